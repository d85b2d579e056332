"""Times to events that compete: metrics and calibration at each horizon, groups, net benefit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import HOURS_OF_UNIT, CompetingEvents
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.baselines import MEANINGS
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.time_baselines import TIME_MEANINGS
from medgemma_clinical.evaluation.time_metrics import aalen_johansen, net_benefit_at, observed_risk
from medgemma_clinical.evaluation.time_table import (
    TIME_METRICS,
    UNCENSORED,
    evaluated_events,
    metric_name,
    statuses_of,
)
from medgemma_clinical.evaluation.time_updates import TimeUpdates
from medgemma_clinical.evaluation.topics import decision_curve
from medgemma_clinical.evaluation.topics.calibration import (
    bins_of_many,
    calibration_table,
    plot_calibration,
)
from medgemma_clinical.evaluation.topics.discrimination import model_comparison
from medgemma_clinical.evaluation.topics.subgroups import sites, subgroups
from medgemma_clinical.evaluation.topics.topic import Cells, Details, Evaluated, Topic, TopicBuilder
from medgemma_clinical.evaluation.verdicts import NO_VALUE, value_text

EVENTS_A_GROUP = 10
"""Events by the last horizon that each group of risk needs."""

GROUPS = (("everyone",), ("low risk", "high risk"), ("low risk", "middle risk", "high risk"))
LOOKS = {"everyone": (plots.MODEL, "-"), "low risk": (plots.MODEL, "-")}
LOOKS |= {"middle risk": (plots.INK, "--"), "high risk": (plots.OTHER, "-.")}
"""Names of one to three groups, and how their curves are drawn."""


def time_topics(events: CompetingEvents) -> list[TopicBuilder]:
    """Return what builds the topics of these events, in their order."""
    return [
        *(partial(build, events) for build in (risks, calibration, decision)),
        partial(model_comparison, meanings=MEANINGS | TIME_MEANINGS),
        *(partial(in_groups, events, build) for build in (subgroups, sites)),
    ]


def risks(events: CompetingEvents, evaluated: Evaluated) -> Topic:
    """Return the topic of the metrics of each risk."""
    values, lines = evaluated.metrics.of(evaluated.model), []
    for metric, (title, form, _) in TIME_METRICS.items():
        keys = {name: metric_name(metric, name, events) for name in events.risk_names}
        texts = {
            name: value_text(values.loc[key], form) if key in values.index else NO_VALUE
            for name, key in keys.items()
        }
        lines.append({"Metric": title, **texts})
    table = pd.DataFrame(lines)
    table = table[(table[[*events.risk_names]] != NO_VALUE).any(axis=1)]
    meanings = {title: meaning for title, _, meaning in TIME_METRICS.values()}
    others = ", ".join(events.names[1:])
    text = (
        f"The risk of {events.names[0]} by each horizon"
        f"{f', while {others} may come first' if others else ''}. Who is not watched for "
        "as long counts by weights, not as without it."
    )
    return Topic(
        "Risks",
        [text, *filter(None, [events.assumption])],
        [Cells(table, "How good the risks are at each horizon [95 %]", is_wide=True)],
        numbers={"metrics": evaluated.metrics.table.reset_index()},
        details=[Details("What the metrics are", terms=meanings)],
    )


def at_horizon(
    events: CompetingEvents, evaluated: Evaluated, name: str
) -> tuple[Evaluated, partial[Array]]:
    """Return a risk as the model's, beside labels: event 1 by its horizon; and ``observed_risk``.

    The latter takes weights (R, n) and members (n, G).
    """
    rows, (horizon, ends) = evaluated.rows, evaluated_events(events)[name]
    hours, event = (rows[column].to_numpy(float) for column in ("event_hours", "event"))
    event = np.where(np.isin(event, ends), 0.0, event)
    given = rows.get(UNCENSORED + name)
    censoring = None if given is None else given.to_numpy(float)
    label = ((event == 1) & (hours <= horizon)).astype(float)
    labelled = rows.assign(label=label, **{evaluated.model: rows[f"{evaluated.model} {name}"]})
    observed = partial(observed_risk, hours, event, horizon, censoring)
    return replace(evaluated, rows=labelled), observed


def group_table(events: CompetingEvents, evaluated: Evaluated) -> pd.DataFrame:
    """Return columns group, hours, observed, at_risk, and predicted: NaN but at horizons."""
    rows, horizons = evaluated.rows, list(events.horizons)
    end, event, risk = (
        rows[name].to_numpy(float) for name in ("event_hours", "event", evaluated.model)
    )
    is_case = (event == 1) & (end <= horizons[-1])
    groups = int(np.clip(is_case.sum() // EVENTS_A_GROUP, 1, len(GROUPS)))
    index = np.searchsorted(np.quantile(risk, np.arange(1, groups) / groups), risk, side="right")
    members = np.stack([index == k for k in np.unique(index)])  # (G, n)
    times, incidences = aalen_johansen(end, event, members.astype(float))
    hours = np.union1d([0, *horizons], times[times <= horizons[-1]])
    steps = np.pad(incidences[:, 0], ((0, 0), (1, 0)))[:, np.searchsorted(times, hours, "right")]
    risks = [f"{evaluated.model} {name}" for name in events.horizon_risks]
    tables = []
    for group, name, observed in zip(members, GROUPS[len(members) - 1], steps, strict=True):
        predicted = dict(zip(horizons, rows.loc[group, risks].mean(), strict=True))
        lines = pd.DataFrame({"group": name, "hours": hours, "observed": observed})
        lines["at_risk"] = group.sum() - np.searchsorted(np.sort(end[group]), hours)
        tables.append(lines.assign(predicted=lines["hours"].map(predicted)))
    return pd.concat(tables, ignore_index=True)


def plot_incidence(table: pd.DataFrame, events: CompetingEvents) -> plots.Plot:
    """Plot a ``group_table`` above the numbers at risk."""
    names = table["group"].unique().tolist()
    figure, (axes, below) = plots.new_figure((5, 0.7 * len(names)), (4.0, 3.6))
    table = table.assign(time=table["hours"] / HOURS_OF_UNIT[events.unit])
    ticks = table[table["hours"].isin([0, *events.horizons])]
    for k, name in enumerate(names):
        rows, at = table[table["group"] == name], ticks[ticks["group"] == name]
        colour, style = LOOKS[name]
        axes.step(
            rows["time"], 100 * rows["observed"], style, where="post", color=colour, label=name
        )
        axes.plot(at["time"], 100 * at["predicted"], "o", color=colour, markersize=5, clip_on=False)
        for time, count in zip(at["time"], at["at_risk"], strict=True):
            below.text(time, k, f"{count:,}", ha="center", va="center", color=colour)
    axes.set(ylabel=f"{events.names[0]}, %", ylim=(0, None))
    axes.set_xlabel("days" if events.unit == "d" else "hours")
    axes.set_xticks(ticks["time"].unique())
    axes.tick_params(labelbottom=True)
    plots.name_lines(below, names)
    below.set_title("at risk", loc="left", fontsize="medium", pad=3)
    below.grid(visible=False)
    below.tick_params(length=0, labelbottom=False, pad=10)
    below.spines[:].set_visible(False)
    alt = f"Cumulative incidence of {events.names[0]} over time by group of risk, with predictions."
    return plots.with_legend(figure), alt


def is_measured(events: CompetingEvents, evaluated: Evaluated, name: str) -> bool:
    """Return whether the rows have an answer at the horizon of a risk, which is not hidden."""
    row = evaluated.metrics.row(evaluated.model, metric_name("oe", name, events))
    return bool(pd.notna(row["value"]))


def calibration(events: CompetingEvents, evaluated: Evaluated) -> Topic | None:
    """Return the topic of the calibration of each risk; None where none is measured."""
    bins_of_risks, noun = [], evaluated.noun
    figures: dict[str, tuple[plots.Plot, str]] = {}
    numbers: dict[str, pd.DataFrame] = {}
    if not evaluated.min_cell:  # each step of a curve is an event or a few
        table = numbers["cumulative_incidence"] = group_table(events, evaluated)
        caption = (
            f"Cumulative incidence of {events.names[0]} in groups of equal size by the first risk. "
            "Lines: observed (Aalen-Johansen); points: the mean risk; below, how many are at risk"
        )
        figures["cumulative_incidence"] = plot_incidence(table, events), caption
    for name, title in events.risk_titles.items():
        if not is_measured(events, evaluated, name):
            continue
        view, observed = at_horizon(events, evaluated, name)
        rows, index = view.rows, bins_of_many(view)
        bins = calibration_table(rows, view.model, view.seed, index, observed)
        bins_of_risks.append(bins.assign(risk=name))
        risk = rows[view.model].to_numpy(float) if index is None else None
        plot = plot_calibration(bins, bins[:0], risk)
        figures[f"calibration_{name}"] = plot, f"Risk of {title}"
    if not figures:
        return None
    text = (
        f"Do the predicted risks come true? In bins of {noun} by rising risk, as "
        "many should have the event as the dotted line says."
    )
    if bins_of_risks:
        numbers["calibration"] = pd.concat(bins_of_risks)
    return Topic("Calibration", [text, *evaluated.no_curves], figures=figures, numbers=numbers)


def time_updates(evaluated: Evaluated, tried: TimeUpdates | None) -> Topic | None:
    """Return the topic of what moving the risks brings; None where it is not tried."""
    if tried is None:
        return None
    text = (
        "An update moves each risk on the complementary log-log scale, by pseudo-values. The "
        "simplest move is taken whose log loss, in halves of the patients that it has not seen, is "
        f"within one standard error of the lowest: {tried.method}. Change of the log loss there: "
        f"{tried.gain}."
    )
    return Topic("Calibration after an update", [text])


def in_groups(events: CompetingEvents, build: Any, evaluated: Evaluated) -> Topic | None:
    """Return the topic of subgroups or sites at the first horizon."""
    name = events.risk_names[0]
    view, _ = at_horizon(events, evaluated, name)
    risk = view.rows[view.model].to_numpy(float)

    def measure(members: NDArray[np.intp], weights: Array) -> dict[str, Array]:
        statuses = statuses_of(view.rows, events, name, weights, members)
        return statuses.ranking(risk[members]) | statuses.calibration(risk[members])

    topic = build(view, measure)
    text = f"Risk of {events.risk_titles[name]}."
    return topic and replace(topic, text=[text, *topic.text])


def decision(events: CompetingEvents, evaluated: Evaluated) -> Topic | None:
    """Return the topic of the net benefit at the first horizon; None where it is hidden."""
    name = events.risk_names[0]
    view, observed = at_horizon(events, evaluated, name)
    if not is_measured(events, evaluated, name):
        return None

    def shares(positive: NDArray[np.bool_], weights: Array) -> dict[str, Array]:
        return statuses_of(view.rows, events, name, weights).confusion(positive)

    benefit = partial(net_benefit_at, observed)
    return decision_curve.decision(view, events.risk_titles[name], benefit, shares)
