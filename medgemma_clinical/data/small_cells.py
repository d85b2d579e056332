"""Counts of patients, and how those of a few are written in what is given away.

Everything on the owner's machine shows exact counts. Only a report under ``--min_cell N`` and the
files of ``push_to_hub`` hide counts of 1 to N - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MIN_CELL = 11
"""Patients of the smallest cell that is shared. Source: CMS cell size suppression policy, no cell
of 1 to 10."""


def count_patients(groups: NDArray[np.generic], rows: NDArray[np.generic]) -> int:
    """Count the different patients of some rows: ``groups`` (n,), ``rows`` a mask or positions."""
    return len(np.unique(groups[rows]))


def minority_patients(labels: NDArray[np.generic], groups: NDArray[np.generic]) -> int:
    """Count the patients that have the outcome (label 0 or 1) that fewer patients have."""
    return min(count_patients(groups, labels == label) for label in (0, 1))


def count_text(count: int, min_cell: int) -> str:
    """Write a number of patients, or that it is below ``min_cell``; 0 hides none."""
    return f"fewer than {min_cell}" if 0 < count < min_cell else f"{count:,}"


# --- used by rooms that are being rewritten; the lead deletes them

rarer_patients = minority_patients

PERCENT = np.arange(1, 100) / 100
"""Risks, and shares of the rows, at which bands begin before small ones are merged."""

Patients = tuple[set[int], set[int]]
"""Patients without and with the event."""


def is_small(count: int, fewest: int) -> bool:
    """Return whether a number of patients must not be shown."""
    return 0 < count < fewest


def counting_rule(fewest: int) -> str:
    """Describe how small cells were treated, for the foot of a page."""
    if fewest == 0:
        return "shown (--min_cell 0): check the data use agreement before this page is shared"
    return (
        f"counts of fewer than {fewest} patients, and figures that give them away, are hidden; "
        f"groups and steps of curves are merged up to {fewest} patients (--min_cell {fewest})"
    )


def has_few_events(
    labels: NDArray[np.float64],
    groups: NDArray[np.generic],
    split: dict[str, NDArray[np.int64]],
    fewest: int,
) -> bool:
    """Return whether few patients of some part have the event, or lack it.

    Parts are stratified, so that the events of one reveal those of the others.

    Args:
        labels: (N,) of 0 and 1.
        groups: (N,) patient of each row.
        split: positions of each part.
        fewest: patients that a cell needs.
    """
    parts = split.values()
    return any(is_small(rarer_patients(labels[rows], groups[rows]), fewest) for rows in parts)


def any_small(
    cells: NDArray[np.int64], groups: NDArray[np.generic], count: int, fewest: int
) -> bool:
    """Return whether any of ``count`` cells is small; ``cells`` (n,) is the cell of each row."""
    return any(is_small(count_patients(groups, cells == k), fewest) for k in range(count))


def merge_bands(
    bands: NDArray[np.int64],
    count: int,
    labels: NDArray[np.float64],
    groups: NDArray[np.int64],
    fewest: int,
) -> NDArray[np.int64]:
    """Merge neighbouring bands until each has no, or enough, patients with and without the event.

    Args:
        bands: (n,) position of each row's band, below ``count``.
        count: number of bands.
        labels: (n,) of 0 and 1.
        groups: (n,) number of each row's patient.
        fewest: patients that a cell needs.

    Returns:
        (count,) the merged band of each band, from 0 on, not decreasing.
    """
    held: list[Patients] = [(set(), set()) for _ in range(count)]
    for band, label, patient in zip(bands.tolist(), labels.tolist(), groups.tolist(), strict=True):
        held[band][int(label)].add(patient)
    merged: list[tuple[int, Patients]] = []  # number of bands, their patients
    open_band: tuple[int, Patients] | None = None
    for each in held:
        open_band = (1, each) if open_band is None else _joined(open_band, (1, each))
        if _is_whole(open_band, fewest):
            merged.append(open_band)
            open_band = None
    while open_band is not None:  # what is left over joins the bands before
        if merged and not _is_whole(open_band, fewest):
            open_band = _joined(merged.pop(), open_band)
        else:
            merged.append(open_band)
            open_band = None
    return np.repeat(np.arange(len(merged)), [bands_in for bands_in, _ in merged])


def _joined(one: tuple[int, Patients], other: tuple[int, Patients]) -> tuple[int, Patients]:
    without, having = (a | b for a, b in zip(one[1], other[1], strict=True))
    return one[0] + other[0], (without, having)


def _is_whole(band: tuple[int, Patients], fewest: int) -> bool:
    return not any(is_small(len(patients), fewest) for patients in band[1])


@dataclass(frozen=True)
class RiskBands:
    """Risks as finely as they may be shown.

    Attributes:
        place: (n,) int64 band of each row, rising with its risk.
        edges: (K,) risks between neighbouring bands; None where each risk is a band of its own.
    """

    place: NDArray[np.int64]
    edges: NDArray[np.float64] | None

    @property
    def thresholds(self) -> NDArray[np.float64]:
        """Risks from which on alarms may be counted."""
        return PERCENT if self.edges is None else self.edges


def risk_bands(
    risk: NDArray[np.float64],
    labels: NDArray[np.float64],
    groups: NDArray[np.int64],
    fewest: int,
    threshold: float | None = None,
) -> RiskBands:
    """Cut risks at whole percents, at their own percentiles and at a threshold; merge the bands.

    Args:
        risk: (n,) within 0 and 1.
        labels: (n,) of 0 and 1.
        groups: (n,) number of each row's patient.
        fewest: patients that a cell needs; 0 merges nothing.
        threshold: stays an edge where alarms with and without event, and the others, are enough.
    """
    if fewest == 0:
        return RiskBands(np.unique(risk, return_inverse=True)[1], None)
    given = [] if threshold is None else [threshold]
    edges = np.unique([*PERCENT, *np.quantile(risk, PERCENT), *given])
    bands = np.digitize(risk, edges)
    sides = [np.arange(len(edges) + 1)]
    if threshold is not None:
        alarm = risk >= threshold
        if not any_small(2 * (labels == 1) + alarm, groups, 4, fewest):
            sides = np.split(sides[0], [int(np.searchsorted(edges, threshold)) + 1])
    merged = np.empty(len(edges) + 1, dtype=np.int64)
    done = 0
    for side in sides:
        rows = np.isin(bands, side)
        own = merge_bands(bands[rows] - side[0], len(side), labels[rows], groups[rows], fewest)
        merged[side] = done + own
        done = merged[side[-1]] + 1
    return RiskBands(merged[bands], edges[np.diff(merged) > 0])


def merge_flow(flow: pd.DataFrame, fewest: int) -> pd.DataFrame:
    """Join rules that remove few rows with their neighbours.

    Args:
        flow: columns rule, removed, left; see ``TrajectoryDataset.flow``.
        fewest: rows that a rule needs.

    Returns:
        The same columns, ``removed`` and ``left`` as text.
    """
    lines: list[tuple[str, int, int]] = []
    small = False
    for rule, removed, left in flow[["rule", "removed", "left"]].itertuples(index=False):
        # A small rule joins the next one; a small last rule the ones before.
        if small:
            before = lines.pop()
            rule, removed = f"{before[0]}; {rule}", before[1] + removed
        lines.append((rule, int(removed), int(left)))
        small = is_small(int(removed), fewest)
    while small and len(lines) > 1:
        rule, removed, left = lines.pop()
        before = lines.pop()
        lines.append((f"{before[0]}; {rule}", before[1] + removed, left))
        small = is_small(lines[-1][1], fewest)
    shown = [
        (rule, count_text(removed, fewest), count_text(left, fewest))
        for rule, removed, left in lines
    ]
    return pd.DataFrame(shown, columns=["rule", "removed", "left"])
