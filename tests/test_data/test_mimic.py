"""MIMIC-IV's tables: damaged, incomplete or foreign ones are refused in one line."""

import gzip
import re
import sys

import pytest

from medgemma_clinical.data.mimic import COLUMNS
from medgemma_clinical.files import InputError
from mimic_files import DEMO, Mini, extracted, moment

SECRET = "98765"
"""Stands in a spoiled cell; no message may repeat the content of a patient's cell."""


def edit(name, change):
    def apply(folder):
        path = folder / f"{name}.csv"
        path.write_text(change(path.read_text()))

    return apply


def replace_once(name, old, new):
    return edit(name, lambda text: text.replace(old, new, 1))


def cut_gzip(folder):
    (folder / "hosp" / "labevents.csv").unlink()
    whole = (DEMO / "hosp" / "labevents.csv.gz").read_bytes()
    (folder / "hosp" / "labevents.csv.gz").write_bytes(whole[: len(whole) // 2])


BAD = {
    "no folder": (lambda f: f.rename(f.parent / "gone"), ["--mimic_dir .*: no such folder"]),
    "no icu": (lambda f: (f / "icu").rename(f / "uci"), ["the table icu/icustays .* is missing"]),
    "columns of MIMIC-III": (
        edit("hosp/labevents", lambda t: "ROW_ID," + t.replace("itemid", "ITEMID", 1)),
        ["labevents.csv: no column itemid", "MIMIC-IV 2.x and 3.x"],
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


def refusal(folder):
    with pytest.raises(InputError) as caught:
        extracted(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


@pytest.fixture
def folder(tmp_path):
    return Mini().admit(1).settling(1).admit(2).settling(2).write(tmp_path / "mimic")


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_in_one_line(name, folder):
    spoil, expected = BAD[name]
    spoil(folder)
    text = refusal(folder)
    for pattern in expected:
        assert re.search(pattern, text), text


def test_every_table_and_every_required_column_is_needed(folder):
    for name, columns in COLUMNS.items():
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


def test_bad_parquet_is_refused_in_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    folder = Mini().admit(1).settling(1).write(tmp_path, ".parquet")
    path = folder / "hosp" / "labevents.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "labevents.parquet: damaged" in refusal(folder)


def test_a_gzip_that_is_whole_reads_as_the_text_in_it(folder):
    plain = extracted(folder)
    path = folder / "hosp" / "labevents.csv"
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert extracted(folder).csv == plain.csv


def test_a_terminal_shows_how_far_the_reading_is(folder, capsys, monkeypatch):
    extracted(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    extracted(folder)
    assert "reading labevents.csv: " in capsys.readouterr().err
