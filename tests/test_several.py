"""The program with several series of one patient: what it learns, refuses, and passes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.files import InputError
from stages import arguments
from trajectories import LABEL, SERIES

ROWS, TRAIN, VAL = 700, 440, 80
SECOND = "trajectory_lactate [mmol/L]"


def series(rng: np.random.Generator, hours: np.ndarray, values: np.ndarray | None = None) -> str:
    """Write a series at the given hours, of noise where no values are given."""
    values = rng.normal(20, 4, len(hours)) if values is None else values
    return " -> ".join(f"{v:.1f} ({t:.2f}h)" for v, t in zip(values, hours, strict=True))


def by_second_series(rng: np.random.Generator, label: int) -> tuple[str, str]:
    """Only the level of the second series tells the label."""
    hours = np.sort(rng.uniform(0, 48, 3))
    own = np.sort(rng.uniform(0, 48, 2))
    return series(rng, hours), series(rng, own, rng.normal(2 + 2 * label, 0.6, 2))


def by_interval(rng: np.random.Generator, label: int) -> tuple[str, str]:
    """Only the time from a value of the first series to the next of the second tells the label.

    The first series keeps its hours whatever the label; the second follows it by 1 or 5 hours.
    """
    hours = np.cumsum(rng.uniform(8, 16, 3))
    return series(rng, hours), series(rng, hours + (5 if label else 1) + rng.normal(0, 0.5, 3))


def write(path: Path, rule: Callable[[np.random.Generator, int], tuple[str, str]]) -> Path:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, ROWS)
    first, second = zip(*(rule(rng, int(label)) for label in labels), strict=True)
    parts = ["train"] * TRAIN + ["val"] * VAL + ["test"] * (ROWS - TRAIN - VAL)
    table = pd.DataFrame({SERIES: first, SECOND: second, LABEL: labels, "split": parts})
    table.to_csv(path, index=False)
    return path


def stage_1_auroc(data: Path, folder: Path, *flags: str) -> float:
    """Train stage 1 and return its test AUROC."""
    words = ["--trajectory_only", "--data_path", str(data), "--output_dir", str(folder)]
    words += ["--trajectory_epochs", "20", "--patience", "5", "--log_file", "none", *flags]
    assert trainer.main(words) == 0
    figures = json.loads((folder / "trajectory" / "metrics.json").read_text())
    return float(figures["test"]["auroc"]["value"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in which the second series tells the label."""
    return write(tmp_path_factory.mktemp("several") / "data.csv", by_second_series)


@pytest.fixture(scope="module")
def checkpoint(data: Path) -> Path:
    """Stage 1 on both series, after one epoch."""
    stage_1_auroc(data, data.parent / "run", "--trajectory_epochs", "1")
    return data.parent / "run" / "medgemma_trajectory_best.pt"


def test_what_only_a_second_series_tells_is_learned(data: Path, tmp_path: Path) -> None:
    assert stage_1_auroc(data, tmp_path / "both") > 0.9
    alone = ["--series", "anion gap", "--trajectory_epochs", "5"]
    assert 0.35 < stage_1_auroc(data, tmp_path / "one", *alone) < 0.65


def test_what_only_the_time_between_two_series_tells_is_learned(tmp_path: Path) -> None:
    data = write(tmp_path / "data.csv", by_interval)
    assert stage_1_auroc(data, tmp_path / "both") > 0.9
    alone = ["--series", "lactate", "--trajectory_epochs", "5"]
    assert 0.35 < stage_1_auroc(data, tmp_path / "one", *alone) < 0.65


def test_a_series_that_the_training_part_never_measures_is_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(data)
    table["trajectory_ph"] = np.where(table["split"] == "test", "7.4 (0h)", "")
    other = tmp_path / "data.csv"
    table.to_csv(other, index=False)
    words = ["--trajectory_only", "--data_path", str(other), "--output_dir", str(tmp_path / "run")]
    assert trainer.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "never measures ph" in error
    assert '--series "Anion gap,lactate"' in error
    assert not (tmp_path / "run" / "trajectory").exists()


def test_the_flags_reach_the_data_set_and_the_prompt(data: Path) -> None:
    words = ["--data_path", str(data), "--series", "lactate, Anion gap", "--max_len", "2"]
    args = arguments(*words, "--series_text", "last")
    dataset = trainer.read_dataset(args)
    assert dataset.features == ("lactate", "Anion gap")
    assert dataset.lengths.max() == 2
    assert dataset.prompt(0, trainer.prompt_options(args)).startswith("Last values: ")


def test_series_are_chosen_in_dka_files_only(tmp_path: Path) -> None:
    words = ["--dataset", "srtr", "--data_dir", str(tmp_path), "--series", "GFR"]
    with pytest.raises(InputError, match="--series: not for --dataset srtr"):
        trainer.read_dataset(arguments(*words))


def stage_2(data: Path, checkpoint: Path, folder: Path, *flags: str) -> int:
    """Start stage 2 with an encoder from stage 1."""
    words = ["--data_path", str(data), "--ode_checkpoint", str(checkpoint), "--model_name", "tiny"]
    return trainer.main([*words, "--output_dir", str(folder), *flags])


def test_a_checkpoint_of_other_series_is_refused_with_what_differs(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage_2(data, checkpoint, tmp_path, "--series", "lactate") == 2
    error = capsys.readouterr().err
    assert "trained on features ['Anion gap', 'lactate'], the data have ['lactate']" in error


def test_a_checkpoint_of_other_units_is_refused(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data.csv"
    other.write_text(data.read_text().replace("[mmol/L]", "[mg/dL]", 1))
    assert stage_2(other, checkpoint, tmp_path) == 2
    assert "trained on units ['mEq/L', 'mmol/L'], the data have" in capsys.readouterr().err


def test_a_shorter_view_of_the_same_rows_does_not_hide_another_split(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "data.csv"
    pd.read_csv(data).drop(columns="split").to_csv(plain, index=False)
    stage_1_auroc(plain, tmp_path / "run", "--trajectory_epochs", "1")
    checkpoint = tmp_path / "run" / "medgemma_trajectory_best.pt"
    capsys.readouterr()
    assert stage_2(plain, checkpoint, tmp_path / "x", "--seed", "3", "--max_len", "3") == 2
    assert str(checkpoint) in capsys.readouterr().err
