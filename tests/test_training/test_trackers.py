"""Trackers: metrics alone go there, and one that fails ends no training."""

import getpass
import os
from importlib.machinery import PathFinder
from unittest.mock import MagicMock

import pytest

from medgemma_clinical.files import InputError
from medgemma_clinical.training import trackers
from medgemma_clinical.training.trackers import NO_USAGE_DATA, PROJECT, check_tracker, tracking


@pytest.fixture
def accelerator(monkeypatch):
    """Stands for accelerate's; remembers how it is called."""
    monkeypatch.setattr(trackers, "Accelerator", MagicMock())
    monkeypatch.setattr(os, "environ", {**os.environ})
    return trackers.Accelerator.return_value


def test_a_tracker_gets_numbers_and_is_told_to_take_nothing_else(accelerator, tmp_path):
    def train():
        with tracking("wandb", tmp_path, {"seed": 3}) as track:
            track({"val_auroc": 0.7}, 10)
            raise ZeroDivisionError

    check_tracker("none")
    with tracking("none", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.7}, 10)
    trackers.Accelerator.assert_not_called()
    with pytest.raises(ZeroDivisionError):
        train()
    assert trackers.Accelerator.call_args.kwargs["log_with"] == "wandb"
    accelerator.log.assert_called_once_with({"val_auroc": 0.7}, step=10)
    accelerator.end_training.assert_called_once_with()
    project, numbers, options = accelerator.init_trackers.call_args.args
    assert (project, numbers) == (PROJECT, {"seed": 3})
    settings = {"console": "off", "disable_code": True, "disable_git": True}
    assert options["wandb"]["settings"].items() >= settings.items()
    assert options["wandb"]["dir"] == str(tmp_path)
    assert os.environ.items() >= NO_USAGE_DATA.items()
    with tracking("mlflow", tmp_path, {}):
        tags = accelerator.init_trackers.call_args.args[2]["mlflow"]["tags"]
    assert tags.keys() == {"mlflow.user", "mlflow.source.name"}
    with tracking("aim", tmp_path, {}):
        options = accelerator.init_trackers.call_args.args[2]["aim"]
    assert options == {"capture_terminal_logs": False, "system_tracking_interval": None}
    with tracking("dvclive", tmp_path, {}):
        options = accelerator.init_trackers.call_args.args[2]["dvclive"]
    assert options == {"save_dvc_exp": False, "dvcyaml": None, "dir": str(tmp_path)}
    assert not any("/" in tag or getpass.getuser() in tag for tag in tags.values())


@pytest.mark.parametrize("fails", ["init_trackers", "log", "end_training"])
def test_a_tracker_that_fails_warns_once_or_cannot_start(fails, accelerator, tmp_path, caplog):
    def train():
        with tracking("wandb", tmp_path, {}) as track:
            for epoch in range(3):
                track({"val_auroc": 0.7}, epoch)

    getattr(accelerator, fails).side_effect = RuntimeError("no API key\nand a long story")
    if fails == "init_trackers":
        with pytest.raises(InputError, match=r"--report_to wandb.*no API key$"):
            train()
    else:
        train()
        assert accelerator.log.call_count == (1 if fails == "log" else 3)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * (fails == "log")


def test_tensorboard_writes_the_metrics(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    check_tracker("tensorboard")
    with tracking("tensorboard", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.75}, 2)
    (event,) = reader.EventAccumulator(str(tmp_path / PROJECT)).Reload().Scalars("val_auroc")
    assert (event.step, event.value) == (2, 0.75)


@pytest.mark.parametrize("folder", [False, True])
def test_a_tracker_that_is_not_installed_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    found = PathFinder.find_spec("wandb", [str(tmp_path)]) if folder else None
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: found)
    with pytest.raises(InputError, match="--report_to wandb"):
        check_tracker("wandb")
