"""From the cells of an SRTR table to days, codes and numbers, whatever wrote the file.

Days count from 1960-01-01, as in SAS.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.srtr.codes import DATE_ENDINGS, TEXT_COLUMNS
from medgemma_clinical.data.srtr.files import SafFile, read_chunks
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

EPOCH = pd.Timestamp("1960-01-01")
"""Day 0 of SAS dates, and of Stata's."""

CHUNK_ROWS = 100_000
"""Rows that are read at a time; those of no use are dropped."""

EMPTY = r"\.[A-Z_]?|NA|NAN|NAT|<NA>|"
"""A cell without content; .A to .Z are SAS's special missing values."""

BEHIND = r"(?:[ T]\d{1,2}\s*|(?<!\s)\s*):.*$"
"""The label behind a code, and the time of day behind a date. Spaces are tried from the first one
alone: from each on, many would take the square of their number."""

DATE_FORMS = ("%Y-%m-%d", "%m/%d/%Y", "%m/%d/%y", "%d%b%Y", "%d%b%y")
FIRST_YEAR = 1968
"""Regional waiting lists, from which listings were taken over, are not older (believed)."""

FIRST_DIALYSIS_YEAR = 1960
"""Maintenance dialysis began. Source: Scribner 1960, the arteriovenous shunt."""

REGISTRY_YEAR = 1987
REGISTRY_DAY = (EPOCH.replace(year=REGISTRY_YEAR) - EPOCH).days
"""The registry began in October; listings before are rare, but real."""

MOST_BAD_DATES = 0.01
"""Share of a table's rows above which its dates are taken for another kind of number."""

BAD_DATE = "BAD_DATE"
"""Further column of a read table: whether a date of the row is impossible."""


@dataclass
class DateCheck:
    """Counts of a table's dates that are impossible, or earlier than the registry.

    Attributes:
        path: of the table.
        rows: read so far.
        suspicious_rows: with such a date; a few early ones are real.
        impossible: cells by column.
        first: column, data row from 1 and content of the first suspicious cell.
    """

    path: Path
    rows: int = 0
    suspicious_rows: int = 0
    impossible: Counter[str] = field(default_factory=Counter)
    first: tuple[str, int, str] | None = None

    def add(self, cells: pd.DataFrame, values: pd.DataFrame, unread: pd.DataFrame) -> pd.Series:
        """Count a chunk, as stored and as decoded; return which rows hold an impossible date."""
        dates = [name for name in map(str, values) if name.endswith(DATE_ENDINGS)]
        # Dialysis may begin decades before listing.
        early = values[dates].drop(columns="CAN_DIAL_DT", errors="ignore") < REGISTRY_DAY
        suspicious = unread[dates] | early.reindex(columns=dates, fill_value=False)
        if self.first is None and suspicious.any(axis=None):
            row, column = np.argwhere(suspicious.to_numpy())[0]
            content = str(cells[dates[column]].iloc[row])
            self.first = dates[column], self.rows + int(row) + 1, content
        self.rows += len(cells)
        self.suspicious_rows += int(suspicious.any(axis=1).sum())
        self.impossible.update({name: int(unread[name].sum()) for name in dates})
        return unread[dates].any(axis=1)

    def finish(self) -> None:
        """Log what was counted.

        Raises:
            InputError: too many rows hold impossible or very early dates.
        """
        if self.first and self.suspicious_rows > MOST_BAD_DATES * self.rows:
            column, row, content = self.first
            raise InputError(
                f"{self.path}, column {column}, data row {row}: is no date of a known form, or not "
                f"from {REGISTRY_YEAR} (dialysis: {FIRST_DIALYSIS_YEAR}) to now, one of "
                f"{self.suspicious_rows} such rows among {self.rows}; numbers must be days since "
                "1960-01-01",
                content,
            )
        for name, count in (+self.impossible).items():
            message = "%s, column %s: %d impossible dates: their rows are left out"
            logger.warning(message, self.path, name, count)


def read_saf(file: SafFile, costs: dict[str, str]) -> Iterator[pd.DataFrame]:
    """Read the used columns of a table, a chunk at a time; log which it has and lacks.

    Args:
        file: from ``find_table``.
        costs: what the absence of each column costs, empty for required ones.

    Yields:
        A column for each of ``costs``, as ``decode`` reads it, all NaN where the file lacks it;
        and ``BAD_DATE``.

    Raises:
        InputError: unreadable, a column missing, no rows, too many impossible dates, or a removal
            that is no code.
    """
    path, columns = file.path, file.columns
    spelling = {columns[name]: name for name in costs if name in columns}
    logger.info("%s: %d columns, used: %s", path, len(columns), ", ".join(spelling.values()))
    for name in (name for name in costs if name not in columns):
        if not costs[name]:
            raise InputError(
                f"{path}: no column {name} among {len(columns)}: is this SRTR's "
                f"{path.stem.upper()}, separated by commas if it is a CSV?"
            )
        logger.info("  no %s: %s", name, costs[name])
    dates = DateCheck(path)
    for chunk in read_chunks(path, list(spelling), CHUNK_ROWS):
        cells = chunk.rename(columns=spelling).reindex(columns=list(costs))
        decoded = {name: decode(cells[name]) for name in costs}
        values = pd.DataFrame({name: column for name, (column, _) in decoded.items()})
        unread = pd.DataFrame({name: column for name, (_, column) in decoded.items()})
        _check_numbers(cells, unread, path, dates.rows)
        bad = dates.add(cells, values, unread)
        yield values.assign(**{BAD_DATE: bad})
    if dates.rows == 0:
        raise InputError(f"{path}: no rows below the header")
    dates.finish()


def _check_numbers(cells: pd.DataFrame, unread: pd.DataFrame, path: Path, rows_before: int) -> None:
    """Log cells that are no numbers, and refuse removals that are no codes."""
    for name, bad in unread.items():
        if str(name).endswith(DATE_ENDINGS) or not bad.any():
            continue
        first = int(bad.to_numpy().argmax())
        where = f"{path}, column {name}, data row {rows_before + first + 1}"
        if name == "CAN_REM_CD":
            raise InputError(
                f"{where}: is neither a code nor code: label: export the codes, they decide who "
                "had an event",
                str(cells[name].iloc[first]),
            )
        logger.warning("%s: %d cells are no numbers: taken as missing", where, bad.sum())


def decode(cells: pd.Series) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Decode a column of any storage by way of its distinct cells, which are few.

    Returns:
        (n,) dates in days since 1960-01-01, words in capitals, all else as numbers, Y and N as 1
        and 0, NaN where a cell is empty or unread; and (n,) which cells hold something else.
    """
    place, distinct = pd.factorize(cells)
    known = pd.Series(distinct)
    if not pd.api.types.is_numeric_dtype(known):
        text = known.astype(str).str.strip().str.upper().str.replace(BEHIND, "", regex=True)
        known = text.mask(text.str.fullmatch(EMPTY))
    if cells.name in TEXT_COLUMNS:
        value = known
    elif str(cells.name).endswith(DATE_ENDINGS):
        value = _days(known, FIRST_DIALYSIS_YEAR if cells.name == "CAN_DIAL_DT" else FIRST_YEAR)
    else:
        number = pd.to_numeric(known.replace({"Y": "1", "N": "0"}), errors="coerce")
        value = pd.Series(number, dtype=float)
    unread = known.notna() & value.isna()
    return value.reindex(place).to_numpy(), unread.reindex(place, fill_value=False).to_numpy()


def _days(cells: pd.Series, first_year: int) -> pd.Series:
    """Read dates of any form as days since 1960-01-01, NaN outside ``first_year`` to now.

    SAS days and Unix days overlap, so size cannot tell the epoch: ``DateCheck`` looks at years.
    """
    now = pd.Timestamp.now()
    days = pd.Series(pd.to_numeric(cells, errors="coerce"), dtype=float) // 1
    text = cells[days.isna()].astype(str)
    for form in DATE_FORMS:
        parsed = pd.to_datetime(text, format=form, errors="coerce")
        if form.endswith("%y"):  # two digits: the latest such year that is not in the future
            parsed = parsed.where(~(parsed > now), parsed - pd.DateOffset(years=100))
        days = days.fillna((parsed - EPOCH).dt.days)
    first = EPOCH.replace(year=first_year)
    return days.where(days.between((first - EPOCH).days, (now - EPOCH).days))
