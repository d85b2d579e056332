"""Classical models of times to events on the folds of ``--folds 5``, and one table with stage 1.

    pip install comprisk==0.8.0     # in an environment of its own, beside this program's packages
    python tests/benchmarks/classical.py --data DIR/nafld.csv --horizon_hours 43824 \\
        --risks DIR/nafld_risks.csv [--predictions RUN/folds_trajectory/predictions_folds.csv]

Cause-specific Cox, Fine-Gray and a competing-risks forest read what the product's own baselines
read: the summaries of the series and the static features, unknown values filled in by the median
and marked. In each fold the penalty (lasso or ridge) of the regressions is chosen by three folds of
the training part, leaf size and number of columns of the forest by the Brier score in a fifth of
it. Follow-up ends at the last horizon. The risks go to ``--risks`` and are read from there if the
file exists; with ``--predictions``, the table of the folds of a run on the same file, the metrics
of all models are printed as means over the folds, with paired differences from the blend, and
intervals as wide as those of folds.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, needed, write

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.fold_split import draw_folds, foldable
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, best_blend
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.target import targets_of
from medgemma_clinical.evaluation.time_metrics import aalen_johansen, metrics_at
from medgemma_clinical.evaluation.verdicts import difference_text

FOLDS = 5
COX, FINE_GRAY, FOREST, NULL = "cause-specific Cox", "Fine-Gray", "forest", "Aalen-Johansen"
PENALTIES = [
    {"penalty": "lasso", "n_lambda": 8, "lambda_min_ratio": 0.03},
    {"penalty": "ridge", "lambdas": 10 ** np.linspace(0.5, -2, 6)},
]
TREES, TREES_TO_CHOOSE = 200, 50
LEAVES, COLUMNS = (10, 30, 100), ("sqrt", 0.3)


def read(path, horizons):
    """The rows that the folds of the program hold out, and the fold of each."""
    rows = foldable(MIMICtrajectoryDataset(path, horizon_hours=horizons), 0, 0)
    return rows, draw_folds(rows.groups, rows.labels, FOLDS, 0)


def inputs(rows, train):
    """Summaries and static features, filled, marked, without outliers, by the training rows."""
    table = np.column_stack([rows.baseline_inputs()["logistic regression"], rows.static])
    known = ~np.isnan(table[train])
    table = table[:, known.any(axis=0)]
    unknown = np.unique(np.isnan(table), axis=1).astype(float)  # of a series all are alike
    low, middle, high = np.nanquantile(table[train], [0.005, 0.5, 0.995], axis=0)
    table = np.where(np.isnan(table), middle, table.clip(low, high))
    table = np.column_stack([table, unknown])
    table = table[:, table[train].std(axis=0) > 1e-9]
    return (table - table[train].mean(axis=0)) / table[train].std(axis=0)


def regression(values, hours, event, cause, seed):
    """A penalised Fine-Gray model; without other events it is Cox's."""
    model = needed("comprisk", "comprisk").PenalizedFineGrayRegression
    options = {"cause": cause, "cv": 3, "cv_random_state": seed, "max_iter": 40, "tol": 1e-2}
    fits = [model(**options, **each).fit(values, time=hours, event=event) for each in PENALTIES]
    return min(fits, key=lambda fit: np.nanmin(fit.cv_deviance_))


def cox(train, test, hours, event, horizons, seed):
    """Risk of event 1 by hazards of their own for event 1 and all others."""
    times = np.unique(hours[event > 0])
    steps = []
    for alone in (np.where(event == 1, 1, 0), np.where(event > 1, 1, 0)):
        incidence = regression(train, hours, alone, 1, seed).predict_cumulative_incidence
        steps.append(np.diff(-np.log1p(-incidence(test, times).clip(max=1 - 1e-15)), prepend=0))
    total = steps[0] + steps[1]
    before = np.exp(total - np.cumsum(total, axis=1))
    share = np.divide(steps[0], total, out=np.zeros_like(total), where=total > 0)
    curve = np.cumsum(before * -np.expm1(-total) * share, axis=1)
    at = np.searchsorted(times, horizons, side="right") - 1
    return np.where(at >= 0, curve[:, at.clip(0)], 0.0)


def fine_gray(train, test, hours, event, horizons, seed):
    model = regression(train, hours, event, 1, seed)
    return model.predict_cumulative_incidence(test, horizons)


def forest(train, test, hours, event, horizons, seed):
    """The forest whose leaves and columns have the lowest Brier score in a fifth of the rows."""
    kind = needed("comprisk", "comprisk").CompetingRiskForest
    rest = np.random.default_rng(seed).permutation(len(hours)) % 5 > 0

    def risks(rows, new, trees, leaf, columns):
        options = {"min_samples_leaf": leaf, "max_features": columns, "min_samples_split": 2 * leaf}
        options |= {"n_estimators": trees, "random_state": seed, "n_jobs": 1}
        model = kind(**options).fit(train[rows], hours[rows], event[rows])
        return model.predict_cif(new, times=horizons)[:, 0]

    def loss(leaf, columns):
        found = risks(rest, train[~rest], TREES_TO_CHOOSE, leaf, columns)
        watched = hours[~rest], event[~rest]
        scores = [
            metrics_at(*watched, found[:, k], hour)["scaled_brier"]
            for k, hour in enumerate(horizons)
        ]
        return -np.mean(scores)

    choices = [(leaf, columns) for leaf in LEAVES for columns in COLUMNS]
    chosen = min(choices, key=lambda choice: loss(*choice))
    write(f"  forest: leaves of {chosen[0]}, {chosen[1]} of the columns")
    return risks(slice(None), test, TREES, *chosen)


def null(train, test, hours, event, horizons, seed):
    """The observed risk of the training rows as everyone's."""
    times, curve = aalen_johansen(hours, event)
    at = np.searchsorted(times, horizons, side="right") - 1
    return np.tile(curve[0][at], (len(test), 1))


RIVALS = {COX: cox, FINE_GRAY: fine_gray, FOREST: forest, NULL: null}


def risks_of_folds(rows, fold):
    """The table of all rows: what was observed, the fold, and ``NAME RISK`` of each rival."""
    horizons, names = np.array(rows.competing_events.horizons), rows.competing_events.risk_names
    table = rows.observed(np.arange(len(rows))).assign(fold=fold)
    # Who is without an event at the last horizon is censored then, behind the events of that hour.
    hours = rows.event_hours.clip(max=horizons[-1])
    event = np.where(rows.event_hours > horizons[-1], 0, rows.events).astype(int)
    for k in range(fold.max() + 1):
        train = fold != k
        values = inputs(rows, train)
        for name, rival in RIVALS.items():
            began = time.perf_counter()
            found = rival(values[train], values[~train], hours[train], event[train], horizons, k)
            for risk, column in zip(names, found.T, strict=False):
                table.loc[~train, f"{name} {risk}"] = column
            write(f"fold {k}, {name}: {time.perf_counter() - began:.0f} s")
    return table


def of_stage(predictions, events):
    """The table of a run's folds with ``NAME RISK`` of all models, the ensemble first."""
    table = pd.read_csv(predictions, dtype={"id": str, "patient": str})
    stage = STAGE_NAMES["trajectory"]
    table = table.rename(columns={name: f"{stage} {name}" for name in events.risk_names})
    given = [name for name in table if " risk_" in name]
    given.sort(key=lambda name: not name.startswith(ENSEMBLE))  # others keep their order
    return table[["id", *given]]


def metrics_table(metrics, targets, reference):
    """The metrics of each model at each horizon as Markdown, with differences from one of them."""
    shown = ("auroc", "scaled_brier", "oe", "slope")
    heads = [METRICS[name].title for name in shown]
    differences = [f"{metric}, minus {reference}" for metric in ("AUROC", "Scaled Brier")]
    lines = [["Risk", "Model", *heads, *differences]]
    lines.append(["---"] * len(lines[0]))
    for target in targets:
        for model in metrics.models:
            of_model = metrics.at(target).of(model)
            texts = [METRICS[name].text(of_model.loc[name]) for name in shown]
            texts += [
                "" if model == reference else difference_text(of_model.loc[x]) for x in shown[:2]
            ]
            lines.append([target.name, model, *texts])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--horizon_hours", type=lambda text: [*map(float, text.split(","))])
    parser.add_argument("--risks", type=Path, required=True)
    parser.add_argument("--predictions", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    rows, fold = read(args.data, args.horizon_hours)
    if not args.risks.is_file():
        write(f"{args.data.name}; {machine('comprisk')}")
        risks_of_folds(rows, fold).to_csv(args.risks, index=False)
    table = pd.read_csv(args.risks, dtype={"id": str, "patient": str})
    if args.predictions:
        table = of_stage(args.predictions, rows.competing_events).merge(
            table, on="id", validate="one_to_one"
        )
        if len(table) < len(fold):
            write(f"{len(fold) - len(table)} rows without a prediction of the run are left out")
    targets = targets_of(rows.competing_events)[: len(rows.competing_events.horizons)]
    reference = best_blend(targets[0].models(table))
    metrics = evaluate(table, 0, reference=reference, split=table["fold"], targets=targets)
    write(f"{metrics.counts}, intervals {metrics.widening:.2f} times as wide as of rows")
    write(metrics_table(metrics, targets, reference or metrics.models[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
