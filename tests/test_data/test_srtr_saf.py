"""SRTR: tables in any storage, damaged ones, and cells that are dates, codes or neither."""

import shutil

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr import saf
from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, KEYS
from medgemma_clinical.data.srtr.saf import BAD_DATE, EPOCH, decode, find_table, read_saf
from medgemma_clinical.files import InputError
from srtr_files import LISTED, SYNTHETIC, candidate, filler, random_tables, write_folder


def read(folder, table="cand_liin"):
    """Read a table whole: of CAND all used columns, of STATHIST two."""
    history = {"PX_ID": "", "CANHX_BEGIN_DT": ""}
    columns = CAND_COLUMNS if table.startswith("cand") else history
    return pd.concat(read_saf(find_table(folder, table), columns), ignore_index=True)


def refusal(folder, table="cand_liin"):
    with pytest.raises(InputError) as caught:
        read(folder, table)
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
    path, whole = folder / "cand_liin.csv", read(folder)
    lines = path.read_text().splitlines()
    text = "\n".join([f"{lines[0]},note", *(f'{line},"J\xe9,\ntwo"' for line in lines[1:])])
    path.write_text(text, encoding="latin-1")
    pd.testing.assert_frame_equal(read(folder), whole)


def test_missing_keys_no_rows_and_codes_that_are_words_are_refused(folder):
    cand, rows = filler()
    for column in KEYS:
        write_folder(folder, pd.DataFrame(cand).drop(columns=column), rows)
        assert f"cand_liin.csv: no column {column}" in refusal(folder)
    write_folder(folder, pd.DataFrame(cand)[:0], rows)
    assert "cand_liin.csv: no rows" in refusal(folder)
    write_folder(folder, [{**cand[0], "CAN_REM_CD": "Candidate died"}, *cand[1:]], rows)
    with pytest.raises(InputError, match=r"cand_liin\.csv, column CAN_REM_CD: 1 cell") as caught:
        read(folder)
    assert "Candidate died" not in str(caught.value)
    assert caught.value.value == "Candidate died"


def test_chunks_give_the_same(tmp_path, monkeypatch):
    cand, history = random_tables(150, "liver", 3)
    cand = cand.astype({"CAN_REM_DT": object})
    cand.loc[40, "CAN_REM_DT"] = "soon"
    folder = write_folder(tmp_path, cand, history)
    whole = read(folder)
    assert whole[BAD_DATE].sum() == 1
    monkeypatch.setattr(saf, "CHUNK_ROWS", 31)
    pd.testing.assert_frame_equal(read(folder), whole)


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
        *(("soon", "CAN_LISTING_DT"), ("1850-01-01", "PERS_SSA_DEATH_DT")),
        *((1.8e9, "CAN_LISTING_DT"), (-30000, "PERS_SSA_DEATH_DT"), (45000, "CAN_LISTING_DT")),
        ("stout", "CAN_BMI"),
    ],
)
def test_impossible_cells_are_counted_and_rows_of_impossible_dates_marked(
    cell, column, tmp_path, caplog
):
    marked = read(with_cells(tmp_path, [cell, cell], column))[BAD_DATE]
    assert np.flatnonzero(marked).tolist() == ([] if column == "CAN_BMI" else [0, 1])
    assert f"cand_liin.csv, column {column}: 2 cells" in caplog.text
    assert str(cell) not in caplog.text


def test_a_listing_before_the_registry_is_plausible(tmp_path):
    table = read(with_cells(tmp_path, [9000]))  # 1984
    assert not table[BAD_DATE].any()
    assert table["CAN_LISTING_DT"].iloc[0] == 9000


REGISTRY = np.linspace(10_000, 23_500, 200)  # listings of 1987 to 2024


@pytest.mark.parametrize(
    "cells",
    [
        (REGISTRY - 3653) // 1,  # days since 1970, most of which are plausible years
        (REGISTRY + 21_915) // 1,  # of a spreadsheet
        (REGISTRY - 3653) // 1 * 86_400,  # seconds
        ["soon"] * 3,
    ],
)
def test_a_table_whose_dates_count_from_another_day_is_refused(cells, tmp_path):
    assert "cand_liin.csv, column CAN_LISTING_DT: " in refusal(with_cells(tmp_path, cells))
