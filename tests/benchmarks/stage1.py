"""Compare stage 1 with its baselines, every patient predicted out-of-fold.

    python tests/benchmarks/stage1.py [--data FILE.csv] [--folds 5] [--members 5] [trainer flags]

Trains stage 1 with five members on the folds; the first of them is the model of one member. The
trainer fits the baselines. Prints AUROC with 95 % interval of each model, and its paired difference
to the blend; of stage 1, the ensembles and the blend AUROC and log loss, of the first two minus
boosted trees and minus the blend, and the calibration slope of all rows. Each other metric is the
mean over the folds; one bootstrap draw of patients serves all folds.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import SAMPLE, machine, members_table, train, write

from medgemma_clinical.commands.prediction_files import shared_models
from medgemma_clinical.evaluation.baselines import BOOSTING, best_blend
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, VALUE, evaluate, evaluate_splits
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import LABEL


def compare(tables):
    """Print what is asked of stage 1: its differences to trees and blend, and its calibration."""
    names = LABEL.models(tables[0])
    blend = best_blend(names)
    trees = [name for name in names if name.startswith(BOOSTING)][-1]
    own = [*(name for name in names if "stage 1" in name), blend]
    whole = pd.concat(tables)
    folds = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    found = {name: evaluate_splits(tables, 0, name) for name in (trees, blend)}
    for name, metric in itertools.product(own, ("auroc", "log_loss")):
        rows = {reference: each.row(name, metric) for reference, each in found.items()}
        text = "{} {} {:.4f} [{:.4f}, {:.4f}]".format(name, metric, *rows[blend][VALUE])
        for reference, row in rows.items():
            if reference != name:
                text += "; minus {} {:+.4f} [{:+.4f}, {:+.4f}]".format(reference, *row[DIFFERENCE])
        write(text)
    for name in own:
        slope = evaluate(whole, 0, 0.5, name, folds).row(name, "slope")
        write("{} calibration slope {:.2f} [{:.2f}, {:.2f}]".format(name, *slope[VALUE]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--members", type=int, default=5)
    arguments, flags = parser.parse_known_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data_path", arguments.data, "--folds", arguments.folds, "--output_dir", folder]
        words += ["--members", arguments.members, "--log_file", "none"]
        train("--trajectory_only", *words, *flags)
        folds = Path(folder, "folds_trajectory")
        stages = [folds / f"fold_{k}" / "trajectory" for k in range(arguments.folds)]
        found = [members_table(stage, arguments.data) for stage in stages]
    tables = shared_models(found, LABEL)
    names = LABEL.models(tables[0])
    blend = best_blend(names)
    metrics = evaluate_splits(tables, 0, blend, compared=names)
    write(f"{arguments.data.name} {' '.join(flags)}; {machine('torch', 'scikit-learn')}")
    write(f"{model_table(metrics).to_string(index=False)}\n{metrics.counts}")
    write(f"reference: {blend}, which was fixed before the results")
    compare(tables)
    write(f"{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
