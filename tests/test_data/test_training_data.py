"""What a run learns from: hashes of the data, the rows and inputs of a run."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.checks import check
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.files import InputError
from trajectories import GAP, LABEL, SERIES, data_of, patients

NAN = float("nan")

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


def test_the_description_of_data_is_plain_and_holds_no_patient():
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
    data.check_inputs()
    table.loc[:1, "subject_id"] = "one"  # with two rows
    assert data_of(table, max_len=64).description()["inputs"] == description["inputs"]
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
    silent, short = (
        data_of(table),
        data_of(table, description=replace(GAP, time_scale=0.09)).dataset,
    )
    assert [given.time_scale(None), given.time_scale(5.0), silent.time_scale(5.0)] == [9, 5, 5]
    assert caplog.messages == []
    for data, hours in ((given, 0.09), (replace(given, dataset=short), None)):
        with pytest.raises(InputError, match="time_scale"):
            data.time_scale(hours)
    assert silent.time_scale(None) == 72.0
    (line,) = caplog.messages
    assert "--time_scale 20000" in line


def test_prediction_times_that_no_training_patient_has_are_refused():
    table = patients(60).assign(split=["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    held_out = table.assign(prediction_hours=[NAN] * 40 + [30.0] * 20)
    data_of(table.assign(prediction_hours=[30.0] + [NAN] * 59)).check_inputs()
    data_of(table).check_inputs()
    for use in (
        lambda: data_of(held_out).check_inputs(),
        lambda: check(lambda: MIMICtrajectoryDataset(held_out)),
    ):
        with pytest.raises(InputError, match="column prediction_hours"):
            use()
