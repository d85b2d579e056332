"""The command from_meds: labels, context, static columns, splits, codes, shards, MIMIC's demo."""

import pandas as pd
import pytest

import dataset_format
from event_files import (
    EPOCH,
    GAP,
    GAP_SERIES,
    LACTATE,
    YEAR,
    Mini,
    meds,
    meds_file,
    write_table,
)
from medgemma_clinical.files import InputError


def simple():
    return Mini().ask(1, 30, 1).ask(2, 30, 0, "tuning").measure(1, 12, 4.1).measure(2, 12, 15)


@pytest.fixture
def folder(tmp_path):
    return simple().write_meds(tmp_path / "meds")


def with_labels(folder, table):
    table.to_parquet(folder / "task" / "deep" / "0.parquet")
    return folder


def test_numbers_of_32_bits_are_written_in_their_shortest_text_others_left_out(tmp_path):
    mini = simple().measure(1, 13, None).measure(1, 14, float("inf")).measure(1, 15, float("nan"))
    rows = meds(mini.write_meds(tmp_path / "meds"))
    assert rows["clinical_trajectory"].tolist() == ["4.1 (6h)", "15 (6h)"]
    assert list(rows)[4:] == ["prediction_hours", "label_escalation", "split"]


@pytest.mark.parametrize("column", ["boolean_value", "integer_value", "float_value"])
def test_labels_are_read_from_whichever_column_and_file_holds_them(column, folder, tmp_path):
    kinds = {"boolean_value": "boolean", "integer_value": "Int64", "float_value": "Float32"}
    table = simple().label_table(column, kinds[column])
    for other in kinds.keys() - {column}:
        table[other] = pd.Series([pd.NA, pd.NA], dtype=kinds[other])
    table["categorical_value"] = pd.Series([None, None], dtype="string")
    task = with_labels(folder, table) / "task"
    for labels in (task, task / "deep/0.parquet", write_table(table, tmp_path / "labels.csv")):
        assert meds(folder, labels=labels)["label_escalation"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"categorical_value": ["yes", "no"]}, "boolean_value, integer_value, float_value"),
        ({"integer_value": [0, 3]}, "column integer_value: 1 cell"),
        ({"float_value": [0.5, 0.7]}, "column float_value: 2 cells"),
        ({"boolean_value": True, "zone": True}, "column prediction_time: 2 cells"),
    ],
)
def test_labels_that_are_no_answer_and_times_with_a_zone_are_refused(values, named, folder):
    table = simple().label_table().drop(columns="label").assign(**values)
    if "zone" in table:
        table["prediction_time"] = table["prediction_time"].dt.tz_localize("Europe/Berlin")
    with pytest.raises(InputError, match=rf"0\.parquet.*{named}"):
        meds(with_labels(folder, table))


def test_age_sex_values_and_presence_are_a_text_and_static_columns(tmp_path):
    mini = simple().ask(3, 30).measure(3, 12, 15).measure(1, -60 * YEAR, None, "MEDS_BIRTH")
    mini.measure(1, None, None, "GENDER//F").measure(2, None, None, "GENDER//M")
    mini.measure(1, 8, 3.5, LACTATE).measure(1, 29, 2.1, LACTATE)
    mini.measure(1, 31, 9.9, LACTATE).measure(2, 1, 7, LACTATE)
    mini.measure(2, 10, None, "DRUG//insulin").measure(2, None, None, "RACE//x")
    mini.measure(3, 4, None, "DRUG//insulin").measure(3, 31, None, "DRUG//insulin")
    context = ("lactate [mmol/L]=LAB//lac*", "insulin=DRUG*", "race x=RACE//x", "pH [-]=LAB//pH")
    rows = meds(mini.write_meds(tmp_path / "meds"), context=context).fillna("")
    texts = ["60-year-old woman, lactate 2.1 mmol/L", "Man, insulin, race x", ""]
    assert rows["clinical_context"].tolist() == texts
    assert rows.loc[:, "static_age [years]":].drop(columns="split").astype(str).to_dict("list") == {
        "static_age [years]": ["60", "", ""],
        "static_sex_male": ["0", "1", ""],
        "static_lactate [mmol/L]": ["2.1", "", ""],
        "static_insulin": ["0", "1", "0"],
        "static_race x": ["0", "1", "0"],
        "static_pH [-]": ["", "", ""],
        "label_escalation": ["1", "0", "0"],
    }


def test_age_is_in_full_years_and_not_told_above_89(tmp_path):
    mini = Mini()
    births = ["2060-01-02 06:00", "2060-01-02 06:01", "2090-01-03", "2150-01-03"]
    for subject, birth in enumerate(births):
        hours = (pd.Timestamp(birth) - EPOCH) / pd.Timedelta("1h")
        mini.ask(subject, 30).measure(subject, 12, 15).measure(subject, hours, None, "MEDS_BIRTH")
    rows = meds(mini.write_meds(tmp_path / "meds")).fillna("")
    ages = [text.removesuffix("-year-old patient") for text in rows["clinical_context"]]
    assert ages == ["Over 89", "89", "59", ""]
    assert rows["static_age [years]"].tolist() == ["90", "89", "59", ""]


@pytest.mark.parametrize(
    ("series", "named"),
    [
        ("glucose=LAB//1*", "LAB//1//mg/dL, LAB//1//mmol/L are in mg/dL, mmol/L"),
        ("glucose [mmol/L]=LAB//1//mg/dL", "are in mg/dL"),
        ("glucose [MG/DL]=LAB//1//mg/dL", ""),
        ("glucose=LAB//1//mg/dL", ""),
        ("glucose [mmol/L]=LAB//gap", ""),
    ],
)
def test_codes_of_another_unit_are_refused(series, named, tmp_path):
    mini = simple().measure(1, 13, 90, "LAB//1//mg/dL").measure(1, 14, 5, "LAB//1//mmol/L")
    folder = mini.write_meds(tmp_path / "meds")
    if not named:
        assert len(meds(folder, (series,)))
        return
    with pytest.raises(InputError, match=f"--series glucose: .*{named}"):
        meds(folder, (series,))


@pytest.mark.parametrize("name", ["age [years]", "Sex_male", "x [mmol/L]"])
def test_a_static_feature_of_an_automatic_name_or_another_unit_is_refused(name, tmp_path):
    mini = simple().measure(1, 13, 90, "LAB//1//mg/dL")
    with pytest.raises(InputError, match="--context"):
        meds(mini.write_meds(tmp_path / "meds"), context=(f"{name}=LAB//1//mg/dL",))


def test_the_splits_of_meds_become_ours(tmp_path):
    mini = simple().ask(3, 30, 0, "held_out").measure(3, 12, 15).ask(4, 30).measure(4, 12, 15)
    del mini.splits[4]
    folder = mini.write_meds(tmp_path / "meds")
    rows, description = meds_file(folder)
    assert rows["split"].tolist() == ["train", "val", "test"]
    removed = {rule["rule"]: rule["removed"] for rule in description["flow"]}
    assert removed["subject in no part of the split"] == 1
    rows = meds(folder, no_splits=True)
    assert len(rows) == 4
    assert "split" not in rows


@pytest.mark.parametrize("splits", [None, {1: "train", 2: "test"}, {1: "train", "1": "tuning"}])
def test_splits_that_cannot_be_used_are_refused(splits, folder):
    path = folder / "metadata" / "subject_splits.parquet"
    path.unlink()
    if splits:
        subjects = [int(subject) for subject in splits]
        write_table(pd.DataFrame({"subject_id": subjects, "split": splits.values()}), path)
    with pytest.raises(InputError, match=r"subject_splits\.parquet.*--no_splits"):
        meds(folder)


def test_a_damaged_shard_or_a_missing_flag_is_named_and_nothing_written(folder, tmp_path, capsys):
    shard = folder / "data" / "tuning" / "0.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    flags = {"--labels": str(folder / "task"), "--series": GAP_SERIES}
    flags["--out"] = str(tmp_path / "out.csv")
    for missing in (None, *flags):
        words = [word for name in flags.keys() - {missing} for word in (name, flags[name])]
        assert dataset_format.main(["from_meds", "--meds_dir", str(folder), *words]) == 2
        named = f"{missing}: " if missing else "tuning/0.parquet"
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"meds", ".out.csv.lock"}


def test_codes_are_listed_by_their_number_of_events(tmp_path, capsys):
    mini = Mini().ask(1, 30)
    for subject in range(12):
        mini.measure(subject, 1, 15).measure(subject, 2, 15).ask(subject, 1, 0, f"p{subject % 2}")
        for hour in range(3 if subject < 10 else 0):
            mini.measure(subject, hour, 1, "LAB//ra\nre")
    folder = mini.write_meds(tmp_path / "meds")
    codes = pd.DataFrame({"code": [GAP], "description": ["Anion gap"], "valueuom": [["mEq/L"]]})
    codes.to_parquet(folder / "metadata" / "codes.parquet")
    assert dataset_format.main(["from_meds", "--meds_dir", str(folder), "--list_codes"]) == 0
    _, *lines = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert lines == [r"30 10 LAB//ra\nre", "24 12 LAB//gap mEq/L Anion gap"]
