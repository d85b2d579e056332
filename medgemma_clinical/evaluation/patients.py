"""The page of single patients: each series and the risk over time, and what the risk rests on.

Letters: L observations, F features, n risks: L, or L + 1 with a later prediction time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import HOURS_OF_UNIT, CompetingEvents
from medgemma_clinical.data.texts import Reference, plain, with_space
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import log_odds
from medgemma_clinical.evaluation.topics.topic import Cells, Details, Page, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, Finding, percent

NOTICE = "This page holds patients' data: do not share it. Only its owner can read this file."

READING = (
    "A figure shows each series and, below, the risk with what was known by then. An axis spans at "
    "least two standard deviations of the training data.",
    "The last point of each risk over time is the prediction. An earlier risk is the model's for "
    "the series cut there, with static features and context as they are at the end. Early risks "
    "rest on fewer values and are less accurate; a language model has learned from whole series "
    "only.",
    "The effect of leaving a series out is not causal: it shows what the model's risk rests on. "
    "Times at which this series alone was measured are left out, too, and effects do not add up "
    "to the risk.",
)
MAX_HOURS = 96
"""A longer row has an axis of days."""

EVENT_COLOURS = (plots.MODEL, plots.OTHER, plots.SOFT, *list(plots.COLOURS.values())[5:])
"""Of the events of a figure, in their order."""

WIDTH = 4.8
"""Inches of the figure on the page; a phone shrinks it."""

RISK_HEIGHT, FIGURE_MARGIN, CURVES_HEIGHT = 1.4, 0.4, 2.4
"""Inches of the risk's panel, of the labels of time, and of the figure of times to events."""

NAME: dict[str, Any] = {"loc": "left", "fontsize": "medium", "pad": 3}
"""Look of a name above its panel, where it takes no width."""

SERIES_HEIGHTS, ALL_SERIES = (0.7, 1.1), 5.0
"""Inches of a series' panel with its name, least and most, and of all where there is room."""

MAX_NAMED = 10
"""Lines of a figure that have a name and a colour each."""


class Curves(NamedTuple):
    """The cumulative incidence of each event after the prediction."""

    events: CompetingEvents
    hours: NDArray[np.float64]  # (K,) since the prediction, from 0 to the last horizon
    incidence: NDArray[np.float64]  # (C, K)

    @property
    def words(self) -> str:
        """The incidence of each event by the horizons."""
        places = np.searchsorted(self.hours, self.events.horizons)
        texts = []
        for name, incidence in zip(self.events.names, self.incidence[:, places], strict=True):
            pairs = zip(incidence.tolist(), self.events.horizon_names, strict=True)
            texts.append(f"{name} {', '.join(f'{percent(x)} by {by}' for x, by in pairs)}")
        return "; ".join(texts)


@dataclass(frozen=True)
class Explanation:
    """The risk of one row over time, and what it rests on."""

    id: str
    probability: float
    features: tuple[str, ...]  # F
    units: tuple[str, ...]  # F, empty where a feature has none
    times: NDArray[np.float64]  # (L,) hours on the clock of the data, not decreasing
    values: NDArray[np.float64]  # (L, F) raw units, NaN where not measured
    references: tuple[Reference | None, ...]  # F reference ranges
    spreads: NDArray[np.float64]  # (F,) standard deviation of training rows' last values, or NaN
    observations: tuple[str, ...]  # L texts, what was measured
    hours: NDArray[np.float64]  # (n,) on the same clock
    risks: NDArray[np.float64]  # (n,) with what was known by then; the last is ``probability``
    static: dict[str, str]  # static features that were read
    without: dict[str, float | None]  # risk without a series; None where there is no score
    without_soft_prompt: float | None = None  # None where it is the same
    curves: Curves | None = None  # of times to events
    report: str | None = None  # of stage 3
    problem: str = ""  # of the report

    @property
    def time_unit(self) -> tuple[str, float]:
        """Name and hours of the unit of the time axis."""
        return ("hour", 1.0) if self.hours[-1] - self.hours[0] <= MAX_HOURS else ("day", 24.0)

    @property
    def has_reference(self) -> bool:
        """Whether a series with a value has a reference range, which the figure shows."""
        measured = ~np.isnan(self.values).all(axis=0)
        return any(np.array([bool(ends) for ends in self.references]) & measured)

    def since_first(self, hours: Any) -> Any:
        """Return times since the first value, in the unit of the time axis."""
        return (hours - self.times[0]) / self.time_unit[1]

    def time_text(self, hours: float) -> str:
        """Return a time since the first value with its unit, to two decimals."""
        return f"{self.time_unit[0]} {plain(round(self.since_first(hours), 2))}"

    def changes(self) -> pd.DataFrame:
        """Return the risk after each observation and its change."""
        observed = [*self.observations, "no observation until the prediction time"]
        changes = [NO_VALUE, *(signed(100 * step, 1) for step in np.diff(self.risks).tolist())]
        columns = {
            "Time": [self.time_text(hours) for hours in self.hours.tolist()],
            "Observed": observed[: len(self.hours)],
            "Risk after it": [percent(risk) for risk in self.risks.tolist()],
            "Change (points)": changes,
        }
        return pd.DataFrame(columns)

    def side(self, threshold: float) -> str:
        """Return whether the risk reaches a threshold, in words."""
        return f"{'' if self.probability >= threshold else 'not '}predicted positive"

    def topic(self, k: int, outcome: str, threshold: float) -> Topic:
        """Return the topic of the row, the ``k``-th of the page."""
        last = self.time_text(self.times[-1])
        text = (
            f"Risk {percent(self.probability)}, {self.side(threshold)} (threshold "
            f"{percent(threshold)}). Observations: {len(self.times)}, the last at {last} since the "
            f"first value; prediction at {self.time_text(self.hours[-1])}."
        )
        plot = plot_patient(self, outcome, threshold, WIDTH)
        figures = {f"patient_{k}": (plot, "Grey: reference range" if self.has_reference else "")}
        if self.curves:
            figures[f"curves_{k}"] = plot_curves(self.curves), self.curves.words
        terms = dict(self.static) or {"Static features": "none are read"}
        if self.without_soft_prompt is not None:
            terms["Risk without the soft prompt"] = (
                f"{percent(self.without_soft_prompt)}; the text, and stage 1's log-odds where the "
                "model adds them, stay"
            )
        if self.report is not None:
            terms["Written report"] = f"{self.problem}{': ' if self.problem else ''}{self.report}"
        if self.without:
            effects = Cells(self.effects(), "Effect of leaving a series out; a dash: no score then")
            tables = [effects]
        else:
            tables, terms["Effect of a series"] = [], "there is one: without it there is no score"
        caption = "Change since the observation before, in percentage points, with the time between"
        changes = Cells(self.changes(), caption)
        details = [Details("The risk after each observation", table=changes)]
        return Topic(
            self.id, [text], tables, figures, details=details, terms=terms, anchor=f"row-{k}"
        )

    def effects(self) -> pd.DataFrame:
        """Return the change of the log-odds without each series, the largest first."""
        risk_without = {name: risk for name, risk in self.without.items() if risk is not None}
        odds = log_odds(self.probability)
        change = {name: float(log_odds(risk) - odds) for name, risk in risk_without.items()}
        order = sorted(change, key=lambda name: -abs(change[name]))
        rows = [(name, signed(change[name], 2), percent(risk_without[name])) for name in order]
        rows += [(name, NO_VALUE, NO_VALUE) for name in self.without if name not in risk_without]
        names = ["Series", "Log-odds without it", "Risk without it"]
        return pd.DataFrame(rows, columns=names)


def signed(change: float, digits: int) -> str:
    """Write a change with its sign; what rounds to zero is +0."""
    return f"{round(change, digits) + 0.0:+.{digits}f}"


def patients_page(
    rows: Sequence[Explanation],
    outcome: str,
    threshold: float,
    notes: Sequence[str],  # what is known of the model and its training data
    method: Mapping[str, str],
) -> Page:
    """Return the page of explained rows."""
    positive = sum(row.probability >= threshold for row in rows)
    first = (
        f"{positive} of these {len(rows)} are predicted positive: their risk of {outcome} is "
        f"{percent(threshold)} or more."
    )
    table = pd.DataFrame(
        {
            "Id": [row.id for row in rows],
            "Risk": [percent(row.probability) for row in rows],
            f"Threshold {percent(threshold)}": [row.side(threshold) for row in rows],
        }
    )
    with plots.plot_style():
        topics = [row.topic(k, outcome, threshold) for k, row in enumerate(rows)]
    links = [topic.anchor for topic in topics]
    index = Cells(table, "In the order of the page", links=links)
    overview = Topic("Risks", tables=[index], text=READING)
    findings = [Finding(None, sentence) for sentence in (first, *notes)]
    return Page(f"Patients: {outcome}", findings, [overview, *topics], method, [NOTICE])


def plot_patient(row: Explanation, outcome: str, threshold: float, width: float = 8) -> plots.Plot:
    """Draw the measured series above the risk, on one axis of time; return the same in words."""
    measured = np.flatnonzero(~np.isnan(row.values).all(axis=0)).tolist()
    height = float(np.clip(ALL_SERIES / len(measured), *SERIES_HEIGHTS))
    heights = [height] * len(measured) + [RISK_HEIGHT]
    figure, panels = plots.new_figure(heights, (width, sum(heights) + FIGURE_MARGIN))
    words = [_plot_series(axes, row, f) for f, axes in zip(measured, panels, strict=False)]
    axes, hours, risks = panels[-1], row.since_first(row.hours), 100 * row.risks
    axes.axhline(100 * threshold, color=plots.OTHER, linestyle="--", linewidth=1)
    axes.plot(hours, risks, "-", color=plots.MODEL, linewidth=1.5, drawstyle="steps-post")
    axes.plot(hours, risks, "o", color=plots.MODEL, markersize=4, clip_on=False)
    top = min(100.0, 1.15 * max(float(risks.max()), 200 * threshold))
    axes.set(ylim=(0, top), xlabel=f"{row.time_unit[0]}s since the first value")
    axes.set_title(f"Risk in %; dashed: threshold {percent(threshold)}", **NAME)
    first, last, highest = map(percent, (row.risks[0], row.risks[-1], row.risks.max()))
    return figure, (
        f"Series over the {row.time_unit[0]}s since the first value: {'; '.join(words)}. "
        f"Below, the risk of {outcome}: {first} at "
        f"{row.time_text(row.hours[0])}, {last} at {row.time_text(row.hours[-1])}, highest "
        f"{highest}; the threshold is {percent(threshold)}."
    )


def plot_curves(curves: Curves) -> plots.Plot:
    """Draw the incidences of the events above each other, the first one lowest."""
    figure, (axes,) = plots.new_figure(size=(WIDTH, CURVES_HEIGHT))
    hours, names = HOURS_OF_UNIT[curves.events.unit], curves.events.names
    x, layers = curves.hours / hours, 100 * curves.incidence
    axes.stackplot(x, layers, labels=names, colors=EVENT_COLOURS)
    ticks = [horizon / hours for horizon in curves.events.horizons]
    for tick in ticks:
        axes.axvline(tick, **plots.DOTTED)
    axes.set_xticks([0, *ticks])
    unit = "days" if curves.events.unit == "d" else "hours"
    axes.set(xlim=(0, ticks[-1]), ylim=(0, None), xlabel=f"{unit} after the prediction")
    axes.set_title("Risk in %, events above each other; dotted: horizons", **NAME)
    alt = f"Risk of each event over the {unit} after the prediction, stacked: {curves.words}."
    return plots.with_legend(figure), alt


def plot_risk_curves(curves: pd.DataFrame, outcome: str, threshold: float) -> Figure:
    """Draw the risk of rows over time, a line for each id; columns id, hours, probability."""
    figure, (axes,) = plots.new_figure(size=(8, 5))
    lines = curves.groupby("id", sort=False)
    few = lines.ngroups <= MAX_NAMED
    for id_, line in lines:
        style = {"label": id_} if few else {"color": plots.MODEL, "alpha": 0.3}
        risks = 100 * line["probability"]
        axes.plot(line["hours"], risks, "o-", drawstyle="steps-post", clip_on=False, **style)
    axes.axhline(100 * threshold, color=plots.OTHER, linestyle="--", label="threshold")
    axes.set(ylim=(0, None), xlabel="hours", ylabel=f"Risk of {outcome} (%)")
    if few:
        figure.legend(loc="outside right upper")
    return figure


def _plot_series(axes: Axes, row: Explanation, f: int) -> str:
    """Draw the values of a series above its reference range; return both in words."""
    measured = ~np.isnan(row.values[:, f])
    times, values = row.times[measured], row.values[measured, f]
    low, high = row.references[f] or (None, None)
    bottom, top = axis_limits(values, row.references[f], row.spreads[f])
    axes.set_ylim(bottom, top)
    if row.references[f]:
        lower, upper = bottom if low is None else low, top if high is None else high
        axes.axhspan(lower, upper, color=plots.GRID, linewidth=0)
    # Without clipping, a point on the edge of the panel is drawn whole.
    look: dict[str, Any] = {"color": plots.INK, "linewidth": 1, "markersize": 4, "clip_on": False}
    axes.plot(row.since_first(times), values, "o-", **look)
    whole = bool((values == np.round(values)).all())  # states, grades, counts
    axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2, integer=whole))
    name, unit = row.features[f], with_space(row.units[f])
    axes.set_title(f"{name}{unit}", **NAME)
    ends = {"from": low, "to": high}
    texts = [f"{word} {plain(end)}" for word, end in ends.items() if end is not None]
    reference = f" (reference {' '.join(texts)})" if texts else ""
    return f"{name} {plain(values[0])} to {plain(values[-1])}{unit}, n = {len(values)}{reference}"


def axis_limits(
    values: NDArray[np.float64], reference: Reference | None, spread: float
) -> tuple[float, float]:
    """Return limits that show values and reference range, and span two spreads at least."""
    ends = [*values.tolist(), *(end for end in reference or () if end is not None)]
    low, high = min(ends), max(ends)
    half = 0.6 * max(high - low, 2 * float(np.nan_to_num(spread))) or 1.0
    bottom = (low + high) / 2 - half
    bottom = max(bottom, 0.0) if low >= 0 else bottom
    return bottom, bottom + 2 * half
