"""sites.html: what several sites say together of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.pooling import MIN_POOLED
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.topics.subgroups import (
    FURTHER_SITES,
    SUBGROUP_METRICS,
    pooled_sentence,
    prediction_text,
    site_topic,
)
from medgemma_clinical.evaluation.topics.topic import Cells, Page, Topic
from medgemma_clinical.evaluation.verdicts import Finding, interval_text, percent


def pooled_cells(pooled: pd.DataFrame) -> pd.DataFrame:
    """Return what is pooled of a model as text, by metric: AUROC, O/E and slope."""
    lines = []
    for metric in SUBGROUP_METRICS:
        title, form, _ = METRICS[metric]
        line: Any = pooled.loc[metric]
        value, further = "not pooled", ""
        if line["sites"] >= MIN_POOLED:
            value = interval_text(line["value"], line["low"], line["high"], form)
            further = prediction_text(line, form)
        lines.append([title, f"{line['sites']:.0f}", value, further, percent(line["i2"])])
    names = ["Metric", "Sites", "Pooled [95 %]", FURTHER_SITES.capitalize()]
    return pd.DataFrame(lines, columns=[*names, "I\N{SUPERSCRIPT TWO}"])


def pooled_words(pooled: pd.DataFrame, sites: int) -> str:
    """Return why nothing of several sites is pooled; empty where something is."""
    if (pooled["sites"] >= MIN_POOLED).any():
        return ""
    return f"Nothing is pooled: a pooled value needs {MIN_POOLED} sites, and these are {sites}."


def sites_page(
    sites: Mapping[str, Any], estimates: pd.DataFrame, pooled: pd.DataFrame, notes: Sequence[str]
) -> Page:
    """Return the page of aggregates by site, and of what ``pool_sites`` returns of them."""
    first = next(iter(sites.values()))
    used = first["models"][0]
    table = estimates[estimates["model"] == used["name"]].pivot(
        index="site", columns="metric", values=["value", "low", "high"]
    )
    table.columns = [f"{metric}_{end}".removesuffix("_value") for end, metric in table]
    counts = pd.DataFrame(sites).T[["patients", "events"]].rename(columns={"patients": "n"})
    table = counts.join(table).reset_index(names="site")
    auroc = pooled.loc[(used["name"], "auroc")].to_dict()
    with plots.plot_style():
        topic = site_topic(table, auroc, "patients", "The same model at each site; rounded numbers")
    about = "Each site evaluated the model on its own patients and gave rounded numbers."
    topics = [replace(topic, text=[about, *topic.text[1:], *notes])]
    words = pooled_words(pooled, len(sites))
    if not words:
        of_used = pooled_cells(pooled.loc[used["name"]])
        models = {
            model: pooled_cells(pooled.loc[model]).set_index("Metric")["Pooled [95 %]"]
            for model in pooled.index.unique("model")
        }
        cells = pd.DataFrame(models).T.reset_index(names="Model")
        tables = [Cells(of_used, used["name"], is_wide=True)]
        if len(models) > 1:
            tables.append(Cells(cells, "Both models, pooled [95 %]", is_wide=True))
        topics.append(Topic("Pooled", tables=tables))
    versions = ", ".join(sorted({site["version"] for site in sites.values()}))
    return Page(
        f"{first['outcome']} at {len(sites)} sites",
        [Finding(None, words or pooled_sentence(auroc, len(sites)))],
        topics,
        {
            "Pooling": "Random effects by REML with the interval of Hartung and Knapp, never "
            "narrower than that of a common effect; AUROC on its logit, O/E on its logarithm",
            "Intervals": "Those of a site follow from value and error",
            "Model": used["name"],
            "SHA-256 of the model": used["sha256"],
            "Program of the sites": versions,
        },
    )
