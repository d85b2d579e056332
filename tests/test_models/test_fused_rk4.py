"""The fast path: equal to the plain one, its derivative, its work and its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dte_encoder
from dte_encoder import ClinicalODERNN
from encoders import Batch, alone, gradients, in_single, make_batch, make_encoder, stock_modules
from medgemma_clinical.models import fused_rk4


def plain_twin(encoder: ClinicalODERNN) -> ClinicalODERNN:
    """The same network by the plain path and autograd."""
    twin = copy.deepcopy(encoder)
    twin.fused = False
    return twin


# ---------------------------------------------------------------- equal to the plain path


@pytest.mark.parametrize(
    ("dtype", "gain", "states", "slopes"),
    [
        (torch.float32, 1.0, 1e-6, 1e-5),
        (torch.float64, 3.0, 1e-13, 1e-13),
    ],
)
def test_states_and_gradients_are_those_of_the_plain_path(
    dtype: torch.dtype, gain: float, states: float, slopes: float
) -> None:
    encoder = make_encoder(hidden_dim=64, gain=gain).to(dtype)
    times, values, observed = make_batch(lengths=(12, 1, 7, 30, 2, 12))
    batch = times.to(dtype), values.to(dtype), observed
    twin = plain_twin(encoder)
    torch.testing.assert_close(encoder(*batch), twin(*batch), rtol=0, atol=states)
    expected = gradients(twin, batch)
    for name, gradient in gradients(encoder, batch).items():
        size = float(expected[name].abs().max())
        assert size > 0
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=slopes * max(1, size))


def test_the_fast_path_serves_stock_modules_alone_and_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    original = dte_encoder.fused_states

    def counting(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(dte_encoder, "fused_states", counting)
    batch = make_batch()
    make_encoder()(*batch)
    assert len(calls) == 1
    plain_twin(make_encoder())(*batch)
    make_encoder(solver="dopri5")(*batch)
    hooked = make_encoder()
    hook = stock_modules(hooked)[0].inner.register_forward_hook(lambda *_: None)
    hooked(*batch)
    without_bias = make_encoder()
    without_bias.update = nn.GRUCell(dte_encoder.INPUT_WIDTH, 6, bias=False).double()
    without_bias(*batch)
    assert len(calls) == 1
    hook.remove()
    hooked(*batch)
    assert len(calls) == 2


def test_gradients_of_all_parameters_are_right() -> None:
    encoder = make_encoder(hidden_dim=3)
    times, values, observed = make_batch(lengths=(3, 1, 2))
    values = torch.where(observed, values, torch.nan)
    names = [name for name, _ in encoder.named_parameters()]
    assert len(names) == 11

    def states(*parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(
            encoder, dict(zip(names, parameters, strict=True)), (times, values, observed)
        )
        return result

    assert torch.autograd.gradcheck(states, tuple(encoder.parameters()), fast_mode=True)


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_changes_nothing_but_the_input_layers_precision(fused: bool) -> None:
    encoder = make_encoder(hidden_dim=16, gain=1.0).float()
    encoder.fused = fused
    batch = in_single(make_batch(lengths=(6, 1, 4)))
    states, expected = encoder(*batch), gradients(encoder, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = encoder(*batch)
        found = gradients(encoder, batch)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, states, rtol=0, atol=0.02)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0.05 * size)


# ---------------------------------------------------------------- its derivative in use


def test_a_second_derivative_is_refused_and_the_plain_path_has_it() -> None:
    for encoder in (make_encoder(), plain_twin(make_encoder())):
        weight = stock_modules(encoder)[0].inner.weight
        states = encoder(*make_batch())
        (slope,) = torch.autograd.grad(states.pow(3).sum(), weight, create_graph=True)
        if encoder.fused:
            with pytest.raises(RuntimeError, match="differentiate twice"):
                slope.sum().backward()
        else:
            slope.sum().backward()
            assert weight.grad is not None
            assert bool(weight.grad.any())


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    parameters = list(encoder.field.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for left, right in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(left, right)


def test_weights_that_change_between_states_and_gradients_are_noticed() -> None:
    encoder = make_encoder()
    loss = encoder(*make_batch()).pow(3).sum()
    with torch.no_grad():
        stock_modules(encoder)[1].weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_parameter_gets_a_gradient_even_where_no_time_passes() -> None:
    encoder = make_encoder()  # with several processes a parameter without gradient stops all
    encoder(*make_batch(lengths=(1, 1))).pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("part", ["field", "update", "read"])
def test_a_frozen_part_leaves_the_other_gradients_as_they_are(part: str) -> None:
    encoder, batch = make_encoder(), make_batch()
    expected = gradients(encoder, batch)
    getattr(encoder, part).requires_grad_(False)
    found = gradients(encoder, batch)
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != name.startswith(part)
        assert torch.equal(found[name], expected[name]) or not parameter.requires_grad


# ---------------------------------------------------------------- work and memory, counted


class Products(TorchDispatchMode):
    """Counts matrix products and the multiplications in them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.multiplications = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        left = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}.get(
            func.overloadpacket.__name__
        )
        if left is not None:
            self.count += 1
            self.multiplications += args[left].numel() * args[left + 1].shape[-1]
        return func(*args, **(kwargs or {}))


def products(work: Callable[[], Any]) -> Products:
    with Products() as counted:
        work()
    return counted


@pytest.mark.parametrize("lengths", [(5, 1, 3), (9, 9, 2, 30)])
def test_a_pass_takes_no_more_matrix_products_than_the_derivation_says(
    lengths: tuple[int, ...],
) -> None:
    encoder, batch = make_encoder(hidden_dim=16), make_batch(lengths)
    plan = encoder.plan(*batch)
    steps, arrivals = len(plan.n_active) - 1, sum(map(bool, plan.n_observed))
    assert arrivals < 1 + steps, "the case needs a step without arrival"
    loss: list[Tensor] = []
    forward = products(lambda: loss.append(encoder(*batch).pow(3).sum()))
    # u, three stages and the way back to h a step, one an update; W1 W2, two of the input.
    assert forward.count == 5 * steps + arrivals + 3
    backward = products(loss[0].backward)
    # The same in reverse; one for each of W1, W2, W_hh and W1 W2, which has two factors; three
    # of the input's layers, whose own inputs need none.
    assert backward.count == 5 * steps + arrivals + 4 + 2 + 3


def test_no_product_is_spent_on_padding_or_on_waiting_patients() -> None:
    encoder, (times, values, observed) = make_encoder(hidden_dim=16), make_batch((5, 1, 3))

    def spent(*batch: Tensor) -> int:
        return products(lambda: encoder(*batch).sum().backward()).multiplications

    more = torch.zeros(3, 40, 2)
    padded = (
        torch.cat([times, more[..., 0]], dim=1),
        torch.cat([values, more], dim=1),
        torch.cat([observed, more.bool()], dim=1),
    )
    assert spent(*padded) == spent(times, values, observed)
    # A patient with forty times the steps costs as much as alone, less the weights' own product.
    slow = times.clone()
    slow[0] *= 40
    both = spent(slow, values, observed)
    single = spent(*alone((slow, values, observed), 0))
    rest = spent(times[1:, :3], values[1:, :3], observed[1:, :3])
    shared = 3 * encoder.hidden_dim**3  # W1 W2 and its derivative, once a batch
    assert both == single + rest - shared


def kept_for_backward(encoder: ClinicalODERNN, batch: Batch) -> int:
    """Bytes that autograd holds after a pass, weights left out."""
    seen: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = encoder(*batch)
    assert len(states) == len(batch[0])
    return sum(seen.values())


@pytest.mark.parametrize("lengths", [(5, 1, 3), (9, 9, 2, 30)])
def test_memory_grows_with_steps_and_observations_alone(lengths: tuple[int, ...]) -> None:
    encoder = make_encoder(1, 64).float()
    batch = in_single(make_batch(lengths, features=1))
    plan = encoder.plan(*batch)
    steps = sum(plan.n_active) - plan.n_active[0]
    # A step keeps four stages and its start; an observation the cell's r, z, n, its start and
    # proposal, the state and its norm, the input layer; and places, inputs and step lengths.
    bound = 4 * 64 * (5 * steps + 8 * sum(lengths)) + 4 * 24 * (steps + sum(lengths))
    once = 4 * 64**2  # W1 W2
    assert kept_for_backward(encoder, batch) <= once + bound


def test_nothing_is_kept_where_nothing_is_trained() -> None:
    encoder, batch = make_encoder(), make_batch()
    states = encoder(*batch)
    assert kept_for_backward(encoder, batch) > 0
    with torch.no_grad():
        assert kept_for_backward(encoder, batch) == 0
        assert torch.equal(encoder(*batch), states)
    encoder.requires_grad_(False)
    assert kept_for_backward(encoder, batch) == 0
    assert torch.equal(encoder(*batch), states)
    assert not encoder(*batch).requires_grad


@pytest.mark.parametrize("trains", [True, False])
def test_stages_have_room_for_all_steps_only_where_something_is_trained(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = make_encoder().requires_grad_(trains), make_batch()
    rooms: list[int] = []
    original = fused_rk4._run_forward

    def looking(plan: Any, buffers: Any, *arguments: Any) -> None:
        listed = list(buffers)
        rooms.append(listed[0][0].untyped_storage().nbytes())
        original(plan, iter(listed), *arguments)

    monkeypatch.setattr(fused_rk4, "_run_forward", looking)
    encoder(*batch)
    _, *sizes = encoder.plan(*batch).n_active
    assert rooms == [8 * 6 * 5 * (sum(sizes) if trains else max(sizes))]
