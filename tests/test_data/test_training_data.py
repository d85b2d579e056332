"""What a run learns from: split, copies across it, hashes of patients across files."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import patient_hashes, prepare_data, row_hashes
from medgemma_clinical.files import InputError
from trajectories import GAP, LABEL, SERIES, dataset_of, table_of
from visits import cohort

NAN = float("nan")


def assert_refused(dataset, place):
    with pytest.raises(InputError, match=place):
        dataset.split(0)


# --------------------------------------------------------------------------- split


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
    dataset = MIMICtrajectoryDataset(table.assign(trajectory_x="1 (0h)"), series=["Anion gap"])
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


COLUMNS = {
    SERIES: ["1 (0h) -> 2 (1h)", "3 (0h)"],
    LABEL: [0, 1],
    "subject_id": ["12", "b"],
    "id": ["x", "y"],
    "clinical_context": ["", "old"],
    "split": ["train", "train"],
    "static_x": [0.5, NAN],
    "prediction_hours": [8, NAN],
}


@pytest.mark.parametrize(
    ("change", "same_rows"),
    [
        ({SERIES: ["1 (0h) -> 2 (1h)", "3.0000001 (0h)"]}, True),
        ({SERIES: ["1 (0h) -> 2 (1.5h)", "3 (0h)"]}, True),
        ({SERIES: ["1 (0h)", "2 (1h) -> 3 (2h)"]}, True),
        ({"clinical_context": ["", "older"]}, True),
        ({"static_x": [0.5, 3]}, True),
        ({"static_x": None, "static_y": [0.5, NAN]}, True),
        ({"prediction_hours": [9, NAN]}, True),
        ({LABEL: [0, 0]}, False),
        ({"subject_id": ["12", "c"]}, False),
        ({"subject_id": ["2", "b"], "id": ["x", "y1"]}, False),
        ({"split": ["train", "val"]}, False),
    ],
    ids=str,
)
def test_the_hash_of_data_changes_with_all_that_can_be_learned_from(change, same_rows):
    before, again, after = (
        MIMICtrajectoryDataset(pd.DataFrame(columns).dropna(axis=1, how="all"))
        for columns in (COLUMNS, COLUMNS, COLUMNS | change)
    )
    assert before.fingerprint() == again.fingerprint() != after.fingerprint()
    assert (before.row_fingerprint() == after.row_fingerprint()) == same_rows


# --------------------------------------------------------------------------- overlap


def patients(rows=100, seed=1, *, observations=6, has_ids=True):
    """Make patients of one row each whose values no other seed's share."""
    values = np.random.default_rng(seed).normal(20, 5, (rows, observations)).round(3)
    series = [" -> ".join(f"{v} ({4 * k}h)" for k, v in enumerate(row)) for row in values]
    table = table_of(series).assign(**{LABEL: (np.arange(rows) % 5 == 0).astype(int)})
    return table.assign(subject_id=[f"P{seed}-{k}" for k in range(rows)]) if has_ids else table


def data_of(table, seed=0, *, max_len=20, max_samples=0, description=GAP, **options):
    dataset = MIMICtrajectoryDataset(table, max_len, description=description, **options)
    return prepare_data(dataset, max_samples=max_samples, seed=seed, prompts=PromptOptions())


def overlap(one, other, **options):
    """Count the held-out patients of ``other`` that trained in ``one``."""
    has_ids = one.dataset.has_patient_ids
    return other.count_overlap(one.training_patients(), has_ids, **options)


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


# --------------------------------------------------------------------------- data of a run


def test_the_description_of_data_is_plain_and_counts_the_patients_behind_each_input(caplog):
    table = patients(120).assign(split=["train"] * 80 + ["val"] * 20 + ["test"] * 20)
    table["trajectory_lactate"] = ["2 (0h) -> 3 (1h)"] * 12 + [""] * 108
    table["trajectory_rare"] = ["2 (0h)"] * 10 + [""] * 70 + ["2 (0h)"] * 40
    table["static_age"] = np.arange(120) % 60
    table["static_two"] = [1] * 17 + [0] * 63 + [1] * 40
    table["prediction_hours"] = [30] * 9 + [np.nan] * 111
    data = data_of(table, max_len=64)
    text = json.dumps(data.description())
    assert "P1-" not in text
    description = json.loads(text)
    assert description["read_options"] == {"max_len": 64, "label_column": LABEL}
    assert description["features"] == ["Anion gap", "lactate", "rare"]
    read = {"static": ["static_age", "static_two"], "prediction_time": True}
    assert description["inputs"] == {**read, "series": ["Anion gap", "lactate"]}
    assert (description["dataset"], description["has_patient_ids"]) == ("dka", True)
    static = {"static_age": 80, "static_two": 17, "prediction_hours": 9}
    expected = {"series": {"Anion gap": 80, "lactate": 12}, "static": static}
    assert description["patients"] == expected
    assert data.prevalence() == pytest.approx(0.2)
    caplog.clear()
    data_of(patients()).check_inputs()
    data.check_inputs()
    (line,) = caplog.messages
    assert "prediction_hours" in line
    table.loc[:1, "subject_id"] = "one"  # with two rows
    assert data_of(table, max_len=64).description()["patients"]["series"]["lactate"] == 11
    table.loc[:2, "subject_id"] = "one"
    assert data_of(table, max_len=64).description()["inputs"]["series"] == ["Anion gap"]


def test_rows_without_a_label_enter_nothing_that_is_learned_from():
    table = patients(60)
    table["trajectory_lactate"] = table["static_x"] = table["clinical_context"] = ""
    wild = table.head(20).assign(subject_id=[f"new {k}" for k in range(20)], **{LABEL: None})
    wild = wild.assign(trajectory_lactate="999 (0h)", static_x=range(20), clinical_context="x")
    known, mixed = (
        data_of(table),
        data_of(pd.concat([wild, table, table.head(5).assign(label_escalation=None)])),
    )
    assert mixed.description() == known.description()
    assert (mixed.prompts, mixed.unusable_static) == (known.prompts, known.unusable_static)
    assert not known.prompts.context  # no model reads contexts that all are empty
    assert data_of(table.assign(clinical_context="x")).prompts.context
    for part, rows in known.split.items():
        np.testing.assert_array_equal(mixed.split[part], rows)


def with_rare(few, empty):
    """120 patients, ``few`` of the training part with a rare series; ``empty`` rows hold no other.

    The empty ones are the last; half of them have the event.
    """
    table = patients(120).assign(split=["train"] * 80 + ["val"] * 20 + ["test"] * 20)
    table["trajectory_rare [U]"] = ["2 (1h)"] * few + [""] * (80 - few) + ["7 (1h)"] * 40
    table.loc[120 - empty :, SERIES] = ""
    return table


@pytest.mark.parametrize("few", [10, 11])
def test_rows_of_a_series_that_few_training_patients_have_leave_every_part(few):
    data = data_of(with_rare(few, 8), max_len=64)
    if few == 11:
        assert (len(data.dataset), data.unusable) == (120, [])
        return
    assert [name for name, _ in data.unusable] == ["rare"]
    assert data.dataset.flow[["removed", "left"]].to_numpy().tolist() == [[8, 112]]
    names = {part: data.dataset.groups[rows].tolist() for part, rows in data.split.items()}
    assert names["val"] == [f"P1-{k}" for k in range(80, 100)]
    assert names["test"] == [f"P1-{k}" for k in range(100, 112)]
    without = data_of(with_rare(few, 8).drop(columns="trajectory_rare [U]").head(112), max_len=64)
    for part, rows in data.split.items():
        np.testing.assert_array_equal(rows, without.split[part])


@pytest.mark.parametrize(("few", "empty", "place"), [(10, 20, "test lacks"), (10, 0, "")])
def test_a_part_that_the_rows_left_out_leave_without_both_outcomes_is_refused(few, empty, place):
    table = with_rare(few, empty)
    if place:
        with pytest.raises(InputError, match=place):
            data_of(table, max_len=64)
    else:
        data_of(table, max_len=64)
    with pytest.raises(InputError, match="rare"):  # nothing would be left
        data_of(table.drop(columns=SERIES), max_len=64)


def test_the_series_of_a_given_stage_1_are_read_and_those_of_an_earlier_one_are_all():
    table, options = with_rare(11, 0), {"max_samples": 0, "seed": 0, "prompts": PromptOptions()}
    dataset = MIMICtrajectoryDataset(table, 64, description=GAP)
    inputs = {"static": [], "prediction_time": False}
    every = prepare_data(dataset, **options, inputs=inputs)
    assert (every.description()["inputs"]["series"], every.unusable) == (["Anion gap", "rare"], [])
    own = prepare_data(dataset, **options, inputs={**inputs, "series": ["rare"]})
    assert [name for name, _ in own.unusable] == ["Anion gap"]
    assert own.dataset.lengths.max() == 1
    assert len(own.dataset) == 51


def test_a_sample_is_drawn_before_the_split_and_hashes_are_of_all_that_was_read():
    whole, sample = (data_of(patients(200), max_samples=most) for most in (0, 60))
    assert len(sample.dataset) == sum(map(len, sample.split.values())) == 60
    assert sample.data_sha256 == whole.data_sha256
    assert sample.rows_sha256 == whole.rows_sha256


def test_a_new_encoders_time_scale_is_the_users_or_the_datas(caplog):
    table = patients()
    table[SERIES] = table[SERIES].str.replace("(20h)", "(20000h)")
    given = data_of(table, description=replace(GAP, time_scale=9.0))
    silent = data_of(table)
    assert [given.time_scale(None), given.time_scale(5.0), silent.time_scale(5.0)] == [9, 5, 5]
    assert caplog.messages == []
    assert silent.time_scale(None) == 72.0
    (line,) = caplog.messages
    assert "--time_scale 20000" in line
