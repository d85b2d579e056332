"""Prompts as embeddings, soft tokens included, for a program that serves the language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import to_device
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.scoring import compute_logits
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.loaders import LengthBatches


@torch.no_grad()
def prompt_embeds(
    trained: TrainedModel,
    dataset: TrajectoryDataset,
    indices: Sequence[int],
    batch_size: int = 32,
) -> list[Tensor]:
    """Embed what the language model reads of some rows: <bos> [soft tokens] [text].

    Of stage 3 the text ends with the verdict that the decision rule takes, "Outcome: yes.", behind
    which the report goes on; greedy decoding alone would say yes from 0.5 on, whatever the
    threshold. Of stage 2 the text ends where the head reads.

    Args:
        trained: stage 2 or 3, in evaluation mode.
        dataset: of the rows.
        indices: their positions.
        batch_size: rows a batch.

    Returns:
        For each index (S, D), without padding, in the language model's dtype, on the CPU. They are
        multiplied by sqrt(D) already, as Gemma's ``inputs_embeds`` are.

    Raises:
        InputError: stage 1, or a row cannot be scored: a gap or a text is too long, or the score
            is not finite.
    """
    model = trained.model
    if not isinstance(model, TrajectoryLLM) or trained.tokenizer is None:
        raise InputError("stage 1 has no language model, and no prompts: name stage 2 or 3")
    rows = dataset.subset(np.asarray(indices)).with_inputs(**trained.config["inputs"])
    if model.stage1 is not None:
        longest = model.stage1.encoder.longest_gap_hours
        problem = f"more than {longest:g} h pass without an observation"
        check_rows(rows.longest_gaps() > longest, problem)
    most = trained.config["max_text_tokens"]
    text = TextCollator(
        rows,
        trained.tokenizer,
        trained.prompts,
        answers=False,
        most_tokens=most,
        refuse_long=False,
    )
    too_long = np.isin(np.arange(len(rows)), text.too_long)
    check_rows(too_long, f"its text is longer than {most} tokens")
    lengths = text.lengths()
    batches = list(LengthBatches(np.arange(len(rows)), batch_size, lengths, shuffle=False))
    writes, verdicts = isinstance(model, LLMWriter), np.zeros(len(rows), dtype=bool)
    if writes:
        logit = compute_logits(model, text, batches, len(rows))
        check_rows(~np.isfinite(logit), "no finite score: its values are too extreme")
        verdicts = trained.rule.probability(logit) >= trained.rule.threshold
    embedded: dict[int, Tensor] = {}
    for chosen in batches:
        batch = text.with_verdicts(chosen, verdicts[chosen]) if writes else text(chosen)
        batch = to_device(batch, trained.device)
        sequence = model.embed(batch, model.trajectory(batch))
        for row, vectors, mask in zip(chosen, sequence.embeddings, sequence.mask, strict=True):
            embedded[row] = vectors[mask].cpu()
    return [embedded[row] for row in range(len(rows))]


def check_rows(bad: NDArray[np.bool_], problem: str) -> None:
    """Raise an ``InputError`` on the first row that ``bad`` (n,) marks, counted from 0."""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"row {row} of those given: {problem}: leave the row out")
