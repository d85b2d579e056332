"""An encoder of the user's own in place of ``ClinicalODERNN``: named, never imported unasked."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from gru_d import GRUD
from language_models import TINY_MODEL
from medgemma_clinical.files import InputError
from medgemma_clinical.models import encoders
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_trainer import TrajectoryModel, cross_validate, fit_classification, fit_trajectory

pytestmark = pytest.mark.slow

SHORT = {"min_cell": 0, "trajectory_epochs": 1}
NAME = "gru_d:GRUD"


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Forget the classes of other tests."""
    monkeypatch.setattr(encoders, "ENCODERS", {})


@pytest.fixture(scope="module")
def rows():
    """Sixty stays of the sample data."""
    return pd.read_csv(SAMPLE, nrows=60)


def test_an_encoder_of_the_users_own_trains_all_stages_and_is_asked_for_again(
    rows, tmp_path, monkeypatch
):
    stage_1 = fit_trajectory(rows, encoder=GRUD, **SHORT, output_dir=tmp_path)
    assert type(stage_1.trained.model.encoder) is GRUD
    assert stage_1.config["encoder_class"] == NAME
    expected = stage_1.predict_proba(rows)
    llm = {"model_name": TINY_MODEL, "epochs": 1, "batch_size": 8, "min_cell": 0}
    stage_2 = fit_classification(rows, stage_1, **llm, output_dir=tmp_path)
    assert stage_2.trained.model.projection.linear.in_features == 32  # width of the encoder
    both = stage_2.predict_proba(rows)
    monkeypatch.setattr(encoders, "ENCODERS", {})
    for stage in ("trajectory", "classification"):
        with pytest.raises(InputError, match=NAME):
            TrajectoryModel.from_pretrained(tmp_path / stage)
    for stage, risks in (("trajectory", expected), ("classification", both)):
        model = TrajectoryModel.from_pretrained(tmp_path / stage, encoder=GRUD)
        np.testing.assert_allclose(model.predict_proba(rows), risks, rtol=0, atol=1e-6)


def test_the_command_line_imports_the_class_that_it_is_given(rows, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.csv", tmp_path / "risks.csv"
    rows.to_csv(data, index=False)
    train = ["--trajectory_only", "--data_path", data, "--output_dir", tmp_path / "run"]
    train += ["--trajectory_epochs", "1", "--log_file", "none"]
    predict = ["predict", "--checkpoint", tmp_path / "run" / "trajectory", "--data_path", data]
    predict += ["--predictions", out]
    stage_1 = tmp_path / "run" / TRAJECTORY_FILE

    def call(*words):
        monkeypatch.setattr(encoders, "ENCODERS", {})
        try:
            return trainer.main([str(word) for word in words])
        except SystemExit as wrong:  # usage
            return wrong.code

    assert call(*train, "--encoder", NAME) == 0
    record = json.loads((tmp_path / "run" / "trajectory" / "run.json").read_text())
    assert record["arguments"]["encoder"] == NAME
    assert call(*predict, "--encoder", NAME) == 0
    assert out.exists()
    for words in (
        predict,  # names no class
        [*train, "--encoder", "gru_d:GRUE"],
        [*train, "--encoder", "no_module:GRUD"],
        [*train, "--encoder", "gru_d:Scaler"],  # no encoder
        [*train, "--encoder", NAME, "--solver", "rk4"],
        [*train, "--resume"],
        ["--ablation", *train[1:], "--encoder", NAME],
        ["--ode_checkpoint", stage_1, "--model_name", "demo", *train[1:]],
    ):
        capsys.readouterr()
        assert call(*words) == 2, words
        error = capsys.readouterr().err
        assert "encoder" in error
        assert words is not predict or "--encoder" not in error, "the flag would run the code"


def test_folds_take_a_class(tmp_path):
    rows = pd.read_csv(SAMPLE, nrows=120)
    cross_validate(rows, folds=2, encoder=GRUD, output_dir=tmp_path, **SHORT)
    stage_1 = read_trajectory(tmp_path / "folds_trajectory" / "fold_1" / TRAJECTORY_FILE)
    assert stage_1.config["encoder_class"] == NAME


def test_the_example_sees_no_padding_and_nothing_later(rows):
    torch.manual_seed(0)
    encoder, (times, values) = GRUD(2).eval(), torch.rand(2, 3, 5).cumsum(2)
    values = torch.stack([values, times], dim=2)
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[1, 3:] = False  # padding
    until = times.amax(dim=1) + 1
    states = encoder.run(encoder.plan(times, values, observed, until))
    alone = [x[1:2, :3] for x in (times, values, observed)]
    torch.testing.assert_close(encoder.run((*alone, until[1:2]))[0, :3], states[1, :3])
    values[:, 2:] += 1
    later = encoder.run(encoder.plan(times, values, observed, until))
    torch.testing.assert_close(later[:, :2], states[:, :2])
    assert (later[:, 2] != states[:, 2]).any()
