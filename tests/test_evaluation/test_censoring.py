"""The regression of the censoring: right where it depends on inputs, by other patients' rows."""

import numpy as np
import pytest

from medgemma_clinical.evaluation.censoring import CensoringRegression
from medgemma_clinical.evaluation.time_metrics import metrics_at, uncensored_probability

HORIZON = 24.0


def censoring_survival(*data, seed=0):
    """Return each row's probability by a regression."""
    return CensoringRegression(*data, seed).probability


def waiting_list(rows, seed=0, step=0.0):
    """Draw a waiting list: deaths by x, transplants by x too, and an end of the record by z.

    Returns hours, event (0 end of the record, 1 death, 2 transplant), inputs, and the probabilities
    just before the row's time or the horizon that neither end, nor transplant, came.
    """
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(2, rows))
    hazards = np.stack([0.02 * np.exp(0.6 * z), 0.01 * np.exp(x), 0.02 * np.exp(0.6 * x)])
    ends = rng.exponential(1 / hazards)
    hours, event = ends.min(axis=0), ends.argmin(axis=0)
    if step:
        hours = np.ceil(hours / step) * step
    reached = np.minimum(hours, HORIZON)
    if step:  # what ends before the time ends at a step before
        reached = np.ceil(reached / step) * step - step
    inputs = np.stack([x, z, rng.normal(size=rows)], axis=1)
    risk_without_transplant = 1 - np.exp(-HORIZON * hazards[1])
    return hours, event, inputs, np.exp(-reached * hazards), risk_without_transplant


@pytest.mark.parametrize("step", [0.0, 3.0])
def test_the_probability_of_constant_hazards_is_recovered(step):
    hours, event, inputs, true, _ = waiting_list(4000, step=step)
    for reason in (0, 2):
        survival = censoring_survival(
            hours, event == reason, inputs, HORIZON, np.arange(len(hours))
        )
        assert ((survival > 0) & (survival <= 1)).all()
        before_any = hours <= hours[event == reason].min()
        assert (survival[before_any] == 1).all()
        assert np.abs(survival - true[reason]).mean() < 0.02
        marginal = uncensored_probability(hours, np.where(event == reason, 0, 1), HORIZON)
        assert np.abs(marginal - true[reason]).mean() > 0.03


def test_risks_without_the_intervention_need_the_product_of_both_regressions():
    hours, event, inputs, true, risk = waiting_list(6000)
    groups = np.arange(len(hours))
    ended = [
        censoring_survival(hours, event == reason, inputs, HORIZON, groups) for reason in (0, 2)
    ]
    death = (event == 1).astype(float)
    values, expected, marginal = (
        metrics_at(hours, death, risk, HORIZON, censoring=censoring)
        for censoring in (ended[0] * ended[1], true[0] * true[2], None)
    )
    for name in ("auroc", "brier", "scaled_brier", "oe", "intercept", "ici"):
        assert values[name] == pytest.approx(expected[name], abs=0.02), name
    assert values["oe"] == pytest.approx(1, abs=0.05)
    assert values["slope"] == pytest.approx(1, abs=0.1)
    assert marginal["oe"] < 0.9
    assert marginal["slope"] < 0.85


def test_a_patient_is_predicted_by_other_patients():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(100, 40)).repeat(2, axis=0)  # two equal rows a patient, noise alone
    is_censored = (rng.random(100) < 0.5).repeat(2)
    hours = np.where(is_censored, rng.uniform(1, 20, 200), 30.0)
    mean = {}
    for name, groups in {"patients": np.arange(200) // 2, "rows": np.arange(200)}.items():
        survival = censoring_survival(hours, is_censored, inputs, HORIZON, groups)
        mean[name] = survival[~is_censored].mean()
    assert mean["rows"] > mean["patients"] + 0.1  # there a row's twin was in training


def test_a_value_that_is_unknown_can_tell_the_censoring():
    hours, event, inputs, true, _ = waiting_list(4000)
    inputs = np.where(inputs[:, [1]] > 0.5, np.nan, inputs)  # by z, on which the record's end rests
    survival = censoring_survival(hours, event == 0, inputs, HORIZON, np.arange(len(hours)))
    assert np.abs(survival - true[0]).mean() < 0.04
    assert np.corrcoef(survival, true[0])[0, 1] > 0.9


@pytest.mark.parametrize("patients", [0, 9])
def test_few_censored_patients_leave_kaplan_meier(patients):
    hours, event, inputs, *_ = waiting_list(300)
    early = np.flatnonzero(hours < HORIZON)[: 2 * patients]
    event = np.isin(np.arange(300), early, invert=True).astype(float)
    groups = np.arange(300)
    groups[early] = np.arange(2 * patients) // 2  # two rows each
    survival = censoring_survival(hours, event == 0, inputs, HORIZON, groups)
    assert survival.tolist() == uncensored_probability(hours, event, HORIZON).tolist()
    assert (survival == 1).all() == (patients == 0)


def test_equal_seeds_give_equal_folds():
    hours, event, inputs, *_ = waiting_list(600)
    first, again, other = (
        censoring_survival(hours, event == 0, inputs, HORIZON, np.arange(600), seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
