"""The command from_eicu, and the whole way: a model of MIMIC-IV on another data base."""

import json
from pathlib import Path

import pandas as pd
import pytest

import dataset_format
import medgemma_trainer
from dataset_format import MIMICtrajectoryDataset
from predicting import command as predict_command
from predicting import predicted, refused

DATA = Path(__file__).parent / "data"


def make(source, out, *more):
    folder = DATA / {"mimic": "mimic_iv_demo", "eicu": "eicu_demo"}[source]
    words = [f"from_{source}", f"--{source}_dir", str(folder), "--out", str(out)]
    assert dataset_format.main([*words, "--cohort", "all", *more]) == 0
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Stage 1 after an epoch on all series of MIMIC-IV's demo."""
    place = tmp_path_factory.mktemp("mimic")
    data = make("mimic", place / "mimic.csv", "--series", "all")
    flags = f"--trajectory_only --trajectory_epochs 1 --log_file none --data_path {data}"
    assert medgemma_trainer.main([*flags.split(), "--output_dir", str(place / "run")]) == 0
    return place / "run" / "trajectory"


def test_a_model_of_mimic_predicts_eicu(model, tmp_path):
    data = make("eicu", tmp_path / "eicu.csv", "--series", "all")
    rows = pd.read_csv(data)
    found = predicted(model, data, tmp_path / "predictions.csv")
    assert found["id"].tolist() == rows["subject_id"].tolist()
    assert found["problem"].eq("").all()
    assert found["probability"].between(0, 1).all()
    assert found["probability"].nunique() > 30
    page = (tmp_path / "predictions.report.html").read_text()
    assert "(3 patients have the rarer outcome)" in page


def test_a_model_of_the_gap_without_potassium_refuses_the_reported_one(model, tmp_path, capsys):
    data = make("eicu", tmp_path / "eicu.csv", "--series", "all", "--compute_gap", "reported")
    words = predict_command(model, data, tmp_path / "predictions.csv")
    assert refused(capsys, words, "column trajectory_Anion gap without potassium [mEq/L]: ")


def test_the_data_set_reads_the_file_and_its_description(tmp_path):
    data = make("eicu", tmp_path / "eicu.csv")
    facts = json.loads(data.with_suffix(".json").read_text())
    dataset = MIMICtrajectoryDataset(data)
    assert dataset.groups.tolist() == pd.read_csv(data)["subject_id"].tolist()
    assert dataset.outcome == "Escalation"
    assert facts["made_by"] == "dataset_format.py from_eicu"
    assert facts["source"].startswith("eICU")
    assert facts["tables_sha256"].keys() == {"patient", "admissionDx", "lab"}
    assert "eicu_dir" not in facts["arguments"]
