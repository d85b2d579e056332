"""What must not change an encoder's states, and extremes."""

import copy
import math

import pytest
import torch
from torch.nn import functional

from encoders import alone, as_dtype, assert_same, gradients, make_batch, make_encoder

KINDS = pytest.mark.parametrize("options", [{}, {"fused": False}, {"dynamics": "decay"}], ids=str)


@KINDS
@pytest.mark.parametrize("filler", [0.0, -1e6, math.inf])
def test_padding_and_what_stands_in_it_or_for_unmeasured_values_changes_nothing(options, filler):
    encoder = make_encoder(**options)
    expected, slopes = gradients(encoder, make_batch(ends=True))
    times, values, observed, until = make_batch(ends=True, filler=filler)
    found, found_slopes = gradients(encoder, (times, values, observed, until))
    torch.testing.assert_close((found, found_slopes), (expected, slopes), rtol=0, atol=1e-12)
    padded = (
        functional.pad(times, (0, 4), value=filler),
        functional.pad(values, (0, 0, 0, 4), value=filler),
        functional.pad(observed, (0, 0, 0, 4)),
    )
    states = encoder(*padded, until)
    torch.testing.assert_close(states[:, :6], expected[:, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(states[:, -1], expected[:, -1], rtol=0, atol=1e-12)
    assert not states[:, 6:-1].any()


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        ({}, 1e-12),
        ({"fused": False}, 1e-12),
        ({"dynamics": "decay"}, 1e-12),
        ({"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}, 1e-4),
    ],
)
def test_neither_other_patients_nor_their_order_change_a_patient(options, atol):
    encoder = make_encoder(hidden_dim=16, **options)
    times, values, observed, until = make_batch((5, 1, 3, 5), ends=True)
    times[3], until[3] = 20 * times[3], 20 * until[3]  # its gaps need many more steps
    batch = times, values, observed, until
    states = encoder(*batch)
    order = [2, 0, 3, 1]
    reordered = encoder(*(tensor[order] for tensor in batch))
    torch.testing.assert_close(reordered, states[order], rtol=0, atol=atol)
    for i, length in enumerate((5, 1, 3, 5)):
        single = encoder(*alone(batch, i))[0]
        torch.testing.assert_close(states[i, :length], single[:-1], rtol=0, atol=atol)
        torch.testing.assert_close(states[i, -1], single[-1], rtol=0, atol=atol)


@KINDS
def test_later_observations_change_no_earlier_state(options):
    encoder, batch = make_encoder(**options), make_batch((6, 5, 3))
    earlier = encoder(*(tensor[:, :3] for tensor in batch))
    torch.testing.assert_close(encoder(*batch)[:, :3], earlier, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("shift", [-16.0, 8192.0])
def test_a_shift_of_time_changes_nothing(options, shift):
    encoder, (times, values, observed, until) = make_encoder(**options), make_batch(ends=True)
    expected = gradients(encoder, (times, values, observed, until))
    shifted = times + shift, values, observed, until + shift
    assert_same(gradients(encoder, shifted), expected, 1e-12)


def test_the_unit_of_a_feature_changes_nothing():
    times, values, observed = make_batch()
    states = []
    for converted in (values, values * torch.tensor([88.4, 0.01]) + torch.tensor([-3.0, 40.0])):
        encoder = make_encoder()
        encoder.fit_normalizer(converted, observed)
        states.append(encoder(times, converted, observed))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_inputs_of_any_type_are_read_as_the_numbers_that_they_hold(dtype):
    encoder = make_encoder().float()
    batch = as_dtype(make_batch(ends=True, filler=0.0), torch.float32)
    whole = [tensor.round() if tensor.dtype != torch.bool else tensor for tensor in batch]
    states = encoder(*as_dtype(whole, dtype))
    assert states.dtype == torch.float32
    assert torch.equal(states, encoder(*whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"solver": "dopri5"}], ids=str)
def test_cuda_gives_the_states_and_gradients_of_the_cpu(options):
    encoder = make_encoder(hidden_dim=64, gain=1.0, **options).float()
    batch = as_dtype(make_batch((12, 1, 7, 30), ends=True), torch.float32)
    on_gpu = tuple(tensor.cuda() for tensor in batch)
    states, slopes = gradients(copy.deepcopy(encoder).cuda(), on_gpu)
    assert states.is_cuda
    found = states.cpu(), {name: slope.cpu() for name, slope in slopes.items()}
    assert_same(found, gradients(encoder, batch), 1e-4)


HOURS = (0.0, 1.0, 5.0)


@pytest.mark.parametrize(
    ("hours", "value", "scale", "options"),
    [
        ((0.0, 1.0, 2000.0), 1.0, None, {}),
        ((0.0, 1e-30, 24.0), 1.0, None, {}),
        ((0.0, 1e-30, 24.0), 1.0, None, {"solver": "dopri5"}),
        ((-1e4, 0.0, 1e-3), 1.0, None, {"fused": False}),
        ((0.0, 1.0, 7.2e5), 1.0, None, {"dynamics": "decay"}),
        (tuple(range(0, 3000, 6)), 1.0, None, {}),
        (HOURS, -1e30, None, {}),
        (HOURS, 1e-30, None, {}),
        (HOURS, 1e300, None, {}),
        (HOURS, 1e-45, 1e-45, {}),
        (HOURS, 1e30, 1e30, {}),
    ],
)
def test_extremes_give_finite_states_and_gradients(hours, value, scale, options):
    encoder = make_encoder(1, 8, time_scale=72.0, gain=1.0, **options).float()
    values = torch.full((1, len(hours), 1), value, dtype=torch.float64)
    seen = torch.ones_like(values, dtype=torch.bool)
    if scale is not None:
        encoder.fit_normalizer(scale * torch.tensor([[1.0], [2.0], [4.0]]).double(), seen[0])
    states, slopes = gradients(encoder, (torch.tensor([hours]), values, seen))
    assert states.isfinite().all()
    assert all(slopes[name].isfinite().all() for name, _ in encoder.named_parameters())
