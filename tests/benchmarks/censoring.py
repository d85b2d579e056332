"""Do the weights for censored rows return the metrics of uncensored data?

    python tests/benchmarks/censoring.py --data FILE.csv --outcomes FILE.csv

The data are in the DKA format. The outcomes have the columns subject_id, event_hours, event (1: the
event that the risk is about; 2, 3, ...: competing ones), and nobody is censored, so that the true
metrics are computed. The risk of event 1 by --horizon_hours is that of a logistic regression on
summaries of the series and static features, of patients outside the fold. Then rows are censored
again and again: a random half of them at random times, or each with a hazard that depends on
--censored_by, so that about half of the rows are censored. Prints the metrics of all rows, and mean
(standard deviation) of those of censored rows: by Kaplan-Meier's weights, by a regression on the
static features, and of the rows that are left where censored ones are dropped.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, write
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.evaluation.baselines import LOGISTIC, regression
from medgemma_clinical.evaluation.censoring import CensoringRegression
from medgemma_clinical.evaluation.time_metrics import metrics_at

METRICS = ["auroc", "brier", "scaled_brier", "oe", "intercept", "slope", "ici", "observed"]
METRICS += ["effective_n"]
EFFECT = 0.7
"""Log hazard ratio of the censoring by a standard deviation of --censored_by."""


def censor(hours, event, censored):
    """Return hours and events where follow-up ends at ``censored``."""
    return np.minimum(hours, censored), np.where(hours <= censored, event, 0)


def half_at_random(rng, rows, horizon):
    """Draw an end of follow-up before the horizon for about half of the rows."""
    return np.where(rng.random(rows) < 0.5, rng.uniform(0, horizon, rows), np.inf)


def by_input(rng, scores, horizon):
    """Draw an end of follow-up whose hazard depends on z-scores."""
    return rng.exponential(horizon / np.log(2) * np.exp(-EFFECT * scores))


def only_complete(hours, event, risk, horizon):
    """Compute the metrics where rows that are censored before the horizon are dropped."""
    rows = (event > 0) | (hours >= horizon)
    return metrics_at(hours[rows], event[rows], risk[rows], horizon)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--horizon_hours", type=float, default=168)
    parser.add_argument("--censored_by", default="static_age [years]", help="a column")
    parser.add_argument("--censorings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    horizon, rng = arguments.horizon_hours, np.random.default_rng(arguments.seed)
    dataset = MIMICtrajectoryDataset(arguments.data)
    outcomes = pd.read_csv(arguments.outcomes, dtype={"subject_id": str}).set_index("subject_id")
    outcomes = outcomes.reindex(dataset.groups)
    rows = np.flatnonzero(outcomes["event_hours"] >= 0)  # the others were not there to be asked
    dataset, outcomes = dataset.subset(rows), outcomes.iloc[rows]
    hours, event = (outcomes[name].to_numpy(float) for name in ("event_hours", "event"))
    assert (event > 0).all(), "somebody is censored: the true metrics are unknown"
    static = dataset.static_table(dataset.static_names)
    inputs = dataset.baseline_inputs()[LOGISTIC].join(static)
    label = (event == 1) & (hours <= horizon)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=arguments.seed)
    risk = cross_val_predict(
        regression(0.01), inputs, label, cv=folds, groups=dataset.groups, method="predict_proba"
    )[:, 1]
    score = static[arguments.censored_by].fillna(static[arguments.censored_by].mean())
    score = ((score - score.mean()) / score.std()).to_numpy()

    columns = ["half, dropped", "half, Kaplan-Meier", "by input, Kaplan-Meier"]
    columns.append("by input, regression")
    values = {name: [] for name in columns}
    for draw in range(arguments.censorings):
        now = censor(hours, event, half_at_random(rng, len(hours), horizon))
        values[columns[0]].append(only_complete(*now, risk, horizon))
        values[columns[1]].append(metrics_at(*now, risk, horizon))
        now = censor(hours, event, by_input(rng, score, horizon))
        values[columns[2]].append(metrics_at(*now, risk, horizon))
        given = static.to_numpy(), horizon, dataset.groups, draw
        survival = CensoringRegression(now[0], now[1] == 0, *given).probability
        values[columns[3]].append(metrics_at(*now, risk, horizon, censoring=survival))
    truth = metrics_at(hours, event, risk, horizon)
    frames = {name: pd.DataFrame(rows) for name, rows in values.items()}
    write(
        f"{machine('numpy', 'scikit-learn')}; {len(hours):,} rows, {label.sum():,} with event 1 by"
    )
    write(f"{horizon:g} h, {arguments.censorings} censorings, seed {arguments.seed}")
    write(f"input: {arguments.censored_by}\n")
    write("| | " + " | ".join(["all rows", *columns]) + " |")
    write("|---" * (2 + len(columns)) + "|")
    for metric in METRICS:
        digits = 0 if metric == "effective_n" else 3
        cells = [f"{truth[metric]:.{digits}f}"]
        for frame in frames.values():
            cells.append(f"{frame[metric].mean():.{digits}f} ({frame[metric].std():.{digits}f})")
        write(f"| {metric} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
