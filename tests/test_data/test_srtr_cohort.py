"""SRTR: who is in the cohort of a landmark, with which label, context and static features."""

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, TEXT_COLUMNS
from medgemma_clinical.data.srtr.cohort import (
    CENSORED,
    TRANSPLANTED,
    CohortDefinition,
    apply_criteria,
    contexts,
    read_candidates,
    static_features,
)
from medgemma_clinical.data.srtr.saf import BAD_DATE, find_table
from medgemma_clinical.files import InputError
from srtr_files import LISTED, candidate, history_row, removed, write_folder

ENDED, ERRONEOUS = "ended by the landmark", "removed: listed or removed in error"
LIVER = CohortDefinition("liver", 90, 90, "negative")
KIDNEY = CohortDefinition("kidney", 365, 365, "negative")
EXCLUDE = CohortDefinition("liver", 90, 90, "exclude")


def table_of(*rows, lacking=()):
    """Rows as ``read_candidates`` reads them."""
    table = pd.DataFrame([{**dict.fromkeys(CAND_COLUMNS), **row} for row in rows])
    table = table.astype({name: float for name in CAND_COLUMNS if name not in TEXT_COLUMNS})
    age, bmi = table["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12, table["CAN_BMI"]
    table = table.assign(age=age, bmi=bmi, **{BAD_DATE: False}).set_index("PX_ID")
    return table.drop(columns=list(lacking))


def verdict(row, definition=LIVER):
    """Why a registration is left out, or its label."""
    found = apply_criteria(table_of(row), definition).iloc[0]
    return str(found["reason"]) or float(found["label"])


@pytest.mark.parametrize(
    ("within", "codes"),
    [
        (1.0, (8, 13)),
        (0.0, (4, 14, 15, 18, 19, 21, 22, 23, 43, 45)),
        (ERRONEOUS, (10, 11, 16)),
        (CENSORED, (5, 6, 7, 9, 12, 17, 20, 24, 40, 77, None)),
    ],
)
def test_what_a_removal_within_the_horizon_means(within, codes):
    for code in codes:
        assert verdict(removed(code, 120)) == within
        assert verdict(removed(code, 181)) == (within if within == ERRONEOUS else 0.0)


@pytest.mark.parametrize(("day", "result"), [(90, ENDED), (91, 1.0), (180, 1.0), (181, 0.0)])
def test_the_horizon_is_open_at_the_landmark_and_closed_at_its_end(day, result):
    assert verdict(removed(8, day)) == verdict(removed(13, day)) == result
    followed = CENSORED if result == 1.0 else result
    assert verdict(candidate(1, CAN_ENDWLFU=LISTED + day)) == followed


@pytest.mark.parametrize("column", ["CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"])
def test_a_death_by_the_end_is_an_event_and_one_after_it_is_not(column):
    for row in (removed(7, 120), removed(None, 120), candidate(1, CAN_ENDWLFU=LISTED + 120)):
        for day, result in ((119, 1.0), (120, 1.0), (121, CENSORED), (1500, CENSORED)):
            assert verdict({**row, column: LISTED + day}) == result
    assert verdict(removed(4, 120, **{column: LISTED + 1500})) == 0.0
    assert verdict(candidate(1, **{column: LISTED + 1500})) == 0.0


UNFOLLOWED = {"CAN_REM_CD": 8, "CAN_REM_DT": None, "CAN_ENDWLFU": None}


@pytest.mark.parametrize(
    ("row", "result"),
    [
        # The event is on the day of death, not of the removal.
        (removed(8, 120, CAN_DEATH_DT=LISTED + 80), ENDED),
        (removed(8, 200, CAN_DEATH_DT=LISTED + 170), 1.0),
        (candidate(1, CAN_DEATH_DT=LISTED + 120, **UNFOLLOWED), 1.0),
        (candidate(1, CAN_DEATH_DT=LISTED + 80, **UNFOLLOWED), ENDED),
        # A transplant ends the registration, a death on its day belongs to it.
        (candidate(1, REC_TX_DT=LISTED + 120), 0.0),
        (removed(None, 120, REC_TX_DT=LISTED + 120), 0.0),
        (removed(8, 150, REC_TX_DT=LISTED + 120), 0.0),
        (removed(8, 120, REC_TX_DT=LISTED + 120), 0.0),
        (removed(8, 150, REC_TX_DT=LISTED + 80), ENDED),
        (removed(13, 120, REC_TX_DT=LISTED + 150), 1.0),
        *((removed(code, 120, CAN_DEATH_DT=LISTED + 120), 0.0) for code in (21, 23, 4)),
        (candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=216), 0.0),
        (candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=None), 0.0),
    ],
)
def test_the_end_of_a_registration_decides(row, result):
    assert verdict(row) == result


def test_landmark_horizon_and_transplants_follow_the_definition():
    assert verdict(removed(8, 95), CohortDefinition("liver", 95, 90, "negative")) == ENDED
    assert verdict(removed(8, 120), CohortDefinition("liver", 30, 100, "negative")) == 1.0
    assert verdict(removed(8, 120), CohortDefinition("liver", 95, 10, "negative")) == 0.0
    assert verdict(removed(21, 120), EXCLUDE) == TRANSPLANTED
    assert verdict(removed(21, 181), EXCLUDE) == 0.0
    rows = [removed(7, 120), removed(4, 120), removed(8, 120)]
    labels = apply_criteria(table_of(*rows), EXCLUDE)["label"]
    np.testing.assert_array_equal(labels, [np.nan, np.nan, 1.0])
    for organ in ("KP", "PA", "PI"):
        assert verdict(candidate(1, "kidney", WL_ORG=organ), KIDNEY) == "other organ"


def read(folder, *cand):
    write_folder(folder, list(cand), [history_row(1, 0)])
    return read_candidates(find_table(folder, "cand_liin"))


def test_candidates_are_read_with_what_was_left_out_or_unknown(tmp_path, caplog):
    cand = read(
        tmp_path,
        {**removed(8, 120), "CAN_REM_CD": "8: Candidate died"},
        {**removed(4, 120, px=2), "CAN_REM_CD": "4: Deceased donor tx"},
        *(candidate(3, CAN_BMI=900), candidate(3, CAN_BMI=900)),  # equal: one registration
        removed(77, 120, px=4, CAN_AGE_IN_MONTHS_AT_LISTING=1500),
        candidate(5, PERS_ID=None),
    )
    assert cand.index.tolist() == [1, 2, 3, 4]
    assert cand.isna().loc[[3, 4], ["bmi", "age"]].to_numpy().tolist() == [[1, 0], [0, 1]]
    assert apply_criteria(cand, LIVER)["label"].tolist()[:3] == [1.0, 0.0, 0.0]
    assert "1 unknown removal codes" in caplog.text
    assert "1 rows without PX_ID or PERS_ID" in caplog.text
    with pytest.raises(InputError, match=r"cand_liin\.csv, column PX_ID"):
        read(tmp_path, candidate(1), candidate(1, CAN_REM_DT=LISTED + 5))


UNKNOWN = dict.fromkeys(("CAN_AGE_IN_MONTHS_AT_LISTING", "CAN_GENDER", "CAN_PREV_TX", "CAN_BMI"))
UNKNOWN |= {"CAN_DIAB": 998, "CAN_ABO": "UNK"}
KNOWN = {"CAN_AGE_IN_MONTHS_AT_LISTING": 690, "CAN_GENDER": "M", "CAN_DIAB": 3, "CAN_PREV_TX": 1}


def test_the_context_is_what_was_known_at_listing():
    table = table_of(candidate(1, **KNOWN, CAN_ABO="AB"), candidate(2, **UNKNOWN))
    assert contexts(table, LIVER).tolist() == [
        "57-year-old man, blood group AB, BMI 25.5 kg/m2, type 2 diabetes, earlier transplant, on "
        "the liver waiting list for 90 days",
        "Patient, on the liver waiting list for 90 days",
    ]


def known_of(definition=KIDNEY, lacking=(), **columns):
    """The known static features of a candidate."""
    table = static_features(table_of(candidate(1, **columns), lacking=lacking), definition)
    return table.iloc[0].dropna().to_dict()


def test_static_features_are_the_columns_of_the_candidate():
    assert known_of(**KNOWN, CAN_ABO="A2", CAN_DIAL_DT=LISTED - 365.25) == {
        "static_age [years]": 57.5,
        "static_sex_male": 1,
        "static_bmi [kg/m2]": 25.5,
        "static_diabetes": 1,
        "static_type_1_diabetes": 0,
        "static_earlier_transplant": 1,
        **{f"static_blood_group_{group}": group == "A" for group in ("A", "B", "AB", "O")},
        "static_years_of_dialysis [years]": pytest.approx(1 + 365 / 365.25),
    }
    assert known_of(LIVER, **UNKNOWN) == {}


def test_a_code_of_diabetes_is_its_presence_and_its_type():
    names = ("static_diabetes", "static_type_1_diabetes")
    table = static_features(
        table_of(*(candidate(c, CAN_DIAB=c) for c in (1, 2, 3, 4, 5, 998))), LIVER
    )
    found = [tuple(row) for row in table[[*names]].fillna(-1).to_numpy()]
    assert found == [(0, 0), (1, 1), (1, 0), (1, 0), (1, -1), (-1, -1)]


def test_years_of_dialysis_end_at_the_landmark_and_a_later_start_is_none():
    name = "static_years_of_dialysis [years]"
    for day in (None, LISTED + 365, LISTED + 366, LISTED + 2000):
        assert known_of(CAN_DIAL_DT=day)[name] == 0
    assert known_of(CAN_DIAL_DT=LISTED + 364)[name] == pytest.approx(1 / 365.25)
    assert name not in known_of(lacking=["CAN_DIAL_DT"])
    assert name not in known_of(LIVER, CAN_DIAL_DT=LISTED)
