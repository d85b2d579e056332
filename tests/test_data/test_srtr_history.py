"""SRTR: which history rows count at the landmark, their values, and where dialysis is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import ORGANS
from medgemma_clinical.data.srtr.cohort import CohortDefinition, read_candidates
from medgemma_clinical.data.srtr.files import find_table
from medgemma_clinical.data.srtr.history import (
    CODES,
    DATES,
    FLAGS,
    NOWHERE,
    one_row_a_day,
    read_history,
)
from medgemma_clinical.files import InputError
from srtr_files import LISTED, SUFFIX, candidate, history_row, write_folder

Row = dict[str, Any]
DAYS = {organ: kind.days for organ, kind in ORGANS.items()}


class Read:
    """A cohort whose registrations are all in ``cand``, and what is read of its history."""

    def __init__(
        self, folder: Path, cand: list[Row], history: list[Row], organ: str, given: str | None
    ) -> None:
        write_folder(folder, cand, history, organ)
        file = find_table(folder, f"cand_{SUFFIX[organ]}")
        definition = CohortDefinition(organ, DAYS[organ], DAYS[organ], "negative")
        cohort = read_candidates(file)
        rows, self.dialysis = read_history(
            find_table(folder, f"stathist_{SUFFIX[organ]}"),
            definition,
            cohort["CAN_LISTING_DT"],
            dated="CAN_DIAL_DT" in file.columns,
            dialysis_source=given,
        )
        self.rows = one_row_a_day(rows, cohort, definition, dialysis_source=self.dialysis)

    def series(self, name: str, px: int = 1) -> list[tuple[float, float]]:
        """Days and values of one series; values are -1 where not measured."""
        rows = self.rows[self.rows["PX_ID"] == px]
        return list(zip(rows["day"].tolist(), rows[name].fillna(-1).tolist(), strict=True))


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def build(
        *history: Row, cand: Row | None = None, organ: str = "liver", given: str | None = None
    ) -> Read:
        rows = {row["PX_ID"] for row in history} - {1}
        first = candidate(1, organ) if cand is None else cand
        everyone = [first, *(candidate(px, organ) for px in sorted(rows))]
        return Read(tmp_path, everyone, list(history), organ, given)

    return build


def test_rows_by_the_landmark_count_and_the_last_before_listing_is_carried_to_day_0(
    read: Any,
) -> None:
    days = [(-300, 6210), (-20, 6220), (30, 6230), (90, 6231), (91, 6240)]
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=meld) for day, meld in days]
    assert read(*rows).series("MELD") == [(0, 20), (30, 30), (90, 31)]
    rows.append(history_row(1, 0, CANHX_SRTR_LAB_MELD=6225))
    assert read(*rows).series("MELD") == [(0, 25), (30, 30), (90, 31)]


def test_the_rows_of_a_day_are_one_and_the_later_value_counts(read: Any) -> None:
    cells = [(9, 6210, 3.0), (9, 6220, None), (30, 6230, None)]
    rows = [
        history_row(1, day, CANHX_SRTR_LAB_MELD=meld, CANHX_BILI=bili) for day, meld, bili in cells
    ]
    found = read(*rows)
    assert found.series("MELD") == [(9, 20), (30, 30)]
    assert found.series("bilirubin") == [(9, 3), (30, -1)]  # measured on that day: not filled
    status = [(4099, 100), (4010, 200)]
    for order in (status, status[::-1]):
        rows = [
            history_row(1, 10, "kidney", CANHX_STAT_CD=code, CANHX_BEGIN_TM=second)
            for code, second in order
        ]
        assert read(*rows, organ="kidney").series("status") == [(10, 1)]


def test_a_row_with_an_impossible_date_or_without_values_is_left_out(read: Any) -> None:
    rows = [history_row(1, day) for day in range(60)] * 2
    rows.append(history_row(2, 10**6))
    rows.append(history_row(3, 3, CANHX_STAT_CD=None, CANHX_SRTR_LAB_MELD=None))
    found = read(*rows)
    assert set(found.rows["PX_ID"]) == {1}
    assert len(found.rows) == 60


def test_the_features_are_decoded(read: Any) -> None:
    cells: tuple[Any, ...] = (1.5, 3.1, None, "Y", 2.5, 1.2, 133, 6228, 2, 998, 6999)
    columns = [feature.column for feature in ORGANS["liver"].features]
    found = read(history_row(1, 5, **dict(zip(columns, cells, strict=True))))
    names = [feature.name for feature in ORGANS["liver"].features]
    want = (1.5, 3.1, -1, 1, 2.5, 1.2, 133, 28, 2, -1, 0)
    assert [found.series(name) for name in names] == [[(5, value)] for value in want]


STATUS = {
    "liver": {6010: 1, 6011: 1, 6012: 1, 6101: 1, 6299: 1, 6999: 0, 6300: -1, 7: -1},
    "kidney": {4010: 1, 4050: 1, 4060: 1, 4099: 0, 4999: 0, 4000: -1},
}
MELD = {6206: 6, 6240: 40, 22: 22, 6011: -1, 6999: -1}


def test_status_and_meld_codes(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    for organ, codes in STATUS.items():
        extra = {"CANHX_CPRA": 0.5} if organ == "kidney" else {"CANHX_BILI": 1.0}
        rows = [
            history_row(1, day, organ, CANHX_STAT_CD=code, **extra)
            for day, code in enumerate(codes)
        ]
        assert read(*rows, organ=organ).series("status") == list(enumerate(codes.values()))
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=code) for day, code in enumerate(MELD)]
    caplog.clear()
    assert read(*rows).series("MELD") == list(enumerate(MELD.values()))
    assert "CANHX_SRTR_LAB_MELD: 2 cells hold no known code" in caplog.text


# ------------------------------------------------------------------- dates of the candidate


def test_dialysis_counts_from_its_day_and_gfr_enters_at_its_own(read: Any) -> None:
    def kidney(**columns: Any) -> Read:
        rows = [history_row(1, day, "kidney") for day in (0, 100)]
        found: Read = read(*rows, cand=candidate(1, "kidney", **columns), organ="kidney")
        assert found.dialysis == DATES
        return found

    before = kidney(CAN_DIAL_DT=LISTED - 730.5, CAN_GFR=11, CAN_GFR_DT=LISTED - 10)
    assert before.series("dialysis") == [(0, 1), (100, 1)]
    assert before.series("GFR") == [(0, 11), (100, -1)]
    between = kidney(CAN_DIAL_DT=LISTED + 50, CAN_GFR=11, CAN_GFR_DT=LISTED + 70)
    assert between.series("dialysis") == [(0, 0), (50, 1), (70, 1), (100, 1)]
    assert between.series("GFR") == [(0, -1), (50, -1), (70, 11), (100, -1)]
    later = kidney(CAN_DIAL_DT=LISTED + 366, CAN_GFR=11, CAN_GFR_DT=LISTED + 366)
    missing = kidney(CAN_DIAL_DT=None, CAN_GFR=11, CAN_GFR_DT=None)
    assert later.series("dialysis") == [(0, 0), (100, 0)]
    pd.testing.assert_frame_equal(later.rows, missing.rows)
    assert missing.series("GFR") == [(0, -1), (100, -1)]


def test_a_converted_kidney_history_brings_its_own_laboratory_values(read: Any) -> None:
    lab = {"CANHX_SERUM_CREAT": 8.1, "CANHX_ALBUMIN": 3.5, "CANHX_GFR": 7.0}
    own = candidate(1, "kidney", CAN_DIAL_DT=LISTED - 50)
    for codes, source in (((0, 1), FLAGS), ((1, 3), CODES)):
        rows = [
            history_row(1, day, "kidney", **lab, CANHX_DIAL=code)
            for day, code in zip((0, 90), codes, strict=True)
        ]
        found = read(*rows, cand=own, organ="kidney")
        assert found.series("creatinine") == [(0, 8.1), (90, 8.1)]
        assert found.series("dialysis") == [(0, 0), (90, 1)]  # not by CAN_DIAL_DT
        assert found.dialysis == source


# ------------------------------------------------------------------- where dialysis is read


@pytest.mark.parametrize(
    ("cell", "others", "source", "expected"),
    [
        ("1", "1", DATES, 0.0),  # yes, or CAN_DIAL's no: the date, here none, decides
        ("1", "998", CODES, 0.0),  # unknown has a code, so 1 is CAN_DIAL's no
        ("998", "998", DATES, 0.0),
        ("2", "1", CODES, 1.0),
        ("1", "2", CODES, 0.0),
        ("N", "N", FLAGS, 0.0),
        ("Y", "N", FLAGS, 1.0),
    ],
)
def test_a_kidney_history_of_dialysis_codes_is_not_inverted(
    cell: str, others: str, source: str, expected: float, read: Any
) -> None:
    rows = [history_row(1, 0, "kidney", CANHX_DIAL=cell)]
    rows += [history_row(px, 0, "kidney", CANHX_DIAL=others) for px in range(2, 6)]
    found = read(*rows, cand=candidate(1, "kidney", CAN_DIAL_DT=None), organ="kidney")
    assert (found.dialysis, found.series("dialysis")) == (source, [(0, expected)])


def test_rows_outside_the_cohort_decide_the_coding_too(read: Any) -> None:
    """Only 1 is kept; a later row shows that it is a code."""
    rows = [history_row(1, 0, "kidney", CANHX_DIAL=1), history_row(1, 900, "kidney", CANHX_DIAL=3)]
    found = read(*rows, organ="kidney")
    assert (found.dialysis, found.series("dialysis")) == (CODES, [(0, 0)])


def test_a_lone_registration_decodes_as_in_the_training_data(read: Any) -> None:
    lone = history_row(1, 0, "kidney", CANHX_DIAL=1)
    cand = candidate(1, "kidney", CAN_DIAL_DT=LISTED - 50)
    expected = {CODES: 0.0, FLAGS: 1.0, DATES: 1.0, NOWHERE: -1.0}
    for given, value in expected.items():
        found = read(lone, cand=cand, organ="kidney", given=given)
        assert (found.dialysis, found.series("dialysis")[0][1]) == (given, value)
    nothing = read(history_row(1, 0, "kidney"), cand=cand, organ="kidney", given=CODES)
    assert nothing.series("dialysis")[0][1] == -1, "no date where the training data had codes"


@pytest.mark.parametrize(("given", "cells"), [(FLAGS, (1, 998)), (CODES, (0, 1))])
def test_a_history_of_another_coding_is_refused(
    given: str, cells: tuple[int, int], read: Any
) -> None:
    rows = [history_row(1, day, "kidney", CANHX_DIAL=cell) for day, cell in enumerate(cells)]
    with pytest.raises(InputError, match=r"column CANHX_DIAL: holds .*, in the training data"):
        read(*rows, organ="kidney", given=given)


def test_the_livers_column_is_a_flag_whatever_it_holds(read: Any) -> None:
    found = read(history_row(1, 0, CANHX_DIAL_PRIOR_WEEK="Y"))
    assert (found.dialysis, found.series("dialysis")) == (FLAGS, [(0, 1)])
    assert read(history_row(1, 0)).dialysis == NOWHERE
    assert np.isnan(read(history_row(1, 0)).rows["dialysis"]).all()
