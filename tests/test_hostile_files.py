"""Files made to harm: bombs, forged names, deep JSON, faults that hold a cell, signals."""

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet

import dataset_format
import srtr_dataset
from medgemma_clinical.commands.prediction_files import auroc_of
from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.data.importers import output, tables
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoints import CONFIG, read_config
from mimic_files import DEMO

ROOT = Path(dataset_format.__file__).parent
HEADER = b"clinical_trajectory,label_escalation\n"
ROWS = b"".join(b'"24 (0h) -> %d (2h)",%d\n' % (k, k % 2) for k in range(40))
SECRET = "98765"
"""Stands in a patient's cell; no message may repeat it."""

DEEP = "[" * 100_000


# --------------------------------------------------------------------------- names


def test_names_of_columns_forge_no_line(tmp_path, capsys):
    path = tmp_path / "data.csv"
    others = f'a\x1b]0;owned\x07,"x\nerror: forged",{"b" * 10**6}'
    path.write_bytes(f"{others},".encode() + HEADER + b",,,".join([b"", *ROWS.splitlines(True)]))
    assert dataset_format.main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "columns not read: a\\x1b]0;owned\\x07, x\\nerror: forged, bbb" in shown
    assert "\x1b" not in shown
    assert len(shown) < 3_000


# --------------------------------------------------------------------------- sizes


def test_a_small_parquet_file_of_endless_text_is_refused_before_it_is_read(tmp_path, capsys):
    path = tmp_path / "data.parquet"
    rows = 6_000_000  # 12 GB, of which the file holds one text
    text = pyarrow.array(["24 (0h) -> 20 (2h)" + " " * 2000])
    series = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), text)
    columns = {"clinical_trajectory": series, "label_escalation": np.zeros(rows, np.int8)}
    parquet.write_table(pyarrow.table(columns), path)
    assert dataset_format.main(["check", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_an_excel_file_that_unpacks_to_more_is_refused(tmp_path, monkeypatch):
    whole, path = tmp_path / "whole.xlsx", tmp_path / "labs.xlsx"
    pd.DataFrame({"a": ["1"]}).to_excel(whole, index=False)
    with zipfile.ZipFile(whole) as book, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in book.namelist():
            text = book.read(name)
            if name.endswith("sheet1.xml"):
                text = text.replace(b"</sheetData>", b"<row/>" * 10**5 + b"</sheetData>")
            out.writestr(name, text)
    monkeypatch.setattr(tables, "MAX_UNPACKED", 10**5)
    tables.read_sheet(tables.TableFile(whole, [], ""), "")
    with pytest.raises(InputError, match=re.escape(str(path))):
        tables.read_sheet(tables.TableFile(path, [], ""), "")


# --------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (CONFIG, read_config),
        ("run.json", read_run),
        ("metrics.json", lambda folder: auroc_of(folder, "test")),
    ],
)
@pytest.mark.parametrize("content", [DEEP, '{"test": {}}'])
def test_a_deep_or_damaged_file_of_a_run_is_refused(content, name, read, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path)


# --------------------------------------------------------------------------- faults


def from_mimic(folder, out):
    return ["from_mimic", "--mimic_dir", str(folder), "--out", str(out), "--cohort", "all"]


def broken(*_, **__):
    raise ValueError(f"could not convert {SECRET}")


def out_of_memory(*_, **__):
    raise MemoryError(f"Unable to allocate {SECRET}")


CHECK = dataset_format.main, ["check", "data.csv"]
MIMIC = dataset_format.main, from_mimic(DEMO, "out.csv")
SRTR = srtr_dataset.main, ["check", "--data_dir", "data.csv"]


@pytest.mark.parametrize(
    ("module", "name", "command", "fault"),
    [
        (dataset_format, "MIMICtrajectoryDataset", CHECK, broken),
        (output, "apply_rules", MIMIC, out_of_memory),
        (output, "write_rows", MIMIC, broken),
        (srtr_dataset, "SRTRTrajectoryDataset", SRTR, out_of_memory),
    ],
)
def test_a_fault_that_holds_a_cell_shows_its_kind_alone(
    module, name, command, fault, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_bytes(HEADER + ROWS)
    monkeypatch.setattr(module, name, fault)
    main, words = command
    assert main(words) == 3
    output = capsys.readouterr()
    assert re.fullmatch(r"error: .+\n", output.err)
    kind = "ValueError in test_hostile_files.py, line " if fault is broken else "emory"
    assert kind in output.err
    assert not re.search(rf"{SECRET}|Traceback", output.out + output.err)
    assert {path.name for path in tmp_path.iterdir()} <= {"data.csv"}


# --------------------------------------------------------------------------- signals


SLOW = """
import pathlib, runpy, sys, time
import pandas
def to_csv(self, path, **_):
    pathlib.Path(path).write_text("id,half")
    time.sleep(60)
pandas.DataFrame.to_csv = to_csv
sys.argv = ["dataset_format.py", *sys.argv[1:]]
runpy.run_path("dataset_format.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("numbers", "ignored", "code"),
    [
        ([signal.SIGHUP], False, 129),
        ([signal.SIGHUP, signal.SIGTERM], True, 143),
    ],
    ids=["a closed terminal", "a scheduler after nohup"],
)
def test_a_signal_leaves_no_half_written_file(numbers, ignored, code, tmp_path):
    command = [sys.executable, "-c", SLOW, *from_mimic(DEMO, tmp_path / "out.csv")]
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.csv*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()), "the file is being written"
    for number in numbers:
        time.sleep(0.2)
        os.kill(child.pid, number)
    _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (code, "")
    assert not list(tmp_path.iterdir())
