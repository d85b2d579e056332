"""Fit a step into the memory: fewer rows a pass, then gradient checkpointing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce, send_to_device

from medgemma_clinical.distributed import TOO_LONG
from medgemma_clinical.files import RunFault, is_out_of_memory
from medgemma_clinical.models.language_model import set_checkpointing
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.evaluate import outputs
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

KEPT_COPIES = 5
"""Copies of the weights that learn: two moments, average, best, what processes exchange."""

MEMORY_MARGIN = 0.05
"""Share of the memory that a trial leaves free, for NCCL's buffers and fragments."""

RECOMPUTE_TOKENS = 512
"""Smaller passes take longer than gradient checkpointing: each pass unpacks all weights again."""

FULL_ADVICE = (
    "free some, then --resume; of stages 2 and 3 also with a smaller --batch_size, a larger "
    "--gradient_accumulation of the same product, and --gradient_checkpointing"
)


def recompute(stage: Stage) -> None:
    """Compute layers again in the backward pass, from the largest passes on."""
    assert isinstance(stage.model, TrajectoryLLM)
    set_checkpointing(stage.model.llm)
    stage.recomputes, stage.max_tokens = True, None


def reduce_passes(stage: Stage, rows: list[int]) -> None:
    """Reduce the memory of a pass, after these rows did not fit in one; gradients stay the same."""
    tokens = -(-len(rows) // 2) * int(stage.lengths[rows].max())
    is_small = len(rows) == 1 or tokens < RECOMPUTE_TOKENS
    if is_small and isinstance(stage.model, TrajectoryLLM) and not stage.recomputes:
        recompute(stage)
        logger.info("memory: gradient checkpointing is on from now on")
    elif len(rows) > 1:
        stage.max_tokens = tokens
        logger.info("memory: at most %d tokens a pass from now on", stage.max_tokens)
    else:
        raise RunFault(TOO_LONG)


def restore_passes(stage: Stage, passes: Mapping[str, Any]) -> None:
    """Begin with the passes of a stopped run; with a new ``--gradient_checkpointing`` anew."""
    if passes["recomputes"] and not stage.recomputes:
        recompute(stage)
    if passes["recomputes"] == stage.recomputes:
        stage.max_tokens = passes["max_tokens"]


@contextlib.contextmanager
def advised() -> Iterator[None]:
    """Name what ``--resume`` accepts where a pass no longer fits the memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunFault(f"the memory is full: {FULL_ADVICE}") from error


def check_memory(stage: Stage, device: torch.device) -> None:
    """Find how many of the longest rows fit a GPU in one pass; score those of validation.

    Weights, gradients and random generators do not change.
    """
    model = stage.model.to(device)
    if device.type == "cuda":
        # Processes decide together here; in the middle of a step they could not.
        longest = longest_rows(stage, "train", stage.batch_size)
        rows = stage.passes(longest)[0]
        while not _fits(stage, rows, device):
            reduce_passes(stage, rows)
            rows = stage.passes(longest)[0]
    longest = longest_rows(stage, "val", stage.batches["val"].batch_size)
    for _ in outputs(model, [longest] if longest else [], stage.collate):
        pass
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _fits(stage: Stage, rows: list[int], device: torch.device) -> bool:
    """Return whether every process passes such rows forward and backward."""
    failures = 0.0
    train = stage.batches["train"].rows
    shortest = [int(train[stage.lengths[train].argmin()])]
    stage.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            # Its kernels are loaded before the card is full.
            _pass(stage, shortest, device)
            parameters = stage.trainable_parameters().values()
            reserve = [torch.empty_like(p) for p in parameters for _ in range(KEPT_COPIES)]
            if device.type == "cuda":
                size = int(MEMORY_MARGIN * torch.cuda.mem_get_info(device)[1])
                reserve.append(torch.empty(size, dtype=torch.uint8, device=device))
            _pass(stage, rows, device)
            del reserve
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failures = 1.0
    stage.model.zero_grad()
    torch.cuda.empty_cache()
    return not reduce(torch.tensor(failures, device=device), "sum")


def _pass(stage: Stage, rows: list[int], device: torch.device) -> None:
    """Compute the gradients of some rows."""
    stage.model(send_to_device(stage.collate(rows), device)).loss.sum().backward()


def longest_rows(stage: Stage, part: str, number: int) -> list[int]:
    """Return the positions of the longest rows of a part, longest first."""
    rows = stage.batches[part].rows
    positions: list[int] = rows[np.argsort(-stage.lengths[rows], kind="stable")[:number]].tolist()
    return positions
