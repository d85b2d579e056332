"""Probability that a row's follow-up has not ended, where the inputs tell whose ends early.

Reasons to end, such as an intervention and the end of the record, get a regression each, and their
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
"""Intervals of follow-up with a hazard of their own; about as many rows are censored in each."""

MIN_CENSORED = 10
"""Patients censored before the horizon that a regression needs."""


def censoring_survival(
    hours: Array,
    is_censored: NDArray[np.bool_],
    inputs: Array,
    horizon: float,
    groups: NDArray[np.generic],
    seed: int,
    folds: int = 5,
) -> Array:
    """Compute the probability of being uncensored just before the row's time or the horizon.

    A penalised logistic regression predicts the censoring in each interval of follow-up from the
    interval and the inputs. It is fitted on other patients than those that it predicts.

    Args:
        hours: (n,) time of the event or the end of follow-up.
        is_censored: (n,) whether the follow-up ends for the modelled reason.
        inputs: (n, p) what the censoring may depend on, NaN where unknown.
        horizon: in the unit of ``hours``.
        groups: (n,) patient of each row.
        seed: seed of the folds.
        folds: parts that the patients are cut into.

    Returns:
        (n,) probabilities, ``censoring`` of ``metrics_at``; Kaplan-Meier's where fewer than ten
        patients are censored before the horizon.

    Source: Robins and Finkelstein 2000, Biometrics 56:779.
    """
    kaplan_meier = uncensored_probability(hours, np.where(is_censored, 0.0, 1.0), horizon)
    # Time as the mean cumulative hazard: within an interval the hazard is about constant then.
    clock = -np.log(kaplan_meier)
    end = clock.max()
    is_censored = is_censored & (clock < end)
    if len(np.unique(groups[is_censored])) < MIN_CENSORED:
        return kaplan_meier
    shares = np.arange(1, INTERVALS) / INTERVALS
    starts = np.quantile(clock[is_censored], shares, method="inverted_cdf")
    edges = np.unique([0.0, *starts, end])
    exposure = ((clock[:, None] - edges[:-1]) / np.diff(edges)).clip(0, 1)  # (n, J)
    last = np.searchsorted(edges[1:-1], clock, side="right")
    censored = is_censored[:, None] & (last[:, None] == np.arange(exposure.shape[1]))
    row_weights = np.where(censored, 1.0, exposure)

    def table(rows: NDArray[np.int64], intervals: NDArray[np.int64]) -> Array:
        return np.hstack([np.eye(exposure.shape[1])[intervals], inputs[rows]])

    survival = np.ones(len(hours))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(inputs, is_censored, groups):
        rows, intervals = np.nonzero(row_weights * np.isin(np.arange(len(hours)), train)[:, None])
        weights = {"logisticregression__sample_weight": row_weights[rows, intervals]}
        model = regression().fit(table(rows, intervals), censored[rows, intervals], **weights)
        rows, intervals = np.nonzero(exposure * np.isin(np.arange(len(hours)), test)[:, None])
        hazard = model.predict_proba(table(rows, intervals))[:, 1]
        np.multiply.at(survival, rows, (1 - hazard) ** exposure[rows, intervals])
    return survival
