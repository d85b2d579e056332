"""Compare the cost of stage 2: series as text, context with a soft prompt, and both.

    python tests/benchmarks/llm_cost.py --model_name FOLDER_OR_HUB_ID [--steps 3] [--precision bf16]

One file of one series (batch 16) and one of nine (batch 4), stage 1 frozen. All ways take the same
patients in turn within one process: in order of length, batches at even distances, as an epoch has
them. Prints the tokens a patient that the language model reads (<bos>, soft tokens, text), and the
processor seconds of a training step and of a scored batch on one thread (median, least and most):
on an idle machine they are the seconds that pass. Then the share that the soft prompt takes of the
seconds of text, all steps together.
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
from common import CHEMISTRY, SAMPLE, freeze_stage1, machine, spread

import medgemma_trainer as trainer
from medgemma_clinical.commands.flags import complete
from medgemma_clinical.commands.run_folder import run_data
from medgemma_clinical.training.stage import Stage

FILES = {"One": SAMPLE, "Nine": CHEMISTRY}
WAYS = {
    "text with series": ["--soft_prompt", "off"],
    "soft prompt with context": ["--series_text", "none"],
    "both": [],
}
BATCHES = {"One": 16, "Nine": 4}
"""Patients a batch: 16 with nine series as text need more than 20 GB."""


class Way:
    """A stage 2 that is trained and scored batch by batch."""

    def __init__(self, path: Path, flags: list[str], arguments: argparse.Namespace) -> None:
        words = ["--data_path", str(path), "--max_samples", str(arguments.patients), *flags]
        words += ["--model_name", arguments.model_name, "--precision", arguments.precision]
        args = complete(trainer.build_parser().parse_args(words))
        data = run_data(args, trainer.read_dataset(args), trainer.prompt_options(args), None)
        self.stage: Stage = trainer.make_stage(args, data, None)
        self.model: Any = self.stage.model
        self.collate: Any = self.stage.text
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
        """Train on some patients, then score them; return the processor seconds of both."""
        batch = self.collate(rows)
        began = time.process_time()
        output = self.model.train()(batch)
        (output.loss / output.terms).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained = time.process_time()
        with torch.no_grad():
            self.model.eval()(batch)
        return trained - began, time.process_time() - trained


def measure(series: str, path: Path, arguments: argparse.Namespace) -> list[str]:
    """Take the same batches in each way; return the rows of the table."""
    ways = {name: Way(path, flags, arguments) for name, flags in WAYS.items()}
    tokens = {name: way.tokens() for name, way in ways.items()}
    order = np.argsort(tokens["both"], kind="stable")
    size = BATCHES[series]
    places = np.linspace(0, len(order) - size, 2 * arguments.steps + 1).astype(int)[1::2]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn, place in enumerate([0, *places.tolist()]):
        for name, way in ways.items():
            seconds = way.take(order[place : place + size].tolist())
            if turn:  # the first warms up
                took[name].append(seconds)
    rows = []
    for name, pairs in took.items():
        train, score = (spread(each, 2) for each in zip(*pairs, strict=True))
        median, most = np.median(tokens[name]), tokens[name].max()
        rows.append(f"| {series} | {name} | {median:.0f}, {most} | {train} | {score} |")
    text, soft = (np.sum(took[name], axis=0) for name in list(WAYS)[:2])
    share = " and ".join(f"{each:.2f}" for each in soft / text)
    return [*rows, f"{series}: soft prompt / text, training and scoring: {share}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_name", default="tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(
        f"{machine('torch', 'transformers', 'peft', threads=1)}; "
        f"{arguments.model_name}, {arguments.precision}\n\n"
        "| Series | Way | Tokens: median, longest | Training step, s | Scored batch, s |\n"
        "|---|---|---|---|---|\n"
    )
    for series, path in FILES.items():
        sys.stdout.write("\n".join(measure(series, path, arguments)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
