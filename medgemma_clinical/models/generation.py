"""Reports that stage 3 writes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from medgemma_clinical.distributed import compute_batches
from medgemma_clinical.models.language_model import cache_width
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter

ROWS_AT_ONCE = (64, 512)
"""Fewest and most reports that a GPU writes at a time; a token of 64 takes it as long as of one."""

CPU_ROWS = 16

PASS_NUMBERS = 30
"""Numbers, times the width, of a prompt token while it is read, beside its keys and values."""


def rows_at_once(model: LLMWriter, collate: TextCollator, max_tokens: int) -> int:
    """Return how many reports of ``max_tokens`` are written at a time."""
    device, config = next(model.parameters()).device, model.llm.config
    if device.type != "cuda":
        return CPU_ROWS
    cached = cache_width(config)  # keys and values
    token_bytes = model.llm.dtype.itemsize * (cached + PASS_NUMBERS * config.hidden_size)
    tokens = int(collate.lengths().max(initial=0)) + model.tokens + max_tokens
    # What torch keeps cached is free for it, and used for the driver.
    cache = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free_bytes = 0.8 * (torch.cuda.mem_get_info(device)[0] + cache)
    min_rows, max_rows = ROWS_AT_ONCE
    return max(min_rows, min(max_rows, int(free_bytes / (tokens * token_bytes))))


def write_reports(
    model: LLMWriter,
    collate: TextCollator,
    batches: Iterable[list[int]],
    verdicts: NDArray[np.bool_],
    max_tokens: int,
) -> dict[int, str]:
    """Write a report behind each verdict, (N,) by position; return reports by position."""
    device = next(model.parameters()).device
    texts: dict[int, str] = {}

    def write(rows: list[int]) -> list[list[int]]:
        prompts = send_to_device(collate.with_verdicts(rows, verdicts[np.asarray(rows)]), device)
        return model.write(prompts, max_tokens, collate.eos, collate.pad).tolist()

    for rows, answers in compute_batches(batches, write):
        # The model continues the verdict's word: report and prediction never disagree.
        heads = [collate.stem + collate.words[int(verdicts[row])] for row in rows]
        ids = [head + answer for head, answer in zip(heads, answers, strict=True)]
        decoded = collate.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts.update(zip(rows, decoded, strict=True))
    return texts
