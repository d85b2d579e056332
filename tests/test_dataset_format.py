"""Tests of MIMICtrajectoryDataset: what of a table becomes rows, patients and labels."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.dka.description import Description
from medgemma_clinical.data.scoring import Findings, ScoringRows
from trajectories import LABEL, SERIES, dataset_of, one_series, table_of
from visits import cohort


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
    assert notices == [
        "DataFrame: 2 of 3 patients lose observations, as rows are longer than 3: the most recent "
        "are kept; --max_len 5 keeps more"
    ]


def test_the_time_scale_is_the_descriptions_or_the_formats() -> None:
    table = table_of(["1 (0h)"])
    dataset = MIMICtrajectoryDataset(table)
    assert (dataset.time_scale, dataset.assumed_time_scale) == (72.0, True)
    dataset = MIMICtrajectoryDataset(table, description=Description(time_scale=8760.0))
    assert (dataset.time_scale, dataset.assumed_time_scale) == (8760.0, False)


def test_rows_without_a_value_lose_none(caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(["1 (0h) -> 2 (1h)"] * 20 + [""] * 20, trajectory_x=["1 (0h)"] * 40)
    with caplog.at_level(logging.INFO):
        MIMICtrajectoryDataset(table, 1, series=["Anion gap"])
    assert any("20 of 20 patients lose observations" in line for line in caplog.messages)


def test_a_quiet_file_brings_no_notice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"], subject_id=["a", "b"])
    assert caplog.messages == []


def test_max_len_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        dataset_of(["1 (0h)"], max_len=0)


def test_rows_of_a_subject_share_a_group_and_are_named_by_it() -> None:
    dataset = dataset_of(["1 (0h)"] * 3, subject_id=["007", " 007 ", "8"])
    assert dataset.groups.tolist() == dataset.ids.tolist() == ["007", "007", "8"]


def test_id_names_the_rows_and_stands_in_for_a_missing_subject_id() -> None:
    both = dataset_of(["1 (0h)"] * 2, subject_id=["p", "p"], id=["x", "y"])
    assert (both.groups.tolist(), both.ids.tolist()) == (["p", "p"], ["x", "y"])
    alone = dataset_of(["1 (0h)"] * 2, id=["x", "y"])
    assert (alone.groups.tolist(), alone.ids.tolist()) == (["x", "y"], ["x", "y"])


def test_without_subject_each_row_is_its_own_patient_and_one_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = dataset_of(["1 (0h)"] * 30)
    assert len(set(dataset.groups)) == 30
    warning = "no column subject_id: each row is a patient of its own"
    assert dataset.warnings == (warning,)
    assert caplog.messages == [f"warning: DataFrame: {warning}"]
    assert dataset_of(["1 (0h)"], id="a").warnings == ()


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


def test_labels_may_be_written_as_pandas_writes_booleans() -> None:
    words = ["True", "FALSE", "true", "false", "1", "0.0"]
    dataset = dataset_of(["1 (0h)"] * 6, label_escalation=words)
    assert dataset.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert dataset_of(["1 (0h)"] * 2, label_escalation=[True, False]).labels.tolist() == [1, 0]
    for word in ("yes", "truer", "t"):
        with pytest.raises(InputError, match="must be 0 or 1"):
            dataset_of(["1 (0h)"], label_escalation=[word])


@pytest.mark.parametrize("flags", [{"label_column": ""}, {"label_column": " "}, {"max_len": 0}])
def test_an_impossible_flag_is_named(flags: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^--{next(iter(flags))} "):
        MIMICtrajectoryDataset(table_of(["1 (0h)"]), **flags)


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


def test_whole_floats_are_names_without_a_point() -> None:
    """A column of whole numbers with an empty cell becomes floats in pandas and in Parquet."""
    ids = pd.Series([1.0, 2.0, 12345678.0, 2.5])
    dataset = dataset_of(["1 (0h)"] * 4, subject_id=ids, id=ids.convert_dtypes())
    assert dataset.groups.tolist() == dataset.ids.tolist() == ["1", "2", "12345678", "2.5"]
    with pytest.raises(InputError, match="row 1, column subject_id: is empty"):
        dataset_of(["1 (0h)"] * 2, subject_id=[1.0, None])


def test_constructor_keywords_are_the_trainers_flags() -> None:
    not_given: dict[str, Any] = dict.fromkeys(MIMICtrajectoryDataset.options)
    dataset = MIMICtrajectoryDataset(table_of(["1 (0h)", "2 (0h)"]), **not_given)
    assert dataset.read_options == {"max_len": 20, "label_column": LABEL}


# --------------------------------------------------------------------------- rows to be scored


CONFIG: dict[str, Any] = {
    "inputs": {"static": [], "prediction_time": False},
    "features": ["glucose", "Anion Gap"],
    "units": ["mg/dL", "mEq/L"],
    "outcome": "Escalation",
    "question": "And then?",
    "read_options": {"max_len": 2},
}


def scored(path: Path, most: int, **change: Any) -> tuple[list[ScoringRows], Findings]:
    findings = Findings(str(path), strict=False)
    rows = MIMICtrajectoryDataset.scoring_rows(path, {**CONFIG, **change}, findings, most)
    return list(rows), findings


@pytest.fixture
def new_rows(tmp_path: Path) -> Path:
    """Five rows of two series; the second is unreadable, the third lacks both."""
    table = pd.DataFrame(
        {
            "id": list("abcde"),
            SERIES: ["1 (0h) -> 2 (1h) -> 3 (2h)", "x", "", "4 (0h)", "5 (0h)"],
            "trajectory_Glucose [mg/dL]": ["100 (3h)", "200 (0h)", "", "", "300 (0h)"],
        }
    )
    path = tmp_path / "new.csv"
    table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("most", [1, 2, 100])
def test_scoring_reads_the_checkpoints_series_chunk_by_chunk(new_rows: Path, most: int) -> None:
    rows, findings = scored(new_rows, most)
    assert [len(each.ids) for each in rows] == {1: [1] * 5, 2: [2, 2, 1], 100: [5]}[most]
    assert np.concatenate([each.ids for each in rows]).tolist() == list("abcde")
    assert np.concatenate([each.numbers for each in rows]).tolist() == [2, 3, 4, 5, 6]
    readable = [each.ids[each.positions].tolist() for each in rows]
    assert [name for names in readable for name in names] == ["a", "d", "e"]
    assert readable == [each.dataset.ids.tolist() for each in rows]
    assert set(findings.problems) == {3, 4}
    first = rows[0].dataset
    assert first.features == ("glucose", "Anion Gap")
    assert first.lengths[0] == 2
    assert first.prompt(0).endswith("And then?\n")
    assert first.limits(1) == (-5, 60)
    assert rows[-1].read == new_rows.stat().st_size


def test_rows_that_are_left_out_later_are_noted_by_their_number(new_rows: Path) -> None:
    (rows,), findings = scored(new_rows, 100)
    rest = rows.without(np.array([False, True, False]), "too long", findings)
    assert (rest.dataset.ids.tolist(), rest.positions.tolist()) == (["a", "e"], [0, 4])
    assert findings.problems[5] == "too long"
    assert rows.without(np.zeros(3, dtype=bool), "x", findings) is rows
    with pytest.raises(InputError, match="row 5: too long"):
        rows.without(np.array([False, True, False]), "too long", Findings("x"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"features": ["glucose", "lactate"]}, r"reads lactate, .* add a column 'trajectory_lact"),
        ({"units": ["mmol/L", "mEq/L"]}, r"column trajectory_Glucose \[mg/dL\]: .* in mmol/L unit"),
        ({"units": ["mg/dL", ""]}, "reads Anion Gap in no unit, the file has mEq/L"),
        ({"outcome": "Stroke"}, "predicts Stroke, the file's outcome of label_escalation is Esc"),
    ],
)
def test_a_file_of_another_meaning_is_not_scored(
    change: dict[str, Any], expected: str, new_rows: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        scored(new_rows, 100, **change)


def test_a_header_alone_holds_nothing_to_score(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(f"{SERIES},trajectory_Glucose [mg/dL]\n")
    with pytest.raises(InputError, match="no rows below the header"):
        scored(path, 100)


# --------------------------------------------------------------------------- label and patient


@pytest.mark.parametrize("name", ["patient_id", "HADM_ID", "stay_id", "MRN_hash", "record_id"])
def test_rows_of_one_patient_under_another_name_are_not_split(name: str) -> None:
    table = table_of(["1 (0h)"] * 6).assign(**{name: ["7", "", "8", "", "7", "9"]})
    dataset = MIMICtrajectoryDataset(table)
    with pytest.raises(InputError, match=rf"row 4, column {name}: repeats the value .* subject_id"):
        dataset.split(0)
    with pytest.raises(InputError, match=f"row 4, column {name}"):
        MIMICtrajectoryDataset(table.assign(id=list("abcdef"))).split(0)
    MIMICtrajectoryDataset(table.assign(subject_id=list("abcdef"))).split(0)
    assert not MIMICtrajectoryDataset(table.assign(id=list("abcdaf"))).leak


def test_names_that_all_differ_are_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(["1 (0h)"] * 6, patient_id=list("abcdef"))
    dataset.split(0)
    _, text = dataset.warnings
    assert text.startswith("column patient_id is not read: rename it to subject_id")
    assert f"warning: DataFrame: {text}" in caplog.messages
    assert dataset_of(["1 (0h)"] * 6, id=list("abcdef"), hadm_id=list("ghijkl")).warnings == ()


def test_near_misses_among_unread_columns_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(["1 (0h)"], context="x", glucose="90 (0h)", age=54, id="a")
    assert len(dataset.warnings) == 2
    assert (
        sum(message.startswith("warning: DataFrame: not read: ") for message in caplog.messages)
        == 2
    )
    assert dataset_of(["1 (0h)"], clinical_context="x", context="x", id="a").warnings == ()
    table = pd.DataFrame({SERIES: ["1 (0h)"], "label_death": [1], "id": ["a"]})
    (text,) = MIMICtrajectoryDataset(table, require_labels=False).warnings
    assert "did you mean label_escalation? rename it, or give --label_column label_death" in text
    table[LABEL] = 0
    assert MIMICtrajectoryDataset(table, label_column="label_death").warnings == ()


def test_any_column_of_0_and_1_is_the_label() -> None:
    table = table_of(["1 (0h)"] * 3, label_death=[1, 1, 0])
    dataset = MIMICtrajectoryDataset(table, label_column="label_death")
    assert dataset.labels.tolist() == [1, 1, 0]
    assert (dataset.outcome, dataset.question) == ("Death", "Will the outcome Death occur?")
    assert dataset.read_options["label_column"] == "label_death"
    assert MIMICtrajectoryDataset(table).labels.tolist() == [0, 1, 0]
    for required in (True, False):
        with pytest.raises(InputError, match=r"column death: no such column: .* label_death"):
            MIMICtrajectoryDataset(table, label_column="death", require_labels=required)
    with pytest.raises(InputError, match="row 1, column label_death: must be 0 or 1"):
        MIMICtrajectoryDataset(table.assign(label_death=[1, 2, 0]), label_column="label_death")


def test_rows_to_score_are_judged_by_the_checkpoints_label(new_rows: Path) -> None:
    table = pd.read_csv(new_rows).assign(label_death=1, label_escalation=0)
    table.to_csv(new_rows, index=False)
    change = {"outcome": "Death", "read_options": {"max_len": 2, "label_column": "label_death"}}
    (rows,), _ = scored(new_rows, 100, **change)
    assert rows.dataset.labels.tolist() == [1, 1, 1]
    assert rows.dataset.question == "And then?"
    with pytest.raises(InputError, match="predicts Escalation, the file's outcome of label_death"):
        scored(new_rows, 100, read_options=change["read_options"])
    table.drop(columns="label_death").to_csv(new_rows, index=False)
    (rows,), _ = scored(new_rows, 100, **change)
    assert np.isnan(rows.dataset.labels).all()
