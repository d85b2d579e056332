"""What acting on the risks brings: shares at thresholds, and net benefit over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import Array, confusion_shares, net_benefit
from medgemma_clinical.evaluation.metrics_table import (
    bootstrap,
    label_risk_patient,
    patients_behind_shares,
    with_interval,
)
from medgemma_clinical.evaluation.suppress import any_small
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.topics.topic import (
    Cells,
    Details,
    Evaluated,
    Topic,
)
from medgemma_clinical.evaluation.verdicts import at_threshold, interval_text, percent

TREAT_ALL = "treat all"
SHARES = "sensitivity", "specificity", "ppv", "npv", "positives"
SHOWN_THRESHOLDS = 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7
"""Risks whose lines the table of thresholds has, as far as the decision curve reaches."""


def decision(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    content, names, rows = evaluated.content, evaluated.names, evaluated.rows
    if content.decided_risk is not None:
        rows = rows.assign(**{evaluated.model: content.decided_risk})
    curve = decision_curve(rows, names, content.seed)
    shown = {content.threshold, *(x for x in SHOWN_THRESHOLDS if x <= curve.index.max())}
    table = threshold_table(rows, names, sorted(shown), content.seed, evaluated.min_cell)
    text = (
        "To act at a risk of 20\xa0% and above is to accept four false positives for one true "
        "positive. The net benefit is the share of true positives minus that of false positives, "
        "weighted at this rate. The model helps at thresholds where its curve lies above both "
        "“treat all” and “treat none”. What acting brings and costs should choose the threshold; "
        "--threshold sets another one."
    )
    figure = plot_decision_curve(curve, names), f"Decision curve{evaluated.beside}"
    cells = threshold_cells(table, content.threshold)
    beginning = at_threshold(content.threshold, content.threshold_choice)
    meanings = {METRICS[name][0]: METRICS[name][2] for name in SHARES} | {
        "Minus": "net benefit of this model minus that of another, or of predicting all positive"
    }
    return Topic(
        "Decision curve",
        [text],
        [Cells(cells, f"{beginning}, and at others", is_wide=True)],
        {"decision_curve": figure},
        {"decision_curve": curve.reset_index(), "thresholds": table},
        [Details("What the columns are", terms=meanings)],
    )


def threshold_table(
    rows: pd.DataFrame, names: Sequence[str], thresholds: Sequence[float], seed: int, min_cell: int
) -> pd.DataFrame:
    """Return threshold, metric, value, low and high of the first model.

    Metrics: shares, net benefit, and its difference to the other models and to treating all; none
    at a threshold that splits off a small count.
    """
    labels, risk, patients = label_risk_patient(rows, names[0])
    risks = {name: rows[name].to_numpy(float) for name in names} | {TREAT_ALL: np.ones(len(rows))}
    cuts = np.array(thresholds)

    def statistic(weights: Array) -> dict[Any, Array]:
        benefits = {name: net_benefit(labels, x, cuts, weights) for name, x in risks.items()}
        values: dict[Any, Array] = {}
        for k, threshold in enumerate(thresholds):
            at: dict[str, Array] = confusion_shares(labels, risk >= threshold, weights)
            at["net benefit"] = benefits[names[0]][:, k]
            for name in (*names[1:], TREAT_ALL):
                at[f"minus {name}"] = benefits[names[0]][:, k] - benefits[name][:, k]
            values |= {(threshold, name): x for name, x in at.items()}
        return values

    behind: dict[Any, int] = {}
    hidden: list[float] = []
    for threshold in thresholds:
        positive = risk >= threshold
        of_shares = patients_behind_shares(labels, positive, patients)
        behind |= {(threshold, share): patients for share, patients in of_shares.items()}
        cells = [(positive == p) & (labels == y) for p in (True, False) for y in (0, 1)]
        if any_small([count_patients(patients, cell) for cell in cells], min_cell):
            hidden.append(threshold)
    table = with_interval(*bootstrap(labels, patients, seed, statistic), behind)
    table = table.rename_axis(["threshold", "metric"]).reset_index()
    return table[~table["threshold"].isin(hidden)]


def threshold_cells(table: pd.DataFrame, used: float) -> pd.DataFrame:
    """Return a ``threshold_table`` as text, a line a threshold; the one that is ``used`` first."""
    lines: list[dict[str, str]] = []
    by_threshold = {float(str(threshold)): part for threshold, part in table.groupby("threshold")}
    for threshold in sorted(by_threshold, key=lambda x: (x != used, x)):
        part = by_threshold[threshold]
        line = {"Threshold": percent(threshold) + " (in use)" * (threshold == used)}
        for _, metric, value, low, high in part.itertuples(index=False):
            if metric in SHARES:
                line[METRICS[metric][0]] = interval_text(value, low, high, ".1f", 100)
            else:
                form = "+z.1f" if metric.startswith("minus") else "z.1f"
                title = metric.capitalize() + " of 100 patients" * (metric == "net benefit")
                line[title] = interval_text(value, low, high, form, 100)
        lines.append(line)
    return pd.DataFrame(lines)


def decision_curve(rows: pd.DataFrame, models: list[str], seed: int) -> pd.DataFrame:
    """Return net benefits by threshold risk; low and high are those of the first model."""
    labels, risk, patients = label_risk_patient(rows, models[0])
    highest = min(0.99, max(0.05, 2 * labels.mean(), float(np.quantile(risk, 0.99))))
    thresholds = np.arange(1, math.floor(100 * highest) + 1) / 100  # up to those of use

    def statistic(weights: Array) -> dict[Any, Array]:
        benefit = net_benefit(labels, risk, thresholds, weights)
        return dict(zip(thresholds.tolist(), benefit.T, strict=True))

    table = with_interval(*bootstrap(labels, patients, seed, statistic))
    table = table.rename_axis("threshold").rename(columns={"value": models[0]})
    other_risks = {name: rows[name].to_numpy(float) for name in models[1:]}
    other_risks["treat_all"] = np.ones(len(rows))
    for name, other_risk in other_risks.items():
        table[name] = net_benefit(labels, other_risk, thresholds, np.ones((1, len(rows))))[0]
    return table


def plot_decision_curve(table: pd.DataFrame, models: Sequence[str]) -> plots.Plot:
    """Plot a ``decision_curve`` of the model and the baseline."""
    figure, (axes,) = plots.new_figure()
    threshold = 100 * table.index.to_numpy()
    axes.fill_between(
        threshold, table["low"], table["high"], color=plots.MODEL, alpha=0.18, linewidth=0
    )
    for name, line in zip(models, plots.LINES, strict=False):
        axes.plot(threshold, table[name], **line)
    axes.plot(threshold, table["treat_all"], "-.", color=plots.INK, linewidth=1, label="treat all")
    axes.axhline(0, label="treat none", **plots.DOTTED)
    top = 1.1 * max(table["treat_all"].max(), table["high"].max())
    axes.set(xlabel="threshold risk, %", ylabel="net benefit", ylim=(-0.25 * top, top))
    return plots.with_legend(figure), "Decision curve: net benefit over the threshold risk."
