"""Simple models: fitted on the training part alone, on the data set's tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from medgemma_clinical.evaluation.calibration import log_odds
from threadpoolctl import threadpool_limits

from conftest import SAMPLE
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.baselines import (
    BLEND,
    BOOSTING,
    COMBINED,
    LOGISTIC,
    WITH_FACTS,
    baseline_tables,
    describe_baselines,
    draw_folds,
    fit_baselines,
    openmp_threads,
    richest_blend,
    tuned_regression,
    tuned_trees,
)


@pytest.fixture(scope="module")
def dataset(dka_file: Path) -> MIMICtrajectoryDataset:
    return MIMICtrajectoryDataset(dka_file)


def test_baselines_learn_from_the_training_part_only(dataset: MIMICtrajectoryDataset) -> None:
    split = dataset.split(0)
    tables = baseline_tables(dataset, split["train"], 0)
    before = fit_baselines(tables, dataset.labels, dataset.groups, split)
    held_out = np.concatenate([split["val"], split["test"]])
    labels = dataset.labels.copy()
    labels[held_out] = 1 - labels[held_out]
    after = fit_baselines(tables, labels, dataset.groups, split)
    assert {"last value", "number of observations", "gradient boosting"} <= set(before)
    for name in before:
        for part in ("val", "test"):
            assert np.array_equal(before[name][part], after[name][part])
            assert len(before[name][part]) == len(split[part])


def test_the_last_value_baseline_ranks_by_the_last_value(dataset: MIMICtrajectoryDataset) -> None:
    split = dataset.split(0)
    tables = baseline_tables(dataset, split["train"], 0)
    last = dataset.values[dataset.offsets[1:] - 1, 0][split["test"]]
    tables = {"last value": tables["last value"]}
    risk = fit_baselines(tables, dataset.labels, dataset.groups, split)
    ranks = pd.Series(last).rank(), pd.Series(risk["last value"]["test"]).rank()
    assert abs(ranks[0].corr(ranks[1])) == pytest.approx(1.0)


def test_facts_get_baselines_of_their_own() -> None:
    rng = np.random.default_rng(0)
    ages = rng.integers(20, 90, 200)
    table = pd.DataFrame(
        {
            "clinical_trajectory": [f"{v} (0h)" for v in rng.integers(1, 30, 200)],
            "label_escalation": (ages > 60).astype(int),
            "clinical_context": [f"{age}-year-old man" for age in ages],
        }
    )
    dataset = MIMICtrajectoryDataset(table)
    split = dataset.split(0)
    tables = baseline_tables(dataset, split["train"], 0)
    assert list(tables)[-2:] == ["gradient boosting", "gradient boosting with facts"]
    assert list(tables["facts alone"]) == ["year (number)"], "and no series"
    risks = fit_baselines(tables, dataset.labels, dataset.groups, split)
    test = dataset.labels[split["test"]]
    for name in ("facts alone", "logistic regression with facts", "blend with facts"):
        known = risks[name]["test"]
        assert known[test == 1].min() > known[test == 0].max(), name
    assert list(baseline_tables(MIMICtrajectoryDataset(table.iloc[:, :2]), split["train"], 0)) == [
        *("last value", "number of observations", "logistic regression", "gradient boosting"),
    ]


def test_a_series_without_any_training_value_is_fitted_around() -> None:
    split = {"train": np.arange(100), "val": np.arange(100, 110), "test": np.arange(110, 130)}
    labels = np.tile([0.0, 1.0], 65)
    values = np.where(np.arange(130) < 100, np.nan, 1.0)
    table = pd.DataFrame({"empty": values, "signal": labels + 0.1})
    tables = {"logistic regression": table, "gradient boosting": table}
    for risks in fit_baselines(tables, labels, np.arange(130), split).values():
        assert ((risks["test"] > 0.5) == (labels[110:] == 1)).all()


def test_a_blend_is_the_mean_of_the_logits_of_regression_and_trees_on_one_table() -> None:
    rng = np.random.default_rng(0)
    split = {"train": np.arange(200), "val": np.arange(200, 220), "test": np.arange(220, 260)}
    labels = rng.permutation(np.arange(260) % 2.0)
    few = pd.DataFrame({"a": labels + rng.normal(size=260)})
    more = few.assign(b=labels + rng.normal(size=260))
    regression, trees = "logistic regression", "gradient boosting"
    tables = {"last value": few, regression: few, trees: few}
    tables |= {f"{regression} with facts": more, f"{trees} with facts": more}
    risks = fit_baselines(tables, labels, np.arange(260), split)
    assert set(risks) - set(tables) == {"blend", "blend with facts"}
    for facts in ("", " with facts"):
        for part in ("val", "test"):
            logits = [log_odds(risks[name + facts][part]) for name in (regression, trees, "blend")]
            np.testing.assert_allclose(logits[2], (logits[0] + logits[1]) / 2, atol=1e-9)


def test_the_richest_blend_knows_the_facts_where_there_are_any() -> None:
    assert richest_blend(["blend", "gradient boosting", "blend with facts"]) == "blend with facts"
    assert richest_blend({"blend": 0, "last value": 1}) == "blend"
    assert richest_blend(["last value"]) is None


def test_settings_are_tuned_in_folds_by_patient_where_there_are_patients_enough() -> None:
    labels = np.tile([0.0, 0.0, 1.0, 1.0], 100)
    patients = np.repeat(np.arange(200), 2)
    folds = draw_folds(labels, patients)
    assert len(folds) == 5
    for fitted_on, scored in folds:
        assert not set(patients[fitted_on]) & set(patients[scored])
        assert labels[scored].mean() == pytest.approx(0.5, abs=0.05)
    assert sorted(np.concatenate([scored for _, scored in folds])) == list(range(400))
    assert draw_folds(labels[:-2], patients[:-2]) == [], "99 patients with the event"


def test_noise_gets_a_stronger_penalty_and_fewer_leaves_than_a_signal() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(400) % 2.0)
    folds = draw_folds(labels, np.arange(400))
    noise = rng.normal(size=(400, 20))
    crossed = np.where(labels[:, None] == 1, 1, -1) * np.sign(noise[:, :1] * noise[:, 1:2])
    signal = np.hstack([noise[:, :2], crossed + 0.5 * noise[:, 2:3]])
    plain = np.hstack([3 * labels[:, None] + noise[:, :1]])
    for model, setting, inputs in (
        (tuned_regression(folds), "logisticregression__C", plain),
        (tuned_trees(folds).set_params(estimator__max_iter=30), "max_leaf_nodes", signal),
    ):
        chosen = [model.fit(x, labels).best_params_[setting] for x in (noise, inputs)]
        assert chosen[0] < chosen[1], setting


@pytest.mark.filterwarnings("error::sklearn.exceptions.FitFailedWarning")
def test_a_column_that_some_fold_lacks_is_left_out_of_the_trees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "FEWEST_TUNED", 20)
    split = {"train": np.arange(60), "val": np.arange(60, 70), "test": np.arange(70, 80)}
    labels = np.tile([0.0, 1.0], 40)
    once = np.where(np.arange(80) == 3, 1.0, np.nan)
    table = pd.DataFrame({"once": once, "signal": labels + 0.1 * np.arange(80) / 80})
    tables = {"logistic regression": table, "gradient boosting": table}
    for risks in fit_baselines(tables, labels, np.arange(80), split).values():
        assert np.isfinite(risks["test"]).all()
        assert ((risks["test"] > 0.5) == (labels[70:] == 1)).all()


def test_no_more_threads_are_taken_than_the_environment_allows() -> None:
    with threadpool_limits(1, "openmp"):
        assert openmp_threads() == 1


def test_each_simple_model_of_the_dka_file_is_described() -> None:
    dataset = MIMICtrajectoryDataset(SAMPLE)
    tables = baseline_tables(dataset, np.arange(len(dataset)), 0)
    blends = [name.replace(BOOSTING, BLEND) for name in tables if name.startswith(BOOSTING)]
    names = [*tables, *blends, COMBINED]
    described = describe_baselines([*names, "another model"])
    assert list(described) == names
    for name, meaning in described.items():
        assert meaning != name
        assert ("facts" in meaning) == ("facts" in name), meaning
    both = f"{LOGISTIC + WITH_FACTS} and {BOOSTING + WITH_FACTS}"
    assert described[BLEND + WITH_FACTS].endswith(f"log-odds of {both}")
    assert described[BOOSTING + WITH_FACTS].startswith(f"{BOOSTING} that also reads the facts")
