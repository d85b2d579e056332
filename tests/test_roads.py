"""The whole road of a hospital: export, preview, training, new patients, results by site.

No line of pandas, and at most three calls of from_long an export. Trainings are tiny.
"""

import json

import numpy as np
import pandas as pd
import pytest

import dataset_format
import medgemma_trainer as trainer
from exports import answer, write_a, write_b
from language_models import TINY_MODEL
from medgemma_clinical.evaluation import metrics

pytestmark = pytest.mark.slow

TINY = ["--trajectory_epochs", "1", "--log_file", "none"]


@pytest.fixture
def from_long(monkeypatch):
    """A function that counts its calls, none of which is refused."""
    monkeypatch.setattr(metrics, "REPLICATES", 20)
    calls = []

    def call(*words):
        calls.append(words)
        assert dataset_format.main(["from_long", *map(str, words)]) == 0
        return len(calls)

    return call


def train(*words):
    assert trainer.main([*TINY, *map(str, words)]) == 0


def test_a_german_export_goes_to_results_by_site_of_new_patients(from_long, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, patients, seed in ((old, 80, 7), (new, 40, 8)):
        folder.mkdir()
        write_a(folder, patients, seed)
    monkeypatch.chdir(tmp_path)
    files = ["--table=old/labor.csv", "--labels=old/patienten.csv"]
    from_long(*files, "--out=aki.csv", "--preview")
    static = ["age [years]=Alter", "sex=Geschlecht"]
    answer(tmp_path / "aki.toml", static=static, keep=["Klinik"])
    from_long("--config", "aki.toml")
    train("--trajectory_only", "--data_path=aki.csv", "--output_dir=runs")
    files = ["--table=new/labor.csv", "--labels=new/patienten.csv", "--like=aki.csv"]
    assert from_long(*files, "--out=new.csv") == 3
    words = ["predict", "--checkpoint=runs/trajectory", "--data_path=new.csv"]
    assert trainer.main([*words, "--predictions=risks.csv", "--site=Klinik"]) == 0
    risks, rows = pd.read_csv("risks.csv", dtype=str), pd.read_csv("new.csv", dtype=str)
    assert risks["id"].tolist() == rows["id"].tolist()
    assert risks["probability"].astype(float).between(0, 1).all()
    page = (tmp_path / "risks.report.html").read_text()
    assert all(site in page for site in ("Innere", "Chirurgie", "Intensiv"))


def test_an_export_with_notes_goes_to_a_model_that_reads_them(from_long, tmp_path, monkeypatch):
    pytest.importorskip("openpyxl")
    write_b(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = ["--table=lab.csv.gz", "--labels=cohort.xlsx", "--notes=notes.csv", "--out=b.csv"]
    from_long(*files, "--preview")
    answer(
        tmp_path / "b.toml",
        outcome_column=["ICU transfer <7d", "Died <30d"],
        static=["age [years]=Age at admission", "sex=Gender"],
        keep=["Klinik"],
    )
    assert from_long("--config", "b.toml") == 2
    rows = pd.read_csv("b.csv", dtype=str)
    assert rows["clinical_context"].str.startswith("Note (").sum() > len(rows) / 3
    assert {"label_died_30d", "static_sex_male", "Klinik"} <= {*rows}
    train("--trajectory_only", "--data_path=b.csv", "--output_dir=runs")
    words = ["--data_path=b.csv", "--output_dir=runs", f"--model_name={TINY_MODEL}"]
    train(*words, "--epochs=1", "--ode_checkpoint=runs/medgemma_trajectory_best.pt")
    metrics_of = json.loads((tmp_path / "runs/classification/metrics.json").read_text())
    assert np.isfinite(metrics_of["validation"]["log_loss"]["value"])
