"""The encoder protocols, and batches that bring their plan along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from dte_encoder import ClinicalODERNN
from encoders import make_batch, make_encoder
from medgemma_clinical.files import InputError
from medgemma_clinical.models.encoder import (
    Encoder,
    PlannedEncoder,
    check_gaps,
    collate_with_plan,
    encode,
)


class MeanEncoder(nn.Module):
    """The smallest encoder: the mean of the values, without a plan."""

    name: ClassVar[str] = "mean"
    hidden_dim, longest_gap_hours = 1, float("inf")

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def fit_normalizer(self, values: Tensor, observed: Tensor) -> None:
        pass

    def forward(self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor) -> Tensor:
        return torch.cat([values.mean(2), until[:, None]], dim=1).unsqueeze(2)


class FewSeries:
    """A data set as far as ``collate_with_plan`` needs it."""

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = torch.as_tensor(indices)
        times, values, observed = (tensor[rows] for tensor in make_batch((5, 1, 3, 2)))
        until = times.max(1).values + torch.tensor([0.0, 3.0, 30.0, 1.5])[rows]
        series = {"times": times, "values": values, "observed": observed}
        return {**series, "prediction_hours": until, "index": rows}

    def longest_gap(self) -> float:
        return 20_000.5


def test_protocols_tell_encoders_apart() -> None:
    assert isinstance(ClinicalODERNN(1), PlannedEncoder)
    assert isinstance(MeanEncoder(), Encoder)
    assert not isinstance(MeanEncoder(), PlannedEncoder)
    assert not isinstance(nn.Linear(1, 1), Encoder)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [3, 1], [2, 0]])
def test_a_batch_with_its_plan_has_the_states_of_the_batch(indices: list[int]) -> None:
    encoder, dataset = make_encoder(), FewSeries()
    batch: Any = collate_with_plan(dataset, encoder)(indices)  # type: ignore[arg-type]
    plain: Any = dataset.collate(indices)
    assert batch.keys() - plain.keys() == {"plan"}
    assert torch.equal(encode(encoder, batch), encode(encoder, plain))


def test_a_batch_is_checked_once_where_it_brings_its_plan() -> None:
    encoder = make_encoder()
    batch: Any = collate_with_plan(FewSeries(), encoder)([0, 2])  # type: ignore[arg-type]
    expected = encoder.run(batch["plan"])
    batch["times"].fill_(float("nan"))  # read no more
    assert torch.equal(encode(encoder, batch), expected)


def test_an_encoder_without_plan_gets_the_batch_as_it_is() -> None:
    encoder, dataset = MeanEncoder(), FewSeries()
    batch: Any = collate_with_plan(dataset, encoder)([0, 1])  # type: ignore[arg-type]
    assert "plan" not in batch
    states = encode(encoder, batch)[..., 0]
    assert torch.equal(states[:, :-1], batch["values"].mean(2))
    assert torch.equal(states[:, -1], batch["prediction_hours"])


def test_a_gap_beyond_the_encoders_longest_is_an_input_error() -> None:
    dataset: Any = FewSeries()
    check_gaps(make_encoder(time_scale=2.1), dataset)
    with pytest.raises(InputError, match=r"20000.* h .*--time_scale"):
        check_gaps(make_encoder(time_scale=2.0), dataset)
