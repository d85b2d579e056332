"""Simulate what intervals, verdicts, updates and pooled values are worth, now and before.

    python tests/benchmarks/simulations.py [--only verdicts] [--sets 200]

Populations of known truth. Each line has the rule of this program beside the one that it replaced:
- folds: metrics outside of their own interval where folds have few events, when draws that lack an
  event in some fold are thrown away;
- fold_verdicts: how often an AUROC of folds misses the truth and two equal models differ, and the
  power for a difference of 0.03;
- recalibration: the slope of folds before a rule that tests chose, and of the rule in new rows;
- verdicts: how often one of eight equal baselines is called better or worse than an equal model,
  when the best of them is compared;
- updates: the slope after an update on the page beside the true one, when both halves are pooled;
- sites: how often the interval of a pooled AUROC is narrower than that of a common effect, and how
  often it holds the truth, without its lower bound; how often the prediction interval holds the
  true effect of a further site;
- periods: risks of death by 72 hours, with transplants and without, by baselines of times minus the
  true ones, when a row that ends by any event counts a whole interval at risk;
- interventions: metrics of the true risks without transplants, which the sickest have first, when
  the weights are taken as known in the draws; O/E and slope must be 1;
- monitoring: years in which O/E, AUROC or CUSUM of a model in use alarm, where its months are held
  to be equal;
- text_weight: log loss and AUROC in new rows of a regression on a series, to which what a text says
  is added with the weight of the lowest validation loss, or by the rule for language models.
"""

import argparse
import itertools
import sys
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import still, write  # first: it sets the path
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import rankdata, t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.data.terms import frequent_terms, term_vectorizer
from medgemma_clinical.evaluation import baselines, metrics_table, monitoring
from medgemma_clinical.evaluation import metrics as metrics_module
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.decision import (
    BOTH,
    TESTS,
    DecisionOptions,
    DecisionRule,
    fit_residual_weight,
    fit_text_weight,
    fit_updates,
)
from medgemma_clinical.evaluation.metrics import LOGIT, Known, newton_steps, of_labels, row_losses
from medgemma_clinical.evaluation.metrics_table import (
    DIFFERENCE,
    EXPECTED,
    VALUE,
    compared_models,
    draw_metrics,
    evaluate,
    with_interval,
)
from medgemma_clinical.evaluation.pooling import random_effects
from medgemma_clinical.evaluation.reference import reference
from medgemma_clinical.evaluation.rules import decide_folds
from medgemma_clinical.evaluation.target import (
    LABEL,
    read_weights,
    targets_of,
    weighed,
    weight_columns,
)
from medgemma_clinical.evaluation.text_features import USUAL_PENALTY, tuned_penalty
from medgemma_clinical.evaluation.time_baselines import (
    fit_period_trees,
    fit_regressions,
    periods_of,
)
from medgemma_clinical.evaluation.updating import CHOSEN, crosswise, evaluate_updates
from medgemma_clinical.evaluation.verdicts import BETTER, WORSE, difference_verdict
from medgemma_clinical.models.hazards import Hazards


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

    def draw(patients, seed):
        rng, left, n = np.random.default_rng(seed), metrics_module.REPLICATES, len(patients)
        while left:
            weights = rng.multinomial(n, np.full(n, 1 / n), left)
            weights = weights[np.all([weights[:, own].any(axis=1) for own in cells], axis=0)]
            left -= len(weights)
            if len(weights):
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


# --------------------------------------------------------------------------- folds and verdicts

STRENGTH = {
    (200, 6): (0.0, 0.56, 0.65),
    (200, 16): (0.0, 0.71, 0.86),
    (1000, 6): (0.0, 0.41, 0.53),
    (1000, 16): (0.0, 0.5, 0.62),
}
"""Coefficient of one column, by rows and columns: AUROC 0.5, 0.60 and 0.63 out-of-fold."""


def draw_rows(rng, rows, events, columns, strength, other, *, agree):
    """Return inputs of two models, and labels; they agree where they share half of the columns."""
    x = rng.normal(size=(2, rows, columns))
    if agree:
        x[1, :, : columns // 2] = x[0, :, : columns // 2]
        odds = strength * x[0, :, 0] + (other - strength) * x[1, :, -1]
    else:
        odds = strength * x[0, :, 0] + other * x[1, :, 0]
    level = brentq(lambda a: expit(a + odds).mean() - events / rows, -20, 20)
    return x, (rng.random(rows) < expit(level + odds)).astype(float)


def out_of_fold(x, labels, fold):
    """Return the risk of each row by a regression on the other folds."""
    columns, risk = np.column_stack([np.ones(len(x)), x]).T, np.zeros(len(labels))
    for k in np.unique(fold):
        learned, start = np.ones((1, (fold != k).sum())), np.zeros(len(columns))
        fitted = newton_steps(LOGIT, labels[fold != k], columns[:, fold != k], learned, start)
        risk[fold == k] = expit(fitted[0] @ columns[:, fold == k])
    return risk


def draw_split(rng, labels, folds):
    """Return the fold of each row, of as many events each; of a tuple sites of these shares."""
    rows, shuffled = len(labels), rng.permutation(len(labels))
    fold = np.zeros(rows, dtype=int)
    if isinstance(folds, tuple):
        fold[shuffled] = np.repeat(range(len(folds)), np.multiply(rows, folds).astype(int))
    else:
        fold[shuffled[np.argsort(labels[shuffled], kind="stable")]] = np.arange(rows) % folds
    return fold


def fold_results(rows, events, columns, folds, sets, *, agree, strength=0.0, other=0.0, repeats=1):
    """Return AUROC of a model, and another's minus it, with low and high, a line a data set."""
    lines, names, (a, b) = [], np.arange(rows).astype(str), (("a", "auroc"), ("b", "auroc"))
    for seed in range(sets):
        rng, splits, tested = np.random.default_rng(seed), [], {a: [], b: []}
        x, labels = draw_rows(rng, rows, events, columns, strength, other, agree=agree)
        for repeat in range(repeats):
            fold = draw_split(rng, labels, folds)
            splits.append(100 * repeat + fold)
            for key, inputs in zip(tested, x, strict=True):
                risk = out_of_fold(inputs, labels, fold)
                tested[key] += [(own, risk[own]) for own in own_rows(fold)]

        def statistic(weights, labels=labels, tested=tested):
            return {
                key: metrics_table.mean_of_defined(
                    [
                        metrics_module.metrics(labels[own], risk, weights[:, own])["auroc"]
                        for own, risk in parts
                    ]
                )
                for key, parts in tested.items()
            }

        value, drawn = metrics_table.bootstrap(names, 0, statistic)
        widening = metrics_table.widening_of(np.tile(names, repeats), np.concatenate(splits))
        ends = with_interval(value, drawn, widening=widening)
        difference = pd.Series([value[b] - value[a]]), (drawn[b] - drawn[a]).to_frame(0)
        beside = with_interval(*difference, widening=widening)
        lines.append([*ends.loc[a], *beside.loc[0]])
    return np.array(lines).T


def own_rows(fold):
    """Return the rows of each fold."""
    return [np.flatnonzero(fold == k) for k in np.unique(fold)]


def false_verdicts(rows, events, columns, folds, sets, *, agree=False, signal=0, repeats=1):
    """Return how many of some sets have an AUROC beside the truth, and two equal models unequal."""
    strength = STRENGTH[rows, columns][signal]
    design = {"agree": agree, "strength": strength, "other": strength, "repeats": repeats}
    value, low, high, _, below, above = fold_results(rows, events, columns, folds, sets, **design)
    truth = value.mean() if signal else 0.5
    return {
        "auroc": int(((low > truth) | (high < truth)).sum()),
        "difference": int(((below > 0) | (above < 0)).sum()),
    }


def simulate_fold_verdicts(sets):
    designs = itertools.product(((200, 40), (1000, 150)), (6, 16), (5, 10), (False, True))
    with mock.patch.object(metrics_module, "REPLICATES", 200):
        for (rows, events), columns, folds, agree in designs:
            shape = rows, events, columns, folds, sets
            wrong = [false_verdicts(*shape, agree=agree, signal=signal) for signal in (0, 1)]
            _, low, high = STRENGTH[rows, columns]
            found = fold_results(*shape, agree=agree, strength=low, other=high)
            texts = ["{auroc} and {difference}".format_map(counts) for counts in wrong]
            write(
                f"fold verdicts: {rows} rows, {events} events, {columns} columns, {folds} folds, "
                f"models {'agree' if agree else 'differ'}: wrong AUROC and difference on noise "
                f"{texts[0]}, at 0.60 {texts[1]} of {sets}; a difference of {found[3].mean():.3f} "
                f"is shown in {share((found[4] > 0).sum(), sets)}"
            )
        for repeats in (3, 10):
            wrong = false_verdicts(200, 40, 6, 5, sets, repeats=repeats)
            write(
                f"fold verdicts: {repeats} repeats, noise, 200 rows, 40 events: {wrong} of {sets}"
            )
        for shares in ((0.5, 0.3, 0.2), (0.4, 0.2, 0.2, 0.1, 0.1)):
            wrong = false_verdicts(1000, 150, 6, shares, sets)
            write(
                f"fold verdicts: sites of {shares}, noise, 1000 rows, 150 events: {wrong} of {sets}"
            )


# --------------------------------------------------------------------------- recalibrated folds


def recalibrated_folds(rows, slope, sets):
    """Return slopes of folds whose risks are too extreme, a line a data set."""
    lines, stage = [], STAGE_NAMES["trajectory"]
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        odds, fold = rng.normal(-1.9, 1.2, rows), rng.permutation(np.arange(rows) % 5)
        labels = rng.random(rows) < expit(-1.75 * (1 - slope) + slope * odds)
        table = predictions(labels, **{stage: expit(odds)})
        rules = [{stage: {"label": DecisionRule()}}] * 5
        options = DecisionOptions(TESTS)
        final, table, recalibrated = decide_folds(table, rules, fold, [LABEL], options)
        rule = final[stage]["label"]
        drawn = draw_metrics(table, seed, rule.threshold, split=fold, recalibrated=recalibrated)
        own = compared_models(drawn).of(stage)
        name = f"{EXPECTED if rule.is_moved else ''}slope"
        delivered = slope / rule.multiplier
        lines.append(
            {
                "is_moved": rule.is_moved,
                "has_slope": rule.multiplier != 1,
                "before": own.value["slope"],
                "expected": own.value[name],
                "delivered": delivered,
                "is_covered": own.low[name] <= delivered <= own.high[name],
            }
        )
    return pd.DataFrame(lines)


def simulate_recalibration(sets):
    for rows, slope in ((800, 1.0), (800, 0.85), (800, 0.75), (2000, 0.85), (2000, 0.75)):
        with mock.patch.object(metrics_module, "REPLICATES", 200):
            lines = recalibrated_folds(rows, slope, sets)
        for is_moved, found in lines.groupby("is_moved"):
            ends = found[["before", "delivered"]].quantile([0.025, 0.5, 0.975]).round(2)
            write(
                f"recalibration: {rows} rows, true slope {slope}, the rule moves "
                f"{'risks' if is_moved else 'nothing'} in {share(len(found), sets)}: slope before "
                f"{ends['before'].tolist()}, delivered {ends['delivered'].tolist()}, within its "
                f"interval in {share(found['is_covered'].sum(), len(found))}"
            )


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
                updates = evaluate_updates(table, "model", [LABEL], len(found))
            if updates is None:
                continue
            (update,) = updates
            half = draw_folds(patients, labels, 2, len(found))
            pooled = crosswise(LABEL, table, expit(odds), half, with_slope=True)[BOTH]
            known = of_labels(labels)
            true = 0.7 / fit_updates(known, expit(odds)).get(BOTH, (1.0, 0.0))[0]
            page = update.table["value"]
            slopes = [known.calibration(pooled.to_numpy())["slope"].item()]
            slopes += [page[name, "slope"] for name in (BOTH, CHOSEN)]
            found.append([*slopes, true])
            chosen.append(update.method)
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


# --------------------------------------------------------------------------- periods

RATES = {
    "as many of each": (0.006, 0.008, 0.010, 0.004),
    "more censoring": (0.006, 0.008, 0.010, 0.02),
    "rare deaths": (0.002, 0.02, 0.01, 0.02),
}
"""Hazards an hour of death, transplant, discharge and censoring at inputs of 0."""

CUTS = {1: (72.0,), 2: (24.0, 72.0), 8: (5.0, 10.0, 15.0, 24.0, 34.0, 45.0, 57.0, 72.0)}
"""Ends of so many intervals."""

WAITING = CompetingEvents(("death", "transplant", "discharge"), (72.0,), (2,))


def regression_hazards(table, periods):
    (model,) = fit_regressions(table.to_numpy(), periods, [1.0], [*table])
    return model.risks(table)


def tree_hazards(table, periods):
    usual = dict.fromkeys("123", baselines.USUAL_TREES)
    return fit_period_trees(table.to_numpy(), periods, usual, [*table]).risks(table)


def former_hazards(table, periods):
    """A multinomial regression of the events, which count a whole interval at risk."""
    is_event, intervals = periods.is_event, np.eye(periods.exposure.shape[1])
    weight = np.where(is_event.any(axis=1), 1.0, periods.exposure)
    row, interval = np.nonzero(weight)
    events = (is_event * np.arange(1, is_event.shape[1] + 1)[:, None]).sum(axis=1)
    design = np.hstack([table.to_numpy()[row], 30 * intervals[interval]])
    model = LogisticRegression(max_iter=2000)
    model.fit(design, events[row, interval], sample_weight=weight[row, interval])
    chances = np.array(
        [
            model.predict_proba(np.hstack([table.to_numpy(), np.tile(30 * one, (len(table), 1))]))
            for one in intervals
        ]
    )
    none = chances[..., :1]
    return (-np.log(none) * chances[..., 1:] / (1 - none)).transpose(1, 2, 0)


BASELINES = {"before": former_hazards, "regression": regression_hazards, "trees": tree_hazards}


def risk_distances(rows, intervals, rates, baseline, seed=1):
    """Predicted minus true risks, mean and mean of the sickest tenth: (with, without) transplants.

    Two inputs decide log-linear hazards; the first makes death and transplant more likely.
    """
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows))
    slopes = [0.8 * x + 0.5 * y, 0.9 * x, -0.5 * x, 0 * x]
    hazards = np.array(rates)[:, None] * np.exp(slopes)
    times = rng.exponential(1 / hazards)
    hours, event = times.min(axis=0), np.array([1.0, 2.0, 3.0, 0.0])[times.argmin(axis=0)]
    grid = Hazards(WAITING, CUTS[intervals], (1.0, 1.0, 1.0))
    watched = grid.watched(torch.from_numpy(np.column_stack([0 * hours, hours, event])))
    periods = periods_of(watched.exposure.numpy(), watched.is_event.numpy())
    found = BASELINES[baseline](pd.DataFrame({"x": x, "y": y}), periods)
    found, distances = grid.risks(found).T, []
    for risk, happening in zip(found, ([0, 1, 2], [0, 2]), strict=True):
        total = hazards[happening].sum(axis=0)
        true = hazards[0] / total * (1 - np.exp(-72 * total))
        sickest = true > np.quantile(true, 0.9)
        distances.append([(risk - true).mean(), (risk - true)[sickest].mean()])
    return np.array(distances)


def simulate_periods(sets):
    for intervals in CUTS:
        for name, rates in RATES.items():
            for baseline in BASELINES:
                found = risk_distances(300 * sets, intervals, rates, baseline)
                texts = ["{:+.3f}, sickest tenth {:+.3f}".format(*pair) for pair in found]
                write(
                    f"periods, {300 * sets} rows, {name}, {intervals} intervals, {baseline}: risk "
                    f"{texts[0]}; without transplants {texts[1]}"
                )


# --------------------------------------------------------------------------- monitoring

LEVEL, SPREAD, MONTHS, YEARS = -2.2, 1.1, 12, 20
TRUTHS = {
    "months of SD 0.2": (lambda odds: odds, 0.2),
    "equal months": (lambda odds: odds, 0.0),
    "odds x 1.65": (lambda odds: odds + np.log(1.65), 0.2),
    "odds x 2.5": (lambda odds: odds + np.log(2.5), 0.2),
    "slope 0.6": (lambda odds: LEVEL + 0.11 + 0.6 * (odds - LEVEL), 0.2),
    "AUROC 0.5": (lambda odds: np.full_like(odds, logit(0.149)), 0.2),
}
"""True log-odds of those of the model, and the SD between months."""


def area(labels, ranks):
    """Return the AUROC (years, months) of labels (years, months, n); NaN without an event."""
    events, n = labels.sum(axis=2), ranks.shape[1]
    above = (labels * ranks).sum(axis=2) - events * (events + 1) / 2
    return np.where(events > 0, above / np.maximum(events * (n - events), 1), np.nan)


def alarms(labels, risk, known, levels, rule, limits):
    """Return whether O/E, AUROC and CUSUM of years alarm, (3, years); labels (years, months, n)."""
    low, high, lowest = limits
    oe = labels.sum(axis=2) / risk.sum(axis=1)
    auroc = area(labels, rankdata(risk, axis=1))
    beyond = [oe < low - 1e-6, oe > high + 1e-6, auroc < lowest - 1e-6]
    below, above, ranks = ((x[:, 1:] & x[:, :-1]).any(axis=1) for x in beyond)
    steps = monitoring.cusum_steps(labels, monitoring.stable_risk(risk, known), rule.odds_ratio)
    years = steps.reshape(2, len(labels), -1).swapaxes(0, 1)
    signals = [any(len(monitoring.cusum(x, levels.cusum)[1]) for x in year) for year in years]
    return np.array([below | above, ranks, signals])


def hospital(seed, size, patients, rule, truths=tuple(TRUTHS)):
    """Return the ``alarms`` of a hospital of so many patients a month, and of development."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(LEVEL, SPREAD, patients)
    labels = (rng.random(patients) < expit(odds)).astype(float)
    known = reference(of_labels(labels), expit(odds), np.arange(patients))
    odds = rng.normal(LEVEL, SPREAD, (MONTHS, size))
    risk = expit(odds)
    levels = monitoring.alarm_levels(risk.ravel(), size, MONTHS, known, rule, rng)
    with mock.patch.object(Known, "calibration", still):
        tables = [monitoring.period_limits(month, known, levels, rule, rng) for month in risk]
    limits = np.array([[*x.loc["oe"], x.loc["auroc", "limit_low"]] for x in tables]).T
    limits[2, [not monitoring.has_ranks(month, known, rule) for month in risk]] = -np.inf
    found = {}
    for name in truths:
        true, sd = TRUTHS[name]
        chance = expit(true(odds) + rng.normal(0, sd, (YEARS, MONTHS, 1)))
        drawn = (rng.random(chance.shape) < chance).astype(float)
        found[name] = alarms(drawn, risk, known, levels, rule, limits)
    return found


def simulate_monitoring(sets):
    for size, patients in ((30, 1500), (100, 1500), (400, 5000)):
        for when, sd in (("before", 0), ("now", 0.2)):
            rule = monitoring.MonitorRule(period_sd=sd)
            found = [hospital(seed, size, patients, rule) for seed in range(max(1, sets // 10))]
            for name in TRUTHS:
                years = np.hstack([alarmed[name] for alarmed in found])
                checks = [share(x.sum(), years.shape[1]) for x in (years.any(axis=0), *years)]
                write(
                    f"monitoring, {size} a month, {name}, {when}: {checks[0]} of {years.shape[1]} "
                    f"years alarm (O/E {checks[1]}, AUROC {checks[2]}, CUSUM {checks[3]})"
                )


HORIZON, ENDED = 72.0, 120.0
EVENTS = CompetingEvents(("death", "transplant", "discharge"), (HORIZON,), (2,))


def waiting(rows, selection, seed):
    """Return inputs, hours, events and the true risks without transplants, and with them."""
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(2, rows))
    rates = [0.006 * np.exp(0.8 * x + 0.5 * z), 0.008 * np.exp(selection * x)]
    rates = np.stack([*rates, 0.010 * np.exp(-0.5 * x), np.full(rows, 0.004)])
    times = rng.exponential(1 / rates)
    event = np.where(times.min(axis=0) > ENDED, 0, np.array([1, 2, 3, 0])[times.argmin(axis=0)])
    totals = [rates[0] + rates[2], rates[:3].sum(axis=0)]
    risks = [rates[0] / total * (1 - np.exp(-total * HORIZON)) for total in totals]
    return np.stack([x, z], axis=1), times.min(axis=0).clip(max=ENDED), event, *risks


def simulate_interventions(sets, rows=1500):
    together, without = targets_of(EVENTS)
    for selection in (0.4, 0.9, 1.4):
        truth = {"oe": 1.0, "slope": 1.0, "observed": waiting(200_000, selection, 9)[3].mean()}
        found = {"before": [], "now": []}
        for seed in range(sets):
            inputs, hours, event, risk, usual = waiting(rows, selection, 50 + seed)
            table = predictions(np.zeros(rows)).drop(columns="label")
            table = table.assign(event_hours=hours, event=event)
            table[together.column("m")], table[without.column("m")] = usual, risk
            now = weighed([without], table, lambda inputs=inputs: inputs, "km", seed)
            before = read_weights([without], table.assign(**weight_columns(now)))
            for when, targets in (("before", before), ("now", now)):
                found[when].append(evaluate(table, seed, targets=targets).at(without).of("m"))
        for when, tables in found.items():
            lines = {name: pd.DataFrame([x.loc[name] for x in tables]) for name in truth}
            shares = [
                f"{name} {line['value'].mean():.3f}, interval holds "
                f"{share(line['value'].size - missed(line, truth[name]), sets)}"
                for name, line in lines.items()
            ]
            cut = np.mean([x.loc["weights_cut", "value"] for x in tables])
            write(
                f"interventions, selection {selection}, {when}: {'; '.join(shares)}; "
                f"{100 * cut:.1f} % of weights cut"
            )


TEXT_WORDS, TEXT_TESTED = 12, 4_000
"""Findings of which a text speaks, and rows that measure."""


def draw_texts(seed, rows, effect):
    """Draw series (n,), labels and texts: of findings, affirmed, denied or not named, and noise."""
    rng = np.random.default_rng(seed)
    beta = effect * rng.choice([-1, 1], TEXT_WORDS) * rng.uniform(0, 1.5, TEXT_WORDS)
    has, series = rng.random((rows, TEXT_WORDS)) < 0.3, rng.normal(size=rows)
    odds = (has - 0.3) @ beta + 0.8 * series - 1.2
    labels = (rng.random(rows) < expit(odds)).astype(float)
    texts = []
    for row in has:
        said = [f"{'' if x else 'no '}finding{chr(97 + k)}" for k, x in enumerate(row)]
        named = itertools.compress(said, rng.random(TEXT_WORDS) < 0.8)
        noise = [f"word{chr(97 + k)}" for k in rng.integers(0, 26, 30)]
        texts.append(". ".join([*named, *noise]))
    return series, labels, np.array(texts, object)


def simulate_text_weight(sets):
    """Compare weights of what a text adds, where it says something and where it says nothing."""
    for effect, rows in itertools.product((1.0, 0.0), (300, 1000, 2500)):
        found = []
        for seed in range(sets):
            series, labels, texts = draw_texts(seed, rows + TEXT_TESTED, effect)
            train, val = np.arange(9 * rows // 10), np.arange(9 * rows // 10, rows)
            patients = np.arange(len(labels)).astype(str)
            vocabulary = frequent_terms(texts[train], patients[train])
            table = term_vectorizer(vocabulary).fit(texts[train]).transform(texts)
            fits = baselines.LabelFits(labels[train], patients[train])
            folds = baselines.tuning_folds(labels[train], patients[train])
            penalty = tuned_penalty(fits, table[train], folds) if folds else USUAL_PENALTY
            numbers = table @ fits.fit_text(table[train], penalty)[0].T
            numbers -= numbers[train].mean()
            model = LogisticRegression().fit(series[train, None], labels[train])
            offset = model.decision_function(series[:, None])[:, None]
            both = offset[val], offset[val] + numbers[val]
            weights = {
                "none": 0.0,
                "lowest loss": fit_text_weight(*both, partial(text_losses, labels[val])),
                "as of a language model": fit_residual_weight(
                    *both,
                    patients[val],
                    partial(text_losses, labels[val]),
                    partial(text_auroc, labels[val]),
                ),
                "1": 1.0,
            }
            new = slice(rows, None)
            risks = {name: (offset + w * numbers)[new, 0] for name, w in weights.items()}
            found.append(
                {
                    name: (row_losses(labels[new], x).mean(), roc_auc_score(labels[new], x))
                    for name, x in risks.items()
                }
            )
        means = {name: np.mean([x[name] for x in found], axis=0) for name in found[0]}
        text = "; ".join(f"{name} {loss:.4f}, {auroc:.3f}" for name, (loss, auroc) in means.items())
        write(f"text_weight, {rows} rows, {'effects' if effect else 'noise'}: {text}")


def text_losses(labels, outputs):
    """Return the log loss (weights, n) of logits (weights, n, 1)."""
    return row_losses(labels, outputs[..., 0])


def text_auroc(labels, outputs):
    """Return the AUROC of logits (n, 1)."""
    return roc_auc_score(labels, outputs[:, 0])


def missed(line, true):
    """Return how many intervals do not hold the truth."""
    return int(((line["low"] > true) | (line["high"] < true)).sum())


SIMULATIONS = {
    "folds": simulate_folds,
    "fold_verdicts": simulate_fold_verdicts,
    "recalibration": simulate_recalibration,
    "verdicts": simulate_verdicts,
    "updates": simulate_updates,
    "sites": simulate_sites,
    "periods": simulate_periods,
    "interventions": simulate_interventions,
    "monitoring": simulate_monitoring,
    "text_weight": simulate_text_weight,
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
