"""Messages of the program: to the terminal, and to the log file of a run."""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from medgemma_clinical.files import InputError, one_line

LOG_MARK = "# log of medgemma_clinical\n"
"""First line of a log file; only a file that begins so is appended to."""

FOLDERS = re.compile(r"""(?<![^\s"'(=])/(?:[^/\n:;"']*[^/\s:;"']/)+""")
"""The folders of an absolute path, whose names may hold spaces."""


class PlainFormatter(logging.Formatter):
    """Escape what could steer a terminal; the program's own line breaks stay."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message without unprintable characters; a path is one line."""
        if isinstance(record.args, tuple):
            record.args = tuple(one_line(str(x)) if isinstance(x, Path) else x for x in record.args)
        return plain(super().format(record))


class LogFormatter(PlainFormatter):
    """Show absolute paths without their folders, which may name a user."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message with the last name of each path."""
        return FOLDERS.sub("", super().format(record))


def plain(text: str) -> str:
    """Escape unprintable characters except line breaks; no-break spaces become spaces."""
    return "\n".join(map(one_line, text.replace("\xa0", " ").split("\n")))


class RunLog(logging.handlers.MemoryHandler):
    """Hold the lines of a run until its log file is known, then write them there."""

    def __init__(self) -> None:
        """Start empty, without a file."""
        super().__init__(capacity=1, flushLevel=logging.NOTSET)
        self.file: IO[str] | None = None

    def begin(self) -> None:
        """Close the file of the run before, and hold lines again."""
        with contextlib.suppress(OSError):  # a log on a full disk ends no run
            if self.file:
                self.file.close()
        self.file = None
        self.setTarget(None)
        self.buffer.clear()

    def open(self, path: Path) -> None:
        """Write the held lines, and all that follow, to a new file or an earlier log.

        Raises:
            InputError: the file cannot be written, or is no log of this program.
        """
        check_log_file(path)
        mode = "a" if path.exists() else "x"
        try:
            file = self.file = open(  # noqa: SIM115  (closed by ``begin``)
                path, mode, encoding="utf-8", errors="backslashreplace", opener=_open_no_link
            )
            if mode == "x":
                file.write(LOG_MARK)
        except OSError as error:
            raise InputError(f"--log_file {path}: {error.strerror}") from error
        target = logging.StreamHandler(file)
        target.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        self.setTarget(target)
        self.flush()


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)  # not on Windows


def check_log_file(path: Path) -> None:
    """Check that a log file is new, or an earlier log of this program under one name.

    Raises:
        InputError: a link, a folder, a device, or a file that something else began.
    """
    if not os.path.lexists(path):
        return
    found, own = path.lstat(), False
    try:
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            with path.open("rb") as file:
                own = file.read(len(LOG_MARK)) == LOG_MARK.encode()
    except OSError as error:
        raise InputError(f"--log_file {path}: {error.strerror}") from error
    if not own:
        raise InputError(
            f"--log_file {path}: exists and is no log of this program: choose a new name, or none"
        )


RUN_LOG = RunLog()


def start_logging(*, first: bool = True) -> None:
    """Send messages to stdout, errors to stderr, and both to ``RUN_LOG``.

    Args:
        first: whether this process speaks; of several processes one does.
    """
    logging.raiseExceptions = False  # a log that cannot be written shows no line of it elsewhere
    console = logging.StreamHandler(forgiving(sys.stdout))
    console.setFormatter(PlainFormatter("%(message)s"))
    console.addFilter(lambda record: first and record.levelno < logging.ERROR)
    console.set_name("console")
    errors = logging.StreamHandler(sys.stderr)
    errors.setLevel(logging.ERROR)
    errors.setFormatter(PlainFormatter("error: %(message)s"))
    RUN_LOG.begin()
    logging.basicConfig(level=logging.INFO, handlers=[console, errors, RUN_LOG], force=True)


@contextlib.contextmanager
def command_logging(*, first: bool = True) -> Iterator[None]:
    """Log as ``start_logging`` for the length of a command; a caller's own logging comes back."""
    root = logging.root
    before, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers.clear()
    start_logging(first=first)
    try:
        yield
    finally:
        RUN_LOG.begin()
        root.handlers[:], logging.raiseExceptions = before, raises
        root.setLevel(level)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Send the messages of the program to ``RUN_LOG``, and its warnings to stderr, from Python.

    A caller who has set up logging keeps it.
    """
    own = [logging.getLogger(name) for name in ("medgemma_clinical", "medgemma_trainer")]
    levels = [each.level for each in own]
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    handlers = [RUN_LOG, *([] if logging.root.handlers else [warnings])]
    RUN_LOG.begin()
    try:
        for each in own:
            each.setLevel(logging.INFO)
            for handler in handlers:
                each.addHandler(handler)
        yield
    finally:
        for each, level in zip(own, levels, strict=True):
            each.setLevel(level)
            for handler in handlers:
                each.removeHandler(handler)
        RUN_LOG.begin()


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Keep messages below a warning from the console; a run's log file still gets them."""
    consoles = [each for each in logging.root.handlers if each.get_name() == "console"]
    try:
        for console in consoles:
            console.setLevel(logging.WARNING)
        yield
    finally:
        for console in consoles:
            console.setLevel(logging.NOTSET)


def forgiving(stream: TextIO) -> TextIO:
    """Let a stream escape characters that its encoding lacks."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
