"""What sources of events share: labels and events become windows, and windows become rows."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka.description import (
    LONGEST_NAME,
    LONGEST_SENTENCE,
    MAIN_COLUMN,
    SERIES_COLUMN,
    check_text,
    comparable,
)
from medgemma_clinical.data.duck import (
    Column,
    Database,
    TableFile,
    TableRequest,
    apply_rules,
    readable,
)
from medgemma_clinical.data.texts import FORMULA_STARTS, NUMBER, plain
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

LONGEST_WINDOW = 10**6
STEPS = Path(__file__).parent
SUBJECT = Column("id", advice="give each row its subject")

MOST_AT_MIDNIGHT = 0.1
"""Share of events at midnight above which they seem to have dates in place of times."""

MOST_PAIRS = 200_000
"""Pairs of a prediction and an event of its subject that are joined at a time."""


@dataclass(frozen=True, kw_only=True)
class EventRequest(TableRequest):
    """A request for rows of labels and events; the flags of the same names say what each is.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    labels: Path
    series: tuple[str, ...]
    window_hours: float
    hours_from: str
    min_observations: int
    outcome: str
    question: str

    def __post_init__(self) -> None:
        """Refuse an impossible value."""
        super().__post_init__()
        in_range = 0 < self.window_hours <= LONGEST_WINDOW
        self.check(in_range, "window_hours", f"must be above 0 and at most {LONGEST_WINDOW:,}")
        self.check(self.min_observations >= 1, "min_observations", "must be at least 1")
        named = self.outcome != "" and not self.outcome.startswith(FORMULA_STARTS)
        self.check(named, "outcome", "must begin with a letter")
        check_text("--outcome", self.outcome, LONGEST_NAME)
        check_text("--question", self.question, LONGEST_SENTENCE)


# --------------------------------------------------------------------------- series and codes


@dataclass(frozen=True)
class CodedSeries:
    """A series, or a fact of the context: name, unit (or empty) and codes of its events.

    A trailing ``*`` of a code stands for any ending.
    """

    name: str
    unit: str
    codes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name and unit, as a column has them."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


def parse_series(name: str, texts: Iterable[str], *, code_needed: bool = True) -> list[CodedSeries]:
    """Read the values of a flag; a name that is given twice joins its codes.

    Args:
        name: of the flag.
        texts: ``NAME [unit]=CODE`` each.
        code_needed: whether NAME alone is refused; else it is the code as well.

    Raises:
        InputError: a value of another form, or two units of one series.
    """
    found: dict[str, CodedSeries] = {}
    for text in texts:
        title, _, code = map(str.strip, text.partition("="))
        match = SERIES_COLUMN.fullmatch(f"trajectory_{title}")
        if not match or (code_needed and not code):
            raise InputError(f"--{name} {text}: write 'NAME [unit]=CODE'")
        series = CodedSeries(match[1], match[2] or "", (code or match[1],))
        check_title(f"--{name} {text}", series)
        earlier = found.get(comparable(series.name), CodedSeries(series.name, series.unit, ()))
        if earlier.unit != series.unit:
            problem = f"earlier {series.name} has {earlier.unit or 'no unit'}: give one unit"
            raise InputError(f"--{name} {text}: {problem}")
        joined = CodedSeries(earlier.name, earlier.unit, earlier.codes + series.codes)
        found[comparable(series.name)] = joined
    return list(found.values())


def check_title(place: str, series: CodedSeries) -> None:
    """Refuse a name or unit that a column of the DKA format cannot have.

    Raises:
        InputError: names the place.
    """
    for text in (series.name, series.unit):
        check_text(place, text, LONGEST_NAME)
        if re.search(r"[\[\],*]", text) or re.fullmatch(NUMBER, text):
            problem = "name and unit are words without comma, bracket and star"
            raise InputError(f"{place}: {problem}: give --series 'NAME [unit]=CODE'")


def name_codes(
    database: Database,
    wanted: Mapping[str, Sequence[CodedSeries]],
    list_codes: Callable[[], list[str]],
) -> None:
    """Make the table ``named``: which code of ``record`` belongs to which series.

    Args:
        database: with the table ``record``.
        wanted: series by the flag that names them.
        list_codes: returns the codes of all events.

    Raises:
        InputError: a wanted code has no event of any subject.
    """
    rows = [
        (kind, series.name, series.unit, position, series.title, code)
        for kind, group in wanted.items()
        for position, series in enumerate(group)
        for code in series.codes
    ]
    columns = ["kind", "name", "unit", "position", "title", "code"]
    database.add("wanted", pd.DataFrame(rows, columns=columns))
    database.run(
        "CREATE TABLE named AS SELECT DISTINCT found.code, kind::VARCHAR AS kind, "
        "name::VARCHAR AS name, unit::VARCHAR AS unit, position::INTEGER AS position "
        "FROM wanted JOIN (SELECT DISTINCT code FROM record) AS found "
        "ON is_code(found.code, wanted.code::VARCHAR)"
    )
    absent = (
        "SELECT kind, title, code FROM wanted WHERE NOT EXISTS "
        "(FROM {table} AS found WHERE is_code(found.code, wanted.code::VARCHAR))"
    )
    unseen = database.frame(absent.format(table="named"))
    if unseen.empty:
        return
    codes = list_codes()
    database.add("existing", pd.DataFrame({"code": codes}, dtype="string"))
    for kind, title, code in database.frame(absent.format(table="existing")).values.tolist():
        near = " or ".join(difflib.get_close_matches(code, codes, 3))
        problem = "no event has this code" + (near and f": did you mean {near}?")
        raise InputError(f"--{kind} {title}={code}: {problem}")
    for kind, title, code in unseen.values.tolist():
        problem = "no subject with a label has an event of this code in a window"
        logger.warning("warning: --%s %s=%s: %s", kind, title, code, problem)


# --------------------------------------------------------------------------- labels and events


def add_windows(database: Database, request: EventRequest) -> None:
    """Make the tables of ``windows.sql``.

    Raises:
        InputError: a subject's name that a spreadsheet would take for a formula.
    """
    (formulas,) = database.row(
        "SELECT count(*) FROM label WHERE subject[1] IN ('=', '+', '@') "
        "OR regexp_matches(subject, '^-') AND TRY_CAST(subject AS DOUBLE) IS NULL"
    )
    if formulas:
        problem = "a subject begins with =, +, - or @, as a formula of a spreadsheet: rename it"
        raise InputError(f"{request.labels}: {problem}")
    database.set(width=round(request.window_hours * 3_600_000_000))
    database.run_file(STEPS / "windows.sql")


def check_labels(database: Database, file: TableFile) -> None:
    """Refuse labels (table ``label``, to which ``file`` was added last) of equal subject and time.

    Raises:
        InputError: names the file.
    """
    labels, different = database.row(
        "SELECT count(*), count(DISTINCT (subject, prediction_time)) FROM label"
    )
    if different < labels:
        problem = "subject_id and prediction_time appear twice: keep one label of each"
        raise InputError(f"{file.path}: {problem}")


def event_filter(subject: str, code: str, time: str, wanted: Iterable[str]) -> dict[str, str]:
    """Return SQL by which ``load_table`` keeps the events of some codes within a subject's span.

    Args:
        subject: SQL for the subject of a raw row.
        code: SQL for its code.
        time: SQL for its time; an event without one is kept.
        wanted: codes; none stands for all.
    """
    texts = ["'" + each.replace("'", "''") + "'" for each in dict.fromkeys(wanted)]
    codes = " OR ".join(f"is_code({code}, {text})" for text in texts) or "true"
    return {
        "keep": f"closes IS NOT NULL AND ({codes}) "
        f"AND coalesce({time} BETWEEN opens AND closes, true)",
        "join": f"LEFT JOIN span ON subject = {subject}",
    }


def check_subjects(
    database: Database, files: Iterable[TableFile], subject: str, problem: str
) -> None:
    """Warn where most subjects with a label have no event in their windows.

    Args:
        database: with the tables ``span`` and ``record``.
        files: of the events.
        subject: name of their column of subjects.
        problem: of files in which no subject has a label.

    Raises:
        InputError: no event is of a subject with a label.
    """
    measured, labelled = database.row(
        "SELECT (SELECT count(DISTINCT subject) FROM record), (SELECT count(*) FROM span)"
    )
    if 2 * measured >= labelled:
        return
    if not measured:
        for file in files:
            cell = SUBJECT.typed(file.raw(subject))
            with readable(file.path):
                (events,) = database.row(
                    f"SELECT count(*) FROM {file.rows()} WHERE {cell} IN (SELECT subject FROM span)"
                )
            if events:
                break
        else:
            raise InputError(problem)
    logger.warning(
        "warning: %d of %d subjects with a label have no value in their windows: are subjects "
        "named alike in events and labels?",
        labelled - measured,
        labelled,
    )


def make_trajectories(
    database: Database, request: EventRequest, equal_times: str = "keep"
) -> pd.DataFrame:
    """Return each trajectory: number (of its prediction), series, observations, hours, text."""
    database.set(most=MOST_PAIRS, hours_from=request.hours_from, equal_times=equal_times)
    database.run_file(STEPS / "events.sql")
    found = []
    for first, last in database.frame("FROM batch ORDER BY first").values.tolist() or [[0, 0]]:
        database.set(first=first, last=last)
        database.run_file(STEPS / "trajectories.sql")
        trajectories = database.frame("FROM trajectory")
        found.append(trajectories.astype({"text": object}))  # a copy shares the texts
    return pd.concat(found, ignore_index=True)


# --------------------------------------------------------------------------- rows


def make_rows(
    database: Database,
    request: EventRequest,
    series: Sequence[CodedSeries],
    trajectories: pd.DataFrame,
    usable: str,
    static: pd.DataFrame | None = None,
    parts: pd.Series | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format and their description, but for its origin.

    Args:
        database: in which trajectories were made.
        request: of the command.
        series: the main one first.
        trajectories: of ``make_trajectories``.
        usable: which events of a window are read, in words.
        static: context and static columns by the number of the prediction.
        parts: of the split by subject; a subject in none is left out.
    """
    main, fewest = series[0], request.min_observations
    labels = database.frame(
        "SELECT *, person IN (SELECT person FROM event) AS measured FROM prediction ORDER BY number"
    ).set_index("number")
    by_series = {
        each.name: trajectories[trajectories["series"] == each.name].set_index("number")
        for each in series
    }
    counts = by_series[main.name]["observations"].reindex(labels.index)
    rules = {"label not known": labels["label"].isna()}
    if parts is not None:
        rules["subject in no part of the split"] = ~labels["subject"].isin(parts.index)
    rules["no value of any series from the first window to the last"] = ~labels["measured"]
    few = "no value" if fewest == 1 else f"fewer than {fewest} values"
    rules[f"{few} of {main.name} in the window"] = ~counts.ge(fewest)
    left, flow = apply_rules(pd.DataFrame(rules), f"--labels {request.labels}")
    labels = labels[left]
    columns = [MAIN_COLUMN, *(f"trajectory_{each.title}" for each in series[1:])]
    rows = pd.DataFrame(
        {
            "id": labels["subject"] + " " + labels["shown"],
            "subject_id": labels["subject"],
            "prediction_time": labels["shown"],
            **{c: by_series[each.name]["text"] for c, each in zip(columns, series, strict=True)},
            "prediction_hours": by_series[main.name]["hours"],
            **({} if static is None else static),
            "label_escalation": labels["label"].astype("Int8"),
        },
        index=labels.index,
    )
    if parts is not None:
        rows["split"] = labels["subject"].map(parts)
    patients, events = rows["subject_id"].nunique(), rows["label_escalation"].sum()
    _warn_of_midnight(database)
    return rows.reset_index(drop=True), {
        **_describe(request, main, usable),
        "flow": flow,
        "rows": {"rows": len(rows), "patients": int(patients), "events": int(events)},
    }


def _warn_of_midnight(database: Database) -> None:
    midnight, events = database.row(
        "SELECT count(*) FILTER (date_trunc('day', time) = time OR date_trunc('day', known) = "
        "known), count(*) FROM event"
    )
    if midnight > MOST_AT_MIDNIGHT * events:
        logger.warning(
            "warning: %d of %d events are at midnight: a date without a time counts as known from "
            "the beginning of its day, hours before it was",
            midnight,
            events,
        )


def _describe(request: EventRequest, main: CodedSeries, usable: str) -> dict[str, Any]:
    asks = "the event" if request.outcome == "Event" else f"the outcome {request.outcome!r}"
    window = f"of the {plain(request.window_hours)} hours up to then, both ends included"
    return {
        "series": main.name,
        "unit": main.unit,
        "question": request.question or f"Will {asks} occur?",
        "outcome": request.outcome,
        "plausible": None,
        "prediction_time": f"given with each label; {window}, {usable} are read",
        "horizon": "given by the labels",
    }
