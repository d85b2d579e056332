"""What columns of unknown names may hold, by their names and the form of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medgemma_clinical.data.importers import cells, duck, tables
from medgemma_clinical.data.importers.long_request import LongRequest
from medgemma_clinical.data.importers.questions import Question
from medgemma_clinical.data.importers.sources import Seen, Source
from medgemma_clinical.data.roles import EVENT_ROLES, OPTIONAL, SEX, WORDS
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import did_you_mean

SAMPLE = 2_000  # lines of a table that are looked at; of patients all are
MOST = 0.9  # share of cells that decides what a column holds
MIN_SHARED = 1.5  # patients that have an item, on average
DAYS = (30, 7, 90)  # proposed as the end of a label of dates
UNIT = r"%|\S{1,6}/\S{1,8}|mmHg|°C|fL|pg"
SUBJECT_ROLES = ("subject_id", "labels.subject_id", "notes.subject_id")
STORED = ("storetime", "notes.storetime")
OPTIONAL_ROLES = (("storetime", "unit"), (), ("notes.storetime",))


@dataclass(frozen=True)
class Form:
    """Counts of the cells of a column."""

    name: str
    rows: int
    filled: int
    times: int
    numbers: int
    units: int
    answers: int  # yes, no and the like
    different: int
    length: float

    def is_mostly(self, count: int, share: float = MOST) -> bool:
        """Return whether a count is most of the cells that are not empty."""
        return self.filled > 0 and count >= share * self.filled

    @property
    def is_time(self) -> bool:
        """Whether the cells are times."""
        return self.is_mostly(self.times)

    @property
    def is_words(self) -> bool:
        """Whether the cells are words, neither times nor numbers."""
        return self.filled > 0 and max(self.times, self.numbers) < self.filled / 2

    def means(self, *roles: str) -> bool:
        """Return whether the name has a word of some roles."""
        return any(WORDS[role].search(self.name) for role in roles)


def time_of(cell: str) -> str:
    """Return SQL for the time of a cell in any form."""
    ways = [cells.Instant(), cells.Instant(zoned=True)]
    ways += [cells.Instant(formats=order) for order in cells.ORDERS]
    sqls = [way.typed(cell) for way in ways]
    is_serial = f"regexp_full_match({cell}, '\\d{{5}}\\.\\d+')"  # a whole one may be an id
    sqls.append(f"CASE WHEN {is_serial} THEN {cells.ExcelDay().typed(cell)} END")
    # Most cells are no times, and to try all forms on them is slow.
    may_be = f"length({cell}) BETWEEN 6 AND 40 AND {cell}[1] BETWEEN '0' AND '9'"
    return f"CASE WHEN {may_be} THEN coalesce({', '.join(sqls)}) END"


def look(database: duck.Database, source: Source, limit: str) -> list[Form]:
    """Return the forms of the columns of a file, by some of its lines."""
    words = ", ".join(map(duck.literal, (*cells.YES, *cells.NO)))
    forms = []
    with tables.readable(source.file.path):
        database.run(f"CREATE OR REPLACE TABLE sample AS FROM {source.file.rows()} {limit}")
    for name in dict.fromkeys(source.file.header):
        cell = f"nullif(nullif(trim({source.file.raw(name)}::VARCHAR), ''), 'nan')"
        counts = database.row(
            "SELECT count(*), count(cell), count(time), count(*) FILTER (looks_numeric(cell)), "
            f"count(*) FILTER (regexp_full_match(cell, '{UNIT}')), "
            f"count(*) FILTER (lower(cell) IN ({words})), count(DISTINCT lower(cell)), "
            "coalesce(avg(length(cell)), 0) FROM "
            f"(SELECT {cell} AS cell, {time_of(cell)} AS time FROM sample)"
        )
        forms.append(Form(name, *counts))
    return forms


def ask(
    database: duck.Database,
    seen: Seen,
    lacking: Sequence[Sequence[str]],  # roles of each source without a column
    request: LongRequest,
) -> list[Question]:
    """Return a question for each role without a column; that of one candidate is a guess."""
    sources = seen.sources
    if not request.sheet:
        pairs = [*zip(sources, lacking, strict=True)]
        if any(source.file.sheets[1:] and missing for source, missing in pairs):
            return ask_sheets(pairs)
    if not any(lacking) and not {*sources[0].unread} - {*sources[1].file.header}:
        return []  # no column is left for a role that may be missing
    mapped, asked = request.mapped(), list[Question]()
    for k, (source, missing) in enumerate(zip(sources, lacking, strict=True)):
        free, candidates = find_candidates(database, seen, k)
        optional = [role for role in OPTIONAL_ROLES[k] if role not in source.names]
        for role in dict.fromkeys((*missing, *optional)):
            absent = mapped.get(role) or request.earlier.columns.get(role, "")
            if role in mapped and not absent:
                continue  # the user says that there is none
            names = candidates.get(role, [])
            if absent:
                names = near_first(absent, names, free, is_typed=role in mapped)
            if role == "label" and absent and not names:  # words that --positive explains
                names = [x.name for x in free if x.different == 2 and not SEX.search(x.name)]
            if role == "labels.subject_id" and names[:1] == asked_subject(asked):
                continue  # named alike: the answer to ``subject_id`` holds for both
            is_titled = any(outcome.title for outcome in request.outcomes())
            if role == "prediction_time":
                asked.append(ask_prediction_time(source.file, names, absent, request))
            elif role == "label" and (len(names) != 1 or is_titled):
                asked.append(ask_label(source.file, names, free, request))
            elif names or role in missing:
                asked.append(ask_role(source.file, role, names, absent, is_typed=role in mapped))
    return asked


def find_candidates(
    database: duck.Database, seen: Seen, k: int
) -> tuple[list[Form], dict[str, list[str]]]:
    """Return the columns of source ``k`` that no role has, and the candidates of each role."""
    source, role = seen.sources[k], SUBJECT_ROLES[k]
    key = source.file.path, *source.file.sheets[:1]
    if key not in seen.cells:
        seen.cells[key] = look(database, source, "" if k == 1 else f"LIMIT {SAMPLE}")
    headers = [x.file.header for x in seen.sources if x is not source]
    subjects = find_subjects(seen.cells[key], headers)
    subject = source.names.get(role, "".join(subjects[:1]))
    free = [x for x in seen.cells[key] if x.name not in (*source.names.values(), subject)]
    if k == 0:
        labels = seen.sources[1].file.header
        free = [x for x in free if x.name not in labels]  # as a stay number
        candidates = find_values(database, source, free, subject)
    elif k == 1:
        candidates = find_labels(free)
    else:
        candidates = find_notes(free, source)
    return free, {role: subjects} | candidates


def near_first(
    absent: str, names: Sequence[str], free: Sequence[Form], *, is_typed: bool
) -> list[str]:
    """Return candidates for a role, those that are named like its absent column first."""
    near = [x.name for x in free if did_you_mean(absent, [x.name], 0.6)]
    if names and not is_typed:  # the form of the cells tells more
        near = [name for name in near if name in names]
    return list(dict.fromkeys((*near, *names)))


def ask_role(
    file: tables.TableFile, role: str, found: Sequence[str], absent: str, *, is_typed: bool
) -> Question:
    """Return the question which column a role has, a guess where one has its name and form."""
    text = f"{file.path}: which column is {role}"
    text += ", the patient, not the stay" if role in SUBJECT_ROLES else ""
    text += f", as there is no {absent}" if absent else ""
    if role in ("end_time", "event_time"):
        return Question(text, role, tuple(found))
    answers = [f"{role}={name}" for name in found]
    if role in OPTIONAL and absent and not is_typed:
        answers.append(f"{role}=")
    is_sure = len(found) == 1 and not absent and role not in SUBJECT_ROLES
    if role in STORED:
        is_sure &= any(WORDS["storetime"].search(name) for name in found)
    return Question(text, "columns", tuple(answers), guessed=is_sure)


def times_of_some(seen: Seen, source: Source) -> list[str]:
    """Return the columns of times of some rows that nothing reads, as far as a preview looked."""
    forms = seen.cells.get((source.file.path, *source.file.sheets[:1]), [])
    some = [x.name for x in forms if x.is_time and x.filled < MOST * x.rows]
    return [name for name in some if name in source.unread]


def asked_subject(asked: Sequence[Question]) -> list[str]:
    """Return the first answer to which column is the patient, as a list."""
    begin = f"{SUBJECT_ROLES[0]}="
    answers = [x.answers[0] for x in asked if x.answers]
    return [x.removeprefix(begin) for x in answers if x.startswith(begin)][:1]


def ask_sheets(pairs: Sequence[tuple[Source, Sequence[str]]]) -> list[Question]:
    """Return which sheet of each workbook is read, the largest where the first is no table."""
    asked, taken = list[Question](), list[tuple[object, str]]()
    for source, missing in pairs:
        path = source.file.path
        sheets = [name for name in source.file.sheets if (path, name) not in taken]
        if not sheets:
            continue
        first = tables.largest_sheet(path, sheets) if missing else sheets[0]
        taken.append((path, first))
        answers = (first, *(name for name in sheets if name != first))
        ordinal = f", table {len(asked) + 1} of these" if asked else ""
        text = f"{path}: which sheet is read{ordinal}"
        asked.append(Question(text, "sheet", answers, guessed=True))
    return asked


def ask_prediction_time(
    file: tables.TableFile, found: Sequence[str], absent: str, request: LongRequest
) -> Question:
    """Return the question when the risk is wanted, which is never a guess."""
    later = f" + {plain(request.window_hours)} h"
    if request.prediction_time:
        later = request.prediction_time.strip().removeprefix(absent)
    text = f"{file.path}: when is the risk wanted, at a moment that is known when it comes"
    text += f"; there is no {absent}" if absent else ""
    return Question(text, "prediction_time", tuple(f"{name}{later}" for name in found))


def ask_end_time(source: Source, request: LongRequest) -> Question | None:
    """Return the question whether a column named like an end is the end of the stay."""
    if request.like or {"end_time", "event_time"} & {*source.names}:
        return None
    found = [name for name in source.unread if WORDS["end_time"].search(name)]
    text = f"{source.file.path}: is this the end of the stay: rows that ended before the prediction"
    text += " time are left out"
    return Question(text, "end_time", tuple(found)) if found else None


def ask_label(
    file: tables.TableFile, found: Sequence[str], free: Sequence[Form], request: LongRequest
) -> Question:
    """Return the question which column is the outcome: of yes and no, or of times of some rows."""
    times = [x for x in free if x.is_time and x.filled < MOST * x.rows]
    times.sort(key=lambda x: not x.means("death"))
    if outcomes := [x for x in request.outcomes() if x.title]:
        title, column = outcomes[0].title, outcomes[0].column
        names = [x.name for x in times] if outcomes[0].is_dated else [*found]
        text = f"{file.path}: which column is {title}, as there is no {column}"
        return Question(text, "label", tuple(f"{title}={x}" for x in names))
    if found:
        return Question(f"{file.path}: which outcome is the label", "outcome_column", (*found,))
    problem = f"{file.path}: no column of yes and no"
    if times:
        titles = ["death" if x.means("death") else x.name for x in times]
        pairs = zip(titles, times, strict=True)
        answers = [text for title, x in pairs for text in within_days(title, x.name)]
        text = f"{problem}: by when comes which of these, or --event 'NAME={times[0].name}'"
        return Question(text, "label", tuple(answers))
    text = f"{problem}: --outcome_column, with --positive of words"
    return Question(text, "no_labels", ("true",))


def within_days(title: str, column: str) -> tuple[str, ...]:
    """Return labels that are proposed of a column of dates."""
    return tuple(f"{title} within {days} days={column}" for days in DAYS)


# ---------------------------------------------------------------------------- candidates


def by_name(forms: Sequence[Form], *roles: str) -> list[str]:
    """Return the names of the columns that are named like some roles, or else of all."""
    return [x.name for x in forms if x.means(*roles)] or [x.name for x in forms]


def find_subjects(forms: Sequence[Form], others: Sequence[Sequence[str]]) -> list[str]:
    """Return the columns that may be the patient: named so, and in the other tables, too."""
    ids = [x for x in forms if x.filled and not x.is_time and not x.is_mostly(x.answers)]
    shared = [x for x in ids if all(x.name in header for header in others)]
    named = [x.name for x in ids if x.means("subject_id")]
    both = by_name(shared, "subject_id")
    return [*both, *(x.name for x in shared if x.name not in both)] or named


def find_values(
    database: duck.Database, source: Source, forms: Sequence[Form], subject: str
) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of values."""
    found = find_pair(forms, "", source)
    numbers = [x for x in forms if not x.is_time and x.is_mostly(x.numbers, 0.5)]
    found["value"] = by_name(numbers, "value")
    units = [x for x in forms if x.is_words and x.is_mostly(x.units, 0.5)]
    found["unit"] = by_name(units, "unit")[:1]
    words = [x for x in forms if x.is_words and x.name not in found["unit"]]
    words = [x for x in words if 1 < x.different <= x.filled / 2]
    words = [x for x in words if is_shared(database, source.file, x.name, subject)]
    found["item"] = by_name(words, "item")
    return found


def is_shared(database: duck.Database, file: tables.TableFile, item: str, subject: str) -> bool:
    """Return whether patients share the words of a column; their own names are no items."""
    patient, word = (file.raw(name) for name in (subject, item))
    pairs, words = database.row(
        f"SELECT count(DISTINCT ({patient}, {word})), count(DISTINCT {word}) "
        f"FROM (FROM {file.rows()} LIMIT {SAMPLE})"
    )
    return not subject or bool(pairs >= MIN_SHARED * words)


def find_pair(forms: Sequence[Form], prefix: str, source: Source) -> dict[str, list[str]]:
    """Return the candidates of the time, and of the time of storing, which its name tells."""
    times = [x for x in forms if x.is_time]
    stored = [x.name for x in times if x.means("storetime")]
    first = [x for x in times if x.name not in stored]
    named = by_name(first, "time")
    named += [x.name for x in first if x.name not in named]
    rest = named if f"{prefix}time" in source.names else named[1:]
    return {f"{prefix}time": named or stored, f"{prefix}storetime": stored or rest}


def find_labels(forms: Sequence[Form]) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of patients."""
    answers = [x.name for x in forms if x.is_mostly(x.answers) and x.different == 2]
    times = [x for x in forms if x.is_time]
    whole = [x for x in times if x.filled >= MOST * x.rows] or times
    order = ("prediction_time", "end_time", "birth")
    whole.sort(key=lambda x: (not x.means(order[0]), x.means(*order[1:])))
    ends = sorted(times, key=lambda x: not x.means("end_time"))
    ids = [x.name for x in forms if x.different == x.rows and not x.is_time and not x.is_words]
    roles = {"prediction_time": [x.name for x in whole], "label": answers, "id": ids}
    return roles | {role: [x.name for x in ends] for role in ("end_time", EVENT_ROLES[0])}


def find_notes(forms: Sequence[Form], source: Source) -> dict[str, list[str]]:
    """Return the candidates of each role of a table of notes."""
    texts = sorted((x for x in forms if x.is_words), key=lambda x: -x.length)
    return {**find_pair(forms, "notes.", source), "notes.text": [x.name for x in texts[:1]]}
