"""A training step of stages 2 and 3 against the same model trained plainly.

    python tests/benchmarks/llm.py --model_name FOLDER_OR_HUB_ID [--steps 6] [--precision bf16]

Plainly: full logits of every position, all hidden states kept, the encoder run at every step, rows
in random order of length. Both ways take the same rows of the sample data with the same weights,
in turn, so that a load on the machine meets both; first their losses and gradients must agree.
Prints seconds a step (median, quartiles), padding, the ratio, and each way's peak memory in a
process of its own.

Then reports, as a run writes them (batches of like lengths, a cache of keys and values) and one by
one (with the cache too): batch after batch in turn with its own patients one by one. In float32
both must write the same, a first batch before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import machine, peak_mib, spread

import medgemma_trainer as trainer
from medgemma_trainer import IGNORED, Batches, LLMClassifier, TextBatch

ROWS = 1000
"""Patients among whom batches are drawn: enough for buckets of equal length."""

SAME_GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Share of its norm by which the gradient of all that learns may differ between the ways."""

REPORT_TOKENS = 64
"""Tokens a report of the benchmark has at most; the sample's have about 110."""


def build(mode: str, arguments: argparse.Namespace) -> tuple[Any, trainer.Stage]:
    """Give model and stage as a run with a frozen encoder has them."""
    words = ["--data_path", str(arguments.data), "--max_samples", str(ROWS), "--mode", mode]
    words += ["--model_name", arguments.model_name, "--precision", arguments.precision]
    words += ["--lora_dropout", "0", "--freeze_ode", "--series_text", arguments.series_text]
    args = trainer.resolve(trainer.build_parser().parse_args(words))
    stage = trainer.llm_stage(args, trainer.load_data(args))
    stage.model.to(trainer.default_device())
    return stage.model, stage


def plain_loss(model: Any, batch: TextBatch) -> tuple[Tensor, int]:
    """Give loss and terms with everything computed and kept."""
    fresh = trainer.encode(model.encoder, None, batch, model.tokens)
    embeddings, mask, order = model.embed(batch, fresh)
    result = model.llm(
        inputs_embeds=embeddings, attention_mask=mask.long(), output_hidden_states=True
    )
    place = (order == (batch["verdict"] + model.text_start)[:, None]).nonzero(as_tuple=True)
    if isinstance(model, LLMClassifier):
        logit = model.head(result.hidden_states[-1][place].float()).squeeze(1)
        labels = batch["labels"]
        loss = functional.binary_cross_entropy_with_logits(logit, labels, reduction="sum")
        return loss, len(labels)
    slots = functional.pad(batch["targets"], (model.text_start, 0), value=IGNORED)
    targets = slots.gather(1, order)[:, 1:]
    losses = functional.cross_entropy(
        result.logits[:, :-1].float().flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    ).view(targets.shape)
    weights = torch.ones_like(losses)
    weights[place] = trainer.VERDICT_WEIGHT
    terms = int((targets != IGNORED).sum()) + (trainer.VERDICT_WEIGHT - 1) * len(place[0])
    return (losses * weights).sum(), terms


def own_loss(model: Any, batch: TextBatch) -> tuple[Tensor, int]:
    output = model(batch)
    return output.loss, output.terms


class Way:
    """One way to train: its loss and its batches."""

    def __init__(self, stage: trainer.Stage, loss: Callable[..., Any], *, bucketed: bool) -> None:
        known = stage.loaders["train"].batch_sampler
        assert isinstance(known, Batches)
        lengths = known.lengths if bucketed else None
        self.batches = Batches(known.rows, known.batch_size, lengths, shuffle=True)
        self.batches.generator.manual_seed(0)
        self.loss, self.stage = loss, stage
        self.rows = iter(self.batches)
        self.optimizer = torch.optim.AdamW(stage.parameter_groups(), fused=True)

    def step(self) -> float:
        """Take a training step; give its seconds."""
        model, device = self.stage.model.train(), trainer.default_device()
        batch = trainer.to_device(self.stage.loaders["train"].collate_fn(next(self.rows)), device)
        start = time.perf_counter()
        loss, terms = self.loss(model, batch)
        (loss / terms).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def ways_of(stage: trainer.Stage) -> dict[str, Way]:
    return {
        "project": Way(stage, own_loss, bucketed=True),
        "plain": Way(stage, plain_loss, bucketed=False),
    }


def check(model: Any, stage: trainer.Stage) -> None:
    """Hold both ways against each other on one batch.

    Raises:
        SystemExit: they do not compute the same.
    """
    batch = stage.loaders["val"].collate_fn([0, 1, 2, 3])
    batch = trainer.to_device(batch, trainer.default_device())
    losses, slopes = [], []
    for way in (own_loss, plain_loss):
        model.eval().zero_grad()
        loss, _ = way(model, batch)
        loss.backward()
        losses.append(loss.item())
        given = [p.grad for p in model.parameters() if p.grad is not None]
        slopes.append(torch.cat([slope.flatten().double() for slope in given]))
    model.zero_grad()
    apart = float((slopes[0] - slopes[1]).norm() / slopes[1].norm())
    # bf16 sums in another order.
    if abs(losses[0] / losses[1] - 1) > 2e-2 or apart > SAME_GRADIENTS[model.llm.dtype]:
        raise SystemExit(f"losses {losses}, gradients {apart:.1e} apart: nothing to compare")


def measure(mode: str, arguments: argparse.Namespace) -> list[str]:
    """Time both ways in turn; give the lines of the report."""
    model, stage = build(mode, arguments)
    check(model, stage)
    ways = ways_of(stage)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + arguments.steps):
        for name, way in ways.items():
            seconds = way.step()
            if turn:  # the first warms up
                took[name].append(seconds)
    lines = [f"\n{mode}"]
    lengths = ways["project"].batches.lengths
    assert lengths is not None
    for name, seconds_of in took.items():
        low, median, high = np.quantile(seconds_of, [0.25, 0.5, 0.75])
        padding = trainer.padding_share(ways[name].batches, lengths)
        lines.append(
            f"{name:8} {median:7.2f} s a step ({low:.2f} to {high:.2f}), padding {padding:.0%}, "
            f"peak {peak_apart(mode, name, arguments):,.0f} MiB"
        )
    ratio = np.sum(took["plain"]) / np.sum(took["project"])
    return [*lines, f"plain / project, all {arguments.steps} steps: {ratio:.2f}"]


def measure_writing(arguments: argparse.Namespace) -> list[str]:
    """Time reports written in batches and one by one; give the lines of the report."""
    model, stage = build("generative", arguments)
    collate: Any = stage.loaders["val"].collate_fn
    device = trainer.default_device()
    rows = np.arange(arguments.reports)
    lengths = np.array([len(prompt) for prompt in collate.prompts])

    def write(*batches: list[int]) -> tuple[list[list[int]], float]:
        """Give the tokens of each report, and the seconds of all."""
        start = time.perf_counter()
        written: list[list[int]] = []
        for indices in batches:
            prompts = trainer.to_device(collate.prompts_only(indices), device)
            ids = model.write(prompts, REPORT_TOKENS, collate.eos, collate.pad).tolist()
            written += [[token for token in row if token != collate.pad] for row in ids]
        return written, time.perf_counter() - start

    took: dict[str, list[float]] = {"one by one": [], "batches": [], "ratio": []}
    equal: list[bool] = []
    batches = list(Batches(rows, trainer.GENERATION_BATCH, lengths, shuffle=False))
    for turn, indices in enumerate([batches[0][:4], *batches]):
        (one, slow), (many, fast) = write(*([i] for i in indices)), write(indices)
        same = [a == b for a, b in zip(one, many, strict=True)]
        if arguments.precision == "fp32" and not all(same):
            raise SystemExit(f"{1 - np.mean(same):.0%} of the reports differ: nothing to compare")
        if turn:  # the first warms up
            equal += same
            for name, each in (("one by one", slow), ("batches", fast), ("ratio", slow / fast)):
                took[name].append(each)
    told = {name: spread(each, 2) for name, each in took.items()}
    rates = [len(rows) / sum(took[name]) for name in ("one by one", "batches")]
    return [
        f"\nwriting {len(rows)} reports of at most {REPORT_TOKENS} tokens, "
        f"{trainer.GENERATION_BATCH} a batch; {np.mean(equal):.0%} the same token by token",
        f"one by one {told['one by one']} s a batch, {rates[0]:.2f} reports a second",
        f"batches {told['batches']} s a batch, {rates[1]:.2f} reports a second",
        f"one by one / batches: {told['ratio']}, all together {rates[1] / rates[0]:.2f}",
    ]


def peak_apart(mode: str, way: str, arguments: argparse.Namespace) -> float:
    """Give the peak memory of two steps in a fresh process, in MiB."""
    words = [sys.executable, __file__, "--model_name", arguments.model_name, "--peak", mode, way]
    words += ["--precision", arguments.precision, "--series_text", arguments.series_text]
    words += ["--data", str(arguments.data)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def peak(mode: str, way: str, arguments: argparse.Namespace) -> float:
    """Take two steps and give the peak memory of this process, or of the GPU, in MiB."""
    _, stage = build(mode, arguments)
    chosen = ways_of(stage)[way]
    for _ in range(2):
        chosen.step()
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mib()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--data", type=Path, default=trainer.SAMPLE_DATA)
    parser.add_argument("--series_text", default="all")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=6, help="0 for none")
    parser.add_argument("--reports", type=int, default=32, help="0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        mode, way = arguments.peak
        sys.stdout.write(f"\n{json.dumps(peak(mode, way, arguments))}\n")
        return 0
    sys.stdout.write(
        f"{machine('torch', 'transformers', 'peft', threads=torch.get_num_threads())}; "
        f"{trainer.default_device()}, {arguments.model_name}, {arguments.precision}, batch 16\n"
    )
    for mode in ("classification", "generative") if arguments.steps else ():
        sys.stdout.write("\n".join(measure(mode, arguments)) + "\n")
        sys.stdout.flush()
    if arguments.reports:
        sys.stdout.write("\n".join(measure_writing(arguments)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
