"""From the state of training to a checkpoint and back, to the last bit."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from medgemma_clinical.distributed import default_device, gather, processes
from medgemma_clinical.files import InputError
from medgemma_clinical.training.checkpoint_store import TrainingCheckpoint
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import (
    EarlyStopping,
    Progress,
    TrainState,
    copies,
    copy_into,
)

logger = logging.getLogger(__name__)


def capture_checkpoint(stage: Stage, state: TrainState) -> TrainingCheckpoint:
    """Return the checkpoint of this moment, between two steps; each process must call.

    Its tensors are those that training goes on changing: write it before the next step.
    """
    names = list(stage.trainable_parameters())

    def named(tensors: list[Any]) -> dict[str, Tensor]:
        return dict(zip(names, (tensor.detach() for tensor in tensors), strict=True))

    return TrainingCheckpoint(
        weights=named(state.parameters),
        average=named(state.average.weights),
        average_steps=state.average.steps,
        best=named(state.best) if state.best else {},
        optimizer=state.optimizer.state_dict(),
        schedule=state.schedule.state_dict(),
        random=gather([_random_state()]),
        progress=vars(state.progress),
        stopping=vars(state.stopping),
    )


def resume_training(stage: Stage, state: TrainState, checkpoint: TrainingCheckpoint) -> None:
    """Bring the state of training, random generators included, to that of a checkpoint.

    The best weights so far come back into ``state.best``; the caller writes them to disk.

    Raises:
        InputError: the checkpoint is of another model, or of another number of processes.
    """
    _check_fits(stage, checkpoint)
    copy_into(state.parameters, list(checkpoint.weights.values()))
    copy_into(state.average.weights, list(checkpoint.average.values()))
    state.average.steps = checkpoint.average_steps
    if checkpoint.best:
        state.best = copies(state.parameters)
        copy_into(state.best, list(checkpoint.best.values()))
    state.optimizer.load_state_dict(checkpoint.optimizer)
    state.schedule.load_state_dict(checkpoint.schedule)
    state.progress = Progress(**checkpoint.progress)
    state.stopping = EarlyStopping(**checkpoint.stopping)
    own = checkpoint.random[processes().process_index]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], default_device())
    logger.info(
        "resuming in epoch %d after %d of its batches, %d steps in all",
        state.stopping.epoch + 1,
        state.progress.batches,
        state.average.steps,
    )


def _random_state() -> dict[str, Tensor]:
    """Return the states of the generators that training draws from in this process."""
    states = {"cpu": torch.get_rng_state()}
    if default_device().type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(default_device())
    return states


def _check_fits(stage: Stage, checkpoint: TrainingCheckpoint) -> None:
    """Compare names, shapes and dtypes of the weights, and the number of processes.

    Raises:
        InputError: naming what differs.
    """
    again = "start again without --resume"
    found, number = len(checkpoint.random), processes().num_processes
    if found != number:
        raise InputError(
            f"--resume: begun with {found} processes, now {number}: start the same number, or "
            f"{again}"
        )
    expected = {name: (p.shape, p.dtype) for name, p in stage.trainable_parameters().items()}
    for part in (checkpoint.weights, checkpoint.average, checkpoint.best or checkpoint.weights):
        kept = {name: (tensor.shape, tensor.dtype) for name, tensor in part.items()}
        other = [name for name in {**expected, **kept} if expected.get(name) != kept.get(name)]
        if other or list(kept) != list(expected):
            name = (other or list(kept))[0]
            raise InputError(f"--resume: the checkpoint is of another model: {name}: {again}")
