"""The files of an SRTR folder: found in any storage and case, read in chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.tables import parquet_blocks
from medgemma_clinical.files import InputError


@dataclass(frozen=True)
class SafFile:
    """A found table.

    Attributes:
        path: of the file.
        columns: the data dictionary's spelling of each column, and the file's.
    """

    path: Path
    columns: dict[str, str]


def find_table(folder: Path, name: str) -> SafFile:
    """Find one table in a folder or one folder down, in any storage and case.

    Args:
        folder: of the user.
        name: of the table in small letters, such as ``cand_kipa``.

    Raises:
        InputError: no such folder, not exactly one such table, or an unreadable one.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for an overlong name too
        raise InputError(f"--data_dir {folder}: no such folder: give the one with the SRTR files")
    files = sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())
    found = [p for p in files if p.name.lower() in {name + ending for ending in READERS}]
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in found)
        raise InputError(
            f"--data_dir {folder}: {name} ({', '.join(READERS)}) must be there or one folder down "
            f"once, decrypted and unpacked: found {names or f'none among {len(files)} files'}"
        )
    first = next(read_chunks(found[0], None, 1), pd.DataFrame())
    return SafFile(found[0], {column.strip().upper(): column for column in first.columns})


def read_chunks(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    """Read a table so many rows at a time.

    Args:
        path: of the file.
        columns: to read, as the file spells them; None for all.
        rows: at a time.

    Raises:
        InputError: the file cannot be read to its end.
    """
    try:
        yield from READERS[path.suffix.lower()](path, columns, rows)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: Parquet needs a package: pip install pyarrow") from error
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on a broken file pandas' readers raise any exception
        raise InputError(
            f"{path}: not readable to its end as {path.suffix[1:].lower()} "
            f"({type(error).__name__}): truncated, still encrypted or of another kind: copy or "
            "decrypt it again"
        ) from error


def _sas(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    reader: Any = pd.read_sas(path, format="sas7bdat", encoding="latin-1", chunksize=rows)
    with reader:  # pandas itself refuses a file with fewer rows than its header says
        for chunk in reader:
            yield chunk if columns is None else chunk[columns]


def _csv(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    _check_last_row(path)
    text: dict[str, Any] = {"encoding": "utf-8-sig", "encoding_errors": "replace", "dtype": str}
    with pd.read_csv(path, usecols=columns, chunksize=rows, index_col=False, **text) as reader:
        yield from reader


def _check_last_row(path: Path) -> None:
    with path.open("rb") as file:
        header = file.readline()
        file.seek(-min(path.stat().st_size, 2**16), os.SEEK_END)
        last = file.readlines()[-1]
    if not last.endswith(b"\n") and last.count(b",") < header.count(b","):
        raise EOFError("cut off within the last row")


def _stata(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    options: Any = {"convert_categoricals": False, "columns": columns}
    with pd.read_stata(path, chunksize=rows, **options) as reader:
        yield from reader


def _parquet(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    for block in parquet_blocks(path, rows, columns):
        yield block.to_pandas(ignore_metadata=True)  # a pandas index stays a column


READERS = {".sas7bdat": _sas, ".csv": _csv, ".dta": _stata, ".parquet": _parquet}
