"""Trackers: figures alone go there, and one that fails ends no training."""

from __future__ import annotations

import getpass
import importlib.machinery
import importlib.util
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from medgemma_clinical.files import InputError
from medgemma_clinical.training.trackers import PROJECT, check_tracker, tracking


class Recorder:
    """Stands where accelerate would, and remembers what it is given."""

    fails: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.setup: dict[str, Any] = {}
        self.numbers: dict[str, Any] = {}
        self.kwargs: dict[str, Any] = {}
        self.logged: list[tuple[Mapping[str, float], int]] = []
        self.calls: list[str] = []

    def __call__(self, **setup: Any) -> Recorder:
        self.setup = setup
        return self

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise RuntimeError("no API key\nand a long story")

    def init_trackers(self, name: str, numbers: dict[str, Any], kwargs: dict[str, Any]) -> None:
        self._call("init")
        self.numbers, self.kwargs = numbers, kwargs

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._call("log")
        self.logged.append((figures, step))

    def end_training(self) -> None:
        self._call("end")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("accelerate.Accelerator", recorder)
    return recorder


def test_a_tracker_gets_numbers_and_is_told_to_take_nothing_else(
    recorder: Recorder, tmp_path: Path
) -> None:
    with tracking("wandb", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.7}, 10)
        track({"test_auroc": 0.6}, 20)
    assert recorder.setup["log_with"] == "wandb"
    assert recorder.numbers == {"seed": 3}
    assert recorder.logged == [({"val_auroc": 0.7}, 10), ({"test_auroc": 0.6}, 20)]
    assert recorder.calls[-1] == "end"
    settings = recorder.kwargs["wandb"]["settings"]
    assert settings["console"] == "off", "what the terminal shows stays here"
    assert settings["disable_code"]
    assert settings["disable_git"]
    assert recorder.kwargs["wandb"]["dir"] == str(tmp_path)


@pytest.mark.parametrize("fails", ["log", "end"])
def test_a_tracker_that_fails_is_warned_of_once_and_training_goes_on(
    fails: str, recorder: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails = (fails,)
    epochs = 0
    with tracking("wandb", tmp_path, {}) as track:
        for epoch in range(3):
            track({"val_auroc": 0.7}, epoch)
            epochs += 1
    assert epochs == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "--report_to wandb: failed, training goes on without it: no API key"
    )
    assert recorder.calls.count("log") == (1 if fails == "log" else 3)


def test_a_tracker_ends_when_training_fails(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracking("wandb", tmp_path, {}):
        raise ZeroDivisionError
    assert recorder.calls == ["init", "end"]


def test_a_tracker_that_cannot_start_is_one_line(recorder: Recorder, tmp_path: Path) -> None:
    recorder.fails = ("init",)
    with (
        pytest.raises(InputError, match=r"^--report_to wandb: cannot start: no API key$"),
        tracking("wandb", tmp_path, {}),
    ):
        pytest.fail("the block does not begin")


def test_no_tracker_is_asked_unless_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator", None)  # a call would fail
    check_tracker("none")
    with tracking("none", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.7}, 10)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_tracker("tensorboard")
    with tracking("tensorboard", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.5}, 1)
        track({"val_auroc": 0.75}, 2)
    events = EventAccumulator(str(tmp_path / PROJECT)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("val_auroc")] == [
        (1, 0.5),
        (2, 0.75),
    ]


def test_tensorboards_files_do_not_name_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(socket, "gethostname", lambda: "ward-7-pc")
    with tracking("tensorboard", tmp_path, {"seed": 3}) as track:
        track({"val_auroc": 0.5}, 1)
    assert [path for path in tmp_path.rglob("*") if "tfevents" in path.name]
    assert not [path for path in tmp_path.rglob("*") if "ward-7-pc" in path.name]
    assert socket.gethostname() == "ward-7-pc"


def test_mlflow_gets_neither_the_user_nor_a_path(recorder: Recorder, tmp_path: Path) -> None:
    with tracking("mlflow", tmp_path, {}):
        pass
    tags = recorder.kwargs["mlflow"]["tags"]
    assert tags.keys() == {"mlflow.user", "mlflow.source.name"}
    assert not any("/" in tag or getpass.getuser() in tag for tag in tags.values())


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_tracker_that_is_not_installed_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name, as a tracker leaves one, is no package."""
    (tmp_path / "wandb").mkdir()
    bare = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path)])
    assert bare is not None
    found = bare if kind == "folder" else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: found)
    with pytest.raises(InputError, match=r"^--report_to wandb: not installed: pip install wandb$"):
        check_tracker("wandb")
