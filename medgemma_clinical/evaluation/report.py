"""report.html: what the figures of a cohort say in words, and the page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medgemma_clinical.evaluation import report_tables
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2, describe_baselines
from medgemma_clinical.evaluation.bootstrap import REPLICATES, Estimate
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures
from medgemma_clinical.evaluation.judgement.sentences import combined_finding, judge
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    CHANCE,
    FEW,
    FEWEST_PATIENTS,
    UNDECIDED,
    WORSE,
    Verdict,
    judge_interval,
)
from medgemma_clinical.evaluation.plots import report_images
from medgemma_clinical.files import write_text

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)

PAGE_MARK = "MedGemma Clinical Fine-Tuning"
"""The generator that the beginning of every page names."""

STAGE_TITLES = {
    "trajectory": "Stage 1, trajectory alone",
    "classification": "Stage 2, classification",
    "generative": "Stage 3, written reports",
}
STAGE_NAMES = {
    "trajectory": STAGE_1,
    "classification": STAGE_2,
    "generative": "stage 3 (written reports)",
}
"""Names of the models among several, and within a sentence."""

PATIENTS_NOTICE = "This page names patients (--report_patients): do not share it."

CARD = {
    "Intended use": (
        "Research on the question above, on data like those of the training part. Not a medical "
        "device, not for clinical use."
    )
}
"""The first lines of each model card."""

INTERVALS = (
    f"95 % percentile intervals of {REPLICATES:,} draws of patients with all their rows; exact "
    "intervals for shares of 0 and 1"
)


@dataclass(frozen=True)
class ReportContent:
    """What a report says beside its figures; names no patient.

    Attributes:
        title: of the page.
        outcome: the event in a few words.
        question: lines of name and text: what is predicted, when, from what.
        data: lines about the data.
        card: lines about the model; hashes and versions stand last.
        flow: from ``flow_table``; None, as below, leaves the section out.
        split: from ``split_table``.
        history: one object an epoch, as in history.jsonl.
        reports: figures of written reports.
        unshown: lines on earlier stages that cannot be set beside.
        shift: from ``shift_table``.
        validation: AUROC of the part on which the model was chosen.
        notice: a banner above the result; empty for none.
        first: what the result in words begins with; empty for nothing.
    """

    title: str
    outcome: str
    question: dict[str, str]
    data: dict[str, str]
    card: dict[str, str]
    flow: pd.DataFrame | None = None
    split: pd.DataFrame | None = None
    history: list[dict[str, Any]] | None = None
    reports: Mapping[str, Any] | None = None
    unshown: Sequence[str] = ()
    shift: pd.DataFrame | None = None
    validation: Estimate | None = None
    notice: str = ""
    first: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure at the top of a page, drawn on a scale.

    Attributes:
        name: of the figure.
        figure: value with interval.
        comparison: what to compare with.
        verdict: on the figure beside what it is compared with; None for a slope whose interval
            includes 1.
        place: of ``low``, ``value``, ``high`` and ``reference`` on the scale, in percent; empty
            without an interval. What lies outside of 0 to 100 is cut off, and an arrow says so.
    """

    name: str
    figure: str
    comparison: str
    verdict: Verdict | None
    place: dict[str, float]


def write_report(
    path: Path,
    cohort: Cohort,
    figures: CohortFigures,
    content: ReportContent,
    *,
    list_patients: bool = False,
    reports: list[dict[str, Any]] | None = None,
) -> str:
    """Write a report: one file that needs neither network nor script.

    Args:
        path: of the page.
        cohort: the rows that are judged.
        figures: of these rows.
        content: what the page says beside them.
        list_patients: add what names patients: the ten largest errors, by id, label and
            probability, and three of ``reports``.
        reports: lines of generations_test.jsonl, in the order of the rows.

    Returns:
        The result in words, a line for each finding.
    """
    judgement = judge(figures, content.outcome, content.validation)
    first = [*filter(None, [content.first, report_tables.written_sentence(content.reports)])]
    notices = [content.notice, PATIENTS_NOTICE if list_patients else ""]
    text = render(
        "report",
        content=content,
        title=content.title,
        notice=" ".join(filter(None, notices)),
        judgement=judgement,
        tiles=headline(figures),
        images=report_images(cohort, figures, content.history or []),
        discrimination=report_tables.figure_table(figures, report_tables.DISCRIMINATION),
        calibration=report_tables.figure_table(figures, report_tables.CALIBRATION),
        calibration_details=report_tables.figure_table(figures, report_tables.CALIBRATION_DETAILS),
        recalibration=report_tables.recalibration_table(figures),
        at_threshold=report_tables.figure_table(figures, report_tables.AT_THRESHOLD, scale=100),
        baselines=report_tables.baseline_table(figures),
        stages=report_tables.stage_table(figures),
        models=describe_baselines(figures.others),
        combined=combined_finding(figures),
        subgroups=report_tables.subgroup_table(figures),
        few=FEW,
        few_subgroups=report_tables.few_subgroups(figures),
        fewest=figures.fewest,
        judged=figures.events is not None,
        fewest_patients=FEWEST_PATIENTS,
        written=report_tables.written_table(content.reports),
        first=first,
        examples=report_tables.example_reports(reports, cohort.labels)
        if list_patients and reports
        else None,
        errors=report_tables.largest_errors(cohort) if list_patients else None,
    )
    write_text(path, text)
    return "\n".join([*first, *judgement.lines()])


def render(name: str, **content: Any) -> str:
    """Fill the page ``templates/NAME.html.j2``; every value is escaped."""
    return PAGES.get_template(f"{name}.html.j2").render(page_mark=PAGE_MARK, **content) + "\n"


def headline(figures: CohortFigures) -> list[Tile]:
    """Return the figures at the top; none where no figure is shown."""
    prevalence = figures.prevalence
    if prevalence is None:
        return []
    known, rarer = figures.estimates, figures.rarer
    chance = f"chance is {prevalence:.2g}, 1 is perfect"
    slope = known["calibration_slope"]
    tiles = [
        _tile("AUROC", known["auroc"], rarer, "0.5 is chance, 1 is perfect", CHANCE, (0, 1)),
        _tile("AUPRC", known["auprc"], rarer, chance, prevalence, (0, 1)),
        _tile("Calibration slope", slope, rarer, "1 is ideal", 1, (0, 2), ".2f"),
        _tile(
            "Brier skill", known["brier_skill"], rarer, "0 is the average risk for all", 0, (-1, 1)
        ),
    ]
    of_slope = {BETTER: WORSE, UNDECIDED: None, WORSE: WORSE, FEW: FEW}  # none is better than 1
    tiles[2] = replace(tiles[2], verdict=of_slope[judge_interval(slope, rarer, 1)])
    return tiles


def _tile(
    name: str,
    score: Estimate,
    rarer: int | None,
    comparison: str,
    reference: float,
    ends: tuple[float, float],
    form: str = ".3f",
) -> Tile:
    """Draw a figure on the scale from one of ``ends`` to the other; more is better."""
    numbers = {"low": score.low, "value": score.value, "high": score.high, "reference": reference}
    start, end = ends
    place = {
        key: 100 * (number - start) / (end - start)
        for key, number in numbers.items()
        if number is not None
    }
    verdict = judge_interval(score, rarer, reference)
    whole = len(place) == len(numbers)
    return Tile(name, score.text(form), comparison, verdict, place if whole else {})
