"""Sharing: a checkpoint's files travel and nothing of a patient; each failure is one line."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants

import medgemma_trainer as trainer
from hub_server import hub_on_this_machine
from language_models import TINY_MODEL
from medgemma_clinical.evaluation.baselines import WORDS
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import (
    columns_of_few,
    find_checkpoint,
    push_model,
    save_model,
    shared_copy,
)
from medgemma_clinical.models import trained_model
from medgemma_clinical.models.checkpoints import BASELINES, TEXT, TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.models.choices import LLM_STAGES
from medgemma_clinical.models.trained_model import load_trained_model
from medgemma_trainer import TrajectoryModel, fit_classification, fit_trajectory
from predicting import MARKER, VALUES
from shared_metrics import run_metrics

PAGE = Path(__file__).parents[2] / "medgemma_clinical" / "docs" / "sharing.md"
ID = "jane/anion-gap"
STAGE_1 = {TRAJECTORY_FILE, BASELINES, "README.md", "model_facts.xml"}
STAGE_2 = {
    *("config.json", "modules.safetensors", "NOTICE", "README.md", "model_facts.xml", BASELINES),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
}
STAGES = {"trajectory": STAGE_1, "classification": STAGE_2}


@pytest.fixture(scope="module")
def models(runs):
    """The model of each stage, finished, with 7 events of 60 in its test part."""
    few = {"metrics": run_metrics(events=7)}
    loaded = {stage: load_trained_model(runs / stage, trainer.BUILDERS) for stage in STAGES}
    for model in loaded.values():
        model.config.update(few)
    return loaded


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_on_this_machine(tmp_path / "cache", monkeypatch) as served:
        yield served


def load(checkpoint, revision=None):
    """Load a copy of a model, which does not know the folder of its base model."""
    path = find_checkpoint(checkpoint, revision)
    return load_trained_model(path, trainer.BUILDERS, model_name=TINY_MODEL)


def refusal(call, *words, **keywords):
    with pytest.raises(InputError) as caught:
        call(*words, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def same_weights(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ what leaves the machine


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_files_of_a_checkpoint_are_sent_and_nothing_of_a_patient(
    stage, runs, models, hub, tmp_path
):
    address = push_model(models[stage], ID)
    assert address.startswith(f"{hub.address}/{ID}/commit/")
    assert hub.repositories[ID].private
    assert hub.files(ID).keys() == STAGES[stage]
    for name, content in hub.files(ID).items():
        (tmp_path / "sent" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sent" / name).write_bytes(content)
    config = load(tmp_path / "sent").config
    sent = hub.received_bytes() + json.dumps(config).encode()
    assert b"AUROC" in sent, "the card is there, so the search can find something"
    vocabulary = models[stage].text.reading.vocabulary
    assert len(vocabulary) > 10
    assert not [word for word in vocabulary if f'"{word}"'.encode() in sent]
    places = str(runs), runs.name, "train.csv", tempfile.gettempdir()
    for mark in (MARKER, *VALUES, *places):
        assert mark.encode() not in sent, mark
    hashes = read_trajectory(runs / TRAJECTORY_FILE).train_patients
    assert len(hashes) > 100
    assert not [each for each in hashes if each.tobytes() in sent]
    for mark in (b"0.42857", b'"value": 0.7'):  # of 7 events neither sensitivity nor AUROC is left
        assert mark not in sent
    assert config["metrics"]["test"]["events"] == "fewer than 11"
    assert "with the event: fewer than 11" in hub.files(ID)["README.md"].decode()
    assert "with the event: fewer than 11" in hub.files(ID)["model_facts.xml"].decode()
    assert f'TrajectoryModel.from_pretrained("{ID}")' in hub.files(ID)["README.md"].decode()


@pytest.mark.parametrize("behind", [10, None])
@pytest.mark.parametrize("stage", STAGES)
def test_few_patients_behind_a_mean_are_refused_unless_allowed(stage, behind, runs, hub, tmp_path):
    """As many as counted; an earlier version counted none."""
    trained = load_trained_model(runs / stage, trainer.BUILDERS)
    trained.config.update(metrics=run_metrics(events=7))
    weights = trained.model.state_dict()
    (name, *_) = (name for name in weights if name.endswith("static_scaler.patients"))
    if behind is None:
        trained.model.load_state_dict({k: x for k, x in weights.items() if k != name})
    else:
        weights[name][0] = behind
    text = refusal(push_model, trained, ID)
    assert trained.config["inputs"]["static"][0] in text
    assert "allow_small_cells=True" in text
    assert not hub.requests
    assert "allow_small_cells=True" in refusal(shared_copy, trained, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    push_model(trained, ID, allow_small_cells=True)
    config = load(ID).config
    assert config["metrics"]["test"]["events"] == 7
    assert "with the event: 7" in hub.files(ID)["README.md"].decode()
    assert "with the event: 7<" in hub.files(ID)["model_facts.xml"].decode()


def numbers_in(content):
    """All numbers of nested lists, tensors and texts."""
    if isinstance(content, torch.Tensor):
        return content.double().flatten().tolist()
    if isinstance(content, dict):
        return [x for part in (list(content), list(content.values())) for x in numbers_in(part)]
    if isinstance(content, list | tuple):
        return [x for part in content for x in numbers_in(part)]
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", str(content))]


def test_no_number_of_a_shared_folder_is_that_of_one_patient_with_many_rows(tmp_path):
    """Such a patient fills a bin of 20 values."""
    rng, rows = np.random.default_rng(0), []
    for i in range(160):
        first, last, age = rng.normal([24, 24, 60], [3, 3, 10])
        rows.append((i, f"{first:.1f} (0h) -> {last:.1f} (5h)", round(age), i % 3 == 0))
    for k in range(45):
        rows.append((999, f"91.37 (0h) -> 91.37 ({5 + k / 100:.2f}h)", 103.25, 0))
    names = ["subject_id", "clinical_trajectory", "static_age", "label_escalation"]
    table = pd.DataFrame(rows, columns=names)
    parts = np.array([*["train"] * 7, "val", "test", "train"])
    table["split"] = parts[table["subject_id"] % 10]
    model = fit_trajectory(table, trajectory_epochs=1)
    model.save_shared(tmp_path / "shared")
    assert columns_of_few(model.trained) == []
    content = torch.load(tmp_path / "shared" / TRAJECTORY_FILE, weights_only=True)
    texts = [(tmp_path / "shared" / x).read_text() for x in ("README.md", "model_facts.xml")]
    texts.append((tmp_path / "shared" / BASELINES).read_text())
    found = numbers_in([content, *texts])
    assert len(found) > 10_000
    assert not [x for x in found for value in (91.37, 103.25) if abs(x - value) < 1e-4]


def test_a_public_repository_is_used_only_where_asked(models, hub):
    push_model(models["trajectory"], "jane/open", private=False)
    assert not hub.repositories["jane/open"].private
    before, seen = hub.repositories["jane/open"].refs["main"], len(hub.requests)
    assert "exists and is public" in refusal(push_model, models["trajectory"], "jane/open")
    assert hub.repositories["jane/open"].refs["main"] == before
    assert not [path for _, path in hub.requests[seen:] if "upload" in path or "commit" in path]


@pytest.mark.slow
def test_a_second_push_replaces_the_model_and_leaves_other_files(models, hub):
    push_model(models["trajectory"], ID)
    others = {"figure.png": b"png", "data/README.md": b"own"}
    repository = hub.repositories[ID]
    repository.commit({**repository.commits[repository.refs["main"]], **others})
    push_model(models["classification"], ID, commit_message="stage 2")
    assert hub.files(ID).keys() == STAGE_2 | others.keys()
    push_model(models["trajectory"], ID)
    for _ in range(2):  # the branch is made once
        push_model(models["classification"], ID, revision="stage-2")
    assert hub.files(ID).keys() == STAGE_1 | others.keys()
    assert hub.files(ID, "stage-2").keys() == STAGE_2 | others.keys()


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize("stage", STAGES)
def test_a_shared_folder_and_a_saved_one_hold_the_model_of_the_run(stage, models, tmp_path):
    for name, write in (("shared", shared_copy), ("saved", save_model)):
        for _ in range(2):  # its own earlier files are replaced
            write(models[stage], tmp_path / "new" / name)
        own = {TEXT} if name == "saved" else set()
        assert files_in(tmp_path / "new" / name) == STAGES[stage] | own
    saved, shared = load(tmp_path / "new" / "saved"), load(tmp_path / "new" / "shared")
    assert same_weights(saved, models[stage])
    assert same_weights(shared, models[stage])
    known = {k: x for k, x in models[stage].config.items() if "sha256" not in k}
    assert {k: x for k, x in saved.config.items() if "sha256" not in k} == known
    assert saved.config["models"].keys() - shared.config["models"].keys() == {WORDS}
    assert saved.text.to_json() == models[stage].text.to_json()
    assert shared.text is None
    for kind in ("series", "static"):
        assert shared.config["case_mix"][kind] == known["case_mix"][kind]
    assert known["case_mix"]["series"]["Serum bicarbonate"]["measured"] == 1
    for copy in (saved, shared):
        assert copy.baselines.to_json() == models[stage].baselines.to_json()
    if stage == "trajectory":
        np.testing.assert_array_equal(saved.train_patients, models[stage].train_patients)
        assert len(shared.train_patients) == 0
    again = tmp_path / "again"
    shared_copy(shared, again)
    for name in STAGES[stage] - {TRAJECTORY_FILE}:
        assert (again / name).read_bytes() == (tmp_path / "new" / "shared" / name).read_bytes()


def test_baselines_of_few_patients_or_of_a_version_that_counted_none_are_not_shared(
    models, tmp_path
):
    trained = models["trajectory"]
    for leaf_patients in (0, 10):
        few = replace(trained, baselines=replace(trained.baselines, leaf_patients=leaf_patients))
        shared_copy(few, tmp_path / "shared")
        assert files_in(tmp_path / "shared") == STAGE_1 - {BASELINES}
        copy = load(tmp_path / "shared")
        assert copy.baselines is None
        assert not {"baselines_sha256", "baseline_inputs", "models"} & copy.config.keys()
    shared_copy(few, tmp_path / "shared", allow_small_cells=True)
    assert BASELINES in files_in(tmp_path / "shared")


@pytest.mark.parametrize("names", [["a.csv"], [TRAJECTORY_FILE], ["README.md", "own.txt"]])
def test_a_folder_with_other_files_is_not_replaced(names, models, tmp_path):
    for name in names:
        (tmp_path / name).write_text("own")
    for folder in (tmp_path, tmp_path / names[0]):
        assert "exists and holds other files" in refusal(save_model, models["trajectory"], folder)
    assert {path.name for path in tmp_path.iterdir()} == {*names}


# ------------------------------------------------------------------ from the hub


@pytest.mark.slow
def test_revisions_load_by_branch_tag_and_commit_also_offline(models, hub, monkeypatch):
    push_model(models["trajectory"], ID)
    repository = hub.repositories[ID]
    repository.refs["v1"] = first = repository.refs["main"]
    push_model(models["classification"], ID)
    files = repository.commits[repository.refs["main"]]
    repository.commit({**files, "own.py": b"raise", "adapter/extra.bin": b"", "config.json.x": b""})
    revisions = (None, "main", "v1", first)
    online = [find_checkpoint(ID, revision) for revision in revisions]
    expected = [STAGE_2, STAGE_2, STAGE_1, STAGE_1]
    assert [files_in(place) for place in online] == expected, "other files are not downloaded"
    for place, stage in zip(online[1:3], ("classification", "trajectory"), strict=True):
        assert same_weights(load(place), models[stage])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(hub.requests)
    assert [find_checkpoint(ID, revision) for revision in revisions] == online
    refusal(find_checkpoint, ID, "v2")
    assert len(hub.requests) == seen


# ------------------------------------------------------------------ failures


def test_what_the_hub_lacks_or_refuses_is_one_line(models, hub):
    assert ID in refusal(load, ID)
    hub.repository(ID).commit({"config.json": b"{}"})
    for revision in (None, "v9"):
        refusal(load, ID, revision)
    assert "hf_wrong" not in refusal(push_model, models["trajectory"], "jane/b", token="hf_wrong")
    assert {*hub.repositories} == {ID}


@pytest.mark.parametrize("name", ["classification", "../run/best", "jane/a--b", "jane/a\nb"])
def test_a_name_that_is_no_id_asks_nobody(name, hub, models):
    refusal(load, name)
    refusal(push_model, models["trajectory"], name)
    assert not hub.requests


def test_a_hub_that_does_not_answer_is_one_line(models, tmp_path, monkeypatch):
    with hub_on_this_machine(tmp_path / "cache", monkeypatch):
        pass
    refusal(find_checkpoint, ID, None)
    refusal(push_model, models["trajectory"], ID)


# ------------------------------------------------------------------ from Python


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["trajectory", *LLM_STAGES])
def test_a_model_comes_back_from_a_folder_and_from_the_hub(stage, runs, table, hub, tmp_path):
    rows, saved = table.head(12), tmp_path / "saved"
    model = TrajectoryModel.from_pretrained(runs / stage)
    model.save_pretrained(saved)
    model.push_to_hub(ID, allow_small_cells=True)
    for place in (saved, ID):
        again = TrajectoryModel.from_pretrained(place, model_name=TINY_MODEL)
        np.testing.assert_array_equal(again.predict_proba(rows), model.predict_proba(rows))
        assert again.threshold == model.threshold
        pd.testing.assert_frame_equal(again.results(), model.results())
    for path in saved.rglob("*"):
        assert not path.stat().st_mode & 0o077, path


@pytest.mark.slow
def test_the_snippets_of_the_page_run_as_they_stand(runs, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints_medgemma_dka").symlink_to(runs)
    push, load = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    monkeypatch.setattr(trained_model, "base_folder", lambda *_: TINY_MODEL)  # not on the hub
    exec(push, names)
    repository = hub.repositories["user/name"]
    assert repository.private
    repository.refs["v1"] = repository.refs["main"]
    exec(load, names)
    assert names["model"].stage == "classification"


def test_a_shared_stage_1_is_no_encoder_for_it_does_not_know_its_patients(runs, tmp_path):
    shared = tmp_path / "shared"
    model = TrajectoryModel.from_pretrained(runs / "trajectory")
    model.save_shared(shared, allow_small_cells=True)
    encoder = TrajectoryModel.from_pretrained(shared)
    with pytest.raises(InputError, match="shared copy"):
        fit_classification(runs / "train.csv", encoder=encoder, model_name=TINY_MODEL)
