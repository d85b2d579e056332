"""report.html, tripod.md and the page of a comparison: they need neither network nor script."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.texts import code
from medgemma_clinical.evaluation import plots, tables
from medgemma_clinical.evaluation.metrics import REPLICATES
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.suppress import suppressed
from medgemma_clinical.evaluation.topics import cohort
from medgemma_clinical.evaluation.topics.discrimination import about_models
from medgemma_clinical.evaluation.topics.learning import learning
from medgemma_clinical.evaluation.topics.subgroups import subgroup_cells
from medgemma_clinical.evaluation.topics.topic import (
    Cells,
    Evaluated,
    ReportContent,
    TopicBuilder,
)
from medgemma_clinical.evaluation.topics.written_reports import (
    compare_words,
    suppress_reports,
    written_reports,
    written_sentence,
)
from medgemma_clinical.evaluation.verdicts import counts_text, multiplicity_sentence, percent
from medgemma_clinical.files import atomic, write_text

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
PATIENTS_NOTICE = "This page names patients: do not share it."
PAGES.globals.update(
    percent=percent,
    compare=compare_words,
    today=date.today,
    COLOURS=plots.COLOURS,
)
MARKDOWN = PAGES.overlay(autoescape=False)


def unbroken(text: str) -> str:
    """Return a text in which no line breaks within an interval."""
    return re.sub(
        r"[\[(][-+]?\d[^\])]*[\])]", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text
    )


PAGES.filters["unbroken"] = unbroken


def describe_intervals(metrics: Metrics) -> str:
    """Return how the intervals of a page were made, in words."""
    text = (
        f"95 % percentile intervals of {REPLICATES:,} draws of patients; exact intervals "
        "for shares of 0 and 1 at the threshold"
    )
    if metrics.widening == 1:
        return f"{text}; the trained model is taken as fixed"
    return (
        f"{text}; those of metrics and differences are {metrics.widening:.2f} times as wide, as "
        "the models learn from each other's test patients (after Nadeau and Bengio 2003); shares "
        "of events and counts are not widened"
    )


def render(name: str, **content: object) -> str:
    """Fill the page ``templates/NAME.html.j2``; every value is escaped."""
    return PAGES.get_template(f"{name}.html.j2").render(**content) + "\n"


def write_report(
    path: Path,
    rows: pd.DataFrame,
    metrics: Metrics,
    content: ReportContent,
    topics: Sequence[TopicBuilder],  # on the risks, as ``Outcome.topics`` lists them
    *,
    min_cell: int = 0,  # smaller counts are hidden
    list_patients: bool = False,  # names the rows with the largest errors
    folder: Path | None = None,
) -> None:
    """Write a report, and with a ``folder`` each figure, each table and ``tripod.md`` as files."""
    has_few = metrics.counts["minority_patients"] < min_cell
    shown = suppressed(metrics, min_cell)
    evaluated = Evaluated(rows, shown, content, min_cell, has_few, list_patients)
    builders: dict[str, Sequence[TopicBuilder]] = {
        "written": [written_reports],
        "results": [*([] if has_few else topics), cohort.case_mix_topic],
        "rows": [cohort.largest_errors, cohort.table_one_topic],
        "methods": [cohort.cohort, learning],
    }
    with plots.plot_style():
        sections = {
            part: [topic for build in group if (topic := build(evaluated)) is not None]
            for part, group in builders.items()
        }
        every = [topic for group in sections.values() for topic in group]
        figures = {name: plot for topic in every for name, (plot, _) in topic.figures.items()}
        numbers = {name: table for topic in every for name, table in topic.numbers.items()}
        images = {name: plots.to_image(*plot) for name, plot in figures.items()}
        if folder is not None:
            _write_files(folder / "figures", figures, images, numbers)
            if content.has_tripod:
                write_text(folder / "tripod.md", tripod(content, shown, numbers))
    notices = [content.notice, PATIENTS_NOTICE if list_patients else ""]
    reports = suppress_reports(content.reports or {}, min_cell)
    page = render(
        "report",
        title=content.title,
        intervals=describe_intervals(metrics),
        notice=" ".join(filter(None, notices)),
        min_cell=min_cell,
        content=content,
        first=[*filter(None, [written_sentence(reports), *content.first])],
        findings=[] if has_few else content.findings(shown),
        has_few=has_few,
        sections=sections,
        images=images,
    )
    write_text(path, page)


def tripod(content: ReportContent, metrics: Metrics, numbers: Mapping[str, pd.DataFrame]) -> str:
    """Return the items of TRIPOD+AI as Markdown, filled in; ``metrics`` may be suppressed."""
    lines = {name: table.to_dict("records") for name, table in numbers.items()}
    groups = subgroup_cells(numbers["subgroups"], content.noun) if "subgroups" in numbers else None
    filled = MARKDOWN.get_template("tripod.md.j2").render(
        content=content,
        performance=tables.metric_table(metrics, [*tables.METRICS]).to_dict("records"),
        others=", ".join(map(code, metrics.models[1:])),
        lines=defaultdict(list, lines),
        subgroups=[] if groups is None else groups.to_dict("records"),
        methods=defaultdict(str, content.methods or {}),
        threshold=content.at_threshold,
        **{"code": code, "number": count_text},
    )
    return f"{filled}\n"


def _write_files(
    folder: Path,
    figures: Mapping[str, plots.Plot],
    images: Mapping[str, plots.Image],
    numbers: Mapping[str, pd.DataFrame],
) -> None:
    """Write each figure as SVG and PDF, each table as CSV."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        for name, (figure, _) in figures.items():
            (temporary / f"{name}.svg").write_bytes(images[name].svg)
            figure.savefig(temporary / f"{name}.pdf", metadata={"CreationDate": None})
        for name, table in numbers.items():
            table.to_csv(temporary / f"{name}.csv", index=False)


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
    reference, counts = metrics.models[0], counts_text(metrics.counts)
    caption = f"Test metrics ({counts}); the reference is {reference}"
    about_costs = (
        "Seconds an epoch: median, validation included. Tokens: that the language model reads, "
        "mean of the training part. Memory: peak of the device. Weight: of the language model "
        "beside stage 1."
    )
    page = render(
        "comparison",
        title=title,
        intervals=describe_intervals(metrics),
        notice=notice,
        min_cell=0,
        sentences=sentences,
        reference=reference,
        table_of_models=Cells(tables.model_cells(metrics, cost), caption, is_wide=True),
        multiplicity=multiplicity_sentence(metrics),
        splits=None if splits is None else Cells(splits, "AUROC of each run [95 %]", is_wide=True),
        image=image,
        details=about_models(models, about_costs),
        card=card,
    )
    write_text(path, page)
