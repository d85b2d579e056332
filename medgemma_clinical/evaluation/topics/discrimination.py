"""How well risks rank: AUROC, AUPRC, their curves, and other models on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.baselines import meanings
from medgemma_clinical.evaluation.metrics import Array, Known
from medgemma_clinical.evaluation.tables import metric_table, model_cells
from medgemma_clinical.evaluation.topics.topic import Cells, Details, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import multiplicity_sentence


def discrimination(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    metrics, noun = evaluated.metrics, evaluated.noun
    figures = {}
    if not evaluated.min_cell:
        risks, known = [evaluated.risk(name) for name in evaluated.names], evaluated.known
        value = metrics.of(evaluated.model)["value"]
        roc = plot_roc(known, risks, (1 - value["specificity"], value["sensitivity"]))
        figures["roc"] = roc, f"ROC curve{evaluated.beside}"
        precision_recall = plot_precision_recall(known, risks)
        figures["precision_recall"] = precision_recall, "Precision-recall curve"
    cells = metric_table(metrics, ["auroc", "auprc"])
    return Topic(
        "Discrimination",
        [
            f"Do {noun} with the event get a higher risk than {noun} without it?",
            *evaluated.no_curves,
        ],
        [Cells(cells, "How well the model ranks")],
        figures,
        {"metrics": metrics.table.reset_index()},
    )


def plot_roc(known: Known, scores: Sequence[Array], point: tuple[float, float]) -> plots.Plot:
    """Plot the ROC curves of model and baseline, and the threshold's point if it is known."""
    figure, (axes,) = plots.new_figure()
    for score, line in zip(scores, plots.LINES, strict=False):
        shown = RocCurveDisplay.from_predictions(
            known.case, score, sample_weight=known.weights[0], ax=axes
        )
        shown.line_.set(**line)
    axes.plot([0, 1], [0, 1], label="chance", **plots.DOTTED)
    if not np.isnan(point).any():
        axes.plot(*point, "o", color=plots.MODEL, markersize=6, clip_on=False, label="threshold")
    axes.set(xlabel="1 \N{MINUS SIGN} specificity", ylabel="sensitivity")
    return plots.with_legend(figure), "ROC curve: sensitivity over 1 minus specificity."


def plot_precision_recall(known: Known, scores: Sequence[Array]) -> plots.Plot:
    """Plot the precision-recall curves of the model and the baseline."""
    figure, (axes,) = plots.new_figure()
    weights = known.weights[0]
    options: dict[str, Any] = {"sample_weight": weights, "drop_intermediate": True, "ax": axes}
    for score, line in zip(scores, plots.LINES, strict=False):
        shown = PrecisionRecallDisplay.from_predictions(known.case, score, **options)
        shown.line_.set(**line)
    axes.axhline(np.average(known.case, weights=weights), label="prevalence", **plots.DOTTED)
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    alt = "Precision-recall curve: precision over recall, beside the prevalence."
    return plots.with_legend(figure), alt


def model_comparison(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    noun, metrics = evaluated.noun, evaluated.metrics
    cells = model_cells(metrics)
    numbers = {"models": cells}
    if len(cells) == 1:
        return Topic("Baselines", [f"None was scored on these {noun}."], numbers=numbers)
    words = meanings(of_times=evaluated.target.horizon > 0)
    terms = {name: words[name] for name in metrics.models if name in words}
    return Topic(
        "Baselines",
        [*filter(None, [multiplicity_sentence(metrics)])],
        [Cells(cells, f"This model beside others on the same {noun}", is_wide=True)],
        numbers=numbers,
        details=[about_models(terms)],
    )


def about_models(terms: Mapping[str, str], more: str = "") -> Details:
    """Return what the columns of ``model_cells`` and the models are."""
    text = (
        "“Minus reference” is the AUROC of a line minus that of the reference, or of the model "
        "that stands behind it, paired by patient: above 0 the line ranks better. It is better or "
        "worse only where the whole interval lies on one side of zero. AUPRC is the mean precision "
        "over recall, whose chance level is the prevalence; the Brier score is the mean squared "
        "distance of risk and outcome: less is better. O/E is observed over expected events: 1 is "
        f"ideal. {more}"
    )
    return Details("What columns and models are", text.strip(), terms=terms)
