"""The one table of metrics: equal to a loop over the draws, invariant, and whole in JSON."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import simulations
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from cohorts import (
    blended,
    cohort,
    coverage,
    plain_benefit,
    plain_line,
    plain_metrics,
    plain_table,
    predictions,
    samples_of,
)
from medgemma_clinical.evaluation import metrics as metrics_module
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.metrics import LEVEL, RANKING
from medgemma_clinical.evaluation.metrics_table import (
    ORDER,
    SHARED_TRAINING,
    Metrics,
    compared_models,
    draw_metrics,
    evaluate,
    mean_of_repeats,
    widening_of,
    with_interval,
)
from medgemma_clinical.evaluation.target import LABEL, targets_of
from medgemma_clinical.evaluation.topics.calibration import calibration_table
from medgemma_clinical.evaluation.topics.decision_curve import decision_curve
from medgemma_clinical.evaluation.topics.subgroups import subgroup_table
from medgemma_clinical.evaluation.topics.topic import Evaluated
from time_rows import EVENTS, make_times

DRAWS = 12  # a loop over them is slow
ENDS = [0.025, 0.975]
INTERVAL = ["low", "high"]
VALUE = ["value", *INTERVAL]
DIFFERENCE = ["difference", "difference_low", "difference_high"]


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "splits"), [(0.3, 1), (None, 1), (None, 2)])
def test_the_table_equals_a_loop_over_the_draws(threshold, splits):
    rows = blended()
    split = None if splits == 1 else pd.factorize(rows["patient"])[0] % splits
    found = evaluate(rows, 7, threshold, split=split)
    value, draws = plain_table(rows, 7, threshold, split)
    factor = 1 if splits == 1 else np.sqrt(1 + SHARED_TRAINING * splits / (splits - 1))
    assert found.widening == pytest.approx(factor)
    assert {*found.table.index} - {*value.index} == {("model", "ici_ideal")}
    assert found.models == list(rows.columns[3:])
    assert [*found.of("model").index] == [x for x in ORDER if x in found.of("model").index]
    for key, line in found.table.drop(("model", "ici_ideal")).iterrows():
        assert line["value"] == pytest.approx(value[key], abs=1e-6)
        # A distance grows by the noise of the draws; of further models no fit is drawn.
        if has_none := key[1] in ("ici", "e50", "e90") or draws[key].isna().all():
            assert line[INTERVAL].isna().all()
        else:
            ends = widened(value[key], draws[key].quantile(ENDS), factor, key[1])
            assert tuple(line[INTERVAL]) == pytest.approx(ends, abs=1e-5)
        minus = "blend with statics" if key[0] == "ensemble" else "model", key[1]
        assert line["reference"] == minus[0]
        if key[0] == "model":
            assert line[DIFFERENCE].isna().all()
            continue
        difference = value[key] - value[minus]
        ends = [np.nan] * 2 if has_none else (draws[key] - draws[minus]).quantile(ENDS)
        paired = difference, *(difference + factor * (np.array(ends) - difference))
        assert tuple(line[DIFFERENCE]) == pytest.approx(paired, abs=1e-6, nan_ok=True)


def widened(value, ends, factor, name):
    """Return the ends of an interval, moved away from its value, of a share as log-odds."""
    if name in ("auroc", "auprc", "mean_risk"):
        return expit(logit(value) + factor * (logit(ends) - logit(value)))
    return ends if name == "observed" else value + factor * (ends - value)


def test_folds_widen_by_what_they_learn_from_each_other_and_repeats_narrow_nothing():
    patients, fold = np.arange(100), np.arange(100) % 5
    assert widening_of(patients, None) == 1
    five = widening_of(patients, fold)
    assert five == pytest.approx(np.sqrt(1 + SHARED_TRAINING * 5 / 4))
    assert five >= np.sqrt(1 + 5 / 4), "Nadeau and Bengio's factor is the least"
    thrice = np.concatenate([fold, 5 + fold[::-1], 10 + fold])
    assert widening_of(np.tile(patients, 3), thrice) == pytest.approx(five)
    rows = np.repeat(patients, 4)  # rows of a patient are no further patients
    assert widening_of(rows, np.repeat(fold, 4)) == pytest.approx(five)
    sites = np.repeat([0, 1, 2], [50, 30, 20])
    of_sites = 50 / 50 + 30 / 70 + 20 / 80
    assert widening_of(patients, sites) == pytest.approx(np.sqrt(1 + SHARED_TRAINING * of_sites))
    two_splits, tested = np.repeat([0, 1], 10), np.arange(20)
    assert widening_of(tested, two_splits, 80) == pytest.approx(np.sqrt(1 + 1.4 * 20 / 80))


def test_shares_of_events_and_counts_are_not_widened_and_a_widened_share_stays_a_share():
    keys = pd.MultiIndex.from_product([["m"], ["auroc", "sensitivity", "oe", "observed_24h"]])
    drawn = pd.DataFrame([[0.90, 0.9, 0.4, 0.1], [1.0, 1.0, 1.0, 0.3]], columns=keys)
    value = pd.Series([0.99, 1.0, 0.8, 0.2], keys)
    before, after = with_interval(value, drawn), with_interval(value, drawn, widening=1.5)
    assert (after.loc["m", "observed_24h"] == before.loc["m", "observed_24h"]).all()
    assert after.low["m", "oe"] == pytest.approx(0.8 + 1.5 * (before.low["m", "oe"] - 0.8))
    assert after[["low", "high"]].iloc[:2].stack().between(0, 1).all()
    assert (after.low < before.low).iloc[:3].all()


@pytest.mark.slow
def test_noise_is_rarely_called_a_result_in_folds(monkeypatch):
    """Without widening 8 of these 100 intervals exclude 0.5, and 15 equal pairs differ."""
    monkeypatch.setattr(metrics_module, "REPLICATES", 200)
    wrong = simulations.false_verdicts(200, 40, columns=6, folds=5, sets=100)
    assert max(wrong.values()) <= 5, wrong


@pytest.mark.slow
def test_what_a_rule_of_the_folds_promises_holds_its_own_error(monkeypatch):
    monkeypatch.setattr(metrics_module, "REPLICATES", 200)
    found = simulations.recalibrated_folds(rows=800, slope=0.75, sets=40)
    moved = found[found["is_moved"]]
    assert len(moved) >= 20
    assert moved["before"].median() == pytest.approx(0.75, abs=0.1)  # not near 1
    expected = moved["expected"][moved["has_slope"]].to_numpy()
    assert expected == pytest.approx(1, abs=1e-6), "the rows that chose a slope fit it"
    assert moved["is_covered"].mean() >= 0.9
    assert moved["delivered"].std() > 0.02, "the rule errs"


def test_the_mean_of_repeats_is_that_of_their_values_and_draws():
    rows, fold = blended(), np.arange(120) % 3
    other = rows.assign(model=rows["model"] ** 2)
    drawn = [draw_metrics(table, 0, 0.3, split=fold) for table in (rows, other)]
    found = compared_models(mean_of_repeats(drawn))
    each = [compared_models(one).table for one in drawn]
    for name in ("auroc", "sensitivity", "slope", "ici", "log_loss"):
        values = [table.value["model", name] for table in each]
        line = found.table.loc["model", name]
        assert line.value == pytest.approx(np.mean(values))
        assert (line["min"], line["max"]) == pytest.approx((min(values), max(values)))
    same = compared_models(mean_of_repeats([drawn[0]] * 2)).table
    pd.testing.assert_frame_equal(same[VALUE + DIFFERENCE], each[0][VALUE + DIFFERENCE])
    assert found.counts == compared_models(drawn[0]).counts
    with pytest.raises(AssertionError):
        mean_of_repeats([drawn[0], draw_metrics(other, 1, 0.3, split=fold)])


@pytest.mark.parametrize(
    ("reference", "dropped", "first", "of_ensemble"),
    [
        (None, [], "model", "blend with statics"),
        (None, ["blend with statics"], "model", "blend"),
        (None, ["blend with statics", "blend"], "model", "model"),
        ("last value", [], "last value", "blend with statics"),
        ("blend with statics", [], "blend with statics", "blend with statics"),
        ("ensemble", [], "ensemble", "ensemble"),
    ],
)
def test_the_reference_is_the_first_model_or_the_one_named(reference, dropped, first, of_ensemble):
    found = evaluate(blended().drop(columns=dropped), 0, reference=reference)
    assert found.models[0] == first
    others = found.metric("auroc")["reference"].drop("ensemble")
    assert (others == first).all()
    assert found.metric("auroc").loc["ensemble", "reference"] == of_ensemble


def test_a_difference_is_row_minus_reference_and_of_the_same_risks_exactly_zero():
    rows = cohort(constant=np.full(120, 0.5))
    found = evaluate(rows.assign(same=rows["model"]), 0)
    line = found.metric("auroc").loc["constant"]
    assert line.difference == 0.5 - found.metric("auroc").value["model"] < 0
    same = found.of("same")
    assert (same["difference"] == 0).all()
    assert same.loc[[*RANKING, *LEVEL], DIFFERENCE].eq(0).all(axis=None)


def test_several_splits_have_mean_deviation_and_range():
    rows, split = blended(), np.arange(120) % 3
    parts = [part for _, part in rows.groupby(split)]
    found = evaluate(rows, 0, split=split).of("blend")
    of_parts = [plain_metrics(part["label"], part["blend"]) for part in parts]
    for name in of_parts[0]:
        values = [x[name] for x in of_parts]
        expected = np.mean(values), np.std(values, ddof=1), min(values), max(values)
        assert tuple(found.loc[name, ["value", "sd", "min", "max"]]) == pytest.approx(expected)
    assert {*found.index[found["sd"].notna()]} == {*of_parts[0]}


@pytest.mark.parametrize(("events", "folds"), [(10, 10), (24, 12)])
def test_metrics_of_folds_with_few_events_lie_within_their_intervals(events, folds, monkeypatch):
    """Patients are drawn without condition, and a fold that lacks a class in a draw is left out."""
    monkeypatch.setattr(metrics_module, "REPLICATES", 1000)
    rng = np.random.default_rng(0)
    odds = np.log(events / 300) + rng.normal(size=300)
    labels, fold = np.zeros(300), np.arange(300) % folds
    labels[rng.choice(300, events, replace=False, p=expit(odds) / expit(odds).sum())] = 1
    fold[labels == 1] = np.arange(events) % folds
    patients = np.arange(300).astype(str)
    others = {"blend": expit(odds + rng.normal(size=300)), "noise": rng.random(300) / 5}
    rows = predictions((labels, expit(odds), patients), **others)
    table = evaluate(rows, 0, 0.05, split=fold).table
    for ends in (VALUE, DIFFERENCE):
        value, low, high = table[ends].dropna().to_numpy().T
        assert len(value) >= 10
        assert ((low <= value) & (value <= high)).all()
    own, pooled = table.loc["model"], evaluate(rows, 0, 0.05).of("model")
    for name in ("brier", "log_loss"):  # defined in each fold and draw, so that nothing is left out
        assert own.value[name] == pytest.approx(pooled.value[name], rel=0.1)
        assert (own.high - own.low)[name] > 1.4 * (pooled.high - pooled.low)[name]


def test_a_fold_without_a_class_is_left_out_where_it_has_no_value():
    rows = cohort(240)
    split = np.arange(240) % 3
    rows.loc[split == 2, "label"] = 0
    found = evaluate(rows, 0, split=split).of("model")["value"]
    each = [evaluate(rows[split == k], 0).of("model")["value"] for k in (0, 1)]
    assert found["auroc"] == pytest.approx(np.mean([own["auroc"] for own in each]))
    brier = [np.mean((own["label"] - own["model"]) ** 2) for _, own in rows.groupby(split)]
    assert found["brier"] == pytest.approx(np.mean(brier))


def test_the_planned_comparison_is_the_blend_that_reads_most_or_the_one_named():
    rows = blended().assign(**{STAGE_NAMES["trajectory"]: 0.4})
    stage1 = STAGE_NAMES["trajectory"]
    found = evaluate(rows, 0)
    assert found.primary == "blend with statics"
    assert found.planned == ["blend with statics", "ensemble", stage1]
    assert evaluate(rows, 0, primary="blend").planned == ["blend", "ensemble", stage1]
    assert evaluate(rows, 0, primary="gone").primary == "blend with statics"
    assert evaluate(rows, 0, compared=["last value"]).planned[0] == "last value"
    assert evaluate(rows, 0, reference="ensemble").planned == ["blend with statics", stage1]


@pytest.mark.parametrize("splits", [None, 3])
def test_several_targets_have_the_metrics_of_each_alone_and_count_what_is_known(splits):
    rows, targets, thresholds = make_times(), targets_of(EVENTS)[:2], [0.1, 0.3]
    split = None if splits is None else np.arange(len(rows)) % splits
    found = evaluate(rows, 0, thresholds, split=split, targets=targets)
    for target, threshold in zip(targets, thresholds, strict=True):
        alone = evaluate(rows, 0, threshold, split=split, targets=[target]).at(target)
        own = found.at(target)
        pd.testing.assert_frame_equal(own.table, alone.table)
        labels = target.labels(rows)
        assert np.isnan(labels).any()
        events, others = (labels == 1).sum(), (labels == 0).sum()
        assert own.counts["events"] == events
        assert own.counts["minority_patients"] == min(events, others)
        if splits:
            parts = [labels[split == k] for k in range(splits)]
            fewest = min(min((x == 1).sum(), (x == 0).sum()) for x in parts)
            assert own.counts["fold_minority_patients"] == fewest
    again = Metrics.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert_same(again.at(targets[1]), found.at(targets[1]))


# ------------------------------------------------------------------ invariances


def assert_same(one, other):
    assert one.counts == other.counts
    pd.testing.assert_frame_equal(one.table, other.table, rtol=1e-7, atol=1e-7)


def test_order_of_rows_names_of_patients_and_of_rows_change_nothing():
    rows = blended()
    before = evaluate(rows, 3, 0.3)
    assert_same(before, evaluate(rows.sample(frac=1, random_state=5), 3, 0.3))
    assert_same(before, evaluate(rows.assign(id="same", patient="P" + rows["patient"]), 3, 0.3))
    renamed = {name: f"x{k}" for k, name in enumerate(rows["patient"].unique())}  # another order
    other = evaluate(rows.assign(patient=rows["patient"].map(renamed)), 3, 0.3)
    assert other.counts == before.counts
    assert other.table["value"].to_numpy() == pytest.approx(before.table["value"].to_numpy())
    alone = evaluate(rows.iloc[:, :4], 3).of("model")  # without threshold and other models
    pd.testing.assert_frame_equal(before.of("model").loc[alone.index], alone)


def test_more_rows_of_the_same_patients_do_not_narrow_an_interval():
    rows = blended()
    four = pd.concat([rows.assign(id=f"copy {k}") for k in range(4)], ignore_index=True)
    before, after = evaluate(rows, 3, 0.3), evaluate(four, 3, 0.3)
    pd.testing.assert_frame_equal(after.table, before.table, rtol=1e-7, atol=1e-7)
    assert after.counts["patients"] == before.counts["patients"]
    copies = four.assign(patient=four["id"] + four["patient"])  # of other patients
    width = [each.table["high"] - each.table["low"] for each in (before, evaluate(copies, 3, 0.3))]
    assert (width[1] / width[0]).median() == pytest.approx(0.5, abs=0.15)


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("rows_a_patient", [1, 2])
def test_a_perfect_model_has_its_draws_interval_and_its_shares_the_exact_one(rows_a_patient):
    labels = np.repeat([1.0, 0.0], [10, 30])
    risk = np.repeat([0.95, 0.9, 0.1], [4, 6, 30])
    rows = predictions((labels, risk, (np.arange(40) // rows_a_patient).astype(str)))
    own = evaluate(rows, 0, 0.5).of("model")
    for name in ("auroc", "auprc"):
        assert tuple(own.loc[name, VALUE]) == (1, 1, 1)
    few = evaluate(rows, 0, 0.95).of("model")
    shares = (own, "sensitivity", 10), (own, "specificity", 30), (few, "ppv", 4), (own, "npv", 30)
    for table, name, n in shares:
        exact = 1, 0.025 ** (rows_a_patient / n), 1  # Clopper and Pearson where all succeed
        assert tuple(table.loc[name, VALUE]) == pytest.approx(exact)
    assert own.low["positives"] < 0.25 < own.high["positives"]
    none = evaluate(rows, 0, 0.99).of("model")
    assert none.loc["ppv", VALUE].isna().all()
    for name, n in (("sensitivity", 10), ("positives", 40)):
        exact = 0, 0, 1 - 0.025 ** (rows_a_patient / n)
        assert tuple(none.loc[name, VALUE]) == pytest.approx(exact)


def test_undefined_draws_are_left_out_and_too_many_leave_no_interval():
    drawn = pd.DataFrame({name: np.linspace(0, 1, 1000) for name in ("some", "many", "infinite")})
    drawn.loc[:49, "some"] = drawn.loc[:50, "many"] = np.nan
    drawn.loc[:50, "infinite"] = -np.inf
    value = pd.Series({"some": 0.5, "many": 0.5, "infinite": 0.5})
    found = with_interval(value, drawn)
    assert tuple(found.loc["some", INTERVAL]) == pytest.approx(np.quantile(drawn.some[50:], ENDS))
    assert found.loc[["many", "infinite"], INTERVAL].isna().all(axis=None)
    assert with_interval(value * np.nan, drawn).isna().all(axis=None)


def test_json_holds_counts_the_model_and_the_others_and_null_where_undefined():
    labels = np.repeat([0.0, 1.0], 20)  # separated: no slope
    rows = predictions((labels, np.linspace(0.1, 0.9, 40), (np.arange(40) // 2).astype(str)))
    found = evaluate(rows.assign(other=0.5), 0, 0.95)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content.pop("widening") == 1
    counts = {"n": 40, "patients": 20, "events": 20, "minority_patients": 10}
    assert found.counts == {name: content.pop(name) for name in counts} == counts
    assert [content.pop(key) for key in ("model", "primary", "planned")] == ["model", None, []]
    other = content.pop("models").pop("other")
    assert other.pop("reference") == "model"
    assert {*content} - {*other} == {
        *("sensitivity", "specificity", "ppv", "npv", "positives", "net_benefit", "ici_ideal"),
    }
    assert not {*other} - {*content}
    assert content["slope"] == {"value": None, "low": None, "high": None}
    assert {*other["auroc"]} == {*VALUE, *DIFFERENCE}
    assert other["auroc"]["difference"] == -0.5


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("columns", [4, 8])
def test_a_table_survives_json(splits, columns):
    split = None if splits is None else np.arange(120) % splits
    before = evaluate(blended().iloc[:, :columns], 0, None if splits else 0.3, split=split)
    after = Metrics.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    assert_same(before, after)
    assert after.to_json() == before.to_json()


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_counts_and_no_metric(label):
    found = evaluate(blended().assign(label=label), 0, 0.3)
    assert found.counts["events"] == 120 * label
    assert found.table[VALUE + DIFFERENCE].isna().all(axis=None)


# ------------------------------------------------------------------ subgroups and curves


def test_subgroups_have_counts_auroc_and_calibration_of_their_draws():
    rows = cohort(240)
    size = pd.Categorical(np.where(np.arange(240) < 12, "few", "many"), ["few", "many", "none"])
    site = pd.Categorical(np.tile(["a", "b"], 120))
    found = subgroup_table(rows, "model", pd.DataFrame({"size": size, "site": site}), 0)
    keys = [("size", "few"), ("size", "many"), ("site", "a"), ("site", "b")]
    assert list(zip(found["group"], found["level"], strict=True)) == keys  # none has no row
    own = {key: (size if key[0] == "size" else site) == key[1] for key in keys}
    for (_, line), (key, inside) in zip(found.iterrows(), own.items(), strict=True):
        part = rows[inside]
        minority = part.groupby("label")["patient"].nunique().min()
        expected = len(part), part["patient"].nunique(), part["label"].sum(), minority
        assert tuple(line[["n", "patients", "events", "minority_patients"]]) == expected
        assert line.risk == pytest.approx(part["model"].mean())
        assert line.prevalence == pytest.approx(part["label"].mean())
        if key == ("size", "few"):
            assert minority < 10
            assert line.loc["auroc":].isna().all()
            continue
        parts = [rows.iloc[sample[inside[sample]]] for sample in samples_of(rows, 0)]
        value, *draws = [roc_auc_score(own["label"], own["model"]) for own in parts]
        assert line.auroc == pytest.approx(value)
        assert (line.auroc_low, line.auroc_high) == pytest.approx(np.quantile(draws, ENDS))
        value, *draws = [own["label"].mean() / own["model"].mean() for own in parts]
        assert line.oe == pytest.approx(value)
        assert (line.oe_low, line.oe_high) == pytest.approx(np.quantile(draws, ENDS))
        assert line.slope == pytest.approx(plain_line(part["label"], part["model"])[0])
        assert line.slope_low < line.slope < line.slope_high


@pytest.mark.parametrize(("patients", "shown"), [(9, False), (10, True)])
def test_a_subgroup_needs_ten_patients_of_each_outcome(patients, shown):
    labels = np.repeat([1.0, 0.0], [4 * patients, 60])
    names = np.append(np.arange(4 * patients) // 4, np.arange(100, 160)).astype(str)
    rows = predictions((labels, np.linspace(0.9, 0.1, len(labels)), names))
    everyone = pd.DataFrame({"all": pd.Categorical(["all"] * len(rows))})
    found = subgroup_table(rows, "model", everyone, 0)
    assert found["minority_patients"].tolist() == [patients]
    assert found["auroc"].notna().tolist() == [shown]


def test_the_calibration_curve_has_bins_of_equal_size_with_intervals():
    rows = cohort(240)
    rows.loc[rows["model"].rank() <= 24, "label"] = 0  # a share of 0 has the exact interval
    found = calibration_table(rows, rows["model"].to_numpy(), LABEL, 0)
    bins = pd.qcut(rows["model"], 10, labels=False)
    assert found["n"].tolist() == [24] * 10
    assert found["predicted"].to_numpy() == pytest.approx(rows.groupby(bins)["model"].mean())
    assert found["observed"].to_numpy() == pytest.approx(rows.groupby(bins)["label"].mean())
    _, *draws = [
        rows["label"][sample].groupby(bins[sample].to_numpy()).mean()
        for sample in samples_of(rows, 0)
    ]
    draws = pd.DataFrame(draws)
    for k, line in found.reset_index(drop=True).iterrows():
        ends = draws[k].quantile(ENDS)
        if k == 0:
            ends = (0, 1 - 0.025 ** (1 / rows["patient"][bins == k].nunique()))
        assert (line.low, line.high) == pytest.approx(tuple(ends))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=60))
def test_bins_of_tied_risks_hold_each_row_once(rows):
    labels, tenths = np.array([(True, 3), (False, 3), *rows], dtype=float).T
    patients = np.arange(len(labels)).astype(str)
    rows = predictions((labels, tenths / 10, patients))
    found = calibration_table(rows, tenths / 10, LABEL, 0)
    assert found["n"].sum() == len(labels)
    assert found["n"] @ found["predicted"] == pytest.approx(tenths.sum() / 10)
    assert found["n"] @ found["observed"] == pytest.approx(labels.sum())
    assert found["predicted"].is_monotonic_increasing
    assert len(found) <= max(2, min(10, min(labels.sum(), (1 - labels).sum()) // 5))


def curve_of(rows):
    """Return the decision curve of a model and its planned comparison."""
    patients = pd.DataFrame(index=rows.index)
    return decision_curve(Evaluated(rows, evaluate(rows, 0), patients, 0, [0.3], "set by the user"))


def test_the_decision_curve_is_the_net_benefit_of_each_draw():
    rows = blended()[["id", "label", "patient", "model", "blend"]]
    found = curve_of(rows)
    assert list(found.columns) == ["model", "low", "high", "blend", "treat_all"]
    assert found.index.to_numpy() == pytest.approx(np.arange(1, len(found) + 1) / 100)
    highest = max(2 * rows["label"].mean(), rows["model"].quantile(0.99))
    assert found.index[-1] == pytest.approx(math.floor(100 * min(0.99, highest)) / 100)

    low = curve_of(rows.assign(model=0.1))  # up to twice the observed share
    assert low.index[-1] == pytest.approx(math.floor(200 * rows["label"].mean()) / 100)

    def benefit(model, sample, threshold):
        part = rows.iloc[sample]
        return plain_benefit(part["label"], part[model], threshold)

    samples = list(samples_of(rows, 0))
    for threshold in found.index[[0, 9, 40]]:
        value, *draws = [benefit("model", sample, threshold) for sample in samples]
        line = found.loc[threshold]
        assert line.model == pytest.approx(value)
        assert (line.low, line.high) == pytest.approx(np.quantile(draws, ENDS))
        assert line.blend == pytest.approx(benefit("blend", samples[0], threshold))
        assert line.treat_all == pytest.approx(plain_benefit(rows["label"], 1, threshold))


def test_a_good_model_of_a_rare_outcome_has_all_curves():
    labels = np.zeros(10_000)
    labels[:5] = labels[-100::2] = 1  # 55 events, nearly all in the top percent
    risk = np.append(np.linspace(0.001, 0.02, 9_900), np.linspace(0.3, 0.9, 100))
    rows = predictions((labels, risk, np.arange(10_000).astype(str)))
    curve = curve_of(rows)
    assert curve.index.min() == 0.01
    assert curve.index.max() >= 0.05
    assert np.isfinite(curve).all(axis=None)
    bins = calibration_table(rows, risk, LABEL, 0)
    assert (bins["n"] == 1000).all()
    assert bins["observed"].iloc[-1] == 0.05


# ------------------------------------------------------------------ coverage


@pytest.mark.slow
def test_intervals_cover_the_truth_of_a_population(monkeypatch):
    monkeypatch.setattr(metrics_module, "REPLICATES", 200)
    shares = coverage(60, 400, rows_a_patient=4, seed=1)
    # 60 data sets tell a share of 0.95 to 0.03; draws of rows cover the positives' to 0.76.
    assert min(shares.values()) >= 0.85, shares
    assert 0.925 <= np.mean(list(shares.values())) <= 0.975, shares
