"""The command from_long: a table with one value a row, and a table of labels."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medgemma_clinical.data.database.connection import Database, open_database
from medgemma_clinical.data.database.flags import flag, usable_cores
from medgemma_clinical.data.database.output import Made, describe_origin
from medgemma_clinical.data.database.table_files import (
    NUMBER_OR_EMPTY,
    WORD,
    WORD_OR_EMPTY,
    Column,
    TableFile,
    load_table,
    open_table,
    quoted,
    readable,
)
from medgemma_clinical.data.description import join_names, list_columns
from medgemma_clinical.data.small_cells import FEWEST, count_text
from medgemma_clinical.data.sources.events import (
    CodedSeries,
    EventRequest,
    check_title,
    cut_windows,
    make_rows,
    match_sql,
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

LABEL_ROLES = {name: (name,) for name in ("subject_id", "prediction_time", "label")}
OPTIONAL = ("unit", "storetime")

MICROSECONDS = {"minutes": 60_000_000, "hours": 3_600_000_000, "days": 86_400_000_000}
MOST_SERIES = 100
ADVICE = "correct the cell"


@dataclass(frozen=True, kw_only=True)
class LongRequest(EventRequest):
    """The flags of from_long.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    table: Path = flag("one value a row: CSV, CSV in gzip or Parquet")
    labels: Path = flag("subject_id, prediction_time and label: CSV, CSV in gzip or Parquet")
    columns: tuple[str, ...] = flag("names of columns: subject_id=patient,...", (), separated=True)
    time_unit: str = flag(
        "minutes, hours or days of numeric times", "", choices=tuple(MICROSECONDS)
    )
    equal_times: str = flag(
        "of values at one time: keep, last or mean", "keep", choices=("keep", "last", "mean")
    )
    factor: tuple[str, ...] = flag(
        "'ITEM:UNIT=NUMBER' multiplies values in UNIT", (), repeated=True
    )

    def mapped(self) -> dict[str, str]:
        """Return the columns that are named by their role.

        Raises:
            InputError: no such role.
        """
        found = {}
        for text in self.columns:
            role, _, name = map(str.strip, text.partition("="))
            if role not in {*ROLES, *LABEL_ROLES} or not name:
                roles = ", ".join({**ROLES, **LABEL_ROLES})
                raise InputError(f"--columns {text}: write ROLE=COLUMN, a role of {roles}")
            found[role] = name
        return found

    def factors(self) -> dict[tuple[str, str], float]:
        """Return the factor of each item and unit.

        Raises:
            InputError: a value of another form.
        """
        found = {}
        for text in self.factor:
            item_unit, _, number = text.rpartition("=")
            item, colon, unit = item_unit.rpartition(":")
            try:
                factor = float(number)
            except ValueError:
                factor = math.nan
            if not colon or not math.isfinite(factor):
                raise InputError(f"--factor {text}: write 'ITEM:UNIT=NUMBER'")
            found[item.strip(), unit.strip()] = factor
        return found


def make_long(request: LongRequest) -> Made:
    """Return the rows of the DKA format, and their description.

    Raises:
        InputError: the tables or flags cannot be used.
    """
    wanted = parse_series("series", request.series, code_needed=False)
    mapped, factors = request.mapped(), request.factors()
    threads = request.threads or usable_cores()
    with open_database(request.out.parent, request.memory_limit, threads) as database:
        table = open_table(database, request.table, {}, "")
        labels = open_table(database, request.labels, {}, "")
        names = find_columns(table, ROLES, mapped)
        load_labels(database, labels, find_columns(labels, LABEL_ROLES, mapped), request)
        load_values(database, table, names, wanted, request)
        name_items(database, table, names, wanted)
        units = convert_units(database, factors, request)
        counts = count_left_out(database, table)
        cut_windows(database, request, request.equal_times)
        series = [
            dataclasses.replace(each, unit=units.get(each.name, each.unit)) for each in wanted
        ]
        series = series or list_items(database, table, units)
        known = "values that were stored by then" if "storetime" in names else "values"
        rows, description = make_rows(database, request, series, known)
    hashes = {request.table.name: table.sha256, f"labels/{request.labels.name}": labels.sha256}
    origin = describe_origin(request, "from_long", hashes)
    return rows, {**description, "values": counts, **origin}


# --------------------------------------------------------------------------- columns


def find_columns(
    file: TableFile, roles: Mapping[str, Sequence[str]], mapped: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role that a file has.

    Raises:
        InputError: one is missing; names those that are nearest.
    """
    found = {}
    for role, usual in roles.items():
        names = [mapped[role]] if role in mapped else list(usual)
        if roles is LABEL_ROLES:  # whose name of the subject may differ from the table's
            names += usual
        there = [name for name in names if name in file.header]
        if there:
            found[role] = there[0]
        elif role not in OPTIONAL or role in mapped:
            near = nearest(names, file.header)
            hint = f"did you mean --columns {role}={near}? " if near else ""
            problem = f"no column {' or '.join(dict.fromkeys(names))}"
            raise InputError(f"{file.path}: {problem}: {hint}{list_columns(file.header)}")
    return found


def nearest(names: Sequence[str], header: Sequence[str]) -> str:
    """Return the column whose name is nearest to some name, empty where none is near."""
    small = {column.lower(): column for column in header}
    for name in names:
        for near in difflib.get_close_matches(name.lower(), small, 1, 0.5):
            return small[near]
    return ""


# --------------------------------------------------------------------------- tables


def time_column(request: LongRequest, *, may_be_empty: bool = False) -> Column:
    """Return how times are read."""
    return Column("number" if request.time_unit else "instant", may_be_empty=may_be_empty)


def as_time(cell: str, request: LongRequest) -> str:
    """Return SQL for a time: a number counts from an arbitrary day."""
    if not request.time_unit:
        return cell
    return f"make_timestamp(TRY_CAST(round({cell} * {MICROSECONDS[request.time_unit]}) AS BIGINT))"


def load(
    database: Database,
    file: TableFile,
    columns: dict[str, Column],
    time: str,
    request: LongRequest,
    keep: str = "true",
) -> None:
    """Make the table ``loaded``, whose times are times.

    Raises:
        InputError: a wrong cell, by its place.
    """
    file.check_columns(columns, "")
    load_table(database, "loaded", file, columns, keep, ADVICE)
    (wrong,) = database.row(
        f"SELECT count(*) FROM loaded WHERE {as_time(quoted(time), request)} IS NULL"
    )
    if wrong:
        raise InputError(f"{file.path}, column {time}: a time that is no finite number: {ADVICE}")


def load_labels(
    database: Database, file: TableFile, names: dict[str, str], request: LongRequest
) -> None:
    """Make the table ``label``.

    Raises:
        InputError: labels that are not 0 or 1, or that are given twice.
    """
    subject, time, label = names["subject_id"], names["prediction_time"], names["label"]
    answer = Column("label", may_be_empty=True)
    columns = {subject: WORD, time: time_column(request), label: answer}
    load(database, file, columns, time, request)
    cell = quoted(time)
    shown = f"plain({cell})" if request.time_unit else f"replace({cell}::VARCHAR, ' ', 'T')"
    database.run(
        f"CREATE TABLE label AS SELECT {quoted(subject)} AS subject, "
        f"{as_time(cell, request)} AS prediction_time, {shown} AS shown, {quoted(label)} AS label "
        "FROM loaded; DROP TABLE loaded"
    )


def load_values(
    database: Database,
    file: TableFile,
    names: dict[str, str],
    wanted: Sequence[CodedSeries],
    request: LongRequest,
) -> None:
    """Make the view ``record``: values of subjects with a label, of items that are asked for."""
    if request.equal_times == "last" and "storetime" not in names:
        raise InputError("--equal_times last: needs a column storetime: --columns storetime=NAME")
    forms = {
        "subject_id": WORD,
        "item": WORD,
        "time": time_column(request),
        "value": NUMBER_OR_EMPTY,
        "unit": WORD_OR_EMPTY,
        "storetime": time_column(request, may_be_empty=True),
    }
    columns = {names[role]: form for role, form in forms.items() if role in names}
    subject, item = (WORD.typed(file.raw(names[role])) for role in ("subject_id", "item"))
    keep = f"{subject} IN (SELECT subject FROM label)"
    if wanted:
        keep += f" AND {match_sql(item, [code for each in wanted for code in each.codes])}"
    load(database, file, columns, names["time"], request, keep)
    cells = {role: quoted(name) for role, name in names.items()}
    known = as_time(cells.get("storetime", cells["time"]), request)
    database.run(
        f"CREATE VIEW record AS SELECT {cells['subject_id']} AS subject, {cells['item']} AS code, "
        f"{as_time(cells['time'], request)} AS time, {known} AS known, "
        f"CASE WHEN isfinite({cells['value']}) THEN {cells['value']} END AS value, "
        f"{cells.get('unit', 'NULL::VARCHAR')} AS unit FROM loaded"
    )
    if "storetime" not in names:
        logger.warning("%s: no storetime: values count as known when measured", file.path)


# --------------------------------------------------------------------------- items


def name_items(
    database: Database, file: TableFile, names: dict[str, str], wanted: Sequence[CodedSeries]
) -> None:
    """Make the table ``named``: the series of each item, which is its own if none is wanted."""

    def known() -> list[str]:
        item = WORD.typed(file.raw(names["item"]))
        with readable(file.path):
            return [*database.frame(f"SELECT DISTINCT {item} AS item FROM {file.rows()}")["item"]]

    items = database.frame("SELECT DISTINCT code FROM record ORDER BY code")["code"]
    wanted = wanted or [CodedSeries(code, "", (code,)) for code in items]
    name_codes(database, {"series": wanted}, known)


def convert_units(
    database: Database, factors: Mapping[tuple[str, str], float], request: LongRequest
) -> dict[str, str]:
    """Make the table ``factor`` (code, unit, factor), and return the unit of each series.

    Raises:
        InputError: values of a series have two units, or another than it is given.
    """
    database.run("CREATE TABLE factor (code VARCHAR, unit VARCHAR, factor DOUBLE)")
    for (code, unit), factor in factors.items():
        values = {"code": code, "unit": unit, "factor": factor}
        database.run("INSERT INTO factor VALUES ($code, $unit, $factor)", values)
    found = database.frame(
        "SELECT name, record.code, record.unit, factor, any_value(named.unit) AS given "
        "FROM record JOIN named USING (code) "
        "LEFT JOIN factor ON record.code = factor.code AND record.unit = factor.unit "
        "WHERE value IS NOT NULL AND record.unit IS NOT NULL "
        "GROUP BY name, record.code, record.unit, factor "
        "ORDER BY name, record.unit = '', count(*) DESC, record.code, record.unit"
    )
    used = set(zip(found["code"], found["unit"], strict=True))
    for code, unit in factors:
        if (code, unit) not in used:
            raise InputError(f"--factor '{code}:{unit}=': no value has this item and this unit")
    units: dict[str, str] = {}
    for name, code, unit, _, given in found[found["factor"].isna()].itertuples(index=False):
        kept = units.setdefault(name, given or unit)
        if unit != kept:
            other = unit or "no unit"
            raise InputError(
                f"{request.table}: {name} has values in {kept} and in {other}: give --factor "
                f"'{code}:{unit}=NUMBER', the number that turns {other} into {kept}"
            )
    return units


def count_left_out(database: Database, file: TableFile) -> dict[str, int]:
    """Count and log the values that are left out or converted."""
    empty, unknown, converted = database.row(
        "SELECT count(*) FILTER (value IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND known IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND factor IS NOT NULL) "
        "FROM record JOIN named USING (code) "
        "LEFT JOIN factor ON record.code = factor.code AND record.unit = factor.unit"
    )
    counts = {"without a number": empty, "never stored": unknown, "converted": converted}
    for what, count in counts.items():
        if count:
            logger.info("%s: %s values %s", file.path, count_text(count, FEWEST), what)
    return counts


def list_items(database: Database, file: TableFile, units: Mapping[str, str]) -> list[CodedSeries]:
    """Return all items as series, the one with most values in the windows first.

    Raises:
        InputError: there are too many, or one has no name that a series may have.
    """
    found = database.frame(
        "SELECT series FROM trajectory GROUP BY series ORDER BY sum(observations) DESC, series"
    )
    series = [CodedSeries(name, units.get(name, ""), (name,)) for name in found["series"]]
    if not 1 <= len(series) <= MOST_SERIES:
        problem = f"{len(series):,} items have values in the windows, and 1 to {MOST_SERIES} may be"
        raise InputError(f"{file.path}: {problem}: choose by --series")
    for each in series:
        check_title(f"{file.path}, item {each.title}", each)
    logger.info("series: %s", join_names([each.title for each in series]))
    return series
