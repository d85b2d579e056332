"""What changes as a stage learns, and its checkpoint on the disk."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medgemma_clinical.distributed import default_device
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.files import InputError, RunFault, remove
from medgemma_clinical.models.checkpoints import read_tensors, write_tensors
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

AVERAGE_DECAY = 0.998
"""The weights that are evaluated and kept are an exponential average over about 500 steps."""

LOSS_TOLERANCE = 0.03
"""Epochs whose validation loss is at most so much above the lowest are averaged: in a part of fifty
events such differences are noise, by which no single epoch can be chosen."""

MAX_SKIPPED = 5
"""Training stops after so many steps in a row whose loss or gradient is not finite."""

SKIPPED_ADVICE = (
    "look for extreme values in the data; where batches of some lengths fail and others do not, "
    "the attention of this GPU and this version of torch fails: try --attention eager, another "
    "version, --precision fp32, or another --batch_size"
)

STATE_FORMAT = 12
"""Rises when older states can no longer be resumed."""

STATE_FILE = "newest.state"
START_AGAIN = "start again without --resume"


class NonFiniteLossError(RunFault):
    """The loss is not finite; the message names the epoch and what to do."""


class WeightAverage:
    """Exponential moving average of the parameters that learn.

    Source: Polyak and Juditsky 1992; the warm-up of the decay as in TensorFlow's
    ``ExponentialMovingAverage``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        # torch's ``AveragedModel`` would copy the frozen language model as well.
        self.weights = copies(self.parameters)

    def update(self, step: int) -> None:
        """Move the averages towards the parameters after the optimizer's step number ``step``."""
        decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.weights, self.parameters, step)


@dataclass
class Progress:
    """How far training has come; all plain types."""

    epoch: int = 0  # epochs that have ended
    batches: int = 0  # steps of the current epoch, taken or skipped
    steps: int = 0  # of all epochs, taken or skipped
    loss: float = 0.0  # sum over the epoch's terms of all processes
    terms: float = 0.0
    seconds: float = 0.0  # of the epoch, those before a stop included
    skipped: int = 0  # steps of the epoch whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    # Validation loss of each epoch and member, infinite once a member has stopped.
    losses: list[list[float]] = field(default_factory=list)
    averaged: list[list[int]] = field(default_factory=list)  # epochs, of each member
    history: list[dict[str, Any]] = field(default_factory=list)  # of ``history.jsonl``
    over: bool = False  # training has ended

    @property
    def mean_loss(self) -> float:
        """Mean loss over the terms of the epoch so far, NaN where there are none."""
        return self.loss / self.terms if self.terms else math.nan

    def count(self, loss: float, terms: float, norm: float) -> bool:
        """Count a step of a loss over so many terms; return whether it is taken, or skipped."""
        self.batches += 1
        self.steps += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.loss += loss
            self.terms += terms
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise NonFiniteLossError(
                f"the loss is {loss / terms}, its gradient {norm} in epoch {self.epoch + 1}, the "
                f"{MAX_SKIPPED}th time in a row: {SKIPPED_ADVICE}; what earlier epochs reached is "
                "kept"
            )
        return False

    @property
    def limits(self) -> Array:
        """The highest loss (N,) of each member that is good."""
        lowest: Array = np.min(self.losses, axis=0)
        return lowest * (1 + LOSS_TOLERANCE)

    @property
    def lowest_epochs(self) -> NDArray[np.int64]:
        """The first epoch (N,) of each member that has its lowest loss."""
        return np.argmin(self.losses, axis=0) + 1

    def good_epochs(self) -> list[list[int]]:
        """Return the epochs of each member whose loss is near its lowest."""
        is_good = np.array(self.losses) <= self.limits  # (epochs, N)
        return [(np.flatnonzero(epochs) + 1).tolist() for epochs in is_good.T]

    def learning(self, patience: int) -> NDArray[np.bool_]:
        """Return for each member whether its patience lasts in the current epoch, (N,)."""
        return self.epoch - self.lowest_epochs < patience

    def next_epoch(self) -> None:
        """Count an epoch and begin the next."""
        self.epoch += 1
        self.batches = self.skipped = 0
        self.loss = self.terms = self.seconds = 0.0


def warmup_and_cosine(optimizer: AdamW, warmup: int, total: int) -> LambdaLR:
    """Return a schedule that rises over ``warmup`` steps and falls as a half cosine to 0."""

    def share(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, total - warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, share)


def describe_selection(members: int) -> str:
    """Return which weights a training of one or several members keeps, in words."""
    steps, within = round(1 / (1 - AVERAGE_DECAY)), f"{100 * LOSS_TOLERANCE:g} %"
    return (
        f"the mean of the weights of the epochs{' of each member' if members > 1 else ''} whose "
        f"validation loss is within {within} of the lowest, or the epoch of the lowest where the "
        f"loss of that mean is not; an epoch's weights are an exponential average over about "
        f"{steps} steps"
    )


def describe_epochs(epochs: Iterable[int]) -> str:
    """Return some epochs in words, those in a row as a range."""
    ranges: list[list[int]] = []
    for epoch in sorted({*epochs}):
        if ranges and epoch == ranges[-1][-1] + 1:
            ranges[-1].append(epoch)
        else:
            ranges.append([epoch])
    return ", ".join(f"{r[0]} to {r[-1]}" if r[1:] else str(r[0]) for r in ranges)


@dataclass
class TrainState:
    """All that training changes, and the model as the processes share it."""

    accelerator: Accelerator
    model: nn.Module  # of several processes within DistributedDataParallel
    parameters: list[nn.Parameter]  # in the order of ``Stage.trainable_parameters``
    members: list[int]  # of stage 1, by parameter
    optimizer: AdamW
    schedule: LambdaLR  # of the learning rates
    average: WeightAverage
    progress: Progress = field(default_factory=Progress)
    epochs: dict[int, list[Tensor]] = field(default_factory=dict)  # weights that may be averaged
    folder: Path | None = None  # of states and ``epochs``; None: both are in memory alone
    last_tick: float = field(default_factory=time.perf_counter)  # of ``add_elapsed``

    def by_member(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each member that have a gradient, of those that still learn."""
        groups: dict[int, list[nn.Parameter]] = {}
        for member, parameter in zip(self.members, self.parameters, strict=True):
            if parameter.grad is not None:
                groups.setdefault(member, []).append(parameter)
        return list(groups.values())

    def learning(self, patience: int) -> list[bool]:
        """Return for each member of stage 1 whether its patience lasts in this epoch."""
        # Several processes wait for the gradients of all members: there all learn on.
        if not self.progress.losses or self.accelerator.num_processes > 1:
            return [True] * (1 + max(self.members))
        return self.progress.learning(patience).tolist()

    def keep_good(
        self, losses: Array | None, patience: int, final_epochs: Sequence[int] | None
    ) -> bool:
        """Keep the averaged weights of this epoch if it is good for some member; return whether.

        ``losses`` (N,) are those of the validation part; without one the good epochs are those that
        the folds chose, or the last one. A member whose patience has ended keeps its own.
        """
        progress, epoch = self.progress, self.progress.epoch + 1
        if losses is None:
            chosen = [k for k in final_epochs or () if k <= epoch] or [epoch]
            progress.averaged = [chosen] * (1 + max(self.members))
        else:
            learns = progress.learning(patience) if progress.losses else True
            progress.losses.append(np.where(learns, losses, math.inf).tolist())
            progress.averaged = progress.good_epochs()
        good = {*itertools.chain(*progress.averaged)}
        if epoch in good:
            self.epochs[epoch] = self.kept_weights(epoch)
        self.epochs = {k: weights for k, weights in self.epochs.items() if k in good}
        return epoch in good

    def kept_weights(self, epoch: int) -> list[Tensor]:
        """Return the averaged weights for good: those of a file that the first process writes."""
        if self.folder is None:
            return [weight.cpu().clone() for weight in self.average.weights]
        path = epoch_file(self.folder, epoch)
        if self.accelerator.is_main_process:
            write_tensors(path, {"weights": self.average.weights})
        self.accelerator.wait_for_everyone()
        weights: list[Tensor] = read_tensors(path, mapped=True)["weights"]
        return weights

    def set_best(self, validate: Callable[[], Array]) -> None:
        """Set the mean weights of the good epochs; the best where a member's mean is not good.

        The weights of single epochs are let go, so that their files can be removed.
        """
        progress = self.progress
        self.set_weights(self.mean_weights())
        if progress.losses:
            is_good = validate() <= progress.limits  # (N,), False where a loss is no number
            for member in np.flatnonzero(~is_good):
                progress.averaged[member] = [int(progress.lowest_epochs[member])]
            self.set_weights(self.mean_weights())
        self.epochs = {}

    def mean_weights(self) -> list[Tensor]:
        """Return the mean of the weights of each member's averaged epochs."""
        means = []
        for k, member in enumerate(self.members):
            weights = [self.epochs[epoch][k] for epoch in self.progress.averaged[member]]
            means.append(torch.stack(weights).mean(dim=0))
        return means

    def add_elapsed(self) -> None:
        """Add the seconds since the last call to those of the epoch."""
        now = time.perf_counter()
        self.progress.seconds += now - self.last_tick
        self.last_tick = now

    @torch.no_grad()
    def set_weights(self, values: Iterable[Tensor]) -> None:
        """Copy values into the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def swapped_weights(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Put other values in place of the parameters for the length of a block."""
        before = copies(self.parameters)
        try:
            self.set_weights(values)
            yield
        finally:
            self.set_weights(before)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


def has_state(folder: Path) -> bool:
    """Return whether a stage's training can be resumed."""
    return (folder / STATE_FILE).exists()


def epoch_file(folder: Path, epoch: int) -> Path:
    """Return the file of the averaged weights of an epoch."""
    return folder / f"epoch_{epoch}.weights"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state in place of the one before; the files of ``epochs`` stay, others go."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / STATE_FILE, {"format": STATE_FORMAT, **state})
    # Until now a kill would have left the state before, which needs its own.
    named = [epoch_file(folder, epoch) for epoch in state["epochs"]]
    for path in folder.glob("epoch_*.weights"):
        if path not in named:
            remove(path)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a training, ``epochs`` with their weights; code in a file does not run."""
    path = folder / STATE_FILE
    try:
        state = read_tensors(path)
        is_readable = state.pop("format") == STATE_FORMAT
        weights = {}
        for epoch in state["epochs"] if is_readable else ():
            path = epoch_file(folder, epoch)
            weights[epoch] = read_tensors(path, mapped=True)["weights"]
    except Exception as error:  # torch.load has no error of its own
        raise InputError(f"--resume {path}: no state, or damaged: {START_AGAIN}") from error
    if not is_readable:
        raise InputError(f"{path}: of another version: {START_AGAIN}")
    return {**state, "epochs": weights}


def generators() -> dict[str, Tensor]:
    """Return the states of the random generators; a GPU's lies on the host."""
    device = default_device()
    random = {"cpu": torch.get_rng_state()}
    return random | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(random: dict[str, Tensor]) -> None:
    """Set the states of the random generators."""
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], default_device())


def training_state(stage: Stage, state: TrainState) -> dict[str, Any]:
    """Return all that resumes training to the bit; each process brings its generators."""
    return {
        "weights": {name: p.detach() for name, p in stage.trainable_parameters().items()},
        "average": state.average.weights,
        "epochs": [*state.epochs],
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "progress": vars(state.progress),
        "random": gather_object([generators()]),
        "passes": {"max_tokens": stage.max_tokens, "recomputes": stage.recomputes},
    }


def load_training_state(stage: Stage, state: TrainState, content: dict[str, Any]) -> None:
    """Restore a state of ``training_state``, random generators included, to the bit."""
    expected = {name: p.shape for name, p in stage.trainable_parameters().items()}
    same_shapes = {name: weight.shape for name, weight in content["weights"].items()} == expected
    if not same_shapes or len(content["random"]) != state.accelerator.num_processes:
        raise InputError("--resume: another model or number of processes: start without --resume")
    state.set_weights(content["weights"].values())
    device = default_device()
    state.average.weights = [weight.to(device) for weight in content["average"]]
    state.epochs = content["epochs"]
    state.optimizer.load_state_dict(content["optimizer"])
    state.schedule.load_state_dict(content["schedule"])
    vars(state.progress).update(content["progress"])
    set_generators(content["random"][state.accelerator.process_index])
    progress = state.progress
    logger.info(
        "resuming in epoch %d after %d of its steps, %d steps in all",
        progress.epoch + 1,
        progress.batches,
        progress.steps,
    )
