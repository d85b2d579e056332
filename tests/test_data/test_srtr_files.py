"""SRTR: files in any storage, damaged ones, and cells that are dates, codes or neither."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.srtr import decode as decode_module
from medgemma_clinical.data.srtr.codes import CAND_COLUMNS, KEYS
from medgemma_clinical.data.srtr.decode import BAD_DATE, EPOCH, decode, read_saf
from medgemma_clinical.data.srtr.files import find_table
from medgemma_clinical.files import InputError
from srtr_files import LISTED, SYNTHETIC, candidate, filler, random_tables, write_folder

UNREADABLE = "not readable to its end"
"""Words of an error; those of a test's own name would be in its path."""


def read(folder: Path, table: str = "cand_liin", columns: Any = None) -> pd.DataFrame:
    """Read a table whole: of CAND all used columns, of STATHIST two."""
    if columns is None:
        history = {"PX_ID": "", "CANHX_BEGIN_DT": ""}
        columns = CAND_COLUMNS if table.startswith("cand") else history
    return pd.concat(read_saf(find_table(folder, table), columns), ignore_index=True)


def refusal(folder: Path, table: str = "cand_liin") -> str:
    with pytest.raises(InputError) as caught:
        read(folder, table)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "saf", *filler())


# ------------------------------------------------------------------- files


def test_missing_folder_and_tables(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "cand_kipa" in refusal(folder, "cand_kipa")
    (folder / "stathist_liin.csv").rename(folder / "stathist_liin.zip")
    text = refusal(folder, "stathist_liin")
    assert "stathist_liin (" in text
    assert "unpacked: found none among 2 files" in text


def test_a_table_found_twice(folder: Path) -> None:
    (folder / "old").mkdir()
    shutil.copy(folder / "cand_liin.csv", folder / "old" / "CAND_LIIN.csv")
    assert "once, decrypted and unpacked: found cand_liin.csv, old/CAND_LIIN.csv" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "size"), [("cand_liin", 0), ("stathist_liin", 100), ("cand_liin", 100_000)]
)
def test_truncated_sas_files(name: str, size: int, tmp_path: Path) -> None:
    content = (SYNTHETIC / f"{name}.sas7bdat").read_bytes()
    (tmp_path / f"{name}.sas7bdat").write_bytes(content[:size])
    assert UNREADABLE in refusal(tmp_path, name)


@pytest.mark.filterwarnings("ignore::pandas.errors.ParserWarning")
def test_encrypted_files(folder: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    for ending in (".sas7bdat", ".dta"):
        place = tmp_path / ending.strip(".")
        place.mkdir()
        (place / f"cand_liin{ending}").write_bytes(noise)
        assert UNREADABLE in refusal(place)
    (folder / "cand_liin.csv").write_bytes(noise)
    assert "cand_liin.csv" in refusal(folder)


def test_truncated_text_files(folder: Path, tmp_path: Path) -> None:
    path = folder / "cand_liin.csv"
    content = path.read_text()
    path.write_text(content.rstrip("\n"))
    assert len(read(folder)) == 24, "a file without a last line break is whole"
    path.write_text(content[: content.rindex(",") - 8])
    assert UNREADABLE in refusal(folder)
    stata = write_folder(tmp_path / "stata", *filler(), ending=".dta")
    file = stata / "cand_liin.dta"
    file.write_bytes(file.read_bytes()[:-900])
    assert UNREADABLE in refusal(stata)


def test_rows_with_more_fields_than_the_header(folder: Path) -> None:
    path = folder / "cand_liin.csv"
    whole = read(folder)
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line},\n" for line in lines))  # a comma behind each row
    pd.testing.assert_frame_equal(read(folder), whole)
    lines[4] = lines[4].replace(",LI,", ",LI: Liver, whole,")  # a label that shifts its row
    path.write_text("\n".join(lines) + "\n")
    assert "data row 4: is no date" in refusal(folder)


def test_missing_keys_and_no_rows(folder: Path) -> None:
    cand, rows = filler()
    for column in KEYS:
        write_folder(folder, pd.DataFrame(cand).drop(columns=column), rows)
        text = refusal(folder)
        assert f"no column {column}" in text
        assert "CAND_LIIN" in text
    write_folder(folder, pd.DataFrame(cand)[:0], rows)
    assert "no rows below the header" in refusal(folder)


def test_parquet_without_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "cand_liin.csv").rename(folder / "cand_liin.parquet")
    assert "pip install pyarrow" in refusal(folder)


def test_chunks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cand, history = random_tables(150, "liver", 3)
    cand = cand.astype({"CAN_REM_DT": object})
    cand.loc[40, "CAN_REM_DT"] = "soon"
    folder = write_folder(tmp_path, cand, history)
    whole = read(folder)
    assert whole[BAD_DATE].sum() == 1
    monkeypatch.setattr(decode_module, "CHUNK_ROWS", 31)
    pd.testing.assert_frame_equal(read(folder), whole)


# ------------------------------------------------------------------- cells


def dates_of(*cells: object, column: str = "CAN_LISTING_DT") -> list[str | None]:
    """How a column is read: ISO dates, None for empty, "bad" for cells that are no date."""
    decoded = decode(pd.Series(cells, name=column, dtype=object))
    found: list[str | None] = []
    for day, unread in zip(*decoded, strict=True):
        date = None if np.isnan(day) else f"{EPOCH + pd.Timedelta(days=day):%Y-%m-%d}"
        found.append("bad" if unread else date)
    return found


def test_dates_of_every_form_are_read() -> None:
    assert dates_of(LISTED, "2014-10-04", "10/04/2014", "10/04/14", "04OCT2014", "04oct14") == (
        ["2014-10-04"] * 6
    )
    assert dates_of("2014-10-04 00:00:00", ".", ".B", "", None, "NaT") == (
        ["2014-10-04", *[None] * 5]
    )
    assert dates_of("last spring", "2019-13-45", 1.8e9, -30000) == ["bad"] * 4


def test_two_digit_years_are_in_the_past() -> None:
    assert dates_of("01/02/26", "12/31/87", "01/02/99") == [
        "2026-01-02",
        "1987-12-31",
        "1999-01-02",
    ]
    assert dates_of("05/01/65", column="CAN_DIAL_DT") == ["1965-05-01"]
    assert dates_of("05/01/65") == ["bad"]


def test_words_numbers_and_codes_with_labels_are_read() -> None:
    assert decode(pd.Series(["ki: Kidney", "LI"], name="WL_ORG"))[0].tolist() == ["KI", "LI"]
    flags, unread = decode(pd.Series(["Y", "N", "1: yes", ".", "maybe"], name="CANHX_DIAL"))
    np.testing.assert_array_equal(flags, [1, 0, 1, np.nan, np.nan])
    assert unread.tolist() == [False] * 4 + [True]


def test_a_removal_that_is_no_code_is_refused(folder: Path) -> None:
    cand, rows = filler()
    write_folder(folder, [{**cand[0], "CAN_REM_CD": "Candidate died"}, *cand[1:]], rows)
    text = refusal(folder)
    assert "column CAN_REM_CD, data row 1: is neither a code" in text
    assert "Candidate died" not in text


# ------------------------------------------------------------------- impossible dates


def with_dates(folder: Path, cells: list[Any], column: str = "CAN_LISTING_DT") -> Path:
    """200 registrations of which some have other cells in a column of dates."""
    cand = [candidate(px, **({column: cells[px]} if px < len(cells) else {})) for px in range(200)]
    return write_folder(folder, cand, filler()[1])


@pytest.mark.parametrize(
    ("cell", "column"),
    [
        *(("soon", "CAN_LISTING_DT"), ("1850-01-01", "PERS_SSA_DEATH_DT")),
        *((1.8e9, "CAN_LISTING_DT"), (-30000, "PERS_SSA_DEATH_DT"), (45000, "CAN_LISTING_DT")),
    ],
)
def test_a_few_impossible_dates_are_counted_and_their_rows_marked(
    cell: Any, column: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = read(with_dates(tmp_path, [cell, cell], column))
    assert np.flatnonzero(table[BAD_DATE]).tolist() == [0, 1]
    assert f"column {column}: 2 impossible dates: their rows are left out" in caplog.text
    assert str(cell) not in caplog.text


def test_a_listing_before_the_registry_is_plausible(tmp_path: Path) -> None:
    table = read(with_dates(tmp_path, [9000]))
    assert not table[BAD_DATE].any()
    assert table["CAN_LISTING_DT"].iloc[0] == 9000  # 1984


@pytest.mark.parametrize("cell", ["soon", 1.8e9, 9000])
def test_many_impossible_or_early_dates_refuse_the_table(cell: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(with_dates(tmp_path, [LISTED, *[cell] * 3]))
    text = str(caught.value)
    assert "column CAN_LISTING_DT, data row 2: is no date of a known form" in text
    assert "not from 1987 (dialysis: 1960) to now, one of 3 such rows among 200" in text
    assert str(cell) not in text
    assert caught.value.value is not None
