"""What was measured in the patients of a cohort, and what does not fit those of the training.

A patient counts once, by the median of the medians of their rows. What is stored are means of
disjoint groups of at least ``MIN_CELL`` patients, rounded, so that it may be shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri

from medgemma_clinical.data.analytes import Conversion, conversions
from medgemma_clinical.data.dka import join_names
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

LEVELS = (np.arange(99) + 0.5) / 99
LOWER, MIDDLE, UPPER = 15, 49, 83
"""Levels of quantiles that are compared; of these the median, and a standard deviation off it."""

SHARES = np.arange(0.05, 0.96, 0.025)
TILTS = np.array([(tilt, bend) for tilt in np.linspace(-2, 2, 9) for bend in (-0.5, 0.0, 0.5)])
"""Shares of patients with another unit; weights of the patients of another population."""

MIN_GROUPS, MIN_POSITIVE, MIN_CHANGED = 5, 0.8, 5
"""Minimum of groups of training patients, of the share above 0, and of patients of another unit."""

SMALL_RATIO, MIN_SMALL = 3.0, 60
"""Urea doubles in sicker patients, too: smaller ratios are sought in so many patients or more."""

CLOSER, CLOSER_STRICT, CLOSER_SUSPECTED = 3.0, 4.0, 2.0
"""Another unit has to lie so many times closer than another population; strictly, where chance
offers much: small ratios, and powers of ten of a share; less, where all patients suggest it."""

POPULATION_SHIFT, OWN_SHIFT = {True: 0.5, False: 1.0}, (0.5, 0.1)
"""Shifts in standard deviations that are no unit of all patients, by whether the test has the ratio
in our table; and of patients with another unit, in SD and as a share of its logarithm."""

NEAREST = 0.005
"""Smallest distance of logarithms: quantiles are rounded."""

ASKS_UNIT = "is the unit right?"


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


def compare(
    training: Distributions, rows: pd.DataFrame, periods: pd.Series[str] | None = None
) -> list[str]:
    """Return what of ``row_medians`` does not fit the training patients, by period where known."""
    patients, problems = patient_medians(rows), []
    for kind in ("series", "static"):
        for name, entry in training.get(kind, {}).items():
            if (kind, name) not in patients:
                continue
            column = patients[kind, name].to_numpy(float)
            change, where = find_unit_change(name, entry, column), ""
            if periods is not None:
                by_period = unit_changes(name, entry, rows[kind, name], periods, change)
                if 0 < len(by_period) < (periods.value_counts() >= MIN_MEASURED).sum():
                    where = f" ({join_names([*by_period])})"
                change = change or next(iter(by_period.values()), None)
            found = compare_column(name, entry, column, change, where)
            problems += [f"{name}: {problem}" for problem in found]
    return problems


def compare_column(
    name: str,
    entry: Mapping[str, Any],
    column: NDArray[np.float64],
    change: UnitChange | None,
    where: str = "",
) -> list[str]:
    """Return what of one value a patient does not fit a stored distribution."""
    values, problems = column[~np.isnan(column)], []
    n, usual = len(values), entry["measured"]
    share, expected = n / max(1, len(column)), usual * len(column)
    if expected >= MIN_MEASURED and not n:
        problems.append("never measured here")
    elif max(n, expected) >= MIN_MEASURED and not usual / RARE < share < usual * RARE:
        shares = percent(share), percent(usual)
        problems.append("measured in {} of patients here, {} in training".format(*shares))
    if change:
        problems.append(f"{change.words}{where}: {ASKS_UNIT}")
    elif n >= MIN_MEASURED and not _is_usual(entry, float(np.median(values))):
        here, there = f"{np.median(values):.3g}", "0 or 1"
        if "share" not in entry:
            there = f"{quantile(entry, 0.5):.3g}"
        problems.append(f"median {here} here, {there} in training: {ASKS_UNIT}")
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
    ends = [middle + reach * (mean - middle) for mean in (means[0], means[-1])]
    if means[0] > 0:  # or of logarithms, where that is wider: troponins are skewed
        center = math.exp(np.interp(0.5, levels, np.log(means)))
        ends += [center * (mean / center) ** reach for mean in (means[0], means[-1])]
    return min(ends), max(ends)


# ------------------------------------------------------------------ of two units


@dataclass(frozen=True)
class UnitChange:
    """Another unit, of a share of patients, that explains their values."""

    conversion: Conversion
    share: float
    distance: float  # of the logarithms of quantiles

    @property
    def words(self) -> str:
        """What fits the training data, and how."""
        if self.share == 1:
            return f"the values fit the training data if {self.conversion.remedy}"
        share = percent(_two_digits(self.share))
        return f"about {share} of patients fit the training data if {self.conversion.remedy}"


def unit_changes(
    name: str,
    entry: Mapping[str, Any],
    column: pd.Series[float],  # of rows, whose index is the patient
    periods: pd.Series[str],
    suspected: UnitChange | None,  # of all patients
) -> dict[str, UnitChange]:
    """Return the periods in which another unit is seen."""
    found = {}
    for period, part in column.groupby(periods.to_numpy()):
        values = np.asarray(part.groupby(level=0).median(), dtype=float)
        if change := find_unit_change(name, entry, values, suspected):
            found[str(period)] = change
    return found


def find_unit_change(
    name: str,
    entry: Mapping[str, Any],
    column: NDArray[np.float64],
    suspected: UnitChange | None = None,
) -> UnitChange | None:
    """Return the unit that explains values (patients,) far better than another population does."""
    # By quantiles of logarithms: of the training patients, of whom all or a share have another
    # unit, and of other populations.
    values = column[np.isfinite(column)]
    logs = np.log(values[values > 0])
    if "share" in entry or len(entry["means"]) < MIN_GROUPS or len(logs) < MIN_MEASURED:
        return None
    is_positive = np.array(entry["means"]) > 0
    if min(len(logs) / len(values), is_positive.mean()) < MIN_POSITIVE:
        return None
    there, here = _log_quantiles(entry), np.quantile(logs, LEVELS)
    if np.abs(here - there).mean() < CLOSER * NEAREST:
        return None
    others = {shift: _population_distance(here, there, shift) for shift in (0.5, 1.0, np.inf)}
    closer = CLOSER_SUSPECTED if suspected else None
    found = list[UnitChange]()
    for conversion in [suspected.conversion] if suspected else conversions(name):
        found += _changes_by(conversion, here, there, len(logs), others, closer)
    # Lactates in mg/dL nearly fit a factor of 10.
    found = [x for x in found if x.conversion.is_named] or found
    return min(found, key=lambda change: change.distance, default=None)


def _changes_by(
    conversion: Conversion,
    here: NDArray[np.float64],  # (levels,) logarithms
    there: NDArray[np.float64],
    n: int,  # values here
    others: Mapping[float, float],  # distances of other populations by their shift
    closer: float | None,  # how many times closer another unit has to lie; None: by its kind
) -> list[UnitChange]:
    """Return the unit of all patients, and of a share, where it is far closer than others."""
    changed, spread = conversion.of_logs(there), _spread(there)
    factor = abs(float(changed[MIDDLE] - there[MIDDLE]))
    is_small = factor < math.log(SMALL_RATIO)
    if is_small and n < MIN_SMALL:
        return []
    shares = SHARES[SHARES * n >= MIN_CHANGED]
    mixtures = np.concatenate([changed[None], _mixtures(there, changed, shares)])
    own_shift = 0.0 if is_small else min(OWN_SHIFT[0] * spread, OWN_SHIFT[1] * factor)
    distances = _distances(here - mixtures, own_shift)
    found = list[UnitChange]()
    for k in {0, int(distances[1:].argmin()) + 1 if len(shares) else 0}:
        is_whole = k == 0
        is_strict = is_small or not (conversion.is_named or is_whole)
        times = closer or (CLOSER_STRICT if is_strict else CLOSER)
        shift = POPULATION_SHIFT[conversion.is_named] if is_whole else np.inf
        if distances[k] <= spread and times * max(NEAREST, distances[k]) < others[shift]:
            share = 1.0 if is_whole else float(shares[k - 1])
            found.append(UnitChange(conversion, share, np.abs(here - mixtures[k]).mean()))
    return found


def _log_quantiles(entry: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return logarithms of the quantiles at ``LEVELS``; beyond the means, of a normal curve."""
    means = np.array(entry["means"], dtype=float)
    z, logs = ndtri(np.array(entry["levels"])[means > 0]), np.log(means[means > 0])
    wanted, middle = ndtri(LEVELS), np.interp(0, z, logs)
    quantiles = np.interp(wanted, z, logs)
    for end, beyond in ((0, wanted < z[0]), (-1, wanted > z[-1])):
        quantiles[beyond] = middle + (logs[end] - middle) * wanted[beyond] / z[end]
    return np.maximum.accumulate(quantiles)


def _spread(quantiles: NDArray[np.float64]) -> float:
    return max(float(quantiles[UPPER] - quantiles[LOWER]) / 2, NEAREST)


def _distances(rest: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Return mean distances (k,) of quantiles (k, levels) that may be shifted by up to so much."""
    shifts = np.clip(np.median(rest, axis=1), -shift, shift)
    return np.abs(rest - shifts[:, None]).mean(axis=1)


def _population_distance(
    here: NDArray[np.float64], there: NDArray[np.float64], shift: float
) -> float:
    """Return how close another population comes that is shifted by so many SD at most."""
    spread = _spread(there)
    z = (there - there[MIDDLE]) / spread
    steeper = max(0.2, np.polyfit(there, here, 1)[0]) if np.ptp(there) else 1.0
    stretched = there[MIDDLE] + np.outer([1.0, steeper], there - there[MIDDLE])
    size = np.abs(TILTS[:, 0]) + 2 * TILTS[:, 1].clip(0)  # weights of both ends shift, too
    tilt, bend = TILTS[size <= shift].T[:, :, None]
    clipped = np.clip(z, -4, 4)
    weighted = _weighted(there, np.exp(tilt * clipped + bend * clipped**2))
    distances = _distances(here - stretched, shift * spread)
    return float(min(*distances, *_distances(here - weighted, 0.0)))


def _mixtures(
    there: NDArray[np.float64], changed: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return quantiles of patients of whom a share has another unit, (shares, levels)."""
    both = np.concatenate([there, changed])
    order = np.argsort(both, kind="stable")
    share = shares[:, None]
    return _weighted(both[order], np.where(order < len(there), 1 - share, share))


def _weighted(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quantiles of rising values (n,) by weights (k, n)."""
    levels = (weights.cumsum(axis=1) - weights / 2) / weights.sum(axis=1, keepdims=True)
    quantiles = [np.interp(LEVELS, of_row, values) for of_row in levels]
    return np.array(quantiles).reshape(len(weights), len(LEVELS))
