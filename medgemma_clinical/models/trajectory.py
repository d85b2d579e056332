"""Stage 1: encoder states, summaries and static features to one logit, without a language model.

Letters: B patients, L observations, H state of the encoder, S summaries, K static features,
C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgemma_clinical.data.features import MIN_PATIENTS, patients_behind
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import Batch, TrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.models.scaler import Scaler

STATIC_WIDTH = 32
"""Width of the network of the static features."""


class Output(NamedTuple):
    """Loss and predictions of a stage's model for one batch.

    loss: scalar float32, a sum over ``terms`` (patients, or answer tokens), so that no mean depends
    on how rows fall into batches; terms: their number, weights included; logit (B,): log-odds of
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
    """Add the terms of states, summaries and static features to one logit a patient.

    The states are read as their attention-weighted mean beside the state at the prediction time,
    the summaries by a linear term that starts at zero, the static features by a small
    network.
    """

    def __init__(self, hidden_dim: int, *, summaries: int, static: int) -> None:
        """Make the terms of H states, S summaries and K static features, which may be 0."""
        super().__init__()
        self.attention = nn.Linear(hidden_dim, 1, bias=False)
        self.output = nn.Linear(2 * hidden_dim, 1)
        self.summary_scaler = Scaler(summaries)
        self.wide = nn.Linear(2 * summaries, 1, bias=False)
        nn.init.zeros_(self.wide.weight)
        self.static_scaler = Scaler(static)
        self.static: nn.Module | None = None
        if static:
            inner, outer = (
                nn.Linear(2 * static, STATIC_WIDTH),
                nn.Linear(STATIC_WIDTH, 1, bias=False),
            )
            self.static = nn.Sequential(inner, nn.ReLU(), outer)

    def forward(self, states: Tensor, batch: Batch) -> Tensor:
        """Return logits (B,) float32.

        Args:
            states: (B, L + 1, H), after each observation and, last, at the prediction time.
            batch: of the same patients.
        """
        present = batch["observed"].any(dim=2)  # (B, L)
        observed, last = states[:, :-1], states[:, -1]
        scores = self.attention(observed).squeeze(2).masked_fill(~present, -math.inf)  # (B, L)
        pooled = torch.einsum("bl,blh->bh", scores.softmax(dim=1), observed)
        logit = self.output(torch.cat([pooled, last], dim=1))  # (B, 1)
        logit = logit + self.wide(masked(self.summary_scaler, batch["summaries"]))
        if self.static is not None:
            logit = logit + self.static(masked(self.static_scaler, batch["static"]))
        result: Tensor = logit.squeeze(1)
        return result


def masked(scaler: Scaler, table: Tensor) -> Tensor:
    """Return (B, 2C) for (B, C): z-scores, zero where unknown, and 1 where known."""
    z = scaler(table)
    return torch.cat([z, (~table.isnan()).to(z)], dim=1)


class TrajectoryMember(nn.Module):
    """An encoder (``ClinicalODERNN``, or a module with its ``plan`` and ``run``) and its head."""

    def __init__(self, encoder: Any, head: TrajectoryHead) -> None:
        """Join both."""
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the states (B, L + 1, H) and the logit (B,) of each patient."""
        states: Tensor = self.encoder.run(batch["plan"])
        return states, self.head(states, batch)


class Stage1(nn.Module):
    """Stage 1: one or more members of different seeds, whose logits are averaged.

    Source: Lakshminarayanan 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles".
    """

    def __init__(self, members: Iterable[TrajectoryMember]) -> None:
        """Join the members; they read the same series, so one plan serves all."""
        super().__init__()
        self.members = nn.ModuleList(members)

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
        """Return the first member's states (B, L + 1, H) and all members' logits (N, B)."""
        batch = batch if "plan" in batch else self.plan(batch)
        outputs = [member(batch) for member in self.members]
        return outputs[0][0], torch.stack([logit for _, logit in outputs])

    def forward(self, batch: Batch) -> Output:
        """Return the members' mean binary cross-entropy (sum over B) and mean logit.

        Each member learns from its own loss; the loss of the averaged prediction is lower.
        """
        logits = self.read(batch)[1]  # (N, B)
        labels = batch["labels"].expand_as(logits)
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return Output(loss / len(logits), len(labels[0]), logits.mean(dim=0))

    def collate(self, dataset: TrajectoryDataset) -> Callable[[Sequence[int]], Batch]:
        """Return the function that makes a batch, planned ahead, of positions in a data set."""
        return lambda rows: self.plan(dataset.collate(rows))

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
            nn.init.constant_(member.head.output.bias, log_odds(data.prevalence()))

    def check_gaps(self, dataset: TrajectoryDataset) -> None:
        """Raise an ``InputError`` where the encoder does not accept a data set's longest gap."""
        longest = dataset.longest_gaps().max()
        if longest > self.encoder.longest_gap_hours:
            raise InputError(f"a gap of {longest:g} h in the data needs a larger --time_scale")
