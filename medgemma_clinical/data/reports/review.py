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

from medgemma_clinical.data.reports.score import (
    SENTENCE_END,
    ReportScore,
    WrittenPart,
    find_statements,
    score_report,
    stated_numbers,
    written_parts,
)
from medgemma_clinical.data.texts import (
    DIRECTIONS,
    END,
    START,
    VALUE,
    Choice,
    Number,
    clause_text,
    plain,
)

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

SEPARATOR = re.compile(rf"[,;]|{SENTENCE_END.pattern}")
"""Between two statements."""

Observation = tuple[str, str, str]
"""Series, value and time, as a report writes them."""


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
    clauses, names = dataset.report_clauses(i), dataset.report_names()
    statements = find_statements(text, clauses, names)
    written = written_parts(clauses, statements)
    parts = [part for clause in clauses for part in clause if not isinstance(part, str)]
    abnormal = abnormal_values(dataset, i)
    stated = _observations([(each.part, each.text) for each in written])
    true = _observations([(part, part.text) for part in parts])
    trends = {part.trend for part in parts if isinstance(part, Choice)} - {""}
    right = {name for name in trends if _is_right(name, parts, written)}
    return ReportReview(
        score=score_report(text, dataset.outcome, clauses, names, written),
        expected=sum(isinstance(part, Number) for part in parts),
        abnormal=len(abnormal),
        named=sum(bool(each & stated) for each in abnormal),
        nameable=sum(bool(each & true) for each in abnormal),
        trends=len(trends),
        right_trends=len(right),
        invented=_count_invented(dataset, i, text, statements, written),
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


def held_numbers(dataset: TrajectoryDataset, i: int) -> set[str]:
    """Return the numbers of row ``i`` as ``plain`` writes them.

    Values and times of its series, its facts, the numbers of its context and of its true report.
    """
    parts = itertools.chain.from_iterable(dataset.report_clauses(i))
    context = dataset.contexts[i]
    stated = stated_numbers(context, dataset.report_names())
    known = [float(context[start:end]) for start, end in stated]
    for _, times, values in dataset.measured(i):
        known += [*values, *(times / dataset.report_hours)]
    if dataset.statics is not None:
        known += dataset.statics[i].tolist()
    return {*map(plain, known), *(part.text for part in parts if isinstance(part, Number))}


def _observations(written: list[tuple[Number | Choice, str]]) -> set[Observation]:
    """Return the values with their times among parts of the true report and what is written."""
    return {
        (part.series, value, time)
        for (part, value), (_, time) in itertools.pairwise(written)
        if isinstance(part, Number) and part.kind == VALUE
    }


def _is_right(name: str, parts: list[Number | Choice], written: list[WrittenPart]) -> bool:
    """Return whether direction, begin and end of a series are written as they are."""

    def bears(part: Number | Choice) -> bool:
        if isinstance(part, Choice):
            return part.trend == name
        return part.series == name and part.kind in (START, END)

    return sum(map(bears, parts)) == sum(bears(each.part) and each.right for each in written)


def _count_invented(
    dataset: TrajectoryDataset,
    i: int,
    text: str,
    statements: list[re.Match[str] | None],
    written: list[WrittenPart],
) -> int:
    """Count numbers, states and further statements of a report that its row does not hold."""
    numbers = held_numbers(dataset, i)
    wrong = [
        each
        for each in written
        if (isinstance(each.part, Number) and each.text not in numbers)
        or (isinstance(each.part, Choice) and each.part.among != DIRECTIONS and not each.right)
    ]
    rest = text
    for start, end in sorted([each.span() for each in statements if each], reverse=True):
        rest = rest[:start] + rest[end:]
    rest = re.sub(rf"{re.escape(dataset.outcome)}: (?:yes|no)\b", "", rest)
    held = " ".join([*map(clause_text, dataset.report_clauses(i)), dataset.contexts[i]])
    further = [" ".join(piece.split()) for piece in SEPARATOR.split(rest)]
    return len(wrong) + sum(not _is_held(piece, held) for piece in further)


def _is_held(piece: str, held: str) -> bool:
    """Return whether a statement says nothing, or stands in ``held`` with whole words."""
    if re.search(r"\w", piece) is None:
        return True
    whole = rf"(?<![\w.]){re.escape(piece)}(?!\w|\.[0-9])"
    return re.search(whole, held) is not None
