"""Prompts as embeddings, soft tokens included, for a program that serves the language model."""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from medgemma_clinical.files import InputError
from medgemma_clinical.inference.scoring import Scores
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.loaders import LengthBatches


@torch.no_grad()
def prompt_embeds(scores: Scores, trained: TrainedModel, batch_size: int) -> list[Tensor]:
    """Embed what the language model reads of scored rows: <bos> [soft tokens] [text].

    Of stage 3 the text ends with the verdict that the decision rule takes, "Outcome: yes.", behind
    which the report goes on; greedy decoding alone would say yes from 0.5 on, whatever the
    threshold. Of stage 2 the text ends where the head reads.

    Args:
        scores: of the rows, by the same model.
        trained: stage 2 or 3, in evaluation mode.
        batch_size: rows a batch.

    Returns:
        For each row (S, D), without padding, in the language model's dtype, on the CPU. They are
        multiplied by sqrt(D) already, as Gemma's ``inputs_embeds`` are.

    Raises:
        InputError: stage 1.
    """
    model, text = trained.model, scores.text
    if not isinstance(model, TrajectoryLLM):
        raise InputError("stage 1 has no language model, and no prompts: name stage 2 or 3")
    if text is None:  # there are no rows
        return []
    lengths = text.lengths()
    verdicts = np.zeros(len(lengths), dtype=bool)
    verdicts[scores.positions] = scores.positive
    embedded: dict[int, Tensor] = {}
    for chosen in LengthBatches(scores.positions, batch_size, lengths, shuffle=False):
        writes = isinstance(model, LLMWriter)
        batch = text.with_verdicts(chosen, verdicts[chosen]) if writes else text(chosen)
        batch = send_to_device(batch, trained.device)
        sequence = model.embed(batch, model.trajectory(batch))
        for row, vectors, mask in zip(chosen, sequence.embeddings, sequence.mask, strict=True):
            embedded[row] = vectors[mask].cpu()
    return [embedded[row] for row in scores.positions.tolist()]
