"""What a finished run says: no patient unless asked, scikit-learn's figures, Platt's fit."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics

import medgemma_trainer as trainer
from conftest import sign_table
from medgemma_clinical.commands.results import weigh_language_model
from medgemma_clinical.evaluation.baselines import STAGE_1
from medgemma_clinical.evaluation.decision import youden_threshold
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.sharing.model_card import card_figures
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from stages import stage_of_patients


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def marked_table(rows: int) -> pd.DataFrame:
    """A table whose ids, contexts and values can be found wherever they turn up."""
    table = sign_table(rows, seed=3)
    table["clinical_trajectory"] += " -> 7.41703 (49.31h)"
    extreme = pd.Series({7: " -> 987.654 (777.25h)"}).reindex(table.index, fill_value="")
    table["clinical_trajectory"] += extreme
    table["subject_id"] = [f"MARKERID{i}" for i in range(rows)]
    ages = np.random.default_rng(0).integers(20, 90, rows)
    table["clinical_context"] = [f"{a}-year-old man, MARKERCONTEXT{i}" for i, a in enumerate(ages)]
    return table


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Command and folder of a finished stage 1 on a marked table."""
    place = tmp_path_factory.mktemp("marked")
    marked_table(300).to_csv(place / "signs.csv", index=False)
    words = ["--trajectory_only", "--data_path", str(place / "signs.csv")]
    words += ["--trajectory_epochs", "2", "--output_dir", str(place / "run"), "--min_cell", "0"]
    assert trainer.main(words) == 0
    return words, place / "run" / "trajectory"


def test_no_file_of_a_run_holds_a_context_a_value_or_beside_predictions_an_id(
    marked: tuple[list[str], Path],
) -> None:
    _, folder = marked
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "MARKERCONTEXT" not in text
        for value in ("7.41703", "987.6", "987.7", "777.2", "777.3"):
            assert value not in text.replace(",", ""), "an extreme is one patient's value"
        if not path.name.startswith("predictions_"):
            assert "MARKERID" not in text, path.name
        if path.name == "report.html":
            assert str(folder.parent) not in text


def test_the_page_says_what_was_asked_of_whom(marked: tuple[list[str], Path]) -> None:
    _, folder = marked
    text = (folder / "report.html").read_text(encoding="utf-8")
    for piece in (
        "Will care have to be escalated?",
        "60 to 74",
        "No weights of MedGemma",
        "logistic regression with facts",
    ):
        assert piece in text
    mix = read(folder / "run.json")["data"]["case_mix"]
    assert mix["rows"] == 240
    assert 40 < mix["age_median"] < 70


def test_the_threshold_is_validations_and_its_shares_are_scikit_learns(
    marked: tuple[list[str], Path],
) -> None:
    _, folder = marked
    found = read(folder / "metrics.json")
    test, val = (pd.read_csv(folder / f"predictions_{part}.csv") for part in ("test", "val"))
    threshold = youden_threshold(val["label"].to_numpy(), val["probability"].to_numpy())
    assert found["threshold"] == threshold
    alarm = (test["probability"] >= threshold).astype(int)
    expected = {
        "sensitivity": metrics.recall_score(test["label"], alarm),
        "specificity": metrics.recall_score(test["label"], alarm, pos_label=0),
        "ppv": metrics.precision_score(test["label"], alarm),
        "npv": metrics.precision_score(test["label"], alarm, pos_label=0),
    }
    for name, value in expected.items():
        assert found["test"][name]["value"] == pytest.approx(value, abs=1e-6)
        assert found["test"][name]["low"] <= value <= found["test"][name]["high"]
    assert {"calibration_slope", "brier_skill"} < set(found["validation"])


def test_ten_patients_are_named_where_that_is_asked_for(marked: tuple[list[str], Path]) -> None:
    words, folder = marked
    place = folder.parent.parent / "named"
    words = [*words, "--report_patients", "--log_file", "none", "--output_dir", str(place)]
    assert trainer.main(words) == 0
    text = (place / "trajectory" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"MARKERID\d+", text)) == 10
    assert "MARKERCONTEXT" not in text


def test_a_smaller_sample_is_said_in_log_and_flow(
    dka_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--trajectory_only", "--data_path", str(dka_file), "--trajectory_epochs", "1"]
    words += ["--output_dir", str(tmp_path), "--max_samples", "90"]
    assert trainer.main(words) == 0
    assert "90 of 160 patients drawn (--max_samples)" in capsys.readouterr().out
    split = read(tmp_path / "trajectory" / "run.json")["split"]
    assert sum(part["n"] for part in split.values()) == 90
    page = (tmp_path / "trajectory" / "report.html").read_text(encoding="utf-8")
    row = page[page.index("--max_samples 90") :][:400]
    assert ">70<" in row.replace(" ", "").replace("\n", "")
    assert ">90<" in row.replace(" ", "").replace("\n", "")


def run_calibrated(folder: Path, how: str) -> dict[str, Any]:
    """Run stage 1 on risks that no two patients share; return its figures."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(300) % 3 == 0).astype(int)
    last = 20 - 4 * labels + 4 * rng.normal(size=300)
    series = [f"20 (0h) -> {value:.4f} (6h)" for value in last]
    table = {"clinical_trajectory": series, "label_escalation": labels, "id": range(300)}
    pd.DataFrame(table).to_csv(folder / "data.csv", index=False)
    words = ["--data_path", str(folder / "data.csv"), "--calibrate", how, "--log_file", "none"]
    words += ["--output_dir", str(folder / how), "--trajectory_epochs", "8", "--trajectory_only"]
    words += ["--min_cell", "0"]
    assert trainer.main(words) == 0
    figures: dict[str, Any] = read(folder / how / "trajectory" / "metrics.json")
    return figures


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Folder and figures of the same stage 1, as it is and recalibrated."""
    place = tmp_path_factory.mktemp("calibrated")
    return place, {how: run_calibrated(place, how) for how in ("none", "platt")}


def test_recalibration_changes_risks_and_not_the_order_of_patients(
    calibrated: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    _, figures = calibrated
    plain, mended = figures["none"], figures["platt"]
    assert plain["calibration"] == {"method": "none"}
    for part in ("validation", "test"):
        before = mended["calibration"][f"{part} before"]
        for name in ("auroc", "brier", "calibration_slope", "log_loss"):
            assert before[name] == pytest.approx(plain[part][name])
        assert mended[part]["auroc"] == plain[part]["auroc"]
        for name in ("sensitivity", "specificity", "ppv", "alarms"):  # at thresholds of their own
            assert before[name] == mended[part][name]
    assert mended["validation"]["calibration_slope"]["value"] == pytest.approx(1, abs=1e-4)


def test_the_fit_lies_with_the_weights_and_makes_the_predictions(
    calibrated: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    place, figures = calibrated
    known = figures["platt"]["calibration"]
    config = torch.load(place / "platt" / TRAJECTORY_FILE, weights_only=True)["config"]
    threshold = figures["platt"]["threshold"]
    line = {"slope": known["slope"], "intercept": known["intercept"], "threshold": threshold}
    assert config["decision"] == line
    raw, new = (
        pd.read_csv(place / how / "trajectory" / "predictions_test.csv")["probability"]
        for how in ("none", "platt")
    )
    logit = known["intercept"] + known["slope"] * np.log(raw / (1 - raw))
    np.testing.assert_allclose(new, 1 / (1 + np.exp(-logit)), atol=1e-6)


def test_the_figures_of_the_card_lie_with_the_weights(
    calibrated: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    place, figures = calibrated
    for how in ("none", "platt"):
        content = torch.load(place / how / TRAJECTORY_FILE, weights_only=True)
        known = content["config"]["figures"]
        assert known == card_figures(figures[how])
        assert known["test"]["auroc"] == figures[how]["test"]["auroc"]
        assert known["calibration"]["method"] == how
        assert known["baselines"].keys() == figures[how]["baselines"].keys()


def test_the_page_shows_recalibration_where_there_was_one(
    calibrated: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    place, figures = calibrated
    with_fit, without = (
        (place / how / "trajectory" / "report.html").read_text() for how in ("platt", "none")
    )
    slopes = [figures[how]["test"]["calibration_slope"]["value"] for how in ("none", "platt")]
    rows = with_fit[with_fit.index("Before and after") :]
    assert rows.index(f"{slopes[0]:.3f}") < rows.index(f"{slopes[1]:.3f}")
    assert "Before and after" not in without


def test_new_predictions_are_recalibrated_as_the_runs_own(
    calibrated: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    place, figures = calibrated
    out = tmp_path / "new.csv"
    words = ["--predict", "--checkpoint", str(place / "platt" / "trajectory")]
    words += ["--predictions", str(out), "--data_path", str(place / "data.csv")]
    assert trainer.main(words) == 0
    saved = pd.read_csv(place / "platt/trajectory/predictions_test.csv", dtype={"id": str})
    new = pd.read_csv(out, dtype={"id": str}).set_index("id").loc[saved["id"]]
    np.testing.assert_allclose(new["probability"], saved["probability"], atol=1e-6)
    alarm = (new["probability"] >= figures["platt"]["threshold"]).astype(int)
    assert new["prediction"].tolist() == alarm.tolist()
    assert 0 < alarm.sum() < len(alarm)


def test_stage_1_stands_beside_the_stage_that_builds_on_it_as_it_scores_itself(
    calibrated: tuple[Path, dict[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    place, figures = calibrated
    words = ["--data_path", str(place / "data.csv"), "--output_dir", str(place / "later")]
    words += ["--ode_checkpoint", str(place / "platt" / TRAJECTORY_FILE), "--model_name", "tiny"]
    words += ["--epochs", "1", "--head_lr", "1", "--log_file", "none", "--min_cell", "0"]
    assert trainer.main([*words, "--stage1_logit", "off"]) == 0
    folder = place / "later" / "classification"
    found = read(folder / "metrics.json")
    for part, name in (("val", "validation"), ("test", "test")):
        table = pd.read_csv(folder / f"predictions_{part}.csv")
        own = pd.read_csv(place / "platt" / "trajectory" / f"predictions_{part}.csv")
        assert table["id"].tolist() == own["id"].tolist()
        np.testing.assert_allclose(table[STAGE_1], own["probability"], atol=1e-6)
        for metric in ("auroc", "brier"):
            beside = found["baselines"][STAGE_1][name][metric]["value"]
            assert beside == pytest.approx(figures["platt"][name][metric]["value"], abs=1e-6)
        auroc = metrics.roc_auc_score(table["label"], table["probability"])
        gain = auroc - metrics.roc_auc_score(own["label"], own["probability"])
        difference = found["differences"][STAGE_1][name]["auroc"]
        assert difference["value"] == pytest.approx(gain, abs=1e-9)
        assert gain != 0, "the sign must show"
        assert difference["low"] <= gain <= difference["high"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    (line,) = re.findall(rf"{re.escape(STAGE_1)} .*", capsys.readouterr().out.split("\n\n")[-2])
    row = page[page.index(f'<th scope="row">{STAGE_1}') :]
    for text in (line, re.sub("<[^>]+>", "", row[: row.index("</tr>")])):
        assert f"{gain:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]" in text


def test_a_language_model_that_adds_nothing_leaves_stage_1_as_it_is(
    calibrated: tuple[Path, dict[str, dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, figures = calibrated
    words = ["--data_path", str(place / "data.csv"), "--output_dir", str(tmp_path)]
    words += ["--ode_checkpoint", str(place / "platt" / TRAJECTORY_FILE), "--model_name", "tiny"]
    words += ["--epochs", "1", "--head_lr", "1", "--log_file", "none", "--min_cell", "0"]
    assert trainer.main(words) == 0
    said = "language model beside stage 1: 0: the language model adds nothing here"
    assert said in capsys.readouterr().out
    folder = tmp_path / "classification"
    found = read(folder / "metrics.json")
    assert found["residual_weight"] == 0
    assert read(folder / "best" / "config.json")["residual_weight"] == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    assert "the language model adds nothing here" in page
    # Stage 1 was recalibrated, this stage was not.
    first = "has weight 0 and adds nothing: rows are ranked as by stage 1 alone."
    assert page.index("The result in words") < page.index(first) < page.index("than chance")
    assert "beside stage 1: 0: the language model adds nothing here" in card
    for name in ("validation", "test"):
        stage_1 = figures["platt"][name]["auroc"]["value"]
        assert found[name]["auroc"]["value"] == pytest.approx(stage_1, abs=1e-6)
    out = tmp_path / "new.csv"
    words = ["--predict", "--checkpoint", str(folder), "--predictions", str(out)]
    assert trainer.main([*words, "--data_path", str(place / "data.csv")]) == 0
    saved = pd.read_csv(folder / "predictions_test.csv", dtype={"id": str})
    new = pd.read_csv(out, dtype={"id": str}).set_index("id").loc[saved["id"]]
    np.testing.assert_allclose(new["probability"], saved["probability"], atol=1e-6)


def test_the_chosen_weight_is_kept_with_the_model_and_makes_its_predictions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels, offset = np.tile([0.0, 1, 0, 1, 0, 1], 100), np.zeros(600)
    logit = np.tile([-1.0, 3, -1, 3, 2, -2], 100)
    raw = Predictions(0.5, labels, logit, np.arange(600), offset)
    stage = stage_of_patients("--freeze_ode")
    assert isinstance(stage.model, TrajectoryLLM)
    with caplog.at_level("INFO"):
        weighted = weigh_language_model(stage, {"val": raw, "test": raw})
    weight = stage.model.residual_weight
    assert 0 < weight < 1
    assert stage.config["residual_weight"] == weight
    assert (
        f"language model beside stage 1: {weight:g}, chosen on the validation part" in caplog.text
    )
    for part in ("val", "test"):
        assert weighted[part].logit == pytest.approx(weight * logit)
    alone = stage_of_patients("--soft_prompt", "off")
    assert weigh_language_model(alone, {"val": raw})["val"] is raw


@pytest.mark.parametrize(
    "flags", [["--soft_prompt", "off"], ["--freeze_ode"], [], ["--trajectory_only"]]
)
def test_no_stage_1_stands_beside_a_stage_that_builds_on_none(flags: list[str]) -> None:
    assert stage_of_patients(*flags).stage1_risks is None
