"""The command from_long: a table with one value a row, and a table of labels."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.analytes import prefix_ratios, unit_ratios
from medgemma_clinical.data.dka import EVENT as EVENT_COLUMN
from medgemma_clinical.data.dka import (
    EVENT_COLUMNS,
    EVENT_HOURS,
    HOURS,
    MAIN_COLUMN,
    MAX_EVENT,
    NO_HEADER,
    STATIC,
    comparable,
    description_path,
    holds_data,
    join_names,
)
from medgemma_clinical.data.dka import LABEL as LABEL_COLUMN
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import duck, events, guesses
from medgemma_clinical.data.importers.notes import NoteText, add_notes, load_notes
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.data.roles import (
    EVENT_ROLES,
    FEMALE,
    HINTS,
    LABEL_ROLES,
    MALE,
    NOTE_ROLES,
    OPTIONAL,
    OTHER_SEX,
    ROLES,
    SEX,
    SEXES,
    SITE_INPUT,
    columns_alike,
    find_column,
    find_roles,
    is_site,
)
from medgemma_clinical.data.texts import NUMBER, plain
from medgemma_clinical.files import InputError, did_you_mean, one_line, read_json

logger = logging.getLogger(__name__)

COMMAND, EVENT, CONTEXT = "from_long", "Event", "clinical_context"
WRITTEN = ("id", "subject_id", "prediction_time", MAIN_COLUMN, HOURS, LABEL_COLUMN)
TIMES = ("prediction_time", "time", "storetime", "event_time", "end_time")
MAX_SERIES, MAX_CATEGORIES, MAX_WORDS, MAX_LETTERS = 100, 20, 10, 30
LABEL = duck.Column("label", may_be_empty=True, advice="--positive WORD names that of 1")
CENSORED = ("", "nan", "none", "censored", "alive", *duck.NO)
LATER = re.compile(r"(.+?)\s*\+\s*(\d+(?:\.\d+)?)\s*(h|d)(?:ours?|ays?)?")
FACTOR = re.compile(rf"(.*):(.*)=\s*({NUMBER})\s*")
NOT_LIKE = {*("table", "labels", "out", "memory_limit", "threads"), "like", "read_as", "no_labels"}
# Columns beside those of a header, of which no name begins with a space.
ZONE, KEPT, ID = " zone of the prediction time", " kept ", " id"
END, CAUSE, LEFT = " end", " cause", " end of the stay"
MICRO = re.compile("\N{MICRO SIGN}|\N{GREEK SMALL LETTER MU}|\\bmc(?=g)")  # written u, too
HOUR = duck.MICROSECONDS["hours"]
SAME = 0.8, 1.25  # ratio of medians within which two units are taken for one
MAX_RATIO, MIN_OF_UNIT, SURE = 5.0, 5, 4.0
"""Medians of a series by unit that differ so many times are refused, each of so many values, where
the difference is so many times what chance makes."""


@dataclass(frozen=True, kw_only=True)
class LongRequest(events.EventRequest):
    """The flags of from_long."""

    table: Path
    columns: tuple[str, ...]
    time_unit: str
    time_format: tuple[str, ...]
    no_labels: bool
    static: tuple[str, ...]
    sex: tuple[str, ...]
    keep: tuple[str, ...]
    outcome_column: tuple[str, ...]
    end_time: str
    event_time: str
    event: str
    event_names: tuple[str, ...]
    interventions: tuple[str, ...]
    context_column: str
    notes: Path | None
    max_note_words: int
    below_limit: str
    bad_values: str
    result_flags: tuple[str, ...]
    decimal: str
    positive: tuple[str, ...]
    encoding: str
    sheet: tuple[str, ...]
    equal_times: str
    factor: tuple[str, ...]
    like: Path | None
    read_as: Mapping[str, Any]  # what an earlier file was found to be: times and static

    def prediction_time_column(self) -> tuple[str, int]:
        """Return the column of --prediction_time, and the microseconds to add to it."""
        match = LATER.fullmatch(self.prediction_time.strip())
        if not match:
            return self.prediction_time.strip(), 0
        return match[1], round(float(match[2]) * HOUR * (24 if match[3] == "d" else 1))

    def mapped(self) -> dict[str, str]:
        """Return the columns that are named by their role, empty where there is none."""
        columns: dict[str, str] = {}
        roles = {**ROLES, **LABEL_ROLES, **NOTE_ROLES}
        begins = "|".join(map(re.escape, roles))
        for text in self.columns:
            for pair in re.split(rf",(?=\s*(?:{begins})\s*=)", text):
                role, _, name = map(str.strip, pair.partition("="))
                if role not in roles or not (name or role in OPTIONAL):
                    problem = f"write ROLE=COLUMN, a role of {', '.join(roles)}"
                    raise InputError(f"--columns {text}: {problem}")
                columns[role] = name
        if self.outcome_column:
            columns.setdefault("label", self.outcome_column[0])
        if self.prediction_time:
            columns["prediction_time"] = self.prediction_time_column()[0]
        for role in ("end_time", *EVENT_ROLES):
            columns |= {role: name} if (name := getattr(self, role)) else {}
        if bool(columns.get("event_time")) != bool(columns.get("event")):
            raise InputError("--event_time, --event: give both: when, and what happened then")
        return columns

    def unread_roles(self) -> set[str]:
        """Return the roles of outcomes that are not read: all of new patients.

        Beside times to events a label is read only where it is named.
        """
        mapped = self.mapped()
        has_events, has_label = bool(mapped.get("event")), "label" in mapped
        unread = set() if has_label or not has_events else {"label"}
        unread |= set() if has_events else {*EVENT_ROLES}
        return {"label", *EVENT_ROLES} if self.no_labels else unread

    def factors(self) -> dict[tuple[str, str], float]:
        """Return the factor of each item and unit."""
        factors: dict[tuple[str, str], float] = {}
        for text in self.factor:
            match = FACTOR.fullmatch(text)
            if not match or not 0 < float(match[3]) < math.inf:
                raise InputError(f"--factor {text}: write 'ITEM:UNIT=NUMBER', a number above 0")
            key = match[1].strip(), match[2].strip()
            key = next((earlier for earlier in factors if alike(earlier, key)), key)
            factors[key] = float(match[3])
        return factors


@dataclass
class Reading:
    """What the tables are taken for, as far as a run came; a preview shows it."""

    guesses: bool = False  # columns of unknown names are guessed from their cells
    files: list[duck.TableFile] = field(default_factory=list)
    columns: list[dict[str, str]] = field(default_factory=list)  # of each file, by what it is
    formats: dict[str, list[str]] = field(default_factory=dict)  # of times that are not in ISO's
    signs: set[str] = field(default_factory=set)  # of decimals: comma or point
    series: list[Feature] = field(default_factory=list)


def read_like(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the flags of an earlier output, unchecked, and ``read_as`` from its description.

    ``path`` may also be the description itself, or the folder of a model with its ``import.json``.
    """
    file = path / "import.json" if path.is_dir() else description_path(path)
    try:
        content = read_json(file)
        arguments = dict(content["arguments"]) if content[duck.MADE_BY].endswith(COMMAND) else {}
        read_as = {
            kind: {str(name): tuple(map(str, texts)) for name, texts in by_name.items()}
            for kind, by_name in arguments.pop("read_as", {}).items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        arguments = {}
    if not arguments:
        raise InputError(f"--like {path}: {file.name} is no description of an output of {COMMAND}")
    flags = {field.name for field in fields(LongRequest)} - NOT_LIKE
    return {k: value for k, value in arguments.items() if k in flags and value != ""}, read_as


def make_long(
    request: LongRequest, reading: Reading | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description; fill ``reading``."""
    reading = reading or Reading()
    chosen_series = events.parse_features("series", request.series, code_needed=False)
    factors = request.factors()
    if request.like and request.out.resolve() == request.like.resolve():
        raise InputError(f"--out {request.out}: --like reads it: choose another name")
    if request.notes is None and any(role.startswith("notes.") for role in request.mapped()):
        logger.warning("warning: --like %s was made with notes: give those of now", request.like)
    with duck.open_database(request.out, request.memory_limit, request.threads) as database:
        database.set(below_limit=request.below_limit, result_flags=[*request.result_flags])
        reading.files = table, labels, *notes = files = open_tables(database, request)
        reading.columns = find_columns(database, files, request, guess=reading.guesses)
        names, label_names, *note_names = map(dict, reading.columns)
        times = find_times(database, labels, label_names, request)
        categories = load_labels(database, labels, label_names, request, times, reading)
        times |= find_times(database, table, names, request)
        for file, roles in zip(notes, note_names, strict=True):
            times |= find_times(database, file, roles, request, "notes.")
        all_names = {**label_names, **names, **(note_names[0] if notes else {})}
        check_zones(times, all_names, files)
        if reading.guesses:
            for file, roles in zip(files, (names, label_names, *note_names), strict=True):
                forms = {role: times[role] for role in roles if role in times}
                used = {r: duck.formats_used(database, file, roles[r], t) for r, t in forms.items()}
                reading.formats |= used
        codes = [code for feature in chosen_series for code in feature.keys]
        repeated = load_values(database, table, names, request, times, codes, reading)
        items = chosen_series or find_items(database)
        events.name_codes(database, {"series": items})
        items = convert_units(database, items, factors, table.path)
        if not chosen_series:
            by_name = [split_title(str(item.keys[0]))[1] for item in items]
            items = [
                replace(x, unit=x.unit or unit) for x, unit in zip(items, by_name, strict=True)
            ]
        check_medians(database, table.path)
        trajectories = events.make_trajectories(
            database, request, request.equal_times, is_stored="storetime" in names
        )
        series = items if chosen_series else choose_series(trajectories, items, table.path)
        reading.series = series
        columns = f"COLUMNS('(?s)^(number|{STATIC}.*|label_.*|{KEPT}.*)$')"
        static = database.frame(f"SELECT {columns} FROM prediction")
        outcomes = find_outcomes(labels, label_names, request)
        static = static.astype(dict.fromkeys(outcomes, "Int8"))
        static.columns = static.columns.str.removeprefix(KEPT)
        static = static.set_index("number").sort_index()
        if CONTEXT in static and request.context_column:
            words = static[CONTEXT].str.rstrip(". ").str.split()
            static[CONTEXT] = words.str[-request.max_note_words :].str.join(" ")
        for file, roles in zip(notes, note_names, strict=True):
            add_context(database, static, file, roles, times, request)
        rows, flow = events.make_rows(
            database,
            request,
            series,
            trajectories,
            static,
            keep_all=request.no_labels,
        )
        left_out = {"repeated": repeated, **count_left_out(database, table.path)}
        dropped = count_dropped(database)
    about_events = dict[str, Any]()
    if EVENT_HOURS in rows:
        rows, later, about_events = finish_events(rows, label_names, request)
        flow = [*flow, *later]
    usable = "values that were stored by then"
    if "storetime" not in names:
        usable = "values"
        logger.warning("warning: %s: no storetime: values count as known when measured", table.path)
    label, outcome = label_names.get("label", ""), request.outcome
    if outcome == EVENT and label and find_column(LABEL_ROLES["label"], label) is None:
        outcome = label
    if outcome == EVENT and not label:
        outcome = about_events.get("events", {}).get("1", outcome)
    formats = {role: column.formats[:1] for role, column in times.items()}
    settled = replace(
        request,
        outcome=outcome,
        columns=tuple(f"{role}={name}" for role, name in all_names.items()),
        series=tuple(f"{feature.title}={key}" for feature in series for key in feature.keys),
        read_as={"times": formats, "static": categories},
    )
    folders = ("", "labels/", "notes/")
    hashes = {f"{folder}{x.path.name}": x.sha256 for folder, x in zip(folders, files, strict=False)}
    description = events.describe_rows(settled, series[0], usable, rows, flow)
    description["values"] = left_out
    description["dropped"] = dropped
    description["labels"] = {name: {"outcome": column} for name, column in outcomes.items()}
    rows = rows if label else rows.drop(columns=LABEL_COLUMN)
    description |= about_events
    return rows, description | duck.describe_origin(settled, COMMAND, hashes)


# ---------------------------------------------------------------------------- tables


def open_tables(database: duck.Database, request: LongRequest) -> list[duck.TableFile]:
    """Open --table, --labels, --notes, an Excel file at the next --sheet, or at the last one."""
    files, sheets = list[duck.TableFile](), [*request.sheet]
    for path in filter(None, (request.table, request.labels, request.notes)):
        sheet = sheets[0] if sheets else ""
        encoding = request.encoding or duck.WINDOWS
        files.append(duck.open_table(database, path, {}, encoding, sheet))
        if files[-1].encoding == duck.WINDOWS and not request.encoding:
            duck.check_damage(path)
        if files[-1].sheets:
            sheets = sheets[1:] or sheets
    return files


def find_columns(
    database: duck.Database, files: Sequence[duck.TableFile], request: LongRequest, *, guess: bool
) -> list[dict[str, str]]:
    """Return the column of each role in each table; ask for all that are missing in one line."""
    mapped, problems, names_of = request.mapped(), list[str](), list[dict[str, str]]()
    lacking = list[list[str]]()
    label_roles = {r: n for r, n in LABEL_ROLES.items() if r not in request.unread_roles()}
    subject = mapped.get("subject_id", "")
    label_roles["labels.subject_id"] = (subject, *label_roles["labels.subject_id"])
    note_roles = {**NOTE_ROLES, "notes.subject_id": (subject, *NOTE_ROLES["notes.subject_id"])}
    for file, roles in zip(files, (ROLES, label_roles, note_roles), strict=False):
        names = find_roles(file.header, roles, mapped)
        names_of.append(names)
        missing = [r for r in roles if r not in names and (r not in OPTIONAL or mapped.get(r))]
        if request.no_labels:  # new patients may still be there
            missing = [role for role in missing if role != "end_time"]
        lacking.append(missing)
        absent = [name for role in missing if (name := mapped.get(role))]
        if missing and holds_data(file.header):  # none is guessed, and none is shown
            raise InputError(f"{file.path}: {NO_HEADER}")
        if missing:
            flags = " ".join(f"{role}=?" for role in missing)
            flags += "".join(HINTS.get(role, "") for role in missing)
            columns = f"the columns are {join_names(file.header)}"
            if absent:
                near = did_you_mean(absent[0], file.header, 0.4)
                columns = f"there is no {join_names(absent)}{near or ':'} {columns}"
            if file.sheets[1:]:
                columns += f"; other sheets, by --sheet, are {join_names(file.sheets[1:])}"
            problems.append(f"{file.path}: --columns {flags}: {columns}")
        for role, name in names.items():
            check_alike(file, f"--columns {role}", name, mapped.get(role, ""), *roles[role])
            if name in file.rounded and role.removeprefix("notes.") not in (*TIMES, "value"):
                problem = "numbers of 16 digits or more, which Excel has rounded: use texts, or CSV"
                raise InputError(f"{file.path}, column {name}: {problem}")
    asked = guesses.ask(database, files, names_of, lacking, request) if guess else []
    if problems or asked:
        raise OpenQuestions("; ".join(problems), asked)
    if request.equal_times == "last" and "storetime" not in names_of[0]:
        raise InputError("--equal_times last: needs a column storetime")
    return names_of


def check_alike(file: duck.TableFile, flag: str, column: str, *names: str) -> None:
    """Refuse a column that others of the header are named like."""
    if len(alike := columns_alike(file.header, column, *names)) > 1:
        where = f"{file.path}, column {column}"
        problem = f"the columns {join_names(alike)} are named alike"
        advice = f"remove one, or name one by {flag}=COLUMN"
        role = flag.removeprefix("--columns ")
        answers = tuple(f"{role}={name}" for name in alike)
        is_asked = role != flag and len({*alike}) == len(alike)
        asked = [Question(f"{where}: {problem}", "columns", answers)] if is_asked else []
        raise OpenQuestions(f"{where}: {problem}: {advice}", asked)


def log_columns(file: duck.TableFile, names: Mapping[str, str], kept: Sequence[str] = ()) -> None:
    """Log which column is read as what, and those that are not read."""
    columns_read = ", ".join(f"{role}={one_line(name)}" for role, name in names.items())
    columns_read += f"; kept: {join_names(kept)}" if kept else ""
    used = {*names.values(), *kept}
    columns_unread = join_names([name for name in file.header if name not in used])
    logger.info("%s: %s; columns not read: %s", file.path, columns_read, columns_unread or "none")


def find_times(
    database: duck.Database,
    file: duck.TableFile,
    names: Mapping[str, str],
    request: LongRequest,
    prefix: str = "",
) -> dict[str, duck.Column]:
    """Return how the times of each role are read."""
    earlier = request.read_as.get("times", {})
    roles = [role for role in (prefix + name for name in TIMES) if role in names]
    if request.time_unit:
        return dict.fromkeys(roles, duck.Column(request.time_unit))
    return {
        role: duck.find_time(
            database, file, names[role], request.time_format, earlier.get(role, ())
        )
        for role in roles
    }


def check_zones(
    times: Mapping[str, duck.Column], names: Mapping[str, str], files: Sequence[duck.TableFile]
) -> None:
    """Refuse times with a zone beside others without."""
    zoned = [role for role, column in times.items() if column.zoned]
    if 0 < len(zoned) < len(times):
        paths = ", ".join(str(file.path) for file in files)
        texts = [names[role] for role in times if role not in zoned]
        problem = f"column {names[zoned[0]]}: times with a zone, without one in {join_names(texts)}"
        raise InputError(f"{paths}: {problem}: export all in one zone")


def load_values(
    database: duck.Database,
    file: duck.TableFile,
    names: Mapping[str, str],
    request: LongRequest,
    times: Mapping[str, duck.Column],
    codes: Sequence[Any],
    reading: Reading,
) -> int:
    """Make the view ``record`` of the values in the windows; return how many were repeated."""
    roles = {
        "subject_id": events.SUBJECT,
        "item": duck.WORD,
        "value": file.value(names["value"], request.decimal),
        "unit": duck.WORD_OR_EMPTY,
        **{role: replace(t, may_be_empty=role == "storetime") for role, t in times.items()},
    }
    columns = {name: roles[role] for role, name in names.items()}
    columns[duck.LINE] = duck.Column("line", optional=True)
    log_columns(file, names)
    events.load_events(database, request, [file], names, columns, codes)
    warn_of_zeros(database, file, names["subject_id"])
    repeated = drop_repeated(database, file.path)
    item = duck.quoted(names["item"])
    reading.signs |= check_texts(database, "read", names["value"], file, request, item)
    return repeated


def warn_of_zeros(database: duck.Database, file: duck.TableFile, column: str) -> None:
    """Warn of patients whose ids differ in leading zeros alone, and who are taken as one."""
    raw = file.raw(column)
    key, written = (duck.Column(form).typed(raw) for form in ("id", "written_id"))
    (count,) = database.row(
        f"SELECT count(*) FROM (SELECT {key} AS key FROM {file.rows()} GROUP BY key "
        f"HAVING min({written}) != max({written}))"
    )
    if count:
        text = "warning: %s, column %s: ids that differ in leading zeros alone, taken as one: %s"
        logger.warning(text, file.path, column, f"{count:,}")


def drop_repeated(database: duck.Database, path: Path) -> int:
    """Keep one of equal lines; return how many others there were."""
    lines, different = database.row(
        f"SELECT count(*), count(DISTINCT {duck.quoted(duck.LINE)}) FROM read"
    )
    if different < lines:
        database.run("CREATE OR REPLACE TABLE read AS SELECT DISTINCT * FROM read")
        logger.info("%s: %s lines are repeated: dropped", path, f"{lines - different:,}")
    return int(lines - different)


def load_labels(
    database: duck.Database,
    file: duck.TableFile,
    names: Mapping[str, str],
    request: LongRequest,
    times: Mapping[str, duck.Column],
    reading: Reading,
) -> dict[str, list[str]]:
    """Make the table ``label`` and windows of it; return the categories of each static feature."""
    static = events.parse_features("static", request.static, code_needed=False)
    columns_of, categories = dict[str, str](), dict[str, list[str]]()
    for feature in static:
        column = find_column(file.header, str(feature.keys[0]))
        used_columns = {*names.values(), *columns_of.values()}
        if column is None or column in used_columns or len(feature.keys) > 1:
            problem = f"no column of its own among {join_names(file.header)}"
            raise InputError(f"--static {feature.title}={feature.keys[0]}: {file.path}: {problem}")
        columns_of[feature.title] = column
        check_alike(file, f"--static '{feature.title}'", column, str(feature.keys[0]))
        if is_site(column) or is_site(feature.name):
            logger.warning("warning: %s, column %s: %s", file.path, column, SITE_INPUT)
    outcomes = find_outcomes(file, names, request)
    context = find_context(file, request)
    writes_context = bool(context or request.notes)
    taken = [*WRITTEN, *outcomes, *((CONTEXT,) if writes_context else ())]
    taken += EVENT_COLUMNS if "event" in names else ()
    kept = find_kept(file, request, taken)
    columns_read = {**names, **columns_of, **outcomes, **context}
    log_columns(file, columns_read, kept)
    reading.columns[1] = columns_read | {f"keep {name}": name for name in kept}
    columns = {name: file.value(name, request.decimal) for name in columns_of.values()}
    time = times["prediction_time"]
    columns |= {names["labels.subject_id"]: events.SUBJECT, names["prediction_time"]: time}
    columns |= {KEPT + name: duck.Column("text", source=name) for name in kept}
    columns |= {
        KEPT + role: NoteText(source=column, max_words=request.max_note_words)
        for role, column in context.items()
    }
    columns |= {ID: duck.Column("word", source=names["id"])} if "id" in names else {}
    columns[events.PATIENT] = duck.Column("written_id", source=names["labels.subject_id"])
    zone = "''"
    if time.zoned:
        columns[ZONE], zone = duck.Column("zone", source=names["prediction_time"]), f'"{ZONE}"'
    if "label" in names:
        label = {names["label"]: names["label"], **outcomes}
        columns |= find_positive(database, file, label, request)
    _, delay = request.prediction_time_column()
    prediction_time = f"{duck.quoted(names['prediction_time'])} + to_microseconds({delay})"
    label_sql, event_sql = "NULL::INTEGER", dict[str, str]()
    if "end_time" in names:
        form = replace(times["end_time"], source=names["end_time"], may_be_empty=True)
        columns[LEFT] = form
        # A date without a time stands for the whole day.
        end = f"last_moment({duck.quoted(LEFT)})"
        event_sql[events.ENDED] = f"{end} < {prediction_time}"
    if "event" in names:
        cause, end = duck.quoted(CAUSE), duck.quoted(END)
        form = replace(times["event_time"], source=names["event_time"], may_be_empty=True)
        columns |= {CAUSE: find_causes(database, file, names["event"], request), END: form}
        # An empty cell is censored, but nothing is known where the time is empty, too.
        known = f"CASE WHEN {cause} > 0 OR {end} IS NOT NULL THEN {cause} END"
        hours = f"tidy((epoch_us({end}) - epoch_us({prediction_time})) / {HOUR})"
        event_sql |= {KEPT + EVENT_HOURS: hours, KEPT + EVENT_COLUMN: known}
        label_sql = f"({known} = 1)::INTEGER"  # is counted as the event
    if reading.guesses and not request.like and not {"end_time", "event_time"} & {*names}:
        used = {*columns_read.values(), *kept}
        unread = [name for name in file.header if name not in used]
        predicted = time.typed(file.raw(names["prediction_time"]))
        predicted += f" + to_microseconds({delay})"
        if asked := guesses.ask_end_time(database, file, unread, predicted):
            raise OpenQuestions(asked.text, [asked])
    duck.load_table(database, "answers", file, columns)
    select = {
        "subject": duck.quoted(names["labels.subject_id"]),
        events.PATIENT: duck.quoted(events.PATIENT),
        "prediction_time": prediction_time,
        "label": duck.quoted(names["label"]) if "label" in names else label_sql,
        "zone": zone,
        **{name: duck.quoted(name) for name in outcomes},
        **{KEPT + name: duck.quoted(KEPT + name) for name in (*kept, *context)},
        **({"id": duck.quoted(ID)} if "id" in names else {}),
        **event_sql,
    }
    for feature in static:
        sql, categories[feature.title] = make_static(
            database, feature, columns_of[feature.title], file, request, reading
        )
        for name, column_sql in sql:
            if comparable(name) in map(comparable, select):
                where = f"{file.path}, column {columns_of[feature.title]}"
                problem = "is the name of two columns: rename a category or a static feature"
                raise InputError(f"{where}: {name} {problem}")
            select[name] = column_sql
    columns_sql = ", ".join(f"{sql} AS {duck.quoted(name)}" for name, sql in select.items())
    database.run(f"CREATE TABLE label AS SELECT {columns_sql} FROM answers")
    events.add_windows(database, request, duck.MICROSECONDS.get(request.time_unit, 0))
    return categories


# ---------------------------------------------------------------------------- cells


def check_texts(
    database: duck.Database,
    loaded: str,
    column: str,
    file: duck.TableFile,
    request: LongRequest,
    item: str = "NULL",
) -> set[str]:
    """Refuse what only a flag says how to read, log what is left out; return signs of decimals."""
    where = f"{file.path}, column {column}"
    texts = f"SELECT {item} AS item, unnest({duck.quoted(column)}) FROM {loaded}"
    total, flagged, below, above, numeric, other, with_unit, letters, commas, points = database.row(
        "SELECT count(number) + count(text), count(*) FILTER (flagged), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('<', '≤')), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('>', '≥')), "
        "count(*) FILTER (NOT is_limit(text) AND looks_numeric(text)), "
        "count(*) FILTER (NOT looks_numeric(text)), count(*) FILTER (holds_unit(text)), "
        "list_distinct(list(letters_behind(text)) FILTER (letters_behind(text) != '')), "
        f"count(*) FILTER (sign = ','), count(*) FILTER (sign = '.') FROM ({texts})"
    )
    asked = list[tuple[str, str, str, tuple[str, ...]]]()  # problem, advice, flag, its values
    signs = ("comma", "point") if commas > points else ("point", "comma")
    unclear = [] if request.decimal else unclear_signs(database, texts, file.separator)
    asked += [(text, "", "decimal", signs) for text in unclear]
    if numeric and not (request.decimal and request.bad_values):
        problem = f"{numeric:,} cells look like numbers of another form"
        if request.decimal:
            asked.append((problem, ": write all alike", "bad_values", ("drop",)))
        else:
            asked.append((problem, ": --decimal comma or point", "decimal", signs))
    if below + above and not request.below_limit:
        flag = ': --below_limit half, value or drop (of "<5": 2.5, 5 or empty)'
        problem = f"{duck.cells(below + above)} at a limit"
        asked.append((problem, flag, "below_limit", ("half", "value", "drop")))
    if with_unit:
        advice = ": write the unit in a column of its own"
        problem = f"{duck.cells(with_unit)} with a unit behind the number"
        asked.append((problem, advice, "", ()))
    for word in sorted(letters or ()):
        problem = f"numbers have {word} behind them, a unit or the laboratory's flag"
        advice = f": --result_flags {word}, or a column of the unit"
        asked.append((problem, advice, "result_flags", (word,)))
    if other > with_unit and not request.bad_values and not letters:
        problem = f"{duck.cells(other)} not a number"
        asked.append((problem, ": --bad_values drop leaves it out", "bad_values", ("drop",)))
    if asked:
        problems = "; ".join(problem + advice for problem, advice, *_ in asked)
        questions = [Question(f"{where}: {x}", flag, values) for x, _, flag, values in asked]
        raise OpenQuestions(f"{where}: {problems}", questions)
    if flagged:
        logger.info("%s: %s numbers with a laboratory's flag are read", where, f"{flagged:,}")
    if below + above:
        counts = f"{below:,} values below a limit, {above:,} above one"
        logger.info("%s: %s: --below_limit %s", where, counts, request.below_limit)
    if numeric + other:
        log_dropped(database, texts, where, total)
    return {name for name, count in (("comma", commas), ("point", points)) if count}


def log_dropped(database: duck.Database, texts: str, where: str, total: int) -> None:
    """Log the forms of the texts that are dropped, those of numbers all and as a warning."""
    text_form = "regexp_replace(text, '\\d+', '#', 'g')"
    number_form = f"regexp_replace({text_form}, '[[:alpha:]]{{3,}}', '...', 'g')"
    is_number = "regexp_matches(text, '^[<>≤≥+-]*\\s*\\d')"
    kinds = ((number_form, is_number, True), (text_form, f"NOT {is_number}", False))
    for form, condition, warns in kinds:
        words = database.run(
            f"SELECT left({form}, {MAX_LETTERS + 1}) AS word, count(*) AS count FROM ({texts}) "
            f"WHERE text IS NOT NULL AND NOT is_limit(text) AND {condition} "
            "GROUP BY word ORDER BY count DESC, word"
        ).fetchall()
        count = sum(count for _, count in words)
        shown = [x for x in words if len(x[0]) <= MAX_LETTERS][:MAX_WORDS]
        if len(words) > MAX_WORDS:  # a rare one may be a remark on a patient
            shown = [(word, count) for word, count in shown if count > 1]
        listed = [f'{count:,} values "{one_line(word)}"' for word, count in shown]
        rest = count - sum(count for _, count in shown)
        listed += [f"{rest:,} other texts"] if rest else []
        if count and warns:
            share = f"{count:,} cells that begin with a number ({count / total:.1%})"
            logger.warning("warning: %s: dropped %s: %s", where, share, ", ".join(listed))
        elif count:
            logger.info("%s: dropped %s", where, ", ".join(listed))


def unclear_signs(database: duck.Database, texts: str, separator: str) -> list[str]:
    """Return what is unclear of the signs of numbers: decimals, or between thousands."""
    rows = database.run(
        "SELECT item, count(*) FILTER (sign = ','), count(*) FILTER (sign = '.'), "
        "count(*) FILTER (sign != '' AND NOT thousands), "
        "count(*) FILTER (sign = '' AND (number IS NOT NULL OR is_limit(text))) "
        f"FROM ({texts}) GROUP BY item ORDER BY item"
    ).fetchall()
    commas, points, decimals = (sum(row[k] for row in rows) for k in (1, 2, 3))
    is_text = separator in (";", "\t", "|")  # where commas are free to be decimal
    if commas and (points or not is_text):
        counts = f"{commas:,} numbers have a comma and {points:,} a point"
        return [f"{counts}: --decimal comma or point says which is decimal"]
    unclear = [
        item
        for item, *signs, decimals_of_item, whole in rows
        if sum(signs) and not decimals_of_item and (whole or (is_text and not decimals))
    ]
    if not unclear:
        return []
    items = f" of {join_names(unclear)}" if unclear != [None] else ""
    sign = "comma" if commas else "point"
    problem = f"each {sign}{items} has three digits behind it, as thousands have"
    return [f"{problem}: --decimal comma or point says which is decimal"]


def find_outcomes(
    file: duck.TableFile, names: Mapping[str, str], request: LongRequest
) -> dict[str, str]:
    """Return the columns of --outcome_column, beside the label, by the name of their label."""
    outcomes = dict[str, str]()
    for text in request.outcome_column if not request.no_labels else ():
        column, where = find_column(file.header, text), f"--outcome_column {text}: {file.path}"
        if column is None and request.like:
            logger.warning("warning: %s: no such column", where)
            continue
        if column is None:
            raise InputError(f"{where}: no such column among {join_names(file.header)}")
        check_alike(file, "--outcome_column", column, text)
        words = re.sub(r"\W+", "_", column.lower()).strip("_")
        name = f"label_{words.removeprefix('label_')}"
        if column == names["label"] or outcomes.get(name) == column:
            continue
        if name in outcomes or name == LABEL_COLUMN or not words:
            raise InputError(f"{where}: {name} is the name of two outcomes: rename one")
        outcomes[name] = column
    return outcomes


def find_kept(file: duck.TableFile, request: LongRequest, taken: Sequence[str]) -> list[str]:
    """Return the columns of --keep, those that the table has if an earlier output names them."""
    kept = list[str]()
    for text in request.keep:
        column = find_column(file.header, text)
        if column is None and request.like:
            logger.warning("warning: --keep %s: %s: no such column", text, file.path)
            continue
        where = f"--keep {text}: {file.path}"
        if column is None:
            raise InputError(f"{where}: no such column among {join_names(file.header)}")
        check_alike(file, "--keep", column, text)
        key = comparable(column)
        if key in map(comparable, taken) or key.startswith(("trajectory", "static ")):
            raise InputError(f"{where}, column {column}: is a name of the output: rename it")
        kept += [] if column in kept else [column]
    return kept


def find_context(file: duck.TableFile, request: LongRequest) -> dict[str, str]:
    """Return the column of --context_column, by the name that it gets."""
    if not (text := request.context_column):
        return {}
    column = find_column(file.header, text)
    if column is None:
        columns = join_names(file.header)
        problem = f"no such column among {columns}"
        raise InputError(f"--context_column {text}: {file.path}: {problem}")
    check_alike(file, "--context_column", column, text)
    return {CONTEXT: column}


def add_context(
    database: duck.Database,
    static: pd.DataFrame,  # by number of the prediction
    file: duck.TableFile,
    names: Mapping[str, str],
    times: Mapping[str, duck.Column],
    request: LongRequest,
) -> None:
    """Add the notes that were written by the prediction times to the context."""
    log_columns(file, names)
    if "notes.storetime" not in names:
        problem = "no notes.storetime: notes count as known when written"
        logger.warning("warning: %s: %s", file.path, problem)
    roles = {"subject": "subject_id", "charted": "time", "stored": "storetime", "text": "text"}
    columns = {x: names[f"notes.{y}"] for x, y in roles.items() if f"notes.{y}" in names}
    forms = {x: times[f"notes.{y}"] for x, y in roles.items() if f"notes.{y}" in times}
    load_notes(database, file, columns, events.SUBJECT, request.max_note_words, times=forms)
    contexts = static.get(CONTEXT, pd.Series("", static.index))
    static[CONTEXT] = add_notes(database, contexts, request.max_note_words)


def find_positive(
    database: duck.Database, file: duck.TableFile, columns: Mapping[str, str], request: LongRequest
) -> dict[str, duck.Column]:
    """Return how the label of each column is read: by those words of --positive that it holds.

    Refuses words that only --positive explains, and one that no column holds.
    """
    found, unused = dict[str, duck.Column](), {word.strip().lower() for word in request.positive}
    for name, column in columns.items():
        raw, where = file.raw(column), f"{file.path}, column {column}"
        cell = f"trim({raw}::VARCHAR)"
        select = f"SELECT lower({cell}) AS word, count(*) AS count, min({cell}) FROM {file.rows()}"
        words = database.run(f"{select} GROUP BY 1 ORDER BY count DESC, word").fetchall()
        held = {word for word, *_ in words}
        own = tuple(x for x in request.positive if x.strip().lower() in held)
        unused -= {x.strip().lower() for x in own}
        # New patients may have no event.
        label = replace(LABEL, source=column, positive=request.positive if request.like else own)
        found[name] = label
        (count,) = database.row(
            f"SELECT count(*) FILTER ({label.is_wrong(raw)}) FROM {file.rows()}"
        )
        if count:
            known = [text for word, _, text in words[::-1] if (word or "") not in duck.NOT_KNOWN]
            given = f"--positive {', '.join(request.positive)}: " if request.positive else ""
            problem = f"{given}{where}: {label.problem(count)}"
            times, filled = database.row(
                f"SELECT count({guesses.time_of(cell)}), count(nullif({cell}, '')) "
                f"FROM {file.rows()}"
            )
            if times > guesses.MOST * filled:
                problem = f"{where}: holds times, as of a death, not yes and no: write a column of "
                problem += "1 where it comes by the end that is asked, or give --event_time"
                raise InputError(problem)
            answers = tuple(known) if len(known) <= MAX_WORDS else ()
            asked = Question(problem, "positive", answers, of_cells=True)
            raise OpenQuestions(problem, [asked])
        if own:
            log_labels(where, words, own)
    if unused and not request.like:
        raise InputError(f"--positive {', '.join(sorted(unused))}: {file.path}: no outcome has it")
    return found


def log_labels(where: str, words: Sequence[tuple[str, int, str]], positive: Sequence[str]) -> None:
    """Log which words of a column are 1 and 0."""
    ones = {word.strip().lower() for word in positive}
    known = [(word, count) for word, count, _ in words if (word or "") not in duck.NOT_KNOWN]
    for value in (1, 0):
        of_value = [(word, count) for word, count in known if (word in ones) == value]
        if len(of_value) > MAX_WORDS:  # a rare one may be a remark on a patient
            of_value = [(word, count) for word, count in of_value if count > 1]
        shown = [f"{one_line(word[:MAX_LETTERS])} ({count:,})" for word, count in of_value]
        logger.info("%s: %d is %s", where, value, join_names(shown, MAX_WORDS) or "no word")


@dataclass(frozen=True)
class Cause(duck.Column):
    """An event by its number, or by its word in ``names``; 0 where the record ended without."""

    form: str = "event"
    may_be_empty: bool = True
    names: tuple[str, ...] = ()

    def typed(self, raw: str) -> str:
        """Return SQL for the number of a raw cell, NULL of another word."""
        cell = f"lower(coalesce(trim({raw}::VARCHAR), ''))"
        words = {duck.literal(name.lower()): k for k, name in enumerate(self.names, start=1)}
        cases = " ".join(f"WHEN {cell} = {word} THEN {k}" for word, k in words.items())
        number, largest = f"TRY_CAST({cell} AS DOUBLE)", len(self.names) or MAX_EVENT
        is_number = f"{number} BETWEEN 1 AND {largest} AND {number} % 1 = 0"
        none = f"WHEN {cell} IN {CENSORED} THEN 0"
        return f"CASE {cases} {none} WHEN {is_number} THEN {number}::INTEGER END"


def find_causes(
    database: duck.Database, file: duck.TableFile, column: str, request: LongRequest
) -> Cause:
    """Return how the events of a column are read; refuse words that nothing names."""
    cause, raw = Cause(source=column, names=request.event_names), file.raw(column)
    select = f"SELECT min(trim({raw}::VARCHAR)), count(*) AS count FROM {file.rows()}"
    words = database.run(
        f"{select} WHERE {cause.is_wrong(raw)} GROUP BY lower(trim({raw}::VARCHAR)) "
        "ORDER BY count DESC, 1"
    ).fetchall()
    if words:
        problem = f"{file.path}, column {column}: {cause.problem(sum(n for _, n in words))}"
        answers = [(word,) for word, _ in words] if len(words) <= MAX_WORDS else [()]
        asked = [Question(problem, "event_names", answer, of_cells=True) for answer in answers]
        raise OpenQuestions(problem, asked)
    return cause


def finish_events(
    rows: pd.DataFrame, names: Mapping[str, str], request: LongRequest
) -> tuple[pd.DataFrame, list[dict[str, Any]], dict[str, Any]]:
    """Leave out rows whose record ended before; return them, their flow, and what events mean."""
    where, hours = f"{request.labels}, column {names['event_time']}", rows[EVENT_HOURS]
    rows[EVENT_COLUMN] = rows[EVENT_COLUMN].astype("Int8")
    if count := int((hours.isna() & rows[EVENT_COLUMN].notna()).sum()):
        raise InputError(f"{where}: {duck.cells(count)} empty where {names['event']} is an event")
    rule = "the event, or the end of the record, before the prediction time"
    left, flow = duck.apply_rules(pd.DataFrame({rule: hours < 0}), where, rows["subject_id"])
    rows = rows[left].reset_index(drop=True)
    named = {str(k): name for k, name in enumerate(request.event_names, start=1)}
    numbers = {name.lower(): int(k) for k, name in named.items()}
    largest = len(named) or int(rows[EVENT_COLUMN].fillna(0).max())
    numbers |= {str(k): k for k in range(1, largest + 1)}
    if len(numbers) < len(named) + largest:
        raise InputError("--event_names: each event needs a name of its own, which is no number")
    for text in request.interventions:
        if numbers.get(text.lower(), 0) < 2:
            problem = f"not the name or the number, 2 to {largest}, of an event"
            raise InputError(f"--interventions {text}: {problem}")
    brought = sorted({numbers[text.lower()] for text in request.interventions})
    if named and request.outcome != EVENT:
        named["1"] = request.outcome
    about: dict[str, Any] = {"events": named} if named else {}
    return rows, flow, {**about, "interventions": brought, "horizon": ""}


def make_static(
    database: duck.Database,
    feature: Feature,
    column: str,
    file: duck.TableFile,
    request: LongRequest,
    reading: Reading,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return columns of a static feature with their SQL, and its categories: none of numbers."""
    where, cell = f"{file.path}, column {column}", duck.quoted(column)
    word = f"lower(coalesce({cell}.text, plain({cell}.number)))"
    words = request.read_as.get("static", {}).get(feature.title)
    is_sex, sexes = SEX.fullmatch(feature.name) is not None, read_sexes(request.sex)
    if words is None:
        (numbers,) = database.row(f"SELECT count({cell}.number) FROM answers")
        select = f"SELECT DISTINCT {word} AS word FROM answers WHERE word IS NOT NULL ORDER BY 1"
        is_number = numbers and not is_sex
        words = [] if is_number else [text for (text,) in database.run(select).fetchall()]
    if is_sex and (unknown := [x for x in words if x.isdigit() and x not in sexes]):
        ask_sexes(where, unknown)
    if len(words) > MAX_CATEGORIES:
        raise InputError(f"{where}: {len(words):,} different texts, {MAX_CATEGORIES} may be")
    if not words:
        reading.signs |= check_texts(database, "answers", column, file, request)
        number = f"plain(coalesce({cell}.number, at_limit({cell}.text)))"
        return [(f"{STATIC}{feature.title}", number)], words
    categories, columns = name_categories(feature.name, words, sexes)
    is_category, sql = f"{word} IN ({', '.join(map(duck.literal, categories))})", []
    (count,) = database.row(f"SELECT count(*) FROM answers WHERE NOT {is_category}")
    if count:
        known = "neither female nor male" if SEX.fullmatch(feature.name) else "of no known category"
        logger.warning("warning: %s: %s %s: empty", where, duck.cells(count), known)
    for name, ones in columns:
        logger.info("%s: %s is 1 for %s", where, name, one_line(", ".join(ones)))
        one = f"({word} IN ({', '.join(map(duck.literal, ones))}))::INTEGER::VARCHAR"
        sql.append((name, f"CASE WHEN {is_category} THEN {one} END"))
    return sql, words


def read_sexes(texts: Sequence[str]) -> dict[str, str]:
    """Return the sex of each word of --sex, in small letters."""
    sexes = dict[str, str]()
    for text in texts:
        word, _, sex = map(str.strip, text.lower().rpartition("="))
        if not word or sex not in (*SEXES, "unknown"):
            raise InputError(f"--sex {text}: write WORD=male, WORD=female or WORD=unknown")
        sexes[word] = sex
    return sexes


def ask_sexes(where: str, words: Sequence[str]) -> None:
    """Ask which numbers are which sex: registries differ."""
    problem = f"{where}: which number is which sex"
    asked = []
    for k, word in enumerate(words):
        order = (*SEXES[k % 2 :], *SEXES[: k % 2], "unknown")
        if len(words) > len(SEXES) and word not in ("1", "2"):
            order = ("unknown", *SEXES)
        asked.append(Question(problem, "sex", tuple(f"{word}={sex}" for sex in order)))
    example = " ".join(question.answers[0] for question in asked)
    advice = f"--sex {example}, or another of male, female and unknown"
    raise OpenQuestions(f"{problem}: {advice}", asked)


def name_categories(
    name: str, words: Sequence[str], sexes: Mapping[str, str]
) -> tuple[Sequence[str], list[tuple[str, Sequence[str]]]]:
    """Return the categories, and those that are 1 in each column: one column for two of them."""
    is_sex = SEX.fullmatch(name) is not None
    title = "sex_male" if is_sex else f"{name.lower()}_male"
    male, female = (
        (*usual, *(word for word, sex in sexes.items() if is_sex and sex == named))
        for usual, named in ((MALE, "male"), (FEMALE, "female"))
    )
    # A third sex leaves the cell empty.
    others = {*OTHER_SEX, *sexes} if is_sex else set[str]()
    known = {*male, *female, *others}
    pairs_of_words = (
        (male, female, known, title),
        (duck.YES, duck.NO, {*duck.YES, *duck.NO}, name),
    )
    for ones, zeros, allowed, title in pairs_of_words:
        if {*words} <= allowed:
            return (*ones, *zeros), [(f"{STATIC}{title}", ones)]
    with_column = words[1:] if len(words) == 2 else words
    titles = [" ".join(re.sub(r"[\[\],*=]", " ", word).split()) for word in with_column]
    pairs = zip(titles, with_column, strict=True)
    return words, [(f"{STATIC}{name} {title}", (word,)) for title, word in pairs]


# ---------------------------------------------------------------------------- items


def find_items(database: duck.Database) -> list[Feature]:
    """Return each item as a feature, whatever its case, by its most frequent spelling."""
    spellings: dict[str, list[str]] = {}
    names = dict[str, str]()
    select = "SELECT code, unit_within(code) FROM record GROUP BY code ORDER BY count(*) DESC, code"
    for code, unit in database.run(select).fetchall():
        key = comparable(code)
        names.setdefault(key, split_title(code, unit)[0])
        spellings.setdefault(key, []).append(code)
    counts = Counter(map(comparable, names.values()))
    features = list[Feature]()
    for key, name in names.items():
        is_one = counts[comparable(name)] == 1
        codes = spellings[key]
        features.append(Feature(name if is_one else codes[0], "", tuple(codes)))
    return features


def split_title(item: str, unit: str = "") -> tuple[str, str]:
    """Return name and unit of an item such as ``Kreatinin [µmol/L]``, or with ``(unit)``."""
    if match := events.TITLE.fullmatch(item):
        name, unit = match[1], match[2] or unit
        return name.removesuffix(f"({unit})").strip() if unit else name, unit
    return item, ""


def choose_series(
    trajectories: pd.DataFrame, items: Sequence[Feature], path: Path
) -> list[Feature]:
    """Return the items with values in the windows, the one with most values first."""
    by_name = {item.name: item for item in items}
    totals = trajectories.groupby("series")["observations"].sum()
    names = [*totals.sort_values(ascending=False, kind="stable").index]
    if not 1 <= len(names) <= MAX_SERIES:
        problem = f"{len(names):,} items have values in the windows, and 1 to {MAX_SERIES} may be"
        most = [by_name[name] for name in names[:MAX_SERIES]]
        asked = ask_series(most, f"{path}: {problem}", guess=False)
        raise OpenQuestions(f"{path}: {problem}: choose by --series", asked)
    series = [by_name[name] for name in names]
    if unnamed := [name for name in names if not events.is_name(name)]:
        problem = f"{path}, item {join_names(unnamed)}: not the name of a column"
        example = f"--series '{name_from(unnamed[0])} [unit]={unnamed[0]}'"
        text = f"{problem}: name all series that are read, this one as {example}"
        raise OpenQuestions(text, ask_series(series, problem, guess=True))
    logger.info("series: %s", join_names([feature.title for feature in series]))
    return series


def name_from(item: str) -> str:
    """Return a name that a series or a static feature can have, made of another."""
    name = " ".join(re.sub(r"[\[\],*=\x00-\x1f]", " ", item).split())
    return name if events.is_name(name) else f"item {name}".strip()


def ask_series(items: Sequence[Feature], problem: str, *, guess: bool) -> list[Question]:
    """Return a question for each item, which series it is; guess those whose name serves."""
    asked = []
    for item in items:
        is_guess = guess and events.is_name(item.name)
        title = replace(item, name=name_from(item.name)).title
        pairs = [(f"{title}={key}",) for key in item.keys]
        asked += [Question(problem, "series", pair, guessed=is_guess) for pair in pairs]
    return asked


def alike(texts: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether units, or items, differ in their case or the sign of micro alone."""
    first, second = ([MICRO.sub("u", text).lower() for text in pair] for pair in (texts, others))
    return first == second


def convert_units(
    database: duck.Database,
    items: Sequence[Feature],
    factors: Mapping[tuple[str, str], float],
    path: Path,
) -> list[Feature]:
    """Return the items with their one unit; refuse two units, warn of a factor without a use."""
    rows = database.run(
        "SELECT name, any_value(named.unit), converted, code, record.unit "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL AND record.unit IS NOT NULL "
        "GROUP BY name, converted, code, record.unit "
        "ORDER BY name, converted, record.unit = '', count(*) DESC, code, record.unit"
    ).fetchall()
    for item, unit in factors:
        units_of_item = [row_unit for *_, code, row_unit in rows if alike((code,), (item,))]
        if not any(alike((unit,), (row_unit,)) for row_unit in units_of_item):
            units_text = join_names([x or "no unit" for x in units_of_item]) or "no value of it"
            problem = f"no value in a window has this item and this unit: there is {units_text}"
            logger.warning("warning: --factor '%s:%s=': %s", item, unit, problem)
    units: dict[str, str] = {}
    asked = dict[str, Question]()  # by the text of the refusal
    for name, flag_unit, converted, code, unit in rows:  # values that are not converted come first
        if converted and not (flag_unit or name in units):
            problem = "all values are converted: give the unit"
            raise InputError(f"{path}: {problem} by --series '{name} [unit]'")
        target = units.setdefault(name, flag_unit or unit)
        if converted == alike((unit,), (target,)):
            problem = f"{name} has values in {target} and in {unit or 'no unit'}"
            problem = f"{name} is in this unit already" if converted else problem
            by = f"--factor '{code}:{unit}=NUMBER'"
            text = f"{path}: {problem}: convert what is in another unit by {by}"
            asked[text] = Question(f"{path}: {problem}", "factor")
            ratio = 0.0 if converted else ratio_of_medians(database, name, unit, target)
            if ratio:
                by_prefix = prefix_ratios(unit, target)
                known = {*(by_prefix or unit_ratios(name))}
                known |= {1 / x for x in known}
                near = [x for x in known if 0.7 < ratio / x < 1.4]
                if not by_prefix and SAME[0] < ratio < SAME[1]:
                    near = [1.0]
                answer = f"{near[0]:.4g}" if len(near) == 1 else "NUMBER"
                medians = f"{path}: {problem}, whose medians are as {ratio:.3g} to 1"
                answers = f"{code}:{unit}={answer}"
                assumed = answers if len(near) == 1 else f"{code}:{unit}={ratio:.4g}"
                asked[text] = Question(medians, "factor", (answers,), assumed)
    if asked:
        raise OpenQuestions(next(iter(asked)), [*asked.values()])
    return [replace(item, unit=units.get(item.name, item.unit)) for item in items]


def check_medians(database: duck.Database, path: Path) -> None:
    """Refuse a series whose items or units have very different medians once converted."""
    rows = database.frame(
        "SELECT name, code, record.unit, count(*) AS n, "
        "quantile_cont(ln(value), 0.25) AS low, median(ln(value)) AS middle, "
        "quantile_cont(ln(value), 0.75) AS high "
        "FROM record JOIN named USING (code) WHERE value > 0 "
        f"GROUP BY name, code, record.unit HAVING n >= {MIN_OF_UNIT} ORDER BY name, n DESC, code, 3"
    )
    for name, groups in rows.groupby("name"):
        median = groups["middle"].to_numpy()
        spread = groups["high"].to_numpy() - groups["low"].to_numpy()
        variance = spread**2 / groups["n"].to_numpy()  # of a median
        difference = np.abs(median[1:] - median[0])
        chance = SURE * np.sqrt(variance[1:] + variance[0])
        wrong = np.flatnonzero(difference > np.maximum(math.log(MAX_RATIO), chance))
        if not len(wrong):
            continue
        texts = []
        for k in (0, wrong[0] + 1):
            code, unit = groups.iloc[k][["code", "unit"]]
            of_unit = f" in {unit}" if unit else ""
            texts.append(f"{plain(float(f'{math.exp(median[k]):.3g}'))} ({code}{of_unit})")
        problem = f"{path}: {name}: values of one unit have the medians {' and '.join(texts)}"
        advice = "correct --factor, or make two series of them"
        raise OpenQuestions(f"{problem}: {advice}", [Question(problem, "factor")])


def ratio_of_medians(database: duck.Database, name: str, unit: str, target: str) -> float:
    """Return the ratio of an item's medians in two units, 0 where there is none."""
    texts = ", ".join(
        f"median(value) FILTER (record.unit = {duck.literal(x)})" for x in (unit, target)
    )
    of_item = f"named.name = {duck.literal(name)} AND NOT converted"
    first, second = database.row(
        f"SELECT {texts} FROM record JOIN named USING (code) WHERE {of_item}"
    )
    return float(second / first) if first and second and second / first > 0 else 0.0


def count_left_out(database: duck.Database, path: Path) -> dict[str, int]:
    """Count and log the values in the windows that are left out or converted."""
    row = database.row(
        "SELECT count(*) FILTER (value IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND known IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND converted) FROM record JOIN named USING (code)"
    )
    counts = dict(zip(("without a number", "never stored", "converted"), row, strict=True))
    for words, count in counts.items():
        if count:
            logger.info("%s: %d values %s", path, count, words)
    return counts


def count_dropped(database: duck.Database) -> dict[str, dict[str, Any]]:
    """Return the share of each series' values that is dropped, and the end where they lie."""
    rows = database.run(
        "SELECT name, avg((value IS NULL)::INTEGER) AS share, "
        "median(scale * number_within(text)) FILTER (value IS NULL) AS dropped, "
        "quantile_cont(value, 0.1) AS low, quantile_cont(value, 0.9) AS high "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL OR text IS NOT NULL "
        "GROUP BY name HAVING share > 0 ORDER BY name"
    ).fetchall()
    found = dict[str, dict[str, Any]]()
    for name, share, dropped, low, high in rows:
        is_end = None not in (dropped, low) and not low < dropped < high
        end = ("low" if dropped <= low else "high") if is_end else ""
        found[name] = {"share": round(share, 4), "end": end}
    return found
