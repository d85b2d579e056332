"""Copies across a split, and patients of one file that are known again in another."""

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.overlap import (
    TrainingPatients,
    count_overlap,
    patient_hashes,
    row_hashes,
)
from medgemma_clinical.files import InputError
from trajectories import GAP, LABEL, SERIES, data_of, dataset_of, patients, table_of

NAN = float("nan")


def assert_refused(dataset, place):
    with pytest.raises(InputError, match=place):
        dataset.split(0)


# --------------------------------------------------------------------------- copies

PARTS = ["train", "train", "val", "val", "test", "test"]
ROWS = [f"{k} (0h) -> 20 (2h) -> 18 (4h)" for k in range(6)]
LABELS = [0, 1, 0, 1, 0, 1]


def with_copy(cell=ROWS[1], options=(), **columns):
    """Return six patients, the fourth with another cell than its own."""
    table = table_of([*ROWS[:3], cell, *ROWS[4:]], split=PARTS, **columns)
    return MIMICtrajectoryDataset(table, **dict(options))


def sizes(dataset):
    return [len(rows) for rows in dataset.split(0).values()]


def test_a_copy_in_another_part_is_refused_unless_allowed():
    columns = {"static_x": [5, NAN, 5, NAN, 5, 5], "prediction_hours": [5, 6, 5, 6, 5, 5]}
    columns |= {"clinical_context": list("abcbef"), "subject_id": list("uvwxyz")}
    assert_refused(with_copy(**columns), r"rows 1 and 3 .*1 such pairs.*--allow_duplicates")
    assert sizes(with_copy(options={"allow_duplicates": True}, **columns)) == [2, 2, 2]


@pytest.mark.parametrize(
    "columns",
    [
        {LABEL: [0, 1, 1, 0, 0, 1]},
        {"clinical_context": list("abcdef")},
        {"static_x": [0, 0, 0, NAN, 0, 0]},
        {"prediction_hours": [9, 9, 9, 10, 9, 9]},
        {"cell": "1 (1h) -> 20 (3h) -> 18 (5h)"},
        {"cell": "1 (0h) -> 18 (2h) -> 20 (4h)"},
        {"trajectory_x": ["", "1 (0h)", "", "1 (2h)", "", ""]},
    ],
    ids=str,
)
def test_rows_that_differ_in_what_is_read_are_no_copies(columns):
    assert sizes(with_copy(**columns)) == [2, 2, 2]


def test_copies_in_one_part_or_of_few_values_leak_nothing():
    again = dataset_of([*ROWS, ROWS[0]], split=[*PARTS, "train"], **{LABEL: [*LABELS, 0]})
    assert sizes(again) == [3, 2, 2]
    same = ["24 (0h) -> 20 (2h)"] * 6
    assert sizes(dataset_of(same, split=PARTS)) == [2, 2, 2]
    assert_refused(dataset_of(same, split=PARTS, trajectory_x=["1 (9h)"] * 6), "equal")


def test_copies_are_numbered_as_in_the_file_also_when_rows_were_left_out():
    table = table_of(["", *ROWS, "", ROWS[1]], split=["train", *PARTS, "train", "test"])
    table[LABEL] = [0, *LABELS, 0, 1]
    dataset = MIMICtrajectoryDataset(
        table.assign(trajectory_x="1 (0h)"), description=GAP, series=["Anion gap"]
    )
    assert_refused(dataset.subset(np.arange(len(dataset))[::-1]), "rows 2 and 8 ")


# --------------------------------------------------------------------------- hashes


@pytest.mark.parametrize("latest", [5, None])
def test_hashes_of_rows_tell_apart_what_a_plain_comparison_does(latest):
    rng = np.random.default_rng(0)
    series = [
        " -> ".join(f"{rng.integers(3)} ({h}h)" for h in sorted(rng.choice(5, size=n)))
        for n in rng.integers(1, 8, 3_000)
    ]
    x = [f"{rng.integers(3)} ({rng.integers(9)}h)" if rng.random() < 0.4 else "" for _ in series]
    dataset = dataset_of(series, trajectory_x=x)
    rows, named = rng.permutation(len(dataset)), {}
    hashes = row_hashes(dataset, rows, latest=latest)
    for i, own in zip(rows.tolist(), hashes.tolist(), strict=True):
        kept = slice(dataset.offsets[i], dataset.offsets[i + 1])
        times, values = dataset.times[kept], dataset.values[kept]
        times, values = (column[-latest if latest else 0 :] for column in (times, values))
        key = (times - times[-1]).tobytes(), values.tobytes(), dataset.labels[i]
        assert named.setdefault(key if (~np.isnan(values)).sum() >= 3 else 0, own) == own
    assert len(set(named.values())) == len(named) > 1000
    assert named.get(0, 0) == 0
    flipped = row_hashes(dataset, rows, 1.0, latest)
    assert np.array_equal(flipped == hashes, (dataset.labels[rows] == 1) | (hashes == 0))
    assert len(row_hashes(dataset, rows[:0], latest=latest)) == 0


def test_hashes_stay_those_that_checkpoints_hold():
    dataset, rows = dataset_of(["1 (0h) -> 2 (1h) -> -0 (3h)"], subject_id=["a7"]), np.arange(1)
    assert row_hashes(dataset, rows).tolist() == [6374126875211811226]
    assert patient_hashes(dataset, rows).tolist() == [6710318407972753942]


# --------------------------------------------------------------------------- overlap


def overlap(one, other, **options):
    """Count the held-out patients of ``other`` that trained in ``one``."""
    has_ids, trained = one.dataset.has_patient_ids, one.training_patients()
    return count_overlap(other.dataset, other.split, trained, has_ids=has_ids, **options)


def moved(one, other, names):
    """Count the same slowly: ``names`` gives each row's patient in either file."""
    trained = {names[0][i] for i in one.split["train"]}
    rows = np.concatenate([other.split["val"], other.split["test"]])
    return sum(names[1][i] in trained for i in rows)


@pytest.mark.parametrize("has_ids", [(True, True), (False, False), (True, False), (False, True)])
def test_patients_are_known_again_across_files_by_name_or_by_their_rows(has_ids):
    one, other = (patients(has_ids=each) for each in has_ids)
    static = {"clinical_context": "54-year-old woman", "static_x": np.arange(100)}
    first, stranger = data_of(one, 0), data_of(patients(seed=2, has_ids=has_ids[1]), 1)
    assert overlap(first, stranger) == 0
    for table in (other, other.assign(**static), other.iloc[::-1].assign(**static)):
        second = data_of(table, 1)
        names = one[SERIES].tolist(), table[SERIES].tolist()
        assert overlap(first, second) == moved(first, second, names) > 10
        if all(has_ids):
            assert overlap(first, data_of(table, 0)) == 0
    assert data_of(one.assign(**static)).rows_sha256 == first.rows_sha256
    assert data_of(one.assign(**static)).data_sha256 != first.data_sha256


def test_rows_that_many_patients_share_identify_nobody():
    """Series of one or two whole numbers recur; so do those of the split's own training part."""
    few = table_of(["24 (0h) -> 20 (2h)"] * 60)
    assert overlap(data_of(few, 0), data_of(few, 1)) == 0
    twins = pd.concat([patients(50, has_ids=False)] * 2, ignore_index=True)
    same = data_of(twins, 0, allow_duplicates=True)
    assert overlap(same, same) == 0


def test_rows_of_a_shorter_history_and_of_the_same_file_are_known_again():
    table = patients(observations=12, has_ids=False)
    whole, short, cut = (data_of(table, seed, max_len=m) for seed, m in ((0, 20), (1, 6), (1, 2)))
    assert overlap(whole, short) == overlap(whole, data_of(table, 1)) > 10
    assert cut.rows_sha256 == whole.rows_sha256
    by_number = moved(whole, cut, [range(100)] * 2)
    assert overlap(whole, cut, same_rows=True) == by_number > 10
    assert overlap(whole, data_of(table, 0), same_rows=True) == 0


def test_the_hashes_of_training_patients_are_sorted_unique_and_of_names_and_rows():
    hashes = data_of(patients()).training_patients()
    assert (hashes.dtype, len(hashes)) == (np.int64, 2 * 80)
    assert (np.diff(hashes) > 0).all()


@pytest.mark.parametrize(
    ("patients", "rows", "named", "expected"),
    [
        ([1, 2, 9], [11, 19, 19], True, [True, True, False]),  # an equal row proves the names
        ([1, 2, 9], [11, 19, 19], False, [True, False, False]),
        ([1, 2, 9], [18, 19, 19], True, [False, False, False]),
        ([8, 2, 9], [11, 19, 0], True, [True, False, False]),  # of another patient's name
    ],
)
def test_a_row_is_in_the_training_data_by_its_hash_or_its_patients(patients, rows, named, expected):
    trained = np.array([0, 1, 2, 11])
    either = np.stack([np.array(rows), np.array([98, 0, 0])], axis=1)  # with each of the labels
    known = TrainingPatients(trained, has_ids=True)
    found = known.include(np.array(patients), either, has_ids=named)
    assert found.tolist() == expected
