"""The ways of fusion that tests/benchmarks/fusion.py tries."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import common
import fusion
import fusion_ways

import medgemma_trainer as trainer
from stages import arguments, data_for, stage_of_patients
from trajectories import dataset_of

PATIENTS = list(range(8))


def test_a_split_holds_so_many_patients_of_each_part_with_both_labels(tmp_path):
    sizes = {"train": 200, "val": 100, "test": 50}
    copies = [fusion.with_split(common.SAMPLE, sizes, seed, tmp_path / "x.csv") for seed in (0, 1)]
    table = pd.read_csv(copies[1], dtype=str)
    assert table["split"].value_counts().to_dict() == sizes
    share = table["label_escalation"].astype(int).groupby(table["split"]).mean()
    assert share.max() - share.min() < 0.02
    assert (tmp_path / "x.json").exists()


def test_a_caption_says_first_last_lowest_highest_and_trend():
    dataset = dataset_of(["24 (0h) -> 9 (1h) -> 30 (2h) -> 22.5 (4h)"])
    words = "first 24, last 22.5, lowest 9, highest 30, falling"
    assert fusion_ways.caption(dataset, 0) == f"{dataset.features[0]} {words}"


def test_the_words_hold_mean_spread_and_risk():
    data = data_for(arguments("--data_path", str(common.SAMPLE)))
    told = fusion_ways.with_summary(data, np.zeros(len(data.dataset))).dataset
    values = next(iter(data.dataset.measured(0)))[2]
    mean, spread = round(values.mean(), 1), round(values.std(), 1)
    expected = f"{data.dataset.contexts[0]}. {told.features[0]} mean {mean:g}, spread {spread:g}"
    assert told.contexts[0] == f"{expected}. Estimated risk 50%"


def test_closed_gates_change_nothing_and_open_ones_do(monkeypatch):
    monkeypatch.setattr(trainer, "LLMClassifier", fusion_ways.CrossAttending)
    stage = stage_of_patients("--mode", "classification")
    model = stage.model.eval()
    batch = stage.collate(PATIENTS)
    nn.init.normal_(model.head.weight)
    closed = model(batch).logit
    hidden, start = fusion_ways.LLMClassifier.read(model, batch, None)
    text = model.head(hidden[PATIENTS, start + batch["verdict"]])[:, 0]
    torch.testing.assert_close(closed, text + model.trajectory(batch).logit)
    nn.init.ones_(model.projection.gates)
    assert (model(batch).logit - closed).abs().min() > 1e-3


def test_a_warm_up_moves_the_projection_alone():
    flags = ("--model_name", "tiny", "--lora_dropout", "0")
    stage = stage_of_patients("--mode", "classification")
    before = {name: p.clone() for name, p in stage.model.named_parameters()}
    fusion_ways.warm_up(stage, arguments(*flags), stage.text.dataset)
    after = dict(stage.model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {"projection.linear.weight", "projection.linear.bias"}
    assert any("lora" in name and p.requires_grad for name, p in after.items())


def test_a_margin_adds_the_mean_over_pairs_in_training_alone(monkeypatch):
    monkeypatch.setattr(trainer, "LLMWriter", fusion_ways.MarginWriter)
    stage = stage_of_patients("--mode", "generative")
    model = stage.model.eval()
    batch = stage.collate(PATIENTS)
    plain, labels = model(batch), batch["labels"] == 1
    trained = model.train()(batch)
    pairs = [functional.softplus(b - a) for a in plain.logit[labels] for b in plain.logit[~labels]]
    margin = fusion_ways.VERDICT_WEIGHT * len(labels) * torch.stack(pairs).mean()
    torch.testing.assert_close(trained.loss, plain.loss + margin)


def test_the_weight_of_a_half_is_chosen_on_the_other_half():
    rng = np.random.default_rng(0)
    offset, patients = np.zeros(400), np.arange(400).astype(str)
    logit = rng.normal(size=400)
    _, patient = np.unique(patients, return_inverse=True)
    half = (np.random.default_rng(3).permutation(400) % 2)[patient]
    # In half 0 the residual is true, in half 1 it is false.
    label = np.where(half == 0, logit > 0, logit < 0).astype(float)
    weighed, chosen = fusion_ways.weighed(label, offset, logit, patients, 3)
    assert chosen == [0.0, 1.0]
    np.testing.assert_allclose(weighed, np.where(half == 0, 0, logit))
