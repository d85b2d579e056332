"""Stage 1: the head that reads a series of encoder states, and the classifier without an LLM.

Letters: B patients, L observations, H state of the encoder.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgemma_clinical.data.ragged import Batch
from medgemma_clinical.models.encoder import Encoder, encode


class Output(NamedTuple):
    """Loss and predictions of a stage's model for one batch.

    loss: scalar float32, a sum over ``terms`` (patients, or answer tokens), so that no mean depends
    on how rows fall into batches; terms: their number, weights included; logit (B,): log-odds of
    the event, float32.
    """

    loss: Tensor
    terms: int
    logit: Tensor


def classification_output(logit: Tensor, labels: Tensor) -> Output:
    """Return the unweighted binary cross-entropy of logits (B,) and labels (B,) of 0 and 1."""
    loss = functional.binary_cross_entropy_with_logits(logit, labels, reduction="sum")
    return Output(loss, len(labels), logit)


def log_odds(prevalence: float) -> float:
    """Return the log-odds of a share of events within (0, 1)."""
    return math.log(prevalence / (1 - prevalence))


class PooledHead(nn.Module):
    """Read one logit from a series of states: their attention-weighted mean beside the last."""

    def __init__(self, hidden_dim: int, prevalence: float) -> None:
        """Start near ``prevalence``, the training part's share of events, within (0, 1)."""
        super().__init__()
        self.attention = nn.Linear(hidden_dim, 1, bias=False)
        self.output = nn.Linear(2 * hidden_dim, 1)
        nn.init.constant_(self.output.bias, log_odds(prevalence))

    def forward(self, states: Tensor, present: Tensor) -> Tensor:
        """Return logits (B,) float32.

        Args:
            states: (B, L, H), after each observation.
            present: (B, L) bool, False in the padding behind a series.
        """
        scores = self.attention(states).squeeze(2).masked_fill(~present, -math.inf)  # (B, L)
        pooled = torch.einsum("bl,blh->bh", scores.softmax(dim=1), states)
        row = torch.arange(len(states), device=states.device)
        last = states[row, present.sum(dim=1) - 1]  # (B, H)
        logit: Tensor = self.output(torch.cat([pooled, last], dim=1)).squeeze(1)
        return logit


class TrajectoryClassifier(nn.Module):
    """Stage 1: encoder and head alone."""

    def __init__(self, encoder: Encoder, prevalence: float) -> None:
        """Join the encoder with a new ``PooledHead``, which see for ``prevalence``."""
        super().__init__()
        self.encoder = encoder
        self.head = PooledHead(encoder.hidden_dim, prevalence)

    def forward(self, batch: Batch) -> Output:
        """Return the binary cross-entropy (sum over B) and the logit of each patient."""
        states = encode(self.encoder, batch)  # (B, L, H)
        logit = self.head(states, batch["observed"].any(dim=2))
        return classification_output(logit, batch["labels"])
