"""The scales of values, summaries and static features."""

import math

import pytest
import torch

from medgemma_clinical.models.scaler import MAX_Z_SCORE, Scaler


def test_scales_are_those_of_the_known_entries():
    scaler = Scaler(2)
    table = torch.tensor([[1.0, math.nan], [3.0, 10.0], [math.nan, 40.0], [8.0, 10.0]])
    scaler.fit(table)
    torch.testing.assert_close(scaler.mean, torch.tensor([4.0, 20.0]))
    torch.testing.assert_close(scaler.std, torch.tensor([26 / 3, 200.0]).sqrt())
    z = scaler(table)
    assert torch.equal(z == 0, table.isnan()), "unknown reads as the mean"
    torch.testing.assert_close(z.sum(0), torch.zeros(2))
    torch.testing.assert_close(z.square().sum(0), torch.tensor([3.0, 3.0]))


def test_an_extreme_value_is_clipped_and_an_ordinary_one_is_not():
    scaler = Scaler(1)
    scaler.fit(torch.tensor([[-1.0], [1.0]]))  # mean 0, standard deviation 1
    z = scaler(torch.tensor([[3.0], [-7.5], [8.5], [-1e30], [math.inf]]))
    assert z[:, 0].tolist() == [3.0, -7.5, MAX_Z_SCORE, -MAX_Z_SCORE, MAX_Z_SCORE]


@pytest.mark.parametrize("constant", [0.0, 0.1, -7 / 3, 1e6 / 3])
def test_a_constant_column_is_centred_and_not_magnified(constant):
    scaler = Scaler(1)
    table = torch.full((21, 1), constant, dtype=torch.float64)
    scaler.fit(table)
    assert scaler.std.item() == 1.0
    assert scaler(table.float()).abs().max() <= 1e-6 * max(1.0, abs(constant))


def test_a_column_that_the_training_part_never_knew_reads_as_zero_ever_after():
    scaler = Scaler(2)
    scaler.fit(torch.tensor([[1.0, math.nan], [3.0, math.nan]]))
    later = torch.tensor([[2.0, 7.0], [2.0, -1e30], [2.0, math.nan], [2.0, math.inf]])
    assert not scaler(later).any()


def test_scales_keep_their_precision_for_float32_values_far_from_zero():
    scaler = Scaler(1)
    scaler.fit(torch.tensor([9999.0, 10000.0, 10001.0] * 50_000).reshape(-1, 1))
    assert scaler.mean.item() == 10000.0
    assert scaler.std.item() == pytest.approx(math.sqrt(2 / 3), rel=1e-6)
