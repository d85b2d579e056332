"""Tables of text from CSV and Parquet files, with the row numbers that a spreadsheet shows."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from medgemma_clinical.data.small_cells import FEWEST, count_text
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; a series of 20,000 observations is one field."""

SEPARATORS = {";": "';'", "\t": "tabs"}
"""Wrong separators that are recognised, as errors name them."""


@dataclass
class Findings:
    """What shows while a file is read, whole or in chunks, and is logged once at its end.

    Attributes:
        source: the file, as errors name it.
        strict: whether an unreadable row refuses the file.
        problems: if not strict, the first problem of each unreadable row by the row's number;
            names the column, never the content of a patient's cell.
        counts: rows by what there is to say of them.
        notes: what there is to say of the file; an ordered set.
    """

    source: str
    strict: bool = True
    problems: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)

    def add_problem(
        self, row: int, problem: str, *, column: str = "", value: object = None
    ) -> None:
        """Note why a row cannot be read, unless another reason is noted.

        Raises:
            InputError: the findings are strict.
        """
        if self.strict:
            place = f", column {column}" if column else ""
            raise InputError(f"{self.source}, row {row}{place}: {problem}", value)
        self.problems.setdefault(row, f"column {column}: {problem}" if column else problem)

    def log(self) -> None:
        """Log notes and counts; problems are the caller's to report."""
        for note in self.notes:
            logger.info("%s: %s", self.source, note)
        for text, rows in self.counts.items():
            if rows:
                logger.info("%s: %s rows %s", self.source, count_text(rows, FEWEST), text)


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


def _csv_chunks(
    path: Path, file: BinaryIO, findings: Findings, most: int | None
) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield rows and their numbers, the header being 1; blank rows are left out."""
    opened: Any = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    rows = _numbered_rows(path, text)
    _, names = next(rows, (0, None))
    if names is None:
        raise InputError(f"{path}: the file is empty")
    header = [name.strip() for name in names]
    _check_separator(path, header)
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


def _numbered_rows(path: Path, text: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV that are not blank, with their numbers.

    Strict: a misplaced quote otherwise swallows all rows up to the next one, or to the end.
    """
    csv.field_size_limit(LONGEST_FIELD)
    number = 0
    try:
        for cells in csv.reader(text, skipinitialspace=True, strict=True):
            number += 1
            if any(map(str.strip, cells)):
                yield number, cells
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: {error}: check its quotes") from error


def _check_separator(path: Path, header: list[str]) -> None:
    """Refuse a header in which another separator is more frequent than the comma."""
    for separator, name in SEPARATORS.items():
        if sum(cell.count(separator) for cell in header) > len(header) - 1:
            raise InputError(
                f"{path}, row 1: the columns seem to be separated by {name}: save the file as CSV "
                "separated by commas"
            )


def _parquet_chunks(path: Path, most: int | None) -> Iterator[tuple[pd.DataFrame, int]]:
    """Yield rows and their numbers, the first being 0."""
    try:
        import pyarrow  # not among the requirements: needed for Parquet alone
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file, done, size = parquet.ParquetFile(path), 0, path.stat().st_size
        rows = file.metadata.num_rows
        for batch in file.iter_batches(most) if most and rows else [file.read()]:
            # A pandas index stays a column; integers stay integers beside missing ones.
            table = batch.to_pandas(ignore_metadata=True, integer_object_nulls=True)
            table = table.rename(columns=str.strip)
            table.index += done
            done += len(table)
            yield table, size * done // max(rows, 1)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a whole Parquet file, or one with a column twice") from error


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with rows numbered from 0 and stripped column names; a named index stays."""
    nameless = list(table.index.names) == [None]
    return table.reset_index(drop=nameless).rename(columns=lambda name: str(name).strip())


def column_text(table: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as stripped text, empty where missing; whole floats as integers: 1.0 is 1."""
    column = table[name]
    if pd.api.types.is_float_dtype(column.dtype):
        whole = column.notna() & (column % 1 == 0) & (column.abs() < 2**53)
        column = column.astype(object).where(~whole, column.where(whole, 0).astype("int64"))
    return column.astype(object).where(column.notna(), "").astype(str).str.strip()
