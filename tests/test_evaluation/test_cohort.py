"""The figures of a cohort: all from one bootstrap, each as its definition, ready for JSON."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn import metrics

from cohorts import make_cohort, simulate
from medgemma_clinical.data.case_mix import AGE_BANDS
from medgemma_clinical.evaluation import cohort as cohort_module
from medgemma_clinical.evaluation.bootstrap import Estimate, bootstrap
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import (
    Cohort,
    cohort_figures,
    rarer_patients,
)
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.metrics import METRICS, benefit_gain, weighted_metrics
from medgemma_clinical.evaluation.predictions import Predictions


def noisy(risk: np.ndarray, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(expit(log_odds(risk) + scale * rng.normal(size=len(risk))))


def ends(estimate: Estimate | None) -> tuple[float, float, float]:
    assert estimate is not None
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.value, estimate.low, estimate.high


def percentiles(draws: np.ndarray) -> Any:
    return pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_all_figures_come_from_one_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return bootstrap(*args)

    monkeypatch.setattr(cohort_module, "bootstrap", counted)
    labels, risk, groups = simulate(np.random.default_rng(0), 200, rows_a_patient=2)
    cohort = make_cohort((labels, risk, groups), last_value=noisy(risk, 1), count=noisy(risk, 2))
    figures = cohort_figures(cohort, 0.3, 0, 0)
    assert len(calls) == 1
    assert set(figures.baselines) == {"last value", "count"}


def test_figures_and_paired_differences_are_those_of_their_draws() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    other = noisy(risk, 1)
    figures = cohort_figures(make_cohort((labels, risk, groups), last_value=other), 0.3, 7, 0)
    draws = bootstrap(labels, groups, 7, partial(weighted_metrics, labels, risk))
    other_draws = bootstrap(labels, groups, 7, partial(weighted_metrics, labels, other))
    baseline, differences = figures.baselines["last value"], figures.differences["last value"]
    for name in METRICS:
        value, low, high = ends(figures.estimates[name])
        assert (low, high) == percentiles(draws[name])
        assert ends(baseline[name])[1:] == percentiles(other_draws[name])
        difference = ends(differences[name])
        assert difference[0] == pytest.approx(value - ends(baseline[name])[0])
        assert difference[1:] == percentiles(draws[name] - other_draws[name])
    assert figures.auroc.value == pytest.approx(metrics.roc_auc_score(labels, risk))
    alarm = risk >= 0.3
    expected = {
        "sensitivity": metrics.recall_score(labels, alarm),
        "specificity": metrics.recall_score(labels, alarm, pos_label=0),
        "ppv": metrics.precision_score(labels, alarm),
        "npv": metrics.precision_score(labels, alarm, pos_label=0),
        "alarms": alarm.mean(),
    }
    for name, share in expected.items():
        assert figures.estimates[name].value == pytest.approx(share)
    assert (figures.n, figures.events, figures.patients) == (400, labels.sum(), 200)


def test_the_gain_in_net_benefit_has_the_interval_of_its_own_draws() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    figures = cohort_figures(make_cohort((labels, risk, groups)), 0.3, 7, 0)

    def gain(weights: Any) -> Any:
        return {"gain": benefit_gain(labels, risk, 0.3, weights)}

    assert ends(figures.benefit_gain)[1:] == percentiles(bootstrap(labels, groups, 7, gain)["gain"])


def test_a_subgroup_has_the_interval_of_its_own_draws() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(2), 600))
    figures = cohort_figures(cohort, 0.3, 0, 0)
    rows = np.flatnonzero(cohort.subgroups["size"] == "many")
    labels, risk = cohort.labels[rows], cohort.probability[rows]

    def inside(weights: Any) -> Any:
        return weighted_metrics(labels, risk, weights[:, rows])

    draws = bootstrap(cohort.labels, cohort.groups, 0, inside)["auroc"]
    few, many = figures.subgroups  # a level without rows is left out
    assert (few.name, few.rows, few.auroc) == ("size: few", 15, None)
    value, low, high = ends(many.auroc)
    assert value == pytest.approx(metrics.roc_auc_score(labels, risk))
    assert (low, high) == percentiles(draws)
    assert high - low > 0.02
    assert (many.rows, many.events) == (585, labels.sum())
    assert many.risk == pytest.approx(risk.mean())


def test_few_patients_with_many_rows_are_not_called_sure() -> None:
    labels = np.repeat([1.0, 0.0], [12, 30])
    groups = np.array(["one"] * 12 + [str(k) for k in range(30)])  # twelve rows, one patient
    cohort = make_cohort((labels, np.where(labels == 1, 0.9, 0.1), groups), same=labels)
    figures = cohort_figures(cohort, 0.5, 0, 0)
    assert figures.rarer == rarer_patients(labels, groups) == 1
    for score in (figures.auroc, figures.baselines["same"]["auroc"]):
        assert score.value == 1
        assert score.low == pytest.approx(0.025)  # one pair of patients tells no more
    assert [group.auroc for group in figures.subgroups] == [None, None]


def test_a_perfect_subgroup_has_an_exact_interval() -> None:
    labels = np.tile([1.0, 0.0], 30)
    risk = np.where(labels == 1, 0.8, 0.2)
    risk[:10] = 0.5  # outside the subgroup "many"
    figures = cohort_figures(make_cohort((labels, risk, np.arange(60).astype(str))), 0.4, 0, 0)
    (many,) = [group for group in figures.subgroups if group.name == "size: many"]
    value, low, _ = ends(many.auroc)
    assert value == 1
    assert low == pytest.approx(0.025 ** (1 / 22))  # 22 of its patients have the rarer outcome


def test_shares_of_none_and_all_get_exact_intervals_by_patients() -> None:
    labels, risk = np.repeat([1.0, 0.0], [10, 30]), np.repeat([0.9, 0.1], [10, 30])
    single = cohort_figures(make_cohort((labels, risk, np.arange(40).astype(str))), 0.5, 0, 0)
    assert single.estimates["sensitivity"].low == pytest.approx(1 - 0.3085, abs=1e-4)
    pairs = make_cohort((labels, risk, (np.arange(40) // 2).astype(str)))
    paired = cohort_figures(pairs, 0.5, 0, 0)
    assert paired.estimates["sensitivity"].low == pytest.approx(0.025 ** (1 / 5))
    silent = cohort_figures(pairs, 0.95, 0, 0)
    assert silent.estimates["ppv"] == Estimate(None)


def test_the_json_of_a_part_is_whole_and_has_no_numbers_that_json_lacks() -> None:
    labels = np.repeat([0.0, 1.0], 20)
    cohort = make_cohort((labels, np.linspace(0.1, 0.9, 40), np.arange(40).astype(str)))
    figures = cohort_figures(cohort, 0.5, 0, 0)
    content = figures.to_json(figures.estimates)
    json.dumps(content, allow_nan=False)
    assert list(content) == [
        *("n", "events", "auroc", "auprc", "accuracy", "brier", "log_loss"),
        *("calibration_slope", "calibration_intercept", "calibration_in_the_large"),
        *("brier_skill", "sensitivity", "specificity", "ppv", "npv", "alarms"),
    ]
    assert content["calibration_slope"] == {"value": None, "low": None, "high": None}
    assert (content["n"], content["events"]) == (40, 20)


def test_the_json_of_a_baseline_holds_its_metrics() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 200)
    figures = cohort_figures(make_cohort((labels, risk, groups), count=noisy(risk, 1)), 0.3, 0, 0)
    content = figures.to_json(figures.baselines["count"])
    assert list(content) == ["n", "events", *METRICS]
    assert content["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(labels, noisy(risk, 1)))
    assert figures.before == {}


def test_figures_before_recalibration_stand_beside_those_after() -> None:
    labels, risk, groups = simulate(np.random.default_rng(1), 500, slope=2.5)
    logit, rows = log_odds(risk), np.arange(500)
    rule = DecisionRule(0.4, 0.0, float(expit(0.4 * np.log(0.4 / 0.6))))  # as 0.4 before
    mended = Predictions(0.5, labels, logit, rows, np.zeros(500), rule)

    class Dataset:
        ids = np.arange(500).astype(str)

        def subgroups(self) -> Any:
            return make_cohort((labels, risk, groups)).subgroups

    dataset: Any = Dataset()
    dataset.groups = groups
    cohort = Cohort.from_predictions(dataset, mended, {})
    figures = cohort_figures(cohort, mended.rule.threshold, 3, 0)
    plain = cohort_figures(make_cohort((labels, risk, groups)), 0.4, 3, 0)
    before, after = figures.to_json(figures.before), figures.to_json(figures.estimates)
    expected = plain.to_json(plain.estimates)
    assert before == {key: pytest.approx(value) for key, value in expected.items()}
    for name in ("auroc", "sensitivity", "ppv", "alarms"):  # the order and the alarms stay
        assert after[name] == pytest.approx(before[name])
    assert after["log_loss"]["value"] < before["log_loss"]["value"] - 0.02


def test_the_best_baseline_is_the_one_with_the_largest_auroc() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 300)
    cohort = make_cohort((labels, risk, groups), flat=np.full(300, 0.5), good=noisy(risk, 0, 0.1))
    assert cohort_figures(cohort, 0.3, 0, 0).best_baseline == "good"
    assert cohort_figures(make_cohort((labels, risk, groups)), 0.3, 0, 0).best_baseline is None


def blended_cohort(rows: int = 400) -> Cohort:
    """A model and two blends, each with noise of its own."""
    labels, risk, groups = simulate(np.random.default_rng(0), rows, rows_a_patient=2)
    noise = {"blend": noisy(risk, 1, 2.0), "blend_with_facts": noisy(risk, 2)}
    return make_cohort((labels, noisy(risk, 3), groups), **noise)


def test_the_combined_model_is_the_mean_logit_of_model_and_richest_blend() -> None:
    cohort = blended_cohort()
    blend = cohort.baselines["blend with facts"]
    mean = (log_odds(cohort.probability) + log_odds(blend)) / 2
    assert cohort.combined == pytest.approx(expit(mean))
    figures = cohort_figures(cohort, 0.3, 7, 0)
    draws, alone = (
        bootstrap(cohort.labels, cohort.groups, 7, partial(weighted_metrics, cohort.labels, each))
        for each in (expit(mean), blend)
    )
    for name in METRICS:
        value, *interval = ends(figures.combined[name])
        assert tuple(interval) == percentiles(draws[name])
        gain = ends(figures.combined_minus_blend[name])
        assert gain[0] == pytest.approx(
            value - ends(figures.baselines["blend with facts"][name])[0]
        )
        assert gain[1:] == percentiles(draws[name] - alone[name])


def test_the_combined_model_is_no_baseline() -> None:
    figures = cohort_figures(blended_cohort(), 0.3, 0, 0)
    best = max(figures.others, key=lambda name: ends(figures.others[name]["auroc"])[0])
    assert best == "combined"
    assert figures.best_baseline == "blend with facts"
    assert set(figures.differences) == set(figures.baselines) == {"blend", "blend with facts"}
    alone = cohort_figures(make_cohort(simulate(np.random.default_rng(0), 100)), 0.3, 0, 0)
    assert alone.combined == alone.combined_minus_blend == alone.others == {}


def test_a_perfect_combined_model_has_an_exact_interval() -> None:
    labels = np.repeat([0.0, 1.0], 30)
    risk = np.where(labels == 1, 0.9, 0.1)
    cohort = make_cohort((labels, risk, np.arange(60).astype(str)), blend=risk)
    combined = cohort_figures(cohort, 0.5, 0, 0).combined["auroc"]
    assert combined.value == combined.high == 1.0
    assert 0.8 < ends(combined)[1] < 0.95


# ------------------------------------------------------------------- small cells


def test_small_cells_of_the_combined_model_or_its_blend_hide_accuracy_and_difference() -> None:
    labels = np.repeat([0.0, 1.0], 50)
    right = np.where(labels == 1, 0.9, 0.1)
    wrong = np.where(labels == 1, 0.05, 0.95)
    three_wrong, twenty_wrong = (np.where(np.arange(100) % 50 < k, wrong, right) for k in (3, 20))
    groups = np.arange(100).astype(str)
    shown = cohort_figures(make_cohort((labels, right, groups), blend=right), 0.5, 0, 11)
    assert shown.combined_minus_blend["accuracy"] == Estimate(0.0, 0.0, 0.0)
    for model, blend in ((three_wrong, right), (twenty_wrong, three_wrong)):
        figures = cohort_figures(make_cohort((labels, model, groups), blend=blend), 0.5, 0, 11)
        assert figures.combined_minus_blend["accuracy"] == Estimate(None), "gives the other figure"
        assert figures.combined_minus_blend["auroc"].value is not None


def few_events_cohort(events: int, rows: int = 200) -> Cohort:
    rng = np.random.default_rng(4)
    labels = (np.arange(rows) < events).astype(float)
    risk = np.clip(0.2 + 0.2 * labels + 0.1 * rng.normal(size=rows), 0.01, 0.99)
    return make_cohort((labels, risk, np.arange(rows).astype(str)), blend=noisy(risk, 2))


def test_a_part_with_a_few_events_shows_no_figure() -> None:
    figures = cohort_figures(few_events_cohort(10), 0.3, 0, 11)
    assert figures.events is None
    assert figures.rarer is None
    assert figures.prevalence is None
    assert figures.subgroups == []
    assert figures.bins == {}
    assert figures.benefit == {}
    shown = [figures.estimates, *figures.others.values(), *figures.differences.values()]
    shown.append(figures.combined_minus_blend)
    assert "combined" in figures.others
    assert all(each == Estimate(None) for estimates in shown for each in estimates.values())
    assert figures.to_json(figures.estimates)["events"] is None
    assert cohort_figures(few_events_cohort(10), 0.3, 0, 10).events == 10


def test_a_threshold_that_leaves_a_few_events_without_alarm_shows_no_share() -> None:
    cohort = few_events_cohort(60)
    event, risk = cohort.labels == 1, cohort.probability
    missed = np.sort(risk[event])[4]  # four events lie below
    figures = cohort_figures(cohort, float(missed), 0, 11)
    for share in ("sensitivity", "specificity", "ppv", "npv", "alarms"):
        assert figures.estimates[share].value is None
    assert figures.events == 60
    labels, risk, groups = simulate(np.random.default_rng(1), 300)
    shown = cohort_figures(make_cohort((labels, risk, groups)), 0.3, 0, 11).estimates
    assert shown["sensitivity"].value == pytest.approx((risk >= 0.3)[labels == 1].mean())


def test_the_accuracy_is_hidden_where_a_few_rows_are_wrong() -> None:
    labels = np.repeat([0.0, 1.0], 50)
    risk = np.where(labels == 1, 0.8, 0.2) + np.linspace(0, 0.1, 100)
    risk[:3] = 0.9
    cohort = make_cohort((labels, risk, np.arange(100).astype(str)))
    assert cohort_figures(cohort, 0.5, 0, 11).estimates["accuracy"].value is None
    assert cohort_figures(cohort, 0.5, 0, 3).estimates["accuracy"].value == pytest.approx(0.97)


def test_subgroups_with_a_few_patients_join_their_neighbours() -> None:
    rng = np.random.default_rng(6)
    labels, risk, groups = simulate(rng, 300)
    cohort = make_cohort((labels, risk, groups))
    age = pd.cut(np.arange(300) % 100, [-1, 2, 40, 70, 100], labels=[*AGE_BANDS][:4])
    columns = pd.DataFrame({"age": age, "place": pd.Categorical(["x"] * 300)})
    cohort = replace(cohort, subgroups=columns)
    figures = cohort_figures(cohort, 0.3, 0, 11)
    assert [group.name for group in figures.subgroups] == [
        "age: under 40",
        "age: 40 to 59",
        "age: 60 to 74",
        "place: x",
    ]
    ages = figures.subgroups[:3]
    assert sum(group.rows for group in ages) == 300
    assert sum(group.events for group in ages) == figures.events
    assert all(min(g.events, g.rows - g.events) >= 11 for g in figures.subgroups)
    halves = pd.Categorical(np.where(np.arange(300) < 3, "few", "many"))
    alone = replace(cohort, subgroups=pd.DataFrame({"half": halves}))
    assert cohort_figures(alone, 0.3, 0, 11).subgroups == [], "one band is the cohort itself"


def test_no_two_points_of_the_calibration_and_decision_curves_lie_a_few_patients_apart() -> None:
    labels, risk, groups = simulate(np.random.default_rng(8), 400)
    cohort = make_cohort((labels, risk, groups))
    figures = cohort_figures(cohort, 0.3, 0, 11)
    place = figures.bands.place
    bins = [place == band for band in np.unique(place)]
    assert len(bins) > 2
    assert list(figures.bins) == pytest.approx([risk[rows].mean() for rows in bins])
    for band in np.unique(place):
        for label in (0, 1):
            assert not 0 < int((labels[place == band] == label).sum()) < 11
    assert len(figures.benefit) > 3
    alarms = [risk >= threshold for threshold in figures.benefit]
    for more, fewer in itertools.pairwise(alarms):
        for label in (0, 1):
            assert not 0 < int((labels[more & ~fewer] == label).sum()) < 11


@pytest.mark.parametrize("rows", [400, 1_500, 6_000])
def test_a_calibration_curve_has_ten_points_at_most_each_of_whole_bands(rows: int) -> None:
    labels, risk, groups = simulate(np.random.default_rng(8), rows)
    figures = cohort_figures(make_cohort((labels, risk, groups)), 0.3, 0, 11)
    band = figures.bands.place
    bands = np.unique(band).tolist()
    assert (len(bands) > 10) == (rows > 400)
    bins = cohort_module._bins(labels, risk, figures.bands)
    assert list(figures.bins) == [risk[inside].mean() for inside in bins]
    assert 5 <= len(bins) <= 10
    assert (np.sum(bins, axis=0) == 1).all(), "each row lies in one bin"
    held = [np.unique(band[inside]).tolist() for inside in bins]
    assert list(itertools.chain(*held)) == bands, "no band lies in two bins"
    assert max(inside.mean() for inside in bins) < 0.35


def test_figures_are_rounded_where_all_their_digits_would_tell_counts() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(8), 300))
    rounded, whole = (
        figures.to_json(figures.estimates)["auroc"]["value"]
        for figures in (cohort_figures(cohort, 0.3, 0, fewest) for fewest in (11, 0))
    )
    assert rounded == round(whole, 4) != whole


def test_a_rare_outcome_keeps_its_bands_and_bins() -> None:
    rng = np.random.default_rng(3)
    risk = 0.006 * rng.lognormal(size=9_000).clip(0, 4) / 2
    labels = (rng.random(9_000) < 2 * risk).astype(float)
    groups = np.arange(9_000).astype(str)
    figures = cohort_figures(make_cohort((labels, risk, groups)), 0.004, 0, 11)
    assert risk.max() < 0.013, "of whole percents alone there is one limit"
    assert len(figures.bins) > 4
