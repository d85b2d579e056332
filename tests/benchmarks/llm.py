"""Compare a training step of stages 2 and 3 with the same model trained plainly.

    python tests/benchmarks/llm.py --model_name FOLDER_OR_HUB_ID [--steps 6] [--precision bf16]

Plainly: full logits of every position, all hidden states kept, the encoder run at every step, rows
in random order of length. Both ways take rows of the sample data with the same weights, in turn, so
that a load on the machine meets both; first their losses and gradients must agree. Prints seconds a
step (median, quartiles), padding, the ratio, and the peak memory of each way in a process of its
own.

Then reports, as a run writes them (batches of similar lengths, a cache of keys and values) and one
by one (with the cache too): each batch in turn with its own patients one by one. In float32 both
must write the same; the first batch is checked before anything is timed.
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
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, freeze_stage1, machine, peak_mib, spread

import medgemma_trainer as trainer
from medgemma_clinical.commands.flags import complete
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.generation import rows_at_once
from medgemma_clinical.models.trajectory_llm import (
    IGNORED,
    VERDICT_WEIGHT,
    LLMClassifier,
    TextBatch,
    latest_states,
)
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.stage import Stage

ROWS = 1000
"""Patients in the batches: enough for buckets of equal length."""

SAME_GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Share of its norm by which the whole gradient may differ between the ways."""

REPORT_TOKENS = 64
"""Most tokens of a report in the benchmark; those of the sample data have about 110."""


def build(mode: str, arguments: argparse.Namespace) -> tuple[Any, Stage]:
    """Return model and stage as a run with a frozen stage 1 has them."""
    words = ["--data_path", str(arguments.data), "--max_samples", str(ROWS), "--mode", mode]
    words += ["--model_name", arguments.model_name, "--precision", arguments.precision]
    words += ["--lora_dropout", "0", "--series_text", arguments.series_text]
    args = complete(trainer.build_parser().parse_args(words))
    data = prepare_data(
        trainer.read_dataset(args),
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=trainer.prompt_options(args),
    )
    stage = trainer.make_stage(args, data, None)
    freeze_stage1(stage)
    return stage.model, stage


def plain_loss(model: Any, batch: TextBatch) -> tuple[Tensor, int]:
    """Return loss and terms with everything computed and kept."""
    trajectory = latest_states(model.stage1, batch, model.tokens)
    added = trajectory.logit
    sequence = model.embed(batch, trajectory)
    result = model.llm(
        inputs_embeds=sequence.embeddings,
        attention_mask=sequence.mask.long(),
        output_hidden_states=True,
    )
    row = torch.arange(len(sequence.text_start), device=sequence.text_start.device)
    verdict = sequence.text_start + batch["verdict"]
    if isinstance(model, LLMClassifier):
        logit = model.head(result.hidden_states[-1][row, verdict].float()).squeeze(1) + added
        labels = batch["labels"]
        loss = functional.binary_cross_entropy_with_logits(logit, labels, reduction="sum")
        return loss, len(labels)
    targets = torch.full(sequence.mask.shape, IGNORED, device=row.device)
    rows, places = (batch["targets"] != IGNORED).nonzero(as_tuple=True)
    targets[rows, sequence.text_start[rows] + places] = batch["targets"][rows, places]
    logits = result.logits[:, :-1].float()
    logits[row, verdict, model.verdict[0]] += added
    losses = functional.cross_entropy(
        logits.flatten(0, 1),
        targets[:, 1:].flatten(),
        reduction="none",
        ignore_index=IGNORED,
    ).view(len(row), -1)
    weights = torch.ones_like(losses)
    weights[row, verdict] = VERDICT_WEIGHT
    return (losses * weights).sum(), len(rows) + (VERDICT_WEIGHT - 1) * len(row)


def own_loss(model: Any, batch: TextBatch) -> tuple[Tensor, int]:
    output = model(batch)
    return output.loss, output.terms


def padding_share(batches: LengthBatches, lengths: Any) -> float:
    """Return the share of padding in all batches."""
    chosen = [lengths[rows] for rows in batches]
    return 1 - sum(x.sum() for x in chosen) / sum(len(x) * x.max() for x in chosen)


class Way:
    """One way to train: its loss and its batches."""

    def __init__(self, stage: Stage, loss: Callable[..., Any], *, bucketed: bool) -> None:
        known = stage.batches["train"]
        lengths = known.lengths if bucketed else None
        self.batches = LengthBatches(known.rows, known.batch_size, lengths, shuffle=True)
        self.loss, self.stage = loss, stage
        self.rows = iter(self.batches)
        self.optimizer = torch.optim.AdamW(stage.parameter_groups(), fused=True)

    def step(self) -> float:
        """Take a training step; return its seconds."""
        model = self.stage.model.train()
        batch = send_to_device(self.stage.collate(next(self.rows)), default_device())
        start = time.perf_counter()
        loss, terms = self.loss(model, batch)
        (loss / terms).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if default_device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def ways_of(stage: Stage) -> dict[str, Way]:
    return {
        "project": Way(stage, own_loss, bucketed=True),
        "plain": Way(stage, plain_loss, bucketed=False),
    }


def check(model: Any, stage: Stage) -> None:
    """Compare both ways on one batch.

    Raises:
        SystemExit: they do not compute the same.
    """
    batch = send_to_device(stage.collate([0, 1, 2, 3]), default_device())
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
    """Time both ways in turn; return the lines of the report."""
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
        padding = padding_share(ways[name].batches, lengths)
        lines.append(
            f"{name:8} {median:7.2f} s a step ({low:.2f} to {high:.2f}), padding {padding:.0%}, "
            f"peak {peak_apart(mode, name, arguments):,.0f} MiB"
        )
    ratio = np.sum(took["plain"]) / np.sum(took["project"])
    return [*lines, f"plain / project, all {arguments.steps} steps: {ratio:.2f}"]


def measure_writing(arguments: argparse.Namespace) -> list[str]:
    """Time reports written in batches and one by one; return the lines of the report."""
    model, stage = build("generative", arguments)
    collate: Any = stage.text
    size = rows_at_once(model, collate, REPORT_TOKENS)
    rows = np.arange(arguments.reports)
    lengths = np.array([len(prompt) for prompt in collate.prompt_ids])

    def write(*batches: list[int]) -> tuple[list[list[int]], float]:
        """Return the tokens of each report, and the seconds of all."""
        start = time.perf_counter()
        written: list[list[int]] = []
        for indices in batches:
            no = np.zeros(len(indices), dtype=bool)  # the verdict that all reports continue
            prompts = send_to_device(collate.with_verdicts(indices, no), default_device())
            ids = model.write(prompts, REPORT_TOKENS, collate.eos, collate.pad).tolist()
            written += [[token for token in row if token != collate.pad] for row in ids]
        return written, time.perf_counter() - start

    took: dict[str, list[float]] = {"one by one": [], "batches": [], "ratio": []}
    equal: list[bool] = []
    batches = list(LengthBatches(rows, size, lengths, shuffle=False))
    for turn, indices in enumerate([batches[0][:4], *batches]):
        (one, slow), (many, fast) = write(*([i] for i in indices)), write(indices)
        same = [a == b for a, b in zip(one, many, strict=True)]
        if arguments.precision == "fp32" and not all(same):
            raise SystemExit(f"{1 - np.mean(same):.0%} of the reports differ: nothing to compare")
        if turn:  # the first warms up
            equal += same
            for name, each in (("one by one", slow), ("batches", fast), ("ratio", slow / fast)):
                took[name].append(each)
    shown = {name: spread(each, 2) for name, each in took.items()}
    rates = [len(rows) / sum(took[name]) for name in ("one by one", "batches")]
    return [
        f"\nwriting {len(rows)} reports of at most {REPORT_TOKENS} tokens, "
        f"{size} a batch; {np.mean(equal):.0%} the same token by token",
        f"one by one {shown['one by one']} s a batch, {rates[0]:.2f} reports a second",
        f"batches {shown['batches']} s a batch, {rates[1]:.2f} reports a second",
        f"one by one / batches: {shown['ratio']}, all together {rates[1] / rates[0]:.2f}",
    ]


def peak_apart(mode: str, way: str, arguments: argparse.Namespace) -> float:
    """Return the peak memory of two steps in a fresh process, in MiB."""
    words = [sys.executable, __file__, "--model_name", arguments.model_name, "--peak", mode, way]
    words += ["--precision", arguments.precision, "--series_text", arguments.series_text]
    words += ["--data", str(arguments.data)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def peak(mode: str, way: str, arguments: argparse.Namespace) -> float:
    """Take two steps; return the peak memory of this process, or of the GPU, in MiB."""
    _, stage = build(mode, arguments)
    chosen = ways_of(stage)[way]
    for _ in range(2):
        chosen.step()
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mib()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--data", type=Path, default=SAMPLE)
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
        f"{default_device()}, {arguments.model_name}, {arguments.precision}, batch 16\n"
    )
    for mode in ("classification", "generative") if arguments.steps else ():
        sys.stdout.write("\n".join(measure(mode, arguments)) + "\n")
        sys.stdout.flush()
    if arguments.reports:
        sys.stdout.write("\n".join(measure_writing(arguments)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
