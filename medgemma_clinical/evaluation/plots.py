"""Pictures of reports and comparisons, in one style, for pages and as files."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from medgemma_clinical.data.small_cells import risk_bands
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures
from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    SAME,
    SCALE,
    WORSE,
    Verdict,
    group_by_verdict,
)
from medgemma_clinical.evaluation.report_tables import percent

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs each font that it looks for

INK, GRID, MODEL, OTHER = "#1d2430", "#d5dae2", "#0b6fa4", "#b4531f"
PAPER = "#ffffff"
DARK = {PAPER: "#14181f", INK: "#e8ebf0", GRID: "#3a4352", MODEL: "#6bb8ea", OTHER: "#f0a06a"}
DARK |= {verdict.colour: verdict.dark for verdict in SCALE}
"""The colours of a picture on a page, and those that replace them on a dark screen."""

EQUALS = Path([(-1, 0.5), (1, 0.5), (-1, -0.5), (1, -0.5)], [Path.MOVETO, Path.LINETO] * 2)
"""Mark of a model that is the same as the reference; matplotlib has none of this form."""

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 3,
    "svg.fonttype": "none",
    "svg.hashsalt": "medgemma",  # the same picture has the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a user's words stays one
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE = (4.0, 3.2)
"""Inches of a report's picture; all have one height."""

MOST_POINTS = 400
"""Points of a curve that are drawn."""

LEAST_DIFFERENCE = 0.05
"""A forest plot reaches at least so far to both sides, so that noise looks small."""

FEWEST_BANDS = 3
"""Bands of risk that a curve needs."""


@dataclass(frozen=True)
class Image:
    """A picture for a page: ``source`` is a data URI, ``alt`` says the same in words."""

    source: str
    alt: str


def report_images(
    cohort: Cohort, figures: CohortFigures, history: Sequence[dict[str, Any]]
) -> dict[str, Image]:
    """Draw a report's pictures by name; without a history there is no learning curve.

    Without ``FEWEST_BANDS`` bands of risk, two of them with events, there is no curve: it would
    contradict the figures.
    """
    plots: dict[str, Any] = {
        "roc": plot_roc,
        "precision": plot_precision_recall,
        "calibration": plot_calibration,
        "decision_curve": plot_decision_curve,
    }
    place, edges = figures.bands.place, figures.bands.edges
    filled, with_events = np.unique(place), np.unique(place[cohort.labels == 1])
    coarse = edges is not None and (len(filled) < FEWEST_BANDS or len(with_events) < 2)
    if figures.events is None or coarse:
        plots = {}
    with plot_style():
        images = {name: to_image(*plot(cohort, figures)) for name, plot in plots.items()}
        if history:
            images["learning"] = to_image(*plot_learning(history))
    return images


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the style of this program within the block, whatever a ``matplotlibrc`` says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def new_figure(
    heights: Sequence[float] = (1,), size: tuple[float, float] = SIZE, *, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure, ``size`` inches, and its axes below each other with relative heights."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=sharex, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def add_legend(figure: Figure) -> None:
    """Put the legend above the panels, where it hides no curve."""
    figure.legend(loc="outside upper left", ncols=2)


def to_image(figure: Figure, alt: str) -> Image:
    """Turn a figure into an SVG image that a page holds inside itself, dark on a dark screen."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    head, tag, body = buffer.getvalue().partition("<defs>")
    assert tag  # matplotlib begins its content so
    content = base64.b64encode(f"{head}<style>{_dark_rules()}</style>{tag}{body}".encode()).decode()
    return Image(f"data:image/svg+xml;base64,{content}", alt)


def _dark_rules() -> str:
    """Return the style that replaces the colours which matplotlib writes beside each shape."""
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme: dark){{{rules}}}"


def plot_roc(cohort: Cohort, figures: CohortFigures) -> tuple[Figure, str]:
    """Return the ROC curve of the model and its best baseline, and its text alternative."""
    figure, (axes,) = new_figure()
    axes.plot([0, 100], [0, 100], ":", color=INK, linewidth=1, label="chance")
    for risk, look in _model_and_baseline(cohort, figures):
        false_alarms, sensitivity, _ = roc_curve(cohort.labels, risk)
        few = _thinned(len(sensitivity))
        axes.plot(100 * false_alarms[few], 100 * sensitivity[few], **look)
    alt = f"ROC curve: AUROC {figures.auroc.text()}."
    found, spared = (figures.estimates[name].value for name in ("sensitivity", "specificity"))
    if found is not None and spared is not None:
        point = 100 * (1 - spared), 100 * found
        axes.plot(*point, "o", color=MODEL, markersize=6, clip_on=False, label="chosen threshold")
        alt += (
            f" At the chosen threshold the model finds {percent(found)} of the events with an "
            f"alarm in {percent(1 - spared)} of the other rows."
        )
    axes.set(xlabel="false alarms, % of rows without event", xlim=(-1, 101), ylim=(-1, 101))
    axes.set_ylabel("sensitivity, % of events")
    add_legend(figure)
    return figure, alt


def plot_precision_recall(cohort: Cohort, figures: CohortFigures) -> tuple[Figure, str]:
    """Return precision over sensitivity beside the prevalence, and its text alternative."""
    figure, (axes,) = new_figure()
    prevalence = figures.prevalence
    assert prevalence is not None  # else ``report_images`` draws no curve
    axes.axhline(100 * prevalence, color=INK, linestyle=":", linewidth=1, label="prevalence")
    for risk, look in _model_and_baseline(cohort, figures):
        precision, recall, _ = precision_recall_curve(cohort.labels, risk)
        few = _thinned(len(recall) - 1)  # the last point, at no alarm, is a convention
        axes.plot(100 * recall[few], 100 * precision[few], **look)
    axes.set(xlabel="sensitivity, % of events", xlim=(-1, 101), ylim=(-1, 101))
    axes.set_ylabel("events among alarms (PPV), %")
    add_legend(figure)
    return figure, (
        f"Precision-recall curve: AUPRC {figures.estimates['auprc'].text()}, where chance is the "
        f"prevalence, {prevalence:.3f}."
    )


def _model_and_baseline(
    cohort: Cohort, figures: CohortFigures
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """Yield the best baseline's risks, if any, and the model's, each with its line's look.

    The risks are numbers of their bands, whose order is all that such a curve shows.
    """
    marker = "" if figures.bands.edges is None else "o"  # few points, which lines connect
    if name := figures.best_baseline:
        look = {"color": OTHER, "linestyle": "--", "linewidth": 1.5, "label": "best baseline"}
        groups = np.unique(cohort.groups, return_inverse=True)[1]
        risk = cohort.baselines[name]
        yield (
            risk_bands(risk, cohort.labels, groups, figures.fewest).place,
            {**look, "marker": marker},
        )
    look = {"color": MODEL, "linewidth": 2, "label": "model"}
    yield figures.bands.place, {**look, "marker": marker}


def _thinned(count: int) -> NDArray[np.int64]:
    """Return so many of ``count`` positions as a curve needs."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64))


def plot_calibration(cohort: Cohort, figures: CohortFigures) -> tuple[Figure, str]:
    """Return observed shares over predicted risks with a histogram, and its text alternative."""
    figure, (axes, below) = new_figure((4, 1))
    risks = 100 * np.array(list(figures.bins))
    shares, low, high = _percentages(figures.bins.values())
    top = min(100.0, 1.05 * np.nanmax([risks, shares, high]))
    axes.plot([0, 100], [0, 100], ":", color=INK, linewidth=1, label="as predicted")
    axes.vlines(risks, low, high, color=MODEL)
    axes.plot(risks, shares, "o-", color=MODEL, linewidth=1, markersize=5, label="observed [95 %]")
    axes.set(ylabel="observed, %", xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
    edges = np.linspace(0, top, 41)
    if figures.bands.edges is not None:
        edges = 100 * np.array([0, *figures.bands.edges, 1])
    below.hist(100 * cohort.probability, edges.tolist(), density=True, color=MODEL, alpha=0.5)
    below.set(xlabel="predicted risk, %", ylabel="rows")
    below.set_yticks([])
    add_legend(figure)
    pairs = "; ".join(
        f"{risk:.0f} % predicted, {share:.0f} % observed"
        for risk, share in zip(risks, shares, strict=True)
    )
    return figure, f"Calibration curve, bins of about equal size by rising risk: {pairs}."


def _percentages(estimates: Iterable[Estimate]) -> NDArray[np.float64]:
    """Return value, low and high, (3, k), times 100; NaN where undefined."""
    numbers = [(each.value, each.low, each.high) for each in estimates]
    return 100 * np.array(numbers, dtype=np.float64).T


def plot_decision_curve(cohort: Cohort, figures: CohortFigures) -> tuple[Figure, str]:
    """Return net benefit over threshold risk, and its text alternative."""
    figure, (axes,) = new_figure()
    prevalence = figures.prevalence
    assert prevalence is not None  # else ``report_images`` draws no curve
    highest = min(0.99, max(2 * prevalence, float(np.quantile(cohort.probability, 0.99))))
    known = {risk: each for risk, each in figures.benefit.items() if risk <= max(0.05, highest)}
    risks = np.array(list(known))
    value, low, high = _percentages(known.values())
    everyone = 100 * (prevalence - (1 - prevalence) * risks / (1 - risks))
    axes.axhline(0, color=INK, linestyle=":", linewidth=1, label="treat none")
    axes.plot(100 * risks, everyone, "--", color=OTHER, label="treat all")
    axes.set_xlim(0, 100 * highest)
    if figures.bands.edges is None:
        axes.fill_between(100 * risks, low, high, color=MODEL, alpha=0.18, linewidth=0)
        axes.plot(100 * risks, value, color=MODEL, linewidth=2, label="model [95 %]")
    else:  # between these risks nothing may be shown
        axes.vlines(100 * risks, low, high, color=MODEL)
        axes.plot(100 * risks, value, "o", color=MODEL, label="model [95 %]")
    ceiling = 110 * prevalence
    axes.set(xlabel="threshold risk, %", ylim=(-0.25 * ceiling, ceiling))
    axes.set_ylabel("net benefit, true alarms per 100 rows")
    add_legend(figure)
    above = value > np.maximum(everyone, 0) + 1e-9
    return figure, (
        "Decision curve: net benefit of the model over the threshold risk, beside treating all and "
        f"treating none. The model lies above both at {above.sum()} of {len(risks)} threshold "
        f"risks from {threshold_text(risks[0])} to {threshold_text(risks[-1])}."
    )


def plot_learning(history: Sequence[dict[str, Any]]) -> tuple[Figure, str]:
    """Return losses and validation AUROC by epoch, and their text alternative.

    Args:
        history: one object an epoch with epoch, train_loss, val_loss, val_auroc, improved; a number
            may be None.
    """
    figure, (upper, lower) = new_figure((1, 1))
    table = pd.DataFrame(history).set_index("epoch")
    kept = table.index[table["improved"]][-1]
    curves = table[["train_loss", "val_loss", "val_auroc"]].astype(float)
    upper.plot(curves["train_loss"], "o--", color=OTHER, label="training")
    upper.plot(curves["val_loss"], "o-", color=MODEL, label="validation")
    lower.plot(curves["val_auroc"], "o-", color=MODEL)
    for axes in (upper, lower):
        axes.axvline(kept, color=INK, linestyle=":", linewidth=1)
    # Whole axes: a change of a hundredth between epochs is noise and looks like it.
    upper.set_ylabel("loss")
    upper.set_ylim(bottom=0)
    lowest = np.fmin(0.5, np.floor(10 * curves["val_auroc"].min()) / 10)
    lower.set(xlabel="epoch (dotted: the one kept)", ylabel="val. AUROC", ylim=(lowest, 1))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    add_legend(figure)
    last = curves.iloc[-1]
    return figure, (
        f"Learning curve of {len(table)} epochs; epoch {kept} was kept. In the last epoch the "
        f"training loss was {last['train_loss']:.3f}, the validation loss {last['val_loss']:.3f}, "
        f"the validation AUROC {last['val_auroc']:.3f}."
    )


def plot_forest(
    differences: Mapping[str, tuple[Estimate, Verdict]], reference: str
) -> tuple[Figure, str]:
    """Return the paired differences of AUROC from a reference as a forest plot, and its text.

    Args:
        differences: of each other model, with the verdict on it, by the model's name.
        reference: name of the model at zero.
    """
    names = [f"{reference}, reference", *differences]
    figure, (axes,) = new_figure(size=(5.5, 0.28 * len(names) + 1.5))
    axes.axvline(0, color=INK, linewidth=1)
    axes.plot([0], [0], "s", color=INK, markersize=4)
    shown, widest = set(), LEAST_DIFFERENCE
    for row, (difference, verdict) in enumerate(differences.values(), start=1):
        if difference.low is not None and difference.high is not None:
            axes.hlines(row, difference.low, difference.high, color=verdict.colour)
            widest = max(widest, -difference.low, difference.high)
        if difference.value is not None:
            axes.plot([difference.value], [row], **_look_of(verdict))
            widest = max(widest, abs(difference.value))
            shown.add(verdict)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(-1.05 * widest, 1.05 * widest), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("AUROC minus that of the reference [95 %]")
    axes.grid(visible=False, axis="y")  # it would hide the ends of the intervals
    if shown:
        in_order = [verdict for verdict in (*SCALE, SAME) if verdict in shown]
        marks = [Line2D([], [], label=v.words, **_look_of(v)) for v in in_order]
        figure.legend(handles=marks, loc="outside upper left", ncols=2)
    groups = group_by_verdict({name: verdict for name, (_, verdict) in differences.items()})
    return figure, (
        f"Forest plot: paired difference of the AUROC of each model from that of {reference}, with "
        f"95 % intervals. {groups or 'No other model is judged.'} The table holds the numbers."
    )


def _look_of(verdict: Verdict) -> dict[str, Any]:
    """Return the look of a verdict's mark, filled where the verdict is better or worse."""
    filled = verdict in (BETTER, WORSE)
    return {
        "color": verdict.colour,
        "linestyle": "none",
        "marker": EQUALS if verdict == SAME else verdict.marker,
        "markerfacecolor": verdict.colour if filled else PAPER,
        "markersize": 6,
    }
