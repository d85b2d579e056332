"""Fit a step into the memory: fewer rows a pass, then gradient checkpointing."""

from __future__ import annotations

import logging

import numpy as np
import torch
from accelerate.utils import reduce, send_to_device

from medgemma_clinical.files import RunFault
from medgemma_clinical.models.language_model import set_checkpointing
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.evaluate import outputs
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

KEPT_COPIES = 5
"""Copies of the weights that learn: two moments, average, best, what processes exchange."""

MEMORY_MARGIN = 0.05
"""Share of the memory that a trial leaves free, for NCCL's buffers and fragments."""

TOO_LONG = (
    "a single row does not fit the memory: shorten series or text by --max_len, --series_text or "
    "--max_text_tokens, or take --quantization nf4"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a pass did not fit; cuBLAS has a message of its own for its workspace."""
    cublas_failed = "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return cublas_failed or isinstance(error, torch.OutOfMemoryError)


def reduce_passes(stage: Stage, rows: list[int]) -> None:
    """Reduce the rows a pass, after these did not fit in one; gradients stay the same."""
    if len(rows) > 1:
        stage.max_tokens = -(-len(rows) // 2) * int(stage.lengths[rows].max())
        logger.info("memory: at most %d tokens a pass from now on", stage.max_tokens)
    elif isinstance(stage.model, TrajectoryLLM) and not stage.recomputes:
        set_checkpointing(stage.model.llm)
        stage.recomputes, stage.max_tokens = True, None
        logger.info("memory: gradient checkpointing is on from now on")
    else:
        raise RunFault(TOO_LONG)


def check_memory(stage: Stage, device: torch.device) -> None:
    """Find how many of the longest rows fit a GPU in one pass; score those of validation.

    Weights, gradients and random generators do not change.
    """
    model = stage.model.to(device)
    if device.type == "cuda":
        # Processes decide together here; in the middle of a step they could not.
        longest = longest_rows(stage, "train", stage.batch_size)
        while not _fits(stage, rows := stage.passes(longest)[0], device):
            reduce_passes(stage, rows)
    longest = longest_rows(stage, "val", stage.batches["val"].batch_size)
    for _ in outputs(model, stage.passes(longest, len(longest)), stage.collate):
        pass
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _fits(stage: Stage, rows: list[int], device: torch.device) -> bool:
    """Return whether every process passes such rows forward and backward."""
    failures = 0.0
    stage.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            parameters = stage.trainable_parameters().values()
            reserve = [torch.empty_like(p) for p in parameters for _ in range(KEPT_COPIES)]
            if device.type == "cuda":
                size = int(MEMORY_MARGIN * torch.cuda.mem_get_info(device)[1])
                reserve.append(torch.empty(size, dtype=torch.uint8, device=device))
            stage.model(send_to_device(stage.collate(rows), device)).loss.sum().backward()
            del reserve
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failures = 1.0
    stage.model.zero_grad()
    torch.cuda.empty_cache()
    return not reduce(torch.tensor(failures, device=device), "sum")


def longest_rows(stage: Stage, part: str, number: int) -> list[int]:
    """Return the positions of the longest rows of a part, longest first."""
    rows = stage.batches[part].rows
    positions: list[int] = rows[np.argsort(-stage.lengths[rows], kind="stable")[:number]].tolist()
    return positions
