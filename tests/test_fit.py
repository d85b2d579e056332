"""Training from Python: the same models as the command line, and nothing on the disk unasked."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.baselines import STAGE_2
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_trainer import (
    TrajectoryModel,
    fit_classification,
    fit_generative,
    fit_trajectory,
)
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import synthetic_tables, write_folder

SHORT: dict[str, Any] = {"min_cell": 0, "batch_size": 8}
STAGE_1: dict[str, Any] = {**SHORT, "trajectory_epochs": 2, "encoder_lr": 0.02}
LLM: dict[str, Any] = {**SHORT, "model_name": "tiny", "epochs": 1, "adapter_lr": 0.01}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """A hundred stays of the sample data."""
    return pd.read_csv(SAMPLE, nrows=100)


@pytest.fixture(scope="module")
def place(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and the three stages as the command line trains them."""
    folder = tmp_path_factory.mktemp("command")
    table.to_csv(folder / "data.csv", index=False)
    shared = ["--data_path", str(folder / "data.csv"), "--output_dir", str(folder)]
    words = [word for name, x in STAGE_1.items() for word in (f"--{name}", str(x))]
    assert trainer.main(["--trajectory_only", *shared, *words]) == 0
    words = [word for name, x in LLM.items() for word in (f"--{name}", str(x))]
    words += ["--ode_checkpoint", str(folder / TRAJECTORY_FILE)]
    for mode in ("classification", "generative"):
        assert trainer.main(["--mode", mode, *shared, *words]) == 0
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, which is also the place of temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_model_trained_from_python_is_that_of_the_command_and_leaves_no_file(
    table: pd.DataFrame, place: Path, nowhere: Path
) -> None:
    stage_1 = fit_trajectory(table, **STAGE_1)
    models = {
        "trajectory": stage_1,
        "classification": fit_classification(table, encoder=stage_1, **LLM),
        "generative": fit_generative(table, stage_1, **LLM),
    }
    assert not list(nowhere.iterdir())
    for stage, model in models.items():
        assert type(model) is TrajectoryModel
        written = TrajectoryModel.from_pretrained(place / stage)
        np.testing.assert_allclose(
            model.predict_proba(table), written.predict_proba(table), rtol=0, atol=1e-6
        )
        metrics = written.metrics or {}
        for beside in ("baselines", "differences") if stage == "generative" else ():
            del metrics[beside][STAGE_2]  # which lies in the folder alone
        assert model.metrics == metrics
        assert model.config["decision"] == written.config["decision"]
        assert model.threshold == written.threshold
    assert models["generative"].write_reports(table.head(3)) == TrajectoryModel.from_pretrained(
        place / "generative"
    ).write_reports(table.head(3))


def test_a_folder_gets_what_the_command_writes_for_its_owner_alone(
    table: pd.DataFrame, place: Path, tmp_path: Path
) -> None:
    fit_trajectory(table, **STAGE_1, output_dir=tmp_path / "run")
    fit_classification(table, place / TRAJECTORY_FILE, **LLM, output_dir=tmp_path / "run")

    def files(folder: Path) -> set[str]:
        stages = [p for p in folder.rglob("*") if p.is_file() and "generative" not in str(p)]
        names = {p.relative_to(folder).as_posix() for p in stages}
        return {name for name in names if not name.endswith((".log", "data.csv"))}

    assert files(tmp_path / "run") == files(place)
    (log,) = (tmp_path / "run" / "trajectory").glob("train_*.log")
    assert "epoch 2/2: train loss" in log.read_text()
    for path in (tmp_path / "run").rglob("*"):
        assert not stat.S_IMODE(os.stat(path).st_mode) & 0o077, path


def test_the_keywords_are_the_flags_with_their_defaults(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def stop(args: Any, dataset: Any, stage1: Any) -> None:
        seen.append(vars(args))
        raise InterruptedError

    monkeypatch.setattr(trainer, "train_model", stop)
    with pytest.raises(InterruptedError):
        fit_classification(table)
    with pytest.raises(InterruptedError):
        fit_classification(
            table, facts=False, series=None, members=3, deterministic=False, encoder_lr=1e-5
        )
    defaults = vars(trainer.complete(trainer.build_parser().parse_args([])))
    assert seen[0] == {**defaults, "output_dir": None}
    changed = {"facts": "off", "members": 3, "encoder_lr": 1e-5}
    assert seen[1] == {**defaults, **changed, "output_dir": None}


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"epoch": 3}, TypeError, "'epoch': did you mean 'epochs'"),
        ({"data_path": "x.csv"}, TypeError, "unexpected keyword 'data_path'"),
        ({"batch_size": 0}, InputError, "--batch_size: '0' must be a whole number from 1"),
        ({"dynamics": "fast"}, InputError, "--dynamics: invalid choice"),
        ({"trajectory_only": True}, TypeError, "unexpected keyword 'trajectory_only'"),
        ({"organ": "liver"}, InputError, "--organ: not for --dataset dka"),
        ({"soft_prompt": "off", "stage1_logit": "off"}, InputError, "has no use for"),
    ],
)
def test_a_wrong_keyword_is_named(
    flags: dict[str, Any], error: type[Exception], words: str, table: pd.DataFrame
) -> None:
    with pytest.raises(error, match=words):
        fit_classification(table, **flags)


def test_an_encoder_that_saw_held_out_patients_is_refused(table: pd.DataFrame, place: Path) -> None:
    encoder = TrajectoryModel.from_pretrained(place / "trajectory")
    for given in (encoder, place / TRAJECTORY_FILE):
        with pytest.raises(InputError, match="held-out patients trained this encoder"):
            fit_classification(table, encoder=given, seed=1, **LLM)
    with pytest.raises(ValueError, match="encoder needs a model of stage trajectory"):
        fit_classification(
            table, encoder=TrajectoryModel.from_pretrained(place / "classification"), **LLM
        )


def test_a_data_set_that_is_read_already_trains_a_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, *synthetic_tables("kidney"), "kidney")
    dataset = SRTRTrajectoryDataset(folder)
    model = fit_trajectory(dataset, trajectory_epochs=1, min_cell=0)
    assert model.config["dataset"] == "srtr"
    assert model.predict_proba(dataset).shape == (len(dataset), 2)
    lines = model.predictions(folder).set_index("id")["probability"]  # unknown outcomes too
    probability = model.predict_proba(dataset)[:, 1]
    expected = lines.loc[dataset.ids.tolist()].to_numpy(dtype=np.float64)
    np.testing.assert_allclose(probability, expected, atol=1e-6)
    with pytest.raises(InputError, match="the data set has been read: leave max_len out"):
        fit_trajectory(dataset, max_len=5)


def test_an_encoder_may_be_named_as_a_model_is(
    table: pd.DataFrame, place: Path, tmp_path: Path
) -> None:
    TrajectoryModel.from_pretrained(place / "trajectory").save_pretrained(tmp_path / "saved")
    for encoder in (str(place / "trajectory"), place / TRAJECTORY_FILE, tmp_path / "saved"):
        model = fit_classification(table, encoder=encoder, **LLM)
        assert model.metrics is not None
        assert model.metrics["stage"] == "classification"


@pytest.mark.parametrize("flag", ["resume", "save_every", "report_patients"])
def test_a_keyword_of_a_folder_needs_one(flag: str, table: pd.DataFrame) -> None:
    with pytest.raises(InputError, match=f"{flag}: give output_dir too"):
        fit_trajectory(table, **STAGE_1, **{flag: 1 if flag == "save_every" else True})


@pytest.mark.parametrize("rows", [None, [1, 2], np.zeros(3), {"a": 1}])
def test_rows_of_another_kind_are_refused(rows: Any) -> None:
    with pytest.raises(InputError, match=f"rows of type {type(rows).__name__}: give a DataFrame"):
        fit_trajectory(rows)


def test_a_second_training_in_the_process_is_refused(table: pd.DataFrame) -> None:
    with trainer.FITTING, pytest.raises(RuntimeError, match="another model is being trained"):
        fit_trajectory(table, **STAGE_1)
    assert not trainer.FITTING.locked()


def test_an_interrupt_says_how_to_go_on_and_frees_the_way(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt) as caught:
            fit_trajectory(table, **STAGE_1, output_dir=tmp_path)
    assert caught.value.__notes__ == [f"resume=True continues the run in {tmp_path}"]
    model = fit_trajectory(table, **STAGE_1, output_dir=tmp_path, resume=True)
    assert model.metrics is not None


def test_what_the_data_lack_stands_in_the_log_and_hidden_figures_are_warned_of(
    table: pd.DataFrame, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = table.drop(columns=["subject_id"], errors="ignore")
    shown = {name: x for name, x in STAGE_1.items() if name != "min_cell"}
    handlers = logging.root.handlers[:]
    logging.root.handlers.clear()
    try:
        model = fit_trajectory(rows, **shown, output_dir=tmp_path)
    finally:
        logging.root.handlers[:] = handlers
    (log,) = (tmp_path / "trajectory").glob("train_*.log")
    assert "no column subject_id" in log.read_text()
    assert model.results()["auroc"].isna().all()
    error = capfd.readouterr().err
    assert "no column subject_id" in error
    assert "--min_cell" in error or "fewer than 11" in error


def test_logging_of_the_caller_stays_as_it_was(
    table: pd.DataFrame, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("medgemma_clinical")
    before = logger.level, list(logger.handlers), list(logging.root.handlers)
    fit_trajectory(MIMICtrajectoryDataset(table), **STAGE_1)
    assert (logger.level, list(logger.handlers), list(logging.root.handlers)) == before
    assert "epoch" not in capfd.readouterr().out
