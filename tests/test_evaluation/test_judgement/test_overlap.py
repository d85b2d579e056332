"""Patients that trained the model among those it is judged on, in words."""

from __future__ import annotations

import numpy as np
import pytest

from medgemma_clinical.evaluation.judgement.overlap import Overlap, find_overlap

NAMES = np.arange(100, 140)
"""Hashes of 40 patients; those of their rows are the negative numbers."""


def overlap(trained: list[int], *, named: bool = True, fewest: int = 0) -> Overlap:
    """Compare 40 patients of two rows each; the first patient's rows hold too few values."""
    rows = np.concatenate([-NAMES, -NAMES - 1000])
    rows[[0, 40]] = 0
    return find_overlap(
        np.tile(NAMES, 2),
        rows,
        np.array(trained, dtype=np.int64),
        named=named,
        fewest=fewest,
    )


def said(found: Overlap) -> tuple[str, bool]:
    """Return the sentence, and whether it warns."""
    return found.sentence, found.flatters


def trained_on(count: int) -> list[int]:
    """Hashes of the first patients and of their first rows, but that of too few values."""
    return [*range(100, 100 + count), *range(-99 - count, -100)]


def test_patients_who_trained_are_counted_once_and_warned_of() -> None:
    assert said(overlap(trained_on(30))) == (
        "30 of these 40 patients trained the model: the figures flatter it.",
        True,
    )
    assert overlap(trained_on(40)).sentence.startswith("All these 40 patients trained the model:")


@pytest.mark.parametrize(
    ("count", "start"),
    [
        (10, "Fewer than 11 of these 40 patients trained"),
        (11, "11 of these 40 patients trained"),
        (29, "29 of these 40 patients trained"),
        (30, "All but fewer than 11 of these 40 patients trained"),
        (40, "All these 40 patients trained"),
    ],
)
def test_no_count_gives_a_few_patients_away(count: int, start: str) -> None:
    assert overlap(trained_on(count), fewest=11).sentence.startswith(start)


def test_equal_identifiers_without_an_equal_row_are_no_proof() -> None:
    """Another hospital may count its patients alike."""
    names = [hash_ for hash_ in trained_on(30) if hash_ > 0]
    found = overlap(names)
    assert said(found) == (
        "30 of these 40 patients have the identifier of a patient who trained the model: if they "
        "are the same, the figures flatter it.",
        True,
    )
    assert said(overlap([*names, -139])) == said(found), (
        "a row of another patient is no proof either"
    )
    assert overlap([*names, -129]).sentence.startswith("30 of these 40 patients trained")


@pytest.mark.parametrize("named", [True, False])
def test_rows_are_compared_without_equal_identifiers_and_those_of_few_values_are_not(
    named: bool,
) -> None:
    """The training file under new pseudonyms, and without any."""
    rows = [*range(-129, -100), 0]
    found = overlap(rows, named=named)
    assert said(found) == (
        "29 of these 40 patients have the last values, hours and outcome of a row that trained the "
        "model: if they are the same, the figures flatter it.",
        True,
    )
    few = overlap([*range(-110, -100)], named=named, fewest=11)
    assert few.sentence.startswith("Fewer than 11 of these 40 patients have the last values")


def test_identifiers_are_not_compared_unless_both_data_sets_have_them() -> None:
    """Without identifiers the patients are the numbers of the rows."""
    none = overlap([hash_ for hash_ in trained_on(30) if hash_ > 0] + [0], named=False)
    assert said(none) == (
        "No patient here has the last values of one who trained the model. Rows of fewer than 3 "
        "values are not compared.",
        False,
    )


def test_other_patients_raise_no_warning_and_an_unknown_training_does() -> None:
    assert said(overlap([1, 2, -1])) == (
        "No patient here has the identifier, or the last values, of one who trained the model. "
        "Rows of fewer than 3 values are compared by identifier alone.",
        False,
    )
    unknown = overlap([])
    assert unknown.flatters
    assert unknown.sentence.startswith("The checkpoint does not hold its training patients: if ")


def test_one_patient_is_no_plural() -> None:
    sentences = [
        find_overlap(
            np.array([7, 7]), np.array([-7, -8]), np.array(trained), named=True, fewest=11
        ).sentence
        for trained in ([7, -8], [7, 8])
    ]
    assert sentences[0].startswith("This patient trained the model")
    assert sentences[1].startswith("This patient has the identifier of a patient who trained")
