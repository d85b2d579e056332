"""What a run learns from: the rows, their split and their inputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.findings import log_warnings
from medgemma_clinical.data.overlap import training_hashes
from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.data.split import Split, check_outcomes
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import MIN_TIME_SCALE, TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

MIN_EVENT_PATIENTS = 10
"""Training patients that each of the competing events needs."""

MAX_SPANS = 10
"""Median span in time scales beyond which a time scale that nobody chose does not fit."""

NO_VALUE = "without a value of a series that is read"


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
    text_features: str = "none"  # what stage 1 and a regression read of texts

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
            log_warnings(describe_long_spans(self.dataset), self.dataset.source)
            hours = self.dataset.time_scale
        if hours < MIN_TIME_SCALE:
            raise InputError(f"--time_scale {hours:g}: give at least {MIN_TIME_SCALE:g} hours")
        return hours

    def check_inputs(self) -> None:
        """Refuse prediction times that are read where no training patient has one."""
        hours = self.dataset.hours_read
        if hours is not None and np.isnan(hours[self.split["train"]]).all():
            raise InputError(
                f"{self.dataset.source}: no patient of the training part has a prediction time: "
                "fill the column prediction_hours, or leave it unread by --prediction_time off"
            )

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
            "text_features": self.text_features,
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
    text_features: str = "none",
) -> Data:
    """Take at most ``max_samples`` patients (0: all) of what was read, and split them."""
    if text_features != "none" and not (dataset.contexts != "").any():
        raise InputError(
            f"--text_features {text_features}: {dataset.source} holds no text: fill the column "
            "clinical_context, or leave the flag out"
        )
    dataset = labelled_rows(dataset)
    sample = dataset.sample_patients(max_samples, seed)
    split = sample.split(seed)
    unusable_series = unread_series(sample, split, inputs)
    series = [name for name in sample.features if name not in unusable_series]
    sample, split = measured_rows(sample.with_series(series), split)
    check_events(sample, split["train"])
    unusable_static = sample.unusable_static(split["train"])
    if inputs is None:
        names = [name for name in sample.static_names if static and name not in unusable_static]
        has_hours = sample.prediction_hours is not None
        inputs = {"static": names, "prediction_time": prediction_time and has_hours}
    reads_context = prompts.context and bool((dataset.contexts != "").any())
    return Data(
        sample.with_inputs(**inputs),
        split,
        replace(prompts, context=reads_context),
        data_sha256=dataset.fingerprint(),
        rows_sha256=dataset.row_fingerprint(),
        unusable_static=unusable_static,
        unusable_series=unusable_series,
        text_features=text_features,
    )


def labelled_rows(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """Return the rows with a label, the only ones that a training sees; log how many lack one."""
    has_label = ~np.isnan(dataset.labels)
    if has_label.all():
        return dataset
    logger.info("%s: %d rows without a label are not used", dataset.source, int((~has_label).sum()))
    return dataset.keep_rows(has_label, "without a label")


def unread_series(
    dataset: TrajectoryDataset, split: Split, inputs: dict[str, Any] | None
) -> dict[str, str]:
    """Return the series that are not read, and why: of a stage 1, or else by the training part."""
    if inputs is None:
        return dataset.unusable_series(split["train"])
    series = inputs.get("series", dataset.features)
    return {x: "stage 1 does not read it" for x in dataset.features if x not in series}


def measured_rows(dataset: TrajectoryDataset, split: Split) -> tuple[TrajectoryDataset, Split]:
    """Return the rows that hold a value of a series that is read, and their split."""
    has_value = dataset.lengths > 0
    if has_value.all():
        return dataset, split
    rows = dataset.keep_rows(has_value, NO_VALUE)
    position = np.cumsum(has_value) - 1
    parts = {part: position[index[has_value[index]]] for part, index in split.items()}
    filled_parts = {part: parts[part] for part in split if len(split[part])}
    where = f"{dataset.source}, where rows {NO_VALUE} are left out"
    check_outcomes(filled_parts, rows.groups, rows.labels, where)
    text = "%s: %s rows hold no value of a series that is read, and are not used"
    logger.info(text, dataset.source, f"{len(dataset) - len(rows):,}")
    return rows, parts


def check_events(dataset: TrajectoryDataset, train: NDArray[np.int64]) -> None:
    """Refuse competing events of which a model could learn nothing."""
    if dataset.competing_events is None:
        return
    _, hours, events = dataset.targets()[train].T
    by_then = hours <= dataset.competing_events.horizons[-1]
    for event, name in enumerate(dataset.competing_events.names, start=1):
        patients = count_patients(dataset.groups[train], by_then & (events == event))
        if patients < MIN_EVENT_PATIENTS:
            raise InputError(
                f"{dataset.source}: fewer than {MIN_EVENT_PATIENTS} patients of the training part "
                f"have event {event}, {name}, by the last horizon: merge it: {dataset.merging}"
            )


def describe_long_spans(dataset: TrajectoryDataset) -> list[str]:
    """Warn of a time scale that nobody chose and that is far below the span of most rows."""
    if not dataset.assumed_time_scale:
        return []
    median = float(np.median(dataset.prediction_times() - dataset.times[dataset.offsets[:-1]]))
    scale, better = dataset.time_scale, f"{float(f'{median:.2g}'):.0f}"
    if median <= MAX_SPANS * scale:
        return []
    return [
        f"the median span of a row, {median:,.0f} h, is beyond {MAX_SPANS} time scales of "
        f"{scale:g} h, which makes very many solver steps: train with --time_scale {better}, or "
        f'write "time_scale": {better} in the JSON file beside the data'
    ]
