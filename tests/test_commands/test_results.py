"""What a finished run leaves: one table everywhere, no patient unless asked, recalibration."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from language_models import TINY_MODEL
from medgemma_clinical.commands import pages, results, run_folder
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, describe_tuning
from medgemma_clinical.evaluation.decision import EvaluationOptions, Predictions, choose_threshold
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.model_card import weight_0_sentence
from medgemma_clinical.models.outcome import weighted
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_clinical.training.state import describe_selection
from pages import Page
from predicting import MARKER, STAGES, VALUES, predicted, write_data
from stages import arguments, data_for, make_stage, patients, stage_of_patients

pytestmark = pytest.mark.slow

REPORTS = True
PARTS = {"val": "validation", "test": "test"}
STAGE_1 = STAGE_NAMES["trajectory"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def predictions_of(folder, part):
    """Read the predictions of a stage, the model under its own name."""
    table = pd.read_csv(folder / f"predictions_{part}.csv", dtype={"id": str, "patient": str})
    table = table.drop(columns="model_sha256")
    return table.rename(columns={"probability": STAGE_NAMES[folder.name]})


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_one_table_of_the_predictions(stage, runs):
    folder = runs / stage
    known = read(folder / "metrics.json")
    for part, name in PARTS.items():
        rows = predictions_of(folder, part)
        assert list(rows.columns[:4]) == ["id", "label", STAGE_NAMES[stage], "patient"]
        expected = evaluate(rows, 0, known["threshold"])
        assert expected.counts == Metrics.from_json(known[name]).counts
        table = Metrics.from_json(known[name]).table
        pd.testing.assert_frame_equal(expected.table, table, rtol=1e-6, check_dtype=False)
        assert expected.models[-1] == ENSEMBLE
        assert (STAGE_1 in expected.models[1:]) == (stage != "trajectory")
    val = predictions_of(folder, "val")
    risk, of_val = val[STAGE_NAMES[stage]].to_numpy(), of_labels(val["label"].to_numpy(float))
    assert known["threshold"] == pytest.approx(choose_threshold(None, of_val, risk))
    assert read_trained_config(folder)["metrics"] == known
    lines = (folder / "tripod.md").read_text().splitlines()
    (performance,) = (line for line in lines if line.startswith("| 23a |"))
    assert f"AUROC {known['test']['auroc']['value']:.3f}" in performance
    assert any("drawn by seed 0" in line for line in lines)
    own = trainer.TrajectoryModel.from_pretrained(folder).results().loc[STAGE_NAMES[stage]]
    tracked = results.metrics_for_tracker({"metrics": known})
    assert own["auroc"] == tracked["test_auroc"] == known["test"]["auroc"]["value"]


def test_primary_baseline_and_threshold_are_those_that_were_named(dka_file, tmp_path, capsys):
    words = ["--trajectory_only", "--trajectory_epochs=1", "--log_file=none"]
    words += ["--data_path", dka_file]
    words += ["--output_dir", tmp_path / "run", "--primary", "last value"]
    words += ["--threshold", "specificity 0.8"]
    assert trainer.main([*map(str, words)]) == 0
    assert "simple model (last value)" in capsys.readouterr().out
    known = read(tmp_path / "run" / "trajectory" / "metrics.json")["test"]
    assert known["primary"] == "last value"
    assert known["planned"] == ["last value", ENSEMBLE]
    folder = tmp_path / "run" / "trajectory"
    val, model = predictions_of(folder, "val"), trainer.TrajectoryModel.from_pretrained(folder)
    assert model.config["threshold_choice"] == "specificity 0.8"
    of_val = of_labels(val["label"].to_numpy(float))
    for name, rules in model.trained.rules.items():
        threshold = choose_threshold("specificity 0.8", of_val, val[name].to_numpy())
        assert rules["label"].threshold == pytest.approx(threshold)
    page = Page((folder / "report.html").read_text()).text
    assert "for a specificity of at least 80 % on the validation part" in page


def test_baselines_of_the_test_part_learn_from_validation_rows_and_those_of_it_do_not(
    table, tmp_path
):
    """Settings are chosen on the training part; stage 1 reads no label of another part."""
    parts = np.array(["train"] * 60 + ["val"] * 20 + ["test"] * 20)
    tables, labels = [], table["label_escalation"].to_numpy()
    for name, swapped in (("as it is", slice(0)), ("others", slice(60, 80))):
        own = labels.copy()
        own[swapped] = own[swapped][::-1]
        data = write_data(table.assign(split=parts, label_escalation=own), tmp_path / f"{name}.csv")
        words = [
            "--trajectory_only",
            "--trajectory_epochs=1",
            "--log_file=none",
            "--data_path",
            data,
        ]
        words += ["--output_dir", tmp_path / name]
        assert trainer.main([*map(str, words)]) == 0
        tables.append([predictions_of(tmp_path / name / "trajectory", part) for part in PARTS])
    for part, first, other in zip(PARTS, *tables, strict=True):
        same = {model for model in first.columns[4:] if first[model].equals(other[model])}
        others = {*first.columns[4:]} - same
        assert others == (set() if part == "val" else {*first.columns[4:]})


def test_the_methods_name_the_rates_of_what_learns_and_the_rows_of_a_step(runs):
    words = f"--data_path {runs}/train.csv --ode_checkpoint {runs}/{TRAJECTORY_FILE}"
    words += f" --model_name {TINY_MODEL} --batch_size 3 --gradient_accumulation 7"
    args = arguments(*words.split())
    data, checkpoint = data_for(args), run_folder.given_stage1(args)
    run = {**run_folder.run_record(args, data, checkpoint), "processes": 2}
    methods = pages.training_methods(make_stage(args, data), data, run)
    assert {*re.findall(r"\((\w+)\)", methods["training"])} == {"projection", "llm", "head"}
    assert re.search(r"\b42 rows", methods["training"])


@pytest.mark.parametrize("stage", STAGES)
def test_page_and_tripod_say_how_the_epoch_was_kept_and_that_few_events_tune_nothing(stage, runs):
    folder = runs / stage
    assert json.loads((folder / "baselines.json").read_text())["tuned"] is False
    page = Page((folder / "report.html").read_text()).text
    for text in (page, (folder / "tripod.md").read_text()):
        assert describe_tuning([False]) in text
        assert describe_selection(1) in text


def test_stage_1_stands_beside_the_stage_that_builds_on_it_as_it_scores_itself(runs):
    own, later = (predictions_of(runs / stage, "test") for stage in STAGES[:2])
    np.testing.assert_allclose(later[STAGE_1], own[STAGE_1], atol=1e-6)
    table = Metrics.from_json(read(runs / "classification" / "metrics.json")["test"])
    row = table.row(STAGE_1, "brier")
    alone = table.row(STAGE_NAMES["classification"], "brier")
    assert row["difference"] == pytest.approx(row["value"] - alone["value"])
    assert row["difference"] != 0


def test_no_file_of_a_run_holds_a_context_a_value_or_beside_predictions_a_name(runs):
    for path in runs.rglob("*"):
        if path.is_dir() or path.name in ("train.csv", "train.json"):
            continue
        content = path.read_bytes()
        assert b"-year-old" not in content, path
        assert not [each for each in VALUES if each.encode() in content.replace(b",", b"")], path
        if not path.name.startswith("predictions_"):
            assert MARKER.encode() not in content, path
        if path.name in ("report.html", "tripod.md"):
            assert str(runs).encode() not in content


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Folder and metrics of the same stage 1, as it is and recalibrated.

    The former names patients, the latter hides fewer than 11.
    """
    place = tmp_path_factory.mktemp("calibrated")
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(300) % 3 == 0).astype(int)
    last = 20 - 4 * labels + 4 * rng.normal(size=300)
    series = [f"20 (0h) -> {value:.4f} (6h)" for value in last]  # no two patients share a risk
    table = pd.DataFrame({"clinical_trajectory": series, "label_escalation": labels})
    table["id"] = [f"MARKERID{k}" for k in range(300)]
    table["static_age [years]"] = rng.integers(20, 90, 300)
    table.to_csv(place / "data.csv", index=False)
    known = {}
    for how, more in (("none", ["--report_patients"]), ("platt", ["--min_cell", "11"])):
        words = ["--data_path", str(place / "data.csv"), "--calibrate", how, *more]
        words += ["--output_dir", str(place / how), "--trajectory_epochs", "8"]
        assert trainer.main([*words, "--trajectory_only"]) == 0
        known[how] = read(place / how / "trajectory" / "metrics.json")
    return place, known


def test_the_owner_of_few_patients_sees_everything(calibrated):
    folder = calibrated[0] / "none" / "trajectory"
    (log,) = folder.glob("train_*.log")
    text, page = log.read_text(), (folder / "report.html").read_text()
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    test = calibrated[1]["none"]["test"]
    assert (test["n"], test["events"]) == (30, 10)
    for shown in (text, page):
        auroc = f"{test['auroc']['value']:.3f} [{test['auroc']['low']:.3f}"
        assert auroc in shown.replace("\xa0", " ")
    assert f"val AUROC {history[0]['val_auroc']:.4f}" in text
    assert len(re.findall(r"MARKERID\d+", page)) == 10, "--report_patients"
    assert {"roc.svg", "roc.pdf", "metrics.csv"} <= {p.name for p in (folder / "figures").iterdir()}


def test_min_cell_hides_few_events_on_the_page_alone(calibrated):
    place, known = calibrated
    page = (place / "platt" / "trajectory" / "report.html").read_text()
    for part in PARTS.values():
        assert known["platt"][part]["events"] == 10
        assert f"{known['platt'][part]['auroc']['value']:.3f}" not in page
    assert "fewer than 11" in page.replace("\xa0", " ")
    assert "MARKERID" not in page


def test_recalibration_changes_risks_and_not_the_order_of_patients(calibrated, tmp_path):
    place, known = calibrated
    plain, mended = known["none"], known["platt"]
    assert plain["calibration"] == {"method": "none", "moves": {}}
    for part in PARTS.values():
        for name in ("auroc", "sensitivity", "specificity"):  # at thresholds of their own
            assert mended[part][name] == plain[part][name]
    assert mended["validation"]["slope"]["value"] == pytest.approx(1, abs=1e-6)
    assert mended["validation"]["intercept"]["value"] == pytest.approx(0, abs=1e-6)
    config = torch.load(place / "platt" / TRAJECTORY_FILE, weights_only=True)["config"]
    multiplier, shift = mended["calibration"]["moves"]["label"]
    rule = {"multiplier": multiplier, "shift": shift, "threshold": mended["threshold"]}
    assert config["decision"] == {"label": rule}
    raw, new = (predictions_of(place / how / "trajectory", "test")[STAGE_1] for how in known)
    logit = shift + multiplier * np.log(raw / (1 - raw))
    np.testing.assert_allclose(new, 1 / (1 + np.exp(-logit)), atol=1e-6)
    scored = predicted(place / "platt" / "trajectory", place / "data.csv", tmp_path / "new.csv")
    saved = predictions_of(place / "platt" / "trajectory", "test").set_index("id")[STAGE_1]
    scored = scored.set_index("id").loc[saved.index]
    np.testing.assert_allclose(scored["probability"], saved, atol=1e-6)
    positive = (scored["probability"] >= mended["threshold"]).astype(int)
    assert scored["prediction"].tolist() == positive.tolist()
    assert 0 < positive.sum() < len(positive)


def test_a_language_model_that_adds_nothing_leaves_stage_1_as_it_is(calibrated, tmp_path):
    place, known = calibrated
    (tmp_path / TRAJECTORY_FILE).write_bytes((place / "platt" / TRAJECTORY_FILE).read_bytes())
    words = ["--data_path", str(place / "data.csv"), "--output_dir", str(tmp_path)]
    words += ["--ode_checkpoint", str(tmp_path / TRAJECTORY_FILE), "--model_name", TINY_MODEL]
    assert trainer.main([*words, "--epochs", "1", "--head_lr", "1", "--log_file", "none"]) == 0
    folder = tmp_path / "classification"
    found = read(folder / "metrics.json")
    assert found["residual_weight"] == read_trained_config(folder)["residual_weight"] == 0
    for name in PARTS.values():
        stage_1 = known["platt"][name]["auroc"]["value"]
        assert found[name]["auroc"]["value"] == pytest.approx(stage_1, abs=1e-6)
    page, card = (folder / "report.html").read_text(), (folder / "best/README.md").read_text()
    for text in (page, card):
        assert re.search(r"not\sshown\sto\sadd\son\s30\svalidation\spatients", text)
    assert '<a href="../trajectory/report.html">' in page
    scored = predicted(folder, place / "data.csv", tmp_path / "new.csv").set_index("id")
    saved = predictions_of(folder, "test").set_index("id")[STAGE_NAMES["classification"]]
    np.testing.assert_allclose(scored.loc[saved.index, "probability"], saved, atol=1e-6)


def test_the_chosen_weight_is_kept_with_the_model_and_makes_its_predictions():
    rows = np.arange(600) % 16
    labels, is_wrong = patients().labels[rows], np.arange(600) % 6 > 3
    logit = np.where(is_wrong, 2 - 4 * labels, -1 + 4 * labels)[:, None]
    raw = Predictions(np.full(1, 0.5), logit, rows, np.zeros((600, 1)))
    for flags, weighs in (("--freeze_ode",), True), (("--soft_prompt", "off"), False):
        stage = stage_of_patients(*flags)
        args = arguments("--model_name", TINY_MODEL, *flags)
        data = data_for(args, patients())
        data.split["test"] = data.split["test"][:0]
        options = EvaluationOptions.of(args)
        decided = trainer.decide(stage, data, raw, options, with_baselines=False)
        assert (decided.weight is not None) == weighs
        weight = decided.weight if weighs else 1.0
        assert (0 < weight < 1) == weighs
        assert weighted(raw, decided.weight).outputs == pytest.approx(weight * logit)


@pytest.fixture(scope="module")
def notes(calibrated, tmp_path_factory):
    """Stage 3 after one epoch, which adds nothing to its stage 1: folder, page, last values."""
    (place, _), folder = calibrated, tmp_path_factory.mktemp("notes")
    words = ["--mode", "generative", "--data_path", str(place / "data.csv"), "--epochs", "1"]
    words += ["--ode_checkpoint", str(place / "none" / TRAJECTORY_FILE), "--model_name", TINY_MODEL]
    words += ["--output_dir", str(folder), "--log_file", "none", "--show_values"]
    assert trainer.main(words) == 0
    series = pd.read_csv(place / "data.csv").set_index("id")["clinical_trajectory"]
    page = (folder / "generative" / "report.html").read_text()
    return folder / "generative", page, series.str.split(" ").str[-2]


def test_stage_3_shows_a_test_patient_drawn_by_seed_where_values_may_be_shown(notes):
    folder, page, last = notes
    test, text = predictions_of(folder, "test"), Page(page).text
    drawn = np.random.default_rng(0).integers(len(test))
    values = last[test["id"]].tolist()
    assert [f"{value} (6h)" in text for value in values] == [x == values[drawn] for x in values]
    assert f"risk {100 * test[STAGE_NAMES['generative']][drawn]:.1f}" in text


def test_a_language_model_that_adds_nothing_is_one_sentence_and_the_results_are_folded(notes):
    folder, page, _ = notes
    config = read(folder / "metrics.json")
    assert config["residual_weight"] == 0
    sentence = weight_0_sentence(config)
    assert sentence in Page(page).text
    box, folded = page.index(sentence), page.index("The results of stage 1, again")
    own = page.index("It ranks")
    assert box < page.index("Written reports") < folded < own < page.index("</details>", own)


def test_a_test_part_of_few_events_names_the_folds(caplog):
    for events, named in ((29, True), (30, False)):
        caplog.clear()
        labels = (np.arange(90) < events).astype(int)
        tested = {"id": "", "label": labels, "patient": np.arange(90).astype(str)}
        table = pd.DataFrame({**tested, "model": np.linspace(0, 1, 90)})
        with caplog.at_level("INFO"):
            metrics = {part: evaluate(table, 0) for part in ("val", "test")}
            results.log_results(metrics, (LABEL,), "", None, "x")
        assert ("--folds" in caplog.text) == named
