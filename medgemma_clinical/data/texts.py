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


@dataclass(frozen=True)
class Number:
    """A number within a clause of a report; its truth is checked."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A word within a clause of a report whose place another word of ``among`` may take."""

    text: str
    among: tuple[str, ...]


Clause = Sequence[str | Number | Choice]
"""One statement of a report: fixed words, numbers and chosen words in their order."""


def direction(change: float) -> Choice:
    """Return the word for a change of a value: level, rising or falling."""
    return Choice(DIRECTIONS[int(np.sign(change))], DIRECTIONS)


def clause_text(clause: Clause) -> str:
    """Return a clause as it stands in a report."""
    return "".join(part if isinstance(part, str) else part.text for part in clause)


def clause_pattern(clause: Clause) -> str:
    """Return a regular expression for a clause with any numbers (groups) and any chosen words."""
    pattern = ""
    for part in clause:
        if isinstance(part, Number):
            pattern += f"({NUMBER})"
        elif isinstance(part, Choice):
            pattern += f"(?:{'|'.join(map(re.escape, part.among))})"
        else:
            pattern += re.escape(part)
    return pattern


def main_clauses(
    start: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[Clause]:
    """Return the main series in full: first, last, lowest, highest."""
    low, high = int(values.argmin()), int(values.argmax())
    places = {f"{start}first ": 0, ", last ": -1, ", lowest ": low, ", highest ": high}
    at = f"{with_space(unit)} at "
    return [
        [words, Number(plain(values[k])), at, Number(plain(times[k])), " h"]
        for words, k in places.items()
    ]


def change_clause(
    unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[str | Number | Choice]:
    """Return net change, rate (one significant figure) and direction of a series."""
    change, span = values[-1] - values[0], times[-1] - times[0]
    unit = with_space(unit)
    net = Number(plain(round(change, 6)))
    if span <= 0:  # within no time there is no rate
        return ["Net change ", net, f"{unit}: ", direction(change)]
    rate = Number(plain(float(f"{change / span:.1g}")))
    return ["Net change ", net, f"{unit}, ", rate, f"{unit} an hour: ", direction(change)]


def short_clause(
    start: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> Clause:
    """Return first value, last value and direction of a series."""
    at = f"{with_space(unit)} at "
    first: Clause = [Number(plain(values[0])), at, Number(plain(times[0]))]
    last: Clause = [Number(plain(values[-1])), at, Number(plain(times[-1]))]
    if len(values) == 1:
        return [f"{start}only ", *first, " h"]
    return [f"{start}from ", *first, " h to ", *last, " h, ", direction(values[-1] - values[0])]


def computed_sentences(
    unit: str, times: NDArray[np.float64], values: NDArray[np.float64], *, main: bool
) -> list[str]:
    """Return what a report computes from a series, in its words, as sentences of a prompt."""
    if not main:
        one = len(values) == 1
        return ["only one value. " if one else f"{direction(values[-1] - values[0]).text}. "]
    extremes = "".join(map(clause_text, main_clauses("", unit, times, values)[2:]))
    change = clause_text(change_clause(unit, times, values))
    return [f"{extremes.removeprefix(', ')}. ", f"{change}. "]


@dataclass(frozen=True)
class ReportScore:
    """How true a written report is.

    Attributes:
        verdict: 1 for yes, 0 for no, None where the report begins with neither.
        parses: whether the report has the expected form from beginning to end.
        stated: how many numbers it states.
        true: how many of them are the patient's, in their place.
    """

    verdict: int | None
    parses: bool
    stated: int
    true: int


def score_report(
    text: str, outcome: str, clauses: Sequence[Clause], names: Sequence[str]
) -> ReportScore:
    """Compare a written report with the clauses of the true one, number by number.

    Args:
        text: the written report.
        outcome: what label 1 means; a report begins with it.
        clauses: of the true report.
        names: of series and units, whose digits are no stated numbers (PaCO2, vitamin B12).
    """
    patterns = [clause_pattern(clause) for clause in clauses]
    true = 0
    for clause, pattern in zip(clauses, patterns, strict=True):
        numbers = [part.text for part in clause if isinstance(part, Number)]
        if written := re.search(pattern.removeprefix(re.escape(", ")), text):
            true += sum(a == b for a, b in zip(numbers, written.groups(), strict=True))
    head = rf"{re.escape(outcome)}: (yes|no)"
    verdict = re.match(rf"{head}\b", text)
    by_length = sorted({outcome, *names} - {""}, key=len, reverse=True)
    named = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in by_length)
    return ReportScore(
        verdict=None if verdict is None else int(verdict[1] == "yes"),
        parses=re.fullmatch(rf"{head}\. {''.join(patterns)}\.\s*", text) is not None,
        stated=len(re.findall(NUMBER, re.sub(named, "", text))),
        true=true,
    )


def is_formula(cell: str) -> bool:
    """Return whether a spreadsheet would run a cell as a formula; a number such as -5 is none."""
    return cell.startswith(FORMULA_STARTS) and re.fullmatch(NUMBER, cell) is None


def plain(number: float) -> str:
    """Return the shortest text that reads back as the same number, no exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def with_space(unit: str) -> str:
    """Return a unit as it follows a number, empty where there is none."""
    return f" {unit}" if unit else ""
