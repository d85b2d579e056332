"""from_long's table of labels: outcomes, static features and what else comes along of each row."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data import dka, roles
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, events, guesses, tables
from medgemma_clinical.data.importers.long_request import LongRequest, Outcome
from medgemma_clinical.data.importers.long_values import MAX_LETTERS, MAX_WORDS, check_texts
from medgemma_clinical.data.importers.notes import NoteText
from medgemma_clinical.data.importers.questions import OpenQuestions, Question, unclear
from medgemma_clinical.data.importers.sources import Seen, Source, check_alike, find_time
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.files import InputError, did_you_mean, one_line

logger = logging.getLogger(__name__)

CONTEXT, MAX_CATEGORIES = "clinical_context", 20
WRITTEN = ("id", "subject_id", "prediction_time", dka.MAIN_COLUMN, dka.HOURS, dka.LABEL)
LABEL = cells.Label(may_be_empty=True, advice="--positive WORD names that of 1")
CENSORED = ("", "nan", "none", "censored", "alive", *cells.NO)
HOUR = cells.MICROSECONDS["hours"]
# Columns beside those of a header, of which no name begins with a space.
KEPT = " kept "  # is written as it is
EVENT = "Event"  # the outcome where nothing names it
# Of dated events: their hours, whether these are ends of days, and the end of the record.
HOURS_OF, DATES_OF, END_HOURS = f"{KEPT} hours of ", f"{KEPT} is a date ", f"{KEPT} end"
IS_PAST = f"{events.RULE}the event, or the end of the record, before the prediction time"
PREDICTED, LAST, ZONE = "predicted", "last_known", '" zone"'
"""In SQL on ``answers``: the prediction time, and the last time of the tables."""


@dataclass
class Taking:
    """What is taken of the table of labels: cells to read, and SQL of what becomes of them."""

    database: duck.Database
    source: Source
    request: LongRequest
    columns: dict[str, cells.Column] = field(default_factory=dict)  # of the table ``answers``
    select: dict[str, str] = field(default_factory=dict)  # of the table ``label``
    times: list[str] = field(default_factory=list)  # SQL of the cells that are times
    problems: list[str] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    free: list[str] = field(default_factory=list)  # columns of times of some rows, in a preview

    def find(self, flag: str, text: str, title: str = "", *, may_lack: bool = False) -> str | None:
        """Return the column that a flag names; what an earlier output names may be missing."""
        file = self.source.file
        if (column := roles.find_column(file.header, text)) is not None:
            check_alike(file, f"--{flag} '{title}'" if title else f"--{flag}", column, text)
            return column
        begin = f"{title}=" if title else ""
        where = f"--{flag} {begin}{text}: {file.path}"
        if may_lack and self.request.like:
            logger.warning("warning: %s: no such column", where)
            return None
        self.problems.append(f"{where}: no such column among {dka.join_names(file.header)}")
        kinds = [kind for kind in (roles.SEX, roles.WORDS["age"]) if kind.search(text)]
        near = [x for x in file.header if any(kind.search(x) for kind in kinds)]
        if flag == "event":
            is_death = roles.WORDS["death"].search(title) is not None
            near = sorted(self.free, key=lambda x: is_death != bool(roles.WORDS["death"].search(x)))
            near.sort(key=lambda x: title.lower() not in x.lower())
        free = [x for x in file.header if x not in self.source.names.values() and x not in near]
        near += [x for x in free if did_you_mean(text, [x], 0.6)]
        answers = [f"{begin}{x}" for x in near] + ([begin] if flag == "static" else [])
        self.asked.append(Question(f"{file.path}: there is no {text}", flag, tuple(answers)))
        return None

    def read(self, role: str, name: str, column: str, form: cells.Column) -> str:
        """Read a column for a role of the screen; return SQL for its cell."""
        if role and role not in self.source.names:
            self.source.taken[role] = column
        self.columns[name] = replace(form, source=column)
        return duck.quoted(name)

    def read_time(self, role: str, column: str) -> tuple[str, str]:
        """Read a column of times; return SQL for its cell, and for the last moment that it means.

        In a column without any time of day a date stands for the whole day.
        """
        if role not in self.source.times:
            self.source.times[role] = find_time(
                self.database, self.source, role, self.request, column
            )
        form = replace(self.source.times[role], may_be_empty=True)
        cell = self.read(role, f" {role}", column, form)
        are_dates = f"(SELECT bool_and({cell} = date_trunc('day', {cell})) FROM answers)"
        day = f"INTERVAL 86399999999 MICROSECOND * {are_dates}::INTEGER"
        if self.source.times["prediction_time"].zoned and not form.zoned:
            time = form.typed(self.source.file.raw(column))
            is_day = f"bool_and({time} = date_trunc('day', {time}))"
            (only_dates,) = self.database.row(f"SELECT {is_day} FROM {self.source.file.rows()}")
            if only_dates:  # they have no zone: that of the prediction time is theirs
                self.source.dates.add(role)
                cell = f"({cell} - to_minutes(zone_minutes({ZONE})))"
        self.times.append(cell)
        return cell, f"({cell} + {day})"


def load_labels(
    database: duck.Database, sources: Sequence[Source], request: LongRequest, seen: Seen
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Make the table ``label`` and windows of it.

    Return the categories of each static feature, and the meaning of each label beside the main one.
    """
    source = sources[1]
    taking = Taking(database, source, request, free=guesses.times_of_some(seen, source))
    take_patient(taking)
    static = take_static(taking)
    outcomes = take_outcomes(taking)
    take_events(taking)
    take_end(taking)
    take_kept(taking, outcomes)
    if taking.problems:
        raise OpenQuestions("; ".join(taking.problems), taking.asked)
    if seen.is_preview and (asked := guesses.ask_end_time(source, request)):
        raise unclear([asked])
    source.log()
    tables.load_table(database, "answers", source.file, taking.columns)
    categories = select_static(taking, static, seen)
    _, delay = request.prediction_time_column()
    column = duck.quoted(source.names["prediction_time"])
    predicted = f"{column} + to_microseconds({round(delay * HOUR)}) AS {PREDICTED}"
    last = f"{last_time(taking, sources[0])} AS {LAST}"
    columns = ", ".join(f"{sql} AS {duck.quoted(name)}" for name, sql in taking.select.items())
    database.run(
        f"CREATE TABLE label AS SELECT {columns} FROM (SELECT *, {predicted}, {last} FROM answers)"
    )
    events.add_windows(database, request, cells.MICROSECONDS.get(request.time_unit, 0))
    return categories, outcomes


# ---------------------------------------------------------------------------- what is taken


def take_patient(taking: Taking) -> None:
    """Take the patient, the prediction time with its zone, and the id of a row."""
    names = taking.source.names
    subject, time = names["labels.subject_id"], names["prediction_time"]
    form = taking.source.times["prediction_time"]
    taking.select = {
        "subject": taking.read("", subject, subject, events.SUBJECT),
        events.PATIENT: taking.read("", events.PATIENT, subject, cells.WrittenId()),
        "prediction_time": PREDICTED,
        "label": "NULL::INTEGER",
        "zone": "''",
    }
    taking.read("", time, time, form)
    if form.zoned:
        taking.select["zone"] = taking.read("", " zone", time, cells.Zone())
    if "id" in names:
        taking.select["id"] = taking.read("", " id", names["id"], cells.Word())


def take_static(taking: Taking) -> dict[Feature, str]:
    """Take the columns of --static, the last one of each name; empty: not measured."""
    file, request = taking.source.file, taking.request
    last = dict[str, Feature]()
    for text in request.static:
        (feature,) = events.parse_features("static", [text], code_needed=False)
        earlier = last.get(dka.comparable(feature.name), feature)
        last[dka.comparable(feature.name)] = replace(feature, unit=feature.unit or earlier.unit)
    found = dict[Feature, str]()
    for feature in last.values():
        if not feature.keys:
            words = request.earlier.static.get(feature.title, ())
            columns = name_categories(feature.name, words, {})[1] if words else []
            names = [name for name, _ in columns] or [f"{dka.STATIC}{feature.title}"]
            taking.select |= dict.fromkeys(names, "NULL::VARCHAR")
            continue
        column = taking.find("static", str(feature.keys[0]), feature.title)
        if column is None:
            continue
        if column in (*taking.source.names.values(), *found.values()):
            problem = f"{column} is read already"
            raise InputError(f"--static {feature.title}={column}: {file.path}: {problem}")
        found[feature] = column
        if roles.is_site(column) or roles.is_site(feature.name):
            logger.warning("warning: %s, column %s: %s", file.path, column, roles.SITE_INPUT)
    for feature, column in found.items():
        taking.read(f"static {feature.name}", column, column, file.value(column, request.decimal))
    return found


def take_outcomes(taking: Taking) -> dict[str, str]:
    """Take the labels; return the meaning of each further one by its name."""
    request, names, file = taking.request, taking.source.names, taking.source.file
    if "label" not in names:
        return {}
    outcomes, titles = {"label": Outcome("", names["label"])}, dict[str, str]()
    for outcome in request.outcomes():
        flag = "label" if outcome.title else "outcome_column"
        column = taking.find(flag, outcome.column, outcome.title, may_lack=True)
        if column is None:
            continue
        outcome = replace(outcome, column=column)
        if column == names["label"] and not outcomes["label"].title:
            outcomes["label"] = outcome
            continue
        words = re.sub(r"\W+", "_", (outcome.name or column).lower()).strip("_")
        name = f"label_{words.removeprefix('label_')}"
        if outcomes.get(name) == outcome or outcome == outcomes["label"]:
            continue
        if name in outcomes or name == dka.LABEL or not words:
            where = f"--{flag} {outcome.column}: {file.path}"
            raise InputError(f"{where}: {name} is the name of two outcomes: rename one")
        outcomes[name], titles[name] = outcome, outcome.name or column
    dated = {name for name, outcome in outcomes.items() if holds_times(taking, outcome)}
    yes_or_no = {x.column: x for name, x in outcomes.items() if name not in dated}
    forms = find_positive(taking, [*yes_or_no])
    for name, outcome in outcomes.items():
        if name in dated:
            taking.select[name] = take_date(taking, name, outcome)
        else:
            role = name if name != "label" else ""
            form = forms[outcome.column]
            taking.select[name] = taking.read(role, f" {name}", outcome.column, form)
    return titles


def holds_times(taking: Taking, outcome: Outcome) -> bool:
    """Return whether an outcome is a column of times; refuse one without an end."""
    file, has_end = taking.source.file, outcome.is_dated
    cell = f"trim({file.raw(outcome.column)}::VARCHAR)"
    time, number = guesses.time_of(cell), cells.NUMBER.typed(file.raw(outcome.column))
    if taking.request.time_unit:  # a label has numbers, too
        time = f"CASE WHEN {number} NOT IN (0, 1) THEN {number} END"
    times, filled = taking.database.row(
        f"SELECT count({time}), count(nullif({cell}, '')) FROM {file.rows()}"
    )
    if times <= guesses.MOST * filled or not filled:
        return has_end and not filled
    if not has_end:
        title = outcome.title or "NAME"
        problem = f"{file.path}, column {outcome.column}: holds times, not yes and no"
        answers = guesses.within_days(title, outcome.column)
        advice = f"--label '{answers[0]}', or '{title} by END_COLUMN={outcome.column}'"
        asked = Question(f"{problem}: by when", "label", answers)
        raise OpenQuestions(f"{problem}: {advice}", [asked])
    return True


def take_date(taking: Taking, name: str, outcome: Outcome) -> str:
    """Return SQL for a label of dates: whether one comes by the end, where that is known."""
    at, late = taking.read_time(name, outcome.column)
    if outcome.until:
        column = taking.find("label", outcome.until, outcome.title)
        end = taking.read_time(f"end of {name}", column)[1] if column else "NULL::TIMESTAMP"
    else:
        end = f"{PREDICTED} + to_microseconds({round((outcome.hours or 0) * HOUR)})"
    is_over = f"coalesce({late} < {PREDICTED}, false) OR coalesce({end} < {PREDICTED}, false)"
    if name == "label":
        rule = f"{events.RULE}{outcome.title}: before the prediction time"
        taking.select[rule] = is_over
    is_within = f"{at} <= coalesce({end}, {at})"  # a stay without an end goes on
    is_known = f"{end} <= {LAST}"
    return f"CASE WHEN {is_over} THEN NULL WHEN {is_within} THEN 1 WHEN {is_known} THEN 0 END"


def last_time(taking: Taking, values: Source) -> str:
    """Return SQL for the last time of both tables, beyond which no event can be known."""
    if not any(LAST in sql for sql in taking.select.values()):
        return "NULL"
    time = values.times["time"].typed(values.file.raw(values.names["time"]))
    with tables.readable(values.file.path):
        (last,) = taking.database.row(f"SELECT max({time}) FROM {values.file.rows()}")
    times = [f"TIMESTAMP '{last}'"] if last else []
    times += [f"(SELECT max({cell}) FROM answers)" for cell in taking.times]
    return f"greatest({', '.join(times)})"


def take_events(taking: Taking) -> None:
    """Take times to events: of a column that names them, or of a column of times of each."""
    request, names, select = taking.request, taking.source.names, taking.select
    if request.no_labels:
        take_past(taking)
        return
    hours = f"(epoch_us({{}}) - epoch_us({PREDICTED})) / {HOUR}"
    if "event" in names:
        file, column = taking.source.file, names["event"]
        form = find_causes(taking.database, file, column, request)
        cause = taking.read("", " cause", column, form)
        _, end = taking.read_time("event_time", names["event_time"])
        # An empty cell is censored, but nothing is known where the time is empty, too.
        known = f"CASE WHEN {cause} > 0 OR {end} IS NOT NULL THEN {cause} END"
        first = end
        select[KEPT + dka.EVENT_HOURS] = f"tidy({hours.format(end)})"
        select[KEPT + dka.EVENT] = known
        main = f"{known} = 1"
    elif dated := request.dated_events():
        ended = [role for role in ("event_time", "end_time") if role in names][:1]
        ends = [taking.read_time(role, names[role])[1] for role in ended]
        columns = []
        for name, text in dated.items():
            event_column = taking.find("event", text, name)
            if event_column is None:
                continue
            at, late = taking.read_time(f"event {name}", event_column)
            # What comes on a day after the end of the record is not observed of all.
            seen = f"coalesce(date_trunc('day', {at}) <= {ends[0]}, true)" if ends else "true"
            columns.append(f"CASE WHEN {seen} THEN {late} END")
            select[f"{HOURS_OF}{name}"] = hours.format(columns[-1])
            select[f"{DATES_OF}{name}"] = f"({late} != {at})::INTEGER"
        select[END_HOURS] = hours.format(ends[0]) if ends else "NULL::DOUBLE"
        first = f"least({', '.join(columns)})" if columns else "NULL::TIMESTAMP"
        main = f"coalesce({columns[0]} <= {first}, false)" if columns else "false"
        first = f"coalesce({first}, {ends[0]})" if ends else first
    else:
        return
    select[IS_PAST] = f"{first} < {PREDICTED}"
    if "label" not in names:
        select["label"] = f"({main})::INTEGER"  # is counted as the event


def take_past(taking: Taking) -> None:
    """Leave out new patients whose outcome, or end, is known to lie before the prediction time."""
    request, header = taking.request, taking.source.file.header
    texts = {f"event {name}": text for name, text in request.dated_events().items()}
    texts |= {"event_time": {**request.earlier.columns, **request.mapped()}.get("event_time", "")}
    for outcome in request.outcomes()[:1]:
        texts |= {"label": outcome.column} if outcome.is_dated else {}
        texts |= {"end of label": outcome.until}
    found = {role: roles.find_column(header, text) for role, text in texts.items() if text}
    moments = [taking.read_time(role, column)[1] for role, column in found.items() if column]
    if moments:
        taking.select[IS_PAST] = f"least({', '.join(moments)}) < {PREDICTED}"


def take_end(taking: Taking) -> None:
    """Take the end of the stay: rows that ended before the prediction time are left out."""
    if column := taking.source.names.get("end_time"):
        _, late = taking.read_time("end_time", column)
        rule = f"{events.RULE}the stay ended before the prediction time"
        taking.select[rule] = f"coalesce({late} < {PREDICTED}, false)"


def take_kept(taking: Taking, outcomes: Mapping[str, str]) -> None:
    """Take the text of the context and the columns of --keep."""
    source, request = taking.source, taking.request
    taken = [*WRITTEN, *outcomes, *([CONTEXT] if request.context_column or request.notes else [])]
    has_events = "event" in source.names or request.dated_events()
    taken += dka.EVENT_COLUMNS if has_events else ()
    if request.context_column:
        column = taking.find("context_column", request.context_column)
        if column is not None:
            form = NoteText(max_words=request.max_note_words)
            name = KEPT + CONTEXT
            taking.select[name] = taking.read(CONTEXT, name, column, form)
    for text in request.keep:
        column = taking.find("keep", text, may_lack=True)
        if column is None or column in source.kept:
            continue
        key = dka.comparable(column)
        if key in map(dka.comparable, taken) or key.startswith(("trajectory", "static ")):
            where = f"--keep {text}: {source.file.path}, column {column}"
            raise InputError(f"{where}: is a name of the output: rename it")
        source.kept.append(column)
        taking.select[KEPT + column] = taking.read("", KEPT + column, column, cells.Text())


# ---------------------------------------------------------------------------- static features


def select_static(
    taking: Taking, static: Mapping[Feature, str], seen: Seen
) -> dict[str, list[str]]:
    """Add the columns of static features; return their categories by title."""
    categories = {title: [*words] for title, words in taking.request.earlier.static.items()}
    for feature, column in static.items():
        sql, words = make_static(taking, feature, column, seen)
        categories[feature.title] = words
        for name, column_sql in sql:
            if dka.comparable(name) in map(dka.comparable, taking.select):
                where = f"{taking.source.file.path}, column {column}"
                problem = "is the name of two columns: rename a category or a static feature"
                raise InputError(f"{where}: {name} {problem}")
            taking.select[name] = column_sql
    return categories


def make_static(
    taking: Taking, feature: Feature, column: str, seen: Seen
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return columns of a static feature with their SQL, and its categories: none of numbers."""
    database, file, request = taking.database, taking.source.file, taking.request
    where, cell = f"{file.path}, column {column}", duck.quoted(column)
    word = f"lower(coalesce({cell}.text, plain({cell}.number)))"
    is_sex, sexes = roles.SEX.fullmatch(feature.name) is not None, read_sexes(request.sex)
    (numbers,) = database.row(f"SELECT count({cell}.number) FROM answers")
    select = f"SELECT DISTINCT {word} AS word FROM answers WHERE word IS NOT NULL ORDER BY 1"
    is_number = numbers and not is_sex
    words = [] if is_number else [text for (text,) in database.rows(select)]
    if is_sex and (unknown := [x for x in words if x.isdigit() and x not in sexes]):
        ask_sexes(where, unknown)
    words = [*request.earlier.static.get(feature.title, words)]
    if is_sex and {*words} <= {*roles.MALE, *roles.FEMALE, *roles.OTHER_SEX, *sexes}:
        words = [*roles.SEXES]  # whatever the words of another table are
    if len(words) > MAX_CATEGORIES:
        raise InputError(f"{where}: {len(words):,} different texts, {MAX_CATEGORIES} may be")
    if not words:
        patient = duck.quoted(events.PATIENT)
        seen.signs |= check_texts(database, "answers", column, file, request, patient=patient)
        number = f"plain(coalesce({cell}.number, at_limit({cell}.text)))"
        return [(f"{dka.STATIC}{feature.title}", number)], words
    categories, columns = name_categories(feature.name, words, sexes)
    is_category, sql = f"{word} IN ({', '.join(map(duck.literal, categories))})", []
    (count,) = database.row(f"SELECT count(*) FROM answers WHERE NOT {is_category}")
    if count:
        problem = "neither female nor male" if is_sex else "of no known category"
        logger.warning("warning: %s: %s %s: empty", where, cells.count_cells(count), problem)
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
        if not word or sex not in (*roles.SEXES, "unknown"):
            raise InputError(f"--sex {text}: write WORD=male, WORD=female or WORD=unknown")
        sexes[word] = sex
    return sexes


def ask_sexes(where: str, words: Sequence[str]) -> None:
    """Ask which numbers are which sex: registries differ."""
    chosen = list[tuple[str, ...]]()
    for k, word in enumerate(words):
        order = (*roles.SEXES[k % 2 :], *roles.SEXES[: k % 2], "unknown")
        if len(words) > len(roles.SEXES) and word not in ("1", "2"):
            order = ("unknown", *roles.SEXES)
        chosen.append(tuple(f"{word}={sex}" for sex in order))
    example = " ".join(answers[0] for answers in chosen)
    advice = f"--sex {example}, or another of male, female and unknown"
    problem = "which number is which sex"
    raise unclear([Question(problem, "sex", x, advice=advice) for x in chosen], where)


def name_categories(
    name: str, words: Sequence[str], sexes: Mapping[str, str]
) -> tuple[Sequence[str], list[tuple[str, Sequence[str]]]]:
    """Return the categories, and those that are 1 in each column: one column for two of them."""
    is_sex = roles.SEX.fullmatch(name) is not None
    title = "sex_male" if is_sex else f"{name.lower()}_male"
    male, female = (
        (*usual, *(word for word, sex in sexes.items() if is_sex and sex == named))
        for usual, named in ((roles.MALE, "male"), (roles.FEMALE, "female"))
    )
    # A third sex leaves the cell empty.
    others = {*roles.OTHER_SEX, *sexes} if is_sex else set[str]()
    known = {*male, *female, *others}
    pairs_of_words = (
        (male, female, known, title),
        (cells.YES, cells.NO, {*cells.YES, *cells.NO}, name),
    )
    for ones, zeros, allowed, title in pairs_of_words:
        if {*words} <= allowed:
            return (*ones, *zeros), [(f"{dka.STATIC}{title}", ones)]
    with_column = words[1:] if len(words) == 2 else words
    titles = [" ".join(re.sub(r"[\[\],*=]", " ", word).split()) for word in with_column]
    pairs = zip(titles, with_column, strict=True)
    return words, [(f"{dka.STATIC}{name} {title}", (word,)) for title, word in pairs]


# ---------------------------------------------------------------------------- words


def find_positive(taking: Taking, columns: Sequence[str]) -> dict[str, cells.Column]:
    """Return how the label of each column is read: by those words of --positive that it holds.

    Refuses words that only --positive explains, and one that no column holds.
    """
    database, file, request = taking.database, taking.source.file, taking.request
    found, unused = dict[str, cells.Column](), {word.strip().lower() for word in request.positive}
    for column in columns:
        raw, where = file.raw(column), f"{file.path}, column {column}"
        cell = f"trim({raw}::VARCHAR)"
        select = f"SELECT lower({cell}) AS word, count(*) AS count, min({cell}) FROM {file.rows()}"
        words = database.rows(f"{select} GROUP BY 1 ORDER BY count DESC, word")
        held = {word for word, *_ in words}
        own = tuple(x for x in request.positive if x.strip().lower() in held)
        unused -= {x.strip().lower() for x in own}
        # New patients may have no event.
        label = replace(LABEL, source=column, positive=request.positive if request.like else own)
        found[column] = label
        (count,) = database.row(
            f"SELECT count(*) FILTER ({label.is_wrong(raw)}) FROM {file.rows()}"
        )
        if count:
            known = [text for word, _, text in words[::-1] if (word or "") not in cells.NOT_KNOWN]
            given = f"--positive {', '.join(request.positive)}: " if request.positive else ""
            problem = f"{given}{where}: {label.problem(count)}"
            answers = tuple(known) if len(known) <= MAX_WORDS else ()
            raise unclear([Question(problem, "positive", answers, of_cells=True)])
        if own:
            log_labels(where, words, own)
    if unused and not request.like:
        raise InputError(f"--positive {', '.join(sorted(unused))}: {file.path}: no outcome has it")
    return found


def log_labels(where: str, words: Sequence[tuple[str, int, str]], positive: Sequence[str]) -> None:
    """Log which words of a column are 1 and 0."""
    ones = {word.strip().lower() for word in positive}
    known = [(word, count) for word, count, _ in words if (word or "") not in cells.NOT_KNOWN]
    for value in (1, 0):
        of_value = [(word, count) for word, count in known if (word in ones) == value]
        # A rare one that nobody typed may be a remark on a patient.
        named = [(word, count) for word, count in of_value if value or count >= MIN_CELL]
        shown = [f"{one_line(word[:MAX_LETTERS])} ({count:,})" for word, count in named]
        if rest := sum(n for _, n in of_value) - sum(n for _, n in named):
            shown.append(f"other words ({rest:,})")
        logger.info("%s: %d is %s", where, value, dka.join_names(shown, MAX_WORDS) or "no word")


@dataclass(frozen=True, kw_only=True)
class Cause(cells.Column):
    """An event by its number, or by its word in ``names``; 0 where the record ended without."""

    may_be_empty: bool = True
    names: tuple[str, ...] = ()

    unreadable = "neither 0 nor the number of an event: --event_names gives the words of 1, 2, ..."

    def typed(self, raw: str) -> str:
        """Return SQL for the number of a raw cell, NULL of another word."""
        cell = f"lower(coalesce(trim({raw}::VARCHAR), ''))"
        words = {duck.literal(name.lower()): k for k, name in enumerate(self.names, start=1)}
        cases = " ".join(f"WHEN {cell} = {word} THEN {k}" for word, k in words.items())
        number, largest = f"TRY_CAST({cell} AS DOUBLE)", len(self.names) or dka.MAX_EVENT
        is_number = f"{number} BETWEEN 1 AND {largest} AND {number} % 1 = 0"
        none = f"WHEN {cell} IN {CENSORED} THEN 0"
        return f"CASE {cases} {none} WHEN {is_number} THEN {number}::INTEGER END"


def find_causes(
    database: duck.Database, file: tables.TableFile, column: str, request: LongRequest
) -> Cause:
    """Return how the events of a column are read; refuse words that nothing names."""
    cause, raw = Cause(source=column, names=request.event_names), file.raw(column)
    select = f"SELECT min(trim({raw}::VARCHAR)), count(*) AS count FROM {file.rows()}"
    words = database.rows(
        f"{select} WHERE {cause.is_wrong(raw)} GROUP BY lower(trim({raw}::VARCHAR)) "
        "ORDER BY count DESC, 1"
    )
    if words:
        problem = f"{file.path}, column {column}: {cause.problem(sum(n for _, n in words))}"
        answers = [(word,) for word, _ in words] if len(words) <= MAX_WORDS else [()]
        raise unclear([Question(problem, "event_names", x, of_cells=True) for x in answers])
    return cause


# ---------------------------------------------------------------------------- times to events


def finish_events(
    rows: pd.DataFrame, names: Mapping[str, str], request: LongRequest
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows with what came first, and what events mean."""
    dated = [*request.dated_events()]
    where = f"{request.labels}, column {names.get('event_time', dka.join_names(dated))}"
    if dated:
        rows = choose_first(rows, dated, where, is_labelled="label" in names)
    rows[dka.EVENT] = rows[dka.EVENT].astype("Int8")
    hours = rows[dka.EVENT_HOURS]
    if count := int((hours.isna() & rows[dka.EVENT].notna()).sum()):
        problem = f"{cells.count_cells(count)} empty where {names['event']} is an event"
        raise InputError(f"{where}: {problem}")
    # The end of a day lies just before midnight.
    rows[dka.EVENT_HOURS] = rows[dka.EVENT_HOURS].round(8)
    largest = int(rows[dka.EVENT].fillna(0).max())
    return rows, describe_events(dated or request.event_names, largest, request)


def choose_first(
    rows: pd.DataFrame, dated: Sequence[str], where: str, *, is_labelled: bool
) -> pd.DataFrame:
    """Return rows with what comes first in place of the hours of each event, and of the end."""
    hours = [f"{HOURS_OF}{name}".removeprefix(KEPT) for name in dated]
    dates = [f"{DATES_OF}{name}".removeprefix(KEPT) for name in dated]
    end = END_HOURS.removeprefix(KEPT)
    are_dates = rows[dates].max().to_numpy(float) > 0
    at, event = events.first_event(
        rows[hours].to_numpy(float), are_dates, rows[end].to_numpy(float)
    )
    if unknown := int(np.isnan(event).sum()):
        text = "warning: %s: %d rows have no event and no end: --event_time COLUMN of the end"
        logger.warning(text, where, unknown)
    rows = rows.drop(columns=[*hours, *dates, end])
    position = [*rows].index(dka.LABEL)
    rows.insert(position, dka.EVENT_HOURS, at)
    rows.insert(position + 1, dka.EVENT, event)
    if not is_labelled:
        rows[dka.LABEL] = pd.Series(event == 1, rows.index).astype("Int8")
    return rows


def describe_events(names: Sequence[str], largest: int, request: LongRequest) -> dict[str, Any]:
    """Return what a description says of the events 1, 2, ..., up to ``largest`` without names."""
    largest = len(names) or largest
    numbers = {name.lower(): k for k, name in enumerate(names, start=1)}
    numbers |= {str(k): k for k in range(1, largest + 1)}
    if len(numbers) < len(names) + largest:
        raise InputError("--event_names: each event needs a name of its own, which is no number")
    for text in request.interventions:
        if numbers.get(text.lower(), 0) < 2:
            problem = f"not the name or the number, 2 to {largest}, of an event"
            raise InputError(f"--interventions {text}: {problem}")
    brought = sorted({numbers[text.lower()] for text in request.interventions})
    named = {str(k): name for k, name in enumerate(names, start=1)}
    if named and request.outcome != EVENT:
        named["1"] = request.outcome
    about: dict[str, Any] = {"events": named} if named else {}
    return {**about, "interventions": brought, "horizon": ""}
