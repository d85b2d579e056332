"""TrajectoryModel on the disk and on the hub: what is written loads again and predicts the same."""

import os
import re
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hub_server import hub_on_this_machine
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_trainer import TrajectoryModel, fit_classification
from predicting import STAGES

PAGE = Path(__file__).parents[2] / "medgemma_clinical" / "docs" / "sharing.md"
ID = "jane/bicarbonate"
LLM = {"model_name": "tiny", "epochs": 1, "batch_size": 8}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine."""
    with hub_on_this_machine(tmp_path / "cache", monkeypatch) as served:
        yield served


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_comes_back_from_a_folder_and_from_the_hub(stage, runs, table, hub, tmp_path):
    rows, saved = table.head(12), tmp_path / "saved"
    model = TrajectoryModel.from_pretrained(runs / stage)
    model.save_pretrained(saved)
    model.save_pretrained(saved)  # in place of the earlier one
    address = model.push_to_hub(ID, commit_message="First", allow_small_cells=True)
    assert address.startswith(f"{hub.address}/{ID}/commit/")
    assert hub.repositories[ID].private
    for place in (saved, ID):
        again = TrajectoryModel.from_pretrained(place)
        np.testing.assert_array_equal(again.predict_proba(rows), model.predict_proba(rows))
        assert again.threshold == model.threshold
        pd.testing.assert_frame_equal(again.results(), model.results())
    for path in saved.rglob("*"):
        assert not stat.S_IMODE(os.stat(path).st_mode) & 0o077, path
    (saved / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="saved"):
        model.save_pretrained(saved)


def test_the_snippets_of_the_page_run_as_they_stand(runs, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medgemma_clinical.inference.hub.MIN_CELL", 0)  # of few patients
    Path("checkpoints_medgemma_dka").symlink_to(runs)
    push, load = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    monkeypatch.setattr("medgemma_clinical.inference.hub.MIN_CELL", 1)  # the runs have few patients
    exec(push, names)
    repository = hub.repositories["user/name"]
    assert repository.private
    repository.refs["v1"] = repository.refs["main"]
    exec(load, names)
    assert names["model"].stage == "classification"


def test_a_saved_stage_1_is_an_encoder_that_knows_its_patients_a_pushed_one_is_not(
    runs, hub, tmp_path
):
    model, table = TrajectoryModel.from_pretrained(runs / "trajectory"), runs / "train.csv"
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub(ID, allow_small_cells=True)
    assert len(read_trajectory(tmp_path / "saved" / TRAJECTORY_FILE).train_patients)
    saved = TrajectoryModel.from_pretrained(tmp_path / "saved")
    assert fit_classification(table, encoder=saved, **LLM).stage == "classification"
    with pytest.raises(InputError, match="held-out patients"):
        fit_classification(table, encoder=saved, seed=1, **LLM)
    with pytest.raises(InputError, match="shared copy"):
        fit_classification(table, encoder=TrajectoryModel.from_pretrained(ID), **LLM)
