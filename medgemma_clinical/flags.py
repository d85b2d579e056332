"""A flag: a row of a command's table, or a field of a request."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_clinical.files import InputError

TAKEN, FORM, NEVER = "taken", "form", "never"
"""What an import like an earlier one does with a flag of it: take it, take it from tables of the
same columns alone as it says how their cells are written, or leave it."""


@dataclass(frozen=True)
class Flag:
    """A flag of a command."""

    name: str  # as the keyword of Python
    form: Any = str  # an argparse type, ``bool`` of a switch, or a tuple of choices
    default: Any = None
    help: str = ""
    unread: str = ""  # ways of training that do not read it: typed with one, it is refused
    needs: str = ""  # "--a, --b or --c": what cannot be left out beside it
    metavar: str | None = None
    required: bool = False
    several: bool = False  # takes one value or more
    repeat: bool = False  # may be given several times; its value is a tuple
    bare: Any = None  # its value where it is typed without one
    positional: bool = False
    stored: str = NEVER  # of a request: TAKEN, FORM or NEVER

    def add_to(self, group: Any) -> None:
        """Declare the flag in a parser or a group of one."""
        options: dict[str, Any] = {"help": self.help, "default": self.default}
        if self.form is bool:
            options |= {"action": "store_true", "default": False}
        elif isinstance(self.form, tuple):
            options |= {"choices": self.form}
        else:
            options |= {"type": self.form, "metavar": self.metavar or METAVARS.get(self.form, "N")}
        if self.repeat:
            options |= {"action": Repeated, "default": ()}
        if self.several:
            options["nargs"] = "+"
        if self.bare is not None:
            options |= {"nargs": "?", "const": self.bare}
        if self.positional:
            options["metavar"] = self.name.upper()
        else:
            options["required"] = self.required
        group.add_argument(self.name if self.positional else f"--{self.name}", **options)

    def read(self, value: Any, where: str) -> Any:
        """Return the value of a TOML or JSON file, checked like a typed one."""
        where = f"{where}: {self.name}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        kinds: dict[Any, tuple[str, bool]] = {bool: ("true or false", isinstance(value, bool))}
        kinds |= dict.fromkeys((str, Path), ("a text", isinstance(value, str)))
        kind, is_right = kinds.get(self.form, ("a number", is_number))
        if isinstance(self.form, tuple):
            kind, is_right = f"one of {', '.join(self.form)}", value in self.form
        if self.repeat:
            texts = value if isinstance(value, list) else [value]
            kind, is_right = "a list of texts", all(isinstance(text, str) for text in texts)
            value = tuple(texts)
        if not is_right:
            raise InputError(f"{where} must be {kind}")
        if self.repeat or isinstance(self.form, tuple):
            return value
        try:
            return self.form(str(value)) if is_number else self.form(value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {error}") from error


class Repeated(argparse.Action):
    """Collect the values of a flag that may be given several times, in place of its default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add a value, or several."""
        collected = getattr(namespace, self.dest)
        collected = () if collected is self.default else collected
        values = values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, (*collected, *values))


# ---------------------------------------------------------------------------- requests


Texts = tuple[str, ...]


def row(form: Any, default: Any, about: str, stored: str = NEVER, **options: Any) -> Any:
    """Return a field of a request that is a flag named like it."""
    value = form(default) if isinstance(default, str) and callable(form) else default
    metadata = {"flag": Flag("", form, default, about, stored=stored, **options)}
    return dataclasses.field(default=value, metadata=metadata)


def texts(about: str, stored: str = TAKEN, **options: Any) -> Any:
    """Return a field of texts, a flag that may be given several times."""
    return row(str, (), about, stored, repeat=True, **options)


def flags_of(request: Any) -> dict[str, Flag]:
    """Return the flags of a request, or of its class, by their names."""
    fields = [field for field in dataclasses.fields(request) if "flag" in field.metadata]
    return {x.name: dataclasses.replace(x.metadata["flag"], name=x.name) for x in fields}


def stored(request: Any) -> dict[str, Any]:
    """Return the values that a description keeps of a request."""
    kept = {name for name, flag in flags_of(request).items() if flag.stored != NEVER}
    return {name: value for name, value in vars(request).items() if name in kept}


def check_required(request: Any) -> None:
    """Refuse a request without what it needs."""
    rows = flags_of(request).values()
    if lacking := [f"--{x.name}" for x in rows if x.required and not getattr(request, x.name)]:
        raise InputError(f"needs {', '.join(lacking)}")


# ---------------------------------------------------------------------------- types


def number(
    kind: type, low: float, high: float = sys.float_info.max, *, open_low: bool = False
) -> Callable[[str], Any]:
    """Return an argparse type for finite numbers from ``low`` to ``high``."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (open_low and value == low):
            noun = "a whole number" if kind is int else "a number"
            limits = f"{'above' if open_low else 'from'} {low:g}"
            limits += "" if high == sys.float_info.max else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {noun} {limits}")
        return value

    return convert


POSITIVE, WHOLE = number(int, 1, 10**9), number(int, 0, 10**9)
RATE = number(float, 0, 1, open_low=True)
HOURS = number(float, 0, 10**6, open_low=True)


def names(text: str) -> list[str]:
    """Split a comma-separated list of names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def name_tuple(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of names."""
    return tuple(names(text))


def one_or_some(one: str, some: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type for one name, or a comma-separated list of others."""

    def convert(text: str) -> tuple[str, ...]:
        given = name_tuple(text)
        if given != (one,) and not (given and {*given} <= {*some}):
            allowed = f"{one}, or some of {', '.join(some)}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}")
        return given

    return convert


METAVARS: dict[Any, str] = {str: "NAME", Path: "PATH", names: "NAME,NAME"}
METAVARS[name_tuple] = "NAME,NAME"
"""What stands for a value in ``--help``, a number elsewhere; commands add their types."""
