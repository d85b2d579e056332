"""The steps of gpu.py that compare kernels with plain matrices, and measure speed and memory."""

import itertools
import statistics
import time
from typing import NamedTuple

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
from medgemma_clinical.distributed import default_device, peak_mib
from medgemma_clinical.inference.generation import write_reports
from medgemma_clinical.models.decoders import decoder_of
from medgemma_clinical.models.language_model import DTYPES, compile_layers, set_checkpointing
from medgemma_clinical.models.trajectory_llm import IGNORED, adapters_in

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
"""Share of its norm by which the attention's result may differ, and a product of packed weights."""

PADDING = ("not padded", "padded", "padded on the left")

PRODUCT_ROWS = (1, 16, 300, 1400, 5000)
"""Rows of a product: bitsandbytes chooses among kernels by their number."""

REPEATS, STAGE1_STEPS, LLM_STEPS = 3, 20, 4
"""Timings, and steps of each."""

UNPACKED = 10_240 * 2560 * 4
"""Bytes of the largest weight out of NF4, in float32."""

FACTOR = 1.2
"""A measured peak that differs by this factor from the computed one is a finding."""


def compare_attention(plan):
    """Compare gradients and states by the attention of the card with those by plain matrices."""
    dtype = DTYPES[stage_maker("--data_path", SAMPLE)[0].precision]
    worst, faults = 0.0, []
    for shape, heads in HEADS.items():
        sizes = {**heads, "vocab_size": VOCABULARY, "sliding_window": WINDOW}
        model = small_model(text_config(2, **(sizes | NARROW if plan.toy else sizes)), dtype)
        lengths = LENGTHS[-1:] if plan.toy else LENGTHS
        for length, padding in itertools.product(lengths, PADDING):
            apart = attention_difference(model, length, padding)
            worst = max(worst, apart)
            if not apart <= TOLERANCE[dtype]:  # also where it is NaN
                faults.append(f"{shape}, {length} positions, {padding}: {apart:.1%} apart")
    assert not faults, "; ".join(faults)
    return [f"largest difference {worst:.1e} of the norm in {str(dtype)[6:]}"]


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


def attention_difference(model, length, padding):
    """Return how far the adapter's gradient is from that by plain matrices, relative to its norm.

    Of four rows each is shorter than the one before, unless they are not padded. On the left, as
    reports are written, padding sees nothing at all; there the last states are compared.
    """
    device, shape = default_device(), (4, length, model.config.hidden_size)
    draw = torch.Generator(device).manual_seed(1)
    embeddings = torch.randn(shape, generator=draw, device=device, dtype=model.dtype)
    direction = torch.randn(shape[-1], generator=draw, device=device)
    shorter = 0 if padding == "not padded" else length // 8
    lengths = length - shorter * torch.arange(4, device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None]).long()
    last = lengths - 1
    left = padding == "padded on the left"
    if left:
        mask, last = mask.flip(1), torch.full_like(last, length - 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # As ``TrajectoryLLM.read`` does.
    unmasked = length <= WINDOW and model.dtype == torch.bfloat16 and not left
    keys = {"attention_mask": None if unmasked else mask, "use_cache": False}

    def compute():
        with adapters_in(model.dtype, device):
            hidden = model.get_decoder()(inputs_embeds=embeddings, **keys).last_hidden_state
        states = hidden[torch.arange(4, device=device), last].float()
        if left:
            return states.detach()
        found = torch.autograd.grad((states * direction).sum(), parameters)
        return torch.cat([each.flatten() for each in found])

    found = compute()
    with sdpa_kernel(SDPBackend.MATH):
        plain = compute()
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


def stage_loss(model, batch):
    """Return the loss of the program's stage, and its terms."""
    output = model(batch)
    return output.loss, output.terms


def usual_loss(model, batch):
    """Return the loss of all text tokens by logits everywhere, as TRL's usual QLoRA has it."""
    sequence = model.embed(batch, model.trajectory(batch))
    embeddings, mask = sequence.embeddings, sequence.mask
    targets = torch.full(mask.shape, IGNORED, device=mask.device)
    row, position = batch["text_mask"].nonzero(as_tuple=True)
    targets[row, sequence.text_start[row] + position] = batch["input_ids"][row, position]
    with adapters_in(embeddings.dtype, embeddings.device):
        options = {"attention_mask": mask.long(), "use_cache": False}
        logits = model.llm(inputs_embeds=embeddings, **options).logits[:, :-1]
    logits, targets = logits.flatten(0, 1).float(), targets[:, 1:].flatten()
    return functional.cross_entropy(logits, targets, reduction="sum"), len(row)


def time_steps(stage, count, loss_of=stage_loss):
    """Take training steps; return seconds per step, their batches, and peak bytes beyond before."""
    gpu, state = torch.cuda.is_available(), trainer.set_up(stage)
    state.model.train()
    made = map(stage.collate, itertools.islice(stage.batches["train"], count))
    batches = [send_to_device(batch, default_device()) for batch in made]
    took, before = [], 0
    for turn in range(1 + REPEATS):  # the first one warms up
        if turn == 1 and gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for batch in batches:
            loss, terms = loss_of(state.model, batch)
            loss.backward()
            trainer.step(state, loss.detach(), terms)
        if gpu:
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) / len(batches))
    return took[1:], batches, torch.cuda.max_memory_allocated() - before if gpu else 0


def measure_stage1(plan):
    """Time stage 1 at two batch sizes."""
    figures = []
    for size in (16, 256):
        words = ["--trajectory_only", "--data_path", SAMPLE, "--batch_size", size]
        took, _, _ = time_steps(stage_maker(*words)[2](), 1 if plan.toy else STAGE1_STEPS)
        figures.append(f"batch {size}: {spread([1000 * turn for turn in took], 2)} ms per step")
    return figures


def frozen_stage(plan, mode, *more):
    """Return flags and stage of a run with ``--ode_checkpoint``: stage 1 is read once, ahead."""
    args, _, make = stage_maker(*words_of(plan, mode, "model", *more))
    stage = make()
    model = stage.model.to(default_device())
    model.stage1.requires_grad_(False)
    stage.text.encode(model.stage1, model.tokens, default_device())
    return args, stage


class Speed(NamedTuple):
    """Of steps: median seconds, positions of a mean and of the largest batch, peak bytes."""

    seconds: float
    tokens: float
    largest: int
    peak: int  # 0 without a GPU

    def memory(self):
        """Return MiB per token."""
        return self.peak / self.largest / MIB

    def __str__(self):
        text = f"{self.seconds:.3f} s per step, {self.tokens / self.seconds:,.0f} tokens per second"
        return text + (f", {self.memory():.2f} MiB per token" if self.peak else "")


def measure_steps(plan, stage, loss_of=stage_loss):
    """Return the ``Speed`` of steps of stage 2 or 3."""
    took, batches, peak = time_steps(stage, 1 if plan.toy else LLM_STEPS, loss_of)
    tokens = [positions(batch) for batch in batches]
    return Speed(statistics.median(took), statistics.mean(tokens), max(tokens), peak)


def measure_llm(plan, mode):
    """Time stage 2 or 3 and measure its memory, without and with checkpointing, and TRL's QLoRA."""
    args, stage = frozen_stage(plan, mode)
    plain = measure_steps(plan, stage)
    set_checkpointing(stage.model.llm)
    checkpointed = measure_steps(plan, stage)
    usual = measure_steps(plan, stage, usual_loss)
    figures = [
        f"{args.precision}, batch {args.batch_size}",
        f"without checkpointing: {plain}",
        f"with checkpointing: {checkpointed}",
        f"TRL's usual QLoRA: {usual}, {usual.seconds / plain.seconds:.2f} times as long",
    ]
    if plain.peak and not plan.toy:
        computed = measure(args.precision)
        loss = computed.loss if mode == "generative" else 0
        for checkpointing, speed in ((False, plain), (True, checkpointed)):
            expected = computed.peak[checkpointing] + (UNPACKED + loss) / speed.largest
            differs = not 1 / FACTOR <= speed.memory() * MIB / expected <= FACTOR
            figures.append(f"{'finding: ' * differs}{expected / MIB:.2f} MiB per token computed")
    return figures


def measure_compiled(plan):
    """Time stage 2 with compiled layers, and compare its loss with that of plain ones."""
    skip_without_gpu()
    _, stage = frozen_stage(plan, "classification")
    model = stage.model
    batch = send_to_device(stage.collate(next(iter(stage.batches["val"]))), default_device())

    def loss():
        with torch.no_grad():
            return float(model.eval()(batch).loss)

    plain, loss_before = measure_steps(plan, stage), loss()
    compile_layers(model.llm)
    loss_behind = loss()
    figures = [f"plain: {plain}", f"compiled: {measure_steps(plan, stage)}"]
    return [*figures, f"losses {loss_before:.4f} and {loss_behind:.4f}"]


def measure_reports(plan):
    """Time the reports that stage 3 writes; random weights end few of them early."""
    _, stage = frozen_stage(plan, "generative", "--max_samples", 0)
    model, text = stage.model, stage.text
    rows = dict.fromkeys(range(len(text.prompt_ids)), True)
    write_reports(model, text, {0: True}, 2)  # warms up
    began = time.perf_counter()
    write_reports(model, text, rows, text.report_tokens())
    rate = len(rows) / (time.perf_counter() - began)
    speed = f"{rate:.2f} reports per second, of up to {text.report_tokens()} tokens"
    return [f"{len(rows)} reports: {speed}", f"peak {peak_mib():,.0f} MiB"]


def positions(batch):
    """Return the positions of a batch, padding included."""
    lengths = 1 + batch["text_mask"].sum(dim=1) + batch["states_mask"].sum(dim=1)
    return len(lengths) * int(lengths.max())
