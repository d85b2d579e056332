"""The picture of one patient: each series and, below, the risk, on one axis of time."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medgemma_clinical.data.texts import Reference, plain, with_space
from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.patients.explanation import Explanation
from medgemma_clinical.evaluation.plots import GRID, INK, MODEL, OTHER, new_figure

WIDTH, RISK_HEIGHT, MARGIN = 5.2, 1.2, 0.4
"""Inches of the picture, of the curve of risks, and of the labels of time."""

SERIES_HEIGHT, LEAST_HEIGHT, ALL_SERIES = 0.85, 0.45, 4.0
"""Inches of a series where there are few and where there are many, and of all if there is room."""

LEAST_SPREADS = 2.0
"""Standard deviations between training rows that the axis of a series spans at least."""

LONGEST_LABEL = 20
"""Characters of a name or unit beside its panel."""


def plot_patient(shown: Explanation, outcome: str, threshold: float) -> tuple[Figure, str]:
    """Return the measured series of a row above the curve of its risk, and the text alternative.

    Args:
        shown: the row.
        outcome: the event in a few words.
        threshold: the probability from which on a row is an alarm.
    """
    measured = [f for f in range(len(shown.features)) if not np.isnan(shown.values[:, f]).all()]
    height = max(LEAST_HEIGHT, min(SERIES_HEIGHT, ALL_SERIES / len(measured)))
    heights = [height] * len(measured) + [RISK_HEIGHT]
    figure, panels = new_figure(heights, (WIDTH, sum(heights) + MARGIN))
    words = [_plot_series(axes, shown, f) for f, axes in zip(measured, panels, strict=False)]
    _plot_risk(panels[-1], shown, threshold)
    figure.align_ylabels(panels)
    unit = shown.time_unit
    first, last = 100 * shown.risks[0], 100 * shown.risks[-1]
    return figure, (
        f"Series over time: {'; '.join(words)}. Below, the risk of {outcome}: {first:.1f} % at "
        f"{unit.name} {unit.text(shown.hours[0])}, {last:.1f} % at {unit.name} "
        f"{unit.text(shown.hours[-1])}, highest {100 * shown.risks.max():.1f} %; the alarm "
        f"threshold is {threshold_text(threshold)}."
    )


def _plot_series(axes: Axes, shown: Explanation, f: int) -> str:
    """Draw the values of a series above its reference range; return both in words."""
    unit, reference = shown.time_unit, shown.references[f]
    known = ~np.isnan(shown.values[:, f])
    times, values = shown.times[known], shown.values[known, f]
    bottom, top = axis_limits(values, reference, shown.spreads[f])
    axes.set_ylim(bottom, top)
    if reference:
        low, high = reference
        ends = (bottom if low is None else low, top if high is None else high)
        axes.axhspan(*ends, color=GRID, linewidth=0)
    # Without clipping, a point on the edge of the panel is drawn whole.
    axes.plot(times / unit.hours, values, "o-", color=INK, linewidth=1, markersize=4, clip_on=False)
    whole = bool((values == np.round(values)).all())  # states, grades, counts
    axes.yaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2, integer=whole))
    name, of = shown.features[f], with_space(shown.units[f])
    _set_label(axes, _shortened(name), _shortened(shown.units[f]))
    course = f"from {plain(values[0])} to {plain(values[-1])}{of} in {len(values)} values"
    if len(values) == 1:
        course = f"{plain(values[0])}{of} at {unit.name} {unit.text(times[0])}"
    return f"{name} {course}{_reference_text(reference)}"


def axis_limits(
    values: NDArray[np.float64], reference: Reference | None, spread: float
) -> tuple[float, float]:
    """Return limits that show all values and the reference range, and no small change as large.

    Args:
        values: (n,) of one series.
        reference: range of the series, None where unknown.
        spread: between training rows, NaN where unknown; the limits lie ``LEAST_SPREADS`` of
            them apart at least.
    """
    ends = [end for end in reference or () if end is not None]
    low, high = min([values.min(), *ends]), max([values.max(), *ends])
    span = max(high - low, LEAST_SPREADS * np.nan_to_num(spread))
    # A tenth of room on either side; of one value, room for the whole numbers beside a state.
    half = 0.6 * span or max(0.1 * abs(high), 1.0)
    bottom, top = (low + high) / 2 - half, (low + high) / 2 + half
    below_zero = max(0.0, -bottom) if low >= 0 else 0.0
    return float(bottom + below_zero), float(top + below_zero)


def _plot_risk(axes: Axes, shown: Explanation, threshold: float) -> None:
    """Draw the risk, which holds until the next observation, beside the threshold."""
    hours, risks = shown.hours / shown.time_unit.hours, 100 * shown.risks
    axes.axhline(100 * threshold, color=OTHER, linestyle="--", linewidth=1)
    axes.plot(hours, risks, "-", color=MODEL, linewidth=1.5, drawstyle="steps-post")
    axes.plot(hours, risks, "o", color=MODEL, markersize=4, clip_on=False)
    top = min(100.0, 1.15 * max(float(risks.max()), 200 * threshold))
    axes.set(ylim=(0, top), xlabel=f"{shown.time_unit.name}s")
    _set_label(axes, "Risk (%)", "dashed: threshold", threshold_text(threshold))


def _set_label(axes: Axes, *lines: str) -> None:
    """Write beside a panel, where a label takes no height."""
    axes.set_ylabel("\n".join(filter(None, lines)), rotation=0, ha="right", va="center")


def _shortened(name: str) -> str:
    """Leave out the middle of a long name: names that begin alike end differently."""
    if len(name) <= LONGEST_LABEL:
        return name
    half = LONGEST_LABEL // 2
    return f"{name[:half].rstrip()}\N{HORIZONTAL ELLIPSIS}{name[1 - half :].lstrip()}"


def _reference_text(reference: Reference | None) -> str:
    if reference is None:
        return ""
    low, high = ("" if end is None else plain(end) for end in reference)
    if low and high:
        return f" (reference {low} to {high})"
    return f" (reference from {low})" if low else f" (reference up to {high})"
