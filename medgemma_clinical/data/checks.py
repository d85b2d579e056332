"""What ``check`` says of a data set: a summary, suspicions, and what the data can be used for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.facts import unusable_facts
from medgemma_clinical.data.small_cells import (
    FEWEST,
    count_patients,
    count_text,
    flow_lines,
    has_few_events,
    hides_events,
    is_small,
    patient_quantiles,
    rarer_patients,
    share_text,
)
from medgemma_clinical.data.splits import is_rare_when_drawn
from medgemma_clinical.data.texts import with_space
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

SEED = 0
"""Of the split that is shown; the default of ``--seed``."""

FEWEST_PATIENTS, FEWEST_TEST_EVENTS = 100, 10
"""Patients, and patients of the test part with and without the event, below which a check warns:
with fewer, hardly any difference between models is larger than its interval."""

LONGEST_SPAN = 10
"""Median span in time scales beyond which a time scale that nobody chose does not fit."""

MOST_IMPLAUSIBLE = 0.5
"""Share of a series' values from which on its unit counts as wrong."""


@contextlib.contextmanager
def log_refusal() -> Iterator[None]:
    """Log the verdict on data that cannot be used.

    Raises:
        InputError: that of the block.
    """
    try:
        yield
    except InputError:
        logger.info("not ready")
        raise


def log_check(dataset: TrajectoryDataset, fewest: int, obstacle: str | None = None) -> None:
    """Log summary and split of a data set, what looks wrong, and whether it is ready.

    Args:
        dataset: as read, labels not required.
        fewest: patients of the smallest cell that is shown.
        obstacle: why no model can be trained, where that is known already.

    Raises:
        InputError: the rows are labelled, and no model can be trained on them.
    """
    labels, groups = dataset.labels, dataset.groups
    obstacle = obstacle or _describe_unlabelled(np.isnan(labels), groups, fewest)
    split, problem, hidden = {}, None, False
    try:
        split = {} if obstacle else dataset.split(SEED)
        if split:
            hidden = has_few_events(labels, groups, split, fewest)
            dataset.check_measured(split["train"], fewest)
    except InputError as error:  # raised below the summary, which shows why
        problem = error
        hidden = hidden or is_rare_when_drawn(labels, groups, fewest)
    for line in summarize(dataset, fewest, events=not hidden):
        logger.info(line)
    if split:
        logger.info(describe_split(dataset, split, fewest, events=not hidden))
    warnings = [*implausible_series(dataset, fewest), *_too_few(dataset, split, fewest)]
    warnings += describe_long_spans(dataset, fewest)
    if split:
        warnings += describe_unusable_facts(dataset, split["train"], fewest)
    for line in warnings:
        logger.warning("warning: %s", line)
    if problem:
        raise problem
    ready = "ready to predict on" if obstacle else "ready"
    with_warnings = ", with warnings" if warnings or dataset.warnings else ""
    logger.info("%s%s%s", ready, with_warnings, f", {obstacle}" if obstacle else "")


def _describe_unlabelled(
    unlabelled: NDArray[np.bool_], groups: NDArray[np.str_], fewest: int
) -> str | None:
    """Return why rows without a label, (N,), keep a model from being trained."""
    if not unlabelled.any():
        return None
    if unlabelled.all():
        return "no labels to train on"
    rows = share_text(unlabelled, groups, fewest, "rows")
    return f"not to train on: {rows} have no label: fill or remove these rows"


def describe_split(
    dataset: TrajectoryDataset, split: dict[str, NDArray[np.int64]], fewest: int, *, events: bool
) -> str:
    """Return rows, patients and events of each part, or that a part is too small to be shown.

    Args:
        dataset: with labels.
        split: positions of each part.
        fewest: patients of the smallest cell that is shown.
        events: whether the numbers of events are shown; those of one part reveal the others'.
    """
    how = f"drawn by --seed {SEED}" if dataset.parts is None else "of the column split"
    patients = {part: count_patients(dataset.groups, rows) for part, rows in split.items()}
    if any(is_small(count, fewest) for count in patients.values()):
        return f"split {how}: not shown, a part has fewer than {fewest} patients"
    shown = []
    for part, rows in split.items():
        counted = f"{part} {_plural(len(rows), 'row')}, {_plural(patients[part], 'patient')}"
        happened = _plural(int(dataset.labels[rows].sum()), "event")
        shown.append(counted + (f", {happened}" if events else ""))
    hidden = "" if events else "; number of events not shown"
    return f"split {how}: {'; '.join(shown)}{hidden}"


def _too_few(
    dataset: TrajectoryDataset, split: dict[str, NDArray[np.int64]], fewest: int
) -> list[str]:
    """Warn of few patients; not by limits below ``fewest``, which would reveal hidden numbers."""
    warnings = []
    if dataset.n_patients < (limit := max(FEWEST_PATIENTS, fewest)):
        warnings.append(f"fewer than {limit} patients: figures of a model will be undecided")
    if split:
        rows, limit = split["test"], max(FEWEST_TEST_EVENTS, fewest)
        if rarer_patients(dataset.labels[rows], dataset.groups[rows]) < limit:
            few = f"fewer than {limit} patients of the test part have, or lack, the event"
            warnings.append(f"{few}: its figures will be undecided")
    return warnings


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def summarize(dataset: TrajectoryDataset, fewest: int, *, events: bool = True) -> list[str]:
    """Describe a data set in lines: flow, sizes, events, observations, spans, values.

    Args:
        dataset: as read.
        fewest: patients of the smallest cell that is shown.
        events: False hides the number of events all the same, as it would reveal that of a part.
    """
    labelled = ~np.isnan(dataset.labels)
    known, groups = dataset.labels[labelled], dataset.groups[labelled]
    counted = _plural(int(known.sum()), "event")
    if not len(known):
        counted = "no labels"
    elif not events or hides_events(known, groups, fewest):
        counted = "number of events not shown"
    elif not is_small(count_patients(dataset.groups, ~labelled), fewest):
        counted += f" in {_plural(len(known), 'labelled row')} ({known.mean():.1%})"
    lines = [] if dataset.flow is None else flow_lines(dataset.flow, fewest)
    lines += [
        f"rows {count_text(len(dataset), fewest)}, "
        f"patients {count_text(dataset.n_patients, fewest)}",
        f"outcome {dataset.outcome!r}: {counted}",
    ]
    patient = np.unique(dataset.groups, return_inverse=True)[1]  # numbers are counted faster
    if not is_small(dataset.n_patients, fewest):
        beyond = fewest / dataset.n_patients
        lines += [
            f"observations a row: {_quartiles(dataset.lengths, patient, beyond)}",
            f"span in hours: {_quartiles(_spans(dataset), patient, beyond)}",
        ]
    features = range(len(dataset.features))
    return lines + [_summarize_feature(dataset, patient, f, fewest) for f in features]


def _summarize_feature(
    dataset: TrajectoryDataset, patient: NDArray[np.int64], f: int, fewest: int
) -> str:
    name, unit = dataset.features[f], dataset.units[f]
    titled = f"{name} in {unit}" if unit else name
    measured = ~np.isnan(dataset.values[:, f])
    if not measured.any():
        return f"{titled}: never measured"
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    counts = np.unique(owner[measured], return_counts=True)[1]
    owners = patient[owner[measured]]
    patients, everyone = len(np.unique(owners)), dataset.n_patients
    if is_small(patients, fewest):
        return f"{titled}: in fewer than {fewest} patients"
    share, least = f"{patients / everyone:.1%} of the patients", patients
    if is_small(everyone - patients, fewest):
        # The share within the quantiles must not reveal the number of the other patients.
        share, least = f"all patients but fewer than {fewest}", max(1, everyone - fewest + 1)
    return (
        f"{titled}: {_quartiles(dataset.values[measured, f], owners, fewest / least)}; in {share}, "
        f"{np.median(counts):g} values a row with any"
    )


def _quartiles(numbers: NDArray[Any], groups: NDArray[np.int64], beyond: float) -> str:
    """Describe the patients' numbers by quantiles, each with a share of the patients beyond."""
    beyond = max(0.01, beyond)
    if beyond > 0.5:
        return "too few patients for a median"
    shares = [beyond, 0.25, 0.5, 0.75, 1 - beyond]
    low, q1, median, q3, high = patient_quantiles(numbers, groups, shares)
    text = f"median {median:.4g}"
    if beyond <= 0.25:
        text += f", quartiles {q1:.4g} to {q3:.4g}"
        text += f", {100 * (1 - 2 * beyond):.0f} % within {low:.4g} to {high:.4g}"
    return text


def _spans(dataset: TrajectoryDataset) -> NDArray[np.float64]:
    """Return the hours from the first to the last observation of each row, (N,)."""
    return dataset.times[dataset.offsets[1:] - 1] - dataset.times[dataset.offsets[:-1]]


def describe_long_spans(dataset: TrajectoryDataset, fewest: int) -> list[str]:
    """Warn of a time scale that nobody chose and that is far below the span of most rows.

    Args:
        dataset: as read.
        fewest: patients of the smallest cell that is shown; a median needs as many on both sides.
    """
    if not dataset.assumed_time_scale or dataset.n_patients < max(1, 2 * fewest):
        return []
    spans = dataset.prediction_times() - dataset.times[dataset.offsets[:-1]]
    (median,) = patient_quantiles(spans, dataset.groups, [0.5])
    scale, better = dataset.time_scale, f"{float(f'{median:.2g}'):.0f}"
    if median <= LONGEST_SPAN * scale:
        return []
    return [
        f"the median span of a row, {median:,.0f} h, is beyond {LONGEST_SPAN} time scales of "
        f"{scale:g} h, which makes very many solver steps: train with --time_scale {better}, or "
        f'write "time_scale": {better} in the JSON file beside the data'
    ]


def describe_unusable_facts(
    dataset: TrajectoryDataset, train: NDArray[np.int64], fewest: int
) -> list[str]:
    """Warn of declared facts that no model reads.

    Args:
        dataset: as read.
        train: positions of the training part.
        fewest: patients that a fact needs, see ``facts.unusable_facts``.
    """
    part = dataset.subset(train)
    unusable = unusable_facts(part.fact_table(part.static_names), part.groups, fewest)
    return [f"the fact {name} is not read: {reason}" for name, reason in unusable.items()]


def describe_cut(lengths: NDArray[Any], groups: NDArray[np.generic], most: int) -> str:
    """Describe how many patients lose observations by ``--max_len``, and how to keep them.

    Args:
        lengths: (N,) observations of each row as it stands in the file.
        groups: (N,) patient of each row.
        most: observations that are kept; some row has more.
    """
    patient = np.unique(groups, return_inverse=True)[1]  # numbers are counted faster
    everyone, losing = int(patient.max()) + 1, count_patients(patient, lengths > most)
    shown = count_text(losing, FEWEST)
    if not is_small(losing, FEWEST) and is_small(everyone - losing, FEWEST):
        shown = f"all but fewer than {FEWEST}"
    longer = "a larger --max_len"
    share = 1 - FEWEST / everyone  # not 1: the longest row is a patient's own number
    if share > 0 and (better := patient_quantiles(lengths, patient, [min(0.99, share)])[0]) > most:
        longer = f"--max_len {better}"
    return (
        f"{shown} of {count_text(everyone, FEWEST)} patients lose observations, as rows are longer "
        f"than {most}: the most recent are kept; {longer} keeps more"
    )


def implausible_series(dataset: TrajectoryDataset, fewest: int) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    found = []
    patient = np.unique(dataset.groups, return_inverse=True)[1]  # numbers are counted faster
    patient = np.repeat(patient, dataset.lengths)
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        low, high = dataset.plausible(f)
        measured = ~np.isnan(dataset.values[:, f])
        values, owners = dataset.values[measured, f], patient[measured]
        outside = (values < low) | (values > high)
        if outside.any():
            shown = share_text(outside, owners, fewest, "values")
            most = outside.mean() >= MOST_IMPLAUSIBLE
            advice = "most of them: convert the unit" if most else "is the unit right?"
            found.append(
                f"{name}: {shown} lie outside {low:g} to {high:g}{with_space(unit)}: {advice}"
            )
    return found
