"""The state that the encoder carries from the last observation to the end of a series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import dte_encoder
from dte_encoder import ClinicalODERNN
from encoders import Batch, alone, gradients, in_single, make_batch, make_encoder, same_weights
from problems import PROBLEMS, Problem, let_the_equation_alone_decide

LENGTHS = (6, 2, 4, 1)
WAITS = torch.tensor([0.5, 13.0, 0.0, 4.25], dtype=torch.float64)


def ends_of(batch: Batch) -> Tensor:
    """Return the hours of each patient's last observation, (B,)."""
    times, _, observed = batch
    return times[torch.arange(len(times)), observed.any(dim=2).sum(1) - 1]


def last_of(states: Tensor, batch: Batch) -> Tensor:
    """Return the states (B, H) after each patient's last observation."""
    return states[torch.arange(len(states)), batch[2].any(dim=2).sum(1) - 1]


def carried(encoder: ClinicalODERNN, batch: Batch, waits: Tensor) -> Tensor:
    """Return the states (B, H) so many hours behind the last observation."""
    return encoder(*batch, until=ends_of(batch) + waits)[:, -1]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_carried_state_has_the_closed_form_at_the_end(problem: Problem, fused: bool) -> None:
    encoder = make_encoder(hidden_dim=2)
    encoder.fused = fused
    problem.install(encoder.field)
    let_the_equation_alone_decide(encoder)
    times, _, observed = make_batch(LENGTHS)
    values = torch.randn_like(times).unsqueeze(2).expand(-1, -1, 2).clone()
    observed[:, 0] = True
    until = ends_of((times, values, observed)) + WAITS
    states = encoder(times, values, observed, until)
    elapsed = ((until - times[:, 0]) / encoder.time_scale).unsqueeze(1)
    exact = problem.solution(torch.tanh(values[:, 0]), elapsed)
    torch.testing.assert_close(states[:, -1], exact, rtol=0, atol=2e-5)


def test_an_end_adds_a_column_and_changes_no_other() -> None:
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    states = encoder(*batch)
    longer = encoder(*batch, until=ends_of(batch) + WAITS)
    assert longer.shape == (4, 7, 6)
    torch.testing.assert_close(longer[:, :-1], states, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "dopri5"])
def test_where_nobody_waits_the_last_state_is_the_carried_one(solver: str) -> None:
    encoder, batch = make_encoder(solver=solver), make_batch(LENGTHS)
    states = encoder(*batch, until=ends_of(batch))
    assert torch.equal(states[:, -1], last_of(states, batch))
    moved = carried(encoder, batch, WAITS)
    moves = (moved - states[:, -1]).abs().max(dim=1).values
    # An adaptive solver's steps are those of the batch.
    assert float(moves[2]) <= (1e-12 if solver != "dopri5" else 1e-3), "patient 2 does not wait"
    assert float(moves[[0, 1, 3]].min()) > 1e-3


@pytest.mark.parametrize("solver", ["rk4", "euler", "dopri5"])
def test_each_patient_waits_alone_whatever_the_company(solver: str) -> None:
    encoder, batch = same_weights(make_encoder(), solver), make_batch(LENGTHS)
    waits = torch.tensor([0.0, 900.0, 0.3, 41.0], dtype=torch.float64)
    together = carried(encoder, batch, waits)
    tolerance = 1e-12 if solver != "dopri5" else 1e-6  # whose steps are those of the batch
    for i in range(4):
        own = carried(encoder, alone(batch, i), waits[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], own, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "bosh3"])
def test_the_carried_state_approaches_that_of_a_tight_solver(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", 0.02)
    encoder, batch = make_encoder(gain=1.0), make_batch(LENGTHS)
    reference, other = same_weights(encoder, "dopri5"), same_weights(encoder, solver, 1e-9)
    until = ends_of(batch) + WAITS
    atol = 1e-7 if solver == "rk4" else 1e-4
    expected, found = reference(*batch, until), other(*batch, until)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    slopes = gradients(reference, (*batch, until))
    torch.testing.assert_close(gradients(other, (*batch, until)), slopes, rtol=0, atol=10 * atol)


def test_a_wait_takes_as_many_steps_as_a_gap_of_its_length() -> None:
    encoder, batch = make_encoder(time_scale=10.0), make_batch(LENGTHS)
    short, plan = encoder.plan(*batch), encoder.plan(*batch, until=ends_of(batch) + WAITS)
    assert sum(plan.n_active) - sum(short.n_active) == 1 + 13 + 0 + 5
    torch.testing.assert_close(plan.dt.sum() - short.dt.sum(), WAITS.sum() / 10)
    assert float(plan.dt.max()) <= dte_encoder.MAX_SCALED_STEP + 1e-12
    assert encoder.plan(*batch, until=ends_of(batch)).n_active == short.n_active, "nobody waits"
    adaptive = make_encoder(solver="dopri5")
    short, plan = adaptive.plan(*batch), adaptive.plan(*batch, until=ends_of(batch) + WAITS)
    assert sum(plan.n_active) - sum(short.n_active) == 3


def test_the_fast_path_carries_as_the_plain_one_and_so_do_its_gradients() -> None:
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    until = ends_of(batch) + WAITS
    fast, slopes = encoder(*batch, until), gradients(encoder, (*batch, until))
    encoder.fused = False
    torch.testing.assert_close(encoder(*batch, until), fast, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(encoder, (*batch, until)), slopes, rtol=1e-9, atol=1e-11)


def test_without_an_end_there_is_no_further_column() -> None:
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    assert encoder.plan(*batch).ends is None
    assert encoder(*batch).shape[1] + 1 == encoder(*batch, ends_of(batch)).shape[1]


def test_a_plan_with_ends_runs_as_the_batch_does() -> None:
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    until = ends_of(batch) + WAITS
    assert torch.equal(encoder.run(encoder.plan(*batch, until)), encoder(*batch, until))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_gradient_reaches_the_field_through_the_wait_alone(solver: str) -> None:
    encoder, batch = make_encoder(solver=solver), make_batch((1, 1))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    for wait in (0.0, 5.0):
        encoder.zero_grad()
        (carried(encoder, batch, torch.full((2,), wait)) * weight).sum().backward()
        slopes = [p.grad for p in encoder.field.parameters() if p.grad is not None]
        assert any(bool(slope.any()) for slope in slopes) == (wait > 0)


def test_the_derivative_of_the_carried_state_is_its_slope() -> None:
    """By central differences, for weights of each module."""
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    places = [("field.inner.weight", (1, 2)), ("update.weight_hh", (3, 1)), ("norm.bias", (2,))]
    (carried(encoder, batch, WAITS) * weight).sum().backward()
    for name, place in places:
        parameter, values = encoder.get_parameter(name), []
        assert parameter.grad is not None
        for change in (1e-6, -2e-6):
            with torch.no_grad():
                parameter[place] += change
                values.append(float((carried(encoder, batch, WAITS) * weight).sum()))
        slope = (values[0] - values[1]) / 2e-6
        assert float(parameter.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("patient", "end", "message"),
    [
        (1, -1.0, r"the end -1\.0 h of patient 1 is before its last observation"),
        (0, math.nan, "the end nan h of patient 0 is before its last observation"),
        (3, 1e6, r"the end 1000000\.0 h of patient 3 needs a larger time_scale"),
        (3, math.inf, "the end inf h of patient 3 needs a larger time_scale"),
    ],
)
def test_an_end_without_meaning_is_refused_with_value_and_place(
    patient: int, end: float, message: str
) -> None:
    batch = make_batch(LENGTHS)
    until = ends_of(batch)
    until[patient] = end
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_encoder().plan(*batch, until)


def test_an_end_within_the_series_is_refused_and_the_longest_wait_is_not() -> None:
    encoder, batch = make_encoder(time_scale=2.0, solver="dopri5"), make_batch(LENGTHS)
    with pytest.raises(ValueError, match="of patient 0 is before its last observation"):
        encoder.plan(*batch, until=ends_of(batch) - 0.125)
    encoder.plan(*batch, until=ends_of(batch) + encoder.longest_gap_hours)
    with pytest.raises(ValueError, match="needs a larger time_scale"):
        encoder.plan(*batch, until=ends_of(batch) + encoder.longest_gap_hours + 1)


def test_ends_of_another_shape_or_with_a_derivative_are_refused() -> None:
    encoder, batch = make_encoder(), make_batch(LENGTHS)
    for until in (ends_of(batch)[:, None], ends_of(batch)[:3], torch.tensor(200.0)):
        with pytest.raises(ValueError, match=r"until must be \(4,\), got "):
            encoder(*batch, until)
    until = ends_of(batch).requires_grad_()
    with pytest.raises(ValueError, match=r"no derivative by until: call until\.detach"):
        encoder(*batch, until)


def test_in_single_precision_the_end_at_the_last_observation_is_no_earlier() -> None:
    """Hours that are rounded alike keep their order."""
    hours = np.cumsum(np.random.default_rng(0).exponential(3.3, size=(50, 7)), axis=1)
    times = torch.from_numpy(hours).float()
    values, observed = torch.zeros(50, 7, 2), torch.ones(50, 7, 2, dtype=torch.bool)
    until = torch.from_numpy(hours[:, -1] + np.where(np.arange(50) % 2, 0.0, 1e-9)).float()
    states = make_encoder().float()(*in_single((times, values, observed)), until)
    assert bool(states.isfinite().all())
    assert states.dtype == torch.float32
