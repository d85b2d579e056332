"""Tests of dataset_format: series, batches, patients, splits, simple features."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dataset_format
import medgemma_trainer
from dataset_format import InputError, MIMICtrajectoryDataset, plain
from trajectories import LABEL, SERIES, dataset_of, one_series, random_text, table_of


def cohort(patients: int = 200, seed: int = 0) -> pd.DataFrame:
    """Make one to three rows a patient, a fifth of the patients with the event in one of them."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for visit in range(int(rng.integers(1, 4))):
            series = " -> ".join(f"{rng.integers(5, 40)} ({4 * k}h)" for k in range(3))
            event = int(patient % 5 == 0 and visit == 0)
            rows.append((f"P{patient:03d}", series, f"visit {visit}", event))
    return pd.DataFrame(rows, columns=["subject_id", SERIES, "clinical_context", LABEL])


def reference_parse(text: str) -> tuple[list[float], list[float]]:
    """Read a series slowly, one piece after the other."""
    pairs = []
    for piece in text.split("->"):
        value, hours = piece.replace(")", "").replace("h", "").split("(")
        pairs.append((float(hours), float(value)))
    pairs.sort(key=lambda pair: pair[0])
    return [hours for hours, _ in pairs], [value for _, value in pairs]


# --------------------------------------------------------------------------- series


def test_series_written_with_plain_are_read_back_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    series = []
    for _ in range(300):
        length = int(rng.integers(1, 21))
        times = np.sort(rng.exponential(30.0, length)).tolist()
        values = (rng.normal(size=length) * 10.0 ** rng.integers(-8, 9, length)).tolist()
        series.append((times, values))
    texts = [
        " -> ".join(f"{plain(v)} ({plain(t)}h)" for t, v in zip(*pair, strict=True))
        for pair in series
    ]
    dataset = dataset_of(texts)
    assert dataset.times.dtype == dataset.values.dtype == np.float64
    assert dataset.values.shape == (len(dataset.times), 1)
    assert dataset.lengths.tolist() == [len(times) for times, _ in series]
    assert [one_series(dataset, i) for i in range(300)] == series


def test_parser_agrees_with_a_slow_reference_on_random_texts() -> None:
    rng = np.random.default_rng(1)
    texts = [random_text(rng) for _ in range(500)]
    dataset = dataset_of(texts)
    for i, text in enumerate(texts):
        assert one_series(dataset, i) == reference_parse(text), repr(text)


def test_parsing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random_text(np.random.default_rng(k)) for k in range(50)]
    whole = dataset_of(texts)
    monkeypatch.setattr(dataset_format, "PARSE_ROWS", 7)
    assert dataset_of(texts).fingerprint() == whole.fingerprint()


def test_a_space_of_any_kind_counts_as_a_space() -> None:
    # A spreadsheet or a web page brings no-break spaces that nobody sees.
    dataset = dataset_of(["24\u00a0(0h)\u00a0-> 20\u2009(2\u202fh)", "1 (0h)"])
    assert one_series(dataset, 0) == ([0.0, 2.0], [24.0, 20.0])


def test_times_are_sorted_and_equal_times_keep_their_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(["3 (4h) -> 1 (0h) -> 2 (0h)", "1 (0h) -> 5 (0h)", "1 (2h) -> 2 (1h)"])
    assert one_series(dataset, 0) == ([0.0, 0.0, 4.0], [1.0, 2.0, 3.0])
    assert one_series(dataset, 1) == ([0.0, 0.0], [1.0, 5.0])
    notices = [m for m in caplog.messages if "time order" in m]
    assert len(notices) == 1
    assert "2 rows" in notices[0]


def test_only_the_most_recent_observations_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    long = " -> ".join(f"{10 + k} ({k}h)" for k in reversed(range(5)))
    with caplog.at_level(logging.INFO):
        dataset = dataset_of([long, "1 (0h) -> 2 (1h)", long], max_len=3)
    assert one_series(dataset, 0) == ([2.0, 3.0, 4.0], [12.0, 13.0, 14.0])
    assert dataset.offsets.tolist() == [0, 3, 5, 8]
    notices = [m for m in caplog.messages if "most recent" in m]
    assert len(notices) == 1
    assert "2 rows" in notices[0]


def test_a_quiet_file_brings_no_notice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"], subject_id=["a", "b"])
    assert caplog.messages == []


def test_max_len_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        dataset_of(["1 (0h)"], max_len=0)


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


# --------------------------------------------------------------------------- patients


def test_rows_of_a_subject_share_a_group_and_are_named_by_it() -> None:
    dataset = dataset_of(["1 (0h)"] * 3, subject_id=["007", " 007 ", "8"])
    assert dataset.groups.tolist() == dataset.ids.tolist() == ["007", "007", "8"]


def test_id_names_the_rows_and_stands_in_for_a_missing_subject_id() -> None:
    both = dataset_of(["1 (0h)"] * 2, subject_id=["p", "p"], id=["x", "y"])
    assert (both.groups.tolist(), both.ids.tolist()) == (["p", "p"], ["x", "y"])
    alone = dataset_of(["1 (0h)"] * 2, id=["x", "y"])
    assert (alone.groups.tolist(), alone.ids.tolist()) == (["x", "y"], ["x", "y"])


def test_without_subject_each_row_is_its_own_patient_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(["1 (0h)"] * 30)
    assert len(set(dataset.groups)) == 30
    assert sum("subject_id" in message for message in caplog.messages) == 1


def test_contexts_are_read_and_may_be_empty() -> None:
    dataset = dataset_of(["1 (0h)"] * 2, clinical_context=[" man, 54 years ", None])
    assert dataset.contexts.tolist() == ["man, 54 years", ""]
    assert dataset_of(["1 (0h)"]).contexts.tolist() == [""]


def test_one_long_context_does_not_cost_memory_for_every_row() -> None:
    contexts = ["x" * 20_000] + ["short"] * 999
    dataset = dataset_of(["1 (0h)"] * 1000, clinical_context=contexts)
    assert dataset.contexts.nbytes < 1_000_000


def test_labels_may_be_missing_only_where_none_are_required() -> None:
    table = pd.DataFrame({SERIES: ["1 (0h)", "2 (0h)"], LABEL: [1, None]})
    dataset = MIMICtrajectoryDataset(table, require_labels=False)
    assert dataset.labels[0] == 1
    assert math.isnan(dataset.labels[1])
    assert math.isnan(dataset.collate([1])["labels"].item())
    without = MIMICtrajectoryDataset(table.drop(columns=LABEL), require_labels=False)
    assert np.isnan(without.labels).all()
    with pytest.raises(InputError, match=f"row 1, column {LABEL}"):
        MIMICtrajectoryDataset(table)


def test_a_known_label_is_checked_even_where_none_is_required() -> None:
    table = pd.DataFrame({SERIES: ["1 (0h)"], LABEL: [3]})
    with pytest.raises(InputError, match=f"row 0, column {LABEL}"):
        MIMICtrajectoryDataset(table, require_labels=False)


def test_a_file_and_its_data_frame_give_the_same_data_set(tmp_path: Path) -> None:
    table = cohort(30).assign(split=lambda t: np.where(t["subject_id"] < "P010", "test", "train"))
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    from_file, from_table = MIMICtrajectoryDataset(path), MIMICtrajectoryDataset(table)
    assert from_file.fingerprint() == from_table.fingerprint()
    for name in ("times", "values", "offsets", "labels", "ids", "groups", "contexts", "parts"):
        assert np.array_equal(getattr(from_file, name), getattr(from_table, name)), name


def test_a_data_frame_with_a_column_twice_is_refused() -> None:
    table = table_of(["1 (0h)"])
    with pytest.raises(InputError, match=LABEL):
        MIMICtrajectoryDataset(pd.concat([table, table[[LABEL]]], axis=1))


# --------------------------------------------------------------------------- split


def test_split_shares_no_patient_and_loses_no_row() -> None:
    dataset = MIMICtrajectoryDataset(cohort())
    split = dataset.split(0)
    assert list(split) == ["train", "val", "test"]
    rows = np.concatenate(list(split.values()))
    assert sorted(rows.tolist()) == list(range(len(dataset)))
    patients = {name: set(dataset.groups[rows]) for name, rows in split.items()}
    assert sum(len(p) for p in patients.values()) == len(set.union(*patients.values())) == 200


@pytest.mark.parametrize("seed", range(5))
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


def encoder_buffers(table: pd.DataFrame) -> dict[str, torch.Tensor]:
    dataset = MIMICtrajectoryDataset(table)
    data = medgemma_trainer.Data(dataset, dataset.split(0), "", "")
    args = medgemma_trainer.resolve(medgemma_trainer.build_parser().parse_args([]))
    return dict(medgemma_trainer.make_encoder(args, data).named_buffers())


def test_normaliser_sees_only_the_training_part() -> None:
    table = cohort()
    split = MIMICtrajectoryDataset(table).split(0)
    before = encoder_buffers(table)
    assert before
    changed = table.copy()
    changed.loc[np.concatenate([split["val"], split["test"]]), SERIES] = "900 (0h) -> -900 (5h)"
    after = encoder_buffers(changed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed.loc[split["train"][0], SERIES] = "900 (0h)"
    touched = encoder_buffers(changed)
    assert any(not torch.equal(before[name], touched[name]) for name in before)


# --------------------------------------------------------------------------- summary features


def test_summary_features_agree_with_a_slow_reference() -> None:
    rng = np.random.default_rng(2)
    texts = [
        " -> ".join(f"{rng.normal(20, 5):.3f} ({k + rng.random():.3f}h)" for k in range(length))
        for length in rng.integers(1, 15, 100)
    ]
    dataset = dataset_of(texts)
    table = dataset.summary_features()
    assert table.shape == (100, 8)
    for i in range(100):
        t, v = (np.array(numbers) for numbers in one_series(dataset, i))
        expected = {
            "first": v[0],
            "last": v[-1],
            "min": v.min(),
            "max": v.max(),
            "mean": v.mean(),
            "slope": np.polyfit(t, v, 1)[0] if len(t) > 1 else 0.0,
            "count": len(v),
            "span": t[-1] - t[0],
        }
        row = {name: table.loc[i, f"Anion gap {name}"] for name in expected}
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_summary_features_of_equal_times_have_no_slope() -> None:
    # 0.7 less the mean of seven times 0.7 is 1e-16, not zero.
    series = " -> ".join(f"{value} (0.7h)" for value in (1, 5, 2, 8, 3, 9, 4))
    table = dataset_of([series, "1 (2h) -> 5 (2h)"]).summary_features()
    assert table[["Anion gap slope", "Anion gap span"]].to_numpy().tolist() == [[0, 0]] * 2


def test_summary_features_of_an_unmeasured_feature_are_unknown() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"])
    dataset.features, dataset.units = ("a", "b"), ("u", "u")
    dataset.values = np.array([[1.0, 9.0], [2.0, np.nan], [3.0, np.nan]])
    table = dataset.summary_features()
    described = table[["b first", "b last", "b mean", "b slope"]].to_numpy()
    assert described[0].tolist() == [9, 9, 9, 0]
    assert np.isnan(described[1]).all()


def test_the_baselines_see_the_last_value_the_count_or_everything() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"])
    inputs = dataset.baseline_inputs()
    assert list(inputs) == ["last value", "number of observations", "logistic regression"]
    assert inputs["last value"].to_numpy().tolist() == [[2], [3]]
    assert inputs["number of observations"].to_numpy().tolist() == [[2], [1]]
    assert inputs["logistic regression"].equals(dataset.summary_features())


def test_the_longest_gap_lies_within_a_series() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h) -> 2 (8.5h)", "3 (500h)", "1 (-900h) -> 2 (-898h)"])
    assert dataset.longest_gap() == 7.5


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
