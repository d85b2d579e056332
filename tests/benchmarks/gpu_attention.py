"""The steps of gpu.py that compare kernels of attention and of NF4 with plain matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from gpu_plan import Plan, Result, arguments_of, data_of, skip_without_gpu
from memory import add_lora, text_config
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma3ForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

import medgemma_trainer as trainer
from language_models import disturb_adapter
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.language_model import DTYPES
from medgemma_clinical.models.trajectory_llm import adapters_in

LENGTHS = (96, 192, 320, 193)
"""Positions of a row, the first within the window. cuDNN's gradients are NaN where 64 positions are
left of a multiple of 128 (pytorch 196678); the memory-efficient kernel is wrong for one key head
where 1 is left of a multiple of 32 (pytorch 191937)."""

SHAPES = {
    "MedGemma-4B": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2560},
    "Gemma-3-270M": {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 640},
}
"""The latter has one key head."""

TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
"""Share of its norm by which a gradient may differ."""

PRODUCT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""The same for a product of packed weights."""

LOW = 120.0
"""A row whose logits all lie so far below zero meets cuDNN's fault."""

WINDOW = 128
"""Positions that a sliding layer of the small models looks back: texts are longer."""

PRODUCT_ROWS = (1, 16, 300, 1400, 5000)
"""Rows of a product: bitsandbytes chooses among kernels by their number."""

BYTES = {"vocab_size": 259, "sliding_window": WINDOW}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
Gradients = Callable[[], Tensor]


def gradients_with_cudnn(plan: Plan) -> Result:
    """Report what cuDNN's attention would do; the program switches it off."""
    skip_without_gpu()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        figures, faults = compare_all(plan)
    except RuntimeError as error:  # such as "no valid execution plan"
        figures, faults = "not to be had", [" ".join(str(error).split())[:200]]
    found = [f"cuDNN attention on: {fault}; the program keeps it off" for fault in faults]
    return Result(figures, tuple(found))


def gradients_without_cudnn(plan: Plan) -> Result:
    """Compare the gradients that the program trains with.

    Raises:
        AssertionError: a gradient is not finite, or another one than that of plain matrices.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    figures, faults = compare_all(plan)
    assert not faults, "; ".join(faults)
    return Result(figures)


def compare_all(plan: Plan) -> tuple[str, list[str]]:
    """Return the largest difference in words, and the faults."""
    dtype = plan.dtype()
    worst, faults = 0.0, []
    for shape, sizes in SHAPES.items():
        config = text_config(2, **{**sizes, **BYTES, **(NARROW if plan.toy else {})})
        model = small_model(config, dtype)
        for length in LENGTHS:
            name = f"{shape}, {length} positions"
            if not attention_case(config, length, dtype, LOW)().isfinite().all():
                faults.append(f"{name}, low logits: not finite")
            cases = {
                "attention alone": attention_case(config, length, dtype, 0.0),
                "two layers, padded": model_case(model, length, padded=True),
                "two layers, not padded": model_case(model, length, padded=False),
            }
            for kind, gradients in cases.items():
                apart = difference(gradients)
                if not apart <= TOLERANCE[dtype]:  # also where it is NaN
                    faults.append(f"{name}, {kind}: {apart:.1%} apart")
                worst = max(worst, apart)
    return f"largest difference {worst:.1e} of the norm in {str(dtype)[6:]}", faults


def difference(gradients: Gradients) -> float:
    """Return how far a gradient is from that of plain matrices, as a share of its norm."""
    found = gradients()
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradients()
    return float((found - plain).norm() / plain.norm())


def padding_mask(rows: int, length: int) -> Tensor:
    """Return which keys count, (rows, length) bool: each row is shorter than the one before."""
    lengths = length - 16 * torch.arange(rows, device=default_device())[:, None]
    return torch.arange(length, device=default_device()) < lengths


def attention_case(config: Any, length: int, dtype: torch.dtype, low: float) -> Gradients:
    """Return a function that gives the gradients of one attention, its logits about ``-low``."""
    heads, key_heads, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    draw = torch.Generator(default_device()).manual_seed(0)
    more: dict[str, Any] = {"generator": draw, "device": default_device(), "dtype": dtype}
    query, upstream = (torch.randn(2, heads, length, width, **more) for _ in range(2))
    key, value = (torch.randn(2, key_heads, length, width, **more) for _ in range(2))
    if low:
        query, key = 0.1 * query, 0.1 * key
        query[..., 0], key[..., 0] = 1.0, -low * math.sqrt(width)
    causal = torch.ones(length, length, dtype=torch.bool, device=default_device()).tril()
    mask = padding_mask(2, length)[:, None, None] & causal

    def gradients() -> Tensor:
        leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
        keys, values = (repeat_kv(x, heads // key_heads) for x in leaves[1:])
        attended = functional.scaled_dot_product_attention(leaves[0], keys, values, mask)
        return flat(torch.autograd.grad(attended, leaves, upstream))

    return gradients


def small_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a model with random weights and an adapter that matters."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM._from_config(config, dtype=dtype)
    model = add_lora(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as in training
    disturb_adapter(model)
    return model.to(default_device())


def model_case(model: Any, length: int, *, padded: bool) -> Gradients:
    """Return a function that gives the adapter's gradients of a batch of four rows."""
    shape = 4, length, model.config.hidden_size
    draw = torch.Generator(default_device()).manual_seed(1)
    more: dict[str, Any] = {"generator": draw, "device": default_device()}
    embeddings = torch.randn(shape, dtype=model.dtype, **more)
    direction = torch.randn(shape[-1], **more)
    mask = padding_mask(4, length) if padded else torch.ones(shape[:2], device=default_device())
    last = mask.sum(dim=1).long() - 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    free = length <= WINDOW and model.dtype == torch.bfloat16  # as ``TrajectoryLLM.read`` does
    keys = {"attention_mask": None if free else mask.long(), "use_cache": False}

    def gradients() -> Tensor:
        with adapters_in(model.dtype, default_device()):
            hidden = model.get_decoder()(inputs_embeds=embeddings, **keys).last_hidden_state
        read = hidden[torch.arange(4, device=last.device), last].float()
        return flat(torch.autograd.grad((read * direction).sum(), parameters))

    return gradients


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors])


# --------------------------------------------------------------------------- products in NF4


@torch.no_grad()
def compare_products(plan: Plan) -> Result:
    """Compare products with packed weights, and their gradients, with those of unpacked ones.

    Raises:
        AssertionError: a kernel of bitsandbytes is wrong for some number of rows.
    """
    words = ["--mode", "classification", "--model_name", str(plan.shallow), "--quantization", "nf4"]
    args = arguments_of(*words, "--max_samples", "100")
    model: Any = trainer.make_stage(args, data_of(args), None).model
    dtype = DTYPES[args.precision]
    packed = {
        name.removesuffix(".base_layer").rpartition(".")[2]: module
        for name, module in model.llm.named_modules()
        if type(module).__name__ == "Linear4bit" and name.endswith(".base_layer")
    }
    assert len(packed) == 7, f"{len(packed)} kinds of packed weights"
    worst, faults = 0.0, []
    for name, module in packed.items():
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
        for rows in PRODUCT_ROWS:
            torch.manual_seed(rows)
            given = torch.randn(rows, module.in_features, dtype=dtype, device=default_device())
            upstream = torch.randn(rows, len(weight), dtype=dtype, device=default_device())
            with torch.enable_grad():
                product = module(given.requires_grad_())
            gradient = torch.autograd.grad(product, given, upstream)[0]
            pairs = {
                "product": (product, functional.linear(given, weight)),
                "gradient": (gradient, upstream @ weight),
            }
            for kind, (found, plain) in pairs.items():
                apart = float((found.float() - plain.float()).norm() / plain.float().norm())
                worst = max(worst, apart)
                if not apart <= PRODUCT_TOLERANCE[dtype]:
                    faults.append(f"{name}, {rows} rows: {kind} {apart:.1%} apart")
    assert not faults, "; ".join(faults)
    return Result(f"{len(packed)} kinds, 1 to {rows:,} rows: largest difference {worst:.1e}")
