"""Counts of patients, and how those of a few are written in what is shared."""

import numpy as np
import pytest

from medgemma_clinical.data.small_cells import count_patients, count_text, minority_patients


@pytest.mark.parametrize(
    ("count", "min_cell", "hidden"),
    [(0, 11, False), (1, 11, True), (10, 11, True), (11, 11, False), (3, 0, False)],
)
def test_counts_of_a_few_are_not_written(count, min_cell, hidden):
    assert count_text(count, min_cell) == (f"fewer than {min_cell}" if hidden else str(count))


def test_a_patient_with_several_rows_counts_once():
    groups, labels = np.array(list("aabbc")), np.array([1, 1, 0, 1, 0])
    assert count_patients(groups, labels == 1) == count_patients(groups, np.array([0, 2, 3])) == 2
    assert minority_patients(labels, np.array(list("aabbb"))) == 1
