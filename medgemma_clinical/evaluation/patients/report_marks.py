"""The numbers of a written report, each marked as right or wrong against the series of its row.

A number is right where the true report has the same number in the same place, which is the rule by
which ``data.texts.score_report`` counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medgemma_clinical.data.texts import NUMBER, Clause, Number, clause_pattern


@dataclass(frozen=True)
class Mark:
    """A piece of a report.

    Attributes:
        text: the piece as it stands there.
        right: for a number, whether it is the patient's own in its place; None for words.
    """

    text: str
    right: bool | None = None


def mark_numbers(
    text: str, outcome: str, clauses: Sequence[Clause], names: Sequence[str]
) -> tuple[Mark, ...]:
    """Cut a written report into words and marked numbers; joined, the pieces are the report.

    Args:
        text: the written report.
        outcome: what label 1 means.
        clauses: of the true report.
        names: of series and units, whose digits are no stated numbers (PaCO2, vitamin B12).
    """
    right = {start for clause in clauses for start in _true_starts(text, clause)}
    marks, end = [], 0
    for start, stop in _stated(text, [outcome, *names]):
        if start > end:
            marks.append(Mark(text[end:start]))
        marks.append(Mark(text[start:stop], start in right))
        end = stop
    return (*marks, Mark(text[end:])) if end < len(text) else tuple(marks)


def _true_starts(text: str, clause: Clause) -> Iterator[int]:
    """Yield where the true numbers of a clause stand in a written report."""
    numbers = [part.text for part in clause if isinstance(part, Number)]
    written = re.search(clause_pattern(clause).removeprefix(re.escape(", ")), text)
    for k, number in enumerate(numbers, 1):
        if written and written[k] == number:
            yield written.start(k)


def _stated(text: str, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each number of a text that is no part of one of the names."""
    by_length = sorted(set(names) - {""}, key=len, reverse=True)
    named = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in by_length)
    masked = re.sub(named, lambda name: " " * len(name[0]), text)
    for number in re.finditer(NUMBER, masked):
        yield number.start(), number.end() - number[0].endswith(".")  # the end of a sentence
