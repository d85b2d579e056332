"""Tests of the split: patients, shares, seeds, a split that the data bring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import SAMPLE
from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.splits import row_keys
from trajectories import dataset_of, table_of
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
    with pytest.raises(InputError, match="column split: train lacks patients with or without"):
        MIMICtrajectoryDataset(table).split(0)


# --------------------------------------------------------------------------- equal rows

PARTS = ["train", "train", "val", "val", "test", "test"]
ROWS = [f"{k} (0h) -> 20 (2h) -> 18 (4h)" for k in range(6)]
LABELS = [0, 1, 0, 1, 0, 1]


def with_copy(cell: str, at: int = 3, **columns: Any) -> MIMICtrajectoryDataset:
    """Return six patients of whom one has another cell than their own."""
    return dataset_of([*ROWS[:at], cell, *ROWS[at + 1 :]], split=PARTS, **columns)


def sizes(dataset: MIMICtrajectoryDataset) -> list[int]:
    """Rows of train, val and test."""
    return [len(rows) for rows in dataset.split(0).values()]


def test_equal_rows_in_two_parts_are_refused_unless_allowed() -> None:
    pattern = r"rows 1 and 3 are equal .* \(1 such pairs\): remove .* by --allow_duplicates"
    with pytest.raises(InputError, match=pattern):
        with_copy(ROWS[1]).split(0)
    table = table_of([*ROWS[:3], ROWS[1], *ROWS[4:]], split=PARTS)
    assert sizes(MIMICtrajectoryDataset(table, allow_duplicates=True)) == [2, 2, 2]


@pytest.mark.parametrize(
    "dataset",
    [
        with_copy(ROWS[1], label_escalation=[0, 1, 1, 0, 0, 1]),
        with_copy(ROWS[1], clinical_context=["a", "b", "c", "d", "e", "f"]),
        with_copy("1 (0h) -> 20 (2h) -> 18 (4.5h)"),
        with_copy("1 (0h) -> 18 (2h) -> 20 (4h)"),
        with_copy(ROWS[1], trajectory_x=["", "1 (0h)", "", "2 (0h)", "", ""]),
        with_copy(ROWS[1], trajectory_x=["", "1 (0h)", "", "1 (2h)", "", ""]),
    ],
    ids=["label", "context", "time", "order", "value", "time of a value"],
)
def test_rows_that_differ_in_what_is_read_are_not_equal(dataset: MIMICtrajectoryDataset) -> None:
    assert sizes(dataset) == [2, 2, 2]


def test_equal_rows_in_one_part_leak_nothing() -> None:
    rows, parts = [*ROWS, ROWS[0]], [*PARTS, "train"]
    assert sizes(dataset_of(rows, label_escalation=[*LABELS, 0], split=parts)) == [3, 2, 2]


def test_rows_of_few_values_may_be_equal() -> None:
    assert sizes(dataset_of(["24 (0h) -> 20 (2h)"] * 6, split=PARTS)) == [2, 2, 2]
    with pytest.raises(InputError, match="are equal"):
        dataset_of(["24 (0h) -> 20 (2h)"] * 6, split=PARTS, trajectory_x=["1 (9h)"] * 6).split(0)


def test_equal_rows_are_numbered_as_in_the_file_also_when_rows_were_left_out() -> None:
    table = table_of(["", *ROWS, "", ROWS[1]], split=["train", *PARTS, "train", "test"])
    table["label_escalation"] = [0, *LABELS, 0, 1]
    dataset = MIMICtrajectoryDataset(table.assign(trajectory_x="1 (0h)"), series=["Anion gap"])
    with pytest.raises(InputError, match="rows 2 and 8 are equal"):
        dataset.subset(np.arange(len(dataset))[::-1]).split(0)


@pytest.mark.parametrize("name", ["bicarbonate.csv", "chemistry.csv.gz"])
def test_the_sample_data_hold_no_equal_rows(name: str) -> None:
    dataset = MIMICtrajectoryDataset(SAMPLE.with_name(f"physionet2012_{name}"))
    arrays = (dataset.times, dataset.values, dataset.offsets, dataset.labels, dataset.contexts)
    keys = row_keys(*arrays)
    keys = keys[keys != 0]
    assert len(np.unique(keys)) == len(keys) > 2_900
