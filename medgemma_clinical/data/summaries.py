"""Summaries of trajectories: statistics of each series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STATISTICS = ("first", "last", "min", "max", "mean", "count", "span", "slope")
"""Of each feature: values and mean in raw units, span in hours, least-squares slope an hour."""

SINCE_LAST = "hours since the last observation"
"""Name of the column of hours from the last observation to the prediction time."""


def summary_names(features: Sequence[str], *, prediction_time: bool) -> list[str]:
    """Return the names of all columns of ``TrajectoryDataset.summaries``."""
    names = [f"{name} {statistic}" for name in features for statistic in STATISTICS]
    return [*names, SINCE_LAST] if prediction_time else names


def summary_features(
    times: NDArray[np.float64],  # (M,) hours, ascending within a row
    values: NDArray[np.float64],  # (M, F)
    lengths: NDArray[np.int64],  # (N,) of the rows
) -> NDArray[np.float64]:
    """Return ``STATISTICS`` of each feature, (N, 8 F), NaN if never measured."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    columns: list[NDArray[np.float64]] = []
    for values_of_one in values.T:
        is_measured = ~np.isnan(values_of_one)
        measurements = times[is_measured], values_of_one[is_measured], owner[is_measured]
        columns.extend(_statistics(*measurements, len(lengths)))
    return np.stack(columns, axis=1)


def _statistics(
    times: NDArray[np.float64], values: NDArray[np.float64], owner: NDArray[np.int64], rows: int
) -> NDArray[np.float64]:
    """Return ``STATISTICS`` of n values of one feature, (8, rows); ``owner`` (n,) is the row."""
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
