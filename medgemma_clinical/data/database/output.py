"""The DKA file that is made of tables, and its description: both or none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.checks import flow_lines
from medgemma_clinical.data.database.flags import TableRequest
from medgemma_clinical.files import InputError, atomic, partial_path, read_json
from medgemma_clinical.provenance import code_hash

logger = logging.getLogger(__name__)

MADE_BY = "made_by"
"""Key of the description that marks a file of these commands."""

Made = tuple[pd.DataFrame, dict[str, Any]]
"""Rows of the DKA format, and the description beside them."""


def make_file(request: TableRequest, make: Callable[[Any], Made]) -> int:
    """Make a DKA file and its description, log what became of the rows, and return 0.

    Raises:
        InputError: the tables cannot be used, or the file cannot stand at its place.
        RunFault: the machine has too little memory or disk.
    """
    check_target(request.out)
    table, description = make(request)
    write_rows(table, description, request.out)
    rows = description["rows"]
    counts = (f"{rows[name]:,}" for name in ("rows", "patients", "events"))
    logger.info("%s: %s rows of %s patients, %s events", request.out, *counts)
    return 0


def check_target(out: Path) -> None:
    """Check that the output can be written, before minutes are spent on reading.

    Raises:
        InputError: another ending, no writable folder, or a file of another origin is there.
    """
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: must end in .csv")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}: make it first")
    try:
        partial_path(out).touch()
        partial_path(out).unlink()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror}): choose another folder"
        raise InputError(f"--out {out}: {out.parent} {problem}") from None
    description = out.with_suffix(".json")
    if not out.exists() and not description.exists():
        return
    if not _is_earlier_output(description):
        raise InputError(
            f"--out {out}: this file, or {description.name}, exists and is not an earlier output "
            "of this command: choose another name"
        )


def _is_earlier_output(description: Path) -> bool:
    try:
        return MADE_BY in read_json(description)
    except (ValueError, OSError, TypeError):
        return False


def write_rows(rows: pd.DataFrame, description: dict[str, Any], out: Path) -> None:
    """Write the CSV and the description beside it: both or none.

    The description is renamed first: a table without it would be read as another series.
    """
    with atomic(out) as csv_file, atomic(out.with_suffix(".json")) as json_file:
        rows.to_csv(csv_file, index=False, lineterminator="\n")
        digest = hashlib.sha256(csv_file.read_bytes()).hexdigest()
        text = json.dumps({**description, "csv_sha256": digest}, indent=2, ensure_ascii=False)
        json_file.write_text(f"{text}\n", encoding="utf-8")


def apply_rules(candidates: pd.DataFrame, source: str) -> tuple[pd.Series, list[dict[str, Any]]]:
    """Remove each candidate by the first rule that applies, and log the flow.

    Args:
        candidates: a column of bool a rule, named by it; a row a candidate.
        source: of the tables, named in the error.

    Returns:
        (N,) bool of those left; ``rule``, ``removed`` and ``left`` of each rule.

    Raises:
        InputError: none is left.
    """
    left = pd.Series(True, index=candidates.index)
    flow = []
    for rule, applies in candidates.items():
        removed = int((left & applies).sum())
        left &= ~applies
        flow.append({"rule": rule, "removed": removed, "left": int(left.sum())})
    lines = flow_lines(pd.DataFrame(flow))
    if not left.any():
        removed_by = "; ".join(" ".join(line.split()) for line in lines)
        raise InputError(f"{source}: of {len(left):,} candidates none is left: {removed_by}")
    for line in lines:
        logger.info(line)
    return left, flow


def describe_origin(request: TableRequest, command: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what a description says of the command: flags, hashes of the tables, versions.

    Paths are left out, and limits of the machine, which change no row.

    Args:
        request: of the command.
        command: its name.
        hashes: SHA-256 of each table by its name.
    """
    limits = {field.name for field in dataclasses.fields(TableRequest)}
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return {
        "arguments": {
            name: value
            for name, value in values.items()
            if name not in limits and not isinstance(value, Path)
        },
        "tables_sha256": dict(sorted(hashes.items())),
        "versions": {
            "python": sys.version.split()[0],
            "duckdb": version("duckdb"),
            "pandas": version("pandas"),
            "code_sha256": code_hash(),
        },
        MADE_BY: f"dataset_format.py {command}",
    }
