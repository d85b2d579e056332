"""Random command lines, the same in every run: each ends with an exit code and at most one line."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import sign_table
from medgemma_clinical.commands import demo, predict
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from srtr_files import filler, write_folder
from stages import STAGE_1, arguments, data_for, make_stage
from trajectories import LABEL

EXAMPLES = 80
DATA = "dka_training_data.csv"
ENCODER = f"run/{TRAJECTORY_FILE}"
PATHS = f"{DATA} new.csv wrong.csv empty.csv missing.csv srtr run folder run/trajectory".split()
PATHS += f"other/trajectory broken/best broken.pt {ENCODER} . .. out.csv missing/out.csv".split()
PATHS += [f"{DATA}/x", "{seed}.pt", "\u4e2d.csv", "none", "", "two\nlines.csv", "x" * 300]
NUMBERS = ["1", "2", "3", "8", "16", "30", "200", "0", "0.5", "1e-3", " 4 ", "1_0", "72.0"]
ODD = ["-1", "nan", "inf", "1e400", "1e-400", "0x10", "\uff11", "1,5", "9" * 5000, "1\n", "--", "-"]
ODD += ["", "--no_such_flag", "a b", "--help", "%s", "{seed}", "\x1b[31m", "a\nb"]
TEXTS = {
    "model_name": ["tiny"] * 6 + ["google/medgemma-4b-pt", "folder", "no such", "a\nb", "a/b/c"],
    "log_file": ["none", "none", "auto", "own.log", "missing/own.log", "folder"],
    "series": ["urea", "anion gap", "Urea,anion_gap", "urea,urea", ",", "a\nb", "\u2028"],
}
BEGINNINGS = [
    *[""] * 10,
    *[STAGE_1] * 9,
    f"{STAGE_1} --dry_run",
    f"{STAGE_1} --dataset srtr --data_dir srtr",
    f"{STAGE_1} --seeds 2",
    "--model_name tiny --mode generative",
    "--model_name tiny --dry_run --soft_prompt off",
    f"--model_name tiny --ode_checkpoint {ENCODER}",
    "--model_name tiny --ablation",
    "--demo",
    *["--compare run/trajectory other/trajectory"] * 2,
    *["--predict --checkpoint run/trajectory --data_path new.csv --predictions out.csv"] * 2,
    "--export merged --checkpoint run/trajectory --export_dir served",
]
"""What leads to each of the program's ways; chance adds the rest of a command."""


class StartedError(BaseException):
    """The command would now begin to learn or to score."""


def run(words):
    """Return an exit code, "parser CODE" or "started"."""
    try:
        return trainer.main(words)
    except SystemExit as stop:
        return f"parser {stop.code}"
    except StartedError:
        return "started"


def value(action, rng):
    """Return a word for a flag, more often a good one than any of the others."""
    if rng.random() < 0.1:
        return rng.choice([*PATHS, *ODD])
    if action.choices:
        return str(rng.choice([*action.choices, *action.choices, "x"]))
    good = PATHS if action.type is Path else [*NUMBERS * 3, *ODD]
    return rng.choice(TEXTS.get(action.dest, good))


def command_line(actions, rng):
    """Begin as a command may, add flags, and now and then lose, repeat or slip in a word."""
    words = rng.choice(BEGINNINGS).split()
    for action in rng.sample(actions, rng.choice([0, 1, 1, 2, 2, 3, 5])):
        flag = rng.choice(action.option_strings)
        values = [] if action.nargs == 0 else [value(action, rng)]
        joined = values and rng.random() < 0.2
        words += [f"{flag}={values[0]}"] if joined else [flag, *values]
    if words and rng.random() < 0.2:
        index = rng.randrange(len(words))
        words[index : index + 1] = rng.choice([[], [words[index]] * 2, [rng.choice(ODD)]])
    return words


def make_world(folder):
    """Fill a folder with small data of every kind, and with results of two runs."""
    table = sign_table(40, seed=3)
    table.to_csv(folder / DATA, index=False)
    table.drop(columns=LABEL).to_csv(folder / "new.csv", index=False)
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


def listing(folder):
    """Return each file and folder below, files with their size."""
    return {str(p): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Work in a folder as ``make_world`` makes it; return what restores it."""
    made, here = tmp_path / "made", tmp_path / "here"
    made.mkdir()
    make_world(made)

    def restore():
        os.chdir(tmp_path)
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(made, here)
        os.chdir(here)

    def start(*_, **__):
        raise StartedError

    steps = (trainer, "validate"), (trainer, "train_epoch"), (predict, "write_predictions")
    for module, name in steps:
        monkeypatch.setattr(module, name, start)
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "data_path": made / DATA})
    monkeypatch.chdir(tmp_path)
    restore()
    return restore


def test_random_command_lines_give_one_line_and_no_traceback(world, tmp_path, capsys):
    """Refused ones leave everything as it was."""
    actions, seen = trainer.build_parser()._actions, Counter()
    for seed in range(EXAMPLES):
        words = command_line(actions, Random(seed))
        before = listing(tmp_path)
        end = run(words)
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error, words
        if end in ("parser 2", 2):
            assert re.fullmatch(r"error: [^\n]+\n", error), (words, error)
            assert len(error.splitlines()) == 1, (words, error)
        else:
            assert (end in ("parser 0", 0, "started"), error) == (True, ""), (words, end, error)
        if end == 2:
            assert listing(tmp_path) == before, words
        elif not str(end).startswith("parser"):
            world()
        seen[end] += 1
    assert min(seen[end] for end in ("started", 2, "parser 2")) >= EXAMPLES // 12, seen
