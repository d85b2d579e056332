"""What must change an encoder's states, what must not, and extremes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dte_encoder import ClinicalODERNN
from encoders import (
    Batch,
    alone,
    evolve,
    gradients,
    in_single,
    make_batch,
    make_encoder,
    same_weights,
)
from problems import CONSTANT_DRIFT, DRIFT, let_the_equation_alone_decide


def assert_same_function(encoder: ClinicalODERNN, left: Batch, right: Batch) -> None:
    torch.testing.assert_close(encoder(*left), encoder(*right), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradients(encoder, left), gradients(encoder, right), rtol=0, atol=1e-12
    )


# ---------------------------------------------------------------- what must change nothing


def padded_by(batch: Batch, length: int) -> Batch:
    times, values, observed = batch
    patients, _, features = values.shape
    return (
        torch.cat([times, times.new_zeros(patients, length)], dim=1),
        torch.cat([values, values.new_full((patients, length, features), 7.0)], dim=1),
        torch.cat([observed, observed.new_zeros(patients, length, features)], dim=1),
    )


@pytest.mark.parametrize("solver", ["rk4", "midpoint"])
def test_padding_changes_nothing(solver: str) -> None:
    encoder = same_weights(make_encoder(), solver)
    states = encoder(*padded_by(make_batch(), 4))
    assert states.shape == (3, 9, 6)
    torch.testing.assert_close(states[:, :5], encoder(*make_batch()), rtol=0, atol=1e-12)
    assert torch.equal(states[:, 5:], torch.zeros_like(states[:, 5:]))


@pytest.mark.parametrize("filler", [math.nan, -1e6])
def test_times_and_values_in_padding_change_nothing(filler: float) -> None:
    times, values, observed = make_batch()
    present = observed.any(dim=2)
    changed = (
        torch.where(present, times, filler),
        torch.where(present.unsqueeze(2), values, filler),
        observed,
    )
    assert_same_function(make_encoder(), (times, values, observed), changed)


@pytest.mark.parametrize(
    ("solver", "fused"),
    [("rk4", True), ("rk4", False), ("euler", False), ("explicit_adams", False)],
)
def test_company_in_the_batch_changes_nothing(solver: str, fused: bool) -> None:
    # Adams' method of order 12 is stable for slow dynamics only.
    gain = 0.2 if solver == "explicit_adams" else 2.0
    encoder = make_encoder(hidden_dim=16, solver=solver, gain=gain)
    encoder.fused = fused
    times, values, observed = make_batch(lengths=(5, 1, 3, 5))
    times[3] *= 40  # a patient whose gaps need many more steps than the others'
    batch = times, values, observed
    states = encoder(*batch)
    for i in range(4):
        single = encoder(*alone(batch, i))
        torch.testing.assert_close(states[i : i + 1, : single.shape[1]], single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["dopri5", "implicit_adams"])
def test_company_changes_an_iterated_solution_within_its_tolerance_only(solver: str) -> None:
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


@pytest.mark.parametrize("shift", [-16.0, 8192.0])
def test_a_shift_of_time_changes_nothing(shift: float) -> None:
    times, values, observed = make_batch()
    assert_same_function(
        make_encoder(), (times, values, observed), (times + shift, values, observed)
    )


@pytest.mark.parametrize("filler", [math.nan, 1e6])
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


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "bosh3", "implicit_adams"])
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


def test_float32_gives_the_states_of_float64() -> None:
    encoder, batch = make_encoder(), make_batch()
    single = copy.deepcopy(encoder).float()
    torch.testing.assert_close(
        single(*in_single(batch)).double(), encoder(*batch), rtol=0, atol=1e-4
    )


def test_wider_inputs_do_not_change_the_dtype_of_the_states() -> None:
    assert make_encoder().float()(*make_batch()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_read_as_the_numbers_that_they_hold(dtype: torch.dtype) -> None:
    encoder, (times, values, observed) = make_encoder().float(), make_batch()
    narrow, short = times.to(dtype), values.to(dtype)
    assert torch.equal(
        encoder(narrow, short, observed), encoder(narrow.float(), short.float(), observed)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("solver", ["rk4", "dopri5", "midpoint"])
def test_cuda_gives_the_states_and_gradients_of_the_cpu(solver: str) -> None:
    encoder = same_weights(make_encoder(hidden_dim=64, gain=1.0), solver, 1e-5).float()
    times, values, observed = in_single(make_batch(lengths=(12, 1, 7, 30)))
    on_gpu = copy.deepcopy(encoder).cuda()
    batch_on_gpu = times.cuda(), values.cuda(), observed.cuda()
    states = on_gpu(*batch_on_gpu)
    assert states.is_cuda
    expected_states = encoder(times, values, observed)
    torch.testing.assert_close(states.cpu(), expected_states, rtol=0, atol=1e-5)
    expected = gradients(encoder, (times, values, observed))
    for name, gradient in gradients(on_gpu, batch_on_gpu).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- features


def permuted(encoder: ClinicalODERNN, order: list[int]) -> ClinicalODERNN:
    """The encoder of the features ``order`` with the weights that belong to them."""
    features = len(order)
    twin = make_encoder(features, encoder.hidden_dim)
    state = encoder.state_dict()
    columns = state["read.weight"].shape[1]
    own = [block * encoder.input_dim + f for block in range(4) for f in order]
    common = range(4 * encoder.input_dim, columns)
    state["read.weight"] = state["read.weight"][:, [*own, *common]]
    for name in ("value_mean", "value_std"):
        state[name] = state[name][order]
    twin.load_state_dict(state)
    return twin


def test_the_order_of_features_does_not_matter() -> None:
    encoder, order = make_encoder(3), [2, 0, 1]
    times, values, observed = make_batch(features=3)
    encoder.fit_normalizer(values, observed)
    twin = permuted(encoder, order)
    other = twin(times, values[..., order], observed[..., order])
    torch.testing.assert_close(other, encoder(times, values, observed), rtol=0, atol=1e-12)
    assert float((twin(times, values, observed) - other).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("filler", [math.nan, -math.inf])
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
    without = observed.clone()
    without[1:, :, 2] = False
    without[..., 0] |= observed.any(dim=2)
    both = without.clone()
    both[1, 0, 2] = True
    values[1, 0, 2] = 5.0
    left, right = encoder(times, values, without), encoder(times, values, both)
    assert torch.equal(left[[0, 2]], right[[0, 2]])
    assert float((left[1] - right[1]).detach().abs().max()) > 1e-3


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


# ---------------------------------------------------------------- extremes


def assert_finite_with_gradients(encoder: ClinicalODERNN, batch: Batch) -> None:
    assert bool(torch.isfinite(encoder(*batch)).all())
    assert all(bool(torch.isfinite(g).all()) for g in gradients(encoder, batch).values())


@pytest.mark.parametrize(
    ("times", "solver"),
    [
        ([0.0, 1.0, 2000.0], "rk4"),
        ([0.0, 1e-30, 24.0], "rk4"),
        ([0.0, 1e-30, 24.0], "dopri5"),
        ([-1e4, 0.0, 1e-3], "euler"),
    ],
)
def test_extreme_gaps_give_finite_states_and_gradients(times: list[float], solver: str) -> None:
    encoder = same_weights(make_encoder(1, 8, time_scale=72.0, gain=1.0), solver, 1e-3).float()
    values = torch.ones(1, 3, 1)
    batch = torch.tensor([times]), values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(encoder, batch)


@pytest.mark.parametrize("value", [-1e30, 1e-30])
def test_extreme_values_give_finite_states_and_gradients(value: float) -> None:
    values = torch.full((1, 3, 1), value)
    batch = torch.tensor([[0.0, 1.0, 5.0]]), values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(make_encoder(1, 8).float(), batch)


@pytest.mark.parametrize("scale", [1e-45, 1e30])
def test_a_normaliser_fitted_to_extreme_values_gives_finite_states(scale: float) -> None:
    encoder = make_encoder(1, 8).float()
    values = scale * torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    batch = torch.tensor([[0.0, 1.0, 5.0]]), values, torch.ones_like(values, dtype=torch.bool)
    encoder.fit_normalizer(values, batch[2])
    assert_finite_with_gradients(encoder, batch)


@pytest.mark.parametrize("length", [1, 500])
def test_short_and_long_series_give_finite_states_and_gradients(length: int) -> None:
    values = torch.randn(1, length, 1)
    times = torch.linspace(0, 6 * length, length).unsqueeze(0)
    batch = times, values, torch.ones_like(values, dtype=torch.bool)
    assert_finite_with_gradients(make_encoder(1, 8, time_scale=72.0).float(), batch)
