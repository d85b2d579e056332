"""MIMIC-IV: several series of a row, and the facts beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.duck import write_rows
from medgemma_clinical.files import InputError
from mimic_files import (
    BICARBONATE,
    CREATININE,
    DEMO,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    Run,
    read_tables,
)
from table_requests import make_rows, table_request


def patient() -> Mini:
    """One admission, asked at 13 h, with serum and whole blood glucose."""
    mini = Mini().admit(1, gender="M").settling(1).lab(1, 0.5, 99, GLUCOSE)
    mini.lab(1, 2, 300, GLUCOSE).lab(1, 3, 280, 50809).lab(1, 14, 1, GLUCOSE)
    return mini.lab(1, 5, 7.25, PH).lab(1, 4, 140, SODIUM)


def test_further_series_are_columns_with_name_and_unit(run: Run) -> None:
    result = run(patient(), series=("anion gap", "Glucose", "pH", "bicarbonate"))
    row = result.rows.loc[1]
    assert row["clinical_trajectory"] == "20 (0h) -> 18 (3h)"
    assert row["trajectory_glucose [mg/dL]"] == "300 (1h) -> 280 (2h)"
    assert row["trajectory_pH"] == "7.25 (4h)"
    assert row.isna()["trajectory_bicarbonate [mEq/L]"]
    assert row["clinical_context"].endswith("admission, sodium 140 (mEq/L)")
    assert result.description["limits"]["glucose"] == (5.0, 2500.0)


def test_the_first_series_gives_the_prediction_time_and_is_counted(run: Run) -> None:
    mini = patient().admit(2).settling(2).lab(2, 2, 90, GLUCOSE)
    result = run(mini, series=("glucose", "anion gap"), outcome=["death"])
    assert result.rows.index.tolist() == [1], "2 has one glucose alone"
    assert result.series(1) == "99 (0h) -> 300 (1.5h) -> 280 (2.5h)"
    assert result.rows.loc[1, "trajectory_anion gap [mEq/L]"] == "20 (0.5h) -> 18 (3.5h)"
    assert result.description["series"] == "Glucose"


def test_of_both_gaps_a_series_holds_the_one_that_the_admission_uses(run: Run) -> None:
    mini = Mini().admit(1).trio(1, 2, 140).trio(1, 5, 138).trio(1, 30, 131)
    mini.lab(1, 1, 15, BICARBONATE).lab(1, 6, 15, BICARBONATE).gaps(1, (3, 25), (40, 9))
    request: Any = {"series": ("bicarbonate", "anion gap"), "outcome": ["death"]}
    texts = {
        choice: run(mini, compute_gap=choice, **request).rows.loc[1]
        for choice in ("reported", "missing", "always")
    }
    assert texts["reported"]["trajectory_anion gap [mEq/L]"] == "25 (2h)"
    assert texts["missing"]["trajectory_anion gap [mEq/L]"] == "25 (2h)"
    computed = texts["always"]["trajectory_anion gap without potassium [mEq/L]"]
    assert computed == "20 (1h) -> 18 (4h)"


def test_all_series_are_read_by_the_data_set(tmp_path: Path) -> None:
    out = tmp_path / "all.csv"
    rows, description = make_rows(
        "from_mimic", mimic_dir=DEMO, out=out, cohort="all", series=("all",)
    )
    write_rows(rows, description, out)
    dataset = MIMICtrajectoryDataset(out)
    assert len(dataset.features) == 10
    assert dataset.features[:2] == ("Anion gap without potassium", "bicarbonate")
    assert dataset.units[dataset.features.index("pH")] == ""
    assert dataset.limits(1) == (3.0, 60.0)
    count = read_tables(DEMO)["hosp/labevents"]["itemid"].nunique()
    assert count == 10, "the demo's ten items"


def test_each_series_has_the_reference_range_that_most_often_stands_beside_it(run: Run) -> None:
    """Ranges in another unit, reversed ones and missing ones do not count; of two ends one may."""
    mini = Mini().admit(1).admit(2).settling(2)
    ranges = [(8, 20), (8, 20), (10, 18), ("", ""), ("", ""), ("", "")]
    for hour, (low, high) in enumerate(ranges):
        mini.lab(1, hour, 20 - hour, ref_range_lower=low, ref_range_upper=high)
    for hour, unit in enumerate(("umol/L", "umol/L", "mg/dL")):
        factor = 88.4 if unit == "umol/L" else 1
        ends: Any = {"ref_range_lower": 0.4 * factor, "ref_range_upper": 1.1 * factor}
        mini.lab(1, hour, factor, CREATININE, unit=unit, **ends)
    mini.lab(1, 1, 12, BICARBONATE, ref_range_lower=22)
    mini.lab(1, 1, 200, GLUCOSE, ref_range_lower=105, ref_range_upper=70).lab(1, 1, 138, SODIUM)
    series = ("anion gap", "creatinine", "glucose", "bicarbonate", "sodium")
    described = run(mini, series=series, outcome=["death"]).description
    assert described["reference"] == (8, 20)
    computed = run(mini, outcome=["death"], compute_gap="missing").description
    assert computed["reference"] is None, "computed gaps lack potassium"
    assert described["references"] == {"creatinine": (0.4, 1.1), "bicarbonate": (22, None)}


def test_facts_are_columns_beside_the_context(run: Run) -> None:
    mini = patient().admit(2, age=91, gender="F").settling(2).admit(3, gender="").settling(3)
    rows = run(mini, window_hours=10.5).rows
    assert rows["static_age [years]"].tolist() == [50, 90, 50]
    assert rows["static_sex_male"].fillna(-1).tolist() == [1, 0, -1]
    assert rows["prediction_hours"].tolist() == [10.5] * 3


def test_the_prediction_time_is_rounded_as_the_hours_of_the_series(run: Run) -> None:
    mini = patient().lab(1, 11.507, 7.3, PH, stored=11.507)
    rows = run(mini, window_hours=10.508, series=("anion gap", "pH")).rows
    assert rows["trajectory_pH"].tolist() == ["7.25 (4h) -> 7.3 (10.51h)"]
    assert rows["prediction_hours"].tolist() == [10.51]


@pytest.mark.parametrize(
    ("series", "problem"),
    [
        (("gap",), "--series gap: no such series: all, or some of anion gap, bicarbonate"),
        (("pH", "ph"), "name each series once"),
        (("all", "pH"), "--series all: no such series"),
    ],
)
def test_an_unknown_series_is_refused(series: tuple[str, ...], problem: str, run: Run) -> None:
    with pytest.raises(InputError, match=problem):
        run(patient(), series=series)


def test_an_item_and_series_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--item 50882: does not go with --series"):
        table_request("from_mimic", mimic_dir=tmp_path, out=tmp_path, series=("pH",), item="50882")
