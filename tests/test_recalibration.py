"""Recalibration: fitted on validation, kept with the weights, shown before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer


def drawn(seed: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """True log-odds, and labels drawn by them."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1.5, 1.0, n)
    return logit, (rng.uniform(size=n) < 1 / (1 + np.exp(-logit))).astype(float)


def slope_of(labels: np.ndarray, probability: np.ndarray) -> float:
    ones = np.ones((1, len(labels)))
    return float(trainer.weighted_calibration(labels, probability, ones)["calibration_slope"][0])


def test_an_overconfident_model_shows_a_slope_below_one_and_is_mended_on_new_rows() -> None:
    (truth, labels), (new_truth, new_labels) = drawn(0), drawn(1)
    sure, new_sure = 3 * truth + 1, 3 * new_truth + 1
    before = trainer.decide(labels, sure, "none")
    after = trainer.decide(labels, sure, "platt")
    assert slope_of(new_labels, before.probability(new_sure)) < 0.5
    assert slope_of(new_labels, after.probability(new_sure)) == pytest.approx(1, abs=0.1)
    assert (after.slope, after.intercept) == pytest.approx((1 / 3, -1 / 3), abs=0.08)
    loss = [
        trainer.metrics_of(new_labels, d.probability(new_sure))["log_loss"] for d in (before, after)
    ]
    assert loss[1] < loss[0] - 0.1


def test_on_the_rows_it_was_fitted_to_the_fit_is_exact() -> None:
    truth, labels = drawn(2)
    decision = trainer.decide(labels, 2 * truth - 3, "platt")
    probability = decision.probability(2 * truth - 3)
    assert slope_of(labels, probability) == pytest.approx(1, abs=1e-6)
    assert probability.mean() == pytest.approx(labels.mean(), abs=1e-9)


def test_none_leaves_log_odds_alone_and_the_threshold_is_that_of_the_probability() -> None:
    truth, labels = drawn(3)
    for how in ("none", "platt"):
        decision = trainer.decide(labels, truth, how)
        probability = decision.probability(truth)
        assert decision.threshold == trainer.choose_threshold(labels, probability)
    decision = trainer.decide(labels, truth, "none")
    assert decision[:2] == (1.0, 0.0)


def test_a_model_that_ranks_the_wrong_way_round_is_not_turned_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    truth, labels = drawn(4)
    assert trainer.decide(labels, -truth, "platt")[:2] == (1.0, 0.0)
    assert "not recalibrated" in caplog.text


def test_a_validation_part_that_is_parted_completely_is_not_fitted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = (np.arange(40) >= 20).astype(float)
    decision = trainer.decide(labels, np.linspace(-20, 19, 40), "platt")
    assert not decision.recalibrates
    assert "part completely" in caplog.text


def figures_of(folder: Path, how: str, *flags: str) -> dict[str, Any]:
    data = folder / "data.csv"
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(300) % 3 == 0).astype(int)
    last = 20 - 4 * labels + 4 * rng.normal(size=300)
    # No two patients alike: equal logits may differ in a last bit, which recalibration rounds away.
    series = [f"20 (0h) -> {value:.4f} (6h)" for value in last]
    pd.DataFrame(
        {"clinical_trajectory": series, "label_escalation": labels, "id": range(300)}
    ).to_csv(data, index=False)
    words = ["--data_path", str(data), "--calibrate", how, "--log_file", "none"]
    words += ["--output_dir", str(folder / how), "--trajectory_epochs", "8", "--epochs", "2"]
    assert trainer.main([*words, *flags]) == 0
    stage = "trajectory" if "--trajectory_only" in flags else "classification"
    figures: dict[str, Any] = json.loads((folder / how / stage / "metrics.json").read_text())
    return figures


def test_a_run_keeps_it_with_the_weights_and_shows_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = figures_of(tmp_path, "none", "--trajectory_only")
    assert plain["calibration"] == {"method": "none"}
    assert "recalibrated" not in capsys.readouterr().out
    mended = figures_of(tmp_path, "platt", "--trajectory_only")
    said = capsys.readouterr().out
    for part in ("validation", "test"):
        before = mended["calibration"][f"{part} before"]
        for name in ("auroc", "brier", "calibration_slope", "log_loss"):
            assert before[name] == plain[part][name]
        assert mended[part]["auroc"] == plain[part]["auroc"], "the order of patients stays"
    assert mended["validation"]["calibration_slope"]["value"] == pytest.approx(1, abs=1e-4)
    slope = f"{plain['test']['calibration_slope']['value']:.3f}"
    assert f"calibration slope {slope}" in said
    page = (tmp_path / "platt" / "trajectory" / "report.html").read_text()
    assert "before and after" in page
    rows = page.split("before and after")[-1]
    after = f"{mended['test']['calibration_slope']['value']:.3f}"
    assert rows.index("As learned") < rows.index("Recalibrated")
    assert rows.index(slope) < rows.index(after)
    for part in ("validation", "test"):  # at thresholds of their own: the same rows are alarmed
        for name in ("sensitivity", "specificity", "ppv", "alarms"):
            assert mended["calibration"][f"{part} before"][name] == mended[part][name]
    assert "before and after" not in (tmp_path / "none" / "trajectory" / "report.html").read_text()
    kept = torch.load(tmp_path / "platt" / trainer.TRAJECTORY_FILE, weights_only=True)["config"]
    known = mended["calibration"]
    assert kept["decision"] == {
        "slope": known["slope"],
        "intercept": known["intercept"],
        "threshold": mended["threshold"],
    }
    raw, new = (
        pd.read_csv(tmp_path / how / "trajectory" / "predictions_test.csv")["probability"]
        for how in ("none", "platt")
    )
    logit = np.log(raw / (1 - raw))
    expected = 1 / (1 + np.exp(-(known["intercept"] + known["slope"] * logit)))
    np.testing.assert_allclose(new, expected, atol=1e-6)


@pytest.mark.parametrize("stage", ["trajectory", "classification"])
def test_new_predictions_are_recalibrated_as_the_runs_own(tmp_path: Path, stage: str) -> None:
    figures = figures_of(tmp_path, "platt", "--trajectory_only")
    if stage == "classification":
        encoder = ["--ode_checkpoint", str(tmp_path / "platt" / trainer.TRAJECTORY_FILE)]
        figures = figures_of(tmp_path, "platt", "--model_name", "tiny", *encoder)
    out = tmp_path / "new.csv"
    words = [
        "--predict",
        "--checkpoint",
        str(tmp_path / "platt" / stage),
        "--predictions",
        str(out),
    ]
    assert trainer.main([*words, "--data_path", str(tmp_path / "data.csv")]) == 0
    new = pd.read_csv(out, dtype={"id": str}).set_index("id")
    own = pd.read_csv(tmp_path / "platt" / stage / "predictions_test.csv", dtype={"id": str})
    new = new.loc[own["id"]]
    np.testing.assert_allclose(new["probability"], own["probability"], atol=1e-6)
    alarm = (new["probability"] >= figures["threshold"]).astype(int)
    assert new["prediction"].tolist() == alarm.tolist()
    assert 0 < alarm.sum() < len(alarm)
