"""The flags of a command that makes a DKA file, as fields of its request."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_clinical.files import InputError

SIZE = re.compile(r"[0-9]{1,6}(\.[0-9]+)?\s*([KMGT]i?B)", re.IGNORECASE)


def flag(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] = (),
    repeated: bool = False,
    separated: bool = False,
    alone: str | None = None,
) -> Any:
    """Return a dataclass field that is a flag of the same name.

    Args:
        help: what it is for.
        default: without one the flag is required.
        choices: words that are allowed.
        repeated: whether it may be given several times; the field is a tuple.
        separated: whether commas separate several values; the field is a tuple.
        alone: its value where the flag stands without one.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "repeated": repeated,
        "separated": separated,
        "alone": alone,
    }
    return dataclasses.field(default=default, metadata=metadata)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What every command has that makes a DKA file from tables.

    Attributes:
        out: CSV to write; its description comes beside it.
        memory_limit: of DuckDB's tables.
        threads: of DuckDB; the number of usable cores in place of 0 and of any larger number.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    out: Path = flag("CSV to write; a JSON description comes beside it")
    memory_limit: str = flag("memory for tables; the rest goes to a private folder", "400MB")
    threads: int = flag("threads that read, at most the cores; 0 for all cores", 0)

    def __post_init__(self) -> None:
        """Check the values."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (choices := field.metadata.get("choices")) and value != field.default:
                for each in value if field.metadata["separated"] else [value]:
                    self._check(each in choices, field.name, f"must be one of {', '.join(choices)}")
        limit = SIZE.fullmatch(self.memory_limit.strip())
        self._check(limit is not None, "memory_limit", "must be a size such as 500MB or 2GB")
        self._check(self.threads >= 0, "threads", "must be at least 1, or 0 for all cores")
        cores = usable_cores()
        object.__setattr__(self, "threads", min(self.threads or cores, cores))

    def _check(self, right: bool, name: str, problem: str) -> None:
        """Refuse the value of a flag.

        Raises:
            InputError: it is not right.
        """
        if not right:
            value = getattr(self, name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"--{name} {shown}: {problem}")
