"""Numbers of written reports: three marks by the rule of the report's score, no text lost."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.reports.review import review_report
from medgemma_clinical.evaluation.patients.report_marks import (
    ELSEWHERE,
    FOREIGN,
    RIGHT,
    TRUTHS,
    Truth,
    mark_numbers,
)

DATASET = MIMICtrajectoryDataset(
    pd.DataFrame(
        {
            "clinical_trajectory": ["24 (0h) -> 16 (2.5h) -> 18.5 (8h)"],
            "trajectory_PaCO2": ["44 (0h) -> 36 (2.5h) -> 38.5 (8h)"],
            "trajectory_sodium [mEq/L]": ["137 (0h) -> 141 (8h)"],
            "static_weight": [82],
            "clinical_context": ["54-year-old woman"],
            "label_escalation": [1],
        }
    ),
    description=Description(outcome="Death in 30 days"),
)
TRUE = DATASET.report(0)


def marked(text: str) -> list[tuple[str, Truth]]:
    marks = mark_numbers(DATASET, 0, text)
    assert "".join(mark.text for mark in marks) == text
    return [(mark.text, mark.truth) for mark in marks if mark.truth]


def numbers(text: str, truth: Truth) -> list[str]:
    return [number for number, found in marked(text) if found == truth]


def test_all_numbers_of_the_true_report_are_right_and_those_of_names_are_none() -> None:
    found = marked(TRUE)
    assert len(found) == DATASET.score_report(0, TRUE).true == 18
    assert {truth for _, truth in found} == {RIGHT}
    assert not {("30", RIGHT), ("2", RIGHT)} & set(found)


@pytest.mark.parametrize(
    ("old", "new", "elsewhere", "foreign"),
    [
        ("first 24", "first 25", [], ["25"]),
        ("first 24", "first 24.0", [], []),
        ("first 24", "first 36", ["36"], []),  # of another series
        ("first 24", "first 82", ["82"], []),  # a fact
        ("lowest 16 mEq/L at 2.5 h", "lowest 16 mEq/L at 8 h", ["8"], []),
        ("PaCO2: from", "PaCO2 was", ["44", "0", "38.5", "8"], []),
        ("falling", "falling after 3 days of a 54-year-old woman", ["54"], ["3"]),
        ("falling", "falling, within 16-24", ["16", "24"], []),
        (
            "PaCO2: from",
            "PaCO2: first 18.5 mEq/L at 8 h, from",
            ["18.5", "8"],
            [],
        ),
    ],
)
def test_a_number_that_is_not_right_is_of_the_row_or_not(
    old: str, new: str, elsewhere: list[str], foreign: list[str]
) -> None:
    assert old in TRUE
    text = TRUE.replace(old, new, 1)
    assert numbers(text, ELSEWHERE) == elsewhere
    assert numbers(text, FOREIGN) == foreign


MAIN = "Anion gap: first 24 mEq/L at 0 h"
LAST = "last 18.5 mEq/L at 8 h"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"{MAIN}, {LAST}.", 4),
        (f"Death in 30 days: no. Anion gap: {LAST}, first 24 mEq/L at 0 h.", 4),
        (f"{MAIN}; {LAST}.", 4),
        (f"sodium: {LAST}.", 0),
        (f"{MAIN}. sodium: from 137 mEq/L at 0 h, {LAST}.", 2),
        (f"{MAIN}, sodium: {LAST}.", 2),
        (f"{MAIN}. It is {LAST}.", 2),  # another sentence
        (f"{MAIN}\n{LAST}.", 2),  # a line ends a sentence
        (f"PaCO2 falls; {MAIN}.", 2),  # a semicolon begins a label
        (f"{LAST}.", 0),
        (f"Corrected {MAIN}.", 0),
        (f"{MAIN}. Net change -5.5 mEq/L, -0.7 mEq/L an hour: falling.", 4),
        ("sodium: low. Net change -5.5 mEq/L, -0.7 mEq/L an hour: falling.", 0),
        (f"Anion gap: high. {MAIN}, {LAST}.", 4),
        (f"{MAIN}, {LAST}. {MAIN}, {LAST}.", 4),  # said twice, right once
    ],
)
def test_a_statement_is_that_of_the_series_whose_sentence_it_stands_in(
    text: str, right: int
) -> None:
    assert len(numbers(text, RIGHT)) == DATASET.score_report(0, text).true == right
    assert not numbers(text, FOREIGN)


@given(st.data())
def test_marks_do_not_contradict_score_and_review(data: st.DataObject) -> None:
    pieces = [*TRUE.split(" "), "7", "-3.5", "PaCO2", "1e3", "24.00", "."]
    words = data.draw(st.lists(st.sampled_from(pieces), max_size=60))
    cut = data.draw(st.integers(0, len(TRUE)))
    text = TRUE[:cut] + " " + " ".join(words)
    truths, review = [truth for _, truth in marked(text)], review_report(DATASET, 0, text)
    assert len(truths) == review.score.stated
    assert truths.count(RIGHT) == review.score.true
    assert FOREIGN not in truths or review.invented > 0


def test_a_report_without_numbers_is_one_piece_and_none_is_no_piece() -> None:
    assert len(mark_numbers(DATASET, 0, "nothing to say")) == 1
    assert mark_numbers(DATASET, 0, "") == ()


def test_marks_differ_in_symbol_words_and_colour() -> None:
    for of in (lambda t: t.symbol, lambda t: t.words, lambda t: t.style):
        assert len({of(truth) for truth in TRUTHS}) == 3
