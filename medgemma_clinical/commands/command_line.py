"""The command line's own words: flags, parsers, number types, exit codes for errors."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import socket
import ssl
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from medgemma_clinical import __version__, files
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.flags import METAVARS, WHOLE, Flag, number
from medgemma_clinical.models import choices
from medgemma_clinical.training.signals import SIGNALS

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 0, 2, 3, 130

VERSION = f"medgemma-clinical {__version__}"
FLAG = re.compile(r"--\w+")


Table = Mapping[str, Sequence[Flag]]
"""The flags of a command by the titles of their groups."""


def rows_of(table: Table) -> Iterator[Flag]:
    """Yield each flag of a table."""
    for rows in table.values():
        yield from rows


def changed(values: Mapping[str, Any], table: Table, names: Container[str]) -> dict[str, Any]:
    """Return those of some flags that do not have their default, with their values."""
    rows = [flag for flag in rows_of(table) if flag.name in names]
    default = {flag.name: False if flag.form is bool else flag.default for flag in rows}
    return {name: values[name] for name in default if values[name] != default[name]}


def build_parser(program: str, about: str, table: Table) -> Parser:
    """Return the parser of one command."""
    places = [flag.name.upper() for flag in rows_of(table) if flag.positional]
    usage = " ".join([program, *(f"{name} ..." for name in places), "--FLAG VALUE ..."])
    parser = Parser(program, usage, about, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=VERSION)
    for title, rows in table.items():
        group = parser.add_argument_group(title)
        for flag in rows:
            flag.add_to(group)
    return parser


def check_needs(table: Table, given: set[str]) -> None:
    """Refuse a typed flag without what it needs."""
    for flag in rows_of(table):
        for needed in flag.needs.split(", ") if f"--{flag.name}" in given and flag.needs else ():
            if not given.intersection(needed.split(" or ")):
                raise InputError(f"--{flag.name} needs {needed}")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is False or action.default in (None, (), "", argparse.SUPPRESS)
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; keywords of Python are parsed as flags."""

    def error(self, message: str) -> NoReturn:
        """Refuse wrong usage."""
        raise InputError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line, of a whole program or one command; name the first unknown word."""
        needed = [action for action in self._actions if action.required and action.option_strings]
        for action in needed:  # a mistyped name is said before what is lacking
            action.required = False
        try:
            parsed, unknown = super().parse_known_args(args, namespace)
        finally:
            for action in needed:
                action.required = True
        if unknown:
            word = unknown[0].partition("=")[0]
            hint = files.did_you_mean(word, FLAG.findall(self.format_help()))
            self.error(f"unrecognised {word}{hint}")
        lacking = [x.option_strings[-1] for x in needed if getattr(parsed, x.dest, None) is None]
        if lacking:
            self.error(f"needs {', '.join(lacking)}")
        return parsed, unknown

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; exit with code 2 where its usage is wrong."""
        try:
            return super().parse_args(args, namespace)
        except InputError as error:
            self.exit(EXIT_INPUT, f"error: {error} (see --help)\n")

    def parse_given(self, words: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """Parse a command line; return also the flags that it gives."""
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        return self.parse_args(words), flags

    def parse_keywords(self, keywords: Mapping[str, Any]) -> tuple[argparse.Namespace, set[str]]:
        """Parse keywords named like flags, None for a flag left out; return also those given."""
        defaults = vars(super().parse_args([]))
        words = []
        for name, value in keywords.items():
            if defaults[name] is False:  # a flag that takes no value
                words += [f"--{name}"] if value else []
            elif value is not None:
                words.append(f"--{name}={_text(value)}")
        return super().parse_args(words), {word.partition("=")[0] for word in words}


def _text(value: Any) -> str:
    """Return a Python value as a flag's text: a list by commas, true and false as on and off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def parse_hours(text: str) -> list[float]:
    """Read rising numbers above 0 with commas; used as an argparse type."""
    with contextlib.suppress(ValueError):
        numbers = [float(number) for number in text.split(",")]
        if numbers[0] > 0 and numbers[-1] < math.inf and numbers == sorted({*numbers}):
            return numbers
    raise argparse.ArgumentTypeError(f"{text!r}: give rising numbers above 0, such as 24,72")


def parse_days(text: str) -> int | list[int]:
    """Read rising whole numbers above 0, several with commas; used as an argparse type."""
    days = [int(day) for day in parse_hours(text) if day.is_integer()]
    if len(days) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole days, such as 90,365")
    return days if len(days) > 1 else days[0]


def check_threshold(text: str) -> str:
    """Refuse what is no threshold; used as an argparse type."""
    from medgemma_clinical.evaluation.decision import GOALS, parse_threshold  # loads scikit-learn

    with contextlib.suppress(ValueError):
        parse_threshold(text)
        return text
    goals = ", ".join(f"'{goal} 0.9'" for goal in GOALS)
    raise argparse.ArgumentTypeError(
        f"{text!r}: give a risk within 0 and 1, such as 0.1, or {goals}"
    )


def parse_encoder(text: str) -> str:
    """Import the user's own encoder and return its name; used as an argparse type."""
    from medgemma_clinical.models import encoders  # loads torch

    try:
        return encoders.register(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_quantization(text: str) -> str:
    """Refuse other words, 8-bit weights with the reason; used as an argparse type."""
    if text == "int8":
        raise argparse.ArgumentTypeError(choices.INT8_REFUSED)
    if text not in choices.QUANTIZATIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: give {' or '.join(choices.QUANTIZATIONS)}")
    return text


METAVARS |= {check_threshold: "RISK", parse_days: "DAYS,DAYS", parse_hours: "HOURS,HOURS"}
METAVARS |= {parse_encoder: "MODULE:CLASS", check_quantization: "{nf4,none}"}

# Rows of several commands.
SEED = Flag("seed", number(int, 0, 2**32 - 1), 0, "of split, weights, bootstrap")
OUTPUT_DIR = Flag("output_dir", Path, None, "folder to write", required=True)
CENSORING = Flag(
    "censoring", ("km", "regression"), "km", "times: weights by Kaplan-Meier or inputs"
)
MIN_CELL = Flag("min_cell", WHOLE, 0, "hide smaller counts in report.html (0 = show all)")
SHOW_VALUES = Flag("show_values", bool, help="errors show the cell, stage 3's report a patient")


def run_command(action: Callable[[], int], *, show_values: bool = False) -> int:
    """Run one command; an error becomes an exit code and a line, with its cell if wanted."""
    try:
        with files.owner_only():
            return action()
    except KeyboardInterrupt as stop:
        logger.error("interrupted: nothing more was written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    except Exception as error:
        if SIGNALS.received:  # what it raises within a library may become another error
            return 128 + SIGNALS.received
        if isinstance(error, InputError):
            logger.error("%s", error.message(show_value=show_values))
            return EXIT_INPUT
        logger.error("%s", describe_fault(error), exc_info=show_values)
        return EXIT_FAULT


def describe_fault(error: Exception) -> str:
    """Return one line on an error that the user's input did not cause."""
    # The text of an exception may hold a patient's cell: only its type and place are shown.
    kind = type(error).__name__
    if isinstance(error, RunFault):
        return str(error)
    if files.is_out_of_memory(error):
        return f"{kind}: free memory, or use less data or a smaller model"
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)):
        return f"the network fails ({kind}): try again, or work offline"
    if isinstance(error, OSError) and error.errno:
        return f"{files.one_line(str(error.filename or kind))}: {os.strerror(error.errno)}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{kind} in {Path(frame.filename).name}, line {frame.lineno}"
    if "WORLD_SIZE" in os.environ:
        return f"a process failed ({place}): the same command with --resume continues"
    return f"a fault of the program, {place}: please report it"
