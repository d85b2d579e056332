"""Whether risks come true, as they are and after an update: slope, ICI, curve and bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients, large_bins
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.decision import METHODS, MIN_SLOPE_EVENTS
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import (
    EXPECTED,
    MINORITY_PATIENTS,
    bootstrap,
    with_interval,
)
from medgemma_clinical.evaluation.tables import metric_table
from medgemma_clinical.evaluation.target import Target
from medgemma_clinical.evaluation.topics.topic import Cells, Details, Evaluated, Topic
from medgemma_clinical.evaluation.updating import CHOSEN, DIVISIONS, Update
from medgemma_clinical.evaluation.verdicts import difference_text, value_text

MAX_BINS, EVENTS_A_BIN = 10, 5
SHOWN_RISKS, CURVE_POINTS = (0.01, 0.99), 50
"""Quantiles of the risks between which the curve is drawn, and its points."""

FITTED = "slope", "intercept", "ici"
ABOUT_EXPECTED = (
    "Expected of the recalibrated model: near ideal by construction, as these rows chose its rule; "
    "the interval holds the error of the rule"
)


def calibration_topic(
    evaluated: Evaluated,
    before: Mapping[str, Array] | None = None,  # risks (n,) before the recalibration, by target
    recalibration: str = "",  # how the model that is handed over is recalibrated, in words
) -> Topic:
    """Return the topic."""
    metrics, target = evaluated.metrics, evaluated.target
    risk = evaluated.risk() if before is None else before[target.name]
    bins = calibration_table(
        evaluated.rows, risk, target, evaluated.seed, bins_of_many(evaluated, risk)
    )
    pooled = f", the risks of {evaluated.folds} models pooled" if evaluated.folds else ""
    expected = metric_table(metrics, [EXPECTED + name for name in FITTED])
    if len(expected):
        pooled += ", before the recalibration"
    weights = "effective_n", "weights_cut", "largest_weight"
    shown = "oe", "slope", "ici", "ici_ideal", *weights  # the intercept says what O/E says
    cells = metric_table(metrics, shown)
    beside = "observed", "mean_risk", "intercept", "e50", "e90"
    further = metric_table(metrics, [*beside, "brier", "scaled_brier", "log_loss"])
    smooth = None
    numbers = {"calibration": bins}
    if not evaluated.min_cell:
        smooth = smooth_curve(evaluated.rows, risk, target, evaluated.seed)
        numbers["calibration_curve"] = smooth
    return Topic(
        "Calibration",
        [
            f"Do the predicted risks come true? Of the {evaluated.noun} with a risk of 20\xa0%, "
            "20\xa0% should have the event.",
            *filter(None, [recalibration, target.assumption, target.note]),
            *evaluated.no_curves,
        ],
        [
            Cells(cells, f"How well risks agree with what was observed{pooled}"),
            *([Cells(expected, ABOUT_EXPECTED)] if len(expected) else []),
        ],
        calibration_figures(evaluated, risk, bins, smooth),
        numbers,
        [Details("Further measures", table=Cells(further, "Further measures of the risks"))],
    )


def calibration_figures(
    evaluated: Evaluated,
    risk: Array,  # (n,)
    bins: pd.DataFrame,
    smooth: pd.DataFrame | None,  # None where small counts are hidden: no row is drawn
) -> dict[str, tuple[plots.Plot, str]]:
    """Return the figures by name, with their captions."""
    if smooth is None:
        n = evaluated.min_cell
        caption = f"Calibration in bins of at least {n} patients with, and {n} without, the event"
        return {"calibration": (plot_calibration(bins, bins[:0], None), caption)}
    sizes = "bins of equal size; below, the risks"
    caption = f"Calibration in {sizes}; too few events for a curve"
    if len(smooth):
        caption = (
            f"Calibration curve with its 95\xa0% band, and {sizes}. Where the band misses the "
            "dotted line, the risks are off; where it holds it, no fault is shown"
        )
    distribution = plot_risks(evaluated.labels, risk)
    return {
        "calibration": (plot_calibration(bins, smooth, risk), caption),
        "risk_distribution": (distribution, "Distribution of the risks by outcome"),
    }


def shares_below(labels: Array) -> Array:
    """Return the shares of the rows below the edges of bins of equal size, as events permit."""
    minority = min(np.nansum(labels), np.nansum(1 - labels))
    bins = int(np.clip(minority // EVENTS_A_BIN, 2, MAX_BINS))
    return np.linspace(0, 1, bins + 1)[1:-1]


def bins_of_many(evaluated: Evaluated, risk: Array) -> NDArray[np.intp] | None:
    """Return the bin (n,) of each row where small counts are hidden; else None.

    The shares at the threshold, where they are shown, and the bins tell their difference: bins end
    there, or there is one bin.
    """
    if not evaluated.min_cell:
        return None
    labels = evaluated.labels
    edges = np.quantile(risk, shares_below(labels)).tolist()
    is_shown = pd.notna(evaluated.metrics.of(evaluated.model)["value"].get("sensitivity"))
    threshold = [evaluated.threshold] if is_shown else []
    edges = [*threshold, *edges]
    edges = large_bins(labels, risk, evaluated.patient, evaluated.min_cell, edges)
    return np.searchsorted(edges if {*threshold} <= {*edges} else [], risk, side="right")


def calibration_table(
    rows: pd.DataFrame,
    risk: Array,  # (n,)
    target: Target,
    seed: int,
    index: NDArray[np.intp] | None = None,
) -> pd.DataFrame:
    """Return n, mean risk and observed share of events in bins by rising risk.

    ``index`` (n,): the bin of each row; None: bins of equal size.
    """
    if index is None:  # as scikit-learn's calibration_curve bins
        edges = np.quantile(risk, shares_below(target.labels(rows)))
        index = np.searchsorted(edges, risk)
    bins = [np.flatnonzero(index == k) for k in np.unique(index)]
    patients, is_known = rows["patient"].to_numpy(str), ~np.isnan(target.labels(rows))

    def share(draws: Array) -> dict[Any, Array]:
        known = [target.known(rows, draws, members) for members in bins]
        return {k: x.level(risk[bins[k]])["observed"] for k, x in enumerate(known)}

    behind = {
        k: count_patients(patients, members[is_known[members]]) for k, members in enumerate(bins)
    }
    table = with_interval(*bootstrap(patients, seed, share), behind)
    table.insert(0, "n", [len(members) for members in bins])
    table.insert(1, "predicted", [risk[members].mean() for members in bins])
    return table.rename(columns={"value": "observed"})


def smooth_curve(rows: pd.DataFrame, risk: Array, target: Target, seed: int) -> pd.DataFrame:
    """Return the flexible calibration curve: predicted risk, observed share, low and high."""
    first, last = np.quantile(risk, SHOWN_RISKS)
    at = np.linspace(first, last, CURVE_POINTS)

    def curve(draws: Array) -> Array:
        known = target.known(rows, draws)
        return known.link.curve(known.fitted, risk, known.fitted_weights, at)

    drawn = bootstrap(rows["patient"].to_numpy(str), seed, curve)
    table = with_interval(*drawn).rename(columns={"value": "observed"})
    table.insert(0, "predicted", at)
    return table.dropna()


def plot_calibration(table: pd.DataFrame, smooth: pd.DataFrame, risk: Array | None) -> plots.Plot:
    """Plot a ``calibration_table`` and a ``smooth_curve``, above a histogram of known risks."""
    figure, panels = plots.new_figure((4,) if risk is None else (4, 1))
    axes, bins, smooth = panels[0], 100 * table, 100 * smooth
    shown = smooth["predicted"] if risk is None else 100 * risk
    highest = np.nanmax([*bins["predicted"], *bins["observed"], *bins["high"], *shown])
    top = min(100.0, 1.05 * highest)
    axes.plot([0, 100], [0, 100], label="ideal", **plots.DOTTED)
    if len(smooth):
        plots.fill_band(axes, smooth["predicted"], smooth["low"], smooth["high"])
        axes.plot("predicted", "observed", data=smooth, color=plots.MODEL, label="observed [95 %]")
    axes.vlines(bins["predicted"], bins["low"], bins["high"], color=plots.INK, linewidth=1)
    look: dict[str, Any] = {"label": "bins [95 %]", "color": plots.INK, "markersize": 4}
    axes.plot(bins["predicted"], bins["observed"], "o", **look)
    axes.set(ylabel="observed, %", xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
    panels[-1].set_xlabel("predicted risk, %")
    form = "curve with its band" if len(smooth) else "in bins"
    alt = f"Calibration {form}: share of events over the risk"
    if risk is not None:
        edges = np.linspace(0, top, 41).tolist()
        panels[1].hist(100 * risk, edges, color=plots.MODEL, alpha=0.5)
        panels[1].set(ylabel="count", yticks=[])
        alt += ", and a histogram"
    return plots.with_legend(figure), f"{alt}."


def plot_risks(labels: Array, risk: Array) -> plots.Plot:
    """Plot the distribution of the risks of the events above that of the non-events."""
    figure, panels = plots.new_figure((1, 1))
    edges = np.linspace(0, min(100.0, 102 * risk.max()), 41).tolist()
    classes = ((1, "events", plots.OTHER), (0, "non-events", plots.MODEL))
    for axes, (label, name, colour) in zip(panels, classes, strict=True):
        percents = 100 * risk[labels == label]
        weights = np.full(len(percents), 100 / len(percents))
        axes.hist(percents, edges, weights=weights, color=colour, alpha=0.7)
        axes.axvline(float(np.median(percents)), **plots.DOTTED)
        axes.set_ylabel(f"% of {name}")
    panels[-1].set_xlabel("predicted risk, % (dotted: median)")
    return figure, "Histograms of the predicted risks of events and of non-events."


def calibration_updates(evaluated: Evaluated, tried: Sequence[Update] | None) -> Topic:
    """Return the topic; None: too few patients to try an update."""
    title, noun = "Calibration after an update", evaluated.noun
    if tried is None:
        text = (
            "No update was tried: a half of these patients has fewer than "
            f"{MINORITY_PATIENTS} with, or without, the event."
        )
        return Topic(title, [text])
    text = (
        "An update moves the risks on the scale of their calibration, all alike, so it changes no "
        f"ranking. Tests choose it; a slope is tried from {MIN_SLOPE_EVENTS} events on. How good "
        f"it is in new {noun} is estimated in halves: the risks of each half of the patients are "
        f"updated by a fit on the other half, {DIVISIONS} times. “{CHOSEN.capitalize()}” chooses "
        "in each half anew. Slope and ICI are those of each half by itself, averaged. Both halves "
        "have the same share of events, which keeps the mean risk about right whatever the update: "
        "compare the log loss."
    )
    texts, tables = [text], []
    figures: dict[str, tuple[plots.Plot, str]] = {}
    numbers: dict[str, pd.DataFrame] = {}
    for update in tried:
        view = evaluated.at(update.target)
        own = f" for {update.target.title}" if len(evaluated.targets) > 1 else ""
        log_loss: Any = update.table.loc[(CHOSEN, "log_loss")]
        shown = "" if log_loss["difference_high"] < 0 else "not "
        texts.append(f"Chosen{own}: {update.method}. The log loss is {shown}shown to fall.")
        bins = bins_of_many(view, view.risk())
        curves = {
            name: calibration_table(
                view.rows, update.risks[name].to_numpy(float), view.target, view.seed, bins
            )
            for name in METHODS
        }
        caption = "Calibration curves of the model not updated and after each update"
        key = update.target.key("updates")
        figures[key] = plot_updates(curves), f"{caption}{own}"
        numbers[key] = update.table.reset_index()
        caption = f"The model not updated and updated on these {noun}{own}"
        tables.append(Cells(update_cells(update.table), caption))
    return Topic(title, texts, tables, figures, numbers)


def update_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of ``Updates`` as text, a line a method."""
    lines = []
    for method in table.index.unique("method"):
        loss = table.loc[(method, "log_loss")]
        line = {"Update": method}
        line["Slope"] = value_text(table.loc[(method, "slope")], ".2f")
        line["ICI"] = value_text(table.loc[(method, "ici")])
        line["Log loss [95 %]"] = value_text(loss, ".4f")
        line["Change [95 %]"] = difference_text(loss, "+z.4f")
        lines.append(line)
    cells = pd.DataFrame(lines)
    cells.loc[0, "Change [95 %]"] = ""  # not updated: the reference of the others
    return cells


def plot_updates(curves: Mapping[str, pd.DataFrame]) -> plots.Plot:
    """Plot a ``calibration_table`` of the model not updated, then of each update."""
    figure, (axes,) = plots.new_figure()
    ends = pd.concat(list(curves.values()))[["predicted", "observed"]].max()
    axes.plot([0, 100 * ends.max()], [0, 100 * ends.max()], label="ideal", **plots.DOTTED)
    lines = zip(
        curves.items(), ("o-.", "s--", "D-"), (plots.INK, plots.OTHER, plots.MODEL), strict=True
    )
    for (name, table), form, colour in lines:
        x, y = 100 * table["predicted"], 100 * table["observed"]
        axes.plot(x, y, form, color=colour, linewidth=1, label=name)
    axes.set(xlabel="predicted risk, %", ylabel="observed, %")
    alt = "Calibration curves of the model not updated and after each update."
    return plots.with_legend(figure, 2), alt
