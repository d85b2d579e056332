"""Which rows were used: what each rule removed, and the parts of the split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation.metrics_table import count
from medgemma_clinical.evaluation.suppress import suppress_table
from medgemma_clinical.evaluation.tables import PART_NAMES
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic


def cohort(evaluated: Evaluated) -> Topic:
    """Return the topic, without tables where nothing is known."""
    content, min_cell = evaluated.content, evaluated.min_cell
    numbers = {}
    if content.flow is not None:
        # Patients are known after each rule, or not counted; few removed ones show in differences.
        flow = content.flow.dropna(axis=1)
        flow = flow.drop(columns="patients", errors="ignore") if min_cell else flow
        numbers["flow"] = suppress_table(flow, min_cell)
    if content.split is not None:
        split = suppress_table(content.split, min_cell)
        numbers["split"] = split.drop(columns="minority_patients", errors="ignore")
    tested = "each row was tested once" if content.folds else "the test part was scored once"
    captions = {
        "flow": "What each rule removes, in this order",
        "split": f"Split by patient; {tested}",
    }
    tables = [
        Cells(count_cells(table, content.noun), captions[name]) for name, table in numbers.items()
    ]
    return Topic("Data", tables=tables, numbers=numbers)


def part_table(
    labels: NDArray[Any], groups: NDArray[Any], split: Mapping[str, NDArray[Any]]
) -> pd.DataFrame:
    """Return part, rows, patients, events and minority_patients of each part, as numbers."""
    lines = [
        {"part": PART_NAMES.get(part, part), **count(labels[rows], groups[rows])}
        for part, rows in split.items()
    ]
    return pd.DataFrame(lines).rename(columns={"n": "rows"})


def count_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a table of counts, which may be suppressed, as text; its rows are called ``noun``."""
    names = {
        "rows": noun,
        "removed": f"{noun} removed",
        "left": f"{noun} left",
        "patients": "patients left" if "left" in table else "patients",
    }
    named = table.map(count_text).rename(columns=names).rename(columns=str.capitalize)
    return named.loc[:, ~named.columns.duplicated()]
