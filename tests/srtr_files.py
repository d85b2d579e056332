"""Synthetic SRTR folders for tests and benchmark: hand-written rows, random tables, any form.

No real patient. Days count from 1960-01-01 as in SAS; a test asks for the form of the dates.
"""

from pathlib import Path

import numpy as np
import pandas as pd

SYNTHETIC = Path(__file__).parent / "data" / "srtr_saf"
EPOCH = pd.Timestamp("1960-01-01")
LISTED = 20000
"""Listing day of hand-written registrations: 2014-10-04."""

LAST_DAY = 23500
"""Last day of synthetic follow-up: 2024-05-04."""

SUFFIX = {"kidney": "kipa", "liver": "liin"}
CODE = {"kidney": "KI", "liver": "LI"}
DATE_COLUMNS = ("_DT", "CAN_ENDWLFU")
DEATHS = ("CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT")
LABELS = {
    "WL_ORG": {"KI": "Kidney", "LI": "Liver", "KP": "Kidney: Pancreas", "IN": "Intestine"},
    "CAN_REM_CD": {8: "Candidate died", 13: "Too sick to transplant", 4: "Deceased donor tx"},
    "CANHX_STAT_CD": {4010: "Active", 6999: "Temporarily inactive"},
    "CAN_GENDER": {"M": "Male", "F": "Female"},
}
DATE_FORMATS = {
    "iso": "%Y-%m-%d",
    "mdy4": "%m/%d/%Y",
    "mdy2": "%m/%d/%y",
    "ddmonyyyy": "%d%b%Y",
    "ddmonyy": "%d%b%y",
    "isotime": "%Y-%m-%d 00:00:00",
}


def candidate(px, organ="liver", /, **columns):
    """Return a CAND row of an adult who still waits on day 1000."""
    about = {"CAN_SOURCE": "A", "CAN_LISTING_DT": LISTED, "CAN_ENDWLFU": LISTED + 1000}
    about |= {"CAN_AGE_IN_MONTHS_AT_LISTING": 600, "CAN_GENDER": "F", "CAN_ABO": "O"}
    about |= {"CAN_BMI": 25.5, "CAN_DIAB": 1, "CAN_PREV_TX": 0, "WL_ORG": CODE[organ]}
    about |= dict.fromkeys(("CAN_REM_CD", "CAN_REM_DT", "REC_TX_DT", *DEATHS))
    return {"PX_ID": px, "PERS_ID": px + 500_000, **about, **columns}


def history_row(px, day, organ="liver", **columns):
    """Return a STATHIST row that begins so many days after ``LISTED``."""
    measured = {"CANHX_STAT_CD": 6215, "CANHX_SRTR_LAB_MELD": 6215}
    if organ == "kidney":
        measured = {"CANHX_STAT_CD": 4010, "CANHX_CPRA": 0.2}
    return {"PX_ID": px, "CANHX_BEGIN_DT": LISTED + day, **measured, **columns}


def filler(organ="liver", events=12):
    """Return registrations without which no data set may be read: as many events as others."""
    soon = LISTED + (100 if organ == "liver" else 400)
    died = {"CAN_REM_CD": 8, "CAN_REM_DT": soon, "CAN_DEATH_DT": soon, "CAN_ENDWLFU": soon}
    ids = range(900_000, 900_000 + 2 * events)
    cand = [candidate(px, organ, **(died if px % 2 else {})) for px in ids]
    return cand, [history_row(px, 0, organ) for px in ids]


def removed(code, day, px=1, **more):
    """Return a registration that is removed so many days after listing."""
    end = {"CAN_REM_CD": code, "CAN_REM_DT": LISTED + day, "CAN_ENDWLFU": LISTED + day}
    return candidate(px, **{**end, **more})


def synthetic_tables(organ):
    """Return the tables of ``SYNTHETIC`` with dates as SAS days."""
    paths = (SYNTHETIC / f"{name}_{SUFFIX[organ]}.sas7bdat" for name in ("cand", "stathist"))
    found = [pd.read_sas(path, encoding="latin-1") for path in paths]
    for table in found:
        for column in table.select_dtypes("datetime"):
            table[column] = (table[column] - EPOCH).dt.days
    return found


def random_tables(n, organ, seed, *, risk="MELD", history_rows=0):
    """Draw ``n`` registrations and their history, without a loop over them.

    For ``risk="MELD"`` those die within the horizon whose MELD is above 25 (kidney: GFR below 8) at
    the landmark; for ``"graded"`` the risk climbs with that MELD (falls with that GFR) up to one
    half. ``history_rows``: their mean number a registration, else 9 for a liver, 3 for a kidney.
    """
    rng = np.random.default_rng(seed)
    landmark = 90 if organ == "liver" else 365
    listed = rng.integers(15000, 20000, n)
    rows = 1 + rng.poisson(history_rows - 1 if history_rows else 8 if organ == "liver" else 2, n)
    owner = np.repeat(np.arange(n), rows)
    span = 8 * landmark
    day = rng.integers(0, span, len(owner))
    day[np.concatenate([[0], np.cumsum(rows)[:-1]])] = 0
    order = np.lexsort((day, owner))
    day = day[order]
    level = rng.uniform(8, 36, n)
    score = np.clip(np.round(level[owner] + rng.normal(0, 1.5, len(owner))), 6, 40)
    gfr = rng.uniform(2, 20, n).round(1)
    at_landmark = pd.Series(score[day <= landmark]).groupby(owner[day <= landmark]).last()
    event = (at_landmark.to_numpy() > 25) if organ == "liver" else gfr < 8
    if risk == "graded":
        worse = (at_landmark.to_numpy() - 25) / 4 if organ == "liver" else (8 - gfr) / 3
        event = rng.random(n) < 0.5 / (1 + np.exp(-worse))
    died = landmark + 1 + rng.integers(0, landmark, n)  # days after listing
    left = rng.integers(landmark // 2, 20 * landmark, n)  # others are removed much later or soon
    early = rng.random(n) < 0.2
    gone = ~event & (early | (rng.random(n) < 0.5))
    code = np.where(event, rng.choice([8, 13], n), rng.choice([4, 4, 15, 14, 7, 9, 12, 10], n))
    end = listed + np.where(event, died, np.where(early, left, 3 * landmark + left))
    removed = (event | gone) & (end < LAST_DAY)
    dead = event & (code == 8)
    days = {
        "CAN_LISTING_DT": listed,
        "CAN_REM_DT": np.where(removed, end, np.nan),
        "CAN_DEATH_DT": np.where(dead, end, np.nan),
        "PERS_OPTN_DEATH_DT": np.where(dead, end, np.where(removed, end + 400, np.nan)),
        "PERS_SSA_DEATH_DT": np.nan,
        "REC_TX_DT": np.where(removed & np.isin(code, [4, 14, 15]), end, np.nan),
        "CAN_ENDWLFU": np.where(removed, end, LAST_DAY),
    }
    organs = [CODE[organ], "KP" if organ == "kidney" else "IN"]
    cand = pd.DataFrame(
        {
            "PX_ID": 1_000_000 + rng.permutation(n),
            "PERS_ID": 5_000_000 + rng.integers(0, max(1, int(0.9 * n)), n),
            "WL_ORG": rng.choice(organs, n, p=[0.9, 0.1]),
            "CAN_SOURCE": rng.choice(["A", "R", "L"], n, p=[0.4, 0.55, 0.05]),
            "CAN_REM_CD": np.where(removed, code, np.nan),
            **days,
            "CAN_AGE_IN_MONTHS_AT_LISTING": rng.integers(200, 950, n),
            "CAN_GENDER": rng.choice(["M", "F"], n),
            "CAN_ABO": rng.choice(["A", "B", "AB", "O"], n),
            "CAN_BMI": rng.uniform(18, 42, n).round(1),
            "CAN_DIAB": rng.choice([1, 2, 3, 998], n),
            "CAN_PREV_TX": rng.choice([0, 1], n),
            "CAN_ON_DIAL": rng.choice(["Y", "N"], n),
            "CAN_LAST_STAT": rng.integers(0, 9, n),
            "CAN_LATEST_BMI": rng.integers(0, 9, n),
            "CAN_MOST_RECENT_CREAT": rng.uniform(1, 9, n).round(1),
            "DONOR_ID": rng.integers(0, 9, n),
        }
    )
    cand["PERS_OPTN_DEATH_DT"] = cand["PERS_OPTN_DEATH_DT"].clip(upper=LAST_DAY)
    m = len(owner)
    begin = listed[owner] + day
    history = {"PX_ID": cand["PX_ID"].to_numpy()[owner]}
    history |= {"CANHX_BEGIN_DT": begin, "CANHX_END_DT": begin + 30}
    if organ == "liver":
        history |= dict.fromkeys(("CANHX_STAT_CD", "CANHX_SRTR_LAB_MELD"), 6200 + score)
        history |= {
            "CANHX_BILI": (score / 3 + rng.uniform(0, 3, m)).round(2),
            "CANHX_INR": (1 + score / 30).round(2),
            "CANHX_SERUM_CREAT": np.where(rng.random(m) < 0.9, score / 20, np.nan),
            "CANHX_SERUM_SODIUM": rng.integers(125, 146, m),
            "CANHX_ALBUMIN": rng.uniform(2, 4.5, m).round(1),
            "CANHX_DIAL_PRIOR_WEEK": rng.choice(["Y", "N"], m, p=[0.1, 0.9]),
            "CANHX_ASCITES": rng.integers(1, 4, m),
            "CANHX_ENCEPH": rng.integers(1, 4, m),
        }
    else:
        dialysed, began = rng.random(n) < 0.7, listed + rng.integers(-2000, 700, n)
        cand["CAN_DIAL_DT"] = np.where(dialysed, began, np.nan)
        cand["CAN_GFR"], cand["CAN_GFR_DT"] = gfr, listed + rng.integers(-300, 700, n)
        history |= {
            "CANHX_STAT_CD": rng.choice([4010, 4099, 4999], m, p=[0.7, 0.2, 0.1]),
            "CANHX_REASON_STAT_INACT": rng.choice([7, 10, 12], m),
            "CANHX_CPRA": rng.choice([0, 0.3, 0.99], m),
        }
    return cand, pd.DataFrame(history)


def is_date(column):
    return column.endswith(DATE_COLUMNS)


def write_table(path, table, *, dates="sas", labels=False):
    """Write a table with days as dates of a form; the ending of ``path`` gives the storage."""
    table, ending = table.copy(), path.suffix.lower()
    for column in filter(is_date, table.columns if dates != "sas" else ()):
        table[column] = EPOCH + pd.to_timedelta(pd.to_numeric(table[column]), unit="D")
        if ending not in (".dta", ".parquet"):
            table[column] = table[column].dt.strftime(DATE_FORMATS[dates]).str.upper()
    for column, meanings in LABELS.items() if labels else []:
        if column in table:
            cells = table[column].map(lambda c: c if isinstance(c, str) else f"{c:g}", "ignore")
            meaning = table[column].map(meanings).fillna("x")
            table[column] = (cells + ": " + meaning).where(cells.notna(), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".dta":
        times = [c for c in table if table[c].dtype.kind == "M"]
        empty = table.columns[table.isna().all()].difference(times)
        table = table.astype(dict.fromkeys(empty, float))
        texts = table.select_dtypes(exclude=["number", "datetime"]).columns
        table[texts] = table[texts].astype(object).where(table[texts].notna(), "")
        table.to_stata(path, write_index=False, convert_dates=dict.fromkeys(times, "td"))
    elif ending == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    return path


def write_folder(folder, cand, history, organ="liver", *, ending=".csv", **form):
    """Write both tables of an organ under SRTR's names."""
    for name, table in (("cand", cand), ("stathist", history)):
        write_table(folder / f"{name}_{SUFFIX[organ]}{ending}", pd.DataFrame(table), **form)
    return folder
