"""Baselines beside a trained model: found, checked, used; a copy without them says so."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL, rehash
from medgemma_clinical.data.summaries import SINCE_LAST
from medgemma_clinical.evaluation.baselines import BOOSTING, ENSEMBLE, LOGISTIC, STAGE_NAMES
from medgemma_clinical.evaluation.decision import MIN_CHOOSING_EVENTS, choose_threshold
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.verdicts import planned_above_chance
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.models.checkpoints import BASELINES, TRAJECTORY_FILE
from medgemma_clinical.models.model_card import model_card
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_trainer import TrajectoryModel, fit_trajectory
from predicting import STAGES, command, predicted, refused, write_data
from srtr_files import synthetic_tables, write_folder

pytestmark = pytest.mark.slow

STATICS = f"{LOGISTIC} with statics"


@pytest.fixture(scope="module")
def new(table, tmp_path_factory):
    """Rows without labels."""
    few = table.head(12).drop(columns="label_escalation")
    return write_data(few, tmp_path_factory.mktemp("new") / "new.csv")


@pytest.fixture
def place(runs, tmp_path):
    """A copy of the runs' stage 1 that a test may change."""
    shutil.copytree(runs / "trajectory", tmp_path / "run" / "trajectory")
    shutil.copy(runs / TRAJECTORY_FILE, tmp_path / "run")
    return tmp_path / "run"


def others(table):
    return [name for name in table if name.startswith("probability_")]


def read(path):
    return json.loads(path.read_text())


# ------------------------------------------------------------------ found or lacking


def test_a_file_beside_its_folder_has_the_baselines_and_alone_has_none(
    place, new, tmp_path, capsys
):
    file, out = place / TRAJECTORY_FILE, tmp_path / "out.csv"
    whole = predicted(place / "trajectory", new, out)
    assert others(whole)
    pd.testing.assert_frame_equal(predicted(file, new, out), whole)
    aside = place / TRAJECTORY_FILE.replace(".pt", ".1.pt")
    (place / "trajectory").rename(place / "trajectory.1")  # as a new run moves an earlier one
    file.rename(aside)
    pd.testing.assert_frame_equal(predicted(aside, new, out), whole)
    alone = shutil.move(aside, tmp_path / "alone.pt")
    capsys.readouterr()
    found = predicted(alone, new, out)
    assert BASELINES in capsys.readouterr().out
    pd.testing.assert_frame_equal(found, whole.drop(columns=others(whole)))
    with pytest.raises(InputError, match="ensemble"):
        TrajectoryModel.from_pretrained(alone).predict(new, model="ensemble")
    for use in ("ensemble", "best"):
        assert refused(capsys, command(alone, new, tmp_path / "o.csv", "--use", use), "--use")


def test_a_saved_model_has_all_and_a_shared_one_lacks_the_words(runs, new, tmp_path):
    model = TrajectoryModel.from_pretrained(runs / "classification")
    expected, words = model.predictions(new), "probability_words_of_the_context"
    assert words in expected
    model.save_pretrained(tmp_path / "saved")
    saved = TrajectoryModel.from_pretrained(tmp_path / "saved", model_name=TINY_MODEL)
    pd.testing.assert_frame_equal(saved.predictions(new), expected)
    model.save_shared(tmp_path / "shared")
    shared = TrajectoryModel.from_pretrained(tmp_path / "shared", model_name=TINY_MODEL)
    pd.testing.assert_frame_equal(shared.predictions(new), expected.drop(columns=words))
    vocabulary = model.trained.text.reading.vocabulary
    assert len(vocabulary) > 10
    text = (tmp_path / "shared" / BASELINES).read_text()
    assert not [word for word in vocabulary if f'"{word}"' in text]


# ------------------------------------------------------------------ checked


def with_loop(content):
    content["models"][BOOSTING]["text"] = content["models"][BOOSTING]["text"].replace(
        "\nleft_child=1 ", "\nleft_child=0 ", 1
    )


def with_infinity(content):
    content["models"][LOGISTIC]["means"][0] = float("inf")


@pytest.mark.parametrize("change", [with_loop, with_infinity])
def test_a_hostile_file_with_a_right_hash_is_refused(change, runs, new, tmp_path, capsys):
    stage = shutil.copytree(runs / "classification", tmp_path / "classification")
    content = read(stage / BASELINES)
    before = json.dumps(content)
    change(content)
    assert json.dumps(content) != before
    (stage / BASELINES).write_text(json.dumps(content))
    rehash(stage / "best", baselines_sha256=file_hash(stage / BASELINES))
    words = command(stage, new, tmp_path / "other.csv")
    assert refused(capsys, words, stage / BASELINES, out=tmp_path / "other.csv")


@pytest.mark.parametrize("how", ["changed", "cut", "other"])
def test_a_file_that_is_not_as_it_was_written_is_refused(how, place, new, tmp_path, capsys):
    file = place / "trajectory" / BASELINES
    text = file.read_text()
    changed = {"changed": text.replace("1", "2", 1), "cut": text[:-9], "other": "[]"}
    file.write_text(changed[how])
    words = command(place / "trajectory", new, tmp_path / "out.csv")
    assert refused(capsys, words, file, out=tmp_path / "out.csv")


# ------------------------------------------------------------------ used


@pytest.mark.parametrize("stage", STAGES[:2])
def test_use_gives_another_model_the_probability_and_its_own_threshold(stage, runs, new, tmp_path):
    folder, config = runs / stage, read_trained_config(runs / stage)
    own, model = predicted(folder, new, tmp_path / "own.csv"), None
    rules = config["models"]
    for name, use in ((ENSEMBLE, "ensemble"), (STATICS, STATICS.replace(" ", "_"))):
        found = predicted(folder, new, tmp_path / "out.csv", "--use", use)
        if name == STAGE_NAMES[stage]:
            pd.testing.assert_frame_equal(found, own)
            continue
        assert others(found) == ["probability_stage", *others(own)]
        column = f"probability_{name.replace(' ', '_')}"
        assert found["probability"].tolist() == found[column].tolist() == own[column].tolist()
        assert found["probability_stage"].tolist() == own["probability"].tolist()
        positive = found["probability"] >= rules[name]["label"]["threshold"]
        assert (found["prediction"] == positive).all()
        if stage == "trajectory":
            model = model or TrajectoryModel.from_pretrained(folder)
            again = model.predict_proba(new, name)[:, 1]
            np.testing.assert_allclose(again, found["probability"], rtol=5e-6)
            assert model.predict(new, use).tolist() == found["prediction"].tolist()
            assert others(model.predictions(new, model=use)) == others(found)


@pytest.mark.parametrize("more", [("--use", "noise"), ("--use", "ensemble", "--explain")])
def test_use_is_refused_by_one_line(more, runs, new, tmp_path, capsys):
    words = command(runs / "trajectory", new, tmp_path / "out.csv", *more)
    assert refused(capsys, words, f"--use {more[1]}", out=tmp_path / "out.csv")


@pytest.mark.parametrize("name", [ENSEMBLE, STATICS, None])
def test_use_best_takes_the_recommended_model_and_none_is_refused(
    name, place, new, tmp_path, capsys
):
    content = torch.load(place / TRAJECTORY_FILE, weights_only=True)
    content["config"]["best_model"] = name
    torch.save(content, place / TRAJECTORY_FILE)
    model = TrajectoryModel.from_pretrained(place / "trajectory")
    out = tmp_path / "out.csv"
    words = command(place / "trajectory", new, out, "--use", "best")
    if name is None:
        assert refused(capsys, words, "--use best", "--use NAME", out=out)
        with pytest.raises(InputError, match="--use NAME"):
            model.predict_proba(new, "best")
        assert len(model.predict_proba(new, "stage")) == len(pd.read_csv(new))
        return
    found = predicted(place / "trajectory", new, out, "--use", "best")
    np.testing.assert_allclose(
        model.predict_proba(new, name)[:, 1], found["probability"], rtol=5e-6
    )
    np.testing.assert_allclose(
        model.predict_proba(new, "best")[:, 1], found["probability"], rtol=5e-6
    )


@pytest.mark.parametrize("stage", STAGES)
def test_the_recommended_model_of_few_events_is_the_planned_comparison_or_none(stage, runs):
    config, folder = read_trained_config(runs / stage), runs / stage
    val = pd.read_csv(folder / "predictions_val.csv")
    assert val["label"].sum() < MIN_CHOOSING_EVENTS
    metrics = Metrics.from_json(read(folder / "metrics.json")["validation"])
    assert config["best_model"] == planned_above_chance(metrics)
    for text in (model_card(config), (folder / "report.html").read_text()):
        assert f"fewer than {MIN_CHOOSING_EVENTS} events in the validation rows" in text
    assert read(folder / "run.json")["best_model"] == config["best_model"]
    for name, rules in config["models"].items():
        threshold = choose_threshold(None, of_labels(val["label"].to_numpy()), val[name].to_numpy())
        threshold = pytest.approx(threshold)
        assert rules == {"label": {"multiplier": 1.0, "shift": 0.0, "threshold": threshold}}
    results = f"{stage}/{BASELINES}"
    assert read(folder / "run.json")["results_sha256"][results] == config["baselines_sha256"]


# ------------------------------------------------------------------ as in training


def test_a_model_in_memory_keeps_its_baselines_recalibrated_as_it_is(tmp_path):
    rows = pd.read_csv(SAMPLE, nrows=400)
    words = {"trajectory_epochs": 1, "min_cell": 0, "calibrate": "platt"}
    model = fit_trajectory(rows, **words)
    assert "baselines_sha256" not in model.config
    multipliers = {rules["label"]["multiplier"] for rules in model.config["models"].values()}
    assert len(multipliers) > 3, "recalibrated, each on its own"
    model.save_pretrained(tmp_path / "saved")
    for name in ("ensemble", "last value"):
        saved = TrajectoryModel.from_pretrained(tmp_path / "saved").predict_proba(rows, name)
        np.testing.assert_array_equal(model.predict_proba(rows, name), saved)


def test_baselines_read_what_their_stage_does_not(tmp_path, capsys):
    """A language model of text alone; rows without the columns have no risk."""
    rows = pd.read_csv(SAMPLE, nrows=80, dtype=str)
    rows["prediction_hours"] = np.arange(80) % 7 + 100
    data, out = write_data(rows, tmp_path / "data.csv"), tmp_path / "out.csv"
    words = ["--model_name", TINY_MODEL, "--soft_prompt", "off", "--epochs", "1"]
    assert trainer.main([*words, "--data_path", str(data), "--output_dir", str(tmp_path)]) == 0
    folder = tmp_path / "classification"
    assert SINCE_LAST in read(folder / BASELINES)["models"][LOGISTIC]["columns"]
    found, own = predicted(folder, data, out), pd.read_csv(folder / "predictions_test.csv")
    found = found.set_index(found["id"].astype(own["id"].dtype)).loc[own["id"]]
    for name in (STATICS, LOGISTIC, BOOSTING, "last value", "blend with statics"):
        column = found[f"probability_{name.replace(' ', '_')}"]
        np.testing.assert_allclose(column, own[name], rtol=0, atol=1e-6)
    bare = rows.drop(columns=[name for name in rows if name.startswith("static_")])
    data = write_data(bare, tmp_path / "bare.csv")
    lacking = {name for name, x in predicted(folder, data, out).items() if x.isna().all()}
    assert lacking > {"probability_ensemble", "probability_statics_alone"}
    assert "probability_logistic_regression" not in lacking
    other = tmp_path / "other.csv"
    assert refused(capsys, command(folder, data, other, "--use", "ensemble"), data, out=other)


def test_predictions_on_srtr_are_those_of_the_run(tmp_path):
    data = write_folder(tmp_path / "srtr", *synthetic_tables("kidney"), "kidney")
    words = ["--dataset", "srtr", "--organ", "kidney", "--data_dir", str(data)]
    words += ["--output_dir", str(tmp_path), "--trajectory_epochs", "1", "--trajectory_only"]
    assert trainer.main(words) == 0
    words = ["predict", "--checkpoint", str(tmp_path / "trajectory"), "--data_dir", str(data)]
    assert trainer.main([*words, "--predictions", str(tmp_path / "out.csv")]) == 0
    found = pd.read_csv(tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv").set_index("id")
    own = own.drop(columns=["label", "probability", "patient", "model_sha256", ENSEMBLE])
    assert len(own.columns) > 9
    for name in own:
        column = found.loc[own.index, f"probability_{name.replace(' ', '_')}"]
        np.testing.assert_allclose(column, own[name], rtol=0, atol=1e-6)
