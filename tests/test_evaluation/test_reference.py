"""The calibration that is kept with the weights, by which later rows are compared."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients
from medgemma_clinical.evaluation.metrics import log_odds
from medgemma_clinical.evaluation.reference import reference


def cohort(n=2000, intercept=0.3, slope=0.8, seed=0, rows=1):
    """Labels, risks and patients whose true calibration is known; ``rows`` a patient are equal."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1.5, 1, n)
    labels = (rng.random(n) < expit(intercept + slope * odds)).astype(float)
    return labels.repeat(rows), expit(odds).repeat(rows), np.arange(n).repeat(rows).astype(str)


def test_the_fit_is_logistic_and_its_covariance_that_of_cohorts_drawn_again():
    labels, risk, patients = cohort()
    entry = reference(labels, risk, patients)
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(log_odds(risk)[:, None], labels)
    assert entry["slope"] == pytest.approx(plain.coef_.item(), abs=1e-4)
    assert entry["intercept"] == pytest.approx(plain.intercept_.item(), abs=1e-4)
    assert entry["patients"] == 2000
    drawn = [reference(*cohort(seed=seed)) for seed in range(300)]
    spread = np.cov([[x["intercept"], x["slope"]] for x in drawn], rowvar=False)
    assert np.array(entry["covariance"]) == pytest.approx(spread, rel=0.3)


def test_rows_of_a_patient_count_once():
    one, three = (reference(*cohort(rows=n)) for n in (1, 3))
    assert three["patients"] == one["patients"]
    assert np.array(three["covariance"]) == pytest.approx(np.array(one["covariance"]), rel=1e-4)
    assert three["edges"] == one["edges"]


@pytest.mark.parametrize("n", [200, 2000, 20_000])
def test_each_group_of_risks_holds_enough_patients_of_both_kinds(n):
    labels, risk, patients = cohort(n)
    edges = reference(labels, risk, patients)["edges"]
    assert len(edges) == 9 or n < 20_000
    assert edges == [float(f"{edge:.3g}") for edge in edges]
    group = np.digitize(risk, edges)
    for k in range(len(edges) + 1):
        for label in (0, 1):
            assert count_patients(patients, (group == k) & (labels == label)) >= MIN_CELL


def test_few_patients_and_separated_labels_have_no_entry():
    labels, risk, patients = cohort(100)
    few = np.where(np.cumsum(labels) <= MIN_CELL - 1, labels, 0.0)
    assert reference(few, risk, patients) is None
    assert reference((risk > 0.2).astype(float), risk, patients) is None
    assert reference(np.tile([0.0, 1.0], 50), np.full(100, 0.4), patients) is None
