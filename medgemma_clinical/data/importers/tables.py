"""Table files of any form, read into DuckDB: columns found, times recognised, cells checked."""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import itertools
import logging
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO
from zipfile import BadZipFile, ZipFile

import duckdb
import pandas as pd

from medgemma_clinical.data.importers import cells, duck
from medgemma_clinical.data.importers.questions import OpenQuestions, Question, unclear
from medgemma_clinical.files import InputError, file_hash, one_line

logger = logging.getLogger(__name__)

FORMS = (".csv", ".csv.gz", ".parquet")
LINE = "line of the file"  # a column that each table has: equal lines have equal numbers
EXACT = 10**15  # Excel keeps 15 digits of a number
BLOCK = 2**20  # characters of a CSV that is copied
MAX_UNPACKED = 500 * 10**6  # bytes of an Excel file, of which each takes several in memory
SEPARATORS = ",;\t|"
LOOK = 50  # lines among which the header is sought
SAMPLE = "LIMIT 1000"  # of times: where these are in ISO's order the rest is taken to be so
WINDOWS = "cp1252"  # in which Excel writes a CSV that is not called UTF-8


@dataclass(frozen=True)
class TableFile:
    """A table file: its path, the names of its columns, its SHA-256, what is read of it."""

    path: Path
    header: list[str]
    sha256: str
    source: str = ""  # SQL for all its cells
    separator: str = ","  # empty of an Excel file, which lies in a table of the database
    rounded: tuple[str, ...] = ()  # columns of Excel with numbers of more digits than it keeps
    sheets: tuple[str, ...] = ()  # of Excel: the one that is read, and the others
    encoding: str = ""  # of a CSV

    @property
    def is_parquet(self) -> bool:
        """Whether the file is Parquet, not CSV."""
        return self.path.suffix.lower() == ".parquet"

    def raw(self, name: str) -> str:
        """Return SQL for a column's raw cell, NULL where the file lacks it; of LINE for a hash."""
        if name == LINE:
            return f"hash({', '.join(map(duck.quoted, map(str, range(len(self.header)))))})"
        return f'"{self.header.index(name)}"' if name in self.header else "NULL"

    def value(self, name: str, decimal: str) -> cells.Column:
        """Return how a column of values is read."""
        stored = f"typeof({self.raw(name)}) != 'VARCHAR'" if self.is_parquet else "false"
        if not self.separator:
            stored = f'"number {self.header.index(name)}"'
        return cells.Value(decimal=decimal, stored=stored)

    def rows(self) -> str:
        """Return SQL for the raw rows, their columns named by their position."""
        names = ", ".join(f'"{k}"' for k in range(len(self.header)))
        return f"{self.source} AS t({names})" if names else self.source

    def filled(self, name: str, limit: str = "") -> str:
        """Return SQL for the texts of a column, each a ``cell``, without empty ones."""
        select = f"SELECT {cells.trimmed(self.raw(name))} AS cell FROM {self.rows()}"
        return f"{select} WHERE lower(cell) NOT IN ('', 'nan') {limit}"

    def check_columns(self, columns: Mapping[str, cells.Column]) -> None:
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
    database: duck.Database,
    path: Path,
    columns: Mapping[str, cells.Column],
    encoding: str = "utf-8",  # of a CSV; empty: it is sought
    sheet: str = "",  # of an Excel file; empty: the first
) -> TableFile:
    """Hash a file, read its header and check its columns."""
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path}: no such file")
    with readable(path):
        file = TableFile(path, [], file_hash(path) or "")
        if file.is_parquet:
            # Hive partitioning is off: a folder ``value=1000`` would replace the column ``value``.
            pattern = duck.literal(glob.escape(str(path)))
            file = replace(file, source=f"read_parquet({pattern}, hive_partitioning = false)")
            header = database.frame(f"DESCRIBE FROM {file.rows()}")["column_name"].tolist()
            file = replace(file, header=header)
        elif path.suffix.lower() == ".xlsx":
            file, texts = read_sheet(file, sheet)
            database.add(file.source, texts)
        else:
            file = read_csv(file, encoding, database.folder)
    file.check_columns(columns)
    return file


def read_csv(file: TableFile, encoding: str, folder: Path) -> TableFile:
    """Return a CSV file with its header; one that is not UTF-8 is copied into the folder."""
    path, found = file.path, find_encoding(file.path, encoding)
    if found != "utf-8":
        path = folder / f"{file.sha256}.csv"
        copy_as_utf8(file.path, found, path)
    with open_text(path, "utf-8-sig") as text:
        separator, header, skipped = read_header(text)
    if skipped:
        logger.info("%s: %d lines above the header are left out", file.path, skipped)
    columns = ", ".join(f"'{k}': 'VARCHAR'" for k in range(len(header)))
    source = (
        f"read_csv({duck.literal(glob.escape(str(path)))}, columns = {{{columns}}}, "
        f"auto_detect = false, header = true, skip = {skipped}, delim = '{separator}', "
        "quote = '\"', escape = '\"', strict_mode = true, hive_partitioning = false)"
    )
    return replace(file, header=header, source=source, separator=separator, encoding=found)


def read_header(text: TextIO) -> tuple[str, list[str], int]:
    """Return separator and names of the columns of a CSV, and how many lines stand above them.

    The header is the first mostly filled row.
    """
    lines, most = [*itertools.islice(text, LOOK)], 0
    separator, header, skipped = SEPARATORS[0], list[str](), 0
    widths = {mark: len(next(csv.reader(lines, delimiter=mark), [])) for mark in SEPARATORS}
    # A title may have no separator; a cell of data may hold another one.
    for mark in [mark for mark, width in widths.items() if width == max(widths.values())]:
        reader, begin = csv.reader(lines, delimiter=mark), 0
        rows = list[tuple[int, list[str], int]]()  # filled cells, cells, where the row begins
        for row in reader:
            names = [name.strip() for name in row]
            rows.append((sum(map(bool, names)), names, begin))
            begin = reader.line_num
        total = sum(filled for filled, *_ in rows)
        if total > most:
            most, separator = total, mark
            half = max(filled for filled, *_ in rows) / 2
            _, header, skipped = next(row for row in rows if row[0] > half)
    return separator, header, skipped


def open_text(path: Path, encoding: str, errors: str = "strict") -> Any:
    """Open a text file, packed or not, with its line ends as they are."""
    unpack: Any = gzip.open if path.suffix.lower() == ".gz" else open
    return unpack(path, "rt", encoding=encoding, errors=errors, newline="")


def find_encoding(path: Path, encoding: str) -> str:
    """Return the encoding of a text file: UTF-16 by its mark, UTF-8, or else the named one."""
    if encoding == "utf-8":
        return encoding
    with open_text(path, "latin-1") as text:
        if text.read(2).encode("latin-1") in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for tried in ("utf-8", encoding or WINDOWS):
        try:
            with open_text(path, tried) as text:
                while text.read(BLOCK):
                    pass
            return tried
        except LookupError:
            raise InputError(f"--encoding {encoding}: no such encoding") from None
        except UnicodeError:
            if not encoding:
                check_damage(path)
    problem = f"{path}: neither UTF-8 nor {encoding or WINDOWS}: name its encoding by --encoding"
    raise OpenQuestions(problem, [Question(problem, "encoding")])


def check_damage(path: Path) -> None:
    """Refuse UTF-8 with damaged characters: another encoding would alter all the whole ones."""
    whole, damaged, first = 0, 0, 0
    with open_text(path, "utf-8", "surrogateescape") as text:
        for number, line in enumerate(text, 1):
            if line.isascii():
                continue
            bad = sum("\udc80" <= letter <= "\udcff" for letter in line)
            whole += sum(letter > "\x7f" for letter in line) - bad
            first = number if bad and not damaged else first
            damaged += bad
    if whole > damaged:  # cp1252 is hardly ever UTF-8 as well
        problem = f"damaged characters in a file in UTF-8 ({damaged:,}, {whole:,} are whole)"
        advice = f"correct it, or name its encoding, as --encoding {WINDOWS}"
        asked = [Question(problem, "encoding", (WINDOWS,), advice=advice)]
        raise unclear(asked, f"{path}, line {first}")


def copy_as_utf8(path: Path, encoding: str, copy: Path) -> None:
    """Copy a text file that is in another encoding, for DuckDB reads few of them."""
    logger.info("%s: not UTF-8: read as %s", path, encoding)
    with open_text(path, encoding) as text, copy.open("w", encoding="utf-8", newline="") as out:
        shutil.copyfileobj(text, out, BLOCK)


@functools.lru_cache(maxsize=2)  # a preview reads them again and again
def read_cells(path: Path, name: str, _sha256: str) -> tuple[list[str], pd.DataFrame]:
    """Return the names of the sheets of an Excel file, and the cells of one, by default the first.

    The hash tells a file that was changed.
    """
    try:
        with ZipFile(path) as packed:
            if sum(part.file_size for part in packed.infolist()) > MAX_UNPACKED:
                problem = f"over {MAX_UNPACKED // 10**6} MB when unpacked: save the sheet as CSV"
                raise InputError(f"{path}: {problem}")
        with pd.ExcelFile(path, engine="openpyxl") as book:
            names = [str(sheet) for sheet in book.sheet_names]
            if name and name not in names:
                listed = ", ".join(map(one_line, names))
                raise InputError(f"--sheet {name}: {path}: no such sheet among {listed}")
            chosen = name or names[0]
            # None and NA are words; pandas would rename a column that appears twice.
            options: dict[str, Any] = {"header": None, "dtype": object, "keep_default_na": False}
            return names, pd.read_excel(book, chosen, **options)
    except InputError:
        raise
    except ImportError:  # no requirement: needed for Excel alone
        raise InputError(f"{path}: reading Excel needs openpyxl: pip install openpyxl") from None
    except (BadZipFile, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a whole Excel file") from error


def read_sheet(file: TableFile, name: str) -> tuple[TableFile, pd.DataFrame]:
    """Return an Excel file with its header, and the cells of a sheet below it.

    The cells are texts; of each column K a column ``number K`` says which are stored as numbers.
    """
    path = file.path
    names, sheet = read_cells(path, name, file.sha256)
    chosen = name or names[0]
    if len(names) > 1:
        logger.info("%s: sheet %r of %d is read", path, chosen, len(names))
    counts = (sheet.head(LOOK).notna() & (sheet.head(LOOK) != "")).sum(axis=1)
    first = int((counts > counts.max() / 2).argmax()) if len(sheet) else 0
    if first:
        logger.info("%s: %d lines above the header are left out", path, first)
    header = [str(name).strip() for name in sheet.iloc[first : first + 1].to_numpy().ravel()]
    sheet = sheet[first + 1 :]
    is_number = sheet.map(lambda cell: isinstance(cell, int | float)).astype(bool)
    is_rounded = (sheet.where(is_number, 0).astype(float).abs() >= EXACT).any()
    rounded = tuple(name for name, bad in zip(header, is_rounded, strict=True) if bad)
    sheets = (chosen, *(name for name in names if name != chosen))
    texts = sheet.rename(columns=str).astype("string").join(is_number.add_prefix("number "))
    source = duck.quoted(f"{path}: {chosen}")
    return replace(
        file, header=header, source=source, separator="", rounded=rounded, sheets=sheets
    ), texts


def largest_sheet(path: Path, names: Sequence[str]) -> str:
    """Return the sheet with the most cells of some of an Excel file."""
    with pd.ExcelFile(path, engine="openpyxl") as book:
        sizes = {name: pd.read_excel(book, name, header=None).size for name in names}
    return max(sizes, key=lambda name: sizes[name])


def find_time(
    database: duck.Database,
    file: TableFile,
    name: str,
    formats: Sequence[str],
    earlier: Sequence[str],
) -> cells.Instant:
    """Return how all times of a column are written: in ISO's order, as given, or in another one."""
    where = f"{file.path}, column {name}"
    iso = [cells.Instant(), cells.Instant(zoned=True)]
    iso += [] if file.separator else [cells.ExcelDay()]
    given = [cells.Instant(formats=tuple(formats), zoned="%z" in " ".join(formats))]
    sure = iso + (given if formats else [])
    # Of a column in another form the given formats still tell whether the day comes first.
    kin = [order for order in cells.ORDERS if {*order} & {*formats}] or cells.ORDERS
    ways = sure + [cells.Instant(formats=order) for order in kin]
    with readable(file.path):
        fit, _ = find_fitting(database, file.filled(name, SAMPLE), ways)
        if fit and fit[0] in iso:
            return fit[0]
        # What does not read the first cells does not read all.
        fit, _ = find_fitting(database, file.filled(name), fit or ways)
    if fit and fit[0] in sure:
        return fit[0]
    if not fit:
        raise mixed_times(database, file, name, ways)
    # Where each day may be a month, the first format of an earlier file decides.
    fit = [way for way in fit if [*way.formats[:1]] == [*earlier]] or fit
    if len(fit) > 1:
        advice = (
            "--time_format '%d/%m/%Y' or '%m/%d/%Y', with %H:%M or %I:%M %p if they have a time"
        )
        used_by = [formats_used(database, file, name, way) for way in fit]
        raise ask_format("the day or the month may come first", used_by, f"say {advice}", where)
    if fit[0].formats in cells.ORDERS:
        logger.info("%s: times as %s", where, fit[0].formats[0])
    return fit[0]


def mixed_times(
    database: duck.Database, file: TableFile, name: str, ways: Sequence[cells.Instant]
) -> OpenQuestions:
    """Return the refusal of a column that no one form reads: of several forms, or of no times."""
    where, filled = f"{file.path}, column {name}", file.filled(name)
    joined = [cells.Instant(formats=(*cells.ISO_FORMATS, *order)) for order in cells.ORDERS]
    fit, _ = find_fitting(database, filled, joined)
    if not fit:
        _, unread = find_fitting(database, filled, ways)
        times = "not a time such as 2150-01-31 08:30:00, as the others"
        form = "name the form, as --time_format '%d.%m.%Y %H:%M', or --time_unit of numbers"
        problem = f"{cells.count_cells(unread)} {times}"
        return unclear([Question(problem, "time_format", advice=form)], where)
    used_by = [formats_used(database, file, name, way) for way in fit]
    problem = f"times have several forms, {' and '.join(used_by[0])}"
    form = " ".join(f"--time_format '{x}'" for x in used_by[0])
    return ask_format(problem, used_by, f"say {form}", where)


def ask_format(
    problem: str, used_by: Sequence[Sequence[str]], advice: str, where: str
) -> OpenQuestions:
    """Return the refusal of times that several lists of formats read."""
    asked = [
        Question(problem, "time_format", formats, advice=advice)
        for formats in zip(*used_by, strict=False)
    ]
    return unclear(asked, where)


def find_fitting(
    database: duck.Database, filled: str, ways: Sequence[cells.Instant]
) -> tuple[list[cells.Instant], int]:
    """Return which ways read all of some cells, and how many cells the best way does not."""
    total, *counts = count_read(database, filled, ways)
    fit = [way for way, count in zip(ways, counts, strict=True) if count == total]
    return fit, total - max(counts)


def count_read(database: duck.Database, filled: str, ways: Sequence[cells.Instant]) -> list[int]:
    """Return how many cells there are, and how many of them each way reads."""
    counts = ", ".join(f"count({way.typed('cell')})" for way in ways)
    return [*database.row(f"SELECT count(*), {counts} FROM ({filled})")]


def formats_used(
    database: duck.Database, file: TableFile, name: str, column: cells.Instant
) -> list[str]:
    """Return the formats that times have: one if it reads them all."""
    if not column.formats:
        return []
    sampled, _ = match_formats(database, file.filled(name, SAMPLE), column, column.formats)
    used, is_whole = match_formats(database, file.filled(name), column, sampled)
    if is_whole:
        return used
    return match_formats(database, file.filled(name), column, column.formats)[0]


def match_formats(
    database: duck.Database, filled: str, column: cells.Instant, formats: Sequence[str]
) -> tuple[list[str], bool]:
    """Return those of some formats that times have, and whether they read all."""
    ways = [replace(column, formats=(form,)) for form in formats]
    ways.append(replace(column, formats=tuple(formats)))
    total, *counts, read = count_read(database, filled, ways)
    pairs = [*zip(formats, counts, strict=True)]
    whole = [form for form, count in pairs if count == total]
    return whole[:1] or [form for form, count in pairs if count], read == total


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
    database: duck.Database,
    name: str,
    file: TableFile,
    columns: Mapping[str, cells.Column],
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
    typed = ", ".join(f"{form.typed(raw[c])} AS {duck.quoted(c)}" for c, form in columns.items())
    flags = ", ".join(f"'{k}': {sql}" for k, sql in enumerate(is_wrong.values()))
    rows = f"{file.rows()} {join} WHERE {conditions or 'true'}"
    steps = dict[str, str]()
    for column, form in columns.items():
        steps |= form.steps(raw[column])
    for step, sql in steps.items():
        rows = f"(SELECT *, {sql} AS {step} FROM {rows})"
    with readable(file.path):
        database.run(
            f'CREATE TABLE {name} AS SELECT {typed}, {{{flags}}} AS "is wrong" FROM {rows}',
            title=f"reading {file.path.name}",
        )
    counts = ", ".join(f"""count(*) FILTER ("is wrong"['{k}'])""" for k in range(len(is_wrong)))
    for column, count in zip(is_wrong, database.row(f"SELECT {counts} FROM {name}"), strict=True):
        if count:
            problem = columns[column].problem(count)
            raise InputError(f"{file.path}, column {source[column]}: {problem}")
    database.run(f'ALTER TABLE {name} DROP COLUMN "is wrong"')
