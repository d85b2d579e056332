"""Table 1: who the patients are, overall, by outcome and by part of the split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.dka import STATIC
from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.suppress import NOT_SHOWN
from medgemma_clinical.evaluation.tables import PART_NAMES
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, percent

ALL, OUTCOMES = "all", ("with the event", "without the event")
QUARTILES = ["q1", "median", "q3"]


def table_one_topic(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None where the data are not described."""
    content = evaluated.content
    if content.table_one is None:
        return None
    table = suppress_table_one(
        content.table_one, evaluated.min_cell, hide_events=evaluated.hides_events
    )
    caption = (
        f"Count (share of the known) or median (quartiles) of {content.noun}; a series that is "
        "missing was never measured"
    )
    note = (
        f"A patient with {content.noun} of both kinds, with and without the event, counts in both "
        "of these columns."
    )
    return Topic(
        "Table 1",
        tables=[Cells(table_one_cells(table), caption, is_wide=True)],
        numbers={"table_one": table},
        note="" if content.noun == "patients" else note,
    )


def table_one(dataset: TrajectoryDataset, split: Mapping[str, NDArray[np.int64]]) -> pd.DataFrame:
    """Return numbers by variable and group: ``missing`` rows, and count and share or quartiles."""
    table = _variables(dataset)
    binary = table.isin([0.0, 1.0]).where(table.notna(), True).all() & table.notna().any()
    binary.iloc[len(dataset.static_names) :] = False  # series are numbers
    groups = {ALL: np.arange(len(dataset))}
    groups |= {name: np.flatnonzero(dataset.labels == 1 - k) for k, name in enumerate(OUTCOMES)}
    groups |= {PART_NAMES.get(part, part): rows for part, rows in split.items()}
    tables = []
    for group, rows in groups.items():
        members, patients = table.iloc[rows], len(np.unique(dataset.groups[rows]))
        size: dict[str, Any] = {"group": group, "rows": len(rows), "patients": patients}
        lines = members.quantile([0.25, 0.5, 0.75]).T.set_axis(QUARTILES, axis=1)
        lines[binary] = np.nan
        present = members.notna().sum()
        count = members.sum().where(binary)
        lines = lines.assign(
            missing=len(rows) - present, count=count, share=count / present, **size
        )
        heads = {dataset.noun.capitalize(): len(rows), "Patients": patients}
        head = pd.DataFrame({"count": heads, "missing": 0}).assign(**size)
        tables.append(pd.concat([head, lines]))
    columns = ["group", "rows", "patients", "missing", "count", "share", *QUARTILES]
    return pd.concat(tables)[columns].rename_axis("variable").reset_index()


def _variables(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return the described variables of each row, N rows, NaN where missing."""
    names = [name.removeprefix(STATIC) for name in dataset.static_names]
    columns: list[Any] = [dataset.static]
    summaries = pd.DataFrame(dataset.summaries(), columns=dataset.summary_names())
    for name, unit in ((dataset.features[f], dataset.units[f]) for f in dataset.series_read):
        names += [f"{name}, last value{f' [{unit}]' if unit else ''}"]
        names += [f"{name}, observations"]
        columns += [summaries[[f"{name} last"]], summaries[[f"{name} count"]].fillna(0)]
    return pd.DataFrame(np.column_stack(columns), columns=names)


def table_one_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``table_one``, which may be suppressed, as text: a column for each group."""
    groups = {str(name): lines for name, lines in table.groupby("group", sort=False)}
    cells = {"Variable": groups[ALL]["variable"].tolist()}
    for name, lines in groups.items():
        cells[name.capitalize()] = [_cell(line) for line in lines.to_dict("records")]
    cells["Missing"] = ["" if n == 0 else count_text(n) for n in groups[ALL]["missing"]]
    return pd.DataFrame(cells)


def _cell(line: dict[Any, Any]) -> str:
    """Return a count with its share, or a median with its quartiles, as text."""
    if isinstance(line["count"], str) or not np.isnan(line["count"]):
        share = "" if np.isnan(line["share"]) else f" ({percent(line['share'])})"
        return f"{count_text(line['count'])}{share}"
    low, middle, high = (
        f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in (line[name] for name in QUARTILES)
    )
    return NO_VALUE if middle == "nan" else f"{middle} ({low} to {high})"


def suppress_table_one(table: pd.DataFrame, min_cell: int, *, hide_events: bool) -> pd.DataFrame:
    """Hide small counts of a ``table_one``, and what tells them; drop the sizes of its groups."""
    sizes = table[["rows", "patients"]]
    table = table.drop(columns=list(sizes))
    if min_cell == 0:
        return table
    known_rows, a_row = sizes["rows"] - table["missing"], sizes["patients"] / sizes["rows"]
    rest = ((1 - table["share"]) * known_rows).round(6)
    counts = [table["missing"], known_rows, table["count"], rest]
    small = pd.concat([(n > 0) & (n * a_row < min_cell) for n in counts], axis=1)
    sides = table["group"].map(dict.fromkeys(OUTCOMES, "outcome") | {ALL: ALL}).fillna("part")
    category = table["variable"].str.split("[_ ]", regex=True).str[0]  # unit_medical, unit_surgical
    category = table["variable"].where(table["count"].isna(), category)
    # Counts of outcomes, parts and categories add up: a small one hides those beside it.
    hidden = small.any(axis=1).groupby([category, sides]).transform("any")
    hidden |= hide_events & (sides == "outcome")  # these tell the number of events
    shown = table.astype({"missing": object, "count": object})
    shown.loc[known_rows * a_row < 4 * min_cell, QUARTILES] = np.nan  # few beyond a quartile
    shown.loc[hidden, ["share"]] = np.nan
    for k, name in ((0, "missing"), (2, "count")):
        shown.loc[hidden & table[name].notna(), name] = NOT_SHOWN
        shown.loc[hidden & small.iloc[:, k], name] = count_text(1, min_cell)
    return shown
