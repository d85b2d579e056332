"""The command from_meds: events in the Medical Event Data Standard, with labels as ACES writes."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka.description import comparable, join_names, list_columns
from medgemma_clinical.data.duck import (
    WORD,
    Column,
    Database,
    TableFile,
    TableRequest,
    describe_origin,
    load_table,
    open_database,
    open_table,
    readable,
)
from medgemma_clinical.data.sources.events import (
    STEPS,
    SUBJECT,
    CodedSeries,
    EventRequest,
    add_windows,
    check_labels,
    check_subjects,
    event_filter,
    make_rows,
    make_trajectories,
    name_codes,
    parse_series,
)
from medgemma_clinical.files import InputError, one_line

logger = logging.getLogger(__name__)

OPTIONAL_WORD = Column("word", may_be_empty=True, optional=True)
TIME = Column("instant", advice="write the local time of one zone as a timestamp without zone")
EVENTS = {
    "subject_id": SUBJECT,
    "code": WORD,
    "time": dataclasses.replace(TIME, may_be_empty=True),
    "numeric_value": Column("number", may_be_empty=True, optional=True),
}
"""Source: MEDS 0.4.1, DataSchema."""

YES_OR_NO = "ask a question with yes or no"
ANSWER = Column("label", may_be_empty=True, optional=True, advice=YES_OR_NO)
ANSWERS = ("boolean_value", "integer_value", "float_value")
LABELS = {
    "subject_id": SUBJECT,
    "prediction_time": TIME,
    **dict.fromkeys(ANSWERS, ANSWER),
    "categorical_value": OPTIONAL_WORD,
}
"""Source: MEDS 0.4.1, LabelSchema; a label fills one of the last four."""

CODES = {"code": WORD, "description": OPTIONAL_WORD, "valueuom": OPTIONAL_WORD}
PERSON = ("MEDS_BIRTH", "GENDER//M", "GENDER//F")
PARTS = {"train": "train", "tuning": "val", "held_out": "test"}
SPLITS = "metadata/subject_splits.parquet"
HINT = "is it a table of MEDS?"

AUTOMATIC = ("age", "sex male")
"""Names of the static columns that ``meds.sql`` makes of the person."""


@dataclass(frozen=True, kw_only=True)
class MedsRequest(EventRequest):
    """A request for rows from MEDS."""

    meds_dir: Path
    context: tuple[str, ...]
    no_splits: bool


def make_meds(request: MedsRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the DKA format, and their description.

    Raises:
        InputError: the tables or flags cannot be used.
    """
    wanted = {
        "series": parse_series("series", request.series),
        "context": parse_series("context", request.context),
    }
    for each in wanted["context"]:
        if comparable(each.name) in AUTOMATIC:
            problem = "age and sex are in the context by themselves: give another name"
            raise InputError(f"--context {each.title}: {problem}")
    folder, hashes = request.meds_dir, dict[str, str]()
    with open_database(request.out, request.memory_limit, request.threads) as database:
        load_labels(database, request.labels, hashes)
        add_windows(database, request)
        load_events(database, folder, [*wanted["series"], *wanted["context"]], hashes)
        files = (file for _, file in open_files(database, folder / "data", EVENTS))
        problem = "no event of any subject with a label: are subject_id alike in both?"
        check_subjects(database, files, "subject_id", f"{folder}: {problem}")
        name_codes(database, wanted, lambda: [*count_codes(database, folder)["code"]])
        check_units(database)
        trajectories = make_trajectories(database, request)
        database.run_file(STEPS / "meds.sql")
        static = describe_subjects(database, wanted["context"])
        parts = None if request.no_splits else read_parts(database, folder, hashes)
        rows, description = make_rows(
            database, request, wanted["series"], trajectories, "events", static, parts
        )
        for name, codes in database.frame(
            "SELECT name, list(code ORDER BY code) FROM named WHERE kind = 'series' "
            "GROUP BY name, position ORDER BY position"
        ).itertuples(index=False):
            logger.info("series %s: %s", name, one_line(join_names(codes)))
    return rows, description | describe_origin(request, "from_meds", hashes)


def open_files(
    database: Database, place: Path, columns: Mapping[str, Column]
) -> Iterator[tuple[str, TableFile]]:
    """Open the Parquet files of a folder, or the one file; yield its name in the folder as well.

    Raises:
        InputError: there is none, or one is damaged.
    """
    paths = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not paths:
        raise InputError(f"{place}: no Parquet file in this folder")
    for path in paths:
        name = path.relative_to(place.parent).as_posix()
        yield name, open_table(database, path, columns, HINT)


def load_labels(database: Database, place: Path, hashes: dict[str, str]) -> None:
    """Make the table ``label``.

    Raises:
        InputError: a label is not 0 or 1.
    """
    database.run(
        "CREATE TABLE label "
        "(subject VARCHAR, prediction_time TIMESTAMP, shown VARCHAR, label INTEGER)"
    )
    answers = ", ".join(ANSWERS)
    for name, file in open_files(database, place, LABELS):
        if not (file.is_parquet and {*file.header} & {*ANSWERS, "categorical_value"}):
            problem = f"no Parquet file with a column of {answers}"
            raise InputError(f"{file.path}: {problem}: {list_columns(file.header)}")
        hashes[f"labels: {name}"] = file.sha256
        load_table(database, "answers", file, LABELS)
        classes, several = database.row(
            "SELECT bool_or(categorical_value != ''), "
            f"bool_or(len(list_filter([{answers}], lambda x: x IS NOT NULL)) > 1) FROM answers"
        )
        if classes:
            problem = f"names of classes are not a label 0 or 1: {YES_OR_NO}"
            raise InputError(f"{file.path}, column categorical_value: {problem}")
        if several:
            raise InputError(f"{file.path}: a label fills two of {answers}: leave one")
        database.run(
            "INSERT INTO label SELECT subject_id, prediction_time, "
            f"replace(prediction_time::VARCHAR, ' ', 'T'), coalesce({answers}) FROM answers; "
            "DROP TABLE answers"
        )
        check_labels(database, file)


def load_events(
    database: Database, folder: Path, wanted: Sequence[CodedSeries], hashes: dict[str, str]
) -> None:
    """Make the table ``record``: events of wanted codes in the windows, and birth and sex."""
    database.run(
        "CREATE TABLE record (subject VARCHAR, code VARCHAR, time TIMESTAMP, known TIMESTAMP, "
        "value DOUBLE)"
    )
    codes = [code for each in wanted for code in each.codes]
    for name, file in open_files(database, folder / "data", EVENTS):
        hashes[name] = file.sha256
        subject, code, time = (
            EVENTS[column].typed(file.raw(column)) for column in ("subject_id", "code", "time")
        )
        kept = event_filter(subject, code, time, codes)
        kept["keep"] += f" OR closes IS NOT NULL AND {code} IN {PERSON}"
        load_table(database, "loaded", file, EVENTS, **kept, keys=("subject_id", "code"))
        database.run(
            "INSERT INTO record SELECT subject_id, code, time, time, "
            "CASE WHEN isfinite(numeric_value) THEN numeric_value END FROM loaded; "
            "DROP TABLE loaded"
        )


def check_units(database: Database) -> None:
    """Refuse a series, or a fact with a unit, whose codes end in another unit: LAB//50868//mEq/L.

    Raises:
        InputError: names codes and units.
    """
    for kind, name, unit, codes in database.frame(
        "SELECT kind, name, unit, list(code ORDER BY code) "
        "FROM (SELECT *, lower(split_part(code, '//', -1)) AS ending FROM named) "
        "WHERE len(split(code, '//')) > 2 AND (kind = 'series' OR unit != '') "
        "GROUP BY kind, name, unit, position "
        "HAVING count(DISTINCT ending) > 1 OR unit != '' AND min(ending) != lower(unit) "
        "ORDER BY kind DESC, position"
    ).itertuples(index=False):
        endings = join_names(sorted({code.rpartition("//")[2] for code in codes}))
        raise InputError(
            f"--{kind} {name}: the codes {join_names(codes)} are in {endings}"
            f"{unit and f', the series is in {unit}'}: name codes of one unit, and that one"
        )


def describe_subjects(database: Database, context: Sequence[CodedSeries]) -> pd.DataFrame:
    """Return the context in words and the static columns, by the number of the prediction."""
    static = database.frame("FROM context ORDER BY number").set_index("number")
    facts = database.frame("SELECT number, name, plain(value) AS value FROM fact")
    values = facts.pivot(index="number", columns="name", values="value")
    for each in context:
        static[f"static_{each.title}"] = values.get(each.name)
    return static.replace("", None).dropna(axis="columns", how="all")


def read_parts(database: Database, folder: Path, hashes: dict[str, str]) -> pd.Series:
    """Return the part of each subject.

    Raises:
        InputError: another part, or a subject in two.
    """
    path = folder / SPLITS
    columns = {"subject_id": SUBJECT, "split": WORD}
    if not path.is_file():
        raise InputError(f"{path}: no such file: --no_splits lets the trainer split")
    file = open_table(database, path, columns, HINT)
    hashes[SPLITS] = file.sha256
    load_table(database, "split", file, columns)
    parts = database.frame("SELECT DISTINCT subject_id, split FROM split").set_index("subject_id")
    if parts.index.has_duplicates or not parts["split"].isin(PARTS).all():
        problem = f"each subject needs one part of {', '.join(PARTS)}"
        raise InputError(f"{path}, column split: {problem}; --no_splits lets the trainer split")
    return parts["split"].map(PARTS)


def count_codes(database: Database, folder: Path) -> pd.DataFrame:
    """Return code, events and subjects, the most frequent first; a subject lies in one file."""
    database.run("CREATE OR REPLACE TABLE counted (code VARCHAR, events BIGINT, subjects BIGINT)")
    for _, file in open_files(database, folder / "data", EVENTS):
        subject, code = (
            EVENTS[column].typed(file.raw(column)) for column in ("subject_id", "code")
        )
        with readable(file.path):
            database.run(
                f"INSERT INTO counted SELECT {code}, count(*), count(DISTINCT {subject}) "
                f"FROM {file.rows()} GROUP BY 1",
                title=f"reading {file.path.name}",
            )
    return database.frame(
        "FROM (SELECT code, sum(events)::BIGINT AS events, sum(subjects)::BIGINT AS subjects "
        "FROM counted GROUP BY code) ORDER BY events DESC, code"
    )


def list_codes(meds_dir: Path, memory_limit: str, threads: int) -> int:
    """Log each code with events, subjects, unit and description."""
    path = meds_dir / "metadata" / "codes.parquet"
    limits = TableRequest(
        out=Path(tempfile.gettempdir()) / "codes", memory_limit=memory_limit, threads=threads
    )
    with open_database(limits.out, limits.memory_limit, limits.threads) as database:
        found = count_codes(database, meds_dir).assign(words="")
        if path.is_file():
            file = open_table(database, path, CODES, HINT)
            load_table(database, "meanings", file, CODES)
            words = database.frame(
                "SELECT code, min(trim(replace(trim(valueuom, '[]'), 'NULL', '') || '  ' || "
                "description)) AS words FROM meanings GROUP BY code"
            )
            found = found.drop(columns="words").merge(words, "left", "code").fillna({"words": ""})
    logger.info("%15s %15s  code, unit, description", "events", "subjects")
    for code, events, subjects, words in found.itertuples(index=False):
        shown = one_line(f"{code}  {words}".rstrip())
        logger.info("%15s %15s  %s", f"{events:,}", f"{subjects:,}", shown)
    return 0
