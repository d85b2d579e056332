"""Compare recipes of stage 1 on the validation parts of several seeded splits.

    python tests/benchmarks/recipe.py [--data FILE.csv] [--seeds 5] [--arms NAME,NAME]
        [--prediction_hours 48]

Each arm is the program with a few flags, or a constant of its modules, changed. Only validation
figures are printed, since the recipe is chosen by them: best AUROC, and the loss of that epoch. The
differences are paired over the splits; their standard error is a guide, as the patients overlap.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer
from medgemma_clinical.commands import results
from medgemma_clinical.models import trajectory
from medgemma_clinical.training import stage

DEFAULT = "default"
ARMS: dict[str, list[str]] = {
    DEFAULT: [],
    "no facts": ["--facts", "off"],
    "no prediction time": ["--prediction_time", "off"],
    "no wide term": [],
    "facts linear": [],
    "facts 16 wide": [],
    "facts 64 wide": [],
    "decay 0.1": [],
    "rate 1e-3": ["--encoder_lr", "1e-3"],
    "rate 5e-4": ["--encoder_lr", "5e-4"],
    "batch 32": ["--batch_size", "32"],
    "decay": ["--dynamics", "decay"],
    "none": ["--dynamics", "none"],
    "five members": ["--members", "5"],
}
"""Flags of each arm beside those of ``constants``."""


@contextlib.contextmanager
def constants(arm: str) -> Iterator[None]:
    """Change what no flag changes."""
    changes: dict[str, Any] = {
        "facts 16 wide": (trajectory, "STATIC_WIDTH", 16),
        "facts 64 wide": (trajectory, "STATIC_WIDTH", 64),
        "decay 0.1": (stage, "WEIGHT_DECAY", 0.1),
    }
    with contextlib.ExitStack() as stack:
        if arm in changes:
            module, name, value = changes[arm]
            stack.enter_context(mock.patch.object(module, name, value))
        if arm == "facts linear":
            stack.enter_context(mock.patch.object(torch.nn, "ReLU", torch.nn.Identity))
        if arm == "no wide term":
            forward = trajectory.TrajectoryHead.forward

            def without(head: Any, states: Any, batch: Any) -> Any:
                with torch.no_grad():
                    head.wide.weight.zero_()
                return forward(head, states, batch)

            stack.enter_context(mock.patch.object(trajectory.TrajectoryHead, "forward", without))
        yield


def with_hours(data: Path, hours: float, copy: Path) -> Path:
    """Write a copy of a file, and of its description, whose rows are all asked at an hour."""
    pd.read_csv(data, dtype=str).assign(prediction_hours=f"{hours:g}").to_csv(copy, index=False)
    description = data.with_name(f"{data.name.split('.')[0]}.json")
    shutil.copy(description, copy.with_suffix(".json"))
    return copy


def one_run(arm: str, data: Path, seed: int) -> dict[str, float]:
    """Return the best validation AUROC of a run, its loss, and seconds an epoch."""
    words = ["--trajectory_only", "--data_path", str(data), "--seed", str(seed), *ARMS[arm]]
    # The test part is for the end: the results are not written.
    with tempfile.TemporaryDirectory() as place, constants(arm):
        no_results = mock.patch.object(
            results, "write_results", return_value={"stage": "trajectory"}
        )
        with contextlib.redirect_stdout(io.StringIO()), no_results:
            code = trainer.main([*words, "--log_file", "none", "--output_dir", place])
        if code:
            raise SystemExit(code)
        lines = Path(place, "trajectory", "history.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    best = max(epochs, key=lambda epoch: epoch["val_auroc"])
    seconds = pd.Series([epoch["seconds"] for epoch in epochs]).median()
    return {"auroc": best["val_auroc"], "loss": best["val_loss"], "seconds": seconds}


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prediction_hours", type=float, help="of all rows, if the file has none")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as place:
        data = arguments.data
        if arguments.prediction_hours is not None:
            data = with_hours(data, arguments.prediction_hours, Path(place, "data.csv"))
        for arm in arguments.arms:
            for seed in range(arguments.seeds):
                rows.append({"arm": arm, "seed": seed, **one_run(arm, data, seed)})
                sys.stderr.write(f"{rows[-1]}\n")
    table = pd.DataFrame(rows).pivot(index="seed", columns="arm")
    on = machine("torch", threads=arguments.threads)
    sys.stdout.write(f"{arguments.data.name}; {on}\n")
    for arm in arguments.arms:
        auroc, loss = table["auroc"][arm], table["loss"][arm]
        line = f"{arm}: AUROC {auroc.mean():.4f}, loss {loss.mean():.4f}"
        if arm != DEFAULT and DEFAULT in table["auroc"]:
            more = auroc - table["auroc"][DEFAULT]
            line += f", difference {more.mean():+.4f} (standard error {more.sem():.4f})"
        sys.stdout.write(f"{line}, {table['seconds'][arm].median():.2f} s an epoch\n")
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
