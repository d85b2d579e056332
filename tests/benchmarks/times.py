"""Both risks of a waiting list whose hazards and rule of transplantation are known.

    python tests/benchmarks/times.py --rows 3000 --seeds 3

The sickest are transplanted first. Stage 1 learns times to death, transplant and removal; beside it
stands what a label says: death by the horizon, a transplant being none, who is censored left out.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import write

from medgemma_trainer import fit_trajectory

HORIZONS = np.array([90.0, 365.0])
LOG_RATES = {"death": (-7.0, 0.9), "transplant": (-6.6, 1.3), "removal": (-7.6, 0.0)}
"""Log hazard a day at a last score of 20, and what five points more add."""
CENSORED, WATCHED = np.exp(-6.8), 1095.0  # a day; days at most


def population(rows, seed):
    """Rows in the DKA format, and the true risks (rows, 4): with transplants, and without."""
    rng = np.random.default_rng(seed)
    severity, cells = np.empty(rows), []
    for row in range(rows):
        level = rng.normal()
        days = np.sort(rng.uniform(0, 90, rng.integers(3, 9))).round(1)
        scores = 20 + 5 * level + 4 * (days - 90) / 90 + rng.normal(size=len(days))
        pairs = zip(scores, 24 * days, strict=True)
        cells.append(" -> ".join(f"{score:.1f} ({hour:.1f}h)" for score, hour in pairs))
        severity[row] = (scores[-1] - 20) / 5  # what decides stands in the series
    rates = np.exp([base + slope * severity for base, slope in LOG_RATES.values()])
    times, ends = rng.exponential(1 / rates), rng.exponential(1 / CENSORED, rows).clip(max=WATCHED)
    event = np.where(ends < times.min(axis=0), 0, 1 + times.argmin(axis=0))
    table = pd.DataFrame(
        {
            "subject_id": [f"p{k}" for k in range(rows)],
            "clinical_trajectory": cells,
            "prediction_hours": 90 * 24.0,
            "event_hours": 24 * np.minimum(ends, times.min(axis=0)),
            "event": event,
        }
    )
    truth = []
    for happens in ([1, 1, 1], [1, 0, 1]):
        total = (rates * np.array(happens)[:, None]).sum(axis=0)
        truth += [rates[0] / total * (1 - np.exp(-total * days)) for days in HORIZONS]
    return table, np.column_stack(truth)


def with_label(table, days):
    """The rows whose label is known: death by some days; a transplant is none."""
    by_then = table["event_hours"] <= 24 * days
    labels = ((table["event"] == 1) & by_then).astype(int)
    known = ~(by_then & (table["event"] == 0))
    return table.assign(label_escalation=labels)[known].drop(columns=["event", "event_hours"])


def main():
    """Print a line for each risk: truth, prediction, and their distance in new rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    options = {"trajectory_epochs": args.epochs, "batch_size": 64}
    new, truth = population(5000, 10**6)
    new = new.drop(columns=["event", "event_hours"])
    lines = []
    for seed in range(args.seeds):
        table, _ = population(args.rows, seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "waiting.csv"
            table.to_csv(path, index=False)
            events = {str(k): name for k, name in enumerate(LOG_RATES, 1)}
            about = {"series": "severity", "unit": "", "events": events, "interventions": [2]}
            path.with_suffix(".json").write_text(json.dumps(about))
            model = fit_trajectory(path, horizon_hours=[*(24 * HORIZONS)], **options)
        predicted = model.predictions(new).filter(like="risk_")
        for k, name in enumerate(predicted):
            lines.append((name, truth[:, k], predicted[name].to_numpy()))
        for k, days in enumerate(HORIZONS):
            of_label = fit_trajectory(with_label(table, days), **options, baselines=False)
            risk = of_label.predict_proba(new)[:, 1]
            lines.append((f"label by {days:g} d beside risk", truth[:, k], risk))
            lines.append((f"label by {days:g} d beside risk without", truth[:, 2 + k], risk))
    write("| Risk | True mean | Predicted mean | Mean distance | of the sickest fifth, signed |")
    write("|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, *_ in lines):
        pairs = [(true, risk) for each, true, risk in lines if each == name]
        true, risk = (np.concatenate(column) for column in zip(*pairs, strict=True))
        sickest = true >= np.quantile(true, 0.8)
        texts = true.mean(), risk.mean(), np.abs(risk - true).mean()
        gap = (risk - true)[sickest].mean()
        write(f"| {name} | {' | '.join(f'{x:.3f}' for x in texts)} | {gap:+.3f} |")


if __name__ == "__main__":
    main()
