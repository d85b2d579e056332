from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dte_encoder
from dte_encoder import MAX_Z_SCORE, ClinicalODERNN, Plan
from problems import (
    CONSTANT_DRIFT,
    DRIFT,
    PROBLEMS,
    SATURATING_DECAY,
    Problem,
    let_the_equation_alone_decide,
)

FIXED_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
MULTISTEP = {"explicit_adams": 1e-2, "implicit_adams": 1e-5, "fixed_adams": 1e-5}
"""Method: error on the saturating decay in steps of 0.1."""

HOURS_A_YEAR = 24.0 * 365.25

Batch = tuple[Tensor, Tensor, Tensor]


def make_encoder(
    input_dim: int = 2, hidden_dim: int = 6, *, seed: int = 0, gain: float = 2.0, **kwargs: Any
) -> ClinicalODERNN:
    """A float64 encoder with livelier dynamics than a fresh one, so that faults show."""
    torch.manual_seed(seed)
    encoder = ClinicalODERNN(input_dim, hidden_dim, **{"time_scale": 10.0, **kwargs}).double()
    with torch.no_grad():
        for parameter in encoder.field.parameters():
            parameter.mul_(gain)
    return encoder


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


def gradients(encoder: ClinicalODERNN, batch: Batch) -> dict[str, Tensor]:
    """Derivatives of a random combination of the states (their sum would be constant)."""
    encoder.zero_grad()
    states = encoder(*batch)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    (states * weight.to(states)).sum().backward()
    found = {}
    for name, parameter in encoder.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def assert_same_function(encoder: ClinicalODERNN, left: Batch, right: Batch) -> None:
    torch.testing.assert_close(encoder(*left), encoder(*right), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradients(encoder, left), gradients(encoder, right), rtol=0, atol=1e-12
    )


def plain_states(encoder: ClinicalODERNN, batch: Batch) -> list[Tensor]:
    """The model as its definition says, patient by patient with torch's own cell: slow, obvious."""
    result = []
    scale = encoder.time_scale
    for times, values, observed in zip(*batch, strict=True):
        length = int(observed.any(dim=1).sum())
        state = torch.zeros(1, encoder.hidden_dim, dtype=torch.float64)
        rows = []
        for i in range(length):
            gap = float(times[i] - times[i - 1]) if i else 0.0
            if gap > 0:
                moments = torch.tensor([0.0, gap / scale], dtype=torch.float64)
                state = torchdiffeq.odeint(
                    lambda _, h: encoder.field(h), state, moments, rtol=1e-11, atol=1e-12
                )[1]
            carried, ages = [], []
            for f in range(encoder.input_dim):
                seen = [k for k in range(i + 1) if observed[k, f]]
                earlier = [k for k in seen if k < i]
                latest = float(values[seen[-1], f]) if seen else float(encoder.value_mean[f])
                carried.append((latest - encoder.value_mean[f]) / encoder.value_std[f])
                hours = float(times[i] - times[earlier[-1]]) if earlier else 0.0
                ages.append(math.log1p(hours) / math.log1p(scale))
            unit = math.log1p(scale)
            clock = [
                math.log1p(gap) / unit,
                math.log1p(times[i] - times[0]) / unit,
                math.log(i + 1),
            ]
            row = torch.tensor([*carried, *observed[i], *ages, *clock], dtype=torch.float64)
            state = encoder.update(encoder.read(row.unsqueeze(0)).relu(), state)
            rows.append(encoder.norm(state))
        result.append(torch.cat(rows))
    return result


def evolve(encoder: ClinicalODERNN, state: Tensor, gap: Tensor) -> Tensor:
    """Carry states over gaps in the steps that the encoder itself would take."""
    if encoder.solver != "rk4":
        return encoder._odeint(state, gap)
    step = encoder.field.rk4()
    parts = torch.ceil(gap / dte_encoder.MAX_SCALED_STEP).clamp(min=1)
    for taken in range(int(parts.max())):
        state = step(state, gap / parts * (parts > taken))
    return state


# ---------------------------------------------------------------- dynamics with closed forms


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_evolve_gives_the_closed_form_over_each_rows_own_gap(problem: Problem, solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=2), solver)
    problem.install(encoder.field)
    start = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.5, 0.7], [0.2, 0.1]], dtype=torch.float64)
    gap = torch.tensor([0.0, 0.03, 0.77, 2.5], dtype=torch.float64)
    result = evolve(encoder, start, gap)
    exact = problem.solution(start, gap.unsqueeze(1))
    torch.testing.assert_close(result, exact, rtol=0, atol=2e-5 if solver == "rk4" else 1e-8)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_forward_gives_the_closed_form_at_irregular_times(problem: Problem, solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=2), solver)
    problem.install(encoder.field)
    let_the_equation_alone_decide(encoder)
    times, _, observed = make_batch(lengths=(6, 2, 4, 1))
    values = torch.randn_like(times).unsqueeze(2).expand(-1, -1, 2).clone()
    observed[:, 0] = True
    states = encoder(times, values, observed)

    elapsed = ((times - times[:, :1]) / encoder.time_scale).unsqueeze(2)
    for i, row in enumerate(states):
        length = int(observed[i].any(dim=1).sum())
        start = torch.tanh(values[i, :1]).expand(length, -1)
        exact = problem.solution(start, elapsed[i, :length])
        torch.testing.assert_close(
            row[:length], exact, rtol=0, atol=2e-5 if solver == "rk4" else 1e-8
        )


def test_the_intervals_of_times_0_1_3_6_are_1_2_3() -> None:
    encoder = make_encoder(hidden_dim=2, time_scale=1.0)
    CONSTANT_DRIFT.install(encoder.field)
    let_the_equation_alone_decide(encoder)
    times = torch.tensor([[0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)
    states = encoder(times, torch.zeros(1, 4, 2), torch.ones(1, 4, 2, dtype=torch.bool))
    torch.testing.assert_close(states[0], times.t() * DRIFT, rtol=0, atol=1e-14)


TWO_PATIENTS = torch.tensor([[5.0, 9.0, 0.0, 0.0], [0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)


def two_patients() -> Batch:
    """One patient with times 5, 9 and another with 0, 1, 3, 6."""
    observed = torch.ones(2, 4, 2, dtype=torch.bool)
    observed[0, 2:] = False
    return TWO_PATIENTS, torch.zeros(2, 4, 2), observed


def test_each_gap_reaches_torchdiffeq_once_in_units_of_the_time_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(time_scale=2.0, solver="dopri5")
    seen: list[list[float]] = []
    original = encoder._odeint

    def recording(state: Tensor, span: Tensor) -> Tensor:
        seen.append(span.tolist())
        return original(state, span)

    monkeypatch.setattr(encoder, "_odeint", recording)
    encoder(*two_patients())
    assert seen == [[0.5, 2.0], [1.0], [1.5]]


def test_rk4_takes_no_more_steps_than_each_patients_own_gaps_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(time_scale=2.0)
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", 0.6)
    batch = two_patients()
    plan = encoder.plan(*batch)
    # The second patient leads: gaps 0.5, 1.0, 1.5 in 1, 2, 3 steps; the first has 2.0 in 4.
    assert plan.sizes == [2, 2, 2, 2, 2, 1, 1]
    spans = plan.spans.split(plan.sizes)
    assert [span[0].item() for span in spans] == [0.0] + [0.5] * 6
    assert [span[1].item() for span in spans[:5]] == [0.0] + [0.5] * 4
    # Observations 4 to 7 are the second patient's, in row 0; they come after 0, 1, 3, 6 steps.
    assert plan.arrivals == [2, 1, 0, 1, 1, 0, 1]
    assert plan.rows.tolist() == [0, 1, 0, 0, 1, 0]
    assert plan.places.tolist() == [4, 0, 5, 6, 1, 7]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_two_gaps_lead_where_their_sum_leads(problem: Problem) -> None:
    encoder = make_encoder(hidden_dim=2)
    problem.install(encoder.field)
    start = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    first, second = torch.tensor([[0.4], [0.9]], dtype=torch.float64)
    halfway = evolve(encoder, start, first)
    torch.testing.assert_close(
        evolve(encoder, halfway, second), evolve(encoder, start, first + second), rtol=0, atol=2e-5
    )


# ---------------------------------------------------------------- solvers


def solver_error(solver: str, tolerance: float = 1e-6) -> float:
    """Largest distance from the closed form of the saturating decay."""
    encoder = same_weights(make_encoder(hidden_dim=2), solver, tolerance)
    SATURATING_DECAY.install(encoder.field)
    start = torch.tensor([[1.0, 2.0], [-0.5, 1.5]], dtype=torch.float64)
    gap = torch.tensor([1.6, 0.8], dtype=torch.float64)
    exact = SATURATING_DECAY.solution(start, gap.unsqueeze(1))
    return float((evolve(encoder, start, gap).detach() - exact).abs().max())


@pytest.mark.parametrize(("solver", "order"), FIXED_STEP.items())
def test_halving_the_step_of_a_fixed_step_solver_shows_its_order(
    solver: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    for step in (0.1, 0.05):
        monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", step)
        errors.append(solver_error(solver))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_adaptive_solver_obeys_its_tolerances(solver: str) -> None:
    loose, tight = solver_error(solver, 1e-4), solver_error(solver, 1e-6)
    assert loose < 3e-2
    assert tight < 3e-4
    assert tight < loose / 10


@pytest.mark.parametrize(("solver", "bound"), MULTISTEP.items())
def test_a_multistep_solver_takes_short_steps(solver: str, bound: float) -> None:
    assert solver_error(solver) < bound


@pytest.mark.parametrize("solver", [*FIXED_STEP, *ADAPTIVE, *MULTISTEP])
def test_every_solver_approaches_the_same_states_and_gradients(solver: str) -> None:
    encoder = make_encoder(gain=1.0)
    batch = make_batch()
    reference, other = same_weights(encoder, "dopri5"), same_weights(encoder, solver, 1e-6)
    tolerance = 2e-2 if solver == "euler" else 2e-3
    torch.testing.assert_close(other(*batch), reference(*batch), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        gradients(other, batch), gradients(reference, batch), rtol=0, atol=10 * tolerance
    )


def test_rk4_agrees_with_a_tight_dopri5_in_states_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(gain=1.0)
    batch = make_batch(lengths=(8, 3, 5))
    reference = same_weights(encoder, "dopri5", 1e-10)
    torch.testing.assert_close(encoder(*batch), reference(*batch), rtol=0, atol=2e-5)
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", 0.01)
    torch.testing.assert_close(encoder(*batch), reference(*batch), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        gradients(encoder, batch), gradients(reference, batch), rtol=0, atol=1e-7
    )


def test_an_untouched_encoder_of_full_width_agrees_with_dopri5_at_1e_8() -> None:
    torch.manual_seed(0)
    encoder = ClinicalODERNN(1).double()
    times = torch.tensor([[0.0, 2.0, 9.0, 30.0, 47.0]], dtype=torch.float64)
    values = torch.randn(1, 5, 1, dtype=torch.float64)
    batch = times, values, torch.ones_like(values, dtype=torch.bool)
    reference = same_weights(encoder, "dopri5", 1e-10)
    torch.testing.assert_close(encoder(*batch), reference(*batch), rtol=0, atol=1e-8)


# ---------------------------------------------------------------- the model as defined


def test_states_are_those_of_the_definition_patient_by_patient() -> None:
    encoder = make_encoder(gain=1.0)
    batch = make_batch(lengths=(6, 1, 4, 6))
    encoder.fit_normalizer(batch[1] * 3 + 5, batch[2])
    batch = batch[0], batch[1] * 3 + 5, batch[2]
    states = encoder(*batch)
    for i, expected in enumerate(plain_states(encoder, batch)):
        torch.testing.assert_close(states[i, : len(expected)], expected, rtol=0, atol=1e-6)
        assert torch.equal(states[i, len(expected) :], torch.zeros_like(states[i, len(expected) :]))


@pytest.mark.parametrize("solver", ["rk4", "midpoint"])
def test_gradients_of_all_parameters_are_right(solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=3), solver)
    times, values, observed = make_batch(lengths=(3, 1, 2))
    values = torch.where(observed, values, torch.nan)
    names = [name for name, _ in encoder.named_parameters()]
    assert len(names) == 11

    def states(*parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(
            encoder, dict(zip(names, parameters, strict=True)), (times, values, observed)
        )
        return result

    assert torch.autograd.gradcheck(states, tuple(encoder.parameters()))


class Plain(ClinicalODERNN):
    """The same network, the same steps, its gradients by plain autograd."""

    def _run(self, read: Tensor, plan: Plan) -> Tensor:
        return self._run_plainly(read, plan, self.field.rk4())


def plain_twin(encoder: ClinicalODERNN) -> Plain:
    twin = copy.deepcopy(encoder)
    twin.__class__ = Plain
    assert isinstance(twin, Plain)
    return twin


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_gradients_by_hand_are_those_of_autograd(
    dtype: torch.dtype, tolerance: float, gain: float
) -> None:
    encoder = make_encoder(hidden_dim=64, gain=gain).to(dtype)
    batch = make_batch(lengths=(12, 1, 7, 30, 2, 12))
    reference = plain_twin(encoder)
    torch.testing.assert_close(encoder(*batch), reference(*batch), rtol=0, atol=tolerance)
    expected = gradients(reference, batch)
    for name, gradient in gradients(encoder, batch).items():
        size = float(expected[name].abs().max())
        assert size > 0
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance * max(1, size))


def test_derivatives_by_time_are_refused() -> None:
    encoder = make_encoder(hidden_dim=3)
    times, values, observed = make_batch(lengths=(3, 1, 2))
    plan = encoder.plan(times, values, observed)
    times.requires_grad_()
    for own in (plan, None):
        with pytest.raises(ValueError, match="times have no derivative here"):
            encoder(times, values, observed, own)
        with torch.no_grad():
            encoder(times, values, observed, own)


def test_a_second_derivative_is_refused() -> None:
    encoder = make_encoder()
    states = encoder(*make_batch())
    weight = encoder.field.inner.weight
    (slope,) = torch.autograd.grad(states.pow(3).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    parameters = list(encoder.field.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for left, right in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(left, right)


def test_weights_that_change_between_states_and_gradients_are_noticed() -> None:
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    with torch.no_grad():
        encoder.update.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_parameter_gets_a_gradient_even_where_no_time_passes() -> None:
    encoder = make_encoder()  # with several processes one without would make all of them wait
    encoder(*make_batch(lengths=(1, 1))).pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("part", ["field", "update", "read"])
def test_a_frozen_part_leaves_the_other_gradients_as_they_are(part: str) -> None:
    encoder, batch = make_encoder(), make_batch()
    expected = gradients(encoder, batch)
    getattr(encoder, part).requires_grad_(False)
    found = gradients(encoder, batch)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != name.startswith(part)
        assert torch.equal(found[name], expected[name]) or not parameter.requires_grad


def test_autocast_gives_nearly_the_same_states_and_gradients() -> None:
    encoder = make_encoder(hidden_dim=16, gain=1.0).float()
    times, values, observed = make_batch(lengths=(6, 1, 4))
    batch = times.float(), values.float(), observed
    states, expected = encoder(*batch), gradients(encoder, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = encoder(*batch)
        found = gradients(encoder, batch)
    torch.testing.assert_close(narrow.float(), states, rtol=0, atol=0.05)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0.05 * size)


# ---------------------------------------------------------------- work and memory, counted


class Products(TorchDispatchMode):
    """Counts matrix products and the multiplications in them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.multiplications = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        left = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}.get(
            func.overloadpacket.__name__
        )
        if left is not None:
            self.count += 1
            self.multiplications += args[left].numel() * args[left + 1].shape[-1]
        return func(*args, **(kwargs or {}))


def products(work: Callable[[], Any]) -> Products:
    with Products() as counted:
        work()
    return counted


def ticks_of(encoder: ClinicalODERNN, batch: Batch) -> Plan:
    return encoder.plan(*batch)


def inputs_of(encoder: ClinicalODERNN, *batch: Tensor) -> Tensor:
    """What the input layer reads of each observation, (B, L, 3F + 3), zero in padding."""
    plan = encoder.plan(*batch)
    inputs = encoder.inputs(batch[1], plan)
    placed = inputs.new_zeros(batch[0].numel(), inputs.shape[1]).index_copy(0, plan.places, inputs)
    return placed.view(*batch[0].shape, -1)


@pytest.mark.parametrize("lengths", [(5, 1, 3), (9, 9, 2, 30)])
def test_a_pass_takes_no_more_matrix_products_than_the_derivation_says(
    lengths: tuple[int, ...],
) -> None:
    encoder, batch = make_encoder(hidden_dim=16), make_batch(lengths)
    plan = ticks_of(encoder, batch)
    steps, arrivals = len(plan.sizes) - 1, sum(map(bool, plan.arrivals))
    assert arrivals < 1 + steps, "the case needs a tick without arrival"
    loss: list[Tensor] = []
    forward = products(lambda: loss.append(encoder(*batch).pow(3).sum()))
    # u, three stages and the way back to h a step, one an update; W1 W2, two of the input.
    assert forward.count == 5 * steps + arrivals + 3
    backward = products(loss[0].backward)
    # The same, turned round; one for each of W1, W2, W_hh and W1 W2, which has two factors; three
    # of the input's layers, whose own inputs need none.
    assert backward.count == 5 * steps + arrivals + 4 + 2 + 3


@pytest.mark.parametrize("solver", ["dopri5", "midpoint"])
def test_a_solver_evaluates_the_field_as_often_for_many_patients_as_for_one(solver: str) -> None:
    encoder, batch = make_encoder(solver=solver), make_batch((5,))
    counts = []
    for patients in (1, 7):
        calls: list[None] = []
        hook = encoder.field.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        encoder(*(tensor.repeat_interleave(patients, dim=0) for tensor in batch))
        hook.remove()
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert counts[0] >= 2 * 4, "four gaps"


def test_no_product_is_spent_on_padding_or_on_patients_who_wait() -> None:
    encoder, (times, values, observed) = make_encoder(hidden_dim=16), make_batch((5, 1, 3))
    more = torch.zeros(3, 40, 2)
    padded = (
        torch.cat([times, more[..., 0]], dim=1),
        torch.cat([values, more], dim=1),
        torch.cat([observed, more.bool()], dim=1),
    )
    spent = [
        products(lambda batch=batch: encoder(*batch).sum().backward()).multiplications  # type: ignore[misc]
        for batch in ((times, values, observed), padded)
    ]
    assert spent[0] == spent[1]
    # A patient with forty times the ticks costs what he costs alone, less the products of weights.
    slow = times.clone()
    slow[0] *= 40
    alone_too = [tensor[:1].clone() for tensor in (slow, values, observed)]
    both = products(lambda: encoder(slow, values, observed).sum().backward())
    single = products(lambda: encoder(*alone_too).sum().backward())
    rest = products(
        lambda: encoder(times[1:, :3], values[1:, :3], observed[1:, :3]).sum().backward()
    )
    shared = 3 * encoder.hidden_dim**3  # W1 W2 and its derivative, once a batch
    assert both.multiplications == single.multiplications + rest.multiplications - shared


def kept_for_the_way_back(encoder: ClinicalODERNN, batch: Batch) -> int:
    """Bytes that autograd holds after a pass, weights left out."""
    seen: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = encoder(*batch)
    assert len(states) == len(batch[0])
    return sum(seen.values())


def test_what_is_kept_grows_with_ticks_and_observations_alone() -> None:
    encoder = make_encoder(1, 64).float()
    for lengths in ((5, 1, 3), (9, 9, 2, 30)):
        times, values, observed = make_batch(lengths, features=1)
        batch = times.float(), values.float(), observed
        plan = ticks_of(encoder, batch)
        steps = sum(plan.sizes) - plan.sizes[0]
        # A step keeps four stages and its start; an observation the cell's r, z, n, its start and
        # proposal, the state and its norm, the input layer; and both places, inputs, spans.
        bound = 4 * 64 * (5 * steps + 8 * sum(lengths)) + 4 * 24 * (steps + sum(lengths))
        once = 4 * 64**2  # W1 W2
        assert kept_for_the_way_back(encoder, batch) <= once + bound


@pytest.mark.parametrize("features", [1, 3])
def test_a_plan_made_ahead_changes_no_bit(features: int) -> None:
    encoder = make_encoder(features)
    batch = make_batch((9, 1, 30, 4), features)
    plan = encoder.plan(*batch)
    assert torch.equal(encoder(*batch, plan), encoder(*batch))
    expected = gradients(encoder, batch)
    for name, gradient in gradients(encoder, (*batch, plan)).items():  # type: ignore[arg-type]
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("lengths", [(6, 1, 3), (5, 1)])
def test_a_plan_of_a_batch_of_another_size_is_refused(lengths: tuple[int, ...]) -> None:
    encoder = make_encoder()
    plan = encoder.plan(*make_batch((5, 1, 3)))
    with pytest.raises(ValueError, match=r"a plan of \(3, 5, 2\) for a batch of \("):
        encoder(*make_batch(lengths), plan)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_shapes_are_checked_where_there_is_a_plan_too(wrong: int) -> None:
    encoder, batch = make_encoder(), list(make_batch((5, 1, 3)))
    plan = encoder.plan(*batch)
    batch[wrong] = batch[wrong].transpose(0, 1)
    with pytest.raises(ValueError, match="must be"):
        encoder(*batch, plan)


@pytest.mark.parametrize(
    ("time_scale", "solver", "own"),
    [(24.0, "rk4", "rk4"), (72.0, "dopri5", "rk4"), (24.0, "dopri5", "dopri5")],
)
def test_a_plan_of_an_encoder_with_another_clock_is_refused(
    time_scale: float, solver: str, own: str
) -> None:
    batch = make_batch()
    plan = ClinicalODERNN(2, time_scale=time_scale, solver=solver).plan(*batch)
    encoder = ClinicalODERNN(2, time_scale=72.0, solver=own)
    with pytest.raises(ValueError, match=r"a plan of .*, this encoder has .*scale=72"):
        encoder(*(part.float() for part in batch[:2]), batch[2], plan)


def test_a_plan_of_other_numbers_is_refused() -> None:
    encoder, batch = make_encoder(), make_batch()
    plan = encoder.plan(*batch)
    with pytest.raises(ValueError, match=r"a plan of .*float64.*, this encoder has .*float32"):
        encoder.float()(*batch, plan)


def test_inputs_and_spans_are_as_exact_as_the_weights() -> None:
    encoder = make_encoder(1, time_scale=71.3)
    hours = torch.tensor([[0.1, 0.3, 33.4, 111.7]], dtype=torch.float64)
    batch = hours, torch.zeros(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool)
    plan = encoder.plan(*batch)
    inputs, spans = encoder.inputs(batch[1], plan), plan.spans
    gaps = hours[0].diff(prepend=hours[0, :1]).numpy()
    expected = np.log1p([gaps, hours[0].numpy() - 0.1]) / math.log1p(71.3)
    np.testing.assert_allclose(inputs[:, 3:5].t(), expected, rtol=1e-14)
    np.testing.assert_allclose(inputs[:, 5], np.log1p(np.arange(4)), rtol=1e-14)
    parts = np.maximum(np.ceil(gaps / 7.13), 1).astype(int)
    assert parts.tolist() == [1, 1, 5, 11]
    np.testing.assert_allclose(spans, np.repeat(gaps / parts / 71.3, parts), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_times_of_any_kind_are_read_as_exactly(dtype: torch.dtype) -> None:
    hours = torch.tensor([[0, 7, 33, 120]])
    batch = hours.to(dtype), torch.zeros(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool)
    encoder = make_encoder(1)
    expected = encoder.plan(hours.double(), *batch[1:])
    assert torch.equal(encoder.plan(*batch).told, expected.told)
    assert torch.equal(encoder.plan(*batch).spans, expected.spans)


def test_with_a_plan_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: whoever asks for a number there fails."""
    monkeypatch.setattr(dte_encoder, "in_full_precision", lambda _: nullcontext())  # of no meaning
    encoder, batch = make_encoder(hidden_dim=64), make_batch((9, 1, 30, 4))
    plan = encoder.plan(*batch)
    assert encoder(*batch).shape == (4, 30, 64)
    elsewhere = tuple(tensor.to("meta") for tensor in batch)
    assert plan.small
    assert not plan.to("meta").small  # the CPU's threads are no matter there
    encoder.to("meta")
    encoder(*elsewhere, plan).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in encoder.parameters())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        encoder(*elsewhere)


@pytest.mark.parametrize("patients", [dte_encoder.MOST_ALONE, dte_encoder.MOST_ALONE + 1])
def test_few_patients_run_on_one_thread(patients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = make_encoder(), make_batch((2,) * patients)
    expected = 1 if patients == dte_encoder.MOST_ALONE else 3
    own, seen = torch.get_num_threads(), []
    for name in ("_advance", "_go_back"):
        work = getattr(dte_encoder, name)

        def looking(*arguments: Any, work: Callable[..., Any] = work) -> Any:
            seen.append(torch.get_num_threads())
            return work(*arguments)

        monkeypatch.setattr(dte_encoder, name, looking)
    try:
        torch.set_num_threads(3)
        encoder(*batch).pow(3).sum().backward()
        assert seen == [expected, expected]
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(dte_encoder, "_advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder(*batch)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)


def test_nothing_is_kept_where_nothing_learns() -> None:
    encoder, batch = make_encoder(), make_batch()
    states = encoder(*batch)
    assert kept_for_the_way_back(encoder, batch) > 0
    with torch.no_grad():
        assert kept_for_the_way_back(encoder, batch) == 0
        assert torch.equal(encoder(*batch), states)
    encoder.requires_grad_(False)
    assert kept_for_the_way_back(encoder, batch) == 0
    assert torch.equal(encoder(*batch), states)
    assert not encoder(*batch).requires_grad


PAGES_OF_PASSES = """
import resource, statistics, sys, torch, dte_encoder

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    dte_encoder.keep_freed_memory()
encoder, observed = dte_encoder.ClinicalODERNN(1), torch.ones(256, 40, 1, dtype=torch.bool)
times = torch.arange(40.0).expand(256, 40)
asked = []
for turn in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encoder(times, torch.ones(256, 40, 1), observed).pow(3).sum().backward()
    encoder.zero_grad()
    asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(round(statistics.median(asked[4:])))  # the first ones, and now and then another, still grow
"""


def pages(word: str) -> int:
    """How many pages of memory a pass asks of the system, in a process of its own."""
    command = [sys.executable, "-c", PAGES_OF_PASSES, word]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(dte_encoder.__file__).parent
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_a_pass_takes_the_memory_that_the_one_before_left() -> None:
    given_back = pages("give back")
    if given_back < 200:
        pytest.skip("this C library keeps it by itself")
    assert pages("keep") < given_back / 20


@pytest.mark.parametrize("learns", [True, False])
def test_stages_have_room_for_all_ticks_only_where_something_learns(
    learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = make_encoder().requires_grad_(learns), make_batch()
    rooms: list[int] = []
    advance = dte_encoder._advance

    def looking(*arguments: Any) -> None:
        buffers = list(arguments[1])
        assert not learns or len({each[0].untyped_storage().data_ptr() for each in buffers}) == 1
        rooms.append(buffers[0][0].untyped_storage().nbytes())
        advance(arguments[0], iter(buffers), *arguments[2:])

    monkeypatch.setattr(dte_encoder, "_advance", looking)
    encoder(*batch)
    _, *sizes = ticks_of(encoder, batch).sizes
    assert rooms == [8 * 6 * 5 * (sum(sizes) if learns else max(sizes))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_are_layer_normalised_and_zero_in_padding(dtype: torch.dtype) -> None:
    encoder = make_encoder(hidden_dim=16).to(dtype)
    times, values, observed = make_batch()
    states = encoder(times.to(dtype), values.to(dtype), observed)
    present = observed.any(dim=2)
    assert states.shape == (3, 5, 16)
    assert states.dtype == dtype
    real = states[present]
    torch.testing.assert_close(real.mean(1), torch.zeros_like(real[:, 0]), rtol=0, atol=1e-5)
    spread = real.var(1, unbiased=False)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=2e-2)
    assert torch.equal(states[~present], torch.zeros_like(states[~present]))


def test_float32_gives_the_states_of_float64() -> None:
    encoder = make_encoder()
    batch = make_batch()
    single = copy.deepcopy(encoder).float()
    torch.testing.assert_close(
        single(batch[0].float(), batch[1].float(), batch[2]).double(),
        encoder(*batch),
        rtol=0,
        atol=1e-4,
    )


def test_wider_inputs_do_not_change_the_dtype_of_the_states() -> None:
    times, values, observed = make_batch()
    assert make_encoder().float()(times, values, observed).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_cuda_gives_the_states_and_gradients_of_the_cpu(solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=64, gain=1.0), solver, 1e-5).float()
    times, values, observed = make_batch(lengths=(12, 1, 7, 30))
    batch = times.float(), values.float(), observed
    on_gpu = copy.deepcopy(encoder).cuda()
    batch_on_gpu = times.float().cuda(), values.float().cuda(), observed.cuda()
    states = on_gpu(*batch_on_gpu)
    assert states.is_cuda
    torch.testing.assert_close(states.cpu(), encoder(*batch), rtol=0, atol=1e-5)
    expected = gradients(encoder, batch)
    for name, gradient in gradients(on_gpu, batch_on_gpu).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_read_as_what_they_hold(dtype: torch.dtype) -> None:
    encoder, (times, values, observed) = make_encoder().float(), make_batch()
    narrow, short = times.to(dtype), values.to(dtype)
    assert torch.equal(
        encoder(narrow, short, observed), encoder(narrow.float(), short.float(), observed)
    )


# ---------------------------------------------------------------- what must change nothing


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_padding_changes_nothing(solver: str) -> None:
    encoder = same_weights(make_encoder(), solver)
    times, values, observed = make_batch()
    padded = (
        torch.cat([times, times.new_zeros(3, 4)], dim=1),
        torch.cat([values, values.new_full((3, 4, 2), 7.0)], dim=1),
        torch.cat([observed, observed.new_zeros(3, 4, 2)], dim=1),
    )
    states = encoder(*padded)
    assert states.shape == (3, 9, 6)
    torch.testing.assert_close(states[:, :5], encoder(*make_batch()), rtol=0, atol=1e-12)
    assert torch.equal(states[:, 5:], torch.zeros_like(states[:, 5:]))


@pytest.mark.parametrize("filler", [math.nan, -1e6, 1e6])
def test_times_and_values_in_padding_change_nothing(filler: float) -> None:
    times, values, observed = make_batch()
    present = observed.any(dim=2)
    changed = (
        torch.where(present, times, filler),
        torch.where(present.unsqueeze(2), values, filler),
        observed,
    )
    assert_same_function(make_encoder(), (times, values, observed), changed)


def alone(batch: Batch, i: int) -> Batch:
    length = int(batch[2][i].any(dim=1).sum())
    times, values, observed = (tensor[i : i + 1, :length] for tensor in batch)
    return times, values, observed


def test_company_in_the_batch_changes_nothing() -> None:
    encoder = make_encoder(hidden_dim=16)
    times, values, observed = make_batch(lengths=(5, 1, 3, 5))
    times[3] *= 40  # a patient whose gaps need many more steps than the others'
    batch = times, values, observed
    states = encoder(*batch)
    for i in range(4):
        single = encoder(*alone(batch, i))
        torch.testing.assert_close(states[i : i + 1, : single.shape[1]], single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_company_changes_an_adaptive_solution_within_its_tolerance_only(solver: str) -> None:
    encoder = same_weights(make_encoder(gain=1.0), solver, 1e-5)
    times, values, observed = make_batch(lengths=(5, 1, 3, 5))
    times[3] *= 5
    batch = times, values, observed
    states = encoder(*batch)
    for i in range(4):
        single = encoder(*alone(batch, i))
        torch.testing.assert_close(states[i : i + 1, : single.shape[1]], single, rtol=0, atol=3e-3)


def test_gradients_of_a_batch_are_the_sum_of_its_patients() -> None:
    encoder = make_encoder()
    batch = make_batch()
    weight = torch.randn(3, 5, 6, dtype=torch.float64)
    encoder.zero_grad()
    (encoder(*batch) * weight).sum().backward()
    together = {
        name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
    }
    encoder.zero_grad()
    for i in range(3):
        single = encoder(*alone(batch, i))
        (single * weight[i : i + 1, : single.shape[1]]).sum().backward()
    apart = {name: p.grad for name, p in encoder.named_parameters()}
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_order_in_the_batch_changes_nothing() -> None:
    encoder = make_encoder()
    batch = make_batch(lengths=(2, 5, 1, 5, 3))
    order = torch.tensor([3, 0, 4, 2, 1])
    times, values, observed = (tensor[order] for tensor in batch)
    torch.testing.assert_close(
        encoder(times, values, observed), encoder(*batch)[order], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shift", [-16.0, 0.125, 8192.0])
def test_a_shift_of_time_changes_nothing(shift: float) -> None:
    times, values, observed = make_batch()
    assert_same_function(
        make_encoder(), (times, values, observed), (times + shift, values, observed)
    )


@pytest.mark.parametrize("filler", [math.nan, math.inf, -1e6, 1e6])
def test_unmeasured_values_change_neither_states_nor_gradients(filler: float) -> None:
    times, values, observed = make_batch()
    assert bool((~observed[:, 0]).any()), "the case needs a feature missing beside a measured one"
    filled = torch.where(observed, values, filler)
    assert_same_function(make_encoder(), (times, values, observed), (times, filled, observed))


def test_zero_gap_is_the_identity_bit_by_bit_even_beside_longer_gaps() -> None:
    encoder = make_encoder()
    state = torch.randn(3, 6, dtype=torch.float64)
    gap = torch.tensor([0.0, 0.7, 0.0], dtype=torch.float64)
    evolved = evolve(encoder, state, gap)
    assert torch.equal(evolved[[0, 2]], state[[0, 2]])
    assert not torch.allclose(evolved[1], state[1])


@pytest.mark.parametrize("solver", [*FIXED_STEP, *ADAPTIVE, *MULTISTEP])
def test_zero_gap_is_the_identity_of_every_solver(solver: str) -> None:
    encoder = same_weights(make_encoder(), solver, 1e-6)
    state = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(evolve(encoder, state, torch.zeros(3, dtype=torch.float64)), state)


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "euler"])
def test_equal_times_are_legal_and_are_two_updates_without_evolution(solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=2), solver, 1e-6)
    CONSTANT_DRIFT.install(encoder.field)
    let_the_equation_alone_decide(encoder)
    times = torch.tensor([[0.0, 4.0, 4.0, 4.0, 6.0]], dtype=torch.float64)
    states = encoder(times, torch.zeros(1, 5, 2), torch.ones(1, 5, 2, dtype=torch.bool))
    torch.testing.assert_close(states[0], times.t() / 10 * DRIFT, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- what must change something


def change(encoder: ClinicalODERNN, edit: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
    """How far each observation's state moves when ``edit`` changes the batch in place; (B, L)."""
    batch = make_batch(lengths=(5, 4, 3))
    edited = make_batch(lengths=(5, 4, 3))
    edit(*edited)
    return (encoder(*batch) - encoder(*edited)).detach().abs().amax(2)


def test_a_longer_gap_changes_the_states_from_there_on_and_of_that_patient_only() -> None:
    def longer(times: Tensor, values: Tensor, observed: Tensor) -> None:
        times[1, 2:4] += 3.0

    moved = change(make_encoder(), longer)
    assert bool((moved[1, 2:4] > 1e-3).all())
    assert torch.equal(moved[1, :2], torch.zeros_like(moved[1, :2]))
    assert float(moved[[0, 2]].max()) < 1e-13


def test_a_longer_gap_changes_the_equations_part_of_the_state() -> None:
    encoder = make_encoder()
    state = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        near, far = (evolve(encoder, state, torch.tensor([gap]).double()) for gap in (0.5, 2.5))
    assert float((near - state).abs().max()) > 1e-2
    assert float((far - near).abs().max()) > 1e-2


def test_gap_elapsed_time_and_count_each_reach_the_update() -> None:
    encoder = make_encoder(time_scale=24.0)
    times = torch.tensor([[2.0, 5.0, 26.0]], dtype=torch.float64)
    batch = times, torch.zeros(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)
    inputs, plan = inputs_of(encoder, *batch), encoder.plan(*batch)
    expected = torch.tensor([[0.0, 3.0, 21.0], [0.0, 3.0, 24.0]], dtype=torch.float64)
    clock = expected.log1p() / math.log(25)
    torch.testing.assert_close(inputs[0, :, 6:8], clock.t())
    count = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, :, 8], count.log(), rtol=0, atol=1e-7)
    ticks = [1] + 2 * [3 / 24 / 2] + 9 * [21 / 24 / 9]  # none is longer than 0.1
    assert plan.sizes == [1] * len(ticks)
    torch.testing.assert_close(plan.spans[1:], torch.tensor(ticks[1:], dtype=torch.float64))


def test_each_feature_brings_its_latest_value_its_mask_and_its_own_age() -> None:
    encoder = make_encoder(time_scale=24.0)
    times = torch.tensor([[2.0, 5.0, 6.0, 26.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[[1.0, 9.0], [9.0, 2.0], [9.0, 9.0], [-3.0, 9.0], [9.0, 9.0]]])
    seen = torch.tensor([[[1, 0], [0, 1], [1, 0], [1, 0], [0, 0]]], dtype=torch.bool)
    values[0, 2, 0] = 1.5
    inputs = inputs_of(encoder, times, values, seen)
    carried = [[1.0, 0.0], [1.0, 2.0], [1.5, 2.0], [-3.0, 2.0]]
    assert inputs[0, :4, :2].tolist() == carried
    assert torch.equal(inputs[0, :, 2:4], seen[0].double())
    hours = torch.tensor([[0.0, 0.0], [3.0, 0.0], [4.0, 1.0], [20.0, 21.0]], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, :4, 4:6], hours.log1p() / math.log(25))
    assert bool(inputs.isfinite().all())


def permuted(encoder: ClinicalODERNN, order: list[int]) -> ClinicalODERNN:
    """Give the encoder of the features ``order`` with the weights that belong to them."""
    features = len(order)
    twin = make_encoder(features, encoder.hidden_dim)
    state = encoder.state_dict()
    place = [part * encoder.input_dim + f for part in range(3) for f in order]
    clock = range(3 * encoder.input_dim, 3 * encoder.input_dim + 3)
    state["read.weight"] = state["read.weight"][:, [*place, *clock]]
    for name in ("value_mean", "value_std"):
        state[name] = state[name][order]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2]])
def test_the_order_of_features_does_not_matter(order: list[int]) -> None:
    encoder = make_encoder(3)
    times, values, observed = make_batch(features=3)
    encoder.fit_normalizer(values, observed)
    twin = permuted(encoder, order)
    other = twin(times, values[..., order], observed[..., order])
    torch.testing.assert_close(other, encoder(times, values, observed), rtol=0, atol=1e-12)
    assert float((twin(times, values, observed) - other).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("filler", [math.nan, 1e6, -math.inf])
def test_a_series_that_was_never_measured_changes_nothing(filler: float) -> None:
    encoder = make_encoder(3)
    times, values, observed = make_batch()
    more = torch.cat([values, torch.full_like(values[..., :1], filler)], dim=2)
    mask = torch.cat([observed, torch.zeros_like(observed[..., :1])], dim=2)
    states = encoder(times, more, mask)
    without = permuted(encoder, [0, 1])(times, values, observed)
    torch.testing.assert_close(states, without, rtol=0, atol=1e-12)


def test_a_series_of_one_patient_changes_no_other() -> None:
    encoder = make_encoder(3)
    times, values, observed = make_batch(features=3)
    alone = observed.clone()
    alone[1:, :, 2] = False
    alone[..., 0] |= observed.any(dim=2)
    both = alone.clone()
    both[1, 0, 2] = True
    values[1, 0, 2] = 5.0
    left, right = encoder(times, values, alone), encoder(times, values, both)
    assert torch.equal(left[[0, 2]], right[[0, 2]])
    assert float((left[1] - right[1]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("feature", [0, 1])
def test_each_measured_feature_changes_the_states_from_its_observation_on(feature: int) -> None:
    def edit(times: Tensor, values: Tensor, observed: Tensor) -> None:
        observed[0, 2] = True
        values[0, 2] = torch.tensor([0.5, 0.5])

    def edit_and_raise(times: Tensor, values: Tensor, observed: Tensor) -> None:
        edit(times, values, observed)
        values[0, 2, feature] += 1.0

    encoder = make_encoder()
    left, right = make_batch(), make_batch()
    edit(*left)
    edit_and_raise(*right)
    moved = (encoder(*left) - encoder(*right)).detach().abs().amax(2)
    assert bool((moved[0, 2:] > 1e-4).all())
    assert float(moved[0, :2].max()) == 0.0


def test_a_feature_measured_at_its_mean_differs_from_one_not_measured() -> None:
    def measure(times: Tensor, values: Tensor, observed: Tensor) -> None:
        assert not observed[place]
        observed[place] = True
        values[place] = 0.0  # the normaliser's mean

    missing = ~make_batch(lengths=(5, 4, 3))[2]
    place = tuple(missing[:, :3].nonzero()[0].tolist())
    assert float(change(make_encoder(), measure)[place[:2]]) > 1e-3


def test_whole_numbers_of_hours_count_as_hours() -> None:
    encoder = make_encoder(1, 4, time_scale=0.5)
    values, observed = torch.ones(1, 3, 1), torch.ones(1, 3, 1, dtype=torch.bool)
    whole = encoder(torch.tensor([[0, 1, 3]]), values, observed)
    torch.testing.assert_close(
        whole, encoder(torch.tensor([[0.0, 1.0, 3.0]]).double(), values, observed)
    )


# ---------------------------------------------------------------- normaliser


def test_normaliser_counts_observed_entries_only() -> None:
    encoder = make_encoder()
    values = torch.tensor([[[1.0, math.nan], [3.0, 10.0]], [[1e6, 20.0], [5.0, 60.0]]])
    observed = torch.tensor([[[True, False], [True, True]], [[False, True], [True, True]]])
    encoder.fit_normalizer(values, observed)
    mean = torch.tensor([3.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(encoder.value_mean, mean)
    std = torch.tensor([8 / 3, 1400 / 3], dtype=torch.float64).sqrt()
    torch.testing.assert_close(encoder.value_std, std)


def test_normaliser_makes_the_unit_of_a_feature_irrelevant() -> None:
    times, values, observed = make_batch()
    unit, zero = torch.tensor([88.4, 0.01]), torch.tensor([-3.0, 40.0])
    states = []
    for converted in (values, values * unit + zero):
        encoder = make_encoder()
        encoder.fit_normalizer(converted, observed)
        states.append(encoder(times, converted, observed))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-10)


def test_normaliser_keeps_its_precision_for_float32_values_far_from_zero() -> None:
    encoder = make_encoder(1, 4).float()
    values = torch.tensor([9999.0, 10000.0, 10001.0] * 50_000).reshape(-1, 1)
    encoder.fit_normalizer(values, torch.ones_like(values, dtype=torch.bool))
    assert encoder.value_mean.item() == 10000.0
    assert encoder.value_std.item() == pytest.approx(math.sqrt(2 / 3), rel=1e-6)


def test_normaliser_lives_in_the_state_dict() -> None:
    times, values, observed = make_batch()
    encoder = make_encoder()
    encoder.fit_normalizer(values * 7 + 100, observed)
    assert {"value_mean", "value_std"} <= encoder.state_dict().keys()
    restored = make_encoder(seed=99)
    restored.load_state_dict(encoder.state_dict())
    raw = values * 7 + 100
    assert torch.equal(restored(times, raw, observed), encoder(times, raw, observed))


@pytest.mark.parametrize("constant", [0.0, 4.0, 0.1, 1e-3, 1e6 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_feature_is_centred_and_not_magnified(
    constant: float, dtype: torch.dtype
) -> None:
    encoder = make_encoder(1, 4).to(dtype)
    values = torch.full((7, 3, 1), constant, dtype=dtype)
    observed = torch.ones_like(values, dtype=torch.bool)
    encoder.fit_normalizer(values, observed)
    assert encoder.value_std.item() == 1.0
    inputs = inputs_of(encoder, torch.zeros(7, 3, dtype=dtype), values, observed)
    assert float(inputs[..., 0].abs().max()) <= 1e-6 * max(1.0, constant)


def test_extreme_values_are_cut_and_ordinary_ones_are_not() -> None:
    encoder = make_encoder(1, 4)
    encoder.fit_normalizer(
        torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool)
    )  # mean 0, standard deviation 1
    values = torch.tensor([[[3.0], [-7.5], [8.5], [-1e30]]], dtype=torch.float64)
    seen = torch.ones(1, 4, 1, dtype=torch.bool)
    inputs = inputs_of(encoder, torch.zeros(1, 4, dtype=torch.float64), values, seen)
    assert inputs[0, :, 0].tolist() == [3.0, -7.5, MAX_Z_SCORE, -MAX_Z_SCORE]


@pytest.mark.parametrize(
    ("values", "observed", "message"),
    [
        (torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool), "nothing was observed"),
        (torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bool), r"\(3, 3\).*input_dim 2"),
        (torch.ones(3, 2), torch.ones(2, 2, dtype=torch.bool), r"\(3, 2\).*\(2, 2\)"),
        (torch.ones(3, 2), torch.ones(3, 2), "observed must be bool, got torch.float32"),
        (
            torch.tensor([[1.0, 2.0], [1.0, math.nan]]),
            torch.ones(2, 2, dtype=torch.bool),
            "nan.*observed but not finite",
        ),
    ],
    ids=["nothing observed", "features", "shapes", "not bool", "nan"],
)
def test_normaliser_refuses_what_it_cannot_use(
    values: Tensor, observed: Tensor, message: str
) -> None:
    encoder = make_encoder()
    with pytest.raises(ValueError, match=message):
        encoder.fit_normalizer(values, observed)
    assert torch.equal(encoder.value_mean, torch.zeros(2, dtype=torch.float64))


def test_a_feature_that_nobody_measured_changes_no_state() -> None:
    encoder = make_encoder(2, 4)
    values = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    observed = torch.tensor([[True, False], [True, False]])
    encoder.fit_normalizer(values, observed)
    assert encoder.value_mean.tolist() == [2.0, 0.0]
    assert encoder.value_std.tolist() == [1.0, 1.0]
    times = torch.tensor([[0.0, 1.0]])
    other = torch.tensor([[1.0, -1e9], [3.0, math.nan]])
    states = [encoder(times, v[None], observed[None]) for v in (values, other)]
    assert torch.equal(states[0], states[1])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_dim": 0}, "input_dim 0 and hidden_dim 6 must be positive"),
        ({"input_dim": -2}, "input_dim -2"),
        ({"hidden_dim": 0}, "hidden_dim 0 must be positive"),
        ({"time_scale": 0.0}, r"time_scale .* got 0\.0"),
        ({"time_scale": -1.0}, r"time_scale .* got -1\.0"),
        ({"time_scale": math.inf}, "time_scale .* got inf"),
        ({"time_scale": math.nan}, "time_scale .* got nan"),
        ({"solver": "runge"}, "unknown solver 'runge'.*dopri5"),
        ({"solver": ""}, "unknown solver ''"),
        ({"solver": "scipy_solver"}, "solver 'scipy_solver'"),  # gives no gradients
    ],
    ids=str,
)
def test_bad_configurations_are_refused_with_their_value(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClinicalODERNN(**{"input_dim": 2, "hidden_dim": 6, **kwargs})


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (0, torch.zeros(3), r"times must be \(B, L\).*got \(3,\)"),
        (0, torch.zeros(3, 0), r"times must be .* not empty, got \(3, 0\)"),
        (0, torch.zeros(0, 5), r"times must be .* not empty, got \(0, 5\)"),
        (0, torch.zeros(3, 5, 1), r"times must be \(B, L\).*got \(3, 5, 1\)"),
        (0, torch.zeros(3, 4), r"values must be \(3, 4, 2\), got \(3, 5, 2\)"),
        (1, torch.zeros(3, 5, 1), r"values must be \(3, 5, 2\), got \(3, 5, 1\)"),
        (1, torch.zeros(3, 5), r"values must be \(3, 5, 2\), got \(3, 5\)"),
        (2, torch.ones(3, 5, dtype=torch.bool), r"observed must be \(3, 5, 2\), got \(3, 5\)"),
        (2, torch.ones(3, 5, 2), "observed must be bool, got torch.float32"),
        (2, torch.ones(3, 5, 2, dtype=torch.uint8), "observed must be bool, got torch.uint8"),
    ],
)
def test_wrong_shapes_and_types_are_refused_with_their_shape(
    index: int, tensor: Tensor, message: str
) -> None:
    batch = list(make_batch())
    batch[index] = tensor
    with pytest.raises(ValueError, match=message):
        make_encoder()(*batch)


def set_time(place: tuple[int, int], value: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    def edit(times: Tensor, values: Tensor, observed: Tensor) -> None:
        times[place] = value

    return edit


def set_value(value: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    def edit(times: Tensor, values: Tensor, observed: Tensor) -> None:
        observed[2, 1, 1] = True
        values[2, 1, 1] = value

    return edit


def unobserve(*place: int | slice) -> Callable[[Tensor, Tensor, Tensor], None]:
    def edit(times: Tensor, values: Tensor, observed: Tensor) -> None:
        observed[place] = False

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_time((2, 2), -4.0), r"time -4\.0 h at patient 2, observation 2 "),
        (set_time((0, 0), 1e4), r"time .* at patient 0, observation 1 is before"),
        (set_time((0, 0), math.nan), "time nan.* at patient 0, observation 0 is not finite"),
        (set_time((0, 3), math.nan), "time nan.* at patient 0, observation 3 is not finite"),
        (set_time((0, 4), math.inf), "time inf.* at patient 0, observation 4 is not finite"),
        (
            set_time((0, 4), 1.1e5),
            "gap of .* h to patient 0, observation 4 needs a larger time_scale",
        ),
        (set_time((1, 0), -math.inf), "time -inf.* at patient 1, observation 0 is not finite"),
        (set_value(math.nan), "value nan at patient 2, observation 1, feature 1 "),
        (set_value(math.inf), "value inf at patient 2, observation 1, feature 1 "),
        (set_value(-math.inf), "value -inf at patient 2, observation 1, feature 1 "),
        (unobserve(2, 0), "patient 2, observation 0"),
        (unobserve(0, 2), "padding in front of the observation at patient 0, observation 3"),
        (unobserve(1), "no observation at patient 1"),
        (unobserve(slice(None)), "no observation at patient 0"),
    ],
)
def test_meaningless_series_are_refused_with_value_and_place(
    edit: Callable[[Tensor, Tensor, Tensor], None], message: str
) -> None:
    batch = make_batch()
    edit(*batch)
    with pytest.raises(ValueError, match=message):
        make_encoder()(*batch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((math.inf, math.inf), "time inf at patient 0, observation 1 is not finite"),
        ((-1.7e308, 1.7e308), "time -1.7e.308 h at patient 0, observation 1 is before"),
    ],
)
def test_endless_times_are_refused_without_a_warning(
    given: tuple[float, float], message: str
) -> None:
    times, values, observed = make_batch()
    times[0, 1:3] = torch.tensor(given, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        make_encoder()(times, values, observed)


# ---------------------------------------------------------------- extremes


def assert_finite_with_gradients(encoder: ClinicalODERNN, batch: Batch) -> None:
    assert bool(torch.isfinite(encoder(*batch)).all())
    assert all(bool(torch.isfinite(g).all()) for g in gradients(encoder, batch).values())


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "euler"])
@pytest.mark.parametrize(
    "times",
    [
        [0.0, 1.0, 2 * HOURS_A_YEAR],
        [0.0, 1e-30, 2e-30],
        [0.0, 1e-30, 24.0],
        [0.0, 0.0, 0.0],
        [-1e4, 0.0, 1e-3],
    ],
    ids=str,
)
def test_extreme_gaps_give_finite_states_and_gradients(times: list[float], solver: str) -> None:
    encoder = same_weights(make_encoder(1, 8, time_scale=72.0, gain=1.0), solver, 1e-3).float()
    values = torch.ones(1, 3, 1)
    batch = torch.tensor([times]), values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(encoder, batch)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e-30, 0.0])
def test_extreme_values_give_finite_states_and_gradients(value: float) -> None:
    values = torch.full((1, 3, 1), value)
    batch = torch.tensor([[0.0, 1.0, 5.0]]), values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(make_encoder(1, 8).float(), batch)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e30])
def test_a_normaliser_fitted_to_extreme_values_gives_finite_states(scale: float) -> None:
    encoder = make_encoder(1, 8).float()
    values = scale * torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    batch = torch.tensor([[0.0, 1.0, 5.0]]), values, torch.ones_like(values, dtype=torch.bool)
    encoder.fit_normalizer(values, batch[2])
    assert_finite_with_gradients(encoder, batch)


@pytest.mark.parametrize("length", [1, 10_000])
def test_short_and_long_series_give_finite_states_and_gradients(length: int) -> None:
    values = torch.randn(1, length, 1)
    times = torch.linspace(0, 6 * length, length).unsqueeze(0)
    batch = times, values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(make_encoder(1, 8, time_scale=72.0).float(), batch)


def test_a_single_observation_needs_no_equation() -> None:
    encoder = make_encoder()
    with torch.no_grad():
        for parameter in encoder.field.parameters():
            parameter.fill_(torch.nan)
    batch = make_batch(lengths=(1, 1))
    assert bool(torch.isfinite(encoder(*batch)).all())
    assert isinstance(encoder.update, nn.GRUCell)
