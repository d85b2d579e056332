"""ClinicalODERNN: an encoder for irregularly sampled clinical series. Knows tensors only.

Between two observations the hidden state follows an ordinary differential equation, at an
observation a GRU cell updates it::

    dh/dt = f(h)                               for the hours that pass
    h     = GRU(relu(W inputs of the observation), h)

``dynamics`` replaces the equation by an exponential decay towards a learned state, or by nothing:
the state is held, and the update alone reads the gaps.

Source: Rubanova, Chen, Duvenaud 2019, "Latent ODEs for Irregularly-Sampled Time Series".

Each patient is integrated over their own gaps although the whole batch advances together:
``medgemma_clinical/models/encoder_plan.py`` cuts the gaps into steps. The inputs of an observation
are, for each feature, its latest value, whether it is measured now, whether it was measured before
and how long ago: a value carried forward never passes for a new one.

The mathematics stands here in plain PyTorch and calls ``field`` and ``update`` as modules.
``medgemma_clinical/models/fused_rk4.py`` computes the same faster for the stock field and update.

Letters: B patients, L observations of the longest, P of all together, F features, H state,
n patients in one step, R inputs of the update.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional

from medgemma_clinical.files import RunFault
from medgemma_clinical.models.choices import DYNAMICS, SOLVERS
from medgemma_clinical.models.encoder_plan import (
    FEATURE_INPUTS,
    TIME_INPUTS,
    Plan,
    SolverConfig,
    build_plan,
)
from medgemma_clinical.models.fused_rk4 import full_precision, fused_states
from medgemma_clinical.models.scaler import Scaler

MAX_SCALED_STEP = 0.1
"""Longest step of rk4, in units of ``time_scale``."""

MAX_SCALED_GAP = 10_000.0
"""Longest gap in units of ``time_scale`` (82 years at 72 hours): 100,000 steps."""

INPUT_WIDTH = 64
"""Width R of the layer in front of the update: with many features this layer grows, not the GRU."""


class VectorField(nn.Module):
    """The right-hand side f(h) = W2 tanh(W1 h + b1).

    Bounded by |W2|, so a state can drift but never blows up within a finite gap.
    """

    def __init__(self, hidden_dim: int) -> None:
        """Create the two layers, ``hidden_dim`` wide."""
        super().__init__()
        self.inner = nn.Linear(hidden_dim, hidden_dim)
        self.outer = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        """Return dh/dt (n, H) per ``time_scale`` for ``state`` (n, H)."""
        derivative: Tensor = self.outer(torch.tanh(self.inner(state)))
        return derivative


class Decay(nn.Module):
    """The solution of dh/dt = r (target - h) with a learned target and rate r > 0 a component.

    Source: Che et al. 2018, "Recurrent Neural Networks for Multivariate Time Series with Missing
    Values" (GRU-D), whose states decay towards zero.
    """

    def __init__(self, hidden_dim: int) -> None:
        """Start at a target of zero and a rate of 0.7 per ``time_scale``."""
        super().__init__()
        self.target = nn.Parameter(torch.zeros(hidden_dim))
        self.raw_rate = nn.Parameter(torch.zeros(hidden_dim))

    def forward(self, state: Tensor, dt: Tensor) -> Tensor:
        """Return the states (n, H) after ``dt`` (n,), in units of ``time_scale``."""
        passed = torch.expm1(-functional.softplus(self.raw_rate) * dt.unsqueeze(1))  # 0 to -1
        return state + passed * (state - self.target)


def rk4_step(field: nn.Module, state: Tensor, dt: Tensor) -> Tensor:
    """Return the states (n, H) after one classical Runge-Kutta step, each row's of its own length.

    Args:
        field: the right-hand side, from states (n, H) to derivatives (n, H).
        state: (n, H).
        dt: (n,) step lengths; a zero step changes nothing.

    Source: Kutta 1901, the rule with weights 1/6, 2/6, 2/6, 1/6.
    """
    dt = dt.unsqueeze(1)
    k1 = field(state)
    k2 = field(state + dt / 2 * k1)
    k3 = field(state + dt / 2 * k2)
    k4 = field(state + dt * k3)
    return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class ClinicalODERNN(nn.Module):
    """Turn irregular series into one state per observation.

    Args:
        input_dim: number of features F.
        hidden_dim: width H of the state.
        time_scale: hours that are one unit of the equation's time.
        solver: ``rk4`` is this module's ``rk4_step``; any other of ``SOLVERS`` is torchdiffeq's, on
            rescaled time.
        rtol: relative tolerance of torchdiffeq's solvers.
        atol: absolute tolerance of torchdiffeq's solvers.
        field: the right-hand side, any module from states (n, H) to derivatives (n, H) per
            ``time_scale``; a new ``VectorField`` if None. Not part of ``config``.
        dynamics: ``ode`` follows the field; ``decay`` is a ``Decay`` in closed form; ``none`` holds
            the state. The last two need no solver.
        dropout: share of the update's inputs, and of the states that are returned, that training
            sets to zero.

    Attributes:
        fused: whether rk4 may use the fast path where field and update are the stock modules. It
            has no second derivative, and calls no hooks of these modules.

    Raises:
        ValueError: a size, scale or tolerance that is not positive, an unknown solver or unknown
            dynamics, a field beside other dynamics than ``ode``, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 64,
        *,
        time_scale: float = 72.0,
        solver: str = "rk4",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        field: nn.Module | None = None,
        dynamics: str = "ode",
        dropout: float = 0.0,
    ) -> None:
        """Create the layers; weights come from torch's global generator."""
        super().__init__()
        sizes = {"input_dim": input_dim, "hidden_dim": hidden_dim, "time_scale": time_scale}
        for name, size in {**sizes, "rtol": rtol, "atol": atol}.items():
            if not 0 < size < math.inf:
                raise ValueError(f"{name} must be a positive number, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if dynamics not in DYNAMICS or (field is not None and dynamics != "ode"):
            raise ValueError(f"dynamics {dynamics!r}: one of {', '.join(DYNAMICS)}; a field is ode")
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}: one of {', '.join(SOLVERS)}")
        self.input_dim, self.hidden_dim = input_dim, hidden_dim
        self.time_scale, self.rtol, self.atol = float(time_scale), float(rtol), float(atol)
        self.solver, self.dynamics, self.dropout, self.fused = solver, dynamics, dropout, True
        if field is None:
            stock = {"ode": VectorField, "decay": Decay}.get(dynamics)
            field = nn.Identity() if stock is None else stock(hidden_dim)
        self.field = field
        self.read = nn.Linear((1 + FEATURE_INPUTS) * input_dim + TIME_INPUTS, INPUT_WIDTH)
        self.update: nn.Module = nn.GRUCell(INPUT_WIDTH, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.scaler = Scaler(input_dim)

    @property
    def config(self) -> dict[str, Any]:
        """The keywords that rebuild this encoder, but for a ``field`` of the caller's own."""
        names = ("input_dim", "hidden_dim", "time_scale", "solver", "rtol", "atol", "dynamics")
        return {name: getattr(self, name) for name in (*names, "dropout")}

    @property
    def longest_gap_hours(self) -> float:
        """The longest gap that the encoder accepts, in hours."""
        return MAX_SCALED_GAP * self.time_scale

    def fit_normalizer(
        self, values: Tensor, observed: Tensor, groups: Tensor | None = None
    ) -> None:
        """Fit the normal scores of each feature to the training split.

        Args:
            values: (..., F) in raw units.
            observed: (..., F) bool; only these entries count.
            groups: (...,) int64, the patient of each row of values; None: each row is one.

        Raises:
            ValueError: wrong shapes or dtype, nothing observed at all, or an observed value that
                is not finite.
        """
        if values.shape != observed.shape or values.shape[-1] != self.input_dim:
            raise ValueError(
                f"values {tuple(values.shape)} and observed {tuple(observed.shape)} must be "
                f"equal and end with input_dim {self.input_dim}"
            )
        if observed.dtype != torch.bool or not observed.any():
            raise ValueError("observed must be bool, and true somewhere in the training split")
        not_finite = (observed & ~values.isfinite()).reshape(-1, self.input_dim).any(0)
        if not_finite.any():
            raise ValueError(f"a value of feature {int(not_finite.nonzero()[0])} is not finite")
        entries = torch.where(observed, values.double(), math.nan)
        patients = None if groups is None else groups.reshape(-1)
        self.scaler.fit(entries.reshape(-1, self.input_dim), patients)

    def forward(
        self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor | None = None
    ) -> Tensor:
        """Encode a padded batch.

        Args:
            times: (B, L) hours, not decreasing over a patient's observations.
            values: (B, L, F) raw units; the entries at unobserved places do not matter.
            observed: (B, L, F) bool; rows that are all False are padding behind the series.
            until: (B,) hours to which the state is carried behind the last observation.

        Returns:
            (B, L, H) layer-normalised state after each observation, zero in padding rows; with
            ``until`` (B, L + 1, H), the last column holding the states carried there.

        Raises:
            ValueError: wrong shapes, decreasing times, a value that is not finite at an observed
                place, a patient without observation, an end before the last observation, or a
                derivative by times or ends.
        """
        return self.run(self.plan(times, values, observed, until))

    @torch.compiler.disable  # counts on the host; a compiled graph breaks here
    def plan(
        self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor | None = None
    ) -> Plan:
        """Check a batch and plan its pass on the host; arguments and errors as in ``forward``."""
        steps = self.solver == "rk4" and self.dynamics == "ode"
        config = SolverConfig(
            n_features=self.input_dim,
            time_scale=self.time_scale,
            longest_step=MAX_SCALED_STEP if steps else math.inf,
            longest_gap=MAX_SCALED_GAP,
            dtype=self.scaler.std.dtype,
        )
        return build_plan(times, values, observed, config, until)

    def run(self, plan: Plan) -> Tensor:
        """Encode a batch that this encoder, or one like it, has planned; as ``forward`` does."""
        device = self.scaler.std.device
        plan = plan.to(device)
        inputs = self.drop(functional.relu(self.read(self.inputs(plan))))  # (P, R)
        with full_precision(device):
            # Under autocast the layer's output is narrower than the weights.
            raw, final = self._run_steps(inputs.to(self.scaler.std.dtype), plan)  # (P, H), (B, H)
            states = self.norm(raw)
            if plan.ends is not None:
                final = self.norm(final.index_select(0, plan.ends))
        result = states.new_zeros(plan.shape[0] * plan.shape[1], self.hidden_dim)
        result = result.index_copy(0, plan.observation_index, states).view(*plan.shape, -1)
        if plan.ends is not None:
            result = torch.cat([result, final.unsqueeze(1)], dim=1)
        return self.drop(result)

    def drop(self, tensor: Tensor) -> Tensor:
        """Apply dropout in training."""
        return functional.dropout(tensor, self.dropout, self.training)

    def inputs(self, plan: Plan) -> Tensor:
        """Return what the input layer reads of each observation, (P, 4F + 3).

        For each feature its latest value as normal score, zero before the first; then the plan's
        time features.
        """
        return torch.cat([self.scaler(plan.last_value), plan.time_features], dim=1)

    @torch.compiler.disable  # a loop of another length in each batch
    def _run_steps(self, read: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Run all steps of a plan on the update's inputs ``read`` (P, R).

        Returns:
            The state after each observation (P, H), and the last state in each row (B, H).
        """
        field, update = cast(Any, self.field), cast(Any, self.update)
        stock = type(field) is VectorField and type(update) is nn.GRUCell and update.bias
        if stock and self.fused and self.solver == "rk4":
            weights = field.inner.weight, field.inner.bias, field.outer.weight
            return fused_states(plan, read, weights, update)
        state = read.new_zeros(plan.n_active[0], self.hidden_dim)
        steps = zip(
            plan.dt.split(plan.n_active),
            plan.rows.split(plan.n_observed),
            read.split(plan.n_observed),
            strict=True,
        )
        updated, end_states = [], []
        for dt, rows, inputs in steps:
            end_states.append(state[len(dt) :])
            state = self.advance(state[: len(dt)], dt)  # no time passes in the first step
            if len(rows):
                updated.append(update(inputs, state.index_select(0, rows)))
                state = state.index_copy(0, rows, updated[-1])
        return torch.cat(updated), torch.cat([state, *reversed(end_states)])

    def advance(self, state: Tensor, dt: Tensor) -> Tensor:
        """Return the states (n, H) after ``dt`` (n,), in units of ``time_scale``.

        Raises:
            RunFault: an adaptive solver cannot follow the states.
        """
        if self.dynamics == "none":
            return state
        if self.dynamics == "decay":
            decayed: Tensor = self.field(state, dt)
            return decayed
        if self.solver == "rk4":
            return rk4_step(self.field, state, dt)
        if not dt.any():  # an adaptive solver needs an interval
            return state
        scale = dt.unsqueeze(1)  # with s in [0, 1] and dh/ds = dt f(h) all rows end at 1
        try:
            trajectory: Tensor = torchdiffeq.odeint(
                lambda _, h: scale * self.field(h),
                state,
                state.new_tensor([0.0, 1.0]),
                rtol=self.rtol,
                atol=self.atol,
                method=self.solver,
            )
        except AssertionError as error:  # the solver's step has become zero
            problem = f"the solver {self.solver} cannot follow the states: train with rk4"
            raise RunFault(problem) from error
        return trajectory[1]
