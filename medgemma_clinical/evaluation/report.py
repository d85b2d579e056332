"""report.html, and the page of a comparison: files that need neither network nor script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medgemma_clinical.evaluation import plots, tables
from medgemma_clinical.evaluation.baselines import MEANINGS
from medgemma_clinical.evaluation.metrics import REPLICATES
from medgemma_clinical.evaluation.metrics_table import (
    Metrics,
    calibration_table,
    decision_curve,
    subgroup_table,
)
from medgemma_clinical.evaluation.suppress import (
    suppress,
    suppress_case_mix,
    suppress_reports,
    suppress_table,
)
from medgemma_clinical.evaluation.verdicts import best_baseline, percent, sentences
from medgemma_clinical.files import atomic, write_text

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
PATIENTS_NOTICE = "This page names patients (--report_patients): do not share it."
INTERVALS = (
    f"95 % percentile intervals of {REPLICATES:,} draws of patients with all their rows; exact "
    "intervals for shares of 0 and 1"
)
MAX_ERRORS = 10


@dataclass(frozen=True)
class ReportContent:
    """What a report says beside the metrics; None and empty leave a part of the page out."""

    title: str
    outcome: str
    question: Mapping[str, str]  # what is predicted, when, from what
    data: Mapping[str, str]
    card: Mapping[str, str]  # about the model; hashes and versions stand last
    threshold: float  # chosen on the validation part
    seed: int  # of the bootstrap
    bands: pd.DataFrame  # subgroups of the judged rows: ordered categories, a column a grouping
    flow: pd.DataFrame | None = None  # columns rule, removed, left
    split: pd.DataFrame | None = None  # a ``split_table``
    history: Sequence[Mapping[str, Any]] | None = None  # as in history.jsonl
    reports: Mapping[str, Any] | None = None  # metrics of ``score_reports``
    case_mix: pd.DataFrame | None = None  # a ``case_mix_table``
    notice: str = ""  # a banner
    first: Sequence[str] = ()  # sentences that the result begins with
    unshown: Sequence[str] = ()  # lines on earlier stages


def render(name: str, **content: Any) -> str:
    """Fill the page ``templates/NAME.html.j2``; every value is escaped."""
    return PAGES.get_template(f"{name}.html.j2").render(**content) + "\n"


def write_report(
    path: Path,
    rows: pd.DataFrame,
    metrics: Metrics,
    content: ReportContent,
    *,
    min_cell: int = 0,
    list_patients: bool = False,
    folder: Path | None = None,
) -> None:
    """Write a report on predictions and their metrics, counts below ``min_cell`` hidden.

    ``list_patients`` names the rows with the largest errors. With a ``folder`` each figure and each
    table is also a file in ``folder/figures``.
    """
    few = metrics.counts["minority_patients"] < min_cell
    shown = Metrics.from_json(suppress(metrics.to_json(), min_cell)) if min_cell else metrics
    reports = suppress_reports(dict(content.reports or {}), min_cell)
    numbers = _numbers(rows, shown, content, min_cell, few)
    with plots.plot_style():
        drawn = {} if few else _draw(rows, shown, numbers)
        if content.history:
            drawn["learning_curve"] = plots.plot_learning(content.history)
        images = {name: plots.to_image(*plot) for name, plot in drawn.items()}
        if folder is not None:
            _write_files(folder / "figures", drawn, images, numbers)
    notices = [content.notice, PATIENTS_NOTICE if list_patients else ""]
    page = render(
        "report",
        title=content.title,
        notice=" ".join(filter(None, notices)),
        min_cell=min_cell,
        content=content,
        first=[*content.first, *filter(None, [tables.written_sentence(reports)])],
        findings=[] if few else sentences(shown),
        few=few,
        metrics=shown,
        numbers=numbers,
        images=images,
        written=tables.written_table(reports),
        errors=_largest_errors(rows, metrics.models[0]) if list_patients else None,
        best=best_baseline(metrics),
        tables=tables,
        threshold=percent(content.threshold),
        models={name: MEANINGS[name] for name in metrics.models if name in MEANINGS},
        intervals=INTERVALS,
    )
    write_text(path, page)


def _numbers(
    rows: pd.DataFrame, shown: Metrics, content: ReportContent, min_cell: int, few: bool
) -> dict[str, pd.DataFrame]:
    """Return the tables of a report by the names of their files, small counts hidden."""
    known: dict[str, pd.DataFrame] = {}
    if not few:
        model, seed = shown.models[0], content.seed
        groups = subgroup_table(rows, model, content.bands, seed)
        groups["prevalence"] = groups["events"] / groups["n"]
        known["metrics"] = shown.table.reset_index()
        known["models"] = tables.model_cells(shown)
        known["subgroups"] = suppress_table(groups, min_cell, by="group")
        known["calibration"] = calibration_table(rows, model, seed)
        known["decision_curve"] = decision_curve(rows, _compared(shown), seed).reset_index()
    if content.split is not None:
        split = suppress_table(content.split, min_cell)
        known["split"] = split.drop(columns="minority_patients")
    if content.flow is not None:
        known["flow"] = suppress_table(content.flow[["rule", "removed", "left"]], min_cell)
    if content.case_mix is not None:
        mixes = [dict(mix.dropna()) for _, mix in content.case_mix.items()]
        shared = [suppress_case_mix(mix, min_cell, hide_events=few) for mix in mixes]
        known["case_mix"] = tables.case_mix_cells(*shared)
    return known


def _compared(metrics: Metrics) -> list[str]:
    """Return the models of the curves: the first, and the best baseline where there is one."""
    return [metrics.models[0], *filter(None, [best_baseline(metrics)])]


def _draw(
    rows: pd.DataFrame, shown: Metrics, numbers: dict[str, pd.DataFrame]
) -> dict[str, plots.Plot]:
    """Draw the figures of the model."""
    names = _compared(shown)
    labels, risks = rows["label"].to_numpy(float), [rows[name].to_numpy(float) for name in names]
    value = shown.of(names[0])["value"]
    point = 1 - value["specificity"], value["sensitivity"]
    curve = numbers["decision_curve"].set_index("threshold")
    return {
        "roc": plots.plot_roc(labels, risks, point),
        "precision_recall": plots.plot_precision_recall(labels, risks),
        "calibration": plots.plot_calibration(numbers["calibration"], risks[0]),
        "risk_distribution": plots.plot_risks(labels, risks[0]),
        "decision_curve": plots.plot_decision_curve(curve, names),
    }


def _write_files(
    folder: Path,
    drawn: Mapping[str, plots.Plot],
    images: Mapping[str, plots.Image],
    numbers: Mapping[str, pd.DataFrame],
) -> None:
    """Write each figure as SVG and PDF, each table as CSV."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        for name, (figure, _) in drawn.items():
            (temporary / f"{name}.svg").write_bytes(images[name].svg)
            figure.savefig(temporary / f"{name}.pdf", metadata={"CreationDate": None})
        for name, table in numbers.items():
            table.to_csv(temporary / f"{name}.csv", index=False)


def _largest_errors(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """Return the rows whose risk is farthest from the label."""
    error = (rows["label"] - rows[model]).abs()
    worst = rows.loc[error.sort_values(ascending=False, kind="stable").index[:MAX_ERRORS]]
    return pd.DataFrame(
        {
            "Row": worst["id"].astype(str),
            "Outcome": worst["label"].map({1: "event", 0: "no event"}),
            "Risk": worst[model].map(percent),
        }
    )


def write_comparison(
    path: Path,
    metrics: Metrics,
    *,
    title: str,
    sentences: Sequence[str],
    warnings: Sequence[str] = (),
    card: Mapping[str, str],
    models: Mapping[str, str],
    notice: str = "",
    cost: pd.DataFrame | None = None,
    splits: pd.DataFrame | None = None,
) -> None:
    """Write the page of several models side by side.

    ``warnings`` and ``sentences`` stand first; ``models`` says what the models are, by name,
    ``card`` how they were compared; ``cost`` is that of ``model_table``; ``splits`` has a line of
    text a split.
    """
    with plots.plot_style():
        image = plots.to_image(*plots.plot_forest(metrics))
    page = render(
        "comparison",
        title=title,
        notice=notice,
        min_cell=0,
        warnings=warnings,
        sentences=sentences,
        counts=tables.counts_text(metrics.counts["n"], metrics.counts["events"]),
        reference=metrics.models[0],
        table_of_models=tables.model_cells(metrics, cost),
        splits=splits,
        image=image,
        models=models,
        card={**card, "Intervals": INTERVALS},
    )
    write_text(path, page)
