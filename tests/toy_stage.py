"""A stage that learns in milliseconds, with dropout, a bias, a norm and a frozen part."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from medgemma_clinical.models.trajectory import Output
from medgemma_clinical.training.loaders import part_batches
from medgemma_clinical.training.stage import Stage

SPLIT = {"train": np.arange(37), "val": np.arange(37, 48), "test": np.arange(48, 58)}
LENGTHS = np.random.default_rng(1).integers(1, 9, 58)


class ToyModel(nn.Module):
    """Learns in passes of at most ``room`` tokens; its first ``faults`` ones have no number.

    Without gradients there is room for ``scoring_room`` tokens.
    """

    room, scoring_room, fault, faults = 1000, 1000, "", 0

    def __init__(self, dropout):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(dropout))
        self.head = nn.Linear(4, 1)
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4).requires_grad_(False)

    def forward(self, batch):
        if batch["tokens"] > (self.room if self.training else self.scoring_room):
            raise torch.OutOfMemoryError("CUDA out of memory")
        logit = self.head(self.encoder(self.base(batch["inputs"]))).squeeze(1)
        loss = binary_cross_entropy_with_logits(logit, batch["labels"], reduction="sum")
        if self.training and self.faults:
            self.faults -= 1
            slope = (self.head.bias.sum() * 0).sqrt()  # a number, whose gradient is none
            loss = loss * torch.nan if self.fault == "loss" else loss + slope
        return Output(loss[None], len(logit), logit, logit[:, None])


def toy_stage(seed=0, *, epochs=3, size=8, accumulate=1, dropout=0.3, lengths=None):
    """Return a stage over 58 rows whose label is the sign of the first of three inputs."""
    torch.manual_seed(seed)
    model = ToyModel(dropout)
    inputs = torch.randn(58, 3, generator=torch.Generator().manual_seed(1))

    def collate(rows):
        index, tokens = torch.tensor(rows), len(rows) * int(LENGTHS[rows].max())
        labels = (inputs[index, 0] > 0).float()
        return {"inputs": inputs[index], "labels": labels, "index": index, "tokens": tokens}

    def save(folder, config):
        torch.save(model.state_dict(), folder / "best.pt")

    rates, batches = {"encoder": 0.01, "head": 0.1}, part_batches(SPLIT, size, accumulate, lengths)
    how_long = {"epochs": epochs, "patience": epochs}
    options = {"batch_size": size, "lengths": LENGTHS, "config": {}, "save": save, **how_long}
    return Stage("toy", model, rates, batches, collate, **options)
