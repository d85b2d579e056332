"""The device of a run, as every process finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRECISIONS = """
import torch
from medgemma_clinical.distributed import processes
print(torch.get_float32_matmul_precision())
processes()
print(torch.get_float32_matmul_precision())
"""


def test_products_in_float32_keep_all_bits_where_a_container_asks_for_fewer() -> None:
    asked = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", PRECISIONS]
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]
