"""What every reader of tables reads, and what every reader refuses by name."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
import srtr_dataset

DATA = Path(__file__).parent / "data"


def dka(folder):
    path = folder / "data.csv"
    rows = [f'"24 (0h) -> {k} (2h)",{k % 2},"text, {k}"\n' for k in range(40)]
    header = "clinical_trajectory,label_escalation,clinical_context\n"
    path.write_text(header + "".join(rows), newline="")
    return path, dataset_format.main, ["check", str(path)]


def srtr(folder):
    for name in ("cand_liin", "stathist_liin"):
        table = pd.read_sas(DATA / "srtr_saf" / f"{name}.sas7bdat", encoding="latin-1")
        table.to_csv(folder / f"{name}.csv", index=False)
    path = folder / "cand_liin.csv"
    words = ["check", "--data_dir", str(folder), "--organ", "liver"]
    return path, srtr_dataset.main, words


def unpacked(path):
    """Unpack a file of the demo, so that its text can be altered."""
    target = path.with_suffix("")
    target.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return target


def mimic(folder):
    shutil.copytree(DATA / "mimic_iv_demo", folder / "tables")
    words = ["from_mimic", "--mimic_dir", str(folder / "tables"), "--cohort", "all"]
    path = unpacked(folder / "tables" / "hosp" / "labevents.csv.gz")
    return path, dataset_format.main, [*words, "--out", str(folder / "out.csv")]


def eicu(folder):
    shutil.copytree(DATA / "eicu_demo", folder / "tables")
    words = ["from_eicu", "--eicu_dir", str(folder / "tables"), "--cohort", "all"]
    path = unpacked(folder / "tables" / "lab.csv.gz")
    return path, dataset_format.main, [*words, "--out", str(folder / "out.csv")]


def long_table(folder):
    rng = np.random.default_rng(0)
    hours = pd.to_timedelta(np.arange(200) % 10, unit="h") + pd.Timestamp("2150-01-01")
    table = pd.DataFrame({"subject_id": np.arange(200) // 10, "charttime": hours})
    table["item"], table["value"] = "gap, serum", rng.integers(5, 40, 200)
    labels = pd.DataFrame({"subject_id": range(20), "prediction_time": "2150-01-01 09:00:00"})
    labels["label"] = labels["subject_id"] % 2
    table.to_csv(folder / "table.csv", index=False)
    labels.to_csv(folder / "labels.csv", index=False)
    words = ["from_long", "--table", str(folder / "table.csv")]
    words += ["--labels", str(folder / "labels.csv"), "--series", "anion gap [mEq/L]=gap, serum"]
    return folder / "table.csv", dataset_format.main, [*words, "--out", str(folder / "out.csv")]


def middle(path, change):
    """Change the middle line of a file."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = change(lines[len(lines) // 2])
    path.write_bytes(b"".join(lines))


def one_field_too_many(path):
    middle(path, lambda line: line.rstrip(b"\r\n") + b",4\n")


def one_field_too_few(path):
    middle(path, lambda line: line.rstrip(b"\r\n").rpartition(b",")[0] + b"\n")


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


READERS = [dka, srtr, mimic, eicu, long_table]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "damage",
    [
        one_field_too_many,
        one_field_too_few,
        cut_within_the_last_row,
        field_too_many_in_front,
        unclosed_quote,
        cut_gzip,
    ],
)
def test_every_reader_refuses_a_damaged_table_by_name(reader, damage, tmp_path, capsys):
    path, main, words = reader(tmp_path)
    damage(path)
    packed = path.with_name(f"{path.name}.gz")
    words = [word.replace(str(path), str(packed)) if packed.exists() else word for word in words]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert path.name in line
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", [mark_in_front, no_last_break, windows_breaks, gzipped])
def test_every_reader_reads_a_table_in_any_common_form(reader, form, tmp_path):
    path, main, words = reader(tmp_path)
    assert main(words) == 0
    plain = (tmp_path / "out.csv").read_text() if "--out" in words else None
    form(path)
    packed = path.with_name(f"{path.name}.gz")
    words = [word.replace(str(path), str(packed)) if packed.exists() else word for word in words]
    assert main(words) == 0
    if plain:
        assert (tmp_path / "out.csv").read_text() == plain


@pytest.mark.parametrize(
    ("reader", "name", "column"),
    [
        (mimic, "hosp/admissions", "hadm_id"),
        (mimic, "hosp/patients", "subject_id"),
        (eicu, "patient", "patientunitstayid"),
    ],
)
def test_a_row_that_stands_twice_makes_no_second_trajectory(reader, name, column, tmp_path, capsys):
    _, main, words = reader(tmp_path)
    path = unpacked(tmp_path / "tables" / f"{name}.csv.gz")
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])
    assert main(words) == 2
    assert f"{path}, column {column}: " in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
