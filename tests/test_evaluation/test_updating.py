"""Updates of a model in a new cohort: which one tests choose, and what it brings to other rows."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from medgemma_clinical.commands.update import updated_config
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.evaluation.decision import (
    BOTH,
    INTERCEPT,
    METHODS,
    MIN_SLOPE_EVENTS,
    NOT_UPDATED,
    DecisionRule,
    choose_update,
    clustered_p_value,
    fit_updates,
)
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.evaluation.rules import apply_rules
from medgemma_clinical.evaluation.target import LABEL, targets_of
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.evaluation.topics.calibration import calibration_updates
from medgemma_clinical.evaluation.updating import CHOSEN, crosswise, evaluate_updates
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import LABELS, risk_columns
from pages import MODEL, Page, make_rows, write_page

EVENTS = CompetingEvents(("death", "leaving"), (24.0, 72.0))
OUTCOME = Hazards(EVENTS, EVENTS.horizons, (1.0, 1.0))
TIMES = targets_of(EVENTS)
KINDS = pytest.mark.parametrize("targets", [(LABEL,), TIMES], ids=["label", "times"])


def cohort(targets, n=3000, seed=0, move=(1.0, 0.0), ends=150.0, rows_a_patient=1):
    """Draw rows whose risks are the true ones, moved; also return the true risks."""
    rng = np.random.default_rng(seed)
    table = {"id": names(n), "patient": names(n // rows_a_patient).repeat(rows_a_patient)}
    x = rng.normal(size=n)
    if targets[0] is LABEL:
        truth = [expit(x - 1)]
        table["label"] = (rng.random(n) < truth[0]).astype(float)
    else:
        rates = np.exp([-5 + 0.8 * x, -4.5 + 0.3 * x])
        times, censored = rng.exponential(1 / rates), rng.exponential(ends, n)
        hours, total = times.min(axis=0), rates.sum(axis=0)
        table["event_hours"] = np.minimum(hours, censored)
        table["event"] = np.where(hours < censored, 1.0 + times.argmin(axis=0), 0.0)
        truth = [rates[0] / total * (1 - np.exp(-total * x)) for x in EVENTS.horizons]
    for target, risk in zip(targets, truth, strict=True):
        table[target.column(MODEL)] = target.link.moved(risk, *move)
    return pd.DataFrame(table), truth


def names(n):
    return np.arange(n).astype(str)


def simulated(rng, n, slope=1.0, intercept=0.0, rows_a_patient=1):
    """Draw labels whose log-odds are ``intercept + slope`` times those of the risks."""
    odds = rng.normal(-1.5, 1, n // rows_a_patient).repeat(rows_a_patient)
    draw = rng.random(n // rows_a_patient).repeat(rows_a_patient)  # equal rows of a patient
    return (draw < expit(intercept + slope * odds)).astype(float), expit(odds)


def test_an_update_is_the_logistic_fit_on_the_log_odds():
    labels, risk = simulated(np.random.default_rng(0), 3000, 0.5, 0.5)
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], labels)
    updates = fit_updates(of_labels(labels), risk)
    expected = plain.coef_.item(), plain.intercept_.item()
    assert updates[BOTH] == pytest.approx(expected, abs=1e-4)
    assert updates[BOTH] == pytest.approx((0.5, 0.5), abs=0.12)
    assert updates[NOT_UPDATED] == (1, 0)
    slope, intercept = updates[INTERCEPT]
    assert slope == 1
    assert expit(logit(risk) + intercept).mean() == pytest.approx(labels.mean())
    reversed_updates = fit_updates(of_labels(1 - labels), risk)
    assert BOTH not in reversed_updates, "no update turns the ranking round"


# ------------------------------------------------------------------ the tests that choose


def test_the_p_value_is_a_likelihood_ratios_and_counts_patients():
    labels, risk = simulated(np.random.default_rng(0), 4000, slope=0.93, intercept=0.05)
    odds, one, known = logit(risk), np.ones(4000), of_labels(labels)
    fit, null = np.array(fit_updates(known, risk)[BOTH][::-1]), np.array([0.0, 1.0])

    def loss(a, b):
        return log_loss(labels, expit(a + b * odds), normalize=False)

    plain = chi2.sf(2 * (loss(*null) - loss(*fit)), 2)
    assert 0.001 < plain < 0.5
    columns = np.stack([one, odds])
    p = clustered_p_value(known, columns, 0 * one, names(4000), fit, null, [0, 1])
    assert p == pytest.approx(plain, rel=0.2)
    copies = [np.repeat(x, 3, axis=-1) for x in (columns, 0 * one, names(4000))]
    thrice = of_labels(labels.repeat(3))
    assert clustered_p_value(thrice, *copies, fit, null, [0, 1]) == pytest.approx(p)


@pytest.mark.parametrize("rows_a_patient", [1, 3])
@pytest.mark.parametrize("with_slope", [True, False])
def test_a_calibrated_model_is_rarely_updated(with_slope, rows_a_patient):
    rng, updated = np.random.default_rng(0), 0
    for _ in range(300):
        labels, risk = simulated(rng, 900, rows_a_patient=rows_a_patient)
        patients = names(900 // rows_a_patient).repeat(rows_a_patient)
        method, _ = choose_update(of_labels(labels), risk, patients, with_slope=with_slope)
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
    known = of_labels(labels)
    assert choose_update(known, risk, names(3000), with_slope=with_slope)[0] == method


@KINDS
def test_a_known_move_is_undone(targets):
    rows, truth = cohort(targets, move=(0.6, -1.0))
    found = evaluate_updates(rows, MODEL, targets, 0)
    assert [update.target for update in found] == [*targets]
    for update, true in zip(found, truth, strict=True):
        target = update.target
        assert update.method == BOTH
        assert update.gain.startswith("-")
        risk = rows[target.column(MODEL)].to_numpy()
        again = target.link.moved(risk, update.multiplier, update.shift)
        if target.horizon:
            values = metrics_at(rows["event_hours"], rows["event"], again, target.horizon)
            slope, oe = values["slope"], values["oe"]
        else:
            known = target.known(rows)
            slope, oe = known.calibration(again)["slope"], known.level(again)["oe"]
        assert slope == pytest.approx(1, abs=1e-6)
        assert oe == pytest.approx(1, abs=0.03)
        assert np.abs(again - true).mean() < 0.02


@pytest.mark.slow
@KINDS
def test_true_risks_stay_though_a_fit_to_the_same_rows_would_improve_them(targets):
    found = [evaluate_updates(cohort(targets, 400, k)[0], MODEL, targets, k) for k in range(8)]
    methods = [update.method for updates in found for update in updates]
    assert len(methods) == 8 * len(targets)
    assert methods.count(NOT_UPDATED) >= 7 * len(targets)


@KINDS
def test_a_level_needs_no_slope_where_events_are_few(targets):
    rows, _ = cohort(targets, 300, 1, move=(1.0, 1.0))
    found, *_ = evaluate_updates(rows, MODEL, targets, 0)
    assert np.nansum(targets[0].labels(rows)) < MIN_SLOPE_EVENTS
    assert (found.method, found.multiplier) == (INTERCEPT, 1)


def test_rows_that_were_not_watched_until_the_horizon_are_not_free_of_the_event():
    """As such they would speak for risks that are too low."""
    rows, _ = cohort(TIMES, seed=2, move=(1.0, -0.7), ends=25.0)
    assert (rows.loc[rows["event_hours"] < 72, "event"] == 0).mean() > 0.5
    for update in evaluate_updates(rows, MODEL, TIMES, 0):
        assert update.method != NOT_UPDATED
        assert update.gain.startswith("-")


def test_a_horizon_that_nobody_reaches_has_no_update():
    rows, _ = cohort(TIMES, 2000, move=(1.0, 1.0))
    is_late = rows["event_hours"] > 30
    rows.loc[is_late, ["event_hours", "event"]] = [30.0, 0.0]
    (update,) = evaluate_updates(rows, MODEL, TIMES, 0)
    assert (update.target, update.method) == (TIMES[0], INTERCEPT)


# ------------------------------------------------------------------ what it brings


@KINDS
def test_a_half_never_sees_the_update_that_its_own_outcomes_make(targets):
    rows, _ = cohort(targets, 800, move=(2.0, -1.0))
    target, half = targets[0], np.arange(800) % 2
    risk = rows[target.column(MODEL)].to_numpy()
    before = crosswise(target, rows, risk, half, with_slope=True)
    outcome = [name for name in ("label", "event_hours", "event") if name in rows]
    for k in (0, 1):
        own, other = half == k, rows.copy()
        mixed = np.random.default_rng(k).permutation(np.flatnonzero(own))
        other.loc[own, outcome] = rows.loc[mixed, outcome].to_numpy()
        after = crosswise(target, other, risk, half, with_slope=True)
        pd.testing.assert_frame_equal(after[own], before[own])
        assert (after.loc[~own, BOTH] != before.loc[~own, BOTH]).all()


@pytest.mark.parametrize("rows_a_patient", [1, 5])
@KINDS
def test_the_table_holds_each_update_in_rows_that_it_has_not_seen(
    targets, rows_a_patient, monkeypatch
):
    monkeypatch.setattr("medgemma_clinical.evaluation.updating.DIVISIONS", 1)
    rows, _ = cohort(targets, move=(2.0, -1.0), rows_a_patient=rows_a_patient)
    target = targets[0]
    risk, known = rows[target.column(MODEL)].to_numpy(), target.known(rows)
    found, *_ = evaluate_updates(rows, MODEL, targets, 3)
    assert found.method == BOTH
    assert (found.multiplier, found.shift) == fit_updates(known, risk)[BOTH]
    moved = target.link.scale(found.risks[INTERCEPT].to_numpy()) - target.link.scale(risk)
    of_patients = pd.Series(moved).groupby(rows["patient"])
    assert (of_patients.max() - of_patients.min()).max() < 1e-9, "their rows are in one half"
    (division,) = np.random.default_rng(3).integers(2**32, size=1).tolist()
    half = draw_folds(rows["patient"].to_numpy(str), known.case, 2, division)
    value = found.table["value"]
    for method in (*METHODS, CHOSEN):
        own = found.risks[method].to_numpy()
        expected = log_loss(known.case, own, sample_weight=known.weights[0])
        assert value[method, "log_loss"] == pytest.approx(expected)
        halves = [np.flatnonzero(half == k) for k in (0, 1)]
        slopes = [target.known(rows, part=x).calibration(own[x])["slope"] for x in halves]
        assert value[method, "slope"] == pytest.approx(np.mean(slopes))
    losses = found.table.xs("log_loss", level="metric")
    gain = losses["value"] - losses["value"][NOT_UPDATED]
    assert losses["difference"].to_numpy() == pytest.approx(gain.to_numpy())
    chosen = losses.loc[CHOSEN]
    assert chosen["difference_low"] < gain[CHOSEN] < chosen["difference_high"] < 0


def test_slopes_of_halves_are_not_pooled():
    """Pooled, the slope after an update hardly exceeds 1, however far from the truth it is."""
    rng, slopes = np.random.default_rng(0), []
    while len(slopes) < 8:
        labels, risk = simulated(rng, 150)
        rows = pd.DataFrame({"label": labels, "patient": names(150), MODEL: risk})
        if found := evaluate_updates(rows, MODEL, [LABEL], 0):
            slopes.append(found[0].table["value"][BOTH, "slope"])
    assert np.mean(slopes) > 1.05


@pytest.mark.parametrize(("events", "others", "tried"), [(19, 60, 0), (60, 19, 0), (20, 20, 1)])
def test_few_patients_of_either_class_try_no_update(events, others, tried, tmp_path):
    table = make_rows(events + others).assign(label=np.repeat([1, 0], [events, others]))
    updates = evaluate_updates(table, MODEL, [LABEL], 0)
    assert (updates is not None) == bool(tried)
    results = [partial(calibration_updates, tried=updates)]
    page = Page(write_page(tmp_path, table, results=results))
    assert ("No update was tried" in page.text) == (not tried)
    assert any("after each update" in alt for alt, _ in page.images()) == bool(tried)
    assert (tmp_path / "figures" / "updates.csv").exists() == bool(tried)


# ------------------------------------------------------------------ the rules that are kept


@pytest.mark.parametrize("used", [MODEL, "blend"])
@KINDS
def test_two_updates_of_a_model_are_one_after_the_other_and_touch_no_other_model(targets, used):
    outcome = LABELS if targets[0] is LABEL else OUTCOME
    first = {
        name: {target.name: DecisionRule(threshold=0.2) for target in targets}
        for name in (MODEL, "blend")
    }
    trained = SimpleNamespace(outcome=outcome, name=MODEL, rules=first)
    trained.config = {"stage": "trajectory", "models": {"blend": "own"}, "decision": "own"}
    updates = []
    for seed in range(2):
        rows, _ = cohort(targets, seed=seed, move=(0.7, 0.5))
        updates.append(evaluate_updates(rows, MODEL, targets, 0))
        rows = rows.rename(columns=lambda name: name.replace(MODEL, used))
        trained.config = updated_config(trained, used, updates[-1], rows)
        stored = trained.config["decision"] if used == MODEL else trained.config["models"][used]
        own = {name: DecisionRule.read(rule) for name, rule in stored.items()}
        trained.rules = {**first, used: own}
    other = trained.config["models"]["blend"] if used == MODEL else trained.config["decision"]
    assert other == "own"
    assert trained.config["reference"].keys() == {used}
    assert trained.config["reference"][used]["multiplier"] == pytest.approx(1, abs=0.1)
    risk = np.linspace(0.01, 0.9, 9)
    for one, two, target in zip(*updates, targets, strict=True):
        both = risk, np.array([0.2])
        for update in (one, two):
            both = [target.link.moved(x, update.multiplier, update.shift) for x in both]
        assert own[target.name].risk(risk, target.link) == pytest.approx(both[0])
        assert own[target.name].threshold == pytest.approx(both[1].item())


def test_moved_curves_do_not_fall_and_leave_room_for_all_events():
    outcome = Hazards(EVENTS, (24.0, 48.0, 72.0), (1.0, 1.0))
    forecast = np.random.default_rng(0).exponential(1.0, (200, 2, 3))
    rules = {"risk_24h": DecisionRule(0.8, 1.5), "risk_72h": DecisionRule(1.3, -0.5)}
    hours = np.arange(0, 73, 4.0)
    _, _, curves = outcome.curves(forecast, hours, rules)
    assert (np.diff(curves[:, 0]) >= -1e-12).all()
    assert curves.sum(axis=1).max() <= 1 + 1e-12
    risks = pd.DataFrame(risk_columns(outcome, {MODEL: forecast}))
    risks = apply_rules(risks, {MODEL: rules}, TIMES)
    for target in TIMES:
        at = curves[:, 0, hours.tolist().index(target.horizon)]
        assert (risks[target.column(MODEL)] <= at * (1 + 1e-12)).all()
    assert (risks[TIMES[1].column(MODEL)] >= risks[TIMES[0].column(MODEL)]).all()
