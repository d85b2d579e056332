"""Runs that the tests of several commands read and none changes."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.commands import results
from predicting import SERIES, STAGES, write_data


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """100 stays of the sample data, their ids apart from their patients, some out of time order."""
    table = pd.read_csv(SAMPLE, nrows=100, dtype=str)
    table.insert(1, "id", [f"row {k}" for k in range(len(table))])
    table.loc[5, SERIES] = " -> ".join(reversed(str(table.loc[5, SERIES]).split(" -> ")))
    return table


@pytest.fixture(scope="session")
def runs(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each stage on the tiny model, made by the command line."""
    place = tmp_path_factory.mktemp("runs")
    data = write_data(table, place / "train.csv")
    small = [
        "--data_path",
        str(data),
        "--output_dir",
        str(place),
        "--log_file",
        "none",
        "--min_cell",
        "0",
    ]
    small += ["--batch_size", "8", "--encoder_lr", "0.05"]
    assert trainer.main(["--trajectory_only", "--trajectory_epochs", "3", *small]) == 0
    small += ["--model_name", "tiny", "--epochs", "1", "--adapter_lr", "0.01"]
    small += ["--ode_checkpoint", str(place / "medgemma_trajectory_best.pt")]
    # A language model of weight 0 would hide faults of its part.
    with mock.patch.object(results, "fit_residual_weight", return_value=1.0):
        for mode in STAGES[1:]:
            assert trainer.main(["--mode", mode, *small]) == 0
    return place
