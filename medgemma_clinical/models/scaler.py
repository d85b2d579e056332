"""Standardisation of columns with unknown entries, by the training part."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_Z_SCORE = 8.0
"""Standardised values are clipped here: one mistyped value must not decide a risk."""


class Scaler(nn.Module):
    """Turn C columns into z-scores; its mean and standard deviation are buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int) -> None:
        """Leave the columns as they are until they are fitted."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))

    @torch.no_grad()
    def fit(self, table: Tensor) -> None:
        """Fit the scales to (n, C), NaN being unknown; a column without known entry reads as 0."""
        table = table.double()
        unknown = table.isnan().all(0)
        mean = table.nanmean(0).nan_to_num(nan=0.0)
        std = (table - mean).square().nanmean(0).sqrt()
        # A constant column stays at zero; rounding alone leaves it a spread of 1e-16 of its mean.
        std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
        self.mean.copy_(mean)
        self.std.copy_(std.masked_fill(unknown, math.inf))

    def forward(self, table: Tensor) -> Tensor:
        """Return clipped z-scores for (..., C), zero where unknown."""
        z = ((table - self.mean) / self.std).clamp(-MAX_Z_SCORE, MAX_Z_SCORE)
        return z.nan_to_num(nan=0.0)
