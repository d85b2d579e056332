"""SRTR: which history rows count at the landmark, their values, and where dialysis is read."""

import pandas as pd
import pytest

from medgemma_clinical.data.srtr.codes import ORGANS
from medgemma_clinical.data.srtr.cohort import CohortDefinition, read_candidates
from medgemma_clinical.data.srtr.history import CODES, DATES, FLAGS, NOWHERE, read_history
from medgemma_clinical.data.srtr.saf import find_table
from medgemma_clinical.files import InputError
from srtr_files import LISTED, SUFFIX, candidate, history_row, write_folder


class Read:
    """What is read of a history whose registrations are all in the cohort."""

    def __init__(self, folder, cand, history, organ, given):
        write_folder(folder, cand, history, organ)
        definition = CohortDefinition(organ, ORGANS[organ].days, ORGANS[organ].days, "negative")
        cohort = read_candidates(find_table(folder, f"cand_{SUFFIX[organ]}"))
        path = find_table(folder, f"stathist_{SUFFIX[organ]}")
        self.rows, self.dialysis = read_history(path, definition, cohort, given)

    def feature(self, name, px=1):
        """Days and values of one feature; values are -1 where not measured."""
        rows = self.rows[self.rows["PX_ID"] == px]
        return list(zip(rows["day"].tolist(), rows[name].fillna(-1).tolist(), strict=True))


@pytest.fixture
def read(tmp_path):
    def build(*history, cand=None, organ="liver", given=None):
        others = sorted({row["PX_ID"] for row in history} - {1})
        everyone = [cand or candidate(1, organ), *(candidate(px, organ) for px in others)]
        return Read(tmp_path, everyone, list(history), organ, given)

    return build


def kidney_rows(days, cells, column="CANHX_DIAL"):
    pairs = zip(days, cells, strict=True)
    return [history_row(1, day, "kidney", **{column: cell}) for day, cell in pairs]


def test_rows_by_the_landmark_count_and_the_last_before_listing_is_carried_to_day_0(read):
    days = [(-300, 6210), (-20, 6220), (30, 6230), (90, 6231), (91, 6240)]
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=meld) for day, meld in days]
    assert read(*rows).feature("MELD") == [(0, 20), (30, 30), (90, 31)]
    rows.append(history_row(1, 0, CANHX_SRTR_LAB_MELD=6225))
    assert read(*rows).feature("MELD") == [(0, 25), (30, 30), (90, 31)]


def test_the_rows_of_a_day_are_one_and_the_later_value_counts(read):
    cells = [(9, 6210, 3.0), (9, 6220, None), (30, 6230, None)]
    rows = [
        history_row(1, day, CANHX_SRTR_LAB_MELD=meld, CANHX_BILI=bili) for day, meld, bili in cells
    ]
    found = read(*rows)
    assert found.feature("MELD") == [(9, 20), (30, 30)]
    assert found.feature("bilirubin") == [(9, 3), (30, -1)]  # measured on that day: not filled
    for codes, seconds in (((4099, 4010), (100, 200)), ((4010, 4099), (200, 100))):
        rows = kidney_rows((10, 10), codes, "CANHX_STAT_CD")
        rows = [row | {"CANHX_BEGIN_TM": s} for row, s in zip(rows, seconds, strict=True)]
        assert read(*rows, organ="kidney").feature("status") == [(10, 1)]


def test_a_row_with_an_impossible_date_or_without_values_is_left_out(read):
    rows = [history_row(1, day) for day in range(60)] * 2
    rows.append(history_row(2, 10**6))
    rows.append(history_row(3, 3, CANHX_STAT_CD=None, CANHX_SRTR_LAB_MELD=None))
    assert read(*rows).rows["PX_ID"].tolist() == [1] * 60


def test_the_features_are_decoded(read):
    cells = (1.5, 3.1, None, "Y", 2.5, 1.2, 133, 6228, 2, 998, 6999)
    features = ORGANS["liver"].features
    columns = [feature.keys[0] for feature in features]
    found = read(history_row(1, 5, **dict(zip(columns, cells, strict=True))))
    want = (1.5, 3.1, -1, 1, 2.5, 1.2, 133, 28, 2, -1, 0)
    assert [found.feature(feature.name) for feature in features] == [[(5, cell)] for cell in want]


CODED = {
    ("liver", "status"): {6010: 1, 6011: 1, 6012: 1, 6101: 1, 6299: 1, 6999: 0, 6300: -1, 7: -1},
    ("kidney", "status"): {4010: 1, 4050: 1, 4060: 1, 4099: 0, 4999: 0, 4000: -1},
    ("liver", "MELD"): {6206: 6, 6240: 40, 22: 22, 6011: -1, 6999: -1},
}


@pytest.mark.parametrize(("organ", "name"), CODED)
def test_status_and_meld_codes(organ, name, read, caplog):
    codes, extra = CODED[organ, name], {"liver": "CANHX_BILI", "kidney": "CANHX_CPRA"}[organ]
    column = {"status": "CANHX_STAT_CD", "MELD": "CANHX_SRTR_LAB_MELD"}[name]
    rows = [
        history_row(1, day, organ, **{extra: 1.0, column: code}) for day, code in enumerate(codes)
    ]
    assert read(*rows, organ=organ).feature(name) == list(enumerate(codes.values()))
    assert f"{column}: {list(codes.values()).count(-1)} cells" in caplog.text


def test_dialysis_counts_from_its_day_and_gfr_enters_at_its_own(read):
    def dated(dialysis, gfr):
        columns = {"CAN_DIAL_DT": dialysis, "CAN_GFR": 11, "CAN_GFR_DT": gfr}
        rows = [history_row(1, day, "kidney") for day in (0, 100)]
        found = read(*rows, cand=candidate(1, "kidney", **columns), organ="kidney")
        assert found.dialysis == DATES
        return found

    before = dated(LISTED - 730.5, LISTED - 10)
    assert before.feature("dialysis") == [(0, 1), (100, 1)]
    assert before.feature("GFR") == [(0, 11), (100, -1)]
    between = dated(LISTED + 50, LISTED + 70)
    assert between.feature("dialysis") == [(0, 0), (50, 1), (70, 1), (100, 1)]
    assert between.feature("GFR") == [(0, -1), (50, -1), (70, 11), (100, -1)]
    later, missing = dated(LISTED + 366, LISTED + 366), dated(None, None)
    assert later.feature("dialysis") == [(0, 0), (100, 0)]
    pd.testing.assert_frame_equal(later.rows, missing.rows)


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
def test_a_kidney_history_of_dialysis_codes_is_not_inverted(cell, others, source, expected, read):
    own = kidney_rows([0], [cell])
    later = kidney_rows([900], [others])  # later rows decide the coding too
    for rows in (own + [{**later[0], "PX_ID": px} for px in range(2, 6)], own + later):
        found = read(*rows, cand=candidate(1, "kidney", CAN_DIAL_DT=None), organ="kidney")
        assert (found.dialysis, found.feature("dialysis")) == (source, [(0, expected)])


def test_a_lone_registration_decodes_as_in_the_training_data(read):
    cand = candidate(1, "kidney", CAN_DIAL_DT=LISTED - 50)
    for given, value in {CODES: 0.0, FLAGS: 1.0, DATES: 1.0, NOWHERE: -1.0}.items():
        found = read(*kidney_rows([0], [1]), cand=cand, organ="kidney", given=given)
        assert (found.dialysis, found.feature("dialysis")[0][1]) == (given, value)
    nothing = read(history_row(1, 0, "kidney"), cand=cand, organ="kidney", given=CODES)
    assert nothing.feature("dialysis")[0][1] == -1, "no date where the training data had codes"


@pytest.mark.parametrize(("given", "cells"), [(FLAGS, (1, 998)), (CODES, (0, 1))])
def test_a_history_of_another_coding_is_refused(given, cells, read):
    with pytest.raises(InputError, match=r"stathist_kipa\.csv, column CANHX_DIAL: "):
        read(*kidney_rows((0, 1), cells), organ="kidney", given=given)


def test_the_livers_column_is_a_flag_whatever_it_holds(read):
    found = read(history_row(1, 0, CANHX_DIAL_PRIOR_WEEK="Y"))
    assert (found.dialysis, found.feature("dialysis")) == (FLAGS, [(0, 1)])
    nothing = read(history_row(1, 0))
    assert (nothing.dialysis, nothing.feature("dialysis")) == (NOWHERE, [(0, -1)])
