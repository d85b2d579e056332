"""How good the risk of stage 1 is before the end of a stay.

    python tests/benchmarks/risk_over_time.py [--data FILE.csv] [--seed 0] [flags of the trainer]

Trains stage 1 once. Each stay of the test part is cut into quarters of the time from its first to
its last observation, and scored by what was known at the end of each quarter. Prints AUROC and
calibration of these risks with 95 % intervals (patients are resampled), beside the AUROC of a
logistic regression on the last known values, fitted to whole training stays.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import SAMPLE, machine, train_stage1, write

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.baselines import regression
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.evaluation.metrics_table import bootstrap, with_interval
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.inference.explain import prefixes
from medgemma_trainer import TrajectoryModel

QUARTERS = (0.25, 0.5, 0.75, 1.0)
SHOWN = {
    **{"AUROC": ".3f", "AUROC of the last values": ".3f", "difference": "+.3f"},
    **{"slope": ".2f", "intercept": "+.2f", "mean risk, %": ".1f"},
}
"""Rows of the table and their format."""


def known_prefixes(dataset):
    """Return all prefixes, and for each quarter the prefix (N,) of each stay known at its end."""
    beginnings, owner = prefixes(dataset)
    hours = beginnings.times[beginnings.offsets[1:] - 1]
    first, last = dataset.times[dataset.offsets[:-1]], dataset.times[dataset.offsets[1:] - 1]
    found = []
    for quarter in QUARTERS:
        end = first + quarter * (last - first)
        known = pd.Series(np.flatnonzero(hours <= end[owner] + 1e-9))
        found.append(known.groupby(owner[known]).last().to_numpy())
    return beginnings, found


def last_values(dataset):
    """Return the last value of each series (N, F), NaN if not measured yet."""
    return dataset.baseline_inputs()["last value"].to_numpy()


def quarter_metrics(labels, groups, risk, rival):
    """Return the metrics of one quarter with their intervals, as text."""

    def statistics(draws):
        known = of_labels(labels, draws)
        auroc, other = (known.ranking(x)["auroc"] for x in (risk, rival))
        own = {"AUROC": auroc, "AUROC of the last values": other, "difference": auroc - other}
        own |= known.calibration(risk)
        return own | {"mean risk, %": 100 * known.level(risk)["mean_risk"]}

    table = with_interval(*bootstrap(groups, 0, statistics))
    shown = {name: value_text(table.loc[name], form) for name, form in SHOWN.items()}
    return {**shown, "observed, %": f"{100 * labels.mean():.1f}"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args(argv)
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = train_stage1(arguments.data, arguments.seed, folder, *flags)
        model = TrajectoryModel.from_pretrained(Path(folder) / "trajectory")
    dataset = MIMICtrajectoryDataset(arguments.data)
    split = dataset.split(arguments.seed)
    train, test = (dataset.subset(split[part]) for part in ("train", "test"))
    risks = model.risk_over_time(test)["probability"].to_numpy()
    beginnings, known = known_prefixes(test)
    rule = regression().fit(last_values(train), train.labels)
    table = {}
    for quarter, rows in zip(QUARTERS, known, strict=True):
        rival = rule.predict_proba(last_values(beginnings.subset(rows)))[:, 1]
        seen = beginnings.lengths[rows].mean()
        table[f"{100 * quarter:.0f} %"] = {
            "observations": f"{seen:.1f}",
            **quarter_metrics(test.labels, test.groups, risks[rows], rival),
        }
    on = machine("torch", "scikit-learn", threads=arguments.threads)
    write(
        f"{arguments.data.name} {' '.join(flags)}, seed {arguments.seed}; {on}\n"
        f"{pd.DataFrame(table).to_string()}\n{len(test)} rows, {test.labels.sum():.0f} events; "
        f"AUROC of the run {run['test']['auroc']['value']:.4f}, epochs {run['averaged_epochs']}; "
        f"{time.perf_counter() - began:.0f} s in all"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
