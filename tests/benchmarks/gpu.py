"""Measure stage 1 on a GPU, and stages 2 and 3 with a model in the shape of MedGemma-4B.

    python tests/benchmarks/gpu.py [--batch_size 16] [--steps 20] [--peak_tflops 989]

Stage 1 at batch 16 and 256, sample data: batches lie on the device with their plans. Milliseconds a
step (forward, backward, weights moved and averaged), how often, at least, the host waits for the
device in a step, and the share of the time in which the device works.

Stages 2 and 3: random weights of the 4B text shape in NF4, written to a temporary folder (8 GB) and
loaded as any model; computed in bf16 and in float32. Seconds a step, tokens a second, peak memory
of the steps, and operations a second: 4 for each weight and token, forward and back, since a frozen
weight needs no derivative; attention is not counted. With ``--peak_tflops`` of the card (dense
bf16: 989 of an H100 SXM, 312 of an A100, by NVIDIA's data sheets) also bf16's share of it. The byte
tokenizer makes rows several times as long as Gemma's; where they do not fit, use
``--gradient_checkpointing`` or a smaller ``--batch_size``.

Without a GPU all of it runs on the processor, except waits and work of the device; use fewer
``--layers`` and a smaller ``--width``, a multiple of 8, there.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import SAMPLE, machine, peak_mib, spread

import medgemma_trainer as trainer
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.distributed import default_device, to_device
from medgemma_clinical.models.language_model import tiny_language_model
from medgemma_clinical.models.trajectory_llm import IGNORED, TextBatch, TrajectoryLLM
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.train_state import set_up_training

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
REPEATS = 3
"""Times that all steps are taken; the median, the least and the most are printed."""


def wait() -> None:
    """Wait until the device has finished."""
    if ON_GPU:
        torch.cuda.synchronize()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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
        self.state = set_up_training(stage, DEVICE)
        self.state.model.train()
        made = itertools.islice(stage.loaders["train"], most)
        self.batches = [to_device(batch, DEVICE) for batch in made]
        self.turn: Iterator[Any] = itertools.cycle(self.batches)

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            output = self.state.model(next(self.turn))
            output.loss.backward()
            trainer.train_step(self.state, float(output.loss.detach()), output.terms)


def arguments_of(*words: str) -> argparse.Namespace:
    """Parse flags as the program does."""
    return trainer.complete(trainer.build_parser().parse_args(["--data_path", str(SAMPLE), *words]))


def data_of(args: argparse.Namespace) -> Data:
    """Read and split the sample data as the program does."""
    return prepare_data(
        trainer.read_dataset(args),
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=trainer.prompt_options(args),
    )


def measure_stage_1(batch_size: int, most: int) -> None:
    """Time stage 1, and count where the host waits."""
    args = arguments_of("--trajectory_only", "--batch_size", str(batch_size))
    steps = Steps(trainer.trajectory_stage(args, data_of(args)), most)
    count = len(steps.batches)
    steps.take(count)  # each shape once
    turns = [seconds(partial(steps.take, count)) for _ in range(REPEATS)]
    took = statistics.median(turns)
    each = spread([1000 * turn / count for turn in turns], 2)
    text = f"stage 1, batch {batch_size}: {each} ms a step"
    if ON_GPU:
        text += f", the host waits {waits(steps.take)} times in a step, the device works "
        text += f"{device_seconds(partial(steps.take, count)) / took:.0%} of the time"
    say(text)


def save_model(folder: Path, layers: int, width: int) -> None:
    """Write a Gemma 3 in the shape of MedGemma-4B with random weights, or a part of it."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tiny, tokenizer = tiny_language_model()
    sizes: dict[str, Any] = {"vocab_size": 262_208, "hidden_size": width, "head_dim": 256}
    sizes |= {"intermediate_size": 4 * width, "num_hidden_layers": layers, "layer_types": None}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.02}
    config = Gemma3TextConfig(**{**tiny.config.to_dict(), **sizes})
    with DEVICE:
        model = Gemma3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def operations(model: TrajectoryLLM, batch: TextBatch) -> tuple[int, float]:
    """Return the tokens of a batch, and the operations of a training step with it."""
    linear = [each for each in model.body.modules() if isinstance(each, nn.Linear)]
    inside = sum(each.in_features * each.out_features for each in linear)
    tokens = int(batch["text_mask"].sum() + batch["states_mask"].sum()) + len(batch["index"])
    answers = int((batch["targets"] != IGNORED).sum())
    outputs = model.llm.config.vocab_size * model.llm.config.hidden_size
    return tokens, 4.0 * (tokens * inside + answers * outputs)


def measure_llm(mode: str, precision: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Time a stage with a language model."""
    words = ["--mode", mode, "--model_name", str(folder), "--quantization", "nf4", "--freeze_ode"]
    words += ["--precision", precision, "--batch_size", str(arguments.batch_size)]
    words += ["--gradient_checkpointing"] * arguments.gradient_checkpointing
    # Of these four fifths train.
    args = arguments_of(*words, "--max_samples", str(2 * arguments.steps * arguments.batch_size))
    stage = trainer.make_stage(args, data_of(args))
    steps = Steps(stage, arguments.steps)
    assert isinstance(stage.model, TrajectoryLLM)
    done = [operations(stage.model, batch) for batch in steps.batches]
    steps.take(len(done))
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    turns = [seconds(partial(steps.take, len(done))) for _ in range(REPEATS)]
    took = statistics.median(turns)
    tokens, work = (sum(each) for each in zip(*done, strict=True))
    rate = work / took / 1e12
    known = arguments.peak_tflops and precision == "bf16"
    share = f", {rate / arguments.peak_tflops:.1%} of the card's" if known else ""
    peak = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else peak_mib()
    say(
        f"{mode}, NF4, {precision}, batch {arguments.batch_size}: "
        f"{spread([turn / len(done) for turn in turns], 3)} s a step of {len(done)}, "
        f"{tokens / took:,.0f} tokens a second, {rate:.2f} teraflop a second"
        f"{share}, peak {peak:,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--peak_tflops", type=float)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    on = machine("torch", "transformers", "bitsandbytes", threads=torch.get_num_threads())
    say(f"{card}; {on}; {arguments.layers} layers")
    for size in (16, 256):
        measure_stage_1(size, arguments.steps)
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place), arguments.layers, arguments.width)
        for mode in ("classification", "generative"):
            for precision in ("bf16", "fp32"):
                try:
                    measure_llm(mode, precision, Path(place), arguments)
                except torch.OutOfMemoryError:
                    say(f"{mode}, NF4, {precision}, batch {arguments.batch_size}: out of memory")
                gc.collect()  # frees this model before the next one is loaded
                if ON_GPU:
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
