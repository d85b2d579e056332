"""Updates of a model in a new cohort, each judged on the half that it has not seen."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.updating import (
    AS_IT_IS,
    BOTH,
    INTERCEPT,
    METHODS,
    best_update,
    crosswise,
    fit_update,
    judge_updates,
    update_table,
    updated_rule,
)
from pages import MODEL, Page, make_content, make_rows, write_page


def cohort(n=3000, **options):
    """Draw labels and risks whose log-odds are 2 times too large and 1 too low."""
    rows = make_rows(n, **options)
    rows[MODEL] = expit(2 * logit(rows[MODEL]) - 1)
    return rows, rows["label"].to_numpy(float), rows[MODEL].to_numpy(float)


def test_an_update_is_the_logistic_fit_on_the_log_odds():
    _, labels, risk = cohort()
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], labels)
    slope, intercept = fit_update(labels, risk, BOTH)
    assert slope == pytest.approx(plain.coef_.item(), abs=1e-4)
    assert intercept == pytest.approx(plain.intercept_.item(), abs=1e-4)
    assert (slope, intercept) == (pytest.approx(0.5, abs=0.06), pytest.approx(0.5, abs=0.12))
    assert fit_update(labels, risk, AS_IT_IS) == (1, 0)
    slope, intercept = fit_update(labels, risk, INTERCEPT)
    assert slope == 1
    assert expit(logit(risk) + intercept).mean() == pytest.approx(labels.mean())
    turned = fit_update(1 - labels, risk, BOTH)
    assert turned == fit_update(1 - labels, risk, INTERCEPT), "no update turns the ranking round"


def test_a_half_never_sees_the_update_that_its_own_labels_make():
    _, labels, risk = cohort(800)
    half = np.arange(800) % 2
    before = crosswise(labels, risk, half)
    for k in (0, 1):
        other = np.where(half == k, np.random.default_rng(k).permutation(labels), labels)
        after, own = crosswise(other, risk, half), half == k
        pd.testing.assert_frame_equal(after[own], before[own])
        assert (after.loc[~own, [INTERCEPT, BOTH]] != before.loc[~own, [INTERCEPT, BOTH]]).all(
            axis=None
        )


@pytest.mark.parametrize("rows_a_patient", [1, 5])
def test_the_table_judges_each_update_and_the_best_one_is_chosen(rows_a_patient):
    rows, labels, _ = cohort(rows_a_patient=rows_a_patient)
    judged = judge_updates(rows, MODEL, 3)
    assert list(judged) == list(METHODS)
    for _, own in judged.assign(patient=rows["patient"], risk=rows[MODEL]).groupby("patient"):
        moved = logit(own[INTERCEPT]) - logit(own["risk"])
        assert np.ptp(moved) < 1e-9, "a patient's rows are in one half"
    table = update_table(rows, judged, 0)
    for method in METHODS:
        value = table.loc[method, "value"]
        assert value["log_loss"] == pytest.approx(log_loss(labels, judged[method]))
        assert value["brier"] == pytest.approx(brier_score_loss(labels, judged[method]))
    slope, large = (table.xs(f"calibration_{name}", level=1) for name in ("slope", "in_the_large"))
    assert slope.loc[AS_IT_IS, "high"] < 0.6
    assert slope.loc[BOTH, "low"] < 1 < slope.loc[BOTH, "high"]
    assert large.loc[AS_IT_IS, "low"] > 0.1
    assert (large.loc[[INTERCEPT, BOTH], "low"] < 0).all()
    assert (large.loc[[INTERCEPT, BOTH], "high"] > 0).all()
    method, losses = best_update(labels, judged)
    assert method == BOTH
    assert losses[BOTH] < losses[INTERCEPT] < losses[AS_IT_IS]


@pytest.mark.parametrize(("events", "others", "rows"), [(19, 60, 0), (60, 19, 0), (20, 20, 1)])
def test_few_patients_of_either_class_try_no_update(events, others, rows, tmp_path):
    table = make_rows(events + others).assign(label=np.repeat([1, 0], [events, others]))
    judged = judge_updates(table, MODEL, 0)
    assert len(judged) == rows * len(table)
    content = make_content(len(table), updates=judged)
    page = Page(write_page(tmp_path, table, content, folder=tmp_path))
    assert ("No update was tried" in page.text) == (rows == 0)
    assert any("after each update" in alt for alt, _ in page.images()) == bool(rows)
    assert (tmp_path / "figures" / "updates.csv").exists() == bool(rows)


def test_an_updated_rule_predicts_the_event_for_the_same_rows():
    odds = np.random.default_rng(0).normal(size=1000)
    rule = DecisionRule(1.5, -0.2, 0.3)
    new = updated_rule(rule, 0.5, 0.7)
    before, after = rule.probability(odds), new.probability(odds)
    np.testing.assert_allclose(logit(after), 0.7 + 0.5 * logit(before))
    assert ((after >= new.threshold) == (before >= rule.threshold)).all()
    assert 0 < (before >= rule.threshold).sum() < 1000
