"""The split by patient, drawn or given."""

import numpy as np
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.files import InputError
from trajectories import dataset_of
from visits import cohort


def assert_refused(dataset, place):
    with pytest.raises(InputError, match=place):
        dataset.split(0)


@pytest.mark.parametrize("seed", range(3))
def test_a_split_gives_each_class_80_10_10_of_its_patients_and_loses_no_row(seed):
    dataset = MIMICtrajectoryDataset(cohort())
    split = dataset.split(seed)
    assert sorted(np.concatenate([*split.values()])) == list(range(len(dataset)))
    events, seen = set(dataset.groups[dataset.labels == 1]), set()
    for name, rows in split.items():
        share, own = 0.8 if name == "train" else 0.1, set(dataset.groups[rows])
        assert not own & seen
        seen |= own
        assert (len(own & events), len(own - events)) == (share * 40, share * 160)


def test_without_a_test_part_its_rows_train():
    dataset = MIMICtrajectoryDataset(cohort())
    before = dataset.split(0)
    dataset.held_out = ("val",)
    after = {part: rows.tolist() for part, rows in dataset.split(0).items()}
    train = sorted([*before["train"], *before["test"]])
    assert after == {"train": train, "val": before["val"].tolist(), "test": []}


def test_a_split_depends_on_its_seed_and_not_on_the_order_of_rows():
    table = cohort()
    dataset = MIMICtrajectoryDataset(table)
    shuffled = MIMICtrajectoryDataset(table.sample(frac=1, random_state=0))
    first, again, other = dataset.split(1), shuffled.split(1), dataset.split(2)
    for name, rows in first.items():
        assert set(dataset.groups[rows]) == set(shuffled.groups[again[name]])
        assert not np.array_equal(rows, other[name])


def test_the_smallest_cohort_has_an_event_in_every_part_and_a_smaller_one_is_refused():
    dataset = MIMICtrajectoryDataset(cohort(patients=15))
    for rows in dataset.split(3).values():
        assert set(dataset.labels[rows]) == {0, 1}
    assert_refused(MIMICtrajectoryDataset(cohort(patients=10)), "patients with an event")


def test_a_split_column_overrides_the_seed_and_needs_both_kinds_of_patients_in_each_part():
    names = ["train", "Val", "validation", " test ", "test", "train"]
    rows = {k: v.tolist() for k, v in dataset_of(["1 (0h)"] * 6, split=names).split(0).items()}
    assert rows == {"train": [0, 5], "val": [1, 2], "test": [3, 4]}
    columns = {"subject_id": np.arange(60) // 2, "split": np.repeat(["train", "val", "test"], 20)}
    assert_refused(dataset_of(["24 (0h)"] * 60, **columns), "column split: train")
