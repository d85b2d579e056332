"""Compare the cost of stage 2: series as text, context with a soft prompt, and both.

    python tests/benchmarks/llm_cost.py --model_name FOLDER_OR_HUB_ID [--steps 3] [--precision bf16]

One file of one series and one of nine, batch 16, stage 1 frozen. All ways take the same patients in
turn within one process: batches of those whose text has about the median length. Prints, as a
table, the tokens a patient that the language model reads (<bos>, soft tokens, text), and the
seconds of a training step and of a scored batch (median, least and most).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, freeze_stage1, machine, spread

import medgemma_trainer as trainer
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.distributed import default_device, to_device
from medgemma_clinical.training.stage import Stage

FILES = {"One": SAMPLE, "Nine": SAMPLE.with_name("physionet2012_chemistry.csv.gz")}
WAYS = {
    "text with series": ["--soft_prompt", "off"],
    "soft prompt with context": ["--series_text", "none"],
    "both": [],
}
BATCH = 16


class Way:
    """A stage 2 that is trained and scored batch by batch."""

    def __init__(self, path: Path, flags: list[str], arguments: argparse.Namespace) -> None:
        words = ["--data_path", str(path), "--max_samples", str(arguments.patients), *flags]
        words += ["--model_name", arguments.model_name, "--precision", arguments.precision]
        args = trainer.complete(trainer.build_parser().parse_args(words))
        data = prepare_data(
            trainer.read_dataset(args),
            max_samples=args.max_samples,
            seed=args.seed,
            prompts=trainer.prompt_options(args),
        )
        self.stage: Stage = trainer.make_stage(args, data)
        self.model: Any = self.stage.model.to(default_device())
        self.collate: Any = self.stage.loaders["train"].collate_fn
        if args.soft_prompt == "on":
            freeze_stage1(self.stage)
        self.optimizer = torch.optim.AdamW(self.stage.parameter_groups(), fused=True)
        self.training: list[float] = []
        self.scoring: list[float] = []

    def tokens(self) -> np.ndarray[Any, Any]:
        """Return the tokens of each patient that the language model reads."""
        batch = self.collate(range(len(self.collate.dataset)))
        mask = batch["text_mask"].sum(dim=1)
        soft = batch["states_mask"].sum(dim=1) if "states_mask" in batch else 0
        return np.asarray(1 + mask + soft)

    def take(self, rows: list[int]) -> tuple[float, float]:
        """Train on some patients, then score them; return the seconds of both."""
        batch = to_device(self.collate(rows), default_device())
        began = time.perf_counter()
        output = self.model.train()(batch)
        (output.loss / output.terms).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained = time.perf_counter()
        with torch.no_grad():
            self.model.eval()(batch)
        return trained - began, time.perf_counter() - trained


def measure(series: str, path: Path, arguments: argparse.Namespace) -> list[str]:
    """Take the same batches in each way; return the rows of the table."""
    ways = {name: Way(path, flags, arguments) for name, flags in WAYS.items()}
    tokens = {name: way.tokens() for name, way in ways.items()}
    order = np.argsort(tokens["both"], kind="stable")
    places = (len(order) - arguments.steps * BATCH) // 2 + BATCH * np.arange(arguments.steps)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn, place in enumerate([0, *places.tolist()]):
        for name, way in ways.items():
            seconds = way.take(order[place : place + BATCH].tolist())
            if turn:  # the first warms up
                took[name].append(seconds)
    rows = []
    for name, pairs in took.items():
        train, score = (spread(each, 2) for each in zip(*pairs, strict=True))
        median, most = np.median(tokens[name]), tokens[name].max()
        rows.append(f"| {series} | {name} | {median:.0f}, {most} | {train} | {score} |")
    text, soft = (np.median([t for t, _ in took[name]]) for name in list(WAYS)[:2])
    return [*rows, f"{series}: soft prompt / text, training: {soft / text:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.stdout.write(
        f"{machine('torch', 'transformers', 'peft', threads=torch.get_num_threads())}; "
        f"{default_device()}, {arguments.model_name}, {arguments.precision}, batch {BATCH}\n\n"
        "| Series | Way | Tokens: median, longest | Seconds a training step | A scored batch |\n"
        "|---|---|---|---|---|\n"
    )
    for series, path in FILES.items():
        sys.stdout.write("\n".join(measure(series, path, arguments)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
