"""Simple models: fitted on the training part alone, on the data set's tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.baselines import baseline_tables, fit_baselines


@pytest.fixture(scope="module")
def dataset(dka_file: Path) -> MIMICtrajectoryDataset:
    return MIMICtrajectoryDataset(dka_file)


def test_baselines_learn_from_the_training_part_only(dataset: MIMICtrajectoryDataset) -> None:
    split = dataset.split(0)
    tables = baseline_tables(dataset, split["train"], 0)
    before = fit_baselines(tables, dataset.labels, split)
    held_out = np.concatenate([split["val"], split["test"]])
    labels = dataset.labels.copy()
    labels[held_out] = 1 - labels[held_out]
    after = fit_baselines(tables, labels, split)
    assert {"last value", "number of observations", "gradient boosting"} <= set(before)
    for name in before:
        for part in ("val", "test"):
            assert np.array_equal(before[name][part], after[name][part])
            assert len(before[name][part]) == len(split[part])


def test_the_last_value_baseline_ranks_by_the_last_value(dataset: MIMICtrajectoryDataset) -> None:
    split = dataset.split(0)
    tables = baseline_tables(dataset, split["train"], 0)
    last = dataset.values[dataset.offsets[1:] - 1, 0][split["test"]]
    risk = fit_baselines({"last value": tables["last value"]}, dataset.labels, split)
    ranks = pd.Series(last).rank(), pd.Series(risk["last value"]["test"]).rank()
    assert abs(ranks[0].corr(ranks[1])) == pytest.approx(1.0)


def test_contexts_get_baselines_of_their_own() -> None:
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
    assert list(tables)[-2:] == ["gradient boosting", "gradient boosting with context"]
    risks = fit_baselines(tables, dataset.labels, split)
    with_context = risks["logistic regression with context"]["test"]
    test = dataset.labels[split["test"]]
    assert with_context[test == 1].min() > with_context[test == 0].max()
    assert list(baseline_tables(MIMICtrajectoryDataset(table.iloc[:, :2]), split["train"], 0)) == [
        *("last value", "number of observations", "logistic regression", "gradient boosting"),
    ]


def test_a_series_without_any_training_value_is_fitted_around() -> None:
    split = {"train": np.arange(100), "val": np.arange(100, 110), "test": np.arange(110, 130)}
    labels = np.tile([0.0, 1.0], 65)
    values = np.where(np.arange(130) < 100, np.nan, 1.0)
    table = pd.DataFrame({"empty": values, "signal": labels + 0.1})
    tables = {"logistic regression": table, "gradient boosting": table}
    for risks in fit_baselines(tables, labels, split).values():
        assert ((risks["test"] > 0.5) == (labels[110:] == 1)).all()
