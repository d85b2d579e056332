"""The split of rows into train, val and test, by patient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.files import InputError

PARTS = ("train", "val", "test")

HELD_OUT_SHARE = 0.1  # share of the patients in each of val and test; the others train

Split = dict[str, NDArray[np.int64]]
"""Ascending positions of the rows of each of ``PARTS``."""


def draw_split(
    groups: NDArray[np.str_], labels: NDArray[np.float64], seed: int, source: str
) -> Split:
    """Divide by patient 80/10/10, stratified by event; ``groups``, ``labels`` (n,) in any order."""
    owner, event = patient_events(groups, labels)
    rng = np.random.default_rng(seed)
    part = np.zeros(len(event), dtype=np.int64)
    for outcome, name in ((True, "with"), (False, "without")):
        order = rng.permutation(np.flatnonzero(event == outcome))
        if len(order) < len(PARTS):
            raise InputError(
                f"{source}: fewer than {len(PARTS)} patients {name} an event: train, val and test "
                "need at least one each: add such patients"
            )
        held_out = max(1, round(HELD_OUT_SHARE * len(order)))
        part[order[:held_out]] = PARTS.index("val")
        part[order[held_out : 2 * held_out]] = PARTS.index("test")
    return {name: np.flatnonzero(part[owner] == k) for k, name in enumerate(PARTS)}


def given_split(
    groups: NDArray[np.str_], labels: NDArray[np.float64], parts: NDArray[np.str_], source: str
) -> Split:
    """Return the split that the data bring in ``parts`` (n,); see ``draw_split``."""
    split = {name: np.flatnonzero(parts == name) for name in PARTS}
    check_outcomes(split, groups, labels, f"{source}, column split")
    return split


def check_outcomes(
    split: Split, groups: NDArray[np.str_], labels: NDArray[np.float64], where: str
) -> None:
    """Refuse a part that lacks patients with or without an event; errors begin by ``where``."""
    owner, event = patient_events(groups, labels)
    for name, rows in split.items():
        if len(np.unique(event[owner[rows]])) < 2:
            raise InputError(
                f"{where}: {name} lacks patients with or without an event: each of train, val, "
                "test needs both"
            )


def patient_events(
    groups: NDArray[np.str_], labels: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the patient of each row as a number, (n,), and whether each patient has an event."""
    patients, owner = np.unique(groups, return_inverse=True)
    event = np.zeros(len(patients), dtype=bool)
    np.logical_or.at(event, owner, labels == 1)
    return owner, event
