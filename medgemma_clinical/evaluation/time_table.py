"""Metrics of times to events that compete: one table of all risks, from one bootstrap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.censoring import censoring_survival
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import (
    DIFFERENCE,
    Metrics,
    bootstrap,
    count,
    with_interval,
)
from medgemma_clinical.evaluation.time_metrics import (
    MIN_AT_RISK,
    check_horizon,
    metrics_of_draws,
    uncensored_probability,
)
from medgemma_clinical.evaluation.verdicts import (
    CHANCE,
    TOO_FEW,
    Finding,
    comparison,
    counts_text,
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
    "scaled_brier": ("Scaled Brier", ".3f", "gain over the same risk for everyone"),
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
    return columns


def check_horizons(dataset: TrajectoryDataset, rows: Any, part: str) -> None:
    """Refuse a horizon that too few rows of a part are watched for."""
    events = dataset.competing_events
    if events is None or dataset.events is None or dataset.event_hours is None:
        return
    for horizon in events.horizons:
        try:
            check_horizon(dataset.event_hours[rows], dataset.events[rows], horizon)
        except ValueError as error:  # its horizons are hours
            raise InputError(f"{dataset.source}, {part} part: {error}") from error


def evaluate_times(rows: pd.DataFrame, events: CompetingEvents, seed: int) -> Metrics:
    """Compute the metrics of all models' risks on n rows, with intervals.

    ``rows`` has ``OBSERVED``, a column ``MODEL RISK`` for each risk, and ``UNCENSORED`` ones.
    """
    hours, event = (rows[name].to_numpy(float) for name in ("event_hours", "event"))
    patients, first = rows["patient"].to_numpy(str), events.risk_names[0]
    names = [name for name in map(str, rows) if not name.startswith(UNCENSORED)]
    models = [name.removesuffix(f" {first}") for name in names if name.endswith(f" {first}")]

    def statistic(weights: Array) -> dict[Any, Array]:
        values = {}
        for model in models:
            for name, (horizon, ends) in evaluated_events(events).items():
                ended = np.where(np.isin(event, ends), 0.0, event)
                uncensored = rows.get(UNCENSORED + name)
                given = None if uncensored is None else uncensored.to_numpy(float)
                risk = rows[f"{model} {name}"].to_numpy(float)
                found = metrics_of_draws(hours, ended, risk, horizon, weights, given)
                for metric, drawn in found.items():
                    values[model, metric_name(metric, name, events)] = drawn
        return values

    by_first = ((event == 1) & (hours <= events.horizons[0])).astype(float)
    value, drawn = bootstrap(by_first, patients, seed, statistic)
    for model, name in value.index:  # weights that few rows carry measure nothing
        if name.startswith("effective_n") and value[model, name] < MIN_AT_RISK:
            ending = name.removeprefix("effective_n")
            names = [metric + ending for metric in TIME_METRICS if metric != "effective_n"]
            value[value.index.isin([(model, metric) for metric in names])] = math.nan
    table = with_interval(value, drawn)
    without = table.index.get_level_values(1).str.startswith(tuple(DISTANCES))
    table.loc[without, ["low", "high"]] = math.nan
    beside = pd.MultiIndex.from_tuples([(models[0], name) for _, name in table.index])
    at = value.index.get_indexer(beside)
    table[DIFFERENCE] = with_interval(value - value.to_numpy()[at], drawn - drawn.to_numpy()[:, at])
    table.loc[models[0], DIFFERENCE] = math.nan
    table["reference"] = models[0]
    return Metrics(count(by_first, patients), table.rename_axis(["model", "metric"]), None, [])


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
        observed, oe, slope = (
            values.loc[metric_name(k, name, events)] for k in ("observed", "oe", "slope")
        )
        means.append(observed.value / oe.value if oe.value else math.nan)
        texts = value_text(oe, ".2f"), value_text(slope, ".2f")
        text = f"{title}: observed over expected events {texts[0]}, slope {texts[1]}; 1 is ideal."
        findings.append(Finding(None, text[:1].upper() + text[1:]))
    if events.interventions:
        pairs = zip(events.horizon_names, means, means[len(events.horizons) :], strict=False)
        for horizon, mean, without in pairs:
            if math.isnan(without - mean):
                continue  # hidden, or too few rows
            text = (
                f"By {horizon} the mean risk of {events.names[0]} is {percent(mean)}. It would be "
                f"{percent(without)} if nobody had {events.interventions_text}, a difference of "
                f"{100 * (without - mean):+.1f} percentage points."
            )
            findings.append(Finding(None, text))
        findings.append(Finding(None, events.assumption))
    findings.append(Finding(None, f"Tested on {counts_text(metrics.counts, noun)} by {by}."))
    return findings
