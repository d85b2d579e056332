"""The DKA file that an importer makes: rows, and beside them their description."""

from __future__ import annotations

import glob
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.findings import flow_lines
from medgemma_clinical.files import InputError, atomic, file_hash, locked, remove
from medgemma_clinical.flags import WHOLE, check_required, row, stored
from medgemma_clinical.provenance import code_hash

logger = logging.getLogger(__name__)

MADE_BY = "made_by"  # key of the description that marks a file of these commands


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What every command needs that makes a DKA file: its output, and DuckDB's limits."""

    out: Path = row(Path, None, "CSV to write; a JSON description comes beside it", required=True)
    memory_limit: str = row(str, "400MB", "memory for tables, beyond it disk is used")
    threads: int = row(WHOLE, 0, "threads that read (0 = all cores)")


def make_file(
    request: TableRequest, make: Callable[[Any], tuple[pd.DataFrame, dict[str, Any]]]
) -> int:
    """Write the rows and the description that ``make`` returns, log their counts, and return 0."""
    check_required(request)
    check_target(request.out)
    with locked(request.out):
        for left_over in request.out.parent.glob(f".{glob.escape(request.out.name)}.spill-*"):
            remove(left_over)  # of a run that was killed: another would hold the lock
        rows, description = make(request)
        write_rows(rows, description, request.out)
    counts = (f"{description['rows'][name]:,}" for name in ("rows", "patients", "events"))
    logger.info("%s: %s rows of %s patients, %s events", request.out, *counts)
    return 0


def check_target(out: Path) -> None:
    """Refuse an output that cannot be written before the tables are read, which takes minutes."""
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: must end in .csv")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: the folder is missing, or cannot be written to")
    beside = out.with_suffix(".json")
    is_own = beside.is_file() and MADE_BY in beside.read_text("utf-8", "replace")
    if (out.exists() or beside.exists()) and not is_own:
        problem = f"this file, or {beside.name}, is not an earlier output: choose another name"
        raise InputError(f"--out {out}: {problem}")


def write_rows(rows: pd.DataFrame, description: dict[str, Any], out: Path) -> None:
    """Write the CSV and the description beside it: both or none."""
    # The description is renamed first: a table without it would be read as another series.
    with atomic(out) as csv_file, atomic(out.with_suffix(".json")) as json_file:
        rows.to_csv(csv_file, index=False, lineterminator="\n")
        content = {**description, "csv_sha256": file_hash(csv_file)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        json_file.write_text(f"{text}\n", encoding="utf-8")


def apply_rules(
    candidates: pd.DataFrame,
    source: str,
    patients: pd.Series,  # (N,)
) -> tuple[pd.Series, list[dict[str, Any]]]:
    """Remove rows by the first rule (column) that applies; return (N,) which are left, and flow."""
    left = pd.Series(True, index=candidates.index)
    flow = []
    for rule, matches in candidates.items():
        removed = int((left & matches).sum())
        left &= ~matches
        counts = {"removed": removed, "left": int(left.sum())}
        flow.append({"rule": rule, **counts, "patients": patients[left].nunique()})
    lines = flow_lines(pd.DataFrame(flow))
    if not left.any():
        removed_by = "; ".join(" ".join(line.split()) for line in lines)
        raise InputError(f"{source}: of {len(left):,} candidates none is left: {removed_by}")
    for line in lines:
        logger.info(line)
    return left, flow


def describe_origin(request: TableRequest, command: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what a description says of the command: flags, hashes of the tables, versions."""
    return {
        "arguments": stored(request),
        "tables_sha256": dict(sorted(hashes.items())),
        "versions": {
            "python": sys.version.split()[0],
            "duckdb": version("duckdb"),
            "pandas": version("pandas"),
            "code_sha256": code_hash(),
        },
        MADE_BY: f"dataset_format.py {command}",
    }
