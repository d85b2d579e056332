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

    def take(self, chosen: NDArray[Any]) -> Observations:
        """Return the observations at some positions, or those that a mask (n,) marks."""
        return Observations(self.owner[chosen], self.times[chosen], self.values[chosen])


UNICODE_ARROW = "\u2192"
DATE = re.compile(r"\(\s*(?:\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d{1,2}:\d{2})")
UNIT = re.compile(rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*(?:([a-zA-Z]{{1,9}})\s*)?\)\s*")
"""What stands in place of hours: a date or a time of day, or a number in another unit or none."""

CONVERSIONS = {
    "": "has no unit of time: write h behind the hours",
    **dict.fromkeys(("hours", "hour", "hrs", "hr", "h"), "has a word for hours: write h"),
    **dict.fromkeys(("minutes", "minute", "mins", "min", "m"), "is in minutes: divide by 60"),
    **dict.fromkeys(("seconds", "second", "sec", "s"), "is in seconds: divide by 3600"),
    **dict.fromkeys(("days", "day", "d"), "is in days: multiply by 24"),
}
"""What to do about units of time."""


def describe_unreadable(text: str) -> str:
    """Return which observation of an unreadable cell has the wrong form, and how to convert it.

    Never returns the content.
    """
    pieces = enumerate(text.split(ARROW), 1)
    k, piece = next((k, p) for k, p in pieces if not re.fullmatch(OBSERVATION, p))
    if UNICODE_ARROW in piece:
        problem = "holds the arrow U+2192: write -> between observations"
    elif re.fullmatch(OBSERVATION, piece.replace(",", ".")):
        problem = "holds a comma in a number: write a decimal point, no separator of thousands"
    elif DATE.search(piece):
        problem = "holds a date or a time of day: write the hours since the first observation"
    elif (match := UNIT.fullmatch(piece)) and (unit := match.group(1) or "").lower() in CONVERSIONS:
        problem = CONVERSIONS[unit.lower()]
    else:
        return f"piece {k} is not of the form VALUE (HOURSh), as 24 (0h)"
    return f"piece {k} {problem}, as 24 (0h) -> 20.5 (2h)"


def parse_cells(text: pd.Series) -> Observations:
    """Read cells that have the form of a series; ``owner`` counts the cells."""
    blocks = [np.empty(0)]
    for start in range(0, len(text), PARSE_ROWS):
        joined = " ".join(text.iloc[start : start + PARSE_ROWS])
        numbers = joined.replace(ARROW, " ").translate(BRACKETS)
        ascii_spaces = " ".join(numbers.split())  # spreadsheets bring no-break spaces
        blocks.append(np.fromstring(ascii_spaces, dtype=np.float64, sep=" "))
    pairs = np.concatenate(blocks).reshape(-1, 2)
    lengths = text.str.count(ARROW).to_numpy(np.int64) + 1
    return Observations(np.repeat(np.arange(len(text)), lengths), pairs[:, 1], pairs[:, :1])


def rows_out_of_order(series: Observations) -> NDArray[np.int64]:
    """Return the rows whose times decrease somewhere."""
    backwards = (np.diff(series.times) < 0) & (np.diff(series.owner) == 0)
    return np.unique(series.owner[1:][backwards])


def join_series(series: list[Observations]) -> Observations:
    """Join F series of one value each at common times, into observations of F values by time.

    Where a series holds a time more than once, its k-th value there shares an observation with the
    k-th of the others.
    """
    series = [each.take(np.lexsort((each.times, each.owner))) for each in series]
    if len(series) == 1:
        return series[0]
    owner = np.concatenate([each.owner for each in series])
    times = np.concatenate([each.times for each in series])
    feature = np.repeat(np.arange(len(series)), [len(each.owner) for each in series])
    repeat = np.concatenate([_repeats(each) for each in series])
    order = np.lexsort((repeat, times, owner))
    owner, times, repeat = owner[order], times[order], repeat[order]
    new = np.ones(len(owner), dtype=bool)
    new[1:] = (np.diff(owner) != 0) | (np.diff(times) != 0) | (np.diff(repeat) != 0)
    table = np.full((int(new.sum()), len(series)), np.nan)
    values = np.concatenate([each.values[:, 0] for each in series])
    table[np.cumsum(new) - 1, feature[order]] = values[order]
    return Observations(owner[new], times[new], table)


def _repeats(series: Observations) -> NDArray[np.int64]:
    """Number the observations of a row that share one time: 0, 1, ..."""
    # Not groupby.cumcount, which needs too much memory for a million rows.
    number = np.arange(len(series.owner))
    same = (np.diff(series.owner, prepend=-1) == 0) & (np.diff(series.times, prepend=0) == 0)
    return number - np.maximum.accumulate(np.where(same, 0, number))


@dataclass(frozen=True)
class TableCells:
    """The cells of a table while they are read.

    Attributes:
        table: rows by their numbers.
        findings: get what is wrong or worth saying.
        whole: whether the table is the whole file.
    """

    table: pd.DataFrame
    findings: Findings
    whole: bool

    def reject(
        self, bad: pd.Series | NDArray[np.bool_], column: str, problem: str | Iterable[str]
    ) -> None:
        """Raise for the first bad cell, or note all where the findings are not strict.

        Args:
            bad: which cells of the column.
            column: in the table.
            problem: of all bad cells, or one each; never holds their content.
        """
        rows = self.table.index[bad]
        counted = f" ({len(rows):,} such rows)"
        others = counted if len(rows) > 1 and self.whole else ""
        problems = itertools.repeat(problem) if isinstance(problem, str) else problem
        for row, text in zip(rows, problems, strict=False):
            value = str(self.table.at[row, column]) if column in self.table else None
            self.findings.add_problem(row, text + others, column=column, value=value)

    def parse(self, column: str) -> Observations:
        """Read one series of every row; ``owner`` is the position in the table."""
        text = column_text(self.table, column)
        filled = text != ""
        # Of Arrow's texts pandas would parse the pattern anew at each call.
        readable = text.astype(object).str.fullmatch(CELL)
        unreadable = filled & ~readable
        self.reject(unreadable, column, map(describe_unreadable, text[unreadable]))
        parsed = parse_cells(text[readable])
        owner = np.flatnonzero(readable)[parsed.owner]
        large = np.abs(parsed.times) > LARGEST_HOUR
        large |= np.abs(parsed.values[:, 0]) > LARGEST_VALUE
        too_large = np.isin(np.arange(len(text)), owner[large])
        self.reject(too_large, column, "holds a number that is too large")
        return replace(parsed, owner=owner)
