"""The encoder against its definition, closed forms, and what it keeps and refuses."""

import math
import random

import pytest
import torch
from torch import nn

from dte_encoder import DYNAMICS, ClinicalODERNN, VectorField
from encoders import (
    ADAPTIVE,
    as_dtype,
    assert_same,
    defined_states,
    gradients,
    make_batch,
    make_encoder,
)
from medgemma_clinical.files import RunFault
from problems import PROBLEMS, install


class DampedField(VectorField):
    def forward(self, state):
        return super().forward(state) - state


class HalvingCell(nn.GRUCell):
    def forward(self, inputs, state):
        return super().forward(inputs, state) / 2


def other_field(encoder):
    encoder.field.__class__ = DampedField


def other_cell(encoder):
    encoder.update.__class__ = HalvingCell


def cell_without_bias(encoder):
    encoder.update = nn.GRUCell(64, 6, bias=False).double()


def unaltered(encoder):
    pass


EXACT = [
    ({}, unaltered),
    ({"fused": False}, unaltered),
    ({"dynamics": "decay"}, unaltered),
    ({"dynamics": "decay", "solver": "dopri5"}, unaltered),
    ({"dynamics": "none"}, unaltered),
    ({}, other_field),
    ({}, other_cell),
    ({}, cell_without_bias),
]
APPROXIMATE = [
    *(({"solver": s, "rtol": 1e-8, "atol": 1e-8}, unaltered) for s in ADAPTIVE[:-1]),
    ({"solver": ADAPTIVE[-1], "rtol": 1e-6, "atol": 1e-6}, unaltered),
    ({"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}, other_field),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "alter", "dtype", "atol", "seed"),
    [
        *((*case, torch.float64, 1e-11, seed) for case in EXACT for seed in range(4)),
        *((*case, torch.float32, 1e-4, seed) for case in EXACT[:3] for seed in range(2)),
        *((*case, torch.float64, 1e-4, 1) for case in APPROXIMATE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_states_and_gradients_are_those_of_the_definition(options, alter, dtype, atol, seed):
    encoder = make_encoder(3, gain=1.5, **options)
    alter(encoder)
    encoder.to(dtype)
    lengths = random.Random(seed).choices(range(1, 9), k=4)
    batch = as_dtype(make_batch(lengths, 3, seed, ends=seed % 2 == 1), dtype)
    found = gradients(encoder, batch)
    assert found[0].dtype == dtype
    assert_same(found, gradients(encoder, batch, lambda *b: defined_states(encoder, *b)), atol)


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        ({}, 3e-6),
        ({"fused": False}, 3e-6),
        ({"solver": "dopri5", "rtol": 1e-9, "atol": 1e-9}, 1e-7),
    ],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_states_have_the_closed_form(problem, options, atol):
    encoder = make_encoder(hidden_dim=2, **options)
    solution = install(encoder, problem)
    times, _, observed, until = make_batch((6, 2, 4, 1), ends=True)
    observed[:, 0] = True
    values = torch.randn(observed.shape, dtype=torch.float64)
    states = encoder(times, values, observed, until)
    for i, length in enumerate((6, 2, 4, 1)):
        hours = torch.cat([times[i, :length], until[i : i + 1]]) - times[i, 0]
        start = torch.tanh(values[i, :1]).expand(length + 1, -1)
        exact = solution(start, hours.unsqueeze(1) / encoder.time_scale)
        found = torch.cat([states[i, :length], states[i, -1:]])
        torch.testing.assert_close(found, exact, rtol=0, atol=atol)
        assert not states[i, length:-1].any()


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_an_adaptive_solver_keeps_both_tolerances(solver):
    errors = []
    for rtol, atol in ((1e-6, 1e-6), (1e-2, 1e-9), (1e-9, 1e-2)):
        encoder = make_encoder(hidden_dim=2, solver=solver, rtol=rtol, atol=atol)
        solution = install(encoder, "saturating decay")
        times, values = torch.tensor([[0.0, 16.0]]), torch.ones(1, 2, 2)
        states = encoder(times, values, torch.ones(1, 2, 2, dtype=torch.bool))
        exact = solution(values.double()[:, 0].tanh(), times.double()[:, 1:] / 10)
        errors.append(float((states[:, 1] - exact).detach().abs().max()))
    assert errors[0] < min(2e-4, errors[1] / 10, errors[2] / 10)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("ends", [True, False])
def test_every_parameter_gets_a_gradient_where_no_time_passes(dynamics, ends):
    encoder = make_encoder(dynamics=dynamics)  # or, with several processes, all wait
    times, values, observed = make_batch((1, 1))
    encoder(times, values, observed, times[:, 0] if ends else None).pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("options", [*({"dynamics": d} for d in DYNAMICS), {"solver": "bosh3"}])
def test_config_and_weights_rebuild_the_encoder_to_the_bit(options):
    options |= {"time_scale": 24.0, "rtol": 1e-5, "atol": 1e-6, "dropout": 0.2}
    encoder = make_encoder(**options).eval()
    batch = make_batch(ends=True)
    encoder.fit_normalizer(batch[1] * 7 + 100, batch[2])
    rebuilt = ClinicalODERNN(**encoder.config).double().eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert rebuilt.config == encoder.config
    assert encoder.config.items() >= options.items()
    assert torch.equal(rebuilt(*batch), encoder(*batch))


def test_dropout_is_of_the_updates_inputs_and_of_states_and_in_training_alone():
    batch, found = make_batch((9, 7, 8, 6), ends=True), []
    for fused in (True, False):
        encoder = make_encoder(hidden_dim=32, fused=fused, dropout=0.4)
        torch.manual_seed(2)
        found.append(gradients(encoder, batch))
    assert_same(*found, 1e-12)
    states, plain = found[0][0], make_encoder(hidden_dim=32, fused=False)(*batch)
    assert torch.equal(encoder.eval()(*batch), plain)
    kept = states != 0
    assert 0.5 < kept[plain != 0].double().mean() < 0.7
    assert not torch.isclose(states[kept] * 0.6, plain[kept]).all(), "the inputs are dropped, too"


def test_the_normaliser_counts_observed_values_only():
    encoder = make_encoder().float()
    values = torch.tensor([[[1.0, math.nan], [3.0, 10.0]], [[1e6, 20.0], [5.0, 60.0]]])
    observed = torch.tensor([[[True, False], [True, True]], [[False, True], [True, True]]])
    encoder.fit_normalizer(values, observed)
    torch.testing.assert_close(encoder.scaler.knots[:, 0], torch.tensor([3.0, 30.0]))
    torch.testing.assert_close(encoder.scaler.std, torch.tensor([8 / 3, 1400 / 3]).sqrt())


ONES, SEEN = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("values", "observed", "named"),
    [
        (ONES, ~SEEN, "observed"),
        (ONES, SEEN.float(), "observed"),
        (ONES, SEEN[:2], "observed"),
        (torch.ones(3, 3), torch.ones(3, 3, dtype=torch.bool), "input_dim"),
        (torch.tensor([[1.0, 2.0], [1.0, math.nan]]), SEEN[:2], "feature 1"),
    ],
)
def test_a_normaliser_that_has_no_meaning_is_refused(values, observed, named):
    encoder = make_encoder()
    before = encoder.scaler.knots.clone()
    with pytest.raises(ValueError, match=named):
        encoder.fit_normalizer(values, observed)
    assert torch.equal(encoder.scaler.knots, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, v) for n in ("time_scale", "rtol", "atol") for v in (0.0, -1.0, math.inf, math.nan)),
        *((name, 0) for name in ("input_dim", "hidden_dim")),
        *(("dropout", share) for share in (-0.1, 1.0, math.nan)),
        *(("solver", solver) for solver in ("runge", "", "euler", "scipy_solver")),
        *(("dynamics", dynamics) for dynamics in ("odes", "", None)),
        *(("dynamics", dynamics) for dynamics in DYNAMICS[1:]),  # beside a field
    ],
)
def test_a_wrong_configuration_is_refused(name, value):
    words = {"input_dim": 2, "hidden_dim": 6, "field": nn.Tanh(), name: value}
    with pytest.raises(ValueError, match=name):
        ClinicalODERNN(**words)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_solver_that_cannot_follow_the_states_is_named(solver):
    encoder = make_encoder(solver=solver)
    nn.init.constant_(encoder.field.inner.bias, math.nan)
    with pytest.raises(RunFault, match=solver):
        encoder(*make_batch())


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_encoder_breaks_its_graph_where_it_counts_steps(fused):
    encoder, graphs = make_encoder().eval(), []
    encoder.fused = fused

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(encoder, backend=backend)
    for seed in range(2):
        batch = make_batch(seed=seed)
        assert torch.equal(compiled(*batch), encoder(*batch))
    assert "dropout" in str(graphs)
    assert "tanh" not in str(graphs)  # of the field, in a loop of another length each time
