"""The longest batch, tried before a run: nothing is left of it but the way that fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from language_models import patients
from medgemma_clinical.files import RunFault
from medgemma_clinical.training import memory
from medgemma_clinical.training.memory import make_fit
from medgemma_clinical.training.stage import Stage
from stages import STAGE_1, arguments, data_for, stage_of_patients

CPU = torch.device("cpu")
LENGTHS = patients().lengths
FLAGS = ("--mode", "generative", "--lora_dropout", "0.5", "--batch_size", "3")


def checkpointing(model: Any) -> bool:
    on: bool = model.body.gradient_checkpointing
    return on


def limit_memory(stage: Stage, *, always: bool = False) -> list[list[int]]:
    """Let training fail without checkpointing, or always; return the rows of each try."""
    tries: list[list[int]] = []

    def fail(model: nn.Module, inputs: Any) -> None:
        if model.training:
            tries.append(sorted(inputs[0]["index"].tolist()))
            if always or not checkpointing(model):
                raise torch.OutOfMemoryError("CUDA out of memory")

    stage.model.register_forward_pre_hook(fail)
    return tries


def test_checkpointing_comes_on_where_the_longest_batch_does_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    stage = stage_of_patients(*FLAGS)
    caplog.clear()
    tries = limit_memory(stage)
    make_fit(stage, LENGTHS, CPU)
    assert checkpointing(stage.model)
    assert [record.getMessage() for record in caplog.records] == [
        "the longest batch does not fit the GPU: --gradient_checkpointing is now on"
    ]
    args = arguments(*FLAGS)
    collate = stage.loaders["train"].collate_fn
    tokens = collate.lengths()[data_for(args, patients()).split["train"]]  # type: ignore[union-attr]
    assert len(tries) == 2
    assert tries[0] == tries[1]
    tried = np.sort(collate.lengths()[tries[0]])[::-1]  # type: ignore[union-attr]
    assert tried.tolist() == np.sort(tokens)[::-1][:3].tolist(), "the longest rows that train"


def test_a_batch_that_fits_switches_nothing_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stage = stage_of_patients(*FLAGS)
    caplog.clear()
    make_fit(stage, LENGTHS, CPU)
    assert not checkpointing(stage.model)
    assert not caplog.records


@pytest.mark.parametrize(
    "flags", [FLAGS, (*FLAGS, "--gradient_checkpointing"), (STAGE_1, "--batch_size", "3")]
)
def test_a_batch_that_never_fits_ends_the_run_with_advice(flags: tuple[str, ...]) -> None:
    stage = stage_of_patients(*flags)
    tries = limit_memory(stage, always=True)
    with pytest.raises(RunFault, match="does not fit the GPU: lower --batch_size"):
        make_fit(stage, LENGTHS, CPU)
    assert len(tries) == (2 if stage.save_memory else 1)
    assert (stage.save_memory is None) == (flags != FLAGS)


@pytest.mark.parametrize("limited", [False, True])
def test_the_trial_changes_neither_weights_nor_gradients_nor_random_numbers(limited: bool) -> None:
    stage = stage_of_patients(*FLAGS)
    if limited:
        limit_memory(stage)
    weights = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    state = torch.get_rng_state()
    make_fit(stage, LENGTHS, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in stage.model.parameters())
    after = stage.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_process_that_has_room_follows_one_that_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of_patients(*FLAGS)
    others = iter([1.0, 0.0])  # the other process fails without checkpointing
    monkeypatch.setattr(memory, "sum_over_processes", lambda own: [own + next(others)])
    make_fit(stage, LENGTHS, CPU)
    assert checkpointing(stage.model)


@pytest.mark.parametrize(
    ("text", "caught"), [("CUBLAS_STATUS_ALLOC_FAILED when calling", True), ("another", False)]
)
def test_a_workspace_of_cublas_that_does_not_fit_counts_as_memory(text: str, caught: bool) -> None:
    stage = stage_of_patients(*FLAGS)
    forward = stage.model.forward

    def full(batch: object) -> object:
        if not checkpointing(stage.model):
            raise RuntimeError(text)
        return forward(batch)

    stage.model.forward = full
    if caught:
        make_fit(stage, LENGTHS, CPU)
        assert checkpointing(stage.model)
    else:
        with pytest.raises(RuntimeError, match=text):
            make_fit(stage, LENGTHS, CPU)
