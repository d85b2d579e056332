"""Checks of data for ``check`` and the start of a run: summary, suspicions, verdict."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.findings import flow_lines, log_warnings
from medgemma_clinical.data.leaks import describe_leaks
from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.summaries import STATISTICS
from medgemma_clinical.data.texts import WHOLE_PROMPT, plain, with_space
from medgemma_clinical.data.training_data import Data, describe_long_spans, prepare_data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

SEED = 0  # seed of the logged split; the default of --seed

MIN_COHORT_PATIENTS, MIN_TEST_EVENTS = 100, 10
"""Patients, and patients of the test part with and without the event, below which a check warns:
with fewer, hardly any difference between models is larger than its interval."""

TEST_EVENTS = 200
"""Events of a test part below which folds are suggested. Source: Collins 2016, Stat Med 35:214."""

MAX_IMPLAUSIBLE = 0.5
"""Share of a series' values from which on its unit counts as wrong."""

SHRINKAGE, OPTIMISM, RISK_MARGIN = 0.9, 0.05, 0.05
"""Least shrinkage factor, largest optimism in Nagelkerke's R2, half width of the interval of the
overall risk."""

EXPLAINED = 0.15
"""Share of its maximum that Cox-Snell R2 is taken to reach where no earlier study says more."""


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
        data = prepare_data(dataset, max_samples=0, seed=SEED, prompts=WHOLE_PROMPT)
        logger.info(describe_split(data.dataset, data.split, SEED))
        further = [*describe_unusable(data.unusable_series), *_check_parts(data)]
        log_warnings(further)
        warnings += further
    ready = "ready to predict on" if obstacle else "ready"
    with_warnings = ", with warnings" if warnings or dataset.warnings else ""
    logger.info("%s%s%s", ready, with_warnings, f", {obstacle}" if obstacle else "")


def _check_parts(data: Data) -> list[str]:
    """Log the sample size; warn of a test part of few events, and of suspect inputs."""
    dataset, train, test = data.dataset, data.split["train"], data.split["test"]
    warnings = []
    if minority_patients(dataset.labels[test], dataset.groups[test]) < MIN_TEST_EVENTS:
        problem = f"fewer than {MIN_TEST_EVENTS} patients of the test part have, or lack, the event"
        warnings.append(f"{problem}: its metrics will be undecided")
    logger.info("sample size: %s", describe_sample_size(dataset, data.usable_static, train))
    if dataset.parts is None and dataset.labels[test].sum() < TEST_EVENTS:
        problem = f"fewer than {TEST_EVENTS} events in the test part"
        logger.info("%s: --folds 5 tests the model on each patient once", problem)
    data.check_inputs()
    leaks = describe_leaks(dataset, train, whole_texts=True)
    return [*warnings, *describe_unusable(data.unusable_static), *leaks]


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


def describe_unusable(unusable: Mapping[str, str]) -> list[str]:
    """Warn of series or static features that no model reads; ``unusable`` says why."""
    return [f"{name} is not read: {reason}" for name, reason in unusable.items()]


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


# --------------------------------------------------------------------------- sample size


def sample_sizes(
    predictors: int, prevalence: float, r2: float | None = None
) -> tuple[int, int, int]:
    """Return the patients that shrinkage, optimism and overall risk need; ``r2`` is Cox-Snell's.

    Source: Riley 2020, BMJ 368:m441; Riley 2019, Stat Med 38:1276.
    """
    q = 1 - prevalence
    maximum = 1 - (prevalence**prevalence * q**q) ** 2
    r2 = EXPLAINED * maximum if r2 is None else r2
    factors = SHRINKAGE, r2 / (r2 + OPTIMISM * maximum)
    shrunk, fitted = (predictors / ((s - 1) * math.log(1 - r2 / s)) for s in factors)
    overall = (1.96 / RISK_MARGIN) ** 2 * prevalence * q
    return math.ceil(shrunk), math.ceil(fitted), math.ceil(overall)


def describe_sample_size(
    dataset: TrajectoryDataset, static: Sequence[str], train: NDArray[np.int64]
) -> str:
    """Describe the patients that a logistic regression on series and ``static`` needs and has."""
    unread_series = len(dataset.features) - len(dataset.series_read)
    # Predictors are the columns of the baseline that reads both.
    predictors = len(dataset.summary_names()) - unread_series * len(STATISTICS) + len(static)
    prevalence = float(dataset.labels[train].mean())
    needed, patients = sample_sizes(predictors, prevalence), count_patients(dataset.groups, train)
    return (
        f"a logistic regression on {predictors:,} predictors needs {max(needed):,} patients by "
        f"Riley's criteria (event in {prevalence:.1%}), the training part has {patients:,}"
    )
