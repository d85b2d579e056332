"""Probability that a row's follow-up has not ended, where the inputs tell whose ends early.

Reasons to end, such as an intervention and the end of the record, get a regression each, and their
probabilities are multiplied: what leads to a transplant is not what ends a record.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from medgemma_clinical.data.fold_split import PATIENTS_A_FOLD, draw_folds
from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.evaluation.baselines import regression
from medgemma_clinical.evaluation.metrics import Array, clustered_error
from medgemma_clinical.evaluation.time_metrics import uncensored_probability

FOLDS = 5
INTERVALS = 10
"""Intervals of follow-up with a hazard of their own; about as many rows are censored in each."""

MIN_CENSORED = FOLDS * PATIENTS_A_FOLD
"""Patients censored before the horizon, and others, that a regression needs."""

LEVEL = 0.05
"""Significance level of the test whether censoring depends on the inputs."""


class _Fold(NamedTuple):
    """A regression, what a row of its training part adds to it, and the rows that it predicts."""

    test: NDArray[np.int64]  # (m,)
    inputs: Array  # (m, p) scaled
    exposure: Array  # (m, J)
    coefficients: Array  # (1 + J + p,)
    influence: Array  # (n, 1 + J + p) on the coefficients; 0 of rows that are predicted

    def survival(self, coefficients: Array) -> Array:
        """Return the probability (R, m) by coefficients (R, 1 + J + p)."""
        count = self.exposure.shape[1]
        level = coefficients[:, 1 + count :] @ self.inputs.T + coefficients[:, :1]
        log_survival = np.zeros_like(level)
        for interval in range(count):
            odds = level + coefficients[:, 1 + interval, None]
            log_survival -= self.exposure[:, interval] * np.logaddexp(0, odds)
        return np.exp(log_survival)


class CensoringRegression:
    """A penalised logistic regression of the censoring in each interval of follow-up.

    It is fitted on other patients than those that it predicts. Kaplan-Meier's probability stands
    in its place where few patients are censored before the horizon. A draw of patients moves its
    coefficients as far as the rows' influence on them tells.

    Source: Robins and Finkelstein 2000, Biometrics 56:779; Jaeckel 1972, "The infinitesimal
    jackknife".
    """

    def __init__(
        self,
        hours: Array,  # (n,) time of the event or the end of follow-up
        is_censored: NDArray[np.bool_],  # (n,) whether the follow-up ends for this reason
        inputs: Array,  # (n, p) what it may depend on, NaN where unknown
        horizon: float,
        groups: NDArray[np.generic],  # (n,) patient of each row
        seed: int,  # of the folds
    ) -> None:
        self.times = hours, np.where(is_censored, 0.0, 1.0), horizon
        # (n,) of being watched until just before the row's time or the horizon
        self.probability = uncensored_probability(*self.times)
        self.folds: list[_Fold] = []
        self.depends = False  # whether the inputs are shown to tell whose follow-up ends
        # Time as the mean cumulative hazard: within an interval the hazard is about constant then.
        clock = -np.log(self.probability)
        end = clock.max()
        is_censored = is_censored & (clock < end)
        if minority_patients(is_censored, groups) < MIN_CENSORED:
            return
        shares = np.arange(1, INTERVALS) / INTERVALS
        starts = np.quantile(clock[is_censored], shares, method="inverted_cdf")
        edges = np.unique([0.0, *starts, end])
        exposure = ((clock[:, None] - edges[:-1]) / np.diff(edges)).clip(0, 1)  # (n, J)
        last = np.searchsorted(edges[1:-1], clock, side="right")
        censored = is_censored[:, None] & (last[:, None] == np.arange(exposure.shape[1]))
        at_risk = np.where(censored, 1.0, exposure)
        gain = np.zeros(len(hours))
        fold_of_row = draw_folds(groups.astype(str), is_censored.astype(float), FOLDS, seed)
        self.probability = np.ones(len(hours))
        for k in range(FOLDS):
            train, test = np.flatnonzero(fold_of_row != k), np.flatnonzero(fold_of_row == k)
            fold = _fit_fold(inputs, at_risk, censored, exposure, train, test)
            self.folds.append(fold)
            self.probability[test] = fold.survival(fold.coefficients[None])[0]
            gain[test] = _gain(fold, at_risk, censored, train)
        self.depends = bool(gain.mean() > norm.ppf(1 - LEVEL) * clustered_error(gain, groups))

    def without_inputs(self) -> Self:
        """Return what Kaplan-Meier says of the same reason."""
        marginal = copy.copy(self)
        marginal.folds, marginal.probability = [], uncensored_probability(*self.times)
        return marginal

    def under(self, draws: Array) -> Array:
        """Return the probability (R, n) as draws (R, n) of the rows would tell it."""
        if not self.folds:
            return uncensored_probability(*self.times, draws)
        found = np.empty_like(draws)
        for fold in self.folds:
            moved = fold.coefficients + (draws - 1) @ fold.influence
            found[:, fold.test] = fold.survival(moved)
        return found


def _fit_fold(
    inputs: Array,
    at_risk: Array,  # (n, J) weight of each interval
    censored: NDArray[np.bool_],  # (n, J)
    exposure: Array,  # (n, J)
    train: NDArray[np.int64],
    test: NDArray[np.int64],
) -> _Fold:
    """Fit the regression on a training part."""
    scaler = regression()[:-1].fit(inputs[train])
    scaled = scaler.transform(inputs[train])
    row, interval = np.nonzero(at_risk[train])
    weights, label = at_risk[train][row, interval], censored[train][row, interval]
    table = np.hstack([np.eye(exposure.shape[1])[interval], scaled[row]])
    model = LogisticRegression(max_iter=2000).fit(table, label, sample_weight=weights)
    table = np.hstack([np.ones((len(table), 1)), table])
    coefficients = np.concatenate([model.intercept_, model.coef_[0]])
    hazard = expit(table @ coefficients)
    penalty = np.diag(np.append(0.0, np.ones(len(coefficients) - 1)))
    curvature = (weights * hazard * (1 - hazard) * table.T) @ table + penalty
    scores = np.zeros((len(train), len(coefficients)))
    np.add.at(scores, row, (weights * (label - hazard))[:, None] * table)
    influence = np.zeros((len(inputs), len(coefficients)))
    influence[train] = scores @ np.linalg.pinv(curvature)
    return _Fold(test, scaler.transform(inputs[test]), exposure[test], coefficients, influence)


def _gain(
    fold: _Fold, at_risk: Array, censored: NDArray[np.bool_], train: NDArray[np.int64]
) -> Array:
    """Return by how much the inputs raise the log-likelihood of the rows that a fold predicts."""
    count = at_risk.shape[1]
    events, watched = censored[train].sum(axis=0), at_risk[train].sum(axis=0)
    usual = ((events + 0.5) / (watched + 1)).clip(1e-9, 1 - 1e-9)  # (J,) without inputs
    level = fold.inputs @ fold.coefficients[1 + count :] + fold.coefficients[0]
    odds = level[:, None] + fold.coefficients[1 : 1 + count]
    is_event, weights = censored[fold.test], at_risk[fold.test]
    with_inputs = np.where(is_event, -np.logaddexp(0, -odds), -np.logaddexp(0, odds))
    without = np.where(is_event, np.log(usual), np.log(1 - usual))
    gains: Array = (weights * (with_inputs - without)).sum(axis=1)
    return gains


class Watched:
    """How likely each of n rows was to be watched until its event or horizon, for all reasons."""

    def __init__(
        self, reasons: Sequence[CensoringRegression] = (), given: Array | None = None
    ) -> None:
        self.reasons = reasons
        own = [reason.probability for reason in reasons]
        self.probability = np.prod(own, axis=0) if given is None else given  # (n,)
        self.last: tuple[Array, Array] | None = None

    def under(self, draws: Array) -> Array:
        """Return the probability (R, n) as draws (R, n) tell it; (n,) where it was given."""
        if not self.reasons or (len(draws) == 1 and (draws == 1).all()):
            return self.probability
        if self.last is None or self.last[0] is not draws:  # several parts ask for the same draws
            product = np.prod([reason.under(draws) for reason in self.reasons], axis=0)
            self.last = draws, product
        return self.last[1]
