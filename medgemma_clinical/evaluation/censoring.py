"""Weights for rows whose follow-up ends for reasons that the inputs tell: a regression of its end.

Several reasons, such as an intervention and the end of the record, get a regression each, and their
probabilities are multiplied: what leads to a transplant is not what ends a record.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from medgemma_clinical.evaluation.baselines import regression
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.time_metrics import uncensored_probability

INTERVALS = 10
"""Pieces of follow-up, with about as many censored rows each, that have a hazard of their own."""

MIN_CENSORED = 10
"""Censored rows by the horizon that a regression needs."""


def censoring_survival(
    hours: Array,
    is_censored: NDArray[np.bool_],
    inputs: Array,
    horizon: float,
    groups: NDArray[np.generic],
    seed: int,
    folds: int = 5,
) -> Array:
    """Compute the probability of being uncensored just before each row's time or the horizon.

    A penalised logistic regression of censoring in each interval of follow-up on the interval and
    the inputs. Each patient's probability is that of a regression on other patients.

    Args:
        hours: (n,) time of the event, of the censoring or of an end for another reason.
        is_censored: (n,) whether the follow-up ends for the reason that is modelled.
        inputs: (n, p) known at the prediction time; NaN where unknown.
        horizon: in the unit of ``hours``.
        groups: (n,) patient of each row.
        seed: seed of the folds.
        folds: number of parts that the patients are cut into.

    Returns:
        (n,) probabilities; Kaplan-Meier's where fewer than ten rows are censored by the horizon.

    Source: Robins and Finkelstein 2000, Biometrics 56:779, for weights by a model of the censoring.
    """
    km = uncensored_probability(hours, ~is_censored, horizon)
    # Time as the average cumulative hazard: within an interval the hazard is then about constant.
    clock = -np.log(km)
    censored = is_censored & (hours < horizon) & (clock < clock.max())
    if censored.sum() < MIN_CENSORED:
        return km
    quantiles = np.arange(1, INTERVALS) / INTERVALS
    starts = np.quantile(clock[censored], quantiles, method="inverted_cdf")
    edges = np.unique([0.0, *starts, clock.max()])
    passed = ((clock[:, None] - edges[:-1]) / np.diff(edges)).clip(0, 1)  # (n, J) share that passed
    ended = np.zeros(passed.shape, dtype=bool)
    interval = np.searchsorted(edges, clock[censored], side="right") - 1
    ended[censored, interval] = True
    seen = np.where(ended, 1.0, passed)

    def table(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        return np.hstack([np.eye(passed.shape[1])[columns], inputs[rows]])

    survival = np.ones(len(hours))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for training, test in splitter.split(inputs, censored, groups):
        row, column = np.nonzero(seen[training])
        row = training[row]
        weights = {"logisticregression__sample_weight": seen[row, column]}
        model = regression().fit(table(row, column), ended[row, column], **weights)
        row, column = np.nonzero(passed[test])
        if len(row):
            hazard = model.predict_proba(table(test[row], column))[:, 1]
            log_survival = passed[test[row], column] * np.log1p(-hazard)
            survival[test] = np.exp(np.bincount(row, log_survival, minlength=len(test)))
    return survival
