"""A stage that learns in milliseconds, with dropout, a bias, a norm and a frozen part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from medgemma_clinical.models.trajectory import Output
from medgemma_clinical.training.checkpoint_store import TrainingCheckpoint
from medgemma_clinical.training.loaders import batches_of, make_loaders
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import TrainState

ROWS = {"train": 37, "val": 11, "test": 10}


class ToyModel(nn.Module):
    """Two parts that learn at rates of their own, and one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.3))
        self.head = nn.Linear(4, 1)

    def forward(self, batch: dict[str, Tensor]) -> Output:
        logit = self.head(self.encoder(self.base(batch["inputs"]))).squeeze(1)
        loss = binary_cross_entropy_with_logits(logit, batch["labels"], reduction="sum")
        return Output(loss, len(logit), logit)


def toy_stage(seed: int = 0, *, epochs: int = 3, accumulate: int = 1) -> Stage:
    """Return a stage over 58 rows whose label is the sign of the first of three inputs."""
    torch.manual_seed(seed)
    inputs = torch.randn(sum(ROWS.values()), 3)
    labels = (inputs[:, 0] > 0).float()

    def collate(rows: Sequence[int]) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {"inputs": inputs[index], "labels": labels[index], "index": index}

    ends = np.cumsum([0, *ROWS.values()])
    split = {part: np.arange(*ends[k : k + 2]) for k, part in enumerate(ROWS)}
    model = ToyModel()

    def save(folder: Path, config: dict[str, Any]) -> None:
        torch.save(model.state_dict(), folder / "best.pt")

    return Stage(
        name="toy",
        model=model,
        learning_rates={"encoder": 0.01, "head": 0.1},
        loaders=make_loaders(split, 8, collate),
        epochs=epochs,
        patience=epochs,
        monitor="val_loss",
        higher_is_better=False,
        config={},
        save=save,
        accumulate=accumulate,
    )


def take_steps(stage: Stage, state: TrainState, number: int) -> None:
    """Learn from so many batches, epoch after epoch, from where the state is."""
    stage.model.train()
    while number:
        epoch, done = state.stopping.epoch, state.progress.batches
        batches_of(stage.loaders["train"]).set_epoch(0, epoch + 1, done)
        for batch in stage.loaders["train"]:
            if not number:
                return
            output: Any = state.model(batch)
            stage.model.zero_grad()
            output.loss.backward()
            state.optimizer.step()
            state.schedule.step()
            state.average.update()
            state.progress.batches += 1
            number -= 1
        state.stopping.improved(output.loss.item())
        state.set_best()
        state.progress = state.progress.next_epoch(over=False)


def small_checkpoint(step: int) -> TrainingCheckpoint:
    """Return a checkpoint of a model that does not exist."""
    return TrainingCheckpoint(
        weights={"head.weight": torch.full((2, 3), float(step))},
        average={"head.weight": torch.full((2, 3), step / 3)},
        average_steps=step,
        best={},
        optimizer={
            "state": {0: {"step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 0.1}],
        },
        schedule={"last_epoch": step},
        random=[{"cpu": torch.get_rng_state()}],
        progress={"batches": step, "history": [{"epoch": 1, "val_loss": None}]},
        stopping={"best": float("nan")},
    )
