"""What a run tries before it begins: whether the longest batch fits the GPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgemma_clinical.distributed import default_device, sum_over_processes, to_device
from medgemma_clinical.files import RunFault
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import LengthBatches, batches_of
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

TRIAL_BATCHES = 2
"""Batches of the validation part that are scored before a run begins."""

CUBLAS_FULL = "CUBLAS_STATUS_ALLOC_FAILED"

KEPT_COPIES = 5
"""Of the weights that learn: two moments, the average, the best, what processes exchange."""


def rehearse(stage: Stage, observations: NDArray[np.int64]) -> None:
    """Score two batches and, on a GPU, try the longest one that trains; faults show early.

    Weights, gradients and random generators are afterwards what they were.

    Args:
        stage: its model is moved to the device, and saves memory from here on where it must.
        observations: of each row of the data set, (N,).

    Raises:
        RunFault: the longest batch does not fit the GPU.
    """
    device = default_device()
    evaluate(stage.model.to(device), stage.loaders["val"], device, most_batches=TRIAL_BATCHES)
    if device.type == "cuda":
        make_fit(stage, observations, device)
        torch.cuda.reset_peak_memory_stats()


def make_fit(stage: Stage, observations: NDArray[np.int64], device: torch.device) -> None:
    """Switch gradient checkpointing on where the longest batch does not fit without it.

    Raises:
        RunFault: the batch does not fit.
    """
    loader = stage.loaders["train"]
    batches = batches_of(loader)
    rows = _longest_rows(batches, observations, batches.batch_size)
    assert loader.collate_fn
    batch = loader.collate_fn(rows[batches.process :: batches.n_processes].tolist())
    if _fits(stage, batch, device):
        return
    if stage.save_memory:
        stage.save_memory()
        logger.info("the longest batch does not fit the GPU: --gradient_checkpointing is now on")
        if _fits(stage, batch, device):
            return
    raise RunFault(
        "the longest batch does not fit the GPU: lower --batch_size (in stages 2 and 3 raise "
        "--gradient_accumulation as much), or shorten series or text by --max_len, --series_text "
        "or --max_text_tokens"
    )


def _fits(stage: Stage, batch: Any, device: torch.device) -> bool:
    """Return whether every process passes its batch forward and backward."""
    failed = 0.0
    stage.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _pass_batch(stage, to_device(batch, device))
        except RuntimeError as error:
            # cuBLAS has a message of its own where its workspace does not fit.
            if not isinstance(error, torch.OutOfMemoryError) and CUBLAS_FULL not in str(error):
                raise
            failed = 1.0
    stage.model.zero_grad()
    torch.cuda.empty_cache()
    return not sum_over_processes(failed)[0]


def _pass_batch(stage: Stage, batch: Any) -> None:
    parameters = stage.trainable_parameters().values()
    reserve = [torch.empty_like(p) for p in parameters for _ in range(KEPT_COPIES)]
    stage.model(batch).loss.backward()
    del reserve


def keep_longest(stage: Stage, observations: NDArray[np.int64], steps: int) -> None:
    """Leave only the longest rows to train, for so many optimizer steps.

    Args:
        stage: its training loader is changed.
        observations: of each row of the data set, (N,).
        steps: of the optimizer.
    """
    batches = batches_of(stage.loaders["train"])
    number = steps * stage.accumulate * batches.batch_size
    batches.rows = _longest_rows(batches, observations, number)


def _longest_rows(
    batches: LengthBatches, observations: NDArray[np.int64], number: int
) -> NDArray[np.int64]:
    """Return positions by their tokens, or, without text, observations; longest first."""
    lengths = observations if batches.lengths is None else batches.lengths
    return batches.rows[np.argsort(-lengths[batches.rows], kind="stable")[:number]]
