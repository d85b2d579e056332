"""The page of single patients: the risk of each row over time, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.patients.explanation import MOST_CHANGES, Explanation
from medgemma_clinical.evaluation.patients.patient_plot import plot_patient
from medgemma_clinical.evaluation.patients.report_marks import ELSEWHERE, FOREIGN, RIGHT, TRUTHS
from medgemma_clinical.evaluation.plots import plot_style, to_image
from medgemma_clinical.evaluation.report import render
from medgemma_clinical.files import write_text

NOTICE = (
    "This page holds patients' data: do not share it. It was written readable by its owner alone."
)
"""The banner of the page."""


@dataclass(frozen=True)
class PatientsContent:
    """What the page says beside its rows.

    Attributes:
        outcome: the event in a few words.
        threshold: the probability from which on a row is an alarm.
        chosen: how the rows were chosen, a sentence.
        kept: what stays when a row is scored without soft prompt, a sentence.
        method: lines of name and text: question, model, versions.
        overlap: that patients of the page trained the model, a sentence; empty where none is found.
        unused: that the language model adds nothing, a sentence; empty where it adds something.
        warning: about the model; empty for none.
    """

    outcome: str
    threshold: float
    chosen: str
    kept: str
    method: dict[str, str]
    overlap: str = ""
    unused: str = ""
    warning: str = ""


def write_patients(path: Path, rows: Sequence[Explanation], content: PatientsContent) -> None:
    """Write the page: one file that needs neither network nor script, and holds patients' data.

    Args:
        path: of the page.
        rows: at least one.
        content: what the page says of all rows.
    """
    title = f"Patients: {content.outcome}"
    page = {
        "cards": [_card(row, content) for row in rows],
        "content": content,
        "threshold": threshold_text(content.threshold),
        "removes_soft_prompt": any(row.without_soft_prompt is not None for row in rows),
        "has_reports": any(row.report is not None for row in rows),
        "right": RIGHT,
        "elsewhere": ELSEWHERE,
        "foreign": FOREIGN,
    }
    write_text(path, render("patients", title=title, notice=NOTICE, **page))


def _card(row: Explanation, content: PatientsContent) -> dict[str, Any]:
    """Return what the template shows of a row."""
    with plot_style():
        image = to_image(*plot_patient(row, content.outcome, content.threshold))
    unit = row.time_unit
    later = row.hours[-1] > row.times[-1]
    truths = [mark.truth for mark in row.report or () if mark.truth]
    return {
        "id": row.id,
        "risk": f"{100 * row.probability:.1f}\N{NO-BREAK SPACE}%",
        "alarm": row.probability >= content.threshold,
        "in_training": row.in_training,
        "observations": len(row.times),
        "last": f"{unit.name} {unit.text(row.times[-1])}",
        "asked": f"{unit.name} {unit.text(row.hours[-1])}" if later else None,
        "image": image,
        "caption": _caption(row),
        "facts": row.facts,
        "changes": row.changes(),
        "cut": len(row.hours) > MOST_CHANGES,
        "effects": row.effects(),
        "without_soft_prompt": _soft_prompt_text(row),
        "report": row.report,
        "problem": row.problem[:1].upper() + row.problem[1:],
        "counts": [(truth, truths.count(truth)) for truth in TRUTHS] if truths else [],
    }


def _caption(row: Explanation) -> str:
    caption = "Each series, and the risk with what was known by then."
    if not np.isnan(row.spreads).all():
        caption += " Each axis is so wide that a change within the usual spread looks small."
    measured = np.flatnonzero(~np.isnan(row.values).all(axis=0))
    return (
        f"{caption} Grey: reference range." if any(row.references[f] for f in measured) else caption
    )


def _soft_prompt_text(row: Explanation) -> str:
    """Return the risk without soft prompt beside the risk; empty where the row has none."""
    if row.without_soft_prompt is None:
        return ""
    without, risk = (f"{100 * p:.1f} %" for p in (row.without_soft_prompt, row.probability))
    return f"Without it the risk is {without} instead of {risk}."
