"""SRTR: tables in any storage, the history, and the cohort of a landmark with its label."""

import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr import saf
from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, KEYS, ORGANS, TEXT_COLUMNS
from medgemma_clinical.data.srtr.cohort import (
    CENSORED,
    TRANSPLANTED,
    CohortDefinition,
    apply_criteria,
    contexts,
    read_candidates,
    static_features,
)
from medgemma_clinical.data.srtr.history import CODES, DATES, FLAGS, NOWHERE, read_history
from medgemma_clinical.data.srtr.saf import BAD_DATE, EPOCH, decode, find_table, read_saf
from medgemma_clinical.files import InputError
from slow_srtr import DEATHS, decide_slowly
from srtr_files import (
    LISTED,
    SUFFIX,
    SYNTHETIC,
    candidate,
    filler,
    history_row,
    random_tables,
    removed,
    write_folder,
)

# --------------------------------------------------------------------------- tables


def read_table(folder, table="cand_liin"):
    """Read a table whole: of CAND all used columns, of STATHIST two."""
    history = {"PX_ID": "", "CANHX_BEGIN_DT": ""}
    columns = CAND_COLUMNS if table.startswith("cand") else history
    return pd.concat(read_saf(find_table(folder, table), columns), ignore_index=True)


def refusal(folder, table="cand_liin"):
    with pytest.raises(InputError) as caught:
        read_table(folder, table)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "saf", *filler())


def test_a_table_must_be_there_once(folder, tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "cand_kipa" in refusal(folder, "cand_kipa")
    (folder / "old").mkdir()
    shutil.copy(folder / "cand_liin.csv", folder / "old" / "CAND_LIIN.csv")
    assert "cand_liin.csv, old/CAND_LIIN.csv" in refusal(folder)


@pytest.mark.parametrize("ending", [".sas7bdat", ".csv", ".csv.gz", ".dta", ".parquet"])
def test_encrypted_and_truncated_files(ending, tmp_path):
    path = tmp_path / f"cand_liin{ending}"
    contents = [np.random.default_rng(0).bytes(50_000), b""]
    if "csv" not in ending:  # those that are cut: with all readers
        if ending == ".sas7bdat":
            shutil.copy(SYNTHETIC / path.name, path)
        else:
            write_folder(tmp_path, *filler(), ending=ending)
        contents += [path.read_bytes()[:-900], path.read_bytes()[:100]]
    for content in contents:
        path.write_bytes(content)
        assert path.name in refusal(tmp_path)


def test_a_text_of_two_lines_in_latin_1_is_a_cell(folder):
    path, whole = folder / "cand_liin.csv", read_table(folder)
    lines = path.read_text().splitlines()
    text = "\n".join([f"{lines[0]},note", *(f'{line},"J\xe9,\ntwo"' for line in lines[1:])])
    path.write_text(text, encoding="latin-1")
    pd.testing.assert_frame_equal(read_table(folder), whole)


def test_missing_keys_no_rows_and_codes_that_are_words_are_refused(folder):
    (died, *others), rows = filler()
    write_folder(folder, pd.DataFrame([died]).drop(columns=KEYS[-1]), rows)
    assert f"cand_liin.csv: no column {KEYS[-1]}" in refusal(folder)
    write_folder(folder, pd.DataFrame(others)[:0], rows)
    assert "cand_liin.csv: no rows" in refusal(folder)
    write_folder(folder, [{**died, "CAN_REM_CD": "Candidate died"}, *others], rows)
    message = refusal(folder)
    assert "cand_liin.csv, column CAN_REM_CD: 1 cell" in message
    assert "Candidate died" not in message


def test_chunks_give_the_same(tmp_path, monkeypatch):
    cand, history = random_tables(150, "liver", 3)
    cand = cand.astype({"CAN_REM_DT": object})
    cand.loc[40, "CAN_REM_DT"] = "soon"
    folder = write_folder(tmp_path, cand, history)
    whole = read_table(folder)
    assert whole[BAD_DATE].sum() == 1
    monkeypatch.setattr(saf, "CHUNK_ROWS", 31)
    pd.testing.assert_frame_equal(read_table(folder), whole)


def dates_of(*cells, column="CAN_LISTING_DT"):
    """How a column is read: ISO dates, None for empty, "bad" for cells that are no date."""
    found = []
    for day, unread in zip(*decode(pd.Series(cells, name=column, dtype=object)), strict=True):
        date = None if np.isnan(day) else f"{EPOCH + pd.Timedelta(days=day):%Y-%m-%d}"
        found.append("bad" if unread else date)
    return found


def test_dates_of_every_form_are_read_with_two_digit_years_in_the_past():
    forms = (LISTED, "2014-10-04", "10/04/2014", "10/04/14", "04OCT2014", "04oct14")
    assert dates_of(*forms, "2014-10-04 00:00:00") == ["2014-10-04"] * 7
    assert dates_of(".", ".B", "", None, "NaT") == [None] * 5
    assert dates_of("last spring", "2019-13-45", 1.8e9, -30000) == ["bad"] * 4
    two = ["2026-01-02", "1987-12-31", "1999-01-02"]
    assert dates_of("01/02/26", "12/31/87", "01/02/99") == two
    assert dates_of("05/01/65", column="CAN_DIAL_DT") == ["1965-05-01"]
    assert dates_of("05/01/65") == ["bad"]


def test_flags_and_codes_with_labels_are_read():
    assert decode(pd.Series(["ki: Kidney", "LI"], name="WL_ORG"))[0].tolist() == ["KI", "LI"]
    flags, unread = decode(pd.Series(["Y", "N", "1: yes", ".", "maybe"], name="CANHX_DIAL"))
    np.testing.assert_array_equal(flags, [1, 0, 1, np.nan, np.nan])
    assert unread.tolist() == [False] * 4 + [True]


def with_cells(folder, cells, column="CAN_LISTING_DT"):
    """200 registrations of which some have other cells in a column."""
    cand = [candidate(px, **({column: cells[px]} if px < len(cells) else {})) for px in range(200)]
    return write_folder(folder, cand, filler()[1])


@pytest.mark.parametrize(
    ("cell", "column"),
    [
        *((cell, "CAN_LISTING_DT") for cell in ("soon", 1.8e9, 45000)),
        *(("1850-01-01", "PERS_SSA_DEATH_DT"), ("stout", "CAN_BMI")),
    ],
)
def test_impossible_cells_are_counted_and_rows_of_impossible_dates_marked(
    cell, column, tmp_path, caplog
):
    marked = read_table(with_cells(tmp_path, [cell, cell], column))[BAD_DATE]
    assert np.flatnonzero(marked).tolist() == ([] if column == "CAN_BMI" else [0, 1])
    assert f"cand_liin.csv, column {column}: 2 cells" in caplog.text
    assert str(cell) not in caplog.text


def test_a_listing_before_the_registry_is_plausible(tmp_path):
    assert not read_table(with_cells(tmp_path, [9000]))[BAD_DATE].any()  # 1984


REGISTRY = np.linspace(10_000, 23_500, 200)  # listings of 1987 to 2024


@pytest.mark.parametrize(
    "cells",
    [
        (REGISTRY - 3653) // 1,  # days since 1970, most of which are plausible years
        (REGISTRY - 3653) // 1 * 86_400,  # seconds
        ["soon"] * 3,
    ],
)
def test_a_table_whose_dates_count_from_another_day_is_refused(cells, tmp_path):
    assert "cand_liin.csv, column CAN_LISTING_DT: " in refusal(with_cells(tmp_path, cells))


# --------------------------------------------------------------------------- history


class Read:
    """What is read of a history whose registrations are all in the cohort."""

    def __init__(self, folder, cand, history, organ, given):
        write_folder(folder, cand, history, organ)
        definition = CohortDefinition(organ, ORGANS[organ].days, ORGANS[organ].days, "negative")
        cohort = read_candidates(find_table(folder, f"cand_{SUFFIX[organ]}"))
        path = find_table(folder, f"stathist_{SUFFIX[organ]}")
        self.rows, self.dialysis = read_history(path, definition, cohort, given)

    def feature(self, name):
        """Days and values of one feature of the first; values are -1 where not measured."""
        rows = self.rows[self.rows["PX_ID"] == 1]
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


READ = [  # organ, feature, cells by day, values by day
    ("liver", "MELD", {-9: 6210, -2: 6220, 30: 6230, 90: 6231, 91: 6240}, {0: 20, 30: 30, 90: 31}),
    ("liver", "MELD", {-9: 6210, -2: 6220, 0: 6225}, {0: 25}),
    ("liver", "MELD", {1: 6206, 2: 6240, 3: 22, 4: 6011}, {1: 6, 2: 40, 3: 22, 4: -1}),
    ("liver", "status", {1: 6010, 2: 6012, 3: 6101, 4: 6299}, {1: 1, 2: 1, 3: 1, 4: 1}),
    ("liver", "status", {1: 6011, 2: 6999, 3: 6300, 4: 7}, {1: 1, 2: 0, 3: -1, 4: -1}),
    ("kidney", "status", {1: 4010, 2: 4050, 3: 4060}, {1: 1, 2: 1, 3: 1}),
    ("kidney", "status", {1: 4099, 2: 4999, 3: 4000}, {1: 0, 2: 0, 3: -1}),
]


@pytest.mark.parametrize(("organ", "name", "cells", "values"), READ)
def test_read_history__codes_and_days(organ, name, cells, values, read, caplog):
    """Rows count by the landmark; the last before listing is carried to day 0."""
    column = {"status": "CANHX_STAT_CD", "MELD": "CANHX_SRTR_LAB_MELD"}[name]
    measured = {"CANHX_BILI" if organ == "liver" else "CANHX_CPRA": 1.0}
    rows = [history_row(1, day, organ, **measured, **{column: cells[day]}) for day in cells]
    assert dict(read(*rows, organ=organ).feature(name)) == values
    unknown = [*values.values()].count(-1)
    assert (f"{column}: {unknown} cells" in caplog.text) == bool(unknown)


def test_the_rows_of_a_day_are_one_and_the_later_value_counts(read):
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=m) for day, m in ((9, 6220), (30, 6230))]
    found = read(history_row(1, 9, CANHX_SRTR_LAB_MELD=6210, CANHX_BILI=3.0), *rows)
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
    expected = [(CODES, [1], 0.0), (FLAGS, [1], 1.0), (DATES, [1], 1.0), (NOWHERE, [1], -1.0)]
    for given, cells, value in (*expected, (CODES, [None], -1.0)):
        found = read(*kidney_rows([0], cells), cand=cand, organ="kidney", given=given)
        assert (found.dialysis, found.feature("dialysis")) == (given, [(0, value)])


@pytest.mark.parametrize(("given", "cells"), [(FLAGS, (1, 998)), (CODES, (0, 1))])
def test_a_history_of_another_coding_is_refused(given, cells, read):
    with pytest.raises(InputError, match=r"stathist_kipa\.csv, column CANHX_DIAL: "):
        read(*kidney_rows((0, 1), cells), organ="kidney", given=given)


def test_the_livers_column_is_a_flag_whatever_it_holds(read):
    for columns, source, value in (({"CANHX_DIAL_PRIOR_WEEK": "Y"}, FLAGS, 1), ({}, NOWHERE, -1)):
        found = read(history_row(1, 0, **columns))
        assert (found.dialysis, found.feature("dialysis")) == (source, [(0, value)])


# --------------------------------------------------------------------------- cohort

LIVER = CohortDefinition("liver", 90, 90, "negative")
KIDNEY = CohortDefinition("kidney", 365, 365, "negative")


def table_of(*rows, lacking=()):
    """Rows as ``read_candidates`` reads them."""
    table = pd.DataFrame([{**dict.fromkeys(CAND_COLUMNS), **row} for row in rows])
    table = table.astype({name: float for name in CAND_COLUMNS if name not in TEXT_COLUMNS})
    age, bmi = table["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12, table["CAN_BMI"]
    table = table.assign(age=age, bmi=bmi, **{BAD_DATE: False}).set_index("PX_ID")
    return table.drop(columns=list(lacking))


REMOVALS = [*range(4, 25), 40, 43, 45, 77, None, None, 8, 8, 13, 13]
KNOWN_DATES = {"CAN_REM_DT": 0.7, "REC_TX_DT": 0.2, "CAN_ENDWLFU": 0.8}
KNOWN_DATES |= dict.fromkeys(DEATHS, 0.1)


def random_registrations(rng, organ, landmark, horizon, rows=2000):
    """Rows whose days are often at or beside the landmark and the end of the horizon."""
    ends = [end + k for end in (landmark, landmark + horizon) for k in (-9, -1, 0, 1, 9)]
    drawn = {
        "PX_ID": range(rows),
        "CAN_REM_CD": rng.choice(REMOVALS, rows),
        "CAN_SOURCE": rng.choice(["A", "R", "A", "R", "L"], rows),
        "WL_ORG": rng.choice([*[organ] * 9, "KP", "IN", "PA"], rows),
        "CAN_AGE_IN_MONTHS_AT_LISTING": rng.choice([215, *[216, 600, None] * 5], rows),
    }
    for name, share in KNOWN_DATES.items():
        days = LISTED + rng.choice([*ends, -5, 1500], rows)
        drawn[name] = np.where(rng.random(rows) < share, days, None)
    return pd.DataFrame({**candidate(0), **drawn}).to_dict("records")


@pytest.mark.parametrize(
    ("organ", "landmark", "horizon", "transplant", "kind"),
    [
        ("liver", 90, 90, "negative", "label"),
        ("liver", 90, 90, "exclude", "label"),
        ("liver", 0, 1, "exclude", "label"),
        ("kidney", 365, 30, "negative", "label"),
        ("liver", 0, 90, "negative", "time"),
        ("kidney", 365, 90, "negative", "time"),
    ],
)
def test_apply_criteria_decides_as_a_slow_reading_of_each_registration(
    organ, landmark, horizon, transplant, kind
):
    rng, times = np.random.default_rng(landmark + 1), kind == "time"
    rows = random_registrations(rng, ORGANS[organ].code, landmark, horizon)
    definition = CohortDefinition(organ, landmark, horizon, transplant, kind)
    registrations = apply_criteria(table_of(*rows), definition)
    history = pd.DataFrame({"PX_ID": range(len(rows)), "CANHX_BEGIN_DT": 0})
    words = {"landmark": landmark, "horizon": horizon, "exclude": transplant == "exclude"}
    expected = decide_slowly(pd.DataFrame(rows), history, organ, **words, times=times)
    ends = registrations["label"].tolist()
    if times:
        ends = list(zip(registrations["event"], registrations["event_days"], strict=True))
        assert (registrations["label"] == (registrations["event"] == 1)).all()
    reasons = registrations["reason"].tolist()
    decided = [reason or end for reason, end in zip(reasons, ends, strict=True)]
    assert dict(zip(registrations.index, decided, strict=True)) == expected
    is_unknown = registrations["reason"].isin([CENSORED, TRANSPLANTED])
    assert registrations["label"][is_unknown].isna().all()
    kinds = Counter(end[0] if isinstance(end, tuple) else end for end in expected.values())
    assert min(kinds.values()) >= 10
    assert not times or {0, 1, 2, 3, 4} <= kinds.keys()


def candidates_of(folder, *cand):
    write_folder(folder, list(cand), [history_row(1, 0)])
    return read_candidates(find_table(folder, "cand_liin"))


def test_candidates_are_read_with_what_was_left_out_or_unknown(tmp_path, caplog):
    cand = candidates_of(
        tmp_path,
        {**removed(8, 120), "CAN_REM_CD": "8: Candidate died"},
        *[candidate(3, CAN_BMI=900)] * 2,  # equal: one registration
        removed(77, 120, px=4, CAN_AGE_IN_MONTHS_AT_LISTING=1500),
        candidate(5, PERS_ID=None),
    )
    assert cand.index.tolist() == [1, 3, 4]
    assert cand.isna().loc[[3, 4], ["bmi", "age"]].to_numpy().tolist() == [[1, 0], [0, 1]]
    assert apply_criteria(cand, LIVER)["label"].tolist()[:2] == [1.0, 0.0]
    assert "1 unknown removal codes" in caplog.text
    assert "1 rows without PX_ID or PERS_ID" in caplog.text
    with pytest.raises(InputError, match=r"cand_liin\.csv, column PX_ID"):
        candidates_of(tmp_path, candidate(1), candidate(1, CAN_REM_DT=LISTED + 5))


UNKNOWN = dict.fromkeys(("CAN_AGE_IN_MONTHS_AT_LISTING", "CAN_GENDER", "CAN_PREV_TX", "CAN_BMI"))
UNKNOWN |= {"CAN_DIAB": 998, "CAN_ABO": "UNK"}
KNOWN = {"CAN_AGE_IN_MONTHS_AT_LISTING": 690, "CAN_GENDER": "M", "CAN_DIAB": 3, "CAN_PREV_TX": 1}


def test_the_context_is_what_was_known_at_listing():
    known = "57-year-old man, blood group AB, BMI 25.5 kg/m2, type 2 diabetes, earlier transplant, "
    table = table_of(candidate(1, **KNOWN, CAN_ABO="AB"), candidate(2, **UNKNOWN))
    waits = "on the liver waiting list for 90 days"
    assert contexts(table, LIVER).tolist() == [known + waits, f"Patient, {waits}"]


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
