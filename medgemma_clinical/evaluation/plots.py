"""Figures of reports and comparisons, in one style, for pages and as files."""

from __future__ import annotations

import base64
import io
import logging
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import TextPath
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation import verdicts
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, Metrics

for chatty in ("matplotlib", "fontTools"):  # they log each font
    logging.getLogger(chatty).setLevel(logging.WARNING)

INK, GRID, MODEL, OTHER = "#1d2430", "#d5dae2", "#0b6fa4", "#b4531f"

FONT_SIZE = 9
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": FONT_SIZE,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 3,
    "svg.fonttype": "none",
    "svg.hashsalt": "medgemma",  # the same figure has the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a user's words stays one
    "xtick.color": INK,
    "ytick.color": INK,
}
LINES: tuple[dict[str, Any], ...] = (
    {"color": MODEL, "linewidth": 2, "label": "model"},
    {"color": OTHER, "linewidth": 1.5, "linestyle": "--", "label": "baseline"},
)
DOTTED: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1}
MARKS = {
    verdicts.BETTER: ("^", "#17693a"),
    verdicts.UNDECIDED: ("D", "#855300"),
    verdicts.WORSE: ("v", "#a3211f"),
    verdicts.TOO_FEW: ("o", "#566070"),
    None: (".", "#566070"),
}
"""Marker and colour of each verdict, and of none; the colours are those of pages on a light screen.
"""

MIN_DIFFERENCE = 0.05
"""A forest plot reaches at least so far to both sides, so that noise looks small."""

FLOW_WIDTH, LINE, GAP = 4.4, 0.17, 0.16
"""Inches: width of a flow diagram, height of a line of text, space between boxes."""

Plot = tuple[Figure, str]
"""A figure and its text alternative."""


class Image(NamedTuple):
    """A figure as SVG, and its text alternative."""

    svg: bytes
    alt: str

    @property
    def source(self) -> str:
        """The image as a page holds it inside itself."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def plot_style() -> AbstractContextManager[None]:
    """Draw in the style of this program within a block, whatever a ``matplotlibrc`` says."""
    return style.context(["default", STYLE])


class Shown(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_figure(
    heights: Sequence[float] = (1,), size: tuple[float, float] = (4.0, 3.2)
) -> tuple[Figure, list[Axes]]:
    """Return a figure, ``size`` inches, and its axes below each other with relative heights."""
    figure = Shown(figsize=size, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def to_image(figure: Figure, alt: str) -> Image:
    """Turn a figure into an SVG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # found once; a file of another format keeps it
    return Image(buffer.getvalue(), alt)


def _with_legend(figure: Figure, columns: int = 3) -> Figure:
    """Put one legend above the panels, where it hides no curve."""
    for axes in figure.axes:
        if legend := axes.get_legend():  # scikit-learn's
            legend.remove()
    figure.legend(loc="outside upper left", ncols=columns)
    return figure


def plot_roc(labels: Array, risks: Sequence[Array], point: tuple[float, float]) -> Plot:
    """Plot the ROC curves of model and baseline, and the threshold's point if it is known."""
    figure, (axes,) = new_figure()
    for risk, line in zip(risks, LINES, strict=False):
        RocCurveDisplay.from_predictions(labels, risk, ax=axes).line_.set(**line)
    axes.plot([0, 1], [0, 1], label="chance", **DOTTED)
    if not np.isnan(point).any():
        axes.plot(*point, "o", color=MODEL, markersize=6, clip_on=False, label="threshold")
    axes.set(xlabel="1 \N{MINUS SIGN} specificity", ylabel="sensitivity")
    return _with_legend(figure), "ROC curve: sensitivity over 1 minus specificity."


def plot_precision_recall(labels: Array, risks: Sequence[Array]) -> Plot:
    """Plot the precision-recall curves of the model and the baseline."""
    figure, (axes,) = new_figure()
    draw = PrecisionRecallDisplay.from_predictions
    for risk, line in zip(risks, LINES, strict=False):
        draw(labels, risk, ax=axes, drop_intermediate=True).line_.set(**line)
    axes.axhline(labels.mean(), label="prevalence", **DOTTED)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    alt = "Precision-recall curve: precision over recall, beside the prevalence."
    return _with_legend(figure), alt


def plot_calibration(table: pd.DataFrame, risk: Array) -> Plot:
    """Plot a ``calibration_table`` above a histogram of the risks."""
    figure, (axes, below) = new_figure((4, 1))
    x, y, low, high = (100 * table[name] for name in ("predicted", "observed", "low", "high"))
    top = min(100.0, 1.05 * np.nanmax([*y, *high, 100 * risk.max()]))
    axes.plot([0, 100], [0, 100], label="ideal", **DOTTED)
    axes.vlines(x, low, high, color=MODEL)
    axes.plot(x, y, "o-", label="observed [95 %]", color=MODEL, linewidth=1, markersize=5)
    axes.set(ylabel="observed, %", xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
    below.hist(100 * risk, np.linspace(0, top, 41).tolist(), color=MODEL, alpha=0.5)
    below.set(xlabel="predicted risk, %", ylabel="count", yticks=[])
    alt = "Calibration curve: share of events over the predicted risk, and a histogram."
    return _with_legend(figure), alt


def plot_risks(labels: Array, risk: Array) -> Plot:
    """Plot the distribution of the risks of the events above that of the non-events."""
    figure, panels = new_figure((1, 1))
    bins = np.linspace(0, min(100.0, 102 * risk.max()), 41).tolist()
    classes = ((1, "events", OTHER), (0, "non-events", MODEL))
    for axes, (label, name, colour) in zip(panels, classes, strict=True):
        percents = 100 * risk[labels == label]
        weights = np.full(len(percents), 100 / len(percents))
        axes.hist(percents, bins, weights=weights, color=colour, alpha=0.7)
        axes.axvline(float(np.median(percents)), **DOTTED)
        axes.set_ylabel(f"% of {name}")
    panels[-1].set_xlabel("predicted risk, % (dotted: median)")
    return figure, "Histograms of the predicted risks of events and of non-events."


def plot_decision_curve(table: pd.DataFrame, models: Sequence[str]) -> Plot:
    """Plot a ``decision_curve`` of the model and the baseline."""
    figure, (axes,) = new_figure()
    threshold = 100 * table.index.to_numpy()
    axes.fill_between(threshold, table["low"], table["high"], color=MODEL, alpha=0.18, linewidth=0)
    for name, line in zip(models, LINES, strict=False):
        axes.plot(threshold, table[name], **line)
    axes.plot(threshold, table["treat_all"], "-.", color=INK, linewidth=1, label="treat all")
    axes.axhline(0, label="treat none", **DOTTED)
    top = 1.1 * max(table["treat_all"].max(), table["high"].max())
    axes.set(xlabel="threshold risk, %", ylabel="net benefit", ylim=(-0.25 * top, top))
    return _with_legend(figure), "Decision curve: net benefit over the threshold risk."


def plot_learning(history: Sequence[Mapping[str, Any]]) -> Plot:
    """Plot losses and validation AUROC by epoch; a number of the history may be None."""
    figure, (upper, lower) = new_figure((1, 1))
    table = pd.DataFrame(history).set_index("epoch")
    kept = sorted({*table["best_epochs"].iloc[-1]})  # of each member
    auroc = table["val_auroc"].astype(float)
    upper.plot(table["train_loss"].astype(float), "o--", color=OTHER, label="training")
    upper.plot(table["val_loss"].astype(float), "o-", color=MODEL, label="validation")
    lower.plot(auroc, "o-", color=MODEL)
    for axes in (upper, lower):
        for epoch in kept:
            axes.axvline(epoch, **DOTTED)
    # Whole axes: a change of a hundredth between epochs is noise and looks like it.
    upper.axhline(0, linewidth=0)
    upper.set(ylabel="loss", ylim=(0, None))
    lowest = np.fmin(0.5, np.floor(10 * auroc.min()) / 10)
    lower.set(xlabel="epoch (dotted: kept)", ylabel="val. AUROC", ylim=(lowest, 1))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    alt = f"Learning curve of {len(table)} epochs; kept: {', '.join(map(str, kept))}."
    return _with_legend(figure), alt


def plot_forest(metrics: Metrics) -> Plot:
    """Plot the difference of each model's AUROC to that of its reference."""
    reference, *names = metrics.models
    aurocs = metrics.metric("auroc").loc[names]
    minority = metrics.counts["minority_patients"]
    levels = [
        verdicts.difference_verdict(row, minority) if name in metrics.planned else None
        for name, row in aurocs.iterrows()
    ]
    values, lows, highs = aurocs[DIFFERENCE].to_numpy(float).T
    figure, (axes,) = new_figure(size=(5.5, 0.28 * len(metrics.models) + 1.5))
    axes.axvline(0, color=INK, linewidth=1)
    axes.plot([0], [0], "s", color=INK, markersize=4)
    for verdict, (marker, colour) in MARKS.items():
        rows = [k for k, level in enumerate(levels) if level == verdict]
        if rows:
            errors = [(values - lows)[rows], (highs - values)[rows]]
            look: dict[str, Any] = {"color": colour, "markersize": 6}
            look["label"] = verdict.words if verdict else "not planned"
            axes.errorbar(values[rows], np.add(rows, 1), xerr=errors, fmt=marker, **look)
    widest = np.nanmax([MIN_DIFFERENCE, *np.abs([*values, *lows, *highs])])
    besides = aurocs["reference"]
    texts = [n if beside == reference else f"{n} minus {beside}" for n, beside in besides.items()]
    axes.set_yticks(range(len(names) + 1), [f"{reference}, reference", *texts])
    axes.set(xlim=(-1.05 * widest, 1.05 * widest), ylim=(len(names) + 0.5, -0.5))
    axes.set_xlabel("AUROC minus that of the reference [95 %]")
    axes.grid(visible=False, axis="y")  # it would hide the ends of the intervals
    alt = f"Forest plot: AUROC of each model minus that of {reference}, with intervals."
    return _with_legend(figure) if names else figure, alt


def plot_sites(table: pd.DataFrame, pooled: Mapping[str, float]) -> Plot:
    """Plot the AUROC of each site of a ``site_table`` that has one, and what ``pool`` returns."""
    defined = table[table["auroc"].notna()]
    value, low, high = (
        defined[name].to_numpy(float) for name in ("auroc", "auroc_low", "auroc_high")
    )
    names, below = defined["site"].tolist(), len(defined)
    figure, (axes,) = new_figure(size=(5.5, 0.28 * below + 1.8))
    look: dict[str, Any] = {"color": MODEL, "label": "a site [95 %]", "markersize": 5}
    axes.errorbar(value, range(below), xerr=[value - low, high - value], fmt="s", **look)
    if not np.isnan(pooled["value"]):
        names.append("pooled")
        mean, *ends = (pooled[name] for name in ("value", "low", "high"))
        axes.axvline(mean, **DOTTED)
        look = {"color": OTHER, "label": "pooled [95 %]", "markersize": 7}
        axes.errorbar(mean, below, xerr=[[mean - ends[0]], [ends[1] - mean]], fmt="D", **look)
        names.append("further sites")
        further = [pooled["prediction_low"], pooled["prediction_high"]]
        axes.plot(further, [below + 1] * 2, "|-", color=INK, label="95 % of further sites")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="AUROC", ylim=(len(names) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    return _with_legend(figure), "Forest plot: AUROC of each site, pooled, and of further sites."


def plot_flow(flow: pd.DataFrame | None, split: pd.DataFrame, noun: str) -> Plot:
    """Plot how rules remove rows (``noun``), and the parts; suppressed counts are texts."""
    figure, (axes,) = new_figure()
    column, middle = 0.36 * FLOW_WIDTH, 0.18 * FLOW_WIDTH
    known = [] if flow is None else flow.to_dict("records")
    rules = [rule for rule in known if count_text(rule["removed"]) != "0"]
    total = _total([rules[0]["removed"], rules[0]["left"]] if rules else split["rows"])
    bottom = top = _draw_box(axes, 0, 0, column, f"{noun}: {total}")
    for rule in rules:
        top = bottom - GAP
        text = f"removed: {count_text(rule['removed'])}\n{rule['rule']}"
        aside = _draw_box(axes, column + GAP, top, FLOW_WIDTH - column - GAP, text)
        _draw_arrow(axes, (middle, (top + aside) / 2), (column + GAP, (top + aside) / 2))
        _draw_arrow(axes, (middle, bottom), (middle, aside - GAP))
        bottom = _draw_box(axes, 0, aside - GAP, column, f"left: {count_text(rule['left'])}")
    lowest, width = bottom, (FLOW_WIDTH - 2 * GAP) / 3
    for k, part in enumerate(split.to_dict("records")):
        top = top if k % 3 else lowest - 2 * GAP
        counts = {noun: part["rows"], "patients": part["patients"], "events": part["events"]}
        text = "\n".join(f"{name}: {count_text(n)}" for name, n in counts.items())
        x = (k % 3) * (width + GAP)
        lowest = min(lowest, _draw_box(axes, x, top, width, f"{part['part']}\n{text}"))
        if k < 3:
            _draw_arrow(axes, (middle, bottom), (x + width / 2, top))
    axes.set(xlim=(0, FLOW_WIDTH), ylim=(lowest, 0))
    axes.axis("off")
    figure.set_size_inches(FLOW_WIDTH + 0.1, 0.1 - lowest)
    return figure, f"Flow diagram: {noun} of the source, those removed, and the parts of the split."


def _total(counts: Sequence[float | str] | pd.Series) -> str:
    """Return the sum of counts as text, ``not shown`` where one is hidden."""
    numbers = pd.Series(counts).map(count_text).str.replace(",", "")
    known = pd.to_numeric(numbers, errors="coerce")
    return "not shown" if known.isna().any() else count_text(known.sum())


def _draw_box(axes: Axes, x: float, top: float, width: float, text: str) -> float:
    """Draw a box around wrapped lines of text; return its lower edge."""
    lines = []
    for line in text.split("\n"):
        inches = TextPath((0, 0), line, FONT_SIZE).get_extents().width / 72
        letters = int(0.85 * width / inches * len(line))  # other fonts may be wider
        lines += textwrap.wrap(line, letters)
    height = LINE * (len(lines) + 0.8)
    axes.add_patch(
        Rectangle((x, top - height), width, height, facecolor="white", edgecolor=INK, clip_on=False)
    )
    centre = x + width / 2, top - height / 2
    axes.text(*centre, "\n".join(lines), ha="center", va="center", in_layout=False)
    return top - height


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    look = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)


def plot_updates(curves: Mapping[str, pd.DataFrame]) -> Plot:
    """Plot a ``calibration_table`` of the model not updated, then of each update."""
    figure, (axes,) = new_figure()
    ends = pd.concat(list(curves.values()))[["predicted", "observed"]].max()
    axes.plot([0, 100 * ends.max()], [0, 100 * ends.max()], label="ideal", **DOTTED)
    lines = zip(curves.items(), ("o-.", "s--", "D-"), (INK, OTHER, MODEL), strict=True)
    for (name, table), form, colour in lines:
        x, y = 100 * table["predicted"], 100 * table["observed"]
        axes.plot(x, y, form, color=colour, linewidth=1, label=name)
    axes.set(xlabel="predicted risk, %", ylabel="observed, %")
    alt = "Calibration curves of the model not updated and after each update."
    return _with_legend(figure, 2), alt
