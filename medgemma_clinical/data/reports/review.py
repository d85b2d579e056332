"""Judge a written report as a clinician would: abnormal values, trends, inventions.

An abnormal value is the highest value of a series above its reference range, and the lowest one
below. A report names an abnormal value when it states the value at its time. A trend is the
direction of a series with the times of its first and last value, which are its duration. Invented
is what the row does not hold: a number in a statement of the expected form, and any further
statement that is no text of the row.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medgemma_clinical.data.texts import (
    DIRECTIONS,
    END,
    NUMBER,
    START,
    VALUE,
    Choice,
    Clause,
    Number,
    ReportScore,
    clause_pattern,
    clause_text,
    plain,
)

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

SEPARATOR = re.compile(r"[,;\n]|\.(?![0-9])")
"""Between two statements; the point within a decimal number is none."""

Observation = tuple[str, str, str]
"""Series, value and time, as a report writes them."""

Written = tuple[Number | Choice, str]
"""A part of the true report, and what a written report has in its place."""


@dataclass(frozen=True)
class ReportReview:
    """What a clinician asks of a written report, beside the truth of its numbers.

    Attributes:
        score: truth of its numbers.
        expected: numbers of the true report.
        abnormal: abnormal values of the row.
        named: how many of them the report names.
        nameable: how many of them the true report names.
        trends: trends of the row.
        right_trends: how many of them the report states right.
        invented: numbers and statements that the row does not hold.
    """

    score: ReportScore
    expected: int
    abnormal: int
    named: int
    nameable: int
    trends: int
    right_trends: int
    invented: int

    @property
    def quality(self) -> float:
        """What the report has right, as share of what it states, leaves out or invents.

        Numbers, trends and abnormal values count alike; the true report has 1.
        """
        right = self.score.true + self.right_trends + min(self.named, self.nameable)
        due = max(self.score.stated, self.expected) + self.trends + self.nameable + self.invented
        return right / due if due else 1.0


def review_report(dataset: TrajectoryDataset, i: int, text: str) -> ReportReview:
    """Judge a written report by series ``i`` of a data set, whose label may be unknown."""
    clauses = dataset.report_clauses(i)
    parts = [part for clause in clauses for part in clause if not isinstance(part, str)]
    written = [pair for clause in clauses for pair in _written_parts(clause, text)]
    abnormal = abnormal_values(dataset, i)
    stated, true = _observations(written), _observations([(part, part.text) for part in parts])
    trends = {part.trend for part in parts if isinstance(part, Choice)} - {""}
    right = {name for name in trends if _is_right(name, parts, written)}
    return ReportReview(
        score=dataset.score_report(i, text),
        expected=sum(isinstance(part, Number) for part in parts),
        abnormal=len(abnormal),
        named=sum(bool(each & stated) for each in abnormal),
        nameable=sum(bool(each & true) for each in abnormal),
        trends=len(trends),
        right_trends=len(right),
        invented=_count_invented(dataset, i, text, clauses, written),
    )


def abnormal_values(dataset: TrajectoryDataset, i: int) -> list[set[Observation]]:
    """Return the abnormal values of series ``i``, each with all times at which it occurs."""
    found = []
    for f, times, values in dataset.measured(i):
        low, high = dataset.reference(f) or (None, None)
        extremes = []
        if low is not None and values.min() < low:
            extremes.append(values.min())
        if high is not None and values.max() > high:
            extremes.append(values.max())
        for extreme in extremes:
            hours = times[values == extreme] / dataset.report_hours
            name, value = dataset.features[f], plain(extreme)
            found.append({(name, value, plain(hour)) for hour in hours})
    return found


def _written_parts(clause: Clause, text: str) -> list[Written]:
    """Return what a text has in place of the numbers and words of a clause; empty without it."""
    found = re.search(_pattern(clause, words=True), text)
    parts = [part for part in clause if not isinstance(part, str)]
    return list(zip(parts, found.groups(), strict=True)) if found else []


def _pattern(clause: Clause, *, words: bool) -> str:
    return clause_pattern(clause, words=words).removeprefix(re.escape(", "))


def _observations(written: list[Written]) -> set[Observation]:
    """Return the values with their times among the parts of a report."""
    return {
        (part.series, value, time)
        for (part, value), (_, time) in itertools.pairwise(written)
        if isinstance(part, Number) and part.kind == VALUE
    }


def _is_right(name: str, parts: list[Number | Choice], written: list[Written]) -> bool:
    """Return whether direction, begin and end of a series are written as they are."""

    def bears(part: Number | Choice) -> bool:
        if isinstance(part, Choice):
            return part.trend == name
        return part.series == name and part.kind in (START, END)

    due = [part.text for part in parts if bears(part)]
    return [word for part, word in written if bears(part) and word == part.text] == due


def _count_invented(
    dataset: TrajectoryDataset, i: int, text: str, clauses: list[Clause], written: list[Written]
) -> int:
    """Count numbers, states and further statements of a report that its row does not hold."""
    held = " ".join(["".join(map(clause_text, clauses)), dataset.contexts[i]])
    numbers = {*re.findall(NUMBER, held)}
    for _, times, values in dataset.measured(i):
        numbers |= {plain(number) for number in (*values, *(times / dataset.report_hours))}
    wrong = [
        part
        for part, word in written
        if (isinstance(part, Number) and word not in numbers)
        or (isinstance(part, Choice) and part.among != DIRECTIONS and word != part.text)
    ]
    rest = re.sub(rf"{re.escape(dataset.outcome)}: (?:yes|no)\b", "", text)
    for clause in clauses:
        rest = re.sub(_pattern(clause, words=False), "", rest)
    further = [" ".join(piece.split()) for piece in SEPARATOR.split(rest)]
    return len(wrong) + sum(not _is_held(piece, held) for piece in further)


def _is_held(piece: str, held: str) -> bool:
    """Return whether a statement says nothing, or stands in ``held`` with whole words."""
    if re.search(r"\w", piece) is None:
        return True
    whole = rf"(?<![\w.]){re.escape(piece)}(?!\w|\.[0-9])"
    return re.search(whole, held) is not None
