"""Metrics with competing events and censoring: by hand, by other code, by populations of truth."""

import numpy as np
import pytest
from scipy.optimize import least_squares
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)

from cohorts import repeated
from medgemma_clinical.evaluation.metrics import newton_steps
from medgemma_clinical.evaluation.time_metrics import (
    CLOGLOG,
    aalen_johansen,
    check_horizon,
    known_at,
    metrics_at,
    neighbour_curve,
    uncensored_probability,
)

HOURS = np.array([1.0, 2, 2, 3, 4, 5, 6])
EVENT = np.array([1, 0, 2, 1, 0, 2, 0])
RISK = np.array([0.9, 0.5, 0.2, 0.3, 0.4, 0.4, 0.1])
"""A table small enough for the values below, which were computed by hand."""

HORIZON = 24.0


def cloglog(risk):
    return np.log(-np.log(1 - risk))


def probability(scaled):
    return 1 - np.exp(-np.exp(scaled))


def population(rows, seed=0, censoring=0.02, step=0.0, effect=0.0):
    """Draw hours, events and true risks by ``HORIZON`` from constant hazards of two causes.

    ``effect`` is how much the log hazard of the censoring depends on what the risk depends on;
    ``step`` rounds times up, which makes ties. Returns also the inputs and the hours and events
    without censoring.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    first, second = 0.01 * np.exp(x), np.full(rows, 0.02)
    ends = rng.exponential(1 / np.stack([first, second]))
    hours, event = ends.min(axis=0), 1 + ends.argmin(axis=0)
    censored = np.inf
    if censoring:
        censored = rng.exponential(1 / (censoring * np.exp(effect * x)))
    both = first + second
    risk = first / both * (1 - np.exp(-HORIZON * both))
    complete = hours, event
    event, hours = np.where(censored < hours, 0, event), np.minimum(hours, censored)
    if step:
        hours = np.ceil(hours / step) * step
    return hours, event, risk, x, complete


def ones(hours):
    return np.ones((1, len(hours)))


def incidence_at(hours, event, horizon):
    """Compute Aalen-Johansen's estimate for event 1 with a loop over times."""
    free, incidence = 1.0, 0.0
    for time in np.unique(hours[(hours <= horizon) & (event > 0)]):
        at_risk, now = np.sum(hours >= time), hours == time
        incidence += free * np.sum(now & (event == 1)) / at_risk
        free *= 1 - np.sum(now & (event > 0)) / at_risk
    return incidence


def pseudo_values(hours, event, horizon):
    """Leave each row out in turn."""
    n = len(hours)
    parts = [np.delete(np.arange(n), row) for row in range(n)]
    without = [incidence_at(hours[part], event[part], horizon) for part in parts]
    return n * incidence_at(hours, event, horizon) - (n - 1) * np.array(without)


def plain_calibration(outcome, risk, weights):
    """Compute intercept and slope by scipy."""
    scaled, root = cloglog(risk), np.sqrt(weights)
    settings = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}

    def away(parameters):
        return root * (outcome - probability(parameters[0] + parameters[-1] * scaled))

    level = least_squares(lambda a: away([a[0], 1.0]), [0.0], **settings)
    line = least_squares(away, [0.0, 1.0], **settings)
    return {"intercept": level.x[0], "slope": line.x[1]}


def test_a_table_computed_by_hand():
    times, incidence = aalen_johansen(HOURS, EVENT)
    assert times.tolist() == [1, 2, 3, 4, 5, 6]
    first = [1 / 7, 1 / 7, 9 / 28, 9 / 28, 9 / 28, 9 / 28]
    second = [0, 1 / 7, 1 / 7, 1 / 7, 23 / 56, 23 / 56]
    assert incidence == pytest.approx(np.array([first, second]), abs=1e-12)
    uncensored = [1, 1, 1, 4 / 5, 4 / 5, 8 / 15, 8 / 15]  # just before the time or the horizon
    assert uncensored_probability(HOURS, EVENT, 5) == pytest.approx(uncensored, abs=1e-12)
    known = known_at(HOURS, EVENT, 5, ones(HOURS))
    values = known.level(RISK) | known.ranking(RISK)
    # Weights 1, 0, 1, 5/4, 0, 15/8, 15/8; rows 1 and 4 are cases.
    brier = (0.01 + 0.04 + 0.49 * 5 / 4 + 0.16 * 15 / 8 + 0.01 * 15 / 8) / 7
    assert values["observed"][0] == pytest.approx(9 / 28, abs=1e-12)
    assert values["oe"][0] == pytest.approx(9 / 28 / 0.4, abs=1e-12)
    assert values["brier"][0] == pytest.approx(brier, abs=1e-12)
    assert values["scaled_brier"][0] == pytest.approx(1 - brier / (9 / 28 * 19 / 28), abs=1e-12)
    assert values["auroc"][0] == pytest.approx((4.75 + 1.25 * 2.875) / (2.25 * 4.75), abs=1e-12)
    squares = 1 + 1 + 25 / 16 + 2 * 225 / 64
    assert known.effective_n == pytest.approx(49 / squares, abs=1e-12)
    losses = -np.log([0.9, 0.8, 0.3, 0.6, 0.9]) @ [1, 1, 5 / 4, 15 / 8, 15 / 8] / 7
    assert values["log_loss"][0] == pytest.approx(losses, abs=1e-12)
    precision = (1 / 1 + 5 / 4 * 2.25 / (2.25 + 1.875)) / 2.25
    assert values["auprc"][0] == pytest.approx(precision, abs=1e-12)


def test_constant_hazards_have_the_closed_form():
    hours, event, *_ = population(100_000, effect=0.0)
    everyone = population(100_000, seed=1)[2].mean()
    times, incidence = aalen_johansen(hours, event)
    assert incidence[0, np.searchsorted(times, HORIZON) - 1] == pytest.approx(everyone, abs=0.005)
    uncensored = uncensored_probability(hours, event, HORIZON)
    assert uncensored == pytest.approx(np.exp(-0.02 * np.minimum(hours, HORIZON)), abs=0.005)


@pytest.mark.parametrize("step", [0.0, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_least_squares_of_pseudo_values_that_leave_each_row_out(step, seed):
    hours, event, risk, *_ = population(80, seed=seed, step=step)
    outcome = pseudo_values(hours, event, HORIZON)
    expected = plain_calibration(outcome, risk, np.ones(80))
    known = known_at(hours, event, HORIZON, ones(hours))
    np.testing.assert_allclose(known.fitted[0], outcome, rtol=0, atol=1e-9)
    values = known.calibration(risk) | known.level(risk)
    assert {name: values[name][0] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert values["observed"][0] == pytest.approx(incidence_at(hours, event, HORIZON), abs=1e-12)


def test_calibration_error_averages_the_neighbours_of_each_row():
    hours, event, risk, *_ = population(200)
    risk = np.round(risk, 2)  # ties
    outcome = pseudo_values(hours, event, HORIZON)
    order = np.argsort(risk, kind="stable")
    risks, excess = risk[order], (outcome - risk)[order]
    for value in np.unique(risks):  # rows of equal risk are in no order
        excess[risks == value] = excess[risks == value].mean()
    distance = []
    for value in risks:
        first, last = np.flatnonzero(risks == value)[[0, -1]]
        distance.append(abs(excess[max(first - 50, 0) : last + 51].mean()))
    values = metrics_at(hours, event, risk, HORIZON)
    assert values["ici"] == pytest.approx(np.mean(distance), abs=1e-12)
    assert values["e50"] == pytest.approx(np.quantile(distance, 0.5), abs=1e-12)
    assert values["e90"] == pytest.approx(np.quantile(distance, 0.9), abs=1e-12)


def test_calibration_error_averages_a_twentieth_of_many_rows_on_either_side():
    risk = np.arange(4000) / 4000
    outcome = risk + (np.arange(4000) == 2000)  # one row is off by 1
    curve = neighbour_curve(outcome, risk, np.ones((1, 4000)), risk)[0]
    assert np.abs(curve - risk).mean() == pytest.approx(401 / 4000 / 401, abs=1e-12)
    between = neighbour_curve(outcome, risk, np.ones((1, 4000)), risk[:-1] + 1 / 8000)[0]
    np.testing.assert_allclose(between, (curve[1:] + curve[:-1]) / 2, rtol=0, atol=1e-12)


def test_whole_weights_of_an_incidence_equal_repeated_rows():
    hours, event, *_ = population(150, step=4.0, effect=0.5)
    weights = np.random.default_rng(0).integers(0, 4, (6, 150)).astype(float)
    times, incidence = aalen_johansen(hours, event, weights)
    for draw, weight in enumerate(weights):
        rows = repeated(weight)
        own_times, own_incidence = aalen_johansen(hours[rows], event[rows])
        at = np.isin(times, own_times)
        assert incidence[draw][:, at] == pytest.approx(own_incidence, abs=1e-12)


def test_without_censoring_the_values_are_those_of_the_labels():
    hours, event, risk, *_ = population(500, censoring=0)
    labels = (event == 1) & (hours <= HORIZON)
    values = metrics_at(hours, event, risk, HORIZON)
    assert values["auroc"] == pytest.approx(roc_auc_score(labels, risk), abs=1e-12)
    assert values["brier"] == pytest.approx(brier_score_loss(labels, risk), abs=1e-12)
    assert values["oe"] == pytest.approx(labels.mean() / risk.mean(), abs=1e-12)
    assert values["effective_n"] == pytest.approx(500, abs=1e-9)
    expected = plain_calibration(labels, risk, np.ones(500))
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    alike = metrics_at(hours, event, risk, HORIZON, censoring=np.ones(500))
    assert alike == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("values", [19, 20])
def test_a_slope_needs_twenty_different_risks(values):
    hours, event, risk, *_ = population(600)
    steps = np.quantile(risk, np.linspace(0, 1, values))
    found = metrics_at(hours, event, steps[np.searchsorted(steps, risk)], HORIZON)
    assert np.isfinite(found["slope"]) == (values == 20)
    assert np.isfinite(found["intercept"])


def test_who_is_predicted_positive_needs_no_weights():
    hours, event, risk, *_ = population(300)
    weights = np.vstack([ones(hours), np.random.default_rng(0).integers(0, 4, 300)])
    positive = risk > 0.2
    found = known_at(hours, event, HORIZON, weights).shares(positive)
    expected = (weights * positive).sum(axis=1) / weights.sum(axis=1)
    np.testing.assert_allclose(found["positives"], expected)


def test_weights_are_equal_where_all_are_watched_until_the_horizon():
    hours, event, risk, *_ = population(300, censoring=0)
    event[hours > HORIZON] = 0  # censored, all later
    known = known_at(hours, event, HORIZON, ones(hours))
    assert not known.has_weights
    assert (known.weights == 1).all()
    labels, positive = (event == 1) & (hours <= HORIZON), risk > 0.2
    assert known.shares(positive)["sensitivity"] == pytest.approx(positive[labels].mean())


@pytest.mark.parametrize(("shift", "slope"), [(0, 1), (1.0, 1), (-1.0, 1), (0.3, 2), (-0.5, 0.5)])
def test_a_population_of_known_risks(shift, slope):
    hours, event, true, _, complete = population(40_000)
    risk = probability(shift + slope * cloglog(true))
    values = metrics_at(hours, event, risk, HORIZON)
    if slope == 1:
        assert values["intercept"] == pytest.approx(-shift, abs=0.04)
    assert values["slope"] == pytest.approx(1 / slope, rel=0.05)
    assert values["oe"] == pytest.approx(true.mean() / risk.mean(), rel=0.03)
    distance = np.abs(true - risk)
    expected = distance.mean(), *np.quantile(distance, [0.5, 0.9])
    assert [values[name] for name in ("ici", "e50", "e90")] == pytest.approx(expected, abs=0.012)
    uncensored = metrics_at(*complete, risk, HORIZON)
    for name in ("auroc", "brier", "scaled_brier"):
        assert values[name] == pytest.approx(uncensored[name], abs=0.02), name
    found, whole = (known_at(*x, HORIZON, ones(hours)) for x in ((hours, event), complete))
    for name, share in found.shares(risk >= 0.2).items():
        assert share == pytest.approx(whole.shares(risk >= 0.2)[name], abs=0.02), name
    at = np.array([0.1, 0.2])
    benefits = [known.net_benefit(risk, at) for known in (found, whole)]
    np.testing.assert_allclose(*benefits, rtol=0, atol=0.01)


def test_censoring_that_depends_on_the_risk_needs_its_own_probabilities():
    hours, event, risk, x, _ = population(40_000, effect=0.7)
    given = np.exp(-0.02 * np.exp(0.7 * x) * np.minimum(hours, HORIZON))
    values = metrics_at(hours, event, risk, HORIZON, censoring=given)
    assert values["oe"] == pytest.approx(1, abs=0.03)
    assert values["slope"] == pytest.approx(1, abs=0.1)  # cut weights have a price
    assert values["ici"] < 0.015
    marginal = metrics_at(hours, event, risk, HORIZON)
    assert marginal["oe"] < 0.9
    assert marginal["slope"] < 0.85


def test_weights_of_a_regression_are_cut_and_their_worth_is_shown():
    hours, event, risk, x, _ = population(300, effect=0.5)
    given = np.exp(-0.02 * np.exp(0.5 * x) * np.minimum(hours, HORIZON))
    has_status = (event > 0) | (hours >= HORIZON)
    given[np.flatnonzero(has_status)[0]] = 1e-9  # alone it would be worth all others
    weights = np.where(has_status, 1 / given, 0)
    weights = np.minimum(weights, 20)
    labels = (event == 1) & (hours <= HORIZON)
    values = metrics_at(hours, event, risk, HORIZON, censoring=given)
    assert values["effective_n"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert values["observed"] == pytest.approx(weights @ labels / weights.sum())
    assert values["oe"] == pytest.approx(weights @ labels / (weights @ risk))
    oracles = {"auroc": roc_auc_score, "auprc": average_precision_score, "log_loss": log_loss}
    for name, oracle in oracles.items():
        assert values[name] == pytest.approx(oracle(labels, risk, sample_weight=weights)), name
    expected = plain_calibration(labels, risk, weights)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_events_at_0_equal_risks_certain_risks_and_a_single_cause_have_values():
    hours, event, risk, *_ = population(200)
    hours[event == 1] *= np.arange((event == 1).sum()) > 3
    at_zero = metrics_at(hours, event, risk, HORIZON)
    assert at_zero["observed"] == pytest.approx(incidence_at(hours, event, HORIZON))
    assert np.isfinite([*at_zero.values()]).all()
    equal = metrics_at(hours, event, np.full(200, 0.137219873), HORIZON)
    assert np.isnan(equal.pop("slope"))
    rounded = 0.137219873 + 1e-16 * np.arange(200)  # differ by rounding alone
    assert np.isnan(metrics_at(hours, event, rounded, HORIZON)["slope"])
    assert equal["auroc"] == 0.5
    assert equal["ici"] == pytest.approx(abs(equal["observed"] - 0.137219873))
    assert np.isfinite([*equal.values()]).all()
    risk[:20], risk[20:40] = 0, 1
    assert np.isfinite([*metrics_at(hours, event, risk, HORIZON).values()]).all()
    single = metrics_at(hours, np.minimum(event, 1), risk, HORIZON)
    free = np.prod(
        [
            1 - np.sum((hours == t) & (event > 0)) / np.sum(hours >= t)
            for t in np.unique(hours[(event > 0) & (hours <= HORIZON)])
        ]
    )
    assert single["observed"] == pytest.approx(1 - free)  # Kaplan-Meier's


@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.5])
def test_a_fit_is_found_where_scipy_finds_one(shift):
    hours, event, risk, *_ = population(60, seed=60, effect=0.5)
    scaled = shift + 0.5 * cloglog(risk)  # risks that are far off, and few events
    outcome = np.tile(pseudo_values(hours, event, HORIZON), (100, 1))
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 100).astype(float)
    z = (scaled - scaled.mean()) / scaled.std()
    start = [scaled.mean(), scaled.std()]
    fitted = newton_steps(CLOGLOG, outcome, np.stack([np.ones(60), z]), weights, start)
    defined = 0
    for weight, parameters in zip(weights, fitted, strict=True):
        root = np.sqrt(weight)
        expected = least_squares(
            lambda p, root=root: root * (outcome[0] - probability((p[0] + p[1] * z).clip(max=6))),
            start,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        if np.abs(expected.x).max() < 8:  # beyond it the classes are about separated
            defined += 1
            assert parameters == pytest.approx(expected.x, rel=1e-4, abs=1e-4)
    assert defined > 75


def test_no_finite_fit_is_nan():
    hours, event = np.full(40, 30.0), np.zeros(40)
    hours[:10], event[:10] = 1, 1
    risk = np.where(event == 1, 0.6, 0.2) + np.linspace(0, 0.1, 40)  # separates them
    values = metrics_at(hours, event, risk, HORIZON)
    assert np.isnan(values["slope"])
    assert np.isfinite(values["intercept"])
    assert values["auroc"] == 1
    known = known_at(hours, event * 2, HORIZON, ones(hours))
    nobody = known.ranking(risk) | known.level(risk) | known.calibration(risk)
    nobody |= known.distances(risk)
    undefined = {name for name, x in nobody.items() if not np.isfinite(x[0])}
    assert undefined == {"auroc", "auprc", "scaled_brier", "intercept", "slope"}


def altered(index, row, value):
    arrays = [np.array(x, dtype=float) for x in population(200)[:3]]
    arrays[index][row] = value
    return *arrays, HORIZON


REFUSALS = {
    "everyone censored": (np.full(20, 30.0), np.zeros(20), np.full(20, 0.1), HORIZON),
    "nobody followed so long": (*population(200)[:3], 10_000.0),
    "nine at risk": (
        np.repeat([1.0, 30.0], [20, 9]),
        np.repeat([1, 2], [20, 9]),
        np.full(29, 0.1),
        24,
    ),
    "no event 1 by then": (np.full(40, 30.0), np.ones(40), np.full(40, 0.1), HORIZON),
    "event 1 nowhere": (np.r_[5.0, np.full(39, 30.0)], np.full(40, 2), np.full(40, 0.1), HORIZON),
    "most censored": (
        np.r_[1.0, np.full(480, 5.0), np.full(20, 30.0)],
        np.r_[1, np.zeros(500)],
        np.full(501, 0.1),
        HORIZON,
    ),
    "horizon 0": (*population(200)[:3], 0.0),
    "horizon NaN": (*population(200)[:3], np.nan),
    "other lengths": (*population(200)[:2], np.full(3, 0.1), HORIZON),
    "negative time": altered(0, 7, -1),
    "unknown time": altered(0, 7, np.nan),
    "endless time": altered(0, 7, np.inf),
    "no kind of event": altered(1, 7, 0.5),
    "unknown risk": altered(2, 7, np.nan),
    "risk above 1": altered(2, 7, 1.1),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_answered_is_refused_in_one_line(case):
    with pytest.raises(ValueError, match=r"hours|event|risk|horizon") as refusal:
        metrics_at(*REFUSALS[case])
    assert "\n" not in str(refusal.value)
    if case in ("negative time", "no kind of event", "risk above 1"):
        assert "row 7" in str(refusal.value)


def test_the_last_horizon_that_is_answered():
    hours, event = np.repeat([1.0, 30.0], [20, 10]), np.repeat([1, 2], [20, 10])
    assert check_horizon(hours, event, 30.0) is None
    hours, event = np.r_[1.0, np.full(380, 5.0), np.full(20, 30.0)], np.r_[1, np.zeros(400)]
    assert check_horizon(hours, event, HORIZON) is None  # 20 of 400 are left: a twentieth


@pytest.mark.parametrize("value", [0.0, 1.1, np.nan])
def test_impossible_probabilities_of_censoring_are_refused(value):
    hours, event, risk, *_ = population(200)
    with pytest.raises(ValueError, match="row 3"):
        metrics_at(hours, event, risk, HORIZON, censoring=np.where(np.arange(200) == 3, value, 1))
