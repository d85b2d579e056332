"""Irregular series as flat arrays, their statistics, and the batches made of them.

N series lie one behind another in ``times`` (hours) and ``values`` (raw units), cut by ``offsets``.
Letters: N series, B a batch of them, L observations, F features, S summaries, K facts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NotRequired, Self, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


STATISTICS = ("first", "last", "min", "max", "mean", "count", "span", "slope")
"""Of each feature: values and mean in raw units, span in hours, least-squares slope an hour."""

SINCE_LAST = "hours since the last observation"
"""Name of the column of hours from the last observation to the prediction time."""


def summary_features(
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    lengths: NDArray[np.int64],
    features: Sequence[str],
) -> pd.DataFrame:
    """Return statistics of each series.

    Args:
        times: (all observations,) hours.
        values: (all observations, F) raw units, NaN where not measured.
        lengths: (N,) observations of each series, in order.
        features: F names.

    Returns:
        N rows; per feature the columns of ``STATISTICS``, NaN where never measured.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    columns: list[NDArray[np.float64]] = []
    for values_of_one in values.T:
        measured = ~np.isnan(values_of_one)
        known = times[measured], values_of_one[measured], owner[measured]
        columns.extend(_statistics(*known, len(lengths)))
    names = summary_names(features, prediction_time=False)
    return pd.DataFrame(np.stack(columns, axis=1), columns=names)


def _statistics(
    times: NDArray[np.float64], values: NDArray[np.float64], owner: NDArray[np.int64], rows: int
) -> NDArray[np.float64]:
    """Return ``STATISTICS`` of one feature, (8, rows), NaN where it is never measured.

    Args:
        times: (n,) hours, not decreasing within a series.
        values: (n,) raw units.
        owner: (n,) series of each, not decreasing.
        rows: number of series.
    """
    count = np.bincount(owner, minlength=rows)
    some = np.flatnonzero(count)
    count = count[some]
    starts = np.cumsum(count) - count
    ends = starts + count - 1
    means = [np.add.reduceat(x, starts) / count for x in (times, values)]
    t, v = (x - np.repeat(m, count) for x, m in zip((times, values), means, strict=True))
    span = times[ends] - times[starts]
    square = np.where(span > 0, np.add.reduceat(t * t, starts), 1.0)
    slope = np.where(span > 0, np.add.reduceat(t * v, starts) / square, 0.0)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    table = np.full((len(STATISTICS), rows), np.nan)
    table[:, some] = values[starts], values[ends], low, high, means[1], count, span, slope
    return table


def summary_names(features: Sequence[str], *, prediction_time: bool) -> list[str]:
    """Return the names of all summaries of series, see ``RaggedSeries.summaries``."""
    names = [f"{name} {statistic}" for name in features for statistic in STATISTICS]
    return [*names, SINCE_LAST] if prediction_time else names


class Batch(TypedDict):
    """Padded series: B patients, L observations, F features, S summaries, K facts.

    times (B, L) float32 hours since the patient's first observation, zero in padding;
    values (B, L, F) float32 raw units, zero where not measured; observed (B, L, F) bool, all False
    in padding rows; prediction_hours (B,) float32 on the clock of ``times``, of the last
    observation where unknown; summaries (B, S) and facts (B, K) float32, NaN where unknown; labels
    (B,) float32, NaN where unknown; index (B,) int64 into the data set; plan: what an encoder that
    plans computes ahead of these series.
    """

    times: Tensor
    values: Tensor
    observed: Tensor
    prediction_hours: Tensor
    summaries: Tensor
    facts: Tensor
    labels: Tensor
    index: Tensor
    plan: NotRequired[Any]


class RaggedSeries:
    """N irregular series, and what a model reads beside them.

    Attributes:
        times: (all observations,) float64 hours, not decreasing within a series.
        values: (all observations, F) float64 raw units, NaN where not measured.
        offsets: (N + 1,) int64; series i has rows ``offsets[i]:offsets[i + 1]``.
        labels: (N,) float64 of 0 and 1, NaN where unknown.
        facts: (N, number of ``fact_names``) float64, the facts that a model reads, NaN where
            unknown; None before they are chosen.
        prediction_hours: (N,) float64, when the question is asked, on the clock of ``times``; NaN
            where unknown, None where the data do not say it.
        reads_prediction_time: whether a model reads the hours, where the data say them.
        features: F names.
        fact_names: K names of the facts that a model reads.
    """

    row_columns: ClassVar[tuple[str, ...]] = ("labels", "facts", "prediction_hours", "_summaries")
    """Attributes with one entry a series; a subclass that has more names them too."""

    features: tuple[str, ...]
    fact_names: tuple[str, ...] = ()
    reads_prediction_time: bool = True

    times: NDArray[np.float64]
    values: NDArray[np.float64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.float64]
    facts: NDArray[np.float64] | None = None
    prediction_hours: NDArray[np.float64] | None = None
    _summaries: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Observations a series, (N,)."""
        return np.diff(self.offsets)

    def keep_observations(self, kept: NDArray[np.bool_]) -> None:
        """Leave out the other observations; each series keeps one at least.

        Args:
            kept: (all observations,) which ones.
        """
        owner = np.repeat(np.arange(len(self)), self.lengths)
        sizes = np.bincount(owner[kept], minlength=len(self))
        self.times, self.values = self.times[kept], self.values[kept]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._summaries = None

    def longest_gaps(self) -> NDArray[np.float64]:
        """Return the longest time without an observation of each series in hours, (N,)."""
        if not len(self):
            return np.empty(0)
        gaps = np.diff(self.times, prepend=self.times[:1])
        gaps[self.offsets[:-1]] = 0.0  # nothing precedes the first observation of a series
        waits = self.prediction_times() - self.times[self.offsets[1:] - 1]
        return np.maximum(np.maximum.reduceat(gaps, self.offsets[:-1]), waits)

    def longest_gap(self) -> float:
        """Return the longest time without an observation of any series, in hours."""
        return float(self.longest_gaps().max())

    def measured(self, i: int) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Yield position, times and values of each feature of series ``i`` that was measured."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        for f, values in enumerate(self.values[rows].T):
            present = ~np.isnan(values)
            if present.any():
                yield f, self.times[rows][present], values[present]

    @property
    def hours_read(self) -> NDArray[np.float64] | None:
        """The ``prediction_hours`` that a model reads, None without."""
        return self.prediction_hours if self.reads_prediction_time else None

    def known_facts(self) -> NDArray[np.float64]:
        """Return the facts (N, K); K is 0 before they are chosen."""
        return np.empty((len(self), 0)) if self.facts is None else self.facts

    def prediction_times(
        self, rows: NDArray[np.int64] | slice = slice(None)
    ) -> NDArray[np.float64]:
        """Return when each question is asked, the last observation where it is unknown.

        Args:
            rows: n positions; all N where left out.

        Returns:
            (n,) hours on the clock of ``times``.
        """
        last = self.times[self.offsets[1:][rows] - 1]
        if self.hours_read is None:
            return last
        hours = self.hours_read[rows]
        return np.where(np.isnan(hours), last, hours)

    def summary_names(self) -> list[str]:
        """Return the S names of the columns of ``summaries``."""
        return summary_names(self.features, prediction_time=self.hours_read is not None)

    def summaries(self) -> NDArray[np.float64]:
        """Return the statistics of each series (N, S), computed once.

        Those of ``summary_features``, and the hours from the last observation to the prediction
        time where it is known.
        """
        if self._summaries is None:
            table = summary_features(self.times, self.values, self.lengths, self.features)
            if self.hours_read is not None:
                table[SINCE_LAST] = self.hours_read - self.times[self.offsets[1:] - 1]
            self._summaries = table.to_numpy()
        return self._summaries

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the chosen series to one batch, in the given order.

        Args:
            indices: B positions in the data set.

        Returns:
            A ``Batch``; its L is the longest chosen series.
        """
        import torch  # loading takes a second that checking a file, and --help, need not wait

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.float32))

        index = np.asarray(indices, dtype=np.int64)
        positions, present = self._positions(index)
        rows = np.where(present, positions, positions[:, :1])  # padding repeats the first: hour 0
        times = self.times[rows] - self.times[positions[:, :1]]
        values = self.values[rows].astype(np.float32)  # (B, L, F)
        observed = ~np.isnan(values) & present[..., None]
        return Batch(
            times=tensor(times),
            values=torch.from_numpy(np.where(observed, values, np.float32(0))),
            observed=torch.from_numpy(observed),
            prediction_hours=tensor(self.prediction_times(index) - self.times[positions[:, 0]]),
            summaries=tensor(self.summaries()[index]),
            facts=tensor(self.known_facts()[index]),
            labels=tensor(self.labels[index]),
            index=torch.from_numpy(index),
        )

    def _positions(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return flat rows (B, L) from the start of each chosen series, and which belong to it."""
        starts = self.offsets[index][:, None]
        lengths = self.offsets[index + 1][:, None] - starts
        steps = np.arange(lengths.max(initial=0))
        return starts + steps, steps < lengths

    def rows_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the flat rows of the chosen series, joined."""
        positions, present = self._positions(index)
        return positions[present]

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """Return a data set of the chosen series only, in the given order."""
        chosen = copy.copy(self)
        rows = self.rows_of(indices)
        chosen.times, chosen.values = self.times[rows], self.values[rows]
        chosen.offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(chosen, name, None if column is None else column[indices])
        return chosen
