"""How much the risk of one patient differs when folds and initial weights are drawn again.

Source: Riley and Collins 2023, "Stability of clinical prediction models developed using statistical
or machine learning methods", Biometrical Journal 65:2200302.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.suppress import splits_off_few
from medgemma_clinical.evaluation.tables import METRICS, metric_table, model_table
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import percent

CHANGES = ("changes", "changes_of_two", "changes_at_mean_threshold")
"""Measures that are shares of the rows."""


def repeat_metrics(evaluated: Evaluated) -> Topic:
    """Return the topic of metrics that are means over repeats."""
    metrics = evaluated.metrics
    models = model_table(metrics, targets=evaluated.targets)
    several = len(evaluated.targets) > 1
    own = [
        Cells(
            metric_table(metrics.at(target), [*METRICS]),
            "Metrics of the model" + (f": {target.title}" if several else ""),
        )
        for target in evaluated.targets
    ]
    return Topic(
        "Means over the repeats",
        ["SD over splits is that of the repeats: it says nothing of other patients."],
        [*own, Cells(models, "The model beside others", True)],
        numbers={"metrics": metrics.table.reset_index(), "models": models},
    )


def instability(evaluated: Evaluated, table: pd.DataFrame, by_repeat: pd.DataFrame) -> Topic:
    """Return the topic of ``table``, ``TESTED`` and a column of risks a repeat.

    ``by_repeat`` has a line a repeat, its threshold on these risks and its auroc.
    """
    risks = table.filter(regex="^repeat_").to_numpy(float)
    measures = measure_instability(risks, by_repeat)
    patients = table["patient"].nunique()
    if evaluated.min_cell:  # more digits of an AUROC tell the events
        if any(splits_off_few(patients, measures[name], evaluated.min_cell) for name in CHANGES):
            measures |= dict.fromkeys(CHANGES, np.nan)
        measures = {name: round(value, 3) for name, value in measures.items()}
    repeats, noun = risks.shape[1], evaluated.noun
    shared = percent(1 - 1 / evaluated.folds)
    text = (
        f"Folds and initial weights were drawn {repeats} times, so each of {len(table):,} {noun} "
        f"has {repeats} risks, of models that did not learn from the patient. How much do they "
        "differ?"
    )
    bound = (
        "This is a lower bound: all repeats have the same patients, and two models that predict "
        f"one patient share on average {shared} of those that they learn from. Models of other "
        "patients would differ more."
    )
    figure = (
        plot_instability(risks),
        "Instability plot: the risk in each repeat over the mean of the repeats",
    )
    return Topic(
        "Instability",
        [text, bound, *evaluated.no_curves],
        [Cells(instability_cells(measures, noun), f"Risks of {repeats} repeats")],
        {} if evaluated.min_cell else {"instability": figure},
        {"instability": pd.DataFrame([measures])},
    )


def measure_instability(risks: Array, by_repeat: pd.DataFrame) -> dict[str, float]:
    """Return how much risks (n, repeats) differ; ``by_repeat`` has their threshold and auroc."""
    pairs = [*combinations(range(risks.shape[1]), 2)]
    thresholds, aurocs = by_repeat["threshold"].to_numpy(float), by_repeat["auroc"]
    positive, at_mean = risks >= thresholds, risks >= thresholds.mean()
    sd = risks.std(axis=1, ddof=1)
    measures = {
        "mape": np.mean([abs(risks[:, i] - risks[:, j]).mean() for i, j in pairs]),
        "sd_mean": sd.mean(),
        "sd_median": np.median(sd),
        "sd_p90": np.percentile(sd, 90),
        "changes": (positive.any(axis=1) & ~positive.all(axis=1)).mean(),
        "changes_of_two": np.mean([(positive[:, i] != positive[:, j]).mean() for i, j in pairs]),
        "changes_at_mean_threshold": (at_mean.any(axis=1) & ~at_mean.all(axis=1)).mean(),
        "threshold_mean": thresholds.mean(),
        "threshold_min": thresholds.min(),
        "threshold_max": thresholds.max(),
        "auroc_mean": aurocs.mean(),
        "auroc_sd": aurocs.std(),
        "auroc_min": aurocs.min(),
        "auroc_max": aurocs.max(),
    }
    return {name: float(value) for name, value in measures.items()}


def instability_cells(measures: Mapping[str, float], noun: str) -> pd.DataFrame:
    """Return the measures as text with their meanings; those that are hidden are left out."""
    lowest, highest, mean = (
        percent(measures[f"threshold_{name}"]) for name in ("min", "max", "mean")
    )
    changes, of_two, at_mean = (percent(measures[name]) for name in CHANGES)
    auroc = "{auroc_min:.3f} to {auroc_max:.3f}".format_map(measures)
    average = "mean {auroc_mean:.3f}, SD {auroc_sd:.3f}".format_map(measures)
    lines = [
        ("MAPE", f"{measures['mape']:.3f}", "mean absolute difference of two repeats; 0 is stable"),
        ("SD, mean", f"{measures['sd_mean']:.3f}", "standard deviation over the repeats"),
        ("SD, median", f"{measures['sd_median']:.3f}", f"half of the {noun} have more"),
        ("SD, 90th percentile", f"{measures['sd_p90']:.3f}", f"a tenth of the {noun} has more"),
    ]
    if not np.isnan(measures["changes"]):
        threshold = f"the threshold, each repeat's own ({lowest} to {highest})"
        lines += [
            ("Change sides", changes, f"{noun} on both sides of {threshold}"),
            ("Of two repeats", of_two, "the same in two repeats, on average"),
            ("At one threshold", at_mean, f"the same at {mean}, the mean of the thresholds"),
        ]
    lines.append(("AUROC", auroc, f"of the repeats, lowest to highest; {average}"))
    return pd.DataFrame(lines, columns=["Measure", "Value", "Meaning"])


def plot_instability(risks: Array) -> plots.Plot:
    """Plot the risks (n, repeats) over their mean."""
    figure, (axes,) = plots.new_figure()
    x, y = 100 * np.repeat(risks.mean(axis=1), risks.shape[1]), 100 * risks.ravel()
    top = 1.02 * y.max()
    axes.plot([0, top], [0, top], label="no difference", **plots.DOTTED)
    # An image inside the figure: a path of its own for each point takes megabytes.
    look: dict[str, Any] = {"color": plots.MODEL, "alpha": 0.3, "markeredgewidth": 0}
    axes.plot(x, y, "o", label="a repeat", rasterized=True, **look)
    figure.set_dpi(200)  # of the image
    axes.set(xlabel="mean predicted risk, %", ylabel="predicted risk in a repeat, %")
    alt = "Instability plot: predicted risk in each repeat over the mean of the repeats."
    return plots.with_legend(figure), alt
