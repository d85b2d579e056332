"""The steps of gpu.py that measure speed and memory."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from common import freeze_stage1, spread
from gpu_plan import Plan, Result, arguments_of, data_of, on_gpu
from memory import GIB, MIB, RESERVED, Sizes, measure
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import medgemma_trainer as trainer
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.language_model import set_checkpointing
from medgemma_clinical.models.trajectory_llm import IGNORED, TextBatch, TrajectoryLLM
from medgemma_clinical.training.loaders import part_batches
from medgemma_clinical.training.stage import Stage

REPEATS = 3
"""Times that all steps are taken; the median, the least and the most are printed."""

STEPS, LLM_STEPS = 20, 4
"""Batches of stage 1, and of stages 2 and 3."""

MOST_ROWS, SHARE = 16, 0.7
"""Rows of a batch of stages 2 and 3, where so much of the memory suffices by computation."""

UNPACKED = 10_240 * 2560 * 4
"""Bytes of the largest weight out of NF4, in float32."""

FACTOR = 1.2
"""A measured peak that is larger or smaller by this factor than the computed one is a finding."""


def wait() -> None:
    """Wait until the device has finished."""
    if on_gpu():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds until the device has done the work."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def waits(work: Callable[[], Any]) -> int:
    """Count how often the host waits for the device within the work."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in said)


def device_seconds(work: Callable[[], Any]) -> float:
    """Return the seconds in which the device works: kernels, copies and fills."""
    for _ in range(2):  # the first time the profiler itself warms up
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            seconds(work)
    found = [each for each in seen.key_averages() if each.device_type == DeviceType.CUDA]
    return sum(each.self_device_time_total for each in found) / 1e6


class Steps:
    """Training steps of a stage on batches that lie on the device, again and again."""

    def __init__(self, stage: Stage, most: int) -> None:
        self.state = trainer.set_up(stage)
        self.state.model.train()
        made = map(stage.collate, itertools.islice(stage.batches["train"], most))
        self.batches = [send_to_device(batch, default_device()) for batch in made]
        self.turn: Iterator[Any] = itertools.cycle(self.batches)

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            output = self.state.model(next(self.turn))
            output.loss.backward()
            trainer.step(self.state, output.loss.detach(), output.terms)

    def turns(self) -> list[float]:
        """Return the seconds a step of several turns over all batches, after one to warm up."""
        count = len(self.batches)
        self.take(count)
        return [seconds(partial(self.take, count)) / count for _ in range(REPEATS)]


def measure_stage_1(plan: Plan) -> Result:
    """Time stage 1 at two batch sizes, and count where the host waits."""
    figures = []
    for size in (16, 256):
        args = arguments_of("--trajectory_only", "--batch_size", str(size))
        stage = trainer.make_stage(args, data_of(args), None)
        steps = Steps(stage, 2 if plan.toy else STEPS)
        turns = steps.turns()
        text = f"batch {size}: {spread([1000 * turn for turn in turns], 2)} ms a step"
        if on_gpu():
            count = len(steps.batches)
            busy = device_seconds(partial(steps.take, count)) / count / statistics.median(turns)
            text += f", the host waits {waits(steps.take)} times in a step, the device works "
            text += f"{busy:.0%} of the time"
        figures.append(text)
    return Result("; ".join(figures))


def measure_stage_2(plan: Plan) -> Result:
    """Time stage 2 and measure its memory, without and with gradient checkpointing."""
    return measure_llm(plan, "classification")


def measure_stage_3(plan: Plan) -> Result:
    """Time stage 3 and measure its memory, without and with gradient checkpointing."""
    return measure_llm(plan, "generative")


def measure_llm(plan: Plan, mode: str) -> Result:
    computed = measure(arguments_of().precision) if on_gpu() and not plan.toy else None
    words = ["--mode", mode, "--model_name", str(plan.model), "--quantization", "nf4"]
    args = arguments_of(*words, "--max_samples", "500")
    data = data_of(args)
    stage = trainer.make_stage(args, data, None)
    freeze_stage1(stage)
    assert isinstance(stage.model, TrajectoryLLM)
    longest = int(stage.lengths[data.split["train"]].max())
    rows = rows_that_fit(computed, longest) if computed else 2
    figures, findings = [f"{args.precision}, batch {rows}"], []
    for checkpointing in (False, True):
        if checkpointing:
            set_checkpointing(stage.model.llm)
        batches = part_batches(data.split, rows, lengths=stage.lengths)
        steps = Steps(replace(stage, batches=batches), LLM_STEPS)
        text, peak = time_steps(steps, plan)
        name = f"{'with' if checkpointing else 'without'} checkpointing"
        figures.append(f"{name}: {text}")
        if computed:
            tokens = max(positions(batch) for batch in steps.batches)
            expected = UNPACKED + computed.step_peak(
                checkpointing, tokens, answers=mode == "generative"
            )
            shown = (
                f"{peak / tokens / MIB:.2f} MiB a token ({expected / tokens / MIB:.2f} computed)"
            )
            figures[-1] += f", {shown} at {tokens:,} tokens"
            if not 1 / FACTOR <= peak / expected <= FACTOR:
                findings.append(f"{mode}, {name}: peak {shown}")
    return Result("; ".join(figures), tuple(findings))


def rows_that_fit(computed: Sizes, longest: int) -> int:
    """Return the rows of a batch: 16, or the power of two below that leaves memory free."""
    card = torch.cuda.mem_get_info()[1] / GIB
    tokens = computed.tokens(SHARE * (card - RESERVED) + RESERVED, checkpointing=False)
    rows = MOST_ROWS
    while rows > 1 and rows * longest > tokens:
        rows //= 2
    return rows


def time_steps(steps: Steps, plan: Plan) -> tuple[str, int]:
    """Return speed in words, and on a GPU the bytes that the steps need beyond the weights."""
    model: Any = steps.state.model
    done = [operations(model, batch) for batch in steps.batches]
    steps.take(len(done))
    before = torch.cuda.memory_allocated() if on_gpu() else 0
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    turns = steps.turns()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu() else 0
    took = statistics.median(turns) * len(done)
    tokens, work = (sum(each) for each in zip(*done, strict=True))
    rate = work / took / 1e12
    share = f" ({rate / plan.peak_tflops:.1%} of the card's)" if plan.peak_tflops else ""
    text = (
        f"{spread(turns, 3)} s a step, {tokens / took:,.0f} tokens a second, {rate:.2f} teraflop "
        f"a second{share}"
    )
    return text, peak


def positions(batch: TextBatch) -> int:
    """Return the positions of a batch, padding included."""
    lengths = 1 + batch["text_mask"].sum(dim=1) + batch["states_mask"].sum(dim=1)
    return len(lengths) * int(lengths.max())


def operations(model: TrajectoryLLM, batch: TextBatch) -> tuple[int, float]:
    """Return the tokens of a batch, and the operations of a training step with it.

    Four for each weight and token, forward and back, since a frozen weight needs no derivative;
    neither attention nor what checkpointing computes again is counted.
    """
    linear = [each for each in model.llm.get_decoder().modules() if isinstance(each, nn.Linear)]
    inside = sum(each.in_features * each.out_features for each in linear)
    tokens = int(batch["text_mask"].sum() + batch["states_mask"].sum()) + len(batch["index"])
    answers = int((batch["targets"] != IGNORED).sum())
    outputs = model.llm.config.vocab_size * model.llm.config.hidden_size
    return tokens, 4.0 * (tokens * inside + answers * outputs)
