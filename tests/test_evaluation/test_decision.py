"""From log-odds to probabilities and predictions: threshold, recalibration, weight, storage."""

import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from cohorts import plain_calibration
from medgemma_clinical.evaluation.decision import (
    MIN_CHOOSING_EVENTS,
    RESIDUAL_WEIGHTS,
    DecisionOptions,
    DecisionRule,
    Predictions,
    choose_threshold,
    fit_decision_rule,
    fit_residual_weight,
    recommended_model,
    youden_threshold,
)
from medgemma_clinical.evaluation.metrics import log_odds, row_losses
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import LABEL, TimeOutcome
from time_rows import EVENTS, MODEL, make_times


def drawn(seed, rows=4000):
    """Draw true log-odds, and labels by them."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1.5, 1.0, rows)
    return logit, (rng.random(rows) < expit(logit)).astype(float)


def shares_at(labels, risk, threshold):
    """Return sensitivity and specificity."""
    positive = risk >= threshold
    return positive[labels == 1].mean(), 1 - positive[labels == 0].mean()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=2, max_size=30))
def test_the_threshold_is_youdens_midway_to_the_next_lower_risk(rows):
    labels, risk = np.array(rows, dtype=float).T * [[1], [0.1]]
    assume(len(np.unique(labels)) == 2)
    gains = {t: sum(shares_at(labels, risk, t)) for t in np.unique(risk)}
    best = min(t for t, gain in gains.items() if gain > max(gains.values()) - 1e-12)
    lower = max((t for t in gains if t < best), default=0.0)
    assert youden_threshold(labels, risk) == pytest.approx((best + lower) / 2)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 10)), min_size=2, max_size=30),
    st.sampled_from([0.3, 0.5, 0.9]),
)
def test_a_goal_is_reached_by_the_threshold_that_is_best_for_the_other_share(rows, goal):
    labels, risk = np.array(rows, dtype=float).T * [[1], [0.09]]
    assume(len(np.unique(labels)) == 2)
    shares = {t: shares_at(labels, risk, t) for t in [*np.unique(risk), 2]}
    sensitive = max(t for t, (share, _) in shares.items() if share >= goal)
    specific = min(t for t, (_, share) in shares.items() if share >= goal)
    for name, best in (("sensitivity", sensitive), ("specificity", specific)):
        found = choose_threshold(f"{name} {goal}", labels, risk)
        assert ((risk >= found) == (risk >= best)).all()
        assert 0 < found < 1
    assert choose_threshold("0.25", labels, risk) == 0.25


def test_recalibration_mends_an_overconfident_model():
    (truth, labels), (new_truth, new_labels) = drawn(0), drawn(1)
    sure, new_sure = 3 * truth + 1, 3 * new_truth + 1
    patients, kinds = np.arange(len(labels)), ("none", "platt", "tests")
    before, after, tested = (
        fit_decision_rule(labels, sure, patients, DecisionOptions(kind)) for kind in kinds
    )
    assert (tested.slope, tested.intercept) == (after.slope, after.intercept)
    assert (before.slope, before.intercept) == (1, 0)
    assert (after.slope, after.intercept) == pytest.approx((1 / 3, -1 / 3), abs=0.08)
    own = plain_calibration(labels, after.probability(sure))  # of the rows it was fitted to
    ideal = {"calibration_slope": 1, "calibration_intercept": 0, "calibration_in_the_large": 0}
    assert {name: own[name] for name in ideal} == pytest.approx(ideal, abs=1e-6)
    loss = [log_loss(new_labels, rule.probability(new_sure)) for rule in (before, after)]
    assert loss[1] < loss[0] - 0.1
    for rule in (before, after):
        assert rule.threshold == youden_threshold(labels, rule.probability(sure))


@pytest.mark.parametrize("case", ["reversed", "separated"])
def test_a_reversed_or_separated_validation_part_is_not_recalibrated(case):
    truth, labels = drawn(4, 400)
    logit = -truth if case == "reversed" else np.where(labels == 1, 1, -1) + truth / 100
    rule = fit_decision_rule(labels, logit, np.arange(400), DecisionOptions("platt"))
    assert (rule.slope, rule.intercept) == (1, 0)


@pytest.mark.parametrize(("events", "moved"), [(99, (False, True)), (100, (True, True))])
def test_tests_choose_a_slope_from_a_hundred_events_on_and_else_an_intercept(events, moved):
    truth, labels = drawn(7, 3000)
    kept = (labels == 0) | (labels.cumsum() <= events)
    labels, logit = labels[kept], 3 * truth[kept]
    rule = fit_decision_rule(labels, logit, np.arange(kept.sum()), DecisionOptions("tests"))
    assert (rule.slope != 1, rule.intercept != 0) == moved
    truth, labels = drawn(2)
    right = fit_decision_rule(labels, truth, np.arange(4000), DecisionOptions("tests"))
    assert not right.is_moved


UNSOUND = [("slope", 0.0), ("slope", -1.0), ("slope", "steep"), ("intercept", math.inf)]
UNSOUND += [("intercept", None), ("threshold", math.nan), ("threshold", "")]


@pytest.mark.parametrize(("name", "number"), UNSOUND)
def test_an_unsound_incomplete_or_reversed_rule_is_refused(name, number):
    rule = DecisionRule(0.3, -1.25, 0.125)
    stored = json.loads(json.dumps(asdict(rule)))
    assert DecisionRule.from_config({"decision": stored}) == rule
    assert DecisionRule.from_config({}) == DecisionRule(1, 0, 0.5)
    lacking = {key: each for key, each in stored.items() if key != name}
    for wrong in ({**stored, name: number}, lacking, {}, [*stored.values()]):
        with pytest.raises(ValueError, match="decision rule"):
            DecisionRule.from_config({"decision": wrong})


def test_predictions_follow_their_rule():
    labels, logit = np.array([0.0, 1, 0, 1]), np.array([-2.0, -1, 0, 1])
    parts = np.array([0.25, 0.75]), labels, logit, np.arange(4), np.zeros(4)
    own, moved = Predictions(*parts), Predictions(*parts, DecisionRule(2, 1, expit(1)))
    assert own.loss == 0.5  # of two members
    assert own.probability == pytest.approx(expit(logit))
    with np.errstate(all="raise", under="ignore"):  # extreme log-odds give no warning
        assert DecisionRule(2, 1).probability(np.array([-1e5, 1e5])).tolist() == [0, 1]
    assert own.positive.tolist() == [False, False, True, True]  # a risk at the threshold too
    assert moved.probability == pytest.approx(expit(1 + 2 * logit))
    assert moved.positive.tolist() == [False, False, True, True]
    assert own.auroc() == moved.auroc() == 0.75


# ------------------------------------------------------------------ weight beside stage 1


def added(rows, share, seed=0):
    """Draw labels by ``offset + share * residual``; return them, offset and whole logit."""
    rng = np.random.default_rng(seed)
    offset, residual = rng.normal(size=(2, rows))
    labels = (rng.random(rows) < expit(offset + share * residual)).astype(float)
    return labels, offset, offset + residual


def weight(labels, offset, logit):
    """Choose the weight where each row is a patient."""
    return weight_of(labels, offset, logit, np.arange(len(labels)))


def weight_of(labels, offset, logit, patients):
    """Choose the weight of some patients' rows."""
    functions = partial(LABEL.row_losses, labels), partial(LABEL.auroc, labels)
    return fit_residual_weight(offset[:, None], logit[:, None], patients, *functions)


@pytest.mark.parametrize("patients", [4000, 12, 6])
def test_the_weight_is_the_smallest_within_a_standard_error_of_the_lowest_loss(patients):
    rng = np.random.default_rng(5)
    labels, offset, logit = added(4000, 0.5)
    names = np.arange(4000)
    if patients < 4000:  # of unequal numbers of rows, which are alike within a patient
        alike = (labels - expit(offset)) * (logit - offset) + 3 * rng.normal(size=4000)
        names[alike.argsort()] = np.sort(rng.integers(0, patients, 4000))
    risks = expit([offset + w * (logit - offset) for w in RESIDUAL_WEIGHTS])
    losses = pd.DataFrame(-np.log(np.where(labels == 1, risks, 1 - risks)), RESIDUAL_WEIGHTS).T
    gaps = losses.sub(losses[losses.mean().idxmin()], axis=0)
    sums = (gaps - gaps.mean()).groupby(names).sum()
    error = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / 4000
    expected = gaps.columns[gaps.mean() <= error][0]
    assert 0 < expected < losses.mean().idxmin()
    assert weight_of(labels, offset, logit, names) == expected
    if patients == 4000:
        assert error.to_numpy() == pytest.approx(gaps.sem().to_numpy())
    else:
        assert expected < weight(labels, offset, logit)


def test_more_rows_of_the_same_patients_do_not_change_the_weight():
    changed = 0
    for seed in range(20):
        rows = added(120, 0.6, seed)
        copies = [np.tile(each, 4) for each in rows]
        assert weight_of(*copies, np.tile(np.arange(120), 4)) == weight(*rows)
        changed += weight(*copies) > weight(*rows)  # as other patients they say more
    assert changed > 5


def test_a_language_model_that_adds_nothing_has_no_weight():
    assert weight(*added(40_000, 1.0)) >= 0.9
    assert weight(*(each[:200] for each in added(40_000, 0.05))) == 0
    labels, offset, _ = added(2000, 0.0)
    noise = offset + np.random.default_rng(1).normal(size=2000)
    for logit in (noise, -offset, offset):
        assert weight(labels, offset, logit) == 0
    # A better loss is no better order: that is what --calibrate is for.
    assert log_loss(labels, expit(offset)) < log_loss(labels, expit(offset / 2))
    assert weight(labels, offset / 2, offset) == 0


def test_the_weighted_model_never_ranks_worse_on_the_validation_part():
    for seed in range(80):
        labels, offset, logit = added(60, (-0.5, 0, 0.3, 1)[seed % 4], seed)
        chosen = offset + weight(labels, offset, logit) * (logit - offset)
        assert roc_auc_score(labels, chosen) >= roc_auc_score(labels, offset)


# ------------------------------------------------------------------ the recommended model


def rivals(rows=4000, seed=0):
    """Return labels, true risks, nearly as good ones, and much worse ones."""
    logit, labels = drawn(seed, rows)
    noise = np.random.default_rng(seed + 1).normal(size=rows)
    near, far = expit(logit + 1e-9 * (labels - 0.5)[::-1]), expit(logit + 2 * noise)
    return labels, expit(logit), near, far


def recommended(labels, risks, patients, preferred, planned=None):
    losses = row_losses(labels, log_odds(np.stack([*risks.values()])))
    return recommended_model([*risks], losses, labels.sum(), patients, preferred, planned)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"ensemble": "near", "stage": "best", "other": "best"}, "ensemble"),
        ({"ensemble": "far", "stage": "near", "other": "best"}, "stage"),
        ({"ensemble": "far", "stage": "far", "other": "best", "third": "near"}, "other"),
        ({"stage": "near", "other": "best"}, "stage"),
    ],
)
def test_the_simplest_of_nearly_the_lowest_loss_is_recommended(models, expected):
    labels, *risks = rivals()
    known = dict(zip(("best", "near", "far"), risks, strict=True))
    found = {name: known[each] for name, each in models.items()}
    patients = np.arange(len(labels))
    assert recommended(labels, found, patients, ["ensemble", "stage"]) == expected


@pytest.mark.parametrize("planned", ["stage", None])
@pytest.mark.parametrize("more", [0, -1])
def test_losses_of_few_events_choose_no_model(more, planned):
    labels, best, _, far = rivals()
    last = np.flatnonzero(labels == 1)[MIN_CHOOSING_EVENTS + more - 1] + 1
    found = {"ensemble": far[:last], "stage": far[:last], "other": best[:last]}
    patients, preferred = np.arange(last), ["ensemble", "stage"]
    name = recommended(labels[:last], found, patients, preferred, planned)
    assert name == (planned if more else "other")


@pytest.mark.parametrize("ranks", [True, False])
@pytest.mark.parametrize("kind", ["label", "times"])
def test_of_few_events_the_blend_is_recommended_if_it_ranks_better_than_chance(kind, ranks):
    if kind == "times":
        outcome, table = TimeOutcome(Hazards(EVENTS, EVENTS.horizons, (1.0, 1.0))), make_times(600)
    else:
        logit, labels = drawn(0, 400)
        outcome, names = LABEL, np.arange(400).astype(str)
        table = pd.DataFrame({"id": names, "label": labels, "patient": names})
        table = table.assign(**{MODEL: expit(logit), "blend": expit(logit - 1)})
    if not ranks:
        columns = [name for name in table if name.startswith("blend")]
        mixed = np.random.default_rng(2).permutation(len(table))
        table[columns] = table[columns].to_numpy()[mixed]
    metrics = outcome.evaluate(table, 0)
    assert 10 < metrics.counts["events"] < MIN_CHOOSING_EVENTS
    best = outcome.recommend(table, metrics, MODEL, ["blend"])
    assert best == {"best_model": "blend" if ranks else None}


def test_rows_of_the_same_patient_tell_models_apart_no_better():
    """Copies would make any difference certain if rows were counted."""
    labels, best, _, _ = rivals(600)
    worse = expit(1.15 * np.log(best / (1 - best)) + 0.05)
    patients = np.arange(600)
    found = {"ensemble": worse, "other": best}
    assert recommended(labels, found, patients, ["ensemble"]) == "ensemble"
    copies = {name: risk.repeat(50) for name, risk in found.items()}
    again = recommended(labels.repeat(50), copies, patients.repeat(50), ["ensemble"])
    assert again == "ensemble"
    assert recommended(labels.repeat(50), copies, np.arange(30000), ["ensemble"]) == "other"
