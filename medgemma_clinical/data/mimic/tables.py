"""The tables of MIMIC-IV: columns that are read, where the files lie, and their rows in chunks."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from medgemma_clinical.data.tables import LONGEST_ROW, check_expansion, parquet_blocks
from medgemma_clinical.files import InputError

CHUNK_BYTES = 2**24
"""Text of a table that each process holds and parses at a time."""

FORMS = (".csv", ".csv.gz", ".parquet")
MIMIC_VERSIONS = "this reads MIMIC-IV 2.x and 3.x, whose folder holds hosp/ and icu/"


@dataclass(frozen=True)
class CellType:
    """How a cell is read: as ``number``, ``whole`` number, ``time`` or ``word``; may be empty."""

    form: str
    may_be_empty: bool = False


KEY, NUMBER, TIME, WORD = (CellType(form) for form in ("whole", "number", "time", "word"))
KEY_OR_EMPTY, NUMBER_OR_EMPTY, TIME_OR_EMPTY, WORD_OR_EMPTY = (
    CellType(form, may_be_empty=True) for form in ("whole", "number", "time", "word")
)
TABLES: dict[str, dict[str, CellType]] = {
    "hosp/patients": {
        "subject_id": KEY,
        "gender": WORD_OR_EMPTY,
        "anchor_age": NUMBER_OR_EMPTY,
        "anchor_year": NUMBER_OR_EMPTY,
    },
    "hosp/admissions": {
        "subject_id": KEY,
        "hadm_id": KEY,
        "admittime": TIME,
        "dischtime": TIME_OR_EMPTY,
        "deathtime": TIME_OR_EMPTY,
        "hospital_expire_flag": NUMBER_OR_EMPTY,
    },
    "icu/icustays": {
        "hadm_id": KEY,
        "intime": TIME_OR_EMPTY,
        "outtime": TIME_OR_EMPTY,
        "first_careunit": WORD_OR_EMPTY,
    },
    "hosp/diagnoses_icd": {"hadm_id": KEY, "icd_code": WORD_OR_EMPTY, "icd_version": NUMBER},
    "hosp/d_labitems": {
        "itemid": KEY,
        "label": WORD_OR_EMPTY,
        "fluid": WORD_OR_EMPTY,
        "category": WORD_OR_EMPTY,
    },
    "hosp/labevents": {
        "itemid": KEY,
        "subject_id": KEY,
        "hadm_id": KEY_OR_EMPTY,
        "charttime": TIME,
        "storetime": TIME_OR_EMPTY,
        "valuenum": NUMBER_OR_EMPTY,
        "valueuom": WORD_OR_EMPTY,
    },
}
"""Columns that are read, of each table. Source: mimic.mit.edu, MIMIC-IV, modules hosp and icu."""

LAB_KEYS = ("itemid", "subject_id")
"""Columns of labevents that decide whether a row is needed."""

OPTIONAL_COLUMNS = {"storetime", "fluid", "category"}
"""Columns without which a table is still read; every other one is required."""


@dataclass(frozen=True)
class Table:
    """A found table: its file, all its columns in order, and the types of those to read."""

    path: Path
    header: list[str]
    types: dict[str, CellType]


@dataclass(frozen=True)
class TableChunk:
    """Some rows of a table.

    Attributes:
        rows: CSV text; the length of it alone, where another process reads it; or a DataFrame.
        first: number of the first row: a line of a CSV from 1, a row of Parquet from 0.
        read: bytes of the file up to the end of these rows.
        place: of the text's first byte in the file, None within gzip.
    """

    rows: bytes | int | pd.DataFrame
    first: int
    read: int
    place: int | None = None


class HashingFile:
    """A file that is hashed while it is read once, from its beginning to its end."""

    mode = "rb"

    def __init__(self, file: BinaryIO) -> None:
        """Begin before the first byte."""
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """Read as any file does."""
        content = self.file.read(size)
        self.digest.update(content)
        self.count += len(content)
        return content


def find_table(folder: Path, name: str) -> Path:
    """Find a table such as ``hosp/patients`` in one of its forms.

    Raises:
        InputError: it is missing or present twice, or the folder is no MIMIC-IV.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for an overlong name too
        raise InputError(f"--mimic_dir {folder}: no such folder: give the one with hosp/ and icu/")
    module = name.partition("/")[0]
    if not (folder / module).is_dir():
        names = {path.name.lower().partition(".")[0] for path in folder.iterdir()}
        kind = "MIMIC-III" if {"admissions", "d_labitems", "icustays"} & names else "not MIMIC-IV"
        kind = "MIMIC-IV before 2.0" if "core" in names else kind
        raise InputError(f"--mimic_dir {folder}: no folder {module}/ ({kind}?): {MIMIC_VERSIONS}")
    found = [path for form in FORMS if (path := folder / f"{name}{form}").is_file()]
    if len(found) != 1:
        problem = f"is there {len(found)} times: leave one" if found else "is missing"
        raise InputError(f"--mimic_dir {folder}: the table {name} ({', '.join(FORMS)}) {problem}")
    return found[0]


def select_columns(path: Path, name: str, header: list[str]) -> Table:
    """Return the columns to read, checked against those that are there.

    Raises:
        InputError: a required column is missing, or a column is there twice.
    """
    wanted = TABLES[name]
    missing = [c for c in wanted if c not in header and c not in OPTIONAL_COLUMNS]
    if missing:
        third = "row_id" in {column.lower() for column in header}
        hint = "these are columns of MIMIC-III: " if third else ""
        raise InputError(
            f"{path}: no column {missing[0]} among {len(header)}: {hint}{MIMIC_VERSIONS}"
        )
    if twice := [column for column in wanted if header.count(column) > 1]:
        raise InputError(f"{path}: the column {twice[0]} is there twice")
    return Table(path, header, {c: wanted[c] for c in wanted if c in header})


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line.

    Raises:
        InputError: naming the file, never its content.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


def open_csv(path: Path, name: str, raw: HashingFile) -> tuple[Table, Iterator[TableChunk]]:
    """Open a CSV, gzipped or not: its columns, and its rows in chunks.

    Raises:
        InputError: as ``select_columns``; from the chunks where the last row is cut off.
    """
    gzipped = path.suffix == ".gz"
    stream: Any = gzip.GzipFile(fileobj=raw) if gzipped else raw  # type: ignore[call-overload]
    header, _, rest = stream.read(CHUNK_BYTES).partition(b"\n")
    columns = next(csv.reader([header.decode("utf-8-sig", "replace").strip()]), [])
    place = None if gzipped else len(header) + 1
    table = select_columns(path, name, [column.strip() for column in columns])
    return table, _csv_chunks(path, raw, stream, rest, place)


def _csv_chunks(
    path: Path, raw: HashingFile, stream: Any, text: bytes, place: int | None
) -> Iterator[TableChunk]:
    """Cut a CSV behind its header at the ends of rows; the header is line 1."""
    line, unpacked = 2, len(text)
    while True:
        more = stream.read(CHUNK_BYTES)
        text += more
        unpacked += len(more)
        check_expansion(path, unpacked, raw.count)
        if not more and text and not text.endswith(b"\n"):
            raise InputError(f"{path}: it ends without a line break, within a row: copy it again")
        cut = last_row_end(text) if more else len(text)
        if not cut and len(text) > LONGEST_ROW:
            problem = f"a row longer than {LONGEST_ROW >> 20} MiB, or a quote without its other"
            raise InputError(f"{path}, line {line}: {problem}: copy it again")
        if cut:
            yield TableChunk(text[:cut], line, raw.count, place)
        line += text.count(b"\n", 0, cut)
        place = None if place is None else place + cut
        text = text[cut:]
        if not more:
            return


def last_row_end(text: bytes) -> int:
    """Return the place behind the last line break outside quotes, 0 where there is none."""
    cut = text.rfind(b"\n") + 1
    quotes = text.count(b'"', 0, cut)
    while quotes % 2 and cut:
        earlier = text.rfind(b"\n", 0, cut - 1) + 1
        quotes -= text.count(b'"', earlier, cut)
        cut = earlier
    return cut


def open_parquet(path: Path, name: str) -> tuple[Table, Iterator[TableChunk]]:
    """Open a Parquet file: its columns, and its rows in chunks, counted from 0.

    Raises:
        InputError: as ``select_columns``, or the file is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow  # not among the requirements: only a folder of Parquet needs it
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file: copy it again") from error
    table, count = select_columns(path, name, file.schema_arrow.names), file.metadata.num_rows

    def chunks() -> Iterator[TableChunk]:
        """Yield so many rows at a time, with the share of the file's bytes up to their end."""
        done, size = 0, path.stat().st_size
        try:
            for block in parquet_blocks(path, CHUNK_BYTES // 64, list(table.types)):
                rows = block.to_pandas(ignore_metadata=True, strings_to_categorical=True)
                done += len(rows)
                yield TableChunk(rows, done - len(rows), size * done // count)
        except MemoryError:  # pyarrow's own is one of its exceptions too
            raise
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a whole Parquet file: copy it again") from error

    return table, chunks()
