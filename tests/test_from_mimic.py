"""The commands from_mimic and from_eicu: flags, files, exit codes, and what reads their output."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.demographics import demographics
from mimic_files import DEMO, Mini

ROOT = Path(dataset_format.__file__).parent
FOLDERS = {"mimic": DEMO, "eicu": DEMO.parent / "eicu_demo"}


@pytest.fixture
def folder(tmp_path):
    return Mini().admit(1).settling(1).admit(2, age=10).write(tmp_path / "mimic")


def words(folder, out, *more):
    command = ["from_mimic", "--mimic_dir", str(folder), "--out", str(out), "--cohort", "all"]
    return [*command, "--compute_gap", "reported", *more]


def test_flags_reach_the_extraction_and_the_data_set_reads_series_question_and_flow(folder):
    out = folder.parent / "out.csv"
    flags = "--outcome unresolved,death --window_hours 10 --horizon_hours 30 --min_observations 1"
    flags += " --discharged exclude --threads 1 --memory_limit 300MB --item 50868"
    assert dataset_format.main(words(folder, out, *flags.split())) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["arguments"] == {
        "cohort": "all",
        "series": [],
        "discharged": "exclude",
        "item": "50868",
        "window_hours": 10.0,
        "horizon_hours": 30.0,
        "min_observations": 1,
        "outcome": ["unresolved", "death"],
        "compute_gap": "reported",
        "max_note_words": 256,
    }
    dataset = MIMICtrajectoryDataset(out)
    assert dataset.task_description()["Prediction time"] == about["prediction_time"]
    assert dataset.task_description()["Horizon"] == "30 hours from then on"
    assert dataset.outcome == about["outcome"]
    assert dataset.limits(0) == tuple(about["plausible"])
    assert dataset.prompt(0) == (
        "50-year-old woman, not in intensive care, 11 h since admission. Anion gap (mEq/L): "
        f"20 (0h) -> 18 (3h). {about['question']}\n"
    )
    assert dataset.flow.to_dict("records") == about["flow"]
    assert demographics(dataset)["sex"].tolist() == ["woman"]


@pytest.mark.slow
def test_the_data_set_reads_when_an_open_gap_closes_where_times_are_asked_for(tmp_path):
    mini = Mini().admit(1).settling(1).admit(2, end=60).lab(2, 1, 20).lab(2, 4, 9)
    mini.admit(3, end=60, death=60).lab(3, 1, 20).lab(3, 4, 18)
    out = tmp_path / "out.csv"
    flags = ["--cohort", "dka", "--outcome", "death"]
    assert dataset_format.main(words(mini.write(tmp_path / "mimic"), out, *flags)) == 0
    assert MIMICtrajectoryDataset(out).outcome_kind == "label"
    dataset = MIMICtrajectoryDataset(out, outcome_kind="time", horizon_hours=[24])
    assert dataset.competing_events.names == ("anion gap closed", "death", "discharge")
    np.testing.assert_array_equal(dataset.events, [1, np.nan, 2])
    np.testing.assert_array_equal(dataset.event_hours, [27, np.nan, 47])
    assert dataset.question.startswith("Will the anion gap close")
    assert not dataset.warnings


def test_the_command_writes_files_for_their_owner_and_shows_no_bar_without_a_terminal(
    folder, capsys
):
    out = folder.parent / "a.csv"
    assert dataset_format.main(words(folder, out)) == 0
    output = capsys.readouterr()
    assert "1 rows of 1 patients, 0 events" in output.out
    assert output.err == ""
    for path in (out, out.with_suffix(".json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.slow
def test_eicu_has_the_inputs_of_mimic(tmp_path):
    made = {}
    for source, folder in FOLDERS.items():
        out = tmp_path / f"{source}.csv"
        command = [f"from_{source}", f"--{source}_dir", str(folder), "--out", str(out)]
        assert dataset_format.main([*command, "--cohort", "all", "--series", "all"]) == 0
        made[source] = MIMICtrajectoryDataset(out)
    mimic, eicu = made.values()
    assert (eicu.features, eicu.units) == (mimic.features, mimic.units)
    assert eicu.static_names == mimic.static_names
    assert eicu.description.labels == mimic.description.labels
    about = json.loads((tmp_path / "eicu.json").read_text())
    assert about["made_by"] == "dataset_format.py from_eicu"
    assert about["tables_sha256"].keys() == {"patient", "admissionDx", "lab"}
