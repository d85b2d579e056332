"""Stage 1: encoder states, summaries and static features to one logit, without a language model.

Letters: B patients, L observations, H state of the encoder, S summaries, K static features,
C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medgemma_clinical.data.small_cells import MIN_CELL, patients_behind
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import Batch, TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.outcome import LABELS, Outcome
from medgemma_clinical.models.scaler import Scaler

SUMMARY_WIDTH, STATIC_WIDTH = 128, 32
"""Widths of the networks of summaries and of static features."""

SUMMARY_DROPOUT = 0.3, 0.5
"""Dropout of the inputs and of the hidden layer of the network of summaries."""


class Output(NamedTuple):
    """Loss and predictions of a stage's model for one batch."""

    # A sum over ``terms``, so that no mean depends on how rows fall into batches.
    loss: Tensor  # (N,) float32, of each member; N = 1 for a language model
    terms: int  # patients, or answer tokens, weights included
    logit: Tensor  # (B,) float32, log-odds of the first risk; of stage 1 in training none
    outputs: Tensor  # (B, Q) the log-odds of a label, or hazards
    offset: Tensor | None = None  # (B, Q) the share of the outputs that is not a language model's


class TrajectoryHead(nn.Module):
    """Two heads, whose logits are averaged: one reads states, one summaries, both statics."""

    def __init__(
        self, hidden_dim: int, *, summaries: int, static: int, dropout: float = 0.0, width: int = 1
    ) -> None:
        """Build the heads for H states, S summaries, K static features (may be 0), Q logits."""
        super().__init__()
        self.attention = nn.Linear(hidden_dim, 1, bias=False)
        self.output = nn.Linear(2 * hidden_dim, width)
        self.dropout = nn.Dropout(dropout)
        self.static_scaler, self.summary_scaler = Scaler(static), Scaler(summaries)
        self.static = network(2 * static, STATIC_WIDTH, outputs=width) if static else None
        rates = SUMMARY_DROPOUT if dropout else (0.0, 0.0)
        inputs = 2 * (summaries + static)
        self.summaries = network(inputs, SUMMARY_WIDTH, *rates, outputs=width)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the logits (B, 2, Q) float32 of both heads for states (B, L + 1, H).

        The last state is that at the prediction time. In training the logits at an earlier
        observation follow, where the batch names one: (2B, 2, Q).
        """
        is_observed = batch["observed"].any(dim=2)  # (B, L)
        observed, last, summaries = states[:, :-1], states[:, -1], batch["summaries"]
        static = masked(self.static_scaler, batch["static"])
        if self.training and "prefix_lengths" in batch:
            length, row = batch["prefix_lengths"], torch.arange(len(states), device=states.device)
            prefix = torch.arange(observed.shape[1], device=states.device) < length[:, None]
            is_observed, observed = torch.cat([is_observed, prefix]), observed.repeat(2, 1, 1)
            last = torch.cat([last, states[row, length - 1]])
            summaries = torch.cat([summaries, batch["prefix_summaries"]])
            static = static.repeat(2, 1)
        scores = self.attention(observed).squeeze(2).masked_fill(~is_observed, -math.inf)  # (B, L)
        pooled = torch.einsum("bl,blh->bh", scores.softmax(dim=1), observed)
        state_logit = self.output(self.dropout(torch.cat([pooled, last], dim=1)))  # (B, Q)
        if self.static is not None:
            state_logit = state_logit + self.static(static)
        table = torch.cat([masked(self.summary_scaler, summaries), static], dim=1)
        return torch.stack([state_logit, self.summaries(table)], dim=1)

    def biases(self) -> list[Tensor]:
        """Return what is added to the logits of each head, (Q,) each."""
        last: Any = self.summaries[-1]
        return [self.output.bias, last.bias]


def network(
    inputs: int,
    width: int,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    *,
    outputs: int = 1,
) -> nn.Sequential:
    """Return a network of one hidden layer of some ``width``."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(hidden_dropout),
        nn.Linear(width, outputs),
    )


def masked(scaler: Scaler, table: Tensor) -> Tensor:
    """Return (B, 2C) for (B, C): normal scores, zero where unknown, and 1 where known."""
    z = scaler(table)
    return torch.cat([z, (~table.isnan()).to(z)], dim=1)


def training_loss(outcome: Outcome, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss (N,) of both readings' (N, B, 2, Q): of their mean, and of each alone."""
    # With many series the states would fit the training part before the summaries learn.
    # A reading that leans on the other fits what the other has left of the training part.
    readings = torch.cat([logits.mean(dim=2), *logits.unbind(dim=2)])  # (3N, B, Q)
    both, first, second = outcome.loss(readings, targets).chunk(3)
    return both / 2 + (first + second) / 4


class TrajectoryMember(nn.Module):
    """An encoder (``ClinicalODERNN``, or a module with its ``plan`` and ``run``) and its head."""

    def __init__(self, encoder: Any, head: TrajectoryHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the states (B, L + 1, H) and both heads' logits (B, 2, Q) of each patient."""
        states: Tensor = self.encoder.run(batch["plan"])
        return states, self.head(states, batch)


class Stage1(nn.Module):
    """One or more members of different seeds, whose logits are averaged.

    Source: Lakshminarayanan 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles".
    """

    def __init__(
        self, members: Iterable[tuple[Any, TrajectoryHead]], outcome: Outcome = LABELS
    ) -> None:
        """Join encoder and head of each member; all read the same series, so one plan serves."""
        super().__init__()
        self.outcome = outcome
        self.members = nn.ModuleList(TrajectoryMember(*member) for member in members)
        self.learn = [True] * len(self.members)  # False: left out in training

    @property
    def encoder(self) -> Any:
        """The first member's encoder, whose states become soft tokens."""
        return self.members[0].encoder

    def plan(self, batch: Batch) -> Batch:
        """Return a batch with the encoders' plan of its series, made on the host."""
        until = batch["prediction_hours"]
        plan = self.encoder.plan(batch["times"], batch["values"], batch["observed"], until)
        return {**batch, "plan": plan}

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the first member's states (B, L + 1, H) and the members' logits (N, B, 2, Q)."""
        batch = batch if "plan" in batch else self.plan(batch)
        pairs = zip(self.members, self.learn, strict=True)
        outputs = [member(batch) for member, learns in pairs if learns or not self.training]
        return outputs[0][0], torch.stack([logits for _, logits in outputs])

    def forward(self, batch: Batch) -> Output:
        """Return each member's loss (sum over B) and, but in training, the mean logit."""
        logits, targets = self.read(batch)[1], batch["outcomes"]
        size = len(targets)
        if self.training:
            has_earlier = logits.shape[1] > size
            # The risk at an earlier observation counts as much as that at the prediction time.
            both = torch.cat([targets, batch["prefix_outcomes"]]) if has_earlier else targets
            loss = training_loss(self.outcome, logits, both) / (1 + has_earlier)
            return Output(loss, size, logits.new_empty(0), logits.new_empty(0))
        loss = self.outcome.loss(logits.mean(dim=2), targets)
        outputs = logits.mean(dim=(0, 2))  # (B, Q)
        return Output(loss, size, self.outcome.logit(outputs), outputs)

    def fit_scales(self, data: Data) -> None:
        """Fit scales, and the risk that training starts from, to the training part."""
        dataset, train = data.dataset, data.split["train"]
        start = torch.from_numpy(self.outcome.start(dataset.targets()[train]))
        values = torch.from_numpy(dataset.values[dataset.rows_of(train)]).float()
        summaries = torch.from_numpy(dataset.summaries()[train])
        groups = pd.factorize(dataset.groups[train])[0]
        for column in summaries.T:
            if patients_behind(column.numpy(), groups) < MIN_CELL:
                column.fill_(math.nan)  # a summary of few patients is not read
        static, patients = torch.from_numpy(dataset.static_values(train)), torch.from_numpy(groups)
        of_values = patients.repeat_interleave(torch.from_numpy(dataset.lengths[train]))
        member: Any
        for member in self.members:
            try:
                member.encoder.fit_normalizer(values, ~values.isnan(), of_values)
            except ValueError as error:
                names = ", ".join(dataset.features)
                raise InputError(f"{error} (features: {names})") from error
            member.head.summary_scaler.fit(summaries, patients)
            member.head.static_scaler.fit(static, patients)
            for bias in member.head.biases():
                bias.data.copy_(start)

    def alone(self) -> list[Stage1]:
        """Return each member as a model of its own, of the same weights."""
        members: Any = self.members
        return [Stage1([(member.encoder, member.head)], self.outcome) for member in members]

    @torch.no_grad()
    def shift(self, logits: Tensor) -> None:
        """Add numbers (Q,) to the logits of each member."""
        member: Any
        for member in self.members:
            for bias in member.head.biases():
                bias += logits.to(bias)

    def check_gaps(self, dataset: TrajectoryDataset) -> None:
        """Raise an ``InputError`` where the encoder does not accept a data set's longest gap."""
        longest = dataset.longest_gaps().max()
        if longest > self.encoder.longest_gap_hours:
            raise InputError(f"a gap of {longest:g} h in the data needs a larger --time_scale")


class TrajectoryCollator:
    """Make planned batches of stage 1; after ``draw`` each row also has an earlier observation."""

    def __init__(self, model: Stage1, dataset: TrajectoryDataset) -> None:
        """Store both; no earlier observation is drawn yet."""
        self.model, self.dataset = model, dataset
        self.lengths = self.summaries = self.targets = torch.empty(0)

    def begin_epoch(self, seed: int, epoch: int, learn: list[bool]) -> None:
        """Draw for an epoch of training, in which some of the members learn."""
        self.draw(seed, epoch)
        self.model.learn = learn

    def draw(self, seed: int, epoch: int) -> None:
        """Draw an observation of each row for an epoch."""
        # By seed, epoch and row alone, not by the batches.
        share = np.random.default_rng([seed, epoch]).random(len(self.dataset))
        lengths = 1 + (share * self.dataset.lengths).astype(np.int64)
        self.lengths = torch.from_numpy(lengths)
        earlier = self.dataset.up_to(lengths)
        self.summaries = torch.from_numpy(earlier.summaries()).float()
        self.targets = torch.tensor(earlier.targets(), dtype=torch.float32)  # may be read-only

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of B positions."""
        batch = self.model.plan(self.dataset.collate(rows))
        if not len(self.lengths):
            return batch
        batch["prefix_lengths"] = self.lengths[batch["index"]]
        batch["prefix_summaries"] = self.summaries[batch["index"]]
        batch["prefix_outcomes"] = self.targets[batch["index"]]
        return batch
