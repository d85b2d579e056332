"""Statistics of series, as simple models and the head of stage 1 read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
    columns = {}
    for f, name in enumerate(features):
        measured = ~np.isnan(values[:, f])
        long = pd.DataFrame({"t": times[measured], "v": values[measured, f]})
        by_owner = long.groupby(owner[measured])
        table = by_owner["v"].agg(["first", "last", "min", "max", "mean", "count"])
        centred = long - by_owner.transform("mean")
        product = (centred["t"] * centred["v"]).groupby(owner[measured]).sum()
        square = centred["t"].pow(2).groupby(owner[measured]).sum()
        table["span"] = by_owner["t"].max() - by_owner["t"].min()
        table["slope"] = (product / square).where(table["span"] > 0, 0.0)  # 0 / 0 within no time
        for statistic in STATISTICS:
            columns[f"{name} {statistic}"] = table[statistic].reindex(range(len(lengths)))
    return pd.DataFrame(columns, index=range(len(lengths)))


def summary_names(features: Sequence[str], *, prediction_time: bool) -> list[str]:
    """Return the names of all summaries of series, see ``RaggedSeries.summaries``."""
    names = [f"{name} {statistic}" for name in features for statistic in STATISTICS]
    return [*names, SINCE_LAST] if prediction_time else names
