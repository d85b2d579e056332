"""Compare stage 1 with its rivals on several seeded splits.

    python tests/benchmarks/stage1.py [--data FILE.csv] [--seeds 5] [flags of the trainer]

Each seed is a run of its own; the test part of its split is scored once, by the best epoch on its
validation part. Prints the pooled test AUROC of stage 1, the baselines and the combined model with
95 % intervals (patients are drawn once for all splits), the paired differences to stage 1, and
those to the blend of the simple models.
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
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer
from medgemma_clinical.commands.compare import cost_of, read_predictions
from medgemma_clinical.evaluation.metrics_table import evaluate_splits
from medgemma_clinical.evaluation.tables import model_table

STAGE, BLEND = "stage 1", "blend with statics"


def train(data: Path, seed: int, place: Path, *flags: str) -> dict[str, Any]:
    """Run stage 1 in a folder; return its metrics and the median ``seconds_an_epoch``."""
    words = ["--trajectory_only", "--data_path", str(data), "--seed", str(seed), *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        code = trainer.main([*words, "--log_file", "none", "--output_dir", str(place)])
    if code:
        raise SystemExit(code)
    folder = place / "trajectory"
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {**metrics, **cost_of(folder)}


def main() -> None:
    """Run the splits and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    began, metrics, tables = time.perf_counter(), [], []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as place:
            metrics.append(train(arguments.data, seed, Path(place), *flags))
            tables.append(read_predictions(Path(place, "trajectory"), STAGE))
        auroc = metrics[-1]["test"]["auroc"]["value"]
        sys.stderr.write(
            f"split {seed}: {STAGE} {auroc:.4f}, epoch {metrics[-1]['selected_epoch']}\n"
        )
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    sys.stdout.write(f"{arguments.data.name} {' '.join(flags)}; {on}\n")
    for reference in (STAGE, BLEND):
        if reference in tables[0]:
            table = model_table(evaluate_splits(tables, 0, reference))
            sys.stdout.write(f"{table.to_string(index=False)}\n\n")
    validation = np.mean([each["validation"]["auroc"]["value"] for each in metrics])
    seconds = np.median([each["seconds_an_epoch"] for each in metrics])
    sys.stdout.write(
        f"{STAGE}: validation AUROC, mean {validation:.4f}; {seconds:.2f} s an epoch; "
        f"{time.perf_counter() - began:.0f} s in all\n"
    )


if __name__ == "__main__":
    main()
