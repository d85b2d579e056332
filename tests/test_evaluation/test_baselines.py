"""Simple models: fitted on the training part alone, on the data set's tables."""

import json
import re
from dataclasses import replace
from unittest import mock

import lightgbm
import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from scipy.stats import rankdata

from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.baselines import (
    BOOSTING,
    ENSEMBLE,
    FROZEN,
    LOGISTIC,
    WITH_TEXT,
    Baselines,
    fit_baselines,
    tune_baselines,
)
from medgemma_clinical.evaluation.simple_models import (
    Regression,
    Trees,
    from_plain,
    kept_text,
    to_plain,
)
from medgemma_clinical.models.outcome import LABELS
from trajectories import dataset_of

WITHOUT_STATICS = ["last value", "number of observations", LOGISTIC, BOOSTING, "blend"]
WITH_STATICS = [*WITHOUT_STATICS, "statics alone", "words of the context"]
WITH_STATICS += [f"{name} with statics" for name in (LOGISTIC, BOOSTING, "blend")]
MEANINGS = baselines.meanings(of_times=False)
SPLIT = {"train": np.arange(100), "val": np.arange(100, 120), "test": np.arange(120, 160)}


@pytest.fixture(scope="module", autouse=True)
def two_folds():
    """Tune on few patients, and in two folds: five take longer and say no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "MIN_TUNED", 20)
        patch.setattr(baselines, "FOLDS", 2)
        yield


def visits(statics=True):
    """80 patients of two rows; the label follows the last value, the number of values, the age."""
    rng = np.random.default_rng(0)
    last, more, age = rng.integers(1, 30, 160), rng.integers(1, 5, 160), rng.integers(20, 90, 160)
    odds = (last - 15) / 4 + (more - 2.5) + (age - 55) / 10 * statics
    table = {
        "series": [f"{'9 (0h) -> ' * n}{last[k]} ({k + 1}h)" for k, n in enumerate(more)],
        "label_escalation": (odds + rng.logistic(size=160) > 0).astype(int),
        "subject_id": [f"p{k // 2}" for k in range(160)],
    }
    texts = [f"{years} years, {'sepsis' if years > 55 else 'trauma'}" for years in age]
    return {**table, "static_age": age, "clinical_context": texts} if statics else table


def fit_on_train(dataset, static):
    return fit_baselines(dataset, SPLIT["train"], tune_baselines(dataset, SPLIT["train"], static))


def risks_of(dataset, static):
    """Fit on the training part; return the risks of the other parts."""
    fitted = fit_on_train(dataset, static)
    parts = {part: fitted.risks(dataset, SPLIT[part]) for part in ("val", "test")}
    return {name: {part: parts[part][name] for part in parts} for name in fitted.names}


@pytest.fixture(scope="module")
def fitted():
    return fit_on_train(dataset_of(**visits()), ["static_age"])


@pytest.fixture(scope="module")
def risks():
    return risks_of(dataset_of(**visits()), ["static_age"])


@pytest.mark.slow
def test_no_row_outside_of_the_training_part_changes_another_rows_risk(risks):
    rows = visits()
    altered = [*range(100, 110), *range(120, 150)]  # of val and of test
    for k in altered:
        rows["series"][k] = "1 (0h) -> " * 9 + "500 (900h)"
        rows["label_escalation"][k] = 1 - rows["label_escalation"][k]
        rows["static_age"][k] = 700
        rows["clinical_context"][k] = "alien with trauma and without sepsis"
    after = risks_of(dataset_of(**rows), ["static_age"])
    assert (
        set(after)
        == set(risks)
        == set(WITH_STATICS)
        == set(MEANINGS) - {ENSEMBLE, FROZEN, WITH_TEXT}
    )
    for name, each in risks.items():
        for part in ("val", "test"):
            assert len(each[part]) == len(SPLIT[part])
            assert ((each[part] > 0) & (each[part] < 1)).all()
            same = ~np.isin(SPLIT[part], altered)
            assert np.array_equal(each[part][same], after[name][part][same]), name
        assert not np.array_equal(each["test"], after[name]["test"]), "the changes are read"


def test_each_baseline_reads_its_own_inputs(risks):
    dataset = dataset_of(**visits())
    found = {name: each["test"] for name, each in risks.items()}
    last = dataset.values[dataset.offsets[1:] - 1, 0][SPLIT["test"]]
    assert np.array_equal(rankdata(found["last value"]), rankdata(last))
    count = dataset.lengths[SPLIT["test"]]
    assert np.array_equal(rankdata(found["number of observations"]), rankdata(count))
    ages = dataset.static[SPLIT["test"], 0]
    assert np.array_equal(rankdata(found["statics alone"]), rankdata(ages))
    risk = found["words of the context"]
    assert len(np.unique(risk)) == 2, "of two words, and of no number"
    assert risk[ages > 55].min() > risk[ages <= 55].max()
    for name in (LOGISTIC, BOOSTING):
        assert not np.allclose(found[name], found[f"{name} with statics"])
    for ending in ("", " with statics"):
        pair = [logit(found[name + ending]) for name in (LOGISTIC, BOOSTING)]
        assert logit(found[f"blend{ending}"]) == pytest.approx(np.mean(pair, axis=0))


def test_a_blend_of_certain_risks_is_finite():
    assert baselines.blend(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx([0.5, 0.5])


def test_the_best_blend_reads_the_statics_where_there_are_any():
    assert baselines.best_blend(["blend", BOOSTING, "blend with statics"]) == "blend with statics"
    assert baselines.best_blend({"blend": 0, "last value": 1}) == "blend"
    assert baselines.best_blend(["last value"]) is None


# ------------------------------------------------------------------ tuning


def test_folds_keep_patients_together_and_both_classes_in_proportion(monkeypatch):
    labels, patients = np.tile([0.0, 0.0, 1.0, 1.0], 100), np.repeat(np.arange(200), 2)
    shuffled = np.random.default_rng(0).permutation(400)
    labels, patients = labels[shuffled], patients[shuffled]
    monkeypatch.setattr(baselines, "MIN_TUNED", 100)
    monkeypatch.setattr(baselines, "FOLDS", 5)
    folds = baselines.tuning_folds(labels, patients)
    assert len(folds) == 5
    for fitted_on, scored in folds:
        assert not set(patients[fitted_on]) & set(patients[scored])
        assert labels[scored].mean() == pytest.approx(0.5, abs=0.05)
    assert sorted(np.concatenate([scored for _, scored in folds])) == list(range(400))
    fewer = (patients != patients[labels == 1][0]).nonzero()[0]  # 99 patients with the event
    assert baselines.tuning_folds(labels[fewer], patients[fewer]) == []


def test_noise_gets_a_stronger_penalty_and_fewer_leaves_than_a_signal():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(400) % 2.0)
    folds = baselines.tuning_folds(labels, np.arange(400))
    noise = rng.normal(size=(400, 20))
    crossed = np.where(labels[:, None] == 1, 1, -1) * np.sign(noise[:, :1] * noise[:, 1:2])
    signal = np.hstack([noise[:, :2], crossed + 0.5 * noise[:, 2:3]])
    plain = 3 * labels[:, None] + noise[:, :1]
    penalties = [
        baselines.tuned_penalty(baselines.regression(), x, labels, folds) for x in (noise, plain)
    ]
    trees = [baselines.tuned_trees(x, labels, folds)["trees"] for x in (noise, signal)]
    assert penalties[0] < penalties[1]
    assert trees[0] < trees[1]


def test_a_regression_learns_from_what_is_missing():
    values, labels = np.ones((40, 1)), np.arange(40) % 2
    values[labels == 1] = np.nan
    risk = baselines.regression().fit(values, labels).predict_proba(values)[:, 1]
    assert risk[labels == 1].min() > 0.8 > 0.2 > risk[labels == 0].max()


@pytest.mark.parametrize("fewer_rows_are_better", [True, False])
def test_trees_take_the_size_columns_rows_and_number_of_the_lowest_loss(
    fewer_rows_are_better, monkeypatch
):
    def cv(settings, *_, **__):
        best = settings["num_leaves"] == 8 and settings["feature_fraction"] == 0.3
        loss = 0.3 - 0.1 * best
        if settings["bagging_fraction"] < 0.7:
            loss += -0.05 if fewer_rows_are_better else 0.05
        return {"valid binary_logloss-mean": [0.9, loss, loss + 0.01]}

    monkeypatch.setattr(lightgbm, "cv", cv)
    chosen = baselines.tuned_trees(np.zeros((9, 2)), np.arange(9) % 2.0, [(0, 0)])
    sizes = [chosen[name] for name in ("num_leaves", "feature_fraction", "trees")]
    assert sizes == [8, 0.3, 2]
    assert (chosen["bagging_fraction"] < 0.7) == fewer_rows_are_better


@pytest.mark.parametrize("rows", [100, 10_000, 100_000])
def test_trees_learn_few_rows_slowly(rows):
    settings = baselines.tuned_trees(np.ones((rows, 1)), np.arange(rows) % 2.0, [])
    assert settings["learning_rate"] == (0.03 if rows <= 10_000 else 0.1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("known", "tuned"), [(0, True), (1, True), (0, False)])
def test_a_series_that_the_training_part_or_a_fold_lacks_is_fitted_around(
    known, tuned, monkeypatch
):
    monkeypatch.setattr(baselines, "MIN_TUNED", 20 if tuned else 1000)
    dataset = dataset_of(**visits(statics=False))
    inputs = dataset.baseline_inputs()
    rare = np.where(np.arange(160) < 100, np.nan, 1.0)
    rare[:known] = 1.0
    inputs[LOGISTIC] = inputs[LOGISTIC].assign(rare=rare)
    dataset.baseline_inputs = lambda: inputs
    with mock.patch.object(baselines, "tuning_folds", wraps=baselines.tuning_folds) as drawn:
        found = risks_of(dataset, [])
    assert np.array_equal(drawn.call_args.args[1], dataset.groups[:100]), "folds of patients"
    assert set(found) == set(WITHOUT_STATICS)
    assert all(np.isfinite(each["test"]).all() for each in found.values())


# ------------------------------------------------------------------ kept


def holes(rows, columns, share=0.3, seed=0):
    """Draw a table with unknown values, none in the last column, none but those in the first."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, columns))
    values[rng.random(values.shape) < share] = np.nan
    values[:, 0], values[:, -1] = np.nan, np.round(rng.normal(size=rows), 1)
    return pd.DataFrame(values, columns=[f"{k}: {{}}[]" for k in range(columns)])


KEPT = {
    *("version", "num_class", "num_tree_per_iteration", "label_index", "max_feature_idx"),
    *("objective", "feature_names", "feature_infos", "Tree", "num_leaves", "num_cat"),
    *("split_feature", "threshold", "decision_type", "left_child", "right_child", "leaf_value"),
    *("is_linear", "shrinkage"),
}
"""Lines of LightGBM's text: none counts or weighs rows."""


def as_kept(model):
    return from_plain(json.loads(json.dumps(to_plain(model))))


@pytest.mark.parametrize("kind", ["regression", "trees", "one leaf"])
def test_a_kept_model_computes_what_its_library_does(kind):
    table, other = holes(300, 5), holes(200, 5, share=0.6, seed=1)
    other.iloc[:50, -1] = np.nan  # never unknown in training
    other.iloc[50:100] = 0.0
    table.iloc[:, 1] *= 0  # known or not is all it says: LightGBM splits it at infinity
    signal = table.iloc[:, -1] + 2 * table.iloc[:, 1].isna()
    labels = (signal + np.random.default_rng(2).normal(size=300) > 0.5).astype(float)
    if kind == "regression":
        model = baselines.regression().fit(table.to_numpy(), labels)
        expected = model.predict_proba(other.to_numpy())[:, 1]
        kept = as_kept(Regression.of(model, [*table]))
        content = to_plain(kept)
        assert len(content["marked"]) == 4
        # All that stands for the rows that are known, or not, is part of the weights.
        assert (content["means"][:4], {*content["center"]}, {*content["scale"]}) == (
            [0] * 4,
            {0},
            {1},
        )
        assert content["means"][4] == float(f"{table.iloc[:, -1].mean():.6g}")
    else:
        rows = 10 if kind == "one leaf" else 300
        values, labels = table.to_numpy()[:rows], labels[:rows]
        model = baselines.fit_trees(values, labels, baselines.tuned_trees(values, labels, []))
        kept = as_kept(Trees([*table], kept_text(model)))
        expected = model.predict(other.to_numpy())
        again = lightgbm.Booster(model_str=kept.text).predict(other.to_numpy())
        assert np.array_equal(again, expected)
        assert {*re.findall(r"^(\w+)=", kept.text, re.MULTILINE)} == KEPT
        assert (len(kept.forests[0][0].leaf) == 1) == (kind == "one leaf")
    assert np.ptp(expected) > 0.5 or kind == "one leaf"
    found, rounded = kept.risks(other), other.iloc[:, -1].isna() & (kind == "regression")
    np.testing.assert_allclose(found[~rounded], expected[~rounded], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_kept_baselines_give_the_same_risks_and_hold_no_extreme_value(fitted):
    dataset = dataset_of(**visits())
    text = fitted.to_json()
    kept, bounds = (
        replace(Baselines.from_json(text), text=fitted.text),
        re.findall(r"feature_infos=(.*?)\\n", text),
    )
    assert {*" ".join(bounds).split()} == {"none"}
    assert kept.names == fitted.names == [*WITH_STATICS[:3], *kept.names[3:]]
    for name, risk in kept.risks(dataset).items():
        assert np.array_equal(risk, fitted.risks(dataset)[name]), name
    forecasts, risks = kept.forecasts(dataset), kept.risks(dataset)
    for name, (first, second) in kept.pairs.items():
        blended = LABELS.risks(LABELS.blend(forecasts[first], forecasts[second]))[:, 0]
        np.testing.assert_allclose(blended, risks[name], rtol=1e-12)


@pytest.mark.parametrize("rows_of_one", [1, 45])
def test_each_leaf_stands_for_enough_patients_whatever_the_rows_of_one(rows_of_one):
    rng = np.random.default_rng(0)
    table = {
        "series": [f"{x} (0h)" for x in [*rng.integers(1, 30, 160), *[200] * rows_of_one]],
        "label_escalation": [*rng.integers(0, 2, 160), *[1] * rows_of_one],
        "subject_id": [*map(str, range(160)), *["one"] * rows_of_one],
    }
    dataset = dataset_of(**table)
    settings = baselines.Settings([], {}, {**baselines.USUAL_TREES, "learning_rate": 0.1})
    fitted = fit_baselines(dataset, np.arange(len(dataset)), settings)
    (trees,) = (model for name, model in fitted.models.items() if name == BOOSTING)
    values = fitted.table(dataset)[trees.columns].to_numpy()
    fewest = [
        min(
            len(np.unique(dataset.groups[tree.leaf[tree.leaves(values)] == x]))
            for x in np.unique(tree.leaf)
        )
        for tree in trees.forests[0]
    ]
    assert fitted.leaf_patients == Baselines.from_json(fitted.to_json()).leaf_patients
    assert min(fewest) == fitted.leaf_patients >= MIN_CELL
    assert max(len(tree.leaf) for tree in trees.forests[0]) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("needed", "tuned"), [(20, True), (80, False)])
def test_baselines_keep_whether_their_settings_were_searched(needed, tuned, monkeypatch):
    monkeypatch.setattr(baselines, "MIN_TUNED", needed)
    fitted = fit_on_train(dataset_of(**visits(statics=False)), [])
    content = json.loads(fitted.to_json())
    kept = Baselines.from_json(json.dumps(content))
    assert (fitted.tuned, kept.tuned) == (tuned, tuned)
    del content["tuned"], content["leaf_patients"]  # as in files of an earlier version
    earlier = Baselines.from_json(json.dumps(content))
    assert (earlier.tuned, earlier.leaf_patients, earlier.names) == (None, 0, fitted.names)
    assert len({*map(baselines.describe_tuning, ([True], [False], [True, False]))}) == 3


def test_a_baseline_whose_columns_the_rows_lack_has_no_risk(fitted):
    rows = visits()
    del rows["static_age"]
    found = fitted.risks(dataset_of(**rows))
    lacking = {name for name, risk in found.items() if np.isnan(risk).all()}
    assert lacking == {name for name in fitted.names if "statics" in name}
    assert all(np.isfinite(risk).all() for name, risk in found.items() if name not in lacking)


TREE = {
    "split_feature": "0 1",
    "threshold": "0.5 0.5",
    "decision_type": "2 8",
    "left_child": "1 -1",
    "right_child": "-3 -2",
    "leaf_value": "0.1 0.2 0.3",
    "num_cat": "0",
    "is_linear": "0",
}


def trees_text(**changed):
    lines = [f"{name}={text}" for name, text in {**TREE, **changed}.items()]
    return "\n".join(["tree", "", "Tree=0", *lines]) + "\n\nend of trees\n"


HOSTILE_TREES = [
    {"left_child": "1 0"},  # a loop
    {"left_child": "0 -1"},  # itself
    {"left_child": "2 -1"},
    {"right_child": "-4 -2"},
    {"split_feature": "0 2"},
    {"split_feature": "-1 1"},
    {"leaf_value": "0.1 0.2"},
]


@pytest.mark.parametrize("changed", HOSTILE_TREES, ids=lambda each: " ".join(*each.items()))
def test_trees_that_loop_or_are_out_of_range_are_refused(changed):
    def content(text):
        return {"columns": ["a", "b"], "text": text}

    assert from_plain(content(trees_text())).risks(pd.DataFrame({"a": [0], "b": [1]})).size
    with pytest.raises(ValueError, match="a tree out of range"):
        from_plain(content(trees_text(**changed)))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["models", "last value", "means", 0], float("nan")),
        (["models", LOGISTIC, "intercept"], None),
        (["models", BOOSTING, "text"], 7),
        (["models", BOOSTING, "text"], ""),
        (["models", BOOSTING, "columns"], []),
    ],
)
def test_altered_baselines_are_refused(keys, value, fitted):
    content = json.loads(fitted.to_json())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        Baselines.from_json(json.dumps(content))
