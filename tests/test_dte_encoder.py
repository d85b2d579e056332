"""The encoder's equation, solvers, definition and normaliser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import dte_encoder
from dte_encoder import MAX_Z_SCORE, ClinicalODERNN, VectorField, is_fixed_step
from encoders import (
    ADAPTIVE,
    FIXED_STEP,
    MULTISTEP,
    Batch,
    evolve,
    gradients,
    inputs_of,
    make_batch,
    make_encoder,
    same_weights,
    stock_modules,
)
from medgemma_clinical.files import RunFault
from problems import (
    CONSTANT_DRIFT,
    DRIFT,
    PROBLEMS,
    SATURATING_DECAY,
    Problem,
    let_the_equation_alone_decide,
)

# ---------------------------------------------------------------- dynamics with closed forms


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_dopri5_evolves_states_by_the_closed_form_over_each_rows_own_gap(problem: Problem) -> None:
    encoder = same_weights(make_encoder(hidden_dim=2), "dopri5")
    problem.install(encoder.field)
    start = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.5, 0.7], [0.2, 0.1]], dtype=torch.float64)
    gap = torch.tensor([0.0, 0.03, 0.77, 2.5], dtype=torch.float64)
    result = evolve(encoder, start, gap)
    exact = problem.solution(start, gap.unsqueeze(1))
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_a_batch_has_the_closed_form_at_irregular_times(problem: Problem, fused: bool) -> None:
    encoder = make_encoder(hidden_dim=2)
    encoder.fused = fused
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
        torch.testing.assert_close(row[:length], exact, rtol=0, atol=2e-5)


def test_the_intervals_of_times_0_1_3_6_are_1_2_3() -> None:
    encoder = make_encoder(hidden_dim=2, time_scale=1.0)
    CONSTANT_DRIFT.install(encoder.field)
    let_the_equation_alone_decide(encoder)
    times = torch.tensor([[0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)
    states = encoder(times, torch.zeros(1, 4, 2), torch.ones(1, 4, 2, dtype=torch.bool))
    torch.testing.assert_close(states[0], times.t() * DRIFT, rtol=0, atol=1e-14)


def test_each_gap_reaches_torchdiffeq_once_in_units_of_the_time_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(time_scale=2.0, solver="dopri5")
    seen: list[list[float]] = []
    original = encoder._odeint

    def recording(state: Tensor, dt: Tensor) -> Tensor:
        seen.append(dt.tolist())
        return original(state, dt)

    monkeypatch.setattr(encoder, "_odeint", recording)
    times = torch.tensor([[5.0, 9.0, 0.0, 0.0], [0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)
    observed = torch.ones(2, 4, 2, dtype=torch.bool)
    observed[0, 2:] = False
    encoder(times, torch.zeros(2, 4, 2), observed)
    assert seen == [[0.5, 2.0], [1.0], [1.5]]


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


@pytest.mark.parametrize("solver", ["dopri5", "bosh3"])
def test_an_adaptive_solver_keeps_its_tolerances(solver: str) -> None:
    loose, tight = solver_error(solver, 1e-4), solver_error(solver, 1e-6)
    assert loose < 3e-2
    assert tight < 3e-4
    assert tight < loose / 10


@pytest.mark.parametrize(("solver", "bound"), MULTISTEP.items())
def test_a_multistep_solver_takes_short_steps(solver: str, bound: float) -> None:
    assert solver_error(solver) < bound


@pytest.mark.parametrize("solver", [*FIXED_STEP, "bosh3", "implicit_adams"])
def test_every_solver_approaches_the_same_states_and_gradients(solver: str) -> None:
    encoder = make_encoder(gain=1.0)
    batch = make_batch((3, 1, 2))
    reference, other = same_weights(encoder, "dopri5"), same_weights(encoder, solver, 1e-6)
    tolerance = 2e-2 if solver == "euler" else 2e-3
    torch.testing.assert_close(other(*batch), reference(*batch), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        gradients(other, batch), gradients(reference, batch), rtol=0, atol=10 * tolerance
    )


def test_fixed_step_solvers_are_those_of_torchdiffeqs_own_classes() -> None:
    assert all(map(is_fixed_step, [*FIXED_STEP, *MULTISTEP]))
    assert not any(map(is_fixed_step, ADAPTIVE))


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


# ---------------------------------------------------------------- other modules take effect


class Decay(nn.Module):
    """dh/dt = -h, a field without tanh or weights."""

    def forward(self, state: Tensor) -> Tensor:
        return -state


@pytest.mark.parametrize("solver", ["rk4", "euler", "dopri5", "explicit_adams"])
def test_any_field_is_solved_under_every_solver(solver: str) -> None:
    encoder = ClinicalODERNN(2, 2, time_scale=10.0, solver=solver, field=Decay()).double()
    encoder.rtol = encoder.atol = 1e-7
    let_the_equation_alone_decide(encoder)
    times, _, observed = make_batch(lengths=(4, 2))
    values = torch.randn_like(times).unsqueeze(2).expand(-1, -1, 2).clone()
    observed[:, 0] = True
    states = encoder(times, values, observed)
    elapsed = ((times - times[:, :1]) / encoder.time_scale).unsqueeze(2)
    exact = torch.tanh(values[:, :1]) * torch.exp(-elapsed) * observed.any(2, keepdim=True)
    torch.testing.assert_close(states, exact, rtol=0, atol=3e-2 if solver == "euler" else 3e-3)


class DampedField(VectorField):
    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state) - 5 * state


class HalvingCell(nn.GRUCell):
    def forward(self, inputs: Tensor, hx: Tensor | None = None) -> Tensor:
        return super().forward(inputs, hx) / 2


class TriplingLayer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def with_other_field(encoder: ClinicalODERNN) -> None:
    encoder.field.__class__ = DampedField


def with_other_cell(encoder: ClinicalODERNN) -> None:
    encoder.update.__class__ = HalvingCell


def with_own_forward(encoder: ClinicalODERNN) -> None:
    encoder.field.forward = lambda state: -state


def with_other_layer(encoder: ClinicalODERNN) -> None:
    stock_modules(encoder)[0].inner.__class__ = TriplingLayer


def with_layers_of_other_shape(encoder: ClinicalODERNN) -> None:
    torch.manual_seed(5)
    encoder.field.inner = nn.Linear(6, 20).double()
    encoder.field.outer = nn.Linear(20, 6, bias=False).double()


def with_outer_bias(encoder: ClinicalODERNN) -> None:
    stock_modules(encoder)[0].outer.bias = nn.Parameter(torch.full((6,), 0.5).double())


def with_field_hook(encoder: ClinicalODERNN) -> None:
    encoder.field.register_forward_hook(lambda module, inputs, output: output - 5 * inputs[0])


def with_cell_hook(encoder: ClinicalODERNN) -> None:
    encoder.update.register_forward_hook(lambda module, inputs, output: output / 2)


def with_layer_hook(encoder: ClinicalODERNN) -> None:
    stock_modules(encoder)[0].outer.register_forward_pre_hook(lambda module, inputs: 3 * inputs[0])


@pytest.mark.parametrize(
    ("alter", "solver"),
    [
        (with_other_field, "rk4"),
        (with_other_cell, "rk4"),
        (with_own_forward, "rk4"),
        (with_other_layer, "rk4"),
        (with_layers_of_other_shape, "rk4"),
        (with_outer_bias, "rk4"),
        (with_field_hook, "rk4"),
        (with_cell_hook, "rk4"),
        (with_layer_hook, "rk4"),
        (with_other_field, "midpoint"),
        (with_cell_hook, "dopri5"),
    ],
)
def test_an_altered_field_or_update_takes_effect_under_every_solver(
    alter: Callable[[ClinicalODERNN], None], solver: str
) -> None:
    stock = same_weights(make_encoder(), solver, 1e-8)
    altered, plain = copy.deepcopy(stock), same_weights(make_encoder(), "dopri5", 1e-8)
    alter(altered)
    alter(plain)
    batch = make_batch()
    states = altered(*batch)
    assert float((states - stock(*batch)).detach().abs().max()) > 0.05
    torch.testing.assert_close(states, plain(*batch), rtol=0, atol=2e-2)


@pytest.mark.parametrize("part", ["field", "update"])
def test_a_backward_hook_sees_the_gradient(part: str) -> None:
    encoder, seen = make_encoder(), []
    getattr(encoder, part).register_full_backward_hook(lambda *_: seen.append(part))
    gradients(encoder, make_batch())
    assert seen


# ---------------------------------------------------------------- the model as defined


def defined_states(encoder: ClinicalODERNN, batch: Batch) -> list[Tensor]:
    """The model as its definition says, patient by patient with torch's own cell: slow, obvious."""
    result = []
    scale, unit = encoder.time_scale, math.log1p(encoder.time_scale)
    for times, values, observed in zip(*batch, strict=True):
        state = torch.zeros(1, encoder.hidden_dim, dtype=torch.float64)
        rows = []
        for i in range(int(observed.any(dim=1).sum())):
            gap = float(times[i] - times[i - 1]) if i else 0.0
            if gap > 0:
                moments = torch.tensor([0.0, gap / scale], dtype=torch.float64)
                state = torchdiffeq.odeint(
                    lambda _, h: encoder.field(h), state, moments, rtol=1e-11, atol=1e-12
                )[1]
            carried, before, ages = [], [], []
            for f in range(encoder.input_dim):
                seen = [k for k in range(i + 1) if observed[k, f]]
                earlier = [k for k in seen if k < i]
                latest = float(values[seen[-1], f]) if seen else float(encoder.value_mean[f])
                carried.append((latest - encoder.value_mean[f]) / encoder.value_std[f])
                before.append(float(bool(earlier)))
                hours = float(times[i] - times[earlier[-1]]) if earlier else 0.0
                ages.append(math.log1p(hours) / unit)
            clock = math.log1p(gap) / unit, math.log1p(times[i] - times[0]) / unit, math.log(i + 1)
            inputs = [*carried, *observed[i], *before, *ages, *clock]
            row = torch.tensor([inputs], dtype=torch.float64)
            state = encoder.update(encoder.read(row).relu(), state)
            rows.append(encoder.norm(state))
        result.append(torch.cat(rows))
    return result


@pytest.mark.parametrize("fused", [True, False])
def test_states_are_those_of_the_definition_patient_by_patient(fused: bool) -> None:
    encoder = make_encoder(gain=1.0)
    encoder.fused = fused
    times, values, observed = make_batch(lengths=(6, 1, 4, 6))
    batch = times, values * 3 + 5, observed
    encoder.fit_normalizer(batch[1], batch[2])
    states = encoder(*batch)
    for i, expected in enumerate(defined_states(encoder, batch)):
        torch.testing.assert_close(states[i, : len(expected)], expected, rtol=0, atol=1e-6)
        assert torch.equal(states[i, len(expected) :], torch.zeros_like(states[i, len(expected) :]))


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


def test_a_single_observation_needs_no_equation() -> None:
    encoder = make_encoder()
    with torch.no_grad():
        for parameter in encoder.field.parameters():
            parameter.fill_(torch.nan)
    assert bool(torch.isfinite(encoder(*make_batch(lengths=(1, 1)))).all())


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "midpoint"])
def test_config_and_weights_rebuild_the_encoder_to_the_bit(solver: str) -> None:
    encoder = make_encoder(solver=solver, time_scale=24, rtol=1e-5, atol=1e-6)
    times, values, observed = make_batch()
    encoder.fit_normalizer(values * 7 + 100, observed)
    rebuilt = ClinicalODERNN(**encoder.config).double()
    rebuilt.load_state_dict(encoder.state_dict())
    assert {type(value) for value in encoder.config.values()} == {int, float, str}
    assert (rebuilt.rtol, rebuilt.atol, rebuilt.time_scale) == (1e-5, 1e-6, 24.0)
    batch = times, values * 7 + 100, observed
    assert torch.equal(rebuilt(*batch), encoder(*batch))


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


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_a_constant_feature_is_centred_and_not_magnified(constant: float) -> None:
    encoder = make_encoder(1, 4).float()
    values = torch.full((7, 3, 1), constant)
    observed = torch.ones_like(values, dtype=torch.bool)
    encoder.fit_normalizer(values, observed)
    assert encoder.value_std.item() == 1.0
    inputs = inputs_of(encoder, torch.zeros(7, 3), values, observed)
    assert float(inputs[..., 0].abs().max()) <= 1e-6 * max(1.0, constant)


def test_extreme_values_are_clipped_and_ordinary_ones_are_not() -> None:
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
            "a value of feature 1 is not finite",
        ),
    ],
    ids=["nothing observed", "features", "shapes", "not bool", "nan"],
)
def test_normaliser_refuses_meaningless_values(
    values: Tensor, observed: Tensor, message: str
) -> None:
    encoder = make_encoder()
    with pytest.raises(ValueError, match=message):
        encoder.fit_normalizer(values, observed)
    assert torch.equal(encoder.value_mean, torch.zeros(2, dtype=torch.float64))


def test_a_feature_that_is_never_measured_changes_no_state() -> None:
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


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_dim": 0}, "input_dim 0 and hidden_dim 6 must be positive"),
        ({"hidden_dim": 0}, "hidden_dim 0 must be positive"),
        ({"time_scale": -1.0}, r"time_scale .* got -1\.0"),
        ({"time_scale": math.inf}, "time_scale .* got inf"),
        ({"time_scale": math.nan}, "time_scale .* got nan"),
        ({"rtol": 0.0}, "rtol 0.0 and atol 0.0001 must be positive"),
        ({"atol": math.nan}, "atol nan must be positive"),
        ({"solver": "runge"}, "unknown solver 'runge'.*dopri5"),
        ({"solver": ""}, "unknown solver ''"),
        ({"solver": "scipy_solver"}, "solver 'scipy_solver' gives no gradients"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused_with_their_value(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClinicalODERNN(**{"input_dim": 2, "hidden_dim": 6, **kwargs})


def test_a_solver_that_cannot_follow_the_states_ends_in_one_line() -> None:
    encoder = same_weights(make_encoder(), "dopri5")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(RunFault, match="solver dopri5 cannot follow the states: train with rk4"):
        encoder(*make_batch())
