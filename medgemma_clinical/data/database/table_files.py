"""Table files (CSV, CSV in gzip, Parquet) as tables of a database; damage is named by its place."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import itertools
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from medgemma_clinical.data.database.connection import Database
from medgemma_clinical.data.tables import check_expansion, check_separator
from medgemma_clinical.files import InputError

FORMS = (".csv", ".csv.gz", ".parquet")
READ_BYTES = 2**20

LARGEST_WHOLE = 10**10
"""Bound of a key, and of an offset in minutes, which a timestamp holds."""

LONGEST_WORD = 300
"""Characters kept of a word: a unit, a code, a ward."""

COPY_AGAIN = "copy the table again"

ONE, ZERO = "('1', '1.0', 'true')", "('0', '0.0', 'false')"
"""Cells of a label, in small letters, as SQL."""

MOMENT = r"\d{4}-\d\d-\d\d([ T]\d{1,2}:\d\d(:\d\d(\.\d+)?)?)?"
"""A time as text; DuckDB alone would drop AM, PM, a zone and any other word behind it."""

ZONE = r":\d\d(\.\d+)?\s*([A-Z]{3,4}|Z|[+-]\d\d(:?\d\d)?|[A-Za-z]+/[A-Za-z_/]+)$"
"""End of a time that has a zone."""

MICROSECONDS = {"minutes": 60_000_000, "hours": 3_600_000_000, "days": 86_400_000_000}
"""Units of times that are numbers, counted from an arbitrary day."""


@dataclass(frozen=True)
class Column:
    """How a column is read.

    Attributes:
        form: ``number``, ``whole`` number, ``time`` (in full seconds), ``instant`` (a time with its
            fraction of a second), a unit of ``MICROSECONDS`` (a time that is a number), ``label``
            (0 or 1), ``word``, or ``id`` (a word; 10001.0 is read as 10001).
        may_be_empty: whether a cell may lack a value; a word that does is an empty text.
        optional: whether the file may lack the column; its cells are empty then.
        advice: what to do about a wrong cell.
    """

    form: str
    may_be_empty: bool = False
    optional: bool = False
    advice: str = ""

    def typed(self, raw: str) -> str:
        """Return SQL for the value of a raw cell, NULL where there is none."""
        word = f"coalesce(trim(left({raw}::VARCHAR, {LONGEST_WORD})), '')"
        if self.form == "word":
            return word
        if self.form == "id":
            return f"regexp_replace({word}, '^(\\d+)\\.0$', '\\1')"
        if self.form in ("time", "instant"):
            is_time = f"regexp_full_match(trim({raw}::VARCHAR), '{MOMENT}')"
            time = f"CASE WHEN {is_time} THEN TRY_CAST({raw}::VARCHAR AS TIMESTAMP) END"
            return f"date_trunc('second', {time})" if self.form == "time" else time
        if self.form == "label":
            cell = f"lower(trim({raw}::VARCHAR))"
            return f"CASE WHEN {cell} IN {ONE} THEN 1 WHEN {cell} IN {ZERO} THEN 0 END"
        # NaN is above every number in DuckDB.
        number = f"nullif(TRY_CAST({raw} AS DOUBLE), 'nan'::DOUBLE)"
        if self.form in MICROSECONDS:
            passed = f"round({number} * {MICROSECONDS[self.form]})"
            return f"make_timestamp(TRY_CAST({passed} AS BIGINT))"
        return f"TRY_CAST({number} AS BIGINT)" if self.form == "whole" else number

    def is_no_key(self, raw: str) -> str:
        """Return SQL for whether a raw cell cannot be a key, or is empty; cheap on all rows."""
        if self.form != "whole":
            return f"{self.typed(raw)} = ''"
        number = f"TRY_CAST({raw} AS DOUBLE)"
        return f"coalesce({number} % 1 != 0 OR abs({number}) >= {LARGEST_WHOLE}, true)"

    def problems(self, raw: str) -> dict[str, str]:
        """Return SQL for each problem that a raw cell may have, by its words."""
        empty = "('', 'nan')" if self.form in ("number", "whole") else "('')"
        filled = f"coalesce(lower(trim({raw}::VARCHAR)), '') NOT IN {empty}"
        found = {} if self.may_be_empty else {"empty": f"NOT {filled}"}
        wrong = f"{filled} AND {self.typed(raw)} IS NULL"
        if self.form in ("time", "instant"):
            found["a time with a zone"] = (
                f"{wrong} AND regexp_matches(trim({raw}::VARCHAR), '{ZONE}')"
            )
        if self.form == "whole":  # BIGINT alone would round 1.5 in silence
            wrong = f"{filled} AND {self.is_no_key(raw)}"
        if self.form in WRONG:
            found[WRONG[self.form]] = wrong
        return found

    def advise(self, problem: str) -> str:
        """Return what to do about a problem; a table that was copied has none."""
        if problem == "empty" and self.advice:
            return "fill the cell, or remove the row"
        return self.advice or COPY_AGAIN


NO_TIME = "not a time such as 2150-01-31 08:30:00"
WRONG = {
    "number": "not a number",
    "whole": "not a whole number",
    "label": "neither 0 nor 1",
    "time": NO_TIME,
    "instant": NO_TIME,
    **dict.fromkeys(MICROSECONDS, "a time that is not a finite number"),
}
"""What is wrong with a cell of each form."""

KEY, NUMBER, TIME, WORD, INSTANT = (
    Column(form) for form in ("whole", "number", "time", "word", "instant")
)
KEY_OR_EMPTY, NUMBER_OR_EMPTY, TIME_OR_EMPTY, WORD_OR_EMPTY = (
    Column(form, may_be_empty=True) for form in ("whole", "number", "time", "word")
)


@dataclass(frozen=True)
class TableFile:
    """A table file, read once from beginning to end and found whole.

    Attributes:
        path: of the file.
        header: names of all its columns.
        sha256: of the file.
        floats: columns of a Parquet file with 32 bits a number.
    """

    path: Path
    header: list[str]
    sha256: str
    floats: frozenset[str] = frozenset()

    @property
    def is_parquet(self) -> bool:
        """Whether rows have numbers from 0, not lines from 1."""
        return self.path.suffix.lower() == ".parquet"

    def raw(self, name: str) -> str:
        """Return SQL for a column's raw cell."""
        if name not in self.header:
            return "NULL"
        cell = f'"{self.header.index(name)}"'
        return f"{cell}::VARCHAR" if name in self.floats else cell  # 4.1, not 4.0999999

    def rows(self) -> str:
        """Return SQL for the raw rows: columns named by their place, and ``file_row_number``."""
        place = "'" + glob.escape(str(self.path)).replace("'", "''") + "'"
        if self.is_parquet:
            names = [*(f'"{k}"' for k in range(len(self.header))), "file_row_number"]
            return f"read_parquet({place}, file_row_number = true) AS t({', '.join(names)})"
        columns = ", ".join(f"'{k}': 'VARCHAR'" for k in range(len(self.header)))
        return (
            f"read_csv({place}, columns = {{{columns}}}, auto_detect = false, header = true, "
            "delim = ',', quote = '\"', escape = '\"', "
            "strict_mode = true, store_rejects = true, rejects_limit = 100)"
        )

    def check_columns(self, columns: Mapping[str, Column], hint: str) -> None:
        """Check that the file has the columns once each.

        Args:
            columns: by name.
            hint: what to do about a missing one.

        Raises:
            InputError: names the first that is missing or appears twice.
        """
        for name, column in columns.items():
            if name not in self.header and not column.optional:
                raise InputError(f"{self.path}: no column {name} among {len(self.header)}: {hint}")
            if self.header.count(name) > 1:
                raise InputError(f"{self.path}: the column {name} appears twice: remove one")


def check_rows(database: Database, table: str, path: Path, key: str = "") -> None:
    """Refuse a table without rows, or with a key twice.

    Raises:
        InputError: names the file.
    """
    different = f"count(DISTINCT {key})" if key else "count(*)"
    rows, keys = database.row(f"SELECT count(*), {different} FROM {table}")
    if not rows:
        raise InputError(f"{path}: no rows below the header")
    if keys < rows:
        problem = "a value appears more than once"
        raise InputError(f"{path}, column {key}: {problem}: {COPY_AGAIN}")


def find_file(folder: Path, name: str, flag: str) -> Path:
    """Find the file of a table in one of its forms.

    Args:
        folder: that the flag names.
        name: of the table, such as ``hosp/patients``.
        flag: for the error.

    Raises:
        InputError: it is missing or present twice.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for an overlong name too
        raise InputError(f"{flag} {folder}: no such folder")
    found = [path for form in FORMS if (path := folder / f"{name}{form}").is_file()]
    if len(found) != 1:
        problem = f"is there {len(found)} times: leave one" if found else "is missing"
        raise InputError(f"{flag} {folder}: the table {name} ({', '.join(FORMS)}) {problem}")
    return found[0]


def open_table(
    database: Database, path: Path, columns: Mapping[str, Column], hint: str
) -> TableFile:
    """Read a file once, to know that it is whole, and check its columns.

    DuckDB checks no sum of a gzip file, and takes a CSV cut within its last cell for whole.

    Raises:
        InputError: the file is damaged, or lacks a column.
    """
    if path.suffix.lower() == ".parquet":
        file = _open_parquet(database, path)
    else:
        with readable(path), path.open("rb") as stream:
            file = _open_csv(path, stream)
    file.check_columns(columns, hint)
    return file


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line.

    Raises:
        InputError: naming the file, never its content.
    """
    import duckdb

    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: not a whole gzip file: {COPY_AGAIN}") from None
    except UnicodeError:
        raise InputError(f"{path}: not a text file in UTF-8: {COPY_AGAIN}") from None
    except OSError as error:
        problem = error.strerror or "damaged"
        raise InputError(f"{path}: cannot be read: {problem}") from None
    except (csv.Error, duckdb.Error) as error:
        # Of a damaged Parquet file DuckDB raises its base class.
        damage = (csv.Error, duckdb.InvalidInputException, duckdb.IOException)
        if not isinstance(error, damage) and type(error) is not duckdb.Error:
            raise
        kind = "Parquet file" if path.suffix.lower() == ".parquet" else "CSV"
        raise InputError(f"{path}: not a whole {kind}: {COPY_AGAIN}") from None


class _HashingFile:
    """A file that is hashed and counted while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        """Begin before the first byte."""
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """Read as any file does."""
        content = self.file.read(size)
        self.digest.update(content)
        self.count += len(content)
        return content


def _open_csv(path: Path, stream: BinaryIO) -> TableFile:
    raw = _HashingFile(stream)
    text: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[call-overload]
    block = start = text.read(READ_BYTES)
    unpacked, end = 0, b""
    with _progress_bar(f"checking {path.name}", path.stat().st_size) as bar:
        while block:
            unpacked, end = unpacked + len(block), block[-1:]
            check_expansion(path, unpacked, raw.count)
            bar.update(raw.count - bar.n)
            block = text.read(READ_BYTES)
    if not unpacked:
        raise InputError(f"{path}: the file is empty")
    if end not in (b"\n", b"\r"):
        raise InputError(f"{path}: it ends without a line break, within a row: {COPY_AGAIN}")
    first, _, _ = start.partition(b"\n")
    names = next(csv.reader([first.decode("utf-8-sig", "replace").strip()]), [])
    header = [name.strip() for name in names]
    check_separator(path, header)
    return TableFile(path, header, raw.digest.hexdigest())


def _open_parquet(database: Database, path: Path) -> TableFile:
    with readable(path):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        place = {"path": glob.escape(str(path))}
        rows, packed = database.row(
            "SELECT num_rows, file_size_bytes FROM parquet_file_metadata($path)", place
        )
        described = database.frame("DESCRIBE SELECT * FROM read_parquet($path)", place)
    header = described["column_name"].tolist()
    check_expansion(path, rows * len(header), packed)
    floats = described["column_name"][described["column_type"] == "FLOAT"]
    return TableFile(path, header, digest, frozenset(floats))


def quoted(name: str) -> str:
    """Return SQL for a column's name."""
    return '"' + name.replace('"', '""') + '"'


def load_table(
    database: Database,
    name: str,
    file: TableFile,
    columns: Mapping[str, Column],
    keep: str = "true",
    join: str = "",
) -> None:
    """Make a table of the rows of a file.

    Args:
        database: that gets the table.
        name: of the table.
        file: that was found whole.
        columns: to read, by name; others are never looked at.
        keep: SQL condition on the first two columns; cells of other rows are not checked, except
            those of these two columns.
        join: SQL of a join whose columns ``keep`` may use.

    Raises:
        InputError: rows that do not fit the header, or a cell of another type, by file, line (of
            Parquet: row) and column.
    """
    problems = {
        (column_name, words): f"({sql})"
        for column_name, column in columns.items()
        if column_name in file.header
        for words, sql in column.problems(file.raw(column_name)).items()
    }
    keys = [c.is_no_key(file.raw(n)) for n, c in list(columns.items())[:2] if n in file.header]
    numbered = "\n".join(f"WHEN {sql} THEN {k}" for k, sql in enumerate(problems.values()))
    typed = ",\n".join(f"{c.typed(file.raw(n))} AS {quoted(n)}" for n, c in columns.items())
    with readable(file.path):
        database.run(
            f"CREATE TABLE {name} AS SELECT {typed}, CASE {numbered} END AS problem\n"
            f"FROM {file.rows()} {join} WHERE ({keep}) OR {' OR '.join(keys)}",
            title=f"reading {file.path.name}",
        )
        _check_rejects(database, file)
    first, count = database.row(
        f"SELECT min(problem), count(*) FILTER (problem = (SELECT min(problem) FROM {name})) "
        f"FROM {name}"
    )
    if first is not None:
        (column, words), sql = list(problems.items())[int(first)]
        where = f"{file.path}, {find_row(database, file, sql)}, column {column}"
        others = f" in {count:,} rows" if count > 1 else ""
        raise InputError(f"{where}: {words}{others}: {columns[column].advise(words)}")
    database.run(f"ALTER TABLE {name} DROP COLUMN problem")


def _check_rejects(database: Database, file: TableFile) -> None:
    """Refuse a CSV with rows that DuckDB left out in silence."""
    if file.is_parquet:
        return
    found = database.frame("SELECT line, error_type FROM reject_errors ORDER BY line LIMIT 1")
    database.run("DROP TABLE reject_errors; DROP TABLE reject_scans")
    for line, kind in found.itertuples(index=False):
        words = {
            "TOO MANY COLUMNS": "more fields than the header has",
            "MISSING COLUMNS": "fewer fields than the header has",
            "UNQUOTED VALUE": "a quote without its other, or line ends of two kinds",
            "INVALID ENCODING": "no text in UTF-8",
            "LINE SIZE OVER MAXIMUM": "a row longer than 2 MB, or a quote without its other",
        }
        problem = words.get(kind, "the row cannot be read")
        raise InputError(f"{file.path}, line {line}: {problem}: {COPY_AGAIN}")


def find_row(database: Database, file: TableFile, condition: str) -> str:
    """Return the place of the first row that meets a condition."""
    if file.is_parquet:
        (number,) = database.row(
            f"SELECT min(file_row_number) FROM {file.rows()} WHERE {condition}"
        )
        return f"row {number}"
    database.run("SET threads = 1")  # rows come in the order of the file
    (number,) = database.row(
        "SELECT min(number) FROM "
        f"(SELECT *, row_number() OVER () AS number FROM {file.rows()}) WHERE {condition}"
    )
    opened = gzip.open if file.path.suffix.lower() == ".gz" else open
    with opened(file.path, "rt", encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        rows = (reader.line_num for row in reader if row)
        return f"line {next(itertools.islice(rows, number, None))}"


def _progress_bar(title: str, size: int) -> Any:
    """Return a progress bar over bytes, silent where stderr is no terminal."""
    from tqdm import tqdm

    silent = not sys.stderr.isatty()
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, leave=False, disable=silent)
