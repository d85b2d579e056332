"""Compute, without a GPU, the memory of training steps in Gemma 3's shapes; print tables.

    python tests/benchmarks/memory.py

The step runs on torch's meta device: tensors have shapes and no content, and every storage that
lives is counted once, weights apart. "Kept" is what forward leaves for backward; "peak" is the most
within the step, gradients of the adapter included. All layers are alike, so models of four and five
layers are measured, and what the fifth adds is added for each further one. Then the rows that fit
on several cards. The attention is ``sdpa``.

CPU and meta device choose other kernels than CUDA, so two are put in place of theirs:

- dropout: the fused kernel of CUDA keeps a byte an element, the plain one keeps a number;
- attention: with a mask (any batch with padding) the memory-efficient kernel, with a bias made of
  the mask; without one flash attention in bfloat16, and in float32 the plain matrices, since the
  memory-efficient kernel has no grouped heads (transformers asks for them where no mask is there).

A frozen Linear stands for bitsandbytes' Linear4bit: ``MatMul4Bit.forward`` keeps ``(None, B)``, the
packed weight and no input, as a frozen Linear does. What it unpacks in a step, a weight at a time,
is in ``RESERVED``.
"""

import argparse
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import machine

from medgemma_clinical.models.language_model import (
    LORA_TARGETS,
    quiet_libraries,
    set_checkpointing,
    tiny_language_model,
)
from medgemma_clinical.models.trajectory_llm import answer_loss

META = torch.device("meta")
MIB, GIB = 2**20, 2**30
SHAPES = {
    "4B": {
        **{"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    },
    "12B": {
        **{"hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
    },
    "27B": {
        **{"hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62},
        **{"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
    },
}
"""Of Gemma 3's text part; MedGemma 4B and 1.5 4B have the first, MedGemma 27B the last.

Source: transformers, ``models/gemma3/convert_gemma3_weights.py``."""

LAYERS = SHAPES["4B"]["num_hidden_layers"]
LENGTHS = (128, 256, 512, 1024)
"""Positions of a row: <bos>, soft tokens, text, padding."""

CASES = (
    (False, False, LENGTHS[0]),
    (False, False, LENGTHS[-1]),
    (False, True, LENGTHS[-1]),
    (True, False, LENGTHS[-1]),
    (True, True, LENGTHS[-1]),
)
"""With checkpointing or not, with padding or not, at which length; without checkpointing first."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CARDS = {
    "T4, 16 GB": (14.7, "fp32"),
    "L4, 24 GB": (22.0, "bf16"),
    "A100, 40 GB": (39.4, "bf16"),
    "A100 or H100, 80 GB": (79.1, "bf16"),
}
"""GiB that torch has on a card, and the precision that the program chooses there."""

RESERVED = 1.5
"""GiB assumed for the CUDA context, the workspace of cuBLAS and an unpacked weight."""

ROWS, ANSWERS = 16, 2048
"""Rows of a measured step, and answer tokens of stage 3's loss."""

COPIES = 6
"""Of the adapter in float32: weights, gradients, two moments of AdamW, average, best epoch."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step: what forward leaves for backward, and the most at any time."""

    kept: int
    peak: int


class LiveStorages(TorchDispatchMode):
    """Count the bytes of all storages that are made and not yet freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self.live, self.peak = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.known.pop(key)


def text_config(layers: int = LAYERS, **sizes: int) -> Any:
    """Return a configuration in the shape of 4B, with so many layers and some sizes changed."""
    from transformers import Gemma3TextConfig

    tiny, _ = tiny_language_model()
    known: dict[str, Any] = {**SHAPES["4B"], "vocab_size": 262_208, "num_hidden_layers": layers}
    known |= {"layer_types": None, "initializer_range": 0.02}
    return Gemma3TextConfig(**{**tiny.config.to_dict(), **known, **sizes})


def add_lora(model: Any, dropout: float = 0.0) -> Any:
    """Return a frozen model with the program's adapter, whose weights have the model's dtype.

    So autocast computes their products; its copies of the weights themselves are not counted.
    """
    keys = {"target_modules": list(LORA_TARGETS), "lora_dropout": dropout}
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **keys)
    frozen = model.requires_grad_(False)
    with quiet_libraries():
        return get_peft_model(frozen, config, autocast_adapter_dtype=False)


def build(dtype: torch.dtype, config: Any, attention: str = "sdpa") -> Any:
    """Return the language model with an adapter of rank 8, as the program makes it, on meta."""
    from transformers import Gemma3ForCausalLM

    config.layer_types[-1] = "full_attention"  # the whole model has both kinds
    with META:
        model = Gemma3ForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    return add_lora(model, 0.05).train()


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend by the kernel that CUDA chooses while cuDNN's is off."""
    ops = torch.ops.aten
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1e9)
        bias = bias.expand(-1, query.shape[1], -1, -1)
        kernel = ops._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    if query.dtype == torch.float32:
        kernel, more = ops._scaled_dot_product_attention_math, {"enable_gqa": enable_gqa}
        return kernel(query, key, value, None, dropout_p, is_causal, scale=scale, **more)[0]
    kernel = ops._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Put CUDA's kernels in place of those that keep something else on the meta device."""

    def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p else x

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", cuda_attention),
        mock.patch.object(functional, "dropout", dropout),
    ):
        yield


def measure_step(model: Any, rows: int, length: int, *, padded: bool) -> StepBytes:
    """Take a step of stage 2's language model and count its bytes."""
    shape = rows, length, model.config.hidden_size
    embeddings = torch.empty(shape, dtype=model.dtype, device=META, requires_grad=True)
    kind = torch.bool if model.config._attn_implementation == "sdpa" else model.dtype
    mask = torch.ones(rows, 1, length, length, dtype=kind, device=META) if padded else None
    masks = {"full_attention": mask, "sliding_attention": mask}
    with kernels_of_cuda(), LiveStorages(model) as storages:
        body = model.get_base_model().model
        hidden = body(inputs_embeds=embeddings, attention_mask=masks, use_cache=False)
        last = hidden.last_hidden_state[:, -1].float()
        kept = storages.live
        last.sum().backward()
    model.zero_grad()
    return StepBytes(kept, storages.peak)


def measure_answer_loss(model: Any, tokens: int) -> StepBytes:
    """Count the bytes of stage 3's loss over so many answer tokens."""
    weight = model.get_output_embeddings().weight
    shape = tokens, model.config.hidden_size
    hidden = torch.empty(shape, dtype=model.dtype, device=META, requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.long, device=META)
    ones = torch.empty(tokens, device=META)
    with LiveStorages(model) as storages:
        loss = answer_loss(hidden * 1, weight, targets, ones, ones, 0)
        kept = storages.live
        loss.backward()
    return StepBytes(kept, storages.peak)


def weight_bytes(model: Any) -> int:
    """Return the bytes of the frozen weights in NF4 with double quantisation.

    Half a byte a weight of a projection, a byte a block of 64, and a float32 a 256 of these; the
    rest, embedding above all, in the dtype of the computation.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            packed = name.endswith("base_layer.weight")
            each = 0.5 + 1 / 64 + 4 / (64 * 256) if packed else parameter.element_size()
            total += parameter.numel() * each
    return round(total)


def adapter_bytes(model: Any) -> int:
    """Return the bytes of one copy of what learns."""
    return sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Sizes:
    """Bytes of training in one shape at one precision.

    Attributes:
        weights: frozen, in NF4.
        adapter: one copy of what learns.
        loss: of stage 3 over ``ANSWERS`` tokens.
        steps: by checkpointing, padding and length, each of ``ROWS`` rows.
    """

    weights: int
    adapter: int
    loss: StepBytes
    steps: dict[tuple[bool, bool, int], StepBytes]

    def per_token(self, checkpointing: bool) -> float:
        """Return the peak a token of the longest rows, with or without padding: the larger."""
        peaks = [self.steps[checkpointing, padded, LENGTHS[-1]].peak for padded in (True, False)]
        return max(peaks) / (ROWS * LENGTHS[-1])

    def step_peak(self, checkpointing: bool, tokens: int, *, answers: bool) -> float:
        """Return the peak of a step of so many tokens, stage 3's with ``answers``."""
        longest = ROWS * LENGTHS[-1]
        kept = self.steps[checkpointing, True, LENGTHS[-1]].kept / longest * tokens
        loss = kept + self.loss.peak if answers else 0.0
        return max(self.per_token(checkpointing) * tokens, loss)

    def tokens(self, card: float, checkpointing: bool) -> int:
        """Return the tokens of a step for which so many GiB suffice in stages 2 and 3, 0 if none.

        Without room for the weights there is none.
        """
        free = (card - RESERVED) * GIB - self.weights - COPIES * self.adapter - self.loss.peak
        return max(0, int(free / self.per_token(checkpointing)))


def measure(precision: str, shape: str = "4B") -> Sizes:
    """Measure models of four and five layers and add what each further layer adds."""
    sizes = dict(SHAPES[shape])
    further = sizes.pop("num_hidden_layers") - 5
    small, large = (build(DTYPES[precision], text_config(layers, **sizes)) for layers in (4, 5))

    def whole(four: int, five: int) -> int:
        return five + further * (five - four)

    steps = {}
    for checkpointing, padded, length in CASES:
        if checkpointing:
            for model in (small, large):
                set_checkpointing(model)
        pair = [measure_step(model, ROWS, length, padded=padded) for model in (small, large)]
        steps[checkpointing, padded, length] = StepBytes(
            kept=whole(*(each.kept for each in pair)),
            peak=whole(*(each.peak for each in pair)),
        )
    return Sizes(
        weights=whole(weight_bytes(small), weight_bytes(large)),
        adapter=whole(adapter_bytes(small), adapter_bytes(large)),
        loss=measure_answer_loss(small, ANSWERS),
        steps=steps,
    )


Measured = dict[tuple[str, str], Sizes]
"""By shape and precision."""


def token_table(measured: Measured) -> str:
    """Return the table of the bytes a token in the shape of 4B."""
    lines = [
        "| Precision | Checkpointing | Padding | Row | Kept, MiB a token | Peak, MiB a token |",
        "|---|---|---|---|---|---|",
    ]
    words = {True: "yes", False: "no"}
    for precision in DTYPES:
        for (checkpointing, padded, length), step in measured["4B", precision].steps.items():
            kept, peak = (n / (ROWS * length * MIB) for n in (step.kept, step.peak))
            lines.append(
                f"| {precision} | {words[checkpointing]} | {words[padded]} | {length:,} | "
                f"{kept:.2f} | {peak:.2f} |"
            )
    return "\n".join(lines)


def shape_table(measured: Measured) -> str:
    """Return the table of each shape: what does not depend on the tokens, and the peak a token."""
    lines = [
        "| Shape | Precision | Weights in NF4 | Adapter, six copies | Stage 3's loss | Peak, MiB a "
        "token, without / with checkpointing |",
        "|---|---|---|---|---|---|",
    ]
    for (shape, precision), sizes in measured.items():
        peaks = " / ".join(f"{sizes.per_token(each) / MIB:.2f}" for each in (False, True))
        lines.append(
            f"| {shape} | {precision} | {sizes.weights / GIB:.2f} GiB | "
            f"{COPIES * sizes.adapter / GIB:.2f} GiB | {sizes.loss.peak / GIB:.2f} GiB | {peaks} |"
        )
    return "\n".join(lines)


def card_table(measured: Measured) -> str:
    """Return the table of what fits on each card, without / with checkpointing."""
    lengths = " | ".join(f"{length:,} tokens" for length in LENGTHS)
    lines = [
        f"| Card | Precision | Shape | Tokens a step | Rows of {lengths} |",
        "|---" * (4 + len(LENGTHS)) + "|",
    ]
    for card, (memory, precision) in CARDS.items():
        for shape in SHAPES:
            sizes = measured[shape, precision]
            fit = [sizes.tokens(memory, checkpointing) for checkpointing in (False, True)]
            cells = [" / ".join(f"{n // length:,}" for n in fit) for length in (1, *LENGTHS)]
            lines.append(f"| {card} | {precision} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> list[str]:
    """Return all tables as they stand in docs/training.md."""
    measured = {
        (shape, precision): measure(precision, shape) for shape in SHAPES for precision in DTYPES
    }
    return [token_table(measured), shape_table(measured), card_table(measured)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.parse_args()
    sys.stdout.write("\n\n".join([*tables(), machine("torch", "transformers", "peft")]) + "\n")


if __name__ == "__main__":
    main()
