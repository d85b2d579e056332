"""The command from_long: columns, times, units, equal times, storing times, forms of files."""

import re

import pandas as pd
import pytest

from event_files import EPOCH, GAP, GLUCOSE, Mini, long, long_file
from medgemma_clinical.files import InputError

GLUCOSE_COLUMN = f"trajectory_{GLUCOSE} [mg/dL]"


def simple():
    mini = Mini().ask(1, 30, 1).ask(2, 30, 0).measure(1, 12, 15).measure(2, 12, 14)
    return mini.measure(1, 13, 100, GLUCOSE)


def mixed():
    return simple().measure(1, 14, 5.1, GLUCOSE, unit="mmol/L").measure(1, 15, 120, GLUCOSE)


def no_unit():
    return simple().measure(1, 14, 90, GLUCOSE, unit="")


LABELS = simple().label_table()


def test_without_series_all_items_are_read_the_most_measured_first(tmp_path):
    mini = simple().measure(2, 13, 110, GLUCOSE).measure(1, 14, 120, GLUCOSE)
    for hour in range(40, 60):  # later than the prediction times
        mini.measure(1, hour, 16)
    rows = long(mini, tmp_path)
    assert rows["clinical_trajectory"][0] == "100 (7h) -> 120 (8h)"
    assert rows[f"trajectory_{GAP} [mEq/L]"].tolist() == ["15 (6h)", "14 (6h)"]


def test_items_that_differ_in_case_are_one_series_and_not_every_item_can_be_one(tmp_path):
    mini = Mini().ask(1, 30)
    for hour, item in enumerate(("Sodium", "sodium", "SODIUM"), 12):
        mini.measure(1, hour, hour, item, unit="")
    assert long(mini, tmp_path)["clinical_trajectory"][0] == "12 (6h) -> 13 (7h) -> 14 (8h)"
    for item in ("50868", "glucose [mass]", "a, b"):
        with pytest.raises(InputError, match=re.escape(f"table.csv, item {item}: ")):
            long(Mini().ask(1, 30).measure(1, 12, 1, item, unit=""), tmp_path)
    mini = simple()
    for item in range(98):
        mini.measure(1, 12, 1, f"item {item}")
    assert len(long(mini, tmp_path).filter(like="trajectory").columns) == 100
    with pytest.raises(InputError, match="101 items"):
        long(mini.measure(1, 12, 1, "another"), tmp_path)


def test_what_is_stored_after_the_prediction_time_is_not_known(tmp_path, caplog):
    mini = Mini().ask(1, 30).measure(1, 12, 15, stored=30).measure(1, 13, 16, stored=30.01)
    table = mini.measure(1, 14, 17).measure(1, 31, 18, stored=29).measure(1, 9, None).long()
    table.loc[2, "storetime"] = pd.NaT
    rows, description = long_file(table, tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h)"
    assert description["values"] == {"without a number": 1, "never stored": 1, "converted": 0}
    rows = long(table.drop(columns="storetime"), tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h) -> 16 (7h) -> 17 (8h)"
    assert "no storetime" in caplog.text


def test_a_factor_converts_the_values_of_a_unit(tmp_path):
    flags = {"factor": (f"{GLUCOSE}:mmol/L=18.016",), "series": (GAP, GLUCOSE)}
    rows, description = long_file(mixed(), tmp_path, **flags)
    assert rows[GLUCOSE_COLUMN][0] == "100 (7h) -> 91.8816 (8h) -> 120 (9h)"
    assert description["values"]["converted"] == 1
    flags = {"factor": (f"{GLUCOSE}:=1",), "series": (f"glucose={GLUCOSE}",)}
    assert long(no_unit(), tmp_path, **flags)["clinical_trajectory"][0] == "100 (7h) -> 90 (8h)"
    flags = {"factor": (f"{GLUCOSE}:mg/dL=0.0555",), "series": (GAP, f"x [mmol/L]={GLUCOSE}")}
    assert long(simple(), tmp_path, **flags)["trajectory_x [mmol/L]"][0] == "5.55 (7h)"


@pytest.mark.parametrize(
    ("mini", "factor", "series", "named"),
    [
        (mixed(), "", "", f"in mg/dL and in mmol/L: .* '{GLUCOSE}:mmol/L="),
        (no_unit(), "", "", "in mg/dL and in no unit"),
        (simple(), "", f"glucose [mmol/L]={GLUCOSE}", "in mmol/L and in mg/dL"),
        *((simple(), f"{GLUCOSE}:mg/dL={factor}", "", "--factor") for factor in ("0", "inf")),
        *((simple(), wrong, "", f"--factor {wrong}") for wrong in ("glucose=18", "gap:mg=x")),
        (simple(), f"{GLUCOSE}:mmol=18", "", f"--factor '{GLUCOSE}:mmol='.* mg/dL"),
        (simple(), f"{GLUCOSE}:mg/dL=2", f"x [mg/dL]={GLUCOSE}", f"--factor '{GLUCOSE}:mg/dL='"),
        # A series of converted values alone needs a unit of its own.
        *((simple(), f"{GLUCOSE}:mg/dL=2", s, r"--series '.* \[unit") for s in ("", GLUCOSE)),
    ],
)
def test_units_that_contradict_are_refused_by_name(mini, factor, series, named, tmp_path):
    flags = {"factor": (factor,) if factor else (), "series": (series,) if series else ()}
    with pytest.raises(InputError, match=named):
        long(mini, tmp_path, **flags)


def test_the_last_of_equal_times_needs_the_storing_times(tmp_path):
    table = simple().long().drop(columns="storetime")
    with pytest.raises(InputError, match="--equal_times last"):
        long(table, tmp_path, LABELS, equal_times="last")


def test_columns_have_the_names_that_are_given(tmp_path):
    names = {"subject_id": "patient no", "charttime": "drawn", "item": 'the "test"'}
    names |= {"unit": "units", "value": "valuenum"}
    table = simple().long().rename(columns=names).assign(value="a text beside it")
    labels = simple().label_table("died").rename(columns={"subject_id": "subject"})
    columns = ("subject_id=patient no", "time=drawn", 'item=the "test"', "unit=", "label=died")
    with pytest.raises(InputError, match=r"--columns labels.subject_id=subject\?"):
        long(table, tmp_path, labels, columns=columns)
    rows = long(table, tmp_path, labels, columns=(*columns, "labels.subject_id=subject"))
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]
    assert f"trajectory_{GLUCOSE}" in rows, "without a unit"


@pytest.mark.parametrize(
    ("renamed", "columns", "named"),
    [
        ({"subject_id": "Subject"}, (), "--columns subject_id=Subject"),
        ({"value": "valeu"}, (), "--columns value=valeu"),
        ({"item": "analyte"}, (), "subject_id, charttime, analyte"),
        ({"unit": "Units"}, (), "--columns unit=Units"),
        ({"storetime": "StoreTime"}, (), "--columns storetime=StoreTime"),
        ({}, ("value=valu",), "valu"),
        ({}, ("time=",), "--columns time="),
    ],
)
def test_a_column_that_is_missing_is_named_with_the_nearest(renamed, columns, named, tmp_path):
    with pytest.raises(InputError, match=re.escape(named)):
        long(simple().long().rename(columns=renamed), tmp_path, LABELS, columns=columns)


def test_one_subject_has_many_spellings(tmp_path):
    table = simple().long().astype({"subject_id": str}).replace({"subject_id": {"1": "01.0"}})
    assert long(table, tmp_path, LABELS)["subject_id"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("value", "<0.1"),
        ("storetime", "720"),
        ("label", "2"),
        ("charttime", "31.01.2150"),
        *((column, "") for column in ("charttime", "subject_id", "item")),
    ],
)
def test_a_wrong_cell_is_named_by_its_column_and_not_shown(column, cell, tmp_path):
    tables = {"table.csv": simple().long().astype(str), "labels.csv": LABELS.astype(str)}
    name = "labels.csv" if column == "label" else "table.csv"
    tables[name].loc[1, column] = cell
    with pytest.raises(InputError) as caught:
        long(tables["table.csv"], tmp_path, tables["labels.csv"])
    assert f"{name}, column {column}: 1 cell" in str(caught.value)
    assert len(cell) < 2 or cell not in str(caught.value)


@pytest.mark.parametrize(("unit", "hours"), [("minutes", 1 / 60), ("hours", 1), ("days", 24)])
def test_times_may_be_numbers(unit, hours, tmp_path):
    mini = Mini().ask(1, 30.5).measure(1, 6.5, 15).measure(1, 30.5, 16).measure(1, 30.6, 17)
    table, labels = mini.long(), mini.label_table()
    for frame, column in ((table, "charttime"), (table, "storetime"), (labels, "prediction_time")):
        frame[column] = (frame[column] - EPOCH) / pd.Timedelta(hours, "h")
    rows = long(table, tmp_path, labels, time_unit=unit)
    assert rows["clinical_trajectory"][0] == "15 (0h) -> 16 (24h)"
    assert float(rows["prediction_time"][0]) == pytest.approx(30.5 / hours)
    assert rows["id"][0] == f"1 {rows['prediction_time'][0]}"
    table["charttime"] = ["1", "nan", "3"]
    with pytest.raises(InputError, match=r"table.csv, column charttime: 1 cell"):
        long(table, tmp_path, labels, time_unit=unit)
