"""Differential equations with closed-form answers, as weights of the encoder's own vector field.

The field is f(h) = W2 tanh(W1 h + b1). Each problem chooses W1, b1, W2 so that h' = f(h) has a
known solution, which the code that runs in training must reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dte_encoder import ClinicalODERNN, VectorField

LINEAR_GAIN = 1e-5
"""tanh(x) = x - x^3/3: inputs this small make the field linear up to a relative 1e-10."""

SATURATED = 20.0
"""tanh of this is 1 up to 8e-18, which float64 rounds to 1."""


@dataclass(frozen=True)
class Problem:
    """h' = W2 tanh(W1 h + b1) with two states, and what h is after a time.

    Attributes:
        name: shown by pytest.
        inner: W1, (2, 2).
        bias: b1, (2,).
        outer: W2, (2, 2).
        solution: from the start (n, 2) and the time (n, 1), in units of the equation, to h (n, 2).
    """

    name: str
    inner: Tensor
    bias: Tensor
    outer: Tensor
    solution: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def install(self, field: nn.Module) -> None:
        """Make the stock ``field`` this problem's right-hand side."""
        assert isinstance(field, VectorField)
        field.inner.weight.copy_(self.inner)
        field.inner.bias.copy_(self.bias)
        field.outer.weight.copy_(self.outer)


def _matrix(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _linear(name: str, matrix: Tensor, solution: Callable[[Tensor, Tensor], Tensor]) -> Problem:
    """h' = A h, by a field that stays in the straight part of tanh."""
    eye = torch.eye(2, dtype=torch.float64)
    return Problem(name, LINEAR_GAIN * eye, torch.zeros(2), matrix / LINEAR_GAIN, solution)


def _rotate(start: Tensor, time: Tensor) -> Tensor:
    angle = time.squeeze(1)
    x, y = start.unbind(1)
    return torch.stack(
        [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=1
    )


RATES = torch.tensor([0.5, 1.5], dtype=torch.float64)
DRIFT = torch.tensor([0.25, -0.75], dtype=torch.float64)

EXPONENTIAL_DECAY = _linear(
    "exponential decay",
    -torch.diag(RATES),
    lambda start, time: start * torch.exp(-RATES * time),
)
ROTATION = _linear("rotation", _matrix((0.0, -1.0), (1.0, 0.0)), _rotate)
SATURATING_DECAY = Problem(  # h' = -tanh h: d(sinh h)/dt = -sinh h
    "saturating decay",
    torch.eye(2),
    torch.zeros(2),
    -torch.eye(2),
    lambda start, time: torch.asinh(torch.sinh(start) * torch.exp(-time)),
)
CONSTANT_DRIFT = Problem(
    "constant drift",
    torch.zeros(2, 2),
    torch.full((2,), SATURATED),
    torch.diag(DRIFT),
    lambda start, time: start + DRIFT * time,
)
PROBLEMS = (EXPONENTIAL_DECAY, ROTATION, SATURATING_DECAY, CONSTANT_DRIFT)


@torch.no_grad()
def let_the_equation_alone_decide(encoder: ClinicalODERNN) -> None:
    """Take input layer, update and norm out of the way of the equation, by weights only.

    The first observation sets the state to tanh of the standardised values; later ones keep it.
    The cell tells them apart by the log of the count: 0, then 0.69 and more. A pair of inputs
    carries a value through the rectifier: x = relu(x) - relu(-x).
    Afterwards the encoder's output is the equation's solution at each observation.
    """
    width, update = encoder.hidden_dim, encoder.update
    assert encoder.input_dim == width
    assert isinstance(update, nn.GRUCell)
    eye = torch.eye(width)
    for parameter in (*update.parameters(), *encoder.read.parameters()):
        parameter.zero_()
    encoder.read.weight[:width, :width] = eye
    encoder.read.weight[width : 2 * width, :width] = -eye
    encoder.read.weight[-1, -1] = 1.0
    update.bias_ih[width : 2 * width] = -50.0
    update.weight_ih[width : 2 * width, -1] = 100.0 / math.log(2)
    update.weight_ih[2 * width :, :width] = eye
    update.weight_ih[2 * width :, width : 2 * width] = -eye
    encoder.norm = nn.Identity()  # type: ignore[assignment]
