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

from medgemma_clinical.files import json_hash
from medgemma_clinical.models.language_model import tiny_language_model
from predicting import command, predicted, refused, write_data

FILE = "medgemma_trajectory_best.pt"


def copy_of(runs: Path, stage: str, place: Path) -> Path:
    """Copy the best model of a stage, to be changed."""
    shutil.copy(runs / FILE, place)
    shutil.copytree(runs / stage, place / stage)
    return place / stage


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of a configuration, and make its hash fit."""
    path = folder / "best" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    del config["config_sha256"]
    path.write_text(json.dumps({**config, "config_sha256": json_hash(config)}))


def cut_weights(folder: Path) -> None:
    file = folder / "best" / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_base(folder: Path) -> None:
    change_config(folder, base_model="no/such_model")


def other_data(folder: Path) -> None:
    change_config(folder, dataset="sepsis")


def control(folder: Path) -> None:
    change_config(folder, shuffled=True)


def random_control(folder: Path) -> None:
    change_config(folder, base_weights="random")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_weights, "modules.safetensors is missing or not as it was written"),
        (no_base, "--model_name no/such_model"),
        (other_data, "trained on --dataset sepsis"),
        (control, "a control of --ablation, with soft tokens of other patients"),
        (random_control, "a control of --ablation, with soft tokens of other patients or random"),
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


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_the_weight_of_the_language_model_lies_with_the_weights(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    folder = copy_of(runs, stage, tmp_path)
    data = write_data(table.head(12).drop(columns="label_escalation"), tmp_path / "few.csv")
    logits = []
    for weight in (0.0, 0.5, 1.0):
        change_config(folder, residual_weight=weight)
        risk = predicted(folder, data, tmp_path / f"{weight}.csv")["probability"]
        logits.append(np.log(risk / (1 - risk)))
    np.testing.assert_allclose(logits[1], (logits[0] + logits[2]) / 2, atol=1e-5)
    assert not np.allclose(logits[0], logits[2], atol=1e-4)
    alone = predicted(tmp_path / FILE, data, tmp_path / "stage_1.csv")["probability"]
    np.testing.assert_allclose(logits[0], np.log(alone / (1 - alone)), atol=1e-5)


@pytest.mark.parametrize("stage", ["trajectory", "generative"])
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
