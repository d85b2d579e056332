"""Checks of data for ``check`` and the start of a run: summary, suspicions, verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.findings import flow_lines
from medgemma_clinical.data.leaks import describe_leaks
from medgemma_clinical.data.sample_size import describe_sample_size
from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.texts import plain, with_space
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

SEED = 0  # seed of the logged split; the default of --seed

MIN_COHORT_PATIENTS, MIN_TEST_EVENTS = 100, 10
"""Patients, and patients of the test part with and without the event, below which a check warns:
with fewer, hardly any difference between models is larger than its interval."""

MIN_EVENT_PATIENTS = 10
"""Training patients that each of the competing events needs."""

TEST_EVENTS = 200
"""Events of a test part below which folds are suggested. Source: Collins 2016, Stat Med 35:214."""

MAX_SPANS = 10
"""Median span in time scales beyond which a time scale that nobody chose does not fit."""

MAX_IMPLAUSIBLE = 0.5
"""Share of a series' values from which on its unit counts as wrong."""


def check(read: Callable[[], TrajectoryDataset], min_events: int = 0) -> int:
    """Log what a data set holds, what looks wrong, and if it is ready; refuse unusable data."""
    try:
        _log_check(read(), min_events)
    except InputError:
        logger.info("not ready")
        raise
    return 0


def _log_check(dataset: TrajectoryDataset, min_events: int) -> None:
    for line in summarize(dataset):
        logger.info(line)
    warnings = [*implausible_series(dataset), *describe_long_spans(dataset)]
    if dataset.n_patients < MIN_COHORT_PATIENTS:
        problem = f"fewer than {MIN_COHORT_PATIENTS} patients"
        warnings.append(f"{problem}: metrics of a model will be undecided")
    log_warnings(warnings)
    obstacle, events = "", int(np.nansum(dataset.labels))  # to training, not to prediction
    if events < min_events:
        obstacle = f"not to train on: {events} events, {min_events} are needed"
    elif np.isnan(dataset.labels).all():
        obstacle = "no labels to train on"
    if not obstacle:
        dataset = labelled_rows(dataset)
        rows, split, unread_series = rows_as_read(dataset, dataset.split(SEED))
        logger.info(describe_split(rows, split, SEED))
        check_events(rows, split["train"])
        further = [*describe_unusable(unread_series), *_check_parts(rows, split)]
        log_warnings(further)
        warnings += further
    ready = "ready to predict on" if obstacle else "ready"
    with_warnings = ", with warnings" if warnings or dataset.warnings else ""
    logger.info("%s%s%s", ready, with_warnings, f", {obstacle}" if obstacle else "")


def labelled_rows(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """Return the rows with a label, the only ones that a training sees; log how many lack one."""
    has_label = ~np.isnan(dataset.labels)
    if has_label.all():
        return dataset
    logger.info("%s: %d rows without a label are not used", dataset.source, int((~has_label).sum()))
    return dataset.keep_rows(has_label, "without a label")


def rows_as_read(
    dataset: TrajectoryDataset,
    split: Split,
    series: Sequence[str] | None = None,  # of a stage 1; None: those that training can teach
) -> tuple[TrajectoryDataset, Split, dict[str, str]]:
    """Return the rows with the series that are read alone, their split, and why others are not."""
    if series is None:
        reasons = dataset.unusable_series(split["train"])
        series = [name for name in dataset.features if name not in reasons]
    else:
        names = [name for name in dataset.features if name not in series]
        reasons = dict.fromkeys(names, "stage 1 does not read it")
    rows, split = dataset.with_series(series).keep_measured(split)
    if lost := len(dataset) - len(rows):
        text = "%s: %s rows hold no value of a series that is read, and are not used"
        logger.info(text, dataset.source, f"{lost:,}")
    return rows, split, reasons


def log_warnings(warnings: Iterable[str], source: str = "") -> None:
    """Log lines as warnings, with their source if there is one."""
    for line in warnings:
        logger.warning("warning: %s%s", f"{source}: " if source else "", line)


def _check_parts(dataset: TrajectoryDataset, split: Split) -> list[str]:
    """Log the sample size; warn of a test part of few events, and of suspect inputs."""
    train, test, warnings = split["train"], split["test"], []
    if minority_patients(dataset.labels[test], dataset.groups[test]) < MIN_TEST_EVENTS:
        problem = f"fewer than {MIN_TEST_EVENTS} patients of the test part have, or lack, the event"
        warnings.append(f"{problem}: its metrics will be undecided")
    has_hours, unusable = dataset.prediction_hours is not None, dataset.unusable_static(train)
    names = [name for name in dataset.static_names if name not in unusable]
    inputs = dataset.with_inputs(names, prediction_time=has_hours)
    logger.info("sample size: %s", describe_sample_size(inputs, names, train))
    if dataset.parts is None and dataset.labels[test].sum() < TEST_EVENTS:
        problem = f"fewer than {TEST_EVENTS} events in the test part"
        logger.info("%s: --folds 5 tests the model on each patient once", problem)
    check_prediction_times(inputs, train)
    return [*warnings, *describe_unusable(unusable), *describe_leaks(dataset, train)]


# --------------------------------------------------------------------------- summary


def describe_split(dataset: TrajectoryDataset, split: Split, seed: int) -> str:
    """Return how the parts came about, and rows, patients and events of each."""
    texts = []
    for part, rows in split.items():
        patients = count_patients(dataset.groups, rows)
        counts = {"row": len(rows), "patient": patients, "event": int(dataset.labels[rows].sum())}
        texts.append(f"{part} {', '.join(_plural(n, noun) for noun, n in counts.items())}")
    return f"split, {dataset.describe_origin(seed)}: {'; '.join(texts)}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summarize(dataset: TrajectoryDataset) -> list[str]:
    """Describe a data set in lines: flow, sizes, events, observations, spans, values."""
    labels = dataset.labels[~np.isnan(dataset.labels)]
    events = "no labels"
    if len(labels):
        labelled = f"{_plural(len(labels), 'labelled row')} ({labels.mean():.1%})"
        events = f"{_plural(int(labels.sum()), 'event')} in {labelled}"
    spans = dataset.last_times - dataset.times[dataset.offsets[:-1]]
    lines = [
        *([] if dataset.flow is None else flow_lines(dataset.flow)),
        f"rows {len(dataset):,}, patients {dataset.n_patients:,}",
        f"outcome {dataset.outcome!r}: {events}",
        *describe_events(dataset),
        f"observations a row: {_percentiles(dataset.lengths)}",
        f"span in hours: {_percentiles(spans)}",
    ]
    owner, patients = dataset.owner, pd.factorize(dataset.groups)[0]
    for f in dataset.series_read:
        name, unit, values = dataset.features[f], dataset.units[f], dataset.values[:, f]
        is_measured, text = ~np.isnan(values), "never measured"
        if is_measured.any():
            rows, counts = np.unique(owner[is_measured], return_counts=True)
            text = (
                f"{_percentiles(values[is_measured])}; in {count_patients(patients, rows):,} of "
                f"{dataset.n_patients:,} patients, median {np.median(counts):g} a row with any"
            )
        lines.append(f"{name}{f' [{unit}]' if unit else ''}: {text}")
    return lines


def describe_events(dataset: TrajectoryDataset) -> list[str]:
    """Describe times to events in lines: rows by event, follow-up, censoring; none for labels."""
    about, events, hours = dataset.competing_events, dataset.events, dataset.event_hours
    if about is None or events is None or hours is None or np.isnan(events).all():
        return []
    hours, events = hours[~np.isnan(events)], events[~np.isnan(events)]
    names = enumerate(("censored", *about.names))
    counts = [f"{name} {(events == k).sum():,}" for k, name in names]
    # To at most three digits, as a reader would choose them.
    quartiles = [float(f"{hour:.3g}") for hour in np.quantile(hours, [0.25, 0.5, 0.75])]
    at = np.unique([*about.horizons, *quartiles])
    shares = zip(at.tolist(), uncensored(hours, events, at), strict=True)
    watched = [f"{share:.1%} at {plain(hour)} h" for hour, share in shares]
    return [
        f"rows by event: {', '.join(counts)}",
        f"hours to the event or the end of the record: {_percentiles(hours)}",
        f"still watched, by Kaplan-Meier: {', '.join(watched)}",
    ]


def uncensored(
    hours: NDArray[np.float64], events: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share (n,) not censored by the hours ``at``, had there been no events."""
    times, position = np.unique(hours, return_inverse=True)
    ended, censored = np.bincount(position), np.bincount(position, events == 0)
    # Of equal hours the events come first.
    at_risk = len(hours) - np.cumsum(ended) + censored
    survival = np.cumprod(1 - censored / np.maximum(at_risk, 1))
    return np.append(1.0, survival)[np.searchsorted(times, at, side="right")]


def _percentiles(numbers: NDArray[Any]) -> str:
    low, q1, median, q3, high = np.percentile(numbers, [1, 25, 50, 75, 99])
    return (
        f"median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, 1st to 99th percentile {low:.4g} "
        f"to {high:.4g}"
    )


# --------------------------------------------------------------------------- suspicions


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


def check_prediction_times(dataset: TrajectoryDataset, train: NDArray[np.int64]) -> None:
    """Refuse prediction times that are read where no training patient has one."""
    if dataset.hours_read is not None and np.isnan(dataset.hours_read[train]).all():
        raise InputError(
            f"{dataset.source}: no patient of the training part has a prediction time: fill the "
            "column prediction_hours, or leave it unread by --prediction_time off"
        )


def describe_unusable(unusable: Mapping[str, str]) -> list[str]:
    """Warn of series or static features that no model reads; ``unusable`` says why."""
    return [f"{name} is not read: {reason}" for name, reason in unusable.items()]


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


def describe_cut(lengths: NDArray[Any], groups: NDArray[np.generic], max_len: int) -> str:
    """Describe how many patients lose observations by ``--max_len``; ``lengths`` (N,) are uncut."""
    losing, everyone = count_patients(groups, lengths > max_len), len(np.unique(groups))
    better = int(np.quantile(lengths, 0.99, method="higher"))
    return (
        f"{losing:,} of {everyone:,} patients lose observations, as rows are longer than "
        f"{max_len}: the most recent are kept; --max_len "
        f"{better if better > max_len else lengths.max()} keeps more"
    )


def implausible_series(dataset: TrajectoryDataset) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    warnings = []
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        low, high = dataset.plausible(f)
        values = dataset.values[:, f]
        outside = int(((values < low) | (values > high)).sum())
        value_count = int((~np.isnan(values)).sum())
        if outside:
            is_majority = outside >= MAX_IMPLAUSIBLE * value_count
            advice = "most of them: convert the unit" if is_majority else "is the unit right?"
            warnings.append(
                f"{name}: {outside:,} of {value_count:,} values lie outside {low:g} to {high:g}"
                f"{with_space(unit)}: {advice}"
            )
    return warnings
