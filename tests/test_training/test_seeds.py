"""Seeds and kernels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from medgemma_clinical.training.seeds import deterministic_kernels, seed_everything


def test_every_generator_repeats() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]  # noqa: NPY002

    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_kernels_are_on_within_the_block_alone(wanted: bool) -> None:
    memory: Any = torch.utils.deterministic
    with deterministic_kernels(wanted):
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert memory.fill_uninitialized_memory != wanted
    assert not torch.are_deterministic_algorithms_enabled()
    assert memory.fill_uninitialized_memory
    with pytest.raises(ZeroDivisionError), deterministic_kernels(wanted):
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
