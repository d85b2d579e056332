"""A model after its go-live: limits, CUSUM, levels of false alarms, and the actions of the rule."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest
from simulations import hospital
from sklearn.metrics import brier_score_loss, roc_auc_score

from medgemma_clinical.data.distributions import describe
from medgemma_clinical.evaluation import monitoring
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.evaluation.monitoring import (
    MonitorRule,
    alarm_levels,
    compare_inputs,
    cusum,
    cusum_steps,
    doubled,
    draw_labels,
    measure,
    monitor,
    period_limits,
    period_names,
)
from medgemma_clinical.evaluation.reference import reference

NOTHING = {"series": {}, "static": {}}
RULE, EQUAL = MonitorRule(), MonitorRule(period_sd=0)


def risks(n, seed=0):
    return expit(np.random.default_rng(seed).normal(-1.2, 1, n))


def development(n=1500, seed=0):
    risk = risks(n, seed)
    labels = (np.random.default_rng(seed + 1).random(n) < risk).astype(float)
    return reference(of_labels(labels), risk, np.arange(n))


def cohort(periods=12, size=80, seed=2, begin=99, odds_ratio=1.0, ranks=True):
    """Patients by month, whose odds change, or whose risks say nothing, from a month on."""
    rng, n = np.random.default_rng(seed), periods * size
    odds, month = rng.normal(-1.2, 1, n), np.arange(n) // size
    changed = month >= begin
    true = odds + np.log(odds_ratio) * changed
    if not ranks:
        true = np.where(changed, rng.permutation(odds), odds)
    dates = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(month * 31, unit="D")
    labels = (rng.random(n) < expit(true)).astype(float)
    return pd.DataFrame({"date": dates, "risk": expit(odds), "label": labels})


def monitored(rows, inputs=None, training=NOTHING, period="month", rule=RULE, **more):
    options = {"threshold": 0.3, "reference": development(), "training": training, "seed": 0}
    return monitor(rows, inputs, rule=rule, period=period, **options, **more)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """A few hundred draws: the program has more, for narrower errors."""
    monkeypatch.setattr(monitoring, "REPLICATES", 200)
    monkeypatch.setattr(monitoring, "YEARS", 400)
    monkeypatch.setattr("medgemma_clinical.evaluation.metrics.REPLICATES", 100)


# ------------------------------------------------------------------ numbers


def test_metrics_of_a_period_are_those_of_known_outcomes_and_positives_of_all():
    rows = cohort(1, 200)
    labels, risk = rows["label"].to_numpy(), rows["risk"].to_numpy()
    table = measure(np.append(labels, np.nan), np.append(risk, 0.9), 0.3, 0)
    assert table.loc["positives", "value"] == pytest.approx(((risk >= 0.3).sum() + 1) / 201)
    observed = binomtest(int(labels.sum()), 200)
    ends = observed.statistic, *observed.proportion_ci()
    assert table.loc["oe"].tolist() == pytest.approx(np.array(ends) / risk.mean())
    assert table.loc["auroc", "value"] == pytest.approx(roc_auc_score(labels, risk))
    assert table.loc["brier", "value"] == pytest.approx(brier_score_loss(labels, risk))
    assert (table["low"] < table["value"]).all()
    assert (table["value"] < table["high"]).all()
    one_class = measure(np.zeros(5), risk[:5], 0.3, 0)
    assert one_class["value"].notna().tolist() == [True, True, *[False] * 5]


def test_drawn_labels_have_the_metrics_of_each_draw():
    """Rows with either label, weighted, give all draws at once."""
    risk = risks(60)
    labels = draw_labels(
        logit(risk), np.array([[0.3, 0.8], [-0.5, 1.2]]), 0.2, np.random.default_rng(0)
    )
    values = monitoring._values(*doubled(risk, labels))
    for k, drawn in enumerate(labels):
        alone = monitoring._values(drawn, risk, np.ones((1, 60)))
        for name, value in alone.items():
            assert values[name][k] == pytest.approx(value.item(), abs=1e-6), name


def test_limits_hold_a_stable_period_and_widen_with_a_small_cohort():
    risk, rng = risks(150), np.random.default_rng(0)
    levels = monitoring.Levels(0.05, 0.05, 5.0, 0.05)
    limits = period_limits(risk, development(), levels, EQUAL, rng)
    new = [(np.random.default_rng(k).random(150) < risk).sum() / risk.sum() for k in range(300)]
    inside = np.mean(
        [limits.loc["oe", "limit_low"] <= x <= limits.loc["oe", "limit_high"] for x in new]
    )
    assert inside == pytest.approx(0.9, abs=0.06)
    small = period_limits(risk, development(150), levels, EQUAL, rng)
    widths = [x["limit_high"] - x["limit_low"] for x in (limits, small)]
    assert (widths[1] > widths[0]).all()


def test_the_cusum_is_the_loop_over_patients_and_starts_again_after_a_signal():
    risk = risks(400)
    labels = (np.random.default_rng(3).random(400) < expit(logit(risk) + 1)).astype(float)
    for steps in cusum_steps(labels, risk, 2.0):
        total, expected, signals = 0.0, [], []
        for k, step in enumerate(steps):
            total = max(0.0, total + step)
            expected.append(total)
            if total >= 3:
                signals.append(k)
                total = 0.0
        sums, found = cusum(steps, 3)
        assert sums == pytest.approx(expected)
        assert found.tolist() == signals
    assert len(cusum(cusum_steps(labels, risk, 2.0)[0], 3)[1]) > 1


def test_limits_widen_where_stable_periods_differ():
    risk, levels = risks(600), monitoring.Levels(0.05, 0.05, 5.0, 0.05)
    widths = []
    for rule in (EQUAL, RULE):
        limits = period_limits(risk, development(), levels, rule, np.random.default_rng(0))
        widths.append(limits["limit_high"] - limits["limit_low"])
    assert (widths[1] > 1.3 * widths[0])[["oe", "intercept"]].all()
    assert widths[1]["auroc"] == pytest.approx(widths[0]["auroc"], rel=0.2)


def test_the_step_of_a_patient_is_the_likelihood_ratio_of_changed_odds():
    changed = expit(logit(0.2) + np.log(2))
    (event,), (none,) = (cusum_steps(np.array([y]), np.array([0.2]), 2.0)[0] for y in (1.0, 0.0))
    assert event == pytest.approx(np.log(changed / 0.2))
    assert none == pytest.approx(np.log((1 - changed) / 0.8))


# ------------------------------------------------------------------ false alarms


@pytest.mark.slow
def test_stable_years_whose_months_differ_alarm_as_rarely_as_the_rule_says():
    """Hospitals of the benchmark; rules that hold the months for equal alarm more often."""
    shares = {}
    for rule in (RULE, EQUAL):
        found = [hospital(k, 300, 3000, rule, ["months of SD 0.2", "odds x 2.5"]) for k in range(4)]
        stable, changed = (np.hstack([x[name].any(axis=0) for x in found]) for name in found[0])
        shares[rule] = stable.mean()
        assert changed.mean() > 0.95
    assert shares[RULE] <= 0.07
    assert shares[EQUAL] >= 0.12


def test_levels_hold_the_share_in_their_own_years():
    for rule in (RULE, MonitorRule(false_alarms=0.2)):
        levels = alarm_levels(risks(2000), 60, 4, development(600), rule, np.random.default_rng(5))
        assert 0.5 * rule.false_alarms <= levels.false_alarms <= rule.false_alarms


# ------------------------------------------------------------------ actions


@pytest.mark.slow
def test_a_stable_model_needs_no_action_and_late_outcomes_wait():
    rows = cohort()
    assert monitored(rows).verdict.startswith("no action")
    late = rows.assign(label=rows["label"].where(rows["date"] < "2026-10-15"))
    found = monitored(late)
    assert found.verdict.startswith("no action")
    assert "waiting for outcomes of 2026-1" in found.verdict
    assert found.sums["date"].max() < pd.Timestamp("2026-10-15", tz="UTC")
    assert monitored(late.assign(label=np.nan)).verdict == "waiting for outcomes"


def test_the_cusum_passes_over_a_period_that_waits_perhaps_for_ever():
    rows = cohort(4)
    second = period_names(rows["date"], "month") == "2026-02"
    found = monitored(rows.assign(label=rows["label"].mask(second)))
    assert found.waiting == ["2026-02"]
    assert {*found.sums["period"]} == {*found.counts["period"]} - {"2026-02"}


@pytest.mark.parametrize("seed", range(8))
def test_a_value_on_its_limit_is_within(seed):
    """Limits of few events are values that occur; both are computed of other sums."""
    rng = np.random.default_rng(seed)
    size = 80 + 7 * seed
    risk = rng.beta(1, 9, size)
    levels = monitoring.Levels(0.05, 0.05, 5.0, 0.05)
    limits = period_limits(risk, development(), levels, RULE, rng).loc["oe"]
    for side in ("low", "high"):
        events = round(limits[f"limit_{side}"] * risk.sum())
        for more, expected in ((0, False), (1, True)):
            n = events + (more if side == "high" else -more)
            labels = np.repeat([1.0, 0.0], [n, size - n])
            line = measure(labels, risk, 0.1, 0).join(limits.to_frame("oe").T).loc["oe"]
            assert monitoring.outside(line, side) == expected


@pytest.mark.parametrize(
    ("values", "side", "periods"),
    [
        ([1.6, 1.7, 1.0, 1.0], "high", [["1", "2"]]),
        ([1.6, 0.5, 1.6, 1.0], "high", []),
        ([1.6, 1.0, 1.6, 1.0], "high", []),
        ([0.5, 0.6, 0.6, 1.6], "low", [["1", "2", "3"]]),
        ([0.5, np.nan, 0.6, 0.6], "low", [["3", "4"]]),
    ],
)
def test_all_periods_of_a_run_on_one_side_are_named(values, side, periods):
    lines = pd.DataFrame({"metric": "oe", "period": ["1", "2", "3", "4"], "value": values})
    lines = lines.assign(limit_low=0.7, limit_high=[1.3, 1.4, 1.4, 1.4])
    found = monitoring._runs_outside(lines, "oe", side, 2)
    assert [names for _, names in found] == periods
    for words, (first, *_, last) in found:
        assert f"{first} to {last}" in words


@pytest.mark.slow
def test_outcomes_of_a_tenth_are_not_needed():
    rows = cohort()
    unknown = np.arange(len(rows)) % 80 < 8  # 8 of 80 in each month
    assert not monitored(rows.assign(label=rows["label"].mask(unknown))).waiting
    unknown = np.arange(len(rows)) % 80 < 9
    assert len(monitored(rows.assign(label=rows["label"].mask(unknown))).waiting) == 12


@pytest.mark.slow
@pytest.mark.parametrize("odds_ratio", [2.5, 0.25])
def test_changed_odds_recalibrate(odds_ratio):
    found = monitored(cohort(begin=6, odds_ratio=odds_ratio))
    assert [action.name for action in found.actions] == ["recalibrate"]
    signals = found.sums[found.sums["signal"] != ""]
    assert signals["date"].min() > pd.Timestamp("2026-06", tz="UTC")
    assert len(signals) > 1
    assert f"first in {signals['period'].iloc[0]}" in found.verdict
    table = found.table[found.table["metric"] == "oe"]
    side = "high" if odds_ratio > 1 else "low"
    beyond = table.loc[monitoring.outside(table, side), "period"]
    assert len(beyond) > 2
    assert f"O/E {'above' if odds_ratio > 1 else 'below'} its limit in {beyond.iloc[0]}" in (
        found.verdict
    )
    assert monitored(cohort(begin=11, odds_ratio=odds_ratio)).verdict.count("O/E") == 0, "one month"


def test_lost_discrimination_refits_first():
    found = monitored(cohort(size=200, begin=6, ranks=False))
    assert found.actions[0].name == "refit"
    assert "AUROC" in found.verdict


def test_what_happened_more_than_a_year_ago_is_over():
    later = cohort(14)
    later["date"] += pd.Timedelta(days=93)
    found = monitored(pd.concat([cohort(3, begin=0, odds_ratio=4), later], ignore_index=True))
    assert (found.sums["signal"] == "higher").any()
    assert found.verdict.startswith("no action")


@pytest.mark.slow
def test_no_action_names_what_is_not_judged_and_the_period_that_would_be():
    """30 a month with a useless model: fewer than ten events are expected by month, not quarter."""
    rows = cohort(size=30, begin=0, ranks=False)
    found = monitored(rows)
    assert found.verdict.startswith("no action; slope and AUROC not judged: take --period quarter")
    assert "AUROC below" in monitored(rows, period="quarter").verdict
    assert "AUROC" not in monitored(cohort()).verdict
    few = monitored(cohort(size=3))
    assert "AUROC not judged" in few.verdict
    assert "--period" not in few.verdict


@pytest.mark.slow
def test_a_change_is_told_beside_the_inputs_of_the_same_periods():
    rows, rng = cohort(begin=6, odds_ratio=3), np.random.default_rng(0)
    values = pd.DataFrame({"glucose": rng.normal(140, 30, len(rows))})
    training = {"static": {}, **describe(pd.concat({"series": values}, axis=1))}
    month = period_names(rows["date"], "month")
    texts = {
        "as in training": values,
        "changed before": values.where(month != "2026-02", values / 18),
        "changed": values.where(~month.isin(["2026-08", "2026-09"]), values / 18),
    }
    found = {name: monitored(rows, inputs, training) for name, inputs in texts.items()}
    assert found["as in training"].verdict.startswith("inputs fit")
    for name, period in (("changed before", "2026-02"), ("changed", "2026-08")):
        check, recalibrate = found[name].actions
        assert check.name == "check the unit"
        assert check.reason.startswith(f"glucose in {period}: the values fit")
        assert check.reason.count("glucose") == 1, "each input once"
        assert recalibrate.name == "recalibrate"
        assert recalibrate.inputs.startswith("inputs fit")
    assert "2026-08" not in " ".join(action.words for action in found["changed"].actions[1:])
    assert monitored(rows).verdict.startswith("inputs not checked")


def test_slope_and_auroc_need_events():
    table = monitored(cohort(3, 20)).table.set_index("metric")
    assert table.loc[["slope", "auroc"], "value"].isna().all()
    assert table.loc["oe", "value"].notna().all()


@pytest.mark.slow
def test_an_input_that_changes_its_unit_or_is_no_longer_measured_stops():
    rows, rng = cohort(), np.random.default_rng(0)
    values = pd.DataFrame(
        {"glucose": rng.normal(140, 30, len(rows)), "lactate": rng.gamma(2, 1, len(rows))}
    )
    columns = pd.concat({"series": values}, axis=1)
    training = {"static": {}, **describe(columns)}
    recent = rows["date"] > "2026-10-15"
    assert monitored(rows, values, training).verdict == "no action"
    for name, change, text in (("glucose", 1 / 18, "unit"), ("lactate", np.nan, "never measured")):
        spoilt = values.assign(**{name: values[name] * np.where(recent, change, 1)})
        found = monitored(cohort(begin=6, odds_ratio=3), spoilt, training)
        assert [action.name for action in found.actions] == ["stop", "recalibrate"]
        assert name in found.verdict
        assert text in found.verdict
        repaired = spoilt.where(rows["date"] < "2026-11-15", values)
        [*names] = [action.name for action in monitored(rows, repaired, training).actions]
        assert names == (["check the unit"] if text == "unit" else []), "it is right again"
        lines, problems = compare_inputs(spoilt, period_names(rows["date"], "month"), training)
        assert {*problems["period"]} == {*period_names(rows["date"][recent], "month")}
        share = lines[lines["metric"] == f"measured: {name}"].set_index("period")["value"]
        assert share["2026-01"] == 1


def test_sites_have_values_and_limits_and_do_not_decide():
    rows, other = cohort(4, 160), cohort(4, 20, begin=0, odds_ratio=6)
    both = pd.concat([rows.assign(site="A"), other.assign(site="B")], ignore_index=True)
    table = monitored(both).table
    of_b = table[(table["site"] == "B") & (table["metric"] == "oe")]
    assert (of_b["value"] > of_b["limit_high"]).sum() > 2
    assert {*table["site"]} == {"", "A", "B"}


@pytest.mark.parametrize(
    ("period", "expected"),
    [
        ("week", ["2026-03-02", "2026-03-02", "2026-03-09"]),
        ("month", ["2026-03"] * 3),
        ("quarter", ["2026Q1"] * 3),
    ],
)
def test_periods_sort_by_their_names(period, expected):
    dates = pd.to_datetime(pd.Series(["2026-03-02", "2026-03-08", "2026-03-09"]), utc=True)
    assert period_names(dates, period).tolist() == expected


# ------------------------------------------------------------------ the rule


def test_a_rule_has_documented_defaults_and_its_words():
    assert MonitorRule.checked({}) == RULE
    rule = MonitorRule.checked({"known": 1, "odds_ratio": 3, "consecutive": 3})
    assert (rule.known, rule.odds_ratio, rule.false_alarms) == (1, 3, 0.05)
    assert "in 3 consecutive periods" in rule.words
    assert "SD of 0.35 of" in MonitorRule.checked({"period_sd": 0.35}).words


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"knwon": 0.9}, "knwon"),
        ({"known": "0.9"}, "known"),
        ({"known": 0.2}, "known"),
        ({"consecutive": 2.0}, "consecutive"),
        ({"consecutive": True}, "consecutive"),
        ({"odds_ratio": float("nan")}, "odds_ratio"),
        ({"false_alarms": 0}, "false_alarms"),
        ({"period_sd": -0.1}, "period_sd"),
    ],
)
def test_a_rule_of_other_keys_types_or_bounds_is_refused(content, named):
    with pytest.raises(ValueError, match=named):
        MonitorRule.checked(content)
