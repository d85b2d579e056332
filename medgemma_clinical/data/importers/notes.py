"""Notes with their times, at the end of a context: those that were written by its prediction."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from medgemma_clinical.data.importers import cells, duck, output, tables
from medgemma_clinical.flags import POSITIVE, TAKEN, row

logger = logging.getLogger(__name__)

SUMMARY = r"(?i)\b(discharge summary|entlass(ungs)?(brief|bericht)|epikrise)"
"""How a discharge summary begins. Where no storing time is known, its time may be the admission."""

CHARACTERS = 16  # of a word with its space, more than those of any text on average


LEFT_OUT = (
    "SELECT count(*) FILTER (NOT of_stay), count(*) FILTER (of_stay) FROM ("
    "SELECT note.stay IS NOT NULL AND EXISTS (FROM target WHERE target.subject::VARCHAR = "
    "note.subject AND target.stay = note.stay) AS of_stay FROM note WHERE note.rowid NOT IN "
    "(SELECT note_id FROM seen))"
)
"""Notes that stand in no context: written later, or of a stay that is asked about."""


@dataclass(frozen=True, kw_only=True)
class NoteRequest(output.TableRequest):
    """What a command needs that reads notes."""

    max_note_words: int = row(POSITIVE, 256, "latest words of notes in a context", TAKEN)


@dataclass(frozen=True, kw_only=True)
class NoteText(cells.Text):
    """A text with one space between two words, of which the end of ``max_words`` words is read."""

    max_words: int

    def typed(self, raw: str) -> str:
        """Return SQL for the end of a raw cell; a list of its words would need much memory."""
        words = rf"trim(regexp_replace({raw}::VARCHAR, '\s+', ' ', 'g'))"
        return f"coalesce(right({words}, {CHARACTERS * self.max_words}), '')"


def load_notes(
    database: duck.Database,
    file: tables.TableFile,
    names: Mapping[str, str],
    subject: cells.Column,
    max_words: int,
    keep: Sequence[str] = (),
    times: Mapping[str, cells.Instant] | None = None,  # of charted and stored
) -> None:
    """Add notes of the subjects in ``target`` to ``note``: subject, written, stay, text, words."""
    in_iso_order = dict.fromkeys(("charted", "stored"), cells.Instant())
    time_forms = in_iso_order | dict(times or {})
    # No row of a stay gets a note of that ``stay``, such as its discharge summary.
    forms = {"subject": subject, "stay": cells.KEY_OR_EMPTY}
    forms |= {role: replace(form, may_be_empty=True) for role, form in time_forms.items()}
    columns = {names[role]: form for role, form in forms.items() if role in names}
    columns[names["text"]] = NoteText(max_words=max_words)
    file.check_columns(columns)
    typed = subject.typed(file.raw(names["subject"]))
    join = f"SEMI JOIN target ON target.subject::VARCHAR = ({typed})::VARCHAR"
    if not {"stored", "stay"} & {*names}:
        beginning = f"left(coalesce({file.raw(names['text'])}::VARCHAR, ''), 200)"
        is_summary = f"regexp_matches({beginning}, '{SUMMARY}')"
        conditions = " AND ".join(f"({condition})" for condition in (*keep, is_summary))
        (count,) = database.row(f"SELECT count(*) FROM {file.rows()} {join} WHERE {conditions}")
        if count:
            text = "%s: left out %d discharge summaries, as no time of storing is known"
            logger.warning(text, file.path, count)
        keep = [*keep, f"NOT {is_summary}"]
    tables.load_table(database, "loaded", file, columns, keep, join)
    subjects, stay, charted, stored, text = (
        duck.quoted(names[role]) if role in names else "NULL"
        for role in ("subject", "stay", "charted", "stored", "text")
    )
    # A date without a time, and without a storing time, is known from the end of its day.
    by_day = f"{charted} + to_days(({charted} = date_trunc('day', {charted}))::INTEGER)"
    known = charted if time_forms["charted"].zoned else by_day
    written_time = f"greatest({charted}, coalesce({stored}, {known}))"
    if times and "stored" in names:  # as of the values of from_long: empty means never
        written_time = f"CASE WHEN {stored} IS NOT NULL THEN {written_time} END"
    database.run(
        "CREATE TABLE IF NOT EXISTS note "
        "(subject VARCHAR, written TIMESTAMP, stay BIGINT, text VARCHAR, words INTEGER); "
        f"INSERT INTO note SELECT {subjects}, {written_time}, {stay}, {text}, "
        f"len({text}) - len(replace({text}, ' ', '')) + 1 FROM loaded WHERE {text} != ''; "
        "DROP TABLE loaded"
    )


def add_notes(database: duck.Database, contexts: pd.Series, max_words: int) -> pd.Series:
    """Return contexts, by ``number`` of the table ``target``, with the notes behind them."""
    database.set(max_note_words=max_words)
    database.run_file(Path(__file__).parent / "sql" / "notes.sql")
    pieces = database.frame("SELECT number, text FROM noted ORDER BY number, position DESC")
    notes = pieces.groupby("number")["text"].agg(" ".join).reindex(contexts.index)
    logger.info("%d of %d prediction times have notes", notes.notna().sum(), len(notes))
    later, of_stay = database.row(LEFT_OUT)
    text = "left out %d notes written later, and %d of the admission that is predicted"
    logger.info(text, later, of_stay)
    pairs = zip(contexts.fillna(""), notes.fillna(""), strict=True)
    return pd.Series([". ".join(filter(None, pair)) for pair in pairs], contexts.index)
