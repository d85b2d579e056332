"""Metrics of the reports that stage 3 writes, compared with each patient's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.reports.review import ReportReview, review_report
from medgemma_clinical.data.small_cells import any_small, count_patients
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.bootstrap import Estimate, Figures, bootstrap, estimate
from medgemma_clinical.evaluation.cohort import DECIMALS, UNKNOWN
from medgemma_clinical.evaluation.predictions import Predictions


def score_reports(
    dataset: TrajectoryDataset,
    texts: dict[int, str],
    predictions: Predictions,
    fewest: int,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Judge reports, by position, by their rows.

    Args:
        dataset: of the rows.
        texts: the reports by position.
        predictions: of the rows.
        fewest: patients of the smallest cell that is shown.
        seed: of the bootstrap.

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
    groups = dataset.groups[predictions.rows]
    return lines, report_figures(reviews, predictions.labels, groups, fewest, seed)


def report_figures(
    reviews: Sequence[ReportReview],
    labels: NDArray[Any],
    groups: NDArray[Any],
    fewest: int,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of n reports as they stand in ``metrics.json``.

    Counts, and shares with their 95 % intervals from the draws of patients of the other figures.
    Shares of nothing are None. So are those of abnormal values, and their number, where fewer than
    ``fewest`` patients have, or lack, one; that of trends likewise.

    Args:
        reviews: of the reports.
        labels: (n,) of 0 and 1, which the draws need.
        groups: (n,) patient of each report.
        fewest: patients of the smallest cell that is shown.
        seed: of the bootstrap.
    """

    def column(name: str) -> NDArray[np.float64]:
        return np.array([attrgetter(name)(review) for review in reviews], dtype=np.float64)

    reports, stated = np.ones(len(reviews)), column("score.stated")
    abnormal, trends, invented = map(column, ("abnormal", "trends", "invented"))
    shares = {
        "parse_share": (column("score.parses"), reports),
        "true_number_share": (column("score.true"), stated),
        "abnormal_named_share": (column("named"), abnormal),
        "abnormal_nameable_share": (column("nameable"), abnormal),
        "right_trend_share": (column("right_trends"), trends),
        "inventing_share": (invented > 0, reports),
    }
    estimates = _estimate_shares(shares, labels, groups, seed)
    for name, (_, of) in shares.items():
        having = (of > 0).astype(np.int64)
        if (of is abnormal or of is trends) and any_small(having, groups, 2, fewest):
            estimates[name] = UNKNOWN
    known = estimates["abnormal_named_share"] != UNKNOWN
    digits = DECIMALS if fewest else None
    return {
        "reports": len(reviews),
        "numbers_stated": int(stated.sum()),
        "abnormal_values": int(abnormal.sum()) if known else None,
        "invented": int(invented.sum()),
        **{name: each.to_json(digits) for name, each in estimates.items()},
    }


def _estimate_shares(
    shares: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    labels: NDArray[Any],
    groups: NDArray[Any],
    seed: int,
) -> dict[str, Estimate]:
    """Return the ratio of two sums over n reports, with its interval, for each name."""

    def ratios(weights: NDArray[np.float64]) -> Figures:
        with np.errstate(invalid="ignore"):  # of nothing: NaN
            return {name: (weights @ part) / (weights @ of) for name, (part, of) in shares.items()}

    values = ratios(np.ones((1, len(labels))))
    replicates = bootstrap(labels, groups, seed, ratios)
    return {
        name: estimate(float(values[name][0]), replicates[name], count_patients(groups, of > 0))
        for name, (_, of) in shares.items()
    }
