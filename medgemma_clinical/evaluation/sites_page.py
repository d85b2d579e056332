"""sites.html: what several sites say together of one model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.aggregate import read_groups
from medgemma_clinical.evaluation.report import render
from medgemma_clinical.evaluation.topics.cohort import case_mix_cells
from medgemma_clinical.evaluation.topics.subgroups import MIN_POOLED, site_topic
from medgemma_clinical.evaluation.topics.topic import Cells, Topic
from medgemma_clinical.evaluation.verdicts import interval_text, percent
from medgemma_clinical.files import write_text

SHOWN = {"auroc": ("AUROC", ".3f"), "oe": ("O/E", ".2f"), "calibration_slope": ("Slope", ".2f")}
POOLING = (
    "Random effects by REML with the interval of Hartung and Knapp, never narrower than that of a "
    "common effect; AUROC on its logit, O/E on its logarithm. The intervals of a site follow from "
    "its value and variance."
)


def pooled_cells(pooled: pd.DataFrame) -> pd.DataFrame:
    """Return what is pooled of each model as text: AUROC, O/E and slope."""
    lines = []
    for (model, metric), part in pooled.groupby(["model", "metric"], sort=False):
        if metric in SHOWN:
            (title, form), (line,) = SHOWN[str(metric)], part.to_dict("records")
            few = line["sites"] < MIN_POOLED
            value = interval_text(line["value"], line["low"], line["high"], form)
            further = f"{line['prediction_low']:{form}} to {line['prediction_high']:{form}}"
            cells = ["not pooled", "", ""] if few else [value, further, percent(line["i2"])]
            lines.append([model, title, f"{line['sites']}", *cells])
    names = ["Model", "Metric", "Sites", "Pooled [95 %]", "95 % of further sites"]
    return pd.DataFrame(lines, columns=[*names, "I\N{SUPERSCRIPT TWO}"])


def write_sites(
    path: Path, sites: Mapping[str, Any], estimates: pd.DataFrame, pooled: pd.DataFrame
) -> None:
    """Write the page of aggregates by site, their estimates and what is pooled of these."""
    about = next(iter(sites.values()))["model"]
    own, counts = estimates[estimates["model"] == about["name"]], pd.DataFrame(sites).T
    table = own.pivot(index="site", columns="metric", values=["value", "low", "high"])
    names = {metric: metric.removeprefix("calibration_") for metric in SHOWN}
    table = pd.DataFrame(
        {"n": counts["patients"], "events": counts["events"]}
        | {"prevalence": table["value", "observed"], "risk": table["value", "mean_risk"]}
        | {name: table["value", metric] for metric, name in names.items()}
        | {f"{name}_{x}": table[x, m] for m, name in names.items() for x in ("low", "high")}
    )
    table = table.loc[[*sites]].rename_axis("site").reset_index()
    (auroc,) = pooled[(pooled["model"] == about["name"]) & (pooled["metric"] == "auroc")].to_dict(
        "records"
    )
    caption = "The same model at each site; patients are rounded counts"
    mix = case_mix_cells({name: site["case_mix"] for name, site in sites.items()}, "patients")
    mix_caption = "Median (quartiles) of the patients' medians, or the share of 1"
    topics = [
        site_topic(table, auroc, "patients", caption),
        Topic(
            "Pooled",
            tables=[Cells(pooled_cells(pooled), "Models that each site has", is_wide=True)],
        ),
        risk_groups(sites),
        Topic("Case mix", tables=[Cells(mix, mix_caption, is_wide=True)]),
    ]
    with plots.plot_style():
        drawn = {name: plot for topic in topics for name, (plot, _) in topic.figures.items()}
        images = {name: plots.to_image(*plot) for name, plot in drawn.items()}
    limits = (f"{name} {site['min_cell']}" for name, site in sites.items())
    card = {
        "Model": about["name"],
        "SHA-256 of the model": about["sha256"],
        "Program of the sites": ", ".join(sorted({site["version"] for site in sites.values()})),
        "Smallest count": ", ".join(limits),
        "Pooling": POOLING,
    }
    title = f"{about['outcome']} at {len(sites)} sites"
    page = render("sites", title=title, notice="", topics=topics, images=images, card=card)
    write_text(path, page)


def risk_groups(sites: Mapping[str, Any]) -> Topic:
    """Return the topic of the observed share in risk groups of the development cohort."""
    figure, (axes,) = plots.new_figure()
    looks = itertools.cycle(itertools.product("osDv^", (plots.MODEL, plots.OTHER, plots.SOFT)))
    axes.axline((0, 0), slope=1, **plots.DOTTED)
    for (name, site), (marker, colour) in zip(sites.items(), looks, strict=False):
        groups = read_groups(site)
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
        axes.plot(groups["risk"], groups["observed"], **look)
    axes.set(xlabel="mean predicted risk", ylabel="observed share")
    alt = "Observed share of events by mean predicted risk in risk groups of each site."
    caption = (
        "Tenths of the development cohort by risk, joined until a site has enough patients with, "
        "and without, the event; on the dotted line risks are right"
    )
    return Topic("Risk groups", figures={"groups": ((plots.with_legend(figure), alt), caption)})
