"""The head of stage 1 and the classifier without a language model."""

from __future__ import annotations

import math

import pytest
import torch

from language_models import encoder_for, patients
from medgemma_clinical.models.encoder import collate_with_plan
from medgemma_clinical.models.trajectory import (
    PooledHead,
    TrajectoryClassifier,
    classification_output,
)

LENGTHS = (5, 1, 3)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """States (3, 6, 8) of series of 5, 1 and 3 observations, with noise in the padding."""
    generator = torch.Generator().manual_seed(0)
    present = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(3, 6, 8, generator=generator), present


def test_the_head_reads_the_weighted_mean_beside_the_last_state() -> None:
    torch.manual_seed(1)
    head = PooledHead(8, 0.3)
    states, present = padded()
    logits = head(states, present)
    for row, length in enumerate(LENGTHS):
        alone = states[row, :length]
        shares = (alone @ head.attention.weight[0]).softmax(dim=0)
        read = torch.cat([shares @ alone, alone[-1]])
        expected = head.output.weight[0] @ read + head.output.bias[0]
        torch.testing.assert_close(logits[row], expected)


def test_padding_moves_no_logit_and_gets_no_gradient() -> None:
    head = PooledHead(8, 0.3)
    states, present = padded()
    states.requires_grad_()
    logits = head(states, present)
    logits.sum().backward()
    assert states.grad is not None
    assert not states.grad[~present].any()
    assert bool(states.grad[present].any(dim=1).all())
    other = torch.where(present[..., None], states, 1e6)
    assert torch.equal(head(other, present), logits)


@pytest.mark.parametrize("prevalence", [0.02, 0.5, 0.9])
def test_a_head_starts_at_the_risk_of_the_training_part(prevalence: float) -> None:
    head = PooledHead(8, prevalence)
    torch.nn.init.zeros_(head.output.weight)
    risk = head(*padded()).sigmoid()
    torch.testing.assert_close(risk, torch.full((3,), prevalence))


def test_the_loss_is_the_summed_cross_entropy() -> None:
    logit, labels = torch.tensor([0.3, -2.0, 40.0]), torch.tensor([1.0, 0.0, 1.0])
    output = classification_output(logit, labels)
    expected = math.log1p(math.exp(-0.3)) + math.log1p(math.exp(-2.0))
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.terms == 3
    assert output.logit is logit


def test_a_batch_with_and_without_its_plan_gives_the_same_logits() -> None:
    dataset = patients()
    torch.manual_seed(2)
    model = TrajectoryClassifier(encoder_for(dataset), 0.5)
    rows = [3, 0, 7, 12]
    planned = collate_with_plan(dataset, model.encoder)(rows)
    assert "plan" in planned
    together = model(planned)
    torch.testing.assert_close(model(dataset.collate(rows)).logit, together.logit)
    for k, row in enumerate(rows):
        alone = model(dataset.collate([row])).logit
        torch.testing.assert_close(alone, together.logit[k : k + 1], rtol=0, atol=1e-5)
