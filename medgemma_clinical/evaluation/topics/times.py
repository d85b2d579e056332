"""Times to events that compete: metrics and calibration at each horizon, groups, net benefit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import HOURS_OF_UNIT, CompetingEvents
from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.suppress import any_small, distant_thresholds
from medgemma_clinical.evaluation.time_metrics import (
    aalen_johansen,
    observed_risk,
)
from medgemma_clinical.evaluation.time_table import (
    TIME_METRICS,
    UNCENSORED,
    evaluated_events,
    metric_name,
)
from medgemma_clinical.evaluation.topics.calibration import binned, plot_calibration
from medgemma_clinical.evaluation.topics.decision_curve import (
    ACTING,
    benefit_curve,
    plot_decision_curve,
)
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic, TopicBuilder
from medgemma_clinical.evaluation.verdicts import NO_VALUE, value_text

EVENTS_A_GROUP = 10
"""Events by the last horizon that each group of risk needs."""

GROUPS = (("everyone",), ("low risk", "high risk"), ("low risk", "middle risk", "high risk"))
LOOKS = {"everyone": (plots.MODEL, "-"), "low risk": (plots.MODEL, "-")}
LOOKS |= {"middle risk": (plots.INK, "--"), "high risk": (plots.OTHER, "-.")}
"""Names of one to three groups, and how their curves are drawn."""


@dataclass(frozen=True)
class Followed:
    """What happened to n rows by the horizon of a risk."""

    hours: Array  # (n,)
    event: Array  # (n,) 0 too where an intervention ends the record
    horizon: float
    censoring: Array | None  # (n,) of ``metrics_at``

    @classmethod
    def of(cls, rows: pd.DataFrame, name: str, events: CompetingEvents) -> Followed:
        """Read a table of predictions."""
        horizon, ends = evaluated_events(events)[name]
        hours, event = (rows[column].to_numpy(float) for column in ("event_hours", "event"))
        given = rows.get(UNCENSORED + name)
        event = np.where(np.isin(event, ends), 0.0, event)
        return cls(hours, event, horizon, None if given is None else given.to_numpy(float))

    @property
    def cases(self) -> Array:
        """Whether event 1 is known to have come by the horizon, (n,) of 0 and 1."""
        return ((self.event == 1) & (self.hours <= self.horizon)).astype(float)

    def observed(self, weights: Array, members: NDArray[np.bool_]) -> Array:
        """Return the observed risk (R, G) in groups of members (n, G) under weights (R, n)."""
        return observed_risk(self.hours, self.event, self.horizon, weights, members, self.censoring)

    def benefit(self, risk: Array, thresholds: Array, weights: Array) -> Array:
        """Return the net benefit (R, K) of acting from threshold risks (K,) on.

        The true positives are the share of positives times their observed risk.

        Source: Vickers et al. 2008, "Extensions to decision curve analysis", BMC Medical
        Informatics and Decision Making 8:53.
        """
        positive = risk[:, None] >= thresholds
        share = weights @ positive / weights.sum(axis=1, keepdims=True)
        true = share * np.nan_to_num(self.observed(weights, positive))
        benefit: Array = true - (share - true) * thresholds / (1 - thresholds)
        return benefit


def time_topics(events: CompetingEvents) -> tuple[TopicBuilder, ...]:
    """Return what builds the topics of these events, in their order."""
    return tuple(partial(build, events) for build in (risks, incidence, calibration, decision))


def risks(events: CompetingEvents, evaluated: Evaluated) -> Topic:
    """Return the topic of the metrics of each risk."""
    values, lines = evaluated.metrics.of(evaluated.model), []
    for metric, (title, form, meaning) in TIME_METRICS.items():
        keys = {name: metric_name(metric, name, events) for name in events.risk_names}
        texts = {
            name: value_text(values.loc[key], form) if key in values.index else NO_VALUE
            for name, key in keys.items()
        }
        lines.append({"Metric": title, **texts, "Meaning": meaning})
    table = pd.DataFrame(lines)
    table = table[(table[[*events.risk_names]] != NO_VALUE).any(axis=1)]
    text = (
        f"The risk of {events.names[0]} by each horizon, while {', '.join(events.names[1:])} "
        "may come first. Who is not watched for as long counts by weights, not as without it."
    )
    return Topic(
        "Risks",
        [text, *filter(None, [events.assumption])],
        [Cells(table, "How good the risks are at each horizon [95 %]", is_wide=True)],
        numbers={"metrics": evaluated.metrics.table.reset_index()},
    )


def incidence(events: CompetingEvents, evaluated: Evaluated) -> Topic | None:
    """Return the topic of groups by the first risk; None where they are too small to be shown."""
    table = group_table(events, evaluated)
    if table["hours"].max() < events.horizons[0]:
        return None
    noun, name = evaluated.content.noun, events.names[0]
    text = (
        f"{noun.capitalize()} in groups of equal size by the first risk. Lines: how many have had "
        f"{name} by when (Aalen-Johansen); points: how many should, by the mean of their risks."
    )
    caption = f"Cumulative incidence of {name} by group of risk, and {noun} at risk"
    figure = plot_incidence(table, events), caption
    numbers = {"cumulative_incidence": table}
    return Topic("Cumulative incidence", [text], [], {"cumulative_incidence": figure}, numbers)


def group_table(events: CompetingEvents, evaluated: Evaluated) -> pd.DataFrame:
    """Return columns group, hours, observed, at_risk, and predicted: NaN but at horizons.

    Hours are all different ones; where small counts are hidden, horizons as long as there are none.
    """
    rows, model, min_cell = evaluated.rows, evaluated.model, evaluated.min_cell
    at, patients = Followed.of(rows, events.risk_names[0], events), rows["patient"].to_numpy(str)
    risk, horizons = rows[model].to_numpy(float), list(events.horizons)
    is_case = (at.event == 1) & (at.hours <= horizons[-1])
    groups = int(np.clip(is_case.sum() // EVENTS_A_GROUP, 1, len(GROUPS)))
    index = np.searchsorted(np.quantile(risk, np.arange(1, groups) / groups), risk, side="right")
    members = np.stack([index == k for k in np.unique(index)])  # (G, n)
    times, incidences = aalen_johansen(at.hours, at.event, members.astype(float))
    hours = np.union1d([0, *horizons], times[times <= horizons[-1]])
    if min_cell:
        part, is_event = np.searchsorted(horizons, at.hours), at.event == 1  # (n,) each

        def is_large(k: int) -> bool:
            sides = (part == k) & is_event, (part == k) & ~is_event, part > k
            counts = [count_patients(patients, side & group) for side in sides for group in members]
            return not any_small(counts, min_cell)

        shown = itertools.takewhile(is_large, range(len(horizons)))
        hours = np.array([0, *(horizons[k] for k in shown)])
    steps = np.pad(incidences[:, 0], ((0, 0), (1, 0)))
    lines = pd.DataFrame({"hours": hours})
    tables = []
    for k, name in enumerate(GROUPS[len(members) - 1]):
        group, since = rows[members[k]], np.sort(at.hours[members[k]])
        observed = steps[k, np.searchsorted(times, hours, side="right")]
        at_risk = len(since) - np.searchsorted(since, hours)
        risks = group[[f"{model} {risk}" for risk in events.risk_names[: len(horizons)]]].mean()
        predicted = lines["hours"].map(dict(zip(horizons, risks, strict=True)))
        tables.append(
            lines.assign(group=name, observed=observed, at_risk=at_risk, predicted=predicted)
        )
    return pd.concat(tables, ignore_index=True)


def plot_incidence(table: pd.DataFrame, events: CompetingEvents) -> plots.Plot:
    """Plot a ``group_table`` above the numbers at risk."""
    names, hours_a_unit = table["group"].unique().tolist(), HOURS_OF_UNIT[events.unit]
    figure, (axes, below) = plots.new_figure((5, len(names)), (4.0, 3.8))
    table = table.assign(time=table["hours"] / hours_a_unit)
    ticks = table[table["hours"].isin([0, *events.horizons])]
    for k, name in enumerate(names):
        colour, style = LOOKS[name]
        rows, at = table[table["group"] == name], ticks[ticks["group"] == name]
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
    below.tick_params(length=0, labelbottom=False)
    below.spines[:].set_visible(False)
    return plots.with_legend(figure), (
        f"Cumulative incidence of {events.names[0]} over time by group of risk, with predictions."
    )


def calibration(events: CompetingEvents, evaluated: Evaluated) -> Topic:
    """Return the topic of the calibration of each risk."""
    rows, min_cell = evaluated.rows, evaluated.min_cell
    patients, figures, numbers = rows["patient"].to_numpy(str), {}, []
    for name, title in events.risk_titles.items():
        at, risk = (
            Followed.of(rows, name, events),
            rows[f"{evaluated.model} {name}"].to_numpy(float),
        )
        index = None
        if min_cell:
            cuts = distant_thresholds(at.cases, risk, patients, min_cell)
            index = np.searchsorted(cuts, risk, side="right")
        bins = binned(at.cases, risk, patients, evaluated.content.seed, index, at.observed)
        numbers.append(bins.assign(risk=name))
        # A histogram would tell small counts.
        plot = plot_calibration(bins, bins[:0], None if min_cell else risk)
        figures[f"calibration_{name}"] = plot, f"{title[:1].upper()}{title[1:]}"
    text = (
        f"Do the predicted risks come true? In bins of {evaluated.content.noun} by rising risk, as "
        "many should have the event as the dotted line says."
    )
    tables = {"calibration": pd.concat(numbers)}
    return Topic("Calibration", [text], figures=figures, numbers=tables)


def decision(events: CompetingEvents, evaluated: Evaluated) -> Topic | None:
    """Return the topic of the net benefit at the first horizon; None where it is hidden."""
    rows, first = evaluated.rows, events.risk_names[0]
    at, patients = Followed.of(rows, first, events), rows["patient"].to_numpy(str)
    labelled = replace(evaluated, rows=rows.assign(label=at.cases))
    if not labelled.has_curves:
        return None
    by_model = {name: rows[name].to_numpy(float) for name in evaluated.names}
    seed = evaluated.content.seed
    curve = benefit_curve(at.cases, by_model, patients, seed, at.benefit, labelled.cuts)
    plot, title = plot_decision_curve(curve, evaluated.names), events.risk_titles[first]
    figures = {"decision_curve": (plot, f"Decision curve: {title}{evaluated.beside}")}
    numbers = {"decision_curve": curve.reset_index()}
    return Topic("Decision curve", [ACTING], figures=figures, numbers=numbers)
