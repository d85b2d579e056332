"""Compare stage 1 with its baselines on several seeded splits, all settings at their defaults.

    python tests/benchmarks/stage1.py [--seeds 5] [--data FILE.csv]

Each seed is a run of its own, as a user starts it; the test part of its split is scored once, by
the best epoch on its validation part. Prints the AUROC of each split, the means, and the paired
difference to each baseline with its standard error over the splits (whose patients overlap, so
read it as a guide).
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer

STAGE = "stage 1"


def train(data: Path, seed: int, place: Path, *flags: str) -> dict[str, Any]:
    """Run stage 1 in a folder; return its metrics and the median ``seconds_an_epoch``."""
    words = ["--trajectory_only", "--data_path", str(data), "--seed", str(seed), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        code = trainer.main([*words, "--log_file", "none", "--output_dir", str(place)])
    if code:
        raise SystemExit(code)
    folder = place / "trajectory"
    lines = (folder / "history.jsonl").read_text().splitlines()
    seconds = float(np.median([json.loads(line)["seconds"] for line in lines]))
    return {**json.loads((folder / "metrics.json").read_text()), "seconds_an_epoch": seconds}


def one_split(data: Path, seed: int) -> dict[str, float]:
    """Return the AUROC of stage 1 and of each baseline, the best epoch, the seconds of one."""
    with tempfile.TemporaryDirectory() as place:
        metrics = train(data, seed, Path(place))
    parts = {STAGE: metrics, **metrics["baselines"]}
    test = {name: each["test"]["auroc"]["value"] for name, each in parts.items()}
    validation = {
        f"{name}, validation": each["validation"]["auroc"]["value"] for name, each in parts.items()
    }
    run = {"best epoch": metrics["selected_epoch"], "s an epoch": metrics["seconds_an_epoch"]}
    return {**test, **validation, **run}


def main() -> None:
    """Run the splits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    rows = []
    for seed in range(arguments.seeds):
        rows.append(one_split(arguments.data, seed))
        sys.stderr.write(f"split {seed}: {rows[-1]}\n")
    table = pd.DataFrame(rows).rename_axis("seed")
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    sys.stdout.write(f"{arguments.data.name}; {on}\n{table.round(4).T}\n\n")
    for name in table.columns:
        sys.stdout.write(f"{name}: mean {table[name].mean():.4f}, sd {table[name].std():.4f}\n")
    for name in [c for c in table.columns if f"{c}, validation" in table and c != STAGE]:
        difference = table[STAGE] - table[name]
        error = difference.std() / np.sqrt(len(difference))
        sys.stdout.write(
            f"{STAGE} - {name}: {difference.mean():+.4f} (standard error {error:.4f})\n"
        )
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
