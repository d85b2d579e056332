"""Simple models: fitted on the training part alone, on the data set's tables."""

from unittest import mock

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import rankdata

from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.baselines import BOOSTING, ENSEMBLE, LOGISTIC, fit_baselines
from trajectories import dataset_of

WITHOUT_STATICS = ["last value", "number of observations", LOGISTIC, BOOSTING, "blend"]
WITH_STATICS = [*WITHOUT_STATICS, "statics alone", "words of the context"]
WITH_STATICS += [f"{name} with statics" for name in (LOGISTIC, BOOSTING, "blend")]
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


@pytest.fixture(scope="module")
def risks():
    return fit_baselines(dataset_of(**visits()), SPLIT, ["static_age"])


def test_no_row_outside_of_the_training_part_changes_another_rows_risk(risks):
    rows = visits()
    altered = [*range(100, 110), *range(120, 150)]  # of val and of test
    for k in altered:
        rows["series"][k] = "1 (0h) -> " * 9 + "500 (900h)"
        rows["label_escalation"][k] = 1 - rows["label_escalation"][k]
        rows["static_age"][k] = 700
        rows["clinical_context"][k] = "alien with trauma and without sepsis"
    after = fit_baselines(dataset_of(**rows), SPLIT, ["static_age"])
    assert set(after) == set(risks) == set(WITH_STATICS) == set(baselines.MEANINGS) - {ENSEMBLE}
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


def test_words_are_those_that_one_in_a_hundred_training_contexts_holds():
    contexts = np.array(
        ["Fever", "fever, 40 C", "x", "", *["rare"] * 1, *["cough"] * 145, "new"], object
    )
    table = baselines.context_words(contexts, np.arange(150))
    assert table[[0, 1, 2, 3, 4, 5, 150]].toarray().tolist() == [
        *[[0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [1, 0], [0, 0]]
    ]
    for nothing in (["", "7"] * 75, [f"only{'x' * k}" for k in range(150)]):
        assert baselines.context_words(np.array(nothing, object), np.arange(150)) is None


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
    folds = baselines.draw_folds(labels, patients)
    assert len(folds) == 5
    for fitted_on, scored in folds:
        assert not set(patients[fitted_on]) & set(patients[scored])
        assert labels[scored].mean() == pytest.approx(0.5, abs=0.05)
    assert sorted(np.concatenate([scored for _, scored in folds])) == list(range(400))
    fewer = (patients != patients[labels == 1][0]).nonzero()[0]  # 99 patients with the event
    assert baselines.draw_folds(labels[fewer], patients[fewer]) == []


def test_noise_gets_a_stronger_penalty_and_fewer_leaves_than_a_signal():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(400) % 2.0)
    folds = baselines.draw_folds(labels, np.arange(400))
    noise = rng.normal(size=(400, 20))
    crossed = np.where(labels[:, None] == 1, 1, -1) * np.sign(noise[:, :1] * noise[:, 1:2])
    signal = np.hstack([noise[:, :2], crossed + 0.5 * noise[:, 2:3]])
    plain = 3 * labels[:, None] + noise[:, :1]
    trees = baselines.tuned_trees(folds, 400).set_params(estimator__max_iter=30)
    for model, inputs in ((baselines.tuned_regression(folds), plain), (trees, signal)):
        chosen = [list(model.fit(x, labels).best_params_.values()) for x in (noise, inputs)]
        assert chosen[0] < chosen[1], model


def test_a_regression_learns_from_what_is_missing():
    values, labels = np.ones((40, 1)), np.arange(40) % 2
    values[labels == 1] = np.nan
    risk = baselines.tuned_regression([]).fit(values, labels).predict_proba(values)[:, 1]
    assert risk[labels == 1].min() > 0.8 > 0.2 > risk[labels == 0].max()


@pytest.mark.parametrize("rows", [100, 10_000, 100_000])
def test_trees_hold_out_no_rows_of_patients_that_they_learn_from(rows):
    trees = baselines.tuned_trees([], rows)
    assert trees.early_stopping is False
    assert trees.learning_rate == (0.03 if rows <= 10_000 else 0.1)


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
    with mock.patch.object(baselines, "draw_folds", wraps=baselines.draw_folds) as drawn:
        found = fit_baselines(dataset, SPLIT, [])
    assert np.array_equal(drawn.call_args.args[1], dataset.groups[:100]), "folds of patients"
    assert set(found) == set(WITHOUT_STATICS)
    assert all(np.isfinite(each["test"]).all() for each in found.values())
