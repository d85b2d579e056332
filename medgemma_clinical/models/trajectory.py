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
from torch.nn import functional

from medgemma_clinical.data.features import MIN_PATIENTS, patients_behind
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import Batch, TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.scaler import Scaler

SUMMARY_WIDTH, STATIC_WIDTH = 128, 32
"""Widths of the networks of summaries and of static features."""

SUMMARY_DROPOUT = 0.3, 0.5
"""Dropout of the inputs and of the hidden layer of the network of summaries."""


class Output(NamedTuple):
    """Loss and predictions of a stage's model for one batch.

    loss: (N,) float32, of each member of stage 1, or of a language model alone; a sum over
    ``terms`` (patients, or answer tokens), so that no mean depends on how rows fall into batches;
    terms: their number, weights included; logit (B,): log-odds of
    the event, float32; offset (B,): the share of it that is stage 1's, None where there is none.
    """

    loss: Tensor
    terms: int
    logit: Tensor
    offset: Tensor | None = None


def log_odds(prevalence: float) -> float:
    """Return the log-odds of a share of events within (0, 1)."""
    return math.log(prevalence / (1 - prevalence))


class TrajectoryHead(nn.Module):
    """Two readings of a patient, whose logits are averaged.

    One reads the states, as their attention-weighted mean beside the state at the prediction time,
    the other the summaries by a small network; both read the static features. Each learns from its
    own loss: with many series the states alone would fit the training part before the summaries
    have learned, with few they say more.
    """

    def __init__(
        self, hidden_dim: int, *, summaries: int, static: int, dropout: float = 0.0
    ) -> None:
        """Make the readings of H states, S summaries and K static features, which may be 0."""
        super().__init__()
        self.attention = nn.Linear(hidden_dim, 1, bias=False)
        self.output = nn.Linear(2 * hidden_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.static_scaler, self.summary_scaler = Scaler(static), Scaler(summaries)
        self.static = network(2 * static, STATIC_WIDTH) if static else None
        rates = SUMMARY_DROPOUT if dropout else (0.0, 0.0)
        self.summaries = network(2 * (summaries + static), SUMMARY_WIDTH, *rates)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the logits (B, 2) float32 of both readings at the prediction time.

        Args:
            states: (B, L + 1, H), after each observation and, last, at the prediction time.
            batch: of the same patients.
        """
        present = batch["observed"].any(dim=2)  # (B, L)
        return self.read(states[:, :-1], states[:, -1], present, batch["summaries"], batch)

    def forward_prefix(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the logits (B, 2) at an earlier observation of each patient, as known then.

        Arguments as in ``forward``; the batch says how many observations are read.
        """
        length = batch["prefix_lengths"]  # (B,) at least 1
        present = torch.arange(states.shape[1] - 1, device=length.device) < length[:, None]
        last = states[torch.arange(len(length), device=length.device), length - 1]  # (B, H)
        return self.read(states[:, :-1], last, present, batch["prefix_summaries"], batch)

    def read(
        self, states: Tensor, last: Tensor, present: Tensor, summaries: Tensor, batch: Batch
    ) -> Tensor:
        """Return logits (B, 2) of states (B, L, H) where present (B, L), last (B, H), summaries."""
        scores = self.attention(states).squeeze(2).masked_fill(~present, -math.inf)  # (B, L)
        pooled = torch.einsum("bl,blh->bh", scores.softmax(dim=1), states)
        of_states = self.output(self.dropout(torch.cat([pooled, last], dim=1)))  # (B, 1)
        static = masked(self.static_scaler, batch["static"])
        if self.static is not None:
            of_states = of_states + self.static(static)
        table = torch.cat([masked(self.summary_scaler, summaries), static], dim=1)
        return torch.cat([of_states, self.summaries(table)], dim=1)


def network(
    inputs: int, width: int, dropout: float = 0.0, hidden_dropout: float = 0.0
) -> nn.Sequential:
    """Return a network of one hidden layer from ``inputs`` columns to a number."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(hidden_dropout),
        nn.Linear(width, 1),
    )


def masked(scaler: Scaler, table: Tensor) -> Tensor:
    """Return (B, 2C) for (B, C): normal scores, zero where unknown, and 1 where known."""
    z = scaler(table)
    return torch.cat([z, (~table.isnan()).to(z)], dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each member, (N,), a sum over B of logits (N, B)."""
    targets = labels.expand_as(logits)
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return each.sum(dim=1)


def training_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss (N,) of both readings' logits (N, B, 2): of their mean, and of each alone.

    A reading that leans on the other fits what the other has left of the training part.
    """
    both, first, second = (
        cross_entropy(each, labels) for each in (logits.mean(dim=2), *logits.unbind(dim=2))
    )
    return both / 2 + (first + second) / 4


class TrajectoryMember(nn.Module):
    """An encoder (``ClinicalODERNN``, or a module with its ``plan`` and ``run``) and its head."""

    def __init__(self, encoder: Any, head: TrajectoryHead) -> None:
        """Join both."""
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the states (B, L + 1, H) and both readings' logits (B, 2) of each patient."""
        states: Tensor = self.encoder.run(batch["plan"])
        return states, self.head(states, batch)


class Stage1(nn.Module):
    """Stage 1: one or more members of different seeds, whose logits are averaged.

    Source: Lakshminarayanan 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles".
    """

    def __init__(self, members: Iterable[tuple[Any, TrajectoryHead]]) -> None:
        """Join encoder and head of each member; all read the same series, so one plan serves."""
        super().__init__()
        self.members = nn.ModuleList(TrajectoryMember(*member) for member in members)

    @property
    def encoder(self) -> Any:
        """The first member's encoder, whose states become soft tokens."""
        return self.members[0].encoder

    def plan(self, batch: Batch) -> Batch:
        """Return a batch with the encoders' plan of its series, made on the host."""
        until = batch["prediction_hours"]
        plan = self.encoder.plan(batch["times"], batch["values"], batch["observed"], until)
        return {**batch, "plan": plan}

    def read(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return the states (B, L + 1, H) of each member, and all readings' logits (N, B, 2)."""
        batch = batch if "plan" in batch else self.plan(batch)
        states, logits = zip(*(member(batch) for member in self.members), strict=True)
        return list(states), torch.stack(logits)

    def forward(self, batch: Batch) -> Output:
        """Return each member's binary cross-entropy (sum over B) and the mean logit.

        In training each reading has a loss of its own too, and the risk at an earlier observation
        counts as much as that at the prediction time, where the batch names one.
        """
        states, logits = self.read(batch)  # of N members; (N, B, 2)
        labels = batch["labels"]
        if not self.training:
            loss = cross_entropy(logits.mean(dim=2), labels)
        else:
            loss = training_loss(logits, labels)
        if self.training and "prefix_lengths" in batch:
            members: Any = zip(self.members, states, strict=True)
            early = [each.head.forward_prefix(own, batch) for each, own in members]
            loss = (loss + training_loss(torch.stack(early), labels)) / 2
        return Output(loss, len(labels), logits.mean(dim=(0, 2)))

    def fit_scales(self, data: Data) -> None:
        """Fit scales and prevalence to the training part.

        Summaries of few patients are not read.
        """
        dataset, train = data.dataset, data.split["train"]
        values = torch.from_numpy(dataset.values[dataset.rows_of(train)]).float()
        summaries = torch.from_numpy(dataset.summaries()[train])
        groups = pd.factorize(dataset.groups[train])[0]
        for column in summaries.T:
            if patients_behind(column.numpy(), groups) < MIN_PATIENTS:
                column.fill_(math.nan)
        static = torch.from_numpy(dataset.static_values(train))
        member: Any
        for member in self.members:
            try:
                member.encoder.fit_normalizer(values, ~values.isnan())
            except ValueError as error:
                names = ", ".join(dataset.features)
                raise InputError(f"{error} (features: {names})") from error
            member.head.summary_scaler.fit(summaries)
            member.head.static_scaler.fit(static)
            for reading in (member.head.output, member.head.summaries[-1]):
                nn.init.constant_(reading.bias, log_odds(data.prevalence()))

    def check_gaps(self, dataset: TrajectoryDataset) -> None:
        """Raise an ``InputError`` where the encoder does not accept a data set's longest gap."""
        longest = dataset.longest_gaps().max()
        if longest > self.encoder.longest_gap_hours:
            raise InputError(f"a gap of {longest:g} h in the data needs a larger --time_scale")


class TrajectoryCollator:
    """Make batches of stage 1, planned ahead.

    After ``draw`` they also say up to which earlier observation each row is read a second time, so
    that risks early in a series are learned too, and what its summaries are then. The draw depends
    on seed, epoch and row alone, not on the batches.
    """

    def __init__(self, model: Stage1, dataset: TrajectoryDataset) -> None:
        """Keep both; no earlier observation is drawn yet."""
        self.model, self.dataset = model, dataset
        self.lengths = self.summaries = torch.empty(0)

    def draw(self, seed: int, epoch: int) -> None:
        """Draw an observation of each row for an epoch."""
        share = np.random.default_rng([seed, epoch]).random(len(self.dataset))
        lengths = 1 + (share * self.dataset.lengths).astype(np.int64)
        self.lengths = torch.from_numpy(lengths)
        self.summaries = torch.from_numpy(self.dataset.up_to(lengths).summaries()).float()

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of B positions."""
        batch = self.model.plan(self.dataset.collate(rows))
        if not len(self.lengths):
            return batch
        batch["prefix_lengths"] = self.lengths[batch["index"]]
        batch["prefix_summaries"] = self.summaries[batch["index"]]
        return batch
