"""Compare a written report with its row: verdict, form, numbers, trends, invented numbers.

A statement belongs to the label before it, the words that a colon ends, in the same sentence: "last
4 mmol/L at 6 h" is potassium's behind "potassium:". The net change is a sentence without a label.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from medgemma_clinical.data.texts import NUMBER, Choice, Clause, Number, Part, plain
from medgemma_clinical.data.trajectories import TrajectoryDataset

SENTENCE_END = re.compile(r"\n|\.(?![0-9])")
"""The point within a decimal number ends no sentence."""

BORDER = re.compile(rf"[:,;]|{SENTENCE_END.pattern}")
"""Between two statements, or behind a label."""

STATED = re.compile(rf"(?!(?<=\w)[+-]){NUMBER}")
"""A number within a text; the hyphen between two numbers (7.1-7.4) is no sign."""


@dataclass(frozen=True)
class ReportReview:
    """What of a written report is right."""

    verdict: int | None  # 1 for yes, 0 for no, None where the report begins with neither
    parses: bool  # has the expected form from beginning to end
    stated: int  # numbers
    true: int  # numbers that are the patient's, in a statement of the true report
    trends: int  # series of the true report with a direction over time
    right_trends: int  # those written with the right direction
    invented: int  # stated numbers neither in the row nor in the true report


def review_report(dataset: TrajectoryDataset, i: int, text: str) -> ReportReview:
    """Compare a written report with row ``i`` of a data set, whose label may be unknown."""
    clauses = dataset.report_clauses(i)
    head = rf"{re.escape(dataset.outcome)}: (yes|no)"
    verdict = re.match(rf"{head}\b", text)
    form = "".join([head, *map(_clause_pattern, clauses), r"\.\s*"])
    masked = _mask_names(dataset, text)
    stated, patient_numbers = _stated_numbers(masked), known_numbers(dataset, i)
    right = _right_parts(text, masked, clauses)
    return ReportReview(
        verdict=None if verdict is None else int(verdict[1] == "yes"),
        parses=re.fullmatch(form, text) is not None,
        stated=len(stated),
        true=sum(isinstance(part, Number) for part in right),
        trends=sum(_is_trend(part) for clause in clauses for part in clause.parts),
        right_trends=sum(map(_is_trend, right)),
        invented=sum(number not in patient_numbers for number in stated),
    )


def known_numbers(dataset: TrajectoryDataset, i: int) -> set[str]:
    """Return the numbers of row ``i``: of its prompt, its series, and its true report."""
    numbers = {*_stated_numbers(_mask_names(dataset, dataset.prompt(i)))}
    for _, times, values in dataset.measured(i):
        numbers.update(map(plain, [*values, *(times / dataset.report_hours)]))
    for clause in dataset.report_clauses(i):
        numbers.update(part.text for part in clause.parts if isinstance(part, Number))
    return numbers


def _right_parts(text: str, masked: str, clauses: list[Clause]) -> list[Number | Choice]:
    """Return the numbers and words that the first statement of each clause's form has right."""
    sections = _sections(text, masked)
    right, label = [], ""
    for clause in clauses:
        label = clause.label or label
        own_sentence = clause.joint == ". " and not clause.label
        pattern = re.compile("".join(map(_part_pattern, clause.parts)))
        for name, start, sentence_end, end in sections:
            match = pattern.search(text, start) if name == label else None
            if match and match.start() < (end if own_sentence else sentence_end):
                parts = [part for part in clause.parts if not isinstance(part, str)]
                written = zip(parts, match.groups(), strict=True)
                right += [part for part, word in written if part.text == _shortest(part, word)]
                break
    return right


def _sections(text: str, masked: str) -> list[tuple[str, int, int, int]]:
    """Cut a text behind each label: label, start, end of its sentence, start of the next one."""
    labels, begin = [], 0
    for border in BORDER.finditer(masked):
        if border[0] == ":":
            labels.append((text[begin : border.start()].strip(), border.end()))
        begin = border.end()
    sections = []
    for (label, start), (_, end) in itertools.pairwise([*labels, ("", len(text))]):
        stop = SENTENCE_END.search(masked, start, end)
        sections.append((label, start, stop.start() if stop else end, end))
    return sections


def _clause_pattern(clause: Clause) -> str:
    """Return a regular expression of a clause with any numbers and any chosen words."""
    label = f"{clause.label}: " if clause.label else ""
    return re.escape(clause.joint + label) + "".join(map(_part_pattern, clause.parts))


def _part_pattern(part: Part) -> str:
    if isinstance(part, str):
        return re.escape(part)
    return f"({NUMBER if isinstance(part, Number) else '|'.join(map(re.escape, part.among))})"


def _shortest(part: Number | Choice, written: str) -> str:
    """Return what is written, a number in its shortest form: 7.10 is 7.1."""
    return plain(float(written)) if isinstance(part, Number) else written


def _is_trend(part: Part) -> bool:
    return isinstance(part, Choice) and part.trend


def _stated_numbers(masked: str) -> list[str]:
    return [plain(float(number)) for number in STATED.findall(masked)]


def _mask_names(dataset: TrajectoryDataset, text: str) -> str:
    """Put letters in the place of outcome, series and units, whose digits state nothing (PaCO2)."""
    names = {dataset.outcome, *dataset.features, *dataset.units} - {""}
    by_length = sorted(names, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in by_length)
    return re.sub(pattern, lambda name: "x" * len(name[0]), text)
