"""Several processes: two that share each batch must do what one does alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer

ROOT = Path(trainer.__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import medgemma_trainer as trainer
# Each process draws its own dropout: without it the two ways are the same sum.
trainer.INPUT_DROPOUT = trainer.HEAD_DROPOUT = 0.0
sys.exit(trainer.main(sys.argv[1:]))
"""
STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 2",
    "classification": "--mode classification --model_name tiny --epochs 2 --lora_dropout 0 "
    "--gradient_accumulation 2 --gradient_checkpointing",
    "generative": "--mode generative --model_name tiny --epochs 1 --lora_dropout 0",
}


def launch(processes: int, words: list[str], folder: Path) -> str:
    """Run the program in so many processes; give what they printed."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    command = [sys.executable, str(program), *words]
    if processes > 1:
        # What accelerate launch does for several GPUs; for CPUs it would need mpirun.
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [sys.executable, *start, str(processes), str(program), *words]
    # A precision in accelerate's own configuration must not change the model's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


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
