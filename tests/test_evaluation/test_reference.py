"""The calibration that is kept with the weights, by which later rows are compared."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients
from medgemma_clinical.evaluation.metrics import log_odds, of_labels
from medgemma_clinical.evaluation.reference import reference
from time_rows import MODEL, TARGETS, make_times


def cohort(n=2000, intercept=0.3, slope=0.8, seed=0, rows=1):
    """Labels, risks and patients of known calibration; ``rows`` a patient are equal."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1.5, 1, n)
    labels = (rng.random(n) < expit(intercept + slope * odds)).astype(float)
    return labels.repeat(rows), expit(odds).repeat(rows), np.arange(n).repeat(rows).astype(str)


def reference_of(labels, risk, patients):
    return reference(of_labels(labels), risk, patients)


@pytest.mark.slow
def test_the_fit_is_logistic_and_its_covariance_that_of_cohorts_drawn_again():
    labels, risk, patients = cohort()
    entry = reference_of(labels, risk, patients)
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(log_odds(risk)[:, None], labels)
    assert entry["multiplier"] == pytest.approx(plain.coef_.item(), abs=1e-4)
    assert entry["shift"] == pytest.approx(plain.intercept_.item(), abs=1e-4)
    assert entry["patients"] == 2000
    drawn = [reference_of(*cohort(seed=seed)) for seed in range(300)]
    spread = np.cov([[x["shift"], x["multiplier"]] for x in drawn], rowvar=False)
    assert np.array(entry["covariance"]) == pytest.approx(spread, rel=0.3)


def test_rows_of_a_patient_count_once():
    one, three = (reference_of(*cohort(rows=n)) for n in (1, 3))
    assert three["patients"] == one["patients"]
    assert np.array(three["covariance"]) == pytest.approx(np.array(one["covariance"]), rel=1e-4)
    assert three["edges"] == one["edges"]


@pytest.mark.parametrize("n", [200, 2000, 20_000])
def test_each_group_of_risks_holds_enough_patients_of_both_kinds(n):
    labels, risk, patients = cohort(n)
    edges = reference_of(labels, risk, patients)["edges"]
    assert len(edges) == 9 or n < 20_000
    assert edges == [float(f"{edge:.3g}") for edge in edges]
    group = np.digitize(risk, edges)
    for k in range(len(edges) + 1):
        for label in (0, 1):
            assert count_patients(patients, (group == k) & (labels == label)) >= MIN_CELL


def test_few_patients_and_separated_labels_have_no_entry():
    labels, risk, patients = cohort(100)
    few = np.where(np.cumsum(labels) <= MIN_CELL - 1, labels, 0.0)
    assert reference_of(few, risk, patients) is None
    assert reference_of((risk > 0.2).astype(float), risk, patients) is None
    assert reference_of(np.tile([0.0, 1.0], 50), np.full(100, 0.4), patients) is None


def test_rows_of_times_count_by_the_weights_of_what_is_known():
    """Their expectation is that of rows which all are watched until the horizon."""
    target, rows = TARGETS[0], make_times(20_000)
    risk, known = rows[target.column(MODEL)].to_numpy(), target.known(rows)
    entry = reference(known, risk, rows["patient"].to_numpy(str))
    assert entry["patients"] == (known.weights[0] > 0).sum() < len(rows)
    fit = LogisticRegression(C=np.inf, tol=1e-10)
    fit.fit(log_odds(risk)[:, None], known.case, sample_weight=known.weights[0])
    found = entry["multiplier"], entry["shift"]
    assert found == pytest.approx((fit.coef_.item(), fit.intercept_.item()), abs=1e-4)
    assert found == pytest.approx((1, 0), abs=0.25), "these risks are true"
    nobody = rows.assign(event=0.0)
    assert reference(target.known(nobody), risk, rows["patient"].to_numpy(str)) is None
