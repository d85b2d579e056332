"""The whole program on the tiny model: the user's three commands, their files, what they claim."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

import medgemma_trainer as trainer
from medgemma_clinical.commands import demo
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.models.checkpoint_schema import WRITTEN
from medgemma_clinical.models.checkpoints import (
    TRAJECTORY_FILE,
    load_llm,
    load_trajectory,
    read_trajectory,
)
from medgemma_clinical.models.sharing.model_card import (
    RANDOM_MODEL,
    RANDOM_MODEL_UNREAD,
    card_figures,
    model_card,
)
from medgemma_clinical.models.sharing.terms import NO_BASE
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.stage import Stage
from stages import make_stage

CHECKPOINT = "./checkpoints_medgemma_dka/medgemma_trajectory_best.pt"
COMMANDS = {  # as they stand in the README, made small
    "trajectory": "--trajectory_only --dataset dka --trajectory_epochs 3",
    "classification": f"--mode classification --dataset dka --ode_checkpoint {CHECKPOINT}",
    "generative": f"--mode generative --dataset dka --ode_checkpoint {CHECKPOINT}",
}
SMALL = "--epochs 2 --model_name tiny --batch_size 8 --min_cell 0"
FILES = {
    "trajectory": set(),
    "classification": {"best"},
    "generative": {"best", "generations_test.jsonl"},
}
METRICS = ("auroc", "auprc", "accuracy", "brier", "log_loss")


def arguments(stage: str, data: Path) -> list[str]:
    return [*COMMANDS[stage].split(), *SMALL.split(), "--data_path", str(data)]


@pytest.fixture(scope="module")
def runs(dka_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run folder after the user's three commands, from within the folder where the user is."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for stage in COMMANDS:
            assert trainer.main(arguments(stage, dka_file)) == 0
        yield place / "checkpoints_medgemma_dka"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def load_data(words: list[str]) -> tuple[argparse.Namespace, Data]:
    args = trainer.complete(trainer.build_parser().parse_args(words))
    prompts = wiring.prompt_options(args)
    dataset = trainer.read_dataset(args)
    reading = {"max_samples": args.max_samples, "seed": args.seed, "min_cell": args.min_cell}
    return args, prepare_data(dataset, prompts=prompts, **reading)


def read_config(runs: Path, stage: str) -> dict[str, Any]:
    if stage == "trajectory":
        return read_trajectory(runs / TRAJECTORY_FILE).config
    return dict(read(runs / stage / "best" / "config.json"))


def rebuild(stage: str, data: Path) -> tuple[Stage, Data]:
    args, loaded = load_data(arguments(stage, data))
    return make_stage(args, loaded), loaded


def test_the_run_folder_holds_exactly_what_is_promised(runs: Path) -> None:
    shown = {p.name for p in runs.iterdir() if not p.name.startswith(".")}
    assert shown == {TRAJECTORY_FILE, *COMMANDS}
    for stage, extra in FILES.items():
        names = {p.name for p in (runs / stage).iterdir()}
        logs = {name for name in names if name.startswith("train_") and name.endswith(".log")}
        assert len(logs) == 1
        assert names - logs == extra | {
            "run.json",
            "history.jsonl",
            "metrics.json",
            "report.html",
            "predictions_val.csv",
            "predictions_test.csv",
        }
    for stage in ("classification", "generative"):
        best = runs / stage / "best"
        names = {p.name for p in best.iterdir()}
        assert names == {"adapter", "modules.safetensors", "config.json", "README.md", "NOTICE"}
        assert (best / "NOTICE").read_text() == NO_BASE.notice


@pytest.mark.parametrize("stage", COMMANDS)
def test_history_has_a_line_an_epoch_and_marks_the_winner(runs: Path, stage: str) -> None:
    lines = [json.loads(x) for x in (runs / stage / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) == (3 if stage == "trajectory" else 2)
    monitor, best = ("val_loss", min) if stage == "generative" else ("val_auroc", max)
    winner = best(lines, key=lambda line: line[monitor])
    assert winner["improved"]
    assert read(runs / stage / "metrics.json")["selected_epoch"] == winner["epoch"]


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_winner_reloaded_scores_what_metrics_json_says(
    runs: Path, stage: str, dka_file: Path
) -> None:
    built, data = rebuild(stage, dka_file)
    torch.manual_seed(99)  # nothing of a fresh initialisation may survive the loading
    for parameter in built.trainable_parameters().values():
        torch.nn.init.normal_(parameter)
    if isinstance(built.model, TrajectoryClassifier):
        load_trajectory(built.model, read_trajectory(runs / TRAJECTORY_FILE))
    if isinstance(built.model, TrajectoryLLM):
        load_llm(built.model, runs / stage / "best")
        built.model.residual_weight = read_config(runs, stage)["residual_weight"]
    for part in ("val", "test"):
        scored = evaluate(built.model, built.loaders[part], torch.device("cpu"))
        saved = pd.read_csv(runs / stage / f"predictions_{part}.csv", dtype={"id": str})
        rule = DecisionRule.from_config(read_config(runs, stage))
        risk = scored.with_rule(rule).probability
        np.testing.assert_allclose(risk, saved["probability"], rtol=1e-6)
        assert np.array_equal(data.dataset.ids[scored.rows], saved["id"])
        assert np.array_equal(scored.labels, saved["label"])


@pytest.mark.parametrize("stage", COMMANDS)
def test_metrics_are_scikit_learns_on_the_saved_predictions(runs: Path, stage: str) -> None:
    figures = read(runs / stage / "metrics.json")
    for part, name in (("val", "validation"), ("test", "test")):
        table = pd.read_csv(runs / stage / f"predictions_{part}.csv")
        label, risk = table["label"], table["probability"]
        expected = {
            "auroc": roc_auc_score(label, risk),
            "auprc": average_precision_score(label, risk),
            "accuracy": ((risk >= 0.5) == label).mean(),
            "brier": brier_score_loss(label, risk),
            "log_loss": log_loss(label, risk),
        }
        score = figures[name]
        assert (score["n"], score["events"]) == (len(table), label.sum())
        for metric in METRICS:
            assert score[metric]["value"] == pytest.approx(expected[metric], abs=1e-9)
            assert score[metric]["low"] <= score[metric]["value"] <= score[metric]["high"]
    assert list(figures["baselines"]) == [
        *([] if stage == "trajectory" else [STAGE_1]),
        *([STAGE_2] if stage == "generative" else []),
        "last value",
        "number of observations",
        "logistic regression",
        "gradient boosting",
        "blend",
    ]
    saved = pd.read_csv(runs / stage / "predictions_test.csv")
    assert list(saved)[4:] == [*figures["baselines"], "combined"]
    logits = log_odds(saved["probability"].to_numpy()) + log_odds(saved["blend"].to_numpy())
    np.testing.assert_allclose(saved["combined"], expit(logits / 2))
    assert figures["combined"]["blend"] == "blend"
    combined = roc_auc_score(saved["label"], saved["combined"])
    assert figures["combined"]["test"]["auroc"]["value"] == pytest.approx(combined)
    gain = combined - roc_auc_score(saved["label"], saved["blend"])
    assert figures["combined_minus_blend"]["test"]["auroc"]["value"] == pytest.approx(gain)
    for scores in figures["baselines"].values():
        assert scores["test"]["n"] == figures["test"]["n"]


def test_run_json_makes_the_run_repeatable(runs: Path, dka_file: Path) -> None:
    facts = read(runs / "classification" / "run.json")
    assert facts["seed"] == 0
    assert facts["arguments"]["data_path"] == str(dka_file)
    assert facts["versions"]["torch"] == torch.__version__
    assert {part: facts["split"][part]["n"] for part in facts["split"]} == {
        "train": 128,
        "val": 16,
        "test": 16,
    }
    assert len(facts["data"]["data_sha256"]) == 64
    assert facts["float32_matmul_precision"] == "highest"


def test_the_stage_1_file_loads_safely_and_stays_frozen(runs: Path) -> None:
    from safetensors.torch import load_file

    first = torch.load(runs / TRAJECTORY_FILE, weights_only=True)
    assert first["config"]["features"] == ["Anion gap"]
    for stage in ("classification", "generative"):
        modules = load_file(runs / stage / "best" / "modules.safetensors")
        for name, tensor in first["weights"].items():
            assert torch.equal(modules[f"stage1.{name}"], tensor)


def test_generations_hold_a_line_for_each_test_patient(runs: Path) -> None:
    folder = runs / "generative"
    lines = [json.loads(x) for x in (folder / "generations_test.jsonl").read_text().splitlines()]
    table = pd.read_csv(folder / "predictions_test.csv", dtype={"id": str})
    assert [line["id"] for line in lines] == table["id"].tolist()
    assert [line["probability"] for line in lines] == table["probability"].tolist()
    judged = {"parses", "quality", "abnormal", "named", "trends", "right_trends", "invented"}
    assert set(lines[0]) == {"id", "text", "target", "verdict", "probability"} | judged
    for line, label in zip(lines, table["label"], strict=True):
        assert line["target"].startswith(f"Escalation: {'yes' if label else 'no'}. Anion gap:")
    reports = read(folder / "metrics.json")["reports"]
    assert reports["reports"] == len(lines)
    assert set(reports) == set(WRITTEN)


@pytest.mark.parametrize(("stage", "earlier"), [("classification", 1), ("generative", 2)])
def test_a_page_shows_the_stages_before_its_own(runs: Path, stage: str, earlier: int) -> None:
    """With the paired difference, apart from the baselines."""
    names = {STAGE_1: "trajectory", STAGE_2: "classification"}
    page, differences = (runs / stage / "report.html").read_text(), read_differences(runs, stage)
    section, baselines = page[page.index("Stages side by side") :].split("<h2>Baselines</h2>")
    saved = pd.read_csv(runs / stage / "predictions_test.csv")
    for name in list(names)[:earlier]:
        own = pd.read_csv(runs / names[name] / "predictions_test.csv")
        np.testing.assert_allclose(saved[name], own["probability"], atol=1e-6)
        gain = roc_auc_score(saved["label"], saved["probability"])
        gain -= roc_auc_score(saved["label"], own["probability"])
        assert differences[name]["value"] == pytest.approx(gain, abs=1e-9)
        difference = Estimate(**differences[name]).text("+.3f")
        row = section[section.index(f'<th scope="row">{name}') :].partition("</tr>")[0]
        assert difference in " ".join(re.sub("<[^>]+>", " ", row).split())
        assert f'<th scope="row">{name}' not in baselines
    assert "is not shown:" not in page
    page = (runs / "trajectory" / "report.html").read_text()
    assert "Stages side by side" not in page


def read_differences(runs: Path, stage: str) -> Any:
    found = read(runs / stage / "metrics.json")["differences"]
    return {name: each["test"]["auroc"] for name, each in found.items()}


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_best_model_knows_its_figures_and_its_card_shows_them(runs: Path, stage: str) -> None:
    config, metrics = read_config(runs, stage), read(runs / stage / "metrics.json")
    assert config["figures"] == card_figures(metrics)
    assert ("reports" in config["figures"]) == (stage == "generative")
    if stage != "trajectory":
        card = (runs / stage / "best" / "README.md").read_text(encoding="utf-8")
        assert card == model_card(config)
        assert f"{metrics['test']['auroc']['value']:.3f} [" in card


def test_the_log_holds_summary_epochs_and_table(runs: Path) -> None:
    (log,) = (runs / "trajectory").glob("train_*.log")
    text = log.read_text()
    reads = "stage 1 reads the series up to the last observation, and facts: "
    for piece in ("rows 160, patients 160", "train 128 rows", reads, "epoch 3/3", "blend"):
        assert piece in text


def stage_1(tmp_path: Path, data: Path, name: str, *words: str) -> Path:
    folder = tmp_path / name
    shared = ["--trajectory_only", "--data_path", str(data), "--output_dir", str(folder)]
    shared += ["--log_file", "none", "--trajectory_epochs", "2"]
    assert trainer.main([*shared, *words]) == 0
    return folder


@pytest.mark.parametrize(("flags", "times"), [([], 1), (["--facts", "off"], 0)])
def test_a_fact_that_is_not_read_is_told_once(
    flags: list[str],
    times: int,
    dka_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.csv"
    pd.read_csv(dka_file, dtype=str).assign(static_study="1").to_csv(data, index=False)
    stage_1(tmp_path, data, "run", *flags)
    assert capsys.readouterr().out.count("the fact static_study is not read: ") == times


@pytest.fixture(scope="module")
def plain(dka_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short stage 1 of seed 0."""
    return stage_1(tmp_path_factory.mktemp("plain"), dka_file, "run")


def test_a_second_run_sets_the_first_aside_and_only_the_seed_changes_it(
    plain: Path, dka_file: Path, tmp_path: Path
) -> None:
    folder = stage_1(tmp_path, dka_file, "run")
    first = folder / "trajectory" / "predictions_test.csv"
    assert first.read_text() == (plain / "trajectory" / "predictions_test.csv").read_text()
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stage_1(tmp_path, dka_file, "run", "--seed", "5")
    assert (folder / "trajectory.1" / "predictions_test.csv").read_bytes() == kept[first]
    assert (folder / "medgemma_trajectory_best.1.pt").read_bytes() == kept[folder / TRAJECTORY_FILE]
    assert first.read_bytes() != kept[first]
    assert not list((folder / "trajectory").glob("*.log"))


def test_a_solver_of_torchdiffeq_trains_too(plain: Path, dka_file: Path, tmp_path: Path) -> None:
    other = stage_1(tmp_path, dka_file, "other", "--solver", "bosh3")
    first, second = (
        pd.read_csv(folder / "trajectory" / "predictions_test.csv")["probability"]
        for folder in (plain, other)
    )
    assert np.allclose(first, second, atol=1e-3)
    assert not np.array_equal(first, second)


def learn(tmp_path: Path, data: Path, stage: str, *words: str) -> float:
    command = ["--data_path", str(data), "--output_dir", str(tmp_path / "run")]
    command += ["--log_file", "none", "--model_name", "tiny", *words]
    assert trainer.main(command) == 0
    return float(read(tmp_path / "run" / stage / "metrics.json")["test"]["auroc"]["value"])


FAST_ADAPTER = ["--epochs=14", "--adapter_lr=2e-3", "--projection_lr=3e-3", "--head_lr=1e-2"]


def test_a_label_that_copies_the_last_sign_is_learned_in_stages_1_and_2(
    sign_file: Callable[..., Path], tmp_path: Path
) -> None:
    data = sign_file()
    words = ["--trajectory_only", "--trajectory_epochs", "6"]
    assert learn(tmp_path, data, "trajectory", *words) > 0.95
    encoder = ["--ode_checkpoint", str(tmp_path / "run" / TRAJECTORY_FILE)]
    assert learn(tmp_path, data, "classification", *encoder, *FAST_ADAPTER) > 0.95


def test_shuffled_labels_are_not_learned_in_stages_1_and_2(
    sign_file: Callable[..., Path], tmp_path: Path
) -> None:
    data = sign_file(shuffled=True)  # 200 test rows: an AUROC by chance stays within 0.5 +- 0.13
    words = ["--trajectory_only", "--trajectory_epochs", "6"]
    assert abs(learn(tmp_path, data, "trajectory", *words) - 0.5) < 0.13
    words = [*FAST_ADAPTER, "--epochs=3"]
    assert abs(learn(tmp_path, data, "classification", *words) - 0.5) < 0.13


def test_freeze_ode_keeps_the_encoder_as_it_began(
    plain: Path, dka_file: Path, tmp_path: Path
) -> None:
    frozen = stage_1(tmp_path, dka_file, "run", "--freeze_ode")
    args, data = load_data(["--trajectory_only", "--data_path", str(dka_file)])
    fresh = wiring.make_stage1(args, data, trainer.ENCODERS).state_dict()
    weights = [name for name in fresh if name.endswith(("weight", "bias"))]
    assert any(".encoder." in name for name in weights)
    assert any(".head." in name for name in weights)
    for folder in (plain, frozen):
        saved = read_trajectory(folder / TRAJECTORY_FILE).weights
        for name in weights:
            kept = folder == frozen and ".encoder." in name
            assert torch.equal(saved[name], fresh[name]) == kept, name


def test_the_demo_runs_the_three_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"max_samples": 60, "trajectory_epochs": 1, "epochs": 1}
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **small})
    assert trainer.main(["--demo"]) == 0
    out = capsys.readouterr().out
    for stage in COMMANDS:
        place = tmp_path / "checkpoints_medgemma_demo" / stage
        assert (place / "metrics.json").is_file()
        page = (place / "report.html").read_text()
        notice = RANDOM_MODEL_UNREAD if stage == "trajectory" else RANDOM_MODEL
        assert page.index(notice) < page.index("The result in words")
        assert "48 hours after admission to the ICU" in page
        assert f"\nstage {stage}, trainable" in out  # plain lines, no logger's name in front
    assert out.count("python medgemma_trainer.py") == 3
    assert "checkpoints_medgemma_demo/generative/report.html" in out.strip().splitlines()[-1]
