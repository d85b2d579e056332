"""Columns of any distribution, with unknown entries, as scores of a normal distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BINS = 24
"""Bins into which the values of a column are cut, of equal size, to know its distribution."""

MIN_BIN = 20
"""Minimum of values in a bin: its mean, stored with the weights, reveals no single value."""

MAX_SCORE = 4.0
"""Scores are clipped here: one mistyped value must not decide a risk."""


class Scaler(nn.Module):
    """Turn C columns into normal scores, by the distribution of each in the training part.

    A long tail (lactate, bilirubin) then teaches as much as a symmetric column.

    Source: Conover 1999, "Practical Nonparametric Statistics", for normal scores.
    """

    knots: Tensor  # (C, bins) mean of each bin, ascending
    scores: Tensor  # (C, bins) mean normal score; equal means have one score
    std: Tensor  # (C,) infinite where no entry is known or all are equal

    def __init__(self, columns: int) -> None:
        """Leave the columns as they are, but clipped, until they are fitted."""
        super().__init__()
        identity = torch.linspace(-MAX_SCORE, MAX_SCORE, BINS).repeat(columns, 1)
        self.register_buffer("knots", identity)
        self.register_buffer("scores", identity.clone())
        self.register_buffer("std", torch.ones(columns))

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        """Fit to (n, C), NaN being unknown; a column without known entry, or constant, reads 0."""
        self.knots.zero_()
        self.scores.zero_()
        self.std.fill_(math.inf)
        # In double, sums of equal float32 values are exact: means of bins that share one are equal.
        for c, column in enumerate(table.to(self.std.dtype).double().T):
            values = column[~column.isnan()].sort().values
            # Rounding alone leaves a constant column a spread of 1e-16 of its mean.
            if len(values) and (std := values.std(correction=0)) > 1e-9 * values.mean().abs():
                self.std[c] = std
                self.knots[c], self.scores[c] = bin_means(values)

    def forward(self, table: Tensor) -> Tensor:
        """Return clipped scores for (..., C), zero where unknown."""
        x = table.reshape(table.shape[:-1].numel(), table.shape[-1]).T.contiguous()  # (C, n)
        inside = x.clamp(self.knots[:, :1], self.knots[:, -1:])
        left = (torch.searchsorted(self.knots, inside) - 1).clamp(0, BINS - 2)
        # (C, bins - 1), NaN between equal knots.
        slope = (self.scores.diff(dim=1) / self.knots.diff(dim=1)).nan_to_num(nan=0.0)
        rise = slope.gather(1, left) * (inside - self.knots.gather(1, left))
        score = self.scores.gather(1, left) + rise
        score = (score + (x - inside) / self.std[:, None]).clamp(-MAX_SCORE, MAX_SCORE)
        return score.nan_to_num(nan=0.0).T.reshape(table.shape)


def bin_means(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean value and mean normal score of each bin, (BINS,) each, of sorted values."""
    bins = max(1, min(BINS, len(ordered) // MIN_BIN))
    quantiles = (torch.arange(len(ordered), dtype=torch.double) + 0.5) / len(ordered)
    owner = (quantiles * bins).long()
    sizes = torch.bincount(owner)
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    knots, scores = (torch.bincount(owner, x) / sizes for x in (ordered, normal))
    # A value that fills several bins has one score.
    knots, group, counts = knots.unique_consecutive(return_inverse=True, return_counts=True)
    scores = torch.bincount(group, scores) / counts
    # Few values make fewer bins; the last one fills the places that are left.
    index = torch.arange(BINS).clamp(max=len(knots) - 1)
    return knots[index], scores[index]
