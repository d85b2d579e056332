"""Reports of stage 3: written by the language model, compared with each patient's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.reports.review import ReportReview, review_report
from medgemma_clinical.data.small_cells import any_small
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
    dataset: TrajectoryDataset, texts: dict[int, str], predictions: Predictions, fewest: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Judge reports, by position, by their rows.

    Args:
        dataset: of the rows.
        texts: the reports by position.
        predictions: of the rows.
        fewest: patients of the smallest cell that is shown.

    Returns:
        A line for each report: id, text, target, verdict, probability, and its ``ReportReview``.
        And the figures of all, see ``report_figures``.
    """
    lines, reviews = [], []
    for i, probability in zip(predictions.rows.tolist(), predictions.probability, strict=True):
        review = review_report(dataset, i, texts[i])
        reviews.append(review)
        lines.append(
            {
                "id": str(dataset.ids[i]),
                "text": texts[i],
                "target": dataset.report(i),
                "verdict": review.score.verdict,
                "probability": float(probability),
                "parses": review.score.parses,
                "quality": review.quality,
                "abnormal": review.abnormal,
                "named": review.named,
                "trends": review.trends,
                "right_trends": review.right_trends,
                "invented": review.invented,
            }
        )
    return lines, report_figures(reviews, dataset.groups[predictions.rows], fewest)


def report_figures(
    reviews: Sequence[ReportReview], groups: NDArray[Any], fewest: int
) -> dict[str, Any]:
    """Return the figures of n reports as they stand in ``metrics.json``.

    Number of reports, share of the expected form; share of the stated numbers that are the
    patient's own, their number; number of abnormal values, the shares of them that the reports
    and the true reports name; share of the trends that are right; number of inventions, and share
    of the reports with any. Figures of abnormal values are None without any, and where fewer than
    ``fewest`` patients have, or lack, one; those of trends likewise.
    """

    def total(name: str) -> int:
        return int(sum(getattr(review, name) for review in reviews))

    def share(name: str, of: str) -> float | None:
        having = np.array([getattr(review, of) > 0 for review in reviews])
        hidden = any_small(having.astype(np.int64), groups, 2, fewest)
        return None if hidden or not having.any() else total(name) / total(of)

    stated = sum(review.score.stated for review in reviews)
    named = share("named", "abnormal")
    return {
        "reports": len(reviews),
        "parse_share": sum(review.score.parses for review in reviews) / len(reviews),
        "true_number_share": sum(review.score.true for review in reviews) / max(stated, 1),
        "numbers_stated": stated,
        "abnormal_values": None if named is None else total("abnormal"),
        "abnormal_named_share": named,
        "abnormal_nameable_share": share("nameable", "abnormal"),
        "right_trend_share": share("right_trends", "trends"),
        "invented": total("invented"),
        "inventing_share": sum(review.invented > 0 for review in reviews) / len(reviews),
    }
