"""--folds, --leave_out and --final: every patient is predicted once, by a model of the others."""

import contextlib
import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, logit
from sklearn.metrics import recall_score, roc_auc_score

import medgemma_trainer as trainer
from conftest import whole_reports
from dataset_format import MIMICtrajectoryDataset
from language_models import TINY_MODEL
from medgemma_clinical.commands import folds, plan
from medgemma_clinical.commands.run_folder import stage_folder
from medgemma_clinical.data.fold_split import draw_folds, fold_dataset, foldable
from medgemma_clinical.data.overlap import patient_hashes
from medgemma_clinical.evaluation.baselines import STAGE_NAMES, describe_tuning
from medgemma_clinical.evaluation.decision import (
    BOTH,
    TESTS,
    DecisionOptions,
    DecisionRule,
    choose_threshold,
    fit_rule,
    fit_updates,
    recommended_model,
)
from medgemma_clinical.evaluation.metrics import LOGIT, log_odds, of_labels, row_losses
from medgemma_clinical.evaluation.metrics_table import SHARED_TRAINING, Metrics
from medgemma_clinical.evaluation.rules import decide_folds
from medgemma_clinical.evaluation.target import LABEL as TARGET
from medgemma_clinical.evaluation.verdicts import planned_above_chance
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.training.state import LOSS_TOLERANCE, describe_selection, read_state
from medgemma_trainer import TrajectoryModel, cross_validate
from pages import Page
from stages import arguments, parsed, train_epoch
from toy_stage import toy_stage
from visits import LABEL, cohort

pytestmark = pytest.mark.slow

STAGE_1, K = STAGE_NAMES["trajectory"], 3
FLAGS = {"trajectory_epochs": 3, "encoder_lr": 0.05, "series_name": "Urea", "outcome": "Death"}
WORDS = [f"--{name}={value}" for name, value in FLAGS.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 80 patients with one to three rows each, of two sites, with a column ``split``."""
    table = cohort(80)
    table["static_age [years]"] = np.random.default_rng(0).integers(20, 90, len(table))
    patient = table["subject_id"].str[1:].astype(int)
    table["ward"] = np.where(patient % 2, "east", np.where(patient < 50, "north", "west"))
    path = tmp_path_factory.mktemp("data") / "data.csv"
    table.assign(split="train").to_csv(path, index=False)
    return path


def command(data, folder, *words):
    words = words or (f"--folds={K}",)
    place = [f"--data_path={data}", f"--output_dir={folder}", "--log_file=none"]
    return ["--trajectory_only", *place, *WORDS, *words]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a command with three folds and a model of all patients."""
    folder = tmp_path_factory.mktemp("folds")
    with whole_reports():
        assert trainer.main(command(data, folder, f"--folds={K}", "--final")) == 0
    return folder


def fold_folder(run, k):
    return run / "folds_trajectory" / f"fold_{k}" / "trajectory"


def predictions(path):
    return pd.read_csv(path, dtype={"id": str, "patient": str})


def content(path):
    return json.loads(path.read_text())


def rows_and_folds(data, seed=0):
    """Return the rows that are dealt out, and the fold of each."""
    rows = foldable(MIMICtrajectoryDataset(data, series_name="Urea", outcome="Death"), 0, seed)
    return rows, draw_folds(rows.groups, rows.labels, K, seed)


def state(folder):
    """Return what a run learned: weights, and the risks of its models on the validation part."""
    weights = read_trajectory(folder.parent / TRAJECTORY_FILE).weights
    return weights, (folder / "predictions_val.csv").read_bytes()


def assert_equal(first, second):
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(tensor, second[0][name]) for name, tensor in first[0].items())


# ----------------------------------------------------------------------- which model predicts whom


def test_every_row_is_predicted_once_by_the_model_of_its_fold(run, data):
    rows, fold = rows_and_folds(data)
    table = predictions(run / "folds_trajectory" / "predictions_folds.csv")
    assert list(table)[:5] == ["id", "label", "probability", "patient", "fold"]
    assert table["id"].tolist() == rows.ids.tolist()
    assert table["label"].tolist() == rows.labels.tolist()
    assert table["patient"].tolist() == rows.groups.tolist()
    assert table["fold"].tolist() == fold.tolist()
    for k in range(K):
        own = predictions(fold_folder(run, k) / "predictions_test.csv")
        same = table[table["fold"] == k].drop(columns="fold").reset_index(drop=True)
        pd.testing.assert_frame_equal(same, own[list(same)])
        learned = read_trajectory(fold_folder(run, k).parent / TRAJECTORY_FILE).train_patients
        assert not np.isin(patient_hashes(rows, np.flatnonzero(fold == k)), learned).any()


def test_each_fold_chooses_its_series_and_judges_the_rows_that_hold_one(data, tmp_path):
    """The patients of fold 0 alone have a series, some rows nothing else."""
    rows, fold = rows_and_folds(data)
    table = pd.read_csv(data, dtype=str, keep_default_na=False)
    table["trajectory_rare"] = np.where(fold == 0, "3 (1h)", "")
    alone = np.flatnonzero(fold == 0)[:2]
    table.loc[alone, "clinical_trajectory"] = ""
    table.to_csv(tmp_path / "rare.csv", index=False)
    words = command(tmp_path / "rare.csv", tmp_path, f"--folds={K}", "--final")
    with whole_reports():
        assert trainer.main([*words, "--trajectory_epochs=1"]) == 0
    found = predictions(tmp_path / "folds_trajectory" / "predictions_folds.csv")
    assert found["id"].tolist() == np.delete(rows.ids, alone).tolist()
    assert found["fold"].tolist() == np.delete(fold, alone).tolist()
    flow = pd.read_csv(tmp_path / "folds_trajectory" / "figures" / "flow.csv")
    assert flow[["removed", "left"]].to_numpy().tolist() == [[2, len(found)]]
    series = [["Urea"], *[["Urea", "rare"]] * K]
    for k, place in enumerate([*(fold_folder(tmp_path, k) for k in range(K)), tmp_path / "x"]):
        config = read_trajectory(place.parent / TRAJECTORY_FILE).config
        assert config["inputs"]["series"] == series[k]


def test_metrics_that_compare_risks_are_means_over_the_folds_and_shares_are_of_all_rows(run):
    table = predictions(run / "folds_trajectory" / "predictions_folds.csv")
    metrics = content(run / "folds_trajectory" / "metrics.json")["folds"]
    for name in ("probability", "last value", "ensemble"):
        each = [roc_auc_score(own["label"], own[name]) for _, own in table.groupby("fold")]
        known = metrics if name == "probability" else metrics["models"][name]
        assert known["auroc"]["value"] == pytest.approx(np.mean(each))
    difference = metrics["models"]["last value"]["auroc"]["value"] - metrics["auroc"]["value"]
    assert metrics["models"]["last value"]["auroc"]["difference"] == pytest.approx(difference)
    threshold = content(run / "folds_trajectory" / "metrics.json")["threshold"]
    positive = table["probability"] >= threshold
    assert metrics["sensitivity"]["value"] == pytest.approx(recall_score(table["label"], positive))
    page = (run / "folds_trajectory" / "report.html").read_text()
    assert f"one of {K} models that did not learn from them" in page
    assert "on these rows, whose metrics at it are optimistic" in page


def test_the_pages_of_the_folds_say_what_their_intervals_leave_out_and_how_the_data_were_divided(
    run, data
):
    rows, fold = rows_and_folds(data)
    folder = run / "folds_trajectory"
    page = Page((folder / "report.html").read_text()).text
    tuned = describe_tuning([False] * K)
    for text in (
        f"{np.sqrt(1 + SHARED_TRAINING * K / (K - 1)):.2f} times as wide",
        tuned,
        describe_selection(1),
        f"of {K} models",
    ):
        assert text in page
    for k in range(K):
        tripod = (fold_folder(run, k) / "tripod.md").read_text()
        assert fold_dataset(rows, fold, k, 0).describe_origin(0) in tripod


def test_the_page_of_the_folds_hides_how_they_differ_where_one_has_few_events(run, data, tmp_path):
    shutil.copytree(run / "folds_trajectory", tmp_path / "folds_trajectory")
    shown = {}
    for n in (0, 11):
        args = arguments(*command(data, tmp_path, f"--folds={K}", f"--min_cell={n}"))
        with whole_reports():
            folds.write_fold_results(folds.plan_folds(args, rows_and_folds(data)[0])[1])
        text = Page((tmp_path / "folds_trajectory" / "report.html").read_text()).text
        shown[n] = f"over the {K} folds (AUROC " in text
    assert shown == {0: True, 11: False}


def test_a_fold_that_is_held_out_changes_nothing_that_the_others_teach(run, data, tmp_path):
    rows, fold = rows_and_folds(data)
    changed, held_out = copy.copy(rows), fold == 1
    event = np.isin(rows.groups, rows.groups[rows.labels == 1])
    changed.labels = np.where(held_out, ~event, rows.labels)
    changed.values = np.where(held_out[rows.owner][:, None], 900.0, rows.values)
    changed.static = np.where(held_out[:, None], 900.0, rows.static)
    words = command(data, tmp_path)
    args = folds.fold_arguments(1, arguments(*words))
    assert trainer.train(args, fold_dataset(changed, fold, 1, 0)) == 0
    assert_equal(state(stage_folder(args)), state(fold_folder(run, 1)))


# --------------------------------------------------------------------------- processes, stops


def test_two_processes_find_to_the_bit_what_one_does(run, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 2)
    assert trainer.main(command(data, tmp_path)) == 0
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("fold ")]
    assert sorted(line.split(":")[0] for line in shown) == [f"fold {k}" for k in range(K)]
    for k in range(K):
        assert_equal(state(fold_folder(tmp_path, k)), state(fold_folder(run, k)))
    name = "folds_trajectory/predictions_folds.csv"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize(
    ("given", "expected"), [(None, (1, 4)), ("2", (2, 2)), ("3", ()), ("8", ())]
)
def test_folds_share_the_cores_by_the_threads_of_each(given, expected, monkeypatch):
    def config(*_, inner_max_num_threads, **__):
        begun.append(inner_max_num_threads)
        return contextlib.nullcontext()

    def parallel(jobs, **_):
        begun.append(jobs)
        return list

    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    args = Namespace(trajectory_only=True, ode_checkpoint=None)
    begun, runs = [], [plan.Run("fold", args, None)] * 5
    joblib_of_folds = {"cpu_count": lambda: 4, "parallel_config": config, "Parallel": parallel}
    for name, value in joblib_of_folds.items():
        monkeypatch.setattr(plan.joblib, name, value)
    monkeypatch.setattr(plan, "first_code", lambda codes, bar: 0)
    assert plan.carry_out(runs, trainer.train) == 0
    assert tuple(begun) == expected


def test_a_signal_ends_the_processes_of_the_folds_which_keep_their_states(
    data, tmp_path, monkeypatch
):
    words = [*command(data, tmp_path), "--trajectory_epochs=10000", "--patience=10000"]
    monkeypatch.setattr(plan.joblib, "cpu_count", lambda: 2)
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(sender, 2)
            os.close(sender)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = trainer.main(words)
        finally:
            os._exit(code)
    os.close(sender)
    place, began = tmp_path / "folds_trajectory", time.monotonic()
    while len([*place.glob("fold_*/trajectory/history.jsonl")]) < 2:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert time.monotonic() < began + 300
        time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    with os.fdopen(receiver) as pipe:
        error = pipe.read()  # it is open while a process lives
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert error.startswith("error: interrupted: ")
    assert len(error.splitlines()) == 1
    for k in (0, 1):
        assert read_state(fold_folder(tmp_path, k) / "last")


def test_the_same_command_goes_on_with_the_fold_that_was_stopped_and_joins_what_others_trained(
    run, data, tmp_path, monkeypatch, capsys
):
    steps, step = [], trainer.step

    def stopped(*values):
        steps.append(1)
        if len(steps) == 24:
            signal.raise_signal(signal.SIGTERM)
        return step(*values)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", stopped)
        assert trainer.main(command(data, tmp_path)) == 143
    first = fold_folder(tmp_path, 0) / "predictions_test.csv"
    made = first.stat().st_mtime_ns
    assert trainer.main(command(data, tmp_path, f"--folds={K}", "--only_fold=2")) == 0
    assert not (tmp_path / "folds_trajectory" / "metrics.json").exists()
    assert trainer.main(command(data, tmp_path, f"--folds={K}", f"--only_fold={K}")) == 2
    capsys.readouterr()
    assert trainer.main(command(data, tmp_path)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fold ")]
    how = ["already there, ", "continued, ", "already there, "]
    assert [line.split(": ")[1].partition("test")[0] for line in lines] == how
    assert first.stat().st_mtime_ns == made
    name = "folds_trajectory/predictions_folds.csv"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


# --------------------------------------------------------------------------- all patients


def history_of(folder):
    return pd.read_json(folder / "history.jsonl", lines=True)


def test_a_fold_that_stopped_keeps_its_last_loss_in_the_pooled_curve(tmp_path):
    for k, losses in enumerate([[1.0, 0.5, 0.5, 0.7], [0.9, 0.52]]):
        (tmp_path / str(k)).mkdir()
        table = pd.DataFrame({"epoch": range(1, len(losses) + 1), "val_loss": losses})
        table.to_json(tmp_path / str(k) / "history.jsonl", orient="records", lines=True)
    found = folds.pooled_epochs([tmp_path / "0", tmp_path / "1"])
    assert found["validation_losses"] == pytest.approx([0.95, 0.51, 0.51, 0.61])
    assert found["averaged_epochs"] == [2, 3]


def test_a_final_model_is_given_all_epochs_of_the_pooled_curve(data, tmp_path):
    args = parsed(*command(data, tmp_path, "--folds=2", "--final"))
    folder = trainer.run_folder.folds_folder(args)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"averaged_epochs": [2, 3, 5]}))
    assert folds.with_final_epochs(toy_stage(), folder).final_epochs == [2, 3, 5]


def test_a_final_model_learns_from_all_patients_and_averages_the_epochs_of_the_folds(run, data):
    losses = [history_of(fold_folder(run, k))["val_loss"].tolist() for k in range(K)]
    longest = max(map(len, losses))
    pooled = np.mean([own + own[-1:] * (longest - len(own)) for own in losses], axis=0)
    averaged = (np.flatnonzero(pooled <= (1 + LOSS_TOLERANCE) * pooled.min()) + 1).tolist()
    joint = content(run / "folds_trajectory" / "metrics.json")
    assert (joint["averaged_epochs"], joint["validation_losses"]) == (averaged, pooled.tolist())
    history = history_of(run / "trajectory")
    assert history["epoch"].tolist() == [*range(1, averaged[-1] + 1)]
    assert history["averaged_epochs"].iloc[-1] == averaged
    rows, _ = rows_and_folds(data)
    checkpoint = read_trajectory(run / TRAJECTORY_FILE)
    assert np.isin(patient_hashes(rows, np.arange(len(rows))), checkpoint.train_patients).all()
    # A plain loop, with the schedule of all epochs.
    rows.held_out = ()
    args = arguments(*command(data, run))
    stage = trainer.make_stage(args, trainer.run_folder.run_data(args, rows, None), None)
    assert len(stage.batches["train"].rows) == len(rows)
    own = trainer.set_up(stage)
    kept = []
    for epoch in range(1, averaged[-1] + 1):
        train_epoch(stage, own, args.seed, epoch)
        kept += [[*map(torch.clone, own.average.weights)]] if epoch in averaged else []
    shifts = []  # until the risks of the patients agree with their events
    for name, *weights in zip(stage.trainable_parameters(), *kept, strict=True):
        mean = torch.stack(weights).mean(dim=0)
        if name in ("members.0.head.output.bias", "members.0.head.summaries.4.bias"):
            shifts.append((checkpoint.weights[name] - mean).item())
        else:
            assert torch.equal(checkpoint.weights[name], mean), name
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-6)


def test_a_final_model_has_the_rule_and_the_metrics_of_the_folds(run, data, tmp_path):
    model = TrajectoryModel.from_pretrained(run / "trajectory")
    table = predictions(run / "folds_trajectory" / "predictions_folds.csv")
    known, risk = of_labels(table["label"].to_numpy(float)), table["probability"].to_numpy()
    assert model.threshold == pytest.approx(choose_threshold(None, known, risk))
    folds_metrics = content(run / "folds_trajectory" / "metrics.json")["folds"]
    assert model.metrics["folds"] == folds_metrics
    assert model.results().loc[STAGE_1, "auroc"] == folds_metrics["auroc"]["value"]
    with pytest.raises(ValueError, match="folds"):
        model.results("test")
    model.save_pretrained(tmp_path / "copy")
    assert f"{folds_metrics['auroc']['value']:.3f}" in (tmp_path / "copy/README.md").read_text()
    words = ["predict", "--checkpoint", str(run / "trajectory"), "--data_path", str(data)]
    assert trainer.main([*words, "--predictions", str(tmp_path / "new.csv")]) == 0
    new = pd.read_csv(tmp_path / "new.csv")
    assert len(new) == len(table)
    assert new["probability_ensemble"].between(0, 1).all()
    risks = {name: table[name].to_numpy() for name in table.columns.intersection(["ensemble"])}
    labels, preferred = table["label"].to_numpy(float), ["ensemble", STAGE_1]
    risks[STAGE_1] = risk
    losses = row_losses(labels, log_odds(np.stack([*risks.values()])))
    planned = planned_above_chance(Metrics.from_json(folds_metrics))
    best = recommended_model([*risks], losses, labels.sum(), table["patient"], preferred, planned)
    assert model.config["best_model"] == best
    assert f"(--use best): `{best or 'none'}" in (tmp_path / "copy/README.md").read_text()
    assert "out-of-fold rows" in (tmp_path / "copy/README.md").read_text()
    goal = "specificity 0.7"
    words += ["--predictions", str(tmp_path / "goal.csv"), "--threshold", goal]
    assert trainer.main(words) == 0
    new = pd.read_csv(tmp_path / "goal.csv")
    threshold = choose_threshold(goal, known, risk)
    assert (new["prediction"] == (new["probability"] >= threshold)).all()


def test_a_final_model_is_made_again_where_the_folds_are_other_ones(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    words = command(data, tmp_path / "run", f"--folds={K}", "--final")
    made = (tmp_path / "run" / TRAJECTORY_FILE).stat().st_mtime_ns
    assert trainer.main(words) == 0
    assert "all patients: already there, " in capsys.readouterr().out
    assert (tmp_path / "run" / TRAJECTORY_FILE).stat().st_mtime_ns == made
    assert trainer.main([*words, "--folds=2"]) == 0
    assert "all patients: folds AUROC" in capsys.readouterr().out
    assert (tmp_path / "run" / "trajectory.1").is_dir()


def test_a_fold_is_recalibrated_by_the_others_and_a_final_model_by_all():
    """Whatever rule a fold's own run had; the risks by the others choose the thresholds."""
    rng = np.random.default_rng(0)
    labels, fold = rng.integers(0, 2, 600).astype(float), np.repeat([0, 1, 2], 200)
    risks = {name: expit(labels + rng.normal(size=600)) for name in (STAGE_1, "blend", "ensemble")}
    rules = [{}, {}, {}]
    table = pd.DataFrame({"id": "", "label": labels, "patient": ""})
    for name, risk in risks.items():
        multipliers, shifts = rng.uniform(0.5, 2, 3), rng.normal(size=3)
        table[name] = expit(shifts[fold] + multipliers[fold] * logit(risk))
        for k, rule in enumerate(rules):
            rule[name] = {"label": DecisionRule(multipliers[k], shifts[k])}
    options = DecisionOptions(BOTH, "sensitivity 0.8")
    found, crossed, recalibrated = decide_folds(table, rules, fold, [TARGET], options)
    assert recalibrated["label"].before == pytest.approx(risks[STAGE_1])
    assert recalibrated["label"].rule == found[STAGE_1]["label"]
    for name, risk in risks.items():
        rule = found[name]["label"]
        expected = fit_rule(of_labels(labels), risk, fold, options)
        assert (rule.multiplier, rule.shift) == pytest.approx((expected.multiplier, expected.shift))
        for k in range(3):
            others = fold != k
            by_others = fit_rule(of_labels(labels[others]), risk[others], fold[others], options)
            moved = by_others.risk(risk[~others], LOGIT)
            assert crossed[name][~others].to_numpy() == pytest.approx(moved)
        threshold = choose_threshold(options.threshold, of_labels(labels), crossed[name].to_numpy())
        assert rule.threshold == pytest.approx(threshold)
    assert [*found] == [*risks]
    assert list(crossed) == list(table)


def test_all_folds_are_recalibrated_as_the_model_of_all_patients_is():
    """Three folds alone have too few events for a slope; together they choose one."""
    rng, fold = np.random.default_rng(1), np.arange(240) % 3
    odds = rng.normal(0, 3, 240)
    labels = (rng.random(240) < expit(odds / 3)).astype(float)
    assert 100 <= labels.sum() < 150
    patients = np.arange(240).astype(str)
    table = pd.DataFrame({"id": patients, "label": labels, "patient": patients})
    table[STAGE_1] = expit(odds)
    rules = [{STAGE_1: {"label": DecisionRule()}}] * 3
    found, crossed, _ = decide_folds(table, rules, fold, [TARGET], DecisionOptions(TESTS))
    rule = found[STAGE_1]["label"]
    assert rule.multiplier < 0.6
    for k in range(3):
        of_others = of_labels(labels[fold != k]), expit(odds[fold != k])
        multiplier, shift = fit_updates(*of_others)[BOTH]
        expected = expit(shift + multiplier * odds[fold == k])
        assert crossed[STAGE_1][fold == k].to_numpy() == pytest.approx(expected)
    of_all = of_labels(labels), crossed[STAGE_1].to_numpy()
    assert rule.threshold == choose_threshold(None, *of_all)


# --------------------------------------------------------------------------- sites


def test_each_site_is_held_out_in_turn(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medgemma_clinical.data.fold_split.MIN_OUTCOMES", 5)
    with whole_reports():
        assert trainer.main(command(data, tmp_path, "--leave_out=ward")) == 0
    table = predictions(tmp_path / "leave_out_trajectory" / "predictions_folds.csv")
    given = pd.read_csv(data, dtype=str)
    site = table["patient"].map(given.groupby("subject_id")["ward"].first())
    assert dict(zip(table["fold"], site, strict=True)) == {0: "east", 1: "north"}
    shown = capsys.readouterr().out
    assert "2 sites are held out in turn" in shown
    assert "1 sites only train" in shown
    learned = read_trajectory(tmp_path / "leave_out_trajectory" / "fold_0" / TRAJECTORY_FILE)
    rows = MIMICtrajectoryDataset(data)
    west = given["ward"].to_numpy() == "west"
    assert np.isin(patient_hashes(rows, np.flatnonzero(west)), learned.train_patients).any()
    folder = tmp_path / "leave_out_trajectory"
    assert "east" in (folder / "report.html").read_text()
    # The page counts who was predicted: a total beside the sites would tell a hidden site's counts.
    assert pd.read_csv(folder / "figures" / "split.csv")["rows"].tolist() == [len(table)]
    assert pd.read_csv(folder / "figures" / "flow.csv")["left"].iloc[-1] == len(table)
    assert pd.read_csv(folder / "figures" / "table_one.csv")["count"].iloc[0] == len(table)


# --------------------------------------------------------------------------- stages 2 and 3


def test_the_folds_of_stage_2_read_the_stage_1_of_each(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    where = tmp_path / "run" / "folds_trajectory"
    words = f"--model_name {TINY_MODEL} --epochs 1 --folds {K} --final --log_file none"
    words += f" --data_path {data} --output_dir {tmp_path / 'run'}"
    words += " --series_name Urea --outcome Death"
    fold_0 = [*words.split(), f"--ode_checkpoint={where}/fold_0/{TRAJECTORY_FILE}"]
    assert trainer.main(fold_0) == 2
    assert "{fold}" in capsys.readouterr().err
    other = f"--ode_checkpoint={where}/fold_{{fold}}/{TRAJECTORY_FILE}"
    assert trainer.main([*words.split(), other, "--seed=1"]) == 2
    assert "fold 0: " in capsys.readouterr().err, "patients that its stage 1 has seen"
    last = where / f"fold_{K - 1}" / TRAJECTORY_FILE
    last.rename(where / "aside")
    assert trainer.main([*words.split(), other]) == 2
    assert not (tmp_path / "run" / "folds_classification").exists(), "no fold was trained"
    (where / "aside").rename(last)
    assert trainer.main([*words.split(), other]) == 0
    model = TrajectoryModel.from_pretrained(tmp_path / "run" / "classification")
    place = tmp_path / "run" / "folds_classification"
    each = [content(place / f"fold_{k}/classification/metrics.json") for k in range(K)]
    weight = float(np.median([x["residual_weight"] for x in each]))
    assert model.config["residual_weight"] == weight
    assert STAGE_1 in model.results().index


# --------------------------------------------------------------------------- from Python


def test_cross_validate__finds_what_the_command_does_and_leaves_no_file(
    run, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = pd.read_csv(data, dtype={"subject_id": str})
    found = cross_validate(table, folds=K, **FLAGS)
    assert not list(tmp_path.iterdir())
    expected = predictions(run / "folds_trajectory" / "predictions_folds.csv")
    pd.testing.assert_frame_equal(found.predictions, expected)
    model = TrajectoryModel.from_pretrained(run / "trajectory")
    pd.testing.assert_frame_equal(found.results(), model.results())
    assert LABEL not in found.predictions
    with pytest.raises(TypeError, match="seeds"):
        cross_validate(table, seeds=2)
