"""What a run learns from: the series, their split, and hashes by which leaks are found."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.checks import describe_few_patients, describe_long_spans
from medgemma_clinical.data.splits import IDENTIFYING_VALUES
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import TrajectoryDataset

logger = logging.getLogger(__name__)

LATEST_OBSERVATIONS = 5
"""Observations that identify a row; the latest, since ``--max_len`` cuts the others off."""


@dataclass(frozen=True)
class Data:
    """A data set, its split, and what a language model reads of it.

    Attributes:
        dataset: N series.
        split: positions of the rows of ``train``, ``val``, ``test``.
        prompts: what a prompt holds.
        data_sha256: hash of all that was read, before ``--max_samples``.
        rows_sha256: hash of labels, ids, patients and given split, before ``--max_samples``.
        unusable_static: static features that no model can learn from, and why.
    """

    dataset: TrajectoryDataset
    split: dict[str, NDArray[np.int64]]
    prompts: PromptOptions
    data_sha256: str
    rows_sha256: str
    unusable_static: dict[str, str] = field(default_factory=dict)

    @property
    def usable_static(self) -> list[str]:
        """Names of the static features that the training part can teach."""
        return [name for name in self.dataset.static_names if name not in self.unusable_static]

    def prevalence(self) -> float:
        """Return the share of events in the training part."""
        return float(self.dataset.labels[self.split["train"]].mean())

    def time_scale(self, given: float | None) -> float:
        """Return hours that are a new encoder's unit of time; warn where they do not fit the data.

        Args:
            given: the user's choice, None where the flag is left out.
        """
        if given is not None:
            return given
        for line in describe_long_spans(self.dataset):
            logger.warning("warning: %s: %s", self.dataset.source, line)
        return self.dataset.time_scale

    def check_inputs(self) -> None:
        """Warn of inputs that few training patients have.

        Raises:
            InputError: no training patient has one.
        """
        dataset, train = self.dataset, self.split["train"]
        dataset.check_measured(train)
        for line in describe_few_patients(dataset.patients_behind(train)):
            logger.warning("warning: %s: %s", dataset.source, line)

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint stores of its data, without any patient in it."""
        dataset, train = self.dataset, self.split["train"]
        return {
            "dataset": dataset.name,
            "read_options": dataset.read_options,
            "features": list(dataset.features),
            "units": list(dataset.units),
            "inputs": {
                "static": list(dataset.static_inputs),
                "prediction_time": dataset.hours_read is not None,
            },
            "outcome": dataset.outcome,
            "question": dataset.question,
            "has_patient_ids": dataset.has_patient_ids,
            "data_sha256": self.data_sha256,
            "rows_sha256": self.rows_sha256,
            "patients": dataset.patients_behind(train),
        }

    def training_patients(self) -> NDArray[np.int64]:
        """Return hashes of the patients that train, by name (or row number) and by their rows.

        Texts do not enter: the same patient with another context is the same patient.

        Returns:
            Sorted unique hashes, of 8 bytes each.
        """
        train = self.split["train"]
        rows = row_hashes(self.dataset, train)
        names = patient_hashes(self.dataset, train)
        return np.unique(np.concatenate([rows[rows != 0], names]))

    def count_overlap(
        self, trained: NDArray[np.int64], other_has_ids: bool, *, same_rows: bool = False
    ) -> int:
        """Count the held-out patients (val and test) that are among ``trained``.

        Patients are compared by name where both data sets name them, and by row number where both
        are the same file, however much of its series is read; otherwise by their rows. Rows that
        this split's own training part holds as well identify nobody.

        Args:
            trained: of the other data, as from ``training_patients``.
            other_has_ids: whether the other data name their patients.
            same_rows: whether the other data have the same ``rows_sha256``.
        """
        held_out = np.concatenate([self.split["val"], self.split["test"]])
        if same_rows or (self.dataset.has_patient_ids and other_has_ids):
            known = np.isin(patient_hashes(self.dataset, held_out), trained)
        else:
            rows = row_hashes(self.dataset, held_out)
            shared = np.isin(rows, row_hashes(self.dataset, self.split["train"]))
            known = np.isin(rows, trained) & ~shared & (rows != 0)
        return len(np.unique(self.dataset.groups[held_out][known]))


def patient_hashes(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a hash of the patient's name for each of n rows, (n,)."""
    names = dataset.groups[rows].tolist()
    return np.array([_hash(b"patient", name.encode()) for name in names], dtype=np.int64)


def row_hashes(
    dataset: TrajectoryDataset, rows: NDArray[np.int64], label: float | None = None
) -> NDArray[np.int64]:
    """Return a hash of the latest observations and the label of each of n rows, (n,).

    ``label`` stands in for that of the rows. Rows that hold too few values to identify a patient
    have 0.
    """
    hashes = np.zeros(len(rows), dtype=np.int64)
    for k, i in enumerate(rows.tolist()):
        end = dataset.offsets[i + 1]
        latest = slice(max(dataset.offsets[i], end - LATEST_OBSERVATIONS), end)
        values = dataset.values[latest]
        if np.count_nonzero(~np.isnan(values)) >= IDENTIFYING_VALUES:
            hours = np.round(dataset.times[latest] - dataset.times[end - 1], 6) + 0.0
            own = np.array([dataset.labels[i] if label is None else label])
            hashes[k] = _hash(b"row", hours.tobytes(), values.tobytes(), own.tobytes())
    return hashes


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def prepare_data(
    dataset: TrajectoryDataset,
    *,
    max_samples: int,
    seed: int,
    prompts: PromptOptions,
    inputs: dict[str, Any] | None = None,
    static: bool = True,
    prediction_time: bool = True,
) -> Data:
    """Take at most ``max_samples`` patients (0: all) of what was read, and split them.

    Args:
        dataset: as read.
        max_samples: most patients.
        seed: of drawing and split.
        prompts: what a prompt holds.
        inputs: of a stage 1 beside the series, as in ``Data.description``; None chooses them.
        static: whether a stage 1 reads the static features that the training part can teach.
        prediction_time: whether the prediction time is read where it is known.

    Raises:
        InputError: a part of the split would lack patients with or without an event, or the data
            lack one of ``inputs``.
    """
    data_sha256, rows_sha256 = dataset.fingerprint(), dataset.row_fingerprint()
    sample = dataset.sample_patients(max_samples, seed)
    split = sample.split(seed)
    unusable = sample.unusable_static(split["train"])
    if inputs is None:
        names = [name for name in sample.static_names if static and name not in unusable]
        known = sample.prediction_hours is not None
        inputs = {"static": names, "prediction_time": prediction_time and known}
    sample = sample.with_inputs(**inputs)
    return Data(sample, split, prompts, data_sha256, rows_sha256, unusable)
