"""Sharing: a checkpoint's files travel and nothing of a patient; each failure is one line."""

import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import constants

import medgemma_trainer as trainer
from conftest import sign_table
from hub_server import hub_on_this_machine
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import (
    download_checkpoint,
    share_checkpoint,
    upload_checkpoint,
)
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_config, read_trajectory
from medgemma_clinical.models.trained_model import load_trained_model
from predicting import MARKER, read_predictions

ID = "jane/anion-gap"
STAGE_1 = {TRAJECTORY_FILE, "README.md"}
STAGE_2 = {
    "config.json",
    "modules.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "NOTICE",
    "README.md",
}
VALUES = ("7.41703", "49.31", "987.654", "777.25")


def marked_table(rows):
    """A table whose ids, contexts and extreme values can be found wherever they turn up."""
    table = sign_table(rows, seed=3)
    table["clinical_trajectory"] += " -> 7.41703 (49.31h)"
    extreme = pd.Series({7: " -> 987.654 (777.25h)"}).reindex(table.index, fill_value="")
    table["clinical_trajectory"] += extreme
    table["subject_id"] = [f"{MARKER}{i}" for i in range(rows)]
    table["clinical_context"] = [
        f"{30 + i % 50}-year-old man, {MARKER}note{i}" for i in range(rows)
    ]
    return table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of stages 1 and 2 on a marked table, in the folder of a person."""
    place = tmp_path_factory.mktemp("jdoe")
    marked_table(300).to_csv(place / "signs.csv", index=False)
    small = ["--data_path", str(place / "signs.csv"), "--output_dir", str(place / "run")]
    small += ["--batch_size", "16", "--epochs", "1", "--trajectory_epochs", "1"]
    assert trainer.main(["--trajectory_only", *small]) == 0
    small += ["--model_name", "tiny", "--ode_checkpoint", str(place / "run" / TRAJECTORY_FILE)]
    assert trainer.main(small) == 0
    return place / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_on_this_machine(tmp_path / "cache", monkeypatch) as served:
        yield served


def predictions(run, checkpoint, out):
    words = ["--predict", "--checkpoint", str(checkpoint), "--predictions", str(out)]
    assert trainer.main([*words, "--data_path", str(run.parent / "signs.csv")]) == 0
    return read_predictions(out)


def refusal(call, *words, **keywords):
    with pytest.raises(InputError) as caught:
        call(*words, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def hold_nothing_of_patients(sent, run):
    assert b"AUROC" in sent, "the card is there, so the search can find something"
    places = str(run.parent), run.parent.name, "signs.csv", tempfile.gettempdir()
    for mark in (MARKER, *VALUES, *places):
        assert mark.encode() not in sent, mark
    hashes = read_trajectory(run / TRAJECTORY_FILE).train_patients
    assert len(hashes) > 200
    assert not [each for each in hashes if each.tobytes() in sent]


# ------------------------------------------------------------------ what leaves the machine


def test_stage_2_uploads_its_files_and_no_others(run, hub, tmp_path):
    folder = Path(shutil.copytree(run / "classification", tmp_path / "classification"))
    for name in ("notes.txt", "predictions_test.csv", "adapter/README.md", "adapter/ids.json"):
        (folder / "best" / name).write_text(f"{MARKER} of a patient")
    for name in ("README.md", "NOTICE"):
        (folder / "best" / name).write_text(f"# {MARKER}, written by hand")
    assert (folder / "predictions_test.csv").exists()
    address = upload_checkpoint(folder, ID)
    assert address.startswith(f"{hub.address}/{ID}/commit/")
    assert hub.files(ID).keys() == STAGE_2
    hold_nothing_of_patients(hub.received_bytes(), run)
    best = run / "classification" / "best"
    for name in STAGE_2 - {"README.md"}:
        assert hub.files(ID)[name] == (best / name).read_bytes(), name


def test_stage_1_is_shared_without_the_hashes_of_its_patients(run, hub, tmp_path):
    upload_checkpoint(run / "trajectory", ID)
    assert hub.files(ID).keys() == STAGE_1
    hold_nothing_of_patients(hub.received_bytes(), run)
    (tmp_path / "sent.pt").write_bytes(hub.files(ID)[TRAJECTORY_FILE])
    sent, own = read_trajectory(tmp_path / "sent.pt"), read_trajectory(run / TRAJECTORY_FILE)
    assert (len(sent.train_patients), len(own.train_patients) > 200) == (0, True)
    assert sent.config == own.config
    assert sent.weights.keys() == own.weights.keys()
    assert all(torch.equal(sent.weights[name], own.weights[name]) for name in own.weights)


def test_a_repository_is_private_unless_asked(run, hub):
    upload_checkpoint(run / "classification", ID)
    upload_checkpoint(run / "classification", "jane/open", private=False)
    assert hub.repositories[ID].private
    assert not hub.repositories["jane/open"].private


def test_nothing_goes_into_a_public_repository_that_should_be_private(run, hub):
    before = hub.repository(ID).refs["main"]
    text = refusal(upload_checkpoint, run / "classification", ID)
    assert text == f"{ID}: exists and is public: make it private, or push with private=False"
    assert hub.repositories[ID].refs["main"] == before
    assert not [path for _, path in hub.requests if "upload" in path or "commit" in path]


def test_a_second_push_replaces_the_model_and_leaves_other_files(run, hub):
    upload_checkpoint(run / TRAJECTORY_FILE, ID)
    others = {"figure.png": b"png", "data/README.md": b"own"}
    repository = hub.repositories[ID]
    repository.commit({**repository.commits[repository.refs["main"]], **others})
    upload_checkpoint(run / "classification", ID, commit_message="stage 2")
    assert hub.files(ID).keys() == STAGE_2 | others.keys()
    upload_checkpoint(run / TRAJECTORY_FILE, ID)
    assert hub.files(ID).keys() == STAGE_1 | others.keys()


def test_a_branch_is_made_where_there_is_none(run, hub):
    upload_checkpoint(run / TRAJECTORY_FILE, ID)
    for _ in range(2):
        upload_checkpoint(run / "classification", ID, revision="stage-2")
    assert hub.files(ID).keys() == STAGE_1
    assert hub.files(ID, "stage-2").keys() == STAGE_2


def test_the_card_on_the_hub_says_how_to_load_the_model(run, hub):
    for place in ("trajectory", "classification"):
        upload_checkpoint(run / place, ID)
        card = hub.files(ID)["README.md"].decode()
        assert f'TrajectoryModel.from_pretrained("{ID}")' in card
        assert f"hf download {ID} --local-dir FOLDER" in card
        assert "| This model | " in card


# ------------------------------------------------------------------ a folder to be passed on


@pytest.mark.parametrize(("place", "files"), [("trajectory", STAGE_1), ("classification", STAGE_2)])
def test_a_shared_folder_predicts_as_the_run(place, files, run, tmp_path):
    expected = predictions(run, run / place, tmp_path / "1.csv")
    for _ in range(2):  # its own earlier files are replaced
        share_checkpoint(run / place, tmp_path / "new" / "shared")
    shared = tmp_path / "new" / "shared"
    found = {str(each.relative_to(shared)) for each in shared.rglob("*") if each.is_file()}
    assert found == files
    pd.testing.assert_frame_equal(predictions(run, shared, tmp_path / "2.csv"), expected)
    share_checkpoint(shared, shared)
    pd.testing.assert_frame_equal(predictions(run, shared, tmp_path / "3.csv"), expected)


@pytest.mark.parametrize("name", ["predictions.csv", TRAJECTORY_FILE])
def test_a_folder_with_other_files_is_not_replaced(name, run, tmp_path):
    (tmp_path / name).write_text("own")
    text = refusal(share_checkpoint, run / "classification", tmp_path)
    assert text == f"{tmp_path}: exists and holds other files: name a new folder"
    assert "exists and" in refusal(share_checkpoint, run / "classification", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_blank_card_of_peft_lies_in_a_run(run):
    cards = list(run.rglob("README.md"))
    assert cards == [run / "classification" / "best" / "README.md"]
    assert "More Information Needed" not in cards[0].read_text()
    assert "| This model | " in cards[0].read_text()


def test_a_damaged_model_is_not_shared(run, hub, tmp_path):
    best = Path(shutil.copytree(run / "classification" / "best", tmp_path / "best"))
    (best / "modules.safetensors").write_bytes(b"")
    assert "modules.safetensors is missing or not as" in refusal(upload_checkpoint, best, ID)
    assert "no such file or folder" in refusal(upload_checkpoint, tmp_path / "nowhere", ID)
    assert not hub.requests


# ------------------------------------------------------------------ from the hub


def test_a_model_that_was_pushed_comes_back(run, hub, tmp_path, capsys):
    for place in ("trajectory", "classification"):
        upload_checkpoint(run / place, ID)
        loaded = download_checkpoint(ID)
        assert loaded.is_relative_to(tmp_path / "cache")
        found = predictions(run, loaded, tmp_path / f"new_{place}.csv")
        expected = predictions(run, run / place, tmp_path / f"{place}.csv")
        pd.testing.assert_frame_equal(found, expected)
    shown = capsys.readouterr().out
    assert "predictions: " in shown
    assert "HTTP Request" not in shown


def test_other_files_of_a_repository_are_not_downloaded(run, hub):
    upload_checkpoint(run / "classification", ID)
    repository = hub.repositories[ID]
    files = repository.commits[repository.refs["main"]]
    repository.commit({**files, "own.py": b"raise", "adapter/extra.bin": b"", "config.json.x": b""})
    folder = download_checkpoint(ID)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == STAGE_2


def test_revisions_load_by_branch_tag_and_commit_also_offline(run, hub, monkeypatch):
    upload_checkpoint(run / "trajectory", ID)
    hub.repositories[ID].refs["v1"] = first = hub.repositories[ID].refs["main"]
    upload_checkpoint(run / "classification", ID)
    revisions = (None, "main", "v1", first)
    online = [download_checkpoint(ID, revision) for revision in revisions]
    assert [place.is_file() for place in online] == [False, False, True, True]
    assert online[2].parent.name == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(hub.requests)
    assert [download_checkpoint(ID, revision) for revision in revisions] == online
    assert "not in the cache of this machine" in refusal(download_checkpoint, ID, "v2")
    assert len(hub.requests) == seen


def test_a_cache_that_another_machine_made_loads_offline(run, tmp_path, monkeypatch):
    """The layout that the hub's library documents: blobs, snapshots of links to them, refs."""
    share_checkpoint(run / "classification", tmp_path / "shared")
    store, commit = tmp_path / "cache" / "models--jane--anion-gap", "c0ffee" + "0" * 34
    snapshot = store / "snapshots" / commit
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    (store / "blobs").mkdir()
    for number, name in enumerate(sorted(STAGE_2)):
        shutil.copy(tmp_path / "shared" / name, store / "blobs" / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(store / "blobs" / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert constants.HF_HUB_OFFLINE, "tests have no network"
    for revision in (None, "main", commit):
        place = download_checkpoint(ID, revision)
        assert place == snapshot
        model = load_trained_model(place, trainer.BUILDERS)
        assert model.config == read_config(run / "classification" / "best")


# ------------------------------------------------------------------ failures


def gated(hub, monkeypatch):
    hub.repository(ID, gated=True)


def private(hub, monkeypatch):
    hub.repository(ID, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")


def foreign(hub, monkeypatch):
    hub.repository(ID).commit({"config.json": b"{}", "model.safetensors": b""})


def offline(hub, monkeypatch):
    hub.repository(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def absent(hub, monkeypatch):
    """No such repository."""


@pytest.mark.parametrize(
    ("state", "revision", "expected"),
    [
        (absent, None, "no such model on the hub, or a private one: check the id, or log in: hf"),
        (private, None, "no such model on the hub, or a private one: check the id, or log in: hf"),
        (gated, None, f"ask for access at https://huggingface.co/{ID}, then log in: hf auth login"),
        (foreign, "v9", "revision v9: no such revision: name a branch, a tag or a commit"),
        (foreign, None, "holds no model of this program: neither modules.safetensors nor medgemma"),
        (offline, None, "not in the cache of this machine, and the hub cannot be reached"),
    ],
)
def test_a_model_that_cannot_be_downloaded_is_one_line(
    state, revision, expected, hub, monkeypatch, capfd
):
    state(hub, monkeypatch)
    text = refusal(download_checkpoint, ID, revision)
    assert text.startswith(ID)
    assert expected in text
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "name",
    ["classification", "a/b/c", "../run/best", "jane/", "jane/a--b", "jane/a\nb", "", "/a/b"],
)
def test_a_name_that_is_no_id_asks_nobody(name, hub, run):
    expected = "no such file or folder here, and not an id of the hub: user/name"
    assert expected in refusal(download_checkpoint, name)
    assert expected in refusal(upload_checkpoint, run / "classification", name)
    assert not hub.requests


def test_an_upload_needs_a_login_with_rights_and_a_network(run, hub, tmp_path, monkeypatch):
    place = run / "classification"
    assert "the hub refused the login: log in" in refusal(upload_checkpoint, place, "foreign/model")
    wrong = refusal(upload_checkpoint, place, ID, token="hf_wrong")
    assert "log in: hf auth login" in wrong
    assert "hf_wrong" not in wrong
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    seen = len(hub.requests)
    none = refusal(upload_checkpoint, place, ID)
    assert none == f"{ID}: not logged in to the hub: log in: hf auth login, or set HF_TOKEN"
    assert len(hub.requests) == seen
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal(upload_checkpoint, place, ID, token="hf_any")
    assert text == f"{ID}: the hub cannot be reached while HF_HUB_OFFLINE is set"
    assert not hub.repositories


def test_a_hub_that_does_not_answer_is_one_line(run, tmp_path, monkeypatch):
    with hub_on_this_machine(tmp_path / "cache", monkeypatch):
        pass
    assert "not in the cache of this machine" in refusal(download_checkpoint, ID)
    assert "the hub did not serve (Conn" in refusal(upload_checkpoint, run / "classification", ID)
