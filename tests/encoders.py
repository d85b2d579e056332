"""Encoders and batches of the tests, and a slow second implementation of the encoder."""

import math

import torch
import torchdiffeq
from torch.nn import functional

from dte_encoder import MAX_SCALED_STEP, SOLVERS, ClinicalODERNN
from medgemma_clinical.models.scaler import MAX_SCORE

ADAPTIVE = SOLVERS[1:]


@torch.no_grad()
def make_encoder(features=2, hidden_dim=6, *, gain=2.0, fused=True, **options):
    """A float64 encoder with livelier dynamics, scales and norm than a new one: faults show."""
    torch.manual_seed(0)
    encoder = ClinicalODERNN(features, hidden_dim, **{"time_scale": 10.0, **options}).double()
    encoder.fused = fused
    for parameter in encoder.field.parameters():
        if encoder.dynamics == "ode":
            parameter.mul_(gain)
        else:
            parameter.normal_()
    scaler = encoder.scaler
    encoder.norm.bias.normal_()
    for tensor in (encoder.norm.weight, scaler.std):
        tensor.uniform_(0.5, 2)
    for tensor in (scaler.knots, scaler.scores):  # most values lie between them
        tensor.copy_(tensor.uniform_(0.1, 0.3).cumsum(1) - 2.4)
    return encoder


def make_batch(lengths=(6, 1, 4, 2), features=2, seed=1, *, ends=False, filler=math.nan):
    """Irregular series with unmeasured values and equal times, and with ``ends`` their ends.

    Times are dyadic, so that sums are exact. The first patient's series ends at its last
    observation. ``filler`` stands in padding and for unmeasured values.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    times = (torch.randint(0, 64, shape, generator=generator).double() / 8).cumsum(1)
    present = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    observed = torch.rand((*shape, features), generator=generator) < 0.6
    observed[..., 0] |= ~observed.any(dim=2)
    observed &= present.unsqueeze(2)
    values = torch.randn((*shape, features), generator=generator, dtype=torch.float64)
    waits = torch.randint(1, 160, (len(lengths),), generator=generator).double() / 8
    waits[0] = 0.0
    until = times[torch.arange(len(lengths)), torch.tensor(lengths) - 1] + waits
    times = torch.where(present, times, filler)
    batch = times, torch.where(observed, values, filler), observed
    return (*batch, until) if ends else batch


def alone(batch, i):
    """One patient without padding."""
    length = int(batch[2][i].any(dim=1).sum())
    return tuple(
        tensor[i : i + 1, :length] if tensor.ndim > 1 else tensor[i : i + 1] for tensor in batch
    )


def as_dtype(batch, dtype):
    return tuple(tensor if tensor.dtype == torch.bool else tensor.to(dtype) for tensor in batch)


def gradients(encoder, batch, states_of=None):
    """Return the states, and the derivatives of a random combination of them by name.

    By all parameters, and by the values. The sum of normalised states would be constant.
    """
    encoder.zero_grad()
    times, values, *rest = batch
    values = values.clone().requires_grad_()
    states = (states_of or encoder)(times, values, *rest)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    (states * weight.to(states)).sum().backward()
    named = {**dict(encoder.named_parameters()), "values": values}
    slopes = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in named.items()}
    return states.detach(), slopes


def assert_same(found, expected, atol):
    """Compare what ``gradients`` returns; a derivative's error counts relative to the largest."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=atol)
    for name, slope in expected[1].items():
        size = max(1.0, float(slope.abs().max()))
        torch.testing.assert_close(
            found[1][name], slope, rtol=0, atol=10 * atol * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def defined_states(encoder, times, values, observed, until=None):
    """The states as the encoder defines them, patient by patient and one step at a time."""
    zero = encoder.scaler.std.new_zeros(())
    unit, features = math.log1p(encoder.time_scale), range(encoder.input_dim)
    result = zero.new_zeros(*times.shape, encoder.hidden_dim)
    final = []
    for b, length in enumerate(observed.any(dim=2).sum(1).tolist()):
        state, hours = zero.new_zeros(1, encoder.hidden_dim), times[b].tolist()
        for i in range(length):
            gap = hours[i] - hours[i - 1] if i else 0.0
            state = flow(encoder, state, gap)
            seen = [[k for k in range(i + 1) if observed[b, k, f]] for f in features]
            earlier = [[k for k in seen[f] if k < i] for f in features]
            z = [
                normal_score(encoder.scaler, f, values[b, seen[f][-1], f]) if seen[f] else zero
                for f in features
            ]
            times_since = [hours[i] - hours[each[-1]] if each else 0.0 for each in earlier]
            clock = [*times_since, gap, hours[i] - hours[0]]
            known = [*observed[b, i].tolist(), *map(bool, earlier)]
            rest = [*known, *(math.log1p(t) / unit for t in clock), math.log(i + 1)]
            inputs = torch.cat([torch.stack(z), zero.new_tensor(rest)]).unsqueeze(0)
            state = encoder.update(encoder.read(inputs).relu(), state)
            result[b, i] = normalised(encoder, state)
        if until is not None:
            final.append(
                normalised(encoder, flow(encoder, state, float(until[b]) - hours[length - 1]))
            )
    return torch.cat([result, torch.stack(final).unsqueeze(1)], dim=1) if final else result


def normal_score(scaler, column, value):
    """The score of one value: a line from knot to knot, and z-scores beyond them, clipped."""
    knots, scores, std = scaler.knots[column], scaler.scores[column], scaler.std[column]
    if value <= knots[0] or value >= knots[-1]:
        end = 0 if value <= knots[0] else -1
        score = scores[end] + (value - knots[end]) / std
    else:
        k = int((knots < value).sum())
        slope = (scores[k] - scores[k - 1]) / (knots[k] - knots[k - 1])
        score = scores[k] + slope * (value - knots[k])
    return score.clamp(-MAX_SCORE, MAX_SCORE)


def normalised(encoder, state):
    norm = encoder.norm
    return functional.layer_norm(state[0], [encoder.hidden_dim], norm.weight, norm.bias)


def flow(encoder, state, hours):
    """The state (1, H) after so many hours without observation."""
    field, dt = encoder.field, hours / encoder.time_scale
    if encoder.dynamics == "none" or dt == 0:
        return state
    if encoder.dynamics == "decay":
        kept = torch.exp(-functional.softplus(field.raw_rate) * dt)
        return field.target + kept * (state - field.target)
    if encoder.solver != "rk4":
        moments = state.new_tensor([0.0, dt])
        tight = {"rtol": 1e-9, "atol": 1e-11, "method": "dopri5"}
        return torchdiffeq.odeint(lambda _, h: field(h), state, moments, **tight)[1]
    steps = math.ceil(hours / (MAX_SCALED_STEP * encoder.time_scale))
    for _ in range(steps):
        k1 = dt / steps * field(state)
        k2 = dt / steps * field(state + k1 / 2)
        k3 = dt / steps * field(state + k2 / 2)
        k4 = dt / steps * field(state + k3)
        state = state + (k1 + 2 * k2 + 2 * k3 + k4) / 6
    return state
