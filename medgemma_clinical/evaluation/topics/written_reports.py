"""Metrics of the reports that stage 3 writes, compared with each patient's numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients, count_text
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import bootstrap, with_interval
from medgemma_clinical.evaluation.report_review import ReportReview, review_report
from medgemma_clinical.evaluation.suppress import hide, splits_off_few
from medgemma_clinical.evaluation.tables import METRIC_COLUMNS
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, json_text, percent, value_text

WRITTEN = {
    "reports": ("Reports", "written for the test part"),
    "right_answer_share": ("Answers right (%)", "of the reports, those whose yes or no came true"),
    "parse_share": ("Expected form (%)", "of the reports, those of the form of the true ones"),
    "numbers_stated": ("Numbers stated", "in all reports"),
    "true_number_share": ("True numbers (%)", "of these, as in the true report"),
    "right_trend_share": ("Trends right (%)", "of the series over time, their direction"),
    "invented": ("Invented numbers", "neither in the patient's data nor in the true report"),
    "inventing_share": ("Reports with inventions (%)", "of the reports"),
}
"""Name and meaning of each metric."""

REPORT_COUNTS: dict[str, tuple[str, ...]] = {
    "reports": ("right_answer_share", "parse_share", "inventing_share", "right_trend_share"),
    "numbers_stated": ("true_number_share",),
    "invented": (),
}
"""Counts of written reports, and the shares of each."""


def written_reports(evaluated: Evaluated, reports: Mapping[str, Any] | None) -> Topic | None:
    """Return the topic of the metrics of ``score_reports``; None where the model writes none."""
    if not reports:
        return None
    cells = written_table(suppress_reports(reports, evaluated.min_cell))
    return Topic(
        "Written reports",
        tables=[Cells(cells, "Each report beside the data and the true report")],
        note="The yes or no of a report is the risk's side of the threshold.",
    )


def score_reports(
    dataset: TrajectoryDataset,
    texts: dict[int, str],  # by position
    rows: NDArray[np.int64],  # (n,)
    risk: Array,  # (n,)
    threshold: float,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the lines of ``generations_test.jsonl`` and the metrics."""
    lines, reviews = [], []
    for i, probability in zip(rows.tolist(), risk, strict=True):
        review = review_report(dataset, i, texts[i])
        reviews.append(review)
        line = {
            "id": str(dataset.ids[i]),
            "text": state_risk(texts[i], dataset.outcome, probability, threshold),
            "target": dataset.report(i),
            "probability": float(probability),
        }
        lines.append(line | asdict(review))
    return lines, report_metrics(reviews, dataset.labels[rows], dataset.groups[rows], seed)


def state_risk(text: str, outcome: str, risk: float, threshold: float) -> str:
    """Return a written report that states risk and threshold behind its yes or no."""
    side, texts = "above" if risk >= threshold else "below", [percent(risk), percent(threshold)]
    if texts[0] == texts[1]:  # more digits tell the side
        texts = [f"{100 * x:.6g}\N{NO-BREAK SPACE}%" for x in (risk, threshold)]
    stated = f" (risk {texts[0]}, {side} the threshold of {texts[1]})"
    return re.sub(rf"^{re.escape(outcome)}: (?:yes|no)\b", lambda found: found[0] + stated, text)


def right_answers(
    rows: pd.DataFrame, model: str, threshold: float, seed: int, min_cell: int
) -> str:
    """Return in a sentence how many reports of scored rows give the right yes or no.

    These are the sides of the threshold; nothing where the share tells a small count.
    """
    patients = rows["patient"].to_numpy(str)
    right = ((rows[model] >= threshold) == rows["label"]).to_numpy(float)
    if splits_off_few(len(np.unique(patients)), right.mean(), min_cell):
        return ""
    drawn = bootstrap(patients, seed, lambda w: {"right": w @ right / w.sum(axis=1)})
    share = value_text(with_interval(*drawn).loc["right"], ".1f", 100)
    return f"Of {len(rows):,} written reports {share} % give the right yes or no."


def example_topic(example: Mapping[str, Any]) -> Topic:
    """Return the topic of a row's prompt, target and text."""
    terms = {
        "What the language model read": example["prompt"],
        "The true report": example["target"],
        "The written report": marked(example["text"], example["target"]),
    }
    note = "Words that differ from the true report are marked."
    return Topic("One patient of the test part, drawn by the seed", terms=terms, note=note)


def marked(text: str, target: str) -> Markup:
    """Return a written report whose words are marked where they differ from the true report."""
    words, true = text.split(), target.split()
    changes = SequenceMatcher(None, true, words, autojunk=False).get_opcodes()
    return Markup(" ").join(
        Markup("{}" if kind == "equal" else "<mark>{}</mark>").format(" ".join(words[i:j]))
        for kind, _, _, i, j in changes
        if i < j
    )


def report_metrics(
    reviews: Sequence[ReportReview], labels: Array, groups: NDArray[Any], seed: int
) -> dict[str, Any]:
    """Return counts of n reports, and shares with intervals by patient, None where undefined."""

    def column(name: str) -> Array:
        return np.array([getattr(review, name) for review in reviews], dtype=np.float64)

    reports, stated, invented = np.ones(len(reviews)), column("stated"), column("invented")
    ratios = {
        "right_answer_share": ((column("verdict") == labels).astype(np.float64), reports),
        "parse_share": (column("parses"), reports),
        "true_number_share": (column("true"), stated),
        "right_trend_share": (column("right_trends"), column("trends")),
        "inventing_share": ((invented > 0).astype(np.float64), reports),
    }

    def shares(weights: Array) -> dict[Any, Array]:
        with np.errstate(invalid="ignore"):  # of nothing: NaN
            return {name: (weights @ part) / (weights @ of) for name, (part, of) in ratios.items()}

    behind = {name: count_patients(groups, of > 0) for name, (_, of) in ratios.items()}
    table = with_interval(*bootstrap(groups, seed, shares), behind).astype(object)
    return {
        "reports": len(reviews),
        "numbers_stated": int(stated.sum()),
        "invented": int(invented.sum()),
        **{str(name): dict(share) for name, share in table.where(table.notna(), None).iterrows()},
    }


def suppress_reports(reports: Mapping[str, Any], min_cell: int) -> dict[str, Any]:
    """Hide small counts of written reports and of what they state, and the shares of these."""
    shown, hidden = dict(reports), set()
    for name, shares in REPORT_COUNTS.items():
        count = reports.get(name)
        if not isinstance(count, int):  # hidden before
            continue
        if is_small := 0 < count < min_cell:
            shown[name] = count_text(count, min_cell)
        for share in shares:
            if is_small or splits_off_few(count, reports[share]["value"] or 0, min_cell):
                hidden.add(share)
    return hide(shown, hidden)


def written_table(reports: Mapping[str, Any]) -> pd.DataFrame:
    """Return what is known of written reports as text, with meanings."""
    lines = []
    for name, (title, meaning) in WRITTEN.items():
        metric = reports[name]
        text = json_text(metric, ".1f", 100) if isinstance(metric, dict) else count_text(metric)
        lines += [(title, text, meaning)] if text != NO_VALUE else []
    return pd.DataFrame(lines, columns=METRIC_COLUMNS)


def written_sentence(reports: Mapping[str, Any] | None) -> str:
    """Return the result of written reports in one sentence; empty without reports."""
    if not reports or not reports["reports"]:
        return ""
    names = ("right_answer_share", "parse_share", "inventing_share")
    if any(reports[name]["value"] is None for name in names):  # hidden
        return ""
    right, expected, inventing = (json_text(reports[name], ".1f", 100) for name in names)
    return (
        f"Of {count_text(reports['reports'])} written reports {right} % give the right yes or no, "
        f"{expected} % have the expected form, and {inventing} % state a number that the patient's "
        "data do not hold."
    )
