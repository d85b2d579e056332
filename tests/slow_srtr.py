"""SRTR's cohort read slowly: the rules again, one registration after another."""

import numpy as np
import pandas as pd

DAYS = {"kidney": 365, "liver": 90}
CODES = {"kidney": "KI", "liver": "LI"}
TRANSPLANT = (4, 14, 15, 18, 19, 21, 22, 23, 43, 45)
DEATHS = ("CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT")
IMPOSSIBLE = (-30000.0, 45000.0)


def decide_slowly(cand, history, organ, landmark=None, horizon=None, *, exclude=False, times=False):
    """Return by PX_ID why each registration is left out, or its label; of times event and days."""
    landmark = DAYS[organ] if landmark is None else landmark
    horizon = DAYS[organ] if horizon is None else horizon
    begins = history.groupby("PX_ID")["CANHX_BEGIN_DT"].min().to_dict()
    known = [c for c in ("CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU") if c in cand]
    dates = cand[known].to_numpy(float)
    last = np.nanmax(np.where((dates > 0) & (dates < 30_000), dates, np.nan))
    result = {}
    for row in cand.to_dict("records"):
        known = {name: value for name, value in row.items() if pd.notna(value)}
        begin = begins.get(row["PX_ID"], np.inf)
        result[int(row["PX_ID"])] = decide_one(
            known, begin, last, CODES[organ], landmark, horizon, exclude=exclude, times=times
        )
    return result


def decide_one(row, begin, last, organ, landmark, horizon, *, exclude, times):
    code, removal, graft = map(row.get, ("CAN_REM_CD", "CAN_REM_DT", "REC_TX_DT"))
    if row.get("WL_ORG") != organ:
        return "other organ"
    if row.get("CAN_SOURCE") == "L":
        return "living donor recipient, never listed"
    if row.get("CAN_AGE_IN_MONTHS_AT_LISTING", 216) < 216:
        return "under 18"
    if code in (10, 11, 16):
        return "removed: listed or removed in error"
    if any(abs(removal - day) < 5000 for day in IMPOSSIBLE if removal is not None):
        return "an impossible date"
    kind = "event" if code in (8, 13) else "transplant" if code in TRANSPLANT else "other"
    end = removal
    if graft is not None and (removal is None or graft < removal):
        end, kind = graft, "transplant"
    elif graft is not None and graft == removal:
        kind = "transplant"
    death = min((row[name] for name in DEATHS if name in row), default=None)
    if removal is None and code == 8 and death is not None and (graft is None or death < graft):
        end, kind = death, "event"
    if end is None:
        end = row.get("CAN_ENDWLFU")
    if end is None and code is None:
        end = last
    if death is not None and end is not None and death <= end:
        end, kind = death, kind if death == end and kind == "transplant" else "event"
    if end is None or "CAN_LISTING_DT" not in row:
        return "no day of listing or removal"
    days = end - row["CAN_LISTING_DT"]
    if days <= landmark:
        return "ended by the landmark"
    within = days <= landmark + horizon and not times
    if within and kind == "transplant" and exclude:
        return "transplanted within the horizon"
    if within and kind == "other":
        return "censored within the horizon"
    if not begin <= row["CAN_LISTING_DT"] + landmark:
        return "no history row by the landmark"
    if times:
        other = 0 if code is None else 3 if code == 12 else 4
        return {"event": 1, "transplant": 2, "other": other}[kind], days - landmark
    return float(within and kind == "event")
