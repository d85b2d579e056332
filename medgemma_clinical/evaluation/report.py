"""report.html, tripod.md and the page of a comparison: they need neither network nor script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.texts import code
from medgemma_clinical.evaluation import plots, tables
from medgemma_clinical.evaluation.baselines import MEANINGS
from medgemma_clinical.evaluation.metrics import REPLICATES
from medgemma_clinical.evaluation.metrics_table import (
    MINORITY_PATIENTS,
    TESTED,
    Metrics,
    calibration_table,
    decision_curve,
    subgroup_table,
)
from medgemma_clinical.evaluation.sites import pool, pooled_sentence, site_table
from medgemma_clinical.evaluation.suppress import (
    suppress,
    suppress_case_mix,
    suppress_reports,
    suppress_table,
    suppress_table_one,
)
from medgemma_clinical.evaluation.table_one import table_one_cells
from medgemma_clinical.evaluation.updating import (
    CHOSEN,
    DIVISIONS,
    METHODS,
    MIN_SLOPE_EVENTS,
    Updates,
)
from medgemma_clinical.evaluation.verdicts import (
    counts_text,
    multiplicity_sentence,
    percent,
    primary_baseline,
    sentences,
)
from medgemma_clinical.evaluation.written_reports import compare_words
from medgemma_clinical.files import atomic, write_text

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
PATIENTS_NOTICE = "This page names patients: do not share it."
INTERVALS = (
    f"95 % percentile intervals of {REPLICATES:,} draws of patients; exact intervals "
    "for shares of 0 and 1 at the threshold"
)
PAGES.globals.update(tables=tables, percent=percent, compare=compare_words, INTERVALS=INTERVALS)
PAGES.globals.update(table_one_cells=table_one_cells, pooled_sentence=pooled_sentence)
PAGES.globals.update(
    MINORITY_PATIENTS=MINORITY_PATIENTS,
    MIN_SLOPE_EVENTS=MIN_SLOPE_EVENTS,
    DIVISIONS=DIVISIONS,
    CHOSEN=CHOSEN,
)

MAX_ERRORS = 10

Tables = dict[str, pd.DataFrame]
Drawn = dict[str, plots.Plot]
"""Tables and figures by the names of their files."""


@dataclass(frozen=True)
class ReportContent:
    """What a report says beside the metrics; None and empty leave a part of the page out."""

    title: str
    question: Mapping[str, str]  # what is predicted, when, from what
    data: Mapping[str, str]
    card: Mapping[str, str]  # about the model; hashes and versions stand last
    threshold: float | None  # None: each fold's own
    seed: int  # of the bootstrap
    bands: pd.DataFrame  # subgroups of the evaluated rows: ordered categories, a column a grouping
    noun: str = "patients"  # what the rows are
    chosen_on: str = "the validation part"  # rows that chose threshold and recalibration
    flow: pd.DataFrame | None = None  # columns rule, removed, left
    split: pd.DataFrame | None = None  # a ``part_table``
    table_one: pd.DataFrame | None = None  # a ``table_one``
    history: Sequence[Mapping[str, Any]] | None = None  # as in history.jsonl
    reports: Mapping[str, Any] | None = None  # metrics of ``score_reports``
    example: Mapping[str, Any] | None = None  # prompt, text, target of a row
    stage1_page: str | None = None  # where the results are stage 1's: its page, empty if unknown
    case_mix: tuple[dict[str, float], dict[str, float]] | None = None  # of training, of these rows
    sites: NDArray[Any] | None = None  # hospital or unit of each row
    updates: Updates | None = None  # of the decision rule in these rows
    tries_updates: bool = False  # whether there is a section on updates, with or without any
    methods: Mapping[str, str] | None = None  # what ``tripod.md`` says of the training
    notice: str = ""  # a banner
    first: Sequence[str] = ()  # sentences that the result begins with
    folds: int = 0  # models whose risks of their own folds are evaluated together; 0: one model


def render(name: str, **content: Any) -> str:
    """Fill the page ``templates/NAME.html.j2``; every value is escaped."""
    return PAGES.get_template(f"{name}.html.j2").render(**content) + "\n"


def write_report(
    path: Path,
    rows: pd.DataFrame,
    metrics: Metrics,
    content: ReportContent,
    *,
    min_cell: int = 0,  # smaller counts are hidden
    list_patients: bool = False,  # names the rows with the largest errors
    folder: Path | None = None,
) -> None:
    """Write a report, and with a ``folder`` each figure, each table and ``tripod.md`` as files."""
    few = metrics.counts["minority_patients"] < min_cell
    shown = Metrics.from_json(suppress(metrics.to_json(), min_cell))
    reports = suppress_reports(dict(content.reports or {}), min_cell)
    with plots.plot_style():
        numbers, drawn = ({}, {}) if few else _model_parts(rows, shown, content, min_cell)
        if content.history and len(content.history) > 1:
            drawn["learning_curve"] = plots.plot_learning(content.history)
        numbers |= (known := _data_tables(content, min_cell, hide_events=few))
        if "split" in known:
            drawn["flow"] = plots.plot_flow(known.get("flow"), known["split"], content.noun)
        images = {name: plots.to_image(*plot) for name, plot in drawn.items()}
        if folder is not None:
            _write_files(folder / "figures", drawn, images, numbers)
            write_text(folder / "tripod.md", tripod(content, shown, numbers))
    notices = [content.notice, PATIENTS_NOTICE if list_patients else ""]
    first = [*content.first, tables.written_sentence(reports)]
    page = render(
        "report",
        title=content.title,
        notice=" ".join(filter(None, notices)),
        min_cell=min_cell,
        content=content,
        first=[*filter(None, first)],
        findings=[] if few else sentences(shown, content.noun),
        few=few,
        metrics=shown,
        numbers=numbers,
        images=images,
        written=tables.written_table(reports),
        errors=_largest_errors(rows, metrics.models[0]) if list_patients else None,
        baseline=primary_baseline(metrics),
        multiplicity=multiplicity_sentence(metrics),
        models={name: MEANINGS[name] for name in metrics.models if name in MEANINGS},
    )
    write_text(path, page)


def tripod(content: ReportContent, metrics: Metrics, numbers: Tables) -> str:
    """Return the items of TRIPOD+AI as Markdown, filled in; ``metrics`` may be suppressed."""
    known = {name: table.to_dict("records") for name, table in numbers.items()}
    filled = (
        PAGES.overlay(autoescape=False)
        .get_template("tripod.md.j2")
        .render(
            content=content,
            performance=tables.metric_table(metrics, [*tables.METRICS]).to_dict("records"),
            others=", ".join(map(code, metrics.models[1:])),
            lines=defaultdict(list, known),
            facts=defaultdict(str, content.methods or {}),
            **{"numbers": numbers, "code": code, "number": count_text},
        )
    )
    return f"{filled}\n"


def _model_parts(
    rows: pd.DataFrame, shown: Metrics, content: ReportContent, min_cell: int
) -> tuple[Tables, Drawn]:
    """Return tables and figures of the model."""
    names, seed = [shown.models[0], *filter(None, [primary_baseline(shown)])], content.seed
    groups = subgroup_table(rows, names[0], content.bands, seed)
    bins = calibration_table(rows, names[0], seed)
    curve = decision_curve(rows, names, seed)
    labels, risks = rows["label"].to_numpy(float), [rows[name].to_numpy(float) for name in names]
    value = shown.of(names[0])["value"]
    numbers = {
        "metrics": shown.table.reset_index(),
        "models": tables.model_cells(shown),
        "subgroups": suppress_table(groups, min_cell, by="group"),
        "calibration": bins.drop(columns="n") if min_cell else bins,
        "decision_curve": curve.reset_index(),
    }
    drawn = {
        "roc": plots.plot_roc(labels, risks, (1 - value["specificity"], value["sensitivity"])),
        "precision_recall": plots.plot_precision_recall(labels, risks),
        "calibration": plots.plot_calibration(bins, risks[0]),
        "risk_distribution": plots.plot_risks(labels, risks[0]),
        "decision_curve": plots.plot_decision_curve(curve, names),
    }
    if content.sites is not None:
        sites = suppress_table(site_table(rows, names[0], content.sites, seed), min_cell)
        pooled = pool(sites)
        numbers |= {"sites": sites, "sites_pooled": pd.DataFrame([pooled])}
        if sites["auroc"].notna().any():
            drawn["sites"] = plots.plot_sites(sites, pooled)
    if content.updates is not None:
        updated = rows[TESTED].join(content.updates.risks)
        curves = {name: calibration_table(updated, name, seed) for name in METHODS}
        numbers["updates"] = content.updates.table.reset_index()
        drawn["updates"] = plots.plot_updates(curves)
    return numbers, drawn


def _data_tables(content: ReportContent, min_cell: int, *, hide_events: bool) -> Tables:
    """Return tables of the data, small counts hidden."""
    tables_by_name = {}
    if (split := content.split) is not None:
        hide_events = hide_events or bool((split["minority_patients"] < min_cell).any())
        tables_by_name["split"] = suppress_table(split, min_cell).drop(columns="minority_patients")
    if content.flow is not None:
        tables_by_name["flow"] = suppress_table(content.flow[["rule", "removed", "left"]], min_cell)
    if (table := content.table_one) is not None:
        tables_by_name["table_one"] = suppress_table_one(table, min_cell, hide_events=hide_events)
    if content.case_mix is not None:
        mixes = [suppress_case_mix(m, min_cell, hide_events=hide_events) for m in content.case_mix]
        tables_by_name["case_mix"] = tables.case_mix_cells(*mixes)
    return tables_by_name


def _write_files(
    folder: Path, drawn: Drawn, images: Mapping[str, plots.Image], numbers: Tables
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
    outcome = worst["label"].map({1: "event", 0: "no event"})
    risk = worst[model].map(percent)
    return pd.DataFrame({"Id": worst["id"].astype(str), "Outcome": outcome, "Risk": risk})


def write_comparison(
    path: Path,
    metrics: Metrics,
    *,
    title: str,
    sentences: Sequence[str],
    card: Mapping[str, str],
    models: Mapping[str, str],
    notice: str = "",
    cost: pd.DataFrame | None = None,
    splits: pd.DataFrame | None = None,
) -> None:
    """Write the page of several models, with what they are (``models``) and how (``card``)."""
    with plots.plot_style():
        image = plots.to_image(*plots.plot_forest(metrics))
    page = render(
        "comparison",
        title=title,
        notice=notice,
        min_cell=0,
        sentences=sentences,
        counts=counts_text(metrics.counts),
        reference=metrics.models[0],
        table_of_models=tables.model_cells(metrics, cost),
        multiplicity=multiplicity_sentence(metrics),
        splits=splits,
        image=image,
        models=models,
        card=card,
    )
    write_text(path, page)
