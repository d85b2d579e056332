"""The plan of a batch: its steps, its inputs, and what it refuses."""

import math

import numpy as np
import pytest
import torch

import dte_encoder
from encoders import gradients, make_batch, make_encoder

# ---------------------------------------------------------------- steps


def test_steps_of_two_patients(monkeypatch):
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_STEP", 0.6)
    times = torch.tensor([[5.0, 9.0, 0.0, 0.0], [0.0, 1.0, 3.0, 6.0]], dtype=torch.float64)
    observed = torch.ones(2, 4, 2, dtype=torch.bool)
    observed[0, 2:] = False
    batch = times, torch.zeros(2, 4, 2), observed
    plan = make_encoder(time_scale=2.0).plan(*batch)
    # The second patient leads: gaps 0.5, 1.0, 1.5 in 1, 2, 3 steps; the first has 2.0 in 4.
    assert plan.n_active == [2, 2, 2, 2, 2, 1, 1]
    assert plan.dt.tolist() == [0.0, 0.0, *[0.5] * 10]
    # Observations 4 to 7 are the second patient's, in row 0; they come after 0, 1, 3, 6 steps.
    assert plan.n_observed == [2, 1, 0, 1, 1, 0, 1]
    assert plan.rows.tolist() == [0, 1, 0, 0, 1, 0]
    assert plan.observation_index.tolist() == [4, 0, 5, 6, 1, 7]
    assert plan.ends is None
    # The first patient waits 5 h, in 5 steps, and leads then.
    plan = make_encoder(time_scale=2.0).plan(*batch, torch.tensor([14.0, 6.0]))
    assert plan.n_active == [2, 2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert plan.ends.tolist() == [0, 1]


@pytest.mark.parametrize("options", [{}, {"solver": "dopri5"}, {"dynamics": "decay"}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_each_patient_takes_the_steps_of_its_own_gaps(options, seed):
    lengths = (5, 1, 3, 9, 2)
    batch = times, _, _, until = make_batch(lengths, seed=seed, ends=True)
    encoder = make_encoder(time_scale=7.13, **options)
    plan = encoder.plan(*batch)
    longest = math.inf if options else 0.1 * 7.13
    sizes, ended = [], {}  # of the patients, by the row of the state
    for row, patient in enumerate(np.argsort(plan.ends.numpy())):
        hours = [*times[patient, : lengths[patient]].tolist(), float(until[patient])]
        gaps = np.diff(hours)
        steps = np.maximum(np.ceil(gaps / longest), 1).astype(int)
        if gaps[-1] == 0:
            steps[-1] = 0
        taken = [dt[row].item() for dt in plan.dt.split(plan.n_active) if len(dt) > row]
        expected = np.repeat(gaps / np.maximum(steps, 1) / 7.13, steps)
        np.testing.assert_allclose(taken, [0.0, *expected], rtol=1e-14)
        sizes.append(len(taken))
        ended |= {
            (1 + sum(steps[:i]), row): patient * max(lengths) + i for i in range(lengths[patient])
        }
    assert sizes == sorted(sizes, reverse=True)
    arrivals = [index for index, n in enumerate(plan.n_observed, 1) for _ in range(n)]
    places = zip(arrivals, plan.rows.tolist(), strict=True)
    assert dict(zip(places, plan.observation_index.tolist(), strict=True)) == ended


# ---------------------------------------------------------------- inputs of an observation


def test_inputs_of_five_observations():
    encoder = make_encoder(time_scale=24.0)
    encoder.scaler.mean.zero_()
    encoder.scaler.std.fill_(1.0)
    times = torch.tensor([[2.0, 5.0, 6.0, 26.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[[1.0, 9.0], [9.0, 2.0], [1.5, 9.0], [-3.0, 9.0], [9.0, 9.0]]])
    seen = torch.tensor([[[1, 0], [0, 1], [1, 0], [1, 0], [0, 0]]], dtype=torch.bool)
    inputs = encoder.inputs(encoder.plan(times, values, seen)).tolist()
    latest = [[1.0, 0.0], [1.0, 2.0], [1.5, 2.0], [-3.0, 2.0]]
    before = [[0, 0], [1, 0], [1, 1], [1, 1]]
    ages = [[0.0, 0.0], [3.0, 0.0], [4.0, 1.0], [20.0, 21.0]]
    clock = [[0.0, 0.0], [3.0, 3.0], [1.0, 4.0], [20.0, 24.0]]  # gap and time since the first
    for i, found in enumerate(inputs):
        logs = [math.log1p(hours) / math.log(25) for hours in (*ages[i], *clock[i])]
        expected = [*latest[i], *seen[0, i].int().tolist(), *before[i], *logs, math.log(i + 1)]
        assert found == pytest.approx(expected, rel=1e-14)


# ---------------------------------------------------------------- a plan holds its whole batch


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"solver": "dopri5"}], ids=str)
def test_a_plan_gives_its_batchs_states_whatever_becomes_of_the_tensors(options):
    encoder, batch = make_encoder(**options), make_batch(ends=True)
    expected, slopes = gradients(encoder, batch)
    plan = encoder.plan(*batch)
    for tensor in batch:
        tensor.zero_()
    states, found = gradients(encoder, batch, lambda *_: encoder.run(plan))
    assert torch.equal(states, expected)
    assert all(torch.equal(found[name], slopes[name]) for name in found if name != "values")


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"dynamics": "decay"}], ids=str)
def test_with_a_plan_nothing_is_read_back_from_the_device(options):
    """On the meta device there is nothing to read: a read there fails."""
    encoder, batch = make_encoder(**options), make_batch(ends=True)
    plan = encoder.plan(*batch)
    encoder.to("meta")
    encoder.run(plan).sum().backward()
    assert all(parameter.grad.is_meta for parameter in encoder.parameters())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        encoder(*(tensor.to("meta") for tensor in batch))


# ---------------------------------------------------------------- refusals


def named_batch():
    return dict(zip(("times", "values", "observed", "until"), make_batch(ends=True), strict=True))


@pytest.mark.parametrize(
    ("member", "tensor", "named"),
    [
        *(("times", torch.zeros(*shape), "times") for shape in ((4,), (4, 0), (0, 6), (4, 6, 1))),
        ("times", torch.zeros(4, 5), "values"),
        ("values", torch.zeros(4, 6, 1), "values"),
        ("observed", torch.ones(4, 6, dtype=torch.bool), "observed"),
        ("observed", torch.ones(4, 6, 2), "observed"),
        *(("until", torch.full(shape, 1e3), "until") for shape in ((), (3,), (4, 1))),
    ],
)
def test_wrong_shapes_and_types_are_refused(member, tensor, named):
    with pytest.raises(ValueError, match=named):
        make_encoder().plan(**{**named_batch(), member: tensor})


@pytest.mark.parametrize("member", ["times", "until"])
def test_a_derivative_by_time_is_refused(member):
    batch = named_batch()
    batch[member].requires_grad_()
    with torch.no_grad():
        make_encoder().plan(**batch)
    with pytest.raises(ValueError, match=member):
        make_encoder().plan(**batch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("member", "place", "value", "named"),
    [
        ("times", (2, 2), -4.0, "time"),
        ("times", (0, 0), 1e3, "time"),
        *(("times", (0, i), value, "time") for i in (0, 3, 5) for value in (math.nan, math.inf)),
        ("times", (1, 0), -math.inf, "time"),
        ("times", (0, 5), 1.1e5, "time_scale"),
        *(("values", (2, 1, 1), value, "value") for value in (math.nan, math.inf, -math.inf)),
        *(("observed", place, False, "series") for place in ((2, 0), (0, 2), 1, slice(None))),
        *(("until", 2, value, "series") for value in (-1.0, math.nan, -math.inf)),
        *(("until", 2, value, "time_scale") for value in (1.1e5, math.inf)),
    ],
)
def test_series_without_meaning_are_refused(member, place, value, named):
    batch = named_batch()
    if member == "values":
        batch["observed"][2, 1, 1] = True
    if member == "times":
        del batch["until"]
    batch[member][place] = value
    with pytest.raises(ValueError, match=named):
        make_encoder().plan(**batch)


@pytest.mark.parametrize("end", [True, False])
def test_the_longest_gap_is_accepted_and_a_longer_one_refused(end):
    encoder = make_encoder(time_scale=2.0, solver="dopri5")
    assert encoder.longest_gap_hours == 2.0 * dte_encoder.MAX_SCALED_GAP
    values, observed = torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool)

    def plan(gap):
        times = [0.0, 0.0 if end else gap]
        return encoder.plan(torch.tensor([times]), values, observed, torch.tensor([gap]))

    plan(encoder.longest_gap_hours)
    with pytest.raises(ValueError, match="time_scale"):
        plan(encoder.longest_gap_hours + 1)
