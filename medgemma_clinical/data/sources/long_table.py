"""The command from_long: a table with one value a row, and a table of labels."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka.columns import is_near_miss
from medgemma_clinical.data.dka.description import comparable, join_names, list_columns
from medgemma_clinical.data.duck import (
    MICROSECONDS,
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
    readable,
)
from medgemma_clinical.data.sources.events import (
    SUBJECT,
    CodedSeries,
    EventRequest,
    add_windows,
    check_labels,
    check_subjects,
    check_title,
    event_filter,
    make_rows,
    make_trajectories,
    name_codes,
    parse_series,
)
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

LEAST_LIKENESS = 0.7
"""Of the name of a column and a usual one, so that an error asks whether it is meant."""

MOST_SERIES = 100
LABEL = Column("label", may_be_empty=True, advice="write 0, 1, or nothing where it is not known")
NUMBER = Column(
    "number",
    may_be_empty=True,
    advice="of 'below a limit' write half of it, or leave the cell empty",
)


@dataclass(frozen=True, kw_only=True)
class LongRequest(EventRequest):
    """A request for rows from a table with one value a row."""

    table: Path
    columns: tuple[str, ...]
    time_unit: str
    equal_times: str
    factor: tuple[str, ...]

    def mapped(self) -> dict[str, str]:
        """Return the columns that are named by their role, empty where there is none.

        Raises:
            InputError: no such role, or a role twice.
        """
        found: dict[str, str] = {}
        for text in self.columns:
            role, _, name = map(str.strip, text.partition("="))
            if role not in {*ROLES, *LABEL_ROLES} or not (name or role in OPTIONAL):
                roles = ", ".join({**ROLES, **LABEL_ROLES})
                raise InputError(f"--columns {text}: write ROLE=COLUMN, a role of {roles}")
            if role in found:
                raise InputError(f"--columns {text}: {role} appears twice: give one column")
            found[role] = name
        return found

    def factors(self) -> dict[tuple[str, str], float]:
        """Return the factor of each item and unit.

        Raises:
            InputError: a value of another form, or an item and unit twice.
        """
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
            if (item, unit) in found:
                raise InputError(f"--factor {text}: {item}:{unit} appears twice: give one number")
            found[item, unit] = factor
        return found

    def time(self, *, may_be_empty: bool = False) -> Column:
        """Return the column of a time."""
        advice = "write the local time of one zone, or give --time_unit for numbers"
        if self.time_unit:
            advice = f"write a number of {self.time_unit}, or leave --time_unit out"
        return Column(self.time_unit or "instant", may_be_empty=may_be_empty, advice=advice)


def make_long(request: LongRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description.

    Raises:
        InputError: the tables or flags cannot be used.
    """
    wanted = parse_series("series", request.series, code_needed=False)
    mapped, factors = request.mapped(), request.factors()
    with open_database(request.out, request.memory_limit, request.threads) as database:
        table = open_table(database, request.table, {}, "")
        labels = open_table(database, request.labels, {}, "")
        names = find_columns(table, ROLES, mapped)
        load_labels(database, labels, mapped, request)
        load_values(database, table, names, wanted, request)
        problem = "no subject of --labels has a value in --table: are they named alike?"
        check_subjects(database, [table], names["subject_id"], problem)
        name_items(database, table, names, wanted)
        units = convert_units(database, factors, request)
        trajectories = make_trajectories(database, request, request.equal_times)
        series = [
            dataclasses.replace(each, unit=units.get(each.name, each.unit)) for each in wanted
        ]
        series = series or list_items(trajectories, table, units)
        usable = "values that were stored by then" if "storetime" in names else "values"
        rows, description = make_rows(database, request, series, trajectories, usable)
        counts = count_left_out(database, table)
    if not wanted:
        logger.info("series: %s", join_names([each.title for each in series]))
    if "storetime" not in names:
        logger.warning("warning: %s: no storetime: values count as known when measured", table.path)
    hashes = {request.table.name: table.sha256, f"labels/{request.labels.name}": labels.sha256}
    origin = describe_origin(request, "from_long", hashes)
    return rows, {**description, "values": counts, **origin}


# --------------------------------------------------------------------------- tables


def find_columns(
    file: TableFile, roles: Mapping[str, Sequence[str]], mapped: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role that a file has.

    Raises:
        InputError: one is missing, with those that may be meant, or one has two roles.
    """
    wanted = {role: (mapped[role],) if role in mapped else names for role, names in roles.items()}
    there = {role: [n for n in names if n in file.header] for role, names in wanted.items()}
    found = {role: names[0] for role, names in there.items() if names}
    for role in roles.keys() - found.keys():
        usual = {name for other in roles.keys() - {role} for name in roles[other]}
        near = [
            column
            for column in file.header
            if column not in {*found.values(), *usual}
            and any(is_near_miss(column, name, LEAST_LIKENESS) for name in wanted[role])
        ]
        hint = f"did you mean --columns {role}={near[0]}? " if near else ""
        if role in OPTIONAL and not mapped.get(role):
            if role in mapped or not near:
                continue
            hint += f"--columns {role}= says that there is none; "
        problem = f"no column {' or '.join(dict.fromkeys(wanted[role]))}"
        raise InputError(f"{file.path}: {problem}: {hint}{list_columns(file.header)}")
    for name in found.values():
        if list(found.values()).count(name) > 1:
            both = " and ".join(role for role in found if found[role] == name)
            raise InputError(
                f"{file.path}: the column {name} is both {both}: name one by --columns"
            )
    return found


def load_labels(
    database: Database, file: TableFile, mapped: Mapping[str, str], request: LongRequest
) -> None:
    """Make the table ``label``, and windows of it.

    Raises:
        InputError: labels that are not 0 or 1, or that are given twice.
    """
    usual = (mapped.get("subject_id", "subject_id"), "subject_id")
    names = find_columns(file, {**LABEL_ROLES, "labels.subject_id": usual}, mapped)
    subject, time = names["labels.subject_id"], names["prediction_time"]
    columns = {subject: SUBJECT, time: request.time(), names["label"]: LABEL}
    file.check_columns(columns, "")
    load_table(database, "answers", file, columns)
    shown = f"replace({quoted(time)}::VARCHAR, ' ', 'T')"
    if request.time_unit:
        shown = f"plain(epoch_us({quoted(time)}) / {MICROSECONDS[request.time_unit]})"
    database.run(
        f"CREATE TABLE label AS SELECT {quoted(subject)} AS subject, {quoted(time)} AS "
        f"prediction_time, {shown} AS shown, {quoted(names['label'])} AS label FROM answers"
    )
    check_labels(database, file)
    add_windows(database, request)


def load_values(
    database: Database,
    file: TableFile,
    names: dict[str, str],
    wanted: Sequence[CodedSeries],
    request: LongRequest,
) -> None:
    """Make the view ``record``: values of wanted items in the windows, in one unit a series."""
    if request.equal_times == "last" and "storetime" not in names:
        raise InputError("--equal_times last: needs a column storetime: --columns storetime=NAME")
    forms = {
        "subject_id": SUBJECT,
        "item": dataclasses.replace(WORD, advice="name the item"),
        "time": request.time(),
        "value": NUMBER,
        "unit": WORD_OR_EMPTY,
        "storetime": request.time(may_be_empty=True),
    }
    columns = {names[role]: form for role, form in forms.items() if role in names}
    file.check_columns(columns, "")
    subject, item, time = (
        forms[role].typed(file.raw(names[role])) for role in ("subject_id", "item", "time")
    )
    codes = [code for each in wanted for code in each.codes]
    kept = event_filter(subject, item, time, codes)
    keys = (names["subject_id"], names["item"])
    load_table(database, "measured", file, columns, **kept, keys=keys)
    factors = [(code, unit, number) for (code, unit), number in request.factors().items()]
    database.add("factors", pd.DataFrame(factors, columns=["code", "unit", "factor"]))
    cells = {role: f"measured.{quoted(name)}" for role, name in names.items()}
    unit, value = cells.get("unit", "NULL::VARCHAR"), cells["value"]
    database.run(
        f"CREATE VIEW record AS SELECT {cells['subject_id']} AS subject, {cells['item']} AS code, "
        f"{cells['time']} AS time, {cells.get('storetime', cells['time'])} AS known, "
        f"CASE WHEN isfinite({value}) THEN coalesce(tidy({value} * factor), {value}) END AS value, "
        f"{unit} AS unit, factor IS NOT NULL AS converted FROM measured LEFT JOIN factors "
        f"ON factors.code::VARCHAR = {cells['item']} AND factors.unit::VARCHAR = {unit}"
    )


# --------------------------------------------------------------------------- items


def name_items(
    database: Database, file: TableFile, names: dict[str, str], wanted: Sequence[CodedSeries]
) -> None:
    """Make the table ``named``; without a wanted series each item is one, whatever its case."""

    def list_codes() -> list[str]:
        item = WORD.typed(file.raw(names["item"]))
        with readable(file.path):
            return [*database.frame(f"SELECT DISTINCT {item} AS item FROM {file.rows()}")["item"]]

    if not wanted:
        spellings: dict[str, list[str]] = {}
        found = "SELECT code FROM record GROUP BY code ORDER BY count(*) DESC, code"
        for code in database.frame(found)["code"]:
            spellings.setdefault(comparable(code), []).append(code)
        wanted = [CodedSeries(codes[0], "", tuple(codes)) for codes in spellings.values()]
    name_codes(database, {"series": wanted}, list_codes)


def convert_units(
    database: Database, factors: Mapping[tuple[str, str], float], request: LongRequest
) -> dict[str, str]:
    """Return the one unit of each series.

    Raises:
        InputError: values of a series have two units, another than it is given, or after their
            conversion none that is known; or a factor converts nothing.
    """
    found = database.frame(
        "SELECT name, code, record.unit, converted, any_value(named.unit) AS given "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL AND record.unit IS NOT NULL "
        "GROUP BY name, code, record.unit, converted "
        "ORDER BY name, converted, record.unit = '', count(*) DESC, code, record.unit"
    )
    for code, unit in factors:
        there = found.loc[found["code"] == code, "unit"].tolist()
        if unit not in there:
            listed = join_names(sorted(each or "no unit" for each in there)) or "no value of it"
            problem = f"no value in a window has this item and this unit: there is {listed}"
            raise InputError(f"--factor '{code}:{unit}=': {problem}")
    units: dict[str, str] = {}
    for name, code, unit, converted, given in found.itertuples(index=False):
        if converted and not (given or name in units):
            problem = f"all values of {name} are converted: give its unit by"
            raise InputError(f"{request.table}: {problem} --series '{name} [unit]'")
        kept = units.setdefault(name, given or unit)
        if converted and unit == kept:
            problem = f"{name} is to have this unit: leave the factor out"
            raise InputError(f"--factor '{code}:{unit}=': {problem}")
        if not converted and unit != kept:
            other = unit or "no unit"
            raise InputError(
                f"{request.table}: {name} has values in {kept} and in {other}: give --factor "
                f"'{code}:{unit}=NUMBER', the number that turns {other} into {kept}"
            )
    return units


def count_left_out(database: Database, file: TableFile) -> dict[str, int]:
    """Count and log the values in the windows that are left out or converted."""
    counts = database.frame(
        'SELECT count(*) FILTER (value IS NULL) AS "without a number", '
        'count(*) FILTER (value IS NOT NULL AND known IS NULL) AS "never stored", '
        'count(*) FILTER (value IS NOT NULL AND converted) AS "converted" '
        "FROM record JOIN named USING (code)"
    ).iloc[0]
    for what, count in counts.items():
        if count:
            logger.info("%s: %d values %s", file.path, count, what)
    return {str(what): int(count) for what, count in counts.items()}


def list_items(
    trajectories: pd.DataFrame, file: TableFile, units: Mapping[str, str]
) -> list[CodedSeries]:
    """Return all items as series, the one with most values in the windows first.

    Raises:
        InputError: there are too many, or one has no name that a series may have.
    """
    totals = trajectories.groupby("series")["observations"].sum()
    names = totals.sort_values(ascending=False, kind="stable").index
    series = [CodedSeries(name, units.get(name, ""), (name,)) for name in names]
    if not 1 <= len(series) <= MOST_SERIES:
        problem = f"{len(series):,} items have values in the windows, and 1 to {MOST_SERIES} may be"
        raise InputError(f"{file.path}: {problem}: choose by --series")
    for each in series:
        check_title(f"{file.path}, item {each.title}", each)
    return series
