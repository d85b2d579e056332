"""SRTR: altered tables are read as another, slow reading decides, or end with one line."""

import os

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, KEYS, ORGANS
from medgemma_clinical.files import InputError
from slow_srtr import IMPOSSIBLE, decide_slowly
from srtr_dataset import MIN_EVENTS, SRTRTrajectoryDataset
from srtr_files import is_date, random_tables, write_folder

ALTERED = int(os.environ.get("SRTR_FUZZ", "16"))
"""Altered tables that are read; the full check is SRTR_FUZZ=2000."""

OPTIONAL = [column for column, cost in CAND_COLUMNS.items() if cost]


def alter(rng, cand, history):
    """Change both tables in one way; the last result says that no data set may come of it."""
    n = len(cand)
    some, three = rng.random(n) < 0.3, cand.index[rng.choice(n, 3, replace=False)]
    what = rng.integers(0, 14)
    if what == 0:
        cand = cand.drop(columns=[c for c in OPTIONAL if c in cand and rng.random() < 0.3])
    elif what == 1:
        column = rng.choice([*KEYS, "CANHX_BEGIN_DT"])
        cand, history = (t.drop(columns=column, errors="ignore") for t in (cand, history))
    elif what == 2:
        cand = pd.concat([cand, cand[some]])
    elif what == 3:
        cand = pd.concat([cand, cand[:3].assign(CAN_REM_CD=9.0, CAN_REM_DT=23000.0, WL_ORG="XX")])
    elif what == 4:
        codes = [8, 13, 4, 15, 21, 10, 17, 5, 77, np.nan]
        cand.loc[some, "CAN_REM_CD"] = rng.choice(codes, some.sum())
    elif what in (5, 6):
        column = rng.choice([c for c in cand.columns if is_date(c)])
        shift = rng.integers(-200, 200, some.sum())
        cand.loc[some, column] += shift if what == 5 else np.nan
    elif what == 7:  # more than one row in a hundred
        wrong = [-30000.0, 9000.0, 45000.0, 1.7e9, 20160518.0]
        cand.loc[three, "CAN_LISTING_DT"] = rng.choice(wrong)
    elif what == 8:
        cand.loc[three, "CAN_REM_DT"] = rng.choice(IMPOSSIBLE)
    elif what == 9:
        cand = cand.astype({"CAN_REM_CD": object})
        cand.loc[three[0], "CAN_REM_CD"] = "Candidate died"
    elif what == 10:
        history = history[rng.random(len(history)) < 0.6]
    elif what == 11:
        history = pd.concat([history, history[rng.random(len(history)) < 0.3]])
    elif what == 12:
        cand, history = cand.sample(frac=1, random_state=1), history.sample(frac=1, random_state=1)
    else:
        cand.loc[some, "CAN_AGE_IN_MONTHS_AT_LISTING"] = rng.integers(100, 400, some.sum())
        cand.loc[some, "WL_ORG"] = "KP"
        cand.loc[some, "REC_TX_DT"] = cand.loc[some, "CAN_LISTING_DT"] + 400
    return cand, history, what in (1, 3, 7, 9)


def read_or_refuse(folder, organ, *, may_refuse):
    """Return the data set, or None where it may be refused, in one line, and is."""
    try:
        return SRTRTrajectoryDataset(folder, organ)
    except InputError as error:
        if "\n" in str(error) or len(str(error)) > 600 or not may_refuse:
            raise


@pytest.mark.slow
def test_altered_tables_read_right_or_end_with_one_line(tmp_path):
    rng = np.random.default_rng(0)
    read_right = 0
    for k in range(ALTERED):
        organ = tuple(ORGANS)[k % 2]
        cand, history = random_tables(90, organ, seed=k % 7)
        fatal = False
        for _ in range(rng.integers(1, 4)):
            if not fatal:
                cand, history, fatal = alter(rng, cand, history)
        used = cand[[c for c in CAND_COLUMNS if c in cand]].drop_duplicates()
        fatal |= bool("PX_ID" in used and used["PX_ID"].duplicated().any())
        form, labels = rng.choice(["sas", "iso", "mdy4", "mdy2", "ddmonyyyy"]), rng.random() < 0.5
        if fatal:
            form, labels = "sas", False
        elif ((cand["CAN_REM_DT"] < 0) | (cand["CAN_REM_DT"] > 30_000)).any():
            form = "iso"  # two digits of an impossible year are a possible one
        write_folder(tmp_path, cand, history, organ, dates=form, labels=labels)
        expected = {} if fatal else decide_slowly(cand, history, organ)
        few = list(expected.values()).count(1.0) < MIN_EVENTS
        dataset = read_or_refuse(tmp_path, organ, may_refuse=few)
        if dataset is None:
            continue
        assert not fatal, k
        table = dataset.registrations
        found = table["label"].where(table["reason"] == "", table["reason"].astype(object))
        assert found.to_dict() == expected, k
        assert not np.isinf(dataset.values).any()
        read_right += 1
    assert ALTERED // 5 <= read_right < ALTERED - ALTERED // 10
