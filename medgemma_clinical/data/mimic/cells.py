"""From a table's text to typed columns: parsed, checked, and the place of a bad cell known."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.mimic.tables import LAB_KEYS, CellType, Table

ONLY_EMPTY_IS_MISSING: Any = {"header": None, "keep_default_na": False, "na_values": [""]}
"""How pandas reads MIMIC-IV's CSV: a text such as NA is no missing cell."""

BEYOND_HEADER = "beyond the header"
"""Name of a further column that catches the fields which the header does not have."""


class BadCellError(ValueError):
    """A cell that cannot be read.

    Args:
        row: of the chunk, from 0.
        problem: its column and the problem, never the cell's content.
    """

    def __init__(self, row: int, problem: str) -> None:
        """Pass both on to the base class, so that the error can be pickled."""
        super().__init__(row, problem)
        self.row, self.problem = row, problem


def parse_rows(text: bytes, table: Table) -> pd.DataFrame:
    """Parse rows of CSV: numbers as float64, all else as text, NaN where a cell is empty.

    Raises:
        BadCellError: rows that do not fit the header, or bytes that are no text.
    """
    columns: Any = {
        "names": [*table.header, BEYOND_HEADER],
        "usecols": [*table.types, BEYOND_HEADER],
    }
    dtypes: Any = {
        name: np.float64 if cell.form in ("whole", "number") else str
        for name, cell in table.types.items()
    }
    dtypes[BEYOND_HEADER] = str
    # An empty first row as wide as that: without it pandas would drop fields beyond the header.
    text = b"," * len(table.header) + b"\n" + text
    try:
        try:
            cells = pd.read_csv(io.BytesIO(text), dtype=dtypes, **columns, **ONLY_EMPTY_IS_MISSING)
        except ValueError:  # a cell is no number: read as text, it can be found and named
            cells = pd.read_csv(io.BytesIO(text), dtype=str, **columns, **ONLY_EMPTY_IS_MISSING)
    except ValueError as error:
        raise BadCellError(0, "from here on rows do not fit the header, or are no text") from error
    cells = cells.iloc[1:].reset_index(drop=True)
    extra = cells.pop(BEYOND_HEADER).notna().to_numpy()
    if extra.any():
        raise BadCellError(int(extra.argmax()), "more fields than the header has")
    return cells


def select_lines(
    text: bytes, table: Table, needed: Callable[[pd.DataFrame], NDArray[np.bool_]]
) -> tuple[bytes, NDArray[np.int64] | None]:
    """Cut out the needed lines by their keys, so that times and units of others are never parsed.

    Args:
        text: rows of CSV.
        table: of labevents.
        needed: decides from the columns ``LAB_KEYS``, (n,) bool.

    Returns:
        The lines and their numbers from 0; all of them and None where lines are not rows one by
        one, or a key is damaged.
    """
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n")) + 1
    columns: Any = {"names": table.header, "usecols": list(LAB_KEYS)}
    try:
        keys = pd.read_csv(io.BytesIO(text), dtype=np.float64, **columns, **ONLY_EMPTY_IS_MISSING)
        here = needed(keys)
    except ValueError:
        return text, None
    # A line break within quotes or an empty line; both may cancel out where none is at the end.
    if len(keys) != len(ends) or not text.endswith(b"\n"):
        return text, None
    return data[np.repeat(here, np.diff(ends, prepend=0))].tobytes(), np.flatnonzero(here)


def decode(cells: pd.DataFrame, types: dict[str, CellType]) -> pd.DataFrame:
    """Decode the cells of columns.

    Returns:
        float64, ``datetime64[s]`` or stripped text; NaN, NaT and "" where a cell is empty.

    Raises:
        BadCellError: a cell of another type, or an empty one in a required column.
    """
    return pd.DataFrame(
        {name: _decode_column(cells[name], cell) for name, cell in types.items()},
        index=cells.index,
    )


def _decode_column(column: pd.Series, cell: CellType) -> pd.Series:
    if cell.form == "word":
        return column.astype(object).where(column.notna(), "").astype(str).str.strip()
    if cell.form == "time":
        value = _times(column)
    else:
        value = pd.to_numeric(column, errors="coerce").astype(np.float64)
    empty = column.isna()
    if column.dtype == object or pd.api.types.is_string_dtype(column.dtype):
        empty |= column.astype(str).str.strip() == ""
    wrong = value.isna() & ~empty
    if cell.form == "whole":
        wrong |= (value % 1 != 0) & ~empty
    _check_cells(wrong, f"column {column.name}: no {cell.form}")
    if not cell.may_be_empty:
        _check_cells(empty, f"column {column.name}: empty")
    return value


def _check_cells(bad: pd.Series, problem: str) -> None:
    if bad.any():
        raise BadCellError(int(bad.index[int(bad.to_numpy().argmax())]), problem)


def _times(column: pd.Series) -> pd.Series:
    """Read points in time as ``datetime64[s]``, NaT where a cell is none."""
    if not pd.api.types.is_datetime64_any_dtype(column.dtype):
        text = column.astype(object).where(column.notna(), None)
        try:
            column = pd.to_datetime(text, format="ISO8601", errors="coerce")
        except ValueError as error:
            raise BadCellError(0, "times of several time zones from here on") from error
    return column.dt.tz_localize(None).dt.floor("s").astype("datetime64[s]")
