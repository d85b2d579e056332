"""Texts that a language model reads and writes: prompts, and clauses of reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.files import one_line

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
"""A decimal number, as regular expression without groups."""

DIRECTIONS = ("level", "rising", "falling")  # words for a change by its sign: 0, 1 and -1 as index

Reference = tuple[float | None, float | None]
"""Lowest and highest value of a healthy adult; None where a side has no bound."""

SERIES_TEXT = ("all", "main", "last", "none")
"""How much of the series a prompt holds: all in full, the main one, last values, nothing."""

TEXT_FEATURES = ("words", "frozen", "none")
"""What stage 1 and a regression read of texts: their words, an encoder's states, nothing."""


@dataclass(frozen=True)
class PromptOptions:
    """What a prompt holds beside the question."""

    series: str = "all"  # one of ``SERIES_TEXT``
    context: bool = True
    # What a report computes from full series: language models copy well and calculate poorly.
    computed: bool = False
    latest: int | None = None  # observations of each series; None: all


WHOLE_PROMPT = PromptOptions()
"""The default: context and all series, nothing computed."""


@dataclass(frozen=True)
class Number:
    """A number within a clause of a report."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A word of ``among`` within a clause of a report; ``trend``: the direction of a series."""

    text: str
    among: tuple[str, ...]
    trend: bool = False


Part = str | Number | Choice
"""Fixed words, a number or a chosen word of a clause."""


@dataclass(frozen=True)
class Clause:
    """One statement of a report."""

    joint: str  # separates it from the statement before: ``". "`` or ``", "``
    label: str  # what it is about, a colon follows; empty: the label of the clause before
    parts: Sequence[Part]

    @property
    def text(self) -> str:
        """The clause as it stands in a report."""
        label = f"{self.label}: " if self.label else ""
        parts = (part if isinstance(part, str) else part.text for part in self.parts)
        return "".join([self.joint, label, *parts])


def direction(times: NDArray[np.float64], values: NDArray[np.float64]) -> Choice:
    """Return level, rising or falling by first and last value; a trend if time has passed."""
    word = DIRECTIONS[int(np.sign(values[-1] - values[0]))]
    return Choice(word, DIRECTIONS, bool(times[-1] > times[0]))


def observation(value: float, at: str, time: float) -> list[Part]:
    """Return a value, the words ``at``, and its time."""
    return [Number(plain(value)), at, Number(plain(time))]


def full_clauses(
    name: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[Clause]:
    """Return first, last, lowest and highest value; then net change, rate and direction."""
    unit = with_space(unit)
    index = {"first": 0, "last": -1}
    index |= {"lowest": int(values.argmin()), "highest": int(values.argmax())}
    clauses = [
        Clause(", ", "", [f"{word} ", *observation(values[k], f"{unit} at ", times[k]), " h"])
        for word, k in index.items()
    ]
    clauses[0] = Clause(". ", name, clauses[0].parts)
    change, span = values[-1] - values[0], times[-1] - times[0]
    net: list[Part] = ["Net change ", Number(plain(round(change, 6))), unit]
    if span > 0:  # within no time there is no rate
        net += [", ", Number(plain(float(f"{change / span:.1g}"))), f"{unit} an hour"]
    return [*clauses, Clause(". ", "", [*net, ": ", direction(times, values)])]


def short_clauses(
    name: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[Clause]:
    """Return first value, last value and direction."""
    at = f"{with_space(unit)} at "
    first, last = (observation(values[k], at, times[k]) for k in (0, -1))
    parts: list[Part] = ["only ", *first, " h"]
    if len(values) > 1:
        parts = ["from ", *first, " h to ", *last, " h, ", direction(times, values)]
    return [Clause(". ", name, parts)]


def computed_text(
    unit: str, times: NDArray[np.float64], values: NDArray[np.float64], *, full: bool
) -> str:
    """Return what ``full_clauses``, or else ``short_clauses``, compute, for a prompt."""
    if full:
        clauses = full_clauses("", unit, times, values)[2:]
        return "".join(clause.text for clause in clauses).removeprefix(", ") + ". "
    return f"{direction(times, values).text if len(values) > 1 else 'only one value'}. "


def plain(number: float) -> str:
    """Return the shortest text that reads back as the same number, no exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def with_space(unit: str) -> str:
    """Return a unit as it follows a number, empty where there is none."""
    return f" {unit}" if unit else ""


def code(text: str) -> str:
    """Return words of data or configuration as Markdown code, in which nothing is markup."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(0xA6)) or ' '}`"
