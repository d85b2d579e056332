"""Discrimination and calibration in subgroups of the patients and at sites, a hospital or a unit.

What sites have in common is a meta-analysis of their results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.demographics import demographic_bands
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import (
    MINORITY_PATIENTS,
    bootstrap,
    count,
    with_interval,
)
from medgemma_clinical.evaluation.pooling import MIN_POOLED, random_effects
from medgemma_clinical.evaluation.suppress import suppress_table
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import interval_text, percent

SUBGROUP_METRICS = "auroc", "oe", "slope"

FURTHER_SITES = "about 90 % of further sites"
"""What a prediction interval of 95 % covers, by simulation, where tau2 is estimated."""

TOO_FEW_SITES = "too few sites"
ABOUT_I2 = "I\N{SUPERSCRIPT TWO} is the share of the spread between sites that is no chance."


def subgroups(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    bands, widening = demographic_bands(evaluated.patients), evaluated.exact.widening
    exact = subgroup_table(
        evaluated.rows, evaluated.model, bands, evaluated.seed, evaluated.target, widening
    )
    table = suppress_table(exact, evaluated.min_cell, by="group")
    cells = subgroup_cells(table, evaluated.noun)
    return Topic(
        "Subgroups",
        tables=[Cells(cells, subgroup_caption(evaluated, "in subgroups"), is_wide=True)],
        numbers={"subgroups": table},
    )


def subgroup_caption(evaluated: Evaluated, where: str) -> str:
    """Return the caption of ``subgroup_cells``."""
    folds = evaluated.folds
    pooled = f"The pooled risks of {folds} models" if folds else "The same model"
    about = "O/E: observed divided by expected events; a dash: too few patients"
    return f"{pooled} {where}; {about}"


def subgroup_table(
    rows: pd.DataFrame,
    model: str,
    bands: pd.DataFrame,
    seed: int,
    target: Target = LABEL,
    widening: float = 1.0,  # of the intervals
) -> pd.DataFrame:
    """Return counts, AUROC and calibration of each category in ``bands`` (n rows)."""
    risk = rows[target.column(model)].to_numpy(float)
    labels, patients = target.labels(rows), rows["patient"].to_numpy(str)
    lines: list[dict[str, Any]] = []
    scored = {}  # rows by line
    for group, column in bands.items():
        for level in column.cat.categories:
            members = np.flatnonzero(column.to_numpy() == level)
            if len(members):
                counts = count(labels[members], patients[members])
                if counts["minority_patients"] >= MINORITY_PATIENTS:
                    scored[len(lines)] = members
                known = target.known(rows, part=members).level(risk[members])
                mean = {"prevalence": known["observed"].item(), "risk": risk[members].mean()}
                lines.append({"group": str(group), "level": str(level), **counts, **mean})

    def statistic(draws: Array) -> dict[Any, Array]:
        values: dict[Any, Array] = {}
        for k, members in scored.items():
            known, own = target.known(rows, draws, members), risk[members]
            found = known.ranking(own) | known.level(own) | known.calibration(own)
            values |= {(k, name): found[name] for name in SUBGROUP_METRICS}
        return values

    table, intervals = pd.DataFrame(lines), None
    if scored:
        drawn = bootstrap(patients, seed, statistic)
        intervals = with_interval(*drawn, widening=widening)
    for name in SUBGROUP_METRICS:
        columns = [name, f"{name}_low", f"{name}_high"]
        table[columns] = (
            np.nan if intervals is None else intervals.xs(name, level=1).reindex(table.index)
        )
    return table


def subgroup_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a ``subgroup_table`` or a ``site_table`` as text, with the metrics that any has."""
    if "site" in table:
        cells = pd.DataFrame({"Site": table["site"]})
    else:
        cells = pd.DataFrame({"Subgroup": table["group"] + ": " + table["level"]})
    cells[noun.capitalize()] = table["n"].map(count_text)
    cells["Events"] = table["events"].map(count_text)
    for name, title in (("prevalence", "Observed"), ("risk", "Mean risk")):
        if name in table:  # an aggregate has neither
            cells[title] = table[name].map(percent)
    for name in SUBGROUP_METRICS:
        title, form, _ = METRICS[name]
        if table[name].notna().any():
            numbers = (table[column] for column in (name, f"{name}_low", f"{name}_high"))
            texts = [
                interval_text(value, low, high, form)
                for value, low, high in zip(*numbers, strict=True)
            ]
            place = 1 if name == "auroc" else len(cells.columns)  # a phone shows two columns
            cells.insert(place, f"{title} [95 %]", texts)
    return cells


def sites(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None without sites."""
    if evaluated.patients["site"].isna().all():
        return None
    names = evaluated.patients["site"].to_numpy(str)
    # A site that was held out is tested by one model, which learned from none of its patients.
    rows, widening = evaluated.rows, 1.0 if evaluated.leaves_out else evaluated.exact.widening
    exact = site_table(rows, evaluated.model, names, evaluated.seed, evaluated.target, widening)
    table = suppress_table(exact, evaluated.min_cell)
    pooled = pool(exact[table["auroc"].notna()])
    about = subgroup_caption(evaluated, "at each site")
    numbers = {"sites": table, "sites_pooled": pd.DataFrame([pooled])}
    return replace(site_topic(table, pooled, evaluated.noun, about), numbers=numbers)


def site_topic(table: pd.DataFrame, pooled: Mapping[str, float], noun: str, about: str) -> Topic:
    """Return the topic of a ``site_table`` and its ``pool``; ``about`` is the table's caption."""
    caption = "AUROC by site"
    if pooled["sites"] >= MIN_POOLED:
        caption += (
            "; random effects on its logit, by REML, with the interval of Hartung and Knapp, "
            "never narrower than that of a common effect"
        )
    figures = {}
    if table["auroc"].notna().any():
        figures["sites"] = plot_sites(table, pooled), caption
    if table["oe"].notna().any():
        calibration = "Calibration by site: below 1 the risks are too high"
        figures["sites_calibration"] = plot_site_calibration(table), calibration
    cells = Cells(subgroup_cells(table, noun), about, is_wide=True)
    text = [pooled_sentence(pooled, len(table))]
    text += [ABOUT_I2] if pooled["sites"] >= MIN_POOLED else []
    return Topic("Sites", text, [cells], figures)


def site_table(
    rows: pd.DataFrame,
    model: str,
    sites: NDArray[np.str_],
    seed: int,
    target: Target = LABEL,
    widening: float = 1.0,
) -> pd.DataFrame:
    """Return the ``subgroup_table`` of ``sites`` (n,), with the AUROC's logit and its error ``se``.

    Source: Debray et al. 2017, BMJ 356:i6460, for the error by the ends of the interval.
    """
    bands = pd.DataFrame({"site": pd.Categorical(sites)})
    table = subgroup_table(rows, model, bands, seed, target, widening).drop(columns="group")
    table = table.rename(columns={"level": "site"})
    # An AUROC of 0 or 1 has no logit: half a pair of patients is ranked otherwise.
    half = 0.5 / (table["events"] * (table["n"] - table["events"]))
    ends = table[["auroc", "auroc_low", "auroc_high"]].clip(half, 1 - half, axis=0)
    table["logit"] = logit(ends["auroc"])
    width = logit(ends["auroc_high"]) - logit(ends["auroc_low"])
    table["se"] = (width / (2 * norm.ppf(0.975))).where(width > 0)
    return table


def pool(table: pd.DataFrame) -> dict[str, float]:
    """Return the pooled AUROC, its intervals, ``i2``, ``tau2`` of its logit; NaN with few sites."""
    estimates = table.dropna(subset=["logit", "se"])
    pooled = random_effects(
        estimates["logit"].to_numpy(float), estimates["se"].to_numpy(float) ** 2
    )
    scale = {name: float(expit(x)) for name, x in pooled.items() if name not in ("i2", "tau2")}
    return {"sites": len(estimates), **pooled, **scale}


def pooled_sentence(pooled: Mapping[str, float], sites: int) -> str:
    """Return the result of ``pool`` in words; ``sites``: how many there are."""
    if pooled["sites"] < MIN_POOLED:
        return f"Nothing is pooled: fewer than {MIN_POOLED} sites have an AUROC with an interval."
    auroc = interval_text(pooled["value"], pooled["low"], pooled["high"])
    further = f"{FURTHER_SITES}: {prediction_text(pooled, '.3f')}"
    if math.isnan(pooled["prediction_low"]):
        further = f"{TOO_FEW_SITES} to say where further ones lie"
    return (
        f"Pooled over {pooled['sites']:.0f} of {sites} sites: AUROC {auroc}, I\N{SUPERSCRIPT TWO} "
        f"{percent(pooled['i2'])}; {further}."
    )


def prediction_text(pooled: Any, form: str) -> str:
    """Write the prediction interval of a result of ``random_effects``."""
    if math.isnan(pooled["prediction_low"]):
        return TOO_FEW_SITES
    return f"{pooled['prediction_low']:{form}} to {pooled['prediction_high']:{form}}"


def plot_sites(table: pd.DataFrame, pooled: Mapping[str, float]) -> plots.Plot:
    """Plot the AUROC of each site of a ``site_table`` that has one, and what ``pool`` returns."""
    figure, axes, names = _plot_metric(table, "auroc", below=2)
    alt = "Forest plot: AUROC of each site"
    if not np.isnan(pooled["value"]):
        below = len(names)
        mean, *ends = (pooled[name] for name in ("value", "low", "high"))
        axes.axvline(mean, **plots.DOTTED)
        look: dict[str, Any] = {"color": plots.OTHER, "label": "pooled [95 %]", "markersize": 7}
        axes.errorbar(mean, below, xerr=[[mean - ends[0]], [ends[1] - mean]], fmt="D", **look)
        names.append("pooled")
        alt += ", pooled"
    further = [pooled["prediction_low"], pooled["prediction_high"]]
    if not np.isnan(further).any():
        look = {"color": plots.INK, "marker": "|", "label": FURTHER_SITES}
        axes.plot(further, [len(names)] * 2, **look)
        names.append("further sites")
        alt += ", and of further sites"
    plots.name_lines(axes, names)
    axes.set_xlabel("AUROC")
    return plots.with_legend(figure, 2), f"{alt}."


def plot_site_calibration(table: pd.DataFrame) -> plots.Plot:
    """Plot observed by expected events of each site of a ``site_table`` that has them."""
    figure, axes, names = _plot_metric(table, "oe")
    axes.axvline(1, label="ideal", **plots.DOTTED)
    plots.name_lines(axes, names)
    axes.set_xlabel("observed by expected events")
    alt = "Forest plot: observed divided by expected events of each site, with intervals."
    return plots.with_legend(figure, 2), alt


def _plot_metric(table: pd.DataFrame, name: str, below: int = 0) -> tuple[Figure, Axes, list[str]]:
    """Plot a metric of each site that has it, with room for more lines; return the sites, too."""
    defined = table[table[name].notna()]
    value, low, high = (defined[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    figure, (axes,) = plots.new_figure(size=(4.0, 0.28 * (len(defined) + below) + 1.2))
    look: dict[str, Any] = {"color": plots.MODEL, "label": "a site [95 %]", "markersize": 5}
    axes.errorbar(value, range(len(defined)), xerr=[value - low, high - value], fmt="s", **look)
    return figure, axes, defined["site"].tolist()
