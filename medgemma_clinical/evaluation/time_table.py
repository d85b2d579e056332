"""Metrics of times to events that compete: one table of all risks, from one bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.censoring import censoring_survival
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import (
    Drawn,
    Metrics,
    bootstrap,
    compared_models,
    count_parts,
    mean_of_defined,
    spread,
    widening_of,
)
from medgemma_clinical.evaluation.time_metrics import (
    MIN_AT_RISK,
    MIN_UNCENSORED,
    Statuses,
    check_horizon,
    statuses_at,
    uncensored_probability,
)
from medgemma_clinical.evaluation.verdicts import (
    CHANCE,
    TOO_FEW,
    Finding,
    comparison,
    counts_text,
    literal_risks,
    percent,
    value_text,
    verdict,
)
from medgemma_clinical.files import InputError

OBSERVED = ["id", "event_hours", "event", "patient"]
UNCENSORED = "uncensored "
"""Beginning of the columns with the chance (n,) that a row was watched until its event or horizon,
for the risks whose metrics are weighted by a regression."""

DISTANCES = ["ici", "e50", "e90"]
"""They grow by the noise of the draws: they have no interval."""

TIME_METRICS = {
    "auroc": ("AUROC", ".3f", "how often an event by the horizon ranks above none by then"),
    "scaled_brier": (
        "Scaled Brier score",
        ".3f",
        "gain over the same risk for everyone; 0 is none, 1 perfect",
    ),
    "oe": ("O/E", ".2f", "observed over expected events; 1 is ideal"),
    "intercept": ("Intercept", "+.2f", "0 is ideal; below, risks are too high"),
    "slope": ("Slope", ".2f", "1 is ideal; below, risks are too extreme; above, too alike"),
    "ici": ("ICI", ".3f", "mean distance of the risks from the calibration curve; 0 is ideal"),
    "e50": ("E50", ".3f", "median of these distances"),
    "e90": ("E90", ".3f", "90th percentile of these distances"),
    "brier": ("Brier score", ".4f", "weighted mean squared distance of risk and outcome"),
    "effective_n": ("Effective rows", ".0f", "rows that the weights are worth"),
}
"""Name, format and meaning of each metric."""


def metric_name(metric: str, risk_name: str, events: CompetingEvents) -> str:
    """Return the key of a metric of a risk; that of the first risk has no ending."""
    first = risk_name == events.risk_names[0]
    return metric if first else f"{metric}_{risk_name.removeprefix('risk_')}"


def evaluated_events(events: CompetingEvents) -> dict[str, tuple[float, tuple[int, ...]]]:
    """Return horizon (hours) and events that are taken for the end of a record, by risk."""
    n = len(events.horizons)
    return {
        name: (events.horizons[k % n], events.interventions if k >= n else ())
        for k, name in enumerate(events.risk_names)
    }


def statuses_of(
    rows: pd.DataFrame,
    events: CompetingEvents,
    name: str,
    weights: Array | None = None,  # (R, n); each row once where None
    part: NDArray[np.intp] | slice = slice(None),
) -> Statuses:
    """Return what a table of predictions tells of a part of its rows at the horizon of a risk."""
    horizon, ends = evaluated_events(events)[name]
    hours, event = (rows[column].to_numpy(float)[part] for column in ("event_hours", "event"))
    uncensored = rows.get(UNCENSORED + name)
    given = None if uncensored is None else uncensored.to_numpy(float)[part]
    weights = np.ones((1, len(hours))) if weights is None else weights[:, part]
    return statuses_at(hours, np.where(np.isin(event, ends), 0.0, event), horizon, weights, given)


def uncensored_columns(
    events: CompetingEvents, dataset: TrajectoryDataset, censoring: str, seed: int
) -> dict[str, Array]:
    """Return the ``UNCENSORED`` columns of a data set, cross-fitted on its rows by patient."""
    hours, event = dataset.event_hours, dataset.events
    assert hours is not None
    assert event is not None
    tables = dataset.baseline_inputs()["logistic regression"], dataset.static
    inputs, columns = np.column_stack(tables), {}
    for name, (horizon, ends) in evaluated_events(events).items():
        options = inputs, horizon, dataset.groups, seed
        if censoring == "regression":
            columns[UNCENSORED + name] = censoring_survival(hours, event == 0, *options)
        elif ends:
            columns[UNCENSORED + name] = uncensored_probability(hours, event, horizon)
        if ends:  # what leads to an intervention is not what ends a record
            columns[UNCENSORED + name] *= censoring_survival(hours, np.isin(event, ends), *options)
    # A row of which hardly any is left would count for all others.
    return {name: column.clip(MIN_UNCENSORED) for name, column in columns.items()}


def models_of(rows: pd.DataFrame, events: CompetingEvents) -> list[str]:
    """Return the models with risks in a table of predictions, in its order."""
    end = f" {events.risk_names[0]}"
    return [
        name.removesuffix(end)
        for name in map(str, rows)
        if name.endswith(end) and not name.startswith(UNCENSORED)
    ]


def check_horizons(dataset: TrajectoryDataset) -> None:
    """Refuse a horizon that too few rows are watched for."""
    if (events := dataset.competing_events) is None:
        return
    observed = pd.DataFrame({"event_hours": dataset.event_hours, "event": dataset.events})
    for horizon in events.horizons:
        if problem := horizon_problem(observed, horizon):
            raise InputError(f"{dataset.source}: {problem}")


def horizon_problem(observed: pd.DataFrame, horizon: float) -> str:
    """Return why some rows cannot be evaluated at a horizon, empty where they can."""
    hours, event = observed["event_hours"].to_numpy(float), observed["event"].to_numpy(float)
    try:
        check_horizon(hours, event, horizon)
    except ValueError as error:  # its horizons are hours
        return str(error)
    return ""


def draw_time_metrics(
    rows: pd.DataFrame,
    events: CompetingEvents,
    seed: int,
    threshold: float | Array | None = None,  # (n,) of several rules; of the first risk
    split: NDArray[np.generic] | None = None,  # (n,) K folds; ranking and error are means over them
) -> Drawn:
    """Compute the metrics of all models' risks on n rows and in draws of patients.

    ``rows`` has ``OBSERVED``, a column ``MODEL RISK`` for each risk, and ``UNCENSORED`` ones.
    """
    hours, event = (rows[name].to_numpy(float) for name in ("event_hours", "event"))
    patients, first = rows["patient"].to_numpy(str), events.risk_names[0]
    models = models_of(rows, events)
    risks = {
        (model, name): rows[f"{model} {name}"].to_numpy(float)
        for model in models
        for name in events.risk_names
    }
    parts = [np.arange(len(rows))]
    if split is not None:
        parts = [np.flatnonzero(split == label) for label in np.unique(split)]
    positive = None if threshold is None else risks[models[0], first] >= threshold

    def ranked(parts: Sequence[NDArray[np.intp]], weights: Array) -> dict[Any, Array]:
        values = {}
        for name in events.risk_names:
            by_part = [(part, statuses_of(rows, events, name, weights, part)) for part in parts]
            for model in models:
                found = [x.ranking(risks[model, name][part]) for part, x in by_part]
                for metric in found[0]:
                    means = mean_of_defined([x[metric] for x in found])
                    values[model, metric_name(metric, name, events)] = means
        return values

    def statistic(weights: Array) -> dict[Any, Array]:
        values = ranked(parts, weights)
        for name in events.risk_names:
            whole = statuses_of(rows, events, name, weights)
            for model in models:
                for metric, drawn in whole.calibration(risks[model, name]).items():
                    values[model, metric_name(metric, name, events)] = drawn
            if positive is not None and name == first:
                confusion = whole.confusion(positive)
                values |= {(models[0], metric): drawn for metric, drawn in confusion.items()}
        return values

    by_first = ((event == 1) & (hours <= events.horizons[0])).astype(float)
    any_labels = np.resize([0.0, 1.0], len(rows))  # no draw depends on them
    value, drawn = bootstrap(any_labels, patients, seed, statistic)
    for name, (horizon, _) in evaluated_events(events).items():
        effective = value[models[0], metric_name("effective_n", name, events)]
        # Few rows watched until then, or weights that few rows carry, measure nothing.
        if effective < MIN_AT_RISK or horizon_problem(rows, horizon):
            keys = {metric_name(metric, name, events) for metric in TIME_METRICS}
            keys -= {metric_name("effective_n", name, events)}
            value[value.index.get_level_values(1).isin(keys)] = math.nan
    for name in events.risk_names:  # a distance grows by the noise of the draws: no interval
        for model in models:
            if np.isfinite(value[model, metric_name("oe", name, events)]):
                found = statuses_of(rows, events, name).calibration_error(risks[model, name])
                for metric, distance in found.items():
                    value[model, metric_name(metric, name, events)] = distance.item()
    of_parts = None
    if split is not None:
        one = np.ones((1, len(rows)))
        of_parts = spread([ranked([part], one) for part in parts])
    counts, widening = count_parts(by_first, patients, parts), widening_of(patients, split)
    return Drawn(value, drawn, counts, {}, of_parts, widening, seed)


def evaluate_times(rows: pd.DataFrame, events: CompetingEvents, *rule: Any, **plan: Any) -> Metrics:
    """Return ``draw_time_metrics`` with intervals and paired differences."""
    return compared_models(draw_time_metrics(rows, events, *rule), **plan)


def time_table(metrics: Metrics, events: CompetingEvents) -> pd.DataFrame:
    """Return the metrics as text, a line for each model and risk."""
    lines = []
    for model in metrics.models:
        values = metrics.of(model)
        for risk in events.risk_names:
            line = {"Model": model, "Risk": risk}
            for metric in ("auroc", "scaled_brier", "oe", "slope", "effective_n"):
                title, form, _ = TIME_METRICS[metric]
                row = values.loc[metric_name(metric, risk, events)]
                line[title] = value_text(row, form)
            lines.append(line)
    return pd.DataFrame(lines)


def time_sentences(
    metrics: Metrics, events: CompetingEvents, noun: str = "predictions"
) -> list[Finding]:
    """Return the result in words: ranking, baseline, calibration, interventions, certainty."""
    values, minority = metrics.of(metrics.models[0]), metrics.counts["minority_patients"]
    auroc, by = values.loc["auroc"], events.horizon_names[0]
    level = verdict(auroc.low, auroc.high, CHANCE, minority)
    text = f"Too few events to say how well it ranks: AUROC {value_text(auroc)}."
    if level is not TOO_FEW:
        text = (
            f"Of two patients, one with {events.names[0]} by {by} and one without it, the first "
            f"has the higher risk in {percent(auroc.value)} of pairs: AUROC {value_text(auroc)}; "
            "0.5 is chance."
        )
    findings = [Finding(level, text), *comparison(metrics)]
    means = []
    for name, title in events.risk_titles.items():
        mean, oe, *fitted = (
            values.loc[metric_name(k, name, events)]
            for k in ("mean_risk", "oe", "slope", "intercept", "ici")
        )
        means.append(mean.value)
        risks = f"the risks of {title}"
        text = f"{literal_risks(risks, *fitted)} O/E {value_text(oe, '.2f')}, 1 is ideal."
        if math.isnan(oe.value):
            text = f"Not measured: {risks}, as few are watched until then, or no event is seen."
        findings.append(Finding(None, text))
    if events.interventions:
        pairs = zip(events.horizon_names, means, means[len(events.horizons) :], strict=False)
        for horizon, mean, without in pairs:
            if math.isnan(without - mean):
                continue  # hidden, or too few rows
            text = (
                f"The model says that by {horizon} the mean risk of {events.names[0]} is "
                f"{percent(mean)}, and {percent(without)} if nobody had "
                f"{events.interventions_text}: {100 * (without - mean):+.1f} percentage points, "
                "without an interval."
            )
            findings.append(Finding(None, text))
        findings.append(Finding(None, events.assumption))
    findings.append(Finding(None, f"Tested on {counts_text(metrics.counts, noun)} by {by}."))
    return findings
