"""Find the statements of the true report in a written one, and count the true numbers.

A statement belongs to the label before it, the words that a colon ends: "last 4 mmol/L at 6 h" is
potassium's behind "potassium:" and sodium's behind "sodium:". It stands in the sentence of its
label. The net change is a sentence without a label: it belongs to the last label before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medgemma_clinical.data.texts import (
    NUMBER,
    Choice,
    Clause,
    Number,
    clause_pattern,
    clause_text,
    plain,
)

SENTENCE_END = re.compile(r"\n|\.(?![0-9])")
"""The point within a decimal number ends no sentence."""

BORDER = re.compile(rf"[:,;]|{SENTENCE_END.pattern}")
STATED = re.compile(rf"(?!(?<=\w)[+-]){NUMBER}")
"""A number within a text; the hyphen between two numbers (7.1-7.4) is no sign."""

JOINTS = (", ", ". ")
"""Between two clauses of a report."""


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


@dataclass(frozen=True)
class WrittenPart:
    """What a written report has in place of a number or chosen word of the true one.

    Attributes:
        part: of the true report.
        text: what is written; a number as ``plain`` writes it.
        start: where it stands in the written report.
    """

    part: Number | Choice
    text: str
    start: int

    @property
    def right(self) -> bool:
        """Whether the true report has the same number or word; 7.10 is 7.1."""
        return self.text == self.part.text


def score_report(
    text: str,
    outcome: str,
    clauses: Sequence[Clause],
    names: Sequence[str],
    written: Sequence[WrittenPart],
) -> ReportScore:
    """Compare a written report with the clauses of the true one, number by number.

    Args:
        text: the written report.
        outcome: what label 1 means; a report begins with it.
        clauses: of the true report.
        names: of outcome, series and units, see ``find_statements``.
        written: as from ``written_parts``.
    """
    head = rf"{re.escape(outcome)}: (yes|no)"
    verdict = re.match(rf"{head}\b", text)
    findings = "".join(map(clause_pattern, clauses))
    return ReportScore(
        verdict=None if verdict is None else int(verdict[1] == "yes"),
        parses=re.fullmatch(rf"{head}\. {findings}\.\s*", text) is not None,
        stated=len(stated_numbers(text, names)),
        true=sum(each.right for each in written if isinstance(each.part, Number)),
    )


def find_statements(
    text: str, clauses: Sequence[Clause], names: Sequence[str]
) -> list[re.Match[str] | None]:
    """Find for each clause the first statement of its form behind its label.

    Args:
        text: the written report.
        clauses: of the true report, the first of them with a label.
        names: of outcome, series and units, whose digits are no stated numbers (PaCO2, vitamin
            B12) and whose points and colons end neither sentence nor label.

    Returns:
        The matches without joint and label, None where there is none; their groups are the numbers
        and chosen words.
    """
    sections = _sections(text, _mask(text, names))
    found, label = [], ""
    for clause in clauses:
        opening = clause_text([*itertools.takewhile(lambda part: isinstance(part, str), clause)])
        joint = opening[:2] if opening[:2] in JOINTS else ""
        own, colon, _ = opening.removeprefix(joint).rpartition(": ")
        label = own or label
        pattern = clause_pattern(clause, words=True).removeprefix(re.escape(joint + own + colon))
        own_sentence = joint == ". " and not own
        behind = [section for section in sections if section.label == label]
        found.append(_first_statement(pattern, text, behind, own_sentence))
    return found


def written_parts(
    clauses: Sequence[Clause], statements: Sequence[re.Match[str] | None]
) -> list[WrittenPart]:
    """Return the numbers and chosen words of what ``find_statements`` found."""
    written = []
    for clause, match in zip(clauses, statements, strict=True):
        if match is None:
            continue
        parts = [part for part in clause if not isinstance(part, str)]
        for k, part in enumerate(parts, 1):
            word = plain(float(match[k])) if isinstance(part, Number) else match[k]
            written.append(WrittenPart(part, word, match.start(k)))
    return written


def stated_numbers(text: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return start and end of each number of a text that is no part of one of the names."""
    numbers = STATED.finditer(_mask(text, names))
    return [(each.start(), each.end() - each[0].endswith(".")) for each in numbers]


@dataclass(frozen=True)
class _Section:
    """A text behind a label: to the end of its sentence, and to the next label's colon."""

    label: str
    start: int
    sentence_end: int
    end: int


def _sections(text: str, masked: str) -> list[_Section]:
    """Cut a text behind each colon outside of names."""
    labels, begin = [], 0
    for border in BORDER.finditer(masked):
        if border[0] == ":":
            labels.append((text[begin : border.start()].strip(), border.end()))
        begin = border.end()
    sections = []
    for (label, start), (_, end) in itertools.pairwise([*labels, ("", len(text))]):
        stop = SENTENCE_END.search(masked, start, end)
        sections.append(_Section(label, start, stop.start() if stop else end, end))
    return sections


def _first_statement(
    pattern: str, text: str, sections: Sequence[_Section], own_sentence: bool
) -> re.Match[str] | None:
    """Return the first match that begins within one of the sections."""
    for section in sections:
        match = re.compile(pattern).search(text, section.start)
        if match and match.start() < (section.end if own_sentence else section.sentence_end):
            return match
    return None


def _mask(text: str, names: Sequence[str]) -> str:
    """Put letters in the place of the names, longer ones first."""
    by_length = sorted({*names} - {""}, key=len, reverse=True)
    named = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in by_length)
    return re.sub(named, lambda name: "x" * len(name[0]), text)
