"""Numbers of written reports: each marked by the rule of the report's score, no text lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgemma_clinical.data.texts import (
    Clause,
    change_clause,
    clause_text,
    main_clauses,
    score_report,
    short_clause,
)
from medgemma_clinical.evaluation.patients.report_marks import mark_numbers

HOURS, VALUES = np.array([0.0, 2.5, 8.0]), np.array([24.0, 16.0, 18.5])
CLAUSES: list[Clause] = [
    *main_clauses("Anion gap", "mEq/L", HOURS, VALUES),
    [". ", *change_clause("Anion gap", "mEq/L", HOURS, VALUES)],
    [". ", *short_clause("PaCO2", "mmHg", HOURS, VALUES + 20)],
]
NAMES = ["Anion gap", "PaCO2", "mEq/L", "mmHg"]
OUTCOME = "Death in 30 days"
TRUE = f"{OUTCOME}: yes. {''.join(map(clause_text, CLAUSES))}."


def marked(text: str) -> list[tuple[str, bool]]:
    marks = mark_numbers(text, OUTCOME, CLAUSES, NAMES)
    assert "".join(mark.text for mark in marks) == text
    return [(mark.text, mark.right) for mark in marks if mark.right is not None]


def test_all_numbers_of_the_true_report_are_right_and_names_are_none() -> None:
    numbers = marked(TRUE)
    assert len(numbers) == score_report(TRUE, OUTCOME, CLAUSES, NAMES).true == 14
    assert all(right for _, right in numbers)
    assert ("30", True) not in numbers
    assert ("2", True) not in numbers


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("first 24", "first 25", ["25"]),
        ("lowest 16 mEq/L at 2.5 h", "lowest 16 mEq/L at 8 h", ["8"]),
        ("falling", "falling after 3 days", ["3"]),
        ("24", "24.", ["24"]),
    ],
)
def test_a_number_that_is_not_the_patients_is_wrong_where_it_stands(
    old: str, new: str, wrong: list[str]
) -> None:
    text = TRUE.replace(old, new, 1)
    assert [number for number, right in marked(text) if not right] == wrong


@given(st.data())
def test_counts_are_those_of_the_score_whatever_is_written(data: st.DataObject) -> None:
    pieces = [*TRUE.split(" "), "7", "-3.5", "PaCO2", "1e3", "."]
    words = data.draw(st.lists(st.sampled_from(pieces), max_size=60))
    cut = data.draw(st.integers(0, len(TRUE)))
    text = TRUE[:cut] + " " + " ".join(words)
    numbers, score = marked(text), score_report(text, OUTCOME, CLAUSES, NAMES)
    assert len(numbers) == score.stated
    assert sum(right for _, right in numbers) == score.true


def test_a_report_without_numbers_is_one_piece_and_none_is_no_piece() -> None:
    assert len(mark_numbers("nothing to say", OUTCOME, CLAUSES, NAMES)) == 1
    assert mark_numbers("", OUTCOME, CLAUSES, NAMES) == ()
