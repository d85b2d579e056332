"""How the training went: losses and validation AUROC by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.topics.topic import Evaluated, Topic


def learning(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None where there is no history or a single epoch."""
    history = evaluated.content.history
    if history is None or len(history) < 2:
        return None
    return Topic("Training", figures={"learning_curve": (plot_learning(history), "Learning curve")})


def plot_learning(history: Sequence[Mapping[str, Any]]) -> plots.Plot:
    """Plot losses and validation AUROC by epoch; a number of the history may be None."""
    table = pd.DataFrame(history).set_index("epoch")
    averaged, auroc = table["averaged_epochs"].iloc[-1], table["val_auroc"].astype(float)
    has_auroc = bool(auroc.notna().any())  # times to events have none
    figure, axes_of = plots.new_figure((1, 1) if has_auroc else (1,))
    upper, lower = axes_of[0], axes_of[-1]
    upper.plot(table["train_loss"].astype(float), "o--", color=plots.OTHER, label="training")
    upper.plot(table["val_loss"].astype(float), "o-", color=plots.MODEL, label="validation")
    for axes in axes_of:
        for epoch in averaged:
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=plots.GRID, linewidth=0)
    # Whole axes: a change of a hundredth between epochs is noise and looks like it.
    upper.axhline(0, linewidth=0)
    upper.set(ylabel="loss", ylim=(0, None))
    if has_auroc:
        lower.plot(auroc, "o-", color=plots.MODEL)
        lowest = np.fmin(0.5, np.floor(10 * auroc.min()) / 10)
        lower.set(ylabel="val. AUROC", ylim=(lowest, 1))
    lower.set(xlabel="epoch (shaded: averaged)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    alt = f"Learning curve of {len(table)} epochs; averaged: {len(averaged)} of them."
    return plots.with_legend(figure), alt
