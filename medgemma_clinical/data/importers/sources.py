"""from_long's tables as they are found: files, the column of each role, the forms of times."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medgemma_clinical.data import roles
from medgemma_clinical.data.dka import NO_HEADER, holds_data, join_names
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, tables
from medgemma_clinical.data.importers.long_request import LongRequest
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.files import InputError, did_you_mean, one_line

logger = logging.getLogger(__name__)

TIMES = ("prediction_time", "time", "storetime", "event_time", "end_time")
READ = ("subject_id", "time", "item", "value")


@dataclass
class Source:
    """A table of the request: its file, the column of each role, and how its times are read."""

    file: tables.TableFile
    names: dict[str, str] = field(default_factory=dict)
    times: dict[str, cells.Instant] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)  # further columns, by what they become
    kept: list[str] = field(default_factory=list)
    dates: set[str] = field(default_factory=set)  # roles of dates in the zone of the prediction

    def log(self) -> None:
        """Log which column is read as what, and those that are not read."""
        pairs = {**self.names, **self.taken}.items()
        read = ", ".join(f"{role}={one_line(name)}" for role, name in pairs)
        read += f"; kept: {join_names(self.kept)}" if self.kept else ""
        unread = join_names(self.unread) or "none"
        logger.info("%s: %s; columns not read: %s", self.file.path, read, unread)

    @property
    def unread(self) -> list[str]:
        """Columns that nothing reads; none while those that are read are not found."""
        used = {*self.names.values(), *self.taken.values(), *self.kept}
        return [name for name in self.file.header if self.names and name not in used]


@dataclass
class Seen:
    """What the tables are taken for, as far as a run came; a preview shows it."""

    is_preview: bool = False  # columns of unknown names are guessed and asked for
    sources: list[Source] = field(default_factory=list)  # of values, of labels, perhaps of notes
    signs: set[str] = field(default_factory=set)  # of decimals: comma or point
    formats: dict[str, list[str]] = field(default_factory=dict)  # of times not in ISO's, by role
    cells: dict[Any, Any] = field(default_factory=dict)  # what is known of cells in all passes
    series: list[Feature] = field(default_factory=list)


def open_sources(database: duck.Database, request: LongRequest) -> list[Source]:
    """Open --table, --labels, --notes, an Excel file at the next --sheet, or at the last one."""
    sources, sheets = list[Source](), [*request.sheet]
    for path in filter(None, (request.table, request.labels, request.notes)):
        sheet = sheets[0] if sheets else ""
        sources.append(Source(tables.open_table(database, path, {}, request.encoding, sheet)))
        if sources[-1].file.sheets:
            sheets = sheets[1:] or sheets
    return sources


def fit_like(request: LongRequest, source: Source) -> LongRequest:
    """Take from --like how cells are written, where the table of values has its columns."""
    earlier = request.earlier
    if request.notes is None and any(role.startswith("notes.") for role in earlier.columns):
        logger.warning("warning: --like %s was made with notes: give those of now", request.like)
    names = [earlier.columns[role] for role in READ if role in earlier.columns]
    absent = [name for name in names if not roles.find_column(source.file.header, name)]
    if len(absent) > 1:  # tables of another form: one column may have a new name
        return replace(request, earlier=replace(earlier, times={}))
    return replace(request, **earlier.form)


def find_columns(
    sources: Sequence[Source], request: LongRequest
) -> tuple[list[list[str]], list[str]]:
    """Find the column of each role in each table; return those that are missing, and in words."""
    problems, lacking = list[str](), list[list[str]]()
    for source, usual_names in zip(sources, usual_names_of(request), strict=False):
        file = source.file
        earlier = {r: n for r, n in request.earlier.columns.items() if r in usual_names}
        wanted = {**earlier, **request.mapped()}
        present = {r: n for r, n in earlier.items() if not n or roles.find_column(file.header, n)}
        names = roles.find_roles(file.header, usual_names, {**present, **request.mapped()})
        missing = [role for role in usual_names if role not in names]
        missing = [role for role in missing if role not in roles.OPTIONAL or wanted.get(role)]
        if request.no_labels:  # new patients may still be there
            missing = [role for role in missing if role != "end_time"]
        lacking.append(missing)
        if missing and holds_data(file.header):  # none is guessed, and none is shown
            if not file.sheets[1:]:
                raise InputError(f"{file.path}: {NO_HEADER}")
            problems.append(f"{file.path}: {NO_HEADER}{other_sheets(file)}")
            continue
        source.names = names
        if missing:
            problems.append(missing_columns(file, missing, wanted))
        for role, name in names.items():
            check_alike(file, f"--columns {role}", name, wanted.get(role, ""), *usual_names[role])
            if name in file.rounded and role.removeprefix("notes.") not in (*TIMES, "value"):
                problem = "numbers of 16 digits or more, which Excel has rounded: use texts, or CSV"
                raise InputError(f"{file.path}, column {name}: {problem}")
    if not problems and request.equal_times == "last" and "storetime" not in sources[0].names:
        raise InputError("--equal_times last: needs a column storetime")
    return lacking, problems


def usual_names_of(request: LongRequest) -> list[dict[str, tuple[str, ...]]]:
    """Return the roles of the columns of each table with their usual names."""
    subject = request.mapped().get("subject_id", request.earlier.columns.get("subject_id", ""))
    unread = request.unread_roles()
    of_labels = {role: names for role, names in roles.LABEL_ROLES.items() if role not in unread}
    of_notes = {**roles.NOTE_ROLES}
    for of_table, role in ((of_labels, "labels.subject_id"), (of_notes, "notes.subject_id")):
        of_table[role] = (subject, *of_table[role])
    return [roles.ROLES, of_labels, of_notes]


def missing_columns(
    file: tables.TableFile, missing: Sequence[str], wanted: Mapping[str, str]
) -> str:
    """Return in words which roles of a table have no column."""
    flags = " ".join(f"{role}=?" for role in missing)
    hints = "".join(roles.HINTS.get(role, "") for role in missing)
    columns = f"the columns are {join_names(file.header)}"
    if absent := [wanted[role] for role in missing if wanted.get(role)]:
        near = did_you_mean(absent[0], file.header, 0.4)
        columns = f"there is no {join_names(absent)}{near or ':'} {columns}"
    return f"{file.path}: --columns {flags}{hints}: {columns}{other_sheets(file)}"


def other_sheets(file: tables.TableFile) -> str:
    """Return in words which other sheets an Excel file has, empty without any."""
    sheets = file.sheets[1:]
    return f"; other sheets, by --sheet, are {join_names(sheets)}" if sheets else ""


def check_alike(file: tables.TableFile, flag: str, column: str, *names: str) -> None:
    """Refuse a column that others of the header are named like."""
    if len(alike := roles.columns_alike(file.header, column, *names)) > 1:
        where = f"{file.path}, column {column}"
        problem = f"the columns {join_names(alike)} are named alike"
        advice = f"remove one, or name one by {flag}=COLUMN"
        role = flag.removeprefix("--columns ")
        answers = tuple(f"{role}={name}" for name in alike)
        is_asked = role != flag and len({*alike}) == len(alike)
        asked = [Question(f"{where}: {problem}", "columns", answers)] if is_asked else []
        raise OpenQuestions(f"{where}: {problem}: {advice}", asked)


def find_times(
    database: duck.Database, sources: Sequence[Source], request: LongRequest, seen: Seen
) -> None:
    """Find how the times of each role are read; ask for all that are unclear in one line."""
    problems, asked = list[str](), list[Question]()
    forms = request.time_format, request.time_unit
    for source in (*sources[1::-1], *sources[2:]):
        for role in [x for x in source.names if x.removeprefix("notes.") in TIMES]:
            try:
                key = source.file.path, source.file.sheets[:1], source.names[role], role, forms
                if key not in seen.cells:
                    seen.cells[key] = find_time(database, source, role, request)
                source.times[role] = seen.cells[key]
            except OpenQuestions as error:
                problems.append(str(error))
                answers = [x.answers for x in asked if x.answers]
                asked += [x for x in error.questions if x.answers not in answers]
    if problems:
        raise OpenQuestions("; ".join(problems), asked)
    if seen.is_preview:
        for source in sources:
            for role, form in source.times.items():
                name = source.names[role]
                of_column = source.file.path, name, form
                if of_column not in seen.cells:
                    used = tables.formats_used(database, source.file, name, form)
                    seen.cells[of_column] = used
                seen.formats[role] = seen.cells[of_column]


def find_time(
    database: duck.Database, source: Source, role: str, request: LongRequest, column: str = ""
) -> cells.Instant:
    """Return how the times of a role are read, by default those of its column."""
    if request.time_unit:
        return cells.Counted(request.time_unit)
    earlier = request.earlier.times.get(role, ())
    name = column or source.names[role]
    return tables.find_time(database, source.file, name, request.time_format, earlier)


def check_zones(sources: Sequence[Source]) -> None:
    """Refuse times with a zone beside others without."""
    pairs = [
        (source.names.get(role, role), column.zoned)
        for source in sources
        for role, column in source.times.items()
        if role not in source.dates
    ]
    zoned = [name for name, is_zoned in pairs if is_zoned]
    if 0 < len(zoned) < len(pairs):
        paths = ", ".join(str(source.file.path) for source in sources)
        texts = [name for name, is_zoned in pairs if not is_zoned]
        problem = f"column {zoned[0]}: times with a zone, without one in {join_names(texts)}"
        raise InputError(f"{paths}: {problem}: export all in one zone")
