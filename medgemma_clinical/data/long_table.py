"""The command from_long: a table with one value a row, and a table of labels."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka import comparable, join_names
from medgemma_clinical.data.duck import (
    MICROSECONDS,
    NUMBER_OR_EMPTY,
    WORD,
    WORD_OR_EMPTY,
    Column,
    Database,
    TableFile,
    describe_origin,
    load_table,
    open_database,
    open_table,
    quoted,
)
from medgemma_clinical.data.events import (
    SUBJECT,
    EventRequest,
    add_windows,
    load_events,
    make_feature,
    make_rows,
    make_trajectories,
    name_codes,
    parse_features,
)
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

ROLES = {
    "subject_id": ("subject_id",),
    "time": ("time", "charttime"),
    "item": ("item", "itemid", "code"),
    "value": ("valuenum", "value"),  # beside a number, MIMIC's value is a text
    "unit": ("unit", "valueuom"),
    "storetime": ("storetime",),
}
"""Columns of a table by what they hold, and their usual names."""

LABEL_ROLES = {
    "labels.subject_id": ("subject_id",),
    "prediction_time": ("prediction_time",),
    "label": ("label", "label_escalation"),
}
OPTIONAL = ("unit", "storetime")
MIN_LIKENESS = 0.7  # of the name of a column and a usual one, to ask whether it is meant
MAX_SERIES = 100
LABEL = Column("label", may_be_empty=True)


@dataclass(frozen=True, kw_only=True)
class LongRequest(EventRequest):
    """The flags of from_long."""

    table: Path
    columns: tuple[str, ...]
    time_unit: str
    equal_times: str
    factor: tuple[str, ...]

    def mapped(self) -> dict[str, str]:
        """Return the columns that are named by their role, empty where there is none."""
        found: dict[str, str] = {}
        for text in self.columns:
            role, _, name = map(str.strip, text.partition("="))
            if role not in {*ROLES, *LABEL_ROLES} or not (name or role in OPTIONAL):
                roles = ", ".join({**ROLES, **LABEL_ROLES})
                raise InputError(f"--columns {text}: write ROLE=COLUMN, a role of {roles}")
            found[role] = name
        return found

    def factors(self) -> dict[tuple[str, str], float]:
        """Return the factor of each item and unit."""
        found: dict[tuple[str, str], float] = {}
        for text in self.factor:
            item_unit, _, number = text.rpartition("=")
            item, colon, unit = map(str.strip, item_unit.rpartition(":"))
            try:
                factor = float(number)
            except ValueError:
                factor = math.nan
            if not colon or not 0 < factor < math.inf:
                raise InputError(f"--factor {text}: write 'ITEM:UNIT=NUMBER', a number above 0")
            found[item, unit] = factor
        return found


def make_long(request: LongRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description."""
    wanted = parse_features("series", request.series, code_needed=False)
    mapped, factors = request.mapped(), request.factors()
    with open_database(request.out, request.memory_limit, request.threads) as database:
        table = open_table(database, request.table, {})
        labels = open_table(database, request.labels, {})
        names = find_columns(table, ROLES, mapped)
        if request.equal_times == "last" and "storetime" not in names:
            raise InputError("--equal_times last: needs a column storetime")
        load_labels(database, labels, mapped, request)
        time = request.time_unit or "instant"
        roles = {
            "subject_id": SUBJECT,
            "item": WORD,
            "time": Column(time),
            "value": NUMBER_OR_EMPTY,
            "unit": WORD_OR_EMPTY,
            "storetime": Column(time, may_be_empty=True),
        }
        codes = [code for each in wanted for code in each.keys]
        columns = {names[role]: column for role, column in roles.items() if role in names}
        load_events(database, [table], names, columns, codes, factors=factors)
        name_codes(database, {"series": wanted or find_items(database)})
        units = convert_units(database, factors, request.table)
        trajectories = make_trajectories(database, request, request.equal_times)
        series = [replace(each, unit=units.get(each.name, each.unit)) for each in wanted]
        series = series or list_items(trajectories, request.table, units)
        usable = "values that were stored by then" if "storetime" in names else "values"
        rows, description = make_rows(database, request, series, trajectories, usable)
        counts = count_left_out(database, request.table)
    if not wanted:
        logger.info("series: %s", join_names([each.title for each in series]))
    if "storetime" not in names:
        logger.warning("warning: %s: no storetime: values count as known when measured", table.path)
    hashes = {request.table.name: table.sha256, f"labels/{request.labels.name}": labels.sha256}
    description["values"] = counts
    return rows, description | describe_origin(request, "from_long", hashes)


# ---------------------------------------------------------------------------- tables


def find_columns(
    file: TableFile, roles: Mapping[str, Sequence[str]], mapped: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role that a file has; ask where another one may be meant."""
    wanted = {role: (mapped[role],) if role in mapped else names for role, names in roles.items()}
    there = {role: [n for n in names if n in file.header] for role, names in wanted.items()}
    found = {role: names[0] for role, names in there.items() if names}
    usual = {name for names in roles.values() for name in names}
    others = {n.lower(): n for n in file.header if n not in {*found.values(), *usual}}
    for role in [role for role in roles if role not in found]:
        near = [
            close
            for name in wanted[role]
            for close in difflib.get_close_matches(name.lower(), others, 1, MIN_LIKENESS)
        ]
        hint = f"did you mean --columns {role}={others[near[0]]}? " if near else ""
        if role in OPTIONAL and not mapped.get(role):
            if role in mapped or not near:
                continue
            hint += f"--columns {role}= says that there is none; "
        problem = f"no column {' or '.join(dict.fromkeys(wanted[role]))}"
        columns = f"the columns are {join_names(file.header)}"
        raise InputError(f"{file.path}: {problem}: {hint}{columns}")
    return found


def load_labels(
    database: Database, file: TableFile, mapped: Mapping[str, str], request: LongRequest
) -> None:
    """Make the table ``label``, and windows of it."""
    usual = (mapped.get("subject_id", "subject_id"), "subject_id")
    names = find_columns(file, {**LABEL_ROLES, "labels.subject_id": usual}, mapped)
    subject, time, label = (names[role] for role in LABEL_ROLES)
    columns = {subject: SUBJECT, time: Column(request.time_unit or "instant"), label: LABEL}
    load_table(database, "answers", file, columns)
    database.run(
        f"CREATE TABLE label AS SELECT {quoted(subject)} AS subject, {quoted(time)} AS "
        f"prediction_time, {quoted(label)} AS label FROM answers"
    )
    add_windows(database, request, MICROSECONDS.get(request.time_unit, 0))


# ---------------------------------------------------------------------------- items


def find_items(database: Database) -> list[Feature]:
    """Return each item as a feature, whatever its case, by its most frequent spelling."""
    spellings: dict[str, list[str]] = {}
    found = "SELECT code FROM record GROUP BY code ORDER BY count(*) DESC, code"
    for (code,) in database.run(found).fetchall():
        spellings.setdefault(comparable(code), []).append(code)
    return [Feature(codes[0], "", tuple(codes)) for codes in spellings.values()]


def convert_units(
    database: Database, factors: Mapping[tuple[str, str], float], path: Path
) -> dict[str, str]:
    """Return the one unit of each feature; refuse two units, and a factor without a use."""
    found = database.run(
        "SELECT name, code, record.unit, converted, any_value(named.unit) AS given "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL AND record.unit IS NOT NULL "
        "GROUP BY name, code, record.unit, converted "
        "ORDER BY name, converted, record.unit = '', count(*) DESC, code, record.unit"
    ).fetchall()
    for item, unit in factors:
        there = [own_unit for _, code, own_unit, *_ in found if code == item]
        if unit not in there:
            listed = join_names([each or "no unit" for each in there]) or "no value of it"
            problem = f"no value in a window has this item and this unit: there is {listed}"
            raise InputError(f"--factor '{item}:{unit}=': {problem}")
    units: dict[str, str] = {}
    for name, code, unit, converted, given in found:
        if converted and not (given or name in units):
            problem = "all values are converted: give the unit"
            raise InputError(f"{path}: {problem} by --series '{name} [unit]'")
        kept = units.setdefault(name, given or unit)
        if converted and unit == kept:
            raise InputError(f"--factor '{code}:{unit}=': {name} is in this unit already")
        if not converted and unit != kept:
            problem = f"{name} has values in {kept} and in {unit or 'no unit'}"
            raise InputError(f"{path}: {problem}: convert them by --factor '{code}:{unit}=NUMBER'")
    return units


def count_left_out(database: Database, path: Path) -> dict[str, int]:
    """Count and log the values in the windows that are left out or converted."""
    counts = database.row(
        "SELECT count(*) FILTER (value IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND known IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND converted) FROM record JOIN named USING (code)"
    )
    found = dict(zip(("without a number", "never stored", "converted"), counts, strict=True))
    for what, count in found.items():
        if count:
            logger.info("%s: %d values %s", path, count, what)
    return found


def list_items(trajectories: pd.DataFrame, path: Path, units: Mapping[str, str]) -> list[Feature]:
    """Return all items as features, the one with most values in the windows first."""
    totals = trajectories.groupby("series")["observations"].sum()
    names = totals.sort_values(ascending=False, kind="stable").index
    if not 1 <= len(names) <= MAX_SERIES:
        problem = f"{len(names):,} items have values in the windows, and 1 to {MAX_SERIES} may be"
        raise InputError(f"{path}: {problem}: choose by --series")
    named = [(name, units.get(name, "")) for name in names]
    # With a unit always, since a bracket in the name of an item is none.
    items = [make_feature(f"{path}, item {n}", f"{n} [{unit or '-'}]", n) for n, unit in named]
    return [replace(item, unit=unit) for item, (_, unit) in zip(items, named, strict=True)]
