"""A DuckDB database that a signal ends, and the quotes of its SQL."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
from tqdm import tqdm

from medgemma_clinical.files import InputError, RunFault

UPDATE_SECONDS = 0.2  # between two looks at a running query: its progress, and signals


def literal(text: str) -> str:
    """Return SQL for a text."""
    return "'" + text.replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Return SQL for a column's name."""
    return '"' + name.replace('"', '""') + '"'


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

    def rows(self, sql: str) -> list[Any]:
        """Return the rows of a query as tuples."""
        return list(self.run(sql).fetchall())

    def row(self, sql: str) -> Any:
        """Return the one row of a query, as a tuple."""
        (row,) = self.rows(sql)  # to the end: an open result blocks ``add``
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
