"""AdamW and its schedule."""

from __future__ import annotations

import math

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medgemma_clinical.training.stage import Stage

WARMUP_STEPS, WARMUP_SHARE = 100, 0.1
"""Warm-up lasts 100 optimizer steps, or a tenth of a shorter run."""


def make_optimizer(stage: Stage) -> AdamW:
    """Return AdamW over the stage's parameter groups."""
    return AdamW(stage.parameter_groups(), fused=True)


def warmup_cosine(step: int, total: int) -> float:
    """Return the factor on the learning rates: linear up, then a cosine down to zero.

    Args:
        step: optimizer steps before.
        total: optimizer steps of the whole training.
    """
    warmup = max(1, min(WARMUP_STEPS, round(WARMUP_SHARE * total)))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_schedule(optimizer: Optimizer, total: int) -> LambdaLR:
    """Return the schedule that ``warmup_cosine`` describes; step it once an optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, total))
