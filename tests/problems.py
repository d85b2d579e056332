"""Differential equations with closed-form answers, as weights of the encoder's own vector field.

The field is f(h) = W2 tanh(W1 h + b1). Each problem chooses W1, b1, W2 so that h' = f(h) has a
known solution, which the code that runs in training must reproduce.
"""

import math

import torch
from torch import nn

from medgemma_clinical.models.scaler import Scaler

LINEAR_GAIN = 1e-5
"""tanh(x) = x - x^3/3: inputs this small make the field linear up to a relative 1e-10."""

SATURATED = 20.0
"""tanh of this is 1 up to 8e-18, which float64 rounds to 1."""

EYE = torch.eye(2, dtype=torch.float64)
RATES = torch.tensor([0.5, 1.5], dtype=torch.float64)
DRIFT = torch.tensor([0.25, -0.75], dtype=torch.float64)


def rotated(start, time):
    (x, y), cos, sin = start.unbind(1), time.cos().squeeze(1), time.sin().squeeze(1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=1)


PROBLEMS = {
    "exponential decay": (
        *(LINEAR_GAIN * EYE, torch.zeros(2), -torch.diag(RATES) / LINEAR_GAIN),
        lambda start, time: start * torch.exp(-RATES * time),
    ),
    "rotation": (
        *(LINEAR_GAIN * EYE, torch.zeros(2), torch.tensor([[0, -1], [1, 0]]) / LINEAR_GAIN),
        rotated,
    ),
    "saturating decay": (  # h' = -tanh h: d(sinh h)/dt = -sinh h
        *(EYE, torch.zeros(2), -EYE),
        lambda start, time: torch.asinh(torch.sinh(start) * torch.exp(-time)),
    ),
    "constant drift": (
        *(torch.zeros(2, 2), torch.full((2,), SATURATED), torch.diag(DRIFT)),
        lambda start, time: start + DRIFT * time,
    ),
}
"""W1, b1 and W2 of each, and the solution: from start (n, 2) and time (n, 1) to (n, 2)."""


@torch.no_grad()
def install(encoder, problem):
    """Make a problem the encoder's equation, and that equation alone decide; return the solution.

    The first observation sets the state to tanh of the values; later ones keep it. The cell tells
    them apart by the log of the count: 0, then 0.69 and more. A pair of inputs carries a value
    through the rectifier: x = relu(x) - relu(-x). The encoder's output is the solution then.
    """
    width, update = encoder.hidden_dim, encoder.update
    eye = torch.eye(width)
    for parameter in (*update.parameters(), *encoder.read.parameters()):
        parameter.zero_()
    encoder.scaler = Scaler(width).double()  # not fitted: values are read as they are
    encoder.read.weight[:width, :width] = eye
    encoder.read.weight[width : 2 * width, :width] = -eye
    encoder.read.weight[-1, -1] = 1.0
    update.bias_ih[width : 2 * width] = -50.0
    update.weight_ih[width : 2 * width, -1] = 100.0 / math.log(2)
    update.weight_ih[2 * width :, :width] = eye
    update.weight_ih[2 * width :, width : 2 * width] = -eye
    encoder.norm = nn.Identity()
    inner, bias, outer, solution = PROBLEMS[problem]
    encoder.field.inner.weight.copy_(inner)
    encoder.field.inner.bias.copy_(bias)
    encoder.field.outer.weight.copy_(outer)
    return solution
