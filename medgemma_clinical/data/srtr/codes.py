"""The codes and columns of SRTR's Standard Analysis Files (SAF), and the features of each organ."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medgemma_clinical.data.feature import Feature

# Removal codes; all others count as removal for another reason. Source: SRTR SAF, CAN_REM_CD.
DIED = 8
ADVERSE = frozenset({DIED, 13})  # 13: deteriorated, too sick
TRANSPLANT = frozenset({4, 14, 15, 18, 19, 21, 22, 23, 43, 45})  # 21, 23: died in the procedure
IMPROVED = 12  # so that a transplant is not needed
ERROR = frozenset({10, 11, 16})  # listed in error, for antigens only, removed in error
KNOWN = ADVERSE | TRANSPLANT | ERROR | {IMPROVED, 5, 6, 7, 9, 17, 20, 24, 40}

# Other codes mean not measured. Source: SRTR SAF, CANHX_STAT_CD, CANHX_SRTR_LAB_MELD.
ACTIVE = (4010, 4050, 4060, 6010, 6011, 6012, *range(6101, 6300))  # a liver's score: active
HISTORY_CODES: dict[str, dict[int, int]] = {
    "CANHX_STAT_CD": {**dict.fromkeys(ACTIVE, 1), **dict.fromkeys((4099, 4999, 6999), 0)},
    # 22 in place of 6222: a converted file
    "CANHX_SRTR_LAB_MELD": {code: meld for meld in range(6, 61) for code in (6200 + meld, meld)},
}
"""Value of each code of the coded columns of the history."""

DIABETES = {1: "no diabetes", 2: "type 1 diabetes", 3: "type 2 diabetes", 4: "diabetes"}
"""5 is of unknown type, 998 unknown. Source: OPTN form codes (believed for CAN_DIAB of the SAF)."""

ANY_DIABETES, TYPE_1 = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1}, {1: 0, 2: 1, 3: 0, 4: 0}
"""Values of each code of ``DIABETES`` as static features."""

BLOOD_GROUPS = {"A": "A", "A1": "A", "A2": "A", "B": "B", "AB": "AB", "O": "O"}

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
        (*TEXT_COLUMNS[2:], "CAN_BMI", "CAN_DIAB", "CAN_PREV_TX"),
        "context and static features lack it",
    ),
}
"""Columns of CAND_* and what their absence costs; empty where they are required."""

CREATININE, BILIRUBIN = (0.6, 1.2), (None, 1.0)
"""Reference ranges in mg/dL. Source: MSD Manual, table Blood Tests."""
ALBUMIN = (3.5, 5.5)
"""In g/dL. Source: American Board of Internal Medicine, laboratory test reference ranges."""
GFR = (60.0, None)
"""In mL/min: from there on the GFR is not decreased. Source: KDIGO 2012, categories G1 and G2."""
SODIUM = (135.0, 145.0)
"""In mEq/L. Source: hyponatraemia, Spasovski 2014; hypernatraemia, Adrogué and Madias 2000."""

YES_NO, ACTIVITY = {0: "no", 1: "yes"}, {0: "inactive", 1: "active"}
GRADES = {1: "none", 2: "slight", 3: "marked"}

LABORATORY = (
    Feature("creatinine", "mg/dL", ("CANHX_SERUM_CREAT",), (0.1, 30), CREATININE),
    Feature("albumin", "g/dL", ("CANHX_ALBUMIN",), (0.5, 7), ALBUMIN),
    Feature("GFR", "mL/min", ("CANHX_GFR",), (0, 200), GFR),
)
DIALYSIS = Feature("dialysis", "0 or 1", ("CANHX_DIAL",), (0, 1), words=YES_NO)
STATUS = Feature("status", "0 or 1", ("CANHX_STAT_CD",), (0, 1), words=ACTIVITY)
KIDNEY = (*LABORATORY, DIALYSIS, STATUS, Feature("cPRA", "fraction", ("CANHX_CPRA",), (0, 1)))
LIVER = (
    *LABORATORY,
    replace(DIALYSIS, keys=("CANHX_DIAL_PRIOR_WEEK",)),
    Feature("bilirubin", "mg/dL", ("CANHX_BILI",), (0.1, 80), BILIRUBIN),
    Feature("INR", "ratio", ("CANHX_INR",), (0.4, 20)),
    Feature("sodium", "mEq/L", ("CANHX_SERUM_SODIUM",), (100, 180), SODIUM),
    Feature("MELD", "score", ("CANHX_SRTR_LAB_MELD",), (6, 60)),
    Feature("ascites", "grade", ("CANHX_ASCITES",), (1, 3), words=GRADES),
    Feature("encephalopathy", "grade", ("CANHX_ENCEPH",), (1, 3), words=GRADES),
    STATUS,
)


@dataclass(frozen=True)
class Organ:
    """What differs between organs."""

    suffix: str  # of the names of its tables
    code: str  # in WL_ORG
    days: int  # default landmark and horizon, and the encoder's unit of time
    main: str  # name of the feature that stands for the others in a short text
    features: tuple[Feature, ...]  # the key of each is its column of STATHIST


ORGANS = {
    "kidney": Organ("kipa", "KI", 365, "GFR", KIDNEY),
    "liver": Organ("liin", "LI", 90, "MELD", LIVER),
}
