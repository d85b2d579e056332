"""Calibration: an unpenalised logistic fit, and what no fit exists for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from cohorts import ones, simulate
from medgemma_clinical.evaluation.calibration import (
    calibration_bins,
    log_odds,
    weighted_calibration,
)


def logistic_fit(odds: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept of scikit-learn's logistic regression without penalty."""
    fit = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    fit.fit(odds[:, None], labels)
    return fit.coef_[0, 0], fit.intercept_[0]


@pytest.mark.parametrize("seed", range(2))
def test_calibration_is_an_unpenalised_logistic_fit(seed: int) -> None:
    labels, risk, _ = simulate(np.random.default_rng(seed), 300, slope=0.5 + seed)
    odds = np.log(risk / (1 - risk))
    slope, intercept = logistic_fit(odds, labels)
    found = weighted_calibration(labels, risk, ones(300))
    assert found["calibration_slope"][0] == pytest.approx(slope, abs=1e-6)
    assert found["calibration_intercept"][0] == pytest.approx(intercept, abs=1e-6)
    low, high = -20.0, 20.0  # the same by bisection: the risks then sum up to the events
    while high - low > 1e-10:
        middle = (low + high) / 2
        enough = expit(odds + middle).sum() > labels.sum()
        low, high = (low, middle) if enough else (middle, high)
    assert found["calibration_in_the_large"][0] == pytest.approx(low, abs=1e-6)
    prevalence = np.full(300, labels.mean())
    skill = 1 - brier_score_loss(labels, risk) / brier_score_loss(labels, prevalence)
    assert found["brier_skill"][0] == pytest.approx(skill, abs=1e-9)


def test_two_risks_are_calibrated_by_hand() -> None:
    # 10 of 40 at risk 0.1 and 30 of 40 at risk 0.5 have the event: log-odds -log 3 and log 3.
    labels = np.repeat([1.0, 0, 1, 0], [10, 30, 30, 10])
    risk = np.repeat([0.1, 0.5], 40)
    found = weighted_calibration(labels, risk, ones(80))
    assert found["calibration_slope"][0] == pytest.approx(np.log(9) / np.log(9), abs=1e-9)
    assert found["calibration_intercept"][0] == pytest.approx(np.log(3), abs=1e-9)


def test_one_event_has_a_slope_though_a_plain_newton_step_overshoots() -> None:
    low = "249 263 267 340 342 352 353 360 393 415 417 427 445 455 458 464 467 486 529 565 581"
    risk = np.array([*(int(x) / 1e4 for x in low.split()), 0.2623, 0.2809, 0.285])
    labels = (risk == 0.2623).astype(float)
    found = weighted_calibration(labels, risk, ones(24))
    slope, _ = logistic_fit(log_odds(risk), labels)
    assert found["calibration_slope"][0] == pytest.approx(slope, abs=1e-5)


def test_separated_classes_have_no_slope() -> None:
    labels = np.repeat([0.0, 1.0], 20)
    found = weighted_calibration(labels, np.linspace(0.1, 0.9, 40), ones(40))
    assert np.isnan(found["calibration_slope"][0])


@pytest.mark.parametrize(("risk", "noise"), [(0.3, 0.0), (0.137219873, 1e-13)])
def test_equal_risks_have_no_slope(risk: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(150) < 0.2).astype(float)
    found = weighted_calibration(labels, risk + noise * rng.normal(size=150), ones(150))
    assert np.isnan(found["calibration_slope"][0])
    assert np.isfinite(found["calibration_in_the_large"][0])


def test_bins_part_the_rows_by_risk_and_keep_equal_risks_together() -> None:
    rng = np.random.default_rng(0)
    labels, risk, _ = simulate(rng, 500)
    bins = calibration_bins(labels, risk)
    assert len(bins) == 10
    assert np.sum(bins, axis=0).tolist() == [1] * 500
    assert max(rows.sum() for rows in bins) <= 51
    for lower, upper in itertools.pairwise(bins):
        assert risk[lower].max() <= risk[upper].min()
    few = np.zeros(500)
    few[:12] = 1  # 12 events: two bins of about five
    assert len(calibration_bins(few, risk)) == 2
    coarse = np.repeat([0.1, 0.2], [400, 100])
    for rows in calibration_bins(labels, coarse):
        assert len(np.unique(coarse[rows])) == 1
