"""Calibration of a model in a new cohort, as it is and after an update of its decision rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from medgemma_clinical.data.folds import draw_folds
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.metrics import Array, calibration, log_odds, metrics
from medgemma_clinical.evaluation.metrics_table import (
    MINORITY_PATIENTS,
    VALUE,
    bootstrap,
    with_interval,
)

AS_IT_IS, INTERCEPT, BOTH = "as it is", "intercept", "intercept and slope"
METHODS = (AS_IT_IS, INTERCEPT, BOTH)

MEASURES = ("calibration_in_the_large", "calibration_slope", "e_average", "brier", "log_loss")


def fit_update(labels: Array, risk: Array, method: str) -> tuple[float, float]:
    """Return slope and intercept by which log-odds of a risk (n,) become those of the labels (n,).

    Where events do not become more frequent with the risk the intercept alone is fitted.

    Source: Steyerberg et al. 2004, "Validation and updating of predictive logistic regression
    models", Statistics in Medicine 23:2567.
    """
    if method == AS_IT_IS:
        return 1.0, 0.0
    fitted = calibration(labels, risk, np.ones((1, len(labels))))
    fit = {name: values.item() for name, values in fitted.items()}
    if method == BOTH and fit["calibration_slope"] > 0:
        return fit["calibration_slope"], fit["calibration_intercept"]
    return 1.0, fit["calibration_in_the_large"]


def crosswise(labels: Array, risk: Array, half: NDArray[np.int64]) -> pd.DataFrame:
    """Return the risks (n,) by each method, those of a half (0 or 1) fitted on the other one."""
    judged = pd.DataFrame(dict.fromkeys(METHODS, risk))
    for k in (0, 1):
        for method in METHODS:
            slope, intercept = fit_update(labels[half != k], risk[half != k], method)
            judged.loc[half == k, method] = expit(intercept + slope * log_odds(risk[half == k]))
    return judged


def judge_updates(rows: pd.DataFrame, model: str, seed: int) -> pd.DataFrame:
    """Return risks as ``crosswise`` of labelled rows, their patients drawn into two halves.

    No rows where a half has too few patients with, or without, the event.
    """
    event = rows.groupby("patient")["label"].max()
    if min(event.sum(), len(event) - event.sum()) < 2 * MINORITY_PATIENTS:
        return pd.DataFrame(columns=list(METHODS))
    labels, risk = rows["label"].to_numpy(float), rows[model].to_numpy(float)
    return crosswise(labels, risk, draw_folds(rows["patient"].to_numpy(str), labels, 2, seed))


def update_table(rows: pd.DataFrame, judged: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return ``MEASURES`` with intervals of the risks ``judged``: index method, metric."""
    labels, patients = rows["label"].to_numpy(float), rows["patient"].to_numpy(str)
    risks = {str(method): column.to_numpy(float) for method, column in judged.items()}

    def statistic(weights: Array) -> dict[Any, Array]:
        values: dict[Any, Array] = {}
        for method, risk in risks.items():
            found = calibration(labels, risk, weights) | metrics(labels, risk, weights)
            values |= {(method, name): found[name] for name in MEASURES}
        return values

    table = with_interval(*bootstrap(labels, patients, seed, statistic))
    # A distance grows by the noise of the draws: they give no interval.
    table.loc[(slice(None), "e_average"), VALUE[1:]] = np.nan
    return table.rename_axis(["method", "metric"])


def best_update(labels: Array, judged: pd.DataFrame) -> tuple[str, dict[str, float]]:
    """Return the update with the lower crosswise log loss, and the log loss of each method."""
    one = np.ones((1, len(labels)))
    losses = {
        method: metrics(labels, judged[method].to_numpy(float), one)["log_loss"].item()
        for method in METHODS
    }
    return min(METHODS[1:], key=losses.__getitem__), losses


def updated_rule(rule: DecisionRule, slope: float, intercept: float) -> DecisionRule:
    """Return a rule followed by an update; it predicts the event for the same rows."""
    threshold = float(expit(intercept + slope * logit(rule.threshold)))
    return DecisionRule(slope * rule.slope, intercept + slope * rule.intercept, threshold)
