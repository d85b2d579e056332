"""Figures for a tracker: all of them, nothing else, and one clear line where it cannot be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import medgemma_trainer as trainer

SAMPLE = Path(__file__).parent / "data" / "physionet2012_bicarbonate.csv"
MARKER = "MARKER7319"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A short run of stage 1 whose every text holds a marker."""
    folder = tmp_path / MARKER
    folder.mkdir()
    table = pd.read_csv(SAMPLE, nrows=100, dtype=str)
    table["subject_id"] = MARKER + table["subject_id"]
    table["clinical_context"] = MARKER + table["clinical_context"]
    table["clinical_trajectory"] = "731.9 (0h) -> " + table["clinical_trajectory"]
    table.to_csv(folder / "data.csv", index=False)
    flags = ["--trajectory_only", "--data_path", str(folder / "data.csv"), "--log_file", "none"]
    flags += ["--trajectory_epochs", "3", "--output_dir", str(tmp_path / "out")]
    return flags


class Recorder:
    """Stands where accelerate would, and remembers what it is told."""

    def __init__(self, **setup: Any) -> None:
        self.setup = setup
        self.numbers: dict[str, Any] = {}
        self.kwargs: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.ended = False

    def __call__(self, **setup: Any) -> Recorder:
        self.setup = setup
        return self

    def init_trackers(self, name: str, numbers: dict[str, Any], kwargs: dict[str, Any]) -> None:
        self.numbers, self.kwargs = numbers, kwargs

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((figures, step))

    def end_training(self) -> None:
        self.ended = True


def test_a_tracker_gets_each_epoch_and_the_final_figures_as_numbers(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr("accelerate.Accelerator", recorder)
    monkeypatch.setattr(trainer, "check_tracker", lambda name: None)
    assert trainer.main([*words, "--report_to", "wandb"]) == 0
    assert recorder.setup["log_with"] == "wandb"
    assert recorder.ended
    folder = tmp_path / "out" / "trajectory"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    *epochs, (final, _) = recorder.logged
    assert [step for _, step in epochs] == [row["step"] for row in history]
    for (figures, _), row in zip(epochs, history, strict=True):
        assert figures == {name: row[name] for name in figures}
        assert {"train_loss", "val_loss", "val_auroc"} <= set(figures)
    metrics = json.loads((folder / "metrics.json").read_text())
    for part in ("validation", "test"):
        for name in ("auroc", "auprc", "brier", "log_loss"):
            assert final[f"{part}_{name}"] == metrics[part][name]["value"]
    told = [recorder.numbers, *(figures for figures, _ in recorder.logged)]
    assert all(isinstance(value, (int, float)) for figures in told for value in figures.values())
    assert MARKER not in repr(told)
    settings = recorder.kwargs["wandb"]["settings"]
    assert settings["console"] == "off", "what the terminal shows stays here"
    assert settings["disable_code"]
    assert settings["disable_git"]


def test_tensorboard_gets_no_text_of_the_data_and_no_path(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trainer.main([*words, "--report_to", "tensorboard"]) == 0
    folder = tmp_path / "out" / "tracker" / "trajectory" / trainer.TRACKED_AS
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert MARKER.encode() not in content
        assert b"731.9" not in content
    events = EventAccumulator(str(folder)).Reload()
    metrics = json.loads((tmp_path / "out" / "trajectory" / "metrics.json").read_text())
    (last,) = events.Scalars("test_auroc")
    assert last.value == pytest.approx(metrics["test"]["auroc"]["value"])
    assert len(events.Scalars("val_auroc")) == 3


def test_no_tracker_is_asked_unless_wanted(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator", None)  # a call would fail
    assert trainer.main(words) == 0


def test_a_tracker_that_is_not_installed_is_one_line_and_nothing_is_written(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: real(name, *rest) if name != "mlflow" else None,
    )
    assert trainer.main([*words, "--report_to", "mlflow"]) == 2
    assert capsys.readouterr().err == (
        "error: --report_to mlflow: not installed: pip install mlflow\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_start_is_one_line(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(Recorder):
        def init_trackers(self, name: str, numbers: Any, kwargs: Any) -> None:
            raise RuntimeError("no API key\nand a long story")

    monkeypatch.setattr("accelerate.Accelerator", Broken())
    monkeypatch.setattr(trainer, "check_tracker", lambda name: None)
    assert trainer.main([*words, "--report_to", "wandb"]) == 2
    assert capsys.readouterr().err == "error: --report_to wandb: cannot start: no API key\n"
    assert not list((tmp_path / "out").iterdir()), "no half-made run"


def test_a_folder_of_a_trackers_name_is_no_tracker(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path" / "wandb").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "path")
    real = importlib.util.find_spec
    bare = importlib.machinery.PathFinder.find_spec("wandb", [str(tmp_path / "path")])
    assert bare is not None

    def found(name: str, *rest: Any) -> Any:
        return bare if name == "wandb" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert trainer.main([*words, "--report_to", "wandb"]) == 2
    assert not (tmp_path / "out").exists()
