"""Small counts are hidden in what is given away: a shared model, and the report of --min_cell N.

A count of 1 to ``min_cell`` - 1 patients is small; a ``min_cell`` of 0 hides nothing. Counts become
texts and metrics null, so that what was hidden once can be hidden again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_float_dtype

from medgemma_clinical.data.small_cells import count_text

COUNTS = ("n", "rows", "patients", "events", "minority_patients", "removed", "left")
AT_THRESHOLD = ("sensitivity", "specificity", "ppv", "npv", "positives", "accuracy")
REPORT_COUNTS = {
    "reports": ("parse_share", "inventing_share", "right_trend_share"),
    "numbers_stated": ("true_number_share",),
    "abnormal_values": ("abnormal_named_share", "abnormal_nameable_share"),
    "invented": (),
}
"""Counts of written reports, and the shares of each."""

NOT_SHOWN = "not shown"

Json = dict[str, Any]


def any_small(counts: Iterable[float], min_cell: int) -> bool:
    """Return whether any count of patients, or share times a count, is small."""
    return any(0 < round(count, 6) < min_cell for count in counts)


def suppress(part: Json, min_cell: int) -> Json:
    """Hide what tells small counts of a part, given as ``Metrics.to_json`` returns it.

    All metrics of a part with few patients with, or without, the event; those at the threshold
    where one of the four cells is small; the accuracy of all models where one has few errors.
    """
    counts = {name: part[name] for name in COUNTS if name in part}
    if min_cell == 0 or any(isinstance(count, str) for count in counts.values()):
        return part
    few = counts["minority_patients"] < min_cell
    texts = {name: count_text(n, min_cell) for name, n in counts.items() if 0 < n < min_cell}
    if few and counts["minority_patients"]:  # the events may be many, and those without it few
        texts.setdefault("events", NOT_SHOWN)
    models = part.get("models", {})
    names = {name for name, metric in part.items() if isinstance(metric, dict)} - {"models"}
    hidden = names if few else _telling(part, min_cell)
    return {
        **part,
        **texts,
        **{name: _blank(part[name]) for name in names & hidden},
        "models": {
            model: {k: _blank(x) if k in hidden else x for k, x in metrics.items()}
            for model, metrics in models.items()
        },
    }


def _telling(part: Json, min_cell: int) -> set[str]:
    """Return the names of metrics that tell a small cell, a row counted as a patient at most."""
    patients = min(part["n"], part["patients"])
    events = part["events"] / part["n"] * patients

    def split(count: float, metrics: Json, name: str) -> list[float]:
        share = metrics.get(name, {}).get("value")
        return [] if share is None else [count * share, count * (1 - share)]

    cells = split(events, part, "sensitivity") + split(patients - events, part, "specificity")
    models = [part, *part.get("models", {}).values()]
    right = [count for model in models for count in split(patients, model, "accuracy")]
    return {
        *(AT_THRESHOLD if any_small(cells, min_cell) else ()),
        *(("accuracy",) if any_small(right, min_cell) else ()),
    }


def _blank(metric: Json) -> Json:
    """Return a metric without its numbers."""
    return {key: x if isinstance(x, str) else None for key, x in metric.items()}


def suppress_reports(reports: Json, min_cell: int) -> Json:
    """Hide small counts of written reports and of what they state, and the shares of these."""
    hidden = dict(reports)
    for name, shares in REPORT_COUNTS.items():
        count = reports.get(name)
        if isinstance(count, int) and 0 < count < min_cell:
            hidden[name] = count_text(count, min_cell)
            hidden |= {share: _blank(reports[share]) for share in shares if share in reports}
    return hidden


def suppress_case_mix(mix: Json, min_cell: int, *, hide_events: bool) -> Json:
    """Leave small counts of the training part out, and what tells them.

    Args:
        mix: see ``case_mix_of``. Sex and age need the number of patients who have them.
        min_cell: the smallest count that is shown.
        hide_events: a scored part hides its events, and a drawn part has about the same share.
    """
    if min_cell == 0:
        return mix
    patients, hidden = mix.get("patients", 0), {"prevalence"} if hide_events else set[str]()
    hidden |= {name for name in ("rows", "patients") if any_small([mix.get(name, 0)], min_cell)}
    for name, known in (("prevalence", patients), ("women", mix.get("sex_patients", 0))):
        share = mix.get(name, 0)
        if known < min_cell or any_small([known * share, known * (1 - share)], min_cell):
            hidden.add(name)
    for name, known in (("observations", patients), ("age", mix.get("age_patients", 0))):
        if known < 4 * min_cell:  # a quarter of them lies beyond a quartile
            hidden |= {f"{name}_{quartile}" for quartile in ("q1", "median", "q3")}
    return {name: x for name, x in mix.items() if name not in hidden}


def suppress_table(table: pd.DataFrame, min_cell: int, by: str | None = None) -> pd.DataFrame:
    """Hide the small counts of a table, and the counts and numbers that would give them away.

    Columns of ``COUNTS`` become texts. Where one count of a column is hidden, so is the smallest of
    the others, since the sum is often known. Columns of floats are NaN in rows with few patients
    with, or without, the event (``minority_patients``).

    Args:
        table: a row a group of patients, or a rule with the rows that it ``removed`` and ``left``.
        min_cell: the smallest count that is shown.
        by: column whose values part the table; counts add up within each.
    """
    if min_cell == 0 or table.empty:
        return table
    if by is not None:
        groups = table.groupby(by, sort=False, observed=True)
        return pd.concat([suppress_table(part, min_cell) for _, part in groups])
    counts = [name for name in COUNTS if name in table]
    shown = table.astype(dict.fromkeys(counts, object))
    minority = table.get("minority_patients", pd.Series(min_cell, table.index)).to_numpy()
    few, hidden = minority < min_cell, dict[str, Any]()
    for name in counts:
        count = table[name].to_numpy()
        text = np.array([count_text(n, min_cell) for n in count], dtype=object)
        hidden[name] = (count > 0) & (count < min_cell)
        if name == "events":  # or few without it
            text[few & (minority > 0) & ~hidden[name]] = NOT_SHOWN
            hidden[name] |= few & (minority > 0)
        others = np.flatnonzero(~hidden[name] & (count > 0))
        if hidden[name].sum() == 1 and len(others) and name != "left":
            smallest = others[count[others].argmin()]
            text[smallest], hidden[name][smallest] = NOT_SHOWN, True
        shown[name] = text
    shown.loc[few, [name for name in table if is_float_dtype(table[name])]] = np.nan
    if "prevalence" in table and "events" in table:
        shown.loc[hidden["events"], "prevalence"] = np.nan
    if "left" in table and "removed" in table and hidden["removed"].any():
        # Two neighbours tell what was removed between them: the first and the last may stay.
        first = hidden["removed"].sum() > 1 and table["removed"].iloc[0] == 0
        shown["left"] = [
            text if (k == 0 and first) or k == len(table) - 1 else NOT_SHOWN
            for k, text in enumerate(shown["left"])
        ]
    return shown
