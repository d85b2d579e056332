"""What ``check`` says of a data set: a summary, suspicions, and what the data can be used for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients, minority_patients
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


def log_check(dataset: TrajectoryDataset, obstacle: str | None = None) -> None:
    """Log summary and split of a data set, what looks wrong, and whether it is ready.

    Args:
        dataset: as read, labels not required.
        obstacle: why no model can be trained, where that is known already.

    Raises:
        InputError: the rows are labelled, and no model can be trained on them.
    """
    for line in summarize(dataset):
        logger.info(line)
    warnings = [*implausible_series(dataset), *describe_long_spans(dataset)]
    if dataset.n_patients < FEWEST_PATIENTS:
        few = f"fewer than {FEWEST_PATIENTS} patients"
        warnings.append(f"{few}: metrics of a model will be undecided")
    log_warnings(warnings)
    if not obstacle and (unlabelled := int(np.isnan(dataset.labels).sum())):
        rows = f"{unlabelled:,} of {len(dataset):,} rows have no label"
        obstacle = f"not to train on: {rows}: fill or remove these rows"
        obstacle = "no labels to train on" if unlabelled == len(dataset) else obstacle
    if not obstacle:
        split = dataset.split(SEED)
        logger.info(describe_split(dataset, split, SEED))
        dataset.check_measured(split["train"])
        warnings += (found := _check_parts(dataset, split))
        log_warnings(found)
    ready = "ready to predict on" if obstacle else "ready"
    with_warnings = ", with warnings" if warnings or dataset.warnings else ""
    logger.info("%s%s%s", ready, with_warnings, f", {obstacle}" if obstacle else "")


def log_warnings(warnings: Iterable[str]) -> None:
    """Log each as a warning."""
    for line in warnings:
        logger.warning("warning: %s", line)


def _check_parts(dataset: TrajectoryDataset, split: dict[str, NDArray[np.int64]]) -> list[str]:
    """Warn of a test part of few events, and of inputs of few training patients."""
    train, test, warnings = split["train"], split["test"], []
    if minority_patients(dataset.labels[test], dataset.groups[test]) < FEWEST_TEST_EVENTS:
        few = f"fewer than {FEWEST_TEST_EVENTS} patients of the test part have, or lack, the event"
        warnings.append(f"{few}: its metrics will be undecided")
    known = dataset.prediction_hours is not None
    unusable = dataset.unusable_static(train)
    names = [name for name in dataset.static_names if name not in unusable]
    read = dataset.with_inputs(names, prediction_time=known)
    few_behind = describe_few_patients(read.patients_behind(train))
    return [*warnings, *few_behind, *describe_unusable(unusable)]


def describe_split(
    dataset: TrajectoryDataset, split: dict[str, NDArray[np.int64]], seed: int
) -> str:
    """Return rows, patients and events of each part."""
    shown = []
    for part, rows in split.items():
        patients = count_patients(dataset.groups, rows)
        counts = {"row": len(rows), "patient": patients, "event": int(dataset.labels[rows].sum())}
        shown.append(f"{part} {', '.join(_plural(n, noun) for noun, n in counts.items())}")
    how = f"drawn by --seed {seed}" if dataset.parts is None else "of the column split"
    return f"split {how}: {'; '.join(shown)}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def flow_lines(flow: pd.DataFrame) -> list[str]:
    """Return a flow (columns rule, removed, left), without the rules that remove nothing."""
    return [
        f"{removed:>15,} out, {left:>9,} left: {rule}"
        for rule, removed, left in flow[["rule", "removed", "left"]].itertuples(index=False)
        if removed
    ]


def summarize(dataset: TrajectoryDataset) -> list[str]:
    """Describe a data set in lines: flow, sizes, events, observations, spans, values."""
    known = dataset.labels[~np.isnan(dataset.labels)]
    events = "no labels"
    if len(known):
        labelled = f"{_plural(len(known), 'labelled row')} ({known.mean():.1%})"
        events = f"{_plural(int(known.sum()), 'event')} in {labelled}"
    spans = dataset.times[dataset.offsets[1:] - 1] - dataset.times[dataset.offsets[:-1]]
    return [
        *([] if dataset.flow is None else flow_lines(dataset.flow)),
        f"rows {len(dataset):,}, patients {dataset.n_patients:,}",
        f"outcome {dataset.outcome!r}: {events}",
        f"observations a row: {_percentiles(dataset.lengths)}",
        f"span in hours: {_percentiles(spans)}",
        *(_summarize_feature(dataset, f) for f in range(len(dataset.features))),
    ]


def _summarize_feature(dataset: TrajectoryDataset, f: int) -> str:
    name, unit = dataset.features[f], dataset.units[f]
    titled = f"{name} [{unit}]" if unit else name
    measured = ~np.isnan(dataset.values[:, f])
    if not measured.any():
        return f"{titled}: never measured"
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    rows, counts = np.unique(owner[measured], return_counts=True)
    patients, everyone = count_patients(dataset.groups, rows), dataset.n_patients
    return (
        f"{titled}: {_percentiles(dataset.values[measured, f])}; in {patients:,} of {everyone:,} "
        f"patients, {np.median(counts):g} values a row with any"
    )


def _percentiles(numbers: NDArray[Any]) -> str:
    low, q1, median, q3, high = np.percentile(numbers, [1, 25, 50, 75, 99])
    return (
        f"median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, 1st to 99th percentile {low:.4g} "
        f"to {high:.4g}"
    )


def describe_long_spans(dataset: TrajectoryDataset) -> list[str]:
    """Warn of a time scale that nobody chose and that is far below the span of most rows."""
    if not dataset.assumed_time_scale:
        return []
    median = float(np.median(dataset.prediction_times() - dataset.times[dataset.offsets[:-1]]))
    scale, better = dataset.time_scale, f"{float(f'{median:.2g}'):.0f}"
    if median <= LONGEST_SPAN * scale:
        return []
    return [
        f"the median span of a row, {median:,.0f} h, is beyond {LONGEST_SPAN} time scales of "
        f"{scale:g} h, which makes very many solver steps: train with --time_scale {better}, or "
        f'write "time_scale": {better} in the JSON file beside the data'
    ]


def describe_unusable(unusable: dict[str, str]) -> list[str]:
    """Warn of static features that no model reads, by ``TrajectoryDataset.unusable_static``."""
    return [f"{name} is not read: {reason}" for name, reason in unusable.items()]


def describe_few_patients(patients: dict[str, dict[str, int]]) -> list[str]:
    """Warn of inputs of so few training patients that their mean, which weights keep, is theirs.

    Args:
        patients: as from ``TrajectoryDataset.patients_behind``.
    """
    behind = {**patients["series"], **patients["static"]}
    if not (few := [name for name, count in behind.items() if 0 < count < MIN_CELL]):
        return []
    return [
        f"fewer than {MIN_CELL} training patients have {', '.join(few)}: the weights keep "
        f"{'its mean' if len(few) == 1 else 'their means'}, and push_to_hub refuses such a model"
    ]


def describe_cut(lengths: NDArray[Any], groups: NDArray[np.generic], most: int) -> str:
    """Describe how many patients lose observations by ``--max_len``, and how to keep them.

    Args:
        lengths: (N,) observations of each row as it stands in the file.
        groups: (N,) patient of each row.
        most: observations that are kept; some row has more.
    """
    losing, everyone = count_patients(groups, lengths > most), len(np.unique(groups))
    better = int(np.quantile(lengths, 0.99, method="higher"))
    return (
        f"{losing:,} of {everyone:,} patients lose observations, as rows are longer than {most}: "
        f"the most recent are kept; --max_len {better if better > most else lengths.max()} keeps "
        "more"
    )


def implausible_series(dataset: TrajectoryDataset) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    found = []
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        low, high = dataset.plausible(f)
        values = dataset.values[:, f]
        outside = int(((values < low) | (values > high)).sum())
        measured = int((~np.isnan(values)).sum())
        if outside:
            most = outside >= MOST_IMPLAUSIBLE * measured
            advice = "most of them: convert the unit" if most else "is the unit right?"
            found.append(
                f"{name}: {outside:,} of {measured:,} values lie outside {low:g} to {high:g}"
                f"{with_space(unit)}: {advice}"
            )
    return found
