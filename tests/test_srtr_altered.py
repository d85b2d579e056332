"""SRTR: altered tables are read as another, slow reading decides, or end with one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, KEYS, ORGANS
from medgemma_clinical.files import InputError
from srtr_dataset import FEWEST_EVENTS, SRTRTrajectoryDataset
from srtr_files import is_date, random_tables, write_folder

ORGAN_NAMES = tuple(ORGANS)
ALTERED = int(os.environ.get("SRTR_FUZZ", "20"))
"""Altered tables a run of the tests reads; the full check is SRTR_FUZZ=2000."""

OPTIONAL = [column for column, cost in CAND_COLUMNS.items() if cost]
TRANSPLANT = (4, 14, 15, 18, 19, 21, 22, 23, 43, 45)


def oracle(cand: pd.DataFrame, history: pd.DataFrame, organ: str) -> dict[int, str | float]:
    """Decide again, one registration after another."""
    landmark, horizon = ORGANS[organ].days, ORGANS[organ].days
    begins: Any = history.groupby("PX_ID")["CANHX_BEGIN_DT"].min().to_dict()
    known = ("CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU")
    last = max(cand[c].max() for c in known if c in cand and cand[c].notna().any())
    result: dict[int, str | float] = {}
    for row in cand.to_dict("records"):

        def get(name: str, row: Any = row) -> Any:
            value = row.get(name)
            return None if value is None or pd.isna(value) else value

        result[int(row["PX_ID"])] = decide_one(get, begins, last, organ, landmark, horizon)
    return result


def decide_one(
    get: Callable[[str], Any],
    begins: dict[Any, float],
    last: float,
    organ: str,
    landmark: int,
    horizon: int,
) -> str | float:
    code, removal, graft = get("CAN_REM_CD"), get("CAN_REM_DT"), get("REC_TX_DT")
    age = get("CAN_AGE_IN_MONTHS_AT_LISTING")
    if get("WL_ORG") != ORGANS[organ].code:
        return "other organ"
    if get("CAN_SOURCE") == "L":
        return "living donor recipient, never listed"
    if age is not None and age < 216:
        return "under 18"
    if code in (10, 11, 16):
        return "removed: listed or removed in error"
    kind = "event" if code in (8, 13) else "transplant" if code in TRANSPLANT else "other"
    end = removal
    if graft is not None and (removal is None or graft < removal):
        end, kind = graft, "transplant"
    elif graft is not None and graft == removal:
        kind = "transplant"
    deaths = [get(c) for c in ("CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT")]
    death = min((d for d in deaths if d is not None), default=None)
    if removal is None and code == 8 and death is not None and (graft is None or death < graft):
        end, kind = death, "event"
    if end is None:
        end = get("CAN_ENDWLFU")
    if end is None and code is None:
        end = last
    if death is not None and (
        end is not None and (death < end or (death == end and kind != "transplant"))
    ):
        end, kind = death, "event"
    if end is None or get("CAN_LISTING_DT") is None:
        return "no day of listing or removal"
    days = end - get("CAN_LISTING_DT")
    if days <= landmark:
        return "ended by the landmark"
    if days <= landmark + horizon and kind == "other":
        return "censored within the horizon"
    if not begins.get(get("PX_ID"), np.inf) <= get("CAN_LISTING_DT") + landmark:
        return "no history row by the landmark"
    return float(days <= landmark + horizon and kind == "event")


def alter(
    rng: np.random.Generator, cand: pd.DataFrame, history: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, bool]:
    """Change both tables in one way; the last result says that no data set may come of it."""
    n = len(cand)
    some = rng.random(n) < 0.3
    what = rng.integers(0, 16)
    dates = [c for c in cand.columns if is_date(c)]
    fatal = False
    if what == 0:
        cand = cand.drop(columns=[c for c in OPTIONAL if c in cand and rng.random() < 0.3])
    elif what == 1:
        required = KEYS
        cand, fatal = cand.drop(columns=required[rng.integers(len(required))]), True
    elif what == 2:
        cand = pd.concat([cand, cand[some]])
    elif what == 3:
        again = cand[:3].assign(CAN_REM_CD=9.0, CAN_REM_DT=23000.0, WL_ORG="XX")
        cand, fatal = pd.concat([cand, again]), True
    elif what == 4:
        codes = [8, 13, 4, 15, 21, 10, 17, 5, 77, np.nan]
        cand.loc[some, "CAN_REM_CD"] = rng.choice(codes, some.sum())
    elif what in (5, 6):
        column, shift = dates[rng.integers(len(dates))], rng.integers(-200, 200, some.sum())
        cand.loc[some, column] += shift if what == 5 else np.nan
    elif what == 7:
        wrong = rng.choice([-30000.0, 9000.0, 45000.0, 1.7e9, 20160518.0])
        cand.loc[three_rows(rng, cand), "CAN_LISTING_DT"] = wrong
        fatal = True
    elif what == 8:
        cand = cand.astype({"CAN_REM_DT": object})
        cand.loc[three_rows(rng, cand), "CAN_REM_DT"] = rng.choice(["soon", "2019-13-45"])
        fatal = True
    elif what == 9:
        cand = cand.astype({"CAN_REM_CD": object})
        cand.loc[cand.index[int(rng.integers(n))], "CAN_REM_CD"] = "Candidate died"
        fatal = True
    elif what == 10:
        history = history[rng.random(len(history)) < 0.6]
    elif what == 11:
        history = pd.concat([history, history[rng.random(len(history)) < 0.3]])
    elif what == 12:
        column = rng.choice(["CANHX_STAT_CD", "CANHX_BEGIN_DT"])
        fatal = column == "CANHX_BEGIN_DT"
        history = history.drop(columns=column) if fatal else history.assign(CANHX_CPRA="x")
    elif what == 13:
        order = rng.permutation(n)
        cand, history = cand.iloc[order], history.iloc[rng.permutation(len(history))]
    elif what == 14:
        table = rng.integers(2)
        cand, history = (cand[:0], history) if table else (cand, history[:0])
        fatal = True
    else:
        cand.loc[some, "CAN_AGE_IN_MONTHS_AT_LISTING"] = rng.integers(100, 400, some.sum())
        cand.loc[some, "WL_ORG"] = "KP"
        cand.loc[some, "REC_TX_DT"] = cand.loc[some, "CAN_LISTING_DT"] + 400
    return cand, history, fatal


def three_rows(rng: np.random.Generator, cand: pd.DataFrame) -> Any:
    """More than one in a hundred."""
    return cand.index[rng.choice(len(cand), 3, replace=False)]


def test_altered_tables_read_right_or_end_with_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    read_right, refused = 0, 0
    for k in range(ALTERED):
        organ = ORGAN_NAMES[k % 2]
        cand, history = random_tables(90, organ, seed=k % 7)
        fatal = False
        for _ in range(rng.integers(1, 4)):
            cand, history, bad = alter(rng, cand, history) if not fatal else (cand, history, True)
            fatal |= bad
        used = cand[[c for c in CAND_COLUMNS if c in cand]].drop_duplicates()
        fatal |= bool("PX_ID" in used and used["PX_ID"].duplicated().any())
        forms = [None, *("sas", "iso", "mdy4", "mdy2", "ddmonyyyy")]
        form = forms[0] if fatal else forms[rng.integers(1, 6)]
        write_folder(
            tmp_path,
            cand,
            history,
            organ,
            dates=form or "sas",
            labels=bool(rng.integers(2)) and not fatal,
        )
        try:
            dataset = SRTRTrajectoryDataset(tmp_path, organ)
        except InputError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 600
            if not fatal:
                truth = oracle(cand, history, organ)
                events = sum(v == 1.0 for v in truth.values())
                assert events < FEWEST_EVENTS, text
            refused += 1
            continue
        assert not fatal, k
        table = dataset.registrations
        found = {
            int(px): reason or label
            for px, reason, label in zip(
                table.index, table["reason"].astype(str), table["label"], strict=True
            )
        }
        assert found == oracle(cand, history, organ), k
        assert not np.isinf(dataset.values).any()
        read_right += 1
    assert read_right >= ALTERED // 5
    assert refused > ALTERED // 10
