"""The risk of each patient after each of their observations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.inference.scoring import score_rows
from medgemma_clinical.models.trained_model import TrainedModel

ROWS_AT_ONCE = 500
"""Rows whose beginnings are in memory at a time."""


def risk_over_time(
    rows: ScoringRows, trained: TrainedModel, findings: Findings, batch_size: int
) -> Iterator[pd.DataFrame]:
    """Score each row as it was known after each of its observations.

    With a language model each beginning of a row is a prompt of its own, so that a row costs a call
    for each observation. Facts and context are those of the whole row.

    Args:
        rows: all of which can be read.
        trained: of any stage.
        findings: strict.
        batch_size: rows a batch.

    Yields:
        Lines of id, hours on the row's clock, probability; see ``TrajectoryModel.risk_over_time``.

    Raises:
        InputError: a row cannot be scored.
    """
    dataset = rows.dataset.with_inputs(**trained.config["inputs"])
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        part = dataset.subset(np.arange(start, min(start + ROWS_AT_ONCE, len(dataset))))
        beginnings, owner = beginnings_of(part)
        ids, numbers = rows.ids[start + owner], rows.numbers[start + owner]
        asked = ScoringRows(ids, numbers, beginnings, np.arange(len(owner)), rows.read)
        scores = score_rows(asked, trained, findings, batch_size)
        hours = beginnings.prediction_times()
        yield pd.DataFrame({"id": ids, "hours": hours, "probability": scores.probability})


def beginnings_of(
    dataset: TrajectoryDataset,
) -> tuple[TrajectoryDataset, NDArray[np.int64]]:
    """Return each series up to each of its observations, and the series that each comes from.

    The question is asked at the last observation of a beginning. Where a prediction time is read
    that lies behind the last observation of the whole series, the whole is repeated with that time.

    Args:
        dataset: N series with the inputs of a model.

    Returns:
        The beginnings, M in the order of the series and of time; (M,) positions in ``dataset``.
    """
    last = dataset.times[dataset.offsets[1:] - 1]
    later = dataset.prediction_times() > last  # (N,)
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths + later)
    first = np.concatenate([[0], np.cumsum(dataset.lengths + later)])[owner]
    size = np.minimum(np.arange(len(owner)) - first + 1, dataset.lengths[owner])
    is_whole = np.arange(len(owner)) - first == dataset.lengths[owner]
    beginnings = dataset.subset(owner)
    place = np.arange(len(beginnings.times)) - np.repeat(
        beginnings.offsets[:-1], beginnings.lengths
    )
    beginnings.keep_observations(place < np.repeat(size, beginnings.lengths))
    if beginnings.prediction_hours is not None:
        ends = beginnings.times[beginnings.offsets[1:] - 1]
        unknown = np.isnan(beginnings.prediction_hours)
        beginnings.prediction_hours = np.where(
            is_whole | unknown, beginnings.prediction_hours, ends
        )
    return beginnings, owner
