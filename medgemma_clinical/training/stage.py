"""A stage of training as data: what learns, from what, how long, and where the best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.training.loaders import LengthBatches, cut_rows

WEIGHT_DECAY = 0.01


@dataclass
class Stage:
    """One stage; the training loop is the same for all."""

    name: str  # of the stage and of its folder
    model: nn.Module  # from a batch to an ``Output``: loss summed over terms, terms, logit
    learning_rates: dict[str, float]  # by part, a direct child of ``model``; frozen ones too
    batches: dict[str, LengthBatches]  # of "train" the rows of a step, of others those of a pass
    collate: Callable[[Sequence[int]], Any]  # from rows to a batch
    batch_size: int  # maximum rows of one forward and backward pass
    lengths: NDArray[np.int64]  # (N,) tokens of each row, without text observations
    epochs: int  # at most
    patience: int  # epochs without a lower validation loss after which training stops
    config: Config  # of the checkpoint; the decision rule joins it with the results
    save: Callable[[Path, Config], None]  # writes the weights and a config as the best
    final_epochs: list[int] | None = None  # that are averaged, where there is no validation part

    # What happens before an epoch: gets the seed, its number, and which members of stage 1 learn.
    begin_epoch: Callable[[int, int, list[bool]], None] = lambda seed, epoch, learn: None
    finish: Callable[[], None] = lambda: None  # what happens to the best weights at the end
    auroc: Callable[[Predictions], float] = lambda predictions: math.nan  # of the first risk

    # Stage 1 alone.
    train_patients: NDArray[np.int64] | None = None  # hashes

    # Stages 2 and 3 alone.
    text: TextCollator | None = None  # the tokenised rows
    # Columns (N,) of a table of predictions, by the frozen stage 1 below the language model.
    stage1_risks: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    # How a step fits the memory; see ``memory``.
    max_tokens: int | None = None  # rows times tokens of the longest in one pass, if limited
    recomputes: bool = False  # gradient checkpointing is on

    @property
    def tokens(self) -> float:
        """Tokens that a language model reads of a training patient, mean; 0 without one."""
        return 0.0 if self.text is None else float(self.lengths[self.batches["train"].rows].mean())

    def passes(self, rows: Sequence[int]) -> list[list[int]]:
        """Cut the rows of a step into those of each forward and backward pass."""
        return cut_rows(rows, self.batch_size, self.lengths, self.max_tokens)

    @property
    def learning_parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn of each part that is not frozen, by its name."""
        parts = {name: getattr(self.model, name).parameters() for name in self.learning_rates}
        learn = {name: [p for p in part if p.requires_grad] for name, part in parts.items()}
        return {name: parameters for name, parameters in learn.items() if parameters}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups of one part and one weight decay.

        Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, for the decay.
        """
        groups = []
        for part, parameters in self.learning_parts.items():
            rate = self.learning_rates[part]
            # A decayed bias or norm scale shifts the model, it does not simplify it.
            matrices = [p for p in parameters if p.ndim >= 2]
            vectors = [p for p in parameters if p.ndim < 2]
            for tensors, decay in ((matrices, WEIGHT_DECAY), (vectors, 0.0)):
                if tensors:
                    groups.append({"params": tensors, "lr": rate, "weight_decay": decay})
        return groups

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn by their name in ``model``, in the groups' order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[p]: p for group in self.parameter_groups() for p in group["params"]}

    def members(self) -> list[int]:
        """Return the member of stage 1 that each trainable parameter belongs to, 0 elsewhere."""
        names = [name.split(".") for name in self.trainable_parameters()]
        return [int(name[1]) if name[0] == "members" else 0 for name in names]
