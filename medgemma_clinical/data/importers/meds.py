"""The command from_meds: events in the Medical Event Data Standard, with labels as ACES writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.dka import EVENT, EVENT_HOURS, comparable, join_names
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, events, output, tables
from medgemma_clinical.data.importers.events import SUBJECT
from medgemma_clinical.data.importers.notes import NoteRequest, add_notes, load_notes
from medgemma_clinical.files import InputError, one_line
from medgemma_clinical.flags import TAKEN, Texts, row, texts

logger = logging.getLogger(__name__)

TIME = cells.Instant()
EVENTS = {
    "subject_id": SUBJECT,
    "code": cells.WORD,
    "time": cells.Instant(may_be_empty=True),
    "numeric_value": cells.Number(may_be_empty=True, optional=True),
}
"""Source: MEDS 0.4.1, DataSchema."""

ROLES = {"subject_id": "subject_id", "item": "code", "time": "time", "value": "numeric_value"}

ANSWERS = ("boolean_value", "integer_value", "float_value")
YES_OR_NO = cells.Label(may_be_empty=True, optional=True)
LABELS = {"subject_id": SUBJECT, "prediction_time": TIME, **dict.fromkeys(ANSWERS, YES_OR_NO)}
"""Source: MEDS 0.4.1, LabelSchema; a label fills one of its answers."""

OPTIONAL_WORD = cells.Word(may_be_empty=True, optional=True)
CODES = {"code": cells.WORD, "description": OPTIONAL_WORD, "valueuom": OPTIONAL_WORD}
PERSON = ("MEDS_BIRTH", "GENDER//M", "GENDER//F")
PART_OF_SPLIT = {"train": "train", "tuning": "val", "held_out": "test"}
SPLITS = "metadata/subject_splits.parquet"

AUTOMATIC = ("age", "sex male")
"""Names of the static columns that ``meds.sql`` makes of the person."""


@dataclass(frozen=True, kw_only=True)
class MedsRequest(events.EventRequest, NoteRequest):
    """The flags of from_meds."""

    meds_dir: Path = row(Path, None, "folder of MEDS with data/ and metadata/", required=True)
    series: Texts = texts("'NAME [unit]=CODE' of --list_codes; first the main one", required=True)
    context: Texts = texts("static 'NAME [unit]=CODE'")
    event: Texts = texts("'NAME=CODE' whose time is written; first the one asked")
    notes: Texts = texts("code of notes for the context")
    no_splits: bool = row(bool, False, "ignore metadata/subject_splits.parquet", TAKEN)


def make_meds(request: MedsRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description."""
    series = events.parse_features("series", request.series)
    context = events.parse_features("context", request.context)
    ends = events.parse_features("event", request.event)
    for feature in context:
        if comparable(feature.name) in AUTOMATIC:
            problem = "age and sex are in the context by themselves: give another name"
            raise InputError(f"--context {feature.title}: {problem}")
    hashes: dict[str, str] = {}
    with duck.open_database(request.out, request.memory_limit, request.threads) as database:
        load_meds_labels(database, request.labels, hashes)
        events.add_windows(database, request)
        files = open_files(database, request.meds_dir / "data", EVENTS)
        hashes |= {name: file.sha256 for name, file in files.items()}
        shards = [*files.values()]
        codes = [code for feature in (*series, *context) for code in feature.keys]
        events.load_events(database, request, shards, ROLES, EVENTS, codes, PERSON)
        events.name_codes(database, {"series": series, "context": context})
        check_units(database)
        trajectories = events.make_trajectories(database, request)
        static = read_static(database, shards, request, context)
        if ends:
            static = static.join(read_ends(database, shards, ends))
        parts = None if request.no_splits else read_parts(database, request.meds_dir, hashes)
        rows, flow = events.make_rows(database, request, series, trajectories, static, parts)
        log_codes(database)
    description = events.describe_rows(request, series[0], "events", rows, flow)
    if ends:
        description["events"] = {str(k): end.title for k, end in enumerate(ends, start=1)}
    return rows, description | output.describe_origin(request, "from_meds", hashes)


def log_codes(database: duck.Database) -> None:
    """Log the codes of each series."""
    for name, codes in database.rows(
        "SELECT name, list(code ORDER BY code) FROM named WHERE kind = 'series' "
        "GROUP BY name, position ORDER BY position"
    ):
        logger.info("series %s: %s", name, one_line(join_names(codes)))


def open_files(
    database: duck.Database, path: Path, columns: Mapping[str, cells.Column]
) -> dict[str, tables.TableFile]:
    """Open the Parquet files of a folder, or the one file, each by its name in the folder."""
    paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no Parquet file in this folder")
    return {
        file_path.relative_to(path.parent).as_posix(): tables.open_table(
            database, file_path, columns
        )
        for file_path in paths
    }


def load_meds_labels(database: duck.Database, path: Path, hashes: dict[str, str]) -> None:
    """Make the table ``label``."""
    answers = ", ".join(ANSWERS)
    database.run(
        "CREATE TABLE label "
        "(subject VARCHAR, prediction_time TIMESTAMP, label INTEGER, zone VARCHAR DEFAULT '')"
    )
    for name, file in open_files(database, path, LABELS).items():
        if not {*file.header} & {*ANSWERS}:
            raise InputError(f"{file.path}: no column {answers}")
        hashes[f"labels: {name}"] = file.sha256
        tables.load_table(database, "answers", file, LABELS)
        database.run(
            "INSERT INTO label (subject, prediction_time, label) "
            f"SELECT subject_id, prediction_time, coalesce({answers}) "
            "FROM answers; DROP TABLE answers"
        )


def check_units(database: duck.Database) -> None:
    """Refuse a feature with a unit whose codes end in another one: ``LAB//50868//mEq/L``."""
    for kind, name, unit, codes in database.rows(
        "SELECT kind, name, unit, list(code ORDER BY code) "
        "FROM (SELECT *, lower(split_part(code, '//', -1)) AS ending FROM named) "
        "WHERE len(split(code, '//')) > 2 AND (kind = 'series' OR unit != '') "
        "GROUP BY kind, name, unit, position "
        "HAVING count(DISTINCT ending) > 1 OR unit != '' AND min(ending) != lower(unit) "
        "ORDER BY kind DESC, position"
    ):
        endings = join_names(sorted({code.rpartition("//")[2] for code in codes}))
        problem = f"the codes {join_names(codes)} are in {endings}"
        raise InputError(
            f"--{kind} {name}: {problem}: name codes of one unit, and it{unit and f', not {unit}'}"
        )


def read_static(
    database: duck.Database,
    files: Sequence[tables.TableFile],
    request: MedsRequest,
    context: Sequence[Feature],
) -> pd.DataFrame:
    """Return context and static columns by number of the prediction."""
    database.run_file(events.SQL / "meds.sql")
    static = database.frame("FROM context ORDER BY number").set_index("number")
    if request.notes:
        load_meds_notes(database, files, request)
        contexts = static["clinical_context"]
        static["clinical_context"] = add_notes(database, contexts, request.max_note_words)
    static = static.replace("", None).dropna(axis="columns", how="all")
    values = database.frame("SELECT number, position, plain(value) AS value FROM static_value")
    for position, feature in enumerate(context):
        column = values[values["position"] == position].set_index("number")["value"]
        if column.isna().all() and not feature.unit:  # a code without numbers: its presence
            column = pd.Series(static.index.isin(column.index).astype(int), static.index)
        static[f"static_{feature.title}"] = column
    return static


def load_meds_notes(
    database: duck.Database, files: Sequence[tables.TableFile], request: MedsRequest
) -> None:
    """Load the notes of all files."""
    names = {"subject": "subject_id", "charted": "time", "text": "text_value"}
    texts = [file for file in files if "text_value" in file.header]  # optional in MEDS
    if not texts:
        raise InputError(f"{request.meds_dir}: no shard has a column text_value for --notes")
    for file in texts:
        keep = events.any_code(cells.WORD.typed(file.raw("code")), request.notes, "false")
        load_notes(database, file, names, SUBJECT, request.max_note_words, [keep])


def read_ends(
    database: duck.Database, files: Iterable[tables.TableFile], ends: Sequence[Feature]
) -> pd.DataFrame:
    """Return ``event_hours`` and ``event`` by number: what comes first, 0 for the last of a record.

    Of two at one time the one that is named first counts. Nothing is known without a later event.
    """
    is_end = [events.any_code("code", end.keys, "false") for end in ends]
    columns = {"subject": "subject_id", "code": "code", "time": "time"}
    hours = "tidy((epoch_us({}) - epoch_us(any_value(prediction_time))) / {})"
    times = [f"min(time) FILTER ({sql})" for sql in is_end] + ["max(time)"]
    hour = cells.MICROSECONDS["hours"]
    selected = ", ".join(f"{hours.format(x, hour)} AS h{k}" for k, x in enumerate(times))
    parts = []
    for file in files:
        typed = [f"{EVENTS[name].typed(file.raw(name))} AS {key}" for key, name in columns.items()]
        select = (
            f"SELECT number, {selected} FROM (SELECT {', '.join(typed)} FROM {file.rows()}) "
            "JOIN prediction USING (subject) WHERE time > prediction_time GROUP BY number"
        )
        with tables.readable(file.path):
            parts.append(database.frame(select).set_index("number"))
    groups = pd.concat(parts).groupby(level="number")
    first, last = groups.min().to_numpy(float)[:, :-1], groups.max().to_numpy(float)[:, -1]
    at, event = events.first_event(first, np.zeros(len(ends), bool), last)
    for k, end in enumerate(ends, start=1):
        if not (event == k).any():
            problem = "comes first for no subject of --labels after a prediction time"
            logger.warning("warning: --event %s: %s", end.title, problem)
    rows = {EVENT_HOURS: at, EVENT: pd.array(event, "Float64").astype("Int8")}
    return pd.DataFrame(rows, groups.min().index)


def read_parts(database: duck.Database, folder: Path, hashes: dict[str, str]) -> pd.Series:
    """Return the part of each subject."""
    path = folder / SPLITS
    columns = {"subject_id": SUBJECT, "split": cells.WORD}
    if not path.is_file():
        raise InputError(f"{path}: no such file: --no_splits lets the trainer split")
    file = tables.open_table(database, path, columns)
    hashes[SPLITS] = file.sha256
    tables.load_table(database, "split", file, columns)
    parts = database.frame("SELECT DISTINCT subject_id, split FROM split").set_index("subject_id")
    if parts.index.has_duplicates or not parts["split"].isin(PART_OF_SPLIT).all():
        problem = f"each subject needs one part of {', '.join(PART_OF_SPLIT)}"
        raise InputError(f"{path}, column split: {problem}; --no_splits lets the trainer split")
    return parts["split"].map(PART_OF_SPLIT)


def list_codes(meds_dir: Path, memory_limit: str, threads: int) -> int:
    """Log each code with events, subjects, unit and description, the most frequent first."""
    out, words = Path(tempfile.gettempdir()) / "codes", dict[str, str]()
    path = meds_dir / "metadata" / "codes.parquet"
    with duck.open_database(out, memory_limit, threads) as database:
        counts = []
        for file in open_files(database, meds_dir / "data", EVENTS).values():
            code, subject = (EVENTS[name].typed(file.raw(name)) for name in ("code", "subject_id"))
            select = f"{code} AS code, count(*) AS events, count(DISTINCT {subject}) AS subjects"
            with tables.readable(file.path):  # a subject lies in one file
                counts.append(database.frame(f"SELECT {select} FROM {file.rows()} GROUP BY 1"))
        if path.is_file():
            tables.load_table(database, "meanings", tables.open_table(database, path, CODES), CODES)
            text = "replace(trim(valueuom, '[]'), 'NULL', '') || '  ' || description"
            meanings = f"SELECT code, min(trim({text})) FROM meanings GROUP BY code"
            words = dict(database.rows(meanings))
    table = pd.concat(counts).groupby("code", as_index=False).sum()
    table = table.sort_values("events", ascending=False, kind="stable")
    logger.info("%15s %15s  code, unit, description", "events", "subjects")
    for code, *counts_of_code in table.values.tolist():
        line = one_line(f"{code}  {words.get(code, '')}".rstrip())
        logger.info("%15s %15s  %s", *(f"{count:,}" for count in counts_of_code), line)
    return 0
