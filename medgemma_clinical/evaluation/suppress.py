"""Small counts are hidden in what is given away: a shared model, and the report of --min_cell N.

Counts become texts and metrics null, so that what was hidden once can be hidden again.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_float_dtype

from medgemma_clinical.data.small_cells import count_patients, count_text
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import FOLD_MINORITY, SPREAD, Metrics

COUNTS = ("n", "rows", "patients", "events", "minority_patients", FOLD_MINORITY, "left", "removed")
EVENTS_OF = "events: "
"""Beginning of the columns that count an event of several."""

AT_THRESHOLD = ("sensitivity", "specificity", "ppv", "npv", "positives")
SHARES = ["prevalence", "oe", "oe_low", "oe_high"]
"""Columns of a table that tell a hidden count, by another one."""

NOT_SHOWN = "not shown"

SHOWN_THRESHOLDS = 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7
"""Risks whose lines the table of thresholds has, as far as the decision curve reaches."""

THRESHOLDS = [
    *SHOWN_THRESHOLDS,
    *(k / 10**digits for digits in (5, 4, 3, 2) for k in range(10, 100)),
]
"""Risks at which curves may have points, where small counts are hidden; all have two digits."""

Json = dict[str, Any]


def suppress(part: Json, min_cell: int) -> Json:
    """Hide what tells small counts of a part, given as ``Metrics.to_json`` returns it."""
    counts = {name: part[name] for name in COUNTS if name in part}
    if min_cell == 0 or any(isinstance(count, str) for count in counts.values()):
        return part
    texts = {name: count_text(n, min_cell) for name, n in counts.items() if 0 < n < min_cell}
    minority = counts["minority_patients"]
    if 0 < minority < min_cell:  # the events may be many, and those without it few
        texts.setdefault("events", NOT_SHOWN)
    models = part.get("models", {})
    every = {name for metrics in (part, *models.values()) for name in metrics}
    hidden = every if minority < min_cell else _telling(part, min_cell)
    # A metric of a fold of few events tells their ranks, and so do many digits of the mean.
    spread = SPREAD if part.get(FOLD_MINORITY, 0) < min_cell else []
    part, *others = (_rounded(blank(x, hidden), spread) for x in (part, *models.values()))
    return {**part, **texts, "models": dict(zip(models, others, strict=True))}


def suppressed(metrics: Metrics, min_cell: int) -> Metrics:
    """Return metrics in which small counts, and what tells them, are hidden."""
    return Metrics.from_json(suppress(metrics.to_json(), min_cell))


def _rounded(metrics: Json, hidden: Container[str]) -> Json:
    """Return metrics with four digits, without the hidden numbers of each."""
    return {
        name: {
            key: None if key in hidden else round(number, 4) if type(number) is float else number
            for key, number in x.items()
        }
        if isinstance(x, dict) and name != "models"
        else x
        for name, x in metrics.items()
    }


def distant_thresholds(
    labels: Array,  # (n,)
    risk: Array,  # (n,)
    patients: NDArray[np.generic],  # (n,)
    min_cell: int,
    thresholds: Iterable[float] = THRESHOLDS,  # the first ones go first
    kept: Iterable[float] = (),  # known already
) -> list[float]:
    """Return thresholds of a risk, rising, between which no small count lies.

    At least ``min_cell`` patients with, and without, the event lie below, between and above them.
    """
    names = np.unique(patients, return_inverse=True)[1]  # numbers are counted faster
    chosen = [-np.inf, *sorted(kept), np.inf]

    def is_large(low: float, high: float) -> bool:
        part = (risk >= low) & (risk < high)
        return all(count_patients(names, part & (labels == y)) >= min_cell for y in (0, 1))

    for threshold in thresholds:
        k = bisect(chosen, threshold)
        if is_large(chosen[k - 1], threshold) and is_large(threshold, chosen[k]):
            chosen.insert(k, threshold)
    return chosen[1:-1]


def _telling(part: Json, min_cell: int) -> set[str]:
    """Return the names of metrics that tell a small cell, a row counted as a patient at most."""
    patients = min(part["n"], part["patients"])
    events = part["events"] / part["n"] * patients

    def tells(count: float, name: str) -> bool:
        share = part.get(name, {}).get("value")
        return share is not None and splits_off_few(count, share, min_cell)

    is_small = tells(events, "sensitivity") or tells(patients - events, "specificity")
    return set(AT_THRESHOLD) if is_small else set()


def splits_off_few(count: float, share: float, min_cell: int) -> bool:
    """Return whether a share of a count, or the rest, is small."""
    return any_small((count * share, count * (1 - share)), min_cell)


def any_small(counts: Iterable[float], min_cell: int) -> bool:
    """Return whether some count is small, and not zero."""
    return any(0 < round(n, 6) < min_cell for n in counts)


def blank(metrics: Json, hidden: Container[str]) -> Json:
    """Return metrics, the hidden ones without their numbers."""
    return {
        name: dict.fromkeys(x) if isinstance(x, dict) and name in hidden else x
        for name, x in metrics.items()
    }


def suppress_table(table: pd.DataFrame, min_cell: int, by: str | None = None) -> pd.DataFrame:
    """Hide small counts, and what tells them: counts add up within each value of ``by``."""
    if min_cell == 0 or table.empty:
        return table
    if by is not None:
        groups = table.groupby(by, sort=False, observed=True)
        return pd.concat([suppress_table(part, min_cell) for _, part in groups])
    minority = table.get("minority_patients", pd.Series(min_cell, table.index))
    table = table.drop(columns="minority_patients", errors="ignore")  # it tells the events
    counts = [name for name in COUNTS if name in table]
    counts += [name for name in map(str, table) if name.startswith(EVENTS_OF)]
    shown = table.astype(dict.fromkeys(counts, object))
    floats = table.columns[[is_float_dtype(kind) for kind in table.dtypes]]
    shown[floats] = table[floats].round(3)  # more digits of an AUROC tell the events
    shown.loc[minority < min_cell, floats] = np.nan
    for name in counts:
        count = table[name]
        small = hidden = (count > 0) & (count < min_cell)
        few = (minority > 0) & (minority < min_cell)
        if name == "events":  # those without it may be few
            hidden = small | few
        if name.startswith(EVENTS_OF):  # they add up to the rows
            hidden = small | bool(few.any())
        others = count[~hidden & (count > 0)]
        # The total and the other counts tell a single hidden one.
        if hidden.sum() == 1 and len(others) and name != "left":
            hidden = hidden | (count.index == others.idxmin())
        texts = [count_text(n, min_cell) for n in count]
        shown[name] = pd.Series(texts, count.index, object).mask(hidden & ~small, NOT_SHOWN)
        shown.loc[hidden, table.columns.intersection(SHARES)] = np.nan
        if name == "removed" and hidden.any():  # two neighbours tell what was removed
            shown.loc[shown.index[:-1], "left"] = NOT_SHOWN
    return shown
