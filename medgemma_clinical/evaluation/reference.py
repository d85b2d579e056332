"""A model's calibration on rows that it did not learn from, kept with its weights.

Later rows are compared with it. Each number stands for at least ``MIN_CELL`` patients with, and
without, the event.
"""

from __future__ import annotations

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
from medgemma_clinical.evaluation.metrics import LOGIT, Array, Known, log_odds

DECILES = np.arange(0.1, 0.95, 0.1)


def reference(known: Known, risk: Array, patients: NDArray[np.generic]) -> dict[str, Any] | None:
    """Return the logistic fit of what is known on the log-odds of risks as they are delivered.

    ``shift``, ``multiplier``, their ``covariance``, clustered by patient; ``edges`` of groups of
    the risk, deciles as far as each group is large enough; None where patients are few or no fit is
    finite.
    """
    has_status = known.weights[0] > 0
    case, odds, weights = known.case[has_status], log_odds(risk), known.weights
    if minority_patients(case, patients[has_status]) < MIN_CELL:
        return None
    labels = Known(known.case, weights, weights, known.case, weights, LOGIT)
    fit = np.array([x.item() for x in labels.fit_line(risk)[::-1]])
    if not np.isfinite(fit).all():
        return None
    columns, none = np.stack([np.ones_like(odds), odds]), np.zeros_like(odds)
    covariance, _ = clustered_covariance(known.case, columns, none, weights[0], patients, fit)
    edges = [float(f"{edge:.3g}") for edge in np.quantile(risk, DECILES)]
    shift, multiplier = (_rounded(x) for x in fit)
    return {
        "patients": count_patients(patients, has_status),
        "shift": shift,
        "multiplier": multiplier,
        "covariance": [[_rounded(x) for x in line] for line in covariance],
        "edges": large_bins(case, risk[has_status], patients[has_status], MIN_CELL, edges),
    }


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")  # enough for any limit, and a label less
