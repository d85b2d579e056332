"""What ``check`` says of a data set: a summary, suspicions, and what the data are fit for."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import (
    count_text,
    flow_lines,
    is_small,
    patient_quantiles,
    rarer_patients,
)
from medgemma_clinical.data.texts import with_space
from medgemma_clinical.data.trajectories import TrajectoryDataset

logger = logging.getLogger(__name__)


def log_check(dataset: TrajectoryDataset, fewest: int, unfit: str | None = None) -> None:
    """Log the summary of a data set, what looks wrong, and whether it is fit to train on.

    Args:
        dataset: as read, labels not required.
        fewest: patients of the smallest cell that is shown.
        unfit: why no model can be trained, where that is known already.

    Raises:
        InputError: the rows are labelled, and no model can be trained on them.
    """
    for line in summarize(dataset, fewest):
        logger.info(line)
    for line in implausible_series(dataset, fewest):
        logger.warning("warning: %s", line)
    if unlabelled := int(np.isnan(dataset.labels).sum()):
        without = count_text(unlabelled, fewest)
        unfit = unfit or f"{without} of {len(dataset):,} rows have no label"
    if unfit:
        logger.info("%s: fit to predict on, not to train on", unfit)
        return
    dataset.check_measured(dataset.split(seed=0)["train"], fewest)
    logger.info("fit to train on")


def summarize(dataset: TrajectoryDataset, fewest: int, *, events: bool = True) -> list[str]:
    """Describe a data set in lines: flow, sizes, events, observations, spans, values.

    Args:
        dataset: as read.
        fewest: patients of the smallest cell that is shown.
        events: False hides the number of events all the same, for it would tell that of a part.
    """
    labelled = ~np.isnan(dataset.labels)
    known, groups = dataset.labels[labelled], dataset.groups[labelled]
    spans = dataset.times[dataset.offsets[1:] - 1] - dataset.times[dataset.offsets[:-1]]
    share = f" ({known.mean():.1%})" if len(known) else ""
    counted = f"{int(known.sum()):,} events in {len(known):,} labelled rows{share}"
    if not events or is_small(rarer_patients(known, groups), fewest):
        counted = "number of events not shown"
    elif is_small(len(dataset) - len(known), fewest):
        counted = f"{int(known.sum()):,} events"
    lines = [] if dataset.flow is None else flow_lines(dataset.flow, fewest)
    lines += [
        f"rows {len(dataset):,}, patients {count_text(dataset.n_patients, fewest)}",
        f"outcome {dataset.outcome!r}: {counted}",
    ]
    patient = np.unique(dataset.groups, return_inverse=True)[1]  # numbers are counted faster
    if not is_small(dataset.n_patients, fewest):
        lines += [
            f"observations a row: {_quartiles(dataset.lengths, patient, fewest)}",
            f"span in hours: {_quartiles(spans, patient, fewest)}",
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
    share = f"{patients / everyone:.1%} of the patients"
    if is_small(everyone - patients, fewest):
        share = f"all patients but fewer than {fewest}"
    return (
        f"{titled}: {_quartiles(dataset.values[measured, f], owners, fewest)}; in {share}, "
        f"{np.median(counts):g} values a row with any"
    )


def _quartiles(numbers: NDArray[Any], groups: NDArray[np.int64], fewest: int) -> str:
    """Describe the patients' numbers by quantiles, each with ``fewest`` patients beyond."""
    beyond = max(0.01, fewest / len(np.unique(groups)))
    if beyond > 0.5:
        return "too few patients for a median"
    shares = [beyond, 0.25, 0.5, 0.75, 1 - beyond]
    low, q1, median, q3, high = patient_quantiles(numbers, groups, shares)
    text = f"median {median:.4g}"
    if beyond <= 0.25:
        text += f", quartiles {q1:.4g} to {q3:.4g}"
        text += f", {100 * (1 - 2 * beyond):.0f} % within {low:.4g} to {high:.4g}"
    return text


def implausible_series(dataset: TrajectoryDataset, fewest: int) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    found = []
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        if count := count_implausible(dataset, f):
            low, high = dataset.plausible(f)
            measured = np.count_nonzero(~np.isnan(dataset.values[:, f]))
            shown = f"{count_text(count, fewest)} of {measured:,} values"
            found.append(
                f"{name}: {shown} lie outside {low:g} to {high:g}{with_space(unit)}: is the unit "
                "right?"
            )
    return found


def count_implausible(dataset: TrajectoryDataset, feature: int) -> int:
    """Count the values of a feature outside its plausible range."""
    low, high = dataset.plausible(feature)
    values = dataset.values[:, feature]
    return int(((values < low) | (values > high)).sum())
