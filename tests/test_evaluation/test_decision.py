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
    BOTH,
    INTERCEPT,
    MIN_CHOOSING_EVENTS,
    NOT_UPDATED,
    RESIDUAL_WEIGHTS,
    TESTS,
    DecisionOptions,
    DecisionRule,
    choose_threshold,
    fit_residual_weight,
    fit_rule,
    recommended_model,
)
from medgemma_clinical.evaluation.metrics import LOGIT, log_odds, of_labels, row_losses
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.rules import recommend, rules_of
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.time_metrics import CLOGLOG
from medgemma_clinical.models.outcome import LABELS, first_auroc
from time_rows import MODEL, TARGETS, make_times


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
    found = choose_threshold(None, of_labels(labels), risk)
    assert found == pytest.approx((best + lower) / 2)


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
        found = choose_threshold(f"{name} {goal}", of_labels(labels), risk)
        assert ((risk >= found) == (risk >= best)).all()
        assert 0 < found < 1
    assert choose_threshold("0.25", of_labels(labels), risk) == 0.25
    assert choose_threshold(None, of_labels(0 * labels), risk) == 0.5, "one class"


def rule_of(labels, odds, method):
    """Fit a rule where each row is a patient."""
    patients, options = np.arange(len(labels)), DecisionOptions(method)
    return fit_rule(of_labels(labels), expit(odds), patients, options)


def test_recalibration_mends_an_overconfident_model():
    (truth, labels), (new_truth, new_labels) = drawn(0), drawn(1)
    sure, new_sure = 3 * truth + 1, 3 * new_truth + 1
    before, after, tested = (rule_of(labels, sure, x) for x in (NOT_UPDATED, BOTH, TESTS))
    assert tested == after
    assert (before.method, after.method) == (NOT_UPDATED, BOTH)
    assert (after.multiplier, after.shift) == pytest.approx((1 / 3, -1 / 3), abs=0.08)
    own = plain_calibration(labels, after.risk(expit(sure), LOGIT))  # the rows it was fitted to
    assert own == pytest.approx({"slope": 1, "intercept": 0}, abs=1e-6)
    loss = [log_loss(new_labels, rule.risk(expit(new_sure), LOGIT)) for rule in (before, after)]
    assert loss[1] < loss[0] - 0.1
    for rule in (before, after):
        risk = rule.risk(expit(sure), LOGIT)
        assert rule.threshold == choose_threshold(None, of_labels(labels), risk)


@pytest.mark.parametrize("case", ["reversed", "separated"])
def test_a_reversed_or_separated_validation_part_is_not_recalibrated(case):
    truth, labels = drawn(4, 400)
    odds = -truth if case == "reversed" else np.where(labels == 1, 1, -1) + truth / 100
    assert not rule_of(labels, odds, BOTH).is_moved


@pytest.mark.parametrize(("events", "method"), [(99, INTERCEPT), (100, BOTH)])
def test_tests_choose_a_slope_from_a_hundred_events_on_and_else_an_intercept(events, method):
    truth, labels = drawn(7, 3000)
    kept = (labels == 0) | (labels.cumsum() <= events)
    assert rule_of(labels[kept], 3 * truth[kept], TESTS).method == method
    truth, labels = drawn(2)
    assert not rule_of(labels, truth, TESTS).is_moved


UNSOUND = [("multiplier", 0.0), ("multiplier", -1.0), ("multiplier", "steep")]
UNSOUND += [("shift", math.inf), ("shift", None), ("threshold", math.nan), ("threshold", "")]


@pytest.mark.parametrize(("name", "number"), UNSOUND)
def test_an_unsound_incomplete_or_reversed_rule_is_refused(name, number):
    rule = DecisionRule(0.3, -1.25, 0.125)
    stored = json.loads(json.dumps(asdict(rule)))
    assert rules_of({"decision": {"label": stored}}) == {"label": rule}
    assert rules_of({}) == {"label": DecisionRule(1, 0, 0.5)}
    lacking = {key: each for key, each in stored.items() if key != name}
    for wrong in ({**stored, name: number}, lacking, {}, [*stored.values()]):
        with pytest.raises(ValueError, match="decision rule"):
            rules_of({"decision": {"label": wrong}})
    with pytest.raises(ValueError, match="risk_24h"):
        rules_of({"decision": {"risk_24h": stored}})  # of another target


@pytest.mark.parametrize("link", [LOGIT, CLOGLOG])
def test_a_rule_moves_risks_on_their_scale_and_predicts_the_event_from_its_threshold_on(link):
    odds = np.array([-2.0, -1, 0, 1])
    risk = link.risk(odds)
    assert (DecisionRule().risk(risk, link) == risk).all()
    assert link.scale(DecisionRule(2, 1).risk(risk, link)) == pytest.approx(1 + 2 * odds)
    with np.errstate(all="raise", under="ignore"):  # extreme risks give no warning
        extreme = DecisionRule(9, 1).risk(np.array([0.0, 1.0]), link)
    assert extreme == pytest.approx([0, 1], abs=1e-12)
    rule = DecisionRule(1.5, -0.2, 0.3)
    new, before = rule.followed_by(0.5, 0.7, link), rule.risk(risk, link)
    after = new.risk(risk, link)
    assert link.scale(after) == pytest.approx(0.7 + 0.5 * link.scale(before))
    assert ((after >= new.threshold) == (before >= rule.threshold)).all()


def test_a_threshold_does_not_depend_on_rows_whose_outcome_is_not_known():
    rows, target = make_times(2000), TARGETS[0]
    known, risk = target.known(rows), rows[target.column(MODEL)].to_numpy()
    first = choose_threshold("specificity 0.8", known, risk)
    is_known = known.weights[0] > 0
    assert 0 < is_known.mean() < 1
    assert choose_threshold("specificity 0.8", known, np.where(is_known, risk, 0.99)) == first
    negative = (risk < first) @ (known.weights[0] * (1 - known.case))
    share = negative / (known.weights[0] @ (1 - known.case))
    assert share == pytest.approx(0.8, abs=0.01)


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
    losses = partial(LABELS.row_losses, labels)
    auroc = partial(first_auroc, LABELS, pd.DataFrame({"label": labels}))
    return fit_residual_weight(offset[:, None], logit[:, None], patients, losses, auroc)


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
@pytest.mark.parametrize("targets", [[LABEL], TARGETS[:2]])
def test_of_few_events_the_blend_is_recommended_if_it_ranks_better_than_chance(targets, ranks):
    if targets[0].horizon:
        table = make_times(600)
    else:
        logit, labels = drawn(0, 400)
        names = np.arange(400).astype(str)
        table = pd.DataFrame({"id": names, "label": labels, "patient": names})
        table = table.assign(**{MODEL: expit(logit), "blend": expit(logit - 1)})
    if not ranks:
        columns = [name for name in table if name.startswith("blend")]
        mixed = np.random.default_rng(2).permutation(len(table))
        table[columns] = table[columns].to_numpy()[mixed]
    metrics = evaluate(table, 0, targets=targets)
    assert 10 < metrics.counts["events"] < MIN_CHOOSING_EVENTS
    best = recommend(table, metrics, targets, MODEL, ["blend"])
    assert best == ("blend" if ranks else None)


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
