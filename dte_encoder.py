"""ClinicalODERNN: an encoder for irregularly sampled clinical series. Knows tensors only.

Between two observations the hidden state follows an ordinary differential equation, at an
observation a GRU cell updates it::

    dh/dt = W2 tanh(W1 h + b1)             for the hours that pass
    h     = GRU(relu(W inputs of the observation), h)

Source: Rubanova, Chen, Duvenaud 2019, "Latent ODEs for Irregularly-Sampled Time Series".

Every patient is integrated over his own gaps although the whole batch advances together. Time is
cut into ticks: a gap of patient b becomes as many ticks as his own solver steps need, the last of
them ends with the observation. In each tick all patients who have one left take a step of their
own length, and those who arrive at an observation are updated. So no patient waits for another's
longer gap, and nobody's steps depend on whom he shares a batch with.

What enters an observation is, of each feature, its latest value, whether it was measured now, and
how long ago it was before: a value carried forward never passes for a new one.

First the network, then its ticks: planning, running, derivative.

Letters: B patients, L observations of the longest, P of all together, F features, H state, N ticks
of all patients together, M = N - B of them in which time passes, n patients in one tick.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_SCALED_STEP = 0.1
"""Longest rk4 step in units of ``time_scale``: 1e-8 from a tight solve with fresh weights, 2e-4
with three times as lively ones."""

MAX_SCALED_GAP = 10_000.0
"""A longer gap (82 years at 72 hours) would take over 100,000 steps: it is refused."""

MAX_Z_SCORE = 8.0
"""Standardised values are cut here: one mistyped laboratory value must not swamp a state."""

INPUTS_A_FEATURE, TIME_INPUTS = 3, 3
"""Per observation: of each feature latest value, mask and hours since it was last measured; of all
together gap, time since first, count so far."""

INPUT_WIDTH = 64
"""Width of the layer in front of the update: with many features it, not the GRU, grows."""

MOST_ALONE = 32
"""Up to so many patients a pass runs on one thread: two take 3 to 20 % longer with 16 of them, the
more the busier the machine, as each product of a few rows wakes a thread."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt's parameters, as glibc's malloc.h has them."""

KEPT_BYTES, LARGEST_KEPT = 2**27, 2**25
"""Bytes of freed memory that are kept, and of the largest piece: glibc allows 32 MiB at most."""

FIXED_STEP_SOLVERS = (
    *("euler", "midpoint", "heun2", "heun3"),
    *("explicit_adams", "implicit_adams", "fixed_adams"),
)
"""Methods of torchdiffeq that need a step length; the others choose their own."""

Advance = Callable[[Tensor, Tensor], Tensor]
"""Carries states (n, H) over spans (n,) in units of ``time_scale``; a zero span changes nothing."""


class VectorField(nn.Module):
    """The autonomous right-hand side f(h) = W2 tanh(W1 h + b1).

    Bounded by |W2|, so a state can drift but never blows up within a finite gap.
    """

    def __init__(self, hidden_dim: int) -> None:
        """Make the two layers, ``hidden_dim`` wide."""
        super().__init__()
        self.inner = nn.Linear(hidden_dim, hidden_dim)
        self.outer = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        """Give dh/dt in 1/``time_scale`` for ``state`` (n, H), same shape."""
        result: Tensor = self.outer(torch.tanh(self.inner(state)))
        return result

    def mixing(self) -> Tensor:
        """Give the transpose of W1 W2, (H, H): u = W1 h + b1 follows u' = W1 W2 tanh(u)."""
        return (self.inner.weight @ self.outer.weight).t()

    def rk4(self) -> Advance:
        """Give the classical Runge-Kutta step, each row's as long as its own span.

        The stages run in u = W1 h + b1, where u' = (W1 W2) tanh(u): one matrix product a stage
        instead of two, and the product W1 W2 is made once for all steps.

        Source: Kutta 1901, the 1/6, 2/6, 2/6, 1/6 rule.
        """
        mixing = self.mixing()
        back = self.outer.weight.t()

        def step(state: Tensor, span: Tensor) -> Tensor:
            """Advance states (n, H) by spans (n,)."""
            span = span.unsqueeze(1)
            half = span / 2
            u = self.inner(state)
            k1 = torch.tanh(u)
            k2 = torch.tanh(torch.addmm(u, k1 * half, mixing))
            k3 = torch.tanh(torch.addmm(u, k2 * half, mixing))
            k4 = torch.tanh(torch.addmm(u, k3 * span, mixing))
            return torch.addmm(state, (k1 + 2 * (k2 + k3) + k4) * (span / 6), back)

        return step


class ClinicalODERNN(nn.Module):
    """Turn irregular series into one state per observation.

    Args:
        input_dim: number of features F.
        hidden_dim: width H of the state.
        time_scale: hours that count as one unit of the equation's time.
        solver: ``rk4`` is the fast fixed-step path of this module; any other name goes to
            ``torchdiffeq.odeint`` on rescaled time (``dopri5``, ``bosh3``, ``midpoint``, ...).
        rtol: relative tolerance of adaptive solvers.
        atol: absolute tolerance of adaptive solvers.

    Raises:
        ValueError: a size that is not positive or a solver that torchdiffeq does not know.
    """

    value_mean: Tensor
    value_std: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 64,
        *,
        time_scale: float = 72.0,
        solver: str = "rk4",
        rtol: float = 1e-3,
        atol: float = 1e-4,
    ) -> None:
        """Make the layers; weights come from torch's global generator."""
        super().__init__()
        if input_dim < 1 or hidden_dim < 1:
            raise ValueError(f"input_dim {input_dim} and hidden_dim {hidden_dim} must be positive")
        if not 0 < time_scale < float("inf"):
            raise ValueError(f"time_scale must be a positive number of hours, got {time_scale}")
        check_solver(solver)
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.time_scale = time_scale
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.field = VectorField(hidden_dim)
        self.read = nn.Linear(INPUTS_A_FEATURE * input_dim + TIME_INPUTS, INPUT_WIDTH)
        self.update = nn.GRUCell(INPUT_WIDTH, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.register_buffer("value_mean", torch.zeros(input_dim))
        self.register_buffer("value_std", torch.ones(input_dim))

    @torch.no_grad()
    def fit_normalizer(self, values: Tensor, observed: Tensor) -> None:
        """Set mean and standard deviation of each feature from the training part.

        Args:
            values: (..., F) in raw units.
            observed: (..., F) bool; only these entries count.

        Raises:
            ValueError: wrong shapes or dtype, nothing observed at all, or a value that is observed
                but not finite.
        """
        if values.shape != observed.shape or values.shape[-1] != self.input_dim:
            raise ValueError(
                f"values {tuple(values.shape)} and observed {tuple(observed.shape)} must be "
                f"equal and end with input_dim {self.input_dim}"
            )
        if observed.dtype != torch.bool:
            raise ValueError(f"observed must be bool, got {observed.dtype}")
        flat = values.reshape(-1, self.input_dim).double()
        mask = observed.reshape(-1, self.input_dim)
        count = mask.sum(0)
        if not bool(count.any()):
            raise ValueError("nothing was observed in the training part")
        bad = mask & ~torch.isfinite(flat)
        _refuse(on_host(bad[None]), "value {value} is observed but not finite", on_host(flat[None]))
        count = count.clamp(min=1)  # a feature that nobody measured is masked: any scale will do
        mean = torch.where(mask, flat, 0.0).sum(0) / count
        std = (torch.where(mask, flat - mean, 0.0).square().sum(0) / count).sqrt()
        # A constant feature stays at zero; rounding alone leaves it a spread of 1e-16 of its mean.
        std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)
        self.value_mean.copy_(mean)
        self.value_std.copy_(std)

    def forward(
        self, times: Tensor, values: Tensor, observed: Tensor, plan: Plan | None = None
    ) -> Tensor:
        """Encode a padded batch.

        Args:
            times: (B, L) hours, not decreasing over a patient's observations.
            values: (B, L, F) raw units; what stands at unobserved places does not matter.
            observed: (B, L, F) bool; rows that are all False are padding behind the series.
            plan: from ``plan`` with the same batch, which is not checked again; made here if it was
                not made ahead.

        Returns:
            (B, L, H) layer-normalised state after each observation, zero in padding rows.

        Raises:
            ValueError: wrong shapes, decreasing times, a value that is not finite at an observed
                place, a patient without observation; a derivative by times; a plan of another size
                or of an encoder that counts time otherwise.
        """
        if plan is None:
            plan = self.plan(times, values, observed)
        else:
            self._refuse_shapes(times, values, observed)
            self._refuse_plan(plan, observed)
        plan = plan.to(times.device)
        inputs = self.inputs(widened(values), plan)
        read = functional.relu(self.read(inputs))  # (P, INPUT_WIDTH)
        states = self.norm(self._run(read, plan))  # (P, H)
        result = states.new_zeros(times.numel(), self.hidden_dim)
        return result.index_copy(0, plan.places, states).view(*times.shape, self.hidden_dim)

    def plan(self, times: Tensor, values: Tensor, observed: Tensor) -> Plan:
        """Check a batch, and plan all that needs neither weights nor values.

        All of it is made on the host, where it costs a third. On CUDA it is best made ahead, from
        tensors that are still on the host: then nothing waits for the device.

        Args:
            times: as in ``forward``, which says too what is refused.
            values: likewise.
            observed: likewise.
        """
        self._refuse_shapes(times, values, observed)
        seen = on_host(observed)
        present: NDArray[np.bool_] = np.logical_or.reduce(seen, axis=2)
        hours, clock = on_host(widened(times)), self._clock
        gaps = self._gaps(hours, on_host(widened(values)), seen, present)
        parts, spans = present.astype(np.int64), np.zeros(present.shape)
        ticks = np.maximum(np.ceil(gaps / clock.longest), 1).astype(np.int64)
        parts[:, 1:] *= ticks
        spans[:, 1:] = gaps / (ticks * clock.time_scale)
        return make_plan(parts, spans, hours, seen, clock)

    @property
    def _clock(self) -> Clock:
        """How this encoder counts time; torchdiffeq divides a gap by itself."""
        longest = MAX_SCALED_STEP * self.time_scale if self.solver == "rk4" else math.inf
        return Clock(self.time_scale, longest, self.value_mean.dtype)

    def _run(self, read: Tensor, plan: Plan) -> Tensor:
        """Give the state (P, H) after each observation.

        Args:
            read: (P, INPUT_WIDTH) what the update reads, tick after tick.
            plan: the ticks.
        """
        field, update = self.field, self.update
        if self.solver != "rk4":
            return self._run_plainly(read, plan, self._odeint)
        with in_full_precision(read.device), one_thread(plan.small):
            weights = (
                *(field.inner.weight, field.inner.bias, field.outer.weight),
                *(update.weight_ih, update.bias_ih, update.weight_hh, update.bias_hh),
            )
            wide = read.to(update.weight_hh.dtype)  # under autocast it is narrower
            states: Tensor = Ticks.apply(plan, torch.is_grad_enabled(), wide, *weights)
            return states.to(read.dtype)

    def _run_plainly(self, read: Tensor, plan: Plan, advance: Advance) -> Tensor:
        """Alternate equation and update as they are written, for any solver; see ``_run``."""
        gates = functional.linear(read, self.update.weight_ih, self.update.bias_ih)
        state = gates.new_zeros(plan.sizes[0], self.hidden_dim)
        states = []
        span = plan.spans.split(plan.sizes)
        for tick, (gate, rows) in enumerate(by_tick(plan.arrivals, gates, plan.rows)):
            if tick:  # nothing passes before the first
                state = advance(state[: plan.sizes[tick]], span[tick])
            if len(rows) == len(state):  # always so with torchdiffeq
                state = self._observe(gate, state)
                states.append(state)
            elif len(rows):
                states.append(self._observe(gate, state.index_select(0, rows)))
                state = state.index_copy(0, rows, states[-1])
        return torch.cat(states)

    def _odeint(self, state: Tensor, span: Tensor) -> Tensor:
        """Integrate with torchdiffeq: with s in [0, 1] and dh/ds = span f(h) all rows end at 1."""
        import torchdiffeq  # half a second of start-up that the fast path does not need

        longest = float(span.max())
        if longest == 0:  # adaptive solvers would still take their first steps
            return state
        scale = span.unsqueeze(1)
        options = {}
        if self.solver in FIXED_STEP_SOLVERS:
            options["step_size"] = 1 / max(1, -(-longest // MAX_SCALED_STEP))
        trajectory: Tensor = torchdiffeq.odeint(
            lambda _, h: scale * self.field(h),
            state,
            state.new_tensor([0.0, 1.0]),
            rtol=self.rtol,
            atol=self.atol,
            method=self.solver,
            options=options or None,
        )
        return trajectory[1]

    def _observe(self, gate: Tensor, state: Tensor) -> Tensor:
        """Apply the GRU cell with its input product ``gate`` (n, 3H) at hand."""
        own = functional.linear(state, self.update.weight_hh, self.update.bias_hh)
        width = 2 * self.hidden_dim
        reset, keep = torch.sigmoid(gate[:, :width] + own[:, :width]).chunk(2, dim=1)
        proposal = torch.tanh(torch.addcmul(gate[:, width:], reset, own[:, width:]))
        return torch.lerp(proposal, state, keep)

    def inputs(self, values: Tensor, plan: Plan) -> Tensor:
        """Give what the input layer reads of each observation, (P, 3F + 3), tick after tick.

        Of each feature the latest value so far as z-score, zero before the first, then what the
        plan tells: the mask stands beside the carried value, so nothing that is old passes for new.

        Args:
            values: (B, L, F) raw units.
            plan: of this batch, on its device.
        """
        latest = values.take(plan.latest).to(plan.told.dtype)
        z = (latest - self.value_mean) / self.value_std
        carried = torch.where(plan.ever, z, 0.0).clamp(-MAX_Z_SCORE, MAX_Z_SCORE)
        return torch.cat([carried, plan.told], dim=1)

    def _refuse_plan(self, plan: Plan, observed: Tensor) -> None:
        """Refuse a plan that cannot be of this batch and this encoder."""
        if plan.shape != observed.shape:
            raise ValueError(f"a plan of {plan.shape} for a batch of {tuple(observed.shape)}")
        if plan.clock != self._clock:
            raise ValueError(f"a plan of {plan.clock}, this encoder has {self._clock}")

    def _refuse_shapes(self, times: Tensor, values: Tensor, observed: Tensor) -> None:
        """Refuse tensors that do not fit each other, and times that ask for a derivative."""
        if times.ndim != 2 or 0 in times.shape:
            raise ValueError(f"times must be (B, L) and not empty, got {tuple(times.shape)}")
        shape = (*times.shape, self.input_dim)
        for name, tensor in (("values", values), ("observed", observed)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if observed.dtype != torch.bool:
            raise ValueError(f"observed must be bool, got {observed.dtype}")
        if times.requires_grad and torch.is_grad_enabled():
            raise ValueError("times have no derivative here: what is planned of them is constant")

    def _gaps(
        self,
        times: NDArray[Any],
        values: NDArray[Any],
        observed: NDArray[np.bool_],
        present: NDArray[np.bool_],
    ) -> NDArray[Any]:
        """Give the hours between observations, (B, L - 1), zero in padding.

        Raises:
            ValueError: a series has no meaning; the first fault with its place.
        """
        with np.errstate(invalid="ignore", over="ignore"):  # times may be no numbers, or endless
            gaps = np.where(present[:, 1:], times[:, 1:] - times[:, :-1], 0.0)
        # A gap that is no number answers no.
        legal = gaps.min(initial=0) >= 0 and gaps.max(initial=0) <= MAX_SCALED_GAP * self.time_scale
        filled = present[:, 0].all() and (present[:, :-1] >= present[:, 1:]).all()
        finite = np.isfinite(times[:, 0]).all() and np.isfinite(values[observed]).all()
        if not (legal and filled and finite):
            self._refuse_series(times, values, observed)
        return gaps

    def _refuse_series(
        self, times: NDArray[Any], values: NDArray[Any], observed: NDArray[np.bool_]
    ) -> None:
        """Raise for the first fault with its place."""
        present: NDArray[np.bool_] = np.logical_or.reduce(observed, axis=2)
        ahead = np.insert(present[:, :-1], 0, True, axis=1)  # is the place ahead real?
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.diff(times, axis=1, prepend=times[:, :1])
        _refuse(~present[:, :1], "no observation at {place}: padding stands behind a series")
        _refuse(present & ~ahead, "padding in front of the observation at {place}")
        _refuse(present & ~np.isfinite(times), "time {value} at {place} is not finite", times)
        _refuse(present & (gaps < 0), "time {value} h at {place} is before the one ahead", times)
        endless = present & (gaps > MAX_SCALED_GAP * self.time_scale)
        _refuse(endless, "the gap of {value} h to {place} needs a larger time_scale", gaps)
        bad = observed & ~np.isfinite(values)
        _refuse(bad, "value {value} at {place} is observed but not finite", values)


def widened(tensor: Tensor) -> Tensor:
    """Give half precision as float32: NumPy knows one kind of it, and hours need more."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast where the caller is inside one.

    To leave none as well takes 1.5 % of a pass at batch 16, which is what that size has to spare.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def keep_freed_memory() -> None:
    """Let glibc keep what a pass frees for the next one, in the whole process; else do nothing.

    On its own it gives some megabytes back to the system after each pass, which hands them out
    again page by page, cleared: up to a quarter of an epoch at batch 256. Counts more than the
    ``MALLOC_`` variables of the environment.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Let torch work on one thread where that is ``wanted``: others would only disturb.

    A thread of Python that uses torch for the first time meanwhile takes this number over.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def on_host(tensor: Tensor) -> NDArray[Any]:
    """Give the same numbers for NumPy, on the CPU in the same memory: nothing may write there."""
    array: NDArray[Any] = tensor.numpy(force=True)
    return array


def _refuse(bad: NDArray[np.bool_], message: str, source: NDArray[Any] | None = None) -> None:
    """Raise with the first True place of ``bad`` (B, L) or (B, L, F), and what stands there."""
    if not bad.any():
        return
    place = np.argwhere(bad)[0].tolist()
    value = None if source is None else source[tuple(place)].item()
    axes = zip(("patient", "observation", "feature"), place, strict=False)
    raise ValueError(message.format(value=value, place=", ".join(f"{n} {i}" for n, i in axes)))


def check_solver(solver: str) -> None:
    """Ask torchdiffeq itself, on a problem of one number, whether it knows the method.

    Raises:
        ValueError: it does not, and the message lists those it knows; or it cannot train.
    """
    if solver == "rk4":
        return
    import torchdiffeq

    if solver == "scipy_solver":
        raise ValueError("solver 'scipy_solver' gives no gradients: nothing could be learned")
    try:
        torchdiffeq.odeint(lambda _, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method=solver)
    except ValueError as error:
        raise ValueError(f"unknown solver {solver!r}: {error}") from error


# --------------------------------------------------------------------------- ticks


class Clock(NamedTuple):
    """How an encoder counts time.

    time_scale: hours that are one unit; longest: hours that a tick may take; dtype: of the numbers.
    """

    time_scale: float
    longest: float
    dtype: torch.dtype


class Plan(NamedTuple):
    """Who does what in which tick. In all ticks the patients with most ticks are the first rows.

    Observations stand tick after tick, and within a tick by row.

    Attributes:
        shape: of the batch, (B, L, F).
        clock: of the encoder.
        sizes: how many patients take part in tick 0, 1, 2, ...; in tick 0 nothing passes yet.
        arrivals: how many of them arrive at an observation.
        rows: (P,) which rows these are.
        spans: (N,) how far each patient goes, tick after tick, in units of ``time_scale``.
        places: (P,) where each observation stands in the flattened (B * L).
        latest: (P, F) where each feature's latest value stands in the flattened (B * L * F).
        ever: (P, F) bool, whether there is one.
        told: (P, 2F + 3) what is read beside the values: of each feature whether it was measured
            now, and log hours since it was before now (zero, where never); then log gap, log hours
            since the first observation, log count.
    """

    shape: tuple[int, ...]
    clock: Clock
    sizes: list[int]
    arrivals: list[int]
    rows: Tensor
    spans: Tensor
    places: Tensor
    latest: Tensor
    ever: Tensor
    told: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Plan:
        """Give the same plan with its tensors on a device, as ``Tensor.to`` does."""
        if self.rows.device == torch.device(device):
            return self
        moved: Any = (
            part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part
            for part in self
        )
        return Plan(*moved)

    @property
    def small(self) -> bool:
        """Whether its products are too small for several threads."""
        return self.sizes[0] <= MOST_ALONE and self.rows.device.type == "cpu"

    def numel(self) -> int:
        """Give how many numbers its tensors hold."""
        return sum(part.numel() for part in self if isinstance(part, Tensor))


def make_plan(
    parts: NDArray[np.int64],
    spans: NDArray[np.float64],
    hours: NDArray[Any],
    seen: NDArray[np.bool_],
    clock: Clock,
) -> Plan:
    """Plan the ticks of a batch, and what is read of each observation beside its values.

    Args:
        parts: (B, L) how many ticks the way to each observation takes, zero in padding.
        spans: (B, L) how long each of them is, in units of ``time_scale``.
        hours: (B, L) when each observation was.
        seen: (B, L, F) what was measured.
        clock: how time is counted.
    """
    ends = parts.cumsum(axis=1)  # in ticks of one's own
    patients = np.argsort(-ends[:, -1], kind="stable")  # row by row of the ticks
    ends, parts, spans = ends[patients], parts[patients], spans[patients]
    rows, steps = parts.nonzero()  # (P,) each, patient after patient
    arrival = ends[rows, steps] - 1
    # The same for each tick (N,).
    count = ends[:, -1]
    number = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    spans = np.repeat(spans[rows, steps], parts[rows, steps])
    # From patient after patient to tick after tick.
    spans = spans[np.argsort(number, kind="stable")]
    order = np.argsort(arrival, kind="stable")
    rows, steps = rows[order], steps[order]
    places, latest, ever, told = what_is_read(patients[rows], steps, hours, seen, clock)
    return Plan(
        seen.shape,
        clock,
        np.bincount(number).tolist(),
        np.bincount(arrival).tolist(),
        torch.from_numpy(rows),
        torch.from_numpy(spans).to(clock.dtype),
        torch.from_numpy(places),
        torch.from_numpy(latest),
        torch.from_numpy(ever),
        torch.from_numpy(told).to(clock.dtype),
    )


def what_is_read(
    patients: NDArray[np.int64],
    steps: NDArray[np.int64],
    hours: NDArray[Any],
    seen: NDArray[np.bool_],
    clock: Clock,
) -> tuple[NDArray[Any], ...]:
    """Give what ``Plan`` calls places, latest, ever and told, of some observations.

    Args:
        patients: (P,) whose they are.
        steps: (P,) which of his.
        hours: (B, L) when each observation was.
        seen: (B, L, F) what was measured.
        clock: how time is counted.
    """
    size, length, features = seen.shape
    number = np.arange(length)
    # At which step each feature was measured last, then any of them, then the first of all: one row
    # more than steps, so that what was before a step stands in front of what is at it; -1 is never.
    last = np.full((size, length + 1, features + 2), -1)
    measured = np.where(seen, number[:, None], -1)
    last[:, 1:, :features] = np.maximum.accumulate(measured, axis=1, out=measured)
    last[:, 1:, features] = number
    last[:, 1:, features + 1] = 0
    last = last.reshape(-1, features + 2)
    first, step = (patients * length)[:, None], steps[:, None]
    places = (first + step).ravel()
    ahead = places + patients  # of the row that an observation has in ``last``
    before, now = last[ahead], last[ahead + 1, :features]
    hours = hours.ravel()
    passed = hours[places][:, None] - hours[first + np.where(before < 0, step, before)]
    logs = np.log1p(passed, dtype=np.float64) / math.log1p(clock.time_scale)  # (P, F + 2)
    told = np.concatenate([now == step, logs, np.log1p(step)], axis=1)
    latest = (first + np.maximum(now, 0)) * features + np.arange(features)
    return places, latest, now >= 0, told


def by_tick(sizes: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors along their first axis into ticks; give all pieces of each tick."""
    # Not Tensor.split, whose Python around this call takes as long again.
    return list(zip(*(torch.split_with_sizes(each, sizes) for each in tensors), strict=True))


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

    tanh(x) is taken as 2 sigmoid(2x) - 1, the inner 2 being a factor of the products: torch's tanh
    goes through MKL's vector functions, which wake every thread and on AMD cost four times its
    sigmoid.

    Source: the discrete adjoint of a Runge-Kutta method, Hager 2000, "Runge-Kutta methods in
    optimal control and the transformed adjoint system"; the cell is that of ``nn.GRUCell``.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, learns: bool, read: Tensor, *weights: Tensor) -> Tensor:
        """Run over the ticks.

        Args:
            ctx: takes what the way back needs.
            plan: the ticks.
            learns: whether gradients are asked for at all; if not, nothing is kept for them.
            read: (P, R) what the cell reads.
            weights: W1, b1, W2, W_ih, b_ih, W_hh and b_hh.

        Returns:
            (P, H) state after each observation.
        """
        inner, bias, outer, into, into_bias, recurrent, recurrent_bias = weights
        learns = learns and any(ctx.needs_input_grad)
        first, *sizes = plan.sizes
        width = len(inner)
        spans = plan.spans[first:]
        mixing = inner @ outer
        turned = mixing.t(), inner.t(), outer.t(), recurrent.t()
        # The cell's products of what it reads need no state: one product for the whole batch.
        gates = torch.addmm(into_bias, read, into.t())
        cells, proposals = torch.empty_like(gates), 2 * gates[:, 2 * width :]
        entering, states = torch.empty_like(proposals), torch.empty_like(proposals)
        stages = gates.new_empty(5, sum(sizes) if learns else max(sizes, default=0), width)
        with torch.inference_mode():  # calls that autograd need not look at: 4 % of the time
            buffers = (
                iter(by_tick(sizes, *stages.unbind(), *_spread(spans, width)))
                if learns
                else ((*stages[:, : len(own)], *_spread(own, width)) for own in spans.split(sizes))
            )
            results = cells, entering, proposals, states
            _advance(plan, buffers, gates, (*turned, bias, recurrent_bias), results)
        if learns:
            ctx.plan = plan
            for_weights = mixing, inner, outer, into, recurrent
            ctx.save_for_backward(spans, read, cells, entering, proposals, stages, *for_weights)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Go back over the ticks; ``grad`` is (P, H)."""
        # A caller may be inside autocast.
        with in_full_precision(grad.device), one_thread(ctx.plan.small):
            return None, None, *_go_back(ctx.plan, grad, *ctx.saved_tensors)


def _advance(
    plan: Plan,
    buffers: Iterator[tuple[Tensor, ...]],
    gates: Tensor,
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    """Run over the ticks without a thought of derivatives; see ``Ticks``.

    Args:
        plan: the ticks.
        buffers: for each tick but the first, the five (n, H) that ``_solve`` fills, and how far
            each patient goes, as from ``_spread``.
        gates: (P, 3H) the cell's products of what it reads.
        weights: M, W1, W2 and W_hh, each transposed, then b1 and b_hh.
        results: (P, 3H) for r, z and n of the cell, then (P, H) each: for the state in front of an
            observation, twice the gates of n, which become the cell's proposal, and for the state
            after it.
    """
    mixing, inner, outer, recurrent, bias, recurrent_bias = weights
    cells, entering, proposals, states = results
    width = len(bias)
    solver = inner, bias, mixing, outer
    # Begins as what the cell's product is added to, ends as r, z and n.
    torch.add(gates, recurrent_bias, out=cells)
    both, n = cells.split_with_sizes([2 * width, width], dim=1)
    n.copy_(recurrent_bias[2 * width :])
    pieces = cells, both, *both.chunk(2, dim=1), n, entering, proposals, states
    updates = by_tick(plan.arrivals, plan.rows, *pieces)
    state, minus_one = gates.new_zeros(plan.sizes[0], width), gates.new_full((), -1.0)
    for tick, size in enumerate(plan.sizes):
        if tick:
            _solve(state[:size], *next(buffers), *solver)
        if plan.arrivals[tick]:
            _observe(state, recurrent, *updates[tick], minus_one)


def _go_back(plan: Plan, grad: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    """Give the gradients of what was read and of the weights, from those of the states (P, H)."""
    spans, read, cells, entering, proposals, stages, *weights = kept
    mixing, inner, outer, into, recurrent = weights
    first, *sizes = plan.sizes
    span, minus_half = _spread(spans, len(inner))
    stages, start = stages[:4], stages[4]
    # First what g is multiplied with; then d1 .. d4, each (M, H), and da, dr, dz, dn, g z.
    fields = torch.addcmul(stages, stages, stages, value=-1).mul_(span)
    cell = _cell_slopes(cells, entering, proposals)  # (P, 5, H)
    own = cell[:, 1:4].flatten(1)
    behind = torch.empty_like(start)
    with torch.inference_mode():
        steps = by_tick(sizes, *fields.unbind(), behind)
        updates = by_tick(plan.arrivals, plan.rows, grad, cell, own, cell[:, 4])
        solver = mixing, outer * (2 / 3), inner
        pull = grad.new_zeros(first, len(inner))  # g of each patient
        for tick in reversed(range(len(plan.sizes))):
            if plan.arrivals[tick]:
                here, given, factors, gates, through = updates[tick]
                factors.mul_(pull.index_select(0, here).add_(given).unsqueeze(1))
                pull.index_copy_(0, here, torch.addmm(through, gates, recurrent))
            if tick:
                _solve_back(pull[: plan.sizes[tick]], *steps[tick - 1], *solver)
    # What is left is one product for each weight.
    inside = fields[0]
    k = torch.addcmul(minus_half, stages, span)
    fields[3].mul_(2)  # u + 2M k3
    d_mixing = fields[1:].flatten(0, 1).t() @ k[:3].flatten(0, 1)
    moved = k[0].add_(k[3]).add_(k[1].add_(k[2]), alpha=2)
    d_inner = (inside.t() @ start).addmm_(d_mixing, outer.t())
    d_outer = torch.addmm(behind.t() @ moved, inner.t(), d_mixing, beta=1 / 3)
    d_recurrent = own.t() @ entering, own.sum(0)
    own[:, 2 * len(inner) :] = cell[:, 0]  # a's in place of n's: now they are those of the gates
    d_into = own.t() @ read, own.sum(0)
    return own @ into, d_inner, inside.sum(0), d_outer, *d_into, *d_recurrent


def _spread(spans: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Give spans (M,) as wide as the states, and -1/2 of them.

    For one column torch has no vector code: a product of three then takes 1.4 times as long with 5
    rows, 4 times with 900. Without a way back it is done tick by tick, for the memory.
    """
    wide = spans.unsqueeze(1).expand(-1, width).contiguous()
    return wide, wide / -2


def _solve(h: Tensor, *buffers: Tensor) -> None:
    """Take a step of rk4 with states h (n, H) in place, and keep its stages as sigmoids."""
    t1, t2, t3, t4, start, span, minus_half, inner, bias, mixing, back = buffers
    start.copy_(h)
    u = torch.addmm(bias, h, inner, beta=2, alpha=2)  # 2u
    torch.sigmoid(u, out=t1)
    k1 = torch.addcmul(minus_half, t1, span)  # c (2 sigmoid - 1)
    torch.addmm(u, k1, mixing, alpha=2, out=t2).sigmoid_()
    k2 = torch.addcmul(minus_half, t2, span)
    torch.addmm(u, k2, mixing, alpha=2, out=t3).sigmoid_()
    k3 = torch.addcmul(minus_half, t3, span)
    torch.addmm(u, k3, mixing, alpha=4, out=t4).sigmoid_()
    k4 = torch.addcmul(minus_half, t4, span)
    h.addmm_(k1.add_(k2, alpha=2).add_(k3, alpha=2).add_(k4), back, alpha=1 / 3)


def _solve_back(g: Tensor, *buffers: Tensor) -> None:
    """Carry g (n, H) in front of a step in place; d2 .. d4 and, as d1, the sum of all four stay."""
    d1, d2, d3, d4, behind, mixing, back, inner = buffers
    behind.copy_(g)
    e = torch.mm(g, back)  # 2e, and the factors lack a 2
    d4.mul_(e)
    d3.mul_(torch.addmm(e, d4, mixing, beta=2, alpha=4))
    d2.mul_(torch.addmm(e, d3, mixing, beta=2, alpha=2))
    others = torch.add(d2, d3).add_(d4)
    g.addmm_(torch.addcmul(others, d1, torch.addmm(e, d2, mixing, alpha=2), out=d1), inner)


def _observe(state: Tensor, product: Tensor, rows: Tensor, *buffers: Tensor) -> None:
    """Update those rows of ``state`` that arrive, and keep what led there."""
    cell, both, r, z, n, x, p, new, minus_one = buffers
    torch.index_select(state, 0, rows, out=x)
    cell.addmm_(x, product)
    both.sigmoid_()
    p.addcmul_(r, n, value=2).sigmoid_()
    torch.add(minus_one, p, alpha=2, out=p)
    torch.lerp(p, x, z, out=new)
    state.index_copy_(0, rows, new)


def _cell_slopes(cells: Tensor, entering: Tensor, proposals: Tensor) -> Tensor:
    """Give (P, 5, H): da, dr, dz, dn and g z without their g, for all observations."""
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
