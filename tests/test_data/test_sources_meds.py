"""The command from_meds: labels, context, splits, codes, damaged shards, and MIMIC's demo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import dataset_format
from event_files import EPOCH, GAP, GAP_SERIES, MEDS_DEMO, Mini, meds, write_table
from medgemma_clinical.files import InputError
from table_requests import make_rows

HOURS_OF_YEAR = 8766.0


def simple() -> Mini:
    return Mini().ask(1, 30, 1).ask(2, 30, 0, "tuning").measure(1, 12, 4.1).measure(2, 12, 15)


def test_a_number_of_32_bits_is_written_in_its_shortest_text(tmp_path: Path) -> None:
    rows = meds(simple().write_meds(tmp_path / "meds"))
    assert rows["clinical_trajectory"].tolist() == ["4.1 (6h)", "15 (6h)"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [("boolean_value", "boolean"), ("integer_value", "Int64"), ("float_value", "Float32")],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_labels_are_read_from_whichever_column_is_filled(
    column: str, kind: str, as_folder: bool, tmp_path: Path
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    task = folder / "task" / "deep" / "0.parquet"
    empty = {"boolean_value": "boolean", "integer_value": "Int64", "float_value": "Float32"}
    table = simple().label_table(column, kind)
    for other in empty.keys() - {column}:
        table[other] = pd.Series([pd.NA, pd.NA], dtype=empty[other])
    table["categorical_value"] = pd.Series([None, None], dtype="string")
    table.to_parquet(task)
    rows = meds(folder, labels=folder / "task" if as_folder else task)
    assert rows["label_escalation"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"categorical_value": ["yes", "no"]}, "names of classes"),
        ({"integer_value": [1, None]}, "fills two"),
        (
            {"boolean_value": None, "integer_value": [0, 3]},
            "column integer_value: 1 cell is neither",
        ),
        (
            {"boolean_value": None, "float_value": [0.5, 1.0]},
            "column float_value: 1 cell is neither",
        ),
    ],
)
def test_labels_that_are_no_answer_are_refused(
    more: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    table = simple().label_table("boolean_value", "boolean").assign(**more)
    table = table.dropna(axis="columns", how="all")
    table.to_parquet(folder / "task" / "deep" / "0.parquet")
    with pytest.raises(InputError, match=expected):
        meds(folder)


def test_a_time_with_a_zone_is_refused(tmp_path: Path) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    table = simple().label_table("boolean_value", "boolean")
    table["prediction_time"] = table["prediction_time"].dt.tz_localize("Europe/Berlin")
    table.to_parquet(folder / "task" / "deep" / "0.parquet")
    with pytest.raises(InputError, match="column prediction_time: 2 cells are empty or not a time"):
        meds(folder)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_labels_without_an_answer_are_refused_with_their_columns(
    ending: str, tmp_path: Path
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    name = "boolean_value" if ending == "csv" else "answer"
    labels = write_table(simple().label_table(name, "boolean"), tmp_path / f"labels.{ending}")
    expected = f"no Parquet file with a column of boolean_value.* prediction_time, {name}"
    with pytest.raises(InputError, match=expected):
        meds(folder, labels=labels)


def test_a_fact_with_the_name_of_an_automatic_column_is_refused(tmp_path: Path) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    for name in ("age [years]", "Sex_male"):
        with pytest.raises(InputError, match=r"--context .*: age and sex are in the context"):
            meds(folder, context=(f"{name}={GAP}",))


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ("glucose=LAB//1*", "LAB//1//mg/dL, LAB//1//mmol/L are in mg/dL, mmol/L: name codes"),
        ("glucose [mmol/L]=LAB//1//mg/dL", "are in mg/dL, the series is in mmol/L"),
        ("glucose [MG/DL]=LAB//1//mg/dL", ""),
        ("glucose=LAB//1//mg/dL", ""),
        ("glucose [mmol/L]=LAB//gap", ""),
    ],
)
def test_codes_of_another_unit_are_refused(series: str, expected: str, tmp_path: Path) -> None:
    mini = simple().measure(1, 13, 90, "LAB//1//mg/dL").measure(1, 14, 5, "LAB//1//mmol/L")
    folder = mini.write_meds(tmp_path / "meds")
    if not expected:
        assert len(meds(folder, (series,)))
        return
    with pytest.raises(InputError, match=expected):
        meds(folder, (series,))
    if "[" in series:
        with pytest.raises(InputError, match=expected):
            meds(folder, context=(series,))


def test_nothing_is_logged_before_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    with caplog.at_level("INFO"), pytest.raises(InputError, match="none is left"):
        meds(folder, min_observations=9)
    assert not caplog.records


def test_the_context_holds_person_values_and_presence(tmp_path: Path) -> None:
    mini = simple().measure(1, -60 * HOURS_OF_YEAR, None, "MEDS_BIRTH")
    mini.measure(1, None, None, "GENDER//F").measure(2, None, None, "GENDER//M")
    mini.measure(1, 8, 3.5, "LAB//lactate").measure(1, 29, 2.1, "LAB//lactate")
    mini.measure(1, 31, 9.9, "LAB//lactate").measure(2, 1, 7, "LAB//lactate")
    mini.measure(2, 10, None, "DRUG//insulin").measure(2, None, None, "RACE//x")
    context = ("lactate [mmol/L]=LAB//lac*", "insulin=DRUG*", "race x=RACE//x")
    rows = meds(mini.write_meds(tmp_path / "meds"), context=context)
    assert rows["clinical_context"].tolist() == [
        "60-year-old woman, lactate 2.1 mmol/L",
        "Man, insulin, race x",
    ]
    assert list(rows)[5:] == [
        *("clinical_context", "static_age [years]", "static_sex_male", "static_lactate [mmol/L]"),
        *("label_escalation", "split"),
    ]
    assert rows.fillna("").iloc[:, 6:9].to_numpy().tolist() == [["60", "0", "2.1"], ["", "1", ""]]


def test_age_is_in_full_years_and_not_told_above_89(tmp_path: Path) -> None:
    mini = Mini()
    births = ["2060-01-02 06:00", "2060-01-02 06:01", "2090-01-03", "2150-01-03"]
    for subject, birth in enumerate(births):
        hours = (pd.Timestamp(birth) - EPOCH) / pd.Timedelta("1h")
        mini.ask(subject, 30).measure(subject, 12, 15).measure(subject, hours, None, "MEDS_BIRTH")
    rows = meds(mini.write_meds(tmp_path / "meds"))
    assert rows["clinical_context"].fillna("").tolist() == [
        "Over 89-year-old patient",
        "89-year-old patient",
        "59-year-old patient",
        "",
    ]
    assert rows["static_age [years]"].fillna("").tolist() == ["90", "89", "59", ""]


def test_without_facts_there_is_no_context(tmp_path: Path) -> None:
    rows = meds(simple().write_meds(tmp_path / "meds"))
    assert list(rows)[4:] == ["prediction_hours", "label_escalation", "split"]


def test_the_splits_of_meds_become_ours(tmp_path: Path) -> None:
    mini = simple().ask(3, 30, 0, "held_out").measure(3, 12, 15).ask(4, 30).measure(4, 12, 15)
    del mini.splits[4]
    folder = mini.write_meds(tmp_path / "meds")
    paths = {"meds_dir": folder, "labels": folder / "task", "out": folder / "out.csv"}
    rows, description = make_rows("from_meds", **paths, series=(GAP_SERIES,))
    assert rows["split"].tolist() == ["train", "val", "test"]
    removed = {rule["rule"]: rule["removed"] for rule in description["flow"]}
    assert removed["subject in no part of the split"] == 1
    rows = meds(folder, no_splits=True)
    assert len(rows) == 4
    assert "split" not in rows


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (None, "no such file: --no_splits"),
        ([(1, "train"), (2, "test")], "each subject needs one part"),
        ([(1, "train"), (1, "tuning"), (2, "train")], "each subject needs one part"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(
    splits: list[tuple[int, str]] | None, expected: str, tmp_path: Path
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    path = folder / "metadata" / "subject_splits.parquet"
    path.unlink()
    if splits:
        pd.DataFrame(splits, columns=["subject_id", "split"]).to_parquet(path)
    with pytest.raises(InputError, match=expected):
        meds(folder)


def test_values_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    mini = simple().measure(1, 13, None).measure(1, 14, float("inf")).measure(1, 15, float("nan"))
    rows = meds(mini.write_meds(tmp_path / "meds"))
    assert rows["clinical_trajectory"][0] == "4.1 (6h)"


def test_a_damaged_shard_is_named_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = simple().write_meds(tmp_path / "meds")
    shard = folder / "data" / "tuning" / "0.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    words = ["from_meds", "--meds_dir", str(folder), "--labels", str(folder / "task")]
    words += ["--series", GAP_SERIES, "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"0\.parquet: damaged", error)
    assert sorted((path.name for path in tmp_path.iterdir()), reverse=True) == [
        "meds",
        ".out.csv.lock",
    ]


@pytest.mark.parametrize("flag", ["--out", "--labels", "--series"])
def test_a_flag_that_is_missing_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"--out": "o.csv", "--labels": "x", "--series": GAP_SERIES}
    del words[flag]
    given = [word for pair in words.items() for word in pair]
    assert dataset_format.main(["from_meds", "--meds_dir", "x", *given]) == 2
    assert f"{flag}: is needed; --list_codes shows" in capsys.readouterr().err


def test_codes_are_listed_by_their_number_of_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini = Mini().ask(1, 30)
    for subject in range(12):
        mini.measure(subject, 1, 15).measure(subject, 2, 15)
        for hour in range(3 if subject < 10 else 0):
            mini.measure(subject, hour, 1, "LAB//ra\nre")
    folder = mini.write_meds(tmp_path / "meds")
    codes = pd.DataFrame({"code": [GAP], "description": ["Anion gap"], "valueuom": [["mEq/L"]]})
    codes.to_parquet(folder / "metadata" / "codes.parquet")
    assert dataset_format.main(["from_meds", "--meds_dir", str(folder), "--list_codes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "events subjects code, unit, description",
        r"30 10 LAB//ra\nre",
        "24 12 LAB//gap mEq/L Anion gap",
    ]


# --------------------------------------------------------------------------- the demo


def test_the_demo_gives_the_trajectories_of_from_mimic(tmp_path: Path) -> None:
    expected, _ = make_rows(
        "from_mimic",
        mimic_dir=MEDS_DEMO.with_name("mimic_iv_demo"),
        out=tmp_path / "mimic.csv",
        cohort="all",
        outcome=("death",),
        compute_gap="reported",
        window_hours=12,
    )
    rows, _ = make_rows(
        "from_meds",
        meds_dir=MEDS_DEMO,
        labels=MEDS_DEMO / "labels" / "hospital_mortality",
        out=tmp_path / "out.csv",
        series=("anion gap [mEq/L]=LAB//50868//mEq/L",),
        window_hours=12,
        hours_from="first",
    )
    assert len(rows) == 87
    assert triples(rows) == triples(expected)


def triples(rows: pd.DataFrame) -> list[tuple[str, str, int]]:
    columns = (
        rows["subject_id"].astype(str),
        rows["clinical_trajectory"],
        rows["label_escalation"],
    )
    return sorted(zip(*columns, strict=True))


def test_labels_of_aces_on_the_demo(tmp_path: Path) -> None:
    rows, description = make_rows(
        "from_meds",
        meds_dir=MEDS_DEMO,
        labels=MEDS_DEMO / "labels" / "in_icu_mortality",
        out=tmp_path / "out.csv",
        series=("anion gap [mEq/L]=LAB//50868*", "glucose [mg/dL]=LAB//50931*"),
        context=("lactate [mmol/L]=LAB//50813*",),
    )
    flow = description["flow"]
    assert flow[0]["removed"] + flow[0]["left"] == 74
    assert len(rows) == flow[-1]["left"] > 60
    assert set(rows["split"]) == {"train", "val", "test"}
    assert rows["clinical_context"].str.match(r"(Over )?\d\d-year-old (wo)?man").all()
    json.dumps(description)
