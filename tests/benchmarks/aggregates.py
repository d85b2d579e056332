"""What a site's aggregate tells of labels to one who knows the risks of all of its patients.

    python tests/benchmarks/aggregates.py [--sets 200]

- files: at most how many files there can be of drawn sites of the smallest size, beside the entropy
  of their labels;
- labels: an integer program solves the labels from the file of a site whose labels no model knows;
- one patient: how often two files, with and without a patient, tell the outcome of this patient.
"""

import argparse
import math
import sys

import numpy as np
import pandas as pd
from common import write  # first: it sets the path
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.special import expit
from scipy.stats import rankdata

from medgemma_clinical.evaluation.aggregate import NEEDED, aggregate, few_digits
from medgemma_clinical.evaluation.metrics import log_odds

SITES = (22, 11), (40, 15), (60, 20), (100, 20), (100, 50)
"""Patients and events of the sites whose labels are solved."""

MODELS = ["model", "blend"]
HUNDREDTHS = np.arange(-99, 100) / 100
SLOPES = np.unique([*HUNDREDTHS, *(10 * HUNDREDTHS), *(100 * HUNDREDTHS)]).round(2)
SLOPES = np.array([x for x in SLOPES if few_digits(float(x), 2) == x])
"""All slopes of two digits up to 99."""


def draw_site(rng, n, events, spread=1.0):
    """Return predictions of two models with so many events; ``spread``: of the log-odds."""
    odds = rng.normal(np.log(events / (n - events)), spread, n)
    labels = np.zeros(n)
    labels[np.argsort(odds + rng.logistic(size=n))[n - events :]] = 1
    names = np.arange(n).astype(str)
    risks = [expit(odds), expit(odds + 0.7 * rng.normal(size=n))]
    rows = pd.DataFrame({"id": names, "label": labels, "patient": names})
    return rows.assign(**dict(zip(MODELS, risks, strict=True)))


def site_file(rows):
    return aggregate(rows, dict.fromkeys(MODELS))


def risks_with(events, slopes, odds):
    """Return recalibrated risks (K, n) of numbers of events and slopes (K,)."""
    turned = np.asarray(slopes, float)[:, None] * odds
    low = -abs(turned).max(axis=1, keepdims=True) - 50
    high = -low
    for _ in range(60):
        level = (low + high) / 2
        few = expit(level + turned).sum(axis=1, keepdims=True) < np.reshape(events, (-1, 1))
        low, high = np.where(few, level, low), np.where(few, high, level)
    return expit(level + turned)


def linear_metrics(risk, events):
    """Return weights and constants by which labels give AUROC, Brier score and sum of log-odds.

    With the events fixed all three are linear in the labels, and the sum gives the slope.
    """
    n, pairs = len(risk), events * (len(risk) - events)
    return {
        "auroc": (rankdata(risk) / pairs, -events * (events + 1) / 2 / pairs),
        "brier": ((1 - 2 * risk) / n, (risk**2).mean()),
        "slope": (log_odds(risk), 0.0),
    }


def half(value):
    """Return half of the last digit of a number of two digits."""
    return np.select([np.abs(value) >= 10, np.abs(value) >= 1], [0.5, 0.05], 0.005)


# --------------------------------------------------------------------------- files


def extremes(weights, events, within, low, high):
    """Return least and largest sum of weights of events, whose other weights have a sum between."""
    parts = {"A_eq": np.ones((1, len(weights))), "b_eq": [events], "bounds": (0, 1)}
    parts |= {"A_ub": np.stack([within, -within]), "b_ub": [high, -low]}
    found = [linprog(sign * weights, **parts) for sign in (1, -1)]
    return None if found[0].status else (found[0].fun, -found[1].fun)


def possible_files(risk, events, together=1):
    """Return at most how many triples of AUROC, slope and Brier score of a model there are.

    O/E, intercept and all errors follow from these, the risks and the number of events. So many
    values of the AUROC are counted together: more are faster, and the bound is less close.
    """
    (ranks, constant), (squares, base), (odds, _) = linear_metrics(risk, events).values()
    totals = [
        risks_with(np.full(len(SLOPES), events), SLOPES + sign * half(SLOPES), odds) @ odds
        for sign in (-1, 1)
    ]
    count = 0
    for first in range(0, 101, together):
        low, high = (k / 100 - constant - 0.005 for k in (first, first + together))
        within = ranks, low, high
        if (found := extremes(odds, events, *within)) is None:
            continue
        slopes = (totals[1] >= found[0]) & (totals[0] <= found[1])
        low, high = (round(100 * (x + base)) for x in extremes(squares, events, *within))
        count += together * slopes.sum() * (high - low + 1)
    return count


def count_files(sets):
    n, events = NEEDED["patients"], NEEDED["events"]
    entropy = math.log2(math.comb(n, events))
    bits = []
    for seed in range(max(1, sets // 20)):
        rows = draw_site(np.random.default_rng(seed), n, events, spread=[0.5, 1, 2][seed % 3])
        bits.append(
            sum(math.log2(possible_files(rows[name].to_numpy(), events)) for name in MODELS)
        )
    write(
        f"files of {n} patients, {events} events: at most {min(bits):.1f} to {max(bits):.1f} bits, "
        f"labels {entropy:.1f} bits: {100 * max(bits) / entropy:.0f} %"
    )


# --------------------------------------------------------------------------- labels


def solve_labels(rows, content, aim, within=1.0):
    """Return labels that fit a file and have the least sum of ``aim``, or None.

    The number of events is known: it follows from O/E. ``within``: share of a digit to stay in.
    """
    events, n = int(rows["label"].sum()), len(rows)
    limits = [LinearConstraint(np.ones(n), events, events)]
    for line in content["models"]:
        risk = rows[line["name"]].to_numpy()
        for name, (weights, constant) in linear_metrics(risk, events).items():
            ends = line[name] + np.array([-within, within]) * half(line[name])
            if name == "slope":
                ends = risks_with([events] * 2, ends, weights) @ weights
            limits.append(LinearConstraint(weights, *(ends - constant)))
    options = {"integrality": np.ones(n), "bounds": Bounds(0, 1)}
    found = milp(aim, constraints=limits, options={"time_limit": 60}, **options)
    return None if found.x is None else found.x.round()


def solve_sites(sets):
    for n, events in SITES:
        right, shared = [], []
        for seed in range(max(1, sets // 20)):
            rng = np.random.default_rng(seed)
            rows = draw_site(rng, n, events)
            rows["label"] = labels = rng.permutation(rows["label"].to_numpy())
            content = site_file(rows)
            for aim, found in ((rng.random(n), right), (labels, shared)):
                solved = solve_labels(rows, content, aim)
                if solved is not None:
                    found.append((solved * labels).sum())
        write(
            f"labels of {n} patients, {events} events: the program finds {np.mean(right):.1f} of "
            f"the events (chance {events**2 / n:.1f}), from {min(right):.0f} to {max(right):.0f}; "
            f"labels that fit share only {np.mean(shared):.1f} with the truth, at most "
            f"{max(shared):.0f}; {len(right)} and {len(shared)} sites solved"
        )


# --------------------------------------------------------------------------- one patient


def fitting_events(rows, content):
    """Return the numbers of events that fit O/E, intercept and rounded counts of a file."""
    digits = 3 if content["patients"] >= 500 else 2
    events = np.arange(content["events"] - 2, content["events"] + 3)
    fits = np.ones(len(events), bool)
    for line in content["models"]:
        risk = rows[line["name"]].to_numpy()
        odds = log_odds(risk)
        level = log_odds(risks_with(events, np.ones(5), odds)[:, 0]) - odds[0]
        for name, values in (("oe", events / risk.sum()), ("intercept", level)):
            fits &= [few_digits(float(x), digits) == line[name] for x in values]
    return events[fits]


def compare_two(sets):
    for n, events in ((100, 20), (300, 60), (499, 100), (2000, 400)):
        known = 0
        for seed in range(sets):
            rows = draw_site(np.random.default_rng(seed), n + 1, events + 1)
            rows = rows.sample(frac=1, random_state=seed)
            counts = [fitting_events(part, site_file(part)) for part in (rows.iloc[1:], rows)]
            known += len({int(y - x) for x in counts[0] for y in counts[1]} & {0, 1}) == 1
        write(
            f"one patient of {n + 1}, two files: the outcome follows in {100 * known / sets:.0f} % "
            f"of {sets} sites"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sets", type=int, default=200)
    sets = parser.parse_args(argv).sets
    count_files(sets)
    solve_sites(sets)
    compare_two(sets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
