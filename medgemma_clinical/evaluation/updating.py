"""Update of a model's decision rule in a new cohort: which one tests choose, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.evaluation import decision, metrics
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.metrics import Array, log_odds
from medgemma_clinical.evaluation.metrics_table import (
    DIFFERENCE,
    MINORITY_PATIENTS,
    bootstrap,
    with_interval,
)
from medgemma_clinical.evaluation.verdicts import difference_text

CHOSEN = "as the tests choose"
"""The method that tests choose anew on each half: what the whole procedure brings."""

DIVISIONS = 20
"""Divisions of the patients into two halves, over which figures are averaged."""


@dataclass(frozen=True)
class Updates:
    """What updates of a model bring in n rows."""

    method: str  # of ``METHODS``, chosen on all rows
    slope: float  # of this method: it multiplies log-odds
    intercept: float
    # Index (method, metric); columns ``VALUE``, of log_loss also ``DIFFERENCE`` to the
    # risks that are not updated. Updates of the other half of the patients predict a row.
    table: pd.DataFrame
    risks: pd.DataFrame  # (n, methods) mean over the divisions, for the figure

    @property
    def gain(self) -> str:
        """Change of the log loss in halves that the update has not seen, as text."""
        return difference_text(self.table.loc[(CHOSEN, "log_loss")], "+.4f")


def crosswise(
    labels: Array,
    risk: Array,
    patients: NDArray[np.generic],
    half: NDArray[np.int64],
    *,
    with_slope: bool,
) -> pd.DataFrame:
    """Return the risks (n,) by each method, those of a half (0 or 1) fitted on the other one."""
    updated = pd.DataFrame(dict.fromkeys((*decision.METHODS, CHOSEN), risk))
    for k in (0, 1):
        other, odds = half != k, log_odds(risk[half == k])
        chosen_method, updates = decision.choose_update(
            labels[other], risk[other], patients[other], with_slope=with_slope
        )
        for name in updated:
            method = chosen_method if name == CHOSEN else str(name)
            slope, intercept = updates.get(method, updates[decision.INTERCEPT])
            updated.loc[half == k, name] = expit(intercept + slope * odds)
    return updated


def evaluate_updates(rows: pd.DataFrame, model: str, seed: int) -> Updates | None:
    """Choose an update on labelled rows and estimate its effect in new rows; None where a half
    of the patients has too few with, or without, the event."""
    event = rows.groupby("patient")["label"].max()
    if min(event.sum(), len(event) - event.sum()) < 2 * MINORITY_PATIENTS:
        return None
    labels, risk = rows["label"].to_numpy(float), rows[model].to_numpy(float)
    patients, with_slope = rows["patient"].to_numpy(str), labels.sum() >= decision.MIN_SLOPE_EVENTS
    names = (*decision.METHODS, CHOSEN)
    halves: dict[Any, list[float]] = {}
    risks, losses = (np.zeros((len(names), len(rows))) for _ in range(2))  # means
    for division in np.random.default_rng(seed).integers(2**32, size=DIVISIONS).tolist():
        half = draw_folds(patients, labels, 2, division)
        updated = crosswise(labels, risk, patients, half, with_slope=with_slope)
        values = updated.to_numpy().T  # (methods, n)
        risks += values / DIVISIONS
        losses += metrics.row_losses(labels, log_odds(values)) / DIVISIONS
        for k in (0, 1):  # pooled, the error of one half would cancel that of the other
            in_half = half == k
            half_labels, once = labels[in_half], np.ones((1, in_half.sum()))
            for name, half_risk in zip(names, values[:, in_half], strict=True):
                slope = metrics.calibration(half_labels, half_risk, once)["calibration_slope"]
                error = metrics.calibration_error(half_labels, half_risk)["ici"]
                for metric, figure in (("calibration_slope", slope.item()), ("ici", error)):
                    halves.setdefault((name, metric), []).append(figure)

    def statistic(weights: Array) -> dict[Any, Array]:
        means = weights @ losses.T / weights.sum(axis=1, keepdims=True)  # (R, methods)
        return {(name, "log_loss"): mean for name, mean in zip(names, means.T, strict=True)}

    value, drawn = bootstrap(labels, patients, seed, statistic)
    table = with_interval(value, drawn)
    none = decision.NOT_UPDATED, "log_loss"
    table[DIFFERENCE] = with_interval(value - value[none], drawn.sub(drawn[none], axis=0))
    for key, figures in halves.items():
        table.loc[key, "value"] = np.mean([x for x in figures if np.isfinite(x)] or [np.nan])
    method, updates = decision.choose_update(labels, risk, patients, with_slope=with_slope)
    by_method = pd.DataFrame(risks.T, columns=list(names), index=rows.index)
    return Updates(method, *updates[method], table.rename_axis(["method", "metric"]), by_method)


def updated_rule(rule: DecisionRule, slope: float, intercept: float) -> DecisionRule:
    """Return a rule followed by an update; it predicts the event for the same rows."""
    threshold = float(expit(intercept + slope * logit(rule.threshold)))
    return DecisionRule(slope * rule.slope, intercept + slope * rule.intercept, threshold)
