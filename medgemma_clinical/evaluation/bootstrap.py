"""95 % intervals of figures, from one bootstrap over patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
CONFIDENCE = 0.95
CHUNK_CELLS = 2**20
"""Draws times rows that are held at a time: 8 MiB an array."""

NO_VALUE = "\N{EN DASH}"

Figures = dict[Any, NDArray[np.float64]]
"""By any hashable name, the values (R,) of a figure under R weightings of the rows."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; None where undefined, as is the PPV without any alarm."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_json(self, digits: int | None = None) -> dict[str, float | None]:
        """Return value, low and high by name, rounded to so many decimals where these are given."""
        numbers = asdict(self)
        if digits is None:
            return numbers
        return {name: x if x is None else round(x, digits) for name, x in numbers.items()}

    def above(self, limit: float) -> bool:
        """Return whether the whole interval is known and above ``limit``."""
        return self.low is not None and self.low > limit

    def below(self, limit: float) -> bool:
        """Return whether the whole interval is known and below ``limit``."""
        return self.high is not None and self.high < limit

    def value_text(self, form: str) -> str:
        """Write the value without its interval; a dash where undefined."""
        return NO_VALUE if self.value is None else f"{self.value:{form}}"

    def text(self, form: str = ".3f", scale: float = 1) -> str:
        """Write ``value [low, high]``, each times ``scale``; a dash where undefined."""
        if self.value is None:
            return NO_VALUE
        value = f"{scale * self.value:{form}}"
        if self.low is None or self.high is None:
            return f"{value} [{NO_VALUE}]"
        return f"{value} [{scale * self.low:{form}}, {scale * self.high:{form}}]"


def draw_weights(
    labels: NDArray[Any], groups: NDArray[Any], seed: int, split: NDArray[Any] | None = None
) -> Iterator[NDArray[np.float64]]:
    """Draw patients with replacement, all rows of a patient together.

    Patients with and without an event are not drawn apart: fixed numbers of both would make the
    intervals of prevalence-dependent figures (Brier score, calibration, PPV, net benefit) too
    narrow. A draw that lacks a class is drawn again.

    Args:
        labels: (n,) of 0 and 1.
        groups: (n,) patient of each row.
        seed: of the draws, which do not depend on how they are cut into chunks.
        split: (n,) divides the rows; each part holds both classes in each draw.

    Yields:
        (r, n) float64: how often each row counts in each of r draws, ``REPLICATES`` in all.

    Raises:
        ValueError: a class is missing.
    """
    parts = np.zeros(len(labels)) if split is None else split
    needed = [(parts == part) & (labels == label) for part in np.unique(parts) for label in (0, 1)]
    if not all(rows.any() for rows in needed):
        raise ValueError("the rows need both labels 0 and 1: with one class no figure is defined")
    names, patient = np.unique(groups, return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK_CELLS // len(labels))
    left = REPLICATES
    while left:
        drawn = rng.multinomial(len(names), chances, size=min(size, left)).astype(np.float64)
        weights = drawn[:, patient]
        weights = weights[np.all([weights[:, rows].any(axis=1) for rows in needed], axis=0)]
        left -= len(weights)
        yield weights


def bootstrap(
    labels: NDArray[Any],
    groups: NDArray[Any],
    seed: int,
    statistics: Callable[[NDArray[np.float64]], Figures],
    split: NDArray[Any] | None = None,
) -> Figures:
    """Compute figures under all draws of ``draw_weights``.

    Args:
        labels: (n,) of 0 and 1.
        groups: (n,) patient of each row.
        seed: of the draws.
        statistics: takes weights (r, n), returns values (r,) by name.
        split: as for ``draw_weights``.

    Returns:
        (REPLICATES,) values by name.
    """
    chunks = [statistics(weights) for weights in draw_weights(labels, groups, seed, split)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def estimate(
    value: float, replicates: NDArray[np.float64], patients: int | None = None
) -> Estimate:
    """Return a figure with its percentile interval.

    Undefined replicates are left out; more than 5 % of them leave no interval. A share of 0 or 1,
    whose replicates do not vary, gets the exact interval.

    Source: Efron and Tibshirani 1993, percentile method; Clopper and Pearson 1934.

    Args:
        value: on all rows, NaN where undefined.
        replicates: (R,) of the bootstrap, NaN where undefined.
        patients: of a share, the independent patients behind it; None for other figures.
    """
    if not math.isfinite(value):
        return Estimate(None)
    if patients is not None and value in (0.0, 1.0):
        reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / patients)
        return Estimate(value, max(0.0, value - reach), min(1.0, value + reach))
    known = replicates[np.isfinite(replicates)]
    if len(known) < CONFIDENCE * len(replicates):
        return Estimate(value)
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))
