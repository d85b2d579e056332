"""Metrics of the reports that stage 3 writes, compared with each patient's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import bootstrap, with_interval
from medgemma_clinical.evaluation.report_review import ReportReview, review_report

WRITTEN = {
    "reports": ("Reports", "written for the test part"),
    "parse_share": ("Expected form (%)", "of the reports, those of the form of the true ones"),
    "numbers_stated": ("Numbers stated", "in all reports"),
    "true_number_share": ("True numbers (%)", "of these, as in the true report"),
    "right_trend_share": ("Trends right (%)", "of the series over time, their direction"),
    "invented": ("Invented numbers", "neither in the patient's data nor in the true report"),
    "inventing_share": ("Reports with inventions (%)", "of the reports"),
}
"""Name and meaning of each metric."""


def score_reports(
    dataset: TrajectoryDataset, texts: dict[int, str], predictions: Predictions, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the lines of ``generations_test.jsonl`` and the metrics; ``texts`` are by position."""
    lines, reviews = [], []
    for i, probability in zip(predictions.rows.tolist(), predictions.probability, strict=True):
        review = review_report(dataset, i, texts[i])
        reviews.append(review)
        line = {
            "id": str(dataset.ids[i]),
            "text": texts[i],
            "target": dataset.report(i),
            "probability": float(probability),
        }
        lines.append(line | asdict(review))
    groups = dataset.groups[predictions.rows]
    return lines, report_metrics(reviews, predictions.labels, groups, seed)


def compare_words(text: str, target: str) -> list[tuple[str, bool]]:
    """Cut a report into pieces, and say of each whether it differs from the true report."""
    words, true = text.split(), target.split()
    changes = SequenceMatcher(None, true, words, autojunk=False).get_opcodes()
    return [(" ".join(words[i:j]), kind != "equal") for kind, _, _, i, j in changes if i < j]


def report_metrics(
    reviews: Sequence[ReportReview], labels: Array, groups: NDArray[Any], seed: int
) -> dict[str, Any]:
    """Return counts of n reports, and shares with intervals by patient, None where undefined."""

    def column(name: str) -> Array:
        return np.array([getattr(review, name) for review in reviews], dtype=np.float64)

    reports, stated, invented = np.ones(len(reviews)), column("stated"), column("invented")
    ratios = {
        "parse_share": (column("parses"), reports),
        "true_number_share": (column("true"), stated),
        "right_trend_share": (column("right_trends"), column("trends")),
        "inventing_share": ((invented > 0).astype(np.float64), reports),
    }

    def shares(weights: Array) -> dict[Any, Array]:
        with np.errstate(invalid="ignore"):  # of nothing: NaN
            return {name: (weights @ part) / (weights @ of) for name, (part, of) in ratios.items()}

    behind = {name: count_patients(groups, of > 0) for name, (_, of) in ratios.items()}
    table = with_interval(*bootstrap(labels, groups, seed, shares), behind).astype(object)
    return {
        "reports": len(reviews),
        "numbers_stated": int(stated.sum()),
        "invented": int(invented.sum()),
        **{str(name): dict(share) for name, share in table.where(table.notna(), None).iterrows()},
    }
