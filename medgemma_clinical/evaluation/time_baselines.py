"""Baselines of times to events: the same inputs, and hazards of each event in each interval.

Letters: N rows, C events, K intervals, P columns, M rows of which each is a row in an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.linear_model import PoissonRegressor
from sklearn.preprocessing import StandardScaler

from medgemma_clinical.evaluation.baselines import (
    PENALTIES,
    PENALTY,
    SIZES,
    Folds,
    fit_trees,
    tuned_trees,
)
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.simple_models import (
    INTERVAL,
    SMALLEST,
    Regression,
    Trees,
    hazards_of,
    kept_text,
)
from medgemma_clinical.evaluation.time_metrics import aalen_johansen

POISSON = {"objective": "poisson", "metric": "poisson", "poisson_max_delta_step": 1e-6}
"""Trees of events per exposure, by Newton's steps as those of labels: LightGBM halves them."""

SHORTEST = 1e-6
"""Least exposure of a row with an event: one may come as an interval begins."""

MAX_PASSES, SAME = 20, 1e-3
"""Turns in which a regression is fitted, at most, and the change of a hazard that ends them."""


class Periods(NamedTuple):
    """Rows in the intervals in which they were watched."""

    exposure: Array  # (N, K) share of the interval, up to an event
    is_event: NDArray[np.bool_]  # (N, C, K) whether the event ended the row in the interval

    def of(self, rows: NDArray[np.int64]) -> Periods:
        """Return those of some rows."""
        return Periods(self.exposure[rows], self.is_event[rows])

    @property
    def level(self) -> Array:
        """The cumulative hazards (C, K) that are the same for everyone."""
        return rates_of(self.is_event.sum(axis=0), self.exposure.sum(axis=0))


def periods_of(exposure: Array, is_event: NDArray[np.bool_]) -> Periods:
    """Return the intervals of N rows by exposure (N, K) and events (N, C, K)."""
    return Periods(np.maximum(exposure, SHORTEST * is_event.any(axis=1)), is_event)


def rates_of(events: Array | NDArray[np.bool_], exposure: Array) -> Array:
    """Return events per exposure, which are never 0: an event that no row has stays possible."""
    rates = np.zeros(events.shape)
    return SMALLEST + np.divide(events, exposure, out=rates, where=exposure > 0)


@dataclass(frozen=True)
class PeriodFits:
    """How baselines are fitted to times of events that compete."""

    periods: Periods
    null: Array  # (C, K) hazards of everyone

    def of(self, rows: NDArray[np.int64]) -> PeriodFits:
        """Return those of some rows."""
        return PeriodFits(self.periods.of(rows), self.null)

    def fit_text(self, table: Any, penalty: float) -> tuple[Array, Array]:
        """Return coefficients (C, W) and levels (C, K) of ridge regressions on texts (N, W)."""
        exposure, events = self.periods.exposure, self.periods.is_event.swapaxes(0, 1)
        fitted = [
            fit_event(poisson_regressor(), table, exposure, is_event, penalty)
            for is_event in events
        ]
        coefficients, levels = zip(*fitted, strict=True)
        return np.array(coefficients), np.array(levels)

    def text_loss(self, numbers: Array, level: Array) -> float:
        """Return the negative log-likelihood of event 1 by what texts add (N, C) to a level."""
        log_hazards = (numbers[..., None] + level)[:, 0]
        exposure, is_event = self.periods.exposure, self.periods.is_event[:, 0]
        return float((exposure * hazards_of(log_hazards) - is_event * log_hazards).sum())

    def tune_trees(self, values: Array, folds: Folds) -> dict[str, Any]:
        """Return the settings of the trees of each event."""
        expected = self.periods.exposure @ self.periods.level[0]
        # A size is chosen by event 1 and with each row once; each event has its own number.
        rates = rates_of(self.periods.is_event[:, 0].max(axis=1), expected)
        chosen = tuned_trees(values, rates, folds, expected, POISSON)
        sizes = [{name: chosen[name] for name in SIZES[0]}]
        row, long, targets = person_periods(values, self.periods)
        within = []
        for train, test in folds:
            parts = np.isin(row, train), np.isin(row, test)
            within.append((np.flatnonzero(parts[0]), np.flatnonzero(parts[1])))
        return {
            str(event): tuned_trees(long, rates, within, expected, POISSON, sizes)
            for event, (rates, expected) in enumerate(targets, 1)
        }

    def tune_penalty(self, values: Array, folds: Folds) -> float:
        """Return the penalty with the highest likelihood of event 1 in the folds."""
        losses = np.sum([fold_losses(values, self.periods, *fold) for fold in folds], axis=0)
        return float(PENALTIES[PENALTY][int(losses.argmin())])

    def fit_trees(
        self, values: Array, settings: Mapping[str, Any], columns: list[str]
    ) -> tuple[Trees, int]:
        """Return the trees of each event; the patients behind a leaf are not counted."""
        return fit_period_trees(values, self.periods, settings, columns), 0

    def fit_regression(
        self, values: Array, penalty: float | None, columns: list[str]
    ) -> Regression:
        """Return a Poisson regression of each event."""
        penalties = [1.0 if penalty is None else penalty]
        return next(fit_regressions(values, self.periods, penalties, columns))


def fold_losses(
    values: Array, periods: Periods, train: NDArray[np.int64], test: NDArray[np.int64]
) -> list[float]:
    """Return the negative log-likelihood of event 1 in some rows of values (N, P), by penalty.

    That of all events would be the most frequent one's.
    """
    first = Periods(periods.exposure, periods.is_event[:, :1])
    exposure, is_event = first.of(test)
    columns, losses = [*range(values.shape[1])], []
    for model in fit_regressions(values[train], first.of(train), PENALTIES[PENALTY], columns):
        hazards = model.risks(pd.DataFrame(values[test]))
        losses.append(float((exposure[:, None] * hazards - is_event * np.log(hazards)).sum()))
    return losses


def fit_period_trees(
    values: Array, periods: Periods, settings: Mapping[str, Any], columns: Sequence[str]
) -> Trees:
    """Return the trees of each event, of given settings, fitted on rows of values (N, P)."""
    _, values, targets = person_periods(values, periods)
    columns, texts = [*columns, INTERVAL], []
    for size, (rates, expected) in zip(settings.values(), targets, strict=True):
        booster = fit_trees(values, rates, size, expected, POISSON)
        texts.append(kept_text(booster))
    return Trees(columns, texts, np.log(periods.level))


def fit_regressions(
    values: Array, periods: Periods, penalties: Sequence[float], columns: Sequence[Any]
) -> Iterator[Regression]:
    """Yield the regression of each penalty, fitted on the periods of rows of values (N, P)."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    scaler = StandardScaler()
    scaled = scaler.fit_transform(imputer.fit_transform(values))
    marked = [columns[k] for k in imputer.indicator_.features_]
    scales = imputer.statistics_, marked, scaler.mean_, scaler.scale_
    exposure, events = periods.exposure, periods.is_event.swapaxes(0, 1)
    models = [poisson_regressor() for _ in events]
    for penalty in penalties:
        fitted = [
            fit_event(model, scaled, exposure, is_event, penalty)
            for model, is_event in zip(models, events, strict=True)
        ]
        weights, intercepts = map(np.array, zip(*fitted, strict=True))
        yield Regression([*columns], *scales, weights, intercepts)


def poisson_regressor() -> PoissonRegressor:
    """Return a regression that begins where it was before."""
    return PoissonRegressor(max_iter=1000, tol=1e-5, warm_start=True)


def fit_event(
    model: PoissonRegressor,
    scaled: Any,  # (N, P), may be sparse
    exposure: Array,
    is_event: NDArray[np.bool_],
    penalty: float,
) -> tuple[Array, Array]:
    """Return coefficients (P,) and intercepts (K,) of an event that ended rows (N, K).

    The hazard of an interval is its level times what the row makes of it. By turns, these are
    fitted to each other: a row has its events at the exposure in all intervals times their levels.

    Source: Holford 1980, "The analysis of rates and of survivorship using log-linear models",
    Biometrics 36:299.
    """
    of_row, of_interval = is_event.max(axis=1), is_event.sum(axis=0)
    level = rates_of(of_interval, exposure.sum(axis=0))
    for _ in range(MAX_PASSES):
        expected, before = exposure @ level, level
        model.set_params(alpha=1 / (penalty * expected.sum()))  # as the inverse C of labels
        model.fit(scaled, rates_of(of_row, expected), sample_weight=expected)
        level = rates_of(of_interval, model.predict(scaled) @ exposure)
        if np.allclose(level, before, rtol=SAME, atol=0):
            break
    return model.coef_, model.intercept_ + np.log(level)


def person_periods(
    values: Array, periods: Periods
) -> tuple[NDArray[np.int64], Array, list[tuple[Array, Array]]]:
    """Return a row for each interval in which one of values (N, P) was watched, M in all.

    Which of N it is, (M,), its values and interval, (M, P + 1), and for each event the rate and the
    weight, (M,) each: events per expected events, and these, if everyone had the same hazards.
    """
    row, interval = np.nonzero(periods.exposure)
    expected = periods.exposure[row, interval] * periods.level[:, interval]  # (C, M)
    rates = rates_of(periods.is_event[row, :, interval].T, expected)
    targets = [*zip(rates, expected, strict=True)]
    return row, np.column_stack([values[row], interval]), targets


def null_hazards(hours: Array, event: Array, cuts: Sequence[float]) -> Array:
    """Return the cumulative hazards (C, K) by which everyone has Aalen-Johansen's incidences.

    Within an interval hazards are constant: events share its total as they share the chances.
    """
    times, incidence = aalen_johansen(hours, event)
    reached = np.searchsorted(times, cuts, side="right")
    incidence = np.pad(incidence, ((0, 0), (1, 0)))[:, reached]  # (C, K) by the cuts
    steps = np.diff(incidence, prepend=0.0)
    free = 1 - incidence.sum(axis=0) + steps.sum(axis=0)  # (K,) of events before each interval
    chances = (steps / free.clip(1e-300)).clip(0)
    some = chances.sum(axis=0)
    hazards: Array = -np.log((1 - some).clip(1e-300)) * chances / some.clip(1e-300)
    return hazards.clip(SMALLEST)
