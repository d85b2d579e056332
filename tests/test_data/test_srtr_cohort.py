"""SRTR: who is in the cohort of a landmark, and with which label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, ORGANS
from medgemma_clinical.data.srtr.cohort import (
    CohortDefinition,
    contexts,
    judge,
    read_candidates,
    statics,
)
from medgemma_clinical.data.srtr.decode import BAD_DATE
from medgemma_clinical.data.srtr.files import find_table
from medgemma_clinical.files import InputError
from srtr_files import LISTED, candidate, history_row, removed, write_folder

CENSORED, ENDED = "censored within the horizon", "ended by the landmark"
ERRONEOUS = "removed: listed or removed in error"
NO_TIME = "no day of listing or removal"
LIVER = CohortDefinition("liver", 90, 90, "negative")
Row = dict[str, Any]


def table_of(*rows: Row) -> pd.DataFrame:
    """Rows as ``read_candidates`` reads them."""
    table = pd.DataFrame([{**dict.fromkeys(CAND_COLUMNS), **row} for row in rows])
    words = ("WL_ORG", "CAN_SOURCE", "CAN_GENDER", "CAN_ABO")
    table = table.astype({name: float for name in CAND_COLUMNS if name not in words})
    age = table["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12
    return table.assign(age=age, **{BAD_DATE: False}).set_index("PX_ID")


def verdict(row: Row, definition: CohortDefinition = LIVER, **options: Any) -> str | float:
    """Why a registration is left out, or its label."""
    judged: Any = judge(table_of(row), definition, **options).iloc[0]
    return str(judged["reason"]) or float(judged["label"])


MEANING: dict[str | float, tuple[float | None, ...]] = {
    1.0: (8, 13),
    0.0: (4, 14, 15, 18, 19, 21, 22, 23, 43, 45),
    ERRONEOUS: (10, 11, 16),
    CENSORED: (5, 6, 7, 9, 12, 17, 20, 24, 40, 77, None),
}


@pytest.mark.parametrize(
    ("code", "within"), [(code, means) for means, codes in MEANING.items() for code in codes]
)
def test_what_a_removal_within_the_horizon_means(code: float | None, within: str | float) -> None:
    assert verdict(removed(code, 120)) == within
    assert verdict(removed(code, 181)) == (within if within == ERRONEOUS else 0.0)


@pytest.mark.parametrize(
    ("day", "result"), [(89, ENDED), (90, ENDED), (91, 1.0), (180, 1.0), (181, 0.0)]
)
def test_the_horizon_is_open_at_the_landmark_and_closed_at_its_end(
    day: int, result: str | float
) -> None:
    assert verdict(removed(8, day)) == verdict(removed(13, day)) == result


@pytest.mark.parametrize(("day", "result"), [(90, ENDED), (180, CENSORED), (181, 0.0)])
def test_a_registration_that_waits_must_be_followed_past_the_horizon(
    day: int, result: str | float
) -> None:
    assert verdict(candidate(1, CAN_ENDWLFU=LISTED + day)) == result


@pytest.mark.parametrize("column", ["CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"])
def test_a_death_by_the_end_is_an_event_and_one_after_it_is_not(column: str) -> None:
    for code in (7, None):
        for day, result in ((119, 1.0), (120, 1.0), (121, CENSORED)):
            assert verdict(removed(code, 120, **{column: LISTED + day})) == result
    waits = {"CAN_ENDWLFU": LISTED + 120}
    assert verdict(candidate(1, **waits, **{column: LISTED + 120})) == 1.0
    assert verdict(candidate(1, **waits, **{column: LISTED + 121})) == CENSORED


def test_the_event_is_on_the_day_of_death_not_of_the_removal() -> None:
    assert verdict(removed(8, 120, CAN_DEATH_DT=LISTED + 80)) == ENDED
    assert verdict(removed(8, 200, CAN_DEATH_DT=LISTED + 170)) == 1.0
    unfollowed: Row = {"CAN_REM_CD": 8, "CAN_REM_DT": None, "CAN_ENDWLFU": None}
    assert verdict(candidate(1, CAN_DEATH_DT=LISTED + 120, **unfollowed)) == 1.0
    assert verdict(candidate(1, CAN_DEATH_DT=LISTED + 80, **unfollowed)) == ENDED


def test_a_death_years_later_changes_nothing() -> None:
    for code, result in ((4, 0.0), (7, CENSORED), (12, CENSORED)):
        assert verdict(removed(code, 120, PERS_OPTN_DEATH_DT=LISTED + 1500)) == result
    assert verdict(candidate(1, PERS_SSA_DEATH_DT=LISTED + 1500)) == 0.0


@pytest.mark.parametrize("code", [21, 23, 4])
def test_a_death_on_the_day_of_the_transplant_is_a_transplant(code: int) -> None:
    day = LISTED + 120
    assert verdict(removed(code, 120, REC_TX_DT=day, CAN_DEATH_DT=day)) == 0.0
    assert verdict(removed(code, 120, CAN_DEATH_DT=day)) == 0.0


@pytest.mark.parametrize(
    ("row", "result"),
    [
        (candidate(1, REC_TX_DT=LISTED + 120), 0.0),  # no removal recorded
        (removed(8, 150, REC_TX_DT=LISTED + 120), 0.0),  # died after it
        (removed(8, 120, REC_TX_DT=LISTED + 120), 0.0),  # died on its day
        (removed(13, 120, REC_TX_DT=LISTED + 150), 1.0),  # too sick comes first
        (removed(None, 120, REC_TX_DT=LISTED + 120), 0.0),
        (removed(8, 150, REC_TX_DT=LISTED + 80), ENDED),
    ],
)
def test_a_transplant_day_ends_the_registration(row: Row, result: str | float) -> None:
    assert verdict(row) == result


def test_transplants_within_the_horizon_can_be_left_out() -> None:
    exclude = CohortDefinition("liver", 90, 90, "exclude")
    for code in (4, 15, 21):
        assert verdict(removed(code, 120)) == 0.0
        assert verdict(removed(code, 120), exclude) == "transplanted within the horizon"
        assert verdict(removed(code, 181), exclude) == 0.0
    assert verdict(removed(8, 120), exclude) == 1.0


def test_landmark_and_horizon_follow_the_definition() -> None:
    assert verdict(removed(8, 95), CohortDefinition("liver", 95, 90, "negative")) == ENDED
    assert verdict(removed(8, 120), CohortDefinition("liver", 30, 100, "negative")) == 1.0
    assert verdict(removed(8, 120), CohortDefinition("liver", 95, 10, "negative")) == 0.0


def test_unknown_labels_stay_where_rows_are_to_be_scored() -> None:
    assert np.isnan(verdict(removed(7, 120), require_labels=False))
    exclude = CohortDefinition("liver", 90, 90, "exclude")
    assert np.isnan(verdict(removed(4, 120), exclude, require_labels=False))
    assert verdict(removed(7, 80), require_labels=False) == ENDED


def test_registrations_of_other_organs_ages_and_sources_are_left_out() -> None:
    kidney = CohortDefinition("kidney", 365, 365, "negative")
    assert verdict(candidate(1, WL_ORG="IN")) == "other organ"
    for organ in ("KP", "PA", "PI"):
        assert verdict(candidate(1, "kidney", WL_ORG=organ), kidney) == "other organ"
    assert verdict(candidate(1, CAN_SOURCE="L")) == "living donor recipient, never listed"
    assert verdict(candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=215)) == "under 18"
    assert verdict(candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=216)) == 0.0
    assert verdict(candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=None)) == 0.0
    assert verdict(candidate(1, CAN_LISTING_DT=None)) == NO_TIME


def test_an_impossible_date_leaves_the_row_out() -> None:
    table = table_of(removed(8, 120)).assign(**{BAD_DATE: True})
    assert judge(table, LIVER)["reason"].tolist() == ["an impossible date"]


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        (("heart", 90, 90, "negative"), "--organ heart"),
        (("liver", 90, 90, "maybe"), "--transplant maybe"),
        (("liver", -1, 90, "negative"), "--landmark_days -1"),
        (("liver", 10**9, 90, "negative"), "--landmark_days 1000000000"),
        (("liver", 90, 0, "negative"), "--horizon_days 0"),
    ],
)
def test_an_impossible_definition_is_refused_with_its_flag(
    definition: tuple[str, int, int, str], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        CohortDefinition(*definition)


# ------------------------------------------------------------------- as read from a file


def read(folder: Path, *cand: Row) -> pd.DataFrame:
    write_folder(folder, list(cand), [history_row(1, 0)])
    return read_candidates(find_table(folder, "cand_liin"))


def test_a_removal_code_stored_as_label_decides_alike(tmp_path: Path) -> None:
    cand = read(
        tmp_path,
        {**removed(8, 120), "CAN_REM_CD": "8: Candidate died"},
        {**removed(4, 120, px=2), "CAN_REM_CD": "4: Deceased donor tx"},
    )
    assert judge(cand, LIVER)["label"].tolist() == [1.0, 0.0]


def test_unknown_codes_are_counted_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(tmp_path, removed(77, 120), candidate(2))
    assert "1 unknown removal codes" in caplog.text


def test_a_registration_with_two_contents_is_refused_and_with_one_is_one(tmp_path: Path) -> None:
    assert len(read(tmp_path, candidate(1), candidate(1))) == 1
    with pytest.raises(InputError, match="1 registrations are there again"):
        read(tmp_path, candidate(1), candidate(1, CAN_REM_DT=LISTED + 5))


def test_rows_without_keys_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, candidate(1), candidate(2, PERS_ID=None)).index.tolist() == [1]
    assert "1 rows without PX_ID or PERS_ID" in caplog.text


# ------------------------------------------------------------------- context


def test_the_context_is_what_was_known_at_listing() -> None:
    person = {"CAN_AGE_IN_MONTHS_AT_LISTING": 695, "CAN_GENDER": "M", "CAN_ABO": "AB"}
    known = candidate(1, **person, CAN_DIAB=3, CAN_PREV_TX=1)
    unknown = candidate(
        2,
        **dict.fromkeys(("CAN_AGE_IN_MONTHS_AT_LISTING", "CAN_GENDER", "CAN_PREV_TX")),
        CAN_DIAB=998,
        CAN_ABO="UNK",
        CAN_BMI=900,
    )
    assert contexts(table_of(known, unknown), LIVER).tolist() == [
        "57-year-old man, blood group AB, BMI 25.5 kg/m2, type 2 diabetes, earlier transplant, on "
        "the liver waiting list for 90 days",
        "Patient, on the liver waiting list for 90 days",
    ]


KIDNEY = CohortDefinition("kidney", 365, 365, "negative")


def facts(definition: CohortDefinition = KIDNEY, *, dated: bool = True, **columns: Any) -> Row:
    """Return the known facts of a candidate."""
    table = statics(table_of(candidate(1, **columns)), definition, dated=dated)
    return {str(name): value for name, value in table.iloc[0].items() if not np.isnan(value)}


def test_facts_are_the_columns_of_the_candidate_as_numbers() -> None:
    person: Row = {"CAN_AGE_IN_MONTHS_AT_LISTING": 690, "CAN_GENDER": "M", "CAN_ABO": "A2"}
    assert facts(**person, CAN_DIAB=3, CAN_PREV_TX=1, CAN_DIAL_DT=LISTED - 365.25) == {
        "age at listing [years]": 57.5,
        "male": 1,
        "BMI [kg/m2]": 25.5,
        "diabetes": 1,
        "type 1 diabetes": 0,
        "earlier transplant": 1,
        **{"blood group A": 1, "blood group B": 0, "blood group AB": 0, "blood group O": 0},
        "dialysis [years]": pytest.approx(1 + 365 / 365.25),
    }
    names = ("CAN_AGE_IN_MONTHS_AT_LISTING", "CAN_GENDER", "CAN_PREV_TX")
    nothing: Row = dict.fromkeys(names)
    assert facts(LIVER, **nothing, CAN_DIAB=998, CAN_ABO="UNK", CAN_BMI=900) == {}


@pytest.mark.parametrize(
    ("code", "known"),
    [(1, (0, 0)), (2, (1, 1)), (3, (1, 0)), (4, (1, 0)), (5, (1, None)), (998, (None, None))],
)
def test_a_code_of_diabetes_is_its_presence_and_its_type(code: int, known: Any) -> None:
    found = facts(CAN_DIAB=code)
    assert (found.get("diabetes"), found.get("type 1 diabetes")) == known


def test_years_of_dialysis_end_at_the_landmark_and_a_later_start_is_none() -> None:
    for day in (None, LISTED + 365, LISTED + 366, LISTED + 2000):
        assert facts(CAN_DIAL_DT=day)["dialysis [years]"] == 0
    assert facts(CAN_DIAL_DT=LISTED + 364)["dialysis [years]"] == pytest.approx(1 / 365.25)
    assert "dialysis [years]" not in facts(dated=False, CAN_DIAL_DT=None)
    assert "dialysis [years]" not in facts(LIVER, CAN_DIAL_DT=LISTED)


def test_each_organ_has_its_own_defaults() -> None:
    assert {name: organ.days for name, organ in ORGANS.items()} == {"kidney": 365, "liver": 90}
