"""Tests of facts and prediction times in the DKA format: cells, refusals, files to be scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.scoring import Findings, ScoringRows
from medgemma_clinical.files import InputError
from trajectories import LABEL, SERIES, dataset_of, table_of

MARKER = "ZYXWMARKER"
NAN = float("nan")
TWO = ["1 (0h) -> 2 (4h)", "3 (1h)"]


def rows_with(**columns: Any) -> MIMICtrajectoryDataset:
    """Return the two rows with further columns."""
    return MIMICtrajectoryDataset(table_of(TWO, **columns))


# --------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["54", ""], [54, NAN]),
        ([" +1.5e1 ", "-.5"], [15, -0.5]),
        (["True", "false"], [1, 0]),
        ([True, None], [1, NAN]),
        ([3, 4], [3, 4]),
        ([NAN, 2.5], [NAN, 2.5]),
        (["", ""], [NAN, NAN]),
    ],
    ids=str,
)
def test_facts_are_numbers_true_or_false_and_empty_where_unknown(
    cells: list[Any], expected: list[float]
) -> None:
    dataset = rows_with(**{"static_x [kg/m2]": cells})
    assert dataset.static_names == ("static_x [kg/m2]",)
    np.testing.assert_array_equal(dataset.static, np.array(expected)[:, None])


@given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2))
def test_a_fact_is_the_very_number_of_its_cell(values: list[float]) -> None:
    dataset = rows_with(static_x=[repr(value) for value in values])
    assert dataset.static is not None
    assert dataset.static[:, 0].tolist() == values


def test_a_file_without_such_columns_knows_neither_facts_nor_prediction_time() -> None:
    dataset = rows_with()
    assert dataset.static_names == ()
    assert dataset.static.shape == (2, 0)
    assert dataset.prediction_hours is None
    assert dataset.task_description()["Prediction time"].startswith("after the last observation")


@pytest.mark.parametrize("cell", [MARKER, "37,5", "nan", "inf", "1 2", "1e99", "50 years", "yes"])
def test_a_cell_that_is_no_number_is_refused_by_its_place(cell: str, tmp_path: Path) -> None:
    table = pd.DataFrame({SERIES: TWO, LABEL: [0, 1], "static_age [years]": ["", cell]})
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    place = r"data.csv, row 3, column static_age \[years\]: "
    problem = "holds a number that is too large" if cell == "1e99" else "is not a number: write "
    with pytest.raises(InputError, match=place + problem) as error:
        MIMICtrajectoryDataset(path)
    assert cell == "nan" or cell not in str(error.value)


def test_prediction_hours_are_on_the_clock_of_the_series_and_may_be_unknown() -> None:
    dataset = dataset_of([*TWO, "5 (-9h)"], prediction_hours=["4", "", "-8.5"])
    np.testing.assert_array_equal(dataset.prediction_hours, [4, NAN, -8.5])
    assert dataset.task_description()["Prediction time"].startswith(
        "at the hour that is given with each row"
    )


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("3.99", "lies before the last observation of the row"),
        (MARKER, "is not a number: write hours on the clock"),
        ("True", "is not a number: write hours on the clock"),
        ("2e6", "holds a number that is too large"),
    ],
)
def test_an_hour_that_leaks_or_is_none_is_refused_by_its_place(cell: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"row 0, column prediction_hours: {problem}"):
        rows_with(prediction_hours=[cell, "9"])


def test_the_last_observation_is_that_of_any_series_in_any_order_however_few_are_kept() -> None:
    other = {"trajectory_glucose": ["100 (7h) -> 90 (5h)", ""]}
    rows_with(**other, prediction_hours=["7", "1"])
    with pytest.raises(InputError, match="row 0, column prediction_hours: lies before the last"):
        MIMICtrajectoryDataset(table_of(TWO, **other, prediction_hours=["6.5", "1"]), 1)


def test_rows_that_are_left_out_take_their_facts_and_hours_with_them() -> None:
    table = pd.DataFrame(
        {
            SERIES: ["1 (0h)", "", "3 (1h)"],
            "trajectory_glucose": ["", "100 (7h)", ""],
            LABEL: [0, 1, 1],
            "prediction_hours": [1, 8, 2],
            "static_x": [10, 20, 30],
            "static_y": [0.1, 0.2, 0.3],
        }
    )
    dataset = MIMICtrajectoryDataset(table, series=["Anion gap"])
    assert dataset.static is not None
    assert dataset.static.tolist() == [[10, 0.1], [30, 0.3]]
    np.testing.assert_array_equal(dataset.prediction_hours, [1, 2])


# --------------------------------------------------------------------------- columns


@pytest.mark.parametrize("name", ["static_age", "prediction_hours"])
def test_a_column_that_is_there_twice_is_refused(name: str) -> None:
    table = pd.DataFrame([["1 (0h)", 0, 1, 2]], columns=[SERIES, LABEL, name, name])
    with pytest.raises(InputError, match=f"column {name}: appears twice"):
        MIMICtrajectoryDataset(table)


@pytest.mark.parametrize("name", ["static_a\x1bb", "static_" + "a" * 200])
def test_a_name_that_no_text_may_hold_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="row 1, column static_a"):
        rows_with(**{name: ["1", "2"]})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Static_age", "static features begin with static_: rename it"),
        ("static age", "static features begin with static_: rename it"),
        ("predictionhours", "did you mean prediction_hours? rename it"),
        ("Prediction_Hours", "did you mean prediction_hours? rename it"),
    ],
)
def test_a_near_miss_is_asked_about(name: str, advice: str) -> None:
    dataset = rows_with(**{name: [9, 9]})
    assert f"not read: column {name}: {advice}" in dataset.warnings
    assert (dataset.static_names, dataset.prediction_hours) == ((), None)


def test_a_fact_of_the_patient_names_no_patient() -> None:
    dataset = MIMICtrajectoryDataset(
        table_of(["1 (0h)"] * 3, **{"static_patient_weight [kg]": [70, 80, 70]})
    )
    assert dataset.leak == ""
    assert not any("patient_weight" in warning for warning in dataset.warnings)


# --------------------------------------------------------------------------- files to be scored

CONFIG: dict[str, Any] = {
    "features": ["Anion gap"],
    "units": ["mEq/L"],
    "inputs": {
        "static": ["static_age [years]", "static_x"],
        "prediction_time": True,
    },
    "outcome": "Escalation",
    "question": "?",
    "read_options": {"max_len": 20},
}
NEW: dict[str, Any] = {
    "id": ["a", "b", "c", "d"],
    SERIES: ["1 (0h) -> 2 (4h)", "3 (1h)", "4 (0h)", "5 (0h)"],
    "prediction_hours": ["5", "0.5", "2", ""],
    "static_x": ["1", "2", MARKER, ""],
    "static_other": [MARKER] * 4,
    "static_age [years]": ["50", "60", "70", "80"],
    "clinical_context": ["70 kg"] * 4,
}


def scored(path: Path, table: dict[str, Any], **inputs: Any) -> tuple[ScoringRows, Findings]:
    pd.DataFrame(table).to_csv(path, index=False)
    findings = Findings(str(path), strict=False)
    config = {**CONFIG, "inputs": {**CONFIG["inputs"], **inputs}}
    (rows,) = MIMICtrajectoryDataset.scoring_rows(path, config, findings, 9)
    return rows, findings


def test_a_row_with_a_wrong_fact_or_hour_has_a_problem_and_the_others_are_scored(
    tmp_path: Path,
) -> None:
    rows, findings = scored(tmp_path / "new.csv", NEW)
    assert rows.ids[rows.positions].tolist() == rows.dataset.ids.tolist() == ["a", "d"]
    assert set(findings.problems) == {3, 4}
    early, wrong = findings.problems[3], findings.problems[4]
    assert early.startswith("column prediction_hours: lies before the last observation")
    assert wrong.startswith("column static_x: is not a number")
    read = rows.dataset.with_inputs(CONFIG["inputs"]["static"], prediction_time=True)
    np.testing.assert_array_equal(read.static_values(), [[50, 1], [80, NAN]])
    np.testing.assert_array_equal(read.prediction_hours, [5, NAN])


def test_what_a_model_does_not_read_keeps_no_row_from_being_scored(tmp_path: Path) -> None:
    rows, findings = scored(tmp_path / "new.csv", NEW, static=[], prediction_time=False)
    assert rows.dataset.ids.tolist() == list("abcd")
    assert findings.problems == {}


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        (["static_x"], "reads static_x, which the file lacks: add such columns"),
        (["static_x", "static_age [years]"], r"reads static_age \[years\], static_x, which"),
        (["prediction_hours"], "reads prediction_hours, which the file lacks"),
    ],
)
def test_a_file_that_lacks_an_input_is_told_by_name(
    lacking: list[str], expected: str, tmp_path: Path
) -> None:
    table = {name: column for name, column in NEW.items() if name not in lacking}
    with pytest.raises(InputError, match=f"{expected}.*empty cells where it is unknown$"):
        scored(tmp_path / "new.csv", table)
    scored(tmp_path / "new.csv", table, static=[], prediction_time=False)


@pytest.mark.parametrize(("unit", "shown"), [(" [months]", "months"), ("", "none")])
def test_a_fact_in_another_unit_is_told_as_such(unit: str, shown: str, tmp_path: Path) -> None:
    table = dict(NEW)
    table[f"static_age{unit}"] = table.pop("static_age [years]")
    expected = f"reads static_age in years, the file has {shown}: convert the values"
    with pytest.raises(InputError, match=expected):
        scored(tmp_path / "new.csv", table)


def test_a_label_is_no_fact() -> None:
    table = table_of(TWO, static_died=[0, 1])
    problem = "row 1, column static_died: begins with static_, so it is a static feature"
    with pytest.raises(InputError, match=problem):
        MIMICtrajectoryDataset(table, label_column="static_died")


def test_the_page_says_the_hour_that_a_model_leaves_unread() -> None:
    dataset = rows_with(prediction_hours=["50", "60"]).with_inputs([], prediction_time=False)
    assert dataset.task_description()["Prediction time"].startswith(
        "at the hour that is given with each row"
    )
    assert dataset.prediction_times().tolist() != [50.0, 60.0]
    assert len(dataset.summary_names()) == 8


def test_the_names_of_facts_are_part_of_the_hash_of_the_data() -> None:
    one, other = rows_with(static_a=[1, 2]), rows_with(static_b=[1, 2])
    assert one.fingerprint() != other.fingerprint()
