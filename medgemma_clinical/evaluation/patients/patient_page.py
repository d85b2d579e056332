"""The page of single patients: the risk of each row over time, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_clinical.evaluation.patients.explanation import MOST_CHANGES, Explanation, signed
from medgemma_clinical.evaluation.patients.patient_plot import plot_patient
from medgemma_clinical.evaluation.patients.report_marks import TRUTHS
from medgemma_clinical.evaluation.plots import plot_style, to_image
from medgemma_clinical.evaluation.report import render
from medgemma_clinical.files import write_text

NOTICE = "This page holds patients' data: do not share it. Only its owner can read the file."
"""The banner of the page."""


@dataclass(frozen=True)
class PatientsContent:
    """What the page says beside its rows.

    Attributes:
        outcome: the event in a few words.
        threshold: the probability from which on the event is predicted.
        chosen: how the rows were chosen, a sentence.
        kept: what stays when a row is scored without soft prompt, a sentence.
        warning: about the model; empty for none.
        method: lines of name and text: question, model, versions.
    """

    outcome: str
    threshold: float
    chosen: str
    kept: str
    method: dict[str, str]
    warning: str = ""


def write_patients(path: Path, rows: Sequence[Explanation], content: PatientsContent) -> None:
    """Write the page: one file that needs neither network nor script, and holds patients' data.

    Args:
        path: of the page.
        rows: at least one.
        content: what the page says of all rows.
    """
    title = f"Patients: {content.outcome}"
    cards = [_card(row, content) for row in rows]
    write_text(path, render("patients", title=title, notice=NOTICE, cards=cards, content=content))


def _card(row: Explanation, content: PatientsContent) -> dict[str, Any]:
    """Return what the template shows of a row."""
    with plot_style():
        image = to_image(*plot_patient(row, content.outcome, content.threshold))
    alarm = row.probability >= content.threshold
    unit = row.time_unit
    asked = "Question asked at" if row.hours[-1] > row.times[-1] else "Last observation"
    truths = [mark.truth for mark in row.report or () if mark.truth]
    return {
        "id": row.id,
        "risk": f"{100 * row.probability:.1f}\N{NO-BREAK SPACE}%",
        "lines": {
            f"Risk of {content.outcome}": f"{100 * row.probability:.1f} %",
            "Threshold": f"{100 * content.threshold:.1f} %",
            "Prediction": "1: the event" if alarm else "0: no event",
            asked: f"{unit.name} {unit.text(row.hours[-1])}",
            "Observations": str(len(row.times)),
        },
        "image": image,
        "facts": row.facts,
        "changes": row.changes(),
        "cut": len(row.hours) > MOST_CHANGES,
        "shares": row.shares(),
        "without_soft_prompt": None
        if row.without_soft_prompt is None
        else _soft_prompt_lines(row, row.without_soft_prompt),
        "report": row.report,
        "counts": [(truth, truths.count(truth)) for truth in TRUTHS] if truths else [],
    }


def _soft_prompt_lines(row: Explanation, without: float) -> dict[str, str]:
    change = 100 * (row.probability - without)
    return {
        "With soft prompt": f"{100 * row.probability:.1f} %",
        "Without": f"{100 * without:.1f} %",
        "Difference": f"{signed(change, 1)} points",
    }
