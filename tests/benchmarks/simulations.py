"""Simulate what intervals, verdicts, updates and pooled values are worth, now and before.

    python tests/benchmarks/simulations.py [--only verdicts] [--sets 200]

Populations of known truth. Each line has the rule of this program beside the one that it replaced:
- folds: metrics outside of their own interval where folds have few events, when draws that lack an
  event in some fold are thrown away;
- verdicts: how often one of eight equal baselines is called better or worse than an equal model,
  when the best of them is compared;
- updates: the slope after an update on the page beside the true one, when both halves are pooled;
- sites: how often the interval of a pooled AUROC is narrower than that of a common effect, and how
  often it holds the truth, without its lower bound; how often the prediction interval holds the
  true effect of a further site.
"""

import argparse
import sys
from unittest import mock

import numpy as np
import pandas as pd
from common import write  # first: it sets the path
from scipy.special import expit
from scipy.stats import t

from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.evaluation import metrics as metrics_module
from medgemma_clinical.evaluation import metrics_table
from medgemma_clinical.evaluation.decision import BOTH, fit_updates
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, VALUE, evaluate
from medgemma_clinical.evaluation.topics.subgroups import random_effects
from medgemma_clinical.evaluation.updating import CHOSEN, crosswise, evaluate_updates
from medgemma_clinical.evaluation.verdicts import BETTER, WORSE, difference_verdict


def predictions(labels, **risks):
    """Return a table of predictions, a row a patient."""
    names = np.arange(len(labels)).astype(str)
    return pd.DataFrame({"id": names, "label": labels.astype(int), "patient": names, **risks})


def share(count, sets):
    return f"{100 * count / sets:.1f} %"


# --------------------------------------------------------------------------- folds of few events


def conditional_draws(labels, fold):
    """Return the bootstrap that throws away draws without a class in some fold."""
    cells = [(fold == k) & (labels == label) for k in np.unique(fold) for label in (0, 1)]

    def draw(labels, patients, seed):
        rng, left = np.random.default_rng(seed), metrics_module.REPLICATES
        while left:
            weights = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), left)
            weights = weights[np.all([weights[:, own].any(axis=1) for own in cells], axis=0)]
            left -= len(weights)
            yield weights.astype(float)

    return draw


def simulate_folds(sets):
    for events, folds in ((10, 10), (24, 12), (50, 10)):
        outside = dict.fromkeys(("before", "now"), 0)
        seen = 0
        for seed in range(max(1, sets // 20)):
            rng = np.random.default_rng(seed)
            odds = np.log(events / 300) + rng.normal(size=300)
            labels, fold, chance = np.zeros(300), np.arange(300) % folds, expit(odds)
            labels[rng.choice(300, events, replace=False, p=chance / chance.sum())] = 1
            fold[labels == 1] = np.arange(events) % folds
            others = {"blend": expit(odds + rng.normal(size=300))}
            rows = predictions(labels, model=expit(odds), **others)
            for when in outside:
                draws = metrics_table.bootstrap_weights
                if when == "before":
                    draws = conditional_draws(labels, fold)
                with mock.patch.object(metrics_table, "bootstrap_weights", draws):
                    table = evaluate(rows, 0, 0.05, split=fold).table
                for ends in (VALUE, DIFFERENCE):
                    value, low, high = table[ends].dropna().to_numpy().T
                    outside[when] += int(((value < low) | (value > high)).sum())
                    seen += len(value)
        counts = {when: share(count, seen / 2) for when, count in outside.items()}
        write(f"folds: 300 patients, {events} events, {folds} folds: outside {counts}")


# --------------------------------------------------------------------------- verdicts


def simulate_verdicts(sets):
    rng, found = np.random.default_rng(1), {"before": [], "now": []}
    for _ in range(sets):
        truth = rng.normal(size=400)
        labels = rng.random(400) < expit(-2.1 + truth)
        shared = truth + 0.5 * rng.normal(size=400)
        names = ["model", "blend", *(f"baseline {k}" for k in range(2, 9))]
        risks = {name: expit(-2 + 0.7 * (shared + 0.5 * rng.normal(size=400))) for name in names}
        metrics = evaluate(predictions(labels, **risks), 0)
        auroc = metrics.metric("auroc")
        compared = {"before": auroc["value"].drop("model").idxmax(), "now": metrics.primary}
        for when, name in compared.items():
            minority = metrics.counts["minority_patients"]
            found[when].append(difference_verdict(auroc.loc[name], minority))
    for when, verdicts in found.items():
        counts = [share(verdicts.count(level), sets) for level in (BETTER, WORSE)]
        write(
            f"verdicts, {when}: a baseline of equal quality is better in {counts[0]}, worse in "
            f"{counts[1]} of {sets} cohorts of 400 (nominal 2.5 %)"
        )


# --------------------------------------------------------------------------- updates


def simulate_updates(sets):
    for rows, level in ((100, -1.0), (200, -1.5), (400, -2.0), (1500, -2.0)):
        rng, found, chosen = np.random.default_rng(0), [], []
        while len(found) < sets // 2:
            odds = rng.normal(level, 1, rows)
            labels = (rng.random(rows) < expit(-0.2 + 0.7 * odds)).astype(float)
            table, patients = predictions(labels, model=expit(odds)), np.arange(rows).astype(str)
            with mock.patch.object(metrics_module, "REPLICATES", 2):
                updates = evaluate_updates(table, "model", len(found))
            if updates is None:
                continue
            half = draw_folds(patients, labels, 2, len(found))
            pooled = crosswise(labels, expit(odds), patients, half, with_slope=True)[BOTH]
            one = np.ones((1, rows))
            before = metrics_module.calibration(labels, pooled.to_numpy(), one)
            fits = fit_updates(labels, expit(odds))
            true = 0.7 / fits.get(BOTH, (1.0, 0.0))[0]
            page = updates.table["value"]
            slopes = [before["calibration_slope"].item()]
            slopes += [page[name, "calibration_slope"] for name in (BOTH, CHOSEN)]
            found.append([*slopes, true])
            chosen.append(updates.method)
        ends = np.nanquantile(found, [0.025, 0.5, 0.975], axis=0).T
        names = ("pooled, before", "mean of halves", "the same as the tests choose", "true")
        text = "; ".join(
            "{} {:.2f}, {:.2f}, {:.2f}".format(name, *each)
            for name, each in zip(names, ends, strict=True)
        )
        counts = {name: share(chosen.count(name), len(chosen)) for name in sorted({*chosen})}
        write(
            f"updates, {rows} rows, slope after intercept and slope (2.5, 50, 97.5 %): {text}; "
            f"the tests choose {counts}"
        )


# --------------------------------------------------------------------------- sites


def simulate_sites(sets):
    for sites in (3, 5, 8):
        rng, narrower, covered = np.random.default_rng(0), [0, 0], [0, 0]
        for _ in range(10 * sets):
            variances = rng.uniform(0.01, 0.1, sites)
            effects = rng.normal(size=sites) * np.sqrt(variances)
            found = random_effects(effects, variances)
            weights = 1 / (variances + found["tau2"])
            squares = weights @ (effects - found["value"]) ** 2
            reach = t.ppf(0.975, sites - 1) * np.sqrt(squares / (sites - 1) / weights.sum())
            common = 1.96 / np.sqrt((1 / variances).sum())
            for k, half in enumerate((reach, (found["high"] - found["low"]) / 2)):
                narrower[k] += half < common
                covered[k] += abs(found["value"]) <= half
        words = [
            f"narrower than of a common effect in {share(narrower[k], 10 * sets)}, "
            f"holds the truth in {share(covered[k], 10 * sets)}"
            for k in (0, 1)
        ]
        write(f"sites, {sites} that do not differ: before {words[0]}; now {words[1]}")
    sets = 15 * sets // 2
    for tau2 in (0.02, 0.05, 0.2):
        held = {sites: further_held(sites, tau2, sets) for sites in (5, 10, 20, 40)}
        counts = ", ".join(f"{share(n, sets)} with {sites}" for sites, n in held.items())
        write(f"sites, tau2 {tau2}: prediction interval holds a further site in {counts} sites")


def further_held(sites, tau2, sets):
    """Count the sets of sites whose prediction interval holds the true effect of another site."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(sets):
        variances = rng.uniform(0.01, 0.1, sites)
        effects = rng.normal(size=sites) * np.sqrt(variances + tau2)
        found = random_effects(effects, variances)
        further = rng.normal() * np.sqrt(tau2)
        held += found["prediction_low"] <= further <= found["prediction_high"]
    return held


SIMULATIONS = {
    "folds": simulate_folds,
    "verdicts": simulate_verdicts,
    "updates": simulate_updates,
    "sites": simulate_sites,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=SIMULATIONS, nargs="+", default=[*SIMULATIONS])
    parser.add_argument("--sets", type=int, default=200)
    arguments = parser.parse_args(argv)
    for name in arguments.only:
        SIMULATIONS[name](arguments.sets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
