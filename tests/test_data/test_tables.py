"""Tests of the table reader: chunks, findings, cells as text."""

from __future__ import annotations

import gzip
import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data import tables
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.data.tables import (
    column_text,
    plain_columns,
    read_chunks,
    read_table,
)
from medgemma_clinical.files import InputError


def numbered(count: int) -> pd.DataFrame:
    return pd.DataFrame({"name": [f"n{k}" for k in range(count)], "value": range(count)})


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("most", [1, 3, 7, 10, None])
def test_chunks_join_to_the_whole_file(ending: str, most: int | None, tmp_path: Path) -> None:
    path, table = tmp_path / f"data.{ending}", numbered(7)
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    chunks = list(read_chunks(path, Findings("x"), most))
    sizes = [len(table) for table, _ in chunks if len(table)]
    assert sizes == {1: [1] * 7, 3: [3, 3, 1]}.get(most or 0, [7])
    whole = pd.concat([table for table, _ in chunks])
    first = 0 if ending == "parquet" else 2
    assert whole.index.tolist() == list(range(first, first + 7))
    assert column_text(whole, "name").tolist() == table["name"].tolist()
    assert column_text(whole, "value").tolist() == [str(k) for k in range(7)]
    read = [read for _, read in chunks]
    assert read == sorted(read)
    if most is not None:
        assert read[-1] == path.stat().st_size


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_header_alone_is_one_empty_chunk(ending: str, tmp_path: Path) -> None:
    path, table = tmp_path / f"data.{ending}", numbered(0)
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    ((table, _),) = read_chunks(path, Findings("x"), 5)
    assert list(table) == ["name", "value"]
    assert table.empty


def test_a_row_with_too_many_fields_is_noted_or_refuses_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n\n3,4,5\n6,7,\n"))
    findings = Findings("x", strict=False)
    ((rows, _),) = read_chunks(path, findings)
    assert rows.index.tolist() == [2, 4, 5]
    assert rows["b"].tolist() == ["2", "4", "7"]
    assert findings.problems == {
        4: '3 fields where the header has 2: put texts with commas in quotes "'
    }
    with pytest.raises(InputError, match="row 4: 3 fields"):
        list(read_chunks(path, Findings("x")))


def test_cells_are_text_without_the_point_of_whole_floats() -> None:
    table = pd.DataFrame(
        {
            "float": [1.0, np.nan, 2.5],
            "large": [2.0**60, 1e300, -3.0],
            "nullable": pd.array([1.0, None, 2.5], dtype="Float64"),
            "whole": pd.array([1, None, 3], dtype="Int64"),
            "text": [" 1.0 ", None, "NA"],
        }
    )
    assert column_text(table, "float").tolist() == ["1", "", "2.5"]
    assert column_text(table, "large").tolist() == [str(2.0**60), "1e+300", "-3"]
    assert column_text(table, "nullable").tolist() == ["1", "", "2.5"]
    assert column_text(table, "whole").tolist() == ["1", "", "3"]
    assert column_text(table, "text").tolist() == ["1.0", "", "NA"]


def test_a_named_index_becomes_a_column_and_a_nameless_one_goes() -> None:
    table = numbered(2).set_index("name")
    assert list(plain_columns(table)) == ["name", "value"]
    assert list(plain_columns(numbered(2).rename(columns={"value": " value "}))) == [
        "name",
        "value",
    ]


def test_findings_are_logged_without_those_that_concern_no_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    findings = Findings("file")
    findings.notes["a note"] = None
    findings.counts["are odd"] += 2
    findings.counts["are even"] += 0
    findings.problems[5] = "secret"
    with caplog.at_level(logging.INFO):
        findings.log()
    assert caplog.messages == ["file: a note", "file: 2 rows are odd"]


# --------------------------------------------------------------------------- bounds


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the bounds so small that a test's files meet them."""
    monkeypatch.setattr(tables, "LONGEST_ROW", 20_000)
    monkeypatch.setattr(tables, "MOST_COLUMNS", 30)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
@pytest.mark.parametrize(
    "row", [b"x" * 30_000, b'"' + b"\n".join(b"%d" % k for k in range(9_000)) + b'"', bytes(30_000)]
)
@pytest.mark.usefixtures("small")
def test_an_endless_row_is_refused_with_its_number(row: bytes, ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"data.{ending}", b"a,b\n1,2\n\n" + row + b",2\n")
    with pytest.raises(InputError, match="row 4: ") as caught:
        read_table(path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.usefixtures("small")
def test_many_short_rows_are_no_endless_one(end: bytes, tmp_path: Path) -> None:
    content = end.join([b"a,b", *(b"%d,%d" % (k, k * k) for k in range(20_000))])
    assert len(read_table(write(tmp_path / "data.csv", content))) == 20_000


@pytest.mark.parametrize("row", [b"\n", b"1,2\n", b"x"])
@pytest.mark.usefixtures("small")
def test_a_gzip_file_that_unpacks_to_far_more_is_refused(row: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv.gz", b"a,b\n" + row * 3_000_000)
    with pytest.raises(InputError, match=r"data\.csv\.gz.* (100 times|longer than)"):
        read_table(path)
    fine = write(tmp_path / "fine.csv.gz", b"a,b\n" + row * 3_000)
    assert len(read_table(fine)) == {b"1,2\n": 3_000, b"x": 1}.get(row, 0)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
@pytest.mark.usefixtures("small")
def test_a_table_of_very_many_columns_is_refused(ending: str, tmp_path: Path) -> None:
    path, table = tmp_path / f"data.{ending}", pd.DataFrame({f"c{k}": [1] for k in range(31)})
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    with pytest.raises(InputError, match="31 columns: leave 30 at most"):
        read_table(path)


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("most", [None, 1_000])
@pytest.mark.parametrize("value", ["1 (0h) -> 2 (1h)" * 1_000, "1 (0h)", "", None])
@pytest.mark.usefixtures("small")
def test_a_parquet_file_whose_rows_share_a_value_is_never_expanded(
    value: Any, most: int | None, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    shared = pyarrow.array(np.zeros(3_000_000, np.int32))
    column = pyarrow.nulls(len(shared))
    if value is not None:
        column = pyarrow.DictionaryArray.from_arrays(shared, pyarrow.array([value]))
    path = write_parquet(tmp_path / "data.parquet", {"a": column}, compression="zstd")
    chunks = read_chunks(path, Findings("x"), most)
    with pytest.raises(InputError, match="unpacks to more than 100 times its size"):
        deque(chunks, maxlen=0)


@pytest.mark.usefixtures("small")
def test_a_parquet_page_that_grows_or_a_long_text_is_refused(tmp_path: Path) -> None:
    page = {"use_dictionary": False, "compression": "zstd"}
    path = write_parquet(tmp_path / "page.parquet", {"a": ["0" * 10**7]}, **page)
    with pytest.raises(InputError, match="100 times its size"):
        read_table(path)
    long = np.random.default_rng(0).bytes(10_001).hex()
    path = write_parquet(tmp_path / "long.parquet", {"b": [1], "a": [long]})
    with pytest.raises(InputError, match=r"column a: holds a text longer than") as caught:
        read_table(path)
    assert long[:9] not in str(caught.value)


@pytest.mark.parametrize("most", [None, 7, 10_000])
def test_texts_of_parquet_are_those_that_were_written(most: int | None, tmp_path: Path) -> None:
    columns = {
        "same": ["x"] * 3_000,
        "few": [None, "", "a", "\u00e9 b"] * 750,
        "own": [f"{k} (0h) -> {k * 7919} (1h)" * 20 for k in range(3_000)],
        "whole": [1, None, 3] * 1_000,
        "real": [0.5, None, float("nan")] * 1_000,
        "a.b": [True, False] * 1_500,
        "codes": [[1, 2], None] * 1_500,
    }
    path = write_parquet(tmp_path / "data.parquet", columns, row_group_size=1_100)
    read = pd.concat([table for table, _ in read_chunks(path, Findings("x"), most)])
    assert set(read) == set(columns)
    assert read.index.tolist() == list(range(3_000))
    assert read.pop("codes").isna().all(), "a nested column comes without its content"
    expected = pd.DataFrame(columns, dtype=object).drop(columns="codes")
    expected["real"] = expected["real"].astype(float)
    for name in expected.columns.astype(str):
        assert column_text(read, name).tolist() == column_text(expected, name).tolist()


def test_the_bounds_lie_far_beyond_real_files() -> None:
    observations = " -> ".join(["-123.456 (12345.67h)"] * 20_000)
    assert 100 * len(observations) < tables.LONGEST_ROW
