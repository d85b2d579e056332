"""Which device a run takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medgemma_trainer as trainer
from medgemma_clinical import distributed
from medgemma_clinical.commands import demo
from medgemma_clinical.distributed import check_gpu
from medgemma_clinical.files import InputError

ROOT = Path(__file__).parent.parent
PRECISIONS = """
import torch
from medgemma_clinical.distributed import processes
print(torch.get_float32_matmul_precision())
processes()
print(torch.get_float32_matmul_precision())
"""


@pytest.fixture
def unusable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch for CUDA on a machine with a GPU that it cannot use; returns the GPU's file."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "GPUS", str(tmp_path / "nvidia[0-9]*"))
    (tmp_path / "nvidia3").touch()
    return tmp_path / "nvidia3"


@pytest.mark.usefixtures("unusable_gpu")
def test_the_cpu_of_a_gpu_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"a newer driver .*whl/cu126.*CUDA_VISIBLE_DEVICES="):
        check_gpu()


def test_the_cpu_is_right_where_there_is_no_gpu_or_none_is_wanted(
    unusable_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)  # torch for CPUs
        check_gpu()
    unusable_gpu.unlink()
    check_gpu()


@pytest.mark.usefixtures("unusable_gpu")
@pytest.mark.parametrize(
    "words",
    [
        "--trajectory_only",
        "--dry_run",
        "--ablation",
        "--seeds 2",
        "--predict --checkpoint x --predictions y.csv --data_path z.csv",
    ],
)
def test_every_command_that_computes_refuses(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot use this machine's NVIDIA GPU" in error


@pytest.mark.usefixtures("unusable_gpu")
def test_what_needs_no_gpu_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: 0)
    assert trainer.main(["--demo"]) == 0
    assert trainer.main(["--compare", str(tmp_path)]) == 2
    assert "NVIDIA" not in capsys.readouterr().err


def test_products_in_float32_keep_all_bits_where_a_container_asks_for_fewer() -> None:
    asked = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", PRECISIONS]
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]
