"""SRTR's tables in any storage: found, read in chunks, cells decoded to days, codes and numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.srtr.codes import DATE_ENDINGS, TEXT_COLUMNS
from medgemma_clinical.data.table_files import read_tables
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

ENDINGS = (".sas7bdat", ".csv", ".csv.gz", ".dta", ".parquet")

CHUNK_ROWS = 100_000  # rows that are read at a time; those of no use are dropped
BAD_DATE = "BAD_DATE"  # further column of a read table: whether a date of the row is impossible
EPOCH = pd.Timestamp("1960-01-01")  # day 0 of dates in SAS and Stata

EMPTY = r"\.[A-Z_]?|NA|NAN|NAT|<NA>|"
"""A cell without content; .A to .Z are SAS's special missing values."""

BEHIND = r"(?:[ T]\d{1,2}\s*|(?<!\s)\s*):.*$"
"""The label behind a code, and the time of day behind a date. Spaces are tried from the first one
alone: from each on, many would take the square of their number."""

DATE_FORMS = ("%Y-%m-%d", "%m/%d/%Y", "%m/%d/%y", "%d%b%Y", "%d%b%y")

FIRST_YEAR, FIRST_DIALYSIS_YEAR, REGISTRY_YEAR = 1968, 1960, 1987
"""Regional waiting lists, from which listings were taken over, are not older (believed);
maintenance dialysis began (Scribner 1960); the registry began: listings before are rare."""

MAX_EARLY = 0.01
"""Share of rows listed before the registry above which the dates count from another day."""


def find_table(folder: Path, name: str) -> Path:
    """Find the one table of a name, such as ``cand_kipa``, in a folder or one folder down."""
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder: give the one with the SRTR files")
    files = sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())
    paths = [path for path in files if path.name.lower() in {name + ending for ending in ENDINGS}]
    if len(paths) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in paths) or "none"
        where = f"--data_dir {folder}: {name} ({', '.join(ENDINGS)}) must be there"
        found_text = f"found {names} among {len(files)} files"
        raise InputError(f"{where} or one folder down, once and decrypted: {found_text}")
    return paths[0]


def read_saf(
    path: Path,
    columns: Mapping[str, str],  # what the absence of each costs, empty if required
) -> Iterator[pd.DataFrame]:
    """Yield chunks of the columns that a table has, as ``decode`` reads them, and ``BAD_DATE``."""
    first = next(read_chunks(path, None, 1), pd.DataFrame())
    if first.empty:
        raise InputError(f"{path}: no rows below the header")
    spelling = {str(name).strip().upper(): str(name) for name in first}
    columns_used = {spelling[name]: name for name in columns if name in spelling}
    logger.info("%s: %d columns, used: %s", path, len(spelling), ", ".join(columns_used.values()))
    for name in (name for name in columns if name not in spelling):
        if not columns[name]:
            raise InputError(f"{path}: no column {name}: is this SRTR's {path.stem.upper()}?")
        logger.info("  no %s: %s", name, columns[name])
    dates = [name for name in columns_used.values() if name.endswith(DATE_ENDINGS)]
    rows, early, unread_counts = 0, 0, Counter[str]()
    for chunk in read_chunks(path, list(columns_used), CHUNK_ROWS):
        cells = chunk.rename(columns=columns_used)
        decoded = {name: decode(cells[name]) for name in columns_used.values()}
        values = pd.DataFrame({name: column for name, (column, _) in decoded.items()})
        bad = pd.DataFrame({name: column for name, (_, column) in decoded.items()})
        unread_counts.update({str(name): int(count) for name, count in bad.sum().items()})
        if count := unread_counts["CAN_REM_CD"]:
            problem = (
                "neither a code nor code: label: export the codes, they decide who had an event"
            )
            value = str(cells["CAN_REM_CD"][bad["CAN_REM_CD"].to_numpy()].iloc[0])
            raise InputError(f"{path}, column CAN_REM_CD: {count} cells are {problem}", value)
        rows += len(values)
        early += int((bad[dates[0]] | (values[dates[0]] < _day(REGISTRY_YEAR))).sum())
        yield values.assign(**{BAD_DATE: bad[dates].any(axis=1)})
    if early > MAX_EARLY * rows:
        problem = f"dates are of no known form or not from {REGISTRY_YEAR} to now"
        problem = f"{early} of {rows} {problem}: numbers must be days since 1960-01-01"
        raise InputError(f"{path}, column {dates[0]}: {problem}")
    for name, count in (+unread_counts).items():
        problem = "not numbers: taken as missing"
        problem = "impossible dates: their rows are left out" if name in dates else problem
        logger.warning("%s, column %s: %d cells are %s", path, name, count, problem)


def _day(year: int) -> int:
    return (pd.Timestamp(year, 1, 1) - EPOCH).days


def decode(cells: pd.Series) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Decode a column: (n,) values, NaN if empty or unread; (n,) which are unread."""
    # Dates are days since 1960-01-01, words are in capitals, all else is a number (Y 1, N 0).
    position, distinct = pd.factorize(cells)  # distinct cells are few
    content = pd.Series(distinct)
    if not pd.api.types.is_numeric_dtype(content):
        text = content.astype(str).str.strip().str.upper().str.replace(BEHIND, "", regex=True)
        content = text.mask(text.str.fullmatch(EMPTY))
    if cells.name in TEXT_COLUMNS:
        value = content
    elif str(cells.name).endswith(DATE_ENDINGS):
        value = _days(content, FIRST_DIALYSIS_YEAR if cells.name == "CAN_DIAL_DT" else FIRST_YEAR)
    else:
        number = pd.to_numeric(content.replace({"Y": "1", "N": "0"}), errors="coerce")
        value = pd.Series(number, dtype=float)
    bad = content.notna() & value.isna()
    return value.reindex(position).to_numpy(), bad.reindex(position, fill_value=False).to_numpy()


def _days(cells: pd.Series, first_year: int) -> pd.Series:
    """Read dates of any form as days since 1960-01-01, NaN outside ``first_year`` to now."""
    now = pd.Timestamp.now()
    days = pd.Series(pd.to_numeric(cells, errors="coerce"), dtype=float) // 1
    text = cells[days.isna()].astype(str)
    for form in DATE_FORMS:
        parsed = pd.to_datetime(text, format=form, errors="coerce")
        if form.endswith("%y"):  # two digits: the latest such year that is not in the future
            parsed = parsed.where(~(parsed > now), parsed - pd.DateOffset(years=100))
        days = days.fillna((parsed - EPOCH).dt.days)
    return days.where(days.between(_day(first_year), (now - EPOCH).days))


# --------------------------------------------------------------------------- storages


def read_chunks(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    """Read columns of a table, all for None, so many rows at a time, or refuse it."""
    kind = path.suffix.lower()
    reader: Any
    try:
        if kind not in (".sas7bdat", ".dta"):
            yield from (chunk for chunk, _ in read_tables(path, rows, columns or ()))
            return
        if kind == ".dta":
            reader = pd.read_stata(path, chunksize=rows, convert_categoricals=False)
        else:
            reader = pd.read_sas(path, format="sas7bdat", encoding="latin-1", chunksize=rows)
        with reader:
            for chunk in reader:
                yield chunk if columns is None else chunk[columns]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on a broken file pandas' readers raise any exception
        problem = "truncated, still encrypted or of another kind: copy or decrypt it again"
        kind = type(error).__name__
        raise InputError(f"{path}: not readable to its end ({kind}): {problem}") from error
