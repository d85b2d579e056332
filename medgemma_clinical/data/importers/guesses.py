"""What columns of unknown names hold, guessed from their cells for a preview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medgemma_clinical.data.importers import duck
from medgemma_clinical.data.importers.questions import Question
from medgemma_clinical.data.roles import EVENT_ROLES
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import did_you_mean

SAMPLE = 2_000  # lines of a table that are looked at; of patients all are
MOST, SURE, SHARED = 0.9, 0.99, 0.2  # shares of cells that decide what a column holds
MIN_SHARED = 1.5  # patients that have an item, on average
MAX_HOURS = 24 * 30  # from a sample to its result
MAX_DAYS = 100  # between values and an admission, on average; a birth lies further off
UNIT = r"%|\S{1,6}/\S{1,8}|mmHg|°C|fL|pg"
OPTIONAL_ROLES = (("storetime", "unit"), (), ("notes.storetime",))
SUBJECT_ROLES = ("subject_id", "labels.subject_id", "notes.subject_id")


@dataclass(frozen=True)
class Cells:
    """Counts of the cells of a column."""

    name: str
    filled: int
    times: int
    numbers: int
    decimals: int
    units: int
    answers: int  # yes, no and the like
    different: int
    length: float
    middle: float  # of the times, in seconds

    def is_mostly(self, count: int, share: float = MOST) -> bool:
        """Return whether a count is most of the cells that are not empty."""
        return self.filled > 0 and count >= share * self.filled

    @property
    def is_words(self) -> bool:
        """Whether the cells are words, neither times nor numbers."""
        return self.filled > 0 and max(self.times, self.numbers) < self.filled / 2


def time_of(cell: str) -> str:
    """Return SQL for the time of a cell in any form."""
    ways = [duck.Column("instant"), duck.Column("instant", zoned=True)]
    ways += [duck.Column("instant", formats=order) for order in duck.ORDERS]
    sqls = [way.typed(cell) for way in ways]
    is_serial = f"regexp_full_match({cell}, '\\d{{5}}\\.\\d+')"  # a whole one may be an id
    sqls.append(f"CASE WHEN {is_serial} THEN {duck.Column('excel').typed(cell)} END")
    # Most cells are no times, and to try all forms on them is slow.
    may_be = f"length({cell}) BETWEEN 6 AND 40 AND {cell}[1] BETWEEN '0' AND '9'"
    return f"CASE WHEN {may_be} THEN coalesce({', '.join(sqls)}) END"


def look(database: duck.Database, file: duck.TableFile, sample: str, limit: str) -> list[Cells]:
    """Copy some lines of a file into a table, and return counts of each column."""
    with duck.readable(file.path):
        database.run(f"CREATE TABLE {sample} AS FROM {file.rows()} {limit}")
    words = ", ".join(map(duck.literal, (*duck.YES, *duck.NO)))
    found = []
    for name in dict.fromkeys(file.header):
        cell = f"trim({file.raw(name)}::VARCHAR)"
        counts = database.row(
            "SELECT count(*), count(time), count(*) FILTER (looks_numeric(cell)), "
            r"count(*) FILTER (regexp_full_match(cell, '\D*\d+[.,]\d*[1-9]\d*\D*')), "
            f"count(*) FILTER (regexp_full_match(cell, '{UNIT}')), "
            f"count(*) FILTER (lower(cell) IN ({words})), count(DISTINCT lower(cell)), "
            f"coalesce(avg(length(cell)), 0), coalesce(avg(epoch(time)), 0) FROM "
            f"(SELECT {cell} AS cell, {time_of(cell)} AS time FROM {sample}) "
            "WHERE lower(cell) NOT IN ('', 'nan')"
        )
        found.append(Cells(name, *counts))
    return found


def ask(
    database: duck.Database,
    files: Sequence[duck.TableFile],  # of values, of patients, perhaps of notes
    names_of: Sequence[Mapping[str, str]],
    lacking: Sequence[Sequence[str]],  # roles of each file without a column
    request: Any,
) -> list[Question]:
    """Return a question for each role without a column; that of one candidate is a guess."""
    books = [(file, bool(missing)) for file, missing in zip(files, lacking, strict=True)]
    if not request.sheet and any(file.sheets[1:] and missing for file, missing in books):
        return ask_sheets(books)
    if not any(lacking) and {*files[0].header} <= {*names_of[0].values(), *files[1].header}:
        return []  # no column is left for a role that may be missing
    limits = ["" if k == 1 else f"LIMIT {SAMPLE}" for k in range(len(files))]
    cells_of = [look(database, x, f"sample_{k}", limits[k]) for k, x in enumerate(files)]
    mapped, asked = request.mapped(), list[Question]()
    subjects = find_subjects(database, files, cells_of, names_of)
    for k, (file, names, missing) in enumerate(zip(files, names_of, lacking, strict=True)):
        free = [x for x in cells_of[k] if x.name not in {*names.values(), *subjects[k]}]
        if k == 0:
            free = [x for x in free if x.name not in files[1].header]  # as a stay number
            candidates = find_values(database, file, free, names, subjects[0])
        else:
            if k == 1:
                candidates = find_labels(free, cells_of[0])
            else:
                candidates = find_notes(database, file, free, names)
        candidates[SUBJECT_ROLES[k]] = subjects[k]
        optional = [role for role in OPTIONAL_ROLES[k] if role not in names]
        for role in dict.fromkeys((*missing, *optional)):
            absent, found = mapped.get(role, ""), candidates.get(role, [])
            if role in mapped and not absent:
                continue  # the user says that there is none
            if absent:
                hint = did_you_mean(absent, file.header, 0.4)
                near = [x for x in file.header if hint and did_you_mean(absent, [x], 0.4) == hint]
                found = list(dict.fromkeys((*near, *found)))
            if role == "labels.subject_id" and found[:1] == subjects[0][:1]:
                continue  # named alike: the answer to ``subject_id`` holds for both
            if role == "prediction_time":
                asked.append(ask_prediction_time(file, found, absent, request))
            elif role == "label" and len(found) != 1:
                asked.append(ask_label(file, found))
            elif found or role in missing:
                is_subject = role in SUBJECT_ROLES
                text = f"{file.path}: which column is {role}"
                text += ", the patient, not the stay" if is_subject else ""
                text += f", as there is no {absent}" if absent else ""
                is_flag = role in (*EVENT_ROLES, "end_time")
                answers = tuple(name if is_flag else f"{role}={name}" for name in found)
                guessed = len(found) == 1 and not absent and not is_subject
                flag = role if is_flag else "columns"
                asked.append(Question(text, flag, answers, guessed=guessed))
    return asked


def ask_sheets(books: Sequence[tuple[duck.TableFile, bool]]) -> list[Question]:
    """Return which sheet of each workbook is read, the largest where the first is no table."""
    asked, taken = list[Question](), list[tuple[Any, str]]()
    for file, missing in books:
        sheets = [name for name in file.sheets if (file.path, name) not in taken]
        if sheets:
            first = duck.largest_sheet(file.path, sheets) if missing else sheets[0]
            taken.append((file.path, first))
            answers = (first, *(name for name in sheets if name != first))
            ordinal = f", table {len(asked) + 1} of these" if len(asked) else ""
            text = f"{file.path}: which sheet is read{ordinal}"
            asked.append(Question(text, "sheet", answers, guessed=True))
    return asked


def ask_prediction_time(
    file: duck.TableFile, found: Sequence[str], absent: str, request: Any
) -> Question:
    """Return the question when the risk is wanted, which is never a guess."""
    later = f" + {plain(request.window_hours)} h"
    if request.prediction_time:
        later = request.prediction_time.strip().removeprefix(absent)
    text = f"{file.path}: when is the risk wanted, at a moment that is known when it comes"
    text += f"; there is no {absent}" if absent else ""
    return Question(text, "prediction_time", tuple(f"{name}{later}" for name in found))


def ask_end_time(
    database: duck.Database, file: duck.TableFile, unread: Sequence[str], prediction_time: str
) -> Question | None:
    """Return the question whether the stay ends at a time that is not read, nearly always later.

    ``prediction_time`` is SQL on raw cells.
    """
    ends = list[tuple[float, str]]()
    for name in unread:
        cell = f"trim({file.raw(name)}::VARCHAR)"
        rows, filled, late, middle = database.row(
            "SELECT count(*), count(time), count(*) FILTER (time >= predicted), avg(epoch(time)) "
            f"FROM (SELECT {time_of(cell)} AS time, {prediction_time} AS predicted "
            f"FROM {file.rows()})"
        )
        if filled >= MOST * rows and late >= MOST / 2 * rows:
            ends.append((middle, name))
    text = f"{file.path}: is this the end of the stay: rows that ended before the prediction time "
    text += "are left out"
    answers = tuple(name for _, name in sorted(ends, reverse=True))
    return Question(text, "end_time", answers) if ends else None


def ask_label(file: duck.TableFile, found: Sequence[str]) -> Question:
    """Return the question which column is the outcome."""
    if found:
        return Question(f"{file.path}: which outcome is the label", "outcome_column", (*found,))
    problem = f"{file.path}: no column of yes and no: --outcome_column, with --positive of words"
    return Question(problem, "no_labels", ("true",))


# ---------------------------------------------------------------------------- candidates


def find_subjects(
    database: duck.Database,
    files: Sequence[duck.TableFile],
    cells_of: Sequence[Sequence[Cells]],
    names_of: Sequence[Mapping[str, str]],
) -> list[list[str]]:
    """Return the columns of each file that may be the patient: those in both, of few first."""
    may_be = []
    for cells, names, role in zip(cells_of, names_of, SUBJECT_ROLES, strict=False):
        ids = [x for x in cells if x.filled and not x.times and not x.decimals]
        may_be.append([x for x in ids if x.name == names.get(role, x.name)])
    patients, named = may_be[1], SUBJECT_ROLES[1] in names_of[1]
    # A ward, or an age, is shared by many.
    patients = [x for x in patients if named or x.different >= SHARED * x.filled]
    found = []
    for k in range(len(files)):
        pairs = [(x, y) for x in may_be[k] for y in patients]
        same = [(x, y) for x, y in pairs if x.name == y.name]
        alike = [pair for pair in same or pairs if k == 1 or overlap(database, files, k, *pair)]
        found.append([(x.name, y.name) for x, y in sorted(alike, key=lambda p: p[1].different)])
    both = [y for _, y in found[0]]
    found[1] = [(x, y) for x, y in found[1] if x == y and x in both]
    found[1].sort(key=lambda pair: both.index(pair[0]))
    return [list(dict.fromkeys(x for x, _ in pairs)) for pairs in found]


def overlap(
    database: duck.Database, files: Sequence[duck.TableFile], k: int, one: Cells, other: Cells
) -> bool:
    """Return whether enough cells of a file are among those of the patients."""
    cell = duck.Column("id").typed(files[k].raw(one.name))
    patient = duck.Column("id").typed(files[1].raw(other.name))
    (share,) = database.row(
        f"SELECT avg(({cell} IN (SELECT {patient} FROM sample_1))::INTEGER) FROM sample_{k}"
    )
    return bool(share and share >= SHARED)


def find_times(cells: Sequence[Cells]) -> list[str]:
    """Return the columns of times, the earliest first."""
    times = [x for x in cells if x.is_mostly(x.times)]
    return [x.name for x in sorted(times, key=lambda x: x.middle)]


def find_values(
    database: duck.Database,
    file: duck.TableFile,
    cells: Sequence[Cells],
    names: Mapping[str, str],
    subjects: Sequence[str],
) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of values."""
    times, found = find_times(cells), find_pair(database, file, "sample_0", cells, names, "")
    numbers = [x for x in cells if x.name not in times and x.is_mostly(x.numbers, 0.5)]
    found["value"] = [x.name for x in [y for y in numbers if y.decimals] or numbers]
    found["unit"] = [x.name for x in cells if x.is_mostly(x.units, 0.5)][:1]
    words = [x for x in cells if x.is_words and x.name not in found["unit"]]
    words = [x for x in words if 1 < x.different <= x.filled / 2]
    subject = names.get("subject_id", subjects[0] if subjects else "")
    found["item"] = [x.name for x in words if is_shared(database, file, x.name, subject)]
    return found


def find_pair(
    database: duck.Database,
    file: duck.TableFile,
    sample: str,
    cells: Sequence[Cells],
    names: Mapping[str, str],
    prefix: str,  # of the roles
) -> dict[str, list[str]]:
    """Return the candidates of the time, and of the storing time where there is one."""
    times, time, stored = find_times(cells), f"{prefix}time", f"{prefix}storetime"
    pair = [names[time], *times] if time in names else times
    if len(pair) == 2 and is_stored(database, file, sample, *pair):
        return {time: pair[:1], stored: pair[1:]}
    return {time: times}


def is_shared(database: duck.Database, file: duck.TableFile, item: str, subject: str) -> bool:
    """Return whether patients share the words of a column; their own names are no items."""
    patient, word = (file.raw(name) for name in (subject, item))
    pairs, words = database.row(
        f"SELECT count(DISTINCT ({patient}, {word})), count(DISTINCT {word}) FROM sample_0"
    )
    return not subject or bool(pairs >= MIN_SHARED * words)


def is_stored(
    database: duck.Database, file: duck.TableFile, sample: str, first: str, second: str
) -> bool:
    """Return whether times are those of results: soon after the samples were taken."""
    early, late = (time_of(f"trim({file.raw(name)}::VARCHAR)") for name in (first, second))
    share, hours = database.row(
        f"SELECT avg((early <= late)::INTEGER), median(date_diff('hour', early, late)) "
        f"FROM (SELECT {early} AS early, {late} AS late FROM {sample})"
    )
    return bool(share and share > SURE and hours < MAX_HOURS)


def find_labels(cells: Sequence[Cells], values: Sequence[Cells]) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of patients, times near the values' first."""
    answers = [x.name for x in cells if x.is_mostly(x.answers) and x.different == 2]
    measured = [x.middle for x in values if x.is_mostly(x.times)]
    times = [x for x in cells if x.is_mostly(x.times)]
    rows = max((x.filled for x in cells), default=0)

    def distance(x: Cells) -> tuple[bool, bool, float]:
        """Return what makes a column less likely: empty cells, years from the values, late."""
        days = min((abs(x.middle - y) for y in measured), default=0.0) / 86400
        return x.filled < MOST * rows, days > MAX_DAYS, x.middle

    times.sort(key=distance)
    ends = [x.name for x in sorted(times, key=lambda x: (distance(x)[0], -x.middle))]
    return {"prediction_time": [x.name for x in times], "end_time": ends, "label": answers}


def find_notes(
    database: duck.Database, file: duck.TableFile, cells: Sequence[Cells], names: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of notes."""
    texts = sorted((x for x in cells if x.is_words), key=lambda x: -x.length)
    found = find_pair(database, file, "sample_2", cells, names, "notes.")
    return {**found, "notes.text": [x.name for x in texts[:1]]}
