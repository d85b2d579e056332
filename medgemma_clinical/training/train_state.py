"""What changes as a stage learns: optimizer, average of the weights, best epoch, progress."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from medgemma_clinical.distributed import processes
from medgemma_clinical.files import RunFault, write_text
from medgemma_clinical.training.optimizer import make_optimizer, make_schedule
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

AVERAGE_DECAY = 0.998
"""The weights that are evaluated and kept are an exponential average over about 500 steps."""

MOST_SKIPPED = 5
"""Steps in a row whose loss or gradient is not finite, after which training stops."""

WARNED_SHARE = 0.01
"""An epoch with a larger share of skipped steps gets a warning."""

SKIPPED_ADVICE = (
    "look for extreme values in the data; where batches of some lengths fail and others do not, "
    "the attention of this GPU and this version of torch fails: try --attention eager, another "
    "version, --precision fp32, or another --batch_size"
)


class NonFiniteLossError(RunFault):
    """The loss is not finite; the text says where and what to do."""


class WeightAverage:
    """Exponential moving average of the parameters that learn.

    ``torch.optim.swa_utils.AveragedModel`` would copy the frozen language model as well.

    Source: Polyak and Juditsky 1992; the warm-up of the decay as in TensorFlow's
    ``ExponentialMovingAverage``.

    Attributes:
        weights: the averages, one tensor a parameter.
        steps: optimizer steps so far, skipped ones included.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float = AVERAGE_DECAY) -> None:
        """Start from the parameters as they are."""
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.weights = copies(self.parameters)

    def update(self) -> None:
        """Move the averages towards the parameters after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.weights, self.parameters, self.steps)


@dataclass
class EarlyStopping:
    """The best epoch so far.

    Attributes:
        patience: epochs without a better score after which training stops.
        higher_is_better: direction of the score.
        best: score of the best epoch, NaN before the first.
        best_epoch: its number, 0 before the first.
        epoch: epochs that have ended.
    """

    patience: int
    higher_is_better: bool
    best: float = math.nan
    best_epoch: int = 0
    epoch: int = 0

    def improved(self, score: float) -> bool:
        """Count an epoch and return whether its score is the best so far."""
        self.epoch += 1
        better = score > self.best if self.higher_is_better else score < self.best
        if self.best_epoch == 0 or better:
            self.best, self.best_epoch = score, self.epoch
        return self.best_epoch == self.epoch

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.epoch - self.best_epoch >= self.patience


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        """Start."""
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the start or the last lap."""
        last, self.last = self.last, time.perf_counter()
        return self.last - last


@dataclass
class Progress:
    """How far training has come; all plain types.

    Attributes:
        batches: of the current epoch, learned from by this process.
        loss: sum of the epoch's losses over all terms of all processes.
        terms: number of these terms.
        seconds: the epoch has taken, those before a stop included.
        skipped: steps of the epoch that were not taken, as loss or gradient was not finite.
        skipped_in_a_row: the latest of them without a step between.
        history: objects of ``history.jsonl``.
        over: training has ended.
        length: of the longest batch of the step under way, in tokens, or observations without text.
        skipped_lengths: the same of each skipped step of the epoch.
    """

    batches: int = 0
    loss: float = 0.0
    terms: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    history: list[dict[str, object]] = field(default_factory=list)
    over: bool = False
    length: int = 0
    skipped_lengths: list[int] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        """Mean loss over the terms of the epoch so far, NaN where there are none."""
        return self.loss / self.terms if self.terms else math.nan

    def see(self, batch: Mapping[str, Any]) -> None:
        """Note the length of a batch of the step under way: of its texts, or of its series."""
        parts = [batch[name].shape[1] for name in ("times", "input_ids") if name in batch]
        self.length = max([self.length, *parts])

    def end_step(self, loss: float, terms: float, *, taken: bool) -> None:
        """Count a step: its loss over so many terms, or that it was skipped."""
        if taken:
            self.loss, self.terms = self.loss + loss, self.terms + terms
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.skipped_lengths.append(self.length)
        self.length = 0

    def skipped_too_often(self, loss: float, norm: float, epoch: int) -> NonFiniteLossError:
        """Return the error after ``MOST_SKIPPED`` skipped steps in a row."""
        return NonFiniteLossError(
            f"the loss is {loss}, its gradient {norm} in epoch {epoch}, the {MOST_SKIPPED}th time "
            f"in a row, {self._skipped_batches()}; what earlier epochs reached is kept"
        )

    def warn_of_skipped(self, epoch: int, steps: int) -> None:
        """Log a warning where more than ``WARNED_SHARE`` of an epoch's steps were skipped."""
        if self.skipped > WARNED_SHARE * steps:
            share = 100 * self.skipped / steps
            logger.warning(
                "epoch %d: %d of %d steps (%.1f %%) were skipped since loss or gradient was not "
                "finite, %s",
                epoch,
                self.skipped,
                steps,
                share,
                self._skipped_batches(),
            )

    def _skipped_batches(self) -> str:
        lengths = ", ".join(map(str, sorted(set(self.skipped_lengths))))
        return f"in batches {lengths} tokens (without text: observations) long: {SKIPPED_ADVICE}"

    def write_history(self, folder: Path) -> None:
        """Write ``history.jsonl``, an object an epoch, by the first of several processes."""
        if processes().is_main_process:
            lines = [json.dumps(line) + "\n" for line in self.history]
            write_text(folder / "history.jsonl", "".join(lines))

    def next_epoch(self, *, over: bool) -> Progress:
        """Return the progress at the start of the next epoch."""
        history, in_a_row = self.history, self.skipped_in_a_row
        return Progress(history=history, skipped_in_a_row=in_a_row, over=over)


@dataclass
class TrainState:
    """All that training changes, and the model as the processes share it.

    Attributes:
        model: the stage's model, of several processes within DistributedDataParallel.
        parameters: those that learn, in the order of ``Stage.trainable_parameters``.
        optimizer: of these parameters.
        schedule: of the optimizer's learning rates.
        average: of these parameters.
        stopping: best epoch so far.
        progress: how far training has come.
        best: averaged weights of the best epoch, one tensor a parameter; empty before the first.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: AdamW
    schedule: LambdaLR
    average: WeightAverage
    stopping: EarlyStopping
    progress: Progress = field(default_factory=Progress)
    best: list[Tensor] = field(default_factory=list)

    def set_best(self) -> None:
        """Remember the averaged weights as those of the best epoch."""
        self.best = copies(self.average.weights)


def set_up_training(stage: Stage, device: torch.device) -> TrainState:
    """Move the stage's model to a device and return the state before the first step.

    Of several processes each draws random numbers (dropout) of its own from here on.
    """
    model = stage.model.to(device)
    shared: nn.Module = model
    if processes().num_processes > 1:
        from accelerate import Accelerator

        # The precision is the model's own, whatever accelerate's configuration says.
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        shared = accelerator.prepare_model(model)
        seeds = np.random.SeedSequence([torch.initial_seed(), processes().process_index])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    parameters = list(stage.trainable_parameters().values())
    optimizer = make_optimizer(stage)
    return TrainState(
        model=shared,
        parameters=parameters,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, stage.total_steps),
        average=WeightAverage(parameters),
        stopping=EarlyStopping(stage.patience, stage.higher_is_better),
    )


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors of the same shapes."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextlib.contextmanager
def swapped_weights(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other values in place of the parameters for the length of a block."""
    before = copies(parameters)
    try:
        copy_into(parameters, values)
        yield
    finally:
        copy_into(parameters, before)
