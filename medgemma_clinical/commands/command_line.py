"""The command line's own words: parsers, number types, exit codes for errors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import socket
import ssl
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from medgemma_clinical.commands.logs import plain
from medgemma_clinical.data.database.flags import TableRequest
from medgemma_clinical.files import InputError, RunFault, one_line, owner_only

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 0, 2, 3, 130

SHOW_VALUES = "an error about a cell shows what the cell holds"
"""Help of the flag ``--show_values``."""

MIN_CELL = "report.html: counts of fewer patients are hidden (0 = none)"
"""Help of the flag ``--min_cell``."""

LESS_MEMORY = (
    "lower --batch_size, shorten the text by --series_text or --max_text_tokens, or free some"
)
LARGEST_COUNT = 10**9
"""Largest count that a flag may name."""

NETWORK_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; keywords of Python are parsed as flags."""

    def error(self, message: str) -> NoReturn:
        """Refuse wrong usage.

        Raises:
            InputError: always.
        """
        raise InputError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; exit with code 2 where its usage is wrong."""
        try:
            return super().parse_args(args, namespace)
        except InputError as error:
            self.exit(EXIT_INPUT, f"error: {error} (see --help)\n")

    def parse_keywords(self, keywords: Mapping[str, Any]) -> tuple[argparse.Namespace, set[str]]:
        """Parse keywords, whose names are those of the flags; None leaves a flag out.

        Returns:
            All flags with their values, and the flags that were given.

        Raises:
            TypeError: there is no such flag.
            InputError: a value is wrong.
        """
        known = vars(super().parse_args([]))
        words = []
        for name, value in keywords.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f": did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"unexpected keyword {name!r}{hint}")
            bare = known[name] is False  # a flag that takes no value
            if value is None or (bare and value is False):
                continue
            words.append(f"--{name}" if bare and value is True else f"--{name}={_text(value)}")
        given = {word.partition("=")[0] for word in words}
        return super().parse_args(words), given


def _text(value: Any) -> str:
    """Return a Python value as a flag's text: a list by commas, true and false as on and off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def number(
    kind: type, low: float, high: float = sys.float_info.max, *, open_low: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type for finite numbers from ``low`` to ``high``."""

    noun = "a whole number" if kind is int else "a number"
    limit = "" if high == sys.float_info.max else f" to {high:g}"

    def convert(text: str) -> Any:
        """Convert one value of the flag."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            start = f"{'above' if open_low else 'from'} {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {noun} {start}{limit}")
        return value

    return convert


POSITIVE, WHOLE = number(int, 1, LARGEST_COUNT), number(int, 0, LARGEST_COUNT)
RATE = number(float, 0, 1, open_low=True)


def names(text: str) -> list[str]:
    """Split a comma-separated list of names."""
    return [name.strip() for name in text.split(",") if name.strip()]


METAVARS = {Path: "PATH", float: "NUMBER", int: "NUMBER"}
"""Values of flags in ``--help``, by type; others have the name of their flag."""


def add_flags(parser: argparse.ArgumentParser, request: type[TableRequest]) -> None:
    """Add the fields of a request as flags."""
    types = get_type_hints(request)
    for field in dataclasses.fields(request):
        about = field.metadata
        default = None if field.default is dataclasses.MISSING else field.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        by_default = "" if shown in (None, "") or shown is False else f" (default: {shown})"
        words: dict[str, Any] = {"help": about["help"] + by_default, "default": default}
        words["required"] = field.default is dataclasses.MISSING
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", **{**words, "action": "store_true"})
            continue
        if about["separated"]:
            words["type"] = lambda text: tuple(names(text))
        elif about["repeated"]:
            words["action"] = Repeated
        else:
            kind = types[field.name]
            words |= {"type": kind, "metavar": METAVARS.get(kind)}
        if about["choices"]:
            words["metavar"] = f"{{{','.join(about['choices'])}}}"
        if about["alone"] is not None:
            words |= {"nargs": "?", "const": about["alone"]}
        parser.add_argument(f"--{field.name}", **words)


class Repeated(argparse.Action):
    """Collect the values of a flag that may be given several times, as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add a value."""
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), values))


def run_command(action: Callable[[], int], *, show_values: bool = False) -> int:
    """Run one command; every error becomes one line and an exit code.

    Args:
        action: returns the exit code of a command that succeeds.
        show_values: show the content of a cell that an error is about, and tracebacks of faults.

    Returns:
        0 done; 2 wrong input; 3 a fault; 129, 130 or 143 ended by a signal.
    """
    try:
        with owner_only():
            return action()
    except InputError as error:
        logger.error("%s", error.message(show_value=show_values))
        return EXIT_INPUT
    except KeyboardInterrupt as stop:
        logger.error("interrupted: nothing more was written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    except Exception as error:
        logger.error("%s", describe_fault(error))
        if show_values:
            sys.stderr.write(plain(traceback.format_exc()))
        return EXIT_FAULT


def describe_fault(error: Exception) -> str:
    """Return one line on an error that the user's input did not cause.

    The text of an exception may hold a patient's cell: only its type and place are shown.
    """
    if isinstance(error, RunFault):
        return str(error)
    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "the machine has too little memory: read fewer rows or series, or free some"
    if re.search("(out of|allocate|enough) memory", text):
        return f"the GPU or the machine has too little memory: {LESS_MEMORY}"
    if isinstance(error, NETWORK_ERRORS) or (isinstance(error, OSError) and error.errno):
        return _describe_os_error(error)
    if re.search("gloo|NCCL|[Cc]onnection", text) and "WORLD_SIZE" in os.environ:
        return "another process of this run has ended: go on by --resume"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    if type(error).__name__ == "AcceleratorError" or re.search("CUDA|CUBLAS|NVIDIA", text):
        return (
            f"the GPU or its driver fails ({what}): see what nvidia-smi says; --show_values shows "
            "the text of the error"
        )
    return f"a fault of the program, {what}: please report it"


def _describe_os_error(error: OSError) -> str:
    """Describe an error of the disk or of the network by its kind and file."""
    if isinstance(error, NETWORK_ERRORS) or error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        kind = type(error).__name__
        return f"the network or a server fails ({kind}): try again, or work offline"
    place = one_line(str(error.filename or type(error).__name__))
    problem = os.strerror(error.errno or 0)
    return f"{place}: {problem}: make room, get the right to it, or choose another place"
