"""How many judged patients trained the model, in words: figures on such patients flatter it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients, is_small
from medgemma_clinical.data.splits import IDENTIFYING_VALUES

ONE = "This patient"


@dataclass(frozen=True)
class Overlap:
    """Patients that trained the model among those on whom it is judged.

    Attributes:
        sentence: how many there are, or why the number is not known.
        flatters: whether the figures flatter the model, or may do so.
        sure: (n,) rows of patients that trained.
        perhaps: (n,) rows of which the identifier or the row alone is equal.
    """

    sentence: str
    flatters: bool
    sure: NDArray[np.bool_]
    perhaps: NDArray[np.bool_]


def find_overlap(
    patients: NDArray[np.int64],
    rows: NDArray[np.int64],
    trained: NDArray[np.int64],
    *,
    named: bool,
    fewest: int,
) -> Overlap:
    """Compare the judged patients with those that trained, by identifiers and by rows.

    Equal identifiers alone prove nothing, since two hospitals may count their patients alike: they
    do where a row is equal, too.

    Args:
        patients: (n,) hash of the patient of each row, as from ``patient_hashes``.
        rows: (n,) hash of each row, as from ``row_hashes``.
        trained: hashes of both kinds, as from ``Data.training_patients``; empty where not known.
        named: whether both data sets have identifiers of patients.
        fewest: patients of the smallest cell that is shown.
    """
    same_row = np.isin(rows, trained) & (rows != 0)
    same_name = np.isin(patients, trained) & named
    sure = same_name & (same_name & same_row).any()
    perhaps = (same_name | same_row) & ~sure
    flatters = True
    if not len(trained):
        sentence = (
            "The checkpoint does not hold its training patients: if these rows trained the model, "
            "the figures flatter it."
        )
    elif sure.any():
        part = _part(sure, patients, fewest)
        sentence = f"{part} trained the model: the figures flatter it."
    elif perhaps.any():
        part = _part(same_name if same_name.any() else same_row, patients, fewest)
        found = "the last values, hours and outcome of a row that trained the model"
        if same_name.any():
            found = "the identifier of a patient who trained the model"
        have = "has" if part == ONE else "have"
        sentence = f"{part} {have} {found}: if they are the same, the figures flatter it."
    else:
        flatters = False
        compared = "the identifier, or the last values," if named else "the last values"
        few = "compared by identifier alone" if named else "not compared"
        sentence = (
            f"No patient here has {compared} of one who trained the model. Rows of fewer than "
            f"{IDENTIFYING_VALUES} values are {few}."
        )
    return Overlap(sentence, flatters, sure, perhaps)


def _part(chosen: NDArray[np.bool_], patients: NDArray[np.int64], fewest: int) -> str:
    """Write how many patients are chosen; a few, or all but a few, in words."""
    known, count = count_patients(patients, chosen), len(np.unique(patients))
    if count == 1:
        return ONE
    if known == count:
        return f"All these {count:,} patients"
    if is_small(known, fewest):
        return f"Fewer than {fewest} of these {count:,} patients"
    if is_small(count - known, fewest):
        return f"All but fewer than {fewest} of these {count:,} patients"
    return f"{known:,} of these {count:,} patients"
