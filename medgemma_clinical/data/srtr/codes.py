"""The codes and columns of SRTR's Standard Analysis Files (SAF), and the series of each organ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from medgemma_clinical.data.texts import Reference, plain

# Removal codes; all others count as removal for another reason. Source: SRTR SAF, CAN_REM_CD.
DIED = 8
ADVERSE = frozenset({DIED, 13})  # 13: deteriorated, too sick
TRANSPLANT = frozenset({4, 14, 15, 18, 19, 21, 22, 23, 43, 45})  # 21, 23: died in the procedure
ERROR = frozenset({10, 11, 16})  # listed in error, for antigens only, removed in error
KNOWN = ADVERSE | TRANSPLANT | ERROR | {5, 6, 7, 9, 12, 17, 20, 24, 40}

# Value of each code; other codes mean not measured. Source: SRTR SAF, CANHX_STAT_CD.
ACTIVE = (4010, 4050, 4060, 6010, 6011, 6012, *range(6101, 6300))  # a liver's score: active
STATUS_CODES = {**dict.fromkeys(ACTIVE, 1), **dict.fromkeys((4099, 4999, 6999), 0)}
MELD_CODES = {code: m for m in range(6, 61) for code in (6200 + m, m)}  # m: a converted file

YES_NO = {0: "no", 1: "yes"}
STATUS_WORDS = {0: "inactive", 1: "active"}
GRADES = {1: "none", 2: "slight", 3: "marked"}

DIABETES = {1: "no diabetes", 2: "type 1 diabetes", 3: "type 2 diabetes", 4: "diabetes"}
"""5 is of unknown type, 998 unknown. Source: OPTN form codes (believed for CAN_DIAB of the SAF)."""

ANY_DIABETES, TYPE_1 = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1}, {1: 0, 2: 1, 3: 0, 4: 0}
"""Values of each code of ``DIABETES`` as facts."""

BLOOD_GROUPS = {"A": "A", "A1": "A", "A2": "A", "B": "B", "AB": "AB", "O": "O"}
LEAST_BMI, LARGEST_BMI = 10, 80

LARGEST_VALUE = 1e6
"""No laboratory value is larger; beyond it a cell counts as not measured."""

TEXT_COLUMNS = ("WL_ORG", "CAN_SOURCE", "CAN_GENDER", "CAN_ABO")
DATE_ENDINGS = ("_DT", "_ENDWLFU")
DEATHS = ["CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"]
KEYS = ("PX_ID", "PERS_ID", "WL_ORG", "CAN_LISTING_DT", "CAN_REM_CD", "CAN_REM_DT")
CAND_COLUMNS = {
    **dict.fromkeys(KEYS, ""),
    "CAN_SOURCE": "living donor recipients who were never listed stay in",
    "CAN_ENDWLFU": "registrations that still wait count as followed to the table's last day",
    **dict.fromkeys(DEATHS, "deaths that only this column records are not seen"),
    "REC_TX_DT": "transplants are known by the removal code alone",
    "CAN_AGE_IN_MONTHS_AT_LISTING": "ages are unknown and children stay in",
    "CAN_DIAL_DT": "dialysis is known from the history alone, its years not at all",
    "CAN_GFR": "GFR is known from the history alone",
    "CAN_GFR_DT": "CAN_GFR is undated, so it is not used",
    **dict.fromkeys(
        (*TEXT_COLUMNS[2:], "CAN_BMI", "CAN_DIAB", "CAN_PREV_TX"), "text and facts lack it"
    ),
}
"""Columns of CAND_* and what their absence costs; empty where they are required."""


@dataclass(frozen=True)
class Feature:
    """One series.

    Attributes:
        name: in texts.
        unit: of its values.
        column: in STATHIST.
        low: lowest plausible value.
        high: highest plausible value.
        words: for values, where the series is a state or a grade.
        codes: value of each code, where the column is coded.
        reference: lowest and highest value of a healthy adult, see ``CREATININE`` and the others.
    """

    name: str
    unit: str
    column: str
    low: float
    high: float
    words: dict[int, str] | None = None
    codes: dict[int, int] | None = None
    reference: Reference | None = None

    def decode(self, column: pd.Series) -> pd.Series:
        """Return the values of a column of STATHIST, NaN where nothing was measured."""
        if self.codes:
            return column.map(self.codes)
        return column.where(
            column.isin(self.words) if self.words else column.abs() <= LARGEST_VALUE
        )

    def text(self, value: float) -> str:
        """Return one value: a word where there is one, a number otherwise."""
        return self.words[int(value)] if self.words else plain(value)


@dataclass(frozen=True)
class Organ:
    """What differs between organs.

    Attributes:
        suffix: of the tables' names.
        code: in WL_ORG.
        days: default landmark and horizon, and the encoder's unit of time.
        main: the series that stands for the others in a short text.
        features: all series.
    """

    suffix: str
    code: str
    days: int
    main: str
    features: tuple[Feature, ...]


CREATININE, BILIRUBIN = (0.6, 1.2), (None, 1.0)
"""Reference ranges in mg/dL. Source: MSD Manual, table Blood Tests."""
ALBUMIN = (3.5, 5.5)
"""In g/dL. Source: American Board of Internal Medicine, laboratory test reference ranges."""
GFR = (60.0, None)
"""In mL/min: from there on the GFR is not decreased. Source: KDIGO 2012, categories G1 and G2."""
SODIUM = (135.0, 145.0)
"""In mEq/L. Source: hyponatraemia, Spasovski 2014; hypernatraemia, Adrogué and Madias 2000."""

LABORATORY = (
    Feature("creatinine", "mg/dL", "CANHX_SERUM_CREAT", 0.1, 30, reference=CREATININE),
    Feature("albumin", "g/dL", "CANHX_ALBUMIN", 0.5, 7, reference=ALBUMIN),
    Feature("GFR", "mL/min", "CANHX_GFR", 0, 200, reference=GFR),
)
DIALYSIS = Feature("dialysis", "0 or 1", "CANHX_DIAL", 0, 1, YES_NO)
STATUS = Feature("status", "0 or 1", "CANHX_STAT_CD", 0, 1, STATUS_WORDS, STATUS_CODES)
CPRA = Feature("cPRA", "fraction", "CANHX_CPRA", 0, 1)
LIVER_FEATURES = (
    *LABORATORY,
    replace(DIALYSIS, column="CANHX_DIAL_PRIOR_WEEK"),
    Feature("bilirubin", "mg/dL", "CANHX_BILI", 0.1, 80, reference=BILIRUBIN),
    Feature("INR", "ratio", "CANHX_INR", 0.4, 20),
    Feature("sodium", "mEq/L", "CANHX_SERUM_SODIUM", 100, 180, reference=SODIUM),
    Feature("MELD", "score", "CANHX_SRTR_LAB_MELD", 6, 60, codes=MELD_CODES),
    Feature("ascites", "grade", "CANHX_ASCITES", 1, 3, GRADES),
    Feature("encephalopathy", "grade", "CANHX_ENCEPH", 1, 3, GRADES),
    STATUS,
)
ORGANS = {
    "kidney": Organ("kipa", "KI", 365, "GFR", (*LABORATORY, DIALYSIS, STATUS, CPRA)),
    "liver": Organ("liin", "LI", 90, "MELD", LIVER_FEATURES),
}
