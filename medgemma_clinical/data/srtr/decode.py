"""From the cells of an SRTR table to days, codes and numbers, whatever wrote the file.

Days count from 1960-01-01, as in SAS.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
"""Rows in memory before those that nobody needs are dropped."""

EMPTY = r"\.[A-Z_]?|NA|NAN|NAT|<NA>|"
"""A cell without content; .A to .Z are SAS's special missing values."""

BEHIND = r"([ T]\d{1,2})?\s*:.*$"
"""The label behind a code, and the time of day behind a date."""

DATE_FORMS = ("%Y-%m-%d", "%m/%d/%Y", "%m/%d/%y", "%d%b%Y", "%d%b%y")
FIRST_YEAR = 1968
"""Regional waiting lists, from which listings were taken over, are not older (believed)."""

FIRST_DIALYSIS_YEAR = 1960
"""Maintenance dialysis began. Source: Scribner 1960, the arteriovenous shunt."""

REGISTRY_YEAR = 1987
"""The registry began in October; listings before are rare, but real."""

MOST_BAD_DATES = 0.01
"""Share of a table's rows above which its dates are taken for another kind of number."""

BAD_DATE = "BAD_DATE"
"""Further column of a read table: whether a date of the row is impossible."""

NO_CODE = "is neither a code nor code: label: export the codes, they decide who had an event"


@dataclass
class DateCheck:
    """Counts a table's impossible dates, and those before the registry began.

    Attributes:
        path: of the table.
        rows: read so far.
        bad_rows: with an impossible date.
        early_rows: with a date before the registry, which a few may have.
        bad_cells: by column.
        place: column, data row from 1 and content of the first suspicious cell.
    """

    path: Path
    rows: int = 0
    bad_rows: int = 0
    early_rows: int = 0
    bad_cells: dict[str, int] = field(default_factory=dict)
    place: tuple[str, int, str] | None = None

    def add(self, cells: pd.DataFrame, decoded: dict[str, Decoded]) -> NDArray[np.bool_]:
        """Count a chunk; return which of its rows hold an impossible date, (n,)."""
        bad, early = np.zeros((2, len(cells)), dtype=bool)
        for name, column in decoded.items():
            if not name.endswith(DATE_ENDINGS):
                continue
            first = EPOCH.replace(year=REGISTRY_YEAR)
            before = column.values < (first - EPOCH).days
            before &= name != "CAN_DIAL_DT"  # dialysis may begin decades before listing
            bad |= column.unread
            early |= before
            if column.unread.any():
                count = int(column.unread.sum())
                self.bad_cells[name] = self.bad_cells.get(name, 0) + count
            suspicious = np.flatnonzero(column.unread | before)
            if len(suspicious) and self.place is None:
                k = int(suspicious[0])
                self.place = name, self.rows + k + 1, str(cells[name].iloc[k])
        self.rows += len(cells)
        self.bad_rows += int(bad.sum())
        self.early_rows += int((early & ~bad).sum())
        return bad

    def finish(self) -> None:
        """Log what was counted.

        Raises:
            InputError: too many rows hold impossible or very early dates.
        """
        wrong = self.bad_rows + self.early_rows
        if self.place and wrong > MOST_BAD_DATES * self.rows:
            column, row, content = self.place
            raise InputError(
                f"{self.path}, column {column}, data row {row}: is no date of a known form, or not "
                f"from {REGISTRY_YEAR} (dialysis: {FIRST_DIALYSIS_YEAR}) to now, one of {wrong} "
                f"such rows among {self.rows}; numbers must be days since 1960-01-01",
                content,
            )
        for name, count in self.bad_cells.items():
            message = "%s, column %s: %d impossible dates: their rows are left out"
            logger.warning(message, self.path, name, count)


@dataclass(frozen=True)
class Decoded:
    """A column: ``values`` (n,), and ``unread`` (n,) bool, the cells that hold something else."""

    values: NDArray[Any]
    unread: NDArray[np.bool_]


def read_saf(
    file: SafFile,
    costs: dict[str, str],
    keep: Callable[[pd.DataFrame], pd.DataFrame] = lambda chunk: chunk,
) -> pd.DataFrame:
    """Read the used columns of a table, a chunk at a time; log which it has and lacks.

    Args:
        file: from ``find_table``.
        costs: what the absence of each column costs, empty for required ones.
        keep: takes from each decoded chunk what is needed later.

    Returns:
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
    kept = []
    for cells in read_chunks(path, list(spelling), CHUNK_ROWS):
        cells = cells.rename(columns=spelling).reindex(columns=list(costs))
        decoded = {name: decode(cells[name]) for name in costs}
        _check_numbers(cells, decoded, path, dates.rows)
        bad = dates.add(cells, decoded)
        chunk = pd.DataFrame({name: column.values for name, column in decoded.items()})
        kept.append(keep(chunk.assign(**{BAD_DATE: bad})))
    if dates.rows == 0:
        raise InputError(f"{path}: no rows below the header")
    dates.finish()
    return pd.concat(kept, ignore_index=True)


def _check_numbers(
    cells: pd.DataFrame, decoded: dict[str, Decoded], path: Path, rows_before: int
) -> None:
    """Log cells that are no numbers, and refuse removals that are no codes."""
    for name, column in decoded.items():
        if name.endswith(DATE_ENDINGS) or not column.unread.any():
            continue
        first = int(column.unread.argmax())
        where = f"{path}, column {name}, data row {rows_before + first + 1}"
        if name == "CAN_REM_CD":
            raise InputError(f"{where}: {NO_CODE}", str(cells[name].iloc[first]))
        count = int(column.unread.sum())
        logger.warning("%s: %d cells are no numbers: taken as missing", where, count)


def decode(cells: pd.Series) -> Decoded:
    """Decode a column of any storage by way of its distinct cells, which are few.

    Returns:
        Dates in days since 1960-01-01, words in capitals, all else as numbers, Y and N as 1 and 0;
        NaN where a cell is empty.
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
    return Decoded(
        value.reindex(place).to_numpy(), unread.reindex(place, fill_value=False).to_numpy()
    )


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
