"""Compare stage 1 with its rivals on several seeded splits.

    python tests/benchmarks/stage1.py [--data FILE.csv] [--seeds 5] [flags of the trainer]

Each seed is a run of its own, as a user starts it with ``--seeds``; the test part of its split is
scored once, by the best epoch on its validation part. Prints the pooled test AUROC of stage 1, the
baselines and the combined model with 95 % intervals (patients are drawn once for all splits), the
paired differences to stage 1, and those to the blend of the simple models.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine

import medgemma_trainer as trainer
from medgemma_clinical.commands.ablation import seconds_an_epoch
from medgemma_clinical.commands.compare import read_predictions
from medgemma_clinical.evaluation.comparison import compare_models, comparison_table

STAGE, BLEND = "stage 1", "blend with facts"


def main() -> None:
    """Run the splits and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    words = ["--trajectory_only", "--data_path", str(arguments.data), *flags]
    with tempfile.TemporaryDirectory() as place:
        words += ["--seeds", str(arguments.seeds), "--log_file", "none", "--output_dir", place]
        with contextlib.redirect_stdout(io.StringIO()):
            code = trainer.main(words)
        if code:
            raise SystemExit(code)
        folders = [Path(place, f"seed_{seed}", "trajectory") for seed in range(arguments.seeds)]
        tables = [read_predictions(folder, STAGE) for folder in folders]
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        seconds = np.median([seconds_an_epoch(folder) for folder in folders])
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    sys.stdout.write(f"{arguments.data.name} {' '.join(flags)}; {on}\n")
    for reference in (STAGE, BLEND):
        if reference in tables[0]:
            results = compare_models(tables, reference, 0, 0)
            sys.stdout.write(f"{comparison_table(results, reference).to_string(index=False)}\n\n")
    validation = [each["validation"]["auroc"]["value"] for each in metrics]
    epochs = [each["selected_epoch"] for each in metrics]
    sys.stdout.write(
        f"{STAGE}: validation AUROC, mean {np.mean(validation):.4f}; best epochs {epochs}; "
        f"{seconds:.2f} s an epoch; {time.perf_counter() - began:.0f} s in all\n"
    )


if __name__ == "__main__":
    main()
