"""The whole program on a small model: the files of a run, what they claim, what a run says."""

import json
import re
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

import medgemma_trainer as trainer
from chai_card import read_facts
from conftest import sign_table, whole_reports
from language_models import TINY_MODEL
from medgemma_clinical.commands import run_log
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.model_card import built_in_sentence
from medgemma_clinical.training.state import LOSS_TOLERANCE
from predicting import STAGES, predicted, write_data
from stages import arguments, data_for, make_stage

pytestmark = pytest.mark.slow

FILES = {"run.json", "history.jsonl", "metrics.json", "report.html", "baselines.json", "text.json"}
FILES |= {"predictions_val.csv", "predictions_test.csv", "figures", "tripod.md"}
BEST = {"adapter", "modules.safetensors", "config.json", "README.md", "NOTICE", "model_facts.xml"}
EXTRA = {"classification": {"best"}, "generative": {"best", "generations_test.jsonl"}}


def read(path):
    return json.loads(path.read_text())


def test_the_run_folder_holds_what_is_promised_and_makes_the_run_repeatable(runs):
    shown = {p.name for p in runs.iterdir() if not p.name.startswith(".")}
    assert shown == {TRAJECTORY_FILE, *STAGES, "train.csv", "train.json"}
    for stage in STAGES:
        extra = EXTRA.get(stage, {"model_facts.xml"})
        assert {p.name for p in (runs / stage).iterdir()} == FILES | extra
        (path,) = (runs / stage).rglob("model_facts.xml")
        known = dict(read_facts(path.read_text()))
        assert STAGE_NAMES[stage] in known["BasicInfo/ModelName"]
        assert known["KeyMetrics/SafetyReliability/TestType"] != "Not tested"
        facts = read(runs / stage / "run.json")
        assert facts["seed"] == 0
        assert facts["arguments"]["data_path"] == str(runs / "train.csv")
        assert torch.__version__.startswith(facts["versions"]["torch"])  # without "+cpu"
        assert [facts["split"][part]["n"] for part in ("train", "val", "test")] == [80, 10, 10]
        assert len(facts["data"]["data_sha256"]) == 64
        assert facts["float32_matmul_precision"] == "highest"
    first = torch.load(runs / TRAJECTORY_FILE, weights_only=True)
    for stage in EXTRA:
        assert {p.name for p in (runs / stage / "best").iterdir()} == BEST
        modules = load_file(runs / stage / "best" / "modules.safetensors")
        for name, tensor in first["weights"].items():  # it stayed frozen
            assert torch.equal(modules[f"stage1.{name}"], tensor)


@pytest.mark.parametrize("stage", STAGES)
def test_the_winner_of_the_history_scores_what_the_files_say(stage, runs, tmp_path):
    history = pd.read_json(runs / stage / "history.jsonl", lines=True)
    metrics = read(runs / stage / "metrics.json")
    assert history["epoch"].tolist() == [1, 2, 3][: 3 if stage == "trajectory" else 2]
    limit = (1 + LOSS_TOLERANCE) * history["val_loss"].min()
    good = history["epoch"][history["val_loss"] <= limit].tolist()
    lowest = history["epoch"][history["val_loss"].argmin()]
    assert metrics["averaged_epochs"] == [history["averaged_epochs"].iloc[-1]]
    assert metrics["averaged_epochs"][0] in (good, [lowest])
    paths = [runs / stage / f"predictions_{part}.csv" for part in ("val", "test")]
    parts = [pd.read_csv(path) for path in paths]
    rows = pd.read_csv(runs / "train.csv", dtype=str)
    rows = rows[rows["id"].isin(pd.concat(parts)["id"])]
    data = write_data(rows, tmp_path / "scored.csv")
    again = predicted(runs / stage, data, tmp_path / "out.csv").set_index("id")
    for name, table in zip(("validation", "test"), parts, strict=True):
        table = table.set_index("id")
        label, risk = table["label"], table["probability"]
        np.testing.assert_allclose(again.loc[table.index, "probability"], risk, rtol=1e-5)
        expected = {
            "auroc": roc_auc_score(label, risk),
            "auprc": average_precision_score(label, risk),
            "brier": brier_score_loss(label, risk),
            "log_loss": log_loss(label, risk),
        }
        assert (metrics[name]["n"], metrics[name]["events"]) == (len(table), label.sum())
        for metric, value in expected.items():
            found = metrics[name][metric]
            assert found["value"] == pytest.approx(value, abs=1e-9)
            if metric in ("auroc", "auprc") and label.sum() < 3:  # too often without an event
                assert (found["low"], found["high"]) == (None, None)
            else:
                assert found["low"] <= found["value"] <= found["high"]
    if stage != "trajectory":
        card = (runs / stage / "best" / "README.md").read_text()
        assert f"{metrics['test']['auroc']['value']:.3f} [" not in card, "few patients"
    if stage == "generative":
        path = runs / stage / "generations_test.jsonl"
        lines = pd.DataFrame(map(json.loads, path.read_text().splitlines()))  # exact floats
        assert lines["id"].tolist() == table.index.tolist()
        assert lines["probability"].tolist() == risk.tolist()
        assert lines["verdict"].tolist() == (risk >= metrics["threshold"]).astype(int).tolist()
        known = lines["target"].str.contains("In-hospital death: yes. Serum bicarb")
        assert known.tolist() == label.astype(bool).tolist()
        assert metrics["reports"]["reports"] == len(lines)


@pytest.mark.parametrize(
    "flags",
    [
        "--trajectory_only --dry_run",
        "--mode classification --dry_run --gradient_accumulation 2 --model_name {}",
        "--mode generative --epochs 1 --model_name demo",
    ],
)
def test_a_run_says_tokens_and_time_of_an_epoch(flags, dka_file, tmp_path, monkeypatch, capsys):
    """A dry run takes two whole steps of the longest rows, a page names the built-in model."""
    monkeypatch.chdir(tmp_path)
    backward, log, said = mock.Mock(wraps=trainer.backward), run_log.log_epoch_time, []

    def timed(stage, _, rows):
        said.extend([backward.call_count, *rows] if stage.text else [])
        log(stage, 3600.0, rows)

    monkeypatch.setattr(trainer, "backward", backward)
    monkeypatch.setattr(run_log, "log_epoch_time", timed)
    words = f"{flags.format(TINY_MODEL)} --data_path {dka_file} --batch_size 4 --max_samples 40"
    with whole_reports():
        assert trainer.main([*words.split(), "--log_file", "none"]) == 0
    printed, args = capsys.readouterr().out, arguments(*words.split())
    stage = make_stage(args, data_for(args))
    train = stage.batches["train"].rows
    assert "processes: 1" in printed
    assert f"\nstage {stage.name}, trainable" in printed  # plain, no logger's name in front
    if stage.text:
        batch = stage.collate(train)
        soft = batch["observed"].any(dim=2).sum(1).clamp(max=8)
        tokens = int((1 + soft + batch["text_mask"].sum(1)).sum())
        assert re.search(rf"\b{tokens:,}\b.* an epoch", printed)
        hours = stage.lengths[train].sum() / stage.lengths[said[1:]].sum()
        (shown,) = re.findall(r"an epoch takes about ([\d.]+) hours", printed)
        assert float(shown) == pytest.approx(hours, rel=0.05)
    assert said[:1] == ([2] if stage.text else [])
    assert any(tmp_path.iterdir()) != args.dry_run
    if args.dry_run:
        steps = [call.args[2] for call in backward.call_args_list]
        assert [len(rows) for rows in steps] == 2 * [4 * args.gradient_accumulation]
        taken = np.sort(stage.lengths[np.concatenate(steps)])
        assert taken.tolist() == np.sort(stage.lengths[train])[-len(taken) :].tolist()
    else:
        page = (tmp_path / "checkpoints_medgemma_dka" / "generative" / "report.html").read_text()
        assert page.index(built_in_sentence()) < page.index("0.5 is chance")


TWO = f"--model_name {TINY_MODEL} --head_lr 1e-2 --adapter_lr 2e-3 --projection_lr 3e-3 --epochs 5"


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_label_that_copies_the_last_sign_is_learned_and_chance_is_not(shuffled, tmp_path):
    """By stage 1, from its states alone, and from text alone."""
    table = sign_table(240, seed=1, shuffled=shuffled)
    table["split"] = ["train"] * 130 + ["val"] * 30 + ["test"] * 80
    table.to_csv(tmp_path / "signs.csv", index=False)
    two = f"{TWO} --epochs 2" if shuffled else TWO
    states = f"--series_text none --stage1_logit off --ode_checkpoint {tmp_path / TRAJECTORY_FILE}"
    for stage, flags in (
        ("trajectory", "--trajectory_only --trajectory_epochs 6 --encoder_lr 0.01"),
        ("classification", f"{two} {states}"),
        ("classification", f"{two} --series_text last --soft_prompt off"),
    ):
        words = f"--data_path {tmp_path / 'signs.csv'} --output_dir {tmp_path} --log_file none"
        assert trainer.main(f"{words} {flags}".split()) == 0
        auroc = read(tmp_path / stage / "metrics.json")["test"]["auroc"]["value"]
        # By chance the AUROC of 80 rows stays within 0.5 +- 0.2.
        assert abs(auroc - 0.5) < 0.2 if shuffled else auroc > 0.85


def test_a_run_begins_with_a_warning_of_an_input_that_tells_the_label(tmp_path, capsys):
    labels = np.arange(100) % 2
    table = pd.DataFrame({"static_died": labels, "label_escalation": labels})
    table["clinical_trajectory"] = [f"20 (0h) -> {10 + k / 8} (2h)" for k in range(100)]
    table.to_csv(tmp_path / "data.csv", index=False)
    words = ["--trajectory_only", "--data_path", str(tmp_path / "data.csv"), "--dry_run"]
    assert trainer.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "static_died alone" in shown.out + shown.err
