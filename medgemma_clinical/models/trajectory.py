"""Stage 1: encoder states, summaries and facts to one logit, without a language model.

Letters: B patients, L observations, H state of the encoder, S summaries, K facts, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgemma_clinical.data.facts import few_patients
from medgemma_clinical.data.ragged import Batch
from medgemma_clinical.files import InputError
from medgemma_clinical.models.encoder import Encoder, PlannedEncoder, encode, series_of

if TYPE_CHECKING:
    from medgemma_clinical.data.training_data import Data

FACT_WIDTH = 32
"""Width of the network of the facts."""

MAX_Z_SCORE = 8.0
"""Standardised columns are clipped here: one mistyped value must not decide a risk."""


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


def classification_output(logit: Tensor, labels: Tensor) -> Output:
    """Return the unweighted binary cross-entropy of logits (B,) and labels (B,) of 0 and 1."""
    loss = functional.binary_cross_entropy_with_logits(logit, labels, reduction="sum")
    return Output(loss, len(labels), logit)


def log_odds(prevalence: float) -> float:
    """Return the log-odds of a share of events within (0, 1)."""
    return math.log(prevalence / (1 - prevalence))


class MaskedScaler(nn.Module):
    """Standardise columns with unknown entries, and mark the known ones."""

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int) -> None:
        """Leave ``columns`` C columns as they are until they are fitted."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        """Fit mean and standard deviation of each column of (n, C), NaN being unknown.

        A column without any known entry reads as zero ever after.
        """
        table = table.double()
        unknown = table.isnan().all(0)
        mean = table.nanmean(0).nan_to_num(nan=0.0)
        std = (table - mean).square().nanmean(0).sqrt()
        std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
        self.mean.copy_(mean)
        self.std.copy_(std.masked_fill(unknown, math.inf))

    def forward(self, table: Tensor) -> Tensor:
        """Return (B, 2C) for (B, C): z-scores, zero where unknown, and 1 where known."""
        z = ((table - self.mean) / self.std).clamp(-MAX_Z_SCORE, MAX_Z_SCORE)
        return torch.cat([z.nan_to_num(nan=0.0), (~table.isnan()).to(z)], dim=1)


class TrajectoryHead(nn.Module):
    """Add the terms of states, summaries and facts to one logit a patient.

    The states are read as their attention-weighted mean beside the state at the prediction time,
    the summaries by a linear term that starts at zero, the facts by a small network.
    """

    def __init__(self, hidden_dim: int, prevalence: float, *, summaries: int, facts: int) -> None:
        """Start near ``prevalence``, the training part's share of events, within (0, 1).

        Args:
            hidden_dim: H.
            prevalence: share of events.
            summaries: S.
            facts: K, which may be 0.
        """
        super().__init__()
        self.attention = nn.Linear(hidden_dim, 1, bias=False)
        self.output = nn.Linear(2 * hidden_dim, 1)
        nn.init.constant_(self.output.bias, log_odds(prevalence))
        self.summary_scaler = MaskedScaler(summaries)
        self.wide = nn.Linear(2 * summaries, 1, bias=False)
        nn.init.zeros_(self.wide.weight)
        self.fact_scaler = MaskedScaler(facts)
        self.facts: nn.Module | None = None
        if facts:
            inner, outer = nn.Linear(2 * facts, FACT_WIDTH), nn.Linear(FACT_WIDTH, 1, bias=False)
            self.facts = nn.Sequential(inner, nn.ReLU(), outer)

    def fit_normalizer(self, summaries: Tensor, facts: Tensor) -> None:
        """Fit the scales to the training part: summaries (n, S) and facts (n, K)."""
        self.summary_scaler.fit(summaries)
        self.fact_scaler.fit(facts)

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
        logit = logit + self.wide(self.summary_scaler(batch["summaries"]))
        if self.facts is not None:
            logit = logit + self.facts(self.fact_scaler(batch["facts"]))
        result: Tensor = logit.squeeze(1)
        return result


class TrajectoryMember(nn.Module):
    """An encoder and its head."""

    def __init__(self, encoder: Encoder, head: TrajectoryHead) -> None:
        """Join both."""
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the states (B, L + 1, H) and the logit (B,) of each patient."""
        states = encode(self.encoder, batch)
        return states, self.head(states, batch)


def fit_member(encoder: Encoder, data: Data) -> TrajectoryMember:
    """Join an encoder with a new head, the scales of both fitted to the training part.

    Summaries that few patients have are not read: their scales would tell of these patients.

    Args:
        encoder: new; its normaliser is fitted.
        data: of the run.

    Raises:
        InputError: a series cannot be normalised.
    """
    dataset, train = data.dataset, data.split["train"]
    values = torch.from_numpy(dataset.values[dataset.rows_of(train)]).float()
    try:
        encoder.fit_normalizer(values, ~values.isnan())
    except ValueError as error:
        raise InputError(f"{error} (features: {', '.join(dataset.features)})") from error
    summaries = torch.from_numpy(dataset.summaries()[train])
    for column in summaries.T:
        if few_patients(column.numpy(), dataset.groups[train], data.min_cell):
            column.fill_(math.nan)
    facts = torch.from_numpy(dataset.known_facts()[train])
    sizes = {"summaries": summaries.shape[1], "facts": facts.shape[1]}
    head = TrajectoryHead(encoder.hidden_dim, data.prevalence(), **sizes)
    head.fit_normalizer(summaries, facts)
    return TrajectoryMember(encoder, head)


class TrajectoryClassifier(nn.Module):
    """Stage 1: one or more members of different seeds, whose logits are averaged.

    Source: Lakshminarayanan 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles".
    """

    def __init__(self, members: Iterable[TrajectoryMember]) -> None:
        """Join the members; they read the same series, so one plan serves all."""
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def encoder(self) -> Encoder:
        """The first member's encoder, whose states become soft tokens."""
        encoder: Encoder = self.members[0].encoder  # type: ignore[assignment]
        return encoder

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the first member's states (B, L + 1, H) and all members' logits (N, B)."""
        if "plan" not in batch and isinstance(self.encoder, PlannedEncoder):
            batch = {**batch, "plan": self.encoder.plan(*series_of(batch))}
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
