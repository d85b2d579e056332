"""The command from_long: columns, times, units, equal times, storing times, forms of files."""

import logging
import re

import pandas as pd
import pytest

import dataset_format
from event_files import EPOCH, GAP, GLUCOSE, Mini, long, long_file, write_table
from medgemma_clinical.files import InputError
from table_requests import make_rows


def simple():
    mini = Mini().ask(1, 30, 1).ask(2, 30, 0).measure(1, 12, 15).measure(2, 12, 14)
    return mini.measure(1, 13, 100, GLUCOSE)


def mixed():
    return simple().measure(1, 14, 5.1, GLUCOSE, unit="mmol/L").measure(1, 15, 120, GLUCOSE)


LABELS = simple().label_table()


def test_without_series_all_items_are_read_the_most_measured_first(tmp_path):
    mini = simple().measure(2, 13, 110, GLUCOSE).measure(1, 14, 120, GLUCOSE)
    for hour in range(40, 60):  # later than the prediction times
        mini.measure(1, hour, 16)
    rows = long(mini, tmp_path)
    assert rows["clinical_trajectory"][0] == "100 (7h) -> 120 (8h)"
    assert rows[f"trajectory_{GAP} [mEq/L]"].tolist() == ["15 (6h)", "14 (6h)"]


def test_items_that_differ_in_case_are_one_series(tmp_path):
    mini = Mini().ask(1, 30)
    for hour, item in enumerate(("Sodium", "sodium", "SODIUM"), 12):
        mini.measure(1, hour, hour, item, unit="")
    assert long(mini, tmp_path)["clinical_trajectory"][0] == "12 (6h) -> 13 (7h) -> 14 (8h)"


def test_items_that_cannot_be_series_are_refused(tmp_path):
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
    table = mini.measure(1, 14, 17).measure(1, 31, 18, stored=29).long()
    table.loc[2, "storetime"] = pd.NaT
    rows, description = long_file(table, tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h)"
    assert "stored by then" in description["prediction_time"]
    assert description["values"] == {"without a number": 0, "never stored": 1, "converted": 0}
    with caplog.at_level(logging.WARNING):
        table = table.drop(columns="storetime")
        rows, description = long_file(table, tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h) -> 16 (7h) -> 17 (8h)"
    assert "stored" not in description["prediction_time"]
    assert "no storetime" in caplog.text


@pytest.mark.parametrize(
    ("equal_times", "expected"),
    [("keep", "9 (6h) -> 1 (6h) -> 4 (6h)"), ("last", "4 (6h)"), ("mean", "4.666666667 (6h)")],
)
def test_several_values_at_one_time(equal_times, expected, tmp_path):
    mini = Mini().ask(1, 30).measure(1, 12, 1, stored=14).measure(1, 12, 4, stored=15)
    mini.measure(1, 12, 9, stored=13).measure(1, 12, 99, stored=31)
    assert long(mini, tmp_path, equal_times=equal_times)["clinical_trajectory"][0] == expected
    if equal_times == "last":
        table = mini.long(storetime=False)
        with pytest.raises(InputError, match="--equal_times last"):
            long(table, tmp_path, mini.label_table(), equal_times="last")


# --------------------------------------------------------------------------- units


def test_a_factor_converts_the_values_of_a_unit(tmp_path):
    flags = {"factor": (f"{GLUCOSE}:mmol/L=18.016",), "series": (GAP, GLUCOSE)}
    rows, description = long_file(mixed(), tmp_path, **flags)
    trajectory = rows[f"trajectory_{GLUCOSE} [mg/dL]"][0]
    assert trajectory == "100 (7h) -> 91.8816 (8h) -> 120 (9h)"
    assert description["values"]["converted"] == 1
    no_unit = simple().measure(1, 14, 90, GLUCOSE, unit="")
    flags = {"factor": (f"{GLUCOSE}:=1",), "series": (f"glucose={GLUCOSE}",)}
    assert long(no_unit, tmp_path, **flags)["clinical_trajectory"][0] == "100 (7h) -> 90 (8h)"


def test_a_series_of_converted_values_alone_needs_its_unit(tmp_path):
    factor = (f"{GLUCOSE}:mg/dL=0.0555",)
    for series in ((), (GAP, GLUCOSE)):
        with pytest.raises(InputError, match=r"--series '.* \[unit"):
            long(simple(), tmp_path, factor=factor, series=series)
    rows = long(simple(), tmp_path, factor=factor, series=(GAP, f"glucose [mmol/L]={GLUCOSE}"))
    assert rows["trajectory_glucose [mmol/L]"][0] == "5.55 (7h)"


@pytest.mark.parametrize(
    ("mini", "flags", "named"),
    [
        (mixed(), {}, f"in mg/dL and in mmol/L: .* '{GLUCOSE}:mmol/L="),
        (simple().measure(1, 14, 90, GLUCOSE, unit=""), {}, "in mg/dL and in no unit"),
        (simple(), {"series": (f"glucose [mmol/L]={GLUCOSE}",)}, "in mmol/L and in mg/dL"),
        (simple(), {"factor": (f"{GLUCOSE}:mg/dL=0",)}, f"--factor {GLUCOSE}:mg/dL=0"),
        (simple(), {"factor": (f"{GLUCOSE}:mg/dL=inf",)}, "--factor"),
        (simple(), {"factor": ("glucose=18",)}, "--factor glucose=18"),
        (simple(), {"factor": ("glucose:mmol/L=x",)}, "--factor glucose:mmol/L=x"),
        (simple(), {"factor": (f"{GLUCOSE}:mmol=18",)}, f"--factor '{GLUCOSE}:mmol='.* mg/dL"),
        (
            simple(),
            {"factor": (f"{GLUCOSE}:mg/dL=2",), "series": (f"glucose [mg/dL]={GLUCOSE}",)},
            f"--factor '{GLUCOSE}:mg/dL='",
        ),
    ],
)
def test_units_that_contradict_are_refused_by_name(mini, flags, named, tmp_path):
    with pytest.raises(InputError, match=named):
        long(mini, tmp_path, **flags)


# --------------------------------------------------------------------------- columns


def test_columns_have_the_names_that_are_given(tmp_path):
    names = {"subject_id": "patient no", "charttime": "drawn", "item": 'the "test"'}
    table = simple().long().rename(columns=names)
    columns = ("subject_id=patient no", "time=drawn", 'item=the "test"', "label=died")
    rows = long(table, tmp_path, simple().label_table("died"), columns=columns)
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]

    labels = LABELS.rename(columns={"subject_id": "subject"})
    with pytest.raises(InputError, match=r"--columns labels.subject_id=subject\?"):
        long(table, tmp_path, labels, columns=columns[:3])
    columns = (*columns[:3], "labels.subject_id=subject")
    assert len(long(table, tmp_path, labels, columns=columns)) == 2


@pytest.mark.parametrize(
    ("renamed", "columns", "named"),
    [
        ({"subject_id": "Subject"}, (), "--columns subject_id=Subject?"),
        ({"charttime": "chart_time"}, (), "--columns time=chart_time?"),
        ({"value": "valeu"}, (), "no column valuenum or value: did you mean --columns value=valeu"),
        ({"item": "analyte"}, (), "the columns are subject_id, charttime, analyte"),
        ({}, ("value=valu",), "no column valu"),
        ({"unit": "Units"}, (), "--columns unit=Units? --columns unit= says"),
        ({"storetime": "StoreTime"}, (), "--columns storetime=StoreTime?"),
        ({"value": "valued", "item": "values"}, ("item=values",), "--columns value=valued?"),
        ({}, ("values=value",), "--columns values=value"),
        ({}, ("time=",), "--columns time="),
    ],
)
def test_a_column_that_is_missing_is_named_with_the_nearest(renamed, columns, named, tmp_path):
    with pytest.raises(InputError, match=re.escape(named)):
        long(simple().long().rename(columns=renamed), tmp_path, LABELS, columns=columns)


def test_a_column_is_not_taken_for_another(tmp_path):
    table = simple().long(storetime=False).rename(columns={"unit": "units", "value": "valuenum"})
    rows = long(table.assign(value="a text beside it"), tmp_path, LABELS, columns=("unit=",))
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]
    assert f"trajectory_{GLUCOSE}" in rows, "without a unit"


@pytest.mark.parametrize("spelled", ["1.0", "01", "1.00", " 1"])
def test_one_subject_has_many_spellings(spelled, tmp_path):
    table = simple().long().astype({"subject_id": str}).replace({"subject_id": {"1": spelled}})
    assert long(table, tmp_path, LABELS)["subject_id"].tolist() == ["1", "2"]


# --------------------------------------------------------------------------- cells and files


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("value", "<0.1"),
        ("charttime", "31.01.2150"),
        ("charttime", "2150-01-01 12:00:00+02:00"),
        ("charttime", "2150-01-01T12:00:00Z"),
        ("storetime", "720"),
        ("charttime", ""),
        ("subject_id", ""),
        ("item", ""),
    ],
)
def test_a_wrong_cell_is_named_by_its_column_and_not_shown(column, cell, tmp_path):
    table = simple().long().astype(str)
    table.loc[1, column] = cell
    with pytest.raises(InputError) as caught:
        long(table, tmp_path, LABELS)
    assert f"table.csv, column {column}: 1 cell" in str(caught.value)
    assert not cell or cell not in str(caught.value)


def test_an_empty_value_is_left_out_and_a_wrong_label_refused(tmp_path):
    _, description = long_file(simple().measure(1, 14, None), tmp_path)
    assert description["values"]["without a number"] == 1
    with pytest.raises(InputError, match=r"labels.csv, column label: 1 cell"):
        long(simple().long(), tmp_path, LABELS.assign(label=[1, 2]))


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


def test_csv_gzip_and_parquet_give_the_same_rows(tmp_path):
    table, labels = mixed().long(), LABELS
    table["value"] = (table["value"] / 3).astype("float32")
    flags = {"out": tmp_path / "out.csv", "factor": (f"{GLUCOSE}:mmol/L=18.016",)}
    made = []
    for form in ("csv", "csv.gz", "parquet"):
        paths = {
            "table": write_table(table, tmp_path / f"table.{form}"),
            "labels": write_table(labels, tmp_path / f"labels.{form}"),
        }
        made.append(make_rows("from_long", **paths, **flags)[0].to_csv())
    for path in (tmp_path / "table.csv", tmp_path / "labels.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))  # no last line break
    paths = {"table": tmp_path / "table.csv", "labels": tmp_path / "labels.csv"}
    made.append(make_rows("from_long", **paths, **flags)[0].to_csv())
    assert len({*made}) == 1
    assert "5 (6h)" in made[0]


def test_a_damaged_table_is_one_line_and_nothing_is_written(tmp_path, capsys):
    table = write_table(simple().long(), tmp_path / "table.csv.gz")
    table.write_bytes(table.read_bytes()[:-3])
    labels = write_table(LABELS, tmp_path / "labels.csv")
    words = ["--table", str(table), "--labels", str(labels), "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main(["from_long", *words]) == 2
    assert "table.csv.gz: " in capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert names == {"table.csv.gz", "labels.csv"}
