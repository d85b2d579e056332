"""MIMIC-IV: who is asked when, what is known then, what counts as outcome; the future stays out."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset_format
import medgemma_trainer as trainer
from dataset_format import Description, InputError, MIMICtrajectoryDataset
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
    CREATININE,
    GAP,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    moment,
    read_tables,
    shuffled,
    write_tables,
)

ROOT = Path(dataset_format.__file__).parent
DEMO = ROOT / "tests" / "data" / "mimic_iv_demo"
FORMS = (".csv", ".csv.gz", ".parquet")
PARTS = ("death", "icu", "unresolved")
COLUMNS = [
    *("subject_id", "hadm_id", "clinical_trajectory", "clinical_context", "label_escalation"),
    *(f"label_{part}" for part in PARTS),
]


class Made:
    """What the command wrote: rows by admission, the description, and all bytes."""

    def __init__(self, out: Path) -> None:
        self.path, self.bytes = out, out.read_bytes()
        self.rows = pd.read_csv(out).set_index("hadm_id")
        self.facts = json.loads(out.with_suffix(".json").read_text())

    def removed(self) -> dict[str, int]:
        return {rule["rule"]: rule["removed"] for rule in self.facts["flow"] if rule["removed"]}

    def series(self, hadm: int) -> str:
        return str(self.rows.loc[hadm, "clinical_trajectory"])

    def context(self, hadm: int) -> str:
        return str(self.rows.loc[hadm, "clinical_context"])

    def labels(self, hadm: int) -> list[int | None]:
        cells = [float(self.rows[f"label_{part}"].loc[hadm]) for part in PARTS]
        return [None if np.isnan(cell) else int(cell) for cell in cells]

    def inputs(self) -> dict[int, tuple[str, str]]:
        columns = (self.rows[name] for name in ("clinical_trajectory", "clinical_context"))
        pairs = zip(*columns, strict=True)
        return dict(zip(self.rows.index.tolist(), pairs, strict=True))


def make(folder: Path, *words: str, out: Path | None = None) -> Made:
    """Run the command on a folder."""
    out = out or folder.parent / f"{folder.name}.csv"
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(out), *words]
    assert dataset_format.main(command) == 0
    return Made(out)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Made]:
    """Write a mini MIMIC and run the command on it, all adults unless asked otherwise."""

    def run(mini: Mini, *words: str, form: str = ".csv") -> Made:
        folder = mini.write(tmp_path / "mimic", form)
        return make(folder, *(words if "--cohort" in words else ("--cohort", "all", *words)))

    return run


# --------------------------------------------------------------------------- prediction time


def test_the_prediction_time_is_the_first_value_and_the_window(made: Callable[..., Made]) -> None:
    """First value at 2 h, so asked at 14 h: what is charted and stored by then, no later."""
    mini = Mini().admit(1, -5.0).gaps(1, (2, 20), (5.5, 18), (13, 16), (13.5, 15), (14.5, 9))
    mini.lab(1, 12.75, 99, stored=14.0).lab(1, 14, 17, stored=14.0).lab(1, 13.25, 98, stored=14.01)
    result = made(mini)
    # 13 is stored at 14 and counts; 13.5 is stored at 14.5 and does not.
    assert result.series(1) == "20 (0h) -> 18 (3.5h) -> 99 (10.75h) -> 16 (11h) -> 17 (12h)"
    assert "19 h since admission" in result.context(1)


def test_equal_times_stand_by_storing_time_and_value_and_are_all_kept(
    made: Callable[..., Made],
) -> None:
    mini = Mini().admit(1).lab(1, 3, 15).gaps(1, (0, 20)).lab(1, 3, 14).lab(1, 3, 19, stored=3.5)
    assert made(mini.gaps(1, (20, 9))).series(1) == "20 (0h) -> 19 (3h) -> 14 (3h) -> 15 (3h)"


def test_a_first_value_that_is_stored_too_late_opens_no_window(made: Callable[..., Made]) -> None:
    """Stored at 14 h, nobody could know at 12 h that it is time to ask."""
    mini = Mini().admit(1).lab(1, 0, 30, stored=14.0).gaps(1, (3, 20), (6, 18), (30, 9))
    result = made(mini)
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert ", 15 h since admission" in result.context(1)


def test_a_value_stored_before_it_is_charted_is_known_when_charted(
    made: Callable[..., Made],
) -> None:
    mini = Mini().admit(1).gaps(1, (0, 20)).lab(1, 3, 18, stored=1.0).lab(1, 13, 5, stored=11.0)
    assert made(mini).series(1) == "20 (0h) -> 18 (3h)"


def test_a_value_without_storing_time_is_no_input_but_an_outcome(
    made: Callable[..., Made],
) -> None:
    mini = Mini().admit(1).gaps(1, (0, 20), (3, 18)).lab(1, 4, 3, stored=None)
    result = made(mini.lab(1, 20, 9, stored=None))
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.labels(1) == [0, 0, 0]
    assert result.facts["values"]["without a time of storing: no input, outcome alone"] == 2


def test_a_table_without_storing_times_takes_charting_times_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = Mini().admit(1).gaps(1, (0, 20), (12, 18), (30, 9)).tables()
    tables["hosp/labevents"] = tables["hosp/labevents"].drop(columns="storetime")
    result = make(write_tables(tmp_path / "mimic", tables), "--cohort", "all")
    assert result.series(1) == "20 (0h) -> 18 (12h)"
    assert "no storetime" in result.facts["prediction_time"]
    assert "no column storetime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "series"),
    [
        ("--window_hours 6", "20 (0h) -> 19 (1h) -> 18 (5h)"),
        ("--window_hours 1.99", None),
        ("--window_hours 2 --min_observations 3", None),
        ("--window_hours 6 --min_observations 3", "20 (0h) -> 19 (1h) -> 18 (5h)"),
    ],
)
def test_window_and_fewest_observations_are_flags(
    words: str, series: str | None, made: Callable[..., Made]
) -> None:
    mini = Mini().admit(1).gaps(1, (0, 20), (1, 19), (5, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20), (0.5, 8), (0.75, 8), (30, 9))  # someone is always left
    result = made(mini, *words.split())
    assert result.series(1) == series if series else list(result.rows.index) == [2]


# --------------------------------------------------------------------------- at risk


def two(hadm: int, mini: Mini) -> Mini:
    """Two open gaps within the window, and one after it that is closed: no event."""
    return mini.gaps(hadm, (1, 20), (4, 18), (40, 9))


LEFT_OUT = {
    "17 years old": (lambda m: m.admit(1, age=17), "under 18"),
    "of unknown age": (lambda m: m.admit(1, age=None), "under 18"),
    "dead at the prediction time": (lambda m: m.admit(1, 0, 13, death=13.0), "died by"),
    "dead in the window, discharge recorded later": (
        lambda m: m.admit(1, 0, 60, death=9.0),
        "died by",
    ),
    "discharged at the prediction time": (lambda m: m.admit(1, 0, 13), "discharged by"),
    "died on a later day than that of the discharge": (
        lambda m: m.admit(1, 0, 12, death=50.0),
        "discharged by",
    ),
    "without an end": (lambda m: m.admit(1, 0, None), "no value"),
    "not admitted yet": (lambda m: m.admit(1, 13.02), "before the admission"),
}


def test_a_table_that_ends_within_a_row_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut within its last cell a row has all its commas, and another value."""
    folder = tmp_path / "mimic"
    shutil.copytree(DEMO, folder)
    (path,) = (folder / "hosp").glob("admissions*")
    content = gzip.decompress(path.read_bytes())
    path.unlink()
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    words = ["from_mimic", "--mimic_dir", str(folder), "--out", str(tmp_path / "out.csv")]
    plain.write_bytes(content)
    assert dataset_format.main([*words, "--cohort", "all"]) == 0
    (tmp_path / "out.csv").unlink()
    plain.write_bytes(content[:-1])
    capsys.readouterr()
    assert dataset_format.main([*words, "--cohort", "all"]) == 2
    assert "ends without a line break" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_description_of_another_file_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["from_mimic", "--mimic_dir", str(DEMO), "--out", str(tmp_path / "d.csv")]
    assert dataset_format.main([*words, "--cohort", "all"]) == 0
    logger = logging.getLogger("dataset_format")
    logger.addHandler(caplog.handler)
    try:
        MIMICtrajectoryDataset(tmp_path / "d.csv")
        assert "was made with another" not in caplog.text
        with (tmp_path / "d.csv").open("a") as file:
            file.write("\n")
        MIMICtrajectoryDataset(tmp_path / "d.csv")
        assert "d.json was made with another d.csv" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_who_is_not_at_risk_is_left_out_and_counted(name: str, made: Callable[..., Made]) -> None:
    admit, rule = LEFT_OUT[name]
    result = made(two(2, two(1, admit(Mini())).admit(2)))
    assert list(result.rows.index) == [2]
    assert [(k, v) for k, v in result.removed().items() if rule in k] == [
        (next(k for k in result.removed() if rule in k), 1)
    ]


@pytest.mark.parametrize(
    ("admit", "age"),
    [
        (lambda m: m.admit(1, age=18), "18-year-old woman"),
        (lambda m: m.admit(1, age=17, start=24 * 365.0, end=24 * 365 + 200.0), "18-year-old"),
        (lambda m: m.admit(1, age=40, start=-24 * 800.0, end=-24 * 800 + 200.0), "37-year-old"),
        (lambda m: m.admit(1, age=91), "Over 89-year-old woman"),
        (lambda m: m.admit(1, age=88, start=24 * 900.0, end=24 * 900 + 200.0), "Over 89-year-old"),
        (lambda m: m.admit(1, age=91, start=-24 * 800.0, end=-24 * 800 + 200.0), "Over 86-year"),
        (lambda m: m.admit(1, age=91, start=24 * 800.0, end=24 * 800 + 200.0), "Over 89-year-old"),
        (lambda m: m.admit(1, age=89), "89-year-old woman"),
    ],
)
def test_the_age_is_that_of_the_year_of_admission(
    admit: Callable[[Mini], Mini], age: str, made: Callable[..., Made]
) -> None:
    mini = admit(Mini())
    start = pd.Timestamp(mini.rows["hosp/admissions"][0]["admittime"])
    hour = (start - pd.Timestamp("2150-01-01")) / pd.Timedelta("1h")
    result = made(mini.gaps(1, (hour + 1, 20), (hour + 4, 18), (hour + 40, 9)))
    assert result.context(1).startswith(age)
    assert MIMICtrajectoryDataset(result.path).ages()[0] == int(re.findall(r"\d+", age)[0])


def test_a_minute_before_and_after_the_edges_of_risk(made: Callable[..., Made]) -> None:
    """Asked at 13 h: a discharge or a death a minute later leaves a patient at risk."""
    mini = two(1, Mini().admit(1, 0, 13 + 1 / 60))
    result = made(two(2, mini.admit(2, 0, 13 + 1 / 60, death=13 + 1 / 60)), "--outcome", "death")
    assert result.rows["label_death"].to_dict() == {1: 0, 2: 1}


# --------------------------------------------------------------------------- the outcome


PARTS_OF = {  # admissions asked at 13 h, looked at until 85 h; then death, icu, unresolved
    "closed": (lambda m: two(1, m.admit(1)), [0, 0, 0]),
    "closed at the edge of the horizon": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 18), (85, 12)),
        [0, 0, 0],
    ),
    "closed a minute too late": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 18), (80, 13), (85 + 1 / 60, 9)),
        [0, 0, 1],
    ),
    "closed at 12 and no lower": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 18), (40, 12.1)),
        [0, 0, 1],
    ),
    "reopened": (lambda m: two(1, m.admit(1)).gaps(1, (60, 12.5)), [0, 0, 1]),
    "reopened too late": (lambda m: two(1, m.admit(1)).gaps(1, (86, 20)), [0, 0, 0]),
    "open and closed at one time": (lambda m: two(1, m.admit(1)).gaps(1, (40, 13)), [0, 0, 0]),
    "open and closed at one later time": (
        lambda m: two(1, m.admit(1)).gaps(1, (60, 9), (60, 13)),
        [0, 0, 0],
    ),
    "closed before, stays closed": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 11), (40, 9)),
        [0, 0, 0],
    ),
    "closed before, never measured again": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 11)),
        [0, 0, 0],
    ),
    "closed before, reopened": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 11), (40, 13)),
        [0, 0, 1],
    ),
    "closed by a value that was not stored by then": (
        lambda m: m.admit(1).gaps(1, (1, 20), (4, 18)).lab(1, 12.9, 10, stored=15.0),
        [0, 0, 0],
    ),
    "discharged with an open gap": (
        lambda m: m.admit(1, 0, 60).gaps(1, (1, 20), (4, 18), (40, 13)),
        [0, 0, None],
    ),
    "discharged with an open gap at the edge": (
        lambda m: m.admit(1, 0, 85).gaps(1, (1, 20), (4, 18), (40, 13)),
        [0, 0, 1],
    ),
    "discharged with a closed gap": (lambda m: two(1, m.admit(1, 0, 60)), [0, 0, 0]),
    "open, not measured again": (lambda m: m.admit(1).gaps(1, (1, 20), (4, 18)), [0, 0, None]),
    "a value after the discharge": (
        lambda m: m.admit(1, 0, 60).gaps(1, (1, 20), (4, 18), (61, 9)),
        [0, 0, None],
    ),
    "died in the horizon, gap open": (
        lambda m: m.admit(1, 0, 50, death=50.0).gaps(1, (1, 20), (4, 18)),
        [1, 0, 1],
    ),
    "died in the horizon, gap closed": (
        lambda m: two(1, m.admit(1, 0, 50, death=50.0)),
        [1, 0, 0],
    ),
    "died at the edge": (lambda m: two(1, m.admit(1, 0, 85, death=85.0)), [1, 0, 0]),
    "died a minute after it": (
        lambda m: two(1, m.admit(1, 0, 99, death=85 + 1 / 60)),
        [0, 0, 0],
    ),
    "died, only the flag says so": (lambda m: two(1, m.admit(1, 0, 50, expired=1)), [1, 0, 0]),
    "died later on the day of the recorded discharge": (
        lambda m: two(1, m.admit(1, 0, 12, death=15.9)),
        [1, 0, 1],  # with an open gap
    ),
    "to intensive care": (lambda m: two(1, m.admit(1)).icu(1, 30, 60), [0, 1, 0]),
    "to intensive care at the edge": (lambda m: two(1, m.admit(1)).icu(1, 85, None), [0, 1, 0]),
    "to intensive care too late": (lambda m: two(1, m.admit(1)).icu(1, 85.02, 99), [0, 0, 0]),
    "in intensive care from the moment on": (
        lambda m: two(1, m.admit(1)).icu(1, 13, 60),
        [0, None, 0],
    ),
    "in intensive care, and back again": (
        lambda m: two(1, m.admit(1)).icu(1, 2, 20).icu(1, 50, 60),
        [0, None, 0],
    ),
    "left intensive care before, and back": (
        lambda m: two(1, m.admit(1)).icu(1, 2, 13).icu(1, 50, 60),
        [0, 1, 0],
    ),
    "left intensive care before": (lambda m: two(1, m.admit(1)).icu(1, 2, 13), [0, 0, 0]),
    "in intensive care without an end": (
        lambda m: two(1, m.admit(1)).icu(1, 2, None),
        [0, None, 0],
    ),
    "another admission's intensive care and death": (
        lambda m: (
            two(1, m.admit(1, 0, 50)).admit(3, 52, 70, subject=10_001, death=70.0).icu(3, 53, 70)
        ),
        [0, 0, 0],
    ),
}


@pytest.mark.parametrize("name", PARTS_OF)
def test_the_parts_of_the_outcome(name: str, made: Callable[..., Made]) -> None:
    admit, parts = PARTS_OF[name]
    result = made(admit(Mini()), "--outcome", "death")  # leaves nobody out for what is unknown
    assert result.labels(1) == parts
    assert result.rows.loc[1, "label_escalation"] == parts[0]
    result = made(two(2, admit(Mini()).admit(2)))
    if None in parts and parts[1] is not None and 1 not in parts:
        assert 1 not in result.rows.index
        assert sum(v for k, v in result.removed().items() if k.startswith("outcome not")) == 1
    else:
        assert result.rows.loc[1, "label_escalation"] == int(1 in parts)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("death", {1: 1, 2: 0, 3: 0, 4: 0, 5: 0}),
        ("icu", {1: 0, 2: 1, 3: 0, 5: 0}),
        ("unresolved", {1: 0, 2: 0, 3: 1, 4: 0}),
        ("death,icu", {1: 1, 2: 1, 3: 0, 4: 0, 5: 0}),
        ("unresolved,death", {1: 1, 2: 0, 3: 1, 4: 0}),
        ("escalation", {1: 1, 2: 1, 3: 1, 4: 0}),
    ],
)
def test_each_part_of_escalation_can_be_switched(
    outcome: str, expected: dict[int, int], made: Callable[..., Made]
) -> None:
    mini = two(1, Mini().admit(1, 0, 50, death=50.0))
    mini = two(2, mini.admit(2)).icu(2, 30, 60)
    mini = two(3, mini.admit(3)).gaps(3, (60, 14))
    mini = two(4, mini.admit(4)).icu(4, 2, 60)
    mini = mini.admit(5, 0, 60).gaps(5, (1, 20), (4, 18), (40, 13))
    result = made(mini, "--outcome", outcome)
    assert result.rows["label_escalation"].to_dict() == expected
    assert MIMICtrajectoryDataset(result.path).outcome == result.facts["outcome"]


def test_the_horizon_is_a_flag(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1, 0, 50, death=50.0))
    mini = two(2, mini.admit(2, 0, 30, death=30.0))
    result = made(mini, "--horizon_hours", "20", "--outcome", "death")
    assert result.rows["label_death"].to_dict() == {1: 0, 2: 1}
    assert result.facts["question"].endswith("within 20 hours?")


# --------------------------------------------------------------------------- whose value it is


def test_a_value_without_hadm_id_belongs_to_the_one_admission_it_lies_in(
    made: Callable[..., Made],
) -> None:
    mini = Mini().admit(1, 0, 100).admit(2, 200, 300, subject=10_001)
    for hour in (0, 3, 100, 150, 200, 202, 301):
        mini.lab(1, hour, hour / 10, named=False)
    result = made(mini, "--outcome", "death")
    assert result.series(1) == "0 (0h) -> 0.3 (3h)"
    assert result.series(2) == "20 (0h) -> 20.2 (2h)"
    assert result.facts["values"]["without hadm_id, within one admission: taken"] == 5
    assert result.facts["values"]["without hadm_id, within none or several"] == 2


def test_a_value_without_hadm_id_in_two_admissions_belongs_to_none(
    made: Callable[..., Made],
) -> None:
    """1 and 2 overlap from 50 to 100 h, 3 begins within 1 and ends before the last value there."""
    mini = Mini().admit(1, 0, 100).admit(2, 50, 300, subject=10_001)
    mini.admit(3, 10, 20, subject=10_001)
    for hour in (1, 4, 15, 20, 30, 60, 100, 110, 120):
        mini.lab(1, hour, hour, named=False)
    result = made(mini, "--outcome", "death", "--window_hours", "30")
    assert result.series(1) == "1 (0h) -> 4 (3h) -> 30 (29h)"
    assert result.series(2) == "110 (0h) -> 120 (10h)"
    assert 3 not in result.rows.index


def test_a_value_is_never_taken_from_another_patient(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1)).admit(2)
    mini = two(2, mini).lab(2, 5, 77, hadm_id=1).lab(2, 6, 66, hadm_id=99)
    result = made(mini)
    assert result.series(1) == result.series(2) == "20 (0h) -> 18 (3h)"
    assert result.facts["values"]["whose hadm_id is no admission of the patient"] == 2


@pytest.mark.parametrize(("hour", "kept"), [(-24.0, True), (-24.02, False), (200.02, False)])
def test_a_named_admission_takes_values_from_a_day_before_it_to_its_end(
    hour: float, kept: bool, made: Callable[..., Made]
) -> None:
    """A value of the emergency department precedes the admission that it names."""
    mini = Mini().admit(1).lab(1, hour, 25).gaps(1, (0, 20), (3, 18), (30, 9))
    result = made(mini, "--window_hours", "25", "--outcome", "death")
    assert result.series(1).startswith("25 (0h)") == kept
    assert result.facts["values"].get("outside the admission that they name", 0) == int(not kept)


def test_two_admissions_of_a_patient_are_two_rows_in_one_group(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1, subject=7)).admit(2, 400, 600, subject=7)
    result = made(mini.gaps(2, (401, 16), (402, 15), (450, 15)))
    assert result.rows["subject_id"].tolist() == [7, 7]
    assert result.rows["label_escalation"].tolist() == [0, 1]
    assert MIMICtrajectoryDataset(result.path).groups.tolist() == ["7", "7"]


@pytest.mark.parametrize("value", [None, "inf"])
def test_a_value_that_is_no_number_is_left_out(value: Any, made: Callable[..., Made]) -> None:
    result = made(two(1, Mini().admit(1)).lab(1, 2, value))
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.facts["values"]["without a number"] == 1


# --------------------------------------------------------------------------- cohorts


CODES = [
    *((c, 9, True) for c in ("25010", "25011", "25012", "25013", "250.13 ")),
    *((c, 9, False) for c in ("25000", "25020", "2510", "E1010", "2761")),
    *((c, 10, True) for c in ("E0810", "E0911", "E1010", "E10.11", "E1110", "e1111", "E1310")),
    *((c, 10, False) for c in ("E0800", "E0801", "E1100", "E1101", "E1300", "E1065", "E1210")),
    *((c, 10, False) for c in ("25010", "E872", "R7309")),
]


@pytest.mark.parametrize(("code", "version", "inside"), CODES)
def test_the_codes_of_ketoacidosis(code: str, version: int, inside: bool, tmp_path: Path) -> None:
    cells = pd.DataFrame({"hadm_id": [5.0], "icd_code": [code], "icd_version": [float(version)]})
    kinds = dataset_format.MIMIC_TABLES["hosp/diagnoses_icd"]
    assert (len(dataset_format.keep_ketoacidosis(cells, kinds)) == 1) == inside


def test_the_default_cohort_is_coded_and_says_that_this_is_hindsight(
    made: Callable[..., Made], capsys: pytest.CaptureFixture[str]
) -> None:
    mini = two(1, Mini().admit(1, code="E1110")).admit(2, code="E1101")
    result = made(two(2, mini), "--cohort", "dka")
    assert list(result.rows.index) == [1]
    assert result.removed() == {"not coded as diabetic ketoacidosis": 1}
    assert "hindsight" in result.facts["definitions"]["cohort"]
    assert "hindsight" in capsys.readouterr().out


SICK: dict[int, float | None] = {GLUCOSE: 251.0, BICARBONATE: 18.0, GAP: 12.5}
BIOCHEMICAL: dict[str, tuple[dict[int, float | None], float, bool]] = {
    "sick": ({}, 3.0, True),
    "a glucose of 250": ({GLUCOSE: 250.0}, 3.0, False),
    "a bicarbonate of 18.1": ({BICARBONATE: 18.1}, 3.0, False),
    "a gap of 12": ({GAP: 12.0}, 3.0, False),
    "a pH of 7.30": ({PH: 7.30}, 3.0, True),
    "a pH of 7.31": ({PH: 7.31}, 3.0, False),
    "no glucose": ({GLUCOSE: None}, 3.0, False),
    "after the window": ({}, 12.5, False),
    "stored after the window": ({}, 11.5, False),
}


@pytest.mark.parametrize("name", BIOCHEMICAL)
def test_the_biochemical_cohort_is_known_within_the_window(
    name: str, made: Callable[..., Made]
) -> None:
    changed, hour, inside = BIOCHEMICAL[name]
    mini = two(2, Mini().admit(2).gaps(2, (2, 15)))
    for item, value in {GLUCOSE: 400.0, BICARBONATE: 9.0, PH: 7.1}.items():
        mini.lab(2, 2, value, item)
    mini.admit(1, code="4019", version=9).gaps(1, (0, 11), (1, 11), (60, 9))
    for item, cell in (SICK | changed).items():
        mini.lab(1, hour, cell, item)
    result = made(mini, "--cohort", "biochemical", "--outcome", "death")
    assert (1 in result.rows.index) == inside
    assert 2 in result.rows.index


# --------------------------------------------------------------------------- context


def test_the_context_tells_what_is_known_and_nothing_later(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1, gender="M")).icu(1, 10, 50).icu(1, 51, 60)
    mini.lab(1, 0.5, 111, SODIUM)  # before the window
    mini.lab(1, 1, 131, SODIUM).lab(1, 6, 140, SODIUM).lab(1, 12.5, 150, SODIUM)
    mini.lab(1, 6, 7.25, PH).lab(1, 7, 300, GLUCOSE).lab(1, 8, 280, 50809)
    mini.lab(1, 6, 40, 51221, unit="%")  # no chemistry
    text = made(mini).context(1)
    assert text == (
        "50-year-old man, Medical Intensive Care Unit (MICU), 13 h since admission, "
        "glucose 280 (mg/dL), pH 7.25, sodium 140 (mEq/L)"
    )


def test_simple_models_find_each_number_of_a_context_under_its_name(
    made: Callable[..., Made],
) -> None:
    text = made(two(1, Mini().admit(1)).lab(1, 2, 7.25, PH).lab(1, 2, 140, SODIUM))
    facts = dataset_format.facts_of(text.context(1))
    numbers = {k: v for k, v in facts.items() if k.endswith(dataset_format.FIGURE)}
    names = ("year", "h", "ph", "sodium")
    expected = zip(names, (50.0, 13.0, 7.25, 140.0), strict=True)
    assert numbers == {f"{name}{dataset_format.FIGURE}": value for name, value in expected}


# --------------------------------------------------------------------------- items and units


def test_an_item_may_be_named(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1)).lab(1, 2, 15, BICARBONATE).lab(1, 3, 16, BICARBONATE)
    by_name, by_number = made(mini, "--item", "bicarbonate"), made(mini, "--item", "50882")
    assert by_name.series(1) == by_number.series(1) == "15 (0h) -> 16 (1h)"
    assert (by_name.facts["series"], by_name.facts["unit"]) == ("Bicarbonate", "mEq/L")
    assert "anion gap 18 (mEq/L)" in by_name.context(1)
    assert "bicarbonate" not in by_name.context(1)
    assert Description.beside(by_name.path).plausible == (3.0, 60.0)


def test_a_series_may_have_no_unit(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1)).lab(1, 2, 7.1, PH).lab(1, 3, 7.2, PH)
    dataset = MIMICtrajectoryDataset(made(mini, "--item", "pH").path)
    assert (dataset.features, dataset.units) == (("pH",), ("",))
    assert dataset.prompt(0).startswith("50-year-old woman, not in intensive care, 14 h since")
    assert "pH: 7.1 (0h) -> 7.2 (1h). " in dataset.prompt(0)


def test_any_item_of_the_laboratory_can_be_the_series(made: Callable[..., Made]) -> None:
    mini = two(1, Mini().admit(1))
    for hour, value in ((1, 40.5), (2, 39), (30, 35)):
        mini.lab(1, hour, value, 51221, unit="%")
    result = made(mini, "--item", "Hematocrit")
    dataset = MIMICtrajectoryDataset(result.path)
    assert (dataset.features, dataset.units) == (("Hematocrit",), ("%",))
    assert dataset.values[:, 0].tolist() == [40.5, 39]


@pytest.mark.parametrize(
    ("item", "unit", "value", "expected"),
    [
        (GAP, "mmol/L", 17.0, "17"),
        (GAP, "MEQ/L", 17.0, "17"),
        (GLUCOSE, "mmol/L", 20.0, "360.32"),
        (CREATININE, "umol/L", 88.4, "0.999981"),
        (PH, "", 7.2, "7.2"),
    ],
)
def test_known_units_are_converted(
    item: int, unit: str, value: float, expected: str, made: Callable[..., Made]
) -> None:
    mini = two(2, Mini().admit(2)).admit(1).gaps(1, (30, 9))
    mini.lab(2, 2, 100, item).lab(2, 3, 100, item)
    mini.lab(1, 1, value, item, unit=unit).lab(1, 2, value, item, unit=unit)
    result = made(mini, "--item", str(item), "--outcome", "death")
    assert result.series(1) == f"{expected} (0h) -> {expected} (1h)"


def test_other_chemistry_in_an_unknown_unit_is_left_out_and_counted(
    made: Callable[..., Made],
) -> None:
    mini = two(1, Mini().admit(1)).lab(1, 2, 140, SODIUM, unit="g/L").lab(1, 3, 8, PH, unit="")
    result = made(mini.lab(1, 4, 100, CHLORIDE, unit=""))
    assert "sodium" not in result.context(1)
    assert "chloride" not in result.context(1)
    assert "pH 8" in result.context(1)
    assert result.facts["values"]["of sodium in no unit or an unknown one"] == 1


def trio(mini: Mini, hadm: int, hour: float, sodium: float, **words: Any) -> Mini:
    """Sodium, chloride 100 and bicarbonate 20, drawn together."""
    mini.lab(hadm, hour, sodium, SODIUM, **words).lab(hadm, hour, 100, CHLORIDE, **words)
    return mini.lab(hadm, hour, 20, BICARBONATE, **words)


def test_a_gap_is_computed_where_the_laboratory_gives_none(made: Callable[..., Made]) -> None:
    mini = Mini().admit(1)
    for hour, sodium in ((1, 140.0), (3, 138.1), (30, 131.0)):
        trio(mini, 1, hour, sodium)
    mini.lab(1, 5, 150, SODIUM).lab(1, 5, 100, CHLORIDE)  # no bicarbonate: no gap
    mini = trio(two(2, mini.admit(2)), 2, 2, 150.0)
    assert list(made(mini).rows.index) == [2]
    result = made(mini, "--compute_gap")
    assert result.series(1) == "20 (0h) -> 18.1 (2h)"
    assert result.labels(1) == [0, 0, 0]
    assert result.series(2) == "20 (0h) -> 18 (3h)", "a series never mixes both"
    assert result.facts["rows"]["computed_gaps"] == 1


def test_every_gap_can_be_computed(made: Callable[..., Made]) -> None:
    """A reported one is then no input and no outcome, whenever it is drawn."""
    mini = two(1, trio(trio(trio(Mini().admit(1), 1, 2, 140), 1, 5, 138), 1, 30, 131))
    mini = two(2, mini.admit(2))
    result = made(mini.gaps(1, (50, 30)), "--compute_gap", "always")
    assert result.rows.index.tolist() == [1]
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.labels(1) == [0, 0, 0], "131 - 100 - 20 = 11"
    assert "anion gap" not in result.context(1)
    assert "without potassium" in result.facts["definitions"]["anion_gap"]
    assert made(mini, "--compute_gap").labels(1) == [0, 0, 1]
    assert (result.facts["series"], result.facts["unit"]) == (
        "Anion gap without potassium",
        "mEq/L",
    )
    other = made(mini, "--compute_gap", "always", "--item", "bicarbonate")
    assert "anion gap 18 (mEq/L)" in other.context(1)


def test_a_computed_series_has_its_unit_whatever_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini = trio(trio(trio(Mini().admit(1), 1, 1, 140), 1, 3, 138), 1, 30, 131)
    words = "--cohort", "all", "--compute_gap", "always"
    assert make(mini.write(tmp_path / "none"), *words).facts["unit"] == "mEq/L"
    mini.lab(1, 2, 20, GAP, unit="mg/dL")
    assert make(mini.write(tmp_path / "odd"), *words).facts["unit"] == "mEq/L"
    mini.lab(1, 2, 20, SODIUM, unit="mg/dL")
    command = ["from_mimic", "--mimic_dir", str(mini.write(tmp_path / "bad")), *words]
    assert dataset_format.main([*command, "--out", str(tmp_path / "bad.csv")]) == 2
    assert "item 50983 has values in 'mEq/L', 'mg/dL'" in capsys.readouterr().err


def test_a_computed_gap_without_a_time_of_storing_is_an_outcome_alone(
    made: Callable[..., Made],
) -> None:
    mini = trio(trio(Mini().admit(1), 1, 1, 140), 1, 3, 138)
    mini.lab(1, 4, 139, SODIUM).lab(1, 4, 100, CHLORIDE).lab(1, 4, 20, BICARBONATE, stored=None)
    mini = trio(mini, 1, 30, 131, stored=None)
    result = made(mini, "--compute_gap", "always")
    assert result.series(1) == "20 (0h) -> 18 (2h)"
    assert result.labels(1) == [0, 0, 0], "131 - 100 - 20 = 11: closed"


def test_a_computed_gap_is_known_when_its_last_part_is(made: Callable[..., Made]) -> None:
    mini = trio(Mini().admit(1), 1, 1, 140)
    mini.lab(1, 4, 139, SODIUM).lab(1, 4, 100, CHLORIDE).lab(1, 4, 20, BICARBONATE, stored=13.5)
    mini = trio(trio(mini, 1, 6, 138), 1, 30, 131)
    assert made(mini, "--compute_gap").series(1) == "20 (0h) -> 18 (5h)"


def test_a_reported_gap_after_the_prediction_time_does_not_change_the_computed_series(
    made: Callable[..., Made],
) -> None:
    mini = trio(trio(trio(Mini().admit(1), 1, 1, 140), 1, 3, 138), 1, 30, 131)
    before = made(mini, "--compute_gap", "--outcome", "death")
    after = made(mini.lab(1, 12.5, 25).gaps(1, (14, 24)), "--compute_gap", "--outcome", "death")
    assert after.inputs() == before.inputs()
    own = made(mini.lab(1, 11, 23), "--compute_gap", "--outcome", "death")
    assert own.series(1) == "23 (0h) -> 25 (1.5h) -> 24 (3h)"


# --------------------------------------------------------------------------- leaks


def with_storing_times(tables: dict[str, pd.DataFrame], seed: int) -> dict[str, pd.DataFrame]:
    """Give the demo storing times, most soon after, some after hours."""
    labs = tables["hosp/labevents"].copy()
    rng = np.random.default_rng(seed)
    chart = pd.to_datetime(labs["charttime"])
    delay = rng.exponential(1.5, len(labs)) * np.where(rng.random(len(labs)) < 0.1, 8, 1)
    stored = (chart + pd.to_timedelta(delay, unit="h")).dt.floor("s")
    labs["storetime"] = stored.astype(str)
    return {**tables, "hosp/labevents": labs}


def owners(tables: dict[str, pd.DataFrame]) -> pd.Series:
    """The admission of each value: named, or the last one begun where the value lies within it."""
    labs, admissions = tables["hosp/labevents"], tables["hosp/admissions"]
    begun = admissions[["subject_id", "hadm_id"]].assign(
        at=pd.to_datetime(admissions["admittime"]), end=pd.to_datetime(admissions["dischtime"])
    )
    rows = labs[["subject_id"]].assign(at=pd.to_datetime(labs["charttime"]), row=labs.index)
    pairs = pd.merge_asof(rows.sort_values("at"), begun.sort_values("at"), "at", by="subject_id")
    inside = pairs["hadm_id"].where(pairs["at"] <= pairs["end"], "").set_axis(pairs["row"])
    return labs["hadm_id"].where(labs["hadm_id"] != "", inside)


def prediction_times(
    tables: dict[str, pd.DataFrame], items: tuple[int, ...], window: float
) -> pd.Series:
    """When each admission of the demo is asked by items drawn together, by its hadm_id."""
    labs = tables["hosp/labevents"]
    labs = labs.assign(hadm_id=owners(tables))[labs["itemid"].isin([str(i) for i in items])]
    chart, stored = (pd.to_datetime(labs[name]) for name in ("charttime", "storetime"))
    keys = [labs["hadm_id"], chart]
    first = stored.groupby([*keys, labs["itemid"]]).min().unstack()
    known = first.dropna().max(axis=1).reset_index(name="known")
    timely = known[known["known"] <= known["charttime"] + pd.Timedelta(window, "h")]
    times = timely.groupby("hadm_id")["charttime"].min() + pd.Timedelta(window, "h")
    return times.drop("", errors="ignore")


def later(times: pd.Series, rng: np.random.Generator) -> pd.Series:
    """Move times by up to four days."""
    return times + pd.to_timedelta(rng.integers(0, 96, len(times)), unit="h")


def altered(
    tables: dict[str, pd.DataFrame], times: pd.Series, rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """Change everything that is charted, stored or happens after the prediction time."""
    result = {name: table.copy() for name, table in tables.items()}
    labs = result["hosp/labevents"]
    then = pd.to_datetime(owners(tables).map(times))
    chart, stored = (pd.to_datetime(labs[name]) for name in ("charttime", "storetime"))
    late = (chart > then) | (stored > then)
    labs.loc[late, "valuenum"] = rng.integers(1, 400, int(late.sum())).astype(str)
    labs.loc[late, "charttime"] = later(chart, rng)[late].astype(str)
    labs.loc[late, "storetime"] = later(stored, rng)[late].astype(str)
    result["hosp/labevents"] = labs[~late | (rng.random(len(labs)) < 0.7)]
    stays = result["icu/icustays"]
    then = pd.to_datetime(stays["hadm_id"].map(times))
    out = pd.to_datetime(stays["outtime"]) > then
    longer = later(pd.to_datetime(stays["outtime"]), rng)
    stays.loc[out, "outtime"] = longer[out].astype(str)
    begins = pd.to_datetime(stays["intime"]) > then
    stays.loc[begins, "intime"] = longer[begins].astype(str)
    result["icu/icustays"] = stays[~begins | (rng.random(len(stays)) < 0.5)]
    admissions = result["hosp/admissions"]
    then = pd.to_datetime(admissions["hadm_id"].map(times))
    open_end = pd.to_datetime(admissions["dischtime"]) > then
    open_end &= ~(pd.to_datetime(admissions["deathtime"].replace("", None)) <= then)
    begun = pd.to_datetime(admissions["admittime"])
    following = begun.sort_values().groupby(admissions["subject_id"]).shift(-1)
    end = then + pd.to_timedelta(rng.integers(1, 150, len(admissions)), unit="h")
    # Whoever comes again left alive before that.
    between = then + (following - then) * rng.random(len(admissions))
    end = end.where(following.isna(), between.dt.floor("s"))
    open_end &= following.isna() | (end > then)
    dies = (rng.random(len(admissions)) < 0.5) & following.isna().to_numpy()
    admissions.loc[open_end, "dischtime"] = end[open_end].astype(str)
    admissions.loc[open_end, "deathtime"] = np.where(dies, end.astype(str), "")[open_end]
    admissions.loc[open_end, "hospital_expire_flag"] = np.where(dies, "1", "0")[open_end]
    patients = result["hosp/patients"]
    patients["dod"] = rng.permutation(patients["dod"])
    codes = result["hosp/diagnoses_icd"]
    codes["seq_num"] = rng.permutation(codes["seq_num"])
    return {name: shuffled(table, int(rng.integers(2**31))) for name, table in result.items()}


PARTS_OF_GAP = (SODIUM, CHLORIDE, BICARBONATE)


def without_some_gaps(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Take the reported gap from every other patient."""
    labs = tables["hosp/labevents"]
    odd = labs["subject_id"].astype(int) % 2 == 1
    return {**tables, "hosp/labevents": labs[~odd | (labs["itemid"] != str(GAP))]}


def all_in_ketoacidosis(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Sugar for all who are measured, and the code for every other admission."""
    labs, codes = (tables[name].copy() for name in ("hosp/labevents", "hosp/diagnoses_icd"))
    labs.loc[labs["itemid"] == str(GLUCOSE), "valuenum"] = "300"
    coded = (codes["seq_num"] == "1") & (codes["hadm_id"].astype(int) % 2 == 1)
    codes.loc[coded, ["icd_code", "icd_version"]] = ["E1010", "10"]
    return {**tables, "hosp/labevents": labs, "hosp/diagnoses_icd": codes}


@pytest.mark.parametrize(
    "words",
    [
        "--cohort all --outcome death",
        "--cohort all --outcome escalation",
        "--cohort all --outcome icu",
        "--cohort all --outcome unresolved --compute_gap always",
        "--cohort all --outcome death --compute_gap",
        "--cohort all --outcome death --compute_gap always",
        "--cohort all --outcome death --item bicarbonate",
        "--cohort biochemical --outcome death --window_hours 72",
        "--cohort dka --outcome death",
    ],
)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**31))
def test_nothing_after_the_prediction_time_changes_a_letter(
    words: str, seed: int, tmp_path: Path
) -> None:
    """Values and their times, order of diagnoses, transfers, deaths and discharges of the demo.

    Which rows there are depends on the future alone where their outcome is not known.
    """
    rng = np.random.default_rng(seed)
    tables = all_in_ketoacidosis(with_storing_times(read_tables(DEMO), seed))
    window = 72.0 if "biochemical" in words else 12.0
    items = (BICARBONATE,) if "bicarbonate" in words else (GAP,)
    if "--compute_gap" in words:
        tables = without_some_gaps(tables)
    computed = prediction_times(tables, PARTS_OF_GAP, window)
    times = prediction_times(tables, items, window)
    if "always" in words:
        times = computed
    elif "--compute_gap" in words:
        own = owners(tables)
        known = pd.to_datetime(tables["hosp/labevents"]["storetime"])
        known = known[tables["hosp/labevents"]["itemid"] == str(GAP)].groupby(own).min()
        times = computed.where(~(known.reindex(computed.index) <= computed), times)
    before = make(write_tables(tmp_path / "before", tables), *words.split())
    after = make(write_tables(tmp_path / "after", altered(tables, times, rng)), *words.split())
    seen, now = before.inputs(), after.inputs()
    both = seen.keys() & now.keys()
    assert len(both) > 5
    assert {hadm: now[hadm] for hadm in both} == {hadm: seen[hadm] for hadm in both}
    assert "death" not in words or seen.keys() == now.keys()
    assert after.bytes != before.bytes, "the labels did change"


# --------------------------------------------------------------------------- the demo


class Slow:
    """The rules once more, admission by admission and value by value, on tables of text."""

    def __init__(self, tables: dict[str, pd.DataFrame]) -> None:
        self.admissions: list[Any] = tables["hosp/admissions"].to_dict("records")
        self.patients = tables["hosp/patients"].set_index("subject_id").to_dict("index")
        self.icu = tables["icu/icustays"].to_dict("records")
        labs = tables["hosp/labevents"]
        self.labs = labs[labs["itemid"] == str(GAP)].to_dict("records")

    @staticmethod
    def span(admission: dict[str, str]) -> tuple[pd.Timestamp, pd.Timestamp]:
        end = admission["deathtime"] or admission["dischtime"]
        if admission["dischtime"] and end[:10] > admission["dischtime"][:10]:
            end = admission["dischtime"]
        return pd.Timestamp(admission["admittime"]), pd.Timestamp(end)

    def values(self, admission: dict[str, str]) -> list[tuple[pd.Timestamp, float]]:
        start, end = self.span(admission)
        subject = admission["subject_id"]
        others = [a for a in self.admissions if a["subject_id"] == subject]
        found = []
        for lab in (each for each in self.labs if each["subject_id"] == subject):
            at = pd.Timestamp(lab["charttime"])
            if lab["hadm_id"] == "":
                holding = [a for a in others if self.span(a)[0] <= at <= self.span(a)[1]]
                mine = holding == [admission]
            else:
                mine = lab["hadm_id"] == admission["hadm_id"]
                mine = mine and start - pd.Timedelta("24h") <= at <= end
            if mine:
                found.append((at, float(lab["valuenum"])))
        return sorted(found)

    def judge(self, admission: dict[str, str], window: float, horizon: float) -> Any:
        """Give the reason for which it is left out, or death, icu, unresolved."""
        start, end = self.span(admission)
        patient = self.patients[admission["subject_id"]]
        if int(patient["anchor_age"]) + start.year - int(patient["anchor_year"]) < 18:
            return "under 18"
        values = self.values(admission)
        if not values:
            return "no value"
        time = values[0][0] + pd.Timedelta(window, "h")
        until = time + pd.Timedelta(horizon, "h")
        if end <= time:
            return "died" if admission["deathtime"] else "discharged by"
        if sum(at <= time for at, _ in values) < 2:
            return "fewer"
        died = admission["deathtime"] != "" and end <= until
        stays = [s for s in self.icu if s["hadm_id"] == admission["hadm_id"]]
        begun = [pd.Timestamp(s["intime"]) for s in stays]
        left = [pd.Timestamp(s["outtime"]) for s in stays]
        there = any(a <= time < b for a, b in zip(begun, left, strict=True))
        icu = None if there else int(any(time < a <= until for a in begun))
        return int(died), icu, self.unresolved(values, time, until, end, died=died)

    @staticmethod
    def unresolved(
        values: list[tuple[pd.Timestamp, float]],
        time: pd.Timestamp,
        until: pd.Timestamp,
        end: pd.Timestamp,
        *,
        died: bool,
    ) -> int | None:
        """Walk through the values as a nurse does: is the gap closed now, was it ever?"""
        lowest: dict[pd.Timestamp, float] = {}
        for at, value in values:
            lowest[at] = min(value, lowest.get(at, value))
        ever = reopened = seen = False
        for at, value in sorted(lowest.items()):
            if at > until:
                break
            if at > time:
                reopened |= ever and value > 12
                seen = True
                ever |= value <= 12
            else:
                ever = value <= 12
        if ever:
            return int(reopened)
        return 1 if died or (seen and end >= until) else None


@pytest.mark.parametrize(("window", "horizon"), [(12.0, 72.0), (30.0, 24.0)])
def test_the_demo_is_counted_as_a_slow_independent_reading_counts_it(
    window: float, horizon: float, tmp_path: Path
) -> None:
    slow = Slow(read_tables(DEMO))
    truth = {int(row["hadm_id"]): slow.judge(row, window, horizon) for row in slow.admissions}
    flags = ["--cohort", "all", "--window_hours", str(window), "--horizon_hours", str(horizon)]
    result = make(DEMO, *flags, "--outcome", "death", out=tmp_path / "demo.csv")
    kept = {hadm: parts for hadm, parts in truth.items() if isinstance(parts, tuple)}
    assert {hadm: tuple(result.labels(hadm)) for hadm in result.rows.index} == kept
    reasons = pd.Series([r for r in truth.values() if isinstance(r, str)]).value_counts()
    assert sorted(result.removed().values()) == sorted(reasons)
    for rule, removed in result.removed().items():
        assert removed == next(n for reason, n in reasons.items() if str(reason) in rule)
    assert {parts[1] for parts in kept.values()} == {None, 0, 1}
    assert {parts[2] for parts in kept.values()} == {None, 0, 1}


def test_the_demos_default_rows_are_those_whose_escalation_is_known(tmp_path: Path) -> None:
    result = make(DEMO, "--cohort", "all", out=tmp_path / "demo.csv")
    every = make(DEMO, "--cohort", "all", "--outcome", "death", out=tmp_path / "death.csv")
    parts = every.rows[[f"label_{part}" for part in PARTS]]
    known = (parts == 1).any(axis=1) | parts["label_unresolved"].notna()
    assert result.rows.index.tolist() == every.rows.index[known].tolist()
    assert result.rows["label_escalation"].tolist() == (parts == 1).any(axis=1)[known].tolist()
    assert (len(every.rows), len(result.rows), result.rows["label_escalation"].sum()) == (
        87,
        77,
        64,
    )
    assert list(pd.read_csv(result.path).columns) == COLUMNS


def test_the_demos_coded_admissions(tmp_path: Path) -> None:
    """Four are coded; no number of them is enough to train on, and the rows are written."""
    tables = read_tables(DEMO)
    code = tables["hosp/diagnoses_icd"]["icd_code"]
    coded = tables["hosp/diagnoses_icd"][code.str.match("2501|E(08|09|10|11|13)1")]["hadm_id"]
    result = make(DEMO, "--outcome", "death", out=tmp_path / "dka.csv")
    assert set(result.rows.index) <= set(coded.astype(int))
    assert result.facts["flow"][1]["left"] == coded.nunique() == 4
    assert len(result.rows) == 4 - sum(f["removed"] for f in result.facts["flow"][2:])


def test_the_demos_own_gap_mostly_includes_potassium() -> None:
    """What the README says of MIMIC-IV's gap."""
    labs = read_tables(DEMO)["hosp/labevents"].astype({"itemid": int, "valuenum": float})
    drawn = labs.pivot_table("valuenum", ["subject_id", "charttime"], "itemid", "first")
    drawn = drawn[[GAP, SODIUM, CHLORIDE, BICARBONATE, 50971]].dropna()
    without = drawn[SODIUM] - drawn[CHLORIDE] - drawn[BICARBONATE]
    assert len(drawn) == 2851
    assert ((drawn[GAP] - without - drawn[50971]).abs() <= 1).mean() == pytest.approx(
        0.81, abs=5e-3
    )
    assert ((drawn[GAP] - without).abs() <= 0.5).mean() == pytest.approx(0.19, abs=5e-3)


# --------------------------------------------------------------------------- same file


def test_csv_gzip_and_parquet_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    tables = with_storing_times(read_tables(DEMO), 0)
    results = [
        make(write_tables(tmp_path / form[1:], tables, form), "--cohort", "all") for form in FORMS
    ]
    assert len(results[0].rows) > 50
    for result in results[1:]:
        assert result.bytes == results[0].bytes
        for key in ("flow", "definitions", "values", "csv_sha256"):
            assert result.facts[key] == results[0].facts[key]


def test_shuffled_tables_give_the_same_file_and_a_rerun_the_same_bytes(tmp_path: Path) -> None:
    tables = with_storing_times(read_tables(DEMO), 1)
    first = make(write_tables(tmp_path / "mimic", tables), "--cohort", "all", "--compute_gap")
    described = first.path.with_suffix(".json").read_bytes()
    again = make(tmp_path / "mimic", "--cohort", "all", "--compute_gap")
    assert again.bytes == first.bytes
    assert again.path.with_suffix(".json").read_bytes() == described
    for seed in range(3):
        mixed = {name: shuffled(table, seed) for name, table in tables.items()}
        other = write_tables(tmp_path / f"mixed_{seed}", mixed)
        assert make(other, "--cohort", "all", "--compute_gap").bytes == first.bytes


@pytest.mark.parametrize("form", [".csv", ".csv.gz"])
def test_pieces_and_processes_change_nothing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces far shorter than a table, some of them cut within quotes, and three processes."""
    tables = with_storing_times(read_tables(DEMO), 2)
    tables["hosp/labevents"]["comments"] = 'a ""high"" value,\nsaid so'
    folder = write_tables(tmp_path / "mimic", tables, form)
    whole = make(folder, "--cohort", "all")
    monkeypatch.setattr(dataset_format, "PIECE_BYTES", 2**16)
    assert make(folder, "--cohort", "all").bytes == whole.bytes
    monkeypatch.setattr(dataset_format, "usable_cores", lambda: 3)
    cut = make(folder, "--cohort", "all")
    assert cut.bytes == whole.bytes
    assert cut.facts["tables_sha256"] == whole.facts["tables_sha256"]


@given(st.text(alphabet='ab,"\n', max_size=60))
def test_a_piece_ends_where_a_csv_reader_ends_a_row(text: str) -> None:
    cut = dataset_format.row_end(text.encode())
    assert text[:cut].count('"') % 2 == 0
    assert cut == 0 or text[cut - 1] == "\n"
    later = [k + 1 for k in range(cut, len(text)) if text[k] == "\n"]
    assert all(text[:k].count('"') % 2 for k in later)


def test_the_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    import hashlib

    result = make(DEMO, "--cohort", "all", out=tmp_path / "demo.csv")
    for name, digest in result.facts["tables_sha256"].items():
        assert hashlib.sha256((DEMO / f"{name}.csv.gz").read_bytes()).hexdigest() == digest
    assert set(result.facts["tables_sha256"]) == set(dataset_format.MIMIC_TABLES)
    assert hashlib.sha256(result.bytes).hexdigest() == result.facts["csv_sha256"]


# --------------------------------------------------------------------------- bad input

SECRET = "98765"


def cut_gzip(folder: Path) -> None:
    for path in folder.glob("hosp/labevents*"):
        path.unlink()
    whole = (DEMO / "hosp" / "labevents.csv.gz").read_bytes()
    (folder / "hosp" / "labevents.csv.gz").write_bytes(whole[: len(whole) // 2])


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{name}.csv"
        path.write_text(change(path.read_text()))

    return apply


def third(folder: Path) -> None:
    """MIMIC-III: capitals, no modules."""
    for path in folder.glob("*/*.csv"):
        path.rename(folder / path.name.upper().replace(".CSV", ".csv"))
    for module in ("hosp", "icu"):
        (folder / module).rmdir()


def first(folder: Path) -> None:
    """MIMIC-IV 1.0: patients and admissions in core/."""
    (folder / "core").mkdir()
    (folder / "hosp" / "patients.csv").rename(folder / "core" / "patients.csv")
    (folder / "hosp").rename(folder / "lab")


def drop_column(column: str) -> Callable[[str], str]:
    return lambda text: text.replace(column, f"no_{column}", 1)


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), ["no such folder", "hosp/ and icu/"]),
    "no hosp": (lambda f: (f / "hosp").rename(f / "hsp"), ["hosp/"]),
    "no icu": (lambda f: (f / "icu").rename(f / "uci"), ["icu/"]),
    "MIMIC-III": (third, ["MIMIC-III", "MIMIC-IV 2.x and 3.x"]),
    "MIMIC-IV 1.0": (first, ["before 2.0"]),
    "columns of MIMIC-III": (
        edit("hosp/labevents", lambda t: "ROW_ID," + t.replace("itemid", "ITEMID", 1)),
        ["labevents.csv", "itemid", "MIMIC-III"],
    ),
    **{
        f"no table {name}": (
            lambda f, name=name: (f / f"{name}.csv").unlink(),  # type: ignore[misc]
            [name, "is not there"],
        )
        for name in dataset_format.MIMIC_TABLES
    },
    **{
        f"no column {column} of {name}": (
            edit(name, drop_column(column)),
            [f"{name}.csv", f"no column {column}"],
        )
        for name, columns in dataset_format.MIMIC_TABLES.items()
        for column in columns
        if column not in dataset_format.MAY_LACK
    },
    "a table twice": (
        lambda f: (f / "hosp/patients.csv.gz").write_bytes(b""),
        ["hosp/patients", "2 times"],
    ),
    "a truncated gzip": (cut_gzip, ["labevents.csv.gz", "gzip", "copy it again"]),
    "no gzip": (
        lambda f: (f / "icu/icustays.csv").rename(f / "icu/icustays.csv.gz"),
        ["icustays.csv.gz", "gzip"],
    ),
    "a cut last row": (
        edit("hosp/labevents", lambda t: t[:-60]),
        ["labevents.csv", "within a row"],
    ),
    "an empty file": (edit("hosp/admissions", lambda t: ""), ["admissions.csv", "no column"]),
    "a header alone": (
        edit("hosp/admissions", lambda t: t.split("\n")[0] + "\n"),
        ["admissions.csv", "no rows"],
    ),
    "labevents a header alone": (
        edit("hosp/labevents", lambda t: t.split("\n")[0] + "\n"),
        ["none is left|no rows"],
    ),
    "a word for a number": (
        edit("hosp/labevents", lambda t: t.replace(",20,mEq/L", f",x{SECRET},mEq/L", 1)),
        ["labevents.csv, line 2", "valuenum", "no number"],
    ),
    "a word for a time": (
        edit("hosp/labevents", lambda t: t.replace(moment(4), SECRET + "th", 1)),
        ["labevents.csv, line 3", "charttime", "no time"],
    ),
    "no time": (
        edit("hosp/labevents", lambda t: t.replace(moment(4), "", 1)),
        ["labevents.csv, line 3", "charttime", "empty"],
    ),
    "half an itemid": (
        edit("hosp/labevents", lambda t: t.replace(",50868,", ",50868.5,", 1)),
        ["labevents.csv, line 2", "itemid", "no whole"],
    ),
    "a subject that is a word": (
        edit("hosp/admissions", lambda t: t.replace("10001,", f"p{SECRET},", 1)),
        ["admissions.csv, line 2", "subject_id", "no whole"],
    ),
    "more fields": (
        edit("hosp/admissions", lambda t: t.rstrip("\n") + f",{SECRET}\n"),
        ["admissions.csv, line 3", "more fields"],
    ),
    "an admission twice": (
        edit("hosp/admissions", lambda t: t + t.split("\n")[1] + "\n"),
        ["admissions.csv", "hadm_id", "once"],
    ),
    "binary": (
        lambda f: (f / "hosp/patients.csv").write_bytes(bytes(range(256)) * 9),
        ["patients.csv"],
    ),
    "another unit": (
        edit("hosp/labevents", lambda t: t.replace("20,mEq/L", "20,g/L", 1)),
        ["labevents.csv", "50868", "'g/L'", "known are"],
    ),
    "no adult": (
        edit("hosp/patients", lambda t: t.replace(",50,2150", ",7,2150")),
        ["2 admissions", "none is left", "under 18 at admission, or of unknown age 2"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_2_one_line_and_no_output(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(2, two(1, Mini().admit(1)).admit(2)).write(tmp_path / "mimic")
    spoil, expected = BAD[name]
    spoil(folder)
    out = tmp_path / "out.csv"
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(out), "--cohort", "all"]
    assert dataset_format.main(command) == 2
    told = capsys.readouterr()
    assert re.fullmatch(r"error: .+\n", told.err)
    for pattern in expected:
        assert re.search(pattern, told.err), told.err
    assert SECRET not in told.out + told.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_bad_cell_far_down_is_named_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind rows that are not needed, in a later piece."""
    mini = two(1, Mini().admit(1))
    for _ in range(200):
        mini.lab(1, 5, 40, 51221, unit="%")
    mini.lab(1, 7.25, 17)
    folder = mini.write(tmp_path / "mimic")
    path = folder / "hosp" / "labevents.csv"
    path.write_text(path.read_text().replace(moment(7.25), "soon"))
    monkeypatch.setattr(dataset_format, "PIECE_BYTES", 2**12)
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main([*command, "--cohort", "all"]) == 2
    number = 1 + next(k for k, line in enumerate(path.read_text().split("\n")) if "soon" in line)
    assert number == 205
    assert f"labevents.csv, line {number}: column charttime" in capsys.readouterr().err


def test_bad_parquet_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    folder = two(1, Mini().admit(1)).write(tmp_path / "mimic", ".parquet")
    path = folder / "hosp" / "labevents.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main([*command, "--cohort", "all"]) == 2
    assert re.fullmatch(r"error: .+labevents.parquet: .+\n", capsys.readouterr().err)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--item 5", "no such item"),
        ("--item Glucose", "50931, Blood, Chemistry; 50809"),
        ("--item 51221", "none is left"),
        ("--window_hours 0", "window_hours"),
        ("--window_hours nan", "window_hours"),
        ("--horizon_hours -1", "horizon_hours"),
        ("--min_observations 0", "min_observations"),
        ("--outcome sepsis", "escalation"),
        ("--outcome ,", "escalation"),
        ("--cohort none", "cohort"),
        ("--out out.txt", "csv"),
        ("--out no/such/out.csv", "no folder"),
        ("--compute_gap never", "compute_gap"),
        ("--out /proc/out.csv", "cannot be written to"),
        ("--windows 3", "unrecognized"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_one_line(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(1, Mini().admit(1)).write(tmp_path / "mimic")
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(tmp_path / "out.csv")]
    try:
        code = dataset_format.main([*command, "--cohort", "all", *words.split()])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: .+\n", told)
    assert expected in told
    assert not list(tmp_path.glob("out*"))


def test_mixed_units_of_an_item_that_nothing_converts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mini = two(1, Mini().admit(1)).lab(1, 2, 40, 51221, unit="%").lab(1, 3, 40, 51221, unit="g/L")
    command = ["from_mimic", "--mimic_dir", str(mini.write(tmp_path / "mimic"))]
    command += ["--out", str(tmp_path / "out.csv"), "--cohort", "all", "--item", "51221"]
    assert dataset_format.main(command) == 2
    assert "values in '%', 'g/L': nothing converts them" in capsys.readouterr().err


def test_what_another_made_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(1, Mini().admit(1)).write(tmp_path / "mimic")
    for name in ("a.csv", "b.json", "hosp.csv"):
        (tmp_path / name).write_text("{}")
        out = tmp_path / f"{name.partition('.')[0]}.csv"
        command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(out)]
        assert dataset_format.main([*command, "--cohort", "all"]) == 2
        assert "choose another name" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "{}"
    table = folder / "hosp" / "labevents.csv"
    content = table.read_bytes()
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(table), "--cohort", "all"]
    assert dataset_format.main(command) == 2
    assert table.read_bytes() == content


def test_an_earlier_output_stays_whole_where_a_later_run_fails(
    tmp_path: Path, made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = made(two(1, Mini().admit(1)))
    described = result.path.with_suffix(".json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    command = ["from_mimic", "--mimic_dir", str(tmp_path / "mimic"), "--out", str(result.path)]
    assert dataset_format.main([*command, "--cohort", "all"]) == 3
    assert result.path.read_bytes() == result.bytes
    assert result.path.with_suffix(".json").read_bytes() == described
    assert {p.name for p in tmp_path.iterdir()} == {"mimic", "mimic.csv", "mimic.json"}


def test_the_description_stands_there_before_the_table(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table without its description would be read as something else."""
    renamed: list[str] = []
    replace = os.replace

    def noted(old: Path, new: Path) -> None:
        renamed.append(new.suffix)
        replace(old, new)

    monkeypatch.setattr(os, "replace", noted)
    made(two(1, Mini().admit(1)))
    assert renamed == [".json", ".csv"]


def test_the_files_are_their_owners_alone(made: Callable[..., Made]) -> None:
    result = made(two(1, Mini().admit(1)))
    for path in (result.path, result.path.with_suffix(".json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_path_of_the_machine_stands_in_the_description(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    result = made(two(1, Mini().admit(1)))
    assert str(tmp_path) not in result.path.with_suffix(".json").read_text()


def test_the_command_shows_no_bar_without_a_terminal(tmp_path: Path) -> None:
    folder = two(1, Mini().admit(1)).write(tmp_path / "mimic")
    command = [sys.executable, str(ROOT / "dataset_format.py"), "from_mimic"]
    command += ["--mimic_dir", str(folder), "--out", str(tmp_path / "a.csv"), "--cohort", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rows of 1 patients, 0 events" in done.stdout


def test_a_terminal_shows_how_far_the_reading_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two(1, Mini().admit(1)).write(tmp_path / "mimic")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(folder, "--cohort", "all")
    assert "reading hosp/labevents: " in capsys.readouterr().err


# --------------------------------------------------------------------------- onwards


def test_the_data_set_reads_series_question_and_flow(made: Callable[..., Made]) -> None:
    result = made(two(1, Mini().admit(1)).admit(2, age=10))
    dataset = MIMICtrajectoryDataset(result.path)
    assert dataset.asked()["Prediction time"] == result.facts["prediction_time"]
    assert dataset.asked()["Horizon"] == "72 hours from then on"
    assert dataset.prompt(0).endswith(f"{result.facts['question']}\n")
    assert dataset.flow is not None
    assert dataset.flow.to_dict("records") == result.facts["flow"]
    assert dataset.sexes().tolist() == ["woman"]


@pytest.mark.parametrize("flow", ['["a"]', '[{"rule": "a"}]', "5", '"abc"'])
def test_a_broken_flow_is_refused(flow: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(f'{{"flow": {flow}}}')
    with pytest.raises(InputError, match=r"data\.json"):
        Description.beside(tmp_path / "data.csv")


def test_rows_of_one_patient_are_on_one_side_of_every_split(tmp_path: Path) -> None:
    result = make(DEMO, "--cohort", "all", out=tmp_path / "demo.csv")
    dataset = MIMICtrajectoryDataset(result.path)
    subjects = result.rows["subject_id"].to_numpy()
    assert dataset.groups.tolist() == [str(subject) for subject in subjects]
    assert len(set(subjects)) < len(subjects)
    for seed in range(20):
        parts = dataset.split(seed)
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(subjects)))
        sides = [set(subjects[rows]) for rows in parts.values()]
        assert sum(map(len, sides)) == len(set.union(*sides))


def test_stage_1_trains_on_the_file(tmp_path: Path) -> None:
    result = make(DEMO, "--cohort", "all", out=tmp_path / "dka_training_data.csv")
    words = ["--trajectory_only", "--dataset", "dka", "--data_path", str(result.path)]
    words += ["--output_dir", str(tmp_path / "run"), "--log_file", "none"]
    assert trainer.main([*words, "--trajectory_epochs", "1"]) == 0
    folder = tmp_path / "run" / "trajectory"
    facts = json.loads((folder / "run.json").read_text())
    assert sum(part["n"] for part in facts["split"].values()) == len(result.rows)
    tested = pd.read_csv(folder / "predictions_test.csv")
    others = pd.read_csv(folder / "predictions_val.csv")
    assert set(tested["patient"]).isdisjoint(others["patient"])
    page = (folder / "report.html").read_text()
    assert "fewer than 2 values known within the window" in page
    assert "12 hours after the first value of each admission" in page


def test_the_readme_lists_every_flag_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## MIMIC-IV data")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(--\w+) [^`]*` \| (.+?) \|", section, re.MULTILINE))
    subparsers = dataset_format.build_parser()._subparsers
    assert subparsers is not None
    command: Any = subparsers._group_actions[0]
    actions = command.choices["from_mimic"]._actions
    shown = {}
    for action in actions[1:]:
        value = ",".join(action.default) if action.dest == "outcome" else action.default
        value = "escalation" if value == "death,icu,unresolved" else value
        number = dataset_format.plain(value) if isinstance(value, float) else value
        shown[action.option_strings[0]] = "—" if value is None else f"`{number}`"
    assert listed == shown
