"""What a user types, and everything that can be wrong: one line, an exit code, nothing left."""

import errno
import logging
import os
import re
import ssl

import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import whole_reports
from medgemma_clinical.commands import run_log
from medgemma_clinical.commands.command_line import run_command
from medgemma_clinical.commands.logs import LOG_MARK, RUN_LOG, command_logging
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.training.signals import SIGNALS
from medgemma_clinical.training.state import describe_epochs
from predicting import refused


@pytest.fixture
def data(dka_file, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(dka_file.read_bytes())
    return path


def words_for(data, log="none"):
    words = f"--trajectory_only --trajectory_epochs 1 --output_dir {data.parent / 'run'}"
    return [*words.split(), "--data_path", str(data), "--log_file", str(log)]


CELL = "Jane Doe 77.123456"
"""Of a patient, in the text of an exception."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError(f"CUDA out of memory {CELL}"), "ValueError in test_command_line.py"),
        (KeyError(CELL), "KeyError in test_command_line.py"),
        (OSError(CELL), "OSError in test_command_line.py"),
        (RuntimeError(CELL), "RuntimeError in test_command_line.py"),
        (RecursionError(CELL), "RecursionError in test_command_line.py"),
        (OSError(errno.ENOSPC, CELL, "run.json"), "run.json: No space left on device"),
        (MemoryError(CELL), "free memory"),
        (torch.OutOfMemoryError(CELL), "free memory"),
        *(
            (RuntimeError(f"{text} {CELL}"), "free memory")
            for text in (
                "CUBLAS_STATUS_ALLOC_FAILED",
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
                "CUDA driver error: out of memory",
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
            )
        ),
        (torch.AcceleratorError(f"CUDA error: out of memory {CELL}"), "free memory"),
        *(
            (torch.AcceleratorError(f"CUDA error: {text} {CELL}"), "AcceleratorError in test_")
            for text in (
                "an illegal memory access was encountered",
                "device-side assert triggered",
                "device not ready",
            )
        ),
        (RunFault("the loss is nan"), "the loss is nan"),
        (ConnectionResetError(CELL), "network"),
        (ssl.SSLError(CELL), "network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_fault_is_named_by_type_and_place_and_never_by_its_text(error, shown, capsys):
    def fail():
        raise error

    with command_logging():
        assert run_command(fail) == 3
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert shown in text
    assert "Jane" not in text
    with command_logging():
        assert run_command(fail, show_values=True) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("Query interrupted"), InputError("damaged")])
def test_what_a_library_makes_of_a_signal_is_no_fault(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(SIGNALS, "received", 15)
    with command_logging():
        assert run_command(fail) == 143
    assert not capsys.readouterr().err


def test_a_full_disk_is_one_line_and_code_3(data, monkeypatch, capsys):
    def full(folder, history):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(run_log, "write_history", full)
    assert refused(capsys, words_for(data), "No space left on device", code=3)


# --------------------------------------------------------------------------- the log


def test_no_text_steers_a_terminal_and_logging_of_a_caller_comes_back(tmp_path, capsys):
    root = logging.root
    before = root.handlers, root.level, logging.raiseExceptions
    with command_logging():
        logging.info("a \x1b[31mred\x1b]0;title\x07 \u202e\r 63\N{NO-BREAK SPACE}%%\nnext")
        RUN_LOG.open(tmp_path / "own.log")
        logging.debug("a detail of a library")
        logging.error("last \x1b[0m")
    assert (root.handlers, root.level, logging.raiseExceptions) == before
    console, written = capsys.readouterr(), (tmp_path / "own.log").read_text()
    assert re.fullmatch(r"a \\x1b\[31mred.* 63 %+\nnext\n", console.out)
    assert console.err == "error: last \\x1b[0m\n"
    assert written.startswith(LOG_MARK)
    assert "library" not in written
    for text in (console.out, written):
        assert text.replace("\n", "").isprintable()
        assert "63 %%\nnext\n" in text
    assert written.endswith("last \\x1b[0m\n")


@pytest.mark.slow
def test_a_log_of_ones_own_is_for_its_owner_alone_and_the_next_run_appends(data, tmp_path):
    log = tmp_path / "own.log"
    for runs in (1, 2):
        assert trainer.main(words_for(data, log)) == 0
        assert log.read_text().count(LOG_MARK) == 1
        assert log.read_text().count("epoch 1/1") == runs
    assert log.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("run/trajectory*/*.log"))


@pytest.mark.slow
def test_the_console_shows_six_epochs_and_the_last_and_the_log_each_of_them(data, tmp_path, capsys):
    words = words_for(data, log := tmp_path / "own.log")
    assert trainer.main([*words, "--trajectory_epochs", "13", "--patience", "13"]) == 0
    history = pd.read_json(tmp_path / "run" / "trajectory" / "history.jsonl", lines=True)
    averaged = history["averaged_epochs"].map(describe_epochs)
    console = capsys.readouterr().out
    for text, shown in ((console, range(3, 14, 3)), (log.read_text(), range(1, 14))):
        ends = [(f"{k}", averaged[k - 1]) for k in [*shown, *{13} - {*shown}]]
        assert re.findall(r"epoch (\d+)/13: .*, averaged: (.*)", text)[:-1] == ends[:-1]
    assert len(console.splitlines()) <= 40


@pytest.mark.slow
def test_a_file_name_that_is_no_text_ends_no_run(data, tmp_path):
    """Names in Latin-1, as an old archive unpacks them; the report comes after all epochs."""
    data = data.rename(tmp_path / os.fsdecode(b"Caf\xe9.csv"))
    with whole_reports():
        assert trainer.main(words_for(data, "auto")) == 0
    folder = tmp_path / "run" / "trajectory"
    assert "Caf\\udce9.csv" in (folder / "report.html").read_text(encoding="utf-8")
    assert "Caf\\udce9" in next(folder.glob("*.log")).read_text(encoding="utf-8")
    assert next(folder.glob("*.log")).stat().st_mode & 0o777 == 0o600
