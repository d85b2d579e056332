"""Made-up patients with known risks, and how often intervals of their figures hold the truth."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import medgemma_trainer as trainer

Drawn = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Labels, risks and patients of some rows."""

POPULATION = 900_000
"""Rows whose figures are taken for the truth."""


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def ones(rows: int) -> NDArray[np.float64]:
    return np.ones((1, rows))


def drawn(rng: np.random.Generator, rows: int, *, a_patient: int = 1, sure: float = 1.0) -> Drawn:
    """Draw labels, risks and patients; the risks' log-odds are ``sure`` times the true ones."""
    patients = rows // a_patient
    shared = rng.normal(size=patients).repeat(a_patient)
    told = -0.8 + 0.9 * shared + 0.6 * rng.normal(size=rows)
    labels = (rng.random(rows) < sigmoid(told)).astype(float)
    return labels, sigmoid(sure * told), np.arange(patients).repeat(a_patient).astype(str)


def asked(labels: Any, risk: Any, weights: Any) -> trainer.Figures:
    """Every kind of figure that a report gives an interval."""
    place = trainer.threshold_shares(labels, risk, 0.35)
    benefit = trainer.weighted_benefit(labels, risk, np.array([0.3]), weights)[:, 0]
    return {
        **trainer.weighted_metrics(labels, risk, weights),
        **trainer.weighted_calibration(labels, risk, weights),
        **trainer.weighted_shares(place, weights),
        "benefit": benefit,
    }


def coverage(sets: int, rows: int, a_patient: int, seed: int) -> dict[str, float]:
    """Give, for each kind of figure, the share of data sets whose interval holds the truth."""
    rng = np.random.default_rng(seed)
    labels, risk, _ = drawn(rng, POPULATION, a_patient=a_patient)
    truth = {name: each[0] for name, each in asked(labels, risk, ones(POPULATION)).items()}
    covered = dict.fromkeys(truth, 0)
    for _ in range(sets):
        labels, risk, groups = drawn(rng, rows, a_patient=a_patient)
        draws = trainer.bootstrap(labels, groups, 0, partial(asked, labels, risk))
        for name, replicates in draws.items():
            score = trainer.estimate(0.0, replicates)
            assert score["low"] is not None
            assert score["high"] is not None
            covered[name] += int(score["low"] <= truth[name] <= score["high"])
    return {name: count / sets for name, count in covered.items()}
