"""Intervals: draws of whole patients, exact shares, and coverage of the truth."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from cohorts import coverage, simulate
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.bootstrap import (
    Estimate,
    draw_weights,
    estimate,
)
from medgemma_clinical.evaluation.metrics import weighted_metrics


def all_draws(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    return np.concatenate(list(draw_weights(labels, groups, seed)))


def test_draws_do_not_depend_on_where_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, _, groups = simulate(np.random.default_rng(0), 90, rows_a_patient=3)
    whole = all_draws(labels, groups, 4)
    monkeypatch.setattr(bootstrap, "CHUNK_CELLS", 90 * 7)
    chunks = list(draw_weights(labels, groups, 4))
    assert max(map(len, chunks)) == 7
    assert np.array_equal(np.concatenate(chunks), whole)
    assert whole.shape == (bootstrap.REPLICATES, 90)


def test_all_rows_of_a_patient_are_drawn_together_and_both_classes_are_there() -> None:
    labels, _, groups = simulate(np.random.default_rng(0), 90, rows_a_patient=3)
    by_patient = all_draws(labels, groups, 4).reshape(-1, 30, 3)
    assert (by_patient == by_patient[:, :, :1]).all()
    assert (by_patient[:, :, 0].sum(axis=1) == 30).all()
    rare = np.zeros(12)
    rare[0] = 1
    assert (all_draws(rare, np.arange(12).astype(str), 0) @ rare > 0).all()


def test_each_part_of_a_split_has_both_classes_in_each_draw() -> None:
    labels = np.array([1.0, 0, 0, 0, 1, 0, 0, 0])
    split = np.repeat([0, 1], 4)
    draws = np.concatenate(list(draw_weights(labels, np.arange(8).astype(str), 0, split)))
    for part in (0, 1):
        for label in (0, 1):
            assert draws[:, (split == part) & (labels == label)].any(axis=1).all()


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both labels"):
        all_draws(np.zeros(5), np.arange(5).astype(str), 0)


def test_the_bootstrap_is_seeded_and_draws_patients_not_rows() -> None:
    labels, risk, alone = simulate(np.random.default_rng(0), 100)
    draw = partial(bootstrap.bootstrap, statistics=partial(weighted_metrics, labels, risk))
    first, other = draw(labels, alone, 1), draw(labels, alone, 2)
    assert np.array_equal(first["auroc"], draw(labels, alone, 1)["auroc"])
    assert not np.array_equal(first["auroc"], other["auroc"])
    # Each patient four times says no more than each once: the interval must not shrink.
    four, four_risks, patients = (np.tile(a, 4) for a in (labels, risk, alone))
    statistics = partial(weighted_metrics, four, four_risks)
    repeated = bootstrap.bootstrap(four, patients, 1, statistics)
    for name in ("auroc", "brier"):
        assert repeated[name] == pytest.approx(first[name])


def test_undefined_replicates_are_left_out_and_too_many_leave_no_interval() -> None:
    replicates = np.linspace(0, 1, 1000)
    whole = estimate(0.5, replicates)
    assert (whole.low, whole.high) == pytest.approx((0.025, 0.975))
    replicates[:50] = np.nan
    assert estimate(0.5, replicates).low == pytest.approx(np.quantile(replicates[50:], 0.025))
    replicates[50] = np.nan
    assert estimate(0.5, replicates) == Estimate(0.5)
    assert estimate(float("nan"), replicates) == Estimate(None)


def test_shares_of_none_and_all_get_exact_intervals() -> None:
    still = np.ones(1000)
    # 10 of 10: Clopper and Pearson give 0.3085 as the upper limit of the complement.
    assert estimate(1.0, still, 10).low == pytest.approx(1 - 0.3085, abs=1e-4)
    assert estimate(0.0, still * 0, 10).high == pytest.approx(0.3085, abs=1e-4)
    assert estimate(0.5, np.linspace(0, 1, 1000), 10).low == pytest.approx(0.025)
    assert estimate(float("nan"), still, 0) == Estimate(None)


def test_an_estimate_is_written_with_its_interval_or_a_dash() -> None:
    score = Estimate(0.7042, 0.6317, 0.77)
    assert score.text() == "0.704 [0.632, 0.770]"
    assert score.text("+.1f", 100) == "+70.4 [+63.2, +77.0]"
    assert Estimate(0.7).text() == "0.700 [\N{EN DASH}]"
    assert Estimate(None).text() == "\N{EN DASH}"
    assert score.above(0.63)
    assert not score.above(0.65)
    assert score.below(0.78)
    assert not score.below(0.75)
    assert not Estimate(0.7).above(0)
    assert not Estimate(0.7).below(1)


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "REPLICATES", 200)
    shares = coverage(60, 400, rows_a_patient=4, seed=1)
    # 60 data sets tell a share of 0.95 to 0.03; draws of rows cover the share of alarms to 0.76.
    assert all(share >= 0.85 for share in shares.values()), shares
    assert 0.925 <= np.mean(list(shares.values())) <= 0.975, shares
