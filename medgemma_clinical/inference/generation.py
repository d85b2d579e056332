"""Reports that stage 3 writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import send_to_device

from medgemma_clinical.distributed import compute_batches, show_progress
from medgemma_clinical.models.language_model import cache_width
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.loaders import LengthBatches

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
    text: TextCollator,
    verdicts: Mapping[int, bool],
    max_tokens: int,
    batch_size: int = 1,
    share: tuple[int, int] = (0, 1),
) -> dict[int, str]:
    """Write reports behind verdicts, both by position; ``share`` as in ``LengthBatches``."""
    device = next(model.parameters()).device
    size = max(batch_size, rows_at_once(model, text, max_tokens))
    rows = np.fromiter(verdicts, np.int64)
    batches = LengthBatches(rows, size, text.lengths(), shuffle=False, share=share)
    texts: dict[int, str] = {}

    def write(rows: list[int]) -> list[list[int]]:
        prompts = text.with_verdicts(rows, [verdicts[row] for row in rows])
        written = model.write(send_to_device(prompts, device), max_tokens, text.eos, text.pad)
        return written.tolist()

    bar = show_progress(batches, "writing reports", len(batches))
    for rows_written, answers in compute_batches(bar, write):
        # The model continues the verdict's word: report and prediction never disagree.
        heads = [text.stem + text.words[verdicts[row]] for row in rows_written]
        ids = [head + answer for head, answer in zip(heads, answers, strict=True)]
        decoded = text.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts.update(zip(rows_written, decoded, strict=True))
    return texts
