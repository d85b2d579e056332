"""Figures of reports and comparisons, in one style, for pages and as files."""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgemma_clinical.evaluation import verdicts
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, Metrics

for chatty in ("matplotlib", "fontTools"):  # they log each font
    logging.getLogger(chatty).setLevel(logging.WARNING)

COLOURS = {
    "ink": "#1d2430",
    "soft": "#566070",
    "grid": "#d5dae2",
    "model": "#0b6fa4",
    "other": "#b4531f",
    "better": "#17693a",
    "undecided": "#855300",
    "worse": "#a3211f",
}
"""Colours of figures, and of pages on a light screen, by their names in the pages' style."""

INK, SOFT, GRID, MODEL, OTHER = (COLOURS[name] for name in list(COLOURS)[:5])

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
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
    verdicts.BETTER: ("^", COLOURS["better"]),
    verdicts.UNDECIDED: ("D", COLOURS["undecided"]),
    verdicts.WORSE: ("v", COLOURS["worse"]),
    verdicts.TOO_FEW: ("o", SOFT),
    None: (".", SOFT),
}
"""Marker and colour of each verdict, and of none."""

COLUMN = 4.0
"""Inches of a figure that takes one of three columns of a page."""

MIN_DIFFERENCE = 0.05
"""A forest plot reaches at least so far to both sides, so that noise looks small."""

METADATA = ("Creator", "Date", "Format", "Type")
"""What an SVG file would say of its making."""

Plot = tuple[Figure, str]
"""A figure and its text alternative."""


class Image(NamedTuple):
    """A figure as SVG, and its text alternative."""

    svg: bytes
    alt: str
    is_broad: bool = False  # it takes two columns of a page

    def inline(self, name: str) -> str:
        """Return an element of a page, in the page's colours; ``name`` is unique on the page."""
        svg = re.sub("<style.*?</style>", "", self.svg.decode())  # it would hold for the page
        body = re.sub("<[^>]+>", lambda tag: _in_page(tag[0], name), svg.partition("<svg")[2])
        return f'<svg role="img" aria-label="{html.escape(self.alt)}"{body}'


def _in_page(tag: str, name: str) -> str:
    """Give a tag of an SVG file ids of its own and the colours of the page."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    for variable, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag.replace("fill: #ffffff", "fill: none")


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
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(METADATA))
    figure.set_layout_engine("none")  # found once; a file of another format keeps it
    return Image(buffer.getvalue(), alt, figure.get_figwidth() > COLUMN)


def fill_band(axes: Axes, x: Any, low: Any, high: Any) -> None:
    """Shade the interval of the model's curve."""
    axes.fill_between(x, low, high, color=MODEL, alpha=0.18, linewidth=0)


def name_lines(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines of a forest plot, from above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")  # it would hide the ends of the intervals


def with_legend(figure: Figure, columns: int = 3) -> Figure:
    """Put one legend above the panels, where it hides no curve."""
    for axes in figure.axes:
        if legend := axes.get_legend():  # scikit-learn's
            legend.remove()
    figure.legend(loc="outside upper left", ncols=columns)
    return figure


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
    name_lines(axes, [f"{reference}, reference", *texts])
    axes.set(xlim=(-1.05 * widest, 1.05 * widest), xlabel="AUROC minus reference [95 %]")
    alt = f"Forest plot: AUROC of each model minus that of {reference}, with intervals."
    return with_legend(figure) if names else figure, alt
