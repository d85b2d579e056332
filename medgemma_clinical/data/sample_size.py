"""Riley's minimum sample size for the development of a model that predicts an event."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.data.summaries import STATISTICS
from medgemma_clinical.data.trajectories import TrajectoryDataset

SHRINKAGE, OPTIMISM, RISK_MARGIN = 0.9, 0.05, 0.05
"""Least shrinkage factor, largest optimism in Nagelkerke's R2, half width of the interval of the
overall risk."""

EXPLAINED = 0.15
"""Share of its maximum that Cox-Snell R2 is taken to reach where no earlier study says more."""


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
