"""Reports that stage 3 writes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray

from medgemma_clinical.models.language_model import cache_width
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter

ROWS_AT_ONCE = (64, 512)
"""Fewest and most reports that a GPU writes at a time; a token of 64 takes it as long as of one."""

CPU_ROWS = 16

PASS_BYTES = 150_000
"""Memory of one prompt token while it is read, beside its keys and values; computed for 4B."""


def rows_at_once(model: LLMWriter, collate: TextCollator, max_tokens: int) -> int:
    """Return how many reports of ``max_tokens`` are written at a time."""
    device, config = next(model.parameters()).device, model.llm.config
    if device.type != "cuda":
        return CPU_ROWS
    cache_bytes = 2 * cache_width(config)
    tokens = int(collate.lengths().max(initial=0)) + model.tokens + max_tokens
    free_bytes = 0.8 * torch.cuda.mem_get_info(device)[0]
    min_rows, max_rows = ROWS_AT_ONCE
    return max(min_rows, min(max_rows, int(free_bytes / (tokens * (cache_bytes + PASS_BYTES)))))


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
    for batch in batches:
        waiting = [batch]
        while waiting:
            rows = waiting.pop()
            batch_verdicts = verdicts[np.asarray(rows)]
            prompts = send_to_device(collate.with_verdicts(rows, batch_verdicts), device)
            try:
                answers = model.write(prompts, max_tokens, collate.eos, collate.pad).tolist()
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
                continue
            # The model continues the verdict's word: report and prediction never disagree.
            heads = [collate.stem + collate.words[int(verdict)] for verdict in batch_verdicts]
            ids = [head + answer for head, answer in zip(heads, answers, strict=True)]
            decoded = collate.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts.update(zip(rows, decoded, strict=True))
    return texts
