"""Random numbers and kernels that repeat."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
