"""monitor.html: the verdict, metrics by period and site beside their limits, the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from medgemma_clinical.data.distributions import RARE
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.monitoring import LIMITED, MONITORED, Monitored, outside
from medgemma_clinical.evaluation.tables import METRICS, Metric
from medgemma_clinical.evaluation.topics.topic import Cells, Page, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, Finding, interval_text, percent

SIDES = {"low": "\N{BLACK DOWN-POINTING TRIANGLE}", "high": "\N{BLACK UP-POINTING TRIANGLE}"}
MAX_TICKS = 6
TREATMENT = (
    "Treatment that the model prompts prevents events: it lowers O/E although the model is right."
)


def monitor_page(
    monitored: Monitored, title: str, notes: Sequence[str], card: Mapping[str, str]
) -> Page:
    """Return the page; ``notes`` are sentences below the verdict."""
    of_all = monitored.table[monitored.table["site"] == ""]
    with plots.plot_style():
        figures = {name: (plot_metric(of_all, name, monitored.waiting), "") for name in MONITORED}
        cusum = "CUSUM of the log-likelihood ratio; it starts again after a signal"
        figures["cusum"] = plot_cusum(monitored), cusum
    tables = [Cells(period_cells(monitored), "All patients by period [95 %]", is_wide=True)]
    levels = {"oe": monitored.levels.oe, "auroc": monitored.levels.auroc}
    for name, level in levels.items():
        cells = site_cells(monitored.table, name)
        if shown := int((cells.iloc[:, 1:] != NO_VALUE).to_numpy().sum()):
            caption = f"{METRICS[name][0]} by site and period: of {shown} values of stable sites "
            caption += f"about {2 * level * shown:.1f} would be marked"
            tables.append(Cells(cells, caption, is_wide=True))
    within = {name: percent(1 - 2 * level) for name, level in levels.items()}
    looks = (
        f"Grey: where {within['oe']} of a stable model's values (AUROC: {within['auroc']}) lie for "
        "as many patients of these risks, so that one beyond, red, ▲ or ▼, is no finding among "
        "many. Hollow: waiting for outcomes, and biased if events are known earlier than their "
        "absence. Bars: 95 % intervals."
    )
    inputs, text = input_cells(monitored), []
    if not len(inputs):
        text = [
            "Not checked: no period has 20 patients, or a file of inputs, which predict writes "
            "beside the predictions, is not there."
        ]
    caption = f"Inputs in {monitored.now} beside the training data"
    words = [monitored.verdict, *(f"Also: {action.words}" for action in monitored.actions[1:])]
    return Page(
        title,
        [Finding(None, x) for x in (*words, *notes, TREATMENT)],
        [
            Topic("By period", [looks], tables, figures),
            Topic("Inputs", text, [Cells(inputs, caption, is_wide=True)] if len(inputs) else []),
        ],
        {**card, "Small counts": "Shown, down to single patients: do not share this page."},
    )


def marked_text(line: Any, metric: Metric, *, interval: bool = True) -> str:
    """Return a value of ``Monitored.table`` as text, behind a mark where it is beyond a limit."""
    if np.isnan(line.value):
        return NO_VALUE
    low, high = (line.low, line.high) if interval else (np.nan, np.nan)
    found = [SIDES[side] for side in SIDES if outside(line, side)]
    return "\N{NO-BREAK SPACE}".join(
        [*found, interval_text(line.value, low, high, metric.form, metric.scale)]
    )


def period_cells(monitored: Monitored) -> pd.DataFrame:
    """Return a line a period: counts and all metrics as text."""
    lines = []
    of_all = monitored.table[monitored.table["site"] == ""].set_index(["period", "metric"])
    counts: Any = monitored.counts[monitored.counts["site"] == ""].itertuples()
    for count in counts:
        known = f"{count.known:,}{'' if count.is_complete else ', waiting'}"
        line = {"Period": count.period}
        for name in ("oe", "auroc", *MONITORED):  # a phone shows the first columns
            metric = METRICS[name]
            line[metric.title] = marked_text(of_all.loc[(count.period, name)], metric)
        lines.append(line | {"Patients": f"{count.patients:,}", "Known": known})
    return pd.DataFrame(lines)


def site_cells(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return one metric by site and period as text."""
    lines = table[(table["site"] != "") & (table["metric"] == name)]
    texts = [marked_text(line, METRICS[name], interval=False) for line in lines.itertuples()]
    cells = lines.assign(text=texts).pivot(index="site", columns="period", values="text")
    return cells.fillna(NO_VALUE).rename_axis("Site").rename_axis(None, axis=1).reset_index()


def input_cells(monitored: Monitored) -> pd.DataFrame:
    """Return the inputs of the last period as text, with what does not fit the training."""
    kind = monitored.table["metric"].str.extract(r"^(measured|median): (.*)$")
    table = monitored.table.assign(kind=kind[0], name=kind[1]).dropna(subset="kind")
    table = table[table["period"] == monitored.now].set_index(["name", "kind"])
    problems = monitored.problems[monitored.problems["period"] == monitored.now]
    lines = []
    for name in dict.fromkeys(table.index.get_level_values("name")):
        share, median = table.loc[(name, "measured")], NO_VALUE
        if (name, "median") in table.index:
            line = table.loc[(name, "median")]
            median = f"{line.value:.3g} ({line.limit_low:.3g} to {line.limit_high:.3g})"
        found = "; ".join(problems.loc[problems["name"] == name, "problem"])
        trained = min(1.0, share["limit_low"] * RARE)
        measured = f"{percent(share['value'])} ({percent(trained)} in training)"
        lines.append((name, measured, median, found or NO_VALUE))
    columns = ["Input", "Measured", "Median (middle 98 % in training)", "Does not fit"]
    return pd.DataFrame(lines, columns=columns)


def plot_metric(of_all: pd.DataFrame, name: str, waiting: Sequence[str]) -> plots.Plot:
    """Plot a metric by period with its intervals, its limits shaded."""
    lines = of_all[of_all["metric"] == name]
    figure, (axes,) = plots.new_figure(size=(4.0, 2.4))
    x, title = np.arange(len(lines)), METRICS[name][0]
    if name in LIMITED:
        axes.fill_between(
            x, *lines[["limit_low", "limit_high"]].to_numpy(float).T, color=plots.GRID
        )
    value, low, high = METRICS[name].scale * lines[["value", "low", "high"]].to_numpy(float).T
    is_waiting = lines["period"].isin(waiting).to_numpy()
    beyond = (outside(lines, "low") | outside(lines, "high")).to_numpy() & ~is_waiting
    looks: list[tuple[Any, dict[str, Any]]] = [
        (~is_waiting & ~beyond, {"color": plots.MODEL}),
        (beyond, {"color": plots.COLOURS["worse"]}),
        (is_waiting, {"color": plots.SOFT, "markerfacecolor": "none"}),
    ]
    for rows, look in looks:
        errors = [(value - low)[rows], (high - value)[rows]]
        axes.errorbar(x[rows], value[rows], yerr=errors, fmt="o", markersize=4, **look)
    step = -(-len(lines) // MAX_TICKS)
    axes.set_xticks(x[::step], lines["period"].iloc[::step])
    axes.set_title(title, loc="left", fontsize="medium")
    texts = [
        f"{line.period} {marked_text(line, METRICS[name], interval=False)}"
        for line in lines.itertuples()
    ]
    return figure, f"{title} by period: {', '.join(texts)}."


def plot_cusum(monitored: Monitored) -> plots.Plot:
    """Plot both sums after each patient, and their limit."""
    sums = monitored.sums
    figure, (axes,) = plots.new_figure(size=(4.0, 2.4))
    dates = sums["date"].dt.tz_localize(None)
    for name, look in zip(("higher", "lower"), plots.LINES, strict=True):
        axes.plot(dates, sums[name], **{**look, "label": f"{name} odds"})
    axes.axhline(monitored.levels.cusum, **plots.DOTTED, label="limit")
    axes.set(ylim=(0, None))
    locator = AutoDateLocator(minticks=2, maxticks=MAX_TICKS)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    signals = sums[sums["signal"] != ""]
    found = ", ".join(f"{x.signal} on {x.date:%Y-%m-%d}" for x in signals.itertuples()) or "none"
    return plots.with_legend(figure), f"CUSUM after each patient; signals: {found}."
