"""Requests for a DKA file: impossible ones are refused with their flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medgemma_clinical.data.database.flags import usable_cores
from medgemma_clinical.data.mimic.request import ALWAYS, OUTCOMES, Extraction
from medgemma_clinical.files import InputError


def request_of(**values: Any) -> Extraction:
    return Extraction(mimic_dir=Path("mimic"), out=Path("out.csv"), **values)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"window_hours": 0.0}, "--window_hours 0"),
        ({"window_hours": float("nan")}, "--window_hours nan"),
        ({"horizon_hours": -1.0}, "--horizon_hours -1"),
        ({"horizon_hours": 2e6}, "--horizon_hours"),
        ({"min_observations": 0}, "--min_observations 0"),
        ({"cohort": "none"}, "--cohort none: must be one of dka, all, biochemical"),
        ({"compute_gap": "never"}, "--compute_gap never"),
        ({"outcome": ("sepsis",)}, "--outcome sepsis"),
        ({"outcome": ("escalation", "death")}, "--outcome escalation,death"),
        ({"outcome": ()}, "--outcome"),
        ({"discharged": "both"}, "--discharged both: must be one of not_escalated, exclude"),
        ({"threads": -1}, "--threads -1"),
        ({"memory_limit": "much"}, "--memory_limit much: must be a size such as 500MB or 2GB"),
        ({"memory_limit": "2"}, "--memory_limit 2"),
    ],
)
def test_an_impossible_request_is_refused_with_its_flag(
    values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        request_of(**values)


@pytest.mark.parametrize("threads", [0, 100_000])
def test_threads_are_at_most_the_cores(threads: int) -> None:
    assert request_of(threads=threads).threads == usable_cores()
    assert request_of(threads=1).threads == 1


def test_the_gap_is_computed_unless_another_is_asked_for() -> None:
    assert request_of().compute_gap == ALWAYS


def test_the_texts_of_several_outcomes_are_joined() -> None:
    chosen = request_of(outcome=("icu", "death"))
    assert chosen.parts == ["death", "icu"]
    assert chosen.outcome_text.outcome == "In-hospital death or ICU admission"
    assert request_of().outcome_text.outcome == "Escalation"
    assert request_of().parts == list(OUTCOMES)
