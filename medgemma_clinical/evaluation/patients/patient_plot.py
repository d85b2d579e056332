"""The picture of one patient: each series and, below, the risk, on one axis of time."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medgemma_clinical.data.texts import plain, with_space
from medgemma_clinical.evaluation.patients.explanation import Explanation
from medgemma_clinical.evaluation.plots import INK, MODEL, OTHER, SIZE, new_figure

SERIES_HEIGHT, RISK_HEIGHT, MARGIN = 0.85, 1.5, 0.5
"""Inches of a series, of the curve of risks, and of the labels of time."""


def plot_patient(shown: Explanation, outcome: str, threshold: float) -> tuple[Figure, str]:
    """Return the measured series of a row above the curve of its risk, and the text alternative.

    Args:
        shown: the row.
        outcome: the event in a few words.
        threshold: the probability from which on the event is predicted.
    """
    measured = [f for f in range(len(shown.features)) if not np.isnan(shown.values[:, f]).all()]
    heights = [SERIES_HEIGHT] * len(measured) + [RISK_HEIGHT]
    figure, panels = new_figure(heights, (SIZE[0], sum(heights) + MARGIN))
    unit, words = shown.time_unit, []
    for f, axes in zip(measured, panels, strict=False):
        known = ~np.isnan(shown.values[:, f])
        times, values = shown.times[known], shown.values[known, f]
        axes.plot(times / unit.hours, values, "o-", color=INK, linewidth=1, markersize=4)
        name, of = shown.features[f], with_space(shown.units[f])
        _set_title(axes, f"{name} ({shown.units[f]})" if shown.units[f] else name)
        axes.margins(y=0.25)
        axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
        course = f"from {plain(values[0])} to {plain(values[-1])}{of} in {len(values)} values"
        if len(values) == 1:
            course = f"{plain(values[0])}{of} at {unit.name} {unit.text(times[0])}"
        words.append(f"{name} {course}")
    _plot_risk(panels[-1], shown, threshold)
    first, last = 100 * shown.risks[0], 100 * shown.risks[-1]
    return figure, (
        f"Series over time: {'; '.join(words)}. Below, the risk of {outcome}: {first:.1f} % at "
        f"{unit.name} {unit.text(shown.hours[0])}, {last:.1f} % at {unit.name} "
        f"{unit.text(shown.hours[-1])}, highest {100 * shown.risks.max():.1f} %; the threshold is "
        f"{100 * threshold:.1f} %."
    )


def _plot_risk(axes: Axes, shown: Explanation, threshold: float) -> None:
    """Draw the risk, which holds until the next observation, beside the threshold."""
    hours, risks = shown.hours / shown.time_unit.hours, 100 * shown.risks
    axes.axhline(100 * threshold, color=OTHER, linestyle="--", linewidth=1)
    axes.plot(hours, risks, "-", color=MODEL, linewidth=1.5, drawstyle="steps-post")
    axes.plot(hours, risks, "o", color=MODEL, markersize=4)
    top = min(100.0, 1.15 * max(float(risks.max()), 200 * threshold))
    axes.set(ylim=(0, top), xlabel=f"{shown.time_unit.name}s")
    _set_title(axes, f"Risk, % (dashed: threshold {100 * threshold:.1f} %)")


def _set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, pad=2)
