"""Predictions: in the order of the data, whatever the batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medgemma_clinical.training import evaluate as module
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import make_loaders
from toy_stage import toy_stage

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 4, 64])
def test_predictions_come_in_the_order_of_the_data_whatever_the_batches(size: int) -> None:
    stage = toy_stage()
    rows = np.array([41, 39, 47, 40, 38])
    lengths = np.random.default_rng(0).integers(1, 9, 58)
    collate: Any = stage.loaders["val"].collate_fn
    loaders = make_loaders({"val": rows}, size, collate, lengths)
    stage.model.train()
    found = evaluate(stage.model, loaders["val"], CPU)
    assert not stage.model.training, "without dropout"
    batch = collate(sorted(rows.tolist()))
    expected = stage.model(batch)
    assert found.rows.tolist() == sorted(rows)
    assert found.labels.tolist() == batch["labels"].tolist()
    assert found.labels.dtype == found.logit.dtype == np.float64
    np.testing.assert_allclose(found.logit, expected.logit.detach(), atol=1e-6)
    assert found.loss == pytest.approx(expected.loss.item() / 5)


def test_a_trial_takes_the_first_batches_alone() -> None:
    stage = toy_stage()
    assert len(evaluate(stage.model, stage.loaders["train"], CPU, most_batches=2).rows) == 16
    assert len(evaluate(stage.model, stage.loaders["train"], CPU, most_batches=99).rows) == 37


def test_the_shares_of_several_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = toy_stage()
    whole = evaluate(stage.model, stage.loaders["val"], CPU)
    collate: Any = stage.loaders["val"].collate_fn
    shares = [
        make_loaders({"val": rows}, 2, collate)["val"]
        for rows in (whole.rows[1::2], whole.rows[::2])
    ]
    sent: list[list[object]] = []

    def gather(items: list[object]) -> list[object]:
        sent.append(items)
        return [item for share in sent for item in share]

    monkeypatch.setattr(module, "gather", gather)
    evaluate(stage.model, shares[0], CPU)
    joined = evaluate(stage.model, shares[1], CPU)
    assert joined.rows.tolist() == whole.rows.tolist()
    np.testing.assert_allclose(joined.logit, whole.logit, atol=1e-6)
    assert joined.loss == pytest.approx(whole.loss)
