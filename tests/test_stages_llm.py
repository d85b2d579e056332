"""Stages 2 and 3 in the training loop: steps, gradients, and no work that is not needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import medgemma_trainer as trainer
from dte_encoder import ClinicalODERNN
from language_models import CPU, body_inputs
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.encoder_plan import Plan
from medgemma_clinical.models.trajectory import Output
from medgemma_clinical.models.trajectory_llm import LLMClassifier, TrajectoryLLM
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import batches_of
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import set_up_training
from stages import STAGE_1, stage_of_patients

TRAINED = 8
"""Rows that train; four validate, four test."""


# --------------------------------------------------------------------------- steps


def gradients_of(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Train an epoch of one step; return the gradients of that step, not clipped."""
    monkeypatch.setattr(trainer, "LARGEST_NORM", math.inf)
    if isinstance(stage.model, LLMClassifier):  # a new head is zero and passes no gradient on
        torch.nn.init.ones_(stage.model.head.weight)
    state = set_up_training(stage, CPU)
    names, steps = list(stage.trainable_parameters()), []

    def keep(*_: Any, **__: Any) -> None:
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in state.parameters]
        steps.append([slope.clone() for slope in slopes])

    state.optimizer.register_step_pre_hook(keep)
    trainer.train_epoch(stage, state, seed=0)
    (only,) = steps
    return dict(zip(names, only, strict=True))


@pytest.mark.parametrize(
    ("mode", "flags"), [("classification", []), ("generative", ["--freeze_ode"])]
)
def test_accumulated_gradients_equal_those_of_the_large_batch(
    mode: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows in batches of 3, 3 and 2, with series and reports of unequal length."""
    flags = ["--mode", mode, *flags]
    whole = stage_of_patients(*flags, "--batch_size", str(TRAINED))
    small = ["--batch_size", "3", "--gradient_accumulation", "4"]
    parts = stage_of_patients(*flags, *small, "--gradient_checkpointing")
    expected, found = gradients_of(whole, monkeypatch), gradients_of(parts, monkeypatch)
    assert found.keys() == expected.keys()
    moved = {name.split(".")[0] for name, gradient in expected.items() if gradient.any()}
    assert moved == set(whole.learning_rates)
    encoders = [gradient for name, gradient in expected.items() if ".encoder." in name]
    assert bool(encoders) == ("--freeze_ode" not in flags)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_epochs_last_batch_makes_its_own_step_and_the_schedule_ends_with_the_last() -> None:
    flags = ["--freeze_ode", "--batch_size", "3", "--gradient_accumulation", "2", "--epochs", "2"]
    stage = stage_of_patients(*flags)
    state = set_up_training(stage, CPU)
    steps, rates = [], []
    for _ in range(stage.epochs):
        trainer.train_epoch(stage, state, seed=0)
        steps.append(state.average.steps)
        rates.append(state.schedule.get_last_lr()[0])
        state.progress = state.progress.next_epoch(over=False)
    assert steps == [2, 4]
    assert rates[0] > 0
    assert rates[1] == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------- work


def test_a_frozen_encoder_encodes_each_row_once_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of_patients(STAGE_1)
    stage.save(tmp_path / "trajectory", stage.config)
    file = str(tmp_path / TRAJECTORY_FILE)
    rows: list[int] = []
    run = ClinicalODERNN.run

    def counted(encoder: Any, plan: Plan) -> Tensor:
        rows.append(plan.shape[0])
        return run(encoder, plan)

    monkeypatch.setattr(ClinicalODERNN, "run", counted)
    stage = stage_of_patients("--ode_checkpoint", file)
    assert rows == [16]
    state = set_up_training(stage, CPU)
    trainer.train_epoch(stage, state, seed=0)
    trainer.validate(stage, state)
    assert rows == [16]


def test_an_encoder_that_learns_encodes_each_batch_anew() -> None:
    stage = stage_of_patients("--mode", "generative", "--encoder_lr", "0.1")
    batch: Any = stage.loaders["train"].collate_fn([0, 1])
    assert "states" not in batch
    assert isinstance(stage.model, TrajectoryLLM)
    before = stage.model.trajectory(batch)
    trainer.train_epoch(stage, set_up_training(stage, CPU), seed=0)
    after = stage.model.eval().trajectory(batch)
    assert before is not None
    assert after is not None
    assert not torch.allclose(before.states, after.states)
    assert not torch.allclose(before.logit, after.logit)


def test_an_epoch_sends_no_position_through_the_layers_that_no_row_needs() -> None:
    stage = stage_of_patients("--mode", "generative", "--batch_size", "4")
    assert isinstance(stage.model, TrajectoryLLM)
    with body_inputs(stage.model) as seen:
        trainer.train_epoch(stage, set_up_training(stage, CPU), seed=3)
    found = [tuple(call["inputs_embeds"].shape[:2]) for call in seen]
    loader = stage.loaders["train"]
    batches_of(loader).set_epoch(3, 1)
    expected = []
    for batch in loader:
        soft = batch["observed"].any(dim=2).sum(1).clamp(max=stage.model.tokens)
        tokens = 1 + soft + batch["text_mask"].sum(1)  # <bos>, soft, text
        expected.append((len(tokens), int(tokens.max())))
    assert found == expected
    assert len(found) == TRAINED // 4


def test_scoring_keeps_nothing_for_gradients_and_takes_twice_the_batch() -> None:
    stage = stage_of_patients("--batch_size", "2")
    sizes: list[int] = []
    kept: list[bool] = []

    def note(_: Any, __: Any, output: Output) -> None:
        sizes.append(len(output.logit))
        kept.append(output.loss.requires_grad or output.logit.requires_grad)

    stage.model.register_forward_hook(note)
    evaluate(stage.model, stage.loaders["test"], CPU)
    assert sizes == [4]
    assert kept == [False]
