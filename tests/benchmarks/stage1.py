"""Stage 1 with its defaults beside the baselines, on several seeded splits.

    python tests/benchmarks/stage1.py [--seeds 5] [--data FILE.csv]

Each seed splits, initialises and trains anew; the test part of a split is scored once, by the
winner of its validation part. Prints AUROC a split, means, and the paired difference to each
baseline with its standard error over the splits (whose patients overlap, so take it as a guide).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import machine

import medgemma_trainer as trainer


def one_split(data_path: Path, seed: int) -> dict[str, float]:
    """Give test AUROC of stage 1 and of each baseline, and validation AUROC of stage 1."""
    words = ["--trajectory_only", "--data_path", str(data_path), "--seed", str(seed)]
    args = trainer.resolve(trainer.build_parser().parse_args(words))
    data = trainer.load_data(args)
    stage = trainer.trajectory_stage(args, data)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "trajectory"
        folder.mkdir()
        stopping = trainer.run_stage(stage, folder, torch.device("cpu"), seed)
    scored = trainer.evaluate(stage.model, stage.loaders["test"], torch.device("cpu"))
    result = {"stage 1": trainer.auroc(scored)}
    labels = data.dataset.labels[data.split["test"]]
    for name, risks in trainer.baselines(data).items():
        result[name] = float(roc_auc_score(labels, risks["test"]))
    validation = data.dataset.labels[data.split["val"]]
    result["stage 1 validation"] = stopping.best
    for name, risks in trainer.baselines(data).items():
        result[f"{name} validation"] = float(roc_auc_score(validation, risks["val"]))
    return {**result, "winner's epoch": stopping.best_epoch}


def main() -> None:
    """Run the splits and print the table."""
    parser = argparse.ArgumentParser(description="Stage 1 beside its baselines.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=trainer.SAMPLE_DATA)
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
    for name in [c for c in table.columns if f"{c} validation" in table and c != "stage 1"]:
        difference = table["stage 1"] - table[name]
        error = difference.std() / np.sqrt(len(difference))
        sys.stdout.write(
            f"stage 1 - {name}: {difference.mean():+.4f} (standard error {error:.4f})\n"
        )
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
