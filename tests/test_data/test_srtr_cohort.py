"""SRTR: who is in the cohort of a landmark, with which label, context and static features."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, ORGANS, TEXT_COLUMNS
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
from slow_srtr import DEATHS, decide_slowly
from srtr_files import LISTED, candidate, history_row, removed, write_folder

LIVER = CohortDefinition("liver", 90, 90, "negative")
KIDNEY = CohortDefinition("kidney", 365, 365, "negative")


def table_of(*rows, lacking=()):
    """Rows as ``read_candidates`` reads them."""
    table = pd.DataFrame([{**dict.fromkeys(CAND_COLUMNS), **row} for row in rows])
    table = table.astype({name: float for name in CAND_COLUMNS if name not in TEXT_COLUMNS})
    age, bmi = table["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12, table["CAN_BMI"]
    table = table.assign(age=age, bmi=bmi, **{BAD_DATE: False}).set_index("PX_ID")
    return table.drop(columns=list(lacking))


CODES = [*range(4, 25), 40, 43, 45, 77, None, None, 8, 8, 13, 13]
DATES = {"CAN_REM_DT": 0.7, "REC_TX_DT": 0.2, "CAN_ENDWLFU": 0.8, **dict.fromkeys(DEATHS, 0.1)}


def random_registrations(rng, organ, landmark, horizon, rows=2000):
    """Rows whose days are often at or beside the landmark and the end of the horizon."""
    ends = [end + k for end in (landmark, landmark + horizon) for k in (-9, -1, 0, 1, 9)]
    drawn = {
        "PX_ID": range(rows),
        "CAN_REM_CD": rng.choice(CODES, rows),
        "CAN_SOURCE": rng.choice(["A", "R", "A", "R", "L"], rows),
        "WL_ORG": rng.choice([*[organ] * 9, "KP", "IN", "PA"], rows),
        "CAN_AGE_IN_MONTHS_AT_LISTING": rng.choice([215, *[216, 600, None] * 5], rows),
    }
    for name, share in DATES.items():
        days = LISTED + rng.choice([*ends, -5, 1500], rows)
        drawn[name] = np.where(rng.random(rows) < share, days, None)
    return pd.DataFrame({**candidate(0), **drawn}).to_dict("records")


@pytest.mark.parametrize(
    ("organ", "landmark", "horizon", "transplant"),
    [
        ("liver", 90, 90, "negative"),
        ("liver", 90, 90, "exclude"),
        ("liver", 0, 1, "exclude"),
        ("kidney", 365, 30, "negative"),
    ],
)
def test_apply_criteria_decides_as_a_slow_reading_of_each_registration(
    organ, landmark, horizon, transplant
):
    rng = np.random.default_rng(landmark)
    rows = random_registrations(rng, ORGANS[organ].code, landmark, horizon)
    found = apply_criteria(table_of(*rows), CohortDefinition(organ, landmark, horizon, transplant))
    history = pd.DataFrame({"PX_ID": range(len(rows)), "CANHX_BEGIN_DT": 0})
    words = {"landmark": landmark, "horizon": horizon, "exclude": transplant == "exclude"}
    expected = decide_slowly(pd.DataFrame(rows), history, organ, **words)
    reason = found["reason"].astype(object)
    assert found["label"].where(reason == "", reason).to_dict() == expected
    assert found["label"][reason.isin([CENSORED, TRANSPLANTED])].isna().all()
    assert min(Counter(expected.values()).values()) >= 10


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
