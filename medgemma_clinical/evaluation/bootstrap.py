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

    def to_json(self) -> dict[str, float | None]:
        """Return ``{"value": ..., "low": ..., "high": ...}``."""
        return asdict(self)

    def above(self, limit: float) -> bool:
        """Return whether the whole interval is known and above ``limit``."""
        return self.low is not None and self.low > limit

    def below(self, limit: float) -> bool:
        """Return whether the whole interval is known and below ``limit``."""
        return self.high is not None and self.high < limit

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
    patients = len(names)
    rng = np.random.default_rng(seed)
    equal_chance = np.full(patients, 1 / patients)
    size = max(1, CHUNK_CELLS // len(labels))
    left = REPLICATES
    while left:
        drawn = rng.multinomial(patients, equal_chance, size=min(size, left)).astype(np.float64)
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
        statistics: takes weights (r, n) and returns values (r,) by name.
        split: as in ``draw_weights``.

    Returns:
        (REPLICATES,) values by name.
    """
    chunks = [statistics(weights) for weights in draw_weights(labels, groups, seed, split)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def estimate(value: float, replicates: NDArray[np.float64]) -> Estimate:
    """Return a figure with its percentile interval.

    Undefined replicates are left out; more than 5 % of them leave no interval.

    Source: Efron and Tibshirani 1993, percentile method.

    Args:
        value: on all rows, NaN where undefined.
        replicates: (R,) of the bootstrap, NaN where undefined.
    """
    if not math.isfinite(value):
        return Estimate(None)
    known = replicates[np.isfinite(replicates)]
    if len(known) < CONFIDENCE * len(replicates):
        return Estimate(value)
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def share_estimate(value: float, replicates: NDArray[np.float64], patients: int) -> Estimate:
    """Return ``estimate``, with an exact interval for shares of 0 and 1, whose draws do not vary.

    Source: Clopper and Pearson 1934.

    Args:
        value: of the share on all rows, NaN where undefined.
        replicates: (R,) of the bootstrap.
        patients: number of independent patients behind the share.
    """
    if value not in (0.0, 1.0):
        return estimate(value, replicates)
    reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / patients)
    return Estimate(value, 0.0, reach) if value == 0 else Estimate(value, 1 - reach, 1.0)


def estimates(
    values: Figures, replicates: Figures, share_patients: dict[Any, int]
) -> dict[Any, Estimate]:
    """Join values (1,) and replicates (R,) of the same names to estimates.

    Args:
        values: figures on all rows.
        replicates: figures under the bootstrap's draws.
        share_patients: for figures that are shares, the patients behind them.
    """
    return {
        name: share_estimate(float(value[0]), replicates[name], share_patients[name])
        if name in share_patients
        else estimate(float(value[0]), replicates[name])
        for name, value in values.items()
    }
