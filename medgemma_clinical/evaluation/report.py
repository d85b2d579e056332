"""report.html: what the figures of a cohort say in words, and the page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medgemma_clinical.evaluation import report_tables
from medgemma_clinical.evaluation.bootstrap import REPLICATES
from medgemma_clinical.evaluation.cohort import FEWEST_PATIENTS, Cohort, CohortFigures
from medgemma_clinical.evaluation.plots import report_images
from medgemma_clinical.evaluation.report_tables import percent
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
    """

    title: str
    outcome: str
    question: dict[str, str]
    data: dict[str, str]
    card: dict[str, str]
    flow: pd.DataFrame | None = None
    split: pd.DataFrame | None = None
    history: list[dict[str, Any]] | None = None
    reports: Mapping[str, float | None] | None = None
    unshown: Sequence[str] = ()
    shift: pd.DataFrame | None = None


@dataclass(frozen=True)
class Verdict:
    """The result in words; ``good`` if nothing in it speaks against the model."""

    good: bool
    sentences: list[str]


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
        The sentences of the verdict.
    """
    verdict = judge(figures, content.outcome)
    text = render(
        "report",
        content=content,
        title=content.title,
        verdict=verdict,
        cards=headline(figures),
        images=report_images(cohort, figures, content.history or []),
        discrimination=report_tables.figure_table(figures, report_tables.DISCRIMINATION),
        calibration=report_tables.figure_table(figures, report_tables.CALIBRATION),
        recalibration=report_tables.recalibration_table(figures),
        at_threshold=report_tables.figure_table(figures, report_tables.AT_THRESHOLD, scale=100),
        baselines=report_tables.baseline_table(figures),
        stages=report_tables.stage_table(figures),
        stage_sentences=report_tables.stage_sentences(figures),
        combined=report_tables.combined_sentence(figures),
        subgroups=report_tables.subgroup_table(figures),
        too_few=report_tables.TOO_FEW,
        fewest=figures.fewest,
        judged=figures.events is not None,
        has_grey=any(group.auroc is None for group in figures.subgroups),
        fewest_patients=FEWEST_PATIENTS,
        written=report_tables.written_figures(content.reports),
        examples=report_tables.example_reports(reports, cohort.labels)
        if list_patients and reports
        else None,
        errors=report_tables.largest_errors(cohort) if list_patients else None,
    )
    write_text(path, text)
    return " ".join(verdict.sentences)


def render(name: str, **content: Any) -> str:
    """Fill the page ``templates/NAME.html.j2``; every value is escaped."""
    return PAGES.get_template(f"{name}.html.j2").render(page_mark=PAGE_MARK, **content) + "\n"


def headline(figures: CohortFigures) -> list[tuple[str, str, str]]:
    """Return the four figures at the top: name, value with interval, what to compare with."""
    known = figures.estimates
    if figures.events is None:
        return []
    return [
        ("AUROC", known["auroc"].text(), "0.5 is chance, 1 is perfect"),
        ("AUPRC", known["auprc"].text(), f"chance is {report_tables.percent(figures.prevalence)}"),
        ("Calibration slope", known["calibration_slope"].text(".2f"), "1 is ideal"),
        ("Brier skill", known["brier_skill"].text(), "0 is no better than the average risk"),
    ]


def judge(figures: CohortFigures, outcome: str) -> Verdict:
    """Put the figures into words: discrimination, gain over the best baseline, calibration."""
    if figures.rarer is None:
        return Verdict(False, [report_tables.few_events_sentence(figures.n, figures.fewest)])
    ranking = _ranking_sentence(figures, outcome)
    if figures.rarer < FEWEST_PATIENTS:
        ranking = (
            f"Only {figures.rarer} of {figures.patients} patients have the rarer outcome: too few "
            f"to judge a model. {ranking}"
        )
    calibrated, calibration = _calibration_sentence(figures)
    best = figures.best_baseline
    better = best is not None and figures.differences[best]["auroc"].above(0)
    good = figures.auroc.above(0.5) and better and calibrated
    return Verdict(good, [ranking, _baseline_sentence(figures), calibration])


def _ranking_sentence(figures: CohortFigures, outcome: str) -> str:
    score = figures.auroc
    if score.above(0.5) and score.value is not None:
        return (
            f"Of two rows, one with the event ({outcome}) and one without, the model gives the row "
            f"with the event the higher risk {percent(score.value)} of the time "
            f"(AUROC {score.text()})."
        )
    if score.below(0.5):
        return f"This model is worse than chance: it ranks rows in reverse (AUROC {score.text()})."
    return (
        f"This model is not shown to be better than chance at telling rows with the event "
        f"({outcome}) from rows without it (AUROC {score.text()}; the interval includes 0.5)."
    )


def _baseline_sentence(figures: CohortFigures) -> str:
    name = figures.best_baseline
    if name is None:
        return "No baseline was scored on these rows, so what the model adds is unknown."
    score, difference = figures.baselines[name]["auroc"], figures.differences[name]["auroc"]
    word = "not shown to be better"
    if difference.above(0) or difference.below(0):
        word = "better" if difference.above(0) else "worse"
    return (
        f"It is {word} than its best baseline, {name} (AUROC {score.text()}): the paired "
        f"difference is {difference.text('+.3f')}."
    )


def _calibration_sentence(figures: CohortFigures) -> tuple[bool, str]:
    """Return whether the risks are calibrated as far as the rows show, and the sentence."""
    slope = figures.estimates["calibration_slope"]
    large = figures.estimates["calibration_in_the_large"]
    few = figures.rarer is None or figures.rarer < FEWEST_PATIENTS
    if few or slope.low is None or large.low is None:
        return False, "These rows cannot show whether the predicted risks are calibrated."
    faults = []
    if slope.below(1):
        faults.append("too extreme (high risks too high, low risks too low)")
    elif slope.above(1):
        faults.append("too close to the average")
    if large.below(0):
        faults.append("too high on average")
    elif large.above(0):
        faults.append("too low on average")
    slope_text = f"calibration slope {slope.text('.2f')}"
    if faults:
        return False, f"Its risks are miscalibrated: {' and '.join(faults)} ({slope_text})."
    return True, f"Its risks agree with the observed shares of events ({slope_text})."
