"""Tests of the split: patients, shares, seeds, a split that the data bring."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from trajectories import dataset_of
from visits import cohort


def test_split_shares_no_patient_and_loses_no_row() -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    split = dataset.split(0)
    assert list(split) == ["train", "val", "test"]
    rows = np.concatenate(list(split.values()))
    assert sorted(rows.tolist()) == list(range(len(dataset)))
    patients = {name: set(dataset.groups[rows]) for name, rows in split.items()}
    assert sum(len(p) for p in patients.values()) == len(set.union(*patients.values())) == 200


@pytest.mark.parametrize("seed", range(3))
def test_split_gives_each_class_80_10_10_of_its_patients(seed: int) -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    events = set(dataset.groups[dataset.labels == 1])
    for name, rows in dataset.split(seed).items():
        share = 0.8 if name == "train" else 0.1
        patients = set(dataset.groups[rows])
        assert len(patients & events) == share * 40
        assert len(patients - events) == share * 160


def test_the_smallest_cohort_still_has_an_event_in_every_part() -> None:
    dataset = MIMICtrajectoryDataset(cohort(patients=15))
    for rows in dataset.split(3).values():
        assert set(dataset.labels[rows]) == {0, 1}


def test_split_is_decided_by_its_seed_alone() -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    first, again, other = dataset.split(1), dataset.split(1), dataset.split(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["test"], other["test"])
    assert not np.array_equal(first["val"], other["val"])


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    table = cohort()
    shuffled = table.sample(frac=1, random_state=0)
    a, b = MIMICtrajectoryDataset(table), MIMICtrajectoryDataset(shuffled)
    for name, rows in a.split(0).items():
        assert set(a.groups[rows]) == set(b.groups[b.split(0)[name]])


def test_a_split_column_overrides_the_seed() -> None:
    names = ["train", "Val", "validation", " test ", "test", "train"]
    dataset = dataset_of(["1 (0h)"] * 6, split=names)
    for seed in (0, 1):
        rows = {name: rows.tolist() for name, rows in dataset.split(seed).items()}
        assert rows == {"train": [0, 5], "val": [1, 2], "test": [3, 4]}


def test_a_given_split_needs_patients_with_and_without_an_event_in_each_part() -> None:
    """Each patient has one row of either kind: rows show both classes, patients only one."""
    table = pd.DataFrame(
        {
            "clinical_trajectory": ["24 (0h) -> 20 (2h)"] * 60,
            "label_escalation": [i % 2 for i in range(60)],
            "subject_id": [i // 2 for i in range(60)],
            "split": ["train"] * 20 + ["val"] * 20 + ["test"] * 20,
        }
    )
    with pytest.raises(InputError, match=r"column split: train .* lacks patients with or without"):
        MIMICtrajectoryDataset(table).split(0)
