"""Numbers and clauses of the texts that a language model reads and writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
"""A decimal number, as regular expression without groups."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a cell that a spreadsheet takes for a formula."""

DIRECTIONS = ("level", "rising", "falling")
"""Words for a change by its sign: 0, 1 and -1 as index."""

Reference = tuple[float | None, float | None]
"""Lowest and highest value of a healthy adult; None where a side has no bound."""

SERIES_TEXT = ("all", "main", "last", "none")
"""How much of the series a prompt holds: all in full, the main one, last values, nothing."""


@dataclass(frozen=True)
class PromptOptions:
    """What a prompt holds beside the question.

    Attributes:
        series: how much of the series, one of ``SERIES_TEXT``.
        context: whether the patient's context is included.
        computed: whether series in full are followed by what a report computes from them;
            language models copy numbers reliably and are poor at arithmetic.
        latest: only so many of the latest observations of each series; None for all.
    """

    series: str = "all"
    context: bool = True
    computed: bool = False
    latest: int | None = None


WHOLE_PROMPT = PromptOptions()
"""The default: context and all series, nothing computed."""


VALUE, TIME, START, END = "value", "time", "start", "end"
"""Kinds of numbers: a value, the time of the value before it, and such a time that begins, or ends,
the trend of a series."""


@dataclass(frozen=True)
class Number:
    """A number within a clause of a report; its truth is checked.

    Attributes:
        text: as it is written.
        kind: ``VALUE``, ``TIME``, ``START``, ``END``, or empty for any other number.
        series: whose value or time the number is; empty for any other number.
    """

    text: str
    kind: str = ""
    series: str = ""


@dataclass(frozen=True)
class Choice:
    """A word within a clause of a report whose place another word of ``among`` may take.

    Attributes:
        text: the word.
        among: all words that may stand here.
        trend: series whose trend the word states; empty for any other word.
    """

    text: str
    among: tuple[str, ...]
    trend: str = ""


Clause = Sequence[str | Number | Choice]
"""One statement of a report: fixed words, numbers and chosen words in their order."""


def direction(change: float, trend: str = "") -> Choice:
    """Return the word for a change of a value: level, rising or falling.

    Args:
        change: of the value.
        trend: the series, if time has passed.
    """
    return Choice(DIRECTIONS[int(np.sign(change))], DIRECTIONS, trend)


def observation(series: str, value: float, at: str, time: float, kind: str) -> list[str | Number]:
    """Return a value, the words ``at``, and its time of a kind such as ``START``."""
    return [Number(plain(value), VALUE, series), at, Number(plain(time), kind, series)]


def clause_text(clause: Clause) -> str:
    """Return a clause as it stands in a report."""
    return "".join(part if isinstance(part, str) else part.text for part in clause)


def clause_pattern(clause: Clause, *, words: bool = False) -> str:
    """Return a regular expression for a clause with any numbers and any chosen words.

    Numbers are groups, and so are the words if ``words``.
    """
    pattern = ""
    for part in clause:
        if isinstance(part, Number):
            pattern += f"({NUMBER})"
        elif isinstance(part, Choice):
            pattern += f"({'' if words else '?:'}{'|'.join(map(re.escape, part.among))})"
        else:
            pattern += re.escape(part)
    return pattern


def main_clauses(
    name: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[Clause]:
    """Return the main series in full: first, last, lowest, highest."""
    low, high = int(values.argmin()), int(values.argmax())
    places = {
        f"{name}: first ": (0, START),
        ", last ": (-1, END),
        ", lowest ": (low, TIME),
        ", highest ": (high, TIME),
    }
    at = f"{with_space(unit)} at "
    return [
        [words, *observation(name, values[k], at, times[k], kind), " h"]
        for words, (k, kind) in places.items()
    ]


def change_clause(
    name: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[str | Number | Choice]:
    """Return net change, rate (one significant figure) and direction of a series."""
    change, span = values[-1] - values[0], times[-1] - times[0]
    unit = with_space(unit)
    net = Number(plain(round(change, 6)))
    if span <= 0:  # within no time there is no rate
        return ["Net change ", net, f"{unit}: ", direction(change)]
    rate = Number(plain(float(f"{change / span:.1g}")))
    return ["Net change ", net, f"{unit}, ", rate, f"{unit} an hour: ", direction(change, name)]


def short_clause(
    name: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> Clause:
    """Return first value, last value and direction of a series."""
    at = f"{with_space(unit)} at "
    first: Clause = observation(name, values[0], at, times[0], START)
    last: Clause = observation(name, values[-1], at, times[-1], END)
    if len(values) == 1:
        return [f"{name}: only ", *first, " h"]
    word = direction(values[-1] - values[0], name if times[-1] > times[0] else "")
    return [f"{name}: from ", *first, " h to ", *last, " h, ", word]


def computed_sentences(
    unit: str, times: NDArray[np.float64], values: NDArray[np.float64], *, main: bool
) -> list[str]:
    """Return what a report computes from a series, in its words, as sentences of a prompt."""
    if not main:
        one = len(values) == 1
        return ["only one value. " if one else f"{direction(values[-1] - values[0]).text}. "]
    extremes = "".join(map(clause_text, main_clauses("", unit, times, values)[2:]))
    change = clause_text(change_clause("", unit, times, values))
    return [f"{extremes.removeprefix(', ')}. ", f"{change}. "]


def is_formula(cell: str) -> bool:
    """Return whether a spreadsheet would run a cell as a formula; a number such as -5 is none."""
    return cell.startswith(FORMULA_STARTS) and re.fullmatch(NUMBER, cell) is None


def plain(number: float) -> str:
    """Return the shortest text that reads back as the same number, no exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def with_space(unit: str) -> str:
    """Return a unit as it follows a number, empty where there is none."""
    return f" {unit}" if unit else ""
