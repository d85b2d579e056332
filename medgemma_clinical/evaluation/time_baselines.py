"""Baselines of times to events: the same inputs, and hazards of each event in each interval.

Letters: N rows, C events, K intervals, P columns, M rows of which each is a row in an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.impute import SimpleImputer
from sklearn.linear_model import PoissonRegressor
from sklearn.preprocessing import StandardScaler

from medgemma_clinical.data.trajectories import Rows, TrajectoryDataset
from medgemma_clinical.evaluation.baselines import (
    BLEND,
    BOOSTING,
    ENSEMBLE,
    LOGISTIC,
    PENALTIES,
    PENALTY,
    SIZES,
    STATISTICS,
    Baselines,
    Folds,
    fit_trees,
    tuned_trees,
)
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.simple_models import Regression, Trees, read_array, read_names
from medgemma_clinical.evaluation.time_metrics import aalen_johansen

NULL = "Aalen-Johansen"
"""The baseline that gives everyone the same risks."""

TIME_MEANINGS = {
    NULL: "the same risks for everyone",
    LOGISTIC: f"a Poisson regression of each event in each interval of follow-up on {STATISTICS}",
    BOOSTING: f"decision trees of each event in each interval of follow-up on {STATISTICS}",
    BLEND: f"the mean hazards of {LOGISTIC} and {BOOSTING}",
    ENSEMBLE: "the mean hazards of this model and of the blend with the most inputs",
}

INTERVAL = "interval of follow-up"
"""Column of boosted trees."""

POISSON = {"objective": "poisson", "metric": "poisson", "poisson_max_delta_step": 1e-6}
"""Trees of events per exposure, by Newton's steps as those of labels: LightGBM halves them."""

SMALLEST, LARGEST = 1e-9, 100.0
"""Bounds of the cumulative hazard of an event in an interval."""

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


def hazards_of(log_hazards: Array) -> Array:
    """Return cumulative hazards within bounds."""
    hazards: Array = np.exp(log_hazards.clip(*np.log([SMALLEST, LARGEST])))
    return hazards


class PeriodRegression(Regression):
    """A Poisson regression of each of C events, with an intercept for each of K intervals."""

    def risks(self, table: pd.DataFrame) -> Array:
        """Return cumulative hazards (N, C, K) of the rows of a table that has the columns."""
        return hazards_of((self.scaled(table) @ self.coefficients.T)[..., None] + self.intercept)

    @classmethod
    def read_weights(cls, content: Mapping[str, Any], size: int) -> tuple[Array, Array]:
        """Check and return coefficients (C, P) and intercepts (C, K)."""
        levels = content["intercept"]
        weights = read_array(content["coefficients"], len(levels), size)
        return weights, read_array(levels, len(levels), len(levels[0]))


@dataclass(frozen=True)
class PeriodTrees:
    """Boosted trees of each event; the last column is the interval."""

    columns: list[str]
    text: list[str]  # of each event, as in ``Trees``
    intercept: Array  # (C, K) log-hazards to which the trees of a row add

    @cached_property
    def events(self) -> list[Trees]:
        """The trees of each event, checked."""
        models = [Trees(self.columns, text) for text in self.text]
        if not all(model.trees for model in models):
            raise ValueError("no trees")
        return models

    def risks(self, table: pd.DataFrame) -> Array:
        """Return cumulative hazards (N, C, K) of the rows of a table that has the columns."""
        intervals = [table.assign(**{INTERVAL: k}) for k in range(self.intercept.shape[1])]
        totals = np.array([[model.totals(x) for x in intervals] for model in self.events])
        return hazards_of(totals.transpose(2, 0, 1) + self.intercept)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Check and return; see ``simple_models``."""
        text, levels = [*map(str, content["text"])], content["intercept"]
        intercept = read_array(levels, len(text), len(levels[0]))
        model = cls(read_names(content["columns"]), text, intercept)
        assert model.events
        return model


@dataclass(frozen=True)
class TimeBaselines(Baselines):
    """Fitted baselines, which give the cumulative hazards of any rows."""

    regression: ClassVar[Any] = PeriodRegression
    trees: ClassVar[Any] = PeriodTrees

    null: Array = field(kw_only=True)  # (C, K) of everyone

    @property
    def names(self) -> list[str]:
        """The names of all baselines and blends, as ``risks`` gives them."""
        return [NULL, *super().names]

    def risks(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> dict[str, Array]:
        """Return hazards (n, C, K) of baselines, then blends; NaN where the data lack columns."""
        table = self.table(dataset).iloc[rows].assign(**{INTERVAL: 0.0})
        hazards = {NULL: np.tile(self.null, (len(table), 1, 1)), **self.risks_of_models(table)}
        blends = {k: blend_hazards(hazards[a], hazards[b]) for k, (a, b) in self.pairs.items()}
        return hazards | blends

    def forecasts(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> dict[str, Array]:
        """Return ``risks``, which are hazards."""
        return self.risks(dataset, rows)

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return checked fields of the class."""
        null = np.array(content["null"], np.float64)
        read = super().from_plain(content) | {"null": read_array(null, *null.shape)}
        shapes = {model.intercept.shape for model in read["models"].values()}
        if not (null > 0).all() or shapes != {null.shape}:
            raise ValueError("hazards of different shapes, or not above 0")
        return read


def blend_hazards(*hazards: Array) -> Array:
    """Return the mean hazards of several models, (n, C, K) each."""
    # The mean of logarithms is lower, and so would be the risks.
    blended: Array = np.mean(hazards, axis=0)
    return blended


@dataclass(frozen=True)
class PeriodFits:
    """How baselines are fitted to times of events that compete."""

    always: ClassVar[tuple[str, ...]] = (NULL,)
    hours: Array  # (n,) until the event or the end of follow-up
    event: Array  # (n,)
    periods: Periods
    cuts: Sequence[float]  # (K,) ends of the intervals

    def vocabulary(self, contexts: NDArray[np.object_]) -> list[str]:
        """Return nothing: no baseline of times reads words."""
        return []

    def tune_trees(self, values: Array, folds: Folds) -> dict[str, Any]:
        """Return the settings of the trees of each event."""
        expected = self.periods.exposure @ self.periods.level[0]
        # A size is chosen by event 1 and with each row once; each event has its own number.
        rates = rates_of(self.periods.is_event[:, 0].max(axis=1), expected)
        found = tuned_trees(values, rates, folds, expected, POISSON)
        sizes = [{name: found[name] for name in SIZES[0]}]
        row, long, targets = person_periods(values, self.periods)
        within = [
            (np.flatnonzero(np.isin(row, a)), np.flatnonzero(np.isin(row, b))) for a, b in folds
        ]
        return {
            str(event): tuned_trees(long, rates, within, expected, POISSON, sizes)
            for event, (rates, expected) in enumerate(targets, 1)
        }

    def tune_penalty(self, values: Any, folds: Folds, *, words: bool = False) -> float:
        """Return the penalty with the highest likelihood of event 1 in the folds."""
        losses = np.sum([fold_losses(values, self.periods, *fold) for fold in folds], axis=0)
        return float(PENALTIES[PENALTY][int(losses.argmin())])

    def fit_trees(
        self, values: Array, settings: Mapping[str, Any], columns: list[str]
    ) -> tuple[PeriodTrees, int]:
        """Return the trees of each event."""
        return fit_period_trees(values, self.periods, settings, columns), 0

    def fit_regression(
        self, values: Array, penalty: float | None, columns: list[str]
    ) -> PeriodRegression:
        """Return a Poisson regression of each event."""
        penalties = [1.0 if penalty is None else penalty]
        return next(fit_regressions(values, self.periods, penalties, columns))

    def collect(self, **fitted: Any) -> TimeBaselines:
        """Return all baselines."""
        return TimeBaselines(**fitted, null=null_hazards(self.hours, self.event, self.cuts))


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
) -> PeriodTrees:
    """Return the trees of each event, of given settings, fitted on rows of values (N, P)."""
    _, values, targets = person_periods(values, periods)
    columns, texts = [*columns, INTERVAL], []
    for size, (rates, expected) in zip(settings.values(), targets, strict=True):
        booster = fit_trees(values, rates, size, expected, POISSON)
        texts.append(Trees.of(booster, columns).text)
    return PeriodTrees(columns, texts, np.log(periods.level))


def fit_regressions(
    values: Array, periods: Periods, penalties: Sequence[float], columns: Sequence[Any]
) -> Iterator[PeriodRegression]:
    """Yield the regression of each penalty, fitted on the periods of rows of values (N, P)."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    scaler = StandardScaler()
    scaled = scaler.fit_transform(imputer.fit_transform(values))
    marked = [columns[k] for k in imputer.indicator_.features_]
    scales = imputer.statistics_, marked, scaler.mean_, scaler.scale_
    exposure, events = periods.exposure, periods.is_event.swapaxes(0, 1)
    models = [PoissonRegressor(max_iter=1000, tol=1e-5, warm_start=True) for _ in events]
    for penalty in penalties:
        fitted = [
            fit_event(model, scaled, exposure, is_event, penalty)
            for model, is_event in zip(models, events, strict=True)
        ]
        weights, intercepts = map(np.array, zip(*fitted, strict=True))
        yield PeriodRegression([*columns], *scales, weights, intercepts)


def fit_event(
    model: PoissonRegressor,
    scaled: Array,
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
