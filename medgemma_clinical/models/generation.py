"""Reports of stage 3: written by the language model, compared with each patient's numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import to_device
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE_TOKENS = 16
"""Tokens that a written report may have beyond the longest one of the data."""


def report_tokens(collate: TextCollator) -> int:
    """Return the tokens that a written report may have, for a collator with answers."""
    return max(map(len, collate.answer_ids)) + SPARE_TOKENS


def write_reports(
    model: LLMWriter,
    collate: TextCollator,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[list[int]],
    verdicts: NDArray[np.bool_],
    most_tokens: int,
) -> dict[int, str]:
    """Let the model write reports behind verdicts that the decision rule has taken.

    The verdict's word is part of the text that the model continues, so that a report and the
    prediction beside it never disagree.

    Args:
        model: stage 3's.
        collate: tokenised prompts of N rows.
        tokenizer: of the language model.
        batches: positions of the rows to write, cut into batches.
        verdicts: (N,) bool by position, whether the report says yes; only those written are read.
        most_tokens: of a report.

    Returns:
        The report of each position in ``batches``.
    """
    device = next(model.parameters()).device
    texts: dict[int, str] = {}
    for indices in batches:
        chosen = verdicts[np.asarray(indices)]
        prompts = to_device(collate.with_verdicts(indices, chosen), device)
        written = model.write(prompts, most_tokens, collate.eos, collate.pad).tolist()
        heads = [collate.stem + collate.words[int(verdict)] for verdict in chosen]
        rows = [head + ids for head, ids in zip(heads, written, strict=True)]
        decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        texts.update(zip(indices, decoded, strict=True))
    return texts


def score_reports(
    dataset: TrajectoryDataset, texts: dict[int, str], predictions: Predictions
) -> tuple[str, dict[str, Any]]:
    """Compare reports, by position, with the numbers of their rows.

    Returns:
        The reports as JSON lines (id, text, target, verdict, probability). And the figures: number
        of reports, share of the expected form, share of the stated numbers that are the patient's
        own, their number.
    """
    lines, scores = [], []
    for i, probability in zip(predictions.rows.tolist(), predictions.probability, strict=True):
        score = dataset.score_report(i, texts[i])
        scores.append(score)
        line = {
            "id": str(dataset.ids[i]),
            "text": texts[i],
            "target": dataset.report(i),
            "verdict": score.verdict,
            "probability": float(probability),
        }
        lines.append(json.dumps(line) + "\n")
    stated = sum(score.stated for score in scores)
    return "".join(lines), {
        "reports": len(scores),
        "parse_share": sum(score.parses for score in scores) / len(scores),
        "true_number_share": sum(score.true for score in scores) / max(stated, 1),
        "numbers_stated": stated,
    }
