"""A model's calibration on rows that it did not learn from, kept with its weights.

Later rows are compared with it. Each number stands for at least ``MIN_CELL`` patients with, and
without, the event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import (
    MIN_CELL,
    count_patients,
    large_bins,
    minority_patients,
)
from medgemma_clinical.evaluation.decision import clustered_covariance
from medgemma_clinical.evaluation.metrics import Array, calibration, log_odds

DECILES = np.arange(0.1, 0.95, 0.1)


def reference(labels: Array, risk: Array, patients: NDArray[np.generic]) -> dict[str, Any] | None:
    """Return the logistic fit of labels (n,) on the log-odds of risks as they are delivered.

    ``intercept``, ``slope``, their ``covariance``, clustered by patient; ``edges`` of groups of the
    risk, deciles as far as each group is large enough; None where patients are few or no fit is
    finite.
    """
    if minority_patients(labels, patients) < MIN_CELL:
        return None
    fitted = calibration(labels, risk, np.ones((1, len(labels))))
    fit = np.array([fitted[f"calibration_{name}"].item() for name in ("intercept", "slope")])
    if not np.isfinite(fit).all():
        return None
    odds = log_odds(risk)
    columns = np.stack([np.ones_like(odds), odds])
    covariance, _ = clustered_covariance(labels, columns, np.zeros_like(odds), patients, fit)
    edges = [float(f"{edge:.3g}") for edge in np.quantile(risk, DECILES)]
    intercept, slope = (_rounded(x) for x in fit)
    return {
        "patients": count_patients(patients, slice(None)),
        "intercept": intercept,
        "slope": slope,
        "covariance": [[_rounded(x) for x in line] for line in covariance],
        "edges": large_bins(labels, risk, patients, MIN_CELL, edges),
    }


def check_reference(entry: Mapping[str, Any]) -> None:
    """Raise an error of any type unless an entry has the form that ``reference`` gives it."""
    fit = [entry[name] for name in ("intercept", "slope", "patients")]
    finite = [np.isfinite(numbers) for numbers in (fit, entry["covariance"], entry["edges"])]
    shapes = [np.shape(numbers) for numbers in finite]
    if shapes[:2] != [(3,), (2, 2)] or len(shapes[2]) != 1 or shapes[2] > DECILES.shape:
        raise ValueError("numbers of another shape")
    if not all(numbers.all() for numbers in finite):
        raise ValueError("numbers that are not finite")


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")  # enough for any limit, and a label less
