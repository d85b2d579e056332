"""From log-odds to probabilities and predictions: threshold, recalibration, what is stored."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from medgemma_clinical.evaluation.calibration import weighted_calibration
from medgemma_clinical.evaluation.predictions import Predictions
from scipy.special import expit
from sklearn.metrics import log_loss

from cohorts import ones, simulate
from medgemma_clinical.evaluation.decision import (
    RESIDUAL_WEIGHTS,
    DecisionRule,
    fit_decision_rule,
    fit_residual_weight,
    threshold_text,
    youden_threshold,
)


def drawn(seed: int, rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Draw true log-odds, and labels by them."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1.5, 1.0, rows)
    return logit, (rng.uniform(size=rows) < expit(logit)).astype(float)


def slope_of(labels: np.ndarray, probability: np.ndarray) -> float:
    figures = weighted_calibration(labels, probability, ones(len(labels)))
    return float(figures["calibration_slope"][0])


def test_the_threshold_is_youdens_and_of_equal_ones_the_lowest() -> None:
    labels = np.array([0.0, 0, 1, 0, 1, 1])
    risk = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    # J is 2/3 from 0.5 on (2 of 3 hits, no false alarm) and from 0.3 on (3 of 3 hits, 1 of 3).
    assert youden_threshold(labels, risk) == pytest.approx(0.25)  # midway from 0.2
    assert youden_threshold(1 - labels, risk) == 0.05  # reversed: an alarm for all
    rng = np.random.default_rng(3)
    for _ in range(20):
        labels, risk, _ = simulate(rng, 60)
        risk = risk.round(1)
        gains = {
            t: (risk >= t)[labels == 1].mean() - (risk >= t)[labels == 0].mean()
            for t in np.unique(risk)
        }
        best = min(t for t, gain in gains.items() if gain > max(gains.values()) - 1e-12)
        lower = max((t for t in gains if t < best), default=0.0)
        assert youden_threshold(labels, risk) == pytest.approx((best + lower) / 2)


def test_an_overconfident_model_is_recalibrated_on_new_rows() -> None:
    (truth, labels), (new_truth, new_labels) = drawn(0), drawn(1)
    sure, new_sure = 3 * truth + 1, 3 * new_truth + 1
    before = fit_decision_rule(labels, sure, "none")
    after = fit_decision_rule(labels, sure, "platt")
    assert slope_of(new_labels, before.probability(new_sure)) < 0.5
    assert slope_of(new_labels, after.probability(new_sure)) == pytest.approx(1, abs=0.1)
    assert (after.slope, after.intercept) == pytest.approx((1 / 3, -1 / 3), abs=0.08)
    loss = [log_loss(new_labels, rule.probability(new_sure)) for rule in (before, after)]
    assert loss[1] < loss[0] - 0.1


def test_on_the_rows_it_was_fitted_to_the_recalibration_is_exact() -> None:
    truth, labels = drawn(2)
    probability = fit_decision_rule(labels, 2 * truth - 3, "platt").probability(2 * truth - 3)
    assert slope_of(labels, probability) == pytest.approx(1, abs=1e-6)
    assert probability.mean() == pytest.approx(labels.mean(), abs=1e-9)


@pytest.mark.parametrize("calibrate", ["none", "platt"])
def test_the_threshold_is_that_of_the_probability_after_recalibration(calibrate: str) -> None:
    truth, labels = drawn(3)
    rule = fit_decision_rule(labels, truth, calibrate)
    assert rule.threshold == youden_threshold(labels, rule.probability(truth))
    assert rule.recalibrates == (calibrate == "platt")


def test_a_model_that_ranks_in_reverse_is_not_reversed(caplog: pytest.LogCaptureFixture) -> None:
    truth, labels = drawn(4)
    assert not fit_decision_rule(labels, -truth, "platt").recalibrates
    assert "not recalibrated: on the validation part events do not become" in caplog.text


def test_a_validation_part_that_is_separated_is_not_fitted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = (np.arange(40) >= 20).astype(float)
    assert not fit_decision_rule(labels, np.linspace(-20, 19, 40), "platt").recalibrates
    assert "not recalibrated" in caplog.text


def test_extreme_log_odds_have_probabilities_without_warning_and_in_order() -> None:
    logit = np.array([-1e5, -800.0, -40.0, 0.0, 30.0, 800.0])
    with np.errstate(all="raise", under="ignore"):
        probability = DecisionRule(slope=1.5, intercept=0.5).probability(logit)
    assert np.all(np.diff(probability) >= 0)
    assert probability[[0, 5]].tolist() == [0.0, 1.0]
    assert probability[3] == pytest.approx(1 / (1 + np.exp(-0.5)))


def test_a_rule_survives_its_config() -> None:
    rule = DecisionRule(0.3, -1.25, 0.125)
    config = json.loads(json.dumps({"decision": rule.to_config()}))
    assert DecisionRule.from_config(config) == rule
    assert DecisionRule.from_config({}) == DecisionRule()


@pytest.mark.parametrize(
    "stored",
    [
        {"slope": 1.0, "intercept": 0.0},
        {"slope": 0.0, "intercept": 0.0, "threshold": 0.5},
        {"slope": 1.0, "intercept": float("inf"), "threshold": 0.5},
        {"slope": "steep", "intercept": 0.0, "threshold": 0.5},
        [1.0, 0.0, 0.5],
    ],
    ids=str,
)
def test_an_unsound_stored_rule_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match="decision rule"):
        DecisionRule.from_config({"decision": stored})


def test_predictions_follow_their_rule() -> None:
    labels, logit = np.array([0.0, 1, 0, 1]), np.array([-2.0, -1, 0, 1])
    raw = Predictions(0.5, labels, logit, np.arange(4), np.zeros(4))
    assert raw.probability == pytest.approx(expit(logit))
    assert raw.auroc() == 0.75
    moved = raw.with_rule(DecisionRule(2.0, 1.0, 0.2))
    assert moved.probability == pytest.approx(expit(1 + 2 * logit))
    assert moved.alarms.tolist() == [False, True, True, True]
    assert moved.auroc() == raw.auroc()


def residual_of(rows: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels by ``offset + share * residual``; return them, offset and the whole logit."""
    rng = np.random.default_rng(0)
    offset, residual = rng.normal(size=(2, rows))
    labels = (rng.random(rows) < expit(offset + share * residual)).astype(float)
    return labels, offset, offset + residual


def test_the_residual_weight_is_the_smallest_within_a_standard_error_of_the_lowest_loss() -> None:
    labels, offset, logit = residual_of(4000, share=0.5)
    risks = expit([offset + w * (logit - offset) for w in RESIDUAL_WEIGHTS])
    losses = -np.log(np.where(labels == 1, risks, 1 - risks))
    best = int(losses.mean(axis=1).argmin())
    assert RESIDUAL_WEIGHTS[best] == pytest.approx(0.5, abs=0.11)
    gaps = losses - losses[best]
    close = gaps.mean(axis=1) <= gaps.std(axis=1, ddof=1) / np.sqrt(len(labels))
    expected = RESIDUAL_WEIGHTS[np.flatnonzero(close)[0]]
    assert 0 < expected < RESIDUAL_WEIGHTS[best]
    assert fit_residual_weight(labels, offset, logit) == expected


def test_many_rows_leave_the_whole_of_a_sound_residual_and_few_rows_nothing() -> None:
    assert fit_residual_weight(*residual_of(40_000, share=1.0)) >= 0.9
    labels, offset, logit = residual_of(40_000, share=0.05)
    few = slice(0, 200)
    assert fit_residual_weight(labels[few], offset[few], logit[few]) == 0


def test_a_residual_that_does_not_order_patients_better_counts_nothing() -> None:
    rng = np.random.default_rng(1)
    offset = rng.normal(size=2000)
    labels = (rng.random(2000) < expit(offset)).astype(float)
    noise = offset + rng.normal(size=2000)
    assert fit_residual_weight(labels, offset, noise) == 0
    assert fit_residual_weight(labels, offset, -offset) == 0
    # A better loss is no better order: that is what --calibrate is for.
    timid = labels, offset / 2, offset
    assert log_loss(labels, expit(offset)) < log_loss(labels, expit(offset / 2))
    assert fit_residual_weight(*timid) == 0
    assert fit_residual_weight(labels, offset, offset) == 0


def test_predictions_take_a_weight_for_all_but_stage_1s_share() -> None:
    labels, logit, offset = np.array([0.0, 1]), np.array([1.0, 3.0]), np.array([0.5, -1.0])
    raw = Predictions(0.5, labels, logit, np.arange(2), offset)
    assert raw.with_residual_weight(0.25).logit == pytest.approx([0.625, 0.0])
    assert raw.with_residual_weight(1).logit.tolist() == logit.tolist()


@pytest.mark.parametrize(
    ("threshold", "text"), [(0.07083, "7.1"), (0.2, "20.0"), (0.16091, "16.1"), (0.00456, "0.46")]
)
def test_a_threshold_has_one_decimal_and_two_digits_at_least(threshold: float, text: str) -> None:
    assert threshold_text(threshold) == f"{text}\N{NO-BREAK SPACE}%"
