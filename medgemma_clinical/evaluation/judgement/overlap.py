"""How many judged patients trained the model, in words: figures on such patients flatter it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import is_small
from medgemma_clinical.data.splits import IDENTIFYING_VALUES


@dataclass(frozen=True)
class Overlap:
    """What is known of the patients that trained the model among those it is judged on.

    Attributes:
        sentence: says so.
        flatters: whether the figures flatter the model, or may do so.
    """

    sentence: str
    flatters: bool


def find_overlap(
    patients: NDArray[np.int64],
    rows: NDArray[np.int64],
    trained: NDArray[np.int64],
    *,
    named: bool,
    learner: str,
    fewest: int,
) -> Overlap:
    """Compare the judged patients with those that trained.

    Identifiers are compared where both data sets have them, otherwise the rows. Equal identifiers
    alone prove nothing, since two hospitals may count their patients alike: they do where a row is
    equal, too.

    Args:
        patients: (n,) hash of the patient of each row, as from ``patient_hashes``.
        rows: (n,) hash of each row, as from ``row_hashes``.
        trained: hashes of both kinds, as from ``Data.training_patients``; empty where not known.
        named: whether both data sets name their patients.
        learner: what these patients trained, "the model" or a part of it.
        fewest: patients of the smallest cell that is shown.
    """
    if not len(trained):
        return Overlap(
            "The checkpoint does not hold its training patients: if these rows trained the model, "
            "the figures flatter it.",
            flatters=True,
        )
    same_row = np.isin(rows, trained) & (rows != 0)
    if not named:
        if not same_row.any():
            return Overlap(
                f"No row here has the last values, hours and outcome of a row that trained "
                f"{learner}. Without identifiers no more can be compared, and rows of fewer than "
                f"{IDENTIFYING_VALUES} values not at all.",
                flatters=False,
            )
        return Overlap(
            f"{_part(int(same_row.sum()), len(rows), 'rows', fewest)} have the last values, hours "
            f"and outcome of a row that trained {learner}: the figures flatter it.",
            flatters=True,
        )
    same_name = np.isin(patients, trained)
    if not same_name.any():
        sentence = f"None of these patients has the identifier of a patient who trained {learner}."
        return Overlap(sentence, flatters=False)
    known, count = len(np.unique(patients[same_name])), len(np.unique(patients))
    part = _part(known, count, "patients", fewest)
    if (same_name & same_row).any():
        return Overlap(f"{part} trained {learner}: the figures flatter it.", flatters=True)
    return Overlap(
        f"{part} have the identifier of a patient who trained {learner}: if they are the same "
        "patients, the figures flatter it.",
        flatters=True,
    )


def _part(known: int, count: int, noun: str, fewest: int) -> str:
    """Write how many of the judged patients or rows are known; a few, or all but a few, in words.

    Without identifiers each row is a patient.
    """
    if known == count:
        return f"All these {count:,} {noun}"
    if is_small(known, fewest):
        return f"Fewer than {fewest} of these {count:,} {noun}"
    if is_small(count - known, fewest):
        return f"All but fewer than {fewest} of these {count:,} {noun}"
    return f"{known:,} of these {count:,} {noun}"
