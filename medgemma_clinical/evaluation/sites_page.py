"""sites.html: what several sites say together of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.pooling import MIN_POOLED
from medgemma_clinical.evaluation.report import render
from medgemma_clinical.evaluation.topics.subgroups import (
    FURTHER_SITES,
    SUBGROUP_METRICS,
    prediction_text,
    site_topic,
)
from medgemma_clinical.evaluation.topics.topic import Cells, Topic
from medgemma_clinical.evaluation.verdicts import interval_text, percent
from medgemma_clinical.files import write_text


def pooled_cells(pooled: pd.DataFrame) -> pd.DataFrame:
    """Return what is pooled of a model as text, by metric: AUROC, O/E and slope."""
    lines = []
    for metric, (title, form) in SUBGROUP_METRICS.items():
        line: Any = pooled.loc[metric]
        value, further = "not pooled", ""
        if line["sites"] >= MIN_POOLED:
            value = interval_text(line["value"], line["low"], line["high"], form)
            further = prediction_text(line, form)
        lines.append([title, f"{line['sites']:.0f}", value, further, percent(line["i2"])])
    names = ["Metric", "Sites", "Pooled [95 %]", FURTHER_SITES.capitalize()]
    return pd.DataFrame(lines, columns=[*names, "I\N{SUPERSCRIPT TWO}"])


def write_sites(
    path: Path,
    sites: Mapping[str, Any],
    estimates: pd.DataFrame,
    pooled: pd.DataFrame,
    notes: Sequence[str],
) -> None:
    """Write the page of aggregates by site, and of what ``pool_sites`` returns of them."""
    first = next(iter(sites.values()))
    used = first["models"][0]
    table = estimates[estimates["model"] == used["name"]].pivot(
        index="site", columns="metric", values=["value", "low", "high"]
    )
    table.columns = [f"{metric}_{end}".removesuffix("_value") for end, metric in table]
    counts = pd.DataFrame(sites).T[["patients", "events"]].rename(columns={"patients": "n"})
    table = counts.join(table).reset_index(names="site")
    models = {
        model: pooled_cells(pooled.loc[model]).set_index("Metric")["Pooled [95 %]"]
        for model in pooled.index.unique("model")
    }
    cells = pd.DataFrame(models).T.reset_index(names="Model")
    tables = [Cells(pooled_cells(pooled.loc[used["name"]]), used["name"])]
    tables += [Cells(cells, "Both models, pooled [95 %]")] if len(models) > 1 else []
    auroc = pooled.loc[(used["name"], "auroc")].to_dict()
    with plots.plot_style():
        topics = [
            site_topic(table, auroc, "patients", "The same model at each site; rounded numbers"),
            Topic("Pooled", notes, tables),
        ]
        drawn = {name: plot for topic in topics for name, (plot, _) in topic.figures.items()}
        images = {name: plots.to_image(*plot) for name, plot in drawn.items()}
    versions = ", ".join(sorted({site["version"] for site in sites.values()}))
    card = {"Model": used["name"], "SHA-256 of the model": used["sha256"]}
    card |= {"Program of the sites": versions}
    title = f"{first['outcome']} at {len(sites)} sites"
    page = render("sites", title=title, notice="", topics=topics, images=images, card=card)
    write_text(path, page)
