"""Who the patients are: observations, age and sex, and subgroups by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.trajectories import AGE, SEX, UNKNOWN, TrajectoryDataset

AGE_EDGES = (18, 40, 60, 75)
OBSERVATION_EDGES = (2, 3, 5, 10, 20)
"""Lowest age, and number of observations, of each subgroup of a report but the first."""

SEXES = {1.0: "man", 0.0: "woman"}


def demographics(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return observations, age (years), sex, label, patient, site of N rows; NaN where unknown."""
    sexes = pd.Series(_static(dataset, SEX)).map(SEXES).fillna(UNKNOWN)
    columns = {
        "observations": dataset.lengths,
        "age": _static(dataset, AGE),
        "sex": pd.Categorical(sexes, ["woman", "man", UNKNOWN], ordered=True),
        "label": dataset.labels,
        "patient": dataset.groups,
        "site": dataset.sites,  # None without sites
    }
    return pd.DataFrame(columns)


def _static(dataset: TrajectoryDataset, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the first of some static features that the data have, (N,), NaN where unknown."""
    for name in names:
        if name in dataset.static_names:
            return dataset.static_table([name])[name].to_numpy()
    return np.full(len(dataset), np.nan)


def demographic_bands(rows: pd.DataFrame) -> pd.DataFrame:
    """Return bands (n rows) of observations and, where known, age and sex: no patient's value."""
    table = pd.DataFrame(
        {
            "observations": banded(rows["observations"], OBSERVATION_EDGES, "1", "more"),
            "age": banded(rows["age"], AGE_EDGES, "under 18", "older"),
            "sex": rows["sex"].array,
        }
    )
    return table.drop(columns=[n for n in ("age", "sex") if (table[n] == UNKNOWN).all()])


def banded(values: Any, edges: Sequence[int], first: str, last: str) -> pd.Categorical:
    """Return the band of each number (n,), by the lowest number of each band but the first."""
    inner = [
        str(low) if high - low == 1 else f"{low} to {high - 1}" for low, high in pairwise(edges)
    ]
    names = [first, *inner, f"{edges[-1]} or {last}", UNKNOWN]
    position = np.searchsorted([*edges, np.inf], values, side="right")  # NaN comes last
    return pd.Categorical([names[k] for k in position], categories=names, ordered=True)
