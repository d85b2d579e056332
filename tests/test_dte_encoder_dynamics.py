"""Dynamics without an equation to solve: exponential decay, and a state that is held."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dte_encoder import ClinicalODERNN, Decay, VectorField
from encoders import gradients, make_batch, make_encoder
from problems import let_the_equation_alone_decide

LENGTHS = (6, 2, 4, 1)
WAITS = torch.tensor([0.5, 13.0, 0.0, 4.25], dtype=torch.float64)
SOLVERS = ("rk4", "midpoint", "dopri5")


def lively(dynamics: str, **options: Any) -> ClinicalODERNN:
    """An encoder whose decay, if any, has a target and rates that differ."""
    encoder = make_encoder(dynamics=dynamics, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in encoder.field.parameters():
        parameter.data.normal_(generator=generator)
    return encoder


def first_values(generator_seed: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of full first observations, and where each series ends."""
    times, _, observed = make_batch(LENGTHS)
    generator = torch.Generator().manual_seed(generator_seed)
    values = torch.randn(*observed.shape, generator=generator, dtype=torch.float64)
    observed[:, 0] = True
    last = times[torch.arange(4), torch.tensor(LENGTHS) - 1]
    return times, values, observed, last + WAITS


def test_a_decay_solves_its_equation() -> None:
    """dh/dt = r (target - h), with the rate softplus(raw)."""
    decay = lively("decay").field
    assert isinstance(decay, Decay)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    dt = torch.tensor([0.0, 0.2, 1.0, 3.0, 7.0], dtype=torch.float64, requires_grad=True)
    state = decay(start, dt)
    assert torch.equal(state[0], start[0])
    rate = functional.softplus(decay.raw_rate)
    for column in range(6):
        (slope,) = torch.autograd.grad(state[:, column].sum(), dt, retain_graph=True)
        expected = rate[column] * (decay.target[column] - state[:, column])
        torch.testing.assert_close(slope, expected)


def test_a_decay_over_a_gap_is_that_over_its_parts_and_ends_at_the_target() -> None:
    decay = lively("decay").field
    assert isinstance(decay, Decay)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    first, second = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    whole = decay(start, first + second)
    torch.testing.assert_close(decay(decay(start, first), second), whole)
    end = decay(start, torch.full((3,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(end, decay.target.expand(3, -1))


def test_a_new_decay_halves_a_state_within_the_time_scale() -> None:
    """Softplus of zero is log 2."""
    decay = Decay(2).double()
    start = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(decay(start, torch.ones(1, dtype=torch.float64)), start / 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_states_decay_by_the_closed_form_between_observations_and_behind(solver: str) -> None:
    encoder = lively("decay", hidden_dim=2, solver=solver)
    let_the_equation_alone_decide(encoder)
    times, values, observed, until = first_values()
    states = encoder(times, values, observed, until)
    decay = encoder.field
    assert isinstance(decay, Decay)
    rate = functional.softplus(decay.raw_rate)
    for i, length in enumerate(LENGTHS):
        hours = torch.cat([times[i, :length], until[i : i + 1]]) - times[i, 0]
        kept = torch.exp(-rate * hours[:, None] / encoder.time_scale)
        exact = decay.target + kept * (torch.tanh(values[i, 0]) - decay.target)
        torch.testing.assert_close(states[i, :length], exact[:-1], rtol=0, atol=1e-10)
        torch.testing.assert_close(states[i, -1], exact[-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_dynamics_the_state_is_held(solver: str) -> None:
    encoder = lively("none", hidden_dim=2, solver=solver)
    let_the_equation_alone_decide(encoder)
    times, values, observed, until = first_values()
    states = encoder(times, values, observed, until)
    for i, length in enumerate(LENGTHS):
        held = torch.tanh(values[i, :1])
        torch.testing.assert_close(states[i, :length], held.expand(length, -1))
        torch.testing.assert_close(states[i, -1:], held)


def test_without_dynamics_the_update_alone_reads_the_gaps() -> None:
    encoder = lively("none")
    times, values, observed = make_batch(LENGTHS)
    states, slower = encoder(times, values, observed), encoder(2 * times, values, observed)
    present = observed.any(dim=2)
    present[:, 0] = False  # no gap in front
    assert torch.equal(states[:, 0], slower[:, 0])
    assert not torch.isclose(states[present], slower[present]).all(dim=1).any()
    assert not list(encoder.field.parameters())


@pytest.mark.parametrize("dynamics", ["decay", "none"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gap_and_a_wait_are_one_step_each_however_long(dynamics: str, solver: str) -> None:
    encoder = lively(dynamics, solver=solver, time_scale=1.0)
    times, values, observed, until = first_values()
    assert encoder.plan(times, values, observed).n_active == [4, 3, 2, 2, 1, 1]
    plan = encoder.plan(times, values, observed, until)
    assert sum(plan.n_active) == 13 + int((WAITS > 0).sum())
    assert sum(plan.n_observed) == 13


@pytest.mark.parametrize("dynamics", ["decay", "none"])
def test_no_solver_is_called(dynamics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dte_encoder.rk4_step", None)
    for solver in SOLVERS:
        encoder = lively(dynamics, solver=solver)
        monkeypatch.setattr(encoder, "_odeint", None)
        assert bool(encoder(*first_values()).isfinite().all())


def test_the_longest_gap_gives_finite_states_and_gradients() -> None:
    encoder = lively("decay", time_scale=2.0)
    times = torch.tensor([[0.0, encoder.longest_gap_hours]], dtype=torch.float64)
    batch = times, torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    assert bool(encoder(*batch).isfinite().all())
    assert all(bool(slope.isfinite().all()) for slope in gradients(encoder, batch).values())


def test_target_and_rate_learn_from_gaps_and_from_waits() -> None:
    encoder, (times, values, observed, until) = lively("decay"), first_values()
    one = (times[:, :1], values[:, :1], observed[:, :1])
    for batch in ((times, values, observed), (*one, until)):
        slopes = gradients(encoder, batch)
        assert bool(slopes["field.target"].any())
        assert bool(slopes["field.raw_rate"].any())


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("dynamics", ["ode", "decay", "none"])
def test_every_parameter_gets_a_gradient_even_where_no_time_passes(
    dynamics: str, ends: bool
) -> None:
    encoder = make_encoder(dynamics=dynamics)  # or, with several processes, all stop
    times, values, observed = make_batch((1, 1))
    until = times[:, 0] if ends else None
    encoder(times, values, observed, until).pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("dynamics", "field"),
    [("ode", {"inner", "outer"}), ("decay", {"target", "raw_rate"}), ("none", set())],
)
def test_config_and_weights_rebuild_the_encoder_to_the_bit(dynamics: str, field: set[str]) -> None:
    encoder = lively(dynamics)
    assert encoder.config["dynamics"] == dynamics
    rebuilt = ClinicalODERNN(**encoder.config).double()
    rebuilt.load_state_dict(encoder.state_dict())
    names = {name.split(".")[1] for name in encoder.state_dict() if name.startswith("field.")}
    assert names == field
    assert torch.equal(rebuilt(*first_values()), encoder(*first_values()))


def test_dynamics_differ() -> None:
    states = [make_encoder(dynamics=name)(*first_values()) for name in ("ode", "decay", "none")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(states[one][:, -1], states[other][:, -1]).all(dim=1).any()


@pytest.mark.parametrize("options", [{"dynamics": "odes"}, {"dynamics": ""}, {"dynamics": None}])
def test_unknown_dynamics_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"dynamics {options['dynamics']!r}: one of ode, decay, n"):
        ClinicalODERNN(2, **options)


@pytest.mark.parametrize("dynamics", ["decay", "none"])
def test_a_field_beside_other_dynamics_is_refused(dynamics: str) -> None:
    with pytest.raises(ValueError, match=f"dynamics '{dynamics}': .*; a field is ode"):
        ClinicalODERNN(2, 6, field=VectorField(6), dynamics=dynamics)
    assert math.isfinite(ClinicalODERNN(2, 6, field=VectorField(6)).time_scale)
