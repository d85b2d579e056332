"""The decision rules of several models, fitted to a table of their predictions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation import decision, verdicts
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.decision import (
    DecisionOptions,
    DecisionRule,
    Recalibrated,
    Rules,
)
from medgemma_clinical.evaluation.metrics import log_odds, row_losses
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.reference import reference
from medgemma_clinical.evaluation.target import Target, targets_of_config

RulesOfModels = Mapping[str, Rules]


def fit_rules(
    table: pd.DataFrame,  # risks as models give them
    models: Sequence[str],
    targets: Sequence[Target],
    options: DecisionOptions,
    part: NDArray[np.generic] | slice = slice(None),
    methods: Mapping[tuple[str, str], str] | None = None,  # by model and target; None: by options
) -> dict[str, dict[str, DecisionRule]]:
    """Fit the rules of models to a part of the rows, which they did not learn from."""
    patients = table["patient"].to_numpy(str)[part]
    rules: dict[str, dict[str, DecisionRule]] = {}
    for model in models:
        rules[model] = {}
        for target in targets:
            own = options
            if methods is not None:
                own = replace(options, method=methods[model, target.name])
            risk = table[target.column(model)].to_numpy(float)[part]
            known = target.known(table, part=part)
            rules[model][target.name] = decision.fit_rule(known, risk, patients, own)
    return rules


def apply_rules(
    table: pd.DataFrame, rules: RulesOfModels, targets: Sequence[Target]
) -> pd.DataFrame:
    """Return a table with the risks that are delivered, which do not fall with the horizon."""
    moved = {}
    for model, of_targets in rules.items():
        for target in targets:
            column = target.column(model)
            risk = table[column].to_numpy(float)
            moved[column] = of_targets[target.name].risk(risk, target.link)
        if any(rule.is_moved for rule in of_targets.values()):
            for earlier, later in itertools.pairwise(targets):
                if earlier.ends == later.ends:
                    name = later.column(model)
                    moved[name] = np.maximum(moved[earlier.column(model)], moved[name])
    return table.assign(**moved)


def decide_folds(
    table: pd.DataFrame,
    rules: Sequence[RulesOfModels],  # of each fold, the stage's first
    fold: NDArray[np.int64],  # (n,)
    targets: Sequence[Target],
    options: DecisionOptions,
) -> tuple[RulesOfModels, pd.DataFrame, dict[str, Recalibrated]]:
    """Fit decision rules to out-of-fold predictions.

    All rows choose how each model is recalibrated. Returns the rules of the models, the table with
    the risks of each fold as the other folds recalibrate them, which choose the thresholds, and by
    target the first model's risks before the recalibration, with its rule.
    """
    models = [name for name in rules[0] if targets[0].column(name) in table]
    raw = without_rules(table, models, rules, fold, targets)
    of_all = fit_rules(raw, models, targets, options)
    methods = {(m, t): rule.method for m, own in of_all.items() for t, rule in own.items()}
    parts = []
    for k in np.unique(fold):
        others = fit_rules(raw, models, targets, options, np.flatnonzero(fold != k), methods)
        parts.append(apply_rules(raw[fold == k], others, targets))
    crossed = pd.concat(parts).sort_index()
    for target in targets:
        known = target.known(table)
        for model in models:
            risk = crossed[target.column(model)].to_numpy(float)
            threshold = decision.choose_threshold(options.threshold, known, risk)
            rule = of_all[model][target.name]
            of_all[model][target.name] = replace(rule, threshold=threshold)
    before = {}
    for target in targets:
        risk = raw[target.column(models[0])].to_numpy(float)
        before[target.name] = Recalibrated(risk, of_all[models[0]][target.name], target.link)
    return of_all, crossed, before


def without_rules(
    table: pd.DataFrame,
    models: Sequence[str],
    rules: Sequence[RulesOfModels],  # of each fold
    fold: NDArray[np.int64],  # (n,)
    targets: Sequence[Target],
) -> pd.DataFrame:
    """Return the risks of folds before each fold's own recalibration."""
    raw = table.copy()
    for model, target in itertools.product(models, targets):
        of_folds = [of_fold[model][target.name] for of_fold in rules]
        multiplier = np.array([rule.multiplier for rule in of_folds])[fold]
        shift = np.array([rule.shift for rule in of_folds])[fold]
        column = target.column(model)
        risk = table[column].to_numpy(float)
        raw[column] = target.link.moved(risk, 1 / multiplier, -shift / multiplier)
    return raw


def recommend(
    table: pd.DataFrame,  # of held-out predictions
    metrics: Metrics,
    targets: Sequence[Target],
    stage: str,
    models: Sequence[str],
) -> str | None:
    """Return ``best_model``, that of ``--use best``, by the log loss at all horizons."""
    names = [name for name in targets[0].models(table) if name in (stage, *models)]
    losses = np.zeros((len(names), len(table)))
    for target in targets:
        if not target.ends:  # what is observed, not what would be
            known = target.known(table)
            risks = table[[target.column(name) for name in names]].to_numpy(float).T
            losses += known.weights[0] * row_losses(known.case, log_odds(risks))
    patients, events = table["patient"].to_numpy(str), metrics.counts["events"]
    planned = verdicts.planned_above_chance(metrics)
    preferred = [ENSEMBLE, stage]
    return decision.recommended_model(names, losses, events, patients, preferred, planned)


def references(table: pd.DataFrame, models: Sequence[str], target: Target) -> dict[str, Any]:
    """Return how models are calibrated in a table of held-out predictions, where that is known."""
    known, patients = target.known(table), table["patient"].to_numpy(str)
    found = {
        name: reference(known, table[target.column(name)].to_numpy(float), patients)
        for name in models
    }
    return {name: entry for name, entry in found.items() if entry is not None}


def rules_of(config: Mapping[str, Any]) -> Rules:
    """Return the rules of a checkpoint's stage; without any, risks stay as they are."""
    targets = targets_of_config(config)
    if "decision" not in config:
        return {target.name: DecisionRule() for target in targets}
    rules = decision.read_rules(config["decision"])
    if {*rules} != {target.name for target in targets}:
        raise ValueError(f"decision rules of {', '.join(rules)}")
    return rules


def moves_of(rules: Rules) -> dict[str, list[float]]:
    """Return multiplier and shift of the rules that move risks."""
    return {k: [rule.multiplier, rule.shift] for k, rule in rules.items() if rule.is_moved}


def describe_moves(rules: Rules, targets: Sequence[Target]) -> str:
    """Return in words how a model's rules move its risks; empty where they do not."""
    titles, texts = {target.name: target.title for target in targets}, []
    for name, (multiplier, shift) in moves_of(rules).items():
        own = f" for {titles[name]}" if len(titles) > 1 else ""
        texts.append(f"multiplied by {multiplier:.2f} and shifted by {shift:+.2f}{own}")
    return f"{', '.join(texts)} on the scale of their calibration" if texts else ""


def stored(rules: RulesOfModels) -> dict[str, Any]:
    """Return rules as a configuration stores them."""
    return {
        model: {name: asdict(rule) for name, rule in own.items()} for model, own in rules.items()
    }
