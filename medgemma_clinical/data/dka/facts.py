"""Columns of a DKA file beside the series: static features, and the prediction time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.dka.description import LONGEST_NAME, check_text, join_names
from medgemma_clinical.data.dka.series_cells import (
    LARGEST_HOUR,
    LARGEST_VALUE,
    Observations,
    TableCells,
)
from medgemma_clinical.data.features import AGE, SEX
from medgemma_clinical.data.tables import column_text
from medgemma_clinical.data.texts import NUMBER
from medgemma_clinical.files import InputError

STATIC = "static_"
"""Beginning of the name of a static feature's column."""

HOURS = "prediction_hours"
"""Column of the prediction time, in hours on the clock of the row's series."""

UNKNOWN = "empty cells where it is unknown"


def static_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns of a table that hold static features."""
    return [name for name in map(str, table.columns) if name.startswith(STATIC)]


def read_statics(cells: TableCells, names: Sequence[str]) -> NDArray[np.float64]:
    """Read columns of static features, (rows, columns), NaN where unknown.

    Raises:
        InputError: a name that no text may hold, or, if the findings are strict, a bad cell.
    """
    for name in names:
        place = f"{cells.findings.source}, row 1, column {' '.join(name[:LONGEST_NAME].split())}"
        check_text(place, name, LONGEST_NAME)
    if not names:
        return np.empty((len(cells.table), 0))
    problem = f"is not a number: write a decimal number, true or false; {UNKNOWN}"
    columns = []
    for name in names:
        words = column_text(cells.table, name).str.lower()
        text = words.replace({"false": "0", "true": "1"})
        columns.append(_read_numbers(cells, name, text, LARGEST_VALUE, problem))
    return np.column_stack(columns)


def read_prediction_hours(
    cells: TableCells, series: Sequence[Observations]
) -> NDArray[np.float64] | None:
    """Read the prediction time of each row (rows,), NaN where unknown; None without the column.

    Args:
        cells: of the table.
        series: of the same rows.

    Raises:
        InputError: a bad cell, or one before the last observation, if the findings are strict.
    """
    if HOURS not in cells.table:
        return None
    text = column_text(cells.table, HOURS)
    problem = f"is not a number: write hours on the clock of the row's series; {UNKNOWN}"
    hours = _read_numbers(cells, HOURS, text, LARGEST_HOUR, problem)
    last = np.full(len(hours), -np.inf)
    for each in series:
        np.maximum.at(last, each.owner, each.times)
    problem = (
        "lies before the last observation of the row, which nobody knew then: correct the hour, or "
        "leave the later observations out"
    )
    cells.reject(hours < last, HOURS, problem)
    return hours


def _read_numbers(
    cells: TableCells, column: str, text: pd.Series, largest: float, problem: str
) -> NDArray[np.float64]:
    """Read cells of one number each, NaN where empty."""
    readable = text.str.fullmatch(NUMBER)
    cells.reject((text != "") & ~readable, column, problem)
    numbers = text.where(readable, "nan").to_numpy(np.float64)
    cells.reject(np.abs(numbers) > largest, column, "holds a number that is too large")
    return numbers


def drop_unread(table: pd.DataFrame, inputs: dict[str, Any]) -> pd.DataFrame:
    """Return a table without the static columns, and the hour, that nothing reads."""
    read = {*inputs["static"], *AGE, *SEX}
    unread = [name for name in static_columns(table) if name not in read]
    if not inputs["prediction_time"]:
        unread.append(HOURS)
    return table.drop(columns=unread, errors="ignore")


def check_inputs(table: pd.DataFrame, inputs: dict[str, Any], source: str) -> None:
    """Refuse a file that lacks a column of what a checkpoint reads beside the series.

    Args:
        table: of the file.
        inputs: of ``Data.description``.
        source: named in errors.

    Raises:
        InputError: names the columns, or the unit that differs.
    """
    there = dict(map(_name_and_unit, static_columns(table)))
    lacking = [name for name in inputs["static"] if name not in table]
    for name, unit in map(_name_and_unit, lacking):
        if name in there and there[name] != unit:
            raise InputError(
                f"{source}: the checkpoint reads {name} in {unit or 'no unit'}, the file has "
                f"{there[name] or 'none'}: convert the values, or correct the unit in the column's "
                "name"
            )
    if inputs["prediction_time"] and HOURS not in table:
        lacking.append(HOURS)
    if lacking:
        raise InputError(
            f"{source}: the checkpoint reads {join_names(lacking)}, which the file lacks: add such "
            f"columns, with {UNKNOWN}"
        )


def _name_and_unit(column: str) -> tuple[str, str]:
    name, _, unit = column.partition("[")
    return name.strip(), unit.rstrip("] ")
