"""Tests of columns that are not read and look as if they should be."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.dka.columns import (
    describe_missing,
    describe_unread,
    is_near_miss,
    patient_column,
)

CELL = "24 (0h) -> 20 (2h)"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("clinical_trajectorie", "clinical_trajectory"),
        ("Clinical_Trajectory", "clinical_trajectory"),
        ("trajectory", "clinical_trajectory"),
        ("label", "label_escalation"),
        ("label_death", "label_escalation"),
        ("patient_id", "subject_id"),
        ("HADM_ID", "subject_id"),
        ("stay_id", "subject_id"),
        ("person_id", "subject_id"),
        ("MRN", "subject_id"),
        ("subjectid", "subject_id"),
        ("record_id", "subject_id"),
        ("study_id", "subject_id"),
        ("participant_id", "subject_id"),
        ("case_id", "subject_id"),
        ("pat_id", "subject_id"),
        ("patnr", "subject_id"),
        ("encounter", "subject_id"),
        ("MRN_hash", "subject_id"),
        ("person_source_value", "subject_id"),
        ("context", "clinical_context"),
        ("clinical_note", "clinical_context"),
        ("splits", "split"),
    ],
)
def test_a_near_miss_means_one_column(name: str, target: str) -> None:
    targets = ("clinical_trajectory", "label_escalation", "subject_id", "clinical_context", "split")
    assert [each for each in targets if is_near_miss(name, each)] == [target]


@pytest.mark.parametrize(
    "name",
    ["age", "hospital_id", "glucose", "", "Unnamed: 0", "patient_age", "n_patients", "inpatient"],
)
def test_other_columns_mean_none(name: str) -> None:
    targets = ("clinical_trajectory", "label_escalation", "subject_id", "clinical_context", "split")
    assert not any(is_near_miss(name, each) for each in targets)


def test_names_of_any_length_are_compared_at_once() -> None:
    start = time.monotonic()
    assert not is_near_miss("clinical" * 1_000_000, "clinical_trajectory")
    assert is_near_miss("subject" * 1_000_000, "subject_id")
    assert time.monotonic() - start < 1


def test_a_missing_column_is_asked_about() -> None:
    table = pd.DataFrame({"age": [1], "clinical_trajectorie": [CELL]})
    assert describe_missing(table, "clinical_trajectory") == (
        "did you mean clinical_trajectorie? rename it to clinical_trajectory; the columns are age, "
        "clinical_trajectorie"
    )
    table = pd.DataFrame({"label_death": [1]})
    assert describe_missing(table, "label_escalation") == (
        "did you mean label_death? rename it to label_escalation, or give --label_column "
        "label_death; the columns are label_death"
    )
    expected = "did you mean label_death? the columns are label_death"
    assert describe_missing(table, "lable_death") == expected
    table = pd.DataFrame({"gap": [CELL], "age": [1]})
    assert "did you mean gap?" in describe_missing(table, "clinical_trajectory")
    assert describe_missing(table[["age"]], "clinical_trajectory") == "the columns are age"


def test_a_long_table_is_recognised() -> None:
    table = pd.DataFrame(columns=["subject_id", "charttime", "itemid", "valuenum"])
    assert "converted by from_long" in describe_missing(table, "clinical_trajectory")


def test_columns_that_seem_to_be_cells_are_not_shown() -> None:
    table = pd.DataFrame({"24 (0h)": [CELL], "98765": [CELL]})
    text = describe_missing(table, "clinical_trajectory")
    assert text == "the first row seems to hold data: is the header missing?"
    assert describe_unread(table, ["24 (0h)", "98765"], ["clinical_context"]) == []


def test_unread_columns_are_asked_about_once_a_kind() -> None:
    series = [None, CELL, "1 (0h)"]
    table = pd.DataFrame({"context": "a", "glucose": series, "age": "54", "lactate": [CELL] * 3})
    assert describe_unread(table, [*table.columns], ["clinical_context", "split"]) == [
        "not read: column context: did you mean clinical_context? rename it",
        "not read: column glucose, lactate: the cells look like series: rename to "
        "trajectory_glucose, trajectory_lactate",
    ]
    assert describe_unread(table, ["context", "age"], ["split"]) == []
    assert len(describe_unread(pd.DataFrame({"note": [CELL]}), ["note"], ["clinical_context"])) == 1
    mixed = table.assign(glucose=["x", CELL, CELL])
    assert describe_unread(mixed, ["glucose"], []) == []


def test_columns_of_one_name_are_no_fault() -> None:
    table = pd.DataFrame([[CELL, CELL, 1]], columns=["glucose", "glucose", "mrn"])
    assert len(describe_unread(table, [*table.columns], [])) == 1
    assert patient_column(table) is None


def test_the_patient_is_the_column_with_the_fewest_values() -> None:
    table = pd.DataFrame({"stay_id": np.arange(4), "patient_id": [1, 1, 2, 2], "id": list("abcd")})
    assert patient_column(table) == "patient_id"
    assert patient_column(table[["id"]]) is None
    assert patient_column(table[["id"]].assign(study_id="A")) is None
    assert patient_column(table[["id"]].assign(study_id=[1, 1, 2, 2])) == "study_id"
    assert patient_column(table.assign(subject_id=1)) is None
