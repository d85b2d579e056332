"""What may be asked of MIMIC-IV: cohorts, outcomes, anion gaps, times; and their definitions.

The definitions go into the description beside the extracted file, letter by letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from medgemma_clinical.data.duck import TableRequest

GAP_ITEM = 50868
"""Item of the anion gap that the laboratory reports. Source: d_labitems of MIMIC-IV."""

COMPUTED_GAP = -1
"""Item of the computed anion gap, which MIMIC-IV does not have."""

LONGEST_HOURS = 1e6
"""114 years: no window or horizon is longer."""

COHORTS = {
    "dka": (
        "adult admissions coded as diabetic ketoacidosis (ICD-9-CM 250.1x; ICD-10-CM E08.1x, "
        "E09.1x, E10.1x, E11.1x, E13.1x). Codes are given at discharge: this cohort is chosen in "
        "hindsight, and a model of it cannot be used at a bedside as it is"
    ),
    "all": "all adult admissions with enough values",
    "biochemical": (
        "adult admissions with, among the values known within the window, glucose above 250 mg/dL, "
        "bicarbonate at most 18 mEq/L, an anion gap above 12 mEq/L and, where any pH is known, one "
        "of at most 7.30 (ketones are not asked for)"
    ),
}
"""Definition of each cohort. Source of biochemical: Kitabchi 2009, diagnosis, with the anion gap
of moderate ketoacidosis and without ketones."""


@dataclass(frozen=True)
class OutcomeText:
    """Texts of one outcome: its name in a report, the end of its question, its definition."""

    outcome: str
    question: str
    definition: str


OUTCOMES = {
    "death": OutcomeText(
        "In-hospital death",
        "die in hospital",
        "death in this hospital admission within the horizon (its time, or the time of discharge "
        "where only that is known). A discharge alive counts 0",
    ),
    "icu": OutcomeText(
        "ICU admission",
        "be admitted to an intensive care unit",
        "a stay in intensive care that begins within the horizon, in this admission; not asked "
        "of a patient who is in intensive care at the prediction time (empty)",
    ),
    "unresolved": OutcomeText(
        "Anion gap not resolved",
        "keep or regain an anion gap above 12 mEq/L",
        "of a gap above 12 mEq/L at the prediction time: no value at or below 12 within the "
        "horizon, or one and a later value above it; of a closed one: a value above 12 within the "
        "horizon. A death with a gap that is not known to be closed counts 1. A discharge alive "
        "with a gap that was open all along counts 0: a competing event. Not known (empty) where "
        "the patient is in hospital for the whole horizon and the gap is not measured in it",
    ),
}
"""The components of escalation, which is any of them."""

ESCALATION = OutcomeText(
    "Escalation", "need escalation of care", "any of death, icu and unresolved"
)

REPORTED, MISSING, ALWAYS = "reported", "missing", "always"
GAPS = {
    REPORTED: (
        "as the laboratory reports it: in MIMIC-IV (item 50868) mostly with potassium and so about "
        "4 mEq/L above sodium - chloride - bicarbonate, in eICU so in some hospitals"
    ),
    MISSING: (
        "as the laboratory reports it (often with potassium), and sodium - chloride - "
        "bicarbonate in admissions without a reported one"
    ),
    ALWAYS: "sodium - chloride - bicarbonate, without potassium as in guidelines, for everyone",
}
"""Definition of the anion gap for each choice of whose gap is computed."""


NOT_ESCALATED, EXCLUDE = "not_escalated", "exclude"
DISCHARGED = {
    NOT_ESCALATED: (
        "a patient who is discharged alive within the horizon, without an event before, counts as "
        "not escalated: a competing event"
    ),
    EXCLUDE: (
        "patients who are discharged alive within the horizon are left out, whatever happened "
        "before: the cohort is chosen by what follows the prediction time"
    ),
}
"""Definition of what a discharge alive within the horizon means, for each choice."""

ALL_SERIES, ESCALATED = "all", "escalation"


@dataclass(frozen=True, kw_only=True)
class CohortRequest(TableRequest):
    """A request for rows from the tables of a hospital: cohort, series, times, outcome.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    cohort: str
    series: tuple[str, ...]
    window_hours: float
    horizon_hours: float
    min_observations: int
    outcome: tuple[str, ...]
    discharged: str
    compute_gap: str

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("window_hours", "horizon_hours"):
            right = 0 < getattr(self, name) <= LONGEST_HOURS  # NaN compares false
            self.check(right, name, f"must be a number above 0, at most {LONGEST_HOURS:g}")
        self.check(self.min_observations >= 1, "min_observations", "must be at least 1")
        chosen = set(self.outcome) <= {ESCALATED, *OUTCOMES}
        self.check(chosen, "outcome", f"must be some of {', '.join([ESCALATED, *OUTCOMES])}")
        whole = ESCALATED in self.outcome and len(self.outcome) > 1
        self.check(bool(self.outcome) and not whole, "outcome", "name escalation, or its parts")

    @property
    def window(self) -> timedelta:
        """The window in whole seconds."""
        return timedelta(seconds=round(self.window_hours * 3600))

    @property
    def horizon(self) -> timedelta:
        """The horizon in whole seconds."""
        return timedelta(seconds=round(self.horizon_hours * 3600))

    @property
    def parts(self) -> list[str]:
        """The parts of the outcome, in the order of ``OUTCOMES``."""
        return [name for name in OUTCOMES if {name, ESCALATED} & set(self.outcome)]

    @property
    def outcome_text(self) -> OutcomeText:
        """The texts of the chosen outcome."""
        if len(self.parts) == len(OUTCOMES):
            return ESCALATION
        chosen = [OUTCOMES[name] for name in self.parts]
        return OutcomeText(
            outcome=" or ".join(text.outcome for text in chosen),
            question=" or ".join(text.question for text in chosen),
            definition=" or ".join(text.definition for text in chosen),
        )


@dataclass(frozen=True, kw_only=True)
class Extraction(CohortRequest):
    """A request for rows from MIMIC-IV."""

    mimic_dir: Path
    item: str

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        other = self.item != str(GAP_ITEM)
        self.check(not (self.series and other), "item", "does not go with --series")
