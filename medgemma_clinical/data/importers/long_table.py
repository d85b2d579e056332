"""The command from_long: a table with one value a row, and a table of labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka import LABEL as LABEL_COLUMN
from medgemma_clinical.data.dka import STATIC
from medgemma_clinical.data.importers import (
    duck,
    events,
    guesses,
    long_labels,
    long_values,
    output,
    sources,
)
from medgemma_clinical.data.importers.long_labels import CONTEXT, EVENT, KEPT
from medgemma_clinical.data.importers.long_request import COMMAND, LongRequest
from medgemma_clinical.data.importers.notes import add_notes, load_notes
from medgemma_clinical.data.importers.questions import OpenQuestions
from medgemma_clinical.data.importers.sources import Seen, Source
from medgemma_clinical.data.roles import LABEL_ROLES, find_column
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)


def make_long(
    request: LongRequest, seen: Seen | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description; ``seen`` keeps how far it came."""
    seen = seen or Seen()
    if request.like and request.out.resolve() == request.like.resolve():
        raise InputError(f"--out {request.out}: --like reads it: choose another name")
    long_values.wanted_series(request)  # wrong flags are refused before the tables are read
    request.factors()
    with duck.open_database(request.out, request.memory_limit, request.threads) as database:
        request = find_sources(database, request, seen)
        # The tables label, prediction and span, of which windows.sql tells.
        categories, titles = long_labels.load_labels(database, seen.sources, request, seen)
        sources.check_zones(seen.sources)
        # The view record of the values, and the table named of their series.
        repeated = long_values.load_series(database, request, seen)
        # events.sql and trajectories.sql.
        is_stored = "storetime" in seen.sources[0].names
        trajectories = events.make_trajectories(
            database, request, request.equal_times, is_stored=is_stored
        )
        static = read_static(database, titles, request, seen.sources[2:])
        rows, flow = events.make_rows(
            database, request, seen.series, trajectories, static, keep_all=request.no_labels
        )
        about_values, medians = long_values.describe_values(database, request.table, repeated)
    names, about_events = seen.sources[1].names, dict[str, Any]()
    if "event" in names or (request.dated_events() and not request.no_labels):
        rows, about_events = long_labels.finish_events(rows, names, request)
    description = describe(request, seen, rows, flow, about_events) | about_values
    description["labels"] = {name: {"outcome": title} for name, title in titles.items()}
    times = {role: form.formats[:1] for x in seen.sources for role, form in x.times.items()}
    read_as = {"times": times, "static": categories, "medians": medians}
    description["arguments"]["read_as"] = read_as
    if "label" not in names:
        rows = rows.drop(columns=LABEL_COLUMN)
    return rows, description


def find_sources(database: duck.Database, request: LongRequest, seen: Seen) -> LongRequest:
    """Find the tables, their columns and the forms of their times; return the flags with --like."""
    seen.sources = sources.open_sources(database, request)
    request = sources.fit_like(request, seen.sources[0])
    database.set(below_limit=request.below_limit, result_flags=[*request.result_flags])
    lacking, problems = sources.find_columns(seen.sources, request)
    asked = guesses.ask(database, seen, lacking, request) if seen.is_preview else []
    if problems or asked:
        raise OpenQuestions("; ".join(problems), asked)
    sources.find_times(database, seen.sources, request, seen)
    return request


def read_static(
    database: duck.Database,
    titles: dict[str, str],  # of further labels
    request: LongRequest,
    notes: Sequence[Source],
) -> pd.DataFrame:
    """Return what comes along of each prediction, by its number."""
    columns = f"COLUMNS('(?s)^(number|{STATIC}.*|label_.*|{KEPT}.*)$')"
    static = database.frame(f"SELECT {columns} FROM prediction")
    static = static.astype(dict.fromkeys(titles, "Int8"))
    static.columns = static.columns.str.removeprefix(KEPT)
    static = static.set_index("number").sort_index()
    if CONTEXT in static and request.context_column:
        words = static[CONTEXT].str.rstrip(". ").str.split()
        static[CONTEXT] = words.str[-request.max_note_words :].str.join(" ")
    for source in notes:
        add_context(database, static, source, request)
    return static


def add_context(
    database: duck.Database,
    static: pd.DataFrame,  # by number of the prediction
    source: Source,
    request: LongRequest,
) -> None:
    """Add the notes that were written by the prediction times to the context."""
    source.log()
    names = source.names
    if "notes.storetime" not in names:
        problem = "no notes.storetime: notes count as known when written"
        logger.warning("warning: %s: %s", source.file.path, problem)
    roles = {"subject": "subject_id", "charted": "time", "stored": "storetime", "text": "text"}
    columns = {x: names[f"notes.{y}"] for x, y in roles.items() if f"notes.{y}" in names}
    forms = {
        x: source.times[f"notes.{y}"] for x, y in roles.items() if f"notes.{y}" in source.times
    }
    load_notes(database, source.file, columns, events.SUBJECT, request.max_note_words, times=forms)
    contexts = static.get(CONTEXT, pd.Series("", static.index))
    static[CONTEXT] = add_notes(database, contexts, request.max_note_words)


def describe(
    request: LongRequest,
    seen: Seen,
    rows: pd.DataFrame,
    flow: list[dict[str, Any]],
    about_events: dict[str, Any],
) -> dict[str, Any]:
    """Return the description of the rows, with the flags as they were settled."""
    values, labels, *notes = seen.sources
    usable = "values that were stored by then"
    if "storetime" not in values.names:
        usable = "values"
        problem = "no storetime: values count as known when measured"
        logger.warning("warning: %s: %s", values.file.path, problem)
    outcome = request.outcome
    if outcome == EVENT:
        outcome = name_outcome(request, labels.names.get("label", ""), about_events)
    columns = labels.names | values.names | (notes[0].names if notes else {})
    pairs = [(feature.title, key) for feature in seen.series for key in feature.keys or ("",)]
    settled = replace(
        request,
        outcome=outcome,
        columns=tuple(f"{role}={name}" for role, name in columns.items()),
        series=tuple(f"{title}={key}" for title, key in pairs),
    )
    folders = ("", "labels/", "notes/")
    files = [source.file for source in seen.sources]
    hashes = {f"{folder}{x.path.name}": x.sha256 for folder, x in zip(folders, files, strict=False)}
    description = events.describe_rows(settled, seen.series[0], usable, rows, flow)
    return description | about_events | output.describe_origin(settled, COMMAND, hashes)


def name_outcome(request: LongRequest, column: str, about_events: dict[str, Any]) -> str:
    """Return what label 1 means: a title, an unusual name of its column, or the first event."""
    if not column:
        return str(about_events.get("events", {}).get("1", EVENT))
    titles = [x.name for x in request.outcomes() if x.title]
    if titles:
        return titles[0]
    return EVENT if find_column(LABEL_ROLES["label"], column) else column
