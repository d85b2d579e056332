"""Random numbers and kernels that repeat."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator that an initialisation or a dropout may draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries beneath draw from it)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Let torch use only kernels that repeat to the last bit; those of the CPU all do.

    Source: PyTorch's notes on reproducibility.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Filling all new memory takes time; it only shows where memory is read before it is written.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before)
