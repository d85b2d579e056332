"""Metrics under weights equal scikit-learn's on repeated rows; the bootstrap draws patients."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from cohorts import (
    plain_calibration,
    plain_distances,
    plain_line,
    plain_metrics,
    plain_shares,
    repeated,
    simulate,
)
from medgemma_clinical.evaluation import metrics as metrics_module
from medgemma_clinical.evaluation.metrics import (
    bootstrap_weights,
    clustered_error,
    confusion_shares,
    metrics,
    net_benefit,
    of_labels,
    spline_curve,
)

RISKS = st.sampled_from([k / 10 for k in range(11)]) | st.floats(0, 1)
ROWS = st.lists(st.tuples(st.integers(0, 1), RISKS, st.integers(0, 3)), min_size=2, max_size=40)

DRAWS = 1000
REPEATABLE = settings(deadline=None, derandomize=True)


def ones(labels):
    return np.ones((1, len(labels)))


def calibration(labels, risk):
    return firsts(of_labels(labels).calibration(risk))


def distances(labels, risk):
    return firsts(of_labels(labels).distances(risk))


def firsts(found):
    return {name: values[0] for name, values in found.items()}


def weightings(labels, count, seed=0):
    """Draw weights that keep both classes."""
    weights = np.random.default_rng(seed).integers(0, 4, (count, len(labels))).astype(float)
    weights[:, [labels.argmax(), labels.argmin()]] = 1
    return weights


@pytest.mark.slow
@REPEATABLE
@given(ROWS)
def test_metrics_and_shares_equal_scikit_learn_on_repeated_rows(rows):
    labels, risk, weight = np.array(rows).T
    sample = repeated(weight)
    assume(len(np.unique(labels[sample])) == 2)
    weights = np.stack([weight, weightings(labels, 1)[0]])
    found = metrics(labels, risk, weights) | confusion_shares(labels, risk >= 0.35, weights)
    expected = plain_metrics(labels[sample], risk[sample])
    expected |= plain_shares(labels[sample], risk[sample] >= 0.35)
    assert firsts(found) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_calibration_is_a_logistic_fit_without_penalty(slope):
    labels, risk, _ = simulate(np.random.default_rng(3), 200, slope=slope)
    weights = weightings(labels, 3)
    known = of_labels(labels, weights)
    found, line = known.calibration(risk), known.fit_line(risk)
    for k, weight in enumerate(weights):
        sample = repeated(weight)
        expected = plain_calibration(labels[sample], risk[sample])
        assert {name: x[k] for name, x in found.items()} == pytest.approx(expected, abs=1e-6)
        expected = plain_line(labels[sample], risk[sample])
        assert [x[k] for x in line] == pytest.approx(expected, abs=1e-6)
        moved = known.fit_level(risk, slope=0.7)[k]  # an offset that is not the risks' own
        assert weight @ (expit(0.7 * logit(risk) + moved) - labels) == pytest.approx(0, abs=1e-6)


def test_one_event_has_a_slope_where_a_plain_newton_step_overshoots():
    rng = np.random.default_rng(0)
    for _ in range(30):
        risk = np.sort(np.append(rng.uniform(0.02, 0.06, 21), rng.uniform(0.25, 0.3, 3)))
        labels = (np.arange(24) == 21).astype(float)  # two others have higher risks
        expected = plain_calibration(labels, risk)
        assert calibration(labels, risk) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", ["separated", "reversed", "tied", "equal", "rounded"])
def test_separated_classes_and_equal_risks_have_no_slope(case):
    labels, risk = np.repeat([0.0, 1.0], [30, 20]), np.linspace(0.1, 0.9, 50)
    if case == "reversed":
        risk = risk[::-1].copy()
    elif case == "tied":
        risk[28:32] = risk[30]  # equal risks at the border change nothing
    elif case in ("equal", "rounded"):
        noise = 1e-13 * np.random.default_rng(0).normal(size=50)
        risk = 0.137219873 + noise * (case == "rounded")
    found = calibration(labels, risk)
    assert np.isnan(found["slope"])
    error = list(distances(labels, risk).values())
    if case in ("equal", "rounded"):  # the curve is the prevalence
        assert error == pytest.approx([abs(0.4 - 0.137219873)] * 3)
    else:
        assert np.isnan(error).all()
    # The intercept moves the risks to sum to the events.
    assert expit(logit(risk) + found["intercept"]).sum() == pytest.approx(labels.sum())


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1, 0.7), (1, -0.7), (2, 0.5), (0.5, -1)])
def test_calibration_of_a_population_of_known_risks(scale, shift):
    events = np.repeat(np.arange(1, 40), 40)  # of 40 rows each
    true, labels = events / 40, (np.arange(len(events)) % 40 < events).astype(float)
    risk = expit(scale * logit(true) + shift)
    line = [x.item() for x in of_labels(labels).fit_line(risk)]
    assert line == pytest.approx([1 / scale, -shift / scale], abs=1e-8)
    distance = np.abs(risk - true)
    expected = distance.mean(), *np.quantile(distance, [0.5, 0.9])
    assert tuple(distances(labels, risk).values()) == pytest.approx(expected, abs=1e-8)
    if scale == 1:
        assert calibration(labels, risk)["intercept"] == pytest.approx(-shift, abs=1e-8)


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_distances_are_those_from_a_spline_on_the_log_odds(slope):
    labels, risk, _ = simulate(np.random.default_rng(4), 400, slope=slope)
    weight = np.random.default_rng(0).integers(1, 4, 400)  # knots are those of the rows
    found = of_labels(labels, np.stack([np.ones(400), weight])).distances(risk)
    assert firsts(found) == pytest.approx(plain_distances(labels, risk), abs=1e-7)
    curve = spline_curve(labels, risk, weight[None], risk)[0]
    distance = np.repeat(np.abs(curve - risk), weight)
    expected = distance.mean(), *np.quantile(distance, [0.5, 0.9])
    assert [x[1] for x in found.values()] == pytest.approx(expected)


def test_distances_see_a_bent_curve_that_slope_and_intercept_miss():
    odds = np.linspace(-3, 3, 4001)
    labels = (np.random.default_rng(0).random(4001) < expit(0.5 * (odds**2 - 3))).astype(float)
    slope, shift = of_labels(labels).fit_line(expit(odds))
    straight = expit(shift + slope * odds)
    expected = {"intercept": 0, "slope": 1}
    assert calibration(labels, straight) == pytest.approx(expected, abs=1e-6)
    assert distances(labels, straight)["ici"] > 0.2


def test_the_ideal_distance_is_that_of_labels_drawn_by_the_risks():
    """It falls with the rows, and does not see that these risks are wrong."""
    ideal = {}
    for rows in (300, 1200):
        labels, risk, _ = simulate(np.random.default_rng(2), rows, slope=2.0)
        rng = np.random.default_rng(1)
        drawn = [plain_distances((rng.random(rows) < risk) * 1.0, risk)["ici"] for _ in range(100)]
        ideal[rows] = of_labels(labels).ideal_distance(risk, np.arange(rows), 0)
        assert ideal[rows] == pytest.approx(np.mean(drawn), rel=0.15)
        assert ideal[rows] < distances(labels, risk)["ici"]
    assert ideal[1200] < 0.7 * ideal[300]


def test_the_standard_error_of_a_mean_counts_patients():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 500))
    alone = clustered_error(values, np.arange(500))
    assert alone == pytest.approx(values.std(axis=1, ddof=1) / np.sqrt(500))
    copied = clustered_error(values.repeat(3, axis=1), np.arange(500).repeat(3))
    assert copied == pytest.approx(alone)


@pytest.mark.parametrize("values", [19, 20])
def test_a_slope_needs_twenty_different_risks(values):
    risk = np.linspace(0.1, 0.9, values)[np.arange(400) % values]
    labels = (np.random.default_rng(0).random(400) < risk).astype(float)
    found = of_labels(labels, np.vstack([ones(labels), weightings(labels, 3)])).calibration(risk)
    assert (np.isfinite(found["slope"]) == (values == 20)).all()
    assert np.isfinite(found["intercept"]).all()


def test_certain_risks_have_a_finite_calibration():
    labels, risk = np.tile([1.0, 0, 1, 0], 6), np.linspace(0.2, 0.8, 24)
    risk[:4] = 0, 0, 1, 1
    assert np.isfinite(list(calibration(labels, risk).values())).all()


def test_a_weighting_without_a_class_is_undefined_without_a_warning(recwarn):
    labels = np.tile([1.0, 0, 0, 1], 6)
    risk = np.tile([0.4, 0.2, 0.6, 0.5], 6) + np.arange(24) / 1000
    weights = np.tile([[0.0, 1, 2, 0], [1, 0, 0, 1], [1, 1, 1, 1]], 6)
    found = metrics(labels, risk, weights) | of_labels(labels, weights).calibration(risk)
    for name in ("auroc", "scaled_brier", "slope", "intercept"):
        assert np.isfinite(found[name]).tolist() == [False, False, True], name
    assert np.isnan(found["auprc"]).tolist() == [True, False, False]
    shares = confusion_shares(labels, risk >= 0.3, weights)
    assert np.isnan(shares["sensitivity"]).tolist() == [True, False, False]
    assert np.isnan(shares["specificity"]).tolist() == [False, True, False]
    assert np.isnan(shares["npv"]).tolist() == [False, True, False]
    assert not recwarn.list


@REPEATABLE
@given(ROWS)
def test_net_benefit_is_its_formula(rows):
    labels, risk, weight = np.array(rows).T
    assume(weight.any())
    at = np.array([0.05, 0.1, 0.5, 0.9])
    found = net_benefit(labels, risk, at, np.stack([weight, weight + 1]))
    for weighting, benefits in zip((weight, weight + 1), found, strict=True):
        sample = repeated(weighting)
        true = [np.mean((risk[sample] >= p) & (labels[sample] == 1)) for p in at]
        false = [np.mean((risk[sample] >= p) & (labels[sample] == 0)) for p in at]
        assert benefits == pytest.approx(np.array(true) - np.array(false) * at / (1 - at))
    all_treated = net_benefit(labels, np.ones(len(labels)), at, ones(labels))[0]
    assert all_treated == pytest.approx(labels.mean() - (1 - labels.mean()) * at / (1 - at))


# ------------------------------------------------------------------ bootstrap


def all_draws(patients, seed=4):
    return np.concatenate(list(bootstrap_weights(patients, seed)))


@pytest.mark.parametrize("chunk", [1, 7])
def test_draws_do_not_depend_on_their_chunks(monkeypatch, chunk):
    patients = np.arange(30).astype(str)
    whole = all_draws(patients)
    assert whole.shape == (metrics_module.REPLICATES, 30)
    monkeypatch.setattr(metrics_module, "CHUNK_CELLS", 30 * chunk)
    chunks = list(bootstrap_weights(patients, 4))
    assert max(map(len, chunks)) == chunk
    assert np.array_equal(np.concatenate(chunks), whole)
    assert not np.array_equal(all_draws(patients, seed=5), whole)


def test_patients_are_drawn_with_all_their_rows():
    patients = np.random.default_rng(0).permutation(np.arange(30).repeat(3)).astype(str)
    draws = all_draws(patients)
    first = draws[:, [np.argmax(patients == name) for name in np.unique(patients)]]
    assert (first.sum(axis=1) == 30).all()
    assert np.array_equal(first[:, np.unique(patients, return_inverse=True)[1]], draws)
    # As often as with replacement: a multinomial's mean and variance.
    assert first.mean(axis=0) == pytest.approx(np.ones(30), abs=0.15)
    assert first.var() == pytest.approx(1 - 1 / 30, abs=0.05)
