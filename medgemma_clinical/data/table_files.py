"""Rows of a CSV or Parquet file, or of a table of any library, a block at a time."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pandas as pd

from medgemma_clinical.files import InputError

BLOCK_ROWS = 50_000  # rows that are read at a time: bounds the memory
MAX_CELL = 2**26  # characters
MAX_TEXT = 10**10  # bytes of the texts of a Parquet file


def read_tables(
    source: Any,  # a CSV or Parquet file, or a DataFrame
    max_rows: int = BLOCK_ROWS,
    columns: Sequence[str] | None = None,  # empty: all; a CSV need not be UTF-8 then
) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield rows, numbered as in a spreadsheet, and the bytes, or rows, read so far."""
    tables: Iterator[tuple[pd.DataFrame, int]]
    if isinstance(source, pd.DataFrame):
        name, whole, total = "DataFrame", plain_table(source), len(source)
        starts = range(0, total, max_rows)
        tables = ((whole[k : k + max_rows], min(k + max_rows, total)) for k in starts)
    else:
        name, tables = str(source), _read_file(Path(source), max_rows, columns)
    empty = True
    for table, progress in tables:
        if len(table):
            empty = False
            yield table, progress
    if empty:
        raise InputError(f"{name}: no rows below the header")


OTHER_FORMS = "; from_long reads one value a row from Excel, and with other separators"


def _read_file(
    path: Path, max_rows: int, columns: Sequence[str] | None
) -> Iterator[tuple[pd.DataFrame, int]]:
    if not os.path.isfile(path):  # ``Path.is_file`` raises for a name that is too long
        raise InputError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    read_blocks = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    try:
        with path.open("rb") as file:
            yield from read_blocks(path, file, max_rows, columns)
    except UnicodeError as error:
        form = "not a text file in UTF-8: save it as CSV UTF-8"
        raise InputError(f"{path}: {form}{OTHER_FORMS}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except csv.Error as error:
        form = 'save it as CSV, cells separated by commas, texts with commas in quotes "'
        raise InputError(f"{path}, {error}: {form}{OTHER_FORMS}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


def _read_csv(
    path: Path, file: BinaryIO, max_rows: int, columns: Sequence[str] | None
) -> Iterator[tuple[pd.DataFrame, int]]:
    content: Any = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
    errors = "strict" if columns is None else "replace"
    text = io.TextIOWrapper(content, "utf-8-sig", errors, newline="")
    rows = _csv_rows(text)
    names = [name.strip() for name in next(rows, (0, []))[1]]
    if not names:
        raise InputError(f"{path}: the file is empty")
    positions = [names.index(name) for name in columns or ()] or range(len(names))
    while block := list(itertools.islice(rows, max_rows)):
        texts: dict[str, str] = {}  # equal cells share their memory
        cells = [[texts.setdefault(row[k], row[k]) for k in positions] for _, row in block]
        numbers, header = [number for number, _ in block], [names[k] for k in positions]
        yield pd.DataFrame(cells, numbers, header, dtype=object), file.tell()


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each row that is not blank, the header first."""
    csv.field_size_limit(MAX_CELL)
    number, width = 1, 0
    try:
        for row in csv.reader(lines, strict=True, skipinitialspace=True):
            if any(map(str.strip, row)):
                if width == 0 and len(row) == 1 and re.search("[;\t]", row[0]):
                    raise csv.Error("no commas")
                width = width or len(row)
                # A file that was cut within a number would be read with another number.
                if len(row) != width:
                    raise csv.Error(f"{len(row)} cells, not {width}")
                yield number, row
            number += 1
    except csv.Error as error:
        raise csv.Error(f"row {number}: {error}") from error


def _read_parquet(
    path: Path, file: BinaryIO, max_rows: int, columns: Sequence[str] | None
) -> Iterator[tuple[pd.DataFrame, int]]:
    try:
        from pyarrow import ArrowException, compute, parquet  # no requirement
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        # A text that a dictionary holds once may stand in millions of rows.
        schema = [x for x in parquet.ParquetFile(file).schema if x.converted_type == "UTF8"]
        texts = [x.name for x in schema if x.path == x.name in (columns or [x.name])]
        packed, length = parquet.ParquetFile(file, read_dictionary=texts), 0
        for block in packed.iter_batches(max_rows, columns=texts):
            for text in block.columns:
                lengths = compute.binary_length(text.dictionary).take(text.indices)
                length += compute.sum(lengths).as_py() or 0
            if length > MAX_TEXT:
                raise InputError(f"{path}: over {MAX_TEXT // 10**9} GB of text: give it in parts")
        source, size, rows = parquet.ParquetFile(file), path.stat().st_size, 0
        for block in source.iter_batches(max_rows, columns=columns or None):
            table = _frame_of(block)
            table.index += rows
            rows += len(table)
            yield table.rename(columns=str.strip), size * rows // max(source.metadata.num_rows, 1)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file") from error


class ArrowTable(Protocol):
    """A table of any library that exports Arrow data, such as polars or pyarrow."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Return a stream of record batches."""


def as_frame(source: Any) -> Any:
    """Return the table of another library as a DataFrame, any other source as it is."""
    if isinstance(source, pd.DataFrame) or not hasattr(source, "__arrow_c_stream__"):
        return source
    try:
        import pyarrow  # no requirement: needed for Parquet and such tables alone
    except ImportError as error:
        table = f"a table of type {type(source).__name__}"
        raise InputError(f"reading {table} needs pyarrow: pip install pyarrow") from error
    return _frame_of(pyarrow.table(source))


def _frame_of(block: Any) -> pd.DataFrame:
    """Return a table or a record batch of pyarrow as a DataFrame."""
    # A pandas index stays a column; integers stay integers beside missing ones.
    frame: pd.DataFrame = block.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame


def plain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with rows numbered from 0 and stripped column names; a named index stays."""
    names = [name for name in table.index.names if name is not None]
    drop = not names or any(name in table for name in names)
    return table.reset_index(drop=drop).rename(columns=lambda name: str(name).strip())
