"""Counts of patients; only shared copies and a report under ``--min_cell`` hide small ones."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MIN_CELL = 11
"""Patients of the smallest cell that is shared, and training patients that an input needs, since
the weights are shared, too. Source: CMS cell size suppression policy, no cell of 1 to 10."""


def count_patients(groups: NDArray[np.generic], rows: NDArray[np.generic] | slice) -> int:
    """Count the different patients of some rows of ``groups`` (n,): a mask, positions, a slice."""
    return len(np.unique(groups[rows]))


def minority_patients(labels: NDArray[np.generic], groups: NDArray[np.generic]) -> int:
    """Count the patients that have the outcome (label 0 or 1) that fewer patients have."""
    return min(count_patients(groups, labels == label) for label in (0, 1))


def patients_behind(column: NDArray[np.float64], groups: NDArray[np.generic]) -> int:
    """Count the patients whose values decide mean and spread of a column, which weights keep."""
    deciding_rows = ~np.isnan(column)
    values, counts = np.unique(column[deciding_rows], return_counts=True)
    # Where most rows share a value, the patients with another one decide.
    if len(values) > 1 and 2 * counts.max() > counts.sum():
        deciding_rows &= column != values[counts.argmax()]
    return count_patients(groups, deciding_rows)


def large_bins(
    labels: NDArray[np.float64],  # (n,)
    risk: NDArray[np.float64],  # (n,)
    patients: NDArray[np.generic],  # (n,)
    min_cell: int,
    edges: Iterable[float],  # the first ones go first
) -> list[float]:
    """Return those edges, rising, whose bins all hold ``min_cell`` patients with each label."""
    names = np.unique(patients, return_inverse=True)[1]  # numbers are counted faster
    chosen = [-np.inf, np.inf]

    def is_large(low: float, high: float) -> bool:
        rows = (risk >= low) & (risk < high)
        return minority_patients(labels[rows], names[rows]) >= min_cell

    for edge in edges:
        k = bisect(chosen, edge)
        if is_large(chosen[k - 1], edge) and is_large(edge, chosen[k]):
            chosen.insert(k, edge)
    return chosen[1:-1]


def count_text(count: float | str, min_cell: int = 0) -> str:
    """Write a number of patients, or that it is below ``min_cell``; a text stays as it is."""
    if isinstance(count, str):
        return count
    return f"fewer than {min_cell}" if 0 < count < min_cell else f"{count:,.0f}"
