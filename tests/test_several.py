"""The program with several series of one patient: what it learns and passes on."""

import json

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.evaluation import baselines
from stages import arguments
from trajectories import LABEL, SERIES

pytestmark = pytest.mark.slow

ROWS, TRAIN, VAL = 560, 360, 60
SECOND = "trajectory_lactate [mmol/L]"


def series(rng, hours, values=None):
    """Write a series at the given hours, of noise where no values are given."""
    values = rng.normal(20, 4, len(hours)) if values is None else values
    return " -> ".join(f"{v:.1f} ({t:.2f}h)" for v, t in zip(values, hours, strict=True))


def by_second_series(rng, label):
    """Only the level of the second series tells the label."""
    hours = np.sort(rng.uniform(0, 48, 3))
    own = np.sort(rng.uniform(0, 48, 2))
    return series(rng, hours), series(rng, own, rng.normal(2 + 2 * label, 0.6, 2))


def by_interval(rng, label):
    """Only the time from a value of the first series to the next of the second tells the label.

    The first series keeps its hours whatever the label; the second follows it by 1 or 5 hours.
    """
    hours = np.cumsum(rng.uniform(8, 16, 3))
    return series(rng, hours), series(rng, hours + (5 if label else 1) + rng.normal(0, 0.5, 3))


def write(path, rule):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, ROWS)
    first, second = zip(*(rule(rng, int(label)) for label in labels), strict=True)
    parts = ["train"] * TRAIN + ["val"] * VAL + ["test"] * (ROWS - TRAIN - VAL)
    table = pd.DataFrame({SERIES: first, SECOND: second, LABEL: labels, "split": parts})
    table.to_csv(path, index=False)
    return path


def stage_1_auroc(data, folder, *flags):
    """Train stage 1 and return its test AUROC."""
    words = ["--trajectory_only", "--data_path", str(data), "--output_dir", str(folder)]
    words += ["--trajectory_epochs", "20", "--patience", "5", "--log_file", "none", *flags]
    assert trainer.main(words) == 0
    figures = json.loads((folder / "trajectory" / "metrics.json").read_text())
    return float(figures["test"]["auroc"]["value"])


@pytest.fixture(autouse=True)
def not_tuned(monkeypatch):
    """Search no settings of baselines, which takes longer than to train the model."""
    monkeypatch.setattr(baselines, "MIN_TUNED", ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file in which the second series tells the label."""
    return write(tmp_path_factory.mktemp("several") / "data.csv", by_second_series)


def test_what_only_a_second_series_tells_is_learned(data, tmp_path):
    assert stage_1_auroc(data, tmp_path / "both", "--trajectory_epochs", "8") > 0.9
    alone = ["--series", "main series", "--trajectory_epochs", "3"]
    assert 0.35 < stage_1_auroc(data, tmp_path / "one", *alone) < 0.65


def test_what_only_the_time_between_two_series_tells_is_learned(tmp_path):
    data = write(tmp_path / "data.csv", by_interval)
    assert stage_1_auroc(data, tmp_path / "both") > 0.9
    alone = ["--series", "lactate", "--trajectory_epochs", "3"]
    assert 0.35 < stage_1_auroc(data, tmp_path / "one", *alone) < 0.65


def test_the_flags_reach_the_data_set_and_the_prompt(data):
    words = ["--data_path", str(data), "--series", "lactate, Main series", "--max_len", "2"]
    args = arguments(*words, "--series_text", "last")
    dataset = trainer.read_dataset(args)
    assert dataset.features == ("lactate", "Main series")
    assert dataset.lengths.max() == 2
    assert dataset.prompt(0, trainer.run_folder.prompt_options(args)).startswith("Last values: ")
