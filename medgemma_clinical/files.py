"""Errors of the user's input, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL, REPLACED = ".partial", ".old"
"""Endings of hidden names: a file that is being written, and a folder that it replaces."""

READING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What reading a damaged JSON file can raise."""


NO_MEMORY = (
    "out of memory",  # CUDA's runtime and driver
    "allocate memory",  # torch's allocator for the CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # there was no room for its handle
)
"""What a RuntimeError of a library says where memory was lacking."""


class InputError(ValueError):
    """A mistake in the user's input, in one line: what, where, what to do."""

    def __init__(self, text: str, value: object = None) -> None:
        """Keep text and value apart, and the text on one line."""
        super().__init__(one_line(text))
        self.value = value  # a patient's cell, shown only with --show_values; never in the text

    def message(self, *, show_value: bool) -> str:
        """Return the text, with the cell's content where that is asked for, or how to ask."""
        if self.value is None:
            return str(self)
        if show_value:
            return f"{self}: it holds {self.value!r}"
        return f"{self} (--show_values shows the cell)"


class RunFault(RuntimeError):
    """A fault of a run, not of its input; the text is one line for the user, exit code 3."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was lacking, by an error's type or a RuntimeError's text."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """Let new files belong to their owner alone for the length of a block: they hold patients."""
    mask_before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask_before)


def one_line(text: str) -> str:
    """Escape line breaks and unprintable characters as Python does: ``\\n``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(name: str, names: Iterable[str], likeness: float = 0.6) -> str:
    """Return a question that offers the nearest of some names, empty where none is near."""
    by_lower_case = {x[:200].lower(): x[:200] for x in names}
    near = difflib.get_close_matches(name[:200].lower(), by_lower_case, 1, likeness)
    return f": did you mean {one_line(by_lower_case[near[0]])}?" if near else ""


def file_hash(path: Path) -> str | None:
    """Return the SHA-256 of a file, None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(content: Any) -> str:
    """Return the SHA-256 of plain content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def partial_path(path: Path) -> Path:
    """Return the name under which a file or folder is written before it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose content replaces that of ``path`` if the block succeeds."""
    temporary = partial_path(path)
    replaced = path.with_name(f".{path.name}{REPLACED}")
    remove(temporary)
    try:
        yield temporary
        # The content reaches the disk before its name: a loss of power leaves no half file.
        for written in [*temporary.rglob("*"), temporary]:
            _sync(written)
        if path.is_dir():  # a folder cannot be replaced in one step; see ``clean``
            remove(replaced)
            path.rename(replaced)
            temporary.rename(path)
            remove(replaced)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name the file
        raise
    finally:
        remove(temporary)


def make_output_dir(folder: Path) -> None:
    """Make the folder of ``--output_dir``, unless there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--output_dir {folder}: is a file: name a folder") from error


def clean(folder: Path) -> None:
    """Remove half-written files of killed runs; restore a folder killed within its replacement."""
    for path in folder.glob(f".*{REPLACED}"):
        whole = path.with_name(path.name[1 : -len(REPLACED)])
        if not whole.exists():
            path.rename(whole)
    for ending in (PARTIAL, REPLACED):
        for path in folder.glob(f".*{ending}"):
            remove(path)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; a file name inside it may be invalid Unicode."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8, with or without byte order mark."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(type(error).__name__, "", 0) from error


def move_aside(paths: Iterable[Path]) -> list[Path]:
    """Rename paths that exist: a number, free for all, behind the stem; return the new names."""
    there = [path for path in paths if os.path.lexists(path)]
    for number in itertools.count(1):
        aside = [path.with_stem(f"{path.stem}.{number}") for path in there]
        if not any(map(os.path.lexists, aside)):
            break
    return [path.rename(new) for path, new in zip(there, aside, strict=True)]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep another run from ``path`` by a hidden lock file; a run that dies frees its lock."""
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout as error:
        problem = "another run is at work there: wait, or choose another"
        raise InputError(f"{path}: {problem}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: FileLock refuses a file without a name
        lock.release()
