"""Small counts are hidden in what is given away: a shared model, and the report of --min_cell N.

Counts become texts and metrics null, so that what was hidden once can be hidden again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation.metrics import SHARES as METRICS_AT
from medgemma_clinical.evaluation.metrics_table import FOLD_MINORITY, NAMES, SPREAD, Metrics

COUNTS = ("n", "rows", "patients", "events", "minority_patients", FOLD_MINORITY, "left", "removed")
EVENTS_OF = "events: "
"""Beginning of the columns that count an event of several."""

MINORITY = "minority_patients"
AT_THRESHOLD = (*METRICS_AT, "net_benefit")
SHARES = ["prevalence", "oe", "oe_low", "oe_high"]
"""Columns of a table that tell a hidden count, by another one."""

NOT_SHOWN = "not shown"

Json = dict[str, Any]


def suppress(part: Json, min_cell: int) -> Json:
    """Hide what tells small counts of a part, given as ``Metrics.to_json`` returns it."""
    minorities = [name for name in part if name.startswith(MINORITY)]
    endings = [name.removeprefix(MINORITY) for name in minorities]  # of the targets
    names = [f"{name}{end}" for end in endings for name in COUNTS]
    counts = {name: part[name] for name in names if name in part}
    if min_cell == 0 or any(isinstance(count, str) for count in counts.values()):
        return part
    texts = {name: count_text(n, min_cell) for name, n in counts.items() if 0 < n < min_cell}
    models, hidden, spreads = part.get("models", {}), set[str](), set[str]()
    few = few_endings(counts, min_cell)
    for end in endings:
        if end in few:
            # The events may be many, and those without it few, or the events of another target.
            if counts[f"{MINORITY}{end}"]:
                texts.setdefault(f"events{end}", NOT_SHOWN)
            hidden |= {f"{name}{end}" for name in NAMES}
        elif _has_few_at_threshold(part, end, min_cell):
            hidden |= {f"{name}{end}" for name in AT_THRESHOLD}
        # A metric of a fold of few events tells their ranks, and so do many digits of the mean.
        if part.get(f"{FOLD_MINORITY}{end}", 0) < min_cell:
            spreads |= {f"{name}{end}" for name in NAMES}
    part, *others = (hide(metrics, hidden, spreads) for metrics in (part, *models.values()))
    return {**part, **texts, "models": dict(zip(models, others, strict=True))}


def few_endings(counts: Mapping[str, Any], min_cell: int) -> set[str]:
    """Return the endings of the targets that fewer patients have, or lack, or that tell such."""
    few: set[str] = set()
    shown: list[int] = []
    for name in [name for name in counts if name.startswith(MINORITY)]:
        end = name.removeprefix(MINORITY)
        events = counts[f"events{end}"]
        # Who has the event by one horizon and not by another is a cell, too.
        tells = any(0 < abs(events - other) < min_cell for other in shown)
        if tells or counts[name] < min_cell:
            few.add(end)
        else:
            shown.append(events)
    return few


def suppressed(metrics: Metrics, min_cell: int) -> Metrics:
    """Return metrics in which small counts, and what tells them, are hidden."""
    return Metrics.from_json(suppress(metrics.to_json(), min_cell)) if min_cell else metrics


def hide(metrics: Json, hidden: Container[str], spreads: Container[str] = ()) -> Json:
    """Return metrics with four digits, without hidden ones and without the spreads of others."""

    def shown(name: str, metric: Json) -> Json:
        if name in hidden:
            return dict.fromkeys(metric)
        digits = {k: round(x, 4) if type(x) is float else x for k, x in metric.items()}
        return digits | dict.fromkeys(digits.keys() & {*SPREAD} if name in spreads else ())

    return {
        name: shown(name, metric) if isinstance(metric, dict) and name != "models" else metric
        for name, metric in metrics.items()
    }


def _has_few_at_threshold(part: Json, ending: str, min_cell: int) -> bool:
    """Return whether few of those predicted positive, or of the others, have or lack the event."""
    patients = min(part["n"], part["patients"])  # a row counts as a patient at most
    events = part[f"events{ending}"] / part["n"] * patients
    others = patients - events
    if f"effective_n{ending}" in part:  # of some the status is unknown
        others = min(others, part[f"{MINORITY}{ending}"])
    for name, count in (("sensitivity", events), ("specificity", others)):
        share = part.get(f"{name}{ending}", {}).get("value")
        if share is None or round(min(share, 1 - share) * count, 6) < min_cell:
            return True
    return False


def splits_off_few(count: float, share: float, min_cell: int) -> bool:
    """Return whether a share of a count, or the rest, is small and not zero."""
    return any(0 < round(n, 6) < min_cell for n in (count * share, count * (1 - share)))


def suppress_table(table: pd.DataFrame, min_cell: int, by: str | None = None) -> pd.DataFrame:
    """Hide small counts, and what tells them: counts add up within each value of ``by``."""
    if min_cell == 0 or table.empty:
        return table
    if by is not None:
        groups = table.groupby(by, sort=False, observed=True)
        return pd.concat([suppress_table(part, min_cell) for _, part in groups])
    minority = table.get("minority_patients", pd.Series(min_cell, table.index))
    few = minority.between(1, min_cell - 1)
    table = table.drop(columns="minority_patients", errors="ignore")  # it tells the events
    shown = table.round(3)  # more digits of an AUROC tell the events
    shown.loc[minority < min_cell, shown.select_dtypes("float").columns] = np.nan
    for name in (*filter(table.__contains__, COUNTS), *table.filter(like=EVENTS_OF)):
        count = table[name]
        small = hidden = count.between(1, min_cell - 1)
        if name == "events":  # those without it may be few
            hidden = small | few
        if name.startswith(EVENTS_OF):  # they add up to the rows
            hidden = small | few.any()
        others = count[~hidden & (count > 0)]
        # The total and the other counts tell a single hidden one.
        if hidden.sum() == 1 and len(others) and name != "left":
            hidden = hidden | (count.index == others.idxmin())
        texts = count.map(partial(count_text, min_cell=min_cell))
        shown[name] = texts.mask(hidden & ~small, NOT_SHOWN)
        shown.loc[hidden, shown.columns.intersection(SHARES)] = np.nan
        if name == "removed" and hidden.any():  # two neighbours tell what was removed
            shown.loc[shown.index[:-1], "left"] = NOT_SHOWN
    return shown
