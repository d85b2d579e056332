"""Copies of rows across a split, and patients of an earlier training, by their hashes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.split import Split
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

LATEST_OBSERVATIONS = 5
"""Observations by which a row is known again; the latest, since ``--max_len`` cuts others off."""

IDENTIFYING_VALUES = 3
"""A row with fewer measured values does not identify its patient: other patients share them."""


# --------------------------------------------------------------------------- hashes
# A checkpoint holds hashes of its training part, so names and rows are compared by these.


def row_hashes(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    label: float | None = None,  # in place of that of the rows
    latest: int | None = LATEST_OBSERVATIONS,  # None: all
) -> NDArray[np.int64]:
    """Hash the latest observations and the label of n rows, (n,), 0 where they identify nobody."""
    ends, lengths = dataset.offsets[rows + 1], dataset.lengths[rows]
    lengths = lengths if latest is None else np.minimum(lengths, latest)
    owner, starts = np.repeat(np.arange(len(rows)), lengths), np.cumsum(lengths) - lengths
    step = np.arange(len(owner)) - (starts + lengths)[owner]  # -1 for the last observation
    flat = ends[owner] + step
    values = dataset.values[flat]
    hours = np.round(dataset.times[flat] - dataset.times[ends - 1][owner], 6)
    hashes = step.astype(np.uint64)
    for column in (hours, *values.T):
        hashes = _mixed(hashes, column)
    if len(rows):
        hashes = np.add.reduceat(hashes, starts)
    value_counts = np.bincount(owner, (~np.isnan(values)).sum(axis=1), minlength=len(rows))
    hashes = _mixed(hashes, dataset.labels[rows] if label is None else np.full(len(rows), label))
    return np.where(value_counts < IDENTIFYING_VALUES, np.uint64(0), hashes).view(np.int64)


def _mixed(hashes: NDArray[np.uint64], column: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return hashes that depend on a column, too; -0 equals 0."""
    return pd.util.hash_array(hashes + pd.util.hash_array(column + 0.0))


def patient_hashes(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a hash of the patient's name for each of n rows, (n,)."""
    return pd.util.hash_array(dataset.groups[rows].astype(object)).view(np.int64)


def both_hashes(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the hashes of n rows with label 0 and with label 1, (n, 2)."""
    return np.stack([row_hashes(dataset, rows, label) for label in (0.0, 1.0)], axis=1)


def training_hashes(dataset: TrajectoryDataset, train: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return sorted unique hashes of the patients of some rows, by name and by their rows."""
    # Texts and static features do not enter: a patient stays the same with other ones.
    rows = row_hashes(dataset, train)
    return np.unique(np.concatenate([rows[rows != 0], patient_hashes(dataset, train)]))


def add_training_rows(
    trained: NDArray[np.int64],
    patients: NDArray[np.int64],
    rows: NDArray[np.int64],
    labels: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return ``trained`` with the hashes of n more rows; ``rows`` (n, 2) are ``both_hashes``."""
    hashes = rows[np.arange(len(rows)), labels.astype(int)]
    return np.union1d(trained, np.concatenate([hashes[hashes != 0], patients]))


# --------------------------------------------------------------------------- comparisons


def describe_copies(dataset: TrajectoryDataset, split: Split, numbers: NDArray[np.int64]) -> str:
    """Describe copies of a row in two parts of a split, if any; ``numbers`` (N,) are the file's."""
    part = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(split.values())])
    rows = pd.DataFrame({"row": np.concatenate([*split.values()]), "part": part})
    rows = rows.sort_values("row", ignore_index=True)
    order = rows["row"].to_numpy()
    content = pd.DataFrame(dataset.static[order])  # copies are equal in all that is read of them
    content["series"] = row_hashes(dataset, order, latest=None)
    content["last"], content["context"] = dataset.last_times[order], dataset.contexts[order]
    if dataset.prediction_hours is not None:
        content["hours"] = dataset.prediction_hours[order]
    rows["key"] = pd.util.hash_pandas_object(content, index=False)
    rows = rows[content["series"] != 0]
    first = rows.groupby("key")[["row", "part"]].transform("first")
    other = rows["part"] != first["part"]
    if not other.any():
        return ""
    pair = sorted(numbers[[first["row"][other].iloc[0], rows["row"][other].iloc[0]]])
    return (
        f"rows {pair[0]} and {pair[1]} are equal in all that is read of them, and lie in two "
        f"parts of the split ({other.sum():,} such pairs): remove the copies, or give the rows of "
        "a patient one subject_id"
    )


def count_overlap(
    dataset: TrajectoryDataset,
    split: Split,
    trained: NDArray[np.int64],
    *,
    has_ids: bool,  # the data of ``trained`` name their patients
    same_rows: bool = False,  # both are one file, of equal ``rows_sha256``
) -> int:
    """Count the held-out patients (val and test) that are among ``trained``, by name or by rows."""
    held_out = np.concatenate([split["val"], split["test"]])
    # Rows of one file have the same numbers, however much of its series is read.
    if same_rows or (dataset.has_patient_ids and has_ids):
        in_training = np.isin(patient_hashes(dataset, held_out), trained)
    else:
        # Rows that the split's own training part holds as well identify nobody.
        rows = row_hashes(dataset, held_out)
        shared = np.isin(rows, row_hashes(dataset, split["train"]))
        in_training = np.isin(rows, trained) & ~shared & (rows != 0)
    return len(np.unique(dataset.groups[held_out][in_training]))


def check_held_out(
    dataset: TrajectoryDataset,
    split: Split,
    trained: NDArray[np.int64] | None,  # None: a shared copy lacks them
    path: Path,
    *,
    has_ids: bool,
    same_rows: bool,
) -> None:
    """Refuse an encoder that has seen patients of a run's validation or test part."""
    if trained is None:
        if same_rows:  # their split may differ here
            raise InputError(
                f"{path}: a shared copy, trained on the same data, lacks hashes of its training "
                "patients: give the file of the run itself"
            )
        logger.warning(
            "%s is a shared copy and lacks the hashes of its training patients, so a leak cannot "
            "be detected: make sure that none of them is in the validation or test part",
            path,
        )
        return
    if leaked := count_overlap(dataset, split, trained, has_ids=has_ids, same_rows=same_rows):
        held_out = np.concatenate([split["val"], split["test"]])
        count = len(np.unique(dataset.groups[held_out]))
        raise InputError(
            f"{path}: {leaked} of {count} held-out patients were in this encoder's training data: "
            "use the same --seed and --max_samples, and the data of stage 1; one of --final has "
            "seen all: give a fold's, or that of a run without --final"
        )
    if not same_rows and not (has_ids and dataset.has_patient_ids):
        logger.warning(
            "%s was trained on another data file, and patients without names are compared by their "
            "series alone: make sure that none of its training patients is in the validation or "
            "test part",
            path,
        )


class TrainingPatients(NamedTuple):
    """What is known of the patients that a model was trained on."""

    hashes: NDArray[np.int64]  # ``training_hashes``; empty where unknown
    has_ids: bool  # the training data name their patients

    def include(
        self, patients: NDArray[np.int64], rows: NDArray[np.int64], *, has_ids: bool
    ) -> NDArray[np.bool_]:
        """Return which of n rows are among them, (n,); ``rows`` (n, 2) are ``both_hashes``."""
        # Either label: whether a row is left out must not depend on its outcome.
        same_row = (np.isin(rows, self.hashes) & (rows != 0)).any(axis=1)
        # Hospitals may number patients alike: an id counts if some row of such a patient is equal.
        same_patient = np.isin(patients, self.hashes) & has_ids & self.has_ids
        return same_row | (same_patient & (same_patient & same_row).any())
