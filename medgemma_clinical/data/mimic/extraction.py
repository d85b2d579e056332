"""From the tables of MIMIC-IV to rows of the DKA format, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.mimic.admissions import SmallTables, find_item
from medgemma_clinical.data.mimic.analytes import ANALYTES, GAP_COMPONENTS, convert_units
from medgemma_clinical.data.mimic.outcome import NOT_MEASURED, OPEN_AT_DISCHARGE, combine, judge
from medgemma_clinical.data.mimic.reading import read_table
from medgemma_clinical.data.mimic.request import (
    ALWAYS,
    COHORTS,
    GAP_ITEM,
    GAPS,
    OUTCOMES,
    REPORTED,
    Extraction,
)
from medgemma_clinical.data.mimic.rows import (
    MADE_BY,
    Candidates,
    Item,
    Origin,
    describe_rows,
    make_rows,
)
from medgemma_clinical.data.mimic.tables import find_table
from medgemma_clinical.data.mimic.values import (
    LabKeeper,
    Stays,
    computed_gaps,
    join_values,
    sort_values,
)
from medgemma_clinical.data.mimic.windows import (
    find_windows,
    in_ketoacidosis,
    known_inputs,
    of_stay,
)
from medgemma_clinical.data.small_cells import FEWEST, count_text, flow_lines
from medgemma_clinical.files import InputError, atomic, read_json

logger = logging.getLogger(__name__)

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

ADULT_YEARS = 18
LABEVENTS = "hosp/labevents"


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
    tables = SmallTables(request.mimic_dir)
    number, name = find_item(request.item, tables)
    adult = tables.admissions["age"] >= ADULT_YEARS  # NaN compares false
    rules = {"under 18 at admission, or of unknown age": ~adult}
    if request.cohort == "dka":
        rules["not coded as diabetic ketoacidosis"] = ~tables.admissions["coded"]
    series_items: tuple[int, ...] = (number,)
    if number == GAP_ITEM and request.compute_gap == ALWAYS:
        # Another quantity than the reported gap: no model of one may pass for one of the other.
        series_items, name = GAP_COMPONENTS, f"{name} without potassium"
    wanted = ~pd.DataFrame(rules).any(axis=1)
    labs = _read_labevents(tables, wanted, series_items, processes)
    item = Item(number, name, labs.unit)
    found = _find_candidates(tables, labs.values, item, request)
    left, flow = _apply_rules(rules | _further_rules(found, request))
    _log_flow(flow, len(left), request)
    rows = make_rows(found, left, item, request)
    origin = Origin(flow, labs.left_out, labs.stored, tables.hashes)
    return rows, describe_rows(rows, found, item, origin, request)


@dataclass(frozen=True)
class Labs:
    """What labevents holds: ``values``, the series' ``unit``, and for ``Origin`` the rest."""

    values: pd.DataFrame
    unit: str
    left_out: Counter[str]
    stored: bool


def _read_labevents(
    tables: SmallTables, wanted: pd.Series, series_items: Sequence[int], processes: int
) -> Labs:
    """Read the series and the other chemistry of the wanted admissions, in one unit each."""
    table = tables.admissions
    subject, hadm = table["subject_id"].to_numpy(), table["hadm_id"].to_numpy()
    start, end = table["start"].to_numpy(), table["end"].to_numpy()
    keeper = LabKeeper(
        {*series_items, *ANALYTES}, Stays(subject, hadm, start, end, wanted.to_numpy())
    )
    path = find_table(tables.folder, LABEVENTS)
    read = read_table(tables.folder, LABEVENTS, keeper, processes)
    tables.hashes[LABEVENTS] = read.sha256
    if not read.kept:
        raise InputError(f"{path}: no rows below the header")
    stored = "storetime" in read.header
    if not stored:
        logger.warning("%s: no column storetime: values count as known when charted", path)
    values, left_out = join_values(read.kept)
    converted = convert_units(values, series_items, str(path))
    left_out = left_out + converted.left_out
    for reason, count in left_out.items():
        logger.info("%s: %s values %s", path, count_text(count, FEWEST), reason)
    return Labs(converted.table, converted.series_unit, left_out, stored)


def _find_candidates(
    tables: SmallTables, values: pd.DataFrame, item: Item, request: Extraction
) -> Candidates:
    """Find for each admission its prediction time, what is known then, and what follows."""
    table = tables.admissions
    if request.compute_gap != REPORTED:
        values = sort_values(pd.concat([values, computed_gaps(values)], ignore_index=True))
    windows = find_windows(values, item.number, request, len(table))
    inputs = known_inputs(values, windows)
    gaps = values[values["item"] == of_stay(values, windows.gap_item)]
    judged = judge(table, tables.icu, gaps, windows, request)
    gap_item = of_stay(inputs, windows.gap_item)
    of_series = inputs["item"] == (gap_item if item.number == GAP_ITEM else item.number)
    return Candidates(table, inputs[of_series], inputs, windows, judged)


def _further_rules(found: Candidates, request: Extraction) -> dict[str, pd.Series]:
    """Return the rules that need values: by name, in their order, (A,) bool of those removed."""
    table, time = found.admissions, found.windows.time
    observations = found.series.groupby("stay").size().reindex(table.index, fill_value=0)
    rules = {
        "no value of the series known within a window of the admission": time.isna(),
        "prediction time before the admission": time < table["start"],
        "died by the prediction time": table["death"] <= time,
        "discharged by the prediction time": ~(table["end"] > time),
        f"fewer than {request.min_observations} values known within the window": (
            observations < request.min_observations
        ),
    }
    if request.cohort == "biochemical":
        sick = in_ketoacidosis(found.inputs, found.windows, len(table))
        rules["not in ketoacidosis by what is known within the window"] = ~sick
    if request.outcome == ("icu",):
        rules["in intensive care at the prediction time"] = found.judged["unit"].notna()
    label = combine(found.judged, request.outcome)
    for reason in (OPEN_AT_DISCHARGE, NOT_MEASURED):
        rules[reason] = label.isna() & (found.judged["why"] == reason)
    return rules


def _apply_rules(rules: dict[str, pd.Series]) -> tuple[pd.Series, list[dict[str, Any]]]:
    """Remove each admission by the first rule that applies.

    Returns:
        (A,) bool of those left; ``rule``, ``removed`` and ``left`` of each rule.
    """
    left = pd.Series(True, index=next(iter(rules.values())).index)
    flow = []
    for rule, applies in rules.items():
        removed = int((left & applies).sum())
        left &= ~applies
        flow.append({"rule": rule, "removed": removed, "left": int(left.sum())})
    return left, flow


def _log_flow(flow: list[dict[str, Any]], admissions: int, request: Extraction) -> None:
    """Log how the admissions became rows, and the cohort's definition.

    Raises:
        InputError: none is left.
    """
    if not flow[-1]["left"]:
        removed = "; ".join(f"{r['rule']} {r['removed']}" for r in flow if r["removed"])
        raise InputError(
            f"--mimic_dir {request.mimic_dir}: of {admissions} admissions none is left: {removed}"
        )
    for line in flow_lines(pd.DataFrame(flow), FEWEST):
        logger.info(line)
    logger.warning("cohort %s: %s", request.cohort, COHORTS[request.cohort])


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


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
