"""Tests of what a run learns from: hashes of patients across files, descriptions, sampling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.dka.description import Description
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import PromptOptions
from trajectories import LABEL, SERIES


def patients(rows: int, seed: int, *, observations: int = 6, named: bool = True) -> pd.DataFrame:
    """Make patients of one row each whose values no other seed's share."""
    rng = np.random.default_rng(seed)
    values = rng.normal(20, 5, (rows, observations)).round(3)
    table: dict[str, Any] = {
        SERIES: [" -> ".join(f"{v} ({4 * k}h)" for k, v in enumerate(row)) for row in values],
        LABEL: [int(k % 5 == 0) for k in range(rows)],
    }
    if named:
        table["subject_id"] = [f"P{seed}-{k}" for k in range(rows)]
    return pd.DataFrame(table)


def data_of(
    table: pd.DataFrame, seed: int = 0, *, max_len: int = 20, most: int = 0, **reading: Any
) -> Data:
    dataset = MIMICtrajectoryDataset(table, max_len, **reading)
    return prepare_data(dataset, max_samples=most, seed=seed, prompts=PromptOptions())


def overlap(one: Data, other: Data) -> int:
    """Count the held-out patients of ``other`` that trained in ``one``."""
    return other.count_overlap(one.training_patients(), one.dataset.has_patient_ids)


def held_out(data: Data) -> set[str]:
    rows = np.concatenate([data.split["val"], data.split["test"]])
    return set(data.dataset.groups[rows])


def test_the_same_split_shares_no_patient_and_another_seed_shares_those_that_moved() -> None:
    table = patients(100, seed=1)
    first, again, other = data_of(table, 0), data_of(table, 0), data_of(table, 1)
    assert overlap(first, again) == 0
    trained = set(first.dataset.groups[first.split["train"]])
    moved = len(held_out(other) & trained)
    assert overlap(first, other) == moved > 10


def test_patients_are_known_again_across_files_whatever_their_texts_say() -> None:
    table = patients(100, seed=1)
    changed = table.assign(clinical_context="54-year-old woman")
    assert overlap(data_of(table, 0), data_of(changed, 0)) == 0
    moved = overlap(data_of(table, 0), data_of(table, 1))
    assert overlap(data_of(table, 0), data_of(changed, 1)) == moved
    assert data_of(changed).rows_sha256 == data_of(table).rows_sha256
    assert data_of(changed).data_sha256 != data_of(table).data_sha256
    shuffled = changed.sample(frac=1, random_state=0)
    assert overlap(data_of(table, 0), data_of(shuffled, 0)) == 0
    assert overlap(data_of(table, 0), data_of(shuffled, 1)) == moved
    assert overlap(data_of(table, 0), data_of(patients(100, seed=2), 1)) == 0


@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True)])
def test_patients_without_a_name_are_known_by_their_rows(named: tuple[bool, bool]) -> None:
    one, other = (patients(100, seed=1, named=each) for each in named)
    other = other.iloc[::-1].assign(clinical_context="elsewhere")
    first, second = data_of(one, 0), data_of(other, 1)
    texts = one[SERIES].tolist()
    trained = {texts[i] for i in first.split["train"]}
    rows = np.concatenate([second.split["val"], second.split["test"]])
    expected = sum(other[SERIES].iloc[i] in trained for i in rows)
    assert overlap(first, second) == expected > 10
    assert overlap(first, data_of(patients(100, seed=2, named=named[1]), 1)) == 0


def test_rows_that_many_patients_share_identify_nobody() -> None:
    """Series of one or two whole numbers recur; so do those of the split's own training part."""
    few = pd.DataFrame({SERIES: ["24 (0h) -> 20 (2h)"] * 60, LABEL: [k % 2 for k in range(60)]})
    assert overlap(data_of(few, 0), data_of(few, 1)) == 0
    twins = pd.concat([patients(50, seed=1, named=False)] * 2, ignore_index=True)
    same = data_of(twins, 0, allow_duplicates=True)
    assert overlap(same, same) == 0


def test_a_shorter_history_is_the_same_row() -> None:
    table = patients(100, seed=1, observations=12, named=False)
    whole, short = data_of(table, 0), data_of(table, 1, max_len=6)
    assert overlap(whole, short) == overlap(whole, data_of(table, 1)) > 10


def test_rows_of_the_same_file_are_known_by_number_however_little_of_them_is_read() -> None:
    table = patients(100, seed=1, observations=12, named=False)
    whole, short, again = data_of(table, 0), data_of(table, 1, max_len=2), data_of(table, 0)
    moved = len(held_out(short) & set(whole.dataset.groups[whole.split["train"]]))
    trained = whole.training_patients()
    assert short.rows_sha256 == whole.rows_sha256
    assert short.count_overlap(trained, False, same_rows=True) == moved > 10
    assert again.count_overlap(trained, False, same_rows=True) == 0


def test_the_hash_of_training_patients_is_sorted_unique_and_names_nobody() -> None:
    data = data_of(patients(100, seed=1))
    hashes = data.training_patients()
    assert hashes.dtype == np.int64
    assert (np.diff(hashes) > 0).all()
    assert len(hashes) == 2 * 80  # by name and by rows


def test_the_description_of_data_is_plain_and_rebuilds_their_reading() -> None:
    data = data_of(patients(100, seed=1), max_len=4)
    description = json.loads(json.dumps(data.description()))
    assert description["dataset"] == "dka"
    assert description["read_options"] == {"max_len": 4, "label_column": LABEL}
    assert description["features"] == ["Anion gap"]
    assert description["has_patient_ids"] is True
    assert "P1-" not in json.dumps(description)
    assert data.prevalence() == pytest.approx(0.2)


def rare_inputs():
    """Make 120 patients: eight have lactate, seven differ in static_two, all know static_age."""
    table = patients(120, seed=1)
    table["split"] = ["train"] * 80 + ["val"] * 20 + ["test"] * 20
    table["trajectory_lactate"] = ["2 (0h) -> 3 (1h)"] * 8 + [""] * 112
    table["static_age"] = np.arange(120) % 60
    table["static_two"] = [1] * 7 + [0] * 73 + [1] * 40
    table["prediction_hours"] = [30] * 9 + [np.nan] * 111
    return table


def test_the_description_counts_the_training_patients_behind_each_input():
    table = rare_inputs()
    static = {"static_age": 80, "static_two": 7, "prediction_hours": 9}
    expected = {"series": {"Anion gap": 80, "lactate": 8}, "static": static}
    assert data_of(table, max_len=64).description()["patients"] == expected
    table.loc[:7, "subject_id"] = "one"  # with eight rows
    assert data_of(table, max_len=64).description()["patients"]["series"]["lactate"] == 1


def test_inputs_of_few_training_patients_are_one_warning(caplog):
    data_of(rare_inputs()).check_inputs()
    (line,) = caplog.messages
    assert line.startswith("warning: DataFrame: fewer than 11 training patients have lactate, ")
    caplog.clear()
    data_of(patients(120, seed=1)).check_inputs()
    assert caplog.messages == []


def test_a_sample_is_drawn_before_the_split_and_hashes_are_of_all_that_was_read() -> None:
    table = patients(200, seed=1)
    whole, sample = data_of(table), data_of(table, most=60)
    assert len(sample.dataset) == sum(map(len, sample.split.values())) == 60
    assert sample.data_sha256 == whole.data_sha256
    assert sample.rows_sha256 == whole.rows_sha256


def test_a_new_encoders_time_scale_is_the_users_or_the_datas(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = patients(100, seed=1)
    table[SERIES] = table[SERIES].str.replace("(20h)", "(20000h)")
    given = data_of(table, description=Description(time_scale=9.0))
    assert (given.time_scale(None), given.time_scale(5.0)) == (9.0, 5.0)
    silent = data_of(table)
    assert silent.time_scale(5.0) == 5.0
    assert caplog.messages == []
    assert silent.time_scale(None) == 72.0
    (line,) = caplog.messages
    assert line.startswith("warning: DataFrame: the median span of a row, 20,000 h, is beyond")
    assert "--time_scale 20000" in line
