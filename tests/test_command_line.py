"""What a user types, and everything that can be wrong: one line, an exit code, nothing left."""

import errno
import logging
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from medgemma_clinical.commands import run_folder
from medgemma_clinical.commands.command_line import run_command
from medgemma_clinical.commands.logs import LOG_MARK, RUN_LOG, command_logging
from medgemma_clinical.files import RunFault
from predicting import refused

ROOT = Path(trainer.__file__).parent


@pytest.fixture
def data(dka_file, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(dka_file.read_bytes())
    return path


def words_for(data, log="none"):
    words = f"--trajectory_only --trajectory_epochs 1 --output_dir {data.parent / 'run'}"
    return [*words.split(), "--data_path", str(data), "--log_file", str(log)]


@pytest.mark.parametrize(
    "words",
    [
        *("--epochs 0", "--batch_size 1.5", "--time_scale 0", "--time_scale inf", "--encoder_lr 0"),
        *("--lora_dropout 1", "--seed 5000000000", "--epochs " + "9" * 400, "--dataset mimic"),
        *("--solver euler", "--precision fp16", "--export gguf", "--quantization int8"),
        *("--traj", "--no_such_flag"),  # abbreviations are not accepted
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(words.split())
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert words.split()[0] in error


NEW = "--predict --checkpoint x --predictions y.csv --data_path z.csv"
LANGUAGE_MODEL = (
    *("--lora_rank 4", "--quantization none", "--mode generative", "--soft_prompt off"),
    *("--ode_checkpoint x.pt", "--stage1_logit off", "--model_name tiny", "--epochs 2"),
)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--seeds 2 --demo", "--seeds --demo"),
        ("--ablation --seeds 2 --dry_run", "--dry_run --ablation --seeds"),
        *((f"{way} --resume", f"{way} --resume") for way in ("--demo", "--predict", "--dry_run")),
        ("--compare a b --model_name c", "--compare --model_name"),
        ("--demo --model_name=foo --epochs 1", "--demo --epochs --model_name"),
        (f"{NEW} --solver rk4", "--predict --solver"),
        (f"{NEW} --patients 1", "--explain --patients"),
        ("--predict", "--checkpoint"),
        ("--predict --checkpoint x --data_dir y", "--predictions"),
        ("--predict --checkpoint x --predictions y", "--data_path --data_dir"),
        ("--open", "--demo --open"),
        ("--strict", "--predict --strict"),
        ("--explain", "--predict --explain"),
        ("--checkpoint x", "--predict --export --checkpoint"),
        ("--export merged --checkpoint x", "--export_dir"),
        ("--export=merged --checkpoint x --export_dir y --data_path z", "--export --data_path"),
        ("--export_dir x", "--export --export_dir"),
        ("--ablation --mode generative", "--ablation --mode"),
        ("--ablation --seeds 2 --freeze_ode", "--ablation --freeze_ode"),
        ("--ablation --series_text none", "--ablation --series_text"),
        ("--seeds 2 --ode_checkpoint stage1.pt", "{seed}"),
        *((f"--trajectory_only {flag}", flag.split()[0]) for flag in LANGUAGE_MODEL),
        ("--soft_prompt off --members 2", "--ode_checkpoint --members"),
        ("--stage1_logit off", "--stage1_logit --ode_checkpoint"),
        ("--soft_prompt shuffled", "--soft_prompt --ode_checkpoint"),
        ("--soft_prompt off --stage1_logit off --ode_checkpoint x", "--soft_prompt --stage1_logit"),
        ("--model_name tiny --quantization nf4", "--quantization"),
        ("--arms text", "--ablation --arms"),
        (f"--trajectory_only --data_dir X --data_path {__file__}", "--data_dir"),
        (f"--trajectory_only --dataset srtr --data_path X --data_dir {ROOT}", "--data_path"),
        ("--trajectory_only", "dka_training_data.csv --data_path"),
        ("--trajectory_only --log_file missing/own.log", "--log_file"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, words.split(), *named.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "variables", "named"),
    [
        ("--trajectory_only --data_path {no_csv}", {}, "no.csv"),
        ("--data_path {data}", {}, "--model_name"),  # the gated model, without network
        ("--data_path {data}", {"HF_HUB_OFFLINE": "0"}, "--model_name"),  # a hub without answer
    ],
)
def test_a_real_process_ends_in_one_line(flags, variables, named, data, tmp_path):
    (tmp_path / "no.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    program = "import sys, time, medgemma_trainer; time.sleep = lambda _: None; "  # no waiting
    program += "sys.exit(medgemma_trainer.main())"
    words = flags.format(data=data, no_csv=tmp_path / "no.csv").split()
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    environment = {**os.environ, **dead, **variables, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert named in result.stderr
    assert "127.0.0.1" not in result.stdout
    assert not list(tmp_path.glob("checkpoints*"))


def test_libraries_send_nothing_about_the_user(tmp_path):
    program = (
        "import os, medgemma_trainer, huggingface_hub.constants as hub; "
        "medgemma_trainer.main(['--open']); "
        "print(hub.HF_HUB_DISABLE_TELEMETRY, os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    clean = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k and k != "DO_NOT_TRACK"}
    command, options = [sys.executable, "-c", program], {"capture_output": True, "text": True}
    result = subprocess.run(command, env={**clean, "PYTHONPATH": str(ROOT)}, **options)
    assert result.stdout.split() == ["True", "1"]


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
        (MemoryError(CELL), "--batch_size"),
        (torch.OutOfMemoryError(CELL), "--batch_size"),
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


def test_a_full_disk_is_one_line_and_code_3(data, monkeypatch, capsys):
    def full(folder, history):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(run_folder, "write_history", full)
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


@pytest.mark.parametrize("kind", ["the data", "an empty file", "a pipe", "a folder", "a device"])
def test_a_log_goes_into_nothing_but_a_log(kind, data, tmp_path, capsys):
    log = {"the data": data, "a device": Path(os.devnull)}.get(kind, tmp_path / "own.log")
    make = {"an empty file": Path.touch, "a pipe": os.mkfifo, "a folder": Path.mkdir}
    make.get(kind, lambda _: None)(log)
    before, content = sorted(tmp_path.iterdir()), data.read_bytes()
    assert refused(capsys, words_for(data, log), "--log_file", log)
    assert (sorted(tmp_path.iterdir()), data.read_bytes()) == (before, content)


def test_a_log_of_ones_own_is_for_its_owner_alone_and_the_next_run_appends(data, tmp_path):
    log = tmp_path / "own.log"
    for runs in (1, 2):
        assert trainer.main(words_for(data, log)) == 0
        assert log.read_text().count(LOG_MARK) == 1
        assert log.read_text().count("epoch 1/1") == runs
    assert log.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("run/trajectory*/*.log"))


def test_the_console_shows_six_epochs_and_the_last_and_the_log_each_of_them(data, tmp_path, capsys):
    words = words_for(data, log := tmp_path / "own.log")
    assert trainer.main([*words, "--trajectory_epochs", "13", "--patience", "13"]) == 0
    history = pd.read_json(tmp_path / "run" / "trajectory" / "history.jsonl", lines=True)
    best = history["epoch"].where(history["improved"]).ffill().astype(int)
    console = capsys.readouterr().out
    for text, shown in ((console, range(3, 14, 3)), (log.read_text(), range(1, 14))):
        shown = [(k, best[k - 1]) for k in [*shown, *{13} - {*shown}]]
        ends = [(f"{k}", "best so far" if k == b else f"best epoch {b}") for k, b in shown]
        assert re.findall(r"epoch (\d+)/13: .*, (best .*)", text) == ends
    assert len(console.splitlines()) <= 40


def test_a_file_name_that_is_no_text_ends_no_run(data, tmp_path):
    """Names in Latin-1, as an old archive unpacks them; the report comes after all epochs."""
    data = data.rename(tmp_path / os.fsdecode(b"Caf\xe9.csv"))
    assert trainer.main(words_for(data, "auto")) == 0
    folder = tmp_path / "run" / "trajectory"
    assert "Caf\\udce9.csv" in (folder / "report.html").read_text(encoding="utf-8")
    assert "Caf\\udce9" in next(folder.glob("*.log")).read_text(encoding="utf-8")
    assert next(folder.glob("*.log")).stat().st_mode & 0o777 == 0o600


def test_a_path_that_cannot_be_written_is_named(data, tmp_path, capsys):
    (tmp_path / "run").write_text("in the way")
    assert refused(capsys, words_for(data), "--output_dir")
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    assert refused(capsys, words_for(pipe), pipe)
