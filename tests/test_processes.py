"""Several processes: two that share each batch must do what one does alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from faults import launch, result_of

DIES = """
train_step = trainer.train_step
def die(state, *rest):
    if state.average.steps == 5 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    train_step(state, *rest)
trainer.train_step = die
"""
DRAWS = """
from torch.nn.functional import dropout
from medgemma_clinical.models.trajectory import TrajectoryHead
forward = TrajectoryHead.forward
def waver(head, states, batch):
    return forward(head, dropout(states, 0.3, head.training), batch)
TrajectoryHead.forward = waver
"""
"""Makes stage 1 draw random numbers as it learns, each process its own, as LoRA's dropout does."""
FAILS = """
from medgemma_clinical.models.trajectory_llm import LLMClassifier
def failing(forward):
    trained = 0
    def fail(model, batch):
        nonlocal trained
        output = forward(model, batch)
        trained += model.training
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        bad = last and model.training and trained == 3
        return output._replace(loss=output.loss + float("nan")) if bad else output
    return fail
LLMClassifier.forward = failing(LLMClassifier.forward)
"""
"""Makes the loss of the third batch that trains NaN, in the last process alone, and leaves its
gradient finite."""
STAGES = {
    "classification": "--mode classification --model_name tiny --epochs 2 --lora_dropout 0 "
    "--gradient_accumulation 2 --gradient_checkpointing --members 2",
    "generative": "--mode generative --model_name tiny --epochs 1 --lora_dropout 0",
}


def run(processes: int, words: list[str], folder: Path, before: str = "") -> str:
    """Run the program in so many processes; return what they printed."""
    program = launch(processes, words, folder, before)
    try:
        out, error = program.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for number in folder.glob("pid.*"):  # each has a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number.read_text()), signal.SIGKILL)
        program.kill()
        raise
    assert program.returncode == 0, error[-9000:]  # the cause stands above what the launcher says
    return out


LITTLE_MEMORY = """
import torch
from medgemma_clinical.models.trajectory_llm import LLMClassifier
from medgemma_clinical.training import memory
def rehearse(stage, lengths):
    on_gpu(stage, lengths)
    memory.make_fit(stage, lengths, torch.device("cpu"))
    on = stage.model.body.gradient_checkpointing
    pathlib.Path({folder!r}, "on." + os.environ["RANK"]).write_text(str(on))
on_gpu, memory.rehearse = memory.rehearse, rehearse
forward = LLMClassifier.forward
def little(model, batch):
    if os.environ["RANK"] == "1" and model.training and not model.body.gradient_checkpointing:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(model, batch)
LLMClassifier.forward = little
"""
"""Gives the second process room for a training step with checkpointing alone."""


def shared_words(data: Path, batch: int) -> list[str]:
    words = ["--data_path", str(data), "--batch_size", str(batch)]
    return [*words, "--min_cell", "0", "--log_file", "none"]


@pytest.mark.parametrize(("stage", "before"), [("classification", FAILS), ("generative", "")])
def test_two_processes_equal_one(stage: str, before: str, dka_file: Path, tmp_path: Path) -> None:
    """With ``FAILS`` both leave the step out, as one process does."""
    printed = {}
    for processes, batch in ((1, 8), (2, 4)):
        words = shared_words(dka_file, batch)
        words += ["--output_dir", str(tmp_path / str(processes)), *STAGES[stage].split()]
        printed[processes] = run(processes, words, tmp_path, before)
    one, two = (tmp_path / str(k) / stage for k in (1, 2))
    assert printed[2].count("epoch 1/") == 1, "one of several processes speaks"
    for part, rows in (("val", 16), ("test", 16)):
        tables = [pd.read_csv(folder / f"predictions_{part}.csv") for folder in (one, two)]
        assert len(tables[1]) == rows, "each row counts once"
        assert tables[0]["id"].equals(tables[1]["id"])
        np.testing.assert_allclose(tables[0]["probability"], tables[1]["probability"], atol=2e-5)
    histories = [
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    for alone, shared in zip(*histories, strict=True):
        for figure in ("step", "train_loss", "val_loss", "val_auroc"):
            assert shared[figure] == pytest.approx(alone[figure], abs=1e-4), figure
    skipped = [[row["skipped_steps"] for row in history] for history in histories]
    assert skipped[0] == skipped[1]
    assert sum(skipped[0]) == int(before == FAILS)
    if stage == "generative":
        reports = [(folder / "generations_test.jsonl").read_text() for folder in (one, two)]
        lines = [[json.loads(line) for line in text.splitlines()] for text in reports]
        for key in ("id", "text", "target", "verdict"):
            assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]


def test_processes_switch_checkpointing_on_together(dka_file: Path, tmp_path: Path) -> None:
    words = shared_words(dka_file, 8)
    words += ["--mode", "classification", "--model_name", "tiny", "--epochs", "1"]
    before = LITTLE_MEMORY.format(folder=str(tmp_path))
    printed = run(2, [*words, "--output_dir", str(tmp_path / "run")], tmp_path, before)
    assert [(tmp_path / f"on.{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert printed.count("--gradient_checkpointing is now on") == 1, "one process speaks"


def test_when_a_process_dies_the_other_ends_and_the_run_resumes(
    dka_file: Path, tmp_path: Path
) -> None:
    """The one that writes dies; ``faults.py`` kills either, at any time."""
    words = shared_words(dka_file, 4)
    words += ["--trajectory_only", "--trajectory_epochs", "2", "--save_every", "2", "--output_dir"]
    run(2, [*words, str(tmp_path / "whole")], tmp_path, DRAWS)
    began = time.monotonic()
    broken = launch(2, [*words, str(tmp_path / "run")], tmp_path, DRAWS + DIES)
    error = broken.communicate(timeout=300)[1]
    assert time.monotonic() - began < 120
    assert broken.returncode != 0
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert lines
    # Or the launcher's request to end came first.
    known = ("another process of this run has ended", "interrupted: ")
    assert all(any(each in line for each in known) for line in lines)
    run(2, [*words, str(tmp_path / "run"), "--resume"], tmp_path, DRAWS)
    one, two = (result_of(tmp_path / name, "trajectory") for name in ("whole", "run"))
    assert one == two
