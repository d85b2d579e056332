"""Updates of a model in a new cohort: which one tests choose, and what it brings to other rows."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.evaluation.decision import (
    BOTH,
    INTERCEPT,
    METHODS,
    NOT_UPDATED,
    DecisionRule,
    choose_update,
    clustered_p_value,
    fit_updates,
)
from medgemma_clinical.evaluation.metrics import calibration
from medgemma_clinical.evaluation.topics.calibration import calibration_updates
from medgemma_clinical.evaluation.updating import (
    CHOSEN,
    crosswise,
    evaluate_updates,
    updated_rule,
)
from pages import MODEL, Page, make_rows, write_page


def cohort(n=3000, **options):
    """Draw labels and risks whose log-odds are 2 times too large and 1 too low."""
    rows = make_rows(n, **options)
    rows[MODEL] = expit(2 * logit(rows[MODEL]) - 1)
    return rows, rows["label"].to_numpy(float), rows[MODEL].to_numpy(float)


def names(n):
    return np.arange(n).astype(str)


def simulated(rng, n, slope=1.0, intercept=0.0, rows_a_patient=1):
    """Draw labels whose log-odds are ``intercept + slope`` times those of the risks."""
    odds = rng.normal(-1.5, 1, n // rows_a_patient).repeat(rows_a_patient)
    draw = rng.random(n // rows_a_patient).repeat(rows_a_patient)  # equal rows of a patient
    return (draw < expit(intercept + slope * odds)).astype(float), expit(odds)


def test_an_update_is_the_logistic_fit_on_the_log_odds():
    _, labels, risk = cohort()
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], labels)
    updates = fit_updates(labels, risk)
    slope, intercept = updates[BOTH]
    assert slope == pytest.approx(plain.coef_.item(), abs=1e-4)
    assert intercept == pytest.approx(plain.intercept_.item(), abs=1e-4)
    assert (slope, intercept) == (pytest.approx(0.5, abs=0.06), pytest.approx(0.5, abs=0.12))
    assert updates[NOT_UPDATED] == (1, 0)
    slope, intercept = updates[INTERCEPT]
    assert slope == 1
    assert expit(logit(risk) + intercept).mean() == pytest.approx(labels.mean())
    assert BOTH not in fit_updates(1 - labels, risk), "no update turns the ranking round"


# ------------------------------------------------------------------ the tests that choose


def test_the_p_value_is_a_likelihood_ratios_and_counts_patients():
    labels, risk = simulated(np.random.default_rng(0), 4000, slope=0.93, intercept=0.05)
    odds, one = logit(risk), np.ones(4000)
    fit, null = np.array(fit_updates(labels, risk)[BOTH][::-1]), np.array([0.0, 1.0])

    def loss(a, b):
        return log_loss(labels, expit(a + b * odds), normalize=False)

    plain = chi2.sf(2 * (loss(*null) - loss(*fit)), 2)
    assert 0.001 < plain < 0.5
    columns = np.stack([one, odds])
    p = clustered_p_value(labels, columns, 0 * one, names(4000), fit, null, [0, 1])
    assert p == pytest.approx(plain, rel=0.2)
    copies = [np.repeat(each, 3, axis=-1) for each in (labels, columns, 0 * one, names(4000))]
    assert clustered_p_value(*copies, fit, null, [0, 1]) == pytest.approx(p)


@pytest.mark.parametrize("rows_a_patient", [1, 3])
@pytest.mark.parametrize("with_slope", [True, False])
def test_a_calibrated_model_is_rarely_updated(with_slope, rows_a_patient):
    rng, updated = np.random.default_rng(0), 0
    for _ in range(300):
        labels, risk = simulated(rng, 900, rows_a_patient=rows_a_patient)
        patients = names(900 // rows_a_patient).repeat(rows_a_patient)
        method, _ = choose_update(labels, risk, patients, with_slope=with_slope)
        updated += method != NOT_UPDATED
    assert 5 <= updated <= 28  # 5 % of 300, by 2.5 standard errors and more


@pytest.mark.parametrize(
    ("slope", "intercept", "with_slope", "method"),
    [
        (0.5, -0.7, True, BOTH),
        (1.0, 0.7, True, INTERCEPT),
        (0.5, 0.7, False, INTERCEPT),
        (-0.5, -2.5, True, INTERCEPT),
    ],
)
def test_tests_choose_the_simplest_update_that_is_needed(slope, intercept, with_slope, method):
    labels, risk = simulated(np.random.default_rng(0), 3000, slope, intercept)
    assert choose_update(labels, risk, names(3000), with_slope=with_slope)[0] == method


# ------------------------------------------------------------------ what it brings


def test_a_half_never_sees_the_update_that_its_own_labels_make():
    _, labels, risk = cohort(800)
    half, patients = np.arange(800) % 2, names(800)
    before = crosswise(labels, risk, patients, half, with_slope=True)
    for k in (0, 1):
        other = np.where(half == k, np.random.default_rng(k).permutation(labels), labels)
        after, own = crosswise(other, risk, patients, half, with_slope=True), half == k
        pd.testing.assert_frame_equal(after[own], before[own])
        assert (after.loc[~own, [INTERCEPT, BOTH]] != before.loc[~own, [INTERCEPT, BOTH]]).all(
            axis=None
        )


@pytest.mark.parametrize("rows_a_patient", [1, 5])
def test_the_table_holds_each_update_in_rows_that_it_has_not_seen(rows_a_patient, monkeypatch):
    monkeypatch.setattr("medgemma_clinical.evaluation.updating.DIVISIONS", 1)
    rows, labels, risk = cohort(rows_a_patient=rows_a_patient)
    found = evaluate_updates(rows, MODEL, 3)
    assert found.method == BOTH
    assert (found.slope, found.intercept) == fit_updates(labels, risk)[BOTH]
    for _, own in found.risks.assign(patient=rows["patient"], risk=risk).groupby("patient"):
        moved = logit(own[INTERCEPT]) - logit(own["risk"])
        assert np.ptp(moved) < 1e-9, "a patient's rows are in one half"
    (division,) = np.random.default_rng(3).integers(2**32, size=1).tolist()
    half = draw_folds(rows["patient"].to_numpy(str), labels, 2, division)
    value = found.table["value"]
    for method in (*METHODS, CHOSEN):
        own = found.risks[method].to_numpy()
        assert value[method, "log_loss"] == pytest.approx(log_loss(labels, own))
        of_halves = [
            calibration(labels[half == k], own[half == k], np.ones((1, (half == k).sum())))
            for k in (0, 1)
        ]
        slopes = [each["calibration_slope"].item() for each in of_halves]
        assert value[method, "calibration_slope"] == pytest.approx(np.mean(slopes))
    losses = found.table.xs("log_loss", level="metric")
    gain = losses["value"] - losses["value"][NOT_UPDATED]
    assert losses["difference"].to_numpy() == pytest.approx(gain.to_numpy())
    assert (
        losses.loc[CHOSEN, "difference_low"] < gain[CHOSEN] < losses.loc[CHOSEN, "difference_high"]
    )
    assert losses.loc[CHOSEN, "difference_high"] < 0


def test_slopes_of_halves_are_not_pooled():
    """Pooled, the slope after an update hardly exceeds 1, however far from the truth it is."""
    rng, slopes = np.random.default_rng(0), []
    while len(slopes) < 8:
        labels, risk = simulated(rng, 150)
        rows = pd.DataFrame({"label": labels, "patient": names(150), MODEL: risk})
        if found := evaluate_updates(rows, MODEL, 0):
            slopes.append(found.table["value"][BOTH, "calibration_slope"])
    assert np.mean(slopes) > 1.05


@pytest.mark.parametrize(("events", "others", "tried"), [(19, 60, 0), (60, 19, 0), (20, 20, 1)])
def test_few_patients_of_either_class_try_no_update(events, others, tried, tmp_path):
    table = make_rows(events + others).assign(label=np.repeat([1, 0], [events, others]))
    updates = evaluate_updates(table, MODEL, 0)
    assert (updates is not None) == bool(tried)
    results = [partial(calibration_updates, tried=updates)]
    page = Page(write_page(tmp_path, table, results=results))
    assert ("No update was tried" in page.text) == (not tried)
    assert any("after each update" in alt for alt, _ in page.images()) == bool(tried)
    assert (tmp_path / "figures" / "updates.csv").exists() == bool(tried)


def test_an_updated_rule_predicts_the_event_for_the_same_rows():
    odds = np.random.default_rng(0).normal(size=1000)
    rule = DecisionRule(1.5, -0.2, 0.3)
    new = updated_rule(rule, 0.5, 0.7)
    before, after = rule.probability(odds), new.probability(odds)
    np.testing.assert_allclose(logit(after), 0.7 + 0.5 * logit(before))
    assert ((after >= new.threshold) == (before >= rule.threshold)).all()
    assert 0 < (before >= rule.threshold).sum() < 1000
