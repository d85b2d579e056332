"""A DuckDB database for clinical tables: bounded memory, a private folder for what spills."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.files import RunFault

LOOK_SECONDS = 0.2
"""How often a running query shows its progress and lets a signal through."""


class Database:
    """A connection whose queries end at a signal, show their progress and raise one line.

    Args:
        connection: of DuckDB.
    """

    def __init__(self, connection: Any) -> None:
        """Hold the connection, and the one thread that uses it."""
        self._connection = connection
        self._thread = ThreadPoolExecutor(1)

    def run(self, sql: str, values: Mapping[str, Any] | None = None, *, title: str = "") -> Any:
        """Run statements; return DuckDB's result of the last one.

        Args:
            sql: one statement or several; ``values`` allows one.
            values: of the parameters ``$name``.
            title: of the progress bar; none is shown without it, or off a terminal.

        Raises:
            RunFault: the memory limit or the disk is too small.
        """
        import duckdb
        from tqdm import tqdm

        query = self._thread.submit(self._connection.execute, sql, values)
        silent = not title or not sys.stderr.isatty()
        with tqdm(desc=title, total=100, leave=False, disable=silent) as bar:
            try:
                while not wait([query], LOOK_SECONDS).done:
                    bar.update(max(self._connection.query_progress(), 0.0) - bar.n)
            except BaseException:  # a signal: the query's thread would run on
                self._connection.interrupt()
                wait([query])
                raise
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

    def run_file(self, path: Path) -> None:
        """Run the statements of a file, with a progress bar named after it."""
        self.run(path.read_text(encoding="utf-8"), title=path.stem)

    def frame(self, sql: str, values: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return the rows of a query."""
        table: pd.DataFrame = self.run(sql, values).df()
        return table

    def row(self, sql: str, values: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Return the one row of a query."""
        row: tuple[Any, ...]
        (row,) = self.run(sql, values).fetchall()  # to the end: an open result blocks ``add``
        return row

    def add(self, name: str, table: pd.DataFrame) -> None:
        """Copy a DataFrame into a table."""
        self._connection.register("incoming", table)
        self.run(f"CREATE TABLE {name} AS SELECT * FROM incoming")
        self._connection.unregister("incoming")

    def set(self, **variables: Any) -> None:
        """Set what SQL reads by ``getvariable``."""
        for name, value in variables.items():
            self.run(f"SET VARIABLE {name} = $value", {"value": value})


@contextlib.contextmanager
def open_database(folder: Path, memory_limit: str, threads: int) -> Iterator[Database]:
    """Open a database in memory; what exceeds the limit goes to a private folder until the end.

    Args:
        folder: where the private folder is made; it holds patients.
        memory_limit: of DuckDB's tables, such as 2GB; the process itself needs more.
        threads: that work on a query.
    """
    import duckdb

    with tempfile.TemporaryDirectory(prefix=".spill-", dir=folder) as spill:
        config = {
            "threads": threads,
            "memory_limit": memory_limit,
            "temp_directory": spill,
            "autoinstall_known_extensions": False,  # nothing is ever loaded from the network
            "autoload_known_extensions": False,
            "preserve_insertion_order": False,
        }
        connection = duckdb.connect(config=config)
        try:
            connection.execute("SET enable_progress_bar = true")
            connection.execute("SET enable_progress_bar_print = false")
            connection.execute("SET TimeZone = 'UTC'")
            database = Database(connection)
            database.run_file(Path(__file__).with_name("macros.sql"))
            yield database
        finally:
            connection.close()
