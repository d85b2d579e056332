"""Both risks of a waiting list whose hazards and rule of transplantation are known.

    python tests/benchmarks/times.py --rows 3000 --seeds 3 [--srtr]

The sickest are transplanted first. Stage 1 learns times to death, transplant and removal; beside it
stands what a label says: death by the horizon, a transplant being none, who is censored left out.
With ``--srtr`` the list is read from the files of SRTR, by both rules of the program. The table
compares the risks of new rows with the true ones: observed over expected, the slope on the
complementary log-log scale, and the greatest distance in tenths of the predicted risk.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import write

from dataset_format import MIMICtrajectoryDataset
from medgemma_trainer import fit_trajectory
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import random_tables, write_folder

HORIZONS, LANDMARK = np.array([90, 365]), 90
LOG_RATES = {"death": (-7.0, 0.9), "transplant": (-6.6, 1.3), "removal": (-7.6, 0.0)}
"""Log hazard a day at a last score of 20, and what five points more add."""
CENSORED, WATCHED = np.exp(-6.8), 1095.0  # a day; days at most
CODES = np.array([np.nan, 8, 4, 9])
"""SRTR's codes of removal: died, transplanted, another reason."""


def ends(severity, rng):
    """Days and event of rows of a severity (rows,), and true risks (rows, 4): with, and without."""
    rates = np.exp([base + slope * severity for base, slope in LOG_RATES.values()])
    times = rng.exponential(1 / rates)
    watched = rng.exponential(1 / CENSORED, len(severity)).clip(max=WATCHED)
    event = np.where(watched < times.min(axis=0), 0, 1 + times.argmin(axis=0))
    truth = []
    for happens in ([1, 1, 1], [1, 0, 1]):
        total = (rates * np.array(happens)[:, None]).sum(axis=0)
        truth += [rates[0] / total * (1 - np.exp(-total * days)) for days in HORIZONS]
    return np.minimum(watched, times.min(axis=0)), event, np.column_stack(truth)


def population(rows, seed):
    """Rows in the DKA format, and the true risks by id."""
    rng = np.random.default_rng(seed)
    severity, cells = np.empty(rows), []
    for row in range(rows):
        level = rng.normal()
        days = np.sort(rng.uniform(0, LANDMARK, rng.integers(3, 9))).round(1)
        scores = 20 + 5 * level + 4 * (days - LANDMARK) / LANDMARK + rng.normal(size=len(days))
        pairs = zip(scores, 24 * days, strict=True)
        cells.append(" -> ".join(f"{score:.1f} ({hour:.1f}h)" for score, hour in pairs))
        severity[row] = (scores[-1] - 20) / 5  # what decides stands in the series
    days, event, truth = ends(severity, rng)
    table = pd.DataFrame(
        {
            "subject_id": [f"p{k}" for k in range(rows)],
            "clinical_trajectory": cells,
            "prediction_hours": LANDMARK * 24.0,
            "event_hours": 24 * days,
            "event": event,
        }
    )
    return table, pd.DataFrame(truth, table["subject_id"])


def waiting_list(rows, seed):
    """CAND and STATHIST of livers, the last MELD by the landmark deciding, and the true risks."""
    cand, history = random_tables(rows, "liver", seed)
    day = history["CANHX_BEGIN_DT"] - history["PX_ID"].map(
        cand.set_index("PX_ID")["CAN_LISTING_DT"]
    )
    known = history[day <= LANDMARK].assign(day=day).sort_values("day", kind="stable")
    meld = known.groupby("PX_ID")["CANHX_SRTR_LAB_MELD"].last().loc[cand["PX_ID"]] - 6200
    days, event, truth = ends((meld.to_numpy() - 20) / 5, np.random.default_rng(seed))
    end = cand["CAN_LISTING_DT"] + LANDMARK + np.ceil(days)  # dates are whole days
    never = dict.fromkeys(("PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"), np.nan)
    ended = {"CAN_REM_DT": event > 0, "CAN_DEATH_DT": event == 1, "REC_TX_DT": event == 2}
    dates = {name: end.where(happened) for name, happened in ended.items()}
    cand = cand.assign(**never, **dates, CAN_REM_CD=CODES[event], CAN_ENDWLFU=end)
    return cand, history, pd.DataFrame(truth, cand["PX_ID"].astype(str))


def with_label(table, days):
    """The rows whose label is known: death by some days; a transplant is none."""
    by_then = table["event_hours"] <= 24 * days
    labels = ((table["event"] == 1) & by_then).astype(int)
    known = ~(by_then & (table["event"] == 0))
    return table.assign(label_escalation=labels)[known].drop(columns=["event", "event_hours"])


def write_table(folder, rows, seed):
    """Write a list in the DKA format; return what reads its times, its labels, and the truth."""
    table, truth = population(rows, seed)
    path = folder / "waiting.csv"
    table.to_csv(path, index=False)
    events = {str(k): name for k, name in enumerate(LOG_RATES, 1)}
    about = {"series": "severity", "unit": "points", "events": events, "interventions": [2]}
    path.with_suffix(".json").write_text(json.dumps(about))
    times = MIMICtrajectoryDataset(path, horizon_hours=24.0 * HORIZONS)
    named = {"series_name": "severity", "unit": "points"}
    labels = [MIMICtrajectoryDataset(with_label(table, days), **named) for days in HORIZONS]
    return path, times, labels, truth


def write_srtr(folder, rows, seed):
    """The same of a list in the files of SRTR."""
    *tables, truth = waiting_list(rows, seed)
    write_folder(folder, *tables, ending=".parquet")
    options = {"landmark_days": LANDMARK, "outcome_kind": "time", "removals": "together"}
    times = SRTRTrajectoryDataset(folder, "liver", horizon_days=[*map(int, HORIZONS)], **options)
    labels = [
        SRTRTrajectoryDataset(folder, "liver", landmark_days=LANDMARK, horizon_days=int(days))
        for days in HORIZONS
    ]
    return folder, times, labels, truth


def risks_of(model, source, names):
    """The risks of a source's rows by risk and model: those of stage 1, then of each other one."""
    table = model.predictions(source).set_index("id")
    for risk in names:
        for column in table:
            if column == risk or column.startswith(f"{risk}_"):
                yield risk, column.removeprefix(risk).removeprefix("_") or "stage 1", table[column]


def line(true, risk):
    """Means, observed over expected, slope, and distances of risks from the truth."""
    curves = [np.log(-np.log1p(-x.clip(1e-9, 1 - 1e-9))) for x in (risk, true)]
    tenths = np.array_split(np.argsort(risk, kind="stable"), 10)
    gaps = [abs(risk[rows].mean() - true[rows].mean()) for rows in tenths]
    sickest = true >= np.quantile(true, 0.8)
    slope = np.polyfit(*curves, 1)[0] if np.ptp(curves[0]) > 1e-6 else np.nan  # none of one risk
    numbers = [true.mean(), risk.mean(), true.mean() / risk.mean(), slope]
    numbers += [np.abs(risk - true).mean(), max(gaps)]
    return [f"{x:.3f}" for x in numbers] + [f"{(risk - true)[sickest].mean():+.3f}"]


HEADS = ["Risk", "Model", "True mean", "Predicted mean", "O/E", "Slope", "Mean distance"]
HEADS += ["Greatest of tenths", "of the sickest fifth, signed"]


def main(argv=None):
    """Print a line for each risk and model: truth, prediction, and their distance in new rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--srtr", action="store_true")
    args = parser.parse_args(argv)
    make = write_srtr if args.srtr else write_table
    options = {"trajectory_epochs": args.epochs, "batch_size": 64}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        new, _, _, truth = make(Path(folder), 5000, 10**6)
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as other:
                _, times, labels, _ = make(Path(other), args.rows, seed)
            names = times.competing_events.risk_names
            lines = [*risks_of(fit_trajectory(times, **options), new, names)]
            for k, dataset in enumerate(labels):
                model = fit_trajectory(dataset, **options, baselines=False)
                risk = model.predictions(new).set_index("id")["probability"]
                lines += [(names[at], "a label by then", risk) for at in (k, k + len(labels))]
            for name, model, risk in lines:
                true = truth.loc[risk.index, names.index(name)].to_numpy()
                found.setdefault((name, model), []).append((true, risk.to_numpy()))
    write(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for key in sorted(found, key=lambda key: names.index(key[0])):
        pairs = [np.concatenate(column) for column in zip(*found[key], strict=True)]
        write(f"| {' | '.join([*key, *line(*pairs)])} |")


if __name__ == "__main__":
    main()
