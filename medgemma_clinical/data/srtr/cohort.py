"""The cohort of a landmark: death or too sick for transplant, of who still waits.

Population: registrations of adults (18 at listing, or of unknown age) on the waiting list of one
    organ, kidney or liver, one row each; a candidate (PERS_ID) may have several.
Prediction time: a landmark after listing, day 365 (kidney) or 90 (liver), ``--landmark_days``.
Read: rows of STATHIST that began by the landmark, the last one before listing standing at day 0;
    of CAND what is known at listing (age, sex, blood group, BMI, diabetes, earlier transplant), and
    GFR and begin of dialysis where their date is not after the landmark.
Label: within the next 365 (kidney) or 90 (liver) days, ``--horizon_days``, death on the list or
    removal as too sick (CAN_REM_CD 8, 13). A transplant before is a competing event, 0; a death on
    the day of the transplant is one of the procedure. A death after removal does not count.
Times, with ``--outcome_kind time``: days from the landmark to that death or removal (1), a
    transplant (2), removal as improved (3, CAN_REM_CD 12) or for another reason (4), whichever ends
    the registration, by the same rules; 0 at the end of follow-up. Nobody is left out as
    transplanted or censored.
Exclusions, in this order: another organ; recipients of a living donor who were never listed; under
    18; listed or removed in error; an impossible date; no day of listing or removal; ended by the
    landmark; transplanted within the horizon (``--transplant exclude``); censored in it, by removal
    for another reason or by the end of follow-up, label unknown; no history row by the landmark.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import OUTCOME_KINDS
from medgemma_clinical.data.srtr import codes
from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, ORGANS, Organ
from medgemma_clinical.data.srtr.saf import BAD_DATE, read_saf
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

ADULT_YEARS, MAX_YEARS, MAX_DAYS, DAYS_A_YEAR = 18, 120, 36_500, 365.25
MIN_BMI, MAX_BMI = 10, 80
TRANSPLANT_CHOICES = ("negative", "exclude")
TRANSPLANTED, CENSORED = "transplanted within the horizon", "censored within the horizon"
NO_ROW = "no history row by the landmark"

END_NAMES = ("death or too sick", "transplant", "improved", "other removal")
"""What ends a registration, events 1 to 4; a transplant is an intervention."""
REMOVALS = ("apart", "together")
"""Whether events 3 and 4 are one: few registrations end as improved."""
ADVERSE_END, TRANSPLANT_END, IMPROVED_END, OTHER_END = range(1, len(END_NAMES) + 1)

AGE, SEX = "static_age [years]", "static_sex_male"
DIALYSIS_YEARS = "static_years_of_dialysis [years]"
"""Static features that baselines read too."""


@dataclass(frozen=True)
class CohortDefinition:
    """Who is asked what, and when; impossible values are refused."""

    organ_name: str  # one of ``ORGANS``
    landmark: int  # days after listing at which the question is asked
    horizon: int | Sequence[int]  # days that it looks ahead; of times perhaps several, rising
    transplant: str  # within the horizon: ``negative`` (label 0, a competing event) or ``exclude``
    outcome_kind: str = "label"  # ``label``, or ``time`` of each registration's end
    removals: str = "apart"  # of ``REMOVALS``

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value, choices in (
            ("organ", self.organ_name, tuple(ORGANS)),
            ("transplant", self.transplant, TRANSPLANT_CHOICES),
            ("outcome_kind", self.outcome_kind, OUTCOME_KINDS),
            ("removals", self.removals, REMOVALS),
        ):
            if value not in choices:
                raise InputError(f"--{name} {value}: must be one of {', '.join(choices)}")
        horizons = [("horizon", days, 1) for days in self.horizons]
        for name, days, least in (("landmark", self.landmark, 0), *horizons):
            if not least <= days <= MAX_DAYS:
                raise InputError(f"--{name}_days {days}: must be from {least} to {MAX_DAYS}")
        text = f"--horizon_days {','.join(map(str, self.horizons))}"
        if not self.horizons or [*self.horizons] != sorted({*self.horizons}):
            raise InputError(f"{text}: must be one or several rising numbers")
        if len(self.horizons) > 1 and not self.of_times:
            raise InputError(f"{text}: several need --outcome_kind time, a label has one")
        if self.of_times and self.transplant == "exclude":
            raise InputError("--transplant exclude: belongs to --outcome_kind label: leave it out")
        if not self.of_times and self.removals == "together":
            raise InputError("--removals together: belongs to --outcome_kind time: leave it out")

    @property
    def horizons(self) -> tuple[int, ...]:
        """All days at which risks are asked for."""
        return (self.horizon,) if isinstance(self.horizon, int) else tuple(self.horizon)

    @property
    def end_names(self) -> tuple[str, ...]:
        """Names of the events 1, 2, ... that end a registration."""
        return END_NAMES if self.removals == "apart" else (*END_NAMES[:2], "removal")

    @property
    def of_times(self) -> bool:
        """Whether the outcome is the time of each registration's end, not a label."""
        return self.outcome_kind == "time"

    @property
    def organ(self) -> Organ:
        """The organ's codes and features."""
        return ORGANS[self.organ_name]


def read_candidates(path: Path) -> pd.DataFrame:
    """Read CAND by ascending PX_ID, with plausible age and BMI; refuse differing rows of one."""
    cand = pd.concat(read_saf(path, CAND_COLUMNS), ignore_index=True)
    # CAN_DIAL_DT is not filled in: its absence decides where dialysis is read.
    missing = [name for name in CAND_COLUMNS if name not in cand and name != "CAN_DIAL_DT"]
    cand = cand.assign(**dict.fromkeys(missing, np.nan))
    keyed = cand[["PX_ID", "PERS_ID"]].abs().lt(np.inf).all(axis=1)
    if count := int((~keyed).sum()):
        logger.warning("%s: %d rows without PX_ID or PERS_ID: left out", path, count)
    if not keyed.any():
        raise InputError(f"{path}, columns PX_ID and PERS_ID: no row has both as numbers")
    cand = cand[keyed].drop_duplicates().astype({"PX_ID": np.int64, "PERS_ID": np.int64})
    if count := int(cand["PX_ID"].duplicated().sum()):
        raise InputError(
            f"{path}, column PX_ID: {count} registrations are repeated with different content: "
            "keep one row of each"
        )
    if count := int((~cand["CAN_REM_CD"].dropna().isin(codes.KNOWN)).sum()):
        message = "%s: %d unknown removal codes: counted as removal for another reason"
        logger.warning(message, path, count)
    age, bmi = cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12, cand["CAN_BMI"]
    cand = cand.assign(age=age.where(age.between(0, MAX_YEARS)))
    cand["bmi"] = bmi.where(bmi.between(MIN_BMI, MAX_BMI))
    return cand.set_index("PX_ID").sort_index()


def apply_criteria(cand: pd.DataFrame, definition: CohortDefinition) -> pd.DataFrame:
    """Return the first ``reason`` to leave a registration out, "" where kept, and its ``label``.

    Of times also ``event``, of ``END_NAMES`` or 0, and ``event_days`` from the landmark to it.
    Source: SRTR SAF data dictionary; landmarking, van Houwelingen 2007.
    """
    ends = _ends(cand)
    days, event = ends["day"] - cand["CAN_LISTING_DT"], ends["event"]
    # No horizon ends the wait for an event whose time is asked for.
    within = definition.of_times | (days <= definition.landmark + definition.horizons[-1])
    excluded = within & (event == TRANSPLANT_END) & (definition.transplant == "exclude")
    is_known = event.isin([ADVERSE_END, TRANSPLANT_END]) | definition.of_times
    censored = within & ~is_known
    rules = {
        "other organ": cand["WL_ORG"] != definition.organ.code,
        "living donor recipient, never listed": cand["CAN_SOURCE"] == "L",
        "under 18": cand["age"] < ADULT_YEARS,
        "removed: listed or removed in error": cand["CAN_REM_CD"].isin(codes.ERROR),
        "an impossible date": cand[BAD_DATE],
        "no day of listing or removal": days.isna(),
        "ended by the landmark": days <= definition.landmark,
        TRANSPLANTED: excluded,
        CENSORED: censored,
        NO_ROW: pd.Series(False, index=cand.index),  # known when the history is read
    }
    reason = np.select([rule.to_numpy() for rule in rules.values()], list(rules), default="")
    reasons = pd.Categorical(reason, categories=["", *rules])
    label = (within & (event == ADVERSE_END)).astype(float).mask(excluded | censored)
    table = pd.DataFrame({"reason": reasons, "label": label}, index=cand.index)
    if not definition.of_times:
        return table
    event = event.clip(upper=len(definition.end_names)).astype(float)
    return table.assign(event=event, event_days=days - definition.landmark)


def _ends(cand: pd.DataFrame) -> pd.DataFrame:
    """Find ``day`` and ``event`` of each end: removal (else last follow-up), transplant, death."""
    code, followed = cand["CAN_REM_CD"], cand["CAN_ENDWLFU"]
    last_day = cand[["CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU"]].max(axis=None)
    followed = followed.where(followed.notna() | code.notna(), last_day)
    death = cand[codes.DEATHS].min(axis=1)
    removed = cand["CAN_REM_DT"].fillna(death.where(code == codes.DIED))
    removed = removed.fillna(followed.where(cand["REC_TX_DT"].isna()))
    transplants = [cand["REC_TX_DT"], removed.where(code.isin(codes.TRANSPLANT))]
    transplant = pd.concat(transplants, axis=1).min(axis=1)
    end = pd.concat([removed, transplant], axis=1).min(axis=1)
    death = death.where(death <= end)
    end = death.fillna(end)
    is_removed = code.notna() & (removed == end)
    kinds = {
        TRANSPLANT_END: transplant == end,  # a death on that day is one of the procedure: 21, 23
        ADVERSE_END: (is_removed & code.isin(codes.ADVERSE)) | (death == end),
        IMPROVED_END: is_removed & (code == codes.IMPROVED),
        OTHER_END: is_removed,
    }
    return pd.DataFrame({"day": end, "event": np.select([*kinds.values()], [*kinds], default=0)})


def contexts(cohort: pd.DataFrame, definition: CohortDefinition) -> NDArray[np.object_]:
    """Write what was known at listing, and the days since: (N,) sentences without full stop."""
    text = cohort["age"].map(lambda age: "" if np.isnan(age) else f"{int(age)}-year-old ")
    text += cohort["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna("patient")
    text = text.str[:1].str.upper() + text.str[1:]
    blood = cohort["CAN_ABO"]
    for words in (
        "blood group " + blood.where(blood.isin(codes.BLOOD_GROUPS)).astype(object),
        cohort["bmi"].map(lambda bmi: f"BMI {plain(bmi)} kg/m2", na_action="ignore"),
        cohort["CAN_DIAB"].map(codes.DIABETES),
        cohort["CAN_PREV_TX"].map({0: "no earlier transplant", 1: "earlier transplant"}),
    ):
        text += (", " + words.astype(object)).fillna("")
    waited = f", on the {definition.organ_name} waiting list for {definition.landmark} days"
    return (text + waited).to_numpy(object)


def static_features(cohort: pd.DataFrame, definition: CohortDefinition) -> pd.DataFrame:
    """Return what was known of the candidates at the landmark as numbers, NaN where unknown."""
    blood = cohort["CAN_ABO"].map(codes.BLOOD_GROUPS)
    columns = {
        AGE: cohort["age"],
        SEX: cohort["CAN_GENDER"].map({"M": 1, "F": 0}),
        "static_bmi [kg/m2]": cohort["bmi"],
        "static_diabetes": cohort["CAN_DIAB"].map(codes.ANY_DIABETES),
        "static_type_1_diabetes": cohort["CAN_DIAB"].map(codes.TYPE_1),
        "static_earlier_transplant": cohort["CAN_PREV_TX"].map({0: 0, 1: 1}),
    }
    for group in ("A", "B", "AB", "O"):
        columns[f"static_blood_group_{group}"] = (blood == group).where(blood.notna())
    if definition.organ_name == "kidney":
        columns[DIALYSIS_YEARS] = pd.Series(np.nan, index=cohort.index)
        if "CAN_DIAL_DT" in cohort:  # a dialysis that begins after the landmark reads as none
            days = cohort["CAN_LISTING_DT"] + definition.landmark - cohort["CAN_DIAL_DT"]
            columns[DIALYSIS_YEARS] = days.clip(lower=0).fillna(0) / DAYS_A_YEAR
    return pd.DataFrame(columns).astype(float)
