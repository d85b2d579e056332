"""Who the patients are: age and sex, subgroups, and the case mix of a part of the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

AGE_BANDS = {
    "under 18": 18.0,
    "18 to 39": 40.0,
    "40 to 59": 60.0,
    "60 to 74": 75.0,
    "75 or older": np.inf,
}
OBSERVATION_BANDS = {
    "1": 2.0,
    "2": 3.0,
    "3 to 4": 5.0,
    "5 to 9": 10.0,
    "10 to 19": 20.0,
    "20 or more": np.inf,
}
"""Subgroups of a report: each band with the number just above it."""

UNKNOWN = "not known"
AGE = re.compile(r"\b([0-9]{1,3})[- ]years?[- ]old\b|\baged?[ :=]+([0-9]{1,3})\b", re.IGNORECASE)
SEXES = {
    "woman": re.compile(r"\b(?:woman|female|girl)\b", re.IGNORECASE),
    "man": re.compile(r"\b(?:man|male|boy)\b", re.IGNORECASE),
}
"""How a context states age (years) and sex."""


def ages_of(contexts: Sequence[str]) -> NDArray[np.float64]:
    """Return the age that each context states, in years, (N,), NaN where it states none."""
    found = (AGE.search(context) for context in contexts)
    return np.array([np.nan if m is None else float(m[1] or m[2]) for m in found])


def sexes_of(contexts: Sequence[str]) -> NDArray[np.str_]:
    """Return ``woman``, ``man`` or ``not known`` for each context, (N,)."""
    rows = []
    for context in contexts:
        named = [sex for sex, words in SEXES.items() if words.search(context)]
        rows.append(named[0] if len(named) == 1 else UNKNOWN)
    return np.array(rows, dtype=np.str_)


def people_of(
    lengths: NDArray[np.int64], ages: NDArray[np.float64], sexes: NDArray[np.str_]
) -> pd.DataFrame:
    """Return N rows: ``observations``, ``age`` in years (NaN where unknown), ``sex`` (category)."""
    categories = pd.Categorical(sexes, [*SEXES, UNKNOWN], ordered=True)
    return pd.DataFrame({"observations": lengths, "age": ages, "sex": categories})


def bands_of(people: pd.DataFrame) -> pd.DataFrame:
    """Return the subgroup of each row; no value of a patient is left.

    Args:
        people: as from ``TrajectoryDataset.people``.

    Returns:
        N rows; ordered categories ``observations`` and, where anything is known of them, ``age``
        (years) and ``sex``; other columns as they are.
    """
    table = people.assign(
        observations=banded(people["observations"].to_numpy(), OBSERVATION_BANDS),
        age=banded(people["age"].to_numpy(), AGE_BANDS),
    )
    return table.drop(columns=[n for n in ("age", "sex") if (table[n] == UNKNOWN).all()])


def banded(values: NDArray[Any], bands: dict[str, float]) -> pd.Categorical:
    """Return the band of each number, ``not known`` for NaN; ``bands`` as ``AGE_BANDS``."""
    names = [*bands, UNKNOWN]
    position = np.searchsorted(list(bands.values()), values, side="right")  # NaN comes last
    return pd.Categorical([names[k] for k in position], categories=names, ordered=True)


def case_mix_of(
    people: pd.DataFrame, labels: NDArray[np.float64], groups: NDArray[Any]
) -> dict[str, float]:
    """Describe n rows by counts, shares and quartiles.

    Args:
        people: as from ``TrajectoryDataset.people``.
        labels: (n,), NaN where unknown.
        groups: (n,) patient of each row.

    Returns:
        ``rows``, ``patients``, ``prevalence`` (share of known labels), ``women`` (share of known
        sexes), ``observations`` and ``age`` (years), each as ``_q1``, ``_median``, ``_q3``. Unknown
        ones are left out.
    """
    sexes = people["sex"]
    mix = {
        "rows": len(people),
        "patients": len(np.unique(groups)),
        "prevalence": pd.Series(labels).mean(),
        "women": (sexes[sexes != UNKNOWN] == "woman").mean(),
    }
    for name in ("observations", "age"):
        quartiles = people[name].quantile([0.25, 0.5, 0.75])
        mix |= zip((f"{name}_q1", f"{name}_median", f"{name}_q3"), quartiles, strict=True)
    return {name: float(number) for name, number in mix.items() if pd.notna(number)}
