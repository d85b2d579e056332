"""Small counts are hidden in what is given away: a shared model, and the report of --min_cell N.

A count of 1 to ``min_cell`` - 1 patients is small; a ``min_cell`` of 0 hides nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_float_dtype

COUNTS = ("n", "rows", "patients", "events", "minority_patients", "removed", "left")
AT_THRESHOLD = ("sensitivity", "specificity", "ppv", "npv", "positives")
"""Shares of the four cells at the threshold: each cell follows from the shares and the counts."""

NOT_SHOWN = "not shown"


def is_small(count: float, min_cell: int) -> bool:
    """Return whether a count, or a share times a count, of patients is small."""
    return 0 < round(count, 6) < min_cell


def count_text(count: float, min_cell: int) -> str:
    """Return a count as text, ``fewer than N`` where it is small."""
    return f"fewer than {min_cell}" if is_small(count, min_cell) else f"{count:,.0f}"


def suppress(part: dict[str, Any], min_cell: int) -> dict[str, Any]:
    """Hide what tells small counts of a part, given as ``Metrics.to_json`` returns it.

    Counts become texts and metrics null: all of a part with few patients with, or without, the
    event; those at the threshold where one of the four cells is small; the accuracy of every model
    where one model has few errors.
    """
    if min_cell == 0:
        return part
    hidden, few = dict(part), part["minority_patients"] < min_cell
    for name in ("n", "patients", "events", "minority_patients"):
        if is_small(part[name], min_cell):
            hidden[name] = count_text(part[name], min_cell)
        elif few and name == "events" and part["minority_patients"]:
            hidden[name] = NOT_SHOWN
    shown = [name for name, metric in part.items() if isinstance(metric, dict) and name != "models"]
    blank = {*shown} if few else _telling(part, min_cell)
    hidden |= {name: _blank(part[name]) for name in shown if name in blank}
    hidden["models"] = {
        model: {
            name: _blank(metric) if isinstance(metric, dict) and (few or name in blank) else metric
            for name, metric in metrics.items()
        }
        for model, metrics in part.get("models", {}).items()
    }
    return hidden


def _telling(part: dict[str, Any], min_cell: int) -> set[str]:
    """Return the names of the metrics that tell a small cell; rows count as patients at most."""
    share = min(1, part["patients"] / part["n"])
    events, others = part["events"] * share, (part["n"] - part["events"]) * share
    blank, models = set[str](), [part, *part.get("models", {}).values()]
    cells = [
        count * x
        for name, count in (("sensitivity", events), ("specificity", others))
        if (value := part.get(name, {}).get("value")) is not None
        for x in (value, 1 - value)
    ]
    if any(is_small(cell, min_cell) for cell in cells):
        blank |= {*AT_THRESHOLD, "accuracy"}
    for model in models:
        right = model.get("accuracy", {}).get("value")
        if right is not None and any(
            is_small(part["n"] * share * x, min_cell) for x in (right, 1 - right)
        ):
            blank.add("accuracy")
    return blank


def _blank(metric: dict[str, Any]) -> dict[str, Any]:
    """Return a metric without its numbers."""
    return {key: x if isinstance(x, str) else None for key, x in metric.items()}


def suppress_table(table: pd.DataFrame, min_cell: int, by: str | None = None) -> pd.DataFrame:
    """Hide the small counts of a table, and the counts and numbers that would give them away.

    Columns of ``COUNTS`` become texts. A column with one hidden count hides its next smallest, too,
    since the sum of a column is often known. Rows with few patients with, or without, the event
    (``minority_patients``) have no number in columns of floats.

    Args:
        table: a row a group of patients, or a rule of a flow with the rows ``removed`` and
            ``left``.
        min_cell: the smallest count that is shown.
        by: column whose values part the table; counts add up within each.
    """
    if min_cell == 0:
        return table
    if by is not None:
        parts = [suppress_table(part, min_cell) for _, part in table.groupby(by, sort=False)]
        return pd.concat(parts) if parts else table
    counts = [name for name in COUNTS if name in table]
    hidden = table.astype(dict.fromkeys(counts, object))
    minority = table["minority_patients"].to_numpy() if "minority_patients" in table else None
    few = np.zeros(len(table), dtype=bool) if minority is None else minority < min_cell
    numbers = [name for name in table if name not in counts and is_float_dtype(table[name])]
    hidden.loc[few, numbers] = np.nan
    for name in counts:
        count = table[name].to_numpy()
        text = np.array([count_text(x, min_cell) for x in count], dtype=object)
        secret = (count > 0) & (count < min_cell)
        if name == "events" and minority is not None:  # or few without it
            text[few & (minority > 0) & ~secret] = NOT_SHOWN
            secret |= few & (minority > 0)
        others = np.flatnonzero(~secret & (count > 0))
        if secret.sum() == 1 and len(others) and name != "left":
            text[others[count[others].argmin()]] = NOT_SHOWN
        hidden[name] = text
    if "prevalence" in hidden and "events" in hidden:
        hidden.loc[hidden["events"] != table["events"].map("{:,.0f}".format), "prevalence"] = np.nan
    return _hide_left(hidden, table) if {"removed", "left"} <= {*counts} else hidden


def _hide_left(hidden: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Hide the rows left between the first and the last rule where a rule's number is hidden."""
    secret = (hidden["removed"] != table["removed"].map("{:,.0f}".format)).to_numpy()
    if secret.any():
        left = hidden["left"].to_numpy(copy=True)
        starts = secret.sum() > 1 and table["removed"].iloc[0] == 0
        left[int(starts) : -1] = NOT_SHOWN
        hidden["left"] = left
    return hidden
