"""The whole program on another label or series, named by flags, and on a file with copies."""

import re

import pandas as pd
import pytest

import dataset_format
import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.evaluation import metrics
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from predicting import command, predicted, refused

STAGE_1 = ("--trajectory_only", "--trajectory_epochs", "1", "--log_file", "none")
DEATH = ("--label_column", "label_death")


REPORTS = True


def words(data, folder, *more):
    return [*STAGE_1, "--data_path", str(data), "--output_dir", str(folder), *more]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(metrics, "REPLICATES", 20)
    table = pd.read_csv(SAMPLE, nrows=120)
    return table.assign(label_death=table["label_escalation"], label_escalation=0)


@pytest.mark.slow
def test_a_label_of_another_name_goes_from_training_to_prediction(table, tmp_path, capsys):
    data, folder = tmp_path / "data.csv", tmp_path / "runs"
    table.to_csv(data, index=False)
    assert trainer.main(words(data, folder, *DEATH)) == 0
    page = (folder / "trajectory" / "report.html").read_text()
    assert "Will the outcome Death occur?" in page
    assert "Escalation" not in page
    config = read_trajectory(folder / TRAJECTORY_FILE).config
    assert (config["outcome"], config["read_options"]["label_column"]) == ("Death", "label_death")
    out = tmp_path / "out.csv"
    assert len(predicted(folder / "trajectory", data, out)) == 120
    assert "are in the training data" in capsys.readouterr().out
    assert trainer.main(words(data, folder, *DEATH, "--resume", "--allow_duplicates")) == 0
    assert refused(capsys, words(data, folder, "--resume"), "patients with an event")
    table.assign(label_escalation=table["label_death"]).to_csv(data, index=False)
    expected = "--label_column was label_death, is label_escalation"
    assert refused(capsys, words(data, folder, "--resume"), expected)
    stage_2 = ["--ode_checkpoint", str(folder / TRAJECTORY_FILE), "--model_name", TINY_MODEL]
    stage_2 += ["--data_path", str(data), "--output_dir", str(folder)]
    assert refused(capsys, stage_2, folder / TRAJECTORY_FILE, "label_column")


@pytest.mark.slow
def test_flags_name_what_no_description_says_from_training_to_prediction(table, tmp_path, capsys):
    named = ("--series_name", "Creatinine", "--unit", "mg/dL", "--outcome", "AKI")
    data, folder = tmp_path / "data.csv", tmp_path / "runs"
    table = table[["subject_id", "clinical_trajectory", "clinical_context", "label_death"]]
    table.rename(columns={"label_death": "label_escalation"}).to_csv(data, index=False)
    assert trainer.main(words(data, folder, *named)) == 0
    assert "taken for" not in capsys.readouterr().out
    page = (folder / "trajectory" / "report.html").read_text()
    assert "Will the outcome AKI occur?" in page
    assert "Creatinine (mg/dL)" in page
    assert not re.search("anion|escalat", page, re.IGNORECASE)
    assert trainer.main(words(data, folder, *named, "--resume")) == 0
    assert refused(capsys, words(data, folder, "--resume"), "--outcome was AKI")
    new = tmp_path / "new.csv"
    table.drop(columns="label_death").head(9).to_csv(new, index=False)
    assert len(predicted(folder / "trajectory", new, tmp_path / "out.csv")) == 9
    assert "clinical_trajectory is taken for Creatinine [mg/dL]" in capsys.readouterr().out
    new.with_suffix(".json").write_text('{"series": "Creatinine", "unit": "umol/L"}')
    place = tmp_path / "none.csv"
    assert refused(capsys, command(folder / "trajectory", new, place), "umol/L", out=place)


def test_a_doubled_file_is_refused_in_check_and_in_training(table, tmp_path, capsys):
    data = tmp_path / "data.csv"
    table = table.rename(columns={"subject_id": "patient_id"})
    pd.concat([table, table]).to_csv(data, index=False)
    for main, line in (
        (dataset_format.main, ["check", str(data), *DEATH]),
        (trainer.main, words(data, tmp_path, *DEATH, "--dry_run")),
    ):
        assert main(line) == 2
        assert "--allow_duplicates" in capsys.readouterr().err
        assert main([*line, "--allow_duplicates"]) == 0
