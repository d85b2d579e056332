"""Messages of the program: to the terminal, and to the log file of a run."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from medgemma_clinical.files import InputError, one_line

LOG_MARK = "# log of medgemma_clinical\n"
"""First line of a log file; only a file that begins so is appended to."""

OWN = [logging.getLogger(name) for name in ("medgemma_trainer", "medgemma_clinical")]
"""Loggers of the program; their debug messages go to the log file alone."""


class PlainFormatter(logging.Formatter):
    """Escape what could steer a terminal; line breaks stay, no-break spaces become spaces."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message without unprintable characters."""
        return "\n".join(map(one_line, super().format(record).replace("\xa0", " ").split("\n")))


class Console(logging.StreamHandler[TextIO]):
    """Write lines above a progress bar, not behind it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record while no bar is shown; without a terminal a bar stays as it is."""
        terminal = sys.stderr.isatty()
        with tqdm.external_write_mode(self.stream) if terminal else contextlib.nullcontext():
            super().emit(record)


class RunLog(MemoryHandler):
    """Buffer the records of a run until its log file is open, then write them there."""

    def begin(self) -> None:
        """Close the log file of the previous run; buffer records again."""
        with contextlib.suppress(OSError):  # a log on a full disk ends no run
            if self.target:
                self.target.close()
        self.setTarget(None)
        self.buffer.clear()

    def open(self, path: Path) -> None:
        """Write the buffered records, and all that follow, to a new file or an earlier log."""
        try:
            with path.open("a") as file:
                file.write("" if file.tell() else LOG_MARK)
            target = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"--log_file {path}: {error.strerror}") from error
        target.setFormatter(PlainFormatter("%(asctime)s %(message)s"))
        self.setTarget(target)
        self.flush()


class CallersLogger(logging.Handler):
    """Pass records on as the caller has set a logger: its level, its handlers, its parents."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.logger = logging.Logger(logger.name, logger.level)
        self.logger.parent, self.logger.handlers = logger.parent, logger.handlers
        self.logger.propagate = logger.propagate

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on, unless it is below the caller's level."""
        if record.levelno >= self.logger.getEffectiveLevel():
            self.logger.handle(record)


RUN_LOG = RunLog(capacity=1)


def check_log_file(path: Path) -> None:
    """Refuse a log without a folder, or in the place of a file that is no log."""
    if not path.parent.is_dir():
        raise InputError(f"--log_file {path}: its folder does not exist")
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(LOG_MARK.encode())):
        raise InputError(f"--log_file {path}: exists and is no log of this program")


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore a caller's own logging after a block, and end the run's log."""
    loggers = (logging.root, *OWN)
    settings = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    raises = logging.raiseExceptions
    try:
        yield
    finally:
        RUN_LOG.begin()
        logging.raiseExceptions = raises
        for logger, handlers, level, propagate in settings:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@contextlib.contextmanager
def command_logging(*, first: bool = True) -> Iterator[None]:
    """Log a command: messages to stdout, of several processes from the first; errors to stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console, errors = Console(sys.stdout), Console(sys.stderr)
    console.set_name("console")
    console.setLevel(logging.INFO)
    console.setFormatter(PlainFormatter("%(message)s"))
    console.addFilter(lambda record: first and record.levelno < logging.ERROR)
    errors.setLevel(logging.ERROR)
    errors.setFormatter(PlainFormatter("error: %(message)s"))
    with restored():
        logging.root.handlers = [console, errors, RUN_LOG]
        logging.root.setLevel(logging.INFO)
        for logger in OWN:
            logger.setLevel(logging.DEBUG)
        logging.raiseExceptions = False  # a console that was closed ends no run
        yield


@contextlib.contextmanager
def collected() -> Iterator[list[logging.LogRecord]]:
    """Yield the records of a block, which go nowhere else."""
    handler = MemoryHandler(sys.maxsize, sys.maxsize)
    with restored():
        logging.root.handlers = [handler]
        yield handler.buffer


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Log a run that Python calls to its file in full, elsewhere as the caller has set logging."""
    with restored():
        for logger in OWN:  # logging itself shows warnings where a caller sets nothing
            logger.handlers, logger.propagate = [RUN_LOG, CallersLogger(logger)], False
            logger.setLevel(logging.DEBUG)
        yield


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Keep messages below a warning from the console; a run's log file still gets them."""
    consoles = [handler for handler in logging.root.handlers if handler.get_name() == "console"]
    for console in consoles:
        console.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for console in consoles:
            console.setLevel(logging.INFO)
