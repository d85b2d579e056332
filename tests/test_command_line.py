"""What a user types, and everything that can be wrong: one line, an exit code, nothing left."""

import errno
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medgemma_trainer as trainer
from medgemma_clinical.commands import run_folder
from medgemma_clinical.commands.command_line import describe_fault, run_command
from medgemma_clinical.commands.logs import RUN_LOG, PlainFormatter, command_logging, start_logging
from medgemma_clinical.files import RunFault
from predicting import refused

ROOT = Path(trainer.__file__).parent
HEADER, GOOD = "clinical_trajectory,label_escalation\n", '"24 (0h) -> 20 (2h)",0\n' * 12


def test_the_fifteen_flags_of_the_card_keep_their_defaults():
    args = vars(trainer.build_parser().parse_args([]))
    expected = {
        **{"mode": "classification", "dataset": "dka", "organ": "kidney", "data_dir": None},
        **{"data_path": Path("dka_training_data.csv"), "max_samples": 10000, "epochs": 10},
        **{"batch_size": 16, "trajectory_only": False, "trajectory_epochs": 100, "patience": 10},
        **{"ode_checkpoint": None, "freeze_ode": False, "time_scale": None, "log_file": "auto"},
        **{"model_name": "google/medgemma-4b-pt", "seed": 0},
    }
    assert expected.items() <= args.items()
    assert trainer.DATASETS["dka"].time_scale == 72.0


@pytest.mark.parametrize(
    "words",
    [
        *("--epochs 0", "--batch_size 1.5", "--batch_size 0", "--time_scale 0", "--time_scale inf"),
        *("--encoder_lr 0", "--lora_dropout 1", "--seed 5000000000", "--epochs " + "9" * 400),
        *("--dataset mimic", "--solver rk5", "--solver euler", "--precision fp16"),
        *("--export gguf", "--attention flash_attention_2", "--quantization int8"),
        *("--traj", "--no_such_flag"),  # abbreviations are not accepted
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(words.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert words.split()[0] in error


NEW = "--predict --checkpoint x --predictions y.csv --data_path z.csv"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--seeds 2 --demo", "--seeds --demo"),
        ("--predict --ablation", "--predict --ablation"),
        ("--ablation --seeds 2 --dry_run", "--dry_run --ablation --seeds"),
        *((f"{way} --resume", f"{way} --resume") for way in ("--demo", "--predict", "--dry_run")),
        ("--compare a b --model_name c", "--compare --model_name"),
        ("--demo --model_name=foo --epochs 1", "--demo --epochs --model_name"),
        (f"{NEW} --solver rk4", "--predict --solver"),
        (f"{NEW} --patients 1", "--explain --patients"),
        ("--predict", "--checkpoint --predictions --data_path"),
        ("--predict --checkpoint x --data_dir y --output_dir z", "--predictions --output_dir"),
        ("--open", "--demo --open"),
        ("--strict", "--predict --strict"),
        ("--explain", "--predict --explain"),
        ("--checkpoint x", "--predict --export --checkpoint"),
        ("--export merged", "--checkpoint --export_dir"),
        ("--export merged --checkpoint x --precision bf16", "--export_dir --precision"),
        ("--export=merged --checkpoint x --export_dir y --data_path z", "--export --data_path"),
        ("--export_dir x", "--export --export_dir"),
        ("--export merged --predict", "--predict --export"),
        ("--ablation --mode generative", "--ablation --mode"),
        ("--ablation --seeds 2 --freeze_ode", "--ablation --freeze_ode"),
        ("--ablation --series_text none", "--ablation --series_text"),
        ("--seeds 2 --ode_checkpoint stage1.pt", "{seed}"),
        ("--trajectory_only --soft_prompt off", "--trajectory_only --soft_prompt"),
        ("--trajectory_only --ode_checkpoint x.pt", "--trajectory_only --ode_checkpoint"),
        ("--trajectory_only --stage1_logit off", "--trajectory_only --stage1_logit"),
        ("--trajectory_only --base_weights random", "--trajectory_only --base_weights"),
        ("--soft_prompt off --freeze_ode", "--ode_checkpoint --freeze_ode"),
        ("--soft_prompt off --stage1_logit off", "--ode_checkpoint --stage1_logit"),
        ("--stage1_logit off", "--stage1_logit --ode_checkpoint"),
        ("--soft_prompt shuffled", "--soft_prompt --ode_checkpoint"),
        ("--soft_prompt off --stage1_logit off --ode_checkpoint x", "--soft_prompt --stage1_logit"),
        ("--model_name tiny --quantization nf4", "--quantization"),
        ("--arms text", "--ablation --arms"),
        ("--reference text", "--ablation --reference"),
        ("--ablation --stage1_logit off", "--ablation --stage1_logit"),
        ("--ablation --base_weights random", "--ablation --base_weights"),
        (f"--trajectory_only --data_dir X --data_path {__file__}", "--data_dir"),
        (f"--trajectory_only --dataset srtr --data_path X --data_dir {ROOT}", "--data_path"),
        ("--trajectory_only", "dka_training_data.csv --data_path"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, words.split(), *named.split())
    assert not list(tmp_path.iterdir())


def test_help_is_grouped():
    text = trainer.build_parser().format_help()
    for group in ("what to do", "data", "training", "ODE-RNN", "language model", "output"):
        assert f"\n{group}:\n" in text
    assert "(default: None)" not in text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "bad.csv"),
        (f'{HEADER}{GOOD}"24 (0h) -> oops",1\n'.encode(), "bad.csv row 14 clinical_trajectory"),
        (f'{HEADER}{GOOD}"24 (0h)",2\n'.encode(), "bad.csv row 14 label_escalation"),
        (f"{HEADER}{GOOD}".encode(), "event"),
        (bytes(range(256)) * 8, "bad.csv"),
        (f"{HEADER}{GOOD}".replace(",", ";").encode(), "bad.csv ';'"),
    ],
)
def test_a_bad_file_ends_with_one_line_and_leaves_nothing(
    content, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_bytes(content)
    words = ["--trajectory_only", "--data_path", "bad.csv"]
    assert refused(capsys, words, *named.split())
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


def words_for(data, folder, *more):
    words = ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(data)]
    return [*words, "--output_dir", str(folder), *more]


def test_a_users_mistake_shows_no_traceback_in_a_real_process(tmp_path):
    (tmp_path / "dka_training_data.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    command = [sys.executable, str(ROOT / "medgemma_trainer.py"), "--trajectory_only"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr


def test_the_gated_model_offline_ends_in_one_line_that_says_what_to_do(dka_file, tmp_path, capsys):
    words = ["--data_path", str(dka_file), "--output_dir", str(tmp_path / "run")]
    assert refused(capsys, words, "--model_name google/medgemma-4b-pt", "tiny")
    assert not (tmp_path / "run").exists()


def test_without_network_the_gated_model_ends_in_one_line(dka_file, tmp_path):
    """A hub that does not answer: the libraries' retries and warnings stay away from the user."""
    program = "import sys, time, medgemma_trainer; time.sleep = lambda _: None; "  # no waiting
    program += "sys.exit(medgemma_trainer.main())"
    command = [sys.executable, "-c", program, "--data_path", str(dka_file)]
    dead = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **dead, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--model_name" in result.stderr
    assert "127.0.0.1" not in result.stdout
    assert not list(tmp_path.glob("checkpoints*"))


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(dka_file, tmp_path, capsys):
    log = ["--log_file", str(tmp_path / "missing" / "run.log")]
    assert refused(capsys, words_for(dka_file, tmp_path / "run", *log), "--log_file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    assert refused(capsys, words_for(dka_file, tmp_path / "file" / "run"), "--output_dir")


def test_a_log_file_of_ones_own_holds_the_run(dka_file, tmp_path):
    own = tmp_path / "own.log"
    assert trainer.main(words_for(dka_file, tmp_path / "run", "--log_file", str(own))) == 0
    assert "epoch 1/1" in own.read_text()
    assert not list((tmp_path / "run" / "trajectory").glob("*.log"))


def test_a_file_name_that_is_no_text_ends_no_run(dka_file, tmp_path):
    """Names in Latin-1, as an old archive unpacks them; the report comes after all epochs."""
    file, folder = (tmp_path / os.fsdecode(name) for name in (b"Caf\xe9.csv", b"Caf\xe9"))
    file.write_bytes(dka_file.read_bytes())
    assert trainer.main(words_for(file, folder)) == 0
    assert "Caf\\udce9.csv" in (folder / "trajectory" / "report.html").read_text(encoding="utf-8")
    assert "Caf\\udce9" in next((folder / "trajectory").glob("*.log")).read_text(encoding="utf-8")


def test_a_full_disk_is_one_line_and_code_3(dka_file, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_text", full)
    words = words_for(dka_file, tmp_path / "run", "--log_file", "none")
    assert refused(capsys, words, "history.jsonl", "No space left on device", code=3)


CELL = "Jane Doe 77.123456"
"""Of a patient, in the text of an exception."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError(f"CUDA {CELL}"), "ValueError in test_command_line.py, "),
        (KeyError(f"out of memory {CELL}"), "KeyError in "),
        (OSError(f"no space left: {CELL}"), "OSError in "),
        (OSError(errno.EIO, CELL, "run.json"), "run.json: Input/output error"),
        (OSError(errno.ENOSPC, CELL, "run.json"), "run.json: No space left on device"),
        (OSError(errno.ENOMEM, CELL), "memory"),
        (MemoryError(CELL), "memory"),
        (torch.OutOfMemoryError(f"CUDA out of memory {CELL}"), "--batch_size"),
        (RuntimeError(f"DefaultCPUAllocator: can't allocate memory {CELL}"), "--batch_size"),
        (torch.AcceleratorError(f"device-side assert {CELL}"), "nvidia-smi"),
        (RuntimeError(f"CUDA error: an illegal access {CELL}"), "nvidia-smi"),
        (RuntimeError(f"shapes {CELL}"), "RuntimeError in "),
        (RecursionError(CELL), "RecursionError in "),
        (RunFault("the loss is nan"), "the loss is nan"),
        (ConnectionResetError(CELL), "network"),
        (TimeoutError(CELL), "network"),
        (socket.gaierror(-2, CELL), "network"),
        (OSError(errno.ENETUNREACH, CELL), "network"),
        (ssl.SSLError(CELL), "network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_fault_is_named_by_type_and_place_and_never_by_its_text(error, shown, capsys):
    def fail():
        raise error

    start_logging()
    assert run_command(fail) == 3
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert shown in text
    assert "Jane" not in text
    known = trainer.build_parser().format_help()
    assert all(flag in known for flag in re.findall(r"--\w+", describe_fault(error)))


def test_no_text_steers_a_terminal_or_names_a_folder_in_the_log(tmp_path, capsys):
    start_logging()
    logger = logging.getLogger("any")
    logger.info(
        "series \x1b[31mred\x1b]0;title\x07 \u202e\r in /home/Jane Doe/a b/data.csv: 1/2\nnext"
    )
    logger.error("--data_path (/home/jane/x.csv), /srv/jane/y.csv; https://huggingface.co/google/m")
    RUN_LOG.open(tmp_path / "own.log")
    RUN_LOG.begin()
    console = capsys.readouterr()
    written = (tmp_path / "own.log").read_text()
    for text in (console.out, console.err, written):
        assert text.replace("\n", "").isprintable()
    assert "\\x1b[31mred" in console.out
    assert "in /home/Jane Doe/a b/data.csv: 1/2\nnext" in console.out
    assert "in data.csv: 1/2\nnext" in written
    assert "--data_path (x.csv), y.csv; https://huggingface.co/google/m" in written
    assert "ane" not in written


def test_libraries_send_nothing_about_the_user(tmp_path):
    program = (
        "import os, medgemma_trainer, huggingface_hub.constants as hub; "
        "medgemma_trainer.main(['--open']); "
        "print(hub.HF_HUB_DISABLE_TELEMETRY, os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    clean = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k and k != "DO_NOT_TRACK"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**clean, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.split() == ["True", "1"]


def test_a_no_break_space_stays_a_space_and_a_path_one_line():
    text = "63\N{NO-BREAK SPACE}%% of %s"
    record = logging.LogRecord("x", logging.INFO, "x", 1, text, (Path("a\nerror: b"),), None)
    assert PlainFormatter().format(record) == "63 % of a\\nerror: b"


def test_logging_of_a_caller_comes_back_after_a_command():
    root = logging.root
    before = root.handlers[:], root.level, logging.raiseExceptions
    with command_logging():
        assert RUN_LOG in root.handlers
    assert (root.handlers[:], root.level, logging.raiseExceptions) == before
