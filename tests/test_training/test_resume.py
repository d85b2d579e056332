"""A checkpoint brings training back to the last bit, or is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from medgemma_clinical.files import InputError
from medgemma_clinical.training.checkpoint_store import CheckpointStore, TrainingCheckpoint
from medgemma_clinical.training.resume import capture_checkpoint, resume_training
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import TrainState, set_up_training
from toy_stage import take_steps, toy_stage

CPU = torch.device("cpu")


def everything(state: TrainState) -> list[Any]:
    """Return all that a checkpoint must bring back, as plain lists."""
    moments = state.optimizer.state_dict()
    tensors = [*state.parameters, *state.average.weights, *state.best]
    tensors += [t for each in moments["state"].values() for t in each.values()]
    rates = [group["lr"] for group in moments["param_groups"]]
    plain = [repr(state.progress), repr(state.stopping), state.average.steps, rates]
    return [[tensor.tolist() for tensor in tensors], plain, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("steps", [0, 3, 5, 7, 13])
def test_training_continues_to_the_last_bit(steps: int, tmp_path: Path) -> None:
    """With dropout, within an epoch and between two, before the first best and behind it."""
    stage = toy_stage()
    state = set_up_training(stage, CPU)
    take_steps(stage, state, steps)
    store = CheckpointStore(tmp_path)
    store.save(capture_checkpoint(stage, state))
    then = everything(state)
    take_steps(stage, state, 6)
    expected = everything(state)
    assert expected[0] != then[0]

    again = toy_stage(seed=5)  # other weights, other random numbers
    again.loaders = stage.loaders
    frozen, base = again.model.get_submodule("base"), stage.model.get_submodule("base")
    frozen.load_state_dict(base.state_dict())
    resumed = set_up_training(again, CPU)
    resume_training(again, resumed, store.newest())
    assert everything(resumed) == then
    take_steps(again, resumed, 6)
    assert everything(resumed) == expected


def captured() -> tuple[Stage, TrainState, TrainingCheckpoint]:
    stage = toy_stage()
    state = set_up_training(stage, CPU)
    take_steps(stage, state, 6)
    return stage, state, capture_checkpoint(stage, state)


@pytest.mark.parametrize("part", ["weights", "average", "best"])
@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "more", "order"])
def test_a_checkpoint_of_another_model_is_refused_before_it_is_used(part: str, change: str) -> None:
    stage, state, checkpoint = captured()
    tensors = dict(getattr(checkpoint, part))
    name = "head.weight"
    if change == "shape":
        tensors[name] = torch.zeros(1)  # which would fit by broadcasting
    elif change == "dtype":
        tensors[name] = tensors[name].double()
    elif change == "missing":
        del tensors[name]
    elif change == "more":
        tensors["head.other"] = torch.zeros(1)
    else:
        tensors = {name: tensors.pop(name), **tensors}
    before = [p.detach().clone() for p in state.parameters]
    changed: Any = {part: tensors}
    with pytest.raises(InputError, match=r"of another model: (head|encoder)"):
        resume_training(stage, state, dataclasses.replace(checkpoint, **changed))
    assert all(map(torch.equal, before, state.parameters))


def test_another_number_of_processes_is_refused() -> None:
    stage, state, checkpoint = captured()
    shared = dataclasses.replace(checkpoint, random=checkpoint.random * 2)
    with pytest.raises(InputError, match="begun with 2 processes, now 1"):
        resume_training(stage, state, shared)
