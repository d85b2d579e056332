"""Small cells: counts of a few patients are hidden, with all that would give them away.

A cell is a number of patients who have something in common. Cells of 1 to ``fewest - 1`` patients
are small; a ``fewest`` of 0 hides nothing. Bands (of age, of risk) are merged until none is small,
so that no sum or difference of what is shown gives a small cell away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FEWEST = 11
"""Default of ``--min_cell``. Source: CMS cell size suppression policy, no cell of 1 to 10."""

PERCENT = np.arange(1, 100) / 100
"""Risks, and shares of the rows, at which bands begin before small ones are merged."""

MIN_CELL = FEWEST

Patients = tuple[set[int], set[int]]
"""Patients without and with the event."""


def is_small(count: int, fewest: int) -> bool:
    """Return whether a number of patients must not be shown."""
    return 0 < count < fewest


def count_text(count: int, fewest: int) -> str:
    """Write a count, or that it is small."""
    return f"fewer than {fewest}" if is_small(count, fewest) else f"{count:,}"


def counting_rule(fewest: int) -> str:
    """Describe how small cells were treated, for the foot of a page."""
    if fewest == 0:
        return "shown (--min_cell 0): check the data use agreement before this page is shared"
    return (
        f"counts of fewer than {fewest} patients, and figures that give them away, are hidden; "
        f"groups and steps of curves are merged up to {fewest} patients (--min_cell {fewest})"
    )


def count_patients(groups: NDArray[np.generic], rows: NDArray[np.generic]) -> int:
    """Count the different patients of some rows: ``groups`` (n,), ``rows`` a mask or positions."""
    return len(np.unique(groups[rows]))


def rarer_patients(labels: NDArray[np.generic], groups: NDArray[np.generic]) -> int:
    """Count the patients that have the outcome (label 0 or 1) that fewer patients have."""
    return min(count_patients(groups, labels == label) for label in (0, 1))


def share_text(
    chosen: NDArray[np.bool_], groups: NDArray[np.generic], fewest: int, noun: str
) -> str:
    """Write how many of some rows or values are chosen, or that few patients have, or lack, them.

    Args:
        chosen: (n,) which ones.
        groups: (n,) patient of each.
        fewest: patients of the smallest cell that is shown.
        noun: what they are, in the plural.
    """
    few = f"{noun} of fewer than {fewest} patients"
    if is_small(count_patients(groups, chosen), fewest):
        return few
    if is_small(count_patients(groups, ~chosen), fewest):
        return f"all but {few}"
    return f"{int(chosen.sum()):,} of {len(chosen):,} {noun}"


def hides_events(labels: NDArray[np.float64], groups: NDArray[np.generic], fewest: int) -> bool:
    """Return whether a number of events is not shown: few patients, or few with, or without, it.

    Args:
        labels: (n,) of 0 and 1.
        groups: (n,) patient of each row.
        fewest: patients that a cell needs.
    """
    return is_small(len(np.unique(groups)), fewest) or is_small(
        rarer_patients(labels, groups), fewest
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


def patient_quantiles(
    numbers: NDArray[Any], groups: NDArray[np.generic], shares: Sequence[float]
) -> list[float]:
    """Return quantiles of numbers in which each patient counts once, however many they have.

    Each quantile is a number that occurs: between two of them it would reveal how many lie above.

    Args:
        numbers: (n,), at least one.
        groups: (n,) the patient of each number.
        shares: of the patients, within 0 and 1.
    """
    _, patient, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(numbers, kind="stable")
    below = np.cumsum(1 / counts[patient[order]])
    places = np.searchsorted(below, np.asarray(shares) * len(counts) - 1e-9)
    return numbers[order][np.minimum(places, len(numbers) - 1)].tolist()


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


def flow_lines(flow: pd.DataFrame, fewest: int) -> list[str]:
    """Return a flow as lines of a log, without the rules that remove nothing."""
    merged = merge_flow(flow[flow["removed"] > 0], fewest)
    return [
        f"{removed:>15} out, {left:>9} left: {rule}"
        for rule, removed, left in merged.itertuples(index=False)
    ]
