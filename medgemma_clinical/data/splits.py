"""Division of the patients into train, val and test."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.files import InputError

PARTS = ("train", "val", "test")

HELD_OUT_SHARE = 0.1
"""Share of the patients in each of val and test; the others train."""

IDENTIFYING_VALUES = 3
"""A row with fewer measured values does not identify its patient: other patients share them."""


def patient_events(
    groups: NDArray[np.str_], labels: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the patient of each row as a number, (n,), and whether each patient has an event."""
    patients, owner = np.unique(groups, return_inverse=True)
    event = np.zeros(len(patients), dtype=bool)
    np.logical_or.at(event, owner, labels == 1)
    return owner, event


def draw_split(
    groups: NDArray[np.str_], labels: NDArray[np.float64], seed: int, source: str
) -> dict[str, NDArray[np.int64]]:
    """Divide the rows 80/10/10 by patient, stratified by event; the order of rows is immaterial.

    Args:
        groups: (n,) patient of each row.
        labels: (n,) 0 or 1.
        seed: decides the part of each patient.
        source: named in errors.

    Returns:
        Ascending positions of the rows for each of ``PARTS``.

    Raises:
        InputError: fewer than three patients with, or without, an event.
    """
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
) -> dict[str, NDArray[np.int64]]:
    """Return the split that the data bring in ``parts`` (n,); see ``draw_split``.

    Raises:
        InputError: a part lacks patients with or without an event.
    """
    split = {name: np.flatnonzero(parts == name) for name in PARTS}
    owner, event = patient_events(groups, labels)
    for name, rows in split.items():
        if len(np.unique(event[owner[rows]])) < 2:
            raise InputError(
                f"{source}, column split: {name} lacks patients with or without an event: each of "
                "train, val, test needs both"
            )
    return split


def row_keys(
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    offsets: NDArray[np.int64],
    labels: NDArray[np.float64],
    contexts: NDArray[np.object_],
) -> NDArray[np.uint64]:
    """Return a hash of all that is read of each row, see ``TrajectoryDataset``; (N,).

    Returns:
        0 for rows that hold too few values to identify a patient.
    """
    starts = offsets[:-1]
    observations = (np.arange(len(times)) - np.repeat(starts, np.diff(offsets))).astype(np.uint64)
    for column in (times, *values.T):
        hashed = pd.util.hash_array(column + 0.0)  # -0 equals 0
        observations = pd.util.hash_array(observations + hashed)
    series = np.add.reduceat(observations, starts)
    rows = pd.DataFrame({"series": series, "label": labels, "context": contexts})
    keys = pd.util.hash_pandas_object(rows, index=False).to_numpy()
    measured = np.add.reduceat(np.count_nonzero(~np.isnan(values), axis=1), starts)
    return np.where(measured < IDENTIFYING_VALUES, np.uint64(0), keys)


def describe_equal_rows(
    keys: NDArray[np.uint64], split: dict[str, NDArray[np.int64]], numbers: NDArray[np.int64]
) -> str:
    """Return what to do about equal rows in two parts of a split; empty where there are none.

    Args:
        keys: (N,) of ``row_keys``.
        split: positions of each part.
        numbers: (N,) number of each row in the file.
    """
    part = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(split.values())])
    rows = pd.DataFrame({"row": np.concatenate([*split.values()]), "part": part})
    rows["key"] = keys[rows["row"]]
    rows = rows[rows["key"] != 0].sort_values("row")
    first = rows.groupby("key")[["row", "part"]].transform("first")
    other = rows["part"] != first["part"]
    if not other.any():
        return ""
    pair = sorted(numbers[[first["row"][other].iloc[0], rows["row"][other].iloc[0]]])
    return (
        f"rows {pair[0]} and {pair[1]} are equal in series, context and label, and lie in two "
        f"parts of the split ({other.sum():,} such pairs): remove the "
        "copies, or give the rows of a patient one subject_id"
    )
