"""What every reader of tables reads, and what every reader refuses by name."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
import srtr_dataset
from mimic_files import Mini, write_tables
from srtr_files import filler, write_folder

DATA = Path(__file__).parent / "data"
OUT = ["--out", "FOLDER/out.csv"]

# Each writes tables to a folder and returns the one to be changed, and a command on them.


def dka(folder):
    rows = [f'"24 (0h) -> {k} (2h)",{k % 2},"text, {k}"\n' for k in range(40)]
    header = "clinical_trajectory,label_escalation,clinical_context\n"
    (folder / "data.csv").write_text(header + "".join(rows), newline="")
    return "data.csv", dataset_format.main, ["check", "FOLDER/data.csv"]


def srtr(folder):
    write_folder(folder, *filler())
    words = ["check", "--data_dir", "FOLDER", "--organ", "liver"]
    return "cand_liin.csv", srtr_dataset.main, words


def mimic(folder):
    mini = Mini()
    for hadm in range(9):
        mini.admit(hadm).settling(hadm)
    for row in mini.rows["hosp/labevents"]:
        row["comments"] = ""  # a text in quotes could be cut to another
    mini.write(folder)
    words = ["from_mimic", "--mimic_dir", "FOLDER", "--cohort", "all", "--compute_gap", "reported"]
    return "hosp/labevents.csv", dataset_format.main, words + OUT


def eicu(folder):
    tables = {
        name: pd.read_csv(DATA / "eicu_demo" / f"{name}.csv.gz", dtype=str, keep_default_na=False)
        for name in ("patient", "admissionDx", "lab")
    }
    kept = tables["patient"]["patientunitstayid"].iloc[:40]
    own = {name: table[table["patientunitstayid"].isin(kept)] for name, table in tables.items()}
    write_tables(folder, own)
    words = ["from_eicu", "--eicu_dir", "FOLDER", "--cohort", "all", "--min_observations", "1"]
    return "lab.csv", dataset_format.main, words + OUT


def long_table(folder):
    rng = np.random.default_rng(0)
    hours = pd.to_timedelta(np.arange(200) % 10, unit="h") + pd.Timestamp("2150-01-01")
    table = pd.DataFrame({"subject_id": np.arange(200) // 10, "charttime": hours})
    table["item"], table["value"] = "gap, serum", rng.integers(5, 40, 200)
    labels = pd.DataFrame({"subject_id": range(20), "prediction_time": "2150-01-01 09:00:00"})
    labels["label"] = labels["subject_id"] % 2
    table.to_csv(folder / "table.csv", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    words = ["from_long", "--table", "FOLDER/table.csv", "--labels", "FOLDER/labels.csv"]
    return "table.csv", dataset_format.main, [*words, "--series", "gap [mEq/L]=gap, serum", *OUT]


@pytest.fixture(scope="module", params=[dka, srtr, mimic, eicu, long_table])
def tables(request, tmp_path_factory):
    """The tables of a reader, its command, and what it writes of them."""
    folder = tmp_path_factory.mktemp("tables")
    name, main, words = request.param(folder)
    written = shutil.copytree(folder, tmp_path_factory.mktemp("out"), dirs_exist_ok=True)
    assert main([word.replace("FOLDER", str(written)) for word in words]) == 0
    out = written / "out.csv"
    return folder, name, main, words, out.read_text() if out.exists() else None


@pytest.fixture
def changed(tables, tmp_path):
    """Change the table, in a copy; return its name, the exit code and what is written."""
    folder, name, main, words, plain = tables

    def change_and_read(change, table=name):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / table
        change(path)
        packed = "" if path.exists() else ".gz"
        own = [w.replace(f"FOLDER/{table}", f"FOLDER/{table}{packed}") for w in words]
        code = main([word.replace("FOLDER", str(tmp_path)) for word in own])
        out = tmp_path / "out.csv"
        return f"{path}{packed}", code, out.read_text() if out.exists() else None, plain

    return change_and_read


def middle(path, change):
    """Change the middle line of a file."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = change(lines[len(lines) // 2])
    path.write_bytes(b"".join(lines))


def one_field_too_many(path):
    middle(path, lambda line: line.rstrip(b"\r\n") + b",4\n")


def cut_within_the_last_row(path):
    path.write_bytes(path.read_bytes().rstrip(b"\r\n").rpartition(b",")[0][:-1])


def field_too_many_in_front(path):
    middle(path, lambda line: b"4," + line)


def unclosed_quote(path):
    middle(path, lambda line: b'"' + line)


def cut_gzip(path):
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0)[:-200])
    path.unlink()


def mark_in_front(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def no_last_break(path):
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))


def windows_breaks(path):
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


def gzipped(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


DAMAGES = [one_field_too_many, cut_within_the_last_row, field_too_many_in_front, cut_gzip]


@pytest.mark.parametrize("damage", [*DAMAGES, unclosed_quote])
def test_every_reader_refuses_a_damaged_table_by_name(damage, changed, capsys):
    path, code, written, _ = changed(damage)
    assert (code, written) == (2, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")


@pytest.mark.parametrize("form", [mark_in_front, no_last_break, windows_breaks, gzipped])
def test_every_reader_reads_a_table_in_any_common_form(form, changed):
    _, code, written, plain = changed(form)
    assert (code, written) == (0, plain)


def row_twice(path):
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])


def test_a_row_that_stands_twice_makes_no_second_trajectory(tables, changed, capsys):
    keys = {"hosp/admissions.csv": "hadm_id", "hosp/patients.csv": "subject_id"}
    keys |= {"patient.csv": "patientunitstayid"}
    for name, column in keys.items():
        if (tables[0] / name).exists():
            path, code, written, _ = changed(row_twice, name)
            assert (code, written) == (2, None)
            assert f"{path}, column {column}: " in capsys.readouterr().err
