"""Attacks by model files on the whole program: code, paths in what is shared."""

import shutil

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import whole_reports
from language_models import save_text_checkpoint
from medgemma_clinical.commands.predictions import inputs_path
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from predicting import STAGES, command, read_predictions, refused, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(runs, tmp_path_factory):
    """A run of stage 2 on a base model in a folder, every place given with its whole path."""
    place = tmp_path_factory.mktemp("jdoe")
    base = save_text_checkpoint(place / "models" / "gemma")
    shutil.copy(runs / TRAJECTORY_FILE, place)
    data = write_data(pd.read_csv(runs / "train.csv", dtype=str), place / "train.csv")
    words = ["--data_path", str(data), "--output_dir", str(place / "out"), "--log_file", "none"]
    words += ["--epochs", "1", "--model_name", str(base)]
    with whole_reports():  # which name the model
        assert trainer.main([*words, "--ode_checkpoint", str(place / TRAJECTORY_FILE)]) == 0
    return place


@pytest.fixture
def stage(place, tmp_path):
    """A copy of the folder of stage 2 that a test may change."""
    return shutil.copytree(place / "out" / "classification", tmp_path / "classification")


def files_with(text, folder):
    """Return the names of the files below a folder whose content holds a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.name for path in files if str(text).encode() in path.read_bytes()}


def test_the_program__writes_paths_into_run_json_alone(place, runs, capsys):
    out, data = place / "out", place / "train.csv"
    predictions = place / "new" / "classification.csv"
    predictions.parent.mkdir()
    assert trainer.main(command(out / "classification", data, predictions)) == 0
    capsys.readouterr()
    stages = [str(runs / name) for name in STAGES]
    assert trainer.main(["compare", *stages]) == 0
    assert str(runs) not in capsys.readouterr().out
    assert files_with(place, out) == files_with(runs, runs) == {"run.json"}
    assert files_with(place, place / "new") == set()
    written = {"config.json", "adapter_config.json", "README.md", "report.html"}
    assert written <= files_with("gemma", out), "the name shows, its folder does not"


def test_predict__refuses_a_folder_without_its_base_model(place, stage, tmp_path, capsys):
    rows = pd.read_csv(place / "train.csv", nrows=6, dtype=str).drop(columns="label_escalation")
    data, out = write_data(rows, tmp_path / "new.csv"), tmp_path / "out.csv"
    assert trainer.main(command(stage, data, out)) == 0
    expected = read_predictions(out)
    out.unlink()
    inputs_path(out).unlink()
    (stage / "run.json").unlink()
    assert refused(capsys, command(stage, data, out), str(stage), "gemma", "--model_name", out=out)
    moved = shutil.copytree(place / "models" / "gemma", tmp_path / "moved")
    assert trainer.main(command(stage, data, out, "--model_name", str(moved))) == 0
    pd.testing.assert_frame_equal(read_predictions(out), expected)
