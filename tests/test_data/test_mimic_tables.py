"""MIMIC-IV's tables: damaged, incomplete or foreign ones are refused in one line."""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgemma_clinical.data.mimic.tables import TABLES
from medgemma_clinical.files import InputError
from mimic_files import DEMO, Mini, extracted, moment

SECRET = "98765"
"""Stands in a spoiled cell; no message may repeat the content of a patient's cell."""


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        path = folder / f"{name}.csv"
        path.write_text(change(path.read_text()))

    return apply


def replace_once(name: str, old: str, new: str) -> Callable[[Path], Any]:
    return edit(name, lambda text: text.replace(old, new, 1))


def cut_gzip(folder: Path) -> None:
    (folder / "hosp" / "labevents.csv").unlink()
    whole = (DEMO / "hosp" / "labevents.csv.gz").read_bytes()
    (folder / "hosp" / "labevents.csv.gz").write_bytes(whole[: len(whole) // 2])


def as_mimic_iii(folder: Path) -> None:
    """Capitals, no modules."""
    for path in folder.glob("*/*.csv"):
        path.rename(folder / path.name.upper().replace(".CSV", ".csv"))
    for module in ("hosp", "icu"):
        (folder / module).rmdir()


def as_mimic_iv_1(folder: Path) -> None:
    """Patients and admissions in core/."""
    (folder / "core").mkdir()
    (folder / "hosp" / "patients.csv").rename(folder / "core" / "patients.csv")
    (folder / "hosp").rename(folder / "lab")


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), ["no such folder", "hosp/ and icu/"]),
    "no hosp": (lambda f: (f / "hosp").rename(f / "hsp"), ["hosp/"]),
    "no icu": (lambda f: (f / "icu").rename(f / "uci"), ["icu/"]),
    "MIMIC-III": (as_mimic_iii, ["MIMIC-III", "MIMIC-IV 2.x and 3.x"]),
    "MIMIC-IV 1.0": (as_mimic_iv_1, ["before 2.0"]),
    "columns of MIMIC-III": (
        edit("hosp/labevents", lambda t: "ROW_ID," + t.replace("itemid", "ITEMID", 1)),
        ["labevents.csv", "itemid", "MIMIC-III"],
    ),
    "a table twice": (
        lambda f: (f / "hosp/patients.csv.gz").write_bytes(b""),
        ["hosp/patients", "2 times"],
    ),
    "a truncated gzip": (
        cut_gzip,
        ["labevents.csv.gz: not a whole gzip file", "copy the table again"],
    ),
    "no gzip": (
        lambda f: (f / "icu/icustays.csv").rename(f / "icu/icustays.csv.gz"),
        ["icustays.csv.gz", "gzip"],
    ),
    "a cut last row": (
        edit("hosp/labevents", lambda t: t[:-60]),
        ["labevents.csv, line "],
    ),
    "an empty file": (
        edit("hosp/admissions", lambda t: ""),
        ["admissions.csv", "the file is empty"],
    ),
    "a header alone": (
        edit("hosp/admissions", lambda t: t.split("\n")[0] + "\n"),
        ["admissions.csv", "no rows"],
    ),
    "labevents a header alone": (
        edit("hosp/labevents", lambda t: t.split("\n")[0] + "\n"),
        ["none is left|no rows"],
    ),
    "a word for a number": (
        replace_once("hosp/labevents", ",20,mEq/L", f",x{SECRET},mEq/L"),
        ["labevents.csv, column valuenum: 1 cell is not a number"],
    ),
    "a word for a time": (
        replace_once("hosp/labevents", moment(4), SECRET + "th"),
        ["labevents.csv, column charttime: 1 cell is empty or not a time"],
    ),
    "no time": (
        replace_once("hosp/labevents", moment(4), ""),
        ["labevents.csv, column charttime: 1 cell is empty"],
    ),
    "half an itemid": (
        replace_once("hosp/labevents", ",50868,", ",50868.5,"),
        ["labevents.csv, column itemid: 1 cell"],
    ),
    "a subject that is a word": (
        replace_once("hosp/admissions", "10001,", f"p{SECRET},"),
        ["admissions.csv, column subject_id: 1 cell"],
    ),
    "more fields": (
        edit("hosp/admissions", lambda t: t.rstrip("\n") + f",{SECRET}\n"),
        ["admissions.csv, line 3: "],
    ),
    "an admission twice": (
        edit("hosp/admissions", lambda t: t + t.split("\n")[1] + "\n"),
        ["admissions.csv", "hadm_id", "more than once"],
    ),
    "binary": (
        lambda f: (f / "hosp/patients.csv").write_bytes(bytes(range(256)) * 9),
        ["patients.csv"],
    ),
    "no adult": (
        edit("hosp/patients", lambda t: t.replace(",50,2150", ",7,2150")),
        ["2 candidates none is left", "under 18 at admission, or of unknown age"],
    ),
}


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        extracted(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Mini().admit(1).settling(1).admit(2).settling(2).write(tmp_path / "mimic")


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_in_one_line(name: str, folder: Path) -> None:
    spoil, expected = BAD[name]
    spoil(folder)
    text = refusal(folder)
    for pattern in expected:
        assert re.search(pattern, text), text


def test_every_table_and_every_required_column_is_needed(folder: Path) -> None:
    for name, columns in TABLES.items():
        path = folder / f"{name}.csv"
        content = path.read_text()
        path.unlink()
        assert f"{name} (.csv" in refusal(folder)
        for column in columns:
            path.write_text(content.replace(column, f"no_{column}", 1))
            if columns[column].optional:
                extracted(folder)
            else:
                assert f"{name}.csv: no column {column}" in refusal(folder)
        path.write_text(content)


def test_bad_parquet_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = Mini().admit(1).settling(1).write(tmp_path, ".parquet")
    path = folder / "hosp" / "labevents.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "labevents.parquet: damaged" in refusal(folder)


def test_a_gzip_that_is_whole_reads_as_the_text_in_it(folder: Path) -> None:
    plain = extracted(folder)
    path = folder / "hosp" / "labevents.csv"
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert extracted(folder).csv == plain.csv


def test_a_terminal_shows_how_far_the_reading_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    extracted(folder)
    assert "reading labevents.csv: " in capsys.readouterr().err
