"""The stock encoder's pass as one operation, with its derivative written by hand.

Recorded step by step, autograd keeps and revisits thirty small results a step and multiplies once
a step for every weight. Here a pass keeps the Runge-Kutta stages and the cell's gates alone, and
each weight's gradient is one product over all steps. ``dte_encoder.py`` holds the same mathematics
in plain PyTorch, and a test holds both equal.

Over a step, with c = dt / 2, M = W1 W2 and u = W1 h + b1, then back from g = dL/dh::

    k1 = c tanh(u)   k2 = c tanh(u + M k1)   k3 = c tanh(u + M k2)   k4 = c tanh(u + 2M k3)
    h += W2 (k1 + 2 k2 + 2 k3 + k4) / 3

    e = W2' g / 3                        f = c (1 - tanh^2) of each stage
    d4 = f4 e                            d3 = f3 (2e + 2M' d4)
    d2 = f2 (2e + M' d3)                 d1 = f1 (e + M' d2)
    g += W1' (d1 + d2 + d3 + d4)

d1 .. d4 are the derivatives by the arguments of tanh. The stages run in u, so each takes one matrix
product instead of two. At an observation with input product a, from the state x in front of it,
with n = W_n x + b_n::

    p = tanh(a + r n)    h = p + z (x - p)

    da = g (1 - z) (1 - p^2)    dr = da n r (1 - r)    dz = g (x - p) z (1 - z)    dn = da r
    g <- g z + W_hh' [dr, dz, dn]

The factors of g are therefore known for all steps before the backward pass begins.

tanh(x) is computed as 2 sigmoid(2x) - 1, the inner 2 being a factor of the products: on some
processors torch's tanh is much slower than its sigmoid.

Source: the discrete adjoint of a Runge-Kutta method, Hager 2000, "Runge-Kutta methods in optimal
control and the transformed adjoint system"; the cell is that of ``nn.GRUCell``.

Letters: B patients, P observations of all together, H state, R inputs of the update, n patients in
one step, M patient-steps in which time passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medgemma_clinical.models.encoder_plan import Plan


def fused_states(
    plan: Plan, read: Tensor, field: tuple[Tensor, Tensor, Tensor], update: nn.GRUCell
) -> tuple[Tensor, Tensor]:
    """Return the states (P, H) after observations and the last ones (B, H), once differentiable.

    ``read`` (P, R) are inputs of the update; ``field`` is W1 (H, H), b1 (H,) and W2 (H, H).
    """
    cell = update.weight_ih, update.bias_ih, update.weight_hh, update.bias_hh
    states: tuple[Tensor, Tensor] = _FusedPass.apply(
        plan, torch.is_grad_enabled(), read, *field, *cell
    )
    return states


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast if it is on: rounding would add up over many small steps."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class _FusedPass(torch.autograd.Function):
    """Runge-Kutta steps and updates over a whole plan; see the module."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, grad_enabled: bool, read: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return all states and the last ones; ``weights``: W1, b1, W2, W_ih, b_ih, W_hh, b_hh."""
        inner, bias, outer, into, into_bias, recurrent, recurrent_bias = weights
        keep = grad_enabled and any(ctx.needs_input_grad)
        n_first, *sizes = plan.n_active
        width = len(inner)
        dt = plan.dt[n_first:]  # no time passes in step 0
        mixing = inner @ outer
        # The cell's products of its inputs need no state: one product for the whole batch.
        gates = torch.addmm(into_bias, read, into.t())
        cells, proposals = torch.empty_like(gates), 2 * gates[:, 2 * width :]
        entering, states = torch.empty_like(proposals), torch.empty_like(proposals)
        final = gates.new_zeros(n_first, width)
        stages = gates.new_empty(5, sum(sizes) if keep else max(sizes, default=0), width)
        with torch.inference_mode():  # its calls are cheaper than those under no_grad
            _run_forward(
                plan,
                _kept_buffers(stages, dt, sizes) if keep else _reused_buffers(stages, dt, sizes),
                gates,
                (mixing.t(), inner.t(), outer.t(), recurrent.t(), bias, recurrent_bias),
                (cells, entering, proposals, states, final),
            )
        if keep:
            ctx.plan = plan
            matrices = mixing, inner, outer, into, recurrent
            ctx.save_for_backward(dt, read, cells, entering, proposals, stages, *matrices)
        return states, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, final_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``read`` and of the weights, from (P, H) and (B, H)."""
        with full_precision(grad.device):  # the caller may be inside autocast
            return None, None, *_run_backward(ctx.plan, grad, final_grad, *ctx.saved_tensors)


def _split(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors along their first axis; return, for each size, the pieces of all tensors."""
    # Tensor.split does the same with more Python around it.
    return list(zip(*(torch.split_with_sizes(tensor, sizes) for tensor in tensors), strict=True))


def _widen(dt: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return step lengths (M,) as wide as the states, (M, H), and -1/2 of them."""
    # torch has no vector code for a product with a single column.
    wide = dt.unsqueeze(1).expand(-1, width).contiguous()
    return wide, wide / -2


def _kept_buffers(stages: Tensor, dt: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Return, step by step, room of its own for stages and start, and its ``_widen``."""
    return iter(_split(sizes, *stages.unbind(), *_widen(dt, stages.shape[2])))


def _reused_buffers(stages: Tensor, dt: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Return the same in room that all steps share."""
    for dt_step in dt.split(sizes):
        yield *stages[:, : len(dt_step)], *_widen(dt_step, stages.shape[2])


def _run_forward(
    plan: Plan,
    buffers: Iterator[tuple[Tensor, ...]],
    gates: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    """Run over the steps of ``_rk4_forward``'s ``buffers`` and fill ``results``, in place.

    Shapes: gates (P, 3H), the cell's products of its inputs; results (P, 3H), 3 x (P, H), (B, H).
    """
    # Transposed matrices M, W1, W2 and W_hh, then b1 and b_hh.
    mixing, inner, outer, recurrent, bias, recurrent_bias = weights
    # r, z, n; before the update; twice the proposal's gates at first; after it; last, zeros.
    cells, entering, proposals, states, state = results
    width = len(bias)
    # Begins as the term that the cell's product is added to, ends as r, z and n.
    torch.add(gates, recurrent_bias, out=cells)
    reset_and_keep, n = cells.split_with_sizes([2 * width, width], dim=1)
    n.copy_(recurrent_bias[2 * width :])
    pieces = cells, reset_and_keep, *reset_and_keep.chunk(2, dim=1), n, entering, proposals, states
    updates = _split(plan.n_observed, plan.rows, *pieces)
    minus_one = gates.new_full((), -1.0)
    for step, size in enumerate(plan.n_active):
        if step:
            _rk4_forward(state[:size], *next(buffers), inner, bias, mixing, outer)
        if plan.n_observed[step]:
            _update_forward(state, recurrent, *updates[step], minus_one)


def _rk4_forward(h: Tensor, *arguments: Tensor) -> None:
    """Advance states h (n, H) in place by one step; keep h before it, and tanh's sigmoids."""
    s1, s2, s3, s4, start, dt, minus_half, inner, bias, mixing, outer = arguments
    start.copy_(h)
    u = torch.addmm(bias, h, inner, beta=2, alpha=2)  # 2u
    torch.sigmoid(u, out=s1)
    k1 = torch.addcmul(minus_half, s1, dt)  # c (2 sigmoid - 1)
    torch.addmm(u, k1, mixing, alpha=2, out=s2).sigmoid_()
    k2 = torch.addcmul(minus_half, s2, dt)
    torch.addmm(u, k2, mixing, alpha=2, out=s3).sigmoid_()
    k3 = torch.addcmul(minus_half, s3, dt)
    torch.addmm(u, k3, mixing, alpha=4, out=s4).sigmoid_()
    k4 = torch.addcmul(minus_half, s4, dt)
    h.addmm_(k1.add_(k2, alpha=2).add_(k3, alpha=2).add_(k4), outer, alpha=1 / 3)


def _update_forward(state: Tensor, recurrent: Tensor, rows: Tensor, *arguments: Tensor) -> None:
    """Update the ``rows`` of ``state`` that reach an observation; keep the cell's gates."""
    cell, reset_and_keep, r, z, n, x, p, new, minus_one = arguments
    torch.index_select(state, 0, rows, out=x)
    cell.addmm_(x, recurrent)
    reset_and_keep.sigmoid_()
    p.addcmul_(r, n, value=2).sigmoid_()
    torch.add(minus_one, p, alpha=2, out=p)
    torch.lerp(p, x, z, out=new)
    state.index_copy_(0, rows, new)


def _run_backward(
    plan: Plan, grad: Tensor, final_grad: Tensor, *saved: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the update's inputs and of the weights, from those of the states."""
    dt, read, cells, entering, proposals, stages, *matrices = saved
    mixing, inner, outer, into, recurrent = matrices
    sizes = plan.n_active[1:]
    wide, minus_half = _widen(dt, len(inner))
    stages, start = stages[:4], stages[4]
    # First the factors of g; after the loop d1 .. d4, each (M, H), and da, dr, dz, dn, g z.
    factors = torch.addcmul(stages, stages, stages, value=-1).mul_(wide)
    cell = _update_slopes(cells, entering, proposals)  # (P, 5, H)
    of_state = cell[:, 1:4].flatten(1)
    behind = torch.empty_like(start)
    with torch.inference_mode():
        steps = _split(sizes, *factors.unbind(), behind)
        updates = _split(plan.n_observed, plan.rows, grad, cell, of_state, cell[:, 4])
        solver = mixing, outer * (2 / 3), inner
        g = final_grad.clone()
        for step in reversed(range(len(plan.n_active))):
            if plan.n_observed[step]:
                _update_backward(g, recurrent, *updates[step])
            if step:
                _rk4_backward(g[: plan.n_active[step]], *steps[step - 1], *solver)
    # One product for each weight.
    d1 = factors[0]
    k = torch.addcmul(minus_half, stages, wide)
    factors[3].mul_(2)  # u + 2M k3
    d_mixing = factors[1:].flatten(0, 1).t() @ k[:3].flatten(0, 1)
    moved = k[0].add_(k[3]).add_(k[1].add_(k[2]), alpha=2)
    d_inner = (d1.t() @ start).addmm_(d_mixing, outer.t())
    d_outer = torch.addmm(behind.t() @ moved, inner.t(), d_mixing, beta=1 / 3)
    d_recurrent = of_state.t() @ entering, of_state.sum(0)
    of_input = of_state
    of_input[:, 2 * len(inner) :] = cell[:, 0]  # da in place of dn: the gates' own
    d_into = of_input.t() @ read, of_input.sum(0)
    return of_input @ into, d_inner, d1.sum(0), d_outer, *d_into, *d_recurrent


def _rk4_backward(g: Tensor, *arguments: Tensor) -> None:
    """Carry g (n, H) in front of a step in place; leave d2 .. d4 and, as d1, the sum of all."""
    d1, d2, d3, d4, behind, mixing, outer, inner = arguments
    behind.copy_(g)  # as it was behind the step
    e = torch.mm(g, outer)  # 2e, and the factors lack a 2
    d4.mul_(e)
    d3.mul_(torch.addmm(e, d4, mixing, beta=2, alpha=4))
    d2.mul_(torch.addmm(e, d3, mixing, beta=2, alpha=2))
    middle = torch.add(d2, d3).add_(d4)
    g.addmm_(torch.addcmul(middle, d1, torch.addmm(e, d2, mixing, alpha=2), out=d1), inner)


def _update_backward(g: Tensor, recurrent: Tensor, rows: Tensor, *arguments: Tensor) -> None:
    """Carry those ``rows`` of g in front of an update; multiply the cell's slopes with g."""
    gradients, slopes, of_state, through = arguments
    slopes.mul_(g.index_select(0, rows).add_(gradients).unsqueeze(1))
    g.index_copy_(0, rows, torch.addmm(through, of_state, recurrent))


def _update_slopes(cells: Tensor, entering: Tensor, proposals: Tensor) -> Tensor:
    """Return the factors of g in da, dr, dz, dn and g z for all observations, (P, 5, H)."""
    r, z, n = cells.chunk(3, dim=1)
    slopes = cells.new_empty(len(cells), 5, proposals.shape[1])
    a, r_slope, z_slope, n_slope, through = slopes.unbind(1)
    torch.sub(1, z, out=through)  # until the end
    torch.addcmul(through, through * proposals, proposals, value=-1, out=a)
    torch.mul(a, r, out=n_slope)
    torch.mul(n_slope, n, out=r_slope).addcmul_(r_slope, r, value=-1)
    torch.sub(entering, proposals, out=z_slope).mul_(z).mul_(through)
    through.copy_(z)
    return slopes
