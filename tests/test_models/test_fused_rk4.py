"""The fast path: equal to the plain one, its derivative in use, and its memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dte_encoder
from encoders import as_dtype, gradients, make_batch, make_encoder


def test_it_serves_stock_modules_alone(monkeypatch):
    """That the plain path then gives the definition's states is a test of the encoder."""

    monkeypatch.setattr(dte_encoder, "fused_states", None)
    with pytest.raises(TypeError):
        make_encoder()(*make_batch())
    for options in ({"fused": False}, {"solver": "dopri5"}, {"field": torch.nn.Tanh()}):
        assert make_encoder(**options)(*make_batch()).any()


@pytest.mark.parametrize(("fused", "backward"), [(True, False), (True, True), (False, False)])
def test_autocast_changes_nothing_but_the_input_layers_precision(fused, backward):
    encoder = make_encoder(hidden_dim=16, gain=1.0, fused=fused).float()
    batch = as_dtype(make_batch(ends=True), torch.float32)
    plain, _ = gradients(encoder, batch)
    narrow = torch.autocast("cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        found, slopes = gradients(encoder, batch, narrow(encoder.forward))
    with narrow:
        read = encoder.read(encoder.inputs(encoder.plan(*batch)))
    assert {found.dtype, *(slope.dtype for slope in slopes.values())} == {torch.float32}
    torch.testing.assert_close(found, plain, rtol=0, atol=0.05)
    encoder.read.register_forward_hook(lambda *_: read.detach().float())
    states, expected = gradients(encoder, batch)
    assert torch.equal(states, found)
    for name, slope in slopes.items():
        if name.startswith("read") or name == "values":
            assert slope.any()
        else:
            assert torch.equal(slope, expected[name])


# ---------------------------------------------------------------- its derivative in use


@pytest.mark.parametrize("fused", [True, False])
def test_a_second_derivative_is_refused_and_the_plain_path_has_it(fused):
    encoder = make_encoder(fused=fused)
    weight = encoder.field.inner.weight
    states = encoder(*make_batch())
    (slope,) = torch.autograd.grad(states.pow(3).sum(), weight, create_graph=True)
    if fused:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.sum().backward()
    else:
        slope.sum().backward()
        assert weight.grad.any()


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    first = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(encoder.parameters()))
    assert all(map(torch.equal, first, again))


def test_a_weight_that_changes_between_states_and_gradients_is_noticed():
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    with torch.no_grad():
        encoder.update.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("part", ["field", "update", "read"])
def test_a_frozen_part_leaves_the_other_gradients_as_they_are(part):
    encoder, batch = make_encoder(), make_batch()
    _, expected = gradients(encoder, batch)
    getattr(encoder, part).requires_grad_(False)
    _, found = gradients(encoder, batch)
    for name, slope in found.items():
        assert torch.equal(slope, expected[name]) != name.startswith(part)


# ---------------------------------------------------------------- memory


class Allocated(TorchDispatchMode):
    """Records the largest tensor that any operation returns, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def kept_for_backward(encoder, batch):
    """Numbers that autograd holds after a pass, weights left out, and the largest tensor of it."""
    seen, weights = {}, {parameter.data_ptr() for parameter in encoder.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() // 8
        return tensor

    with Allocated() as allocated, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = encoder(*batch)
    return sum(seen.values()), allocated.largest, states


def test_memory_grows_with_steps_and_observations_where_something_is_trained_only():
    encoder, lengths = make_encoder(1, 64), (9, 9, 2, 30)
    batch = make_batch(lengths, features=1)
    _, *sizes = encoder.plan(*batch).n_active
    # A step keeps four stages and its start; an observation the cell's r, z, n, its start and
    # proposal, the state and its norm, the input layer; and places, inputs and step lengths.
    bound = 64 * (5 * sum(sizes) + 8 * sum(lengths)) + 24 * (sum(sizes) + sum(lengths)) + 64**2
    kept, largest, states = kept_for_backward(encoder, batch)
    assert 0 < kept <= bound
    assert largest == 5 * 64 * sum(sizes)
    with torch.no_grad():
        untracked = kept_for_backward(encoder, batch)
    frozen = kept_for_backward(encoder.requires_grad_(False), batch)
    for kept, largest, same in (untracked, frozen):
        assert kept == 0
        assert largest < 5 * 64 * sum(sizes) / 4, "a step's room serves all"
        torch.testing.assert_close(same, states, rtol=0, atol=1e-12)
