"""What was measured in the patients of a cohort, and what does not fit those of the training.

A patient counts once, by the median of the medians of their rows. What is stored are means of
disjoint groups of at least ``MIN_CELL`` patients, rounded, so that it may be shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.analytes import unit_ratios
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.trajectories import TrajectoryDataset

Distributions = Mapping[str, Any]
"""Of ``series`` and ``static`` features by name, without which older checkpoints are: the share of
patients ``measured`` and either ``levels`` and ``means`` of groups of patients in order or, of an
indicator, the ``share`` of ones."""

EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45)
"""Shares of patients below the edges of groups, mirrored above the median."""

MIN_MEASURED = 20
"""Minimum of patients of a comparison."""

RARE = 10
"""A share measured that is so many times another one is reported."""

COMPARED = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Levels at which a factor between two units is sought."""

CLOSER = 5
"""A factor fits clearly better if the logarithms of quantiles lie so many times closer."""

SMALL_RATIO, MIN_SMALL = 3.0, 60
"""Urea doubles in sicker patients, too: smaller ratios are sought in so many patients or more."""


# ------------------------------------------------------------------ of a cohort


def row_medians(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return the inputs of a model, (N, F + K), by kind and name; the index is the patient."""
    return _row_values(dataset, "median")


def last_values(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return the last known value of each series, and the rest as ``row_medians`` does."""
    return _row_values(dataset, "last")


def _row_values(dataset: TrajectoryDataset, statistic: str) -> pd.DataFrame:
    read = dataset.series_read
    values = pd.DataFrame(dataset.values[:, read], columns=[dataset.features[f] for f in read])
    static = dataset.static_table(dataset.static_inputs)
    return by_kind(values, dataset.owner, static, dataset.groups, statistic)


def by_kind(
    values: pd.DataFrame,
    owner: NDArray[np.int64],
    static: pd.DataFrame,
    patients: NDArray[Any],
    statistic: str = "median",
) -> pd.DataFrame:
    """Return a statistic of N rows: ``values`` of observations (n, F), ``owner`` their row (n,)."""
    series = values.groupby(owner).agg(statistic).reindex(range(len(patients)))
    table = pd.concat({"series": series, "static": static}, axis=1)
    return table.set_axis(pd.Index(patients), axis=0)


def patient_medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the lower median of each patient's rows, so that an indicator stays 0 or 1."""
    if rows.index.is_unique:
        return rows
    return rows.groupby(level=0).quantile(0.5, interpolation="lower")


def describe(rows: pd.DataFrame, min_patients: int = MIN_CELL) -> dict[str, dict[str, Any]]:
    """Return the distributions of ``row_medians``, each number of at least so many patients."""
    patients, found = patient_medians(rows), dict[str, dict[str, Any]](series={}, static={})
    for kind, entries in found.items():
        for name in patients.get(kind, pd.DataFrame()):
            column = patients[kind, name].to_numpy(float)
            if entry := _describe_column(column, max(1, min_patients)):
                entries[str(name)] = entry
    return found


def _describe_column(column: NDArray[np.float64], min_patients: int) -> dict[str, Any]:
    """Return the distribution of (patients,); nothing where it would tell of few of them."""
    values = np.sort(column[~np.isnan(column)])
    n, lacking = len(values), len(column) - len(values)
    if n < min_patients:
        return {}
    # The exact share would tell how many lack it.
    measured = _two_digits(n / len(column)) if lacking >= min_patients else 1.0
    if np.isin(values, [0, 1]).all():
        ones = int(values.sum())
        if any(0 < count < min_patients for count in (ones, n - ones)):
            return {}
        return {"measured": measured, "share": _two_digits(ones / n)}
    edges = _edges(n, min_patients)
    means = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
    q1, q3 = np.quantile(values, [0.25, 0.75])
    digits = _digits(q3 - q1 or means[-1] - means[0])
    return {
        "measured": measured,
        "levels": [round(level, 2) for level in ((edges[1:] + edges[:-1]) / 2 / n).tolist()],
        "means": [round(mean, digits) for mean in means.tolist()],
    }


def _edges(n: int, min_patients: int) -> NDArray[np.int64]:
    """Return where groups of n patients in order begin and end, each of ``min_patients``."""
    edges = [0]
    for share in EDGES:
        edge = max(round(share * n), edges[-1] + min_patients)
        if n - 2 * edge == 0 or n - 2 * edge >= min_patients:
            edges.append(edge)
    if len(edges) == 1 and n >= 2 * min_patients:
        return np.array([0, n // 2, n])
    return np.unique([*edges, *(n - edge for edge in edges)])


def _digits(spread: float) -> int:
    """Return the decimals that resolve a tenth of a spread: more would tell single values."""
    return 6 if spread <= 0 else -math.floor(math.log10(spread / 10))


def _two_digits(share: float) -> float:
    return float(f"{share:.2g}")


def quantile(entry: Mapping[str, Any], level: float) -> float:
    """Return a quantile of a stored distribution."""
    return float(np.interp(level, entry["levels"], entry["means"]))


# ------------------------------------------------------------------ of two cohorts


def compare(training: Distributions, rows: pd.DataFrame) -> list[str]:
    """Return what of ``row_medians`` does not fit the distributions of the training patients."""
    patients = patient_medians(rows)
    return [
        f"{name}: {problem}"
        for kind in ("series", "static")
        for name, entry in training.get(kind, {}).items()
        if (kind, name) in patients
        for problem in compare_column(name, entry, patients[kind, name].to_numpy(float))
    ]


def compare_column(name: str, entry: Mapping[str, Any], column: NDArray[np.float64]) -> list[str]:
    """Return what of one value a patient does not fit a stored distribution."""
    values, problems = column[~np.isnan(column)], []
    n, usual = len(values), entry["measured"]
    share, expected = n / max(1, len(column)), usual * len(column)
    if expected >= MIN_MEASURED and not n:
        problems.append("never measured here")
    elif max(n, expected) >= MIN_MEASURED and not usual / RARE < share < usual * RARE:
        shares = percent(share), percent(usual)
        problems.append("measured in {} of patients here, {} in training".format(*shares))
    if n >= MIN_MEASURED and not (
        _is_usual(entry, float(np.median(values))) and not fits_a_factor(name, entry, values)
    ):
        here, there = f"{np.median(values):.3g}", "0 or 1"
        if "share" not in entry:
            there = f"{quantile(entry, 0.5):.3g}"
        problems.append(f"median {here} here, {there} in training: is the unit right?")
    return problems


def percent(share: float) -> str:
    """Return a share of two digits in percent."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def _is_usual(entry: Mapping[str, Any], median: float) -> bool:
    low, high = usual_range(entry)
    rounding = 1e-5 * abs(median)
    return low - rounding <= median <= high + rounding


def usual_range(entry: Mapping[str, Any]) -> tuple[float, float]:
    """Return the ends of the middle 98 % of the training patients; infinite where not known."""
    if "share" in entry:
        return 0.0, 1.0
    levels, means = entry["levels"], entry["means"]
    if len(means) == 1:  # of fewer than 22 patients
        return -np.inf, np.inf
    middle, z = quantile(entry, 0.5), NormalDist().inv_cdf
    # Few patients make large groups: their ends lie further in, by those of a normal distribution.
    reach = max(1.0, z(0.01) / z(levels[0]))
    low, high = (middle + reach * (mean - middle) for mean in (means[0], means[-1]))
    return low, high


def fits_a_factor(name: str, entry: Mapping[str, Any], values: NDArray[np.float64]) -> bool:
    """Return whether quantiles, times a factor between two units, are clearly closer."""
    ratios = [x for x in unit_ratios(name) if x >= SMALL_RATIO or len(values) >= MIN_SMALL]
    if not ratios or "share" in entry or len(entry["means"]) < len(COMPARED):
        return False
    here = np.quantile(values, COMPARED)
    there = np.array([quantile(entry, level) for level in COMPARED])
    if min(here[0], there[0]) <= 0:
        return False
    shift = np.log(there / here)
    distances = [np.abs(shift - sign * math.log(x)).mean() for x in ratios for sign in (1, -1)]
    return bool(CLOSER * min(distances) < np.abs(shift).mean())
