"""A stage of training as data: what learns, from what, how long, and where the best is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from medgemma_clinical.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_DECAY = 0.01


@dataclass
class Stage:
    """One stage; the training loop never asks which one.

    Attributes:
        name: of the stage and of its folder.
        model: maps a batch to an ``Output`` (loss summed over terms, number of terms, logit).
        learning_rates: of each trainable part, a direct child of ``model``, by its name.
        loaders: batches of "train", "val" and "test".
        epochs: most passes over the training part.
        patience: epochs without a better score after which training stops.
        monitor: key of the epoch's figures that selects the best epoch.
        higher_is_better: direction of ``monitor``.
        config: of the checkpoint, plain types; the decision rule joins it with the results.
        save: writes the model's weights and a config as the best, for the folder of the stage.
        hides_events: few patients of some part have the event: losses and AUROC, which tell their
            number, are not written.
        accumulate: batches whose gradients make one optimizer step.
        describe: returns lines for the log on what the model reads.
        generate: lets the best model write reports on the rows of predictions; returns them by
            position in each process. None where the stage writes none.
        stage1: (N,) probability of each row by the stage 1 that the stage builds on, None without.
        tokenizer: of the language model, None without.
        train_patients: hashes of the patients that train, of stage 1; None for the others.
        tokens: that a language model reads of a patient, mean over the training part.
        save_memory: lets a step take less memory and more time; None where nothing is left to do.
    """

    name: str
    model: nn.Module
    learning_rates: dict[str, float]
    loaders: dict[str, DataLoader[Any]]
    epochs: int
    patience: int
    monitor: str
    higher_is_better: bool
    config: dict[str, Any]
    save: Callable[[Path, dict[str, Any]], None]
    hides_events: bool = False
    accumulate: int = 1
    describe: Callable[[], list[str]] = list
    generate: Callable[[Predictions], dict[int, str]] | None = None
    stage1: NDArray[np.float64] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train_patients: NDArray[np.int64] | None = None
    tokens: float = 0.0
    save_memory: Callable[[], None] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of one epoch; the last one may take fewer batches."""
        return -(-len(self.loaders["train"]) // self.accumulate)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps if training is not stopped early."""
        return self.epochs * self.steps_per_epoch

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups of one part and one weight decay.

        Only matrices decay: a decayed bias or norm scale shifts the model, it does not simplify it.

        Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, for the decay.
        """
        groups = []
        for part, rate in self.learning_rates.items():
            parameters = [p for p in getattr(self.model, part).parameters() if p.requires_grad]
            matrices = [p for p in parameters if p.ndim >= 2]
            others = [p for p in parameters if p.ndim < 2]
            for chosen, decay in ((matrices, WEIGHT_DECAY), (others, 0.0)):
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn by their name in ``model``, in the groups' order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[p]: p for group in self.parameter_groups() for p in group["params"]}
