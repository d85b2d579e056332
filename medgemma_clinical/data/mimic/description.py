"""The description beside rows of a hospital: texts of the data set, definitions, counts, origin."""

from __future__ import annotations

from typing import Any

from medgemma_clinical.data.duck import describe_origin
from medgemma_clinical.data.mimic.analytes import ItemSeries
from medgemma_clinical.data.mimic.hospital import Hospital
from medgemma_clinical.data.mimic.request import (
    DISCHARGED,
    GAPS,
    OUTCOMES,
    CohortRequest,
    OutcomeText,
)
from medgemma_clinical.data.texts import plain


def describe_rows(
    hospital: Hospital,
    series: list[ItemSeries],
    counts: dict[str, Any],
    request: CohortRequest,
) -> dict[str, Any]:
    """Describe the rows for their readers.

    Args:
        hospital: whose tables were read.
        series: the main one first, each with its unit.
        counts: ``flow``, ``rows`` and ``values`` of the description.
        request: that was made.
    """
    window, horizon = plain(request.window_hours), plain(request.horizon_hours)
    stored = "charted and stored by then" if hospital.has_storing_times else "charted by then"
    main, *others = series
    text = request.outcome_text
    return {
        "series": _as_title(main.name),
        "unit": main.unit,
        "question": _question(text, horizon),
        "outcome": text.outcome,
        "labels": {
            f"label_{name}": {"outcome": each.outcome, "question": _question(each, horizon)}
            for name, each in OUTCOMES.items()
        },
        "plausible": main.plausible,
        "limits": {each.name: each.plausible for each in others},
        "reference": main.reference,
        "references": {each.name: each.reference for each in others if each.reference},
        "prediction_time": (
            f"{window} hours after the first value of each admission, for patients who are then in "
            f"hospital; only values {stored} are read"
        ),
        "horizon": f"{horizon} hours from then on",
        **counts,
        "definitions": {
            "cohort": hospital.cohorts[request.cohort],
            "anion_gap": GAPS[request.compute_gap],
            "discharge": DISCHARGED[request.discharged],
            "label_escalation": text.definition,
            **{f"label_{name}": outcome.definition for name, outcome in OUTCOMES.items()},
        },
        "source": hospital.source,
        **describe_origin(request, hospital.command, hospital.hashes),
    }


def _question(text: OutcomeText, horizon: str) -> str:
    return f"Will the patient {text.question} within {horizon} hours?"


def _as_title(name: str) -> str:
    """Return a name with a capital at its beginning; pH stays as it is."""
    return name if name[1:] != name[1:].lower() else name[:1].upper() + name[1:]
