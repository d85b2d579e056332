"""Weighted metrics, shares and net benefit: equal to scikit-learn and to figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from cohorts import ones, simulate
from medgemma_clinical.evaluation.calibration import weighted_calibration
from medgemma_clinical.evaluation.metrics import (
    METRICS,
    benefit_gain,
    net_benefit,
    threshold_shares,
    weighted_metrics,
    weighted_shares,
)


@pytest.mark.parametrize("seed", range(2))
def test_weighted_metrics_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, risk, _ = simulate(rng, 60)
    risk = risk.round(1 if seed else 9)  # with ties, and once without
    weights = rng.integers(0, 4, (3, 60)).astype(float)
    weights[:, [labels.argmax(), labels.argmin()]] = 1  # both classes count in every weighting
    result = weighted_metrics(labels, risk, weights)
    assert tuple(result) == METRICS
    for k, weight in enumerate(weights):
        expected = {
            "auroc": metrics.roc_auc_score(labels, risk, sample_weight=weight),
            "auprc": metrics.average_precision_score(labels, risk, sample_weight=weight),
            "accuracy": metrics.accuracy_score(labels, risk >= 0.5, sample_weight=weight),
            "brier": metrics.brier_score_loss(labels, risk, sample_weight=weight),
            "log_loss": metrics.log_loss(labels, risk, sample_weight=weight),
        }
        for name, value in expected.items():
            assert result[name][k] == pytest.approx(value, abs=1e-9)


def test_a_weighting_without_a_class_is_undefined_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    labels, risk = np.array([1.0, 0, 0]), np.array([0.4, 0.2, 0.6])
    result = weighted_metrics(labels, risk, np.array([[0.0, 1, 2], [1.0, 1, 1]]))
    assert np.isnan(result["auroc"]).tolist() == [True, False]
    assert np.isnan(result["auprc"]).tolist() == [True, False]
    assert np.isfinite(result["brier"]).all()
    assert not recwarn.list


def test_weights_count_as_repeated_rows() -> None:
    rng = np.random.default_rng(5)
    labels, risk, _ = simulate(rng, 80)
    weights = rng.integers(0, 4, (3, 80)).astype(float)
    at = np.array([0.1, 0.3, 0.31])
    calibration = weighted_calibration(labels, risk, weights)
    share = weighted_shares(threshold_shares(labels, risk, 0.3), weights)
    benefit = net_benefit(labels, risk, at, weights)
    for k, weight in enumerate(weights):
        rows = np.repeat(np.arange(80), weight.astype(int))
        few, few_risks, one = labels[rows], risk[rows], ones(len(rows))
        for name, value in weighted_calibration(few, few_risks, one).items():
            assert calibration[name][k] == pytest.approx(value[0], abs=1e-6)
        for name, value in weighted_shares(threshold_shares(few, few_risks, 0.3), one).items():
            assert share[name][k] == pytest.approx(value[0])
        assert benefit[k] == pytest.approx(net_benefit(few, few_risks, at, one)[0])


def test_net_benefit_by_hand() -> None:
    labels, risk = np.array([1.0, 0, 1, 0, 0]), np.array([0.9, 0.8, 0.2, 0.2, 0.1])
    at = np.array([0.1, 0.2, 0.5, 0.9, 0.95])
    expected = [(2 - 3 / 9) / 5, (2 - 2 / 4) / 5, (1 - 1) / 5, 1 / 5, 0]
    assert net_benefit(labels, risk, at, ones(5))[0] == pytest.approx(expected)
    everyone = net_benefit(labels, np.ones(5), at[:3], ones(5))[0]
    assert everyone == pytest.approx([0.4 - 0.6 / 9, 0.4 - 0.6 / 4, 0.4 - 0.6])


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_the_gain_is_the_net_benefit_above_the_better_of_all_and_none(threshold: float) -> None:
    rng = np.random.default_rng(6)
    labels, risk, _ = simulate(rng, 80)
    weights, at = rng.integers(1, 4, (3, 80)).astype(float), np.array([threshold])
    own = net_benefit(labels, risk, at, weights)[:, 0]
    everyone = net_benefit(labels, np.ones(80), at, weights)[:, 0]
    expected = own - np.maximum(everyone, 0)
    assert benefit_gain(labels, risk, threshold, weights) == pytest.approx(expected)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -2.0, 5.0])
def test_a_threshold_that_is_no_risk_has_no_gain(threshold: float) -> None:
    labels = np.array([1.0, 0])
    assert np.isnan(benefit_gain(labels, labels, threshold, ones(2))).all()
