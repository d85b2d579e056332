"""Simulated patients with known risks, cohorts of them, and the coverage of intervals."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from medgemma_clinical.evaluation.bootstrap import Figures, bootstrap, estimate
from medgemma_clinical.evaluation.calibration import weighted_calibration
from medgemma_clinical.evaluation.cohort import Cohort
from medgemma_clinical.evaluation.metrics import (
    net_benefit,
    threshold_shares,
    weighted_metrics,
    weighted_shares,
)

Simulated = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Labels, risks and patients of some rows."""

POPULATION = 300_000
"""Rows whose figures are taken for the truth."""


def ones(rows: int) -> NDArray[np.float64]:
    return np.ones((1, rows))


def simulate(
    rng: np.random.Generator, rows: int, *, rows_a_patient: int = 1, slope: float = 1.0
) -> Simulated:
    """Draw labels, risks and patients; the risks' log-odds are ``slope`` times the true ones."""
    patients = rows // rows_a_patient
    shared = rng.normal(size=patients).repeat(rows_a_patient)
    odds = -0.8 + 0.9 * shared + 0.6 * rng.normal(size=rows)
    labels = (rng.random(rows) < expit(odds)).astype(float)
    return labels, expit(slope * odds), np.arange(patients).repeat(rows_a_patient).astype(str)


def make_cohort(simulated: Simulated, **baselines: NDArray[Any]) -> Cohort:
    """Name patients and rows so that a page can be searched for them; two subgroups by size."""
    labels, risk, groups = simulated
    rows = len(labels)
    size = np.where(np.arange(rows) < 15, "few", "many")
    return Cohort(
        labels,
        risk,
        np.char.add("MARKER-patient-", groups),
        np.char.add("MARKER-row-", np.arange(rows).astype(str)),
        pd.DataFrame({"size": pd.Categorical(size, ["few", "many", "none"], ordered=True)}),
        {name.replace("_", " "): values for name, values in baselines.items()},
    )


def all_figures(labels: Any, risk: Any, weights: Any) -> Figures:
    """Compute every kind of figure that has an interval."""
    shares = threshold_shares(labels, risk, 0.35)
    return {
        **weighted_metrics(labels, risk, weights),
        **weighted_calibration(labels, risk, weights),
        **weighted_shares(shares, weights),
        "benefit": net_benefit(labels, risk, np.array([0.3]), weights)[:, 0],
    }


def coverage(sets: int, rows: int, rows_a_patient: int, seed: int) -> dict[str, float]:
    """Return, by kind of figure, the share of data sets whose interval holds the truth."""
    rng = np.random.default_rng(seed)
    labels, risk, _ = simulate(rng, POPULATION, rows_a_patient=rows_a_patient)
    truth = {name: each[0] for name, each in all_figures(labels, risk, ones(POPULATION)).items()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(sets):
        labels, risk, groups = simulate(rng, rows, rows_a_patient=rows_a_patient)
        draws = bootstrap(labels, groups, 0, partial(all_figures, labels, risk))
        for name, replicates in draws.items():
            score = estimate(0.0, replicates)
            assert score.low is not None
            assert score.high is not None
            covered[name] += int(score.low <= truth[name] <= score.high)
    return {name: count / sets for name, count in covered.items()}
