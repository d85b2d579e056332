"""Schedule and parameter groups."""

from __future__ import annotations

import pytest
import torch

from medgemma_clinical.training.optimizer import make_optimizer, make_schedule, warmup_cosine
from medgemma_clinical.training.stage import WEIGHT_DECAY
from toy_stage import toy_stage


def test_the_schedule_rises_over_a_tenth_of_the_steps_then_falls_to_zero() -> None:
    assert warmup_cosine(0, 200) == pytest.approx(1 / 20)
    assert warmup_cosine(19, 200) == 1.0
    assert warmup_cosine(110, 200) == pytest.approx(0.5)
    assert warmup_cosine(200, 200) == pytest.approx(0.0)
    assert warmup_cosine(0, 1) == 1.0
    assert warmup_cosine(99, 100_000) == 1.0


def test_each_part_learns_at_its_rate_times_the_schedule() -> None:
    optimizer = make_optimizer(toy_stage())
    schedule = make_schedule(optimizer, 200)
    parameter = optimizer.param_groups[0]["params"][0]
    for step in range(50):
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert rates == pytest.approx([rate * warmup_cosine(step, 200) for rate in (0.01, 0.1)])
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()


def test_only_matrices_decay() -> None:
    """Neither biases nor the scale of a norm, and nothing that is frozen."""
    stage = toy_stage()
    parameters = stage.trainable_parameters()
    decaying = {id(p) for g in stage.parameter_groups() if g["weight_decay"] for p in g["params"]}
    assert {n for n, p in parameters.items() if id(p) in decaying} == {
        "encoder.0.weight",
        "head.weight",
    }
    assert set(parameters) == {
        *("encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"),
        *("head.weight", "head.bias"),
    }
    optimizer = make_optimizer(stage)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in parameters.items():
        rate = 0.1 if name.startswith("head") else 0.01
        factor = (
            1 - rate * WEIGHT_DECAY if name.endswith("0.weight") or name == "head.weight" else 1
        )
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3), (5, 1)])
def test_the_last_step_of_an_epoch_may_take_fewer_batches(accumulate: int, steps: int) -> None:
    stage = toy_stage(accumulate=accumulate, epochs=4)
    assert (stage.steps_per_epoch, stage.total_steps) == (steps, 4 * steps)
