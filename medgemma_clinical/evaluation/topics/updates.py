"""What an update of the decision rule brings in a new cohort."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS, TESTED
from medgemma_clinical.evaluation.recalibration import METHODS, MIN_SLOPE_EVENTS
from medgemma_clinical.evaluation.topics.calibration import calibration_table, distant_bins
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.updating import CHOSEN, DIVISIONS
from medgemma_clinical.evaluation.verdicts import difference_text, value_text


def updates(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None where no update is tried."""
    content, noun = evaluated.content, evaluated.content.noun
    title = "Calibration after an update"
    if not content.tries_updates:
        return None
    if content.updates is None:
        text = (
            "No update was tried: a half of these patients has fewer than "
            f"{MINORITY_PATIENTS} with, or without, the event."
        )
        return Topic(title, [text])
    updated = evaluated.rows[TESTED].join(content.updates.risks)
    bins = distant_bins(evaluated)  # of the model not updated, where small counts are hidden
    curves = {name: calibration_table(updated, name, content.seed, bins) for name in METHODS}
    table = content.updates.table.reset_index()
    text = (
        "An update moves the log-odds of all risks alike, so it changes no ranking. Tests choose "
        f"it: {content.updates.method}. A slope takes {MIN_SLOPE_EVENTS} events. How good it is "
        f"in new {noun} is estimated in halves: the risks of each half of the patients are updated "
        f"by a fit on the other half, {DIVISIONS} times. “{CHOSEN.capitalize()}” chooses in each "
        "half anew. Slope and ICI are those of each half by itself, averaged. Both halves have the "
        "same share of events, which keeps the mean risk right whatever the update: compare the "
        "log loss."
    )
    figure = (
        plot_updates(curves),
        "Calibration curves of the model not updated and after each update",
    )
    caption = f"The model not updated and updated on these {noun}"
    return Topic(
        title,
        [text],
        [Cells(update_cells(table), caption)],
        {"updates": figure},
        {"updates": table},
    )


def update_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of ``Updates``, without index, as text, a line a method."""
    methods = table.set_index(["method", "metric"]).groupby(level=0, sort=False)
    lines = [
        {
            "Update": method,
            "Slope": value_text(row.loc["calibration_slope"], ".2f"),
            "ICI": value_text(row.loc["ici"]),
            "Log loss [95 %]": value_text(row.loc["log_loss"], ".4f"),
            "Change [95 %]": difference_text(row.loc["log_loss"], "+.4f"),
        }
        for method, row in ((method, rows.droplevel(0)) for method, rows in methods)
    ]
    cells = pd.DataFrame(lines)
    cells.loc[0, "Change [95 %]"] = ""  # not updated: the reference of the others
    return cells


def plot_updates(curves: Mapping[str, pd.DataFrame]) -> plots.Plot:
    """Plot a ``calibration_table`` of the model not updated, then of each update."""
    figure, (axes,) = plots.new_figure()
    ends = pd.concat(list(curves.values()))[["predicted", "observed"]].max()
    axes.plot([0, 100 * ends.max()], [0, 100 * ends.max()], label="ideal", **plots.DOTTED)
    lines = zip(
        curves.items(), ("o-.", "s--", "D-"), (plots.INK, plots.OTHER, plots.MODEL), strict=True
    )
    for (name, table), form, colour in lines:
        x, y = 100 * table["predicted"], 100 * table["observed"]
        axes.plot(x, y, form, color=colour, linewidth=1, label=name)
    axes.set(xlabel="predicted risk, %", ylabel="observed, %")
    alt = "Calibration curves of the model not updated and after each update."
    return plots.with_legend(figure, 2), alt
