"""Several processes: two that share each batch must do what one does alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from faults import result_of

ROOT = Path(trainer.__file__).parent
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import medgemma_trainer as trainer
# Each process draws its own dropout: without it the two ways are the same sum.
trainer.INPUT_DROPOUT = trainer.HEAD_DROPOUT = {dropout}
if "DIES" in os.environ and os.environ["RANK"] == os.environ["DIES"]:
    take_step = trainer.take_step
    def die(learner, *rest):
        if learner.average.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        take_step(learner, *rest)
    trainer.take_step = die
sys.exit(trainer.program(sys.argv[1:]))
"""
STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 2",
    "classification": "--mode classification --model_name tiny --epochs 2 --lora_dropout 0 "
    "--gradient_accumulation 2 --gradient_checkpointing",
    "generative": "--mode generative --model_name tiny --epochs 1 --lora_dropout 0",
}


def launch(processes: int, words: list[str], folder: Path, dropout: float = 0.0) -> str:
    """Run the program in so many processes; give what they printed."""
    result = launched(processes, words, folder, dropout)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def launched(
    processes: int, words: list[str], folder: Path, dropout: float, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the program in so many processes, with more in its environment."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), dropout=dropout))
    command = [sys.executable, str(program), *words]
    if processes > 1:
        # What accelerate launch does for several GPUs; for CPUs it would need mpirun.
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [sys.executable, *start, str(processes), str(program), *words]
    # A precision in accelerate's own configuration must not change the model's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**environment, "ACCELERATE_MIXED_PRECISION": "bf16", **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage: str, dka_file: Path, tmp_path: Path) -> None:
    printed = {}
    for processes, batch in ((1, 8), (2, 4)):
        words = ["--data_path", str(dka_file), "--log_file", "none", "--batch_size", str(batch)]
        words += ["--output_dir", str(tmp_path / str(processes)), *STAGES[stage].split()]
        printed[processes] = launch(processes, words, tmp_path)
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
    if stage == "generative":
        reports = [(folder / "generations_test.jsonl").read_text() for folder in (one, two)]
        lines = [[json.loads(line) for line in text.splitlines()] for text in reports]
        for key in ("id", "text", "target", "verdict"):
            assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]


@pytest.mark.parametrize("dies", ["0", "1"])
def test_when_a_process_dies_the_others_end_and_the_run_goes_on(
    dies: str, dka_file: Path, tmp_path: Path
) -> None:
    words = ["--data_path", str(dka_file), "--log_file", "none", "--batch_size", "4"]
    words += ["--trajectory_only", "--trajectory_epochs", "2", "--save_every", "2", "--output_dir"]
    launch(2, [*words, str(tmp_path / "whole")], tmp_path, dropout=0.3)
    began = time.monotonic()
    broken = launched(2, [*words, str(tmp_path / "run")], tmp_path, 0.3, DIES=dies)
    assert time.monotonic() - began < 60
    assert broken.returncode != 0
    told = [line for line in broken.stderr.splitlines() if line.startswith("error: ")]
    assert told
    assert all("another process of this run has ended" in line for line in told)
    launch(2, [*words, str(tmp_path / "run"), "--resume"], tmp_path, dropout=0.3)
    one, two = (result_of(tmp_path / name, "trajectory") for name in ("whole", "run"))
    assert one == two
