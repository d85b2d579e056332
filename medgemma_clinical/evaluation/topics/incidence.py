"""What was observed over time in groups of risk, beside what was predicted at the horizons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.target import Target
from medgemma_clinical.evaluation.time_metrics import aalen_johansen
from medgemma_clinical.evaluation.topics.topic import Evaluated, Topic

EVENTS_A_GROUP = 10
"""Events by the last horizon that each group of risk needs."""

GROUPS = (("everyone",), ("low risk", "high risk"), ("low risk", "middle risk", "high risk"))
LOOKS = {"everyone": (plots.MODEL, "-"), "low risk": (plots.MODEL, "-")}
LOOKS |= {"middle risk": (plots.INK, "--"), "high risk": (plots.OTHER, "-.")}
"""Names of one to three groups, and how their curves are drawn."""

HOURS_A_DAY, DAYS_FROM = 24, 96
"""The axis counts days where the last horizon has so many hours."""


def cumulative_incidence(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None where no risk has a time, or single events are hidden."""
    targets = [target for target in evaluated.targets if target.horizon and not target.ends]
    if not targets or evaluated.min_cell:
        return None
    table = group_table(evaluated, targets)
    name = targets[0].event_name
    caption = (
        f"Cumulative incidence of {name} in groups of equal size by the first risk. Lines: "
        "observed (Aalen-Johansen); points: the mean risk; below, how many are at risk"
    )
    return Topic(
        "Over time",
        figures={"cumulative_incidence": (plot_incidence(table, targets), caption)},
        numbers={"cumulative_incidence": table},
    )


def group_table(evaluated: Evaluated, targets: Sequence[Target]) -> pd.DataFrame:
    """Return columns group, hours, observed, at_risk, and predicted: NaN but at horizons."""
    rows, horizons, model = evaluated.rows, [x.horizon for x in targets], evaluated.model
    end, event = targets[0].times(rows)
    risk = rows[targets[0].column(model)].to_numpy(float)
    is_case = (event == 1) & (end <= horizons[-1])
    groups = int(np.clip(is_case.sum() // EVENTS_A_GROUP, 1, len(GROUPS)))
    index = np.searchsorted(np.quantile(risk, np.arange(1, groups) / groups), risk, side="right")
    members = np.stack([index == k for k in np.unique(index)])  # (G, n)
    times, incidences = aalen_johansen(end, event, members.astype(float))
    hours = np.union1d([0, *horizons], times[times <= horizons[-1]])
    steps = np.pad(incidences[:, 0], ((0, 0), (1, 0)))[:, np.searchsorted(times, hours, "right")]
    risks = [target.column(model) for target in targets]
    tables = []
    for group, name, observed in zip(members, GROUPS[len(members) - 1], steps, strict=True):
        predicted = dict(zip(horizons, rows.loc[group, risks].mean(), strict=True))
        lines = pd.DataFrame({"group": name, "hours": hours, "observed": observed})
        lines["at_risk"] = group.sum() - np.searchsorted(np.sort(end[group]), hours)
        tables.append(lines.assign(predicted=lines["hours"].map(predicted)))
    return pd.concat(tables, ignore_index=True)


def plot_incidence(table: pd.DataFrame, targets: Sequence[Target]) -> plots.Plot:
    """Plot a ``group_table`` above the numbers at risk."""
    names = table["group"].unique().tolist()
    figure, (axes, below) = plots.new_figure((5, 0.7 * len(names)), (4.0, 3.6))
    horizons, event = [target.horizon for target in targets], targets[0].event_name
    in_days = horizons[-1] >= DAYS_FROM
    table = table.assign(time=table["hours"] / (HOURS_A_DAY if in_days else 1))
    ticks = table[table["hours"].isin([0, *horizons])]
    for k, name in enumerate(names):
        rows, at = table[table["group"] == name], ticks[ticks["group"] == name]
        colour, style = LOOKS[name]
        axes.step(
            rows["time"], 100 * rows["observed"], style, where="post", color=colour, label=name
        )
        axes.plot(at["time"], 100 * at["predicted"], "o", color=colour, markersize=5, clip_on=False)
        for time, count in zip(at["time"], at["at_risk"], strict=True):
            below.text(time, k, f"{count:,}", ha="center", va="center", color=colour)
    axes.set(ylabel=f"{event}, %", ylim=(0, None))
    axes.set_xlabel("days" if in_days else "hours")
    axes.set_xticks(ticks["time"].unique())
    axes.tick_params(labelbottom=True)
    plots.name_lines(below, names)
    below.set_title("at risk", loc="left", fontsize="medium", pad=3)
    below.grid(visible=False)
    below.tick_params(length=0, labelbottom=False, pad=10)
    below.spines[:].set_visible(False)
    alt = f"Cumulative incidence of {event} over time by group of risk, with predictions."
    return plots.with_legend(figure), alt
