"""The command from_mimic: flags, files, exit codes, and what reads its output."""

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.case_mix import demographics
from mimic_files import Mini

ROOT = Path(dataset_format.__file__).parent


@pytest.fixture
def folder(tmp_path):
    return Mini().admit(1).settling(1).admit(2, age=10).write(tmp_path / "mimic")


def words(folder, out, *more):
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(out), "--cohort", "all"]
    return [*command, "--compute_gap", "reported", *more]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--item 5", "no such item"),
        ("--window_hours 0", "window_hours"),
        ("--window_hours nan", "window_hours"),
        ("--horizon_hours -1", "horizon_hours"),
        ("--horizon_hours 2e6", "horizon_hours"),
        ("--min_observations 0", "min_observations"),
        ("--max_note_words 0", "max_note_words"),
        ("--threads -1", "threads"),
        ("--memory_limit much", "--memory_limit much"),
        ("--memory_limit 2", "--memory_limit 2"),
        ("--series gap", "--series"),
        ("--series pH,ph", "--series"),
        ("--series all,pH", "--series"),
        ("--series pH --item 50882", "--item 50882"),
        ("--outcome sepsis", "escalation"),
        ("--outcome escalation,death", "escalation"),
        ("--outcome ,", "escalation"),
        ("--cohort none", "cohort"),
        ("--compute_gap missing", "compute_gap"),
        ("--out out.txt", "csv"),
        ("--windows 3", "unrecognized"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_one_line(flags, expected, folder, capsys):
    """The flags of the other commands are of the same types."""
    out = folder.parent / "out.csv"
    try:
        code = dataset_format.main(words(folder, out, *flags.split()))
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert re.fullmatch(r"error: .+\n", error)
    assert expected in error
    assert not list(out.parent.glob("out*"))


def test_every_flag_reaches_the_extraction(folder):
    out = folder.parent / "out.csv"
    flags = "--outcome unresolved,death --window_hours 10 --horizon_hours 30"
    more = [*flags.split(), "--min_observations", "1", "--item", "Anion Gap"]
    more += ["--discharged", "exclude", "--threads", "1", "--memory_limit", "300MB"]
    assert dataset_format.main(words(folder, out, *more)) == 0
    assert json.loads(out.with_suffix(".json").read_text())["arguments"] == {
        "cohort": "all",
        "series": [],
        "discharged": "exclude",
        "item": "Anion Gap",
        "window_hours": 10.0,
        "horizon_hours": 30.0,
        "min_observations": 1,
        "outcome": ["unresolved", "death"],
        "compute_gap": "reported",
        "max_note_words": 256,
    }


def test_the_command_writes_files_for_their_owner_and_shows_no_bar_without_a_terminal(
    folder,
):
    out = folder.parent / "a.csv"
    command = [sys.executable, str(ROOT / "dataset_format.py"), *words(folder, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 rows of 1 patients, 0 events" in done.stdout
    for path in (out, out.with_suffix(".json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_data_set_reads_series_question_and_flow(folder):
    out = folder.parent / "out.csv"
    assert dataset_format.main(words(folder, out)) == 0
    facts = json.loads(out.with_suffix(".json").read_text())
    dataset = MIMICtrajectoryDataset(out)
    assert dataset.task_description()["Prediction time"] == facts["prediction_time"]
    assert dataset.task_description()["Horizon"] == "72 hours from then on"
    assert dataset.outcome == facts["outcome"]
    assert dataset.limits(0) == tuple(facts["plausible"])
    assert dataset.prompt(0) == (
        "50-year-old woman, not in intensive care, 13 h since admission. Anion gap (mEq/L): "
        f"20 (0h) -> 18 (3h). {facts['question']}\n"
    )
    assert dataset.flow is not None
    assert dataset.flow.to_dict("records") == facts["flow"]
    assert demographics(dataset)["sex"].tolist() == ["woman"]
