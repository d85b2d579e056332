"""Tests of the trajectory contract: batches, choice of rows, hashes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.files import InputError
from trajectories import LABEL, SERIES, dataset_of
from visits import cohort


def test_collate_pads_behind_with_hours_since_the_first_observation() -> None:
    dataset = dataset_of(["24 (-5h) -> 20 (2.5h) -> 16 (4h)", "7 (100h)", "1 (0h) -> 2 (1h)"])
    batch = dataset.collate([2, 0, 1])
    assert batch["times"].tolist() == [[0, 1, 0], [0, 7.5, 9], [0, 0, 0]]
    assert batch["values"].tolist() == [[[1], [2], [0]], [[24], [20], [16]], [[7], [0], [0]]]
    observed = [[True, True, False], [True, True, True], [True, False, False]]
    assert batch["observed"].squeeze(2).tolist() == observed
    assert batch["labels"].tolist() == [0, 0, 1]
    assert batch["index"].tolist() == [2, 0, 1]
    for tensor in (batch["times"], batch["values"], batch["labels"]):
        assert tensor.dtype == torch.float32
    assert (batch["observed"].dtype, batch["index"].dtype) == (torch.bool, torch.int64)


def test_collate_takes_the_difference_of_times_before_it_rounds() -> None:
    # In float32, 900,000 h and a minute later are the same.
    batch = dataset_of(["1 (9e5h) -> 2 (900000.015625h)", "1 (0h)"]).collate([0])
    assert batch["times"].tolist() == [[0.0, 0.015625]]


def test_collate_marks_an_unmeasured_feature() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"])
    dataset.features, dataset.units = ("a", "b"), ("u", "u")
    dataset.values = np.array([[1.0, np.nan], [np.nan, 5.0], [3.0, 4.0]])
    batch = dataset.collate([0])
    assert batch["observed"].tolist() == [[[True, False], [False, True]]]
    assert batch["values"].tolist() == [[[1.0, 0.0], [0.0, 5.0]]]


def test_a_batch_costs_its_own_rows_and_not_all() -> None:
    """Collating takes the same memory from two hundred as from 100,000 rows."""
    peaks = []
    for rows in (200, 100_000):
        dataset = dataset_of(["20 (0h) -> 18 (2h) -> 16 (4h)"] * rows)
        dataset.collate(range(16))
        tracemalloc.start()
        dataset.collate(range(100, 116))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1000


def test_the_longest_gap_lies_within_a_series() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h) -> 2 (8.5h)", "3 (500h)", "1 (-900h) -> 2 (-898h)"])
    assert dataset.longest_gap() == 7.5


def test_sample_keeps_all_rows_of_the_drawn_patients() -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    sample = dataset.sample_patients(50, seed=1)
    drawn = set(sample.groups)
    assert len(drawn) == 50
    assert len(sample) == sum(patient in drawn for patient in dataset.groups)
    assert sample.fingerprint() == dataset.sample_patients(50, seed=1).fingerprint()
    assert drawn != set(dataset.sample_patients(50, seed=2).groups)


@pytest.mark.parametrize("most", [0, 200, 10_000])
def test_sample_of_all_patients_is_the_whole(most: int) -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    assert dataset.sample_patients(most, seed=1).fingerprint() == dataset.fingerprint()


def test_subset_equals_the_chosen_rows_in_their_order() -> None:
    table = cohort(20).assign(split="train")
    dataset, chosen = MIMICtrajectoryDataset(table), np.array([7, 0, 19, 3])
    subset = dataset.subset(chosen)
    assert len(subset) == 4
    expected = MIMICtrajectoryDataset(table.iloc[chosen])
    assert subset.fingerprint() == expected.fingerprint()
    whole = dataset.collate(chosen.tolist())
    assert torch.equal(subset.collate([0, 1, 2, 3])["values"], whole["values"])
    assert [subset.prompt(k) for k in range(4)] == [dataset.prompt(int(i)) for i in chosen]


@pytest.mark.parametrize(
    "change",
    [
        {SERIES: ["1 (0h) -> 2 (1h)", "3.0000001 (0h)"]},
        {SERIES: ["1 (0h) -> 2 (1.5h)", "3 (0h)"]},
        {SERIES: ["1 (0h)", "2 (1h) -> 3 (2h)"]},
        {LABEL: [0, 0]},
        {"subject_id": ["a", "c"]},
        {"id": ["x", "z"]},
        {"clinical_context": ["", "older"]},
        {"split": ["train", "val"]},
    ],
    ids=lambda change: f"{next(iter(change))}",
)
def test_fingerprint_changes_with_all_that_can_be_learned_from(change: dict[str, Any]) -> None:
    columns = {
        SERIES: ["1 (0h) -> 2 (1h)", "3 (0h)"],
        LABEL: [0, 1],
        "subject_id": ["a", "b"],
        "id": ["x", "y"],
        "clinical_context": ["", "old"],
        "split": ["train", "train"],
    }
    before = MIMICtrajectoryDataset(pd.DataFrame(columns)).fingerprint()
    assert before == MIMICtrajectoryDataset(pd.DataFrame(columns)).fingerprint()
    assert before != MIMICtrajectoryDataset(pd.DataFrame({**columns, **change})).fingerprint()


def test_fingerprint_tells_the_columns_apart() -> None:
    one = dataset_of(["1 (0h)"] * 2, id=["x", "y1"], subject_id=["2", "z"])
    two = dataset_of(["1 (0h)"] * 2, id=["x", "y"], subject_id=["12", "z"])
    assert one.fingerprint() != two.fingerprint()


def test_a_sample_is_a_step_of_the_flow() -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    sample = dataset.sample_patients(50, seed=1)
    assert dataset.flow is None
    assert sample.flow is not None
    rule = "not among 50 of 200 patients drawn (--max_samples)"
    removed = len(dataset) - len(sample)
    assert sample.flow.to_dict("records") == [
        {"rule": rule, "removed": removed, "left": len(sample)}
    ]
    smaller = sample.sample_patients(20, seed=1)
    assert smaller.flow is not None
    assert smaller.flow["left"].tolist() == [len(sample), len(smaller)]
    assert dataset.sample_patients(0, seed=1).flow is None


def test_the_fingerprint_of_rows_ignores_series_and_contexts() -> None:
    def fingerprint(**change: Any) -> str:
        columns = {SERIES: ["1 (0h)", "2 (1h)"], LABEL: [0, 1], "clinical_context": ["a", "b"]}
        return MIMICtrajectoryDataset(pd.DataFrame({**columns, **change})).row_fingerprint()

    same = {SERIES: ["9 (0h)", "2 (1h)"], "clinical_context": ["a", "other"]}
    assert fingerprint(**same) == fingerprint()
    assert fingerprint(subject_id=["x", "y"]) != fingerprint()
    assert fingerprint(**{LABEL: [1, 1]}) != fingerprint()


def test_a_series_that_the_training_part_never_measures_is_refused_unless_the_format_brings_it(
    monkeypatch,
):
    rare = ["5 (0h)"] + [""] * 39
    dataset, train = dataset_of(["1 (0h)"] * 40, trajectory_rare=rare), np.arange(40)
    dataset.check_measured(train)
    with pytest.raises(InputError, match=r'never measures rare.*--series "Anion gap"'):
        dataset.check_measured(train[1:])
    monkeypatch.setattr(MIMICtrajectoryDataset, "fixed_features", True)
    dataset.check_measured(train[1:])
