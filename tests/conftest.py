"""Shared by all tests: no network, small data in the user's format."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports transformers
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: the cores have tests to run

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

torch.set_num_threads(1)  # the models of the tests are too small to share

SAMPLE = Path(__file__).parent / "data" / "physionet2012_bicarbonate.csv"


def sign_table(rows: int, seed: int, *, shuffled: bool = False) -> pd.DataFrame:
    """Series whose label copies the sign of the last value, or has nothing to do with it."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(rows):
        times = np.sort(rng.uniform(0, 48, size=rng.integers(2, 6))).round(1)
        values = rng.integers(1, 13, size=len(times)) * rng.choice([-1, 1], size=len(times))
        texts.append(" -> ".join(f"{v} ({t}h)" for v, t in zip(values, times, strict=True)))
        labels.append(int(values[-1] > 0))
    if shuffled:
        labels = rng.permutation(labels).tolist()
    return pd.DataFrame({"clinical_trajectory": texts, "label_escalation": labels})


@pytest.fixture
def sign_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a ``sign_table`` with a given split: 240 rows train, 60 validate, 200 test."""

    def write(*, shuffled: bool = False) -> Path:
        table = sign_table(500, seed=1, shuffled=shuffled)
        table["split"] = ["train"] * 240 + ["val"] * 60 + ["test"] * 200
        path = tmp_path / "signs.csv"
        table.to_csv(path, index=False)
        return path

    return write


@pytest.fixture(scope="session")
def dka_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 160 sample stays in the user's two-column format."""
    table = pd.read_csv(SAMPLE, nrows=160)
    path = tmp_path_factory.mktemp("data") / "dka_training_data.csv"
    table[["clinical_trajectory", "label_escalation"]].to_csv(path, index=False)
    return path
