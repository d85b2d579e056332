"""Compute, without a GPU, what fits a card: memory of a training step in a model's shapes.

    python tests/benchmarks/memory.py

The step runs on torch's meta device, where tensors have shapes and no content, and each living
storage is counted once, weights apart. "Peak" is the maximum within a step. All layers are alike,
so models of four and five layers are measured, and what the fifth adds is added for each further
one. CPU and meta device choose other kernels than CUDA, so two are replaced by CUDA's:

- dropout: the fused kernel of CUDA keeps a byte per element, the plain one keeps a number;
- attention (``sdpa``): with a mask the memory-efficient kernel; without one flash attention in
  bfloat16, and plain matrices in float32, since the memory-efficient kernel has no grouped heads.

A frozen Linear stands for bitsandbytes' Linear4bit, which keeps no input either. What it unpacks in
a step, one weight at a time, is in ``RESERVED``.
"""

import argparse
import itertools
import sys
import weakref
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from common import machine, write
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3Config

from medgemma_clinical.models.decoders import LORA_TARGETS
from medgemma_clinical.models.language_model import (
    DTYPES,
    quiet_libraries,
    set_checkpointing,
)
from medgemma_clinical.models.trajectory_llm import answer_loss

META = torch.device("meta")
MIB, GIB = 2**20, 2**30
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim")
SHAPES = {
    "4B": dict(zip(SIZES, (2560, 10_240, 34, 8, 4, 256), strict=True)),
    "12B": dict(zip(SIZES, (3840, 15_360, 48, 16, 8, 256), strict=True)),
    "27B": dict(zip(SIZES, (5376, 21_504, 62, 32, 16, 128), strict=True)),
    "Qwen3-8B": dict(zip(SIZES, (4096, 12_288, 36, 32, 8, 128), strict=True)),
}
"""The first three of Gemma 3's text part, of which MedGemma 4B and 1.5 4B have the first, MedGemma
27B the last. Qwen3-8B has other words, and an output that is not the embedding.

Source: transformers, ``models/gemma3/convert_gemma3_weights.py``; Qwen3-8B's ``config.json``."""

CARDS = {
    "T4, 16 GB": (14.7, "fp32"),
    "RTX 4060 Ti, 16 GB": (15.6, "bf16"),
    "L4, 24 GB": (22.0, "bf16"),
    "A100, 40 GB": (39.4, "bf16"),
    "A100 or H100, 80 GB": (79.1, "bf16"),
}
"""GiB that torch has on a card, and the precision that the program chooses there."""

ROWS, LENGTH, ANSWERS, LAYERS = 16, 1024, 2048, (4, 5)
"""Rows of a measured step, positions of a row (<bos>, soft tokens, text, padding), answer tokens of
stage 3's loss, layers of the measured models."""

COPIES = 6
"""Of the adapter in float32: weights, gradients, two moments of AdamW, average, best epoch."""

RESERVED = 1.5
"""GiB assumed for the CUDA context, the workspace of cuBLAS and an unpacked weight."""


class LiveStorages(TorchDispatchMode):
    """Count the bytes of all storages that are made and not yet freed."""

    def __init__(self, model):
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.live -= self.known.pop(key)


def shape_config(shape, layers):
    """Return the configuration of a shape with so many layers."""
    sizes = {**SHAPES[shape], "num_hidden_layers": layers}
    if shape.startswith("Qwen3"):
        return Qwen3Config(**sizes, vocab_size=151_936, tie_word_embeddings=False)
    return text_config(layers, **sizes)


def text_config(layers, **sizes):
    """Return a configuration in the shape of 4B, with so many layers and some sizes changed."""
    known = {**SHAPES["4B"], "vocab_size": 262_208, "sliding_window": 1024}
    known |= {"num_hidden_layers": layers, "initializer_range": 0.02}
    return Gemma3TextConfig(**{**known, **sizes})


def add_lora(model, dropout=0.0):
    """Return a frozen model with the program's adapter of rank 8 in the model's dtype.

    So autocast computes its products; its copies of the weights themselves are not counted.
    """
    options = {"target_modules": list(LORA_TARGETS), "lora_dropout": dropout}
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **options)
    with quiet_libraries():
        return get_peft_model(model.requires_grad_(False), config, autocast_adapter_dtype=False)


def build(dtype, config):
    """Return the language model with an adapter as the program makes it, on the meta device."""
    config.layer_types[-1] = "full_attention"  # the whole of Gemma has both kinds
    with META:
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_config(config, **options)
    return add_lora(model, 0.05).train()


def cuda_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False, enable_gqa=False
):
    """Attend by the kernel that CUDA chooses if cuDNN's is off."""
    ops, options = torch.ops.aten, {"scale": scale}
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1e9)
        bias = bias.expand(-1, query.shape[1], -1, -1)
        kernel = ops._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, **options)[0]
    if query.dtype == torch.float32:
        kernel, options["enable_gqa"] = ops._scaled_dot_product_attention_math, enable_gqa
        return kernel(query, key, value, None, dropout_p, is_causal, **options)[0]
    kernel = ops._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, **options)[0]


@contextmanager
def kernels_of_cuda():
    """Replace kernels that keep something else on the meta device by those of CUDA."""

    def dropout(x, p, training, inplace=False):
        return torch.native_dropout(x, p, training)[0] if p else x

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", cuda_attention),
        mock.patch.object(functional, "dropout", dropout),
    ):
        yield


def empty(model, *shape):
    """Return hidden states of the model on the meta device."""
    shape = (*shape, model.config.hidden_size)
    return torch.empty(shape, dtype=model.dtype, device=META, requires_grad=True)


def measure_step(model, rows, length, padded):
    """Take a step of stage 2's model; return the bytes kept after forward, and their maximum."""
    embeddings = empty(model, rows, length)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=META) if padded else None
    masks = {"full_attention": mask, "sliding_attention": mask}
    with kernels_of_cuda(), LiveStorages(model) as storages:
        body = model.get_base_model().model
        hidden = body(inputs_embeds=embeddings, attention_mask=masks, use_cache=False)
        last = hidden.last_hidden_state[:, -1].float()
        kept = storages.live
        last.sum().backward()
    model.zero_grad()
    return kept, storages.peak


def answer_loss_peak(model, tokens=ANSWERS):
    """Return the bytes of stage 3's loss over so many answer tokens."""
    weight = model.get_output_embeddings().weight
    hidden = empty(model, tokens)
    targets = torch.empty(tokens, dtype=torch.long, device=META)
    ones = torch.empty(tokens, device=META)
    with LiveStorages(model) as storages:
        answer_loss(hidden * 1, weight, targets, ones, ones, 0, model.config).backward()
    return storages.peak


def weight_bytes(model):
    """Return the bytes of the frozen weights in NF4 with double quantisation.

    A weight of a projection takes half a byte, a block of 64 takes one and 256 blocks take four;
    the others, mainly the embedding, have the dtype of the computation.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            packed = name.endswith("base_layer.weight")
            each = 0.5 + 1 / 64 + 4 / (64 * 256) if packed else parameter.element_size()
            total += parameter.numel() * each
    return total


class Sizes(NamedTuple):
    """Bytes of training in one shape at one precision.

    ``weights`` are frozen, in NF4; ``adapter`` is one copy of what learns; ``loss`` is of stage 3
    over ``ANSWERS`` tokens; ``peak`` is per token of a step, by checkpointing.
    """

    weights: float
    adapter: float
    loss: float
    peak: dict

    def tokens(self, card, checkpointing):
        """Return the tokens of a step of stages 2 and 3 for which so many GiB suffice, or 0."""
        free = (card - RESERVED) * GIB - self.weights - COPIES * self.adapter - self.loss
        return max(0, int(free / self.peak[checkpointing]))


def measure(precision, shape="4B"):
    """Measure two models and add what each further layer adds."""
    further = SHAPES[shape]["num_hidden_layers"] - LAYERS[1]
    models = [build(DTYPES[precision], shape_config(shape, layers)) for layers in LAYERS]

    def whole(measured):
        small, large = map(measured, models)
        return large + further * (large - small)

    peak = {}
    for checkpointing in (False, True):
        if checkpointing:
            for model in models:
                set_checkpointing(model)
        steps = [
            whole(lambda model, padded=padded: measure_step(model, ROWS, LENGTH, padded)[1])
            for padded in (True, False)
        ]
        peak[checkpointing] = max(steps) / (ROWS * LENGTH)
    learns = whole(lambda m: sum(p.numel() * 4 for p in m.parameters() if p.requires_grad))
    return Sizes(whole(weight_bytes), learns, answer_loss_peak(models[0]), peak)


def card_table(measured):
    """Return a line per card: the tokens that fit of each shape, without / with checkpointing."""
    lines = [f"| Card | Precision | {' | '.join(SHAPES)} |", "|---" * (2 + len(SHAPES)) + "|"]
    for card, (memory, precision) in CARDS.items():
        fit = [measured[shape, precision] for shape in SHAPES]
        cells = [f"{x.tokens(memory, False):,} / {x.tokens(memory, True):,}" for x in fit]
        lines.append(f"| {card} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.parse_args(argv)
    pairs = itertools.product(SHAPES, DTYPES)
    measured = {(shape, precision): measure(precision, shape) for shape, precision in pairs}
    write(f"{card_table(measured)}\n\n{machine('torch', 'transformers', 'peft')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
