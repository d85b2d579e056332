"""Who the patients are: observations, age and sex, and subgroups by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.roles import sex_of_column
from medgemma_clinical.data.trajectories import AGE, UNKNOWN, TrajectoryDataset

AGE_EDGES = (18, 40, 60, 75)
OBSERVATION_EDGES = (2, 3, 5, 10, 20)
"""Lowest age, and number of observations, of each subgroup of a report but the first."""


def demographics(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return observations, age (years), sex, label, patient, site of N rows; NaN where unknown."""
    age = next((name for name in AGE if name in dataset.static_names), None)
    columns = {
        "observations": dataset.lengths,
        "age": dataset.static_table([age])[age] if age else np.nan,
        "sex": _sex(dataset),
        "label": dataset.labels,
        "patient": dataset.groups,
        "site": dataset.sites,  # None without sites
    }
    return pd.DataFrame(columns)


def _sex(dataset: TrajectoryDataset) -> pd.Series[Any]:
    """Return the sex of N rows: woman, man, or another word that a static column has."""
    words = {name: word for name in dataset.static_names if (word := sex_of_column(name))}
    table = dataset.static_table([*words])
    table = table.loc[:, table.isin([0.0, 1.0, np.nan]).all()]
    words = {name: word for name, word in words.items() if name in table}
    # Where columns name one of both sexes, those with 0 in each have the other one.
    rest = {"woman", "man"} - {*words.values()}
    sexes = pd.Series(rest.pop() if len(rest) == 1 else UNKNOWN, table.index)
    for name, word in words.items():
        sexes[table[name] == 1] = word
    sexes[table.isna().any(axis=1)] = UNKNOWN
    others = sorted({*words.values()} - {"woman", "man", UNKNOWN})
    return sexes.astype(pd.CategoricalDtype(["woman", "man", *others, UNKNOWN], ordered=True))


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
