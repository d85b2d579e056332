"""What acting on the risks brings: net benefit over thresholds, and shares at the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import Array, net_benefit
from medgemma_clinical.evaluation.metrics_table import bootstrap, label_risk_patient, with_interval
from medgemma_clinical.evaluation.tables import metric_table
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import percent


def decision(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    content = evaluated.content
    curve = decision_curve(evaluated.rows, evaluated.names, content.seed)
    threshold = "each fold's own" if content.threshold is None else percent(content.threshold)
    text = (
        "To act at a risk of 20\xa0% and above is to accept four false positives for one true "
        "positive. The net benefit is the share of true positives minus that of false positives, "
        "weighted at this rate. The model helps at thresholds where its curve lies above both "
        "“treat all” and “treat none”. The threshold is a choice of the clinician, not of the data."
    )
    names = ["sensitivity", "specificity", "ppv", "npv", "positives"]
    caption = f"At Youden's threshold, {threshold}, chosen on {content.chosen_on}"
    figure = plot_decision_curve(curve, evaluated.names), f"Decision curve{evaluated.beside}"
    return Topic(
        "Decision curve",
        [text],
        [Cells(metric_table(evaluated.metrics, names), caption)],
        {"decision_curve": figure},
        {"decision_curve": curve.reset_index()},
    )


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
