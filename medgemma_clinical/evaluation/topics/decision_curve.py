"""What acting on the risks brings: shares at thresholds, and net benefit over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import SHARES, Array
from medgemma_clinical.evaluation.metrics_table import (
    bootstrap,
    patients_behind_shares,
    with_interval,
)
from medgemma_clinical.evaluation.tables import METRICS, metric_table
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, percent, value_text

SHOWN_THRESHOLDS = 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7
"""Risks whose lines the table of thresholds has, as far as the decision curve reaches."""

ACTING = (
    "To act at a risk of 20\xa0% and above is to accept four false positives for one true "
    "positive. The net benefit is the share of true positives minus that of false positives, "
    "weighted at this rate. The model helps at thresholds where its curve lies above both "
    "“treat all” and “treat none”."
)
"""What a decision curve shows."""

TREAT_ALL = "treat all or none"


def decision(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    if evaluated.min_cell:
        return without_curve(evaluated)
    names = evaluated.names
    curve = decision_curve(evaluated)
    shown = {evaluated.threshold, *(x for x in SHOWN_THRESHOLDS if x <= curve.index.max())}
    table = threshold_table(evaluated, sorted(shown))
    text = (
        f"{ACTING} What acting brings and costs should choose the threshold; --threshold sets "
        "another one."
    )
    figure = plot_decision_curve(curve, names), f"Decision curve{evaluated.beside}"
    cells = threshold_cells(table, evaluated.threshold)
    meanings = {METRICS[name].title: METRICS[name].meaning for name in SHARES} | {
        "Net benefit": "of 100 patients: true positives less the false ones that they outweigh",
        "Minus": "net benefit of this model minus that of another, or of the better of predicting "
        "all or none positive",
    }
    return Topic(
        "Decision curve",
        [text],
        [Cells(cells, f"{evaluated.at_threshold}, and at others", is_wide=True)],
        {"decision_curve": figure},
        {"decision_curve": curve.reset_index(), "thresholds": table},
        terms=meanings,
    )


def without_curve(evaluated: Evaluated) -> Topic:
    """Return the topic of one threshold: the difference of two would tell small counts."""
    cells = metric_table(evaluated.metrics, SHARES)
    tables = [Cells(cells, evaluated.at_threshold)] if len(cells) else []
    return Topic("Decision curve", evaluated.no_curves, tables)


def threshold_table(evaluated: Evaluated, thresholds: Sequence[float]) -> pd.DataFrame:
    """Return threshold, metric, value, low and high of the first model.

    Metrics: shares, net benefit, and that minus the one of the other models and of treating all or
    none.
    """
    names, target, rows = evaluated.names, evaluated.target, evaluated.rows
    risks = {name: evaluated.risk(name) for name in names} | {TREAT_ALL: np.ones(len(rows))}
    risk, points = risks[names[0]], np.array(thresholds)

    def statistic(draws: Array) -> dict[Any, Array]:
        known = target.known(rows, draws)
        benefits = {name: known.net_benefit(x, points) for name, x in risks.items()}
        benefits[TREAT_ALL] = benefits[TREAT_ALL].clip(0)
        values: dict[Any, Array] = {}
        for k, threshold in enumerate(thresholds):
            at = known.shares(risk >= threshold)
            at["net benefit"] = benefits[names[0]][:, k]
            for name in (*names[1:], TREAT_ALL):
                at[f"minus {name}"] = benefits[names[0]][:, k] - benefits[name][:, k]
            values |= {(threshold, name): x for name, x in at.items()}
        return values

    behind: dict[Any, int] = {}
    for threshold in thresholds:
        of_shares = patients_behind_shares(evaluated.labels, risk >= threshold, evaluated.patient)
        behind |= {(threshold, share): n for share, n in of_shares.items()}
    drawn = bootstrap(evaluated.patient, evaluated.seed, statistic)
    table = with_interval(*drawn, behind, evaluated.exact.widening)
    return table.rename_axis(["threshold", "metric"]).reset_index()


def threshold_cells(table: pd.DataFrame, used: float) -> pd.DataFrame:
    """Return a ``threshold_table`` as text, a line a threshold; the one that is ``used`` first."""
    lines: list[dict[str, str]] = []
    for threshold in sorted(table["threshold"].unique(), key=lambda x: (x != used, x)):
        line = {"Threshold": percent(threshold) + (" (in use)" if threshold == used else "")}
        for row in table[table["threshold"] == threshold].itertuples():
            title, form = row.metric.capitalize(), "+z.1f"
            if row.metric == "net benefit":
                title, form = "Net benefit", "z.1f"
            elif row.metric in SHARES:
                title, form, _ = METRICS[row.metric]
            line[title] = value_text(row, form, 100)
        lines.append(line)
    return pd.DataFrame(lines).fillna(NO_VALUE)


def decision_curve(evaluated: Evaluated) -> pd.DataFrame:
    """Return net benefits by threshold risk; low and high are those of the first model."""
    names, risk, known = evaluated.names, evaluated.risk(), evaluated.known
    observed = known.level(risk)["observed"].item()
    highest = min(0.99, max(0.05, 2 * observed, float(np.quantile(risk, 0.99))))
    thresholds = np.arange(1, math.floor(100 * highest) + 1) / 100  # up to those of use

    def benefit(draws: Array) -> Array:
        return evaluated.target.known(evaluated.rows, draws).net_benefit(risk, thresholds)

    drawn = bootstrap(evaluated.patient, evaluated.seed, benefit)
    index = pd.Index(thresholds, name="threshold")
    table = with_interval(*drawn, widening=evaluated.exact.widening).set_index(index)
    table = table.rename(columns={"value": names[0]})
    other_risks = {name: evaluated.risk(name) for name in names[1:]}
    other_risks["treat_all"] = np.ones(len(risk))
    for name, other_risk in other_risks.items():
        table[name] = known.net_benefit(other_risk, thresholds)[0]
    return table


def plot_decision_curve(table: pd.DataFrame, models: Sequence[str]) -> plots.Plot:
    """Plot a ``decision_curve`` of the model and the baseline."""
    figure, (axes,) = plots.new_figure()
    table = table.set_axis(100 * table.index)
    plots.fill_band(axes, table.index, table["low"], table["high"])
    for name, line in zip(models, plots.LINES, strict=False):
        axes.plot(table[name], **line)
    axes.plot(table["treat_all"], "-.", color=plots.INK, linewidth=1, label="treat all")
    axes.axhline(0, label="treat none", **plots.DOTTED)
    top = 1.1 * max(table["treat_all"].max(), table["high"].max())
    axes.set(xlabel="threshold risk, %", ylabel="net benefit", ylim=(-0.25 * top, top))
    return plots.with_legend(figure), "Decision curve: net benefit over the threshold risk."
