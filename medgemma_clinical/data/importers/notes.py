"""Notes with their times, at the end of a context: those that were written by its prediction."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from medgemma_clinical.data.importers import duck

logger = logging.getLogger(__name__)

CHARACTERS = 16  # of a word with its space, more than those of any text on average


@dataclass(frozen=True)
class NoteText(duck.Column):
    """A text with one space between two words, of which the end of ``max_words`` words is read."""

    form: str = "word"
    may_be_empty: bool = True
    max_words: int = 0

    def typed(self, raw: str) -> str:
        """Return SQL for the end of a raw cell; a list of its words would need much memory."""
        words = rf"trim(regexp_replace({raw}::VARCHAR, '\s+', ' ', 'g'))"
        return f"coalesce(right({words}, {CHARACTERS * self.max_words}), '')"


def load_notes(
    database: duck.Database,
    file: duck.TableFile,
    names: Mapping[str, str],
    subject: duck.Column,
    max_words: int,
    keep: Sequence[str] = (),
    times: Mapping[str, duck.Column] | None = None,  # charted and stored, by default in ISO's order
) -> None:
    """Add notes of the subjects in ``target`` to ``note``: subject, written, stay, text, words."""
    time = duck.Column("instant", may_be_empty=True)
    # No row of a stay gets a note of that ``stay``, such as its discharge summary.
    forms = {"subject": subject, "charted": time, "stored": time, "stay": duck.KEY_OR_EMPTY}
    forms |= {role: replace(form, may_be_empty=True) for role, form in (times or {}).items()}
    columns = {names[role]: form for role, form in forms.items() if role in names}
    columns[names["text"]] = NoteText(max_words=max_words)
    file.check_columns(columns)
    typed = subject.typed(file.raw(names["subject"]))
    join = f"SEMI JOIN target ON target.subject::VARCHAR = ({typed})::VARCHAR"
    duck.load_table(database, "loaded", file, columns, keep, join)
    cells = {
        role: duck.quoted(names[role]) if role in names else "NULL" for role in (*forms, "text")
    }
    text = cells["text"]
    day = f"date_trunc('day', {cells['charted']})"
    # A date without a time, and without a storing time, is known from the end of its day.
    charted = f"{cells['charted']} + to_days(({cells['charted']} = {day})::INTEGER)"
    charted = cells["charted"] if forms["charted"].zoned else charted
    written_time = f"greatest({cells['charted']}, coalesce({cells['stored']}, {charted}))"
    if times and "stored" in names:  # as of the values of from_long: empty means never
        written_time = f"CASE WHEN {cells['stored']} IS NOT NULL THEN {written_time} END"
    database.run(
        "CREATE TABLE IF NOT EXISTS note "
        "(subject VARCHAR, written TIMESTAMP, stay BIGINT, text VARCHAR, words INTEGER); "
        f"INSERT INTO note SELECT {cells['subject']}, {written_time}, {cells['stay']}, {text}, "
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
    pairs = zip(contexts.fillna(""), notes.fillna(""), strict=True)
    return pd.Series([". ".join(filter(None, pair)) for pair in pairs], contexts.index)
