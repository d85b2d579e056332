"""The command from_long: columns, times, units, equal times, storing times, forms of files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import dataset_format
from event_files import GAP, GLUCOSE, MEDS_DEMO, Mini, long, long_request, write_table
from medgemma_clinical.data.sources.long_table import make_long
from medgemma_clinical.files import InputError
from table_requests import make_rows, table_request

DEMO = MEDS_DEMO.with_name("mimic_iv_demo")
GAP_TITLE = f"gap={GAP}"


def simple() -> Mini:
    mini = Mini().ask(1, 30, 1).ask(2, 30, 0).measure(1, 12, 15).measure(2, 12, 14)
    return mini.measure(1, 13, 100, GLUCOSE)


def test_without_series_all_items_are_read_the_most_measured_first(tmp_path: Path) -> None:
    mini = simple().measure(2, 13, 110, GLUCOSE).measure(1, 14, 120, GLUCOSE)
    for hour in range(40, 60):  # later than the prediction times
        mini.measure(1, hour, 16)
    rows = long(mini, tmp_path)
    assert rows["clinical_trajectory"][0] == "100 (7h) -> 120 (8h)"
    assert rows[f"trajectory_{GAP} [mEq/L]"].tolist() == ["15 (6h)", "14 (6h)"]


def test_more_than_a_hundred_items_are_refused(tmp_path: Path) -> None:
    mini = simple()
    for item in range(100):
        mini.measure(1, 12, 1, f"item {item}")
    with pytest.raises(InputError, match=r"102 items have values .* choose by --series"):
        long(mini, tmp_path)


def test_an_item_that_is_a_number_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"item 50868 .*NAME"):
        long(Mini().ask(1, 30).measure(1, 12, 1, "50868"), tmp_path)


def test_what_is_stored_after_the_prediction_time_is_not_known(tmp_path: Path) -> None:
    mini = Mini().ask(1, 30).measure(1, 12, 15, stored=30).measure(1, 13, 16, stored=30.01)
    table = mini.measure(1, 14, 17).measure(1, 31, 18, stored=29).long()
    table.loc[2, "storetime"] = pd.NaT
    labels = mini.label_table("label", "Int64")
    assert long(table, tmp_path, labels)["clinical_trajectory"][0] == "15 (6h)"
    rows = long(table.drop(columns="storetime"), tmp_path, labels)
    assert rows["clinical_trajectory"][0] == "15 (6h) -> 16 (7h) -> 17 (8h)"


def test_without_storing_times_the_output_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mini = simple()
    request = long_request(mini.long(stored=False), tmp_path, mini.label_table("label", "Int64"))
    with caplog.at_level(logging.WARNING):
        _, description = make_long(request)
    assert "no storetime: values count as known when measured" in caplog.text
    assert "stored" not in description["prediction_time"]
    assert make_long(long_request(mini, tmp_path))[1]["prediction_time"] == (
        "given with each label; of the 24 hours up to then, both ends included, values that were "
        "stored by then are read"
    )


@pytest.mark.parametrize(
    ("equal_times", "expected"),
    [("keep", "9 (6h) -> 1 (6h) -> 4 (6h)"), ("last", "4 (6h)"), ("mean", "4.666666667 (6h)")],
)
def test_several_values_at_one_time(equal_times: str, expected: str, tmp_path: Path) -> None:
    mini = Mini().ask(1, 30).measure(1, 12, 1, stored=14).measure(1, 12, 4, stored=15)
    mini.measure(1, 12, 9, stored=13).measure(1, 12, 99, stored=31)
    assert long(mini, tmp_path, equal_times=equal_times)["clinical_trajectory"][0] == expected


def test_the_one_stored_last_needs_storing_times(tmp_path: Path) -> None:
    mini = simple()
    labels = mini.label_table("label", "Int64")
    with pytest.raises(InputError, match="--equal_times last: needs a column storetime"):
        long(mini.long(stored=False), tmp_path, labels, equal_times="last")


# --------------------------------------------------------------------------- units


def mixed() -> Mini:
    mini = simple().measure(1, 14, 5.1, GLUCOSE, unit="mmol/L").measure(1, 15, 120, GLUCOSE)
    return mini


def test_mixed_units_are_refused_by_name(tmp_path: Path) -> None:
    expected = f"{GLUCOSE} has values in mg/dL and in mmol/L: give --factor '{GLUCOSE}:mmol/L="
    with pytest.raises(InputError, match=expected):
        long(mixed(), tmp_path)


def test_a_factor_converts_the_values_of_a_unit(tmp_path: Path) -> None:
    rows = long(mixed(), tmp_path, factor=(f"{GLUCOSE}:mmol/L=18.016",), series=(GAP, GLUCOSE))
    trajectory = rows[f"trajectory_{GLUCOSE} [mg/dL]"][0]
    assert trajectory == "100 (7h) -> 91.8816 (8h) -> 120 (9h)"


def test_no_unit_beside_a_unit_is_mixed(tmp_path: Path) -> None:
    mini = simple().measure(1, 14, 90, GLUCOSE, unit="")
    for hour in (15, 16):
        mini.measure(1, hour, 90, GLUCOSE, unit="")
    with pytest.raises(InputError, match="in mg/dL and in no unit"):
        long(mini, tmp_path)
    rows = long(mini, tmp_path, factor=(f"{GLUCOSE}:=1",), series=(f"glucose={GLUCOSE}",))
    assert rows["clinical_trajectory"][0].startswith("100 (7h) -> 90 (8h)")


def test_a_series_must_have_the_unit_of_the_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="glucose has values in mmol/L and in mg/dL"):
        long(simple(), tmp_path, series=(GAP, f"glucose [mmol/L]={GLUCOSE}"))


def test_a_series_of_converted_values_alone_needs_its_unit(tmp_path: Path) -> None:
    factor = (f"{GLUCOSE}:mg/dL=0.0555",)
    for series in ((), (GAP, GLUCOSE)):
        with pytest.raises(
            InputError, match=r"are converted: give its unit by --series '.* \[unit"
        ):
            long(simple(), tmp_path, factor=factor, series=series)
    rows = long(simple(), tmp_path, factor=factor, series=(GAP, f"glucose [mmol/L]={GLUCOSE}"))
    assert rows["trajectory_glucose [mmol/L]"][0] == "5.55 (7h)"


def test_items_of_other_case_are_one_series(tmp_path: Path) -> None:
    mini = (
        Mini().ask(1, 30).measure(1, 12, 4, "Sodium", unit="").measure(1, 13, 5, "sodium", unit="")
    )
    rows = long(mini.measure(1, 14, 6, "SODIUM", unit=""), tmp_path)
    assert rows["clinical_trajectory"][0] == "4 (6h) -> 5 (7h) -> 6 (8h)"


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((f"{GLUCOSE}:mg/dL=2", f"{GLUCOSE}: mg/dL=3"), "appears twice"),
        ((f"{GLUCOSE}:mmol/L=18", f"{GLUCOSE}:mg/dL=2"), "is to have this unit: leave"),
    ],
)
def test_factors_that_contradict_are_refused(
    factors: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        long(mixed(), tmp_path, factor=factors, series=(GAP, f"glucose [mg/dL]={GLUCOSE}"))


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (f"{GLUCOSE}:mg/dL=0", "a number above 0"),
        (f"{GLUCOSE}:mg/dL=-1", "a number above 0"),
        (f"{GLUCOSE}:mg/dL=inf", "a number above 0"),
        (f"{GLUCOSE}:mmol=18", "no value in a window has this item and this unit: there is mg/dL"),
        ("glucose=18", "write 'ITEM:UNIT=NUMBER'"),
        ("glucose:mmol/L=x", "write 'ITEM:UNIT=NUMBER'"),
    ],
)
def test_a_factor_without_use_is_refused(factor: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        long(simple(), tmp_path, factor=(factor,))


# --------------------------------------------------------------------------- columns


def test_columns_have_the_names_that_are_given(tmp_path: Path) -> None:
    names = {"subject_id": "patient no", "charttime": "drawn", "item": 'the "test"'}
    table = simple().long().rename(columns=names)
    labels = simple().label_table("died", "Int64")
    columns = ("subject_id=patient no", "time=drawn", 'item=the "test"', "label=died")
    rows = long(table, tmp_path, labels, columns=columns)
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]


@pytest.mark.parametrize(
    ("renamed", "flags", "expected"),
    [
        ({"subject_id": "patient_id"}, {}, "--columns subject_id=patient_id"),
        ({"charttime": "chart_time"}, {}, "no column time or charttime: did you mean --columns"),
        ({"value": "valeu"}, {}, "no column valuenum or value: did you mean --columns value=valeu"),
        ({"item": "analyte"}, {}, "the columns are subject_id, charttime, analyte"),
        ({}, {"columns": ("value=valu",)}, "no column valu: did you mean --columns value=value"),
        ({}, {"columns": ("unit=units",)}, "no column units: did you mean --columns unit=unit"),
        ({}, {"columns": ("values=value",)}, "--columns values=value: write ROLE=COLUMN"),
        ({}, {"columns": ("time=",)}, "--columns time=: write ROLE=COLUMN"),
        ({"unit": "units"}, {}, "--columns unit=units? --columns unit= says that there is none"),
        ({"storetime": "store_time"}, {}, "did you mean --columns storetime=store_time?"),
        ({"storetime": "StoreTime"}, {}, "did you mean --columns storetime=StoreTime?"),
        ({"subject_id": "hadm_id"}, {}, "did you mean --columns subject_id=hadm_id?"),
        ({"value": "valued", "item": "values"}, {"columns": ("item=values",)}, "value=valued?"),
        ({}, {"columns": ("time=charttime", "time=storetime")}, "time appears twice"),
        ({}, {"columns": ("time=storetime",)}, "the column storetime is both time and storetime"),
    ],
)
def test_a_column_that_is_missing_is_named_with_the_nearest(
    renamed: dict[str, str], flags: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    labels = simple().label_table("label", "Int64")
    with pytest.raises(InputError, match=re.escape(expected)):
        long(simple().long().rename(columns=renamed), tmp_path, labels, **flags)


def test_a_near_column_may_be_said_not_to_be_it(tmp_path: Path) -> None:
    table = simple().long(stored=False).rename(columns={"unit": "units"})
    rows = long(table, tmp_path, simple().label_table("label", "Int64"), columns=("unit=",))
    assert f"trajectory_{GLUCOSE}" in rows


def test_a_text_beside_the_number_is_not_taken_for_the_unit(tmp_path: Path) -> None:
    table = simple().long(unit=False).rename(columns={"value": "valuenum"}).assign(value="text")
    assert len(long(table, tmp_path, simple().label_table("label", "Int64"))) == 2


def test_labels_may_name_their_subject_apart(tmp_path: Path) -> None:
    table = simple().long().rename(columns={"subject_id": "patient"})
    labels = simple().label_table("label", "Int64").rename(columns={"subject_id": "person"})
    with pytest.raises(InputError, match=r"did you mean --columns labels.subject_id=person\?"):
        long(table, tmp_path, labels, columns=("subject_id=patient",))
    columns = ("subject_id=patient", "labels.subject_id=person")
    assert len(long(table, tmp_path, labels, columns=columns)) == 2


def test_ids_that_pandas_made_numbers_are_the_same_subject(tmp_path: Path) -> None:
    table = simple().long().astype({"subject_id": float})
    rows = long(table, tmp_path, simple().label_table("label", "Int64"))
    assert rows["subject_id"].tolist() == ["1", "2"]


def test_a_number_counts_before_a_text_beside_it(tmp_path: Path) -> None:
    table = simple().long()
    table = table.rename(columns={"value": "valuenum"}).assign(value="see comment")
    rows = long(table, tmp_path, simple().label_table("label", "Int64"))
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]


# --------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("value", "<0.1", "column value: 1 cell is not a number: of 'below a limit' write half"),
        ("charttime", "31.01.2150", "column charttime: 1 cell is empty or not a time such as"),
        (
            "charttime",
            "2150-01-01 12:00:00+02:00",
            "column charttime: 1 cell is empty or not a time such as",
        ),
        (
            "charttime",
            "2150-01-01T12:00:00Z",
            "column charttime: 1 cell is empty or not a time such as",
        ),
        ("charttime", "720", "write the local time of one zone, or give --time_unit for numbers"),
        ("charttime", "", "column charttime: 1 cell is empty or not a time"),
        ("subject_id", "", "column subject_id: 1 cell is empty"),
    ],
)
def test_a_wrong_cell_is_named_by_its_place_and_not_shown(
    column: str, cell: str, expected: str, tmp_path: Path
) -> None:
    table = simple().long().astype(str)
    table.loc[1, column] = cell
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        long(table, tmp_path, simple().label_table("label", "Int64"))
    assert not cell or cell not in str(caught.value)


def test_an_empty_value_is_left_out_and_counted(tmp_path: Path) -> None:
    _, description = make_long(long_request(simple().measure(1, 14, None), tmp_path))
    assert description["values"] == {"without a number": 1, "never stored": 0, "converted": 0}


def test_a_wrong_label_is_named(tmp_path: Path) -> None:
    labels = simple().label_table("label", "Int64").assign(label=[1, 2])
    with pytest.raises(InputError, match=r"labels.csv, column label: 1 cell is neither 0 nor 1"):
        long(simple().long(), tmp_path, labels)


@pytest.mark.parametrize(("unit", "hours"), [("minutes", 1 / 60), ("hours", 1), ("days", 24)])
def test_times_may_be_numbers(unit: str, hours: float, tmp_path: Path) -> None:
    mini = Mini().ask(1, 30.5).measure(1, 6.5, 15).measure(1, 30.5, 16).measure(1, 30.6, 17)
    table, labels = mini.long(), mini.label_table("label", "Int64")
    for frame, column in ((table, "charttime"), (table, "storetime"), (labels, "prediction_time")):
        passed = frame[column] - pd.Timestamp("2150-01-01")
        frame[column] = passed / pd.Timedelta(hours, "h")
    rows = long(table, tmp_path, labels, time_unit=unit)
    assert rows["clinical_trajectory"][0] == "15 (0h) -> 16 (24h)"
    assert float(rows["prediction_time"][0]) == pytest.approx(30.5 / hours)
    assert rows["id"][0] == f"1 {rows['prediction_time'][0]}"


def test_a_time_that_is_no_finite_number_is_refused(tmp_path: Path) -> None:
    table, labels = simple().long(stored=False), simple().label_table("label", "Int64")
    table["charttime"], labels["prediction_time"] = ["1", "nan", "3"], 4
    with pytest.raises(
        InputError, match="column charttime: 1 cell is empty or not a finite number"
    ):
        long(table, tmp_path, labels, time_unit="hours")


# --------------------------------------------------------------------------- files


def test_csv_gzip_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    table, labels = mixed().long(), mixed().label_table("label", "Int64")
    table["value"] = (table["value"] / 3).astype("float32")
    made = []
    for form in ("csv", "csv.gz", "parquet"):
        request = table_request(
            "from_long",
            table=write_table(table, tmp_path / f"table.{form}"),
            labels=write_table(labels, tmp_path / f"labels.{form}"),
            out=tmp_path / "out.csv",
            factor=(f"{GLUCOSE}:mmol/L=18.016",),
        )
        made.append(make_long(request)[0].to_csv())
    assert made[0] == made[1] == made[2]
    assert "5 (6h)" in made[0]


def test_a_damaged_table_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(simple().long(), tmp_path / "table.csv.gz")
    table.write_bytes(table.read_bytes()[:-3])
    labels = write_table(simple().label_table("label", "Int64"), tmp_path / "labels.csv")
    words = ["--table", str(table), "--labels", str(labels), "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main(["from_long", *words]) == 2
    assert "not a whole gzip file" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        *("table.csv.gz", "labels.csv", ".out.csv.lock")
    }


def test_the_demo_gives_the_trajectories_of_from_mimic(tmp_path: Path) -> None:
    expected, _ = make_rows(
        "from_mimic",
        mimic_dir=DEMO,
        out=tmp_path / "mimic.csv",
        cohort="all",
        outcome=("death",),
        compute_gap="reported",
        window_hours=12,
    )
    labels = pd.read_parquet(MEDS_DEMO / "labels" / "hospital_mortality")
    labels = labels.rename(columns={"boolean_value": "label"})
    request = table_request(
        "from_long",
        table=DEMO / "hosp" / "labevents.csv.gz",
        labels=write_table(labels, tmp_path / "labels.csv"),
        out=tmp_path / "out.csv",
        series=("anion gap=50868",),
        window_hours=12,
        hours_from="first",
    )
    rows, description = make_long(request)
    assert description["unit"] == "mEq/L"
    assert sorted(rows["subject_id"] + rows["clinical_trajectory"]) == sorted(
        expected["subject_id"].astype(str) + expected["clinical_trajectory"]
    )
