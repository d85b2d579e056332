"""What ``check`` says of a data set: a summary, suspicions, and what the data are fit for."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.texts import with_space
from medgemma_clinical.data.trajectories import TrajectoryDataset

logger = logging.getLogger(__name__)


def log_check(dataset: TrajectoryDataset, unfit: str | None = None) -> None:
    """Log the summary of a data set, what looks wrong, and whether it is fit to train on.

    Args:
        dataset: as read, labels not required.
        unfit: why no model can be trained, where that is known already.

    Raises:
        InputError: the rows are labelled, and no model can be trained on them.
    """
    for line in summarize(dataset):
        logger.info(line)
    for line in implausible_series(dataset):
        logger.warning("warning: %s", line)
    if unlabelled := int(np.isnan(dataset.labels).sum()):
        unfit = unfit or f"{unlabelled:,} of {len(dataset):,} rows have no label"
    if unfit:
        logger.info("%s: fit to predict on, not to train on", unfit)
        return
    dataset.check_measured(dataset.split(seed=0)["train"])
    logger.info("fit to train on")


def summarize(dataset: TrajectoryDataset) -> list[str]:
    """Describe a data set in lines: sizes, events, observations, spans, values."""
    known = dataset.labels[~np.isnan(dataset.labels)]
    spans = dataset.times[dataset.offsets[1:] - 1] - dataset.times[dataset.offsets[:-1]]
    share = f" ({known.mean():.1%})" if len(known) else ""
    lines = [
        f"rows {len(dataset):,}, patients {len(np.unique(dataset.groups)):,}",
        f"outcome {dataset.outcome!r}: {int(known.sum()):,} events in {len(known):,} labelled rows"
        f"{share}",
        f"observations a row: {_quartiles(dataset.lengths)}",
        f"span in hours: {_quartiles(spans)}",
    ]
    return lines + [_summarize_feature(dataset, f) for f in range(len(dataset.features))]


def _summarize_feature(dataset: TrajectoryDataset, f: int) -> str:
    name, unit = dataset.features[f], dataset.units[f]
    titled = f"{name} in {unit}" if unit else name
    measured = ~np.isnan(dataset.values[:, f])
    if not measured.any():
        return f"{titled}: never measured"
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    rows, counts = np.unique(owner[measured], return_counts=True)
    share = len(np.unique(dataset.groups[rows])) / len(np.unique(dataset.groups))
    return (
        f"{titled}: {_quartiles(dataset.values[measured, f])}; in {share:.1%} of the patients, "
        f"{np.median(counts):g} values a row with any"
    )


def _quartiles(numbers: NDArray[Any]) -> str:
    # No extremes: they are single patients' values.
    low, q1, median, q3, high = np.quantile(numbers, [0.01, 0.25, 0.5, 0.75, 0.99])
    return (
        f"median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, 98 % within {low:.4g} to {high:.4g}"
    )


def implausible_series(dataset: TrajectoryDataset) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    found = []
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        if count := count_implausible(dataset, f):
            low, high = dataset.plausible(f)
            measured = np.count_nonzero(~np.isnan(dataset.values[:, f]))
            found.append(
                f"{name}: {count:,} of {measured:,} values lie outside {low:g} to "
                f"{high:g}{with_space(unit)}: is the unit right?"
            )
    return found


def count_implausible(dataset: TrajectoryDataset, feature: int) -> int:
    """Count the values of a feature outside its plausible range."""
    low, high = dataset.plausible(feature)
    values = dataset.values[:, feature]
    return int(((values < low) | (values > high)).sum())
