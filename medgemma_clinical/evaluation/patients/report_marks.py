"""The numbers of a written report, each marked by the row that it is about.

Right is what ``data.reports.score.score_report`` counts as true: the true report has the same
number in the same place. Of the others some are numbers of the row, ``held_numbers`` of
``data.reports.review``, and some are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from medgemma_clinical.data.reports.review import held_numbers
from medgemma_clinical.data.reports.score import find_statements, stated_numbers, written_parts
from medgemma_clinical.data.texts import plain
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.judgement.verdict import BETTER, UNDECIDED, WORSE


@dataclass(frozen=True)
class Truth:
    """How a number of a report relates to its row.

    Attributes:
        words: text alternative of the symbol.
        symbol: behind the number.
        style: class of the symbol's colour.
    """

    words: str
    symbol: str
    style: str


RIGHT = Truth("right", "\N{CHECK MARK}", BETTER.style)
ELSEWHERE = Truth("elsewhere in the row", "?", UNDECIDED.style)
FOREIGN = Truth("not of this row", "\N{BALLOT X}", WORSE.style)
TRUTHS = (RIGHT, ELSEWHERE, FOREIGN)


@dataclass(frozen=True)
class Mark:
    """A piece of a report.

    Attributes:
        text: the piece as it stands there.
        truth: of a number; None for words.
    """

    text: str
    truth: Truth | None = None


def mark_numbers(dataset: TrajectoryDataset, i: int, text: str) -> tuple[Mark, ...]:
    """Cut a written report on row ``i`` into words and marked numbers.

    The pieces joined are the report.
    """
    clauses, names = dataset.report_clauses(i), dataset.report_names()
    written = written_parts(clauses, find_statements(text, clauses, names))
    right = {each.start for each in written if each.right}
    held = held_numbers(dataset, i)
    marks, end = [], 0
    for start, stop in stated_numbers(text, names):
        if start > end:
            marks.append(Mark(text[end:start]))
        number = text[start:stop]
        other = ELSEWHERE if plain(float(number)) in held else FOREIGN
        marks.append(Mark(number, RIGHT if start in right else other))
        end = stop
    return (*marks, Mark(text[end:])) if end < len(text) else tuple(marks)
