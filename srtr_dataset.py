"""SRTR Standard Analysis Files: the waitlist of one organ as trajectories with honest labels.

    python srtr_dataset.py check --data_dir DIR --organ liver    # the first thing to run

DIR holds CAND_KIPA and STATHIST_KIPA (kidney) or CAND_LIIN and STATHIST_LIIN (liver) as SRTR
delivers them (.sas7bdat), or as CSV, Stata or Parquet, there or one folder down.

At a landmark L days after listing each registration that still waits is asked: death, or removal
because too sick, within the next H days? Inputs are the history rows that began by day L; nothing
that happened later reaches them. Days count from 1960-01-01 as in SAS until rows are placed; a
data set's times are hours since listing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_format import (
    InputError,
    ReportScore,
    TrajectoryDataset,
    plain,
    score_clauses,
    summarize,
)

logger = logging.getLogger(__name__)

EPOCH = pd.Timestamp("1960-01-01")
"""Day 0 of SAS dates, and of Stata's."""

HOURS, DAYS_A_YEAR, ADULT_YEARS, FEWEST_EVENTS = 24.0, 365.25, 18, 10
CHUNK_ROWS = 100_000
"""Rows in memory before the unneeded ones are dropped."""

TEXT_VALUES = 8
"""Latest values of a series that the text shows: a liver history can hold fifty rows."""

LARGEST = 1e6
"""No laboratory value is larger; what is counts as not measured."""

# Removal codes; all others count as removal for another reason. Source: SRTR SAF, CAN_REM_CD.
ADVERSE = frozenset({8, 13})  # died; deteriorated, too sick
TRANSPLANT = frozenset({4, 14, 15, 18, 19, 21, 22, 23, 43, 45})  # 21, 23: died in the procedure
ERROR = frozenset({10, 11, 16})  # listed in error, for antigens only, removed in error
KNOWN = ADVERSE | TRANSPLANT | ERROR | {5, 6, 7, 9, 12, 17, 20, 24, 40}

# Status codes; a liver status that is a score means active. Source: SRTR SAF, CANHX_STAT_CD.
ACTIVE = frozenset({4010, 4050, 4060, 6010, 6011, 6012, *range(6101, 6300)})
INACTIVE = frozenset({4099, 4999, 6999})
MELD_ZERO = 6200  # MELD = code - 6200

DIABETES = {1: "no diabetes", 2: "type 1 diabetes", 3: "type 2 diabetes", 4: "diabetes"}
"""CAN_DIAB; 5 is of unknown type, 998 unknown. Source: OPTN form codes (believed for the SAF)."""

MISSING = r"\.[A-Z_]?|NA|NAN|NAT|<NA>|"
"""How an export writes nothing; .A to .Z are SAS's special missing values."""

LABEL = r"\s*:.*$"
"""What stands behind a code in a formatted export."""

DATE_FORMS = (
    (r"\d{4}-\d{2}-\d{2}", "%Y-%m-%d"),
    (r"\d{1,2}/\d{1,2}/\d{4}", "%m/%d/%Y"),
    (r"\d{1,2}/\d{1,2}/\d{2}", "%m/%d/%y"),
    (r"\d{1,2}-?[A-Z]{3}-?\d{4}", "%d%b%Y"),
    (r"\d{1,2}-?[A-Z]{3}-?\d{2}", "%d%b%y"),
)
FIRST_YEAR, FIRST_DIALYSIS_YEAR = 1987, 1960
"""SRTR's registry begins in October 1987; dialysis may have begun decades before listing."""

TABLES = ("cand", "stathist")
WORDS = ("WL_ORG", "CAN_SOURCE", "CAN_GENDER", "CAN_ABO")
DEATHS = ["CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"]
KEYS = ("PX_ID", "PERS_ID", "WL_ORG", "CAN_LISTING_DT", "CAN_REM_CD", "CAN_REM_DT")
CAND_COLUMNS = {
    **dict.fromkeys(KEYS, ""),
    "CAN_SOURCE": "living donor recipients who were never listed stay in",
    "CAN_ENDWLFU": "who still waits counts as followed to the last day in the table",
    **dict.fromkeys(DEATHS, "deaths that only it records are not seen"),
    "REC_TX_DT": "transplants are known by the removal code alone",
    "CAN_AGE_IN_MONTHS_AT_LISTING": "age comes from CAN_AGE_AT_LISTING; without it children stay",
    "CAN_AGE_AT_LISTING": "nothing where CAN_AGE_IN_MONTHS_AT_LISTING is there",
    "CAN_DIAL_DT": "dialysis is known from the history alone",
    "CAN_GFR": "GFR is known from the history alone",
    "CAN_GFR_DT": "CAN_GFR is undated, so it is not used",
    **dict.fromkeys((*WORDS[2:], "CAN_BMI", "CAN_DIAB", "CAN_PREV_TX"), "the text lacks it"),
}
"""Columns of CAND_* and what their absence costs; empty where nothing works without them."""


class Feature(NamedTuple):
    """One series: its column in STATHIST, plausible limits, meaning of codes where it has them."""

    name: str
    unit: str
    column: str
    low: float
    high: float
    words: dict[int, str] | None = None


def _four(dialysis: str) -> tuple[Feature, ...]:
    """Give the four series that both organs begin with."""
    return (
        Feature("creatinine", "mg/dL", "CANHX_SERUM_CREAT", 0.1, 30),
        Feature("albumin", "g/dL", "CANHX_ALBUMIN", 0.5, 7),
        Feature("GFR", "mL/min", "CANHX_GFR", 0, 200),
        Feature("dialysis", "0 or 1", dialysis, 0, 1, {0: "no", 1: "yes"}),
    )


STATUS = Feature("status", "0 or 1", "CANHX_STAT_CD", 0, 1, {0: "inactive", 1: "active"})
GRADE = {1: "none", 2: "slight", 3: "marked"}
LABORATORY = ("mg/dL", "g/dL", "mL/min", "mEq/L")
"""Units that the text writes behind a value; scores and fractions stand alone."""


class Organ(NamedTuple):
    """What differs between organs; landmark and horizon in days, time_scale in hours."""

    suffix: str
    code: str
    landmark: int
    horizon: int
    time_scale: float
    features: tuple[Feature, ...]


ORGANS = {
    "kidney": Organ(
        *("kipa", "KI", 365, 365, 365 * HOURS),  # rows come months apart
        features=(
            *_four("CANHX_DIAL"),
            STATUS,
            Feature("cPRA", "fraction", "CANHX_CPRA", 0, 1),
        ),
    ),
    "liver": Organ(
        *("liin", "LI", 90, 90, 90 * HOURS),  # rows come weeks apart
        features=(
            *_four("CANHX_DIAL_PRIOR_WEEK"),
            Feature("bilirubin", "mg/dL", "CANHX_BILI", 0.1, 80),
            Feature("INR", "ratio", "CANHX_INR", 0.4, 20),
            Feature("sodium", "mEq/L", "CANHX_SERUM_SODIUM", 100, 180),
            Feature("MELD", "score", "CANHX_SRTR_LAB_MELD", 6, 60),
            Feature("ascites", "grade", "CANHX_ASCITES", 1, 3, GRADE),
            Feature("encephalopathy", "grade", "CANHX_ENCEPH", 1, 3, GRADE),
            STATUS,
        ),
    ),
}


# --------------------------------------------------------------------------- files


class SafFile(NamedTuple):
    """A found table: its path, the reader of its form, its columns as the file spells them."""

    path: Path
    read: Callable[[Path, list[str]], Iterator[pd.DataFrame]]
    columns: list[str]

    def has(self, column: str) -> bool:
        """Tell whether the table has a column, in whatever case."""
        return column in map(normal, self.columns)


def normal(column: str) -> str:
    """Spell a column as the data dictionary does."""
    return column.removeprefix("\u00ef\u00bb\u00bf").strip().upper()  # a UTF-8 mark read as latin-1


def _sas(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    reader: Any = pd.read_sas(path, format="sas7bdat", encoding="latin-1", chunksize=CHUNK_ROWS)
    with reader:
        yield pd.DataFrame(columns=[column.name for column in reader.columns])
        for chunk in reader:  # pandas itself refuses a file that holds fewer rows than it says
            yield chunk[columns]


def _csv(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    packed = "gzip" if path.suffix.lower() == ".gz" else None
    shape: dict[str, Any] = {"encoding": "latin-1", "compression": packed, "index_col": False}
    header = pd.read_csv(path, nrows=0, **shape)
    yield header
    if not packed and _last_line_is_short(path, len(header.columns)):
        raise EOFError("cut off within the last row")
    with pd.read_csv(path, dtype=str, usecols=columns, chunksize=CHUNK_ROWS, **shape) as reader:
        yield from reader


def _last_line_is_short(path: Path, fields: int) -> bool:
    """Tell whether a text file ends within a row: no line feed, and fields missing."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        last = file.read().decode("latin-1").rpartition("\n")[2]
    return bool(last) and len(next(csv.reader([last]))) < fields


def _stata(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    with pd.read_stata(
        path, chunksize=CHUNK_ROWS, convert_categoricals=False, columns=columns or None
    ) as reader:
        yield pd.DataFrame(columns=list(reader.variable_labels()))
        yield from reader


def _parquet(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    import pyarrow.parquet  # not among the requirements: only who holds Parquet needs it

    with pyarrow.parquet.ParquetFile(path) as file:
        yield pd.DataFrame(columns=file.schema_arrow.names)
        for batch in file.iter_batches(CHUNK_ROWS, columns=columns):
            yield batch.to_pandas()


READERS = {".sas7bdat": _sas, ".csv": _csv, ".csv.gz": _csv, ".dta": _stata, ".parquet": _parquet}


def guarded(path: Path, chunks: Iterator[pd.DataFrame], *, header: bool) -> Iterator[pd.DataFrame]:
    """Pass on the header or the chunks behind it; what fails on the way ends with one line.

    Raises:
        InputError: the file cannot be read to its end.
    """
    try:
        first = next(chunks)
        yield from [first] if header else chunks
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: Parquet needs a package: pip install pyarrow") from error
    except StopIteration:
        return
    except Exception as error:  # on a broken file the readers of pandas raise anything
        raise InputError(
            f"{path}: not readable to its end as {path.name.partition('.')[2].lower()} "
            f"({type(error).__name__}): truncated, still encrypted or of another kind: copy or "
            "decrypt it again"
        ) from error


def find_table(folder: Path, name: str) -> SafFile:
    """Find one table in a folder or one folder down, in any form and case.

    Raises:
        InputError: no such folder, no such table, or more than one.
    """
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder: give the one with the SRTR files")
    names = {name + ending: ending for ending in READERS}
    files = sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())
    found = [p for p in files if p.name.lower() in names]
    if not found:
        packed = [p.name for p in files if p.suffix.lower() in (".zip", ".exe", ".gpg", ".pgp")]
        hint = f"; unpack {packed[0]} first" if packed else ""
        raise InputError(
            f"--data_dir {folder}: no {name} ({', '.join(READERS)}) there or one folder down, "
            f"among {len(files)} files{hint}"
        )
    if len(found) > 1:
        raise InputError(
            f"--data_dir {folder}: {name} stands there {len(found)} times "
            f"({found[0].relative_to(folder)}, {found[1].relative_to(folder)}): leave one"
        )
    read = READERS[names[found[0].name.lower()]]
    header = list(guarded(found[0], read(found[0], []), header=True))
    columns = [str(column) for column in header[0].columns]
    known = [normal(c) for c in columns]
    if twice := sorted({c for c in known if known.count(c) > 1}):
        raise InputError(f"{found[0]}: column {twice[0]} stands there twice: leave one")
    return SafFile(found[0], read, columns)


def read_saf(
    file: SafFile,
    wanted: Collection[str],
    required: Collection[str],
    keep: Callable[[pd.DataFrame], pd.DataFrame] = lambda chunk: chunk,
) -> pd.DataFrame:
    """Read the wanted columns of a table, a chunk at a time.

    Args:
        file: from ``find_table``.
        wanted: columns, as the data dictionary spells them.
        required: those that must be there.
        keep: takes from each decoded chunk what is needed later.

    Returns:
        A column for each of ``wanted``: dates (``*_DT``, ``CAN_ENDWLFU``) in days since
        1960-01-01, words in capitals, all else as numbers; NaN or "" where nothing stands.

    Raises:
        InputError: unreadable, a required column missing, no rows, an impossible date.
    """
    if missing := [name for name in required if not file.has(name)]:
        raise InputError(
            f"{file.path}: no column {missing[0]} among {len(file.columns)}: is this SRTR's "
            f"{file.path.name.partition('.')[0].upper()}, separated by commas if it is a CSV?"
        )
    spelled = {c: normal(c) for c in file.columns if normal(c) in wanted}
    pieces, rows, unread = [], 0, dict.fromkeys(wanted, 0)
    for chunk in guarded(file.path, file.read(file.path, list(spelled)), header=False):
        chunk = chunk.rename(columns=spelled)
        decoded: dict[str, Any] = {}
        for name in wanted:
            if name not in chunk:
                decoded[name] = "" if name in WORDS else np.nan
            elif name in WORDS:
                decoded[name] = words(chunk[name])
            elif name.endswith("_DT") or name == "CAN_ENDWLFU":
                decoded[name] = dates(chunk[name], f"{file.path}, column {name}", rows)
            else:
                decoded[name], count = numbers(chunk[name], coded=name != "CAN_AGE_AT_LISTING")
                unread[name] += count
        pieces.append(keep(pd.DataFrame(decoded, index=range(rows, rows + len(chunk)))))
        rows += len(chunk)
    if rows == 0:
        raise InputError(f"{file.path}: no rows below the header")
    if unread.get("CAN_REM_CD"):
        raise InputError(
            f"{file.path}, column CAN_REM_CD: {unread['CAN_REM_CD']} cells hold neither a code "
            "nor code: label: export the codes, they decide who had an event"
        )
    for name in (n for n, count in unread.items() if count):
        message = "%s, column %s: %d cells are no numbers: taken as missing"
        logger.warning(message, file.path, name, unread[name])
    return pd.concat(pieces, ignore_index=True)


def _distinct(cells: pd.Series) -> tuple[NDArray[np.int64], pd.Series]:
    """Give the place of each cell among the distinct texts (-1: missing), and those in capitals."""
    place, distinct = pd.factorize(cells.astype(object))
    text = pd.Series(distinct, dtype=object).astype(str).str.strip().str.upper()
    missing = text.str.fullmatch(MISSING).to_numpy(bool)
    if missing.any():
        place = np.where(np.append(missing, True)[place], -1, place)
    return place, text


def words(cells: pd.Series) -> NDArray[Any]:
    """Read words, of ``code: label`` the code; "" where nothing stands."""
    place, text = _distinct(cells)
    return np.append(text.str.replace(LABEL, "", regex=True).to_numpy(object), "")[place]


def numbers(cells: pd.Series, *, coded: bool = True) -> tuple[NDArray[np.float64], int]:
    """Read numbers, Y and N as 1 and 0, of ``code: label`` the code unless not ``coded``.

    Returns:
        The numbers, NaN where there is none, and how many cells hold something else.
    """
    if pd.api.types.is_numeric_dtype(cells):
        values = cells.to_numpy(np.float64, na_value=np.nan)
        return np.where(np.isfinite(values), values, np.nan), 0
    place, text = _distinct(cells)
    if coded:
        text = text.str.replace(LABEL, "", regex=True)
        text = text.replace({"Y": "1", "YES": "1", "N": "0", "NO": "0", "TRUE": "1", "FALSE": "0"})
    value = np.append(pd.to_numeric(text, errors="coerce").to_numpy(np.float64), np.nan)
    value[~np.isfinite(value)] = np.nan
    return value[place], int((np.isnan(value[place]) & (place >= 0)).sum())


def dates(cells: pd.Series, where: str, first_row: int) -> NDArray[np.float64]:
    """Read dates of any form as days since 1960-01-01; numbers are SAS days.

    SAS days and Unix days overlap, so size cannot tell the epoch: the years are checked instead.

    Args:
        cells: a column of one chunk.
        where: file and column, for errors.
        first_row: rows before the chunk.

    Raises:
        InputError: a text that is no date, or a year that cannot be.
    """
    if pd.api.types.is_datetime64_any_dtype(cells):
        days = ((cells.dt.tz_localize(None) - EPOCH) // pd.Timedelta(days=1)).to_numpy(np.float64)
    elif pd.api.types.is_numeric_dtype(cells):
        days = np.floor(cells.to_numpy(np.float64, na_value=np.nan))
    else:
        place, text = _distinct(cells)
        days = np.append(_parse_dates(text), np.nan)[place]
        _refuse((place >= 0) & np.isnan(days), where, first_row, "is no date of a known form")
    first = FIRST_DIALYSIS_YEAR if where.endswith("CAN_DIAL_DT") else FIRST_YEAR
    low = (pd.Timestamp(first, 1, 1) - EPOCH).days
    problem = f"lies outside {first} to now: numbers must be days since 1960-01-01"
    _refuse((days < low) | (days > _today()), where, first_row, problem)
    return days


def _parse_dates(text: pd.Series) -> NDArray[np.float64]:
    """Read distinct date texts as days since 1960-01-01, NaN where no form fits."""
    text = text.str.replace(r"[ T:]\d{1,2}:\d{2}.*$", "", regex=True)  # a time of day behind
    days = np.floor(pd.to_numeric(text, errors="coerce").to_numpy(np.float64, copy=True))
    for pattern, form in DATE_FORMS:
        fits = text.str.fullmatch(pattern).to_numpy(bool)
        bare = text[fits].str.replace("-", "") if "%b" in form else text[fits]
        parsed = pd.to_datetime(bare, format=form, errors="coerce")
        if form.endswith("%y"):  # two digits: the latest such year that is not in the future
            late = parsed > EPOCH + pd.Timedelta(days=_today())
            parsed = parsed.where(~late, parsed - pd.DateOffset(years=100))
        days[fits] = (parsed - EPOCH).dt.days.to_numpy(np.float64)
    return days


def _today() -> int:
    return (datetime.date.today() - EPOCH.date()).days


def _refuse(bad: NDArray[np.bool_], where: str, first_row: int, problem: str) -> None:
    """Raise with the place of the first bad cell; never shows what a patient's cell holds."""
    if bad.any():
        row = first_row + int(bad.argmax()) + 1
        raise InputError(f"{where}, data row {row}: {problem} ({int(bad.sum())} such cells)")


# --------------------------------------------------------------------------- cohort and labels


NO_ROW = "no history row by the landmark"


def outcomes(
    cand: pd.DataFrame, organ: Organ, landmark: int, horizon: int, transplant: str
) -> pd.DataFrame:
    """Decide for each registration why it is left out, or its label.

    Args:
        cand: decoded CAND table, one row a registration.
        organ: gives the code of WL_ORG.
        landmark: days after listing at which the question is asked.
        horizon: days that it looks ahead.
        transplant: ``negative`` (a transplant within the horizon is label 0) or ``exclude``.

    Returns:
        For each row ``reason`` ("" where kept) and ``label`` (NaN where left out).

    Source: SRTR SAF data dictionary; landmarking, van Houwelingen 2007.
    """
    code, removed, grafted = cand["CAN_REM_CD"], cand["CAN_REM_DT"], cand["REC_TX_DT"]
    last_day = cand[["CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU"]].max(axis=None)
    followed = cand["CAN_ENDWLFU"].where(cand["CAN_ENDWLFU"].notna() | code.notna(), last_day)
    end = cand[["CAN_REM_DT", "REC_TX_DT"]].min(axis=1).fillna(followed)
    first = grafted.notna() & ~(grafted >= removed)  # removal came later, or never
    transplanted = first | code.isin(TRANSPLANT) | ((grafted == removed) & ~code.isin(ADVERSE))
    death = cand[DEATHS].min(axis=1)
    # Who dies on the day of a transplant dies of it: codes 21 and 23 say so.
    died = (death < end) | ((death == end) & ~transplanted)
    died |= end.isna() & death.notna() & code.isin(ADVERSE)
    adverse = died | (code.isin(ADVERSE) & ~transplanted)
    competing = transplanted & ~died
    days = end.where(~died, death) - cand["CAN_LISTING_DT"]  # listing to end
    within = days <= landmark + horizon
    rules = {
        "other organ": cand["WL_ORG"] != organ.code,
        "living donor recipient, never listed": cand["CAN_SOURCE"] == "L",
        "under 18": age_years(cand) < ADULT_YEARS,
        "removed: listed or removed in error": code.isin(ERROR),
        "no day of listing or removal": days.isna(),
        "ended by the landmark": days <= landmark,
        "transplanted within the horizon": within & competing & (transplant == "exclude"),
        "censored within the horizon": within & ~adverse & ~competing,
        NO_ROW: pd.Series(False, index=cand.index),  # known when the history is read
    }
    reason = np.select([mask.to_numpy() for mask in rules.values()], list(rules), default="")
    label = np.where(reason == "", (within & adverse).astype(float), np.nan)
    reasons = pd.Categorical(reason, categories=["", *rules])
    return pd.DataFrame({"reason": reasons, "label": label}, index=cand.index)


def age_years(cand: pd.DataFrame) -> pd.Series:
    """Give the age at listing in years: formatted exports turn CAN_AGE_AT_LISTING into bins."""
    return (cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12).fillna(cand["CAN_AGE_AT_LISTING"])


def read_candidates(file: SafFile) -> pd.DataFrame:
    """Read CAND, one row a registration, sorted by PX_ID.

    Raises:
        InputError: as ``read_saf``, or a PX_ID with two different rows.
    """
    cand = read_saf(file, CAND_COLUMNS, KEYS)
    keyed = cand[["PX_ID", "PERS_ID"]].gt(0).all(axis=1) & cand["PX_ID"].mod(1).eq(0)
    if not keyed.all():
        logger.warning("%s: %d rows without PX_ID or PERS_ID: left out", file.path, (~keyed).sum())
    cand = cand[keyed].drop_duplicates()
    twice = cand["PX_ID"].duplicated()
    if twice.any():
        raise InputError(
            f"{file.path}, column PX_ID: {int(twice.sum())} registrations stand there again with "
            "different content: leave one row each"
        )
    unknown = int((cand["CAN_REM_CD"].notna() & ~cand["CAN_REM_CD"].isin(KNOWN)).sum())
    if unknown:
        message = "%s: %d unknown removal codes: counted as removal for another reason"
        logger.warning(message, file.path, unknown)
    return cand.sort_values("PX_ID", ignore_index=True)


def flow_table(reasons: pd.Series) -> pd.DataFrame:
    """Count what each rule removed, in the order of the rules: columns rule, removed, left."""
    removed = reasons.value_counts(sort=False).drop("")
    flow = pd.DataFrame({"rule": removed.index, "removed": removed.to_numpy(np.int64)})
    return flow.assign(left=len(reasons) - flow["removed"].cumsum())


# --------------------------------------------------------------------------- inputs


def decode(feature: Feature, column: pd.Series) -> pd.Series:
    """Turn SRTR's codes into a feature's values, NaN where nothing was measured."""
    if feature.name == "MELD":  # converted files may hold the score itself
        score = column.where(column < MELD_ZERO, column - MELD_ZERO)
        return score.where(score.between(feature.low, feature.high))
    if feature is STATUS:
        return column.isin(ACTIVE).astype(float).where(column.isin(ACTIVE | INACTIVE))
    if feature.name == "dialysis" and column.between(2, 5).any():  # coded as CAN_DIAL
        column = column.where(column != 1, 0).where(~column.between(2, 5), 1)
    if feature.words:
        return column.where(column.isin(feature.words))
    return column.where(column.abs() <= LARGEST)


def read_history(file: SafFile, organ: Organ, cohort: pd.DataFrame, landmark: int) -> pd.DataFrame:
    """Read the history rows that began by the landmark, of registrations in the cohort.

    All of them began before the end: who ended by the landmark is not in the cohort.

    Returns:
        owner (position in ``cohort``), day since listing, a column a feature, place in order; the
        last row before listing stands at day 0 where no row begins on that day.
    """
    index, listed = pd.Index(cohort["PX_ID"]), cohort["CAN_LISTING_DT"].to_numpy()

    def keep(chunk: pd.DataFrame) -> pd.DataFrame:
        owner = index.get_indexer(pd.Index(chunk["PX_ID"]))
        day = chunk["CANHX_BEGIN_DT"].to_numpy() - listed[owner]
        chunk = chunk.assign(owner=owner, day=day)
        return chunk[(owner >= 0) & (day <= landmark)]

    columns = ["PX_ID", "CANHX_BEGIN_DT", *(f.column for f in organ.features)]
    rows = read_saf(file, columns, columns[:2], keep)
    history = rows[["owner", "day"]].copy()
    for feature in organ.features:
        history[feature.name] = decode(feature, rows[feature.column])
    history = history.drop_duplicates()  # rows of one day keep the order of the file
    history = history.sort_values(["owner", "day"], kind="stable", ignore_index=True)
    ahead = history["day"] < 0
    followed = history["owner"].shift(-1).eq(history["owner"]) & history["day"].shift(-1).le(0)
    history = history[~(ahead & followed)]  # of the rows before listing only one in force at 0
    return history.assign(day=history["day"].clip(lower=0), place=np.arange(len(history)))


def add_dated_values(
    history: pd.DataFrame, cohort: pd.DataFrame, landmark: int, *, dialysis: bool
) -> pd.DataFrame:
    """Add what CAND dates itself: a GFR at its own day, the day on which dialysis began.

    A date behind the landmark reads exactly as a missing one: both mean "not by then".

    Args:
        history: from ``read_history``.
        cohort: CAND rows that ``owner`` points into.
        landmark: in days.
        dialysis: the history has no column of its own for dialysis.
    """
    gfr, start = (
        (cohort[name] - cohort["CAN_LISTING_DT"]).where(lambda day: day <= landmark)
        for name in ("CAN_GFR_DT", "CAN_DIAL_DT")
    )
    measured = gfr.notna() & cohort["CAN_GFR"].abs().le(LARGEST)
    dated = pd.DataFrame(
        {"owner": cohort.index, "day": gfr.clip(lower=0), "value": cohort["CAN_GFR"]}
    )
    dated = dated[measured]
    if dialysis:
        begun = pd.DataFrame({"owner": cohort.index, "day": start})[start > 0]
        dated = dated.merge(begun, on=["owner", "day"], how="outer")
    dated = dated[dated["owner"].isin(history["owner"])]  # a registration needs a history row
    rows = history.merge(dated, on=["owner", "day"], how="outer")
    rows["GFR"] = rows["GFR"].fillna(rows["value"])
    if dialysis:
        begun_by = start.to_numpy()[rows["owner"]] <= rows["day"]
        rows["dialysis"] = begun_by.astype(float)
    return rows.sort_values(["owner", "day", "place"], kind="stable", ignore_index=True)


def describe(cohort: pd.DataFrame, organ_name: str, landmark: int) -> NDArray[np.object_]:
    """Write what was known at listing, and the days since: (N,) sentences without full stop."""
    age, bmi = age_years(cohort), cohort["CAN_BMI"]
    years = np.floor(age).where(age.between(0, 120))
    person = years.map(lambda a: "Adult " if np.isnan(a) else f"{a:.0f}-year-old ")
    person += cohort["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna("patient")
    group = cohort["CAN_ABO"].where(cohort["CAN_ABO"].isin({"A", "A1", "A2", "B", "O", "AB"}))
    shown = bmi.where(bmi.between(10, 80)).map(plain, na_action="ignore")
    parts = [
        "blood group " + group.astype(object),
        "BMI " + shown.astype(object) + " kg/m2",
        cohort["CAN_DIAB"].map(DIABETES),
        cohort["CAN_PREV_TX"].map({0: "no earlier transplant", 1: "earlier transplant"}),
    ]
    text = person
    for part in parts:
        text = text + (", " + part.astype(object)).fillna("")
    waits = f", on the {organ_name} waiting list for {landmark} days"
    return (text + waits).to_numpy(dtype=object)


class SRTRTrajectoryDataset(TrajectoryDataset):
    """Registrations on the waiting list of one organ that still wait at the landmark.

    Args:
        data_dir: folder with the SAF tables.
        organ: ``kidney`` or ``liver``.
        landmark_days: days after listing at which the question is asked; 365 kidney, 90 liver.
        horizon_days: days that it looks ahead; 365 kidney, 90 liver.
        max_len: only the most recent so many observations of a registration are kept.
        transplant: what a transplant within the horizon is: ``negative`` (label 0, a competing
            event) or ``exclude`` (left out).

    Attributes:
        flow: how many registrations each rule removed; columns rule, removed, left.
        registrations: (all in the organ's file) by PX_ID: ``reason`` ("" where kept), ``label``.
        ages: (N,) years at listing, NaN where unknown.
        dialysis_years: (N,) years on dialysis by the landmark, 0 where not begun.

    Raises:
        InputError: files that cannot be read, nobody left, or fewer than ten events.
    """

    row_columns = (*TrajectoryDataset.row_columns, "ages", "dialysis_years")
    ages: NDArray[np.float64]
    dialysis_years: NDArray[np.float64]
    outcome = "Death or too sick for transplant"
    parts = None

    def __init__(
        self,
        data_dir: str | Path,
        organ: str = "kidney",
        *,
        landmark_days: int | None = None,
        horizon_days: int | None = None,
        max_len: int = 50,
        transplant: str = "negative",
    ) -> None:
        """Read, decide and place everything at once."""
        kind = ORGANS.get(organ)
        if kind is None or transplant not in ("negative", "exclude"):
            raise InputError(f"no organ {organ!r} or no way {transplant!r} to count transplants")
        self.organ, self._kind, self.source = organ, kind, str(data_dir)
        self.landmark_days = kind.landmark if landmark_days is None else landmark_days
        self.horizon_days = kind.horizon if horizon_days is None else horizon_days
        if self.landmark_days < 0 or self.horizon_days < 1 or max_len < 1:
            raise InputError(
                f"landmark_days {self.landmark_days}, horizon_days {self.horizon_days}, max_len "
                f"{max_len}: must be at least 0, 1 and 1"
            )
        self.features = tuple(f.name for f in kind.features)
        self.units = tuple(f.unit for f in kind.features)
        self.time_scale = kind.time_scale
        self.question = (
            f"Will this patient die or become too sick for a {organ} transplant within "
            f"{self.horizon_days} days of day {self.landmark_days}?"
        )
        self._read(Path(data_dir), max_len, transplant)

    def _read(self, folder: Path, max_len: int, transplant: str) -> None:
        kind, landmark = self._kind, self.landmark_days
        cand_file, history_file = (find_table(folder, f"{t}_{kind.suffix}") for t in TABLES)
        cand = read_candidates(cand_file)
        result = outcomes(cand, kind, landmark, self.horizon_days, transplant)
        kept = np.flatnonzero(result["reason"] == "")
        self._refuse_too_few(result)
        cohort = cand.iloc[kept].reset_index(drop=True)
        rows = read_history(history_file, kind, cohort, landmark)
        own = history_file.has(kind.features[3].column)
        dated = not own and cand_file.has("CAN_DIAL_DT")
        rows = add_dated_values(rows, cohort, landmark, dialysis=dated)
        rows = rows[rows[list(self.features)].notna().any(axis=1)]
        seen = np.isin(np.arange(len(cohort)), rows["owner"])
        result.loc[kept[~seen], "reason"] = NO_ROW
        result["label"] = result["label"].where(result["reason"] == "")
        self._refuse_too_few(result)
        self.registrations = result.set_index(cand["PX_ID"].astype(np.int64))
        self.flow = flow_table(result["reason"])
        self.labels = result["label"].dropna().to_numpy(np.float64)
        rows = rows.assign(owner=(np.cumsum(seen) - 1)[rows["owner"].to_numpy(np.int64)])
        self._place(cohort[seen], rows, max_len)
        self._say(history_file)

    def _refuse_too_few(self, result: pd.DataFrame) -> None:
        left, events = int((result["reason"] == "").sum()), int((result["label"] == 1).sum())
        if left and events >= FEWEST_EVENTS:
            return
        flow = flow_table(result["reason"])
        counts = zip(flow["rule"], flow["removed"], strict=True)
        taken = "; ".join(f"{rule} {count}" for rule, count in counts if count)
        raise InputError(
            f"{self.source}: {left or 'no'} registrations left with {events} events, "
            f"{FEWEST_EVENTS} are needed; of {len(result)} the rules took: {taken or 'none'}"
        )

    def _place(self, cohort: pd.DataFrame, rows: pd.DataFrame, max_len: int) -> None:
        """Set the arrays of the contract; ``owner`` of a row is its position in ``cohort``."""
        owner = rows["owner"].to_numpy(np.int64)
        lengths = np.bincount(owner, minlength=len(cohort))
        recent = np.arange(len(owner)) >= np.cumsum(lengths)[owner] - max_len
        self._shortened = int((lengths > max_len).sum())
        self.times = rows["day"].to_numpy(np.float64)[recent] * HOURS
        self.values = rows[list(self.features)].to_numpy(np.float64)[recent]
        self.offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_len))])
        self.ids = np.array(cohort["PX_ID"].astype(np.int64), dtype=np.str_)
        self.groups = np.array(cohort["PERS_ID"].astype(np.int64), dtype=np.str_)
        self.contexts = describe(cohort, self.organ, self.landmark_days)
        self.ages = age_years(cohort).to_numpy(np.float64)
        began = cohort["CAN_DIAL_DT"] - cohort["CAN_LISTING_DT"]
        years = (self.landmark_days - began).clip(lower=0).fillna(0) / DAYS_A_YEAR
        self.dialysis_years = years.to_numpy(np.float64)

    def _say(self, history: SafFile) -> None:
        """Tell what the user should know of the cohort, once."""
        logger.info("%s: %d registrations", self.source, len(self.registrations))
        for rule in self.flow.itertuples():
            logger.info("  %6d out, %7d left: %s", rule.removed, rule.left, rule.rule)
        if self._shortened:
            logger.info("%d have more observations than are kept: the latest", self._shortened)
        never = np.array(self.features)[np.isnan(self.values).all(axis=0)]
        if len(never):
            reason = "; SRTR's own kidney history holds no laboratory value"
            note = reason if self.organ == "kidney" else ""
            logger.info("%s: never measured: %s%s", history.path, ", ".join(never), note)

    def prompt(self, i: int) -> str:
        """Give context, the latest values of each series with their days, and the question."""
        lines = []
        for feature, days, values in self._measured(i):
            if feature.words:  # of a state only its changes
                new = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
                days, values = days[new], values[new]
            unit = f" in {feature.unit}" if feature.unit in LABORATORY else ""
            shown = zip(days[-TEXT_VALUES:], values[-TEXT_VALUES:], strict=True)
            text = " -> ".join(f"{say(feature, v)} (day {plain(d)})" for d, v in shown)
            lines.append(f"{feature.name}{unit}: {text}")
        return f"{self.contexts[i]}. Since listing: {'; '.join(lines)}. {self.question}\n"

    def report(self, i: int) -> str:
        """Give the verdict, then first and last value of each series that was measured.

        Raises:
            ValueError: the label of registration ``i`` is unknown.
        """
        if np.isnan(self.labels[i]):
            raise ValueError(f"registration {i} has no label, so there is no report to learn")
        verdict = "yes" if self.labels[i] == 1 else "no"
        return f"{self.outcome}: {verdict}. History: {', '.join(map(''.join, self._clauses(i)))}."

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with what the history of registration ``i`` holds."""
        coded = {w for f in self._kind.features for w in (f.words or {}).values()}
        free = "|".join(sorted(coded | {"rising", "falling", "level"}))

        def form(patterns: list[str]) -> str:
            said = re.sub(rf"\b(?:{free})\b", f"(?:{free})", ", ".join(patterns))
            return rf"History: {said}\."

        return score_clauses(text, self.outcome, self._clauses(i), form, self.features)

    def _measured(self, i: int) -> Iterator[tuple[Feature, NDArray[Any], NDArray[Any]]]:
        """Give each series of registration ``i`` that was measured: days and values."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        for f, feature in enumerate(self._kind.features):
            seen = ~np.isnan(self.values[rows, f])
            if seen.any():
                yield feature, self.times[rows][seen] / HOURS, self.values[rows, f][seen]

    def _clauses(self, i: int) -> list[list[str]]:
        """Give the clauses of a report, each as words and numbers in turn, words first."""
        clauses = []
        for feature, days, values in self._measured(i):
            first, last = (say(feature, values[k]) for k in (0, -1))
            ends = plain(days[0]), plain(days[-1])
            name, change = feature.name, np.sign(values[-1] - values[0])
            if feature.words:
                parts = [f"last {name} {last} at day ", ends[1]]
            elif len(values) == 1:
                parts = [f"only {name} ", first, " at day ", ends[0]]
            else:
                direction = {1: "rising", -1: "falling", 0: "level"}[int(change)]
                parts = [f"first {name} ", first, " at day ", ends[0]]
                parts += [f" and last {name} ", last, " at day ", ends[1], f" {direction}"]
            clauses.append(parts)
        return [*clauses, ["after ", str(self.lengths[i]), " observations"]]

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Give the inputs of the usual baselines, and of those of this waiting list, N rows each.

        Source: MELD, Kamath 2001; age and years of dialysis, as in Hart 2016.
        """
        inputs = super().baseline_inputs()
        age = pd.DataFrame({"age": self.ages})
        if self.organ == "kidney":
            years = pd.DataFrame({"years of dialysis": self.dialysis_years})
            return {**inputs, "age and years of dialysis": age.join(years)}
        meld = inputs["logistic regression"][["MELD last"]]
        return {**inputs, "last MELD": meld, "last MELD and age": meld.join(age)}


def say(feature: Feature, value: float) -> str:
    """Write one value: a word for a code, a number otherwise."""
    return feature.words[int(value)] if feature.words else plain(value)


# --------------------------------------------------------------------------- check


def describe_files(folder: Path, organ: str) -> None:
    """Log the tables found, and what the columns they lack cost.

    Raises:
        InputError: a table is missing.
    """
    kind = ORGANS[organ]
    history = {f.column: f"{f.name} is not measured" for f in kind.features}
    for table, costs in zip(
        TABLES, (CAND_COLUMNS, {"PX_ID": "", "CANHX_BEGIN_DT": "", **history}), strict=True
    ):
        file = find_table(folder, f"{table}_{kind.suffix}")
        found = [name for name in costs if file.has(name)]
        logger.info("%s: %d columns, used: %s", file.path, len(file.columns), ", ".join(found))
        for name in (n for n in costs if n not in found):
            logger.info("  no %s: %s", name, costs[name] or "cannot be read without it")


def implausible(dataset: SRTRTrajectoryDataset) -> list[str]:
    """Name the series that hold values which no living adult shows."""
    found = []
    for f, feature in enumerate(ORGANS[dataset.organ].features):
        values = dataset.values[:, f]
        outside = int(((values < feature.low) | (values > feature.high)).sum())
        if outside:
            limits = f"{plain(feature.low)} to {plain(feature.high)} {feature.unit}"
            found.append(f"{outside:,} values of {feature.name} lie outside {limits}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the folder can be trained on, 2 when not."""
    parser = argparse.ArgumentParser(
        prog="srtr_dataset.py", description="Check a folder of SRTR files.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="read a folder and print its summary").add_argument
    add("--data_dir", type=Path, required=True, help="folder with the SRTR files")
    add("--organ", choices=tuple(ORGANS), default="kidney")
    add("--landmark_days", type=int, help="days after listing; 365 kidney, 90 liver")
    add("--horizon_days", type=int, help="days looked ahead; 365 kidney, 90 liver")
    add("--transplant", choices=("negative", "exclude"), default="negative")
    options = vars(parser.parse_args(argv))
    del options["command"]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        describe_files(options["data_dir"], options["organ"])
        dataset = SRTRTrajectoryDataset(**options)
        for line in summarize(dataset):
            logger.info(line)
        for line in implausible(dataset):
            logger.warning("warning: %s", line)
        dataset.split(seed=0)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logger.info("fit to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
