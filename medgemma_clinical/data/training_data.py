"""What a run learns from: the rows, their split and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data import checks
from medgemma_clinical.data.overlap import training_hashes
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import MIN_TIME_SCALE, TrajectoryDataset
from medgemma_clinical.files import InputError


@dataclass(frozen=True)
class Data:
    """A data set, its split, and what a language model reads of it."""

    dataset: TrajectoryDataset  # with the inputs of a model
    split: Split
    prompts: PromptOptions
    data_sha256: str  # of all that was read, before ``--max_samples``
    rows_sha256: str  # of labels, ids, patients and given split
    unusable_static: dict[str, str] = field(default_factory=dict)  # no model can learn; and why
    unusable_series: dict[str, str] = field(default_factory=dict)  # blank; and why

    @property
    def usable_static(self) -> list[str]:
        """Names of the static features that the training part can teach."""
        return [name for name in self.dataset.static_names if name not in self.unusable_static]

    @property
    def unusable(self) -> list[tuple[str, str]]:
        """Series and static features that are not read, and why."""
        return [*self.unusable_series.items(), *self.unusable_static.items()]

    def time_scale(self, hours: float | None) -> float:
        """Return a new encoder's unit of time in hours; warn where the data's own does not fit."""
        if hours is None:
            checks.log_warnings(checks.describe_long_spans(self.dataset), self.dataset.source)
            hours = self.dataset.time_scale
        if hours < MIN_TIME_SCALE:
            raise InputError(f"--time_scale {hours:g}: give at least {MIN_TIME_SCALE:g} hours")
        return hours

    def check_inputs(self) -> None:
        """Refuse prediction times that no training patient has."""
        checks.check_prediction_times(self.dataset, self.split["train"])

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
        }

    def training_patients(self) -> NDArray[np.int64]:
        """Return the hashes of the patients that train."""
        return training_hashes(self.dataset, self.split["train"])


def prepare_data(
    dataset: TrajectoryDataset,
    *,
    max_samples: int,
    seed: int,
    prompts: PromptOptions,
    inputs: dict[str, Any] | None = None,  # of a stage 1; None: those that training can teach
    static: bool = True,
    prediction_time: bool = True,
) -> Data:
    """Take at most ``max_samples`` patients (0: all) of what was read, and split them."""
    dataset = checks.labelled_rows(dataset)
    data_sha256, rows_sha256 = dataset.fingerprint(), dataset.row_fingerprint()
    sample = dataset.sample_patients(max_samples, seed)
    split = sample.split(seed)
    series = None if inputs is None else inputs.get("series", sample.features)
    sample, split, unusable_series = checks.rows_as_read(sample, split, series)
    checks.check_events(sample, split["train"])
    unusable = sample.unusable_static(split["train"])
    if inputs is None:
        names = [name for name in sample.static_names if static and name not in unusable]
        has_hours = sample.prediction_hours is not None
        inputs = {"static": names, "prediction_time": prediction_time and has_hours}
    sample = sample.with_inputs(**inputs)
    reads_context = prompts.context and bool((dataset.contexts != "").any())
    prompts = replace(prompts, context=reads_context)
    return Data(sample, split, prompts, data_sha256, rows_sha256, unusable, unusable_series)
