"""Pages made of topics, and ``tripod.md``: they need neither network nor script."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from operator import attrgetter
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.texts import code
from medgemma_clinical.evaluation import plots, tables
from medgemma_clinical.evaluation.metrics import REPLICATES
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.evaluation.topics.discrimination import about_models
from medgemma_clinical.evaluation.topics.subgroups import subgroup_cells
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Page, Topic, TopicBuilder
from medgemma_clinical.evaluation.verdicts import Finding, counts_text, multiplicity_sentence
from medgemma_clinical.files import atomic, write_text

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
PAGES.globals.update(today=date.today, COLOURS=plots.COLOURS)
MARKDOWN = PAGES.overlay(autoescape=False)

PATIENTS_NOTICE = "This page names patients: do not share it."
FEW = "Fewer than {} patients have, or lack, the event: no metric and no curve is shown."
SHOWS = (
    "Shown. Read your data use agreement before you share this page; --min_cell N hides counts of "
    "fewer than N patients in a report."
)
HIDES = (
    "Those of fewer than {0} patients are hidden (--min_cell {0}), with the metrics that tell them."
)
ABOUT_COSTS = (
    "Seconds an epoch: median, validation included. Tokens: that the language model reads, mean of "
    "the training part. Memory: peak of the device. Weight: of the language model beside stage 1."
)
SPLITS = (
    "Each run has a split of its own, so a patient may be tested several times. Metrics above are "
    "means over the splits; for an interval patients are drawn once for all splits."
)


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


def build_topics(evaluated: Evaluated, builders: Iterable[TopicBuilder]) -> list[Topic]:
    """Return the topics that have something to show."""
    with plots.plot_style():
        topics = [build(evaluated) for build in builders]
    return [topic for topic in topics if topic is not None]


def folded(findings: Sequence[Finding], topics: Sequence[Topic], summary: str) -> list[Topic]:
    """Return a result, in words and topics, that a page unfolds under a line of summary."""
    words = Topic("In words", [str(finding) for finding in findings])
    return [replace(topic, summary=summary) for topic in (words, *topics)]


def report_card(evaluated: Evaluated, card: Mapping[str, str]) -> dict[str, str]:
    """Return the card of a report on predictions: how intervals are made, what is hidden."""
    n = evaluated.min_cell
    counts = HIDES.format(n) if n else SHOWS
    return {**card, "Intervals": describe_intervals(evaluated.exact), "Small counts": counts}


def render(page: Page, images: Mapping[str, plots.Image]) -> str:
    """Return a page as HTML; every text is escaped."""
    groups = [(key, [*part]) for key, part in itertools.groupby(page.topics, attrgetter("summary"))]
    return PAGES.get_template("page.html.j2").render(page=page, groups=groups, images=images) + "\n"


def write_report(
    path: Path, page: Page, *, folder: Path | None = None, tripod: str | None = None
) -> None:
    """Write a page, and with a ``folder`` each figure, each table and ``tripod.md`` as files."""
    plotted = {name: plot for topic in page.topics for name, (plot, _) in topic.figures.items()}
    with plots.plot_style():
        images = {name: plots.to_image(*plot) for name, plot in plotted.items()}
        if folder is not None:
            _write_files(folder / "figures", plotted, images, page.topics)
            if tripod is not None:
                write_text(folder / "tripod.md", tripod)
    write_text(path, render(page, images))


def _write_files(
    folder: Path,
    plotted: Mapping[str, plots.Plot],
    images: Mapping[str, plots.Image],
    topics: Sequence[Topic],
) -> None:
    """Write each figure as SVG and PDF, each table as CSV."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        for name, (figure, _) in plotted.items():
            (temporary / f"{name}.svg").write_bytes(images[name].svg)
            figure.savefig(temporary / f"{name}.pdf", metadata={"CreationDate": None})
        for topic in topics:
            for name, table in topic.numbers.items():
                table.to_csv(temporary / f"{name}.csv", index=False)


def fill_tripod(
    page: Page,
    evaluated: Evaluated,
    *,
    question: Mapping[str, str],
    data: Mapping[str, str],
    methods: Mapping[str, str],
    has_sites: bool,
) -> str:
    """Return the items of TRIPOD+AI as Markdown, filled in by what a page shows."""
    numbers = {name: table for topic in page.topics for name, table in topic.numbers.items()}
    lines = {name: table.to_dict("records") for name, table in numbers.items()}
    noun, groups = evaluated.noun, numbers.get("subgroups")
    metrics, of_targets = evaluated.metrics, []
    for target in evaluated.targets:
        table = tables.metric_table(metrics.at(target), [*tables.METRICS])
        ending = f" ({target.title})" if len(evaluated.targets) > 1 else ""
        of_targets.append(table.assign(Metric=table["Metric"] + ending))
    performance = pd.concat(of_targets)
    filled = MARKDOWN.get_template("tripod.md.j2").render(
        title=page.title,
        card=page.card,
        question=question,
        data=data,
        noun=noun,
        has_sites=has_sites,
        performance=performance.to_dict("records"),
        others=", ".join(map(code, metrics.models[1:])),
        lines=defaultdict(list, lines),
        subgroups=[] if groups is None else subgroup_cells(groups, noun).to_dict("records"),
        methods=defaultdict(str, methods),
        threshold=evaluated.at_threshold,
        of_times=any(target.horizon for target in evaluated.targets),
        risks=[code(target.title) for target in evaluated.targets],
        assumptions=[*dict.fromkeys(x.assumption for x in evaluated.targets if x.assumption)],
        code=code,
        number=count_text,
    )
    return f"{filled}\n"


def comparison_page(
    metrics: Metrics,
    targets: Sequence[Target] = (LABEL,),
    *,
    title: str,
    sentences: Sequence[str],
    card: Mapping[str, str],
    models: Mapping[str, str],
    notice: str = "",
    cost: pd.DataFrame | None = None,
    splits: pd.DataFrame | None = None,
) -> Page:
    """Return the page of several models, with what they are (``models``) and how (``card``)."""
    reference, topics = metrics.models[0], []
    for target in targets:
        own = metrics.at(target)
        caption = f"Test metrics ({counts_text(own.counts)}); the reference is {reference}"
        with plots.plot_style():
            plot = plots.plot_forest(own)
        words = f"AUROC minus that of {reference}: to the right a model ranks better"
        name = f": {target.title}" if len(targets) > 1 else ""
        topics.append(
            Topic(
                f"Models side by side{name}",
                [*filter(None, [multiplicity_sentence(own), target.note])],
                [Cells(tables.model_cells(own, cost), caption, is_wide=True)],
                {target.key("forest"): (plot, words)},
                details=[about_models(models, ABOUT_COSTS)],
            )
        )
    if splits is not None:
        topics.append(
            Topic("Split by split", [SPLITS], [Cells(splits, "AUROC of each run [95 %]")])
        )
    findings = [Finding(None, sentence) for sentence in sentences]
    about = {**card, "Intervals": describe_intervals(metrics), "Small counts": SHOWS}
    return Page(title, findings, topics, about, [*filter(None, [notice])])
