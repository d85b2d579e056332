"""What a user types: flags, their table in the README, and everything that can be wrong."""

import errno
import logging
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medgemma_trainer as trainer
from medgemma_clinical.commands.command_line import describe_fault, run_command
from medgemma_clinical.commands.logs import RUN_LOG, PlainFormatter, command_logging, start_logging
from medgemma_clinical.files import RunFault
from medgemma_clinical.training import train_state

ROOT = Path(trainer.__file__).parent
GOOD = '"24 (0h) -> 20 (2h)",{label}\n'
HEADER = "clinical_trajectory,label_escalation\n"


def test_the_fifteen_flags_of_the_card_keep_their_defaults() -> None:
    args = trainer.build_parser().parse_args([])
    assert args.mode == "classification"
    assert args.dataset == "dka"
    assert args.organ == "kidney"
    assert args.data_path == Path("dka_training_data.csv")
    assert args.data_dir is None
    assert (args.max_samples, args.epochs, args.batch_size) == (10000, 10, 16)
    assert (args.trajectory_only, args.trajectory_epochs) == (False, 100)
    assert (args.ode_checkpoint, args.freeze_ode) == (None, False)
    assert args.time_scale is None
    assert trainer.DATASETS["dka"].time_scale == 72.0
    assert (args.patience, args.log_file) == (10, "auto")
    assert args.model_name == "google/medgemma-4b-pt"


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 0",
        "--batch_size 1.5",
        "--batch_size 0",
        "--time_scale 0",
        "--time_scale inf",
        "--encoder_lr 0",
        "--lora_dropout 1",
        "--seed 5000000000",
        "--epochs " + "9" * 400,
        "--dataset mimic",
        "--solver rk5",
        "--precision fp16",
        "--export gguf",
        "--traj",  # abbreviations are not accepted
        "--no_such_flag",
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_one_line(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        trainer.main(words.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert words.split()[0] in error


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--seeds 2 --demo", "--demo and --seeds do not go together"),
        ("--predict --ablation", "--predict and --ablation do not go together"),
        ("--ablation --seeds 2 --dry_run", "--dry_run and --ablation and --seeds"),
        ("--compare a b --model_name c", "--compare has no use for --model_name"),
        ("--demo --model_name=foo --epochs 1", "--demo has no use for --epochs, --model_name"),
        (
            "--predict --checkpoint x --predictions y.csv --data_path z.csv --solver rk4",
            "--predict has no use for --solver",
        ),
        ("--predict", "needs --checkpoint RUN/STAGE, --predictions FILE.csv, --data_path FILE or"),
        (
            "--predict --checkpoint x --data_dir y --output_dir z",
            "--predict needs --predictions FILE.csv; it has no use for --output_dir: leave it out",
        ),
        ("--open", "a command without --demo has no use for --open"),
        ("--strict", "without --predict has no use for --strict"),
        ("--explain", "without --predict has no use for --explain"),
        (
            "--predict --checkpoint x --predictions y.csv --data_path z.csv --patients 1",
            "a command without --explain has no use for --patients",
        ),
        ("--checkpoint x", "without --predict or --export has no use for --checkpoint"),
        ("--export merged", "--export needs --checkpoint RUN/STAGE, --export_dir DIR"),
        (
            "--export merged --checkpoint x --precision bf16",
            "--export needs --export_dir DIR; it has no use for --precision: leave it out",
        ),
        (
            "--export=merged --checkpoint x --export_dir y --data_path z",
            "--export has no use for --data_path",
        ),
        ("--export_dir x", "without --export has no use for --export_dir"),
        ("--export merged --predict", "--predict and --export do not go together"),
        ("--ablation --mode generative", "--ablation has no use for --mode"),
        ("--ablation --seeds 2 --freeze_ode", "--ablation has no use for --freeze_ode"),
        ("--ablation --series_text none", "leaves no text to compare with"),
        ("--seeds 2 --ode_checkpoint stage1.pt", "write {seed}"),
        ("--trajectory_only --soft_prompt off", "--trajectory_only has no use for --soft_prompt"),
        ("--trajectory_only --ode_checkpoint x.pt", "no use for --ode_checkpoint"),
        ("--trajectory_only --stage1_logit off", "no use for --stage1_logit"),
        ("--trajectory_only --base_weights random", "no use for --base_weights"),
        ("--soft_prompt off --freeze_ode", "without --ode_checkpoint has no use for --freeze_ode"),
        ("--soft_prompt off --stage1_logit off", "without --ode_checkpoint has no use for"),
        ("--stage1_logit off", "give a trained stage 1 by --ode_checkpoint"),
        (
            "--soft_prompt off --stage1_logit off --ode_checkpoint x.pt",
            "--soft_prompt off --stage1_logit off: leave --ode_checkpoint out",
        ),
        ("--arms text", "a command without --ablation has no use for --arms"),
        ("--reference text", "a command without --ablation has no use for --reference"),
        ("--ablation --stage1_logit off", "--ablation has no use for --stage1_logit"),
        ("--ablation --base_weights random", "--ablation has no use for --base_weights"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    words: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer.main(words.split()) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_is_grouped() -> None:
    text = trainer.build_parser().format_help()
    for group in ("what to do", "data", "training", "ODE-RNN", "language model", "output"):
        assert f"\n{group}:\n" in text
    assert "(default: None)" not in text


def many(label: int, count: int = 12) -> str:
    return GOOD.format(label=label) * count


BAD_FILES = {
    "empty": (b"", "empty"),
    "unreadable piece": (
        (HEADER + many(0) + '"24 (0h) -> oops",1\n').encode(),
        "row 14, column clinical_trajectory: piece 2",
    ),
    "label 2": ((HEADER + many(0) + GOOD.format(label=2)).encode(), "row 14, column label"),
    "one class": ((HEADER + many(0)).encode(), "patients with an event"),
    "binary": (bytes(range(256)) * 8, "not a text file"),
    "semicolons": ((HEADER + many(0)).replace(",", ";").encode(), "';'"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_ends_with_one_line_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = BAD_FILES[kind]
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_bytes(content)
    assert trainer.main(["--trajectory_only", "--data_path", "bad.csv"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bad.csv") or "one each at least" in error
    assert expected in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


def test_a_missing_file_names_itself_and_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--trajectory_only"]) == 2
    error = capsys.readouterr().err
    assert "dka_training_data.csv: no such file" in error
    assert "--data_path" in error
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_shows_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "dka_training_data.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    command = [sys.executable, str(ROOT / "medgemma_trainer.py"), "--trajectory_only"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout + result.stderr


def test_the_gated_model_offline_ends_in_one_line_that_says_what_to_do(
    dka_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = trainer.main(["--data_path", str(dka_file), "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    for hint in ("https://huggingface.co/google/medgemma-4b-pt", "login", "--model_name tiny"):
        assert hint in error
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_named(
    dka_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["--trajectory_only", "--data_path", str(dka_file), "--output_dir"]
    assert trainer.main([*words, str(tmp_path / "file" / "run")]) == 2
    assert "--output_dir" in capsys.readouterr().err


def test_a_log_file_that_cannot_be_written_is_named_and_leaves_nothing(
    dka_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trajectory_only", "--data_path", str(dka_file), "--output_dir"]
    words += [str(tmp_path / "run"), "--log_file", str(tmp_path / "missing" / "run.log")]
    assert trainer.main(words) == 2
    assert "--log_file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_log_file_of_ones_own_holds_the_run(dka_file: Path, tmp_path: Path) -> None:
    words = ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(dka_file)]
    words += ["--output_dir", str(tmp_path / "run"), "--log_file", str(tmp_path / "own.log")]
    assert trainer.main(words) == 0
    assert "epoch 1/1" in (tmp_path / "own.log").read_text()
    assert not list((tmp_path / "run" / "trajectory").glob("*.log"))


def test_a_file_name_that_is_no_text_ends_no_run(dka_file: Path, tmp_path: Path) -> None:
    """Names in Latin-1, as an old archive unpacks them; the report comes after all epochs."""
    file, folder = (tmp_path / os.fsdecode(name) for name in (b"Caf\xe9.csv", b"Caf\xe9"))
    file.write_bytes(dka_file.read_bytes())
    words = ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(file)]
    assert trainer.main([*words, "--output_dir", str(folder)]) == 0
    assert "Caf\\udce9.csv" in (folder / "trajectory" / "report.html").read_text(encoding="utf-8")
    assert "Caf\\udce9" in next((folder / "trajectory").glob("*.log")).read_text(encoding="utf-8")


def test_without_network_the_gated_model_ends_in_one_line(dka_file: Path, tmp_path: Path) -> None:
    """A hub that does not answer: the libraries' retries and warnings stay away from the user."""
    program = "import sys, time, medgemma_trainer; time.sleep = lambda _: None; "  # no waiting
    program += "sys.exit(medgemma_trainer.main())"
    command = [sys.executable, "-c", program, "--data_path", str(dka_file)]
    dead = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **dead, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--model_name tiny" in result.stderr
    assert "127.0.0.1" not in result.stdout
    assert not list(tmp_path.glob("checkpoints*"))


def test_a_full_disk_is_one_line_and_code_3(
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(train_state, "write_text", full)
    words = ["--trajectory_only", "--data_path", str(dka_file), "--log_file", "none"]
    assert trainer.main([*words, "--output_dir", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        socket.gaierror(-2, "Name or service not known"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        ssl.SSLError("bad certificate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_network_that_fails_is_no_full_disk(error: OSError) -> None:
    text = describe_fault(error)
    assert "the network or a server fails" in text
    assert "make room" not in text


def test_a_disk_that_fails_is_no_network() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "run.json")
    assert describe_fault(full).startswith("run.json: No space left on device: make room")


CELL = "Jane Doe 77.123456"
"""Of a patient, in the text of an exception."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            ValueError(f"CUDA {CELL}"),
            "a fault of the program, ValueError in test_command_line.py, ",
        ),
        (KeyError(f"out of memory {CELL}"), "a fault of the program, KeyError in "),
        (OSError(f"no space left: {CELL}"), "a fault of the program, OSError in "),
        (OSError(errno.EIO, CELL, "run.json"), "run.json: Input/output error: "),
        (OSError(errno.ENOMEM, CELL), "has too little memory"),
        (MemoryError(CELL), "has too little memory"),
        (torch.OutOfMemoryError(f"CUDA out of memory {CELL}"), "has too little memory"),
        (torch.AcceleratorError(f"device-side assert {CELL}"), "the GPU or its driver fails (Acc"),
        (RuntimeError(f"CUDA error: an illegal access {CELL}"), "nvidia-smi says; --show_values"),
        (RuntimeError(f"shapes {CELL}"), "a fault of the program, RuntimeError in "),
        (RecursionError(CELL), "a fault of the program, RecursionError in "),
        (RunFault("the loss is nan"), "the loss is nan"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_fault_is_named_by_type_and_place_and_never_by_its_text(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    start_logging()
    assert run_command(fail) == 3
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert shown in text
    assert "Jane" not in text


def test_no_text_steers_a_terminal_or_names_a_folder_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_libraries_send_nothing_about_the_user(tmp_path: Path) -> None:
    program = (
        "import os, medgemma_trainer, huggingface_hub.constants as hub; "
        "print(hub.HF_HUB_DISABLE_TELEMETRY, *(os.environ[n] for n in ('DO_NOT_TRACK', "
        "'MLFLOW_DISABLE_TELEMETRY', 'WANDB_ERROR_REPORTING')))"
    )
    removed = ("TELEMETRY", "DO_NOT_TRACK", "ERROR_REPORTING")
    clean = {k: v for k, v in os.environ.items() if not any(word in k for word in removed)}
    environment = {**clean, "PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "chosen"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.stdout.split() == ["True", "1", "true", "chosen"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [("--dataset dka --data_dir X", "--data_dir"), ("--dataset srtr --data_path X", "--data_path")],
)
def test_a_flag_of_the_other_kind_of_data_is_refused(
    words: str, flag: str, dka_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = (
        ["--data_path", str(dka_file)] if "dka" in words else ["--data_dir", str(dka_file.parent)]
    )
    assert trainer.main(["--trajectory_only", *words.split(), *rest]) == 2
    assert f"{flag}: not for --dataset" in capsys.readouterr().err


def test_a_no_break_space_stays_a_space_and_a_path_one_line() -> None:
    text = "63\N{NO-BREAK SPACE}%% of %s"
    record = logging.LogRecord("x", logging.INFO, "x", 1, text, (Path("a\nerror: b"),), None)
    assert PlainFormatter().format(record) == "63 % of a\\nerror: b"


def test_logging_of_a_caller_comes_back_after_a_command() -> None:
    root = logging.root
    before = root.handlers[:], root.level, logging.raiseExceptions
    with command_logging():
        assert RUN_LOG in root.handlers
    assert (root.handlers[:], root.level, logging.raiseExceptions) == before
