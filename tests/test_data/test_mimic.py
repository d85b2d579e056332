"""MIMIC-IV's tables: damaged, incomplete or foreign ones are refused in one line."""

import pytest

from medgemma_clinical.data.mimic import COLUMNS
from medgemma_clinical.files import InputError
from mimic_files import Mini, extracted, moment

SECRET = "98765"  # stands in a spoiled cell; no message may repeat it
LABS, ADMISSIONS, PATIENTS = "hosp/labevents", "hosp/admissions", "hosp/patients"


def refused(folder, *named):
    with pytest.raises(InputError) as caught:
        extracted(folder)
    problem = str(caught.value)
    return all(text in problem for text in named) and "\n" not in problem and SECRET not in problem


@pytest.fixture
def folder(tmp_path):
    return Mini().admit(1).settling(1).admit(2).settling(2).write(tmp_path / "mimic")


@pytest.mark.parametrize(
    ("table", "change", "named"),
    [
        (ADMISSIONS, lambda text: text.split("\n")[0] + "\n", "0 candidates"),
        (LABS, lambda text: text.split("\n")[0] + "\n", "2 candidates"),
        (
            LABS,
            lambda text: text.replace(moment(4), f"{SECRET}th", 1),
            "labevents.csv, column chart",
        ),
        (PATIENTS, lambda text: text.replace(",50\n", ",7\n"), "none is left: 2 out"),
    ],
    ids=["a header alone", "no values", "a word for a time", "no adult"],
)
def test_bad_tables_are_refused_in_one_line(table, change, named, folder):
    path = folder / f"{table}.csv"
    path.write_text(change(path.read_text()))
    assert refused(folder, named)


def test_every_table_in_one_form_and_every_required_column_is_needed(folder):
    for name, columns in COLUMNS.items():
        path = folder / f"{name}.csv"
        content = path.read_text()
        path.unlink()
        assert refused(folder, f"{name} (.csv")
        for column in columns:
            path.write_text(content.replace(column, f"no_{column}", 1))
            if columns[column].optional:
                extracted(folder)
            else:
                assert refused(folder, f"{name}.csv: no column {column}")
        path.write_text(content)
    (folder / "hosp" / "patients.csv.gz").write_bytes(b"")
    assert refused(folder, "--mimic_dir ", "hosp/patients", "2 times")
    assert refused(folder / "gone", "--mimic_dir ")
