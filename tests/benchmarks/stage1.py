"""Compare stage 1 with its baselines on several random splits.

    python tests/benchmarks/stage1.py [--data FILE.csv] [--seeds 5] [flags of the trainer]

Each seed is one run. The validation part of its split chooses the epoch, the test part is scored
once. Prints the pooled test AUROC of stage 1, of the baselines and of their ensemble with 95 %
intervals (one bootstrap draw of patients serves all splits), and the paired differences to stage 1
and to the blend of the baselines.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import SAMPLE, machine, train_stage1, write

from medgemma_clinical.commands.compare import read_predictions
from medgemma_clinical.evaluation.metrics_table import evaluate_splits
from medgemma_clinical.evaluation.tables import model_table

STAGE, BLEND = "stage 1", "blend with statics"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args(argv)
    torch.set_num_threads(arguments.threads)
    began, metrics, tables = time.perf_counter(), [], []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            metrics.append(train_stage1(arguments.data, seed, folder, *flags))
            tables.append(read_predictions(Path(folder, "trajectory"), STAGE))
        auroc = metrics[-1]["test"]["auroc"]["value"]
        write(f"split {seed}: {STAGE} {auroc:.4f}, epoch {metrics[-1]['selected_epoch']}")
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    write(f"{arguments.data.name} {' '.join(flags)}; {on}")
    for reference in (STAGE, BLEND):
        if reference in tables[0]:
            table = model_table(evaluate_splits(tables, 0, reference))
            write(f"{table.to_string(index=False)}\n")
    validation = np.mean([each["validation"]["auroc"]["value"] for each in metrics])
    seconds = np.median([each["seconds_an_epoch"] for each in metrics])
    write(
        f"{STAGE}: mean validation AUROC {validation:.4f}; {seconds:.2f} s per epoch; "
        f"{time.perf_counter() - began:.0f} s in all"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
