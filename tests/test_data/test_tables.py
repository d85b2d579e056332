"""Tests of the table reader: chunks, findings, cells as text."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.tables import Findings, column_text, plain_columns, read_chunks
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
    assert caplog.messages == ["file: a note", "file: fewer than 11 rows are odd"]
