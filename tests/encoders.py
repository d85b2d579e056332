"""Encoders and batches that several test modules make."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import dte_encoder
from dte_encoder import ClinicalODERNN, VectorField, rk4_step

FIXED_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Solver: order."""

MULTISTEP = {"explicit_adams": 1e-2, "implicit_adams": 1e-5, "fixed_adams": 1e-5}
"""Solver: error on the saturating decay in steps of 0.1."""

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")

Batch = tuple[Tensor, Tensor, Tensor]


def make_encoder(
    input_dim: int = 2, hidden_dim: int = 6, *, seed: int = 0, gain: float = 2.0, **kwargs: Any
) -> ClinicalODERNN:
    """A float64 encoder with livelier dynamics than a new one, so that faults show."""
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(input_dim, hidden_dim, **{"time_scale": 10.0, **kwargs}).double()
    with torch.no_grad():
        for parameter in encoder.field.parameters():
            parameter.mul_(gain)
    return encoder


def stock_modules(encoder: ClinicalODERNN) -> tuple[VectorField, nn.GRUCell]:
    field, update = encoder.field, encoder.update
    assert isinstance(field, VectorField)
    assert isinstance(update, nn.GRUCell)
    return field, update


def same_weights(encoder: ClinicalODERNN, solver: str, tolerance: float = 1e-10) -> ClinicalODERNN:
    twin = copy.deepcopy(encoder)
    twin.solver, twin.rtol, twin.atol = solver, tolerance, tolerance
    return twin


def make_batch(lengths: tuple[int, ...] = (5, 1, 3), features: int = 2, seed: int = 1) -> Batch:
    """Irregular series with gaps in the values; times are dyadic, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    gaps = torch.randint(1, 64, shape, generator=generator).double() / 8
    times = gaps.cumsum(1)
    present = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    observed = torch.rand((*shape, features), generator=generator) < 0.6
    observed[..., 0] |= ~observed.any(dim=2)
    observed &= present.unsqueeze(2)
    values = torch.randn((*shape, features), generator=generator, dtype=torch.float64)
    times = torch.where(present, times, 0.0)
    return times, torch.where(observed, values, 0.0), observed


def in_single(batch: Batch) -> Batch:
    times, values, observed = batch
    return times.float(), values.float(), observed


def alone(batch: Batch, i: int) -> Batch:
    """One patient without padding."""
    length = int(batch[2][i].any(dim=1).sum())
    times, values, observed = (tensor[i : i + 1, :length] for tensor in batch)
    return times, values, observed


def gradients(encoder: ClinicalODERNN, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Derivatives of a random combination of the states (their sum would be constant)."""
    encoder.zero_grad()
    states = encoder(*batch)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    (states * weight.to(states)).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in encoder.named_parameters()
    }


def evolve(encoder: ClinicalODERNN, state: Tensor, gap: Tensor) -> Tensor:
    """Carry states over gaps in the steps that the encoder itself would take."""
    if encoder.solver != "rk4":
        return encoder._advance(state, gap)
    n_steps = torch.ceil(gap / dte_encoder.MAX_SCALED_STEP).clamp(min=1)
    for step in range(int(n_steps.max())):
        state = rk4_step(encoder.field, state, gap / n_steps * (n_steps > step))
    return state


def inputs_of(encoder: ClinicalODERNN, *batch: Tensor) -> Tensor:
    """What the input layer reads of each observation, (B, L, 4F + 3), zero in padding."""
    plan = encoder.plan(*batch)
    inputs = encoder.inputs(plan)
    placed = inputs.new_zeros(batch[0].numel(), inputs.shape[1])
    return placed.index_copy(0, plan.observation_index, inputs).view(*batch[0].shape, -1)
