"""What a run learns from: the rows, their split, and hashes by which leaks are found."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.checks import (
    describe_long_spans,
    describe_prediction_times,
    labelled_rows,
    log_warnings,
    patients_behind_inputs,
    rows_as_read,
)
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import TrajectoryDataset

logger = logging.getLogger(__name__)

LATEST_OBSERVATIONS = 5
"""Observations by which a row is known again; the latest, since ``--max_len`` cuts others off."""

IDENTIFYING_VALUES = 3
"""A row with fewer measured values does not identify its patient: other patients share them."""


# --------------------------------------------------------------------------- hashes


def row_hashes(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    label: float | None = None,
    latest: int | None = LATEST_OBSERVATIONS,
) -> NDArray[np.int64]:
    """Return a hash of the latest observations (None: of all) and the label of each of n rows.

    It is 0 where a row holds too few values to identify a patient. ``label`` stands in for that of
    the rows.
    """
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
    measured = np.bincount(owner, (~np.isnan(values)).sum(axis=1), minlength=len(rows))
    hashes = _mixed(hashes, dataset.labels[rows] if label is None else np.full(len(rows), label))
    return np.where(measured < IDENTIFYING_VALUES, np.uint64(0), hashes).view(np.int64)


def _mixed(hashes: NDArray[np.uint64], column: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return hashes that depend on a column, too; -0 equals 0."""
    return pd.util.hash_array(hashes + pd.util.hash_array(column + 0.0))


def patient_hashes(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a hash of the patient's name for each of n rows, (n,)."""
    return pd.util.hash_array(dataset.groups[rows].astype(object)).view(np.int64)


def describe_copies(dataset: TrajectoryDataset, split: Split, numbers: NDArray[np.int64]) -> str:
    """Return what to do about copies of a row in two parts of a split; empty where there are none.

    Copies are equal in all that is read of them: observations, static features, prediction time,
    context and label. ``numbers`` (N,) are those of the rows in the file.
    """
    part = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(split.values())])
    rows = pd.DataFrame({"row": np.concatenate([*split.values()]), "part": part})
    rows = rows.sort_values("row", ignore_index=True)
    order = rows["row"].to_numpy()
    read = pd.DataFrame(dataset.static[order])
    read["series"] = row_hashes(dataset, order, latest=None)
    read["last"], read["context"] = dataset.last_times[order], dataset.contexts[order]
    read["hours"] = np.nan if dataset.prediction_hours is None else dataset.prediction_hours[order]
    rows["key"] = pd.util.hash_pandas_object(read, index=False)
    rows = rows[read["series"] != 0]
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


# --------------------------------------------------------------------------- data of a run


@dataclass(frozen=True)
class Data:
    """A data set, its split, and what a language model reads of it.

    Attributes:
        dataset: N rows, with the inputs of a model.
        split: positions of the rows of each part.
        prompts: what a prompt holds.
        data_sha256: hash of all that was read, before ``--max_samples``.
        rows_sha256: hash of labels, ids, patients and given split.
        unusable_static: static features that no model can learn from, and why.
        unusable_series: the same of series, which are blank.
    """

    dataset: TrajectoryDataset
    split: Split
    prompts: PromptOptions
    data_sha256: str
    rows_sha256: str
    unusable_static: dict[str, str] = field(default_factory=dict)
    unusable_series: dict[str, str] = field(default_factory=dict)

    @property
    def usable_static(self) -> list[str]:
        """Names of the static features that the training part can teach."""
        return [name for name in self.dataset.static_names if name not in self.unusable_static]

    @property
    def unusable(self) -> list[tuple[str, str]]:
        """Series and static features that are not read, and why."""
        return [*self.unusable_series.items(), *self.unusable_static.items()]

    def prevalence(self) -> float:
        """Return the share of events in the training part."""
        return float(self.dataset.labels[self.split["train"]].mean())

    def time_scale(self, given: float | None) -> float:
        """Return hours that are a new encoder's unit of time; warn where they do not fit the data.

        ``given``: the user's choice, None where the flag is left out.
        """
        if given is not None:
            return given
        log_warnings(describe_long_spans(self.dataset), self.dataset.source)
        return self.dataset.time_scale

    def check_inputs(self) -> None:
        """Warn of prediction times that few training patients have; refuse those that none has."""
        warnings = describe_prediction_times(self.dataset, self.split["train"])
        log_warnings(warnings, self.dataset.source)

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint stores of its data, without any patient in it."""
        dataset = self.dataset
        return {
            "dataset": dataset.name,
            "read_options": dataset.read_options,
            "features": list(dataset.features),
            "units": list(dataset.units),
            "inputs": {
                "static": list(dataset.static_inputs),
                "prediction_time": dataset.hours_read is not None,
                "series": [dataset.features[f] for f in dataset.series_read],
            },
            "outcome": dataset.outcome,
            "question": dataset.question,
            "has_patient_ids": dataset.has_patient_ids,
            "data_sha256": self.data_sha256,
            "rows_sha256": self.rows_sha256,
            "patients": patients_behind_inputs(dataset, self.split["train"]),
        }

    def training_patients(self) -> NDArray[np.int64]:
        """Return sorted unique hashes of the patients that train, by name and by their rows.

        Texts and static features do not enter: a patient stays the same with other ones.
        """
        train = self.split["train"]
        rows = row_hashes(self.dataset, train)
        return np.unique(np.concatenate([rows[rows != 0], patient_hashes(self.dataset, train)]))

    def count_overlap(
        self, trained: NDArray[np.int64], other_has_ids: bool, *, same_rows: bool = False
    ) -> int:
        """Count the held-out patients (val and test) that are among ``trained``.

        Patients are compared by name where both data sets name them, and by row number where both
        are the same file (of equal ``rows_sha256``), however much of its series is read; otherwise
        by their rows. Rows that this split's own training part holds as well identify nobody.
        """
        held_out = np.concatenate([self.split["val"], self.split["test"]])
        if same_rows or (self.dataset.has_patient_ids and other_has_ids):
            known = np.isin(patient_hashes(self.dataset, held_out), trained)
        else:
            rows = row_hashes(self.dataset, held_out)
            shared = np.isin(rows, row_hashes(self.dataset, self.split["train"]))
            known = np.isin(rows, trained) & ~shared & (rows != 0)
        return len(np.unique(self.dataset.groups[held_out][known]))


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

    ``inputs`` are those of a stage 1, as in ``Data.description``; None chooses them: series and
    static features that the training part can teach, and the prediction time, where asked. Rows
    without a value of a series that is read are left out.
    """
    dataset = labelled_rows(dataset)
    data_sha256, rows_sha256 = dataset.fingerprint(), dataset.row_fingerprint()
    sample = dataset.sample_patients(max_samples, seed)
    split = sample.split(seed)
    series = None if inputs is None else inputs.get("series", sample.features)
    sample, split, unread = rows_as_read(sample, split, series)
    unusable = sample.unusable_static(split["train"])
    if inputs is None:
        names = [name for name in sample.static_names if static and name not in unusable]
        known = sample.prediction_hours is not None
        inputs = {"static": names, "prediction_time": prediction_time and known}
    sample = sample.with_inputs(**inputs)
    reads_context = prompts.context and bool((dataset.contexts != "").any())
    prompts = replace(prompts, context=reads_context)
    return Data(sample, split, prompts, data_sha256, rows_sha256, unusable, unread)
