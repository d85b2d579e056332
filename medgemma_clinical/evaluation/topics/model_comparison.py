"""The model beside baselines, stage 1 and ensemble on the same rows."""

from __future__ import annotations

from collections.abc import Mapping

from medgemma_clinical.evaluation.baselines import MEANINGS
from medgemma_clinical.evaluation.tables import model_cells
from medgemma_clinical.evaluation.topics.topic import Cells, Details, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import multiplicity_sentence


def model_comparison(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    noun, metrics = evaluated.content.noun, evaluated.metrics
    cells = model_cells(metrics)
    numbers = {"models": cells}
    if len(cells) == 1:
        return Topic("Baselines", [f"None was scored on these {noun}."], numbers=numbers)
    terms = {name: MEANINGS[name] for name in metrics.models if name in MEANINGS}
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
        "“Minus reference” is the AUROC of a line minus that of the reference, paired by patient; "
        "the reference of the ensemble is the blend. A line is better or worse only where the "
        "whole interval lies on one side of zero. AUPRC is the mean precision over recall, whose "
        "chance level is the prevalence; the Brier score is the mean squared distance of risk and "
        f"outcome: less is better. {more}"
    )
    return Details("What columns and models are", text.strip(), terms=terms)
