"""The command from_meds: events in the Medical Event Data Standard, with labels as ACES writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medgemma_clinical.data.database.connection import Database, open_database
from medgemma_clinical.data.database.flags import flag, usable_cores
from medgemma_clinical.data.database.output import Made, describe_origin
from medgemma_clinical.data.database.table_files import (
    INSTANT,
    WORD,
    Column,
    TableFile,
    load_table,
    open_table,
    readable,
)
from medgemma_clinical.data.description import join_names
from medgemma_clinical.data.small_cells import FEWEST, count_text
from medgemma_clinical.data.sources.events import (
    STEPS,
    CodedSeries,
    EventRequest,
    cut_windows,
    make_rows,
    match_sql,
    name_codes,
    parse_series,
)
from medgemma_clinical.files import InputError, one_line

logger = logging.getLogger(__name__)

OPTIONAL_WORD = Column("word", may_be_empty=True, optional=True)
EVENTS = {
    "subject_id": WORD,
    "code": WORD,
    "time": Column("instant", may_be_empty=True),
    "numeric_value": Column("number", may_be_empty=True, optional=True),
}
"""Source: MEDS 0.4.1, DataSchema."""

ANSWERS = ("boolean_value", "integer_value", "float_value")
LABELS = {
    "subject_id": WORD,
    "prediction_time": INSTANT,
    **dict.fromkeys(ANSWERS, Column("label", may_be_empty=True, optional=True)),
    "categorical_value": OPTIONAL_WORD,
}
"""Source: MEDS 0.4.1, LabelSchema; a label fills one of the last four."""

CODES = {"code": WORD, "description": OPTIONAL_WORD, "valueuom": OPTIONAL_WORD}
PERSON = ("MEDS_BIRTH", "GENDER//M", "GENDER//F")
PARTS = {"train": "train", "tuning": "val", "held_out": "test"}
SPLITS = "metadata/subject_splits.parquet"
HINT = "is it a table of MEDS?"


@dataclass(frozen=True, kw_only=True)
class MedsRequest(EventRequest):
    """The flags of from_meds; with ``list_codes`` there is neither out, labels nor series.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    meds_dir: Path = flag("folder with data/ and metadata/")
    out: Path = flag("CSV to write; a JSON description comes beside it", None)
    labels: Path = flag("labels in MEDS form, as ACES writes them: Parquet file or folder", None)
    context: tuple[str, ...] = flag("'NAME [unit]=CODE' in the context", (), repeated=True)
    no_splits: bool = flag("ignore metadata/subject_splits.parquet", False)
    list_codes: bool = flag("print all codes with their counts, make no file", False)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("out", "labels", "series"):
            if not (getattr(self, name) or self.list_codes):
                raise InputError(f"--{name}: is needed; --list_codes shows what can be a series")


def make_meds(request: MedsRequest) -> Made:
    """Return the rows of the DKA format, and their description.

    Raises:
        InputError: the tables or flags cannot be used.
    """
    series = parse_series("series", request.series)
    context = parse_series("context", request.context)
    hashes: dict[str, str] = {}
    threads = request.threads or usable_cores()
    with open_database(request.out.parent, request.memory_limit, threads) as database:
        load_labels(database, request.labels, hashes)
        load_events(database, request.meds_dir, [*series, *context], hashes)
        wanted = {"series": series, "context": context}
        name_codes(database, wanted, lambda: [*count_codes(database, request.meds_dir)["code"]])
        for name, codes in database.frame(
            "SELECT name, list(code ORDER BY code) FROM named WHERE kind = 'series' "
            "GROUP BY name, position ORDER BY position"
        ).itertuples(index=False):
            logger.info("series %s: %s", name, one_line(join_names(codes)))
        cut_windows(database, request)
        database.run_file(STEPS / "meds.sql")
        about = describe_subjects(database, context)
        parts = None if request.no_splits else read_parts(database, request.meds_dir, hashes)
        rows, description = make_rows(database, request, series, "events", about, parts)
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
        hashes[f"labels: {name}"] = file.sha256
        load_table(database, "loaded", file, LABELS, advice="ask a question with yes or no")
        classes, twice = database.row(
            "SELECT bool_or(categorical_value != ''), "
            f"bool_or(len(list_filter([{answers}], lambda x: x IS NOT NULL)) > 1) FROM loaded"
        )
        if classes:
            problem = "names of classes are no label 0 or 1: ask a question with yes or no"
            raise InputError(f"{file.path}, column categorical_value: {problem}")
        if twice:
            raise InputError(f"{file.path}: a label fills two of {answers}: leave one")
        database.run(
            "INSERT INTO label SELECT subject_id, prediction_time, "
            f"replace(prediction_time::VARCHAR, ' ', 'T'), coalesce({answers}) FROM loaded; "
            "DROP TABLE loaded"
        )


def load_events(
    database: Database, folder: Path, wanted: Sequence[CodedSeries], hashes: dict[str, str]
) -> None:
    """Make the table ``record``: events of subjects with a label, of codes that are wanted."""
    database.run(
        "CREATE TABLE factor (code VARCHAR, unit VARCHAR, factor DOUBLE);"  # codes hold the unit
        "CREATE TABLE record (subject VARCHAR, code VARCHAR, time TIMESTAMP, known TIMESTAMP, "
        "value DOUBLE, unit VARCHAR)"
    )
    codes = [*PERSON, *(code for each in wanted for code in each.codes)]
    for name, file in open_files(database, folder / "data", EVENTS):
        hashes[name] = file.sha256
        subject, code = (WORD.typed(file.raw(column)) for column in ("subject_id", "code"))
        keep = f"{subject} IN (SELECT subject FROM label) AND {match_sql(code, codes)}"
        load_table(database, "loaded", file, EVENTS, keep)
        database.run(
            "INSERT INTO record SELECT subject_id, code, time, time, "
            "CASE WHEN isfinite(numeric_value) THEN numeric_value END, NULL FROM loaded; "
            "DROP TABLE loaded"
        )


def describe_subjects(database: Database, context: Sequence[CodedSeries]) -> pd.DataFrame:
    """Return the context in words and the static columns, by the number of the question."""
    about = database.frame("FROM described ORDER BY number").set_index("number")
    facts = database.frame("SELECT number, name, plain(value) AS value FROM fact")
    values = facts.pivot(index="number", columns="name", values="value")
    for each in context:
        about[f"static_{each.title}"] = values.get(each.name)
    return about.replace("", None).dropna(axis="columns", how="all")


def read_parts(database: Database, folder: Path, hashes: dict[str, str]) -> pd.Series:
    """Return the part of each subject.

    Raises:
        InputError: another part, or a subject in two.
    """
    path = folder / SPLITS
    columns = {"subject_id": WORD, "split": WORD}
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
        subject, code = (WORD.typed(file.raw(column)) for column in ("subject_id", "code"))
        with readable(file.path):
            database.run(
                f"INSERT INTO counted SELECT {code}, count(*), count(DISTINCT {subject}) "
                f"FROM {file.rows()} GROUP BY 1",
                title=f"reading {file.path.name}",
            )
    return database.frame(
        "FROM (SELECT code, sum(events)::BIGINT AS events, sum(subjects)::BIGINT AS subjects "
        "FROM counted GROUP BY code) "
        "ORDER BY CASE WHEN subjects < $fewest THEN 0 ELSE events END DESC, code",
        {"fewest": FEWEST},
    )


def list_codes(request: MedsRequest) -> int:
    """Log each code with events, subjects, unit and description; counts of few are hidden."""
    spill, path = Path(tempfile.gettempdir()), request.meds_dir / "metadata" / "codes.parquet"
    threads = request.threads or usable_cores()
    with open_database(spill, request.memory_limit, threads) as database:
        found = count_codes(database, request.meds_dir).assign(words="")
        if path.is_file():
            file = open_table(database, path, CODES, HINT)
            load_table(database, "about", file, CODES)
            words = database.frame(
                "SELECT code, min(trim(replace(trim(valueuom, '[]'), 'NULL', '') || '  ' || "
                "description)) AS words FROM about GROUP BY code"
            )
            found = found.drop(columns="words").merge(words, "left", "code").fillna({"words": ""})
    logger.info("%15s %15s  code, unit, description", "events", "subjects")
    for code, events, subjects, words in found.itertuples(index=False):
        shown = count_text(subjects, FEWEST)
        events = f"{events:,}" if subjects >= FEWEST else ""
        logger.info("%15s %15s  %s", events, shown, one_line(f"{code}  {words}".rstrip()))
    return 0
