"""``predict --update``: a model that a hospital has moved to its own rows."""

from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.inference import hub
from medgemma_clinical.inference.hub import shared_copy
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_trainer import TrajectoryModel
from predicting import STAGES, command, predicted, refused, write_data

pytestmark = pytest.mark.slow

LABEL = "label_escalation"


@pytest.fixture(scope="module")
def strangers():
    """500 further stays, none of which trained a model of ``runs``, and with more events."""
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:700].reset_index(drop=True)
    rows.loc[::3, LABEL] = "1"
    return rows


def spread(before, after):
    """Return how far the log-odds of two predictions are from a line."""
    x, y = logit(before["probability"]), logit(after["probability"])
    slope, intercept = np.polyfit(x, y, 1)
    assert slope > 0
    return np.abs(intercept + slope * x - y).max()


@pytest.mark.parametrize(
    ("stage", "use"), [*((stage, "stage") for stage in STAGES[:2]), ("trajectory", "ensemble")]
)
def test_the_updated_model_loads_and_predicts_the_event_for_the_same_rows(
    stage, use, runs, table, strangers, tmp_path, capsys, monkeypatch
):
    """Rows of the training data do not update it, and those that did are known to it."""
    rows = pd.concat([table.iloc[:40], strangers])
    data, new = write_data(rows, tmp_path / "rows.csv"), tmp_path / "hospitals" / "new"
    flags = ["--use", use]
    before = predicted(runs / stage, data, tmp_path / "1.csv", *flags, "--update", str(new))
    assert f"updated model: {new}" in capsys.readouterr().out
    after = predicted(new, data, tmp_path / "2.csv", *flags, "--model_name", TINY_MODEL)
    assert spread(before, after) < 1e-5
    assert np.abs(before["probability"] - after["probability"]).max() > 1e-3
    pd.testing.assert_series_equal(before["prediction"], after["prediction"])
    others = before.filter(regex=f"^probability_(?!words|{use})")  # no copy holds words
    pd.testing.assert_frame_equal(after[others.columns], others, rtol=0, atol=1e-6)
    told, updated = capsys.readouterr().out, read_trained_config(new)["updated"]
    used = use if use == "ensemble" else STAGE_NAMES[stage]
    calibrated = read_trained_config(new)["reference"]
    assert {*calibrated} == {used}, "the 20 held-out rows of the training are too few"
    assert calibrated[used]["multiplier"] == pytest.approx(1, abs=0.05)
    assert calibrated[used]["patients"] == updated["patients"]
    trained = (runs / stage).parent / "trajectory"
    held_out = pd.concat(pd.read_csv(trained / f"predictions_{x}.csv") for x in ("val", "test"))
    held_out = rows["subject_id"].isin(held_out["patient"].astype(str)).iloc[:40].sum()
    assert (updated["rows"], updated["patients"]) == (len(strangers) + held_out,) * 2
    assert updated["events"] >= (strangers[LABEL] == "1").sum()
    if stage == "trajectory":
        assert f"{len(rows)} are in the training data" in told
        assert "No metrics" in told
    else:
        assert "does not hold its training data" in told
    assert "Updated after its test" in (new / "README.md").read_text()
    if use == "ensemble":
        updates = ["--update", str(new)]
        predicted(runs / stage, data, tmp_path / "3.csv", *flags, *updates)
        assert (new.parent / "new.1").is_dir(), "an earlier model is moved aside"
        kept = {path: path.read_bytes() for path in new.parent.rglob("*") if path.is_file()}
        monkeypatch.setattr(hub, "write_text", MagicMock(side_effect=OSError(28, "No space")))
        assert trainer.main(command(runs / stage, data, tmp_path / "4.csv", *flags, *updates)) == 3
        assert {path: path.read_bytes() for path in kept} == kept
        assert not (new.parent / "new.2").exists()


def test_a_shared_copy_is_updated_twice_and_knows_the_rows_but_not_its_training(
    runs, strangers, tmp_path, capsys
):
    model = TrajectoryModel.from_pretrained(runs / "trajectory")
    shared_copy(model.trained, tmp_path / "shared")
    second = strangers.iloc[150:].copy()
    second.iloc[::2, second.columns.get_loc(LABEL)] = "1"  # needs another update
    parts, source = (strangers.iloc[:300], second), tmp_path / "shared"
    for k, rows in enumerate(parts):
        data, new = write_data(rows, tmp_path / f"{k}.csv"), tmp_path / f"new_{k}"
        predicted(source, data, tmp_path / "out.csv", "--update", str(new))
        assert "does not hold its training data" in capsys.readouterr().out
        config = read_trained_config(new)["updated"]
        assert config["rows"] == (300, 200)[k]
        source = new


def test_where_tests_show_no_need_no_model_is_written(
    runs, strangers, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("medgemma_clinical.evaluation.decision.LEVEL", 0.0)
    data, new = write_data(strangers, tmp_path / "rows.csv"), tmp_path / "new"
    predicted(runs / "trajectory", data, tmp_path / "out.csv", "--update", str(new))
    assert f"--update {new}: not written" in capsys.readouterr().out
    assert not new.exists()


@pytest.mark.parametrize("case", ["few", "one class", "no labels", "occupied"])
def test_no_model_is_written_in_place_of_others_or_from_few_patients(
    case, runs, strangers, tmp_path, capsys
):
    rows = strangers.head(30)
    rows = rows.drop(columns=LABEL) if case == "no labels" else rows
    rows = rows.assign(**{LABEL: "0"}) if case == "one class" else rows
    data, new = write_data(rows, tmp_path / "rows.csv"), tmp_path / "new"
    if case == "occupied":
        new.mkdir()
        (new / "mine.txt").write_text("mine")
    out = tmp_path / "out.csv"
    words = command(runs / "trajectory", data, out, "--update", str(new))
    assert refused(capsys, words, "--update" if case != "occupied" else str(new))
    assert out.exists() == (case != "occupied"), "the predictions do not need the update"
    assert new.exists() == (case == "occupied")
    assert not list(tmp_path.glob("*.partial"))
