"""Large clinical tables in DuckDB, and the DKA file that is made of them."""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO
from zipfile import BadZipFile, ZipFile

import duckdb
import pandas as pd
from tqdm import tqdm

from medgemma_clinical.data.findings import flow_lines
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.data.roles import MAX_ID, NO_ID
from medgemma_clinical.files import (
    InputError,
    RunFault,
    atomic,
    file_hash,
    locked,
    one_line,
    remove,
)
from medgemma_clinical.provenance import code_hash

logger = logging.getLogger(__name__)

MADE_BY = "made_by"  # key of the description that marks a file of these commands
UPDATE_SECONDS = 0.2  # between two looks at a running query: its progress, and signals


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What every command needs that makes a DKA file: its output, and DuckDB's limits."""

    out: Path
    memory_limit: str
    threads: int  # the number of usable cores in place of 0 and of any larger number


# ---------------------------------------------------------------------------- database


class Database:
    """A connection whose queries end at a signal, show their progress and raise one line."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
        """Hold the connection, the one thread that uses it, and a private folder."""
        self._connection, self.folder = connection, folder
        self._thread = ThreadPoolExecutor(1)

    def run(self, sql: str, values: Mapping[str, Any] | None = None, *, title: str = "") -> Any:
        """Run statements, or one with ``$name`` values; return DuckDB's result of the last one."""
        query = self._thread.submit(self._connection.execute, sql, values)
        silent = not title or not sys.stderr.isatty()
        with tqdm(desc=title, total=100, leave=False, disable=silent) as bar:
            while not wait([query], UPDATE_SECONDS).done:
                bar.update(max(self._connection.query_progress(), 0.0) - bar.n)
        try:
            return query.result()
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            # A full disk is either; a damaged table is an IOException as well.
            if isinstance(error, duckdb.IOException) and "Could not write" not in str(error):
                raise
            raise RunFault(
                "the tables need more memory than --memory_limit, or more room than the disk of "
                "--out has: raise the limit, or make room"
            ) from None

    def close(self) -> None:
        """End the query that a signal left running, wherever it came, and then the connection."""
        idle = self._thread.submit(lambda: None)
        while not wait([idle], UPDATE_SECONDS).done:
            self._connection.interrupt()  # again: a query that has not begun is not interrupted
        self._thread.shutdown()
        self._connection.close()

    def run_file(self, path: Path) -> None:
        """Run the statements of a file, with a progress bar named after it."""
        self.run(path.read_text(encoding="utf-8"), title=path.stem)

    def frame(self, sql: str) -> pd.DataFrame:
        """Return the rows of a query."""
        return pd.DataFrame(self.run(sql).df())

    def row(self, sql: str) -> Any:
        """Return the one row of a query, as a tuple."""
        (row,) = self.run(sql).fetchall()  # to the end: an open result blocks ``add``
        return row

    def add(self, name: str, table: pd.DataFrame) -> None:
        """Copy a DataFrame into a table."""
        self._connection.register("incoming", table)
        self.run(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM incoming")
        self._connection.unregister("incoming")

    def set(self, **variables: Any) -> None:
        """Set what SQL reads by ``getvariable``."""
        for name, value in variables.items():
            self.run(f"SET VARIABLE {name} = $value", {"value": value})


@contextlib.contextmanager
def open_database(out: Path, memory_limit: str, threads: int) -> Iterator[Database]:
    """Open a database in memory; what exceeds the limit lies in a private folder beside ``out``."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.spill-", dir=out.parent) as spill:
        config = {
            "threads": min(threads or cores, cores),
            "memory_limit": memory_limit,
            "temp_directory": spill,
            "autoinstall_known_extensions": False,  # nothing is ever loaded from the network
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
        }
        try:
            opened = duckdb.connect(config=config)
        except duckdb.ParserException:
            problem = "must be a size such as 500MB or 2GB"
            raise InputError(f"--memory_limit {memory_limit}: {problem}") from None
        with contextlib.closing(Database(opened, Path(spill))) as database:
            database.run(
                "SET enable_progress_bar = true; SET enable_progress_bar_print = false; "
                "SET TimeZone = 'UTC'; SET lock_configuration = true"
            )
            database.run_file(Path(__file__).parent / "sql" / "macros.sql")
            yield database


# ---------------------------------------------------------------------------- table files

FORMS = (".csv", ".csv.gz", ".parquet")

LARGEST_WHOLE = 10**10  # of a key, and of an offset in minutes, which a timestamp holds
MAX_WORD = 300  # characters kept of a unit, a code, a ward
EXACT = 10**15  # Excel keeps 15 digits of a number
BLOCK = 2**20  # characters of a CSV that is copied
MAX_UNPACKED = 500 * 10**6  # bytes of an Excel file, of which each takes several in memory
SEPARATORS = ",;\t|"
LOOK = 50  # lines among which the header is sought
WINDOWS = "cp1252"  # in which Excel writes a CSV that is not called UTF-8

MOMENT = r"\d{4}-\d\d-\d\d([ T]\d{1,2}:\d\d(:\d\d(\.\d+)?)?)?"
"""A time as text; DuckDB alone would drop AM, PM, a zone and any other word behind it."""

ZONED = r"\d{4}-\d\d-\d\d[ T]\d{1,2}:\d\d(:\d\d(\.\d+)?)?( ?(Z|[+-]\d\d(:?\d\d)?))"
"""A time as text with its zone, as ISO 8601 writes it."""

MICROSECONDS = {"minutes": 60_000_000, "hours": 3_600_000_000, "days": 86_400_000_000}
EXCEL_DAYS = 20_000, 80_000  # from 1954 to 2119
EXCEL_1970 = 25_569  # day 0 is 30 December 1899
"""Units of times that are numbers, counted from an arbitrary day."""

CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p")
DAY_FIRST = ("%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%d-%b-%Y", "%d/%m/%y", "%d.%m.%y")
MONTH_FIRST = ("%m/%d/%Y", "%m-%d-%Y", "%m/%d/%y")  # with points the day comes first everywhere
YEAR_FIRST = ("%Y/%m/%d", "%Y.%m.%d")
ORDERS = [
    tuple(date + clock for date in dates for clock in CLOCKS)
    for dates in (DAY_FIRST, MONTH_FIRST, YEAR_FIRST)
]
"""Formats of times that are not in ISO's form; the first of each stands for all."""
ISO_FORMATS = tuple(
    f"%Y-%m-%d{clock}" for clock in ("", " %H:%M", " %H:%M:%S", "T%H:%M:%S", "T%H:%M")
)

YES = ("yes", "y", "true", "1", "1.0", "ja", "j", "oui", "si", "sí", "sì")
NO = ("no", "n", "false", "0", "0.0", "nein", "non")
NOT_KNOWN = ("", "nan", "?", "-", "n/a", "na", "unknown", "unbekannt", "inconnu", "desconocido")
"""Words of a label, in small letters: 1, 0 and neither."""
SAMPLE_ROWS = 1000  # of a column of times that are in ISO's order: the rest is taken to be so

TEXTS = ("word", "id", "written_id")
LINE = "line of the file"  # a column that each table has: equal lines have equal numbers
UNREADABLE = {
    **dict.fromkeys(("word", "written_id"), "empty"),
    "id": f"empty, over {MAX_ID} characters, rounded (1.2E+16) or with control characters",
    "number": "not a number",
    "whole": "not a whole number",
    "label": "neither 0 nor 1, Yes nor No",
    "event": "neither 0 nor the number of an event: --event_names gives the words of 1, 2, ...",
    "excel": f"not a day of Excel between {EXCEL_DAYS[0]} and {EXCEL_DAYS[1]}",
    **dict.fromkeys(("time", "instant"), "not a time such as 2150-01-31 08:30:00, without zone"),
    "zoned": "not a time such as 2150-01-31T08:30:00+02:00",
    **dict.fromkeys(MICROSECONDS, "not a finite number"),
}


@dataclass(frozen=True)
class Column:
    """How a column is read."""

    # A key of UNREADABLE, or ``value``: a number or a text, ``text``: a whole one, ``zone``: of a
    # time, or ``line`` of LINE. A ``time`` is cut to seconds, an ``instant`` is not; the ``id``
    # 10001.0 or 010001 is 10001, and the ``written_id`` 10001 or 010001.
    form: str
    may_be_empty: bool = False  # an empty word is an empty text
    optional: bool = False  # the file may lack it; its cells are empty then
    source: str = ""  # column of the file, by default that of the same name
    formats: tuple[str, ...] = ()  # of an instant that is not in the order of ISO
    zoned: bool = False  # an instant with a zone, which becomes UTC
    positive: tuple[str, ...] = ()  # words of the label 1, all others 0; empty: Yes and No
    decimal: str = ""  # sign of decimals in a value, ``comma`` or ``point``; empty: either
    advice: str = ""  # for cells that cannot be read
    stored: str = "false"  # SQL for whether a value is stored as a number, not as a text

    def typed(self, raw: str) -> str:
        """Return SQL for the value of a raw cell, NULL (of a text: empty) where there is none."""
        if self.form == "line":
            return raw
        if self.form in TEXTS:
            word = f"coalesce(trim(left({raw}::VARCHAR, {MAX_WORD})), '')"
            zeros = "0*" if self.form == "id" else ""
            number = rf"'^{zeros}(\d+)(\.0+)?$', '\1'"
            return word if self.form == "word" else f"regexp_replace({word}, {number})"
        # As text 4.1 of 32 bits stays 4.1; without trim the reader itself would cast, and raise.
        cell = f"trim({raw}::VARCHAR)"
        if self.form == "text":
            return f"coalesce({cell}, '')"
        if self.form == "zone":
            return f"coalesce(nullif(zone_of({cell}), ''), 'Z')"
        if self.formats:
            formats = sorted(self.formats, key=lambda form: "%y" not in form)
            time = f"try_strptime({cell}, [{', '.join(map(literal, formats))}])::TIMESTAMP"
            return f"CASE WHEN year({time}) > 999 THEN {time} END"  # %Y takes 24 for the year 24
        if self.zoned:
            local = f"TRY_CAST(left({cell}, -length(zone_of({cell}))) AS TIMESTAMP)"
            time = f"{local} - to_minutes(zone_minutes(zone_of({cell})))"
            return f"CASE WHEN regexp_full_match({cell}, '{ZONED}') THEN {time} END"
        if self.form in ("time", "instant"):
            is_time = f"regexp_full_match({cell}, '{MOMENT}')"
            time = f"CASE WHEN {is_time} THEN TRY_CAST({cell} AS TIMESTAMP) END"
            return f"date_trunc('second', {time})" if self.form == "time" else time
        if self.form == "label":
            ones = ", ".join(literal(word.strip().lower()) for word in self.positive or YES)
            is_zero = f"NOT IN {NOT_KNOWN}" if self.positive else f"IN {NO}"
            word = f"lower({cell})"
            return f"CASE WHEN {word} IN ({ones}) THEN 1 WHEN {word} {is_zero} THEN 0 END"
        if self.form == "value":
            whole, cell = cell, f"without_flag({cell})"
            flagged = f"CASE WHEN {self.stored} THEN false ELSE {cell} != {whole} END"
            pointed = (
                f"CASE WHEN {self.stored} THEN {cell} ELSE with_point({cell}, '{self.decimal}') END"
            )
            number, empty = NUMBER.typed(pointed), f"lower({cell}) IN ('', 'nan')"
            text = f"left(CASE WHEN is_limit({pointed}) THEN {pointed} ELSE {cell} END, {MAX_WORD})"
            text = f"CASE WHEN {number} IS NULL AND NOT {empty} THEN {text} END"
            sign = f"CASE WHEN {self.stored} THEN '' ELSE sign_of({cell}) END"
            signs = f"'sign': {sign}, 'thousands': may_be_thousands({cell})"
            return f"{{'number': {number}, 'text': {text}, {signs}, 'flagged': {flagged}}}"
        number = f"nullif(TRY_CAST({cell} AS DOUBLE), 'nan'::DOUBLE)"  # NaN is above all numbers
        if self.form == "excel":
            seconds = f"round(({number} - {EXCEL_1970}) * 86400)"
            is_day = f"{number} BETWEEN {EXCEL_DAYS[0]} AND {EXCEL_DAYS[1]}"
            return f"CASE WHEN {is_day} THEN make_timestamp(({seconds} * 1000000)::BIGINT) END"
        if self.form in ("number", "whole"):
            return number if self.form == "number" else f"TRY_CAST({number} AS BIGINT)"
        return f"make_timestamp(TRY_CAST(round({number} * {MICROSECONDS[self.form]}) AS BIGINT))"

    def is_wrong(self, raw: str) -> str:
        """Return SQL for whether a raw cell cannot be read, or is empty and may not be."""
        if self.form in ("value", "text", "zone"):
            return "false"
        is_wrong = f"{self.typed(raw)} = ''" if self.form in TEXTS else f"{self.typed(raw)} IS NULL"
        if self.form == "id":
            cell = f"trim({raw}::VARCHAR)"
            no_id = f"length({cell}) > {MAX_ID} OR regexp_matches({cell}, '{NO_ID}')"
            is_wrong += f" OR typeof({raw}) = 'VARCHAR' AND ({no_id})"  # others need no look
        if self.form == "whole":  # BIGINT has rounded 1.5; a CASE in `typed` would be slow
            number = f"TRY_CAST(trim({raw}::VARCHAR) AS DOUBLE)"
            is_wrong = f"coalesce({number} % 1 != 0 OR abs({number}) >= {LARGEST_WHOLE}, true)"
        if not self.may_be_empty:
            return is_wrong
        words = NOT_KNOWN if self.form == "label" else NOT_KNOWN[:2]
        is_empty = f"coalesce(lower(trim({raw}::VARCHAR)), '') IN {words}"
        return "false" if self.form in TEXTS else f"NOT {is_empty} AND {is_wrong}"

    def problem(self, count: int) -> str:
        """Return what is wrong with some cells."""
        empty = "" if self.may_be_empty or self.form in TEXTS else "empty or "
        advice = f": {self.advice}" if self.advice else ""
        form = "zoned" if self.zoned and not self.formats else self.form
        return f"{cells(count)} {empty}{UNREADABLE[form]}{advice}"


KEY, NUMBER, TIME, WORD = (Column(form) for form in ("whole", "number", "time", "word"))
KEY_OR_EMPTY, NUMBER_OR_EMPTY, TIME_OR_EMPTY, WORD_OR_EMPTY = (
    Column(form, may_be_empty=True) for form in ("whole", "number", "time", "word")
)


def cells(count: int) -> str:
    """Return the subject and verb of what is wrong with some cells."""
    return "1 cell is" if count == 1 else f"{count:,} cells are"


def literal(text: str) -> str:
    """Return SQL for a text."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Return SQL for a column's name."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class TableFile:
    """A table file: its path, the names of its columns, its SHA-256, what separates its cells."""

    path: Path
    header: list[str]
    sha256: str
    separator: str = ","  # empty of an Excel file, which lies in a table of the database
    rounded: tuple[str, ...] = ()  # columns of Excel with numbers of more digits than it keeps
    sheets: tuple[str, ...] = ()  # of Excel: the one that is read, and the others
    utf8: Path | None = None  # copy of a CSV in another encoding
    encoding: str = ""  # of a CSV
    skipped: int = 0  # lines above the header

    @property
    def is_parquet(self) -> bool:
        """Whether the file is Parquet, not CSV."""
        return self.path.suffix.lower() == ".parquet"

    @property
    def sheet_table(self) -> str:
        """SQL for the table of the database that holds the cells of an Excel file."""
        return quoted(f"{self.path}: {self.sheets[0]}")

    def raw(self, name: str) -> str:
        """Return SQL for a column's raw cell, NULL where the file lacks it; of LINE for a hash."""
        if name == LINE:
            return f"hash({', '.join(map(quoted, map(str, range(len(self.header)))))})"
        return f'"{self.header.index(name)}"' if name in self.header else "NULL"

    def value(self, name: str, decimal: str) -> Column:
        """Return how a column of values is read."""
        if not self.separator:
            return Column("value", decimal=decimal, stored=f'"number {self.header.index(name)}"')
        stored = f"typeof({self.raw(name)}) != 'VARCHAR'" if self.is_parquet else "false"
        return Column("value", decimal=decimal, stored=stored)

    def rows(self) -> str:
        """Return SQL for the raw rows, their columns named by their position."""
        # Hive partitioning is off: a folder ``value=1000`` would replace the column ``value``.
        path = literal(glob.escape(str(self.utf8 or self.path)))
        if self.is_parquet or not self.separator:
            names = ", ".join(f'"{k}"' for k in range(len(self.header)))
            alias = f" AS t({names})" if names else ""
            if not self.separator:
                return f"{self.sheet_table}{alias}"
            return f"read_parquet({path}, hive_partitioning = false){alias}"
        columns = ", ".join(f"'{k}': 'VARCHAR'" for k in range(len(self.header)))
        return (
            f"read_csv({path}, columns = {{{columns}}}, auto_detect = false, header = true, "
            f"skip = {self.skipped}, delim = '{self.separator}', quote = '\"', escape = '\"', "
            "strict_mode = true, hive_partitioning = false)"
        )

    def check_columns(self, columns: Mapping[str, Column]) -> None:
        """Refuse a file that lacks a column."""
        for key, column in columns.items():
            name = column.source or key
            if name not in self.header and not column.optional:
                problem = "is it a table of another name or version?"
                raise InputError(
                    f"{self.path}: no column {name} among {len(self.header)}: {problem}"
                )


def find_file(folder: Path, name: str, flag: str) -> Path:
    """Find the file of a table, such as ``hosp/patients``, in one of its forms."""
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: no such folder")
    paths = [path for form in FORMS if (path := folder / f"{name}{form}").is_file()]
    if len(paths) != 1:
        problem = f"is there {len(paths)} times: leave one" if paths else "is missing"
        raise InputError(f"{flag} {folder}: the table {name} ({', '.join(FORMS)}) {problem}")
    return paths[0]


def open_table(
    database: Database,
    path: Path,
    columns: Mapping[str, Column],
    encoding: str = "",  # of a CSV that is not UTF-8; empty: such a CSV is refused
    sheet: str = "",  # of an Excel file; empty: the first
) -> TableFile:
    """Hash a file, read its header and check its columns."""
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path}: no such file")
    file = TableFile(path, [], "")
    with readable(path):
        sha256 = file_hash(path) or ""
        if file.is_parquet:
            header = database.frame(f"DESCRIBE FROM {file.rows()}")["column_name"].tolist()
            file = TableFile(path, header, sha256)
        elif path.suffix.lower() == ".xlsx":
            header, cells, rounded, sheets = read_sheet(path, sheet)
            file = TableFile(path, header, sha256, "", rounded, sheets)
            database.add(file.sheet_table, cells)
        else:
            utf8, found = None, find_encoding(path, encoding) if encoding else "utf-8"
            if found != "utf-8":
                utf8 = database.folder / f"{sha256}.csv"
                copy_as_utf8(path, found, utf8)
            with open_text(utf8 or path, "utf-8-sig") as text:
                skipped = lines_above(text)
                separator, header = read_header(text, skipped)
            if skipped:
                logger.info("%s: %d lines above the header are left out", path, skipped)
            file = TableFile(
                path, header, sha256, separator, utf8=utf8, encoding=found, skipped=skipped
            )
    file.check_columns(columns)
    return file


def lines_above(text: TextIO) -> int:
    """Return how many lines of a CSV stand above its header, the first mostly filled row."""
    text.seek(0)
    lines, most, skipped = [*itertools.islice(text, LOOK)], 0, 0
    widths = {mark: len(next(csv.reader(lines, delimiter=mark), [])) for mark in SEPARATORS}
    widest = max(widths.values())
    # A title may have no separator; a cell of data may hold another one.
    for mark in [mark for mark, width in widths.items() if width == widest]:
        reader, begin = csv.reader(lines, delimiter=mark), 0
        rows = list[tuple[int, int]]()  # filled cells, and where the row begins
        for row in reader:
            rows.append((sum(map(bool, map(str.strip, row))), begin))
            begin = reader.line_num
        fullest = max((filled for filled, _ in rows), default=0)
        if fullest > most:
            most = fullest
            skipped = next(begin for filled, begin in rows if filled > fullest / 2)
    return skipped


def read_header(text: TextIO, skipped: int = 0) -> tuple[str, list[str]]:
    """Return the separator of a CSV, that of most columns, and their names."""
    headers = {}
    for mark in SEPARATORS:
        text.seek(0)
        rows = csv.reader(itertools.islice(text, skipped, None), delimiter=mark)
        headers[mark] = [name.strip() for name in next(rows, [])]
    return max(headers.items(), key=lambda pair: len(pair[1]))


def open_text(path: Path, encoding: str, errors: str = "strict") -> Any:
    """Open a text file, packed or not, with its line ends as they are."""
    unpack: Any = gzip.open if path.suffix.lower() == ".gz" else open
    return unpack(path, "rt", encoding=encoding, errors=errors, newline="")


def find_encoding(path: Path, other: str) -> str:
    """Return the encoding of a text file: UTF-16 by its mark, UTF-8, or else the other one."""
    with open_text(path, "latin-1") as text:
        if text.read(2).encode("latin-1") in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for encoding in ("utf-8", other):
        try:
            with open_text(path, encoding) as text:
                while text.read(BLOCK):
                    pass
        except LookupError:
            raise InputError(f"--encoding {encoding}: no such encoding") from None
        except UnicodeError:
            continue
        return encoding
    problem = f"neither UTF-8 nor {other}: name its encoding by --encoding"
    raise OpenQuestions(f"{path}: {problem}", [Question(f"{path}: {problem}", "encoding")])


def check_damage(path: Path) -> None:
    """Refuse UTF-8 with damaged characters: another encoding would alter all the whole ones."""
    whole, damaged, line, first = 0, 0, 1, 0
    with open_text(path, "utf-8", "surrogateescape") as text:
        while block := text.read(BLOCK):
            whole += len(re.findall(r"[^\x00-\x7f\udc80-\udcff]", block))
            found = [match.start() for match in re.finditer(r"[\udc80-\udcff]", block)]
            if found and not damaged:
                first = line + block.count("\n", 0, found[0])
            damaged += len(found)
            line += block.count("\n")
    if damaged and whole > damaged:  # cp1252 is hardly ever UTF-8 as well
        problem = f"damaged characters in a file in UTF-8 ({damaged:,}, {whole:,} are whole)"
        advice = f"correct it, or name its encoding, as --encoding {WINDOWS}"
        where = f"{path}, line {first}"
        asked = Question(f"{where}: {problem}", "encoding", (WINDOWS,))
        raise OpenQuestions(f"{where}: {problem}: {advice}", [asked])


def copy_as_utf8(path: Path, encoding: str, copy: Path) -> None:
    """Copy a text file that is in another encoding, for DuckDB reads few of them."""
    logger.info("%s: not UTF-8: read as %s", path, encoding)
    with open_text(path, encoding) as text, copy.open("w", encoding="utf-8", newline="") as out:
        shutil.copyfileobj(text, out, BLOCK)


def read_sheet(
    path: Path, name: str
) -> tuple[list[str], pd.DataFrame, tuple[str, ...], tuple[str, ...]]:
    """Return header, cells, rounded columns and name of a sheet of an Excel file, and the others.

    The cells are texts; of each column K a column ``number K`` says which are stored as numbers.
    """
    try:
        with ZipFile(path) as packed:
            if sum(part.file_size for part in packed.infolist()) > MAX_UNPACKED:
                problem = f"over {MAX_UNPACKED // 10**6} MB when unpacked: save the sheet as CSV"
                raise InputError(f"{path}: {problem}")
        with pd.ExcelFile(path, engine="openpyxl") as book:
            names = [str(sheet) for sheet in book.sheet_names]
            chosen = name or names[0]
            if chosen not in names:
                listed = ", ".join(map(one_line, names))
                raise InputError(f"--sheet {name}: {path}: no such sheet among {listed}")
            # None and NA are words; pandas would rename a column that appears twice.
            cells = pd.read_excel(book, chosen, header=None, dtype=object, keep_default_na=False)
    except InputError:
        raise
    except ImportError:  # no requirement: needed for Excel alone
        raise InputError(f"{path}: reading Excel needs openpyxl: pip install openpyxl") from None
    except (BadZipFile, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole Excel file") from error
    if len(names) > 1:
        logger.info("%s: sheet %r of %d is read", path, chosen, len(names))
    filled = cells.head(LOOK).notna() & (cells.head(LOOK) != "")
    counts = filled.sum(axis=1)
    first = int((counts > counts.max() / 2).argmax()) if len(cells) else 0
    if first:
        logger.info("%s: %d lines above the header are left out", path, first)
    header = [str(name).strip() for name in cells.iloc[first : first + 1].to_numpy().ravel()]
    sheet = cells[first + 1 :]
    is_number = sheet.map(lambda cell: isinstance(cell, int | float)).astype(bool)
    is_rounded = (sheet.where(is_number, 0).astype(float).abs() >= EXACT).any()
    texts = sheet.rename(columns=str).astype("string").join(is_number.add_prefix("number "))
    rounded = tuple(name for name, bad in zip(header, is_rounded, strict=True) if bad)
    names.remove(chosen)
    return header, texts, rounded, (chosen, *names)


def largest_sheet(path: Path, names: Sequence[str]) -> str:
    """Return the sheet with the most cells of some of an Excel file."""
    with pd.ExcelFile(path, engine="openpyxl") as book:
        sizes = {name: pd.read_excel(book, name, header=None).size for name in names}
    return max(sizes, key=lambda name: sizes[name])


def find_time(
    database: Database, file: TableFile, name: str, formats: Sequence[str], earlier: Sequence[str]
) -> Column:
    """Return how all times of a column are written: in ISO's order, as given, or in another one."""
    orders = [tuple(formats)] if formats else ORDERS
    iso = [Column("instant"), Column("instant", zoned=True)]
    iso += [Column("excel")] if not file.separator else []
    zoned = [any("%z" in form for form in order) for order in orders]
    pairs = zip(orders, zoned, strict=True)
    ways = [*iso, *(Column("instant", formats=order, zoned=zone) for order, zone in pairs)]
    counts = ", ".join(f"count({way.typed('cell')})" for way in ways)
    cell, where = f"trim({file.raw(name)}::VARCHAR)", f"{file.path}, column {name}"
    for limit in (f"LIMIT {SAMPLE_ROWS}", ""):
        select = f"SELECT {cell} AS cell FROM {file.rows()} WHERE lower(cell) NOT IN ('', 'nan')"
        with readable(file.path):
            total, *fits = database.row(f"SELECT count(*), {counts} FROM ({select} {limit})")
        fit = [way for way, count in zip(ways, fits, strict=True) if count == total]
        if fit and fit[0] in iso:
            return fit[0]
    is_mixed = not fit
    if is_mixed:
        fit = [Column("instant", formats=(*ISO_FORMATS, *order)) for order in ORDERS]
        counts = ", ".join(f"count({way.typed('cell')})" for way in fit)
        fit = [
            way
            for way, count in zip(
                fit, database.row(f"SELECT {counts} FROM ({select})"), strict=True
            )
            if count == total
        ]
    if not fit:
        problem = (
            f"{cells(total - max(fits))} not a time such as 2150-01-31 08:30:00, as the others"
        )
        form = "--time_format '%d.%m.%Y %H:%M', or --time_unit of numbers"
        asked = [Question(f"{where}: {problem}", "time_format")]
        raise OpenQuestions(f"{where}: {problem}: name the form, as {form}", asked)
    # Where each day may be a month, the first format of an earlier file decides.
    fit = [way for way in fit if [*way.formats[:1]] == [*earlier]] or fit
    if is_mixed or len(fit) > 1:
        used_by = [formats_used(database, file, name, way) for way in fit]
        form = "--time_format '%d/%m/%Y' or '%m/%d/%Y', with %H:%M or %I:%M %p if they have a time"
        problem = f"{where}: the day or the month may come first"
        if is_mixed:
            form = " ".join(f"--time_format '{x}'" for x in used_by[0])
            problem = f"{where}: times have several forms, {' and '.join(used_by[0])}"
        count = min(map(len, used_by))
        answers = [tuple(forms[k] for forms in used_by) for k in range(count)]
        asked = [Question(problem, "time_format", of_one) for of_one in answers]
        raise OpenQuestions(f"{problem}: say {form}", asked)
    if fit[0].formats in ORDERS:
        logger.info("%s: times as %s", where, fit[0].formats[0])
    return fit[0]


def formats_used(database: Database, file: TableFile, name: str, column: Column) -> list[str]:
    """Return the formats that times have: one if it reads them all."""
    cell = f"trim({file.raw(name)}::VARCHAR)"
    select = f"SELECT {cell} AS cell FROM {file.rows()} WHERE lower(cell) NOT IN ('', 'nan')"

    def match(forms: Sequence[str], limit: str) -> tuple[list[str], bool]:
        """Return those of some formats that times have, and whether they read all."""
        counts = [f"count({replace(column, formats=(form,)).typed('cell')})" for form in forms]
        counts.append(f"count({replace(column, formats=tuple(forms)).typed('cell')})")
        select_counts = f"SELECT count(*), {', '.join(counts)} FROM ({select} {limit})"
        total, *fits, read = database.row(select_counts)
        pairs = [*zip(forms, fits, strict=True)]
        whole = [form for form, count in pairs if count == total]
        return whole[:1] or [form for form, count in pairs if count], read == total

    if not column.formats:
        return []
    sampled, _ = match(column.formats, f"LIMIT {SAMPLE_ROWS}")
    used, is_whole = match(sampled, "")
    return used if is_whole else match(column.formats, "")[0]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line: file and, of a CSV, line, no content."""
    try:
        yield
    except (EOFError, UnicodeError, csv.Error, OSError, zlib.error, duckdb.Error) as error:
        problem = getattr(error, "strerror", None) or "damaged, or not of the form of its ending"
        if isinstance(error, UnicodeError):
            problem = "not a text file in UTF-8: save it as CSV UTF-8"
        if line := re.search(r"CSV Error on Line: (\d+)", str(error)):
            path = Path(f"{path}, line {line[1]}")
            problem = "not as long as the header, a quote is not closed, or no UTF-8"
        elif "format specifier" in str(error):
            path, problem = Path("--time_format"), "write a format such as '%d.%m.%Y %H:%M'"
        raise InputError(f"{path}: {problem}") from None


def load_table(
    database: Database,
    name: str,
    file: TableFile,
    columns: Mapping[str, Column],
    keep: Sequence[str] = (),  # SQL conditions on raw cells and on columns of ``join``
    join: str = "",
    keys: Sequence[str] = (),  # columns that are checked in rows that are not kept, too
) -> None:
    """Make a table of some columns of a file; refuse wrong cells, counted by column."""
    source = {column: form.source or column for column, form in columns.items()}
    raw = {column: file.raw(name) for column, name in source.items()}
    is_wrong = {c: form.is_wrong(raw[c]) for c, form in columns.items() if source[c] in file.header}
    # An OR a condition, not one around all: DuckDB then applies the cheap ones first.
    wrong_keys = [is_wrong[key] for key in keys]
    conditions = " AND ".join(f"({' OR '.join([condition, *wrong_keys])})" for condition in keep)
    typed = ", ".join(f"{form.typed(raw[c])} AS {quoted(c)}" for c, form in columns.items())
    flags = ", ".join(f"'{k}': {sql}" for k, sql in enumerate(is_wrong.values()))
    with readable(file.path):
        database.run(
            f'CREATE TABLE {name} AS SELECT {typed}, {{{flags}}} AS "is wrong" '
            f"FROM {file.rows()} {join} WHERE {conditions or 'true'}",
            title=f"reading {file.path.name}",
        )
    counts = ", ".join(f"""count(*) FILTER ("is wrong"['{k}'])""" for k in range(len(is_wrong)))
    for column, count in zip(is_wrong, database.row(f"SELECT {counts} FROM {name}"), strict=True):
        if count:
            problem = columns[column].problem(count)
            raise InputError(f"{file.path}, column {source[column]}: {problem}")
    database.run(f'ALTER TABLE {name} DROP COLUMN "is wrong"')


# ---------------------------------------------------------------------------- rows


def make_file(
    request: TableRequest, make: Callable[[Any], tuple[pd.DataFrame, dict[str, Any]]]
) -> int:
    """Write the rows and the description that ``make`` returns, log their counts, and return 0."""
    check_target(request.out)
    with locked(request.out):
        for left_over in request.out.parent.glob(f".{glob.escape(request.out.name)}.spill-*"):
            remove(left_over)  # of a run that was killed: another would hold the lock
        rows, description = make(request)
        write_rows(rows, description, request.out)
    counts = (f"{description['rows'][name]:,}" for name in ("rows", "patients", "events"))
    logger.info("%s: %s rows of %s patients, %s events", request.out, *counts)
    return 0


def check_target(out: Path) -> None:
    """Refuse an output that cannot be written before the tables are read, which takes minutes."""
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: must end in .csv")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: the folder is missing, or cannot be written to")
    beside = out.with_suffix(".json")
    is_own = beside.is_file() and MADE_BY in beside.read_text("utf-8", "replace")
    if (out.exists() or beside.exists()) and not is_own:
        problem = f"this file, or {beside.name}, is not an earlier output: choose another name"
        raise InputError(f"--out {out}: {problem}")


def write_rows(rows: pd.DataFrame, description: dict[str, Any], out: Path) -> None:
    """Write the CSV and the description beside it: both or none."""
    # The description is renamed first: a table without it would be read as another series.
    with atomic(out) as csv_file, atomic(out.with_suffix(".json")) as json_file:
        rows.to_csv(csv_file, index=False, lineterminator="\n")
        content = {**description, "csv_sha256": file_hash(csv_file)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        json_file.write_text(f"{text}\n", encoding="utf-8")


def apply_rules(
    candidates: pd.DataFrame,
    source: str,
    patients: pd.Series,  # (N,)
) -> tuple[pd.Series, list[dict[str, Any]]]:
    """Remove rows by the first rule (column) that applies; return (N,) which are left, and flow."""
    left = pd.Series(True, index=candidates.index)
    flow = []
    for rule, matches in candidates.items():
        removed = int((left & matches).sum())
        left &= ~matches
        counts = {"removed": removed, "left": int(left.sum())}
        flow.append({"rule": rule, **counts, "patients": patients[left].nunique()})
    lines = flow_lines(pd.DataFrame(flow))
    if not left.any():
        removed_by = "; ".join(" ".join(line.split()) for line in lines)
        raise InputError(f"{source}: of {len(left):,} candidates none is left: {removed_by}")
    for line in lines:
        logger.info(line)
    return left, flow


def describe_origin(request: TableRequest, command: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what a description says of the command: flags, hashes of the tables, versions."""
    limits = ("memory_limit", "threads")  # of the machine: like paths they change no row
    flags = {k: v for k, v in vars(request).items() if not isinstance(v, Path | None)}
    return {
        "arguments": {k: v for k, v in flags.items() if k not in limits},
        "tables_sha256": dict(sorted(hashes.items())),
        "versions": {
            "python": sys.version.split()[0],
            "duckdb": version("duckdb"),
            "pandas": version("pandas"),
            "code_sha256": code_hash(),
        },
        MADE_BY: f"dataset_format.py {command}",
    }
