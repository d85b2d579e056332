"""Where is the ODE worth its cost? Stage 1 with each of the dynamics, on easy and on hard rows.

    python tests/benchmarks/dynamics.py [--data FILE.csv] [--seeds 5]

Trains ``--dynamics ode``, ``decay`` and ``none`` on the same seeded splits, all else by default.
Each model scores the test part as it is, and with a random half or nine tenths of the observations
taken away, which is a sampling rate that no training row has. Of the whole test part the rows with
the longest gaps and those with the fewest observations (a third each) are also judged apart.
Prints AUROC and the paired difference to the ODE, with intervals over patients of all splits.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))
import stage1
from common import SAMPLE, machine

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from dte_encoder import DYNAMICS
from medgemma_clinical.evaluation.metrics_table import evaluate_splits
from medgemma_clinical.evaluation.verdicts import difference_text, value_text
from medgemma_clinical.models.trained_model import load_trained_model
from medgemma_clinical.training.evaluate import outputs
from medgemma_clinical.training.loaders import LengthBatches

KEPT = {"all observations": 1.0, "half of them": 0.5, "a tenth of them": 0.1}
THIRD = 1 / 3


def thinned(dataset: MIMICtrajectoryDataset, share: float, seed: int) -> MIMICtrajectoryDataset:
    """Return a data set whose series keep a random share of their observations, at least one.

    The prediction time stays, so that the wait in front of it grows.
    """
    if share == 1:
        return dataset
    generator = np.random.default_rng(seed)
    draw = generator.random(len(dataset.times))
    least = np.repeat(np.minimum.reduceat(draw, dataset.offsets[:-1]), dataset.lengths)
    kept = (draw < share) | (draw == least)
    fewer = copy.copy(dataset)
    if fewer.prediction_hours is not None:
        fewer.prediction_hours = dataset.prediction_times()
    fewer.times, fewer.values = dataset.times[kept], dataset.values[kept]
    counts = np.add.reduceat(kept.astype(np.int64), dataset.offsets[:-1])
    fewer.offsets = np.concatenate([[0], np.cumsum(counts)])
    fewer._summaries = None
    return fewer


def score(place: Path, dataset: MIMICtrajectoryDataset, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return the risk of some rows under the model in ``place``."""
    trained = load_trained_model(place / "trajectory", trainer.BUILDERS)
    part = dataset.subset(rows).with_inputs(**trained.config["inputs"])
    batches, logit = LengthBatches(np.arange(len(rows)), 256, shuffle=False), np.empty(len(rows))
    for batch, output in outputs(trained.model, batches, part.collate):
        logit[batch["index"].numpy()] = output.logit.double().numpy(force=True)
    return trained.rule.probability(logit)


def one_split(dataset: MIMICtrajectoryDataset, data: Path, seed: int) -> dict[str, pd.DataFrame]:
    """Return, by situation, a table of id, patient, label and the risk of each dynamics."""
    test = dataset.split(seed)["test"]
    tables = {
        name: pd.DataFrame(
            {
                "id": dataset.ids[test],
                "patient": dataset.groups[test],
                "label": dataset.labels[test],
            }
        )
        for name in KEPT
    }
    for dynamics in DYNAMICS:
        with tempfile.TemporaryDirectory() as folder:
            metrics = stage1.train(data, seed, Path(folder), "--dynamics", dynamics)
            sys.stderr.write(f"{seed} {dynamics}: {metrics['seconds_an_epoch']:.2f} s an epoch\n")
            for name, share in KEPT.items():
                fewer = thinned(dataset, share, seed)
                tables[name][dynamics] = score(Path(folder), fewer, test)
    whole = tables["all observations"]
    gaps, counts = dataset.longest_gaps()[test], dataset.lengths[test]
    tables["longest gaps"] = whole[gaps >= np.quantile(gaps, 1 - THIRD)]
    tables["fewest observations"] = whole[counts <= np.quantile(counts, THIRD)]
    return tables


def main() -> None:
    """Train on each split and print a table for each situation."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    dataset = MIMICtrajectoryDataset(arguments.data)
    splits = [one_split(dataset, arguments.data, seed) for seed in range(arguments.seeds)]
    sys.stdout.write(f"{arguments.data.name}; {machine('torch', threads=arguments.threads)}\n")
    for situation in splits[0]:
        metrics = evaluate_splits([split[situation] for split in splits], 0, DYNAMICS[0])
        for dynamics, row in metrics.metric("auroc").iterrows():
            sys.stdout.write(
                f"{situation}, {dynamics}: {value_text(row)}, minus ode {difference_text(row)}\n"
            )
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
