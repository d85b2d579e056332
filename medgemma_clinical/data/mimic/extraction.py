"""From the tables of MIMIC-IV to rows of the DKA format: the whole way, and the files it ends in."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.mimic.request import COHORTS, GAPS, OUTCOMES, Extraction
from medgemma_clinical.files import InputError, atomic

__all__ = [
    "COHORTS",
    "GAPS",
    "OUTCOMES",
    "Extraction",
    "check_target",
    "extract",
    "usable_cores",
    "write_rows",
]

MADE_BY = "made_by"
"""Key of the description that marks a file of this command."""


def extract(request: Extraction, processes: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Build the rows of the DKA file from MIMIC-IV.

    Args:
        request: cohort, series, times and outcome.
        processes: number of processes that parse labevents; they end with this one.

    Returns:
        The rows by ascending patient and admission, and the description beside them, whose
        ``rows`` counts ``rows``, ``patients``, ``events`` and ``computed_gaps``.

    Raises:
        InputError: the tables cannot be read, or no admission is left.
    """
    raise NotImplementedError


def check_target(request: Extraction) -> None:
    """Check that the output can be written, before minutes are spent on reading.

    Raises:
        InputError: another ending, no writable folder, or a file of another origin is there.
    """
    out = request.out
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: must end in .csv")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}: make it first")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror}): choose another folder"
        raise InputError(f"--out {out}: {out.parent} {problem}") from None
    description = out.with_suffix(".json")
    if not out.exists() and not description.exists():
        return
    if not _made_by_extraction(description):
        raise InputError(
            f"--out {out}: this file, or {description.name}, exists and is not an earlier output "
            "of this command: choose another name"
        )


def _made_by_extraction(description: Path) -> bool:
    try:
        return MADE_BY in json.loads(description.read_text(encoding="utf-8"))
    except (ValueError, OSError, TypeError):
        return False


def write_rows(rows: pd.DataFrame, description: dict[str, Any], out: Path) -> None:
    """Write the CSV and the description beside it: both or none, readable by their owner alone.

    The description is renamed first: a table without it would be read as another series.
    """
    with atomic(out) as csv_file, atomic(out.with_suffix(".json")) as json_file:
        for path in (csv_file, json_file):
            path.touch(mode=0o600)  # the rows describe patients
        rows.to_csv(csv_file, index=False, lineterminator="\n")
        digest = hashlib.sha256(csv_file.read_bytes()).hexdigest()
        text = json.dumps({**description, "csv_sha256": digest}, indent=2, ensure_ascii=False)
        json_file.write_text(f"{text}\n", encoding="utf-8")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
