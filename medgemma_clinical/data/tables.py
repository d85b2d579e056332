"""Tables of text from CSV and Parquet files, with the row numbers that a spreadsheet shows."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pandas as pd

from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.files import InputError

LONGEST_ROW = 2**26
"""Characters of a row; 20,000 observations of a hundred series have fewer."""

MOST_COLUMNS = 10_000
"""Columns of a table; the widest clinical tables have hundreds."""

MOST_EXPANSION = 100
"""Times that a file may grow when it is unpacked; tables of patients grow up to 20 times. What is
no longer than ``LONGEST_ROW`` may grow more."""

BATCH_ROWS = 2**16
"""Rows of Parquet that are checked at a time."""

SEPARATORS = {";": "';'", "\t": "tabs"}
"""Wrong separators that are recognised, as errors name them."""


def read_table(path: Path) -> pd.DataFrame:
    """Read a file as text, CSV (also within gzip) or Parquet; the index holds the row numbers.

    Raises:
        InputError: the file is missing, empty, damaged, or its rows do not fit its header.
    """
    ((table, _),) = read_chunks(path, Findings(str(path)))
    return table


def read_chunks(
    path: Path, findings: Findings, most: int | None = None
) -> Iterator[tuple[pd.DataFrame, int]]:
    """Read a file at most ``most`` rows at a time, or all at once.

    Yields:
        Once at least: rows, their index the row numbers; and the bytes of the file up to their end.

    Raises:
        InputError: as ``read_table``; for a row that does not fit its header only if the findings
            are strict.
    """
    # A pipe may never end. A name that is too long, of which ``Path.exists`` raises, is no file.
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a file")
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_chunks(path, most)
        else:
            with path.open("rb") as file:
                yield from _csv_chunks(path, file, findings, most)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: save it as CSV UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


class _BoundedBytes(io.BufferedIOBase):
    """The bytes of a CSV, unpacked, for a TextIOWrapper; an endless line ends in an error.

    Raises:
        csv.Error: from ``read1``, a line is longer than ``LONGEST_ROW``.
        InputError: from ``read1``, as ``check_expansion``.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read ``file``, gzipped or not, which is ``path`` in errors."""
        self.path, self.file = path, file
        gzipped = path.suffix.lower() == ".gz"
        self.stream: Any = gzip.GzipFile(fileobj=file) if gzipped else file
        self.unpacked = self.line = 0

    def readable(self) -> bool:
        """Return that this can be read."""
        return True

    def read1(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        content: bytes = self.stream.read1(size)
        self.unpacked += len(content)
        end = max(content.rfind(b"\n"), content.rfind(b"\r"))
        self.line = len(content) - 1 - end + (self.line if end < 0 else 0)
        if self.line > LONGEST_ROW:
            raise csv.Error(f"longer than {LONGEST_ROW >> 20} MiB")
        check_expansion(self.path, self.unpacked, self.file.tell())
        return content


def check_expansion(path: Path, unpacked: int, packed: int) -> None:
    """Refuse a file that is made to fill the memory.

    Args:
        path: named in the error.
        unpacked: characters or bytes so far.
        packed: bytes that they were unpacked from.

    Raises:
        InputError: they are far more.
    """
    if unpacked > max(LONGEST_ROW, MOST_EXPANSION * packed):
        raise InputError(
            f"{path}: unpacks to more than {MOST_EXPANSION} times its size: no table of patients "
            "does: make the file again"
        )


def _csv_chunks(
    path: Path, file: BinaryIO, findings: Findings, most: int | None
) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield rows and their numbers, the header being 1; blank rows are left out."""
    content: Any = _BoundedBytes(path, file)
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    rows = _numbered_rows(path, text)
    _, names = next(rows, (0, None))
    if names is None:
        raise InputError(f"{path}: the file is empty")
    _check_width(path, len(names))
    header = [name.strip() for name in names]
    check_separator(path, header)
    width = len(header)
    while True:
        numbers, cells = [], []
        for number, row in itertools.islice(rows, most):
            if any(row[width:]):
                problem = f"{len(row)} fields where the header has {width}"
                findings.add_problem(number, f'{problem}: put texts with commas in quotes "')
            numbers.append(number)
            cells.append(row[:width] + [""] * (width - len(row)))
        table = pd.DataFrame(cells, columns=header, index=numbers, dtype=object)
        yield table, file.tell()
        if most is None or len(numbers) < most:
            return


def _numbered_rows(path: Path, text: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV that are not blank, with their numbers.

    Strict: a misplaced quote otherwise swallows all rows up to the next one, or to the end.
    """
    csv.field_size_limit(LONGEST_ROW)
    number, header = 0, ""

    def lines() -> Iterator[str]:
        nonlocal header
        for line in text:
            header = header or line.strip()
            yield line

    try:
        for cells in csv.reader(lines(), skipinitialspace=True, strict=True):
            number += 1
            if any(map(str.strip, cells)):
                yield number, cells
    except csv.Error as error:
        for separator in SEPARATORS if number == 0 else ():
            if f'"{separator}' in header:
                raise _wrong_separator(path, separator) from error
        raise InputError(f"{path}, row {number + 1}: {error}: check its quotes") from error


def _check_width(path: Path, columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise InputError(f"{path}: {columns:,} columns: leave {MOST_COLUMNS:,} at most")


def check_separator(path: Path, header: list[str]) -> None:
    """Refuse a header in which another separator is more frequent than the comma."""
    for separator in SEPARATORS:
        if sum(cell.count(separator) for cell in header) > len(header) - 1:
            raise _wrong_separator(path, separator)


def _wrong_separator(path: Path, separator: str) -> InputError:
    return InputError(
        f"{path}, row 1: the columns seem to be separated by {SEPARATORS[separator]}: save the "
        "file as CSV separated by commas, with points in decimal numbers"
    )


def _parquet_chunks(path: Path, most: int | None) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield rows and their numbers, the first being 0."""
    try:
        import pyarrow  # not among the requirements: needed for Parquet alone
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        rows, done, size = parquet.read_metadata(path).num_rows, 0, path.stat().st_size
        blocks = parquet_blocks(path, most or BATCH_ROWS)
        if most is None or not rows:
            empty = parquet.read_schema(path).empty_table()
            blocks = iter([pyarrow.concat_tables([*blocks] or [empty])])
        for block in blocks:
            # A pandas index stays a column; integers stay integers beside missing ones.
            table = block.to_pandas(ignore_metadata=True, integer_object_nulls=True)
            table = table.rename(columns=str.strip)
            table.index += done
            done += len(table)
            yield table, size * done // max(rows, 1)
    except MemoryError:  # pyarrow's own is one of its exceptions too
        raise
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a whole Parquet file, or one with a column twice") from error


def parquet_blocks(path: Path, most: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Read a Parquet file; a text that many rows share is measured before it is copied.

    Args:
        path: of the file.
        most: rows at a time.
        columns: to read; None for all.

    Yields:
        Rows as a pyarrow Table. Nested columns, and bytes of a fixed length, come without their
        content: no series is one, and they may expand to anything.

    Raises:
        InputError: more columns than ``MOST_COLUMNS``, a text longer than ``LONGEST_ROW``, or as
            ``check_expansion``.
    """
    import pyarrow
    from pyarrow import parquet, types

    metadata, size = parquet.read_metadata(path), path.stat().st_size
    _check_width(path, metadata.num_columns)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    check_expansion(path, sum(group.total_byte_size for group in groups), size)
    leaves = map(metadata.schema.column, range(metadata.num_columns))
    paths = [leaf.path for leaf in leaves]  # numbers among them stay numbers
    file = parquet.ParquetFile(path, metadata=metadata, read_dictionary=paths)
    known = {each.name: each.type for each in file.schema_arrow}
    wanted = list(known) if columns is None else columns
    odd = {n for n, t in known.items() if types.is_nested(t) or types.is_fixed_size_binary(t)}
    left_out = [name for name in wanted if name in odd]
    if left_out:
        columns = [name for name in wanted if name not in odd]
    expanded = 0
    for batch in file.iter_batches(most, columns=columns):
        expanded += batch.num_rows * batch.num_columns
        for column, name in zip(batch.columns, batch.schema.names, strict=True):
            if types.is_dictionary(column.type):
                expanded += _text_length(path, name, column)
            check_expansion(path, expanded, size)
        plain = [x.dictionary_decode() if types.is_dictionary(x.type) else x for x in batch.columns]
        plain += [pyarrow.nulls(batch.num_rows) for _ in left_out]
        yield pyarrow.table(plain, names=[*batch.schema.names, *left_out])


def _text_length(path: Path, name: str, column: Any) -> int:
    """Return the bytes of a column of texts when each row has its own.

    Raises:
        InputError: one is longer than ``LONGEST_ROW``.
    """
    from pyarrow import compute

    lengths = compute.binary_length(column.dictionary)
    if (compute.max(lengths).as_py() or 0) > LONGEST_ROW:
        problem = f"holds a text longer than {LONGEST_ROW >> 20} MiB"
        raise InputError(f"{path}, column {name[:200]}: {problem}")
    return compute.sum(lengths.take(column.indices)).as_py() or 0


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with rows numbered from 0 and stripped column names; a named index stays."""
    nameless = list(table.index.names) == [None]
    return table.reset_index(drop=nameless).rename(columns=lambda name: str(name).strip())


def slice_table(table: pd.DataFrame, most: int) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield at most ``most`` rows of a table at a time, and the number of rows up to their end."""
    for start in range(0, max(len(table), 1), most):
        yield table.iloc[start : start + most], min(start + most, len(table))


def column_text(table: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as stripped text, empty where missing; whole floats as integers: 1.0 is 1."""
    column = table[name]
    if pd.api.types.is_float_dtype(column.dtype):
        whole = column.notna() & (column % 1 == 0) & (column.abs() < 2**53)
        column = column.astype(object).where(~whole, column.where(whole, 0).astype("int64"))
    return column.astype(str).where(column.notna(), "").str.strip()
