"""MIMIC-IV's tables: damaged, incomplete or foreign ones are refused in one line."""

import re

import pytest

from medgemma_clinical.data.mimic import COLUMNS
from medgemma_clinical.files import InputError
from mimic_files import Mini, extracted, moment

SECRET = "98765"
"""Stands in a spoiled cell; no message may repeat the content of a patient's cell."""

LABS, ADMISSIONS, PATIENTS = "hosp/labevents", "hosp/admissions", "hosp/patients"
BAD = {  # table, change of its text, what the message names
    "columns of MIMIC-III": (LABS, ("itemid", "ITEMID"), "labevents.csv: no column itemid"),
    "a header alone": (ADMISSIONS, lambda text: text.split("\n")[0] + "\n", "0 candidates none"),
    "no values": (LABS, lambda text: text.split("\n")[0] + "\n", "2 candidates none is left"),
    "a word for a time": (LABS, (moment(4), f"{SECRET}th"), "labevents.csv, column charttime: 1"),
    "no adult": (PATIENTS, lambda text: text.replace(",50\n", ",7\n"), "none is left: 2 out"),
}


def refusal(folder):
    with pytest.raises(InputError) as caught:
        extracted(folder)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return Mini().admit(1).settling(1).admit(2).settling(2).write(tmp_path / "mimic")


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_in_one_line(name, folder):
    table, change, expected = BAD[name]
    path = folder / f"{table}.csv"
    text = path.read_text()
    path.write_text(change(text) if callable(change) else text.replace(*change, 1))
    assert path.read_text() != text
    assert expected in refusal(folder)


def test_a_table_is_found_in_one_form(folder):
    (folder / "hosp" / "patients.csv.gz").write_bytes(b"")
    assert re.search("--mimic_dir .*: the table hosp/patients .* 2 times", refusal(folder))
    folder.rename(folder.with_name("gone"))
    assert "no such folder" in refusal(folder)


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
