"""The steps of gpu.py that compare kernels with plain matrices, and measure speed and memory."""

import itertools
import statistics
import time

import torch
from accelerate.utils import send_to_device
from bitsandbytes.functional import dequantize_4bit
from common import SAMPLE, spread, stage_maker
from gpu_steps import NARROW, VOCABULARY, WINDOW, skip_without_gpu, words_of
from memory import MIB, add_lora, measure, text_config
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.decoders import decoder_of
from medgemma_clinical.models.language_model import DTYPES, compile_layers, set_checkpointing
from medgemma_clinical.models.trajectory_llm import adapters_in

LENGTHS = (24, 192, 320, 193)
"""Positions of a row, the first within the window. cuDNN's gradients are NaN where 64 positions are
left of a multiple of 128 (pytorch 196678); the memory-efficient kernel is wrong for one key head
where 1 is left of a multiple of 32 (pytorch 191937)."""

HEADS = {
    "MedGemma-4B": {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2560},
    "Gemma-3-270M": {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 640},
}
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
PRODUCT_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Share of its norm by which a gradient may differ, and a product of packed weights."""

PRODUCT_ROWS = (1, 16, 300, 1400, 5000)
"""Rows of a product: bitsandbytes chooses among kernels by their number."""

REPEATS, STAGE1_STEPS, LLM_STEPS = 3, 20, 4
"""Timings, and steps of each."""

UNPACKED = 10_240 * 2560 * 4
"""Bytes of the largest weight out of NF4, in float32."""

FACTOR = 1.2
"""A measured peak that differs by this factor from the computed one is a finding."""


def compare_gradients(plan, cudnn):
    """Compare gradients by the attention of the card with those by plain matrices.

    The program switches cuDNN's attention off: a fault is a failure without it, a finding with it.
    """
    if cudnn:
        skip_without_gpu()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    dtype = DTYPES[stage_maker("--data_path", SAMPLE)[0].precision]
    worst, faults = 0.0, []
    for shape, heads in HEADS.items():
        sizes = {**heads, "vocab_size": VOCABULARY, "sliding_window": WINDOW}
        model = small_model(text_config(2, **(sizes | NARROW if plan.toy else sizes)), dtype)
        lengths = LENGTHS[-1:] if plan.toy else LENGTHS
        for length, padded in itertools.product(lengths, (True, False)):
            try:
                apart = gradient_difference(model, length, padded)
            except RuntimeError as error:  # such as "no valid execution plan"
                apart, name = float("nan"), " ".join(str(error).split())[:200]
            else:
                name = f"{shape}, {length} positions{', padded' * padded}: {apart:.1%} apart"
            worst = max(worst, apart)
            if not apart <= TOLERANCE[dtype]:  # also where it is NaN
                faults.append(name)
    assert cudnn or not faults, "; ".join(faults)
    result = f"largest difference {worst:.1e} of the norm in {str(dtype)[6:]}"
    return [result, *(f"cuDNN attention on: {fault}; the program keeps it off" for fault in faults)]


def small_model(config, dtype):
    """Return a model with random weights and an adapter that changes its output."""
    torch.manual_seed(0)
    model = add_lora(Gemma3ForCausalLM._from_config(config, dtype=dtype))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as in training
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.to(default_device())


def gradient_difference(model, length, padded):
    """Return how far the adapter's gradient is from that by plain matrices, relative to its norm.

    Of four rows each is shorter than the one before, unless they are not padded.
    """
    device, shape = default_device(), (4, length, model.config.hidden_size)
    draw = torch.Generator(device).manual_seed(1)
    embeddings = torch.randn(shape, generator=draw, device=device, dtype=model.dtype)
    direction = torch.randn(shape[-1], generator=draw, device=device)
    lengths = length - 16 * padded * torch.arange(4, device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None]).long()
    parameters = [p for p in model.parameters() if p.requires_grad]
    free = length <= WINDOW and model.dtype == torch.bfloat16  # as ``TrajectoryLLM.read`` does
    keys = {"attention_mask": None if free else mask, "use_cache": False}

    def gradient():
        with adapters_in(model.dtype, device):
            hidden = model.get_decoder()(inputs_embeds=embeddings, **keys).last_hidden_state
        last = hidden[torch.arange(4, device=device), lengths - 1].float()
        found = torch.autograd.grad((last * direction).sum(), parameters)
        return torch.cat([each.flatten() for each in found])

    found = gradient()
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradient()
    return float((found - plain).norm() / plain.norm())


@torch.no_grad()
def compare_products(plan):
    """Compare products with packed weights, and their gradients, with those of unpacked ones."""
    args, _, make = stage_maker(*words_of(plan, "classification", "shallow"))
    dtype, device = DTYPES[args.precision], default_device()
    packed = {
        name.removesuffix(".base_layer").rpartition(".")[2]: module
        for name, module in make().model.llm.named_modules()
        if type(module).__name__ == "Linear4bit" and name.endswith(".base_layer")
    }
    targets = decoder_of(plan.model_type).lora_targets
    assert {*packed} == {*targets}, f"packed weights: {', '.join(packed)}"
    worst, faults = 0.0, []
    for (name, module), rows in itertools.product(packed.items(), PRODUCT_ROWS):
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
        torch.manual_seed(rows)
        given = torch.randn(rows, module.in_features, dtype=dtype, device=device)
        upstream = torch.randn(rows, len(weight), dtype=dtype, device=device)
        with torch.enable_grad():
            product = module(given.requires_grad_())
        gradient = torch.autograd.grad(product, given, upstream)[0]
        for kind, found, plain in (
            ("product", product, functional.linear(given, weight)),
            ("gradient", gradient, upstream @ weight),
        ):
            apart = float((found.float() - plain.float()).norm() / plain.float().norm())
            worst = max(worst, apart)
            if not apart <= PRODUCT_TOLERANCE[dtype]:
                faults.append(f"{name}, {rows} rows: {kind} {apart:.1%} apart")
    assert not faults, "; ".join(faults)
    return [f"{len(packed)} kinds, up to {rows:,} rows: largest difference {worst:.1e}"]


def time_steps(stage, count, repeats):
    """Take training steps; return seconds per step, their batches, and peak bytes beyond before."""
    gpu, state = torch.cuda.is_available(), trainer.set_up(stage)
    state.model.train()
    made = map(stage.collate, itertools.islice(stage.batches["train"], count))
    batches = [send_to_device(batch, default_device()) for batch in made]
    took, before = [], 0
    for turn in range(1 + repeats):  # the first one warms up
        if turn == 1 and gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for batch in batches:
            output = state.model(batch)
            output.loss.backward()
            trainer.step(state, output.loss.detach(), output.terms)
        if gpu:
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) / len(batches))
    return took[1:], batches, torch.cuda.max_memory_allocated() - before if gpu else 0


def measure_stage1(plan):
    """Time stage 1 at two batch sizes."""
    lines = []
    for size in (16, 256):
        words = ["--trajectory_only", "--data_path", SAMPLE, "--batch_size", size]
        steps = 1 if plan.toy else STAGE1_STEPS
        took, _, _ = time_steps(stage_maker(*words)[2](), steps, REPEATS)
        lines.append(f"batch {size}: {spread([1000 * turn for turn in took], 2)} ms per step")
    return ["; ".join(lines)]


def measure_llm(plan, mode):
    """Time stage 2 or 3 and measure its memory, without and with gradient checkpointing."""
    args, _, make = stage_maker(*words_of(plan, mode, "model"))
    computed = measure(args.precision) if torch.cuda.is_available() and not plan.toy else None
    stage = make()
    model = stage.model.to(default_device())
    model.stage1.requires_grad_(False)  # as a run with --ode_checkpoint
    stage.text.encode(model.stage1, model.tokens, default_device())
    lines, findings = [f"{args.precision}, batch {args.batch_size}"], []
    for checkpointing in (False, True):
        if checkpointing:
            set_checkpointing(model.llm)
        steps, repeats = (1, 1) if plan.toy else (LLM_STEPS, REPEATS)
        took, batches, peak = time_steps(stage, steps, repeats)
        rate = sum(map(positions, batches)) / len(batches) / statistics.median(took)
        name = f"{'with' if checkpointing else 'without'} checkpointing"
        lines.append(f"{name}: {spread(took, 3)} s per step, {rate:,.0f} tokens per second")
        if computed:
            tokens = max(map(positions, batches))
            expected = computed.peak[checkpointing] + UNPACKED / tokens
            expected += computed.loss / tokens if mode == "generative" else 0
            shown = f"{peak / tokens / MIB:.2f} MiB per token ({expected / MIB:.2f} computed)"
            lines[-1] += f", {shown}"
            if not 1 / FACTOR <= peak / tokens / expected <= FACTOR:
                findings.append(f"{mode}, {name}: peak {shown}")
    return ["; ".join(lines), *findings]


def measure_compiled(plan):
    """Time stage 2 with compiled layers, and compare its loss with that of plain ones."""
    skip_without_gpu()
    lines, losses = [], []
    for compiled in (False, True):
        _, _, make = stage_maker(*words_of(plan, "classification", "model"))
        stage = make()
        model = stage.model.to(default_device())
        model.stage1.requires_grad_(False)
        stage.text.encode(model.stage1, model.tokens, default_device())
        if compiled:
            compile_layers(model.llm)
        batch = send_to_device(stage.collate(next(iter(stage.batches["val"]))), default_device())
        with torch.no_grad():
            losses.append(float(model.eval()(batch).loss))
        took, batches, peak = time_steps(stage, 1 if plan.toy else LLM_STEPS, REPEATS)
        rate = sum(map(positions, batches)) / len(batches) / statistics.median(took)
        name = "compiled" if compiled else "plain"
        lines.append(f"{name}: {rate:,.0f} tokens per second, {peak / MIB:,.0f} MiB")
    lines.append(f"losses {losses[0]:.4f} and {losses[1]:.4f}")
    return ["; ".join(lines)]


def positions(batch):
    """Return the positions of a batch, padding included."""
    lengths = 1 + batch["text_mask"].sum(dim=1) + batch["states_mask"].sum(dim=1)
    return len(lengths) * int(lengths.max())
