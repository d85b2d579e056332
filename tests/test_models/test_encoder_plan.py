"""The plan of a batch: its steps, its inputs, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from encoders import gradients, make_batch, make_encoder

# ---------------------------------------------------------------- steps


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


@pytest.mark.slow
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
