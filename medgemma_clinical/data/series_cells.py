"""Cells such as ``24 (0h) -> 20 (2h)`` as flat arrays, and the union of several series' times."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.tables import Findings, column_text
from medgemma_clinical.data.texts import NUMBER
from medgemma_clinical.files import InputError

OBSERVATION = rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*h\s*\)\s*"
CELL = re.compile(rf"{OBSERVATION}(?:->{OBSERVATION})*")
"""One observation, and a cell of a series."""

ARROW = "->"
BRACKETS = str.maketrans("()h", "   ")

LARGEST_VALUE = float(np.finfo(np.float32).max)
LARGEST_HOUR = 1e6
"""Limits of absolute values: what float32 holds, and a time of 114 years."""

PARSE_ROWS = 100_000
"""Rows parsed at a time: bounds the memory of the intermediate text."""


@dataclass(frozen=True)
class Observations:
    """Flat observations of several rows.

    Attributes:
        owner: (n,) int64 position of the row, ascending.
        times: (n,) float64 hours.
        values: (n, F) float64, NaN where not measured.
    """

    owner: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float64]

    def choose(self, chosen: NDArray[np.bool_]) -> Observations:
        """Return the observations that ``chosen`` (n,) marks."""
        return Observations(self.owner[chosen], self.times[chosen], self.values[chosen])


def readable_cells(text: pd.Series) -> NDArray[np.bool_]:
    """Return which cells have the form of a series."""
    readable: NDArray[np.bool_] = text.str.fullmatch(CELL).to_numpy(dtype=bool)
    return readable


def describe_unreadable(text: str) -> str:
    """Return which observation of an unreadable cell has the wrong form, without its content."""
    pieces = enumerate(text.split(ARROW), 1)
    k = next(k for k, piece in pieces if not re.fullmatch(OBSERVATION, piece))
    return f"piece {k} is not of the form VALUE (HOURSh), as 24 (0h)"


def parse_cells(text: pd.Series) -> Observations:
    """Read cells that have the form of a series; ``owner`` counts the cells."""
    starts = range(0, len(text), PARSE_ROWS)
    blocks = [_parse(text.iloc[k : k + PARSE_ROWS]) for k in starts]
    numbers = np.concatenate([np.empty((0, 2)), *blocks])
    lengths = text.str.count(ARROW).to_numpy(np.int64) + 1
    return Observations(np.repeat(np.arange(len(text)), lengths), numbers[:, 1], numbers[:, :1])


def _parse(text: pd.Series) -> NDArray[np.float64]:
    """Read cells in one pass: (observations, 2) of value and hours."""
    joined = " ".join(text).replace(ARROW, " ").translate(BRACKETS)
    ascii_spaces = " ".join(joined.split())  # spreadsheets bring no-break spaces
    return np.fromstring(ascii_spaces, dtype=np.float64, sep=" ").reshape(-1, 2)


def too_large(observations: Observations, rows: int) -> NDArray[np.bool_]:
    """Return which of the rows hold a value or a time beyond the limits, (rows,)."""
    large = np.abs(observations.times) > LARGEST_HOUR
    large |= (np.abs(observations.values) > LARGEST_VALUE).any(axis=1)
    return np.bincount(observations.owner, large, rows) > 0


def rows_out_of_order(series: Observations) -> NDArray[np.int64]:
    """Return the rows whose times decrease somewhere."""
    backwards = (np.diff(series.times) < 0) & (np.diff(series.owner) == 0)
    return np.unique(series.owner[1:][backwards])


def sort_by_time(series: Observations) -> Observations:
    """Sort each row by time; equal times keep their order."""
    if not len(rows_out_of_order(series)):
        return series
    order = np.lexsort((series.times, series.owner))
    return Observations(series.owner[order], series.times[order], series.values[order])


def join_series(series: list[Observations]) -> Observations:
    """Join F series of one value each at common times, into observations of F values.

    Where a series holds a time more than once, its k-th value there shares an observation with the
    k-th of the others.

    Args:
        series: sorted by owner and time.
    """
    if len(series) == 1:
        return series[0]
    owner = np.concatenate([each.owner for each in series])
    times = np.concatenate([each.times for each in series])
    values = np.concatenate([each.values[:, 0] for each in series])
    repeat = np.concatenate([_repeats(each) for each in series])
    feature = np.repeat(np.arange(len(series)), [len(each.owner) for each in series])
    order = np.lexsort((repeat, times, owner))
    owner, times, repeat = owner[order], times[order], repeat[order]
    new = np.ones(len(owner), dtype=bool)
    new[1:] = (np.diff(owner) != 0) | (np.diff(times) != 0) | (np.diff(repeat) != 0)
    table = np.full((int(new.sum()), len(series)), np.nan)
    table[np.cumsum(new) - 1, feature[order]] = values[order]
    return Observations(owner[new], times[new], table)


def _repeats(series: Observations) -> NDArray[np.int64]:
    """Number the observations of a row that share one time: 0, 1, ..."""
    number = np.arange(len(series.owner))
    same = (np.diff(series.owner) == 0) & (np.diff(series.times) == 0)
    first = np.concatenate([[True], ~same])[: len(number)]
    return number - np.maximum.accumulate(np.where(first, number, 0))


class TableCells:
    """The cells of a table while they are read.

    Attributes:
        table: rows by their numbers.
        findings: get what is wrong or worth saying.
        whole: whether the table is the whole file.
    """

    def __init__(self, table: pd.DataFrame, findings: Findings, *, whole: bool) -> None:
        """Keep all three."""
        self.table, self.findings, self.whole = table, findings, whole

    def reject(
        self,
        bad: Any,
        column: str,
        problem: str | Iterable[str],
        cells: pd.Series | None = None,
    ) -> None:
        """Raise for the first bad cell, or note all where the findings are not strict.

        Args:
            bad: which cells, bool.
            column: their column.
            problem: of all bad cells, or one each; never holds their content.
            cells: those that ``bad`` is about; None for the whole column.
        """
        column_cells = self.table.get(column) if cells is None else cells
        index = self.table.index if column_cells is None else column_cells.index
        rows = index[np.asarray(bad)]
        problems = itertools.repeat(problem) if isinstance(problem, str) else problem
        for row, text in zip(rows, problems, strict=False):
            if self.findings.strict:
                others = f" ({len(rows)} such rows)" if len(rows) > 1 and self.whole else ""
                value = None if column_cells is None else str(column_cells[row])
                where = f"{self.findings.source}, row {row}, column {column}"
                raise InputError(f"{where}: {text}{others}", value)
            self.findings.problems.setdefault(row, f"column {column}: {text}")

    def parse(self, column: str) -> Observations:
        """Read one series of every row; ``owner`` is the position in the table."""
        text = column_text(self.table, column)
        rows = np.flatnonzero(text != "")
        text = text.iloc[rows]
        readable = readable_cells(text)
        if not readable.all():
            problems = map(describe_unreadable, text[~readable])
            self.reject(~readable, column, problems, text)
            rows, text = rows[readable], text[readable]
        parsed = parse_cells(text)
        large = too_large(parsed, len(rows))
        self.reject(large, column, "holds a number that is too large", text)
        return replace(parsed, owner=rows[parsed.owner])
