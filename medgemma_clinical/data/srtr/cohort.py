"""The registrations on a waiting list: who is asked at the landmark, and with which label."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.srtr.codes import (
    ADVERSE,
    ANY_DIABETES,
    BLOOD_GROUPS,
    CAND_COLUMNS,
    DEATHS,
    DIABETES,
    DIED,
    ERROR,
    KNOWN,
    LARGEST_BMI,
    LEAST_BMI,
    ORGANS,
    TRANSPLANT,
    TYPE_1,
    Organ,
)
from medgemma_clinical.data.srtr.decode import BAD_DATE, read_saf
from medgemma_clinical.data.srtr.files import SafFile
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

ADULT_YEARS, OLDEST_YEARS = 18, 120
NO_ROW = "no history row by the landmark"
TRANSPLANT_CHOICES = ("negative", "exclude")

AGE, MALE, DIALYSIS_YEARS = "age at listing [years]", "male", "dialysis [years]"
"""Facts that reports and baselines read too."""

DAYS_A_YEAR = 365.25

LONGEST_DAYS = 36_500
"""A landmark or horizon of a hundred years."""


@dataclass(frozen=True)
class CohortDefinition:
    """Who is asked what, and when.

    Attributes:
        organ_name: one of ``ORGANS``.
        landmark: days after listing at which the registration is asked about.
        horizon: days that it looks ahead.
        transplant: ``negative`` (a transplant within the horizon is label 0, a competing event) or
            ``exclude`` (it leaves the cohort).

    Raises:
        InputError: an impossible value.
    """

    organ_name: str
    landmark: int
    horizon: int
    transplant: str

    def __post_init__(self) -> None:
        """Check the values."""
        wordings = {"organ": self.organ_name, "transplant": self.transplant}
        choices = {"organ": tuple(ORGANS), "transplant": TRANSPLANT_CHOICES}
        for name, word in wordings.items():
            if word not in choices[name]:
                raise InputError(f"--{name} {word}: must be one of {', '.join(choices[name])}")
        for name, days, least in (("landmark", self.landmark, 0), ("horizon", self.horizon, 1)):
            if not least <= days <= LONGEST_DAYS:
                raise InputError(f"--{name}_days {days}: must be from {least} to {LONGEST_DAYS}")

    @property
    def organ(self) -> Organ:
        """The organ's codes and series."""
        return ORGANS[self.organ_name]


def read_candidates(file: SafFile) -> pd.DataFrame:
    """Read CAND, one row a registration, by ascending PX_ID; adds the age at listing in years.

    Raises:
        InputError: as ``read_saf``, or a PX_ID with two different rows.
    """
    cand = pd.concat(read_saf(file, CAND_COLUMNS), ignore_index=True)
    keyed = cand[["PX_ID", "PERS_ID"]].abs().lt(np.inf).all(axis=1)
    if not keyed.all():
        count = int((~keyed).sum())
        logger.warning("%s: %d rows without PX_ID or PERS_ID: left out", file.path, count)
    if not keyed.any():
        raise InputError(f"{file.path}, columns PX_ID and PERS_ID: no row has both as numbers")
    cand = cand[keyed].drop_duplicates().astype({"PX_ID": np.int64, "PERS_ID": np.int64})
    if repeated := int(cand["PX_ID"].duplicated().sum()):
        raise InputError(
            f"{file.path}, column PX_ID: {repeated} registrations are there again with different "
            "content: leave one row each"
        )
    if unknown := int((~cand["CAN_REM_CD"].dropna().isin(KNOWN)).sum()):
        message = "%s: %d unknown removal codes: counted as removal for another reason"
        logger.warning(message, file.path, unknown)
    age = cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12
    cand = cand.assign(age=age.where(age.between(0, OLDEST_YEARS)))
    return cand.set_index("PX_ID").sort_index()


def judge(
    cand: pd.DataFrame, definition: CohortDefinition, *, require_labels: bool = True
) -> pd.DataFrame:
    """Decide for each registration why it is left out, or its label.

    Args:
        cand: from ``read_candidates``.
        definition: organ, landmark, horizon and the meaning of a transplant.
        require_labels: leave out registrations whose label is unknown because of what follows the
            landmark; False keeps them.

    Returns:
        For each row ``reason`` ("" where kept) and ``label``, NaN where unknown.

    Source: SRTR SAF data dictionary; landmarking, van Houwelingen 2007.
    """
    ends = _ends(cand)
    days = ends["day"] - cand["CAN_LISTING_DT"]
    landmark = definition.landmark
    within = days <= landmark + definition.horizon
    excluded = within & ends["competing"] & (definition.transplant == "exclude")
    censored = within & ~ends["adverse"] & ~ends["competing"]
    rules = {
        "other organ": cand["WL_ORG"] != definition.organ.code,
        "living donor recipient, never listed": cand["CAN_SOURCE"] == "L",
        "under 18": cand["age"] < ADULT_YEARS,
        "removed: listed or removed in error": cand["CAN_REM_CD"].isin(ERROR),
        "an impossible date": cand[BAD_DATE],
        "no day of listing or removal": days.isna(),
        "ended by the landmark": days <= landmark,
        "transplanted within the horizon": excluded & require_labels,
        "censored within the horizon": censored & require_labels,
        NO_ROW: pd.Series(False, index=cand.index),  # known when the history is read
    }
    reason = np.select([rule.to_numpy() for rule in rules.values()], list(rules), default="")
    reasons = pd.Categorical(reason, categories=["", *rules])
    label = (within & ends["adverse"]).astype(float).mask(excluded | censored)
    return pd.DataFrame({"reason": reasons, "label": label}, index=cand.index)


def _ends(cand: pd.DataFrame) -> pd.DataFrame:
    """Find how each registration ends: removal (else last follow-up), transplant or death.

    Returns:
        ``day`` (NaN where unknown), ``competing`` (by transplant), ``adverse`` (death, too sick).
    """
    code, followed = cand["CAN_REM_CD"], cand["CAN_ENDWLFU"]
    last_day = cand[["CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU"]].max(axis=None)
    followed = followed.where(followed.notna() | code.notna(), last_day)
    death = cand[DEATHS].min(axis=1)
    removed = cand["CAN_REM_DT"].fillna(death.where(code == DIED))
    removed = removed.fillna(followed.where(cand["REC_TX_DT"].isna()))
    transplants = [cand["REC_TX_DT"], removed.where(code.isin(TRANSPLANT))]
    transplant = pd.concat(transplants, axis=1).min(axis=1)
    end = pd.concat([removed, transplant], axis=1).min(axis=1)
    death = death.where(death <= end)
    end = death.fillna(end)
    competing = transplant == end  # a death on that day is one of the procedure, as codes 21, 23
    too_sick = code.isin(ADVERSE) & (removed == end)
    return pd.DataFrame(
        {"day": end, "competing": competing, "adverse": ~competing & (too_sick | (death == end))}
    )


def contexts(cohort: pd.DataFrame, definition: CohortDefinition) -> NDArray[np.object_]:
    """Write what was known at listing, and the days since: (N,) sentences without full stop."""
    text = cohort["age"].map(lambda age: "" if np.isnan(age) else f"{int(age)}-year-old ")
    text += cohort["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna("patient")
    text = text.str[:1].str.upper() + text.str[1:]
    blood = cohort["CAN_ABO"]
    facts = [
        "blood group " + blood.where(blood.isin(BLOOD_GROUPS)).astype(object),
        _plausible_bmi(cohort).map(lambda b: f"BMI {plain(b)} kg/m2", na_action="ignore"),
        cohort["CAN_DIAB"].map(DIABETES),
        cohort["CAN_PREV_TX"].map({0: "no earlier transplant", 1: "earlier transplant"}),
    ]
    for fact in facts:
        text += (", " + fact.astype(object)).fillna("")
    waited = f", on the {definition.organ_name} waiting list for {definition.landmark} days"
    return (text + waited).to_numpy(object)


def statics(cohort: pd.DataFrame, definition: CohortDefinition, *, dated: bool) -> pd.DataFrame:
    """Return what was known of the candidates at the landmark as numbers, NaN where unknown.

    A dialysis that begins after the landmark reads exactly as none: 0 years.

    Args:
        cohort: from ``read_candidates``.
        definition: organ and landmark.
        dated: whether the table has CAN_DIAL_DT; without it the years are unknown.
    """
    blood = cohort["CAN_ABO"].map(BLOOD_GROUPS)
    facts = {
        AGE: cohort["age"],
        MALE: cohort["CAN_GENDER"].map({"M": 1, "F": 0}),
        "BMI [kg/m2]": _plausible_bmi(cohort),
        "diabetes": cohort["CAN_DIAB"].map(ANY_DIABETES),
        "type 1 diabetes": cohort["CAN_DIAB"].map(TYPE_1),
        "earlier transplant": cohort["CAN_PREV_TX"].map({0: 0, 1: 1}),
    }
    for group in ("A", "B", "AB", "O"):
        facts[f"blood group {group}"] = (blood == group).where(blood.notna())
    if definition.organ_name == "kidney":
        dialysed = cohort["CAN_LISTING_DT"] + definition.landmark - cohort["CAN_DIAL_DT"]
        years = dialysed.clip(lower=0).fillna(0 if dated else np.nan) / DAYS_A_YEAR
        facts[DIALYSIS_YEARS] = years
    return pd.DataFrame(facts).astype(float)


def _plausible_bmi(cohort: pd.DataFrame) -> pd.Series:
    return cohort["CAN_BMI"].where(cohort["CAN_BMI"].between(LEAST_BMI, LARGEST_BMI))
