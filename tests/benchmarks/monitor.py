"""Two simulated years of a hospital: what ``monitor`` says each month, beside the truth.

Rows that trained no model are drawn again, with dates. Metrics that decide nothing are left out,
and the levels of the alarms are computed once, as all years have the same patients.
"""

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from common import still, write

import medgemma_trainer as trainer
from medgemma_clinical.commands.predictions import input_lines
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.evaluation import metrics, monitoring
from medgemma_clinical.evaluation.monitoring import MonitorRule, monitor
from medgemma_clinical.inference.scoring import prediction_table, scoring_rows

FIRST, MONTHS, SIZE, YEARS = 3, 24, 100, 200


def scored(model, table):
    """Return id, label, risk and the last value of each input of a table."""
    findings = Findings("rows", strict=False)
    datasets = trainer.DATASETS
    (rows,) = scoring_rows(table, model.config, datasets, findings, len(table))
    lines, _ = prediction_table(rows, model.trained, findings, 256)
    inputs = input_lines(rows, model.config)
    names = [name for name in inputs if f"{name} measured" in inputs]
    labels = table[model.config["read_options"]["label_column"]].astype(float).to_numpy()
    return lines.assign(label=labels, risk=lines["probability"]), inputs[names]


def draw(rows, rng, months, doubled_from=99):
    """Draw patients of some months; from one on the share of events is doubled."""
    event = (rows["label"] == 1).to_numpy()
    share = event.mean()
    picks = []
    for month in range(1, months + 1):
        prevalence = 2 * share if month >= doubled_from else share
        chance = np.where(event, prevalence / event.sum(), (1 - prevalence) / (~event).sum())
        picks.append(rng.choice(len(rows), SIZE, p=chance))
    month = np.repeat(np.arange(1, months + 1), SIZE)
    dates = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta((month - 1) * 30.5, unit="D")
    dates += pd.to_timedelta(rng.uniform(0, 28, len(month)), unit="D")
    return np.concatenate(picks), month, dates


def main(argv=None):
    """Run all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows that trained no model")
    parser.add_argument("--column", default="trajectory_creatinine [mg/dL]", help="that changes")
    parser.add_argument("--factor", type=float, default=88.4, help="of its other unit")
    args = parser.parse_args(argv)
    with (
        mock.patch.object(metrics, "REPLICATES", 20),
        mock.patch.object(metrics.Known, "calibration", still),
        mock.patch.object(monitoring, "alarm_levels", cache_of(monitoring.alarm_levels)),
    ):
        simulate(args)


def cache_of(function):
    """Return a function that is called once."""
    found = []
    return lambda *words: (found or found.append(function(*words)) or found)[0]


def simulate(args):
    """Print the verdict of each month, and the alarms of stable years."""
    model = trainer.TrajectoryModel.from_pretrained(args.checkpoint)
    table = pd.read_csv(args.data, dtype=str, keep_default_na=False)
    cells, value = table[args.column], r"(-?[\d.]+) \("
    in_unit = cells.str.replace(value, lambda m: f"{float(m[1]) * args.factor:g} (", regex=True)
    as_is, other, lacking = (
        scored(model, table.assign(**{args.column: column})) for column in (cells, in_unit, "")
    )
    config, name = model.config, model.trained.name
    options = {
        "threshold": config["decision"]["label"]["threshold"],
        "reference": config["reference"][name],
        "training": config["case_mix"]["last"],
        "rule": MonitorRule(),
        "period": "month",
        "seed": 0,
    }
    scenarios = {
        "stable": (99, None, 0),
        "prevalence doubled from month 10": (10, None, 0),
        "another unit from month 14": (99, other, 0),
        "not measured from month 14": (99, lacking, 0),
        "outcomes late by two months": (99, None, 2),
        "doubled from month 10, late by two months": (10, None, 2),
    }
    for title, (doubled_from, changed, late) in scenarios.items():
        rng = np.random.default_rng(1)
        picks, month, dates = draw(as_is[0], rng, MONTHS, doubled_from)
        rows, inputs = (x.iloc[picks].reset_index(drop=True) for x in as_is)
        rows = rows[["label", "risk"]].astype(float)
        if changed:
            after = np.flatnonzero(month >= 14)
            rows.loc[after, "risk"] = changed[0]["risk"].to_numpy()[picks[after]]
            inputs.iloc[after] = changed[1].to_numpy()[picks[after]]
        rows["date"] = dates
        for now in range(FIRST, MONTHS + 1):
            known = rows.assign(label=rows["label"].where(month <= now - late))[month <= now]
            found = monitor(known, inputs.astype(float), **options)
            write(f"{title} | {now} | {found.verdict}")
            if now == FIRST:
                write(str(found.levels))
    alarms = []
    for seed in range(YEARS):
        picks, _, dates = draw(as_is[0], np.random.default_rng(1000 + seed), 12)
        rows, inputs = (x.iloc[picks].reset_index(drop=True) for x in as_is)
        found = monitor(rows[["label", "risk"]].assign(date=dates), inputs, **options)
        alarms.append([action.name for action in found.actions])
    counts = {
        name: sum(name in names for names in alarms) for name in ("stop", *monitoring.CHANGES)
    }
    write(f"{YEARS} stable years: {sum(map(bool, alarms))} with an alarm, {counts}")


if __name__ == "__main__":
    main()
