"""Checkpoints made to do harm: refused in one line, nothing run, nothing written elsewhere."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE

HUGE = 10**9
HEADER = struct.pack("<Q", 2 * 2**30) + b"{" + b" " * 1000
"""The beginning of a safetensors file that claims a header of 2 GiB."""


class Code:
    """Runs when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run of stages 1 and 2."""
    place = tmp_path_factory.mktemp("made")
    data = place / "patients.csv"
    pd.read_csv(SAMPLE, nrows=60).to_csv(data, index=False)
    shutil.copy(SAMPLE.with_suffix(".json"), place / "patients.json")
    words = ["--data_path", str(data), "--output_dir", str(place), "--log_file", "none"]
    assert trainer.main(["--trajectory_only", "--trajectory_epochs", "1", *words]) == 0
    words += ["--model_name", "tiny", "--epochs", "1"]
    assert trainer.main(["--mode", "classification", *words]) == 0
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def refused(run: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Predict with a checkpoint; give the one line that refuses it."""
    before = {p: p.lstat().st_mtime_ns for p in run.parent.rglob("*")}
    out = run.parent / "out.csv"
    capsys.readouterr()
    words = ["--predict", "--checkpoint", str(checkpoint), "--data_path", str(run / "patients.csv")]
    assert trainer.main([*words, "--predictions", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {p: p.lstat().st_mtime_ns for p in run.parent.rglob("*")} == before
    return error


# --------------------------------------------------------------------------- code


@pytest.mark.parametrize("place", ["top", "config", "encoder", "head", "format", "plain pickle"])
def test_code_in_a_stage_1_file_does_not_run(
    place: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, code = run / trainer.TRAJECTORY_FILE, Code(run / "ran")
    content = torch.load(file, weights_only=True)
    if place == "plain pickle":
        file.write_bytes(pickle.dumps(code))
    elif place == "top":
        torch.save({**content, "more": code}, file)
    elif place == "format":
        torch.save({**content, "format": code}, file)
    else:
        torch.save({**content, place: {**content[place], "more": code}}, file)
    assert "not a stage 1 checkpoint" in refused(run, file, capsys)
    assert not (run / "ran").exists()


@pytest.mark.parametrize(
    "name", ["modules.safetensors", trainer.ADAPTER_WEIGHTS, "adapter/adapter_model.bin"]
)
def test_code_in_a_winner_does_not_run(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    (best / name).write_bytes(pickle.dumps({"weights": Code(run / "ran")}))
    if name.endswith(".bin"):
        (best / trainer.ADAPTER_WEIGHTS).unlink()
    assert "damaged" in refused(run, run / "classification", capsys)
    reseal(best)  # whoever means harm can count checksums too
    assert "damaged" in refused(run, run / "classification", capsys)
    assert not (run / "ran").exists()


def test_code_in_a_state_does_not_run(run: Path, tmp_path: Path) -> None:
    content = pickle.dumps(Code(run / "ran"))
    digest = trainer.hashlib.sha256(content).hexdigest()
    path = tmp_path / f"00000001-{digest}.safetensors"
    path.write_bytes(content)
    with pytest.raises(trainer.InputError, match="not a state of training"):
        trainer.read_state(path)
    assert not (run / "ran").exists()


def reseal(best: Path) -> None:
    """Give a changed winner the checksums of its files as they are."""
    path = best / "config.json"
    facts = json.loads(path.read_text())
    path.unlink()
    rest = {key: facts[key] for key in facts if key not in ("files_sha256", "facts_sha256")}
    path.write_text(json.dumps(trainer.seal(rest, best)))


# --------------------------------------------------------------------------- size


def test_an_archive_that_unfolds_to_something_huge_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / trainer.TRAJECTORY_FILE
    small = run / "small.zip"
    with (
        zipfile.ZipFile(file) as whole,
        zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
        packed.writestr("archive/data/99", bytes(2**28))
    assert small.stat().st_size < 2**20
    small.replace(file)
    assert "not a stage 1 checkpoint, or damaged" in refused(run, file, capsys)


@pytest.mark.parametrize("name", ["modules.safetensors", trainer.ADAPTER_WEIGHTS])
def test_a_header_of_2_gib_is_refused(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    (best / name).write_bytes(HEADER)
    reseal(best)
    assert "damaged" in refused(run, run / "classification", capsys)


def test_a_state_with_a_header_of_2_gib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"00000001-{trainer.hashlib.sha256(HEADER).hexdigest()}.safetensors"
    path.write_bytes(HEADER)
    with pytest.raises(trainer.InputError, match="not a state of training"):
        trainer.read_state(path)


def wide_encoder(best: Path) -> None:
    path = best / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_dim": HUGE}))


def wide_adapter(best: Path) -> None:
    path = best / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": HUGE}))


@pytest.mark.parametrize("change", [wide_encoder, wide_adapter])
def test_a_size_that_its_weights_do_not_have_is_refused_before_memory_is_given(
    change: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    change(best)
    reseal(best)
    assert "its weights do not fit" in refused(run, run / "classification", capsys)


def test_a_stage_1_file_of_another_size_is_refused_before_memory_is_given(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / trainer.TRAJECTORY_FILE
    content = torch.load(file, weights_only=True)
    torch.save({**content, "config": {**content["config"], "hidden_dim": HUGE}}, file)
    assert "its weights do not fit" in refused(run, file, capsys)
    data = ["--data_path", str(run / "patients.csv"), "--model_name", "tiny", "--dry_run"]
    assert trainer.main(["--ode_checkpoint", str(file), *data]) == 2
    assert "not a whole stage 1 checkpoint" in capsys.readouterr().err


# --------------------------------------------------------------------------- places


def test_names_that_lead_out_of_the_folder_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    outside = run / "classification" / "outside"
    outside.write_text("secret")
    path = best / "config.json"
    facts = json.loads(path.read_text())
    facts["files_sha256"]["../outside"] = trainer.file_hash(outside)
    path.write_text(json.dumps({**facts, "facts_sha256": trainer.facts_hash(facts)}))
    assert "other files than were written" in refused(run, run / "classification", capsys)


def test_a_link_in_place_of_a_file_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    elsewhere = run / "elsewhere"
    (best / "modules.safetensors").rename(elsewhere)
    (best / "modules.safetensors").symlink_to(elsewhere)
    reseal(best)
    assert "modules.safetensors is not as it was written" in refused(
        run, run / "classification", capsys
    )


def test_a_link_in_the_way_of_a_result_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    for name in ("result.json", f".result.json{trainer.PARTIAL}"):
        (tmp_path / name).symlink_to(target)
    trainer.write_text(tmp_path / "result.json", "new")
    assert target.read_text() == "kept"
    assert (tmp_path / "result.json").read_text() == "new"
    assert not (tmp_path / "result.json").is_symlink()


def test_an_adapter_names_no_place_to_load_from(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = run / "classification" / "best"
    path = best / "adapter" / "adapter_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "base_model_name_or_path": "evil/model"}))
    reseal(best)
    out = run / "out.csv"
    words = ["--predict", "--checkpoint", str(run / "classification"), "--predictions", str(out)]
    assert trainer.main([*words, "--data_path", str(run / "patients.csv")]) == 0
    assert "evil" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", [trainer.TRAJECTORY_FILE, "best"])
def test_any_bit_that_is_turned_is_noticed(name: str, run: Path) -> None:
    """Of all files of a winner, at places spread over each."""
    place = run / name if name != "best" else run / "classification" / "best"
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    whole = trainer.winner_facts(place if place.is_file() else run / "classification")
    for file in files:
        content = file.read_bytes()
        for k in range(40):
            at = k * (len(content) - 1) // 39
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << k % 8]) + content[at + 1 :])
            try:  # padding of an archive may be anything
                same = trainer.winner_facts(place if place.is_file() else run / "classification")
            except trainer.InputError:
                continue
            assert same == whole
            assert place.is_file(), file
        file.write_bytes(content)
