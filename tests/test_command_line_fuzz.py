"""Random command lines, the same in every run: each ends with an exit code and at most one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import sign_table
from medgemma_clinical.commands import demo, predict
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from srtr_files import filler, write_folder
from stages import STAGE_1, arguments, data_for, make_stage
from trajectories import LABEL

EXAMPLES = 200
DATA = "dka_training_data.csv"
ODD_NAME = os.fsdecode(b"Caf\xe9.csv")
"""A name in Latin-1, as an old archive unpacks it."""

ENCODER = f"run/{TRAJECTORY_FILE}"
PATHS = f"{DATA} new.csv several.csv wrong.csv empty.csv missing.csv srtr run folder".split()
PATHS += f"run/trajectory other/trajectory broken/best broken.pt {ENCODER} {ODD_NAME} .".split()
PATHS += f".. out.csv out.txt missing/out.csv {DATA}/x {{seed}}.pt ~ * \u4e2d.csv none".split()
PATHS += ["", " ", "two\nlines.csv", "\x1b[31m", "x" * 300]
NUMBERS = ["1", "2", "3", "8", "16", "30", "200", "0", "0.5", "1e-3", " 4 ", "1_0", "72.0"]
ODD_NUMBERS = ["-1", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "\uff11", "1,5", "true"]
ODD_NUMBERS += [str(10**k) for k in (9, 10, 19, 30, 307)] + ["9" * 400, "9" * 5000, "1\n"]
ODD_WORDS = ["--", "-", "-x", "", "--no_such_flag", "a b", "-1", "--help", "%s", "{seed}", "'"]
TEXTS = {
    "model_name": ["tiny"] * 6 + ["google/medgemma-4b-pt", "folder", "no such", "a\nb", "a/b/c"],
    "log_file": ["none", "none", "auto", "own.log", "missing/own.log", "folder"],
    "solver": ["rk4", "euler", "dopri5", "midpoint", "scipy_solver", "rk5", "Rk4", "a\nb"],
    "precision": ["auto", "fp32", "bf16", "fp16", "half", "fp\n32"],
    "series": ["urea", "anion gap", "Urea,anion_gap", "urea,urea", "kalium", ",", "a\nb", "\u2028"],
}
BEGINNINGS = [
    *[""] * 10,
    *[STAGE_1] * 9,
    f"{STAGE_1} --dry_run",
    f"{STAGE_1} --dataset srtr --data_dir srtr",
    f"{STAGE_1} --seeds 2",
    "--model_name tiny",
    "--model_name tiny --mode generative",
    "--model_name tiny --dry_run --soft_prompt off",
    f"--model_name tiny --ode_checkpoint {ENCODER}",
    "--model_name tiny --ablation",
    "--demo",
    *["--compare run/trajectory other/trajectory"] * 2,
    "--predict --checkpoint run/trajectory --data_path new.csv --predictions out.csv",
    "--export merged --checkpoint run/trajectory --export_dir served",
    *[f"--predict --checkpoint {ENCODER} --predictions out.csv --data_path {ODD_NAME}"] * 2,
]
"""What leads to each of the program's ways; chance adds the rest of a command."""


class StartedError(BaseException):
    """The command would now begin to learn or to score."""


class Ending(NamedTuple):
    """Exit code, "parser CODE" or "started", and what was written to stdout and stderr."""

    end: int | str
    out: str
    err: str


def run(words: list[str]) -> Ending:
    """Run a command with streams like those of a terminal in UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    end: int | str
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            end = trainer.main(words)
        except SystemExit as stop:
            end = f"parser {stop.code}"
        except StartedError:
            end = "started"
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return Ending(end, *texts)


def value(action: argparse.Action, rng: Random) -> str:
    """Return a word for a flag, more often a good one than any of the others."""
    if rng.random() < 0.1:
        return rng.choice([*PATHS, *ODD_NUMBERS, *ODD_WORDS])
    if action.choices:
        return str(rng.choice([*action.choices, *action.choices, "x"]))
    if action.dest in TEXTS:
        return rng.choice(TEXTS[action.dest])
    if action.type is Path:
        return rng.choice(PATHS)
    return rng.choice(rng.choice([*[NUMBERS] * 3, ODD_NUMBERS]))


def command_line(actions: list[argparse.Action], rng: Random) -> list[str]:
    """Begin as a command may, add flags, and now and then lose, repeat or slip in a word."""
    words = rng.choice(BEGINNINGS).split()
    for action in rng.sample(actions, rng.choice([0] + [1, 2, 3] * 5 + [2, 5])):
        flag = rng.choice(action.option_strings)
        values = [] if action.nargs == 0 else [value(action, rng)]
        joined = values and rng.random() < 0.2
        words += [f"{flag}={values[0]}"] if joined else [flag, *values]
    if words and rng.random() < 0.2:
        place = rng.randrange(len(words))
        words[place : place + 1] = rng.choice([[], [words[place]] * 2, [rng.choice(ODD_WORDS)]])
    return words


def make_world(folder: Path) -> None:
    """Fill a folder with small data of every kind, and with results of two runs."""
    table = sign_table(40, seed=3)
    table.to_csv(folder / DATA, index=False)
    shutil.copy(folder / DATA, folder / ODD_NAME)
    table.drop(columns=LABEL).to_csv(folder / "new.csv", index=False)
    urea = ["", "5 (1h)", "7 (0h) -> 8 (3h)", "1 (9h)"] * 10
    several = table.assign(**{"trajectory_urea [mg/dL]": urea})
    several.to_csv(folder / "several.csv", index=False)
    table.assign(**{LABEL: [2] + [0] * 39}).to_csv(folder / "wrong.csv", index=False)
    (folder / "empty.csv").touch()
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 junk")
    (folder / "folder").mkdir()
    write_folder(folder / "srtr", *filler("kidney"), "kidney")
    args = arguments(STAGE_1, "--data_path", str(folder / DATA))
    stage = make_stage(args, data_for(args))
    rows = pd.DataFrame({"id": range(20), "patient": range(20), "label": [0, 1] * 10})
    for name, scores in {"run": [0.2, 0.9, 0.4, 0.3], "other": [0.1, 0.8, 0.7, 0.6]}.items():
        (folder / name / "trajectory").mkdir(parents=True)
        stage.save(folder / name / "trajectory", stage.config)
        scored = rows.assign(probability=scores * 5)
        scored.to_csv(folder / name / "trajectory" / "predictions_test.csv", index=False)
    (folder / "broken" / "best").mkdir(parents=True)
    (folder / "broken" / "best" / "config.json").write_text("[]")


def listing(folder: Path) -> dict[str, int]:
    """Return each file and folder below, files with their size."""
    return {str(p): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Work in a folder as ``make_world`` makes it; return what restores it."""
    made, here = tmp_path / "made", tmp_path / "box" / "here"
    made.mkdir()
    make_world(made)

    def restore() -> None:
        os.chdir(tmp_path)
        shutil.rmtree(here.parent, ignore_errors=True)
        shutil.copytree(made, here)
        os.chdir(here)

    def start(*_: Any, **__: Any) -> None:
        raise StartedError

    for name in ("validate", "train_epoch"):
        monkeypatch.setattr(trainer, name, start)
    monkeypatch.setattr(predict, "write_predictions", start)
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "data_path": made / DATA})
    monkeypatch.chdir(tmp_path)
    restore()
    return restore


def test_random_command_lines_give_one_line_and_no_traceback(world: Callable[[], None]) -> None:
    """Refused ones leave everything as it was."""
    actions = trainer.build_parser()._actions
    seen: Counter[int | str] = Counter()
    for seed in range(EXAMPLES):
        words = command_line(actions, Random(seed))
        before = listing(Path(".."))
        ending = run(words)
        assert "Traceback" not in ending.out + ending.err, words
        assert "a fault of the program" not in ending.err, words
        if ending.end in ("parser 2", 2, 3):
            assert re.fullmatch(r"error: [^\n]+\n", ending.err), (words, ending.err)
            assert len(ending.err.splitlines()) == 1, (words, ending.err)
        else:
            assert (ending.end in ("parser 0", 0, "started"), ending.err) == (True, ""), words
        if ending.end == 2:
            assert listing(Path("..")) == before, words
        elif not str(ending.end).startswith("parser"):
            world()
        seen[ending.end] += 1
    assert min(seen[end] for end in ("started", 2, "parser 2")) >= EXAMPLES // 12, seen
