"""Summaries of series, static features that are read, small counts."""

import itertools

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.small_cells import (
    count_patients,
    count_text,
    minority_patients,
    patients_behind,
)
from medgemma_clinical.data.summaries import STATISTICS
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.inference.scoring import count_unknown_static
from trajectories import dataset_of, one_series

NAN = float("nan")


def summaries(dataset):
    return pd.DataFrame(dataset.summaries(), columns=dataset.summary_names())


def test_summaries_agree_with_a_slow_reference():
    rng = np.random.default_rng(2)
    texts = [
        " -> ".join(f"{rng.normal(20, 5):.3f} ({k + rng.random():.3f}h)" for k in range(length))
        for length in rng.integers(1, 15, 100)
    ]
    dataset = dataset_of(texts)
    table = summaries(dataset).rename(columns=lambda name: name.split()[-1])
    assert list(table) == list(STATISTICS)
    for i in range(100):
        t, v = (np.array(numbers) for numbers in one_series(dataset, i))
        expected = {
            **{"first": v[0], "last": v[-1], "min": v.min(), "max": v.max(), "mean": v.mean()},
            "slope": np.polyfit(t, v, 1)[0] if len(t) > 1 else 0.0,
            **{"count": len(v), "span": t[-1] - t[0]},
        }
        assert table.loc[i].to_dict() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_values_of_equal_times_have_no_slope():
    # 0.7 less the mean of seven times 0.7 is 1e-16, not zero.
    series = " -> ".join(f"{value} (0.7h)" for value in (1, 5, 2, 8, 3, 9, 4))
    table = summaries(dataset_of([series, "1 (2h) -> 5 (2h)"]))
    assert table[["Anion gap slope", "Anion gap span"]].to_numpy().tolist() == [[0, 0]] * 2


def test_summaries_hold_eight_numbers_of_each_series_and_nan_of_one_never_measured():
    columns = {"trajectory_glucose": ["9 (2h) -> 8 (2.5h)", ""], "trajectory_x": ["", "6 (1h)"]}
    table = summaries(dataset_of(["", "7 (1h)"], **columns))
    names = itertools.product(("Anion gap", "glucose", "x"), STATISTICS)
    assert list(table) == [" ".join(pair) for pair in names]
    spans = table[["Anion gap span", "glucose span", "x span"]]
    np.testing.assert_array_equal(spans, [[NAN, 0.5, NAN], [0, NAN, 0]])
    assert table.loc[1].isna().tolist() == [False] * 8 + [True] * 8 + [False] * 8


def test_the_baselines_see_the_last_value_the_count_or_everything():
    inputs = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"]).baseline_inputs()
    found = {name: values.to_numpy() for name, values in inputs.items()}
    assert found["last value"].tolist() == [[2], [3]]
    assert found["number of observations"].tolist() == [[2], [1]]
    assert found["logistic regression"].shape == (2, 8)


# --------------------------------------------------------------------------- static features


@pytest.mark.parametrize(
    ("values", "groups", "behind", "read"),
    [
        ([*range(11), NAN], None, 11, True),
        ([*range(10), NAN, NAN], None, 10, False),
        ([*range(11), NAN], [0, *range(11)], 10, False),
        ([NAN] * 19, None, 0, False),
        ([7.0] * 19, None, 19, False),
        ([3.0] * 19 + [NAN], None, 19, False),
        ([0.0] * 19 + [1.0] * 11, None, 11, True),
        ([0.0] * 19 + [1.0] * 10, None, 10, False),
        ([1.0] * 19 + [0.0] * 9, None, 9, False),
        ([0.0] * 40 + [1.0] * 20, np.arange(60) // 2, 10, False),
        # Where most rows share a value, mean and spread tell of the others.
        ([0.0] * 19 + [5.0, 10, 20] * 3, None, 9, False),
        ([0.0] * 9 + [5.0, 10, 20], [*range(9), 20, 20, 21], 2, False),
        ([0.0] * 6 + [5.0, 10, 20] * 2, None, 12, True),
    ],
)
def test_a_static_feature_is_read_with_two_values_and_eleven_patients_that_know_it_or_differ(
    values, groups, behind, read
):
    values = np.array(values)
    groups = np.arange(len(values)) if groups is None else np.array(groups)
    assert patients_behind(values, groups) == behind
    columns = {"static_x": values, "subject_id": groups.astype(str)}
    dataset = dataset_of(["1 (0h)"] * len(values), **columns)
    assert ("static_x" not in dataset.unusable_static(np.arange(len(values)))) == read


def test_the_training_part_alone_decides_which_static_features_are_read():
    part = np.array(["train"] * 80 + ["val"] * 20 + ["test"] * 20)
    columns = {
        "static_age [years]": 20 + np.arange(120) % 60,
        "static_held_out": np.where(part == "train", NAN, np.arange(120)),
        "static_same": 1,
        "static_two": np.arange(120) < 3,
    }
    dataset = dataset_of(["1 (0h)"] * 120, split=part, **columns)
    options = {"max_samples": 0, "seed": 0, "prompts": PromptOptions()}
    data = prepare_data(dataset, **options)
    assert list(data.unusable_static) == ["static_held_out", "static_same", "static_two"]
    assert data.usable_static == list(data.dataset.static_inputs) == ["static_age [years]"]
    assert data.description()["inputs"]["static"] == data.usable_static
    assert data.dataset.static_values()[:2].tolist() == [[20], [21]]
    off = prepare_data(dataset, **options, static=False)
    assert off.dataset.static_inputs == ()
    assert off.usable_static == data.usable_static, "baselines still read them"


def test_rows_that_lack_a_static_feature_that_is_read_are_counted():
    columns = {
        "static_age": ["50", "", "60", ""],
        "static_given": ["1"] * 4,
        "static_off": [""] * 4,
    }
    dataset, findings = dataset_of(["1 (0h)"] * 4, **columns), Findings("x")
    names = ["static_age", "static_given"]
    count_unknown_static(dataset.with_inputs(names, prediction_time=False), findings)
    assert list((+findings.counts).items()) == [
        ("lack the static feature static_age: taken as unknown", 2)
    ]


# --------------------------------------------------------------------------- small counts


@pytest.mark.parametrize(
    ("count", "min_cell", "hidden"),
    [(0, 11, False), (1, 11, True), (10, 11, True), (11, 11, False), (3, 0, False)],
)
def test_counts_of_a_few_are_not_written(count, min_cell, hidden):
    assert count_text(count, min_cell) == (f"fewer than {min_cell}" if hidden else str(count))


def test_a_patient_with_several_rows_counts_once():
    groups, labels = np.array(list("aabbc")), np.array([1, 1, 0, 1, 0])
    assert count_patients(groups, labels == 1) == count_patients(groups, np.array([0, 2, 3])) == 2
    assert minority_patients(labels, np.array(list("aabbb"))) == 1
