"""Columns of a DKA file: those that are read, and those that look as if they should be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import pandas as pd

from medgemma_clinical.data.dka.description import (
    LABEL,
    LEAST_LIKENESS,
    LONGEST_NAME,
    MAIN_COLUMN,
    list_columns,
    list_unread,
    seems_cell,
)
from medgemma_clinical.data.dka.facts import HOURS, STATIC
from medgemma_clinical.data.dka.series_cells import CELL
from medgemma_clinical.data.tables import column_text
from medgemma_clinical.files import InputError

PATIENT = "subject_id"

COLUMNS = (MAIN_COLUMN, PATIENT, "id", "clinical_context", HOURS, "split")
"""Columns of the format beside the label and those of further series and of facts."""

ALIASES = {
    MAIN_COLUMN: {"trajectory", "trajectories", "series", "timeseries"},
    LABEL: {"label", "labels", "outcome", "target", "event", "y"},
    PATIENT: {
        *("pid", "id", "patid", "patnr", "uniquepid", "recordid", "studyid", "caseid"),
        *("hadmid", "admissionid", "stayid", "icustayid", "encounter", "encounterid", "visitid"),
    },
    "clinical_context": {"context", "clinicalnote", "clinicaltext", "note", "notes", "text"},
}
"""Other names of columns, as ``_squeeze`` writes them. Sources: MIMIC-IV, eICU, OMOP, REDCap."""

PATIENT_WORDS = re.compile("mrn|(?<!in)(?<!out)patient|subject|person|participant")
"""Words in the name of a column of patients, such as ``MRN_hash``."""

ATTRIBUTES = (
    *("age", "sex", "gender", "race", "weight", "height", "type", "class", "status", "group"),
    *("count", "patients", "subjects", "persons", "participants"),
)
"""Endings of columns that say something about a patient, or count patients: ``patient_age``."""

SAMPLE_ROWS = 20
"""Rows by which a column is taken for a series."""

LONG_TABLE = ({"item", "itemid", "code"}, {"value", "valuenum", "numericvalue"})
"""Columns of a table with one row a measurement: one of each set."""


def is_near_miss(name: str, target: str, likeness: float = LEAST_LIKENESS) -> bool:
    """Return whether a column's name seems to mean the column ``target``."""
    word, wanted = _squeeze(name), _squeeze(target)
    if word in ALIASES.get(target, ()) or (target == LABEL and word.startswith("label")):
        return True
    if target == PATIENT and PATIENT_WORDS.search(word) and not word.endswith(ATTRIBUTES):
        return True
    return bool(difflib.get_close_matches(word, [wanted], 1, likeness))


def _squeeze(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name[:LONGEST_NAME].lower())


def is_made(name: str) -> bool:
    """Return whether our commands write a column of this name that the data set does not read."""
    return name in ("hadm_id", "prediction_time") or name.startswith("label_")


def describe_missing(table: pd.DataFrame, target: str) -> str:
    """Return what to do about a column that is missing: near misses, then all columns."""
    columns = [str(name) for name in table]
    there = list_columns(columns)
    if any(map(seems_cell, columns)):
        return there
    near = [name for name in columns if is_near_miss(name, target)]
    if target == MAIN_COLUMN:
        near = near or _series_columns(table, columns)
        words = {_squeeze(name) for name in columns}
        if not near and all(words & kind for kind in LONG_TABLE):
            return f"a table of one value a row is converted by from_long; {there}"
    if not near:
        return there
    asked = f"did you mean {list_unread(near)}?"
    if target not in ALIASES:  # a label that the user has named
        return f"{asked} {there}"
    return f"{asked} rename it to {target}{_by_flag(near, target)}; {there}"


def _by_flag(near: Sequence[str], target: str) -> str:
    return f", or give --label_column {list_unread(near[:1])}" if target == LABEL else ""


def describe_unread(table: pd.DataFrame, unread: Sequence[str], absent: Sequence[str]) -> list[str]:
    """Return a warning of each kind of column that seems to be left unread by mistake.

    Args:
        table: as read.
        unread: its columns that are not read.
        absent: columns of the format that the table lacks.
    """
    rest = [name for name in unread if not seems_cell(name)]
    warnings = []
    for target in absent:
        if near := [name for name in rest if is_near_miss(name, target)]:
            meant = f"did you mean {target}? rename it{_by_flag(near, target)}"
            warnings.append(f"not read: column {list_unread(near)}: {meant}")
            rest = [name for name in rest if name not in near]
    if static := [name for name in rest if re.match("static[_ -]", name, re.IGNORECASE)]:
        shown = list_unread(static)
        warnings.append(f"not read: column {shown}: static features begin with {STATIC}: rename it")
    if series := _series_columns(table, rest):
        names = list_unread([f"trajectory_{name}" for name in series])
        meant = f"the cells look like series: rename to {names}"
        warnings.append(f"not read: column {list_unread(series)}: {meant}")
    return warnings


def _series_columns(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return those columns whose first cells all are series."""
    found = []
    for k, name in enumerate(map(str, table.columns)):
        if name in names and not name.lower().startswith("trajectory"):
            cells = [c for c in table.iloc[:SAMPLE_ROWS, k] if isinstance(c, str) and c.strip()]
            if cells and all(map(CELL.fullmatch, cells)):
                found.append(name)
    return found


def patient_column(table: pd.DataFrame) -> str | None:
    """Return the column that seems to name the patients of a table without ``subject_id``.

    Of several the one with the fewest values: that of the patient, not of the stay. A column of one
    value alone names the study.
    """
    names = [n for n in map(str, table) if n not in (PATIENT, "id") and not n.startswith(STATIC)]
    if PATIENT in table or table.columns.duplicated().any():
        return None
    near = [name for name in names if not seems_cell(name) and is_near_miss(name, PATIENT)]
    values = {name: table[name].nunique() for name in near}
    return min((name for name in near if values[name] > 1), key=values.__getitem__, default=None)


def check_header(table: pd.DataFrame, source: str, label: str, *, labelled: bool) -> None:
    """Refuse a table that lacks a column or has one twice.

    Args:
        table: as read.
        source: named in errors.
        label: column of the labels.
        labelled: whether the table needs it.

    Raises:
        InputError: names the column, near misses and all columns that are there.
    """
    for name in (MAIN_COLUMN, label) if labelled else (MAIN_COLUMN,):
        if name not in table:
            advice = describe_missing(table, name)
            raise InputError(f"{source}, row 1, column {name}: no such column: {advice}")
    if label.startswith(STATIC):
        raise InputError(
            f"{source}, row 1, column {label}: begins with {STATIC}, so it is a static feature "
            "that models read, and cannot be the label: rename it"
        )
    for name in map(str, table.columns[table.columns.duplicated()]):
        if name in (*COLUMNS, label) or name.startswith(STATIC):
            raise InputError(f"{source}, row 1, column {name}: appears twice: remove one")


def patients_of(table: pd.DataFrame) -> pd.Series:
    """Return the patient of each row: subject_id, or id, or the row's number."""
    for name in ("subject_id", "id"):
        if name in table:
            return column_text(table, name)
    return pd.Series(table.index.astype(str), index=table.index)


def ids_of(table: pd.DataFrame, patients: pd.Series) -> pd.Series:
    """Return the name of each row in prediction files: id, or its patient, from ``patients_of``."""
    return column_text(table, "id") if "id" in table else patients
