"""sites.html: what several sites say together of one model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.report import render
from medgemma_clinical.evaluation.topics.cohort import case_mix_cells
from medgemma_clinical.evaluation.topics.subgroups import (
    FURTHER_SITES,
    MIN_POOLED,
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
    path: Path, sites: Mapping[str, Any], estimates: pd.DataFrame, pooled: pd.DataFrame
) -> None:
    """Write the page of aggregates by site, their estimates and what is pooled of these."""
    about = next(iter(sites.values()))["model"]
    table = estimates[estimates["model"] == about["name"]].pivot(
        index="site", columns="metric", values=["value", "low", "high"]
    )
    table.columns = [f"{metric}_{end}".removesuffix("_value") for end, metric in table]
    table = table.rename(columns={"observed": "prevalence", "mean_risk": "risk"})
    counts = pd.DataFrame(sites).T[["patients", "events"]].rename(columns={"patients": "n"})
    table = counts.join(table).reset_index(names="site")
    models = {
        model: pooled_cells(pooled.loc[model]).set_index("Metric")["Pooled [95 %]"]
        for model in pooled.index.unique("model")
    }
    cells = pd.DataFrame(models).T.reset_index(names="Model")
    tables = [Cells(pooled_cells(pooled.loc[about["name"]]), about["name"])]
    tables += [Cells(cells, "All models, pooled [95 %]")] if len(models) > 1 else []
    mix = case_mix_cells({name: site["case_mix"] for name, site in sites.items()}, "patients")
    mix_caption = "Median (quartiles) of the patients' medians, or the share of 1"
    auroc = pooled.loc[(about["name"], "auroc")].to_dict()
    with plots.plot_style():
        topics = [
            site_topic(table, auroc, "patients", "The same model at each site; rounded counts"),
            Topic("Pooled", tables=tables, figures={"groups": risk_groups(sites)}),
            Topic("Case mix", tables=[Cells(mix, mix_caption, is_wide=True)]),
        ]
        drawn = {name: plot for topic in topics for name, (plot, _) in topic.figures.items()}
        images = {name: plots.to_image(*plot) for name, plot in drawn.items()}
    limits = ", ".join(f"{name} {site['min_cell']}" for name, site in sites.items())
    versions = ", ".join(sorted({site["version"] for site in sites.values()}))
    card = {"Model": about["name"], "SHA-256 of the model": about["sha256"]}
    card |= {"Program of the sites": versions, "Smallest count": limits}
    title = f"{about['outcome']} at {len(sites)} sites"
    page = render("sites", title=title, notice="", topics=topics, images=images, card=card)
    write_text(path, page)


def risk_groups(sites: Mapping[str, Any]) -> tuple[plots.Plot, str]:
    """Plot the observed share in risk groups of each site; return also the caption."""
    figure, (axes,) = plots.new_figure()
    looks = itertools.cycle(itertools.product("osDv^", (plots.MODEL, plots.OTHER, plots.SOFT)))
    axes.axline((0, 0), slope=1, **plots.DOTTED)
    for (name, site), (marker, colour) in zip(sites.items(), looks, strict=False):
        own = [group for group in site["groups"] if group["model"] == site["model"]["name"]]
        points = [[group[axis] for group in own] for axis in ("risk", "observed")]
        axes.plot(*points, color=colour, marker=marker, markersize=5, label=name)
    axes.set(xlabel="mean predicted risk", ylabel="observed share")
    alt = "Observed share of events by mean predicted risk in risk groups of each site."
    caption = (
        "Calibration in tenths of the development cohort by risk, joined until a site has enough "
        "patients with, and without, the event; on the dotted line risks are right"
    )
    return (plots.with_legend(figure, 2), alt), caption
