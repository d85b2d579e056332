"""What may be asked of MIMIC-IV: cohorts, outcomes, anion gaps, times; and their definitions.

The definitions go into the description beside the extracted file, letter by letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgemma_clinical.files import InputError

GAP_ITEM = 50868
"""Item of the anion gap that the laboratory reports. Source: d_labitems of MIMIC-IV."""

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
        "death in this hospital admission within the horizon (deathtime; the time of discharge "
        "where only hospital_expire_flag says so). Whoever is discharged alive counts 0",
    ),
    "icu": OutcomeText(
        "ICU admission",
        "be admitted to an intensive care unit",
        "a stay in intensive care that begins within the horizon, in this admission; not asked of "
        "whoever is in intensive care at the prediction time (empty)",
    ),
    "unresolved": OutcomeText(
        "Anion gap not resolved",
        "keep or regain an anion gap above 12 mEq/L",
        "of a gap above 12 mEq/L at the prediction time: no value at or below 12 within the "
        "horizon, or one and a later value above it; of a closed one: a value above 12 within the "
        "horizon. Whoever dies with an open gap counts 1. Not known (empty) where an open gap is "
        "not measured again, or is not seen to close before a discharge within the horizon",
    ),
}
"""The components of escalation, which is any of them."""

ESCALATION = OutcomeText(
    "Escalation", "need escalation of care", "any of death, icu and unresolved"
)

REPORTED, MISSING, ALWAYS = "reported", "missing", "always"
GAPS = {
    REPORTED: (
        "as the laboratory reports it (item 50868), in MIMIC-IV mostly with potassium and so about "
        "4 mEq/L above sodium - chloride - bicarbonate"
    ),
    MISSING: (
        "as the laboratory reports it (item 50868; mostly with potassium), and sodium - chloride - "
        "bicarbonate in admissions without a reported one"
    ),
    ALWAYS: "sodium - chloride - bicarbonate, without potassium as in guidelines, for everyone",
}
"""Definition of the anion gap for each choice of whose gap is computed."""


@dataclass(frozen=True)
class Extraction:
    """A request for rows from MIMIC-IV.

    Attributes:
        mimic_dir: folder with hosp/ and icu/.
        out: CSV to write.
        cohort: one of ``COHORTS``.
        item: itemid of the series, or its name in d_labitems.
        window_hours: from the first value to the prediction time.
        horizon_hours: from the prediction time on.
        min_observations: least number of values known within the window.
        outcome: names of ``OUTCOMES``; all of them are escalation.
        compute_gap: one of ``GAPS``.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    mimic_dir: Path
    out: Path
    cohort: str = "dka"
    item: str = str(GAP_ITEM)
    window_hours: float = 12.0
    horizon_hours: float = 72.0
    min_observations: int = 2
    outcome: tuple[str, ...] = tuple(OUTCOMES)
    compute_gap: str = REPORTED

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("window_hours", "horizon_hours"):
            hours = getattr(self, name)
            if not 0 < hours <= LONGEST_HOURS:  # NaN compares false
                raise InputError(f"--{name} {hours}: must be a number above 0")
        if self.min_observations < 1:
            raise InputError(f"--min_observations {self.min_observations}: must be at least 1")
        _check_choice("cohort", self.cohort, tuple(COHORTS))
        _check_choice("compute_gap", self.compute_gap, tuple(GAPS))
        if not self.outcome:
            raise InputError("--outcome: must be escalation, or some of " + ", ".join(OUTCOMES))
        for name in self.outcome:
            _check_choice("outcome", name, tuple(OUTCOMES))

    @property
    def window(self) -> np.timedelta64:
        """The window in whole seconds."""
        return np.timedelta64(round(self.window_hours * 3600), "s")

    @property
    def horizon(self) -> np.timedelta64:
        """The horizon in whole seconds."""
        return np.timedelta64(round(self.horizon_hours * 3600), "s")

    @property
    def outcome_text(self) -> OutcomeText:
        """The texts of the chosen outcome."""
        if set(self.outcome) == set(OUTCOMES):
            return ESCALATION
        chosen = [OUTCOMES[name] for name in self.outcome]
        return OutcomeText(
            outcome=" or ".join(text.outcome for text in chosen),
            question=" or ".join(text.question for text in chosen),
            definition=" or ".join(text.definition for text in chosen),
        )


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"--{flag} {value}: must be one of {', '.join(choices)}")
