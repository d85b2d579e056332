"""Reading a table of MIMIC-IV once, chunk by chunk, in several processes where it is large."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.mimic.cells import BadCellError, decode, parse_rows, select_lines
from medgemma_clinical.data.mimic.tables import (
    CHUNK_BYTES,
    CellType,
    HashingFile,
    Table,
    TableChunk,
    find_table,
    open_csv,
    open_parquet,
    readable,
)
from medgemma_clinical.files import InputError

GZIP_RATIO = 8
"""Gzip shrinks these tables about so many times."""


class Keeper(Protocol):
    """Takes from the cells of a chunk what is needed later."""

    def __call__(self, cells: pd.DataFrame, types: dict[str, CellType]) -> Any:
        """Return what is kept; it may be pickled."""


@runtime_checkable
class LineSelector(Keeper, Protocol):
    """A keeper that decides by the keys of a row whether the rest has to be parsed."""

    def needed(self, cells: pd.DataFrame) -> NDArray[np.bool_]:
        """Return which rows are needed, (n,)."""


@dataclass(frozen=True)
class ReadTable:
    """A table that was read.

    Attributes:
        kept: what the keeper returned, chunk by chunk, in the order of the file.
        sha256: of the file.
        header: all its columns.
    """

    kept: list[Any]
    sha256: str
    header: list[str]


def read_table(folder: Path, name: str, keep: Keeper = decode, processes: int = 1) -> ReadTable:
    """Read the needed columns of a table, hashing its file along the way.

    Args:
        folder: with hosp/ and icu/.
        name: of the table, such as ``hosp/labevents``.
        keep: takes from each chunk what is needed.
        processes: that parse. A file of one chunk is parsed in this process alone, and Parquet,
            which brings its own threads.

    Raises:
        InputError: the table is missing, damaged, or not MIMIC-IV's.
    """
    path = find_table(folder, name)
    size = path.stat().st_size
    with readable(path), path.open("rb") as file:
        raw = HashingFile(file)
        if path.suffix == ".parquet":
            table, chunks = open_parquet(path, name)
            processes = 1
        else:
            table, chunks = open_csv(path, name, raw)
            processes = processes if size > CHUNK_BYTES // GZIP_RATIO else 1
        kept = []
        with _progress_bar(f"reading {name}", size) as bar:
            for read, result in _process_chunks(chunks, table, keep, processes):
                kept.append(result)
                bar.update(read - bar.n)
        while raw.read(2**20):  # pyarrow read Parquet past the hash
            pass
    return ReadTable(kept, raw.digest.hexdigest(), table.header)


def _progress_bar(title: str, size: int) -> Any:
    """Return a progress bar over bytes, silent where stderr is no terminal."""
    from tqdm import tqdm

    silent = not sys.stderr.isatty()
    return tqdm(desc=title, total=size, unit="B", unit_scale=True, leave=False, disable=silent)


def _process_chunks(
    chunks: Iterable[TableChunk], table: Table, keep: Keeper, processes: int
) -> Iterator[tuple[int, Any]]:
    """Yield the bytes read so far and what is kept of each chunk, in their order.

    The pool holds a few chunks at a time, however many there are.
    """
    if processes < 2:
        for chunk in chunks:
            yield chunk.read, _keep_chunk(chunk, table, keep)
        return
    # A forked process begins at once with what its parent holds; a spawned one imports anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_begin_worker, initargs=(table, keep)
    ) as pool:
        waiting: deque[tuple[int, Future[Any]]] = deque()
        for chunk in chunks:
            waiting.append((chunk.read, pool.submit(_work, _by_length(chunk))))
            if len(waiting) > processes:
                read, future = waiting.popleft()
                yield read, future.result()
        for read, future in waiting:
            yield read, future.result()


def _by_length(chunk: TableChunk) -> TableChunk:
    """Replace text by its length where a worker can read it from the file itself.

    The file is in the page cache, since this process has just hashed it; a pipe is slower.
    """
    if chunk.place is None or not isinstance(chunk.rows, bytes):
        return chunk
    return replace(chunk, rows=len(chunk.rows))


_worker: list[tuple[Table, Keeper]] = []
"""What this process does with each chunk; set once when it begins as a worker."""


def _begin_worker(table: Table, keep: Keeper) -> None:
    """Prepare a worker: signals of the terminal are for its parent, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [(table, keep)]


def _end_with_parent() -> None:
    """Wait for the parent's end; a killed parent cannot tell its pool to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: TableChunk) -> Any:
    """Handle a chunk in a worker."""
    table, keep = _worker[0]
    if isinstance(chunk.rows, int):
        with readable(table.path), table.path.open("rb") as file:
            file.seek(chunk.place or 0)
            chunk = replace(chunk, rows=file.read(chunk.rows))
    return _keep_chunk(chunk, table, keep)


def _keep_chunk(chunk: TableChunk, table: Table, keep: Keeper) -> Any:
    """Parse a chunk and keep what is needed of it.

    Raises:
        InputError: naming file and row.
    """
    rows, numbers = chunk.rows, None
    assert not isinstance(rows, int)
    try:
        if isinstance(rows, pd.DataFrame):
            return keep(rows, table.types)
        if isinstance(keep, LineSelector):
            rows, numbers = select_lines(rows, table, keep.needed)
        return keep(parse_rows(rows, table), table.types)
    except BadCellError as error:
        unit = "line" if isinstance(rows, bytes) else "row"
        row = error.row if numbers is None else int(numbers[error.row])
        where = f"{table.path}, {unit} {chunk.first + row}"
        raise InputError(f"{where}: {error.problem}: copy the table again") from error
