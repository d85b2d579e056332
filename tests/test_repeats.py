"""--folds with --seeds: other folds of the same patients, and what their risks have in common."""

import json
import shutil
import signal
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import whole_reports
from medgemma_clinical.commands import folds, repeats
from medgemma_clinical.evaluation.metrics_table import (
    compared_models,
    draw_metrics,
    mean_of_repeats,
)
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from pages import Page
from stages import arguments
from visits import cohort

pytestmark = pytest.mark.slow

K, N, PATIENTS, SEED = 2, 3, 60, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 80 patients with one to three rows each."""
    path = tmp_path_factory.mktemp("data") / "data.csv"
    cohort(80).to_csv(path, index=False)
    return path


def command(data, folder, *words):
    flags = [f"--data_path={data}", f"--output_dir={folder}", "--log_file=none", f"--seed={SEED}"]
    flags += ["--trajectory_epochs=2", "--encoder_lr=0.05", f"--max_samples={PATIENTS}"]
    names = ["--series_name=Urea", "--outcome=Death", f"--folds={K}", f"--seeds={N}"]
    return ["--trajectory_only", *flags, *names, *words]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a command with three repeats of two folds and a model of all patients."""
    folder = tmp_path_factory.mktemp("repeats")
    with whole_reports():
        assert trainer.main(command(data, folder, "--final")) == 0
    return folder


def predictions(path):
    return pd.read_csv(path, dtype={"id": str, "patient": str})


def repeat_predictions(run, repeat):
    return predictions(run / f"repeat_{repeat}" / "folds_trajectory" / "predictions_folds.csv")


def content(path):
    return json.loads(path.read_text())


def test_each_repeat_predicts_each_row_once_in_folds_of_its_own(run):
    tables = [repeat_predictions(run, repeat) for repeat in range(N)]
    for repeat, table in enumerate(tables):
        assert table["id"].is_unique
        assert table["patient"].nunique() == PATIENTS
        assert table[["id", "label", "patient"]].equals(tables[0][["id", "label", "patient"]])
        assert table.groupby("patient")["fold"].nunique().max() == 1
        place = run / f"repeat_{repeat}" / "folds_trajectory" / "fold_0" / "trajectory"
        assert content(place / "run.json")["seed"] == SEED + repeat
    for one, other in combinations(tables, 2):
        together = [pd.crosstab(one["fold"], other["fold"]).to_numpy() / len(one)]
        assert np.min(together) > 0.1, "no fold is that of another repeat"
        assert (one["probability"] - other["probability"]).abs().min() > 0


def test_one_table_holds_all_risks_with_their_mean_and_spread(run):
    folder = run / "repeats_trajectory"
    table = predictions(folder / "predictions_repeats.csv")
    names = [f"repeat_{repeat}" for repeat in range(N)]
    assert list(table) == ["id", "label", "probability", "patient", "sd", *names]
    for repeat in range(N):
        own = repeat_predictions(run, repeat).set_index("id")["probability"]
        assert table.set_index("id")[f"repeat_{repeat}"].equals(own.rename(f"repeat_{repeat}"))
    assert table["probability"].to_numpy() == pytest.approx(table[names].mean(axis=1))
    assert table["sd"].to_numpy() == pytest.approx(table[names].std(axis=1))
    found = content(folder / "metrics.json")
    assert found["n"] == len(table)
    assert [line["seed"] for line in found["repeats"]] == [SEED, SEED + 1, SEED + 2]
    each = [content(run / name / "folds_trajectory" / "metrics.json") for name in names]
    aurocs = pd.Series([metrics["folds"]["auroc"]["value"] for metrics in each])
    thresholds = pd.Series([metrics["threshold"] for metrics in each], names)
    pairs = [(table[a] - table[b]).abs() for a, b in combinations(names, 2)]
    sides = (table[names] >= thresholds).nunique(axis=1)
    expected = {
        "mape": pd.concat(pairs).mean(),
        "sd_median": table["sd"].median(),
        "changes": (sides == 2).mean(),
        "threshold_min": thresholds.min(),
        "auroc_mean": aurocs.mean(),
        "auroc_sd": aurocs.std(),
    }
    measures = found["instability"]
    assert {name: measures[name] for name in expected} == pytest.approx(expected)


def test_the_page_has_the_mean_of_every_metric_and_nothing_of_one_repeat(run):
    folder = run / "repeats_trajectory"
    found, page = content(folder / "metrics.json"), Page((folder / "report.html").read_text()).text
    places = [run / f"repeat_{repeat}" / "folds_trajectory" for repeat in range(N)]
    each = [content(place / "metrics.json")["folds"] for place in places]
    for name in ("auroc", "brier", "sensitivity", "slope", "ici"):
        values = [metrics[name]["value"] for metrics in each]
        assert found["folds"][name]["value"] == pytest.approx(np.mean(values))
        assert found["folds"][name]["max"] == pytest.approx(max(values))
    assert found["folds"]["widening"] == pytest.approx(each[0]["widening"]), "as of one repeat"
    drawn = []
    for repeat in range(N):
        table = repeat_predictions(run, repeat)
        rows = table[["id", "label", "patient", "probability"]]
        drawn.append(draw_metrics(rows, SEED, split=table["fold"].to_numpy()))
    auroc = compared_models(mean_of_repeats(drawn)).row("probability", "auroc")
    ends = [found["folds"]["auroc"][name] for name in ("low", "high")]
    assert ends == pytest.approx([auroc.low, auroc.high]), "the same patients in all repeats"
    mean, first = (
        value_text(pd.Series(metrics["auroc"], dtype=float)).replace("\N{NO-BREAK SPACE}", " ")
        for metrics in (found["folds"], each[0])
    )
    assert mean in page
    assert first not in page
    assert f"drawn {N} times, by seeds {SEED} to {SEED + 2}: " in page
    auroc = f"{found['instability']['auroc_min']:.3f} to {found['instability']['auroc_max']:.3f}"
    assert f"AUROC {auroc} of the repeats" in page
    written = {path.stem for path in (folder / "figures").glob("*.csv")}
    assert {"metrics", "models", "instability"} <= written
    assert not {"subgroups", "decision_curve", "calibration", "thresholds"} & written
    assert "lower bound" not in Page((places[0] / "report.html").read_text()).text


def test_the_first_repeat_trains_the_model_of_all_patients(run):
    joint = content(run / "repeat_0" / "folds_trajectory" / "metrics.json")
    config = read_trajectory(run / "repeat_0" / TRAJECTORY_FILE).config
    assert config["metrics"]["folds"] == joint["folds"]
    assert [path.parent.name for path in run.glob(f"*/{TRAJECTORY_FILE}")] == ["repeat_0"]


def test_the_same_command_goes_on_with_the_repeat_that_was_stopped(
    run, data, tmp_path, monkeypatch, capsys
):
    place, last = tmp_path / "run", "repeat_1/folds_trajectory/fold_1"
    shutil.copytree(run, place)
    for name in (last, "repeat_2", "repeats_trajectory"):
        shutil.rmtree(place / name)
    (place / last).parent.joinpath("predictions_folds.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("predictions_test.csv")}
    words, step, steps = command(data, place, "--final"), trainer.step, []

    def stopped(*values):
        steps.append(1)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*values)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", stopped)
        assert trainer.main(words) == 143
    assert not (place / "repeat_2").exists()
    assert not (place / "repeats_trajectory").exists()
    capsys.readouterr()
    assert trainer.main(words) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("repeat ")]
    how = ["already there", "already there", "already there", "continued"]
    assert [line.split(": ")[1].partition(", ")[0] for line in lines[:4]] == how
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("predictions_repeats.csv", "metrics.json"):
        name = f"repeats_trajectory/{name}"
        assert (place / name).read_bytes() == (run / name).read_bytes()


def test_rows_that_some_repeat_does_not_predict_are_left_out(run, tmp_path):
    folders = [tmp_path / str(repeat) for repeat in range(N)]
    for repeat, folder in enumerate(folders):
        folder.mkdir()
        table = repeat_predictions(run, repeat).drop(index=[2 * repeat])
        table.to_csv(folder / "predictions_folds.csv", index=False)
    ids = repeat_predictions(run, 0)["id"].drop(index=[0, 2, 4])
    assert repeats.join_repeats(folders)["id"].tolist() == ids.tolist()


def test_a_repeat_has_its_folder_its_seed_and_its_stage_1():
    path = "a/repeat_{repeat}/folds_trajectory/fold_{fold}/x.pt"
    words = ["--output_dir=out", "--seed=7", "--folds=3", "--seeds=2", "--final"]
    args = arguments(*words, f"--ode_checkpoint={path}")
    first, second = (repeats.repeat_arguments(repeat, args) for repeat in (0, 1))
    assert second.output_dir == Path("out/repeat_1")
    assert (first.seed, second.seed, second.seeds) == (7, 8, None)
    assert (first.final, second.final) == (True, False)
    own = folds.fold_arguments(2, second)
    assert own.ode_checkpoint == Path("a/repeat_1/folds_trajectory/fold_2/x.pt")
    assert own.output_dir == Path("out/repeat_1/folds_classification/fold_2")
