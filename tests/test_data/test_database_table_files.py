"""Table files: the same from any form; damage is named by file, line and column, never content."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medgemma_clinical.data.database.connection import Database, open_database
from medgemma_clinical.data.database.table_files import (
    KEY,
    NUMBER_OR_EMPTY,
    TIME,
    TIME_OR_EMPTY,
    WORD_OR_EMPTY,
    Column,
    load_table,
    open_table,
)
from medgemma_clinical.files import InputError

COLUMNS = {
    "item": KEY,
    "subject": KEY,
    "time": TIME,
    "stored": replace(TIME_OR_EMPTY, optional=True),
    "value": NUMBER_OR_EMPTY,
    "unit": WORD_OR_EMPTY,
}
HEADER = "item,other,subject,time,value,unit,note\n"
ROW = '{item},7.5,1,2150-01-01 00:{minute:02d}:00,{value},mEq/L,"said ""so"", twice"\n'
TEXT = HEADER + "".join(ROW.format(item=k % 5, minute=k % 60, value=k / 4) for k in range(500))
SECRET = "98765"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(tmp_path, "200MB", 2) as opened:
        yield opened


def read(database: Database, path: Path, keep: str = "true") -> pd.DataFrame:
    database.run("DROP TABLE IF EXISTS cells")
    file = open_table(database, path, COLUMNS, "a hint")
    load_table(database, "cells", file, COLUMNS, keep.format(item=KEY.typed(file.raw("item"))))
    return database.frame("FROM cells ORDER BY ALL")


def test_csv_gzip_and_parquet_are_read_alike(database: Database, tmp_path: Path) -> None:
    texts = {
        "plain.csv": TEXT.encode(),
        "windows.csv": TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
        "within quotes.csv": TEXT.replace("so", "s\no").encode(),
        "blank lines.csv": TEXT.replace("\n", "\n\n", 3).encode(),
        "[o]d *'name.csv": TEXT.encode(),
        "packed.csv.gz": gzip.compress(TEXT.encode()),
    }
    tables = []
    (tmp_path / "od *'name.csv").write_text("a pattern would match this")
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        tables.append(read(database, tmp_path / name))
    whole = pd.read_csv(tmp_path / "plain.csv")
    whole.assign(time=pd.to_datetime(whole["time"])).to_parquet(tmp_path / "typed.parquet")
    whole.astype(str).to_parquet(tmp_path / "text.parquet")
    tables += [read(database, tmp_path / f"{name}.parquet") for name in ("typed", "text")]
    first = tables[0]
    assert len(first) == 500
    assert first["value"].sum() == sum(range(500)) / 4
    assert first["stored"].isna().all()
    for other in tables[1:]:
        pd.testing.assert_frame_equal(other, first)


def test_empty_cells_are_missing_and_cells_are_trimmed(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + '1.0,,2,2150-01-01T10:00:00.75, 2.5 ," mg ",\n1,,3,2150-01-02,,,\n')
    first, second = read(database, path).to_dict("records")
    assert (first["item"], first["value"], first["unit"]) == (1, 2.5, "mg")
    assert first["time"] == pd.Timestamp("2150-01-01 10:00:00")
    assert second["time"] == pd.Timestamp("2150-01-02")
    assert (pd.isna(second["value"]), second["unit"]) == (True, "")


def edit(old: str, new: str, place: int = 300) -> Callable[[str], str]:
    """Change a text once, in line ``place``."""

    def change(text: str) -> str:
        lines = text.split("\n")
        assert old in lines[place - 1]
        lines[place - 1] = lines[place - 1].replace(old, new, 1)
        return "\n".join(lines)

    return change


BAD: dict[str, tuple[Callable[[str], str], str]] = {
    "a word for a number": (edit("74.5", SECRET + "x"), ", line 300, column value: not a number:"),
    "a word for a time": (edit("2150-", SECRET), ", line 300, column time: not a time"),
    "no time": (edit("2150-01-01 00:58:00", ""), ", line 300, column time: empty:"),
    "half a key": (edit("3,", f"3.{SECRET},"), ", line 300, column item: not a whole number:"),
    "a word for a key": (edit("3,", f"x{SECRET},"), ", line 300, column item: not a whole number:"),
    "too long a key": (edit("3,", "3" * 20 + ","), ", line 300, column item: not a whole number:"),
    "no key": (edit("3,", ","), ", line 300, column item: empty:"),
    "more fields": (edit("mEq/L", f"mEq,{SECRET}"), ", line 300: more fields than the header has"),
    "fewer fields": (edit("mEq/L,", ""), ", line 300: fewer fields than the header has"),
    "an open quote": (edit("mEq/L", f'"{SECRET}'), ", line 300: "),
    "the last quote open": (edit("mEq/L,", f'mEq/L,"{SECRET}\n', 501), ", line 501: "),
    "no text": (edit("mEq/L", "\udcb5g"), ", line 300: no text in UTF-8"),
    "line ends of two kinds": (edit('twice"', 'twice"\r'), ", line 300: "),
    "old line ends": (lambda text: text.replace("\n", "\r"), ": not a whole CSV"),
    "a cut last cell": (lambda text: text[:-3], ": it ends without a line break"),
    "nothing": (lambda text: "", ": the file is empty"),
    "no column": (edit("value", "valu", 1), ": no column value among 7: a hint"),
    "a column twice": (edit("other", "item", 1), ": the column item appears twice"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["csv", "gz"])
@pytest.mark.parametrize("name", BAD)
def test_damage_is_named_by_its_place(
    name: str, packed: bool, database: Database, tmp_path: Path
) -> None:
    change, problem = BAD[name]
    content = change(TEXT).encode("utf-8", "surrogateescape")
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError) as caught:
        read(database, path)
    text = str(caught.value)
    assert f"{path}{problem}" in text
    assert SECRET not in text


def test_the_line_counts_line_breaks_within_quotes_and_blank_lines(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    text = edit("so", "s\n\no", 100)(edit("74.5", "x")(TEXT))
    path.write_text(text.replace("\n", "\n\n", 1))
    with pytest.raises(InputError, match="line 303, column value"):
        read(database, path)


def test_cells_of_rows_that_are_not_kept_are_not_looked_at_but_for_keys(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(edit("74.5", "x")(TEXT))
    assert len(read(database, path, "{item} = 1")) == 100
    path.write_text(edit("3,", "x,")(TEXT))
    with pytest.raises(InputError, match="line 300, column item"):
        read(database, path, "{item} = 1")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda packed: packed[:-6], "not a whole gzip file"),
        (lambda packed: packed[: len(packed) // 2], "not a whole gzip file"),
        (lambda packed: packed[:-8] + bytes(4) + packed[-4:], "not a whole gzip file"),
        (lambda packed: TEXT.encode(), "not a whole gzip file"),
    ],
    ids=["cut end", "cut half", "wrong sum", "no gzip"],
)
def test_a_damaged_gzip_is_refused(
    spoil: Callable[[bytes], bytes], problem: str, database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(spoil(gzip.compress(TEXT.encode())))
    with pytest.raises(InputError, match=problem):
        read(database, path)


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("item", ["1", "x", "2"], "row 1, column item: not a whole number"),
        ("item", [1.0, 2.0, 2.5], "row 2, column item: not a whole number"),
        ("subject", [1, None, 2], "row 1, column subject: empty"),
        ("time", ["2150-01-01", "2150-01-01", "soon"], "row 2, column time: not a time"),
    ],
)
def test_a_bad_cell_of_parquet_is_named_by_its_row(
    column: str, values: list[Any], problem: str, database: Database, tmp_path: Path
) -> None:
    good = {"item": [1, 2, 3], "subject": 1, "time": "2150-01-01", "value": 1.5, "unit": ""}
    pd.DataFrame({**good, column: values}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=problem):
        read(database, tmp_path / "t.parquet")


def test_nan_is_an_empty_cell_and_no_large_number(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "1,,2,2150-01-01,NaN,mg,\n1,,2,2150-01-01,1,mg,\n")
    read(database, path)
    assert database.row("SELECT count(*), count(value) FROM cells") == (2, 1)
    nan = "SELECT 1 AS item, 2 AS subject, '2150-01-01' AS time, 'nan'::DOUBLE AS value, '' AS unit"
    database.run(f"COPY ({nan}) TO '{tmp_path}/t.parquet'")
    read(database, tmp_path / "t.parquet")
    assert database.row("SELECT count(*), count(value) FROM cells") == (1, 0)


def test_damage_within_a_parquet_file_is_the_files(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    columns = {"item": range(500), "subject": 1, "time": "2150-01-01", "value": 1.5, "unit": ""}
    pd.DataFrame(columns).to_parquet(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(40, len(whole) - 8, 97):
        path.write_bytes(whole[:place] + bytes(20) + whole[place + 20 :])
        try:
            read(database, path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 10


ODD_TIMES = [
    *("2150-01-01 09:30 PM", "2150-01-01 09:30:00 EST", "2150-01-01 09:30 America/New_York"),
    *("2150-01-01 09:30:00+02:00", "2150-01-01T09:30:00Z", "2150-01-01 soon", "epoch", "infinity"),
]


@pytest.mark.parametrize("form", ["time", "instant"])
@pytest.mark.parametrize("cell", ODD_TIMES)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_time_with_a_zone_or_words_is_refused(
    form: str, cell: str, ending: str, database: Database, tmp_path: Path
) -> None:
    table, path = pd.DataFrame({"time": ["2150-01-01 9:30", cell]}), tmp_path / f"t.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    columns = {"time": Column(form)}
    file = open_table(database, path, columns, "")
    with pytest.raises(InputError, match=r"(line 3|row 1), column time: (a time with|not a time)"):
        load_table(database, "cells", file, columns)


def test_typed_times_and_plain_texts_are_read(database: Database, tmp_path: Path) -> None:
    texts = ["2150-01-01", "2150-01-01 9:30", "2150-01-01T09:30:00", " 2150-01-01 09:30:00.25 "]
    times = pd.to_datetime(pd.Series(texts).str.strip(), format="mixed").astype("datetime64[us]")
    pd.DataFrame({"text": texts, "typed": times}).to_parquet(tmp_path / "t.parquet")
    columns = {"text": Column("instant"), "typed": Column("instant")}
    load_table(
        database, "cells", open_table(database, tmp_path / "t.parquet", columns, ""), columns
    )
    assert database.row("SELECT count(*), bool_and(text = typed) FROM cells") == (4, True)


def test_an_id_loses_the_point_that_pandas_writes(database: Database, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id\n10001.0\n001\n1.5\na.0\n")
    columns = {"id": Column("id")}
    load_table(database, "cells", open_table(database, tmp_path / "t.csv", columns, ""), columns)
    assert database.frame("FROM cells")["id"].tolist() == ["10001", "001", "1.5", "a.0"]


@pytest.mark.parametrize(("separator", "words"), [(";", "';'"), ("\t", "tabs")])
def test_another_separator_is_named(
    separator: str, words: str, database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TEXT.replace(",", separator))
    with pytest.raises(InputError, match=f"row 1: the columns seem to be separated by {words}"):
        read(database, path)


def test_wrong_cells_are_counted_where_there_are_several(
    database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(TEXT.replace(",2150-01-01 00:58:00,", ",soon,"))
    with pytest.raises(InputError, match=r"line 60, column time: not a time .* in 8 rows: copy"):
        read(database, path)
    path.write_text(TEXT.replace(",2150-01-01 00:5", ",soon"))
    with pytest.raises(InputError, match=r"line 52, column time: not a time .* in 80 rows: copy"):
        read(database, path)


def test_a_cut_parquet_is_refused(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"item": range(500)}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read(database, path)
