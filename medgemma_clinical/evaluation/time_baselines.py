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
from scipy.special import softmax
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
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
    WITH_STATICS,
    Baselines,
    Settings,
    baseline_tables,
    fit_trees,
    tuned_trees,
    tuning_folds,
)
from medgemma_clinical.evaluation.metrics import Array, log_odds, row_losses
from medgemma_clinical.evaluation.simple_models import Regression, Trees, read_array, read_names
from medgemma_clinical.evaluation.time_metrics import aalen_johansen

NULL = "Aalen-Johansen"
"""The baseline that gives everyone the same risks."""

TIME_MEANINGS = {
    NULL: "the same risks for everyone",
    LOGISTIC: f"a multinomial regression in each interval of follow-up on {STATISTICS}",
    BOOSTING: f"decision trees of each event in each interval of follow-up on {STATISTICS}",
    BLEND: f"the mean hazards of {LOGISTIC} and {BOOSTING}",
    ENSEMBLE: "the mean hazards of this model and of the blend with the most inputs",
}

INTERVAL = "interval of follow-up"
"""Column of boosted trees."""

UNPENALISED = 30.0
"""Scale of the columns of intervals in a regression: their penalty is a 900th of the others'."""

MAX_INTERVALS = 64
"""Bound of what a file may hold."""

UNSEEN = -30.0
"""Log-odds of an outcome that the fitted rows do not have."""

SMALLEST = 1e-9
"""Least cumulative hazard of an event in an interval."""


class Periods(NamedTuple):
    """Rows in the intervals in which they were watched."""

    row: NDArray[np.int64]  # (M,)
    interval: NDArray[np.int64]  # (M,)
    event: NDArray[np.int64]  # (M,) number of the event that ended the row in the interval, 0 none
    weight: Array  # (M,) share of the interval, 1 with an event
    shape: tuple[int, int]  # C and K

    def of(self, rows: NDArray[np.int64]) -> Periods:
        """Return those of some rows."""
        chosen = np.isin(self.row, rows)
        row, interval, event, weight, shape = self
        return Periods(row[chosen], interval[chosen], event[chosen], weight[chosen], shape)

    def joined(self) -> Periods:
        """Return each row once, in one interval as long as all: enough to choose a penalty by."""
        rows, last = np.unique(self.row[::-1], return_index=True)
        event = self.event[::-1][last]
        share = np.bincount(self.row, self.weight)[rows] / self.shape[1]
        weight = np.where(event > 0, 1.0, share)
        return Periods(rows, np.zeros_like(rows), event, weight, (self.shape[0], 1))


def periods_of(exposure: Array, is_event: NDArray[np.bool_]) -> Periods:
    """Return the intervals of N rows by exposure (N, K) and events (N, C, K)."""
    event = (is_event * np.arange(1, is_event.shape[1] + 1)[:, None]).sum(axis=1)
    weight = np.where(event > 0, 1.0, exposure)
    row, interval = np.nonzero(weight)
    shape = is_event.shape[1], is_event.shape[2]
    return Periods(row, interval, event[row, interval], weight[row, interval], shape)


def hazards_of(chances: Array) -> Array:
    """Return cumulative hazards (..., C, K) from chances (..., K, C + 1) of none, and of each.

    Within an interval hazards are constant: events share its total as they share the chances.
    """
    total = -np.log(chances[..., :1].clip(1e-300))
    shares = chances[..., 1:] / (1 - chances[..., :1]).clip(1e-300)
    hazards: Array = (total * shares).clip(SMALLEST).swapaxes(-1, -2)
    return hazards


class PeriodRegression(Regression):
    """A multinomial regression: an intercept for each interval and outcome, (K, C + 1)."""

    @property
    def shape(self) -> tuple[int, int]:
        """C and K."""
        intervals, outcomes = self.intercept.shape
        return outcomes - 1, intervals

    def risks(self, table: pd.DataFrame) -> Array:
        """Return cumulative hazards (N, C, K) of the rows of a table that has the columns."""
        odds = self.scaled(table) @ self.coefficients.T  # (N, C + 1)
        return hazards_of(softmax(odds[:, None] + self.intercept, axis=2))

    @classmethod
    def read_weights(cls, content: Mapping[str, Any], size: int) -> tuple[Array, Array]:
        """Check and return coefficients (C + 1, P) and intercepts."""
        intercepts = np.array(content["intercept"], np.float64)
        intervals, outcomes = intercepts.shape
        weights = read_array(content["coefficients"], outcomes, size)
        return weights, read_array(intercepts, intervals, outcomes)


@dataclass(frozen=True)
class PeriodTrees:
    """Boosted trees of each event; the last column is the interval."""

    columns: list[str]
    text: list[str]  # of each event, as in ``Trees``
    intervals: int

    @cached_property
    def events(self) -> list[Trees]:
        """The trees of each event, checked."""
        models = [Trees(self.columns, text) for text in self.text]
        if not all(model.trees for model in models):
            raise ValueError("no trees")
        return models

    @property
    def shape(self) -> tuple[int, int]:
        """C and K."""
        return len(self.text), self.intervals

    def risks(self, table: pd.DataFrame) -> Array:
        """Return cumulative hazards (N, C, K) of the rows of a table that has the columns."""
        intervals = [table.assign(**{INTERVAL: k}) for k in range(self.intervals)]
        chances = np.array([[model.risks(x) for model in self.events] for x in intervals])
        chances /= chances.sum(axis=1, keepdims=True).clip(1)  # (K, C, N), fitted one by one
        none = 1 - chances.sum(axis=1, keepdims=True)
        return hazards_of(np.concatenate([none, chances], axis=1).transpose(2, 0, 1))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Check and return; see ``simple_models``."""
        intervals = int(content["intervals"])
        if not 1 <= intervals <= MAX_INTERVALS:
            raise ValueError(f"{intervals} intervals")
        model = cls(read_names(content["columns"]), [*map(str, content["text"])], intervals)
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

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return checked fields of the class."""
        null = np.array(content["null"], np.float64)
        read = super().from_plain(content) | {"null": read_array(null, *null.shape)}
        if not (null > 0).all() or any(m.shape != null.shape for m in read["models"].values()):
            raise ValueError("hazards of different shapes, or not above 0")
        return read


def blend_hazards(*hazards: Array) -> Array:
    """Return the mean hazards of several models, (n, C, K) each."""
    # The mean of logarithms is lower, and so would be the risks.
    blended: Array = np.mean(hazards, axis=0)
    return blended


def time_baseline_names(dataset: TrajectoryDataset, static: Sequence[str]) -> list[str]:
    """Return the names of the baselines that ``fit_time_baselines`` fits, in no order."""
    blends = [BLEND, *([BLEND + WITH_STATICS] if static else [])]
    return [NULL, *baseline_tables(dataset, static), *blends]


def tune_time_baselines(
    dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str], periods: Periods
) -> Settings:
    """Choose the settings of the baselines in folds of some rows; ``periods`` are of these."""
    folds = tuning_folds(dataset.labels[train], dataset.groups[train])
    within = [
        (np.flatnonzero(np.isin(periods.row, a)), np.flatnonzero(np.isin(periods.row, b)))
        for a, b in folds
    ]
    tables = {
        name: table.to_numpy()[train] for name, table in baseline_tables(dataset, static).items()
    }
    boosted = [name for name in tables if name.startswith(BOOSTING)]
    values = with_interval(tables[boosted[-1]], periods)
    trees: dict[str, Any] = {}
    sizes = None  # those of event 1 serve all; each event has its own number of trees
    for event in range(1, periods.shape[0] + 1):
        is_event = (periods.event == event).astype(float)
        found = tuned_trees(values, is_event, within, periods.weight, sizes)
        trees[str(event)] = found
        sizes = sizes or [{name: found[name] for name in SIZES[0]}]
    penalties: dict[str, float] = {}
    periods = periods.joined()
    for name in [name for name in tables if name not in boosted and folds]:
        losses = np.sum([fold_losses(tables[name], periods, *fold) for fold in folds], axis=0)
        penalties[name] = PENALTIES[PENALTY][int(losses.argmin())]
    return Settings([*static], [], penalties, trees)


def fold_losses(
    values: Array, periods: Periods, train: NDArray[np.int64], test: NDArray[np.int64]
) -> list[float]:
    """Return the log loss of event 1 in some rows of values (N, P), for each penalty.

    That of all events would be the most frequent one's.
    """
    held_out, losses = periods.of(test), []
    columns, scaled = [*range(values.shape[1])], pd.DataFrame(values)
    for model in fit_regressions(values, periods.of(train), PENALTIES[PENALTY], columns):
        odds = (model.scaled(scaled) @ model.coefficients.T)[held_out.row]
        chance = softmax(odds + model.intercept[held_out.interval], axis=1)[:, 1]
        of_rows = row_losses((held_out.event == 1).astype(float), log_odds(chance))
        losses.append(float(held_out.weight @ of_rows))
    return losses


def fit_time_baselines(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    settings: Settings,
    periods: Periods,
    cuts: Sequence[float],
) -> TimeBaselines:
    """Fit the baselines on some rows; ``periods`` are of these, ``cuts`` (K,) their ends."""
    assert dataset.event_hours is not None
    assert dataset.events is not None
    models: dict[str, PeriodRegression | PeriodTrees] = {}
    for name, table in baseline_tables(dataset, settings.static).items():
        values, columns = table.to_numpy()[rows], [*table.columns]
        if name.startswith(BOOSTING):
            read, columns, texts = with_interval(values, periods), [*columns, INTERVAL], []
            for event, size in settings.trees.items():
                is_event = (periods.event == int(event)).astype(float)
                booster = fit_trees(read, is_event, size, periods.weight)
                texts.append(Trees.of(booster, columns).text)
            models[name] = PeriodTrees(columns, texts, len(cuts))
        else:
            penalties = [settings.penalties.get(name, 1.0)]
            (models[name],) = fit_regressions(values, periods, penalties, columns)
    inputs = {"static": settings.static, "prediction_time": dataset.hours_read is not None}
    null = null_hazards(dataset.event_hours[rows], dataset.events[rows], cuts)
    return TimeBaselines(models, None, inputs, bool(settings.penalties), null=null)


def fit_regressions(
    values: Array, periods: Periods, penalties: Sequence[float], columns: Sequence[Any]
) -> Iterator[PeriodRegression]:
    """Yield the regression of each penalty, fitted in the intervals of some rows of (N, P)."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    scaler, rows = StandardScaler(), np.unique(periods.row)
    scaler.fit(imputer.fit_transform(values[rows]))
    scaled = scaler.transform(imputer.transform(values))
    outcomes, intervals = periods.shape[0] + 1, np.eye(periods.shape[1])
    design = np.hstack([scaled[periods.row], UNPENALISED * intervals[periods.interval]])
    marked = [columns[k] for k in imputer.indicator_.features_]
    scales = imputer.statistics_, marked, scaler.mean_, scaler.scale_
    model = LogisticRegression(max_iter=2000, warm_start=True)
    joined = periods.joined()
    if periods.shape[1] > 1 and {*joined.event} == {*periods.event}:
        # From the fit to joined rows a third of the steps remain.
        model.set_params(C=penalties[0])
        model.fit(scaled[joined.row], joined.event, sample_weight=joined.weight)
        beside = np.zeros((len(model.coef_), periods.shape[1]))
        model.coef_ = np.hstack([model.coef_, beside])
    for penalty in penalties:
        model.set_params(C=penalty).fit(design, periods.event, sample_weight=periods.weight)
        found = np.hstack([model.coef_, model.intercept_[:, None]])
        if len(found) == 1:  # of two outcomes scikit-learn gives the log-odds
            found = np.vstack([np.zeros_like(found), found])
        fitted = np.zeros((outcomes, found.shape[1]))
        fitted[:, -1] = UNSEEN  # what these rows do not have
        fitted[model.classes_] = found
        weights, of_intervals, of_all = np.split(fitted, [scaled.shape[1], -1], axis=1)
        intercepts = (of_all + UNPENALISED * of_intervals).T
        yield PeriodRegression([*columns], *scales, weights, intercepts)


def with_interval(values: Array, periods: Periods) -> Array:
    """Return the values (N, P) of the row, and the interval, of each of M, (M, P + 1)."""
    return np.column_stack([values[periods.row], periods.interval])


def null_hazards(hours: Array, event: Array, cuts: Sequence[float]) -> Array:
    """Return the cumulative hazards (C, K) by which everyone has Aalen-Johansen's incidences."""
    times, incidence = aalen_johansen(hours, event)
    reached = np.searchsorted(times, cuts, side="right")
    incidence = np.pad(incidence, ((0, 0), (1, 0)))[:, reached]  # (C, K) by the cuts
    steps = np.diff(incidence, prepend=0.0)
    free = 1 - incidence.sum(axis=0) + steps.sum(axis=0)  # (K,) of events before each interval
    chances = steps / free.clip(1e-300)
    return hazards_of(np.vstack([1 - chances.sum(axis=0), chances]).clip(0).T)
