"""Columns of any distribution, with unknown entries, as scores of a normal distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients, patients_behind

BINS = 24
"""Bins into which the values of a column are cut, of equal size, to know its distribution."""

MIN_BIN = 20
"""Minimum of values in a bin, whose mean is stored with the weights. They are of at least
``MIN_CELL`` patients: one patient may have all values of a tail."""

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
    patients: Tensor  # (C,) fewest behind a number above; 0 where not known

    def __init__(self, columns: int) -> None:
        """Leave the columns as they are, but clipped, until they are fitted."""
        super().__init__()
        identity = torch.linspace(-MAX_SCORE, MAX_SCORE, BINS).repeat(columns, 1)
        self.register_buffer("knots", identity)
        self.register_buffer("scores", identity.clone())
        self.register_buffer("std", torch.ones(columns))
        self.register_buffer("patients", torch.zeros(columns))
        self.register_load_state_dict_pre_hook(_without_patients)

    @torch.no_grad()
    def fit(self, table: Tensor, groups: Tensor | None = None) -> None:
        """Fit to (n, C), NaN being unknown; a column without known entry, or constant, reads 0.

        ``groups`` (n,): the patient of each row; None: each row is one.
        """
        patients = np.arange(len(table)) if groups is None else groups.numpy(force=True)
        self.knots.zero_()
        self.scores.zero_()
        self.std.fill_(math.inf)
        self.patients.zero_()
        # In double, sums of equal float32 values are exact: means of bins that share one are equal.
        for c, column in enumerate(table.to(self.std.dtype).double().T):
            values, order = column.sort(stable=True)
            values, order = values[~values.isnan()], order[~values.isnan()]
            # Rounding alone leaves a constant column a spread of 1e-16 of its mean.
            if len(values) and (std := values.std(correction=0)) > 1e-9 * values.mean().abs():
                self.std[c] = std
                owner, fewest = bin_owners(patients[order.numpy(force=True)])
                self.knots[c], self.scores[c] = bin_means(values, owner)
                # Where most values are equal, those of the others decide.
                self.patients[c] = min(fewest, patients_behind(column.numpy(force=True), patients))

    def means_of_few(self) -> list[bool]:
        """Return whether each column keeps a mean of fewer than ``MIN_CELL`` patients."""
        keeps_few: list[bool] = (self.std.isfinite() & (self.patients < MIN_CELL)).tolist()
        return keeps_few

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


def _without_patients(scaler: Scaler, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let a scaler read weights of earlier versions, which did not count patients."""
    weights.setdefault(f"{prefix}patients", torch.zeros_like(scaler.patients))


def bin_owners(patients: NDArray[np.generic]) -> tuple[Tensor, int]:
    """Return the bin (n,) of each value, sorted, of ``patients`` (n,), and the fewest in a bin."""
    n = len(patients)
    bins = max(1, min(BINS, n // MIN_BIN))
    equal = ((np.arange(n) + 0.5) / n * bins).astype(np.int64)
    ends = np.cumsum(np.bincount(equal)).tolist()
    starts = [0]
    for end in ends[:-1]:  # a bin of few patients is joined to the next one
        if count_patients(patients, slice(starts[-1], end)) >= MIN_CELL:
            starts.append(end)
    if len(starts) > 1 and count_patients(patients, slice(starts[-1], n)) < MIN_CELL:
        starts.pop()
    owner = np.searchsorted(starts, np.arange(n), side="right") - 1
    fewest = min(count_patients(patients, owner == k) for k in range(len(starts)))
    return torch.from_numpy(owner), fewest


def bin_means(ordered: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean value and mean normal score of each bin, (BINS,) each, of sorted values."""
    quantiles = (torch.arange(len(ordered), dtype=torch.double) + 0.5) / len(ordered)
    sizes = torch.bincount(owner)
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    knots, scores = (torch.bincount(owner, x) / sizes for x in (ordered, normal))
    # A value that fills several bins has one score.
    knots, group, counts = knots.unique_consecutive(return_inverse=True, return_counts=True)
    scores = torch.bincount(group, scores) / counts
    # Few values make fewer bins; the last one fills the places that are left.
    index = torch.arange(BINS).clamp(max=len(knots) - 1)
    return knots[index], scores[index]
