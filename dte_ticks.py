"""Many irregular series advance together, each by steps of its own: planning, running, derivative.

Time is cut into ticks: a gap of patient b becomes as many ticks as his own solver steps need, the
last of them ends with the observation. In each tick all patients who have one left take a step of
their own length, and those who arrive at an observation are updated.

Letters: B patients, L observations of the longest, P of all together, H state, N ticks of all
patients together, M = N - B of them in which time passes, n patients in one tick.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Plan(NamedTuple):
    """Who does what in which tick. In all ticks the patients with most ticks are the first rows.

    Attributes:
        sizes: how many patients take part in tick 0, 1, 2, ...; in tick 0 nothing passes yet.
        spans: (N,) how far each goes in it, in units of ``time_scale``.
        arrivals: how many of them arrive at an observation.
        rows: (P,) which rows these are, tick after tick.
        places: (P,) where their observations stand in the flattened (B * L).
    """

    sizes: list[int]
    spans: Tensor
    arrivals: list[int]
    rows: Tensor
    places: Tensor


def plan_ticks(gaps: Tensor, parts: Tensor) -> Plan:
    """Cut every patient's time into ticks.

    Args:
        gaps: (B, L) time before each observation, in units of ``time_scale``.
        parts: (B, L) int64, how many ticks each gap takes, zero in padding.
    """
    spans = (gaps / parts.clamp(min=1)).flatten()
    parts = parts.cpu()  # on CUDA the one wait: how many ticks there are steers the host
    count, patients = parts.sum(1).sort(descending=True, stable=True)  # row by row of the ticks
    parts = parts[patients]
    rows, steps = parts.nonzero(as_tuple=True)  # (P,) each, patient after patient
    places = patients[rows] * parts.shape[1] + steps
    parts = parts[rows, steps]
    ahead = count.cumsum(0) - count  # ticks of the patients in the rows above
    arrival, order = (parts.cumsum(0) - ahead[rows] - 1).sort(stable=True)  # in ticks of one's own
    # The same for each tick (N,): from patient after patient to tick after tick.
    owner = torch.repeat_interleave(count)
    number = torch.arange(len(owner)) - ahead[owner]
    sizes = torch.bincount(number)
    place = torch.empty_like(number)
    place[(sizes.cumsum(0) - sizes)[number] + owner] = places.repeat_interleave(parts)
    return Plan(
        sizes.tolist(),
        spans.index_select(0, place.to(spans.device)),
        torch.bincount(arrival).tolist(),
        rows[order].to(spans.device),
        places[order].to(spans.device),
    )


def by_tick(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors along their first axis into ticks; give all pieces of each tick."""
    return list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))


class Ticks(torch.autograd.Function):
    """rk4 and update over all ticks as one operation, its derivative written by hand.

    Recorded step by step, autograd keeps and revisits thirty small results a tick and multiplies
    once a tick for every weight. Here a pass keeps the stages and the cell's gates alone, and each
    weight's gradient is one product over all ticks.

    Over a span, with c = span / 2, M = W1 W2 and u = W1 h + b1, then back from g = dL/dh::

        k1 = c tanh(u)   k2 = c tanh(u + M k1)   k3 = c tanh(u + M k2)   k4 = c tanh(u + 2M k3)
        h += W2 (k1 + 2 k2 + 2 k3 + k4) / 3

        e = W2' g / 3                        f = c (1 - tanh^2) of each stage
        d4 = f4 e                            d3 = f3 (2e + 2M' d4)
        d2 = f2 (2e + M' d3)                 d1 = f1 (e + M' d2)
        g += W1' (d1 + d2 + d3 + d4)

    d1 .. d4 belong to what tanh is taken of. At an observation with input product a, from the
    state x in front of it, with n = W_n x + b_n::

        p = tanh(a + r n)    h = p + z (x - p)

        da = g (1 - z) (1 - p^2)    dr = da n r (1 - r)    dz = g (x - p) z (1 - z)    dn = da r
        g <- g z + W_hh' [dr, dz, dn]

    What g is multiplied with is therefore known for all ticks before the way back begins.

    tanh(x) is taken as 2 sigmoid(2x) - 1, the inner 2 being part of the weights: torch's tanh goes
    through MKL's vector functions, which cost four times its sigmoid and wake every thread.

    Source: the discrete adjoint of a Runge-Kutta method, Hager 2000, "Runge-Kutta methods in
    optimal control and the transformed adjoint system"; the cell is that of ``nn.GRUCell``.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, learns: bool, gates: Tensor, *weights: Tensor) -> Tensor:
        """Run over the ticks.

        Args:
            ctx: takes what the way back needs.
            plan: the ticks.
            learns: whether there is a way back; if not, nothing is kept for it.
            gates: (P, 3H) input products of the cell.
            weights: W1, b1, M transposed, W2, W_hh and b_hh.

        Returns:
            (P, H) state after each observation.
        """
        inner, bias, mixing, outer, recurrent, recurrent_bias = weights
        first, *sizes = plan.sizes
        width = len(bias)
        solver = 2 * inner.t(), 2 * bias, 2 * mixing, 4 * mixing, outer.t() / 3
        inputs, shift, product = (
            torch.cat([tensor[..., : 2 * width], 2 * tensor[..., 2 * width :]], dim=-1)
            for tensor in (gates, recurrent_bias, recurrent.t())
        )
        # Begins as what the cell's product is added to, ends as r, z and 2n.
        cells = inputs + shift
        cells[:, 2 * width :] = shift[2 * width :]
        entering, proposals = gates.new_empty(2, len(gates), width)
        states = torch.empty_like(proposals)
        pieces = cells, cells[:, : 2 * width], *cells.chunk(3, dim=1), inputs[:, 2 * width :]
        updates = by_tick(plan.arrivals, plan.rows, *pieces, entering, proposals, states)
        stages = gates.new_empty(5, sum(sizes) if learns else max(sizes, default=0), width)
        kept = by_tick(sizes, *stages) if learns else [stages[:, :size] for size in sizes]
        span = plan.spans[first:].unsqueeze(1)
        spans = by_tick(sizes, span, -span / 2)
        state = gates.new_zeros(first, width)
        for tick, size in enumerate(plan.sizes):
            if tick:
                _solve(state[:size], *kept[tick - 1], *spans[tick - 1], *solver)
            if plan.arrivals[tick]:
                _observe(state, product, *updates[tick])
        if learns:
            ctx.plan = plan
            ctx.save_for_backward(cells, entering, proposals, stages, *weights[:-1])
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Go back over the ticks; ``grad`` is (P, H)."""
        with torch.autocast(grad.device.type, enabled=False):  # a caller may be inside one
            return None, None, *_go_back(ctx.plan, grad, *ctx.saved_tensors)


def _go_back(plan: Plan, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    """Give the gradients of gates and weights from those of the states, ``grad`` (P, H)."""
    cells, entering, proposals, stages, inner, _, mixing, outer, recurrent = kept
    first, *sizes = plan.sizes
    stages, start = stages[:4], stages[4]
    span = plan.spans[first:].unsqueeze(1)
    # First what g is multiplied with; then d1 .. d4, each (M, H), and da, dr, dz, dn, g z.
    fields = torch.addcmul(stages, stages, stages, value=-1).mul_(2 * span)
    cell = _cell_slopes(cells, entering, proposals)  # (P, 5, H)
    own = cell[:, 1:4].flatten(1)
    behind, inside = torch.empty_like(start), torch.empty_like(start)
    steps = by_tick(sizes, *fields, behind, inside)
    updates = by_tick(plan.arrivals, plan.rows, grad, cell, own, cell[:, 4])
    solver = mixing.t(), outer / 3, inner
    pull = grad.new_zeros(first, len(inner))  # g of each patient
    for tick in reversed(range(len(plan.sizes))):
        if plan.arrivals[tick]:
            rows, given, factors, into, through = updates[tick]
            factors.mul_(pull.index_select(0, rows).add_(given).unsqueeze(1))
            pull.index_copy_(0, rows, torch.addmm(through, into, recurrent))
        if tick:
            _solve_back(pull[: plan.sizes[tick]], *steps[tick - 1], *solver)
    # What is left is one product for each weight.
    k = torch.addcmul(-span / 2, stages, span)
    fields[3].mul_(2)  # u + 2M k3
    d_mixing = k[:3].flatten(0, 1).t() @ fields[1:].flatten(0, 1)
    moved = k[0].add_(k[3]).add_(k[1].add_(k[2]), alpha=2)
    return (
        torch.cat([cell[:, 1:3].flatten(1), cell[:, 0]], dim=1),
        *(inside.t() @ start, inside.sum(0), d_mixing, behind.t() @ moved / 3),
        *(own.t() @ entering, own.sum(0)),
    )


def _solve(h: Tensor, *buffers: Tensor) -> None:
    """Take a step of rk4 with states h (n, H) in place, and keep its stages as sigmoids."""
    t1, t2, t3, t4, start, span, minus_half, inner, bias, mixing, mixing_twice, back = buffers
    start.copy_(h)
    u = torch.addmm(bias, h, inner)
    torch.sigmoid(u, out=t1)
    k1 = torch.addcmul(minus_half, t1, span)  # c (2 sigmoid - 1)
    torch.addmm(u, k1, mixing, out=t2).sigmoid_()
    k2 = torch.addcmul(minus_half, t2, span)
    torch.addmm(u, k2, mixing, out=t3).sigmoid_()
    k3 = torch.addcmul(minus_half, t3, span)
    torch.addmm(u, k3, mixing_twice, out=t4).sigmoid_()
    k4 = torch.addcmul(minus_half, t4, span)
    h.addmm_(k1.add_(k2, alpha=2).add_(k3, alpha=2).add_(k4), back)


def _solve_back(g: Tensor, *buffers: Tensor) -> None:
    """Carry g (n, H) in front of a step in place; d1 .. d4 and what the weights need stay."""
    d1, d2, d3, d4, behind, inside, mixing, back, inner = buffers
    behind.copy_(g)
    e = torch.mm(g, back)
    d4.mul_(e)
    d3.mul_(torch.addmm(e, d4, mixing, beta=2, alpha=2))
    d2.mul_(torch.addmm(e, d3, mixing, beta=2))
    d1.mul_(torch.addmm(e, d2, mixing))
    g.addmm_(torch.add(d1, d2, out=inside).add_(d3).add_(d4), inner)


def _observe(state: Tensor, product: Tensor, rows: Tensor, *buffers: Tensor) -> None:
    """Update those rows of ``state`` that arrive, and keep what led there."""
    cell, both, r, z, n, gate, x, p, new = buffers
    torch.index_select(state, 0, rows, out=x)
    cell.addmm_(x, product)
    both.sigmoid_()
    torch.addcmul(gate, r, n, out=p).sigmoid_().mul_(2).sub_(1)
    torch.lerp(p, x, z, out=new)
    state.index_copy_(0, rows, new)


def _cell_slopes(cells: Tensor, entering: Tensor, proposals: Tensor) -> Tensor:
    """Give (P, 5, H): da, dr, dz, dn and g z without their g, for all observations."""
    r, z, n = cells.chunk(3, dim=1)
    a = (1 - z) * (1 - proposals.square())
    n_slope = a * r
    r_slope = n_slope * n * (1 - r) / 2  # n stands doubled
    z_slope = (entering - proposals) * z * (1 - z)
    return torch.stack([a, r_slope, z_slope, n_slope, z], dim=1)
