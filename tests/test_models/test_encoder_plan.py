"""The plan of a batch: its steps, its inputs, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import dte_encoder
from dte_encoder import ClinicalODERNN
from encoders import gradients, in_single, inputs_of, make_batch, make_encoder

# ---------------------------------------------------------------- steps


def test_rk4_takes_no_more_steps_than_each_patients_own_gaps_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", 0.6)
    times = torch.tensor([[5.0, 9.0, 0.0, 0.0], [0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)
    observed = torch.ones(2, 4, 2, dtype=torch.bool)
    observed[0, 2:] = False
    plan = make_encoder(time_scale=2.0).plan(times, torch.zeros(2, 4, 2), observed)
    # The second patient leads: gaps 0.5, 1.0, 1.5 in 1, 2, 3 steps; the first has 2.0 in 4.
    assert plan.n_active == [2, 2, 2, 2, 2, 1, 1]
    lengths = plan.dt.split(plan.n_active)
    assert [dt[0].item() for dt in lengths] == [0.0] + [0.5] * 6
    assert [dt[1].item() for dt in lengths[:5]] == [0.0] + [0.5] * 4
    # Observations 4 to 7 are the second patient's, in row 0; they come after 0, 1, 3, 6 steps.
    assert plan.n_observed == [2, 1, 0, 1, 1, 0, 1]
    assert plan.rows.tolist() == [0, 1, 0, 0, 1, 0]
    assert plan.observation_index.tolist() == [4, 0, 5, 6, 1, 7]


def test_a_torchdiffeq_solver_covers_a_gap_in_one_call() -> None:
    times, values, observed = make_batch((5, 1, 3))
    plan = make_encoder(solver="midpoint").plan(times, values, observed)
    assert plan.n_active == plan.n_observed == [3, 2, 2, 1, 1]


def test_inputs_and_steps_are_as_exact_as_the_weights() -> None:
    encoder = make_encoder(1, time_scale=71.3)
    hours = torch.tensor([[0.1, 0.3, 33.4, 111.7]], dtype=torch.float64)
    plan = encoder.plan(hours, torch.zeros(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool))
    inputs = encoder.inputs(plan)
    gaps = hours[0].diff(prepend=hours[0, :1]).numpy()
    expected = np.log1p([gaps, hours[0].numpy() - 0.1]) / math.log1p(71.3)
    np.testing.assert_allclose(inputs[:, 4:6].t(), expected, rtol=1e-14)
    np.testing.assert_allclose(inputs[:, 6], np.log1p(np.arange(4)), rtol=1e-14)
    steps = np.maximum(np.ceil(gaps / 7.13), 1).astype(int)
    assert steps.tolist() == [1, 1, 5, 11]
    np.testing.assert_allclose(plan.dt, np.repeat(gaps / steps / 71.3, steps), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_times_of_any_type_are_read_exactly(dtype: torch.dtype) -> None:
    hours = torch.tensor([[0, 7, 33, 120]])
    rest = torch.zeros(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool)
    encoder = make_encoder(1)
    expected, plan = encoder.plan(hours.double(), *rest), encoder.plan(hours.to(dtype), *rest)
    assert torch.equal(plan.time_features, expected.time_features)
    assert torch.equal(plan.dt, expected.dt)


# ---------------------------------------------------------------- inputs of an observation


def test_gap_elapsed_time_and_count_each_reach_the_update() -> None:
    encoder = make_encoder(time_scale=24.0)
    times = torch.tensor([[2.0, 5.0, 26.0]], dtype=torch.float64)
    batch = times, torch.zeros(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)
    inputs = inputs_of(encoder, *batch)
    expected = torch.tensor([[0.0, 3.0, 21.0], [0.0, 3.0, 24.0]], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, :, 8:10], (expected.log1p() / math.log(25)).t())
    count = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, :, 10], count.log(), rtol=0, atol=1e-7)


def test_each_feature_brings_its_latest_value_its_masks_and_its_own_age() -> None:
    encoder = make_encoder(time_scale=24.0)
    times = torch.tensor([[2.0, 5.0, 6.0, 26.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[[1.0, 9.0], [9.0, 2.0], [9.0, 9.0], [-3.0, 9.0], [9.0, 9.0]]])
    seen = torch.tensor([[[1, 0], [0, 1], [1, 0], [1, 0], [0, 0]]], dtype=torch.bool)
    values[0, 2, 0] = 1.5
    inputs = inputs_of(encoder, times, values, seen)
    carried = [[1.0, 0.0], [1.0, 2.0], [1.5, 2.0], [-3.0, 2.0]]
    assert inputs[0, :4, :2].tolist() == carried
    assert torch.equal(inputs[0, :, 2:4], seen[0].double())
    assert inputs[0, :4, 4:6].tolist() == [[0, 0], [1, 0], [1, 1], [1, 1]]
    hours = torch.tensor([[0.0, 0.0], [3.0, 0.0], [4.0, 1.0], [20.0, 21.0]], dtype=torch.float64)
    torch.testing.assert_close(inputs[0, :4, 6:8], hours.log1p() / math.log(25))
    assert bool(inputs.isfinite().all())


def test_measured_a_moment_ago_differs_from_never_measured() -> None:
    encoder = make_encoder()
    times = torch.zeros(2, 2, dtype=torch.float64)  # two rows of the same moment
    values = torch.full((2, 2, 2), 1.5, dtype=torch.float64)
    observed = torch.ones(2, 2, 2, dtype=torch.bool)
    observed[1, 0, 1] = False
    inputs = inputs_of(encoder, times, values, observed)
    differs = inputs[0, 1] != inputs[1, 1]
    assert differs.nonzero().flatten().tolist() == [5], "whether feature 1 was measured before"
    states = encoder(times, values, observed)
    assert float((states[0, 1] - states[1, 1]).detach().abs().max()) > 1e-3


def test_derivatives_by_values_reach_the_observed_values_only() -> None:
    encoder = make_encoder()
    times, values, observed = make_batch()
    values.requires_grad_()
    encoder(times, values, observed).pow(3).sum().backward()
    assert values.grad is not None
    assert bool((values.grad[observed] != 0).all())
    assert not bool(values.grad[~observed].any())


# ---------------------------------------------------------------- a plan holds its whole batch


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "midpoint"])
def test_a_plan_gives_its_own_batchs_states_whatever_becomes_of_the_tensors(solver: str) -> None:
    encoder = make_encoder(3, solver=solver)
    batch = make_batch((9, 1, 12, 4), 3)
    expected, plan = encoder(*batch), encoder.plan(*batch)
    for tensor in batch:
        tensor.zero_()
    assert torch.equal(encoder.run(plan), expected)


def test_a_plan_made_ahead_changes_no_gradient() -> None:
    encoder, batch = make_encoder(), make_batch((9, 1, 12, 4))
    plan, expected = encoder.plan(*batch), gradients(encoder, batch)
    encoder.forward = lambda *_: encoder.run(plan)  # type: ignore[method-assign]
    found = gradients(encoder, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("time_scale", "solver"), [(24.0, "rk4"), (72.0, "dopri5")])
def test_a_plan_of_an_encoder_with_another_clock_is_refused(time_scale: float, solver: str) -> None:
    plan = ClinicalODERNN(2, time_scale=time_scale, solver=solver).plan(*make_batch())
    encoder = ClinicalODERNN(2, time_scale=72.0)
    with pytest.raises(ValueError, match=r"a plan of .*, this encoder has .*scale=72"):
        encoder.run(plan)


def test_a_plan_of_another_dtype_or_number_of_features_is_refused() -> None:
    encoder = make_encoder()
    plan = encoder.plan(*make_batch())
    with pytest.raises(
        ValueError, match=r"a plan of .*n_features=2.*, this encoder has .*n_features=3"
    ):
        make_encoder(3).run(plan)
    with pytest.raises(ValueError, match=r"a plan of .*float64.*, this encoder has .*float32"):
        encoder.float().run(plan)


def test_with_a_plan_nothing_is_read_back_from_the_device() -> None:
    """On the meta device there is nothing to read: a read there fails."""
    encoder, batch = make_encoder(hidden_dim=64), make_batch((9, 1, 30, 4))
    plan = encoder.plan(*batch)
    elsewhere = tuple(tensor.to("meta") for tensor in batch)
    encoder.to("meta")
    encoder.run(plan).sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in encoder.parameters())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        encoder(*elsewhere)


def test_a_plan_moves_as_a_whole() -> None:
    times, values, observed = make_batch((5, 1, 3))
    plan = make_encoder().plan(times, values, observed, times.amax(1) + 3)
    moved = plan.to("meta", non_blocking=True)
    tensors = [member for member in vars(moved).values() if isinstance(member, Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in tensors)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (0, torch.zeros(3), r"times must be \(B, L\).*got \(3,\)"),
        (0, torch.zeros(3, 0), r"times must be .* not empty, got \(3, 0\)"),
        (0, torch.zeros(0, 5), r"times must be .* not empty, got \(0, 5\)"),
        (0, torch.zeros(3, 5, 1), r"times must be \(B, L\).*got \(3, 5, 1\)"),
        (0, torch.zeros(3, 4), r"values must be \(3, 4, 2\), got \(3, 5, 2\)"),
        (1, torch.zeros(3, 5, 1), r"values must be \(3, 5, 2\), got \(3, 5, 1\)"),
        (2, torch.ones(3, 5, dtype=torch.bool), r"observed must be \(3, 5, 2\), got \(3, 5\)"),
        (2, torch.ones(3, 5, 2), "observed must be bool, got torch.float32"),
    ],
)
def test_wrong_shapes_and_types_are_refused_with_their_shape(
    index: int, tensor: Tensor, message: str
) -> None:
    batch = list(make_batch())
    batch[index] = tensor
    with pytest.raises(ValueError, match=message):
        make_encoder().plan(*batch)


def test_derivatives_by_time_are_refused() -> None:
    encoder = make_encoder(hidden_dim=3)
    times, values, observed = make_batch(lengths=(3, 1, 2))
    times.requires_grad_()
    with pytest.raises(ValueError, match="no derivative by times"):
        encoder(times, values, observed)
    with torch.no_grad():
        assert encoder(times, values, observed).shape == (3, 3, 3)


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
        make_encoder().plan(*batch)


def test_the_longest_gap_is_known_in_hours() -> None:
    encoder = make_encoder(time_scale=2.0, solver="dopri5")
    assert encoder.longest_gap_hours == 2.0 * dte_encoder.MAX_SCALED_GAP
    values, observed = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)
    encoder.plan(torch.tensor([[0.0, encoder.longest_gap_hours]]), values, observed)
    with pytest.raises(ValueError, match="needs a larger time_scale"):
        encoder.plan(torch.tensor([[0.0, encoder.longest_gap_hours + 1]]), values, observed)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((math.inf, math.inf), "time inf at patient 0, observation 1 is not finite"),
        ((-1.7e308, 1.7e308), "time -1.7e.308 h at patient 0, observation 1 is before"),
    ],
)
def test_infinite_times_are_refused_without_a_warning(
    given: tuple[float, float], message: str
) -> None:
    times, values, observed = make_batch()
    times[0, 1:3] = torch.tensor(given, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        make_encoder().plan(times, values, observed)


def test_values_beyond_the_weights_precision_are_clipped_not_refused() -> None:
    times, values, observed = in_single(make_batch())
    wide = torch.where(observed, values.double().sign() * 1e300, 0.0)
    assert bool(make_encoder().float()(times, wide, observed).isfinite().all())
