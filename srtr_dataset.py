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

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_format import (
    DIRECTIONS,
    SHOW_VALUES,
    UNKNOWN,
    InputError,
    Parser,
    TrajectoryDataset,
    implausible,
    plain,
    run_check,
)

logger = logging.getLogger(__name__)

EPOCH = pd.Timestamp("1960-01-01")  # day 0 of SAS dates, and of Stata's
HOURS, DAYS_A_YEAR, ADULT_YEARS, FEWEST_EVENTS = 24.0, 365.25, 18, 10
MOST_DAYS = 36_500  # a landmark or horizon of a hundred years
CHUNK_ROWS = 100_000  # in memory before the unneeded ones are dropped
TEXT_VALUES = 8  # latest values of a series in the text: a liver history can hold fifty rows
LARGEST = 1e6  # no laboratory value is larger; what is counts as not measured

# Removal codes; all others count as removal for another reason. Source: SRTR SAF, CAN_REM_CD.
DIED = 8
ADVERSE = frozenset({DIED, 13})  # 13: deteriorated, too sick
TRANSPLANT = frozenset({4, 14, 15, 18, 19, 21, 22, 23, 43, 45})  # 21, 23: died in the procedure
ERROR = frozenset({10, 11, 16})  # listed in error, for antigens only, removed in error
KNOWN = ADVERSE | TRANSPLANT | ERROR | {5, 6, 7, 9, 12, 17, 20, 24, 40}

# Value of each code; other codes mean not measured. Source: SRTR SAF, CANHX_STAT_CD, CAN_DIAL.
ACTIVE = (4010, 4050, 4060, 6010, 6011, 6012, *range(6101, 6300))  # a liver's score: active
STATUS_CODES = {**dict.fromkeys(ACTIVE, 1), **dict.fromkeys((4099, 4999, 6999), 0)}
MELD_CODES = {code: m for m in range(6, 61) for code in (6200 + m, m)}  # m: a converted file
DIALYSIS_KINDS = {1: 0, 2: 1, 3: 1, 4: 1, 5: 1}

YES_NO = {0: "no", 1: "yes"}
GRADES = {1: "none", 2: "slight", 3: "marked"}
# 5 is of unknown type, 998 unknown. Source: OPTN form codes (believed for CAN_DIAB of the SAF).
DIABETES = {1: "no diabetes", 2: "type 1 diabetes", 3: "type 2 diabetes", 4: "diabetes"}

NOTHING = r"\.[A-Z_]?|NA|NAN|NAT|<NA>|"  # .A to .Z are SAS's special missing values
BEHIND = r"([ T]\d{1,2})?\s*:.*$"  # the label behind a code, the time of day behind a date
DATES = ("_DT", "_ENDWLFU")  # endings of the columns that hold dates
DATE_FORMS = ("%Y-%m-%d", "%m/%d/%Y", "%m/%d/%y", "%d%b%Y", "%d%b%y")
FIRST_YEAR = 1987  # SRTR's registry begins in October
FIRST_DIALYSIS_YEAR = 1960  # dialysis may have begun decades before listing
NO_DATE = (
    f"is no date of a known form, or not from {FIRST_YEAR} (dialysis: {FIRST_DIALYSIS_YEAR}) to "
    "now; numbers must be days since 1960-01-01"
)
NO_CODE = "is neither a code nor code: label: export the codes, they decide who had an event"

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
    "CAN_AGE_IN_MONTHS_AT_LISTING": "ages are unknown and children stay in",
    "CAN_DIAL_DT": "dialysis is known from the history alone, its years not at all",
    "CAN_GFR": "GFR is known from the history alone",
    "CAN_GFR_DT": "CAN_GFR is undated, so it is not used",
    **dict.fromkeys((*WORDS[2:], "CAN_BMI", "CAN_DIAB", "CAN_PREV_TX"), "the text lacks it"),
}
"""Columns of CAND_* and what their absence costs; empty where nothing works without them."""


class Feature(NamedTuple):
    """One series: column in STATHIST, plausible limits, words for values, values of codes."""

    name: str
    unit: str
    column: str
    low: float
    high: float
    words: dict[int, str] | None = None
    codes: dict[int, int] | None = None

    def decode(self, column: pd.Series) -> pd.Series:
        """Turn a column of STATHIST into values, NaN where nothing was measured."""
        if self.column == "CANHX_DIAL":  # 0 and 1, or coded as CAN_DIAL, where 1 means no
            seen = set(column.dropna())
            if seen & {2, 3, 4, 5, 998, 999}:
                return column.map(DIALYSIS_KINDS)
            if seen == {1}:
                logger.warning("CANHX_DIAL holds 1 alone, yes or CAN_DIAL's no: not used")
                return column.where(column.isna())
        if self.codes:
            return column.map(self.codes)
        return column.where(column.isin(self.words) if self.words else column.abs() <= LARGEST)

    def say(self, value: float) -> str:
        """Write one value: a word where there is one, a number otherwise."""
        return self.words[int(value)] if self.words else plain(value)


class Organ(NamedTuple):
    """What differs between organs; ``days`` is landmark, horizon and the encoder's unit of time.

    ``main`` is the series that stands for the others in a short text.
    """

    suffix: str
    code: str
    days: int
    main: str
    features: tuple[Feature, ...]


LABORATORY = (
    Feature("creatinine", "mg/dL", "CANHX_SERUM_CREAT", 0.1, 30),
    Feature("albumin", "g/dL", "CANHX_ALBUMIN", 0.5, 7),
    Feature("GFR", "mL/min", "CANHX_GFR", 0, 200),
)
DIALYSIS = Feature("dialysis", "0 or 1", "CANHX_DIAL", 0, 1, YES_NO)
STATUS_WORDS = {0: "inactive", 1: "active"}
STATUS = Feature("status", "0 or 1", "CANHX_STAT_CD", 0, 1, STATUS_WORDS, STATUS_CODES)
CPRA = Feature("cPRA", "fraction", "CANHX_CPRA", 0, 1)
LIVER_FEATURES = (
    *LABORATORY,
    DIALYSIS._replace(column="CANHX_DIAL_PRIOR_WEEK"),
    Feature("bilirubin", "mg/dL", "CANHX_BILI", 0.1, 80),
    Feature("INR", "ratio", "CANHX_INR", 0.4, 20),
    Feature("sodium", "mEq/L", "CANHX_SERUM_SODIUM", 100, 180),
    Feature("MELD", "score", "CANHX_SRTR_LAB_MELD", 6, 60, codes=MELD_CODES),
    Feature("ascites", "grade", "CANHX_ASCITES", 1, 3, GRADES),
    Feature("encephalopathy", "grade", "CANHX_ENCEPH", 1, 3, GRADES),
    STATUS,
)
ORGANS = {
    "kidney": Organ("kipa", "KI", 365, "GFR", (*LABORATORY, DIALYSIS, STATUS, CPRA)),
    "liver": Organ("liin", "LI", 90, "MELD", LIVER_FEATURES),
}


# --------------------------------------------------------------------------- files


class SafFile(NamedTuple):
    """A found table, and its columns: the data dictionary's spelling to the file's."""

    path: Path
    columns: dict[str, str]


def find_table(folder: Path, name: str) -> SafFile:
    """Find one table in a folder or one folder down, in any form and case.

    Raises:
        InputError: no such folder, not exactly one such table, or not readable.
    """
    if not os.path.isdir(folder):  # False also for a name that no disk takes
        raise InputError(f"--data_dir {folder}: no such folder: give the one with the SRTR files")
    files = sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())
    found = [p for p in files if p.name.lower() in {name + ending for ending in READERS}]
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in found)
        raise InputError(
            f"--data_dir {folder}: {name} ({', '.join(READERS)}) must stand there or one folder "
            f"down once, decrypted and unpacked: found {names or f'none among {len(files)} files'}"
        )
    first = next(chunks(found[0], None, 1), pd.DataFrame())
    return SafFile(found[0], {column.strip().upper(): column for column in first.columns})


def chunks(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    """Read a table so many rows at a time: the columns as the file spells them, None for all.

    Raises:
        InputError: the file cannot be read to its end.
    """
    try:
        yield from READERS[path.suffix.lower()](path, columns, rows)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: Parquet needs a package: pip install pyarrow") from error
    except Exception as error:  # on a broken file the readers of pandas raise anything
        raise InputError(
            f"{path}: not readable to its end as {path.suffix[1:].lower()} "
            f"({type(error).__name__}): truncated, still encrypted or of another kind: copy or "
            "decrypt it again"
        ) from error


def _sas(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    reader: Any = pd.read_sas(path, format="sas7bdat", encoding="latin-1", chunksize=rows)
    with reader:  # pandas itself refuses a file that holds fewer rows than it says
        for chunk in reader:
            yield chunk if columns is None else chunk[columns]


def _csv(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    with path.open("rb") as file:
        header = file.readline()
        file.seek(-min(path.stat().st_size, 2**16), os.SEEK_END)
        last = file.readlines()[-1]
    if not last.endswith(b"\n") and last.count(b",") < header.count(b","):
        raise EOFError("cut off within the last row")
    text: dict[str, Any] = {"encoding": "utf-8-sig", "encoding_errors": "replace", "dtype": str}
    with pd.read_csv(path, usecols=columns, chunksize=rows, index_col=False, **text) as reader:
        yield from reader


def _stata(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    plain_codes: Any = {"convert_categoricals": False, "columns": columns}
    with pd.read_stata(path, chunksize=rows, **plain_codes) as reader:
        yield from reader


def _parquet(path: Path, columns: list[str] | None, rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow.parquet  # not among the requirements: only who holds Parquet needs it

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(rows, columns=columns):
            yield batch.to_pandas(ignore_metadata=True)  # a pandas index stays a column


READERS = {".sas7bdat": _sas, ".csv": _csv, ".dta": _stata, ".parquet": _parquet}


def read_saf(
    file: SafFile,
    costs: dict[str, str],
    keep: Callable[[pd.DataFrame], pd.DataFrame] = lambda chunk: chunk,
) -> pd.DataFrame:
    """Read the columns of a table that are used, a chunk at a time; log which it has and lacks.

    Args:
        file: from ``find_table``.
        costs: what the absence of each column costs, empty for those that must be there.
        keep: takes from each decoded chunk what is needed later.

    Returns:
        A column for each of ``costs``, as ``decode`` reads it; all NaN where the file lacks it.

    Raises:
        InputError: unreadable, a column missing, no rows, an impossible date or code.
    """
    path, columns = file
    spelled = {columns[name]: name for name in costs if name in columns}
    logger.info("%s: %d columns, used: %s", path, len(columns), ", ".join(spelled.values()))
    for name in (name for name in costs if name not in columns):
        if not costs[name]:
            raise InputError(
                f"{path}: no column {name} among {len(columns)}: is this SRTR's "
                f"{path.stem.upper()}, separated by commas if it is a CSV?"
            )
        logger.info("  no %s: %s", name, costs[name])
    pieces, rows = [], 0
    for cells in chunks(path, list(spelled), CHUNK_ROWS):
        cells = cells.rename(columns=spelled).reindex(columns=list(costs))
        decoded = {}
        for name in costs:
            decoded[name], bad = decode(cells[name])
            if bad.any():  # never shows what a patient's cell holds
                where = f"{path}, column {name}, data row {rows + int(bad.argmax()) + 1}"
                if name == "CAN_REM_CD" or name.endswith(DATES):
                    problem = NO_CODE if name == "CAN_REM_CD" else NO_DATE
                    raise InputError(f"{where}: {problem}", str(cells.iloc[int(bad.argmax())]))
                logger.warning("%s: %d cells are no numbers: taken as missing", where, bad.sum())
        rows += len(cells)
        pieces.append(keep(pd.DataFrame(decoded)))
    if rows == 0:
        raise InputError(f"{path}: no rows below the header")
    return pd.concat(pieces, ignore_index=True)


def decode(cells: pd.Series) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Decode a column of any storage by way of its distinct cells, which are few.

    Returns:
        Dates in days since 1960-01-01, words in capitals, all else as numbers, Y and N as 1 and 0;
        NaN where nothing stands. And which cells hold something else.
    """
    place, distinct = pd.factorize(cells)
    known = pd.Series(distinct)
    if not pd.api.types.is_numeric_dtype(known):
        text = known.astype(str).str.strip().str.upper().str.replace(BEHIND, "", regex=True)
        known = text.mask(text.str.fullmatch(NOTHING))
    if cells.name in WORDS:
        value = known
    elif str(cells.name).endswith(DATES):
        value = _days(known, FIRST_DIALYSIS_YEAR if cells.name == "CAN_DIAL_DT" else FIRST_YEAR)
    else:
        number = pd.to_numeric(known.replace({"Y": "1", "N": "0"}), errors="coerce")
        value = pd.Series(number, dtype=float)
    unread = known.notna() & value.isna()
    return value.reindex(place).to_numpy(), unread.reindex(place, fill_value=False).to_numpy()


def _days(cells: pd.Series, first: int) -> pd.Series:
    """Read dates of any form as days since 1960-01-01, NaN for none or outside ``first`` to now.

    SAS days and Unix days overlap, so size cannot tell the epoch: the years are checked instead.
    """
    now = pd.Timestamp.now()
    days = pd.Series(pd.to_numeric(cells, errors="coerce"), dtype=float) // 1
    text = cells[days.isna()].astype(str)
    for form in DATE_FORMS:
        parsed = pd.to_datetime(text, format=form, errors="coerce")
        if form.endswith("%y"):  # two digits: the latest such year that is not in the future
            parsed = parsed.where(~(parsed > now), parsed - pd.DateOffset(years=100))
        days = days.fillna((parsed - EPOCH).dt.days)
    return days.where(days.between((pd.Timestamp(first, 1, 1) - EPOCH).days, (now - EPOCH).days))


# --------------------------------------------------------------------------- cohort and labels


NO_ROW = "no history row by the landmark"


def read_candidates(file: SafFile) -> pd.DataFrame:
    """Read CAND, one row a registration, by ascending PX_ID; adds the age at listing in years.

    Raises:
        InputError: as ``read_saf``, or a PX_ID with two different rows.
    """
    cand = read_saf(file, CAND_COLUMNS)
    keyed = cand[["PX_ID", "PERS_ID"]].abs().lt(np.inf).all(axis=1)
    if not keyed.all():
        logger.warning("%s: %d rows without PX_ID or PERS_ID: left out", file.path, (~keyed).sum())
    if not keyed.any():
        raise InputError(f"{file.path}, columns PX_ID and PERS_ID: no row has both as numbers")
    cand = cand[keyed].drop_duplicates().astype({"PX_ID": np.int64, "PERS_ID": np.int64})
    if twice := int(cand["PX_ID"].duplicated().sum()):
        raise InputError(
            f"{file.path}, column PX_ID: {twice} registrations stand there again with different "
            "content: leave one row each"
        )
    if unknown := int((~cand["CAN_REM_CD"].dropna().isin(KNOWN)).sum()):
        message = "%s: %d unknown removal codes: counted as removal for another reason"
        logger.warning(message, file.path, unknown)
    age = cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12
    return cand.assign(age=age.where(age.between(0, 120))).set_index("PX_ID").sort_index()


def outcomes(
    cand: pd.DataFrame,
    organ: Organ,
    landmark: int,
    horizon: int,
    transplant: str,
    *,
    require_labels: bool = True,
) -> pd.DataFrame:
    """Decide for each registration why it is left out, or its label.

    Args:
        cand: from ``read_candidates``.
        organ: gives the code of WL_ORG.
        landmark: days after listing at which the question is asked.
        horizon: days that it looks ahead.
        transplant: ``negative`` (a transplant within the horizon is label 0) or ``exclude``.
        require_labels: leave out who has no label because of what comes after the landmark; False
            keeps him with an unknown one.

    Returns:
        For each row ``reason`` ("" where kept) and ``label``, which counts where it is kept, NaN
        where it is unknown.

    Source: SRTR SAF data dictionary; landmarking, van Houwelingen 2007.
    """
    code, followed = cand["CAN_REM_CD"], cand["CAN_ENDWLFU"]
    last_day = cand[["CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU"]].max(axis=None)
    followed = followed.where(followed.notna() | code.notna(), last_day)
    death = cand[DEATHS].min(axis=1)
    left = cand["CAN_REM_DT"].fillna(death.where(code == DIED))
    left = left.fillna(followed.where(cand["REC_TX_DT"].isna()))
    # The earliest of removal (else last day of follow-up), transplant and death decides.
    grafts = [cand["REC_TX_DT"], left.where(code.isin(TRANSPLANT))]
    grafted = pd.concat(grafts, axis=1).min(axis=1)
    end = pd.concat([left, grafted], axis=1).min(axis=1)
    death = death.where(death <= end)
    end = death.fillna(end)
    competing = grafted == end  # who dies on the day of a transplant dies of it, as codes 21, 23
    adverse = ~competing & ((code.isin(ADVERSE) & (left == end)) | (death == end))
    days = end - cand["CAN_LISTING_DT"]
    within = days <= landmark + horizon
    excluded = within & competing & (transplant == "exclude")
    censored = within & ~adverse & ~competing
    rules = {
        "other organ": cand["WL_ORG"] != organ.code,
        "living donor recipient, never listed": cand["CAN_SOURCE"] == "L",
        "under 18": cand["age"] < ADULT_YEARS,
        "removed: listed or removed in error": code.isin(ERROR),
        "no day of listing or removal": days.isna(),
        "ended by the landmark": days <= landmark,
        "transplanted within the horizon": excluded & require_labels,
        "censored within the horizon": censored & require_labels,
        NO_ROW: days.isna(),  # known when the history is read
    }
    reason = np.select([mask.to_numpy() for mask in rules.values()], list(rules), default="")
    reasons = pd.Categorical(reason, categories=["", *rules])
    label = (within & adverse).astype(float).mask(excluded | censored)
    return pd.DataFrame({"reason": reasons, "label": label}, index=cand.index)


# --------------------------------------------------------------------------- inputs


def _read_history(file: SafFile, organ: Organ, listed: pd.Series, landmark: int) -> pd.DataFrame:
    """Read the history rows that began by the landmark, of the registrations in ``listed``.

    All of them began before the end: who ended by the landmark is not in the cohort. The last row
    before listing stands at day 0 where no row begins on that day.
    """

    def keep(chunk: pd.DataFrame) -> pd.DataFrame:
        day = chunk["CANHX_BEGIN_DT"] - chunk["PX_ID"].map(listed)  # NaN outside the cohort
        return chunk.assign(day=day)[day <= landmark]

    costs = {f.column: f"the history holds no {f.name}" for f in organ.features}
    keys = {"PX_ID": "", "CANHX_BEGIN_DT": "", "CANHX_BEGIN_TM": "the file orders rows of a day"}
    rows = read_saf(file, {**keys, **costs}, keep).sort_values("CANHX_BEGIN_TM", kind="stable")
    start = rows["day"].where(rows["day"] <= 0).groupby(rows["PX_ID"]).transform("max")
    rows = rows[~(rows["day"] < start)]
    features = {f.name: f.decode(rows[f.column]) for f in organ.features}
    for feature in organ.features:
        unread = int((rows[feature.column].notna() & features[feature.name].isna()).sum())
        if unread:
            message = "%s, column %s: %d cells hold no known code or value: not measured"
            logger.warning(message, file.path, feature.column, unread)
    return pd.DataFrame({"PX_ID": rows["PX_ID"], "day": rows["day"].clip(lower=0), **features})


def _one_row_a_day(
    rows: pd.DataFrame, cohort: pd.DataFrame, landmark: int, *, dialysis: bool
) -> pd.DataFrame:
    """Join the rows of a day, the later value winning, with what CAND dates itself.

    A date behind the landmark reads exactly as a missing one: both mean "not by then".
    ``dialysis`` where the history has no column for it.
    """
    cohort = cohort[cohort.index.isin(rows["PX_ID"])]  # a registration needs a history row
    features = list(rows.columns[2:])
    dated = {"GFR": ("CAN_GFR_DT", cohort["CAN_GFR"].where(cohort["CAN_GFR"].abs() <= LARGEST))}
    if dialysis:
        dated["dialysis"] = ("CAN_DIAL_DT", pd.Series(1.0, index=cohort.index))
    for name, (date, value) in dated.items():
        day = (cohort[date] - cohort["CAN_LISTING_DT"]).clip(lower=0)
        new = pd.DataFrame({"day": day, name: value})[day <= landmark].dropna()
        rows = pd.concat([new.reset_index(), rows])  # the history's own value comes later
    rows = rows.groupby(["PX_ID", "day"], as_index=False)[features].last()
    if dialysis:
        rows["dialysis"] = rows.groupby("PX_ID")["dialysis"].ffill().fillna(0.0)
    return rows.dropna(subset=features, how="all")


def describe(cohort: pd.DataFrame, organ_name: str, landmark: int) -> NDArray[np.object_]:
    """Write what was known at listing, and the days since: (N,) sentences without full stop."""
    text = cohort["age"].map(lambda a: "" if np.isnan(a) else f"{int(a)}-year-old ")
    text += cohort["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna("patient")
    text = text.str[:1].str.upper() + text.str[1:]
    blood, bmi = cohort["CAN_ABO"], cohort["CAN_BMI"]
    parts = [
        "blood group " + blood.where(blood.isin(["A", "A1", "A2", "B", "O", "AB"])).astype(object),
        bmi.where(bmi.between(10, 80)).map(lambda b: f"BMI {plain(b)} kg/m2", na_action="ignore"),
        cohort["CAN_DIAB"].map(DIABETES),
        cohort["CAN_PREV_TX"].map({0: "no earlier transplant", 1: "earlier transplant"}),
    ]
    for part in parts:
        text += (", " + part.astype(object)).fillna("")
    return (text + f", on the {organ_name} waiting list for {landmark} days").to_numpy(object)


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
        require_labels: leave out registrations whose label is unknown, and refuse folders with too
            few events; False where new patients are scored.

    Attributes:
        flow: how many registrations each rule removed; columns rule, removed, left.
        registrations: (all in the organ's file) by PX_ID: ``reason`` ("" where kept), ``label``.
        ages_and_dialysis: (N, 2) years: age at listing, NaN where unknown; on dialysis by the
            landmark, 0 where not begun, NaN where the table has no CAN_DIAL_DT.
        sex_words: (N,) ``woman``, ``man`` or ``not known``.

    Raises:
        InputError: files that cannot be read, nobody left, or fewer than ten events.
    """

    row_columns = (*TrajectoryDataset.row_columns, "ages_and_dialysis", "sex_words")
    ages_and_dialysis: NDArray[np.float64]
    sex_words: NDArray[np.str_]
    flow: pd.DataFrame
    outcome = "Death or too sick for transplant"
    fixed_features = True  # SRTR's own kidney history holds no laboratory value
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
        require_labels: bool = True,
    ) -> None:
        """Read, decide and place everything at once."""
        if organ not in ORGANS or transplant not in ("negative", "exclude"):
            raise InputError(f"no organ {organ!r} or no way {transplant!r} to count transplants")
        self.organ, self.source = organ, str(data_dir)
        self.transplant = transplant
        self.landmark_days = self._kind.days if landmark_days is None else landmark_days
        self.horizon_days = self._kind.days if horizon_days is None else horizon_days
        days = (self.landmark_days, self.horizon_days - 1)
        if not all(0 <= d < MOST_DAYS for d in days) or max_len < 1:
            raise InputError(
                f"landmark_days, horizon_days, max_len must be at least 0, 1 and 1; days at most "
                f"{MOST_DAYS}"
            )
        self.features = tuple(f.name for f in self._kind.features)
        self.units = tuple(f.unit for f in self._kind.features)
        self.main = self.features.index(self._kind.main)
        coded = {word for f in self._kind.features for word in (f.words or {}).values()}
        self.words = (*DIRECTIONS, *sorted(coded))
        self.time_scale = self._kind.days * HOURS
        self.question = (
            f"Will this patient die or become too sick for a {organ} transplant within "
            f"{self.horizon_days} days of day {self.landmark_days}?"
        )
        self.reading = {
            "dataset": "srtr",
            "organ": organ,
            "landmark_days": self.landmark_days,
            "horizon_days": self.horizon_days,
            "transplant": transplant,
            "max_len": max_len,
        }
        self._read(Path(data_dir), max_len, transplant, require_labels=require_labels)

    @property
    def _kind(self) -> Organ:
        return ORGANS[self.organ]

    def _read(self, folder: Path, max_len: int, transplant: str, *, require_labels: bool) -> None:
        kind, landmark = self._kind, self.landmark_days
        cand_file, history_file = (find_table(folder, f"{t}_{kind.suffix}") for t in TABLES)
        cand = read_candidates(cand_file)
        result = outcomes(
            cand, kind, landmark, self.horizon_days, transplant, require_labels=require_labels
        )
        cohort = cand[result["reason"] == ""]
        rows = _read_history(history_file, kind, cohort["CAN_LISTING_DT"], landmark)
        dated = "CAN_DIAL_DT" in cand_file.columns
        dialysis = dated and bool(rows["dialysis"].isna().all())
        rows = _one_row_a_day(rows, cohort, landmark, dialysis=dialysis)
        cohort = cohort[cohort.index.isin(rows["PX_ID"])]
        result.loc[~result.index.isin(cohort.index) & (result["reason"] == ""), "reason"] = NO_ROW
        result["label"] = result["label"].where(result["reason"] == "")
        removed = result["reason"].value_counts(sort=False).drop("")
        flow = removed.rename_axis("rule").reset_index(name="removed")
        self.flow = flow.assign(left=len(result) - flow["removed"].cumsum())
        kept = result["reason"] == ""
        self.registrations = result
        self.labels = result.loc[kept, "label"].to_numpy(np.float64)
        events, fewest = int(np.nansum(self.labels)), FEWEST_EVENTS if require_labels else 0
        if events < fewest or not kept.any():
            taken = "; ".join(f"{rule} {count}" for rule, count in removed.items() if count)
            raise InputError(
                f"{self.source}: {len(self) or 'no'} registrations left with {events} events, "
                f"{fewest} are needed; of {len(result)} the rules took: {taken}"
            )
        self._place(cohort, rows.groupby("PX_ID").tail(max_len), dated=dated)
        self._say(history_file.path)

    def _place(self, cohort: pd.DataFrame, rows: pd.DataFrame, *, dated: bool) -> None:
        """Set the arrays of the contract; both tables go by ascending PX_ID."""
        self.times = rows["day"].to_numpy(np.float64) * HOURS
        self.values = rows[list(self.features)].to_numpy(np.float64)
        self.offsets = np.concatenate([[0], rows.groupby("PX_ID").size().cumsum()])
        self.ids = cohort.index.to_numpy().astype(np.str_)
        self.groups = cohort["PERS_ID"].to_numpy().astype(np.str_)
        self.contexts = describe(cohort, self.organ, self.landmark_days)
        dialysed = cohort["CAN_LISTING_DT"] + self.landmark_days - cohort["CAN_DIAL_DT"]
        # No date means not on dialysis where the table dates it at all.
        years = dialysed.clip(lower=0).fillna(0 if dated else np.nan) / DAYS_A_YEAR
        self.ages_and_dialysis = np.column_stack([cohort["age"], years])
        words = cohort["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna(UNKNOWN)
        self.sex_words = words.to_numpy().astype(np.str_)

    def _say(self, history: Path) -> None:
        """Tell what the user should know of the cohort, once."""
        logger.info("%s: %d registrations", self.source, len(self.registrations))
        for rule in self.flow.itertuples():
            logger.info("  %6d out, %7d left: %s", rule.removed, rule.left, rule.rule)
        never = np.array(self.features)[np.isnan(self.values).all(axis=0)]
        if len(never):
            kidney = "; SRTR's own kidney history holds no laboratory value"
            note = kidney if self.organ == "kidney" else ""
            logger.info("%s: never measured: %s%s", history, ", ".join(never), note)

    def plausible(self, feature: int) -> tuple[float, float]:
        """Give the limits of a living adult."""
        return self._kind.features[feature].low, self._kind.features[feature].high

    def _tell(self, i: int, most: int | None) -> str:
        """Give the latest values of each series with their days."""
        most = 1 if self.series_text == "last" else min(most or TEXT_VALUES, TEXT_VALUES)
        computed = self.text_computed and self.series_text != "last"
        lines = []
        for f, times, values in self.measured(i):
            feature, days = self._kind.features[f], times / HOURS
            if self.series_text == "main" and f != self.main:
                continue
            if feature.words:  # of a state only its changes
                new = np.diff(values, prepend=np.nan) != 0
                days, values = days[new], values[new]
            unit = f" in {feature.unit}" if "/" in feature.unit else ""  # scores stand alone
            shown = zip(days[-most:], values[-most:], strict=True)
            text = " -> ".join(f"{feature.say(v)} (day {plain(d)})" for d, v in shown)
            if computed and len(values) > most and not feature.words:
                text = f"first {feature.say(values[0])} (day {plain(days[0])}), latest {text}"
            lines.append(f"{feature.name}{unit}: {text}")
        if computed:
            lines.append(f"{self.lengths[i]} observations")
        return f"History: {'; '.join(lines)}. " if lines else ""

    def _clauses(self, i: int) -> list[list[str]]:
        """Give first and last value of each series that was measured."""
        clauses = []
        for f, times, values in self.measured(i):
            feature, days = self._kind.features[f], times / HOURS
            name = feature.name
            first, last = ([feature.say(values[k]), " at day ", plain(days[k])] for k in (0, -1))
            if feature.words:
                clauses.append([f"last {name} {last[0]} at day ", last[2]])
            elif len(values) == 1:
                clauses.append([f"only {name} ", *last])
            else:
                change = DIRECTIONS[int(np.sign(values[-1] - values[0]))]
                clauses.append(
                    [f"first {name} ", *first, f" and last {name} ", *last, f" {change}"]
                )
        clauses.append(["after ", str(self.lengths[i]), " observations"])
        for k, clause in enumerate(clauses):
            clause[0] = f"{', ' if k else 'History: '}{clause[0]}"
        return clauses

    def ages(self) -> NDArray[np.float64]:
        """Give the age at listing in years, (N,), NaN where unknown."""
        ages: NDArray[np.float64] = self.ages_and_dialysis[:, 0]
        return ages

    def sexes(self) -> NDArray[np.str_]:
        """Give ``woman``, ``man`` or ``not known`` for each registration, (N,)."""
        return self.sex_words

    def people(self) -> pd.DataFrame:
        """Add the organ to what rows are told apart by."""
        return super().people().assign(organ=pd.Categorical([self.organ] * len(self)))

    def asked(self) -> dict[str, str]:
        """Say in words what is predicted, and that landmark and horizon are the user's choice."""
        return {
            **super().asked(),
            "Prediction time": (
                f"day {self.landmark_days} after listing for a {self.organ}, of each registration "
                "that still waits then; only what was recorded by that day is read"
            ),
            "Horizon": f"{self.horizon_days} days from then on",
            "A transplant within the horizon": (
                "counts as no event (label 0), since it is a competing one"
                if self.transplant == "negative"
                else "leaves the cohort"
            ),
        }

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Give the inputs of the usual baselines, and of those of this waiting list, N rows each.

        Source: MELD, Kamath 2001; age and years of dialysis, as in Hart 2016.
        """
        inputs = super().baseline_inputs()
        person = pd.DataFrame(self.ages_and_dialysis, columns=["age", "years of dialysis"])
        if self.organ == "kidney":
            return {**inputs, "age and years of dialysis": person}
        meld = inputs["logistic regression"][["MELD last"]]
        return {**inputs, "last MELD": meld, "last MELD and age": meld.join(person["age"])}


# --------------------------------------------------------------------------- check


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the folder can be trained on, 2 when not."""
    parser = Parser(
        prog="srtr_dataset.py", description="Check a folder of SRTR files.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="read a folder and print its summary").add_argument
    add("--data_dir", type=Path, required=True, help="folder with the SRTR files")
    add("--organ", choices=tuple(ORGANS), default="kidney")
    add("--landmark_days", type=int, help="days after listing; 365 kidney, 90 liver")
    add("--horizon_days", type=int, help="days looked ahead; 365 kidney, 90 liver")
    add("--transplant", choices=("negative", "exclude"), default="negative")
    add("--show_values", action="store_true", help=SHOW_VALUES)
    options = vars(parser.parse_args(argv))
    del options["command"]
    shown = options.pop("show_values")
    return run_check(lambda: SRTRTrajectoryDataset(**options), implausible, show_values=shown)


if __name__ == "__main__":
    sys.exit(main())
