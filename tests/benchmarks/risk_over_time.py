"""How good the risk of stage 1 is before the end of a stay.

    python tests/benchmarks/risk_over_time.py [--data FILE.csv] [--seed 0] [flags of the trainer]

Trains stage 1 once. Each stay of the test part, from its first to its last observation, is cut into
quarters of its own length, and scored with what was known at the end of each quarter. Prints AUROC
and calibration of these risks with 95 % intervals, patients being drawn, beside the AUROC of the
last values known by then: a logistic regression fitted to the last values of whole training stays.
"""

import argparse
import contextlib
import io
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
from common import SAMPLE, machine

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.baselines import tuned_regression
from medgemma_clinical.evaluation.metrics import calibration, metrics
from medgemma_clinical.evaluation.metrics_table import bootstrap, with_interval
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.inference.explain import prefixes

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def last_known(dataset: TrajectoryDataset) -> list[NDArray[np.int64]]:
    """Return for each quarter the beginning (N,) of each stay that was known at its end."""
    beginnings, owner = prefixes(dataset)
    hours = beginnings.times[beginnings.offsets[1:] - 1]
    first, last = dataset.times[dataset.offsets[:-1]], dataset.times[dataset.offsets[1:] - 1]
    places = []
    for quarter in QUARTERS:
        end = first + quarter * (last - first)
        known = pd.Series(np.flatnonzero(hours <= end[owner] + 1e-9))
        places.append(known.groupby(owner[known]).last().to_numpy())
    return places


def last_values(dataset: TrajectoryDataset) -> NDArray[np.float64]:
    """Return the last value of each series (N, F), NaN where not measured yet."""
    return dataset.baseline_inputs()["last value"].to_numpy()


def figures_of(
    labels: NDArray[np.float64],
    groups: NDArray[np.str_],
    risk: NDArray[np.float64],
    rival: NDArray[np.float64],
) -> dict[str, str]:
    """Return the figures of one quarter with their intervals, in words."""

    def statistics(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        share = weights / weights.sum(axis=1, keepdims=True)
        auroc, other = (metrics(labels, x, weights)["auroc"] for x in (risk, rival))
        return {
            "AUROC": auroc,
            "AUROC of the last values": other,
            "difference": auroc - other,
            **calibration(labels, risk, weights),
            "mean risk, %": 100 * share @ risk,
        }

    table = with_interval(*bootstrap(labels, groups, 0, statistics))
    shown = {
        name: value_text(table.loc[name], form)
        for name, form in {
            "AUROC": ".3f",
            "AUROC of the last values": ".3f",
            "difference": "+.3f",
            "calibration_slope": ".2f",
            "calibration_intercept": "+.2f",
            "calibration_in_the_large": "+.2f",
            "mean risk, %": ".1f",
        }.items()
    }
    return {**shown, "observed, %": f"{100 * labels.mean():.1f}"}


def main() -> None:
    """Train, score the quarters and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    words = ["--trajectory_only", "--data_path", str(arguments.data), "--seed", str(arguments.seed)]
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        if code := trainer.main([*words, *flags, "--log_file", "none", "--output_dir", place]):
            raise SystemExit(code)
        model = trainer.TrajectoryModel.from_pretrained(Path(place) / "trajectory")
        known: Any = model.config["metrics"]
    dataset = MIMICtrajectoryDataset(arguments.data)
    split = dataset.split(arguments.seed)
    train, test = (dataset.subset(split[part]) for part in ("train", "test"))
    risks = model.risk_over_time(test)["probability"].to_numpy()
    beginnings, _ = prefixes(test)
    rule = tuned_regression([]).fit(last_values(train), train.labels)
    table = {}
    for quarter, places in zip(QUARTERS, last_known(test), strict=True):
        rival = rule.predict_proba(last_values(beginnings.subset(places)))[:, 1]
        figures = figures_of(test.labels, test.groups, risks[places], rival)
        seen = beginnings.lengths[places].mean()
        table[f"{100 * quarter:.0f} %"] = {"observations": f"{seen:.1f}", **figures}
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    auroc = known["test"]["auroc"]["value"]
    sys.stdout.write(
        f"{arguments.data.name} {' '.join(flags)}, seed {arguments.seed}; {on}\n"
        f"{pd.DataFrame(table).to_string()}\n{len(test)} rows, {test.labels.sum():.0f} events; "
        f"AUROC of the run {auroc:.4f}, epoch {known['selected_epoch']}; "
        f"{time.perf_counter() - began:.0f} s in all\n"
    )


if __name__ == "__main__":
    main()
