"""Checkpoints at ``--predict``: damaged ones end in one line, changed decisions take effect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from medgemma_clinical.files import file_hash, json_hash
from medgemma_clinical.models.language_model import tiny_language_model
from predicting import STAGES, command, predicted, refused, write_data

FILE = "medgemma_trajectory_best.pt"


def copy_of(runs: Path, stage: str, place: Path) -> Path:
    """Copy the best model of a stage, to be changed."""
    shutil.copy(runs / FILE, place)
    shutil.copytree(runs / stage, place / stage)
    return place / stage


def change_config(folder: Path, *, without: str = "", **changes: Any) -> None:
    """Change or remove entries of a configuration, and make its hashes fit."""
    best = folder / "best"
    config = {**json.loads((best / "config.json").read_text()), **changes}
    config["files_sha256"] = {name: file_hash(best / name) for name in config["files_sha256"]}
    kept = {k: v for k, v in config.items() if k not in ("config_sha256", without)}
    content = {**kept, "config_sha256": json_hash(kept)}
    (best / "config.json").write_text(json.dumps(content))


def no_place(folder: Path) -> None:
    shutil.rmtree(folder)


def no_best(folder: Path) -> None:
    no_place(folder / "best")


def no_config(folder: Path) -> None:
    (folder / "best" / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "best" / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_adapter(folder: Path) -> None:
    (folder / "best" / "adapter" / "adapter_model.safetensors").unlink()


def other_rank(folder: Path) -> None:
    file = folder / "best" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))
    change_config(folder)


def other_head(folder: Path) -> None:
    file = folder / "best" / "modules.safetensors"
    state = load_file(file)
    state["trajectory_head.other"] = state.pop("trajectory_head.output.bias")
    save_file(state, file)
    change_config(folder)


def no_base(folder: Path) -> None:
    change_config(folder, base_model="no/such_model")


def no_outcome(folder: Path) -> None:
    change_config(folder, without="outcome")


def other_format(folder: Path) -> None:
    change_config(folder, format=3)


def other_data(folder: Path) -> None:
    change_config(folder, dataset="sepsis")


def falling_slope(folder: Path) -> None:
    change_config(folder, decision={"slope": -1.0, "intercept": 0.0, "threshold": 0.5})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_place, "no such file or folder"),
        (no_best, "holds no trained model"),
        (no_config, "damaged"),
        (cut_weights, "modules.safetensors is missing or not as it was written"),
        (no_adapter, "adapter_model.safetensors is missing"),
        (other_rank, "its weights do not fit"),
        (other_head, "its weights do not fit"),
        (no_base, "--model_name no/such_model"),
        (no_outcome, "lacks outcome"),
        (other_format, "checkpoint format 3"),
        (other_data, "data of the kind sepsis"),
        (falling_slope, "damaged: decision rule"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_line(
    damage: Callable[[Path], None],
    expected: str,
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = copy_of(runs, "classification", tmp_path), tmp_path / "out.csv"
    damage(folder)
    assert refused(capsys, command(folder, runs / "train.csv", out), expected, out=out)


def test_a_stage_1_file_that_cannot_be_used_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(runs / FILE, weights_only=True)
    broken, out = tmp_path / "broken.pt", tmp_path / "out.csv"
    words = command(broken, runs / "train.csv", out)
    broken.write_bytes((runs / FILE).read_bytes()[:-500])
    assert refused(capsys, words, "broken.pt", "damaged", out=out)
    torch.save({**content, "format": 2}, broken)
    assert refused(capsys, words, "format 2", out=out)
    del content["head"]["output.bias"]
    torch.save(content, broken)
    assert refused(capsys, words, "damaged", out=out)


def test_files_beside_the_expected_ones_and_links_do_not_matter(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    folder = copy_of(runs, "classification", tmp_path)
    data = write_data(table.head(9).drop(columns="label_escalation"), tmp_path / "few.csv")
    expected = predicted(folder, data, tmp_path / "1.csv")
    best = folder / "best"
    (best / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "blobs").mkdir()
    for path in [*best.glob("*.*"), *best.glob("adapter/*.*")]:  # as a hub's snapshot lies
        moved = tmp_path / "blobs" / path.name
        path.rename(moved)
        path.symlink_to(moved)
    pd.testing.assert_frame_equal(predicted(folder, data, tmp_path / "2.csv"), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_recalibration_and_threshold_lie_with_the_weights(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    folder = copy_of(runs, stage, tmp_path)
    data = write_data(table.head(12).drop(columns="label_escalation"), tmp_path / "few.csv")
    plain = predicted(folder, data, tmp_path / "1.csv")
    threshold = 0.3
    decision = {"slope": 2.0, "intercept": 0.5, "threshold": threshold}
    if stage == "trajectory":
        content = torch.load(tmp_path / FILE, weights_only=True)
        content["config"]["decision"] = decision
        torch.save(content, tmp_path / FILE)
    else:
        change_config(folder, decision=decision)
    out = predicted(folder, data, tmp_path / "2.csv")
    logit = np.log(plain["probability"] / (1 - plain["probability"]))
    expected = 1 / (1 + np.exp(-(0.5 + 2 * logit)))
    assert np.abs(out["probability"] - expected).max() < 1e-6
    assert (out["prediction"] == (out["probability"] >= threshold)).all()
    if stage == "generative":
        assert (out["report"].str.contains(": yes", regex=False) == out["prediction"].eq(1)).all()


def test_the_base_model_may_lie_elsewhere(runs: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    folder = copy_of(runs, "classification", tmp_path)
    data = write_data(table.head(20).drop(columns="label_escalation"), tmp_path / "few.csv")
    expected = predicted(folder, data, tmp_path / "1.csv")
    model, tokenizer = tiny_language_model()
    model.save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "moved")
    change_config(folder, base_model="no/such_model", base_revision="0" * 40)
    moved = ["--model_name", str(tmp_path / "moved"), "--quantization", "none"]
    out = predicted(folder, data, tmp_path / "2.csv", *moved)
    pd.testing.assert_frame_equal(out, expected, rtol=0, atol=1e-6)
    rough = predicted(folder, data, tmp_path / "3.csv", *moved, "--precision", "bf16")
    difference = np.abs(rough["probability"] - expected["probability"])
    assert 1e-6 < difference.max() < 0.05
