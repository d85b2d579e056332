"""What from_long is asked: its flags, declared once, and what an earlier import says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgemma_clinical.data.dka import description_path
from medgemma_clinical.data.importers import cells, output
from medgemma_clinical.data.importers.events import MICRO, EventRequest
from medgemma_clinical.data.importers.notes import NoteRequest
from medgemma_clinical.data.roles import EVENT_ROLES, LABEL_ROLES, NOTE_ROLES, OPTIONAL, ROLES
from medgemma_clinical.data.texts import NUMBER
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.flags import FORM, NEVER, TAKEN, Flag, Texts, flags_of, row, texts

COMMAND = "from_long"
LIMITS = "of '<5': 2.5, 5, or no value; of '>5': 5, or no value"
LATER = re.compile(r"(.+?)\s*\+\s*(\d+(?:\.\d+)?)\s*(h|d)(?:ours?|ays?)?")
WITHIN = re.compile(r"(.+?)\s+within\s+(\d+(?:\.\d+)?)\s*(h|d)(?:ours?|ays?)?")
BY = re.compile(r"(.+?)\s+by\s+(.+)")
FACTOR = re.compile(rf"(.*):(.*)=\s*({NUMBER}|drop)\s*")
DROP = math.inf
"""Factor of values that are left out, as those of an unknown unit."""


@dataclass(frozen=True)
class Outcome:
    """A label of --label or --outcome_column: its meaning, its column, and the end of a date's."""

    title: str  # empty: only the column is named
    column: str
    hours: float | None = None  # from the prediction time to the end, of a column of dates
    until: str = ""  # the column of the end in place of it

    @property
    def name(self) -> str:
        """The title without the column of the end, which other tables name otherwise."""
        match = BY.fullmatch(self.title) if self.until else None
        return match[1] if match else self.title

    @property
    def is_dated(self) -> bool:
        """Whether its column holds dates, of which an end is asked."""
        return self.hours is not None or bool(self.until)


@dataclass(frozen=True)
class Earlier:
    """What --like takes from the description of an earlier import."""

    values: Mapping[str, Any] = field(default_factory=dict)  # of flags that any table may take
    form: Mapping[str, Any] = field(default_factory=dict)  # of flags that its own columns need
    columns: Mapping[str, str] = field(default_factory=dict)  # by role
    series: tuple[str, ...] = ()
    times: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # formats by role
    static: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # categories by title
    medians: Mapping[str, float] = field(default_factory=dict)  # of the values of each series


@dataclass(frozen=True, kw_only=True)
class LongRequest(EventRequest, NoteRequest):
    """The flags of from_long."""

    table: Path = row(Path, None, "CSV, Excel or Parquet, one value a row", required=True)
    labels: Path = row(Path, None, "patient, prediction time and label", required=True)
    like: Path | None = row(Path, None, "read as for this earlier output, or model")
    columns: Texts = texts("other names, as time=Drawn item=Analyte", several=True)
    prediction_time: str = row(str, "", "'COLUMN + 48 h' of --labels", TAKEN)
    label: Texts = texts("'death within 30 days=COLUMN' of dates, or 'death=COLUMN'")
    outcome_column: Texts = texts("a label without a title; the first is the main")
    positive: Texts = texts("word of label 1, all others being 0 (Yes)", FORM)
    event: Texts = texts("'death=COLUMN' of times, or a column of numbers or words")
    event_time: str = row(str, "", "column: time of the event, or end of the record", TAKEN)
    event_names: Texts = texts("of 1, 2, ...: the words of --event", several=True)
    interventions: Texts = texts("events by a treatment decision", several=True)
    end_time: str = row(str, "", "column of --labels: when the stay ended", TAKEN)
    no_labels: bool = row(bool, False, "outcome not known: new patients")
    static: Texts = texts("'age [years]=COLUMN' of --labels")
    sex: Texts = texts("words of a sex, as 1=male 2=female", FORM, several=True)
    keep: Texts = texts("columns of --labels to carry along", several=True)
    context_column: str = row(str, "", "column of --labels with a text for the context", TAKEN)
    notes: Path | None = row(Path, None, "table with patient, time and text, for the context")
    time_format: Texts = texts("strptime format of times", FORM)
    time_unit: str = row(tuple(cells.MICROSECONDS), "", "unit of times that are numbers", FORM)
    decimal: str = row(("comma", "point"), "", "decimal sign; the other groups thousands", FORM)
    below_limit: str = row(("half", "value", "drop"), "", LIMITS, TAKEN)
    bad_values: str = row(("drop",), "", "leave out values that are no numbers", FORM)
    result_flags: Texts = texts("letters behind numbers, as L", FORM, several=True)
    factor: Texts = texts("'ITEM:UNIT=NUMBER' converts a unit, =drop leaves it out", FORM)
    equal_times: str = row(("keep", "last", "mean"), "", "different values of one time", TAKEN)
    encoding: str = row(str, "", "of a CSV that is not UTF-8 (default: cp1252)", FORM)
    sheet: Texts = texts("of an Excel file (default: first); again: the next", FORM)
    earlier: Earlier = Earlier()

    def prediction_time_column(self) -> tuple[str, float]:
        """Return the column of --prediction_time, and the hours to add to it."""
        match = LATER.fullmatch(self.prediction_time.strip())
        if not match:
            return self.prediction_time.strip(), 0.0
        return match[1], hours_of(match[2], match[3])

    def mapped(self) -> dict[str, str]:
        """Return the columns that are named by their role, empty where there is none."""
        columns = read_columns(self.columns)
        if outcomes := self.outcomes():
            first = outcomes[0].column
            columns["label"] = first if self.label else columns.get("label", first)
        if self.prediction_time:
            columns["prediction_time"] = self.prediction_time_column()[0]
        named = {"end_time": self.end_time, "event_time": self.event_time}
        named["event"] = "" if self.dated_events() else "".join(self.event[:1])
        columns = {role: name for role, name in named.items() if name} | columns
        if columns.get("event") and not columns.get("event_time"):
            raise InputError("--event: write 'NAME=COLUMN', or give --event_time")
        if columns.get("event_time") and not (self.event or columns.get("event")):
            raise InputError("--event_time: needs --event, what happened then")
        return columns

    def outcomes(self) -> list[Outcome]:
        """Return the labels, the main one first; of one title the last counts."""
        titled = {outcome.title: outcome for outcome in map(read_outcome, self.label)}
        dated = {x.column for x in titled.values() if x.is_dated}
        outcomes = [*titled.values(), *(Outcome("", text) for text in self.outcome_column)]
        return [x for x in outcomes if x.is_dated or x.column not in dated]

    def dated_events(self) -> dict[str, str]:
        """Return the columns of times of events by their names; none where a column names them."""
        pairs = [[part.strip() for part in text.partition("=")] for text in self.event]
        if not pairs or (len(pairs) == 1 and not pairs[0][1]):
            return {}
        for (name, _, column), text in zip(pairs, self.event, strict=True):
            if not name or not column or name.isdigit():
                raise InputError(f"--event {text}: write 'NAME=COLUMN' of each event")
        if self.event_names:
            raise InputError("--event: 'NAME=COLUMN' has no use for --event_names")
        names = {name.lower(): name for name, *_ in pairs[::-1]}
        return {names[name.lower()]: column for name, _, column in pairs}  # the last of a name

    def unread_roles(self) -> set[str]:
        """Return the roles of outcomes that are not read: all of new patients.

        Beside times to events a label is read only where it is named.
        """
        mapped = self.mapped()
        if self.no_labels:
            return {"label", *EVENT_ROLES}
        unread = (
            set() if "label" in mapped or not (mapped.get("event") or self.event) else {"label"}
        )
        return unread | {role for role in EVENT_ROLES if not mapped.get(role)}

    def factors(self) -> dict[tuple[str, str], float]:
        """Return the factor of each item and unit."""
        factors: dict[tuple[str, str], float] = {}
        for text in self.factor:
            match = FACTOR.fullmatch(text)
            is_drop = match is not None and match[3] == "drop"
            factor = DROP if is_drop or not match else float(match[3])
            if not match or factor <= 0 or (factor == math.inf and not is_drop):
                raise InputError(f"--factor {text}: write 'ITEM:UNIT=NUMBER', a number above 0")
            key = match[1].strip(), match[2].strip()
            key = next((earlier for earlier in factors if alike(earlier, key)), key)
            factors[key] = factor
        return factors


def hours_of(number: str, unit: str) -> float:
    """Return the hours of a number of hours or days."""
    return float(number) * (24 if unit == "d" else 1)


def read_outcome(text: str) -> Outcome:
    """Read a --label."""
    title, _, column = map(str.strip, text.partition("="))
    if not title or not column:
        raise InputError(f"--label {text}: write 'death within 30 days=COLUMN', or 'TITLE=COLUMN'")
    if match := WITHIN.fullmatch(title):
        return Outcome(title, column, hours_of(match[2], match[3]))
    match = BY.fullmatch(title)
    return Outcome(title, column, until=match[2] if match else "")


def read_columns(texts: tuple[str, ...]) -> dict[str, str]:
    """Read --columns: the column of each role."""
    columns: dict[str, str] = {}
    roles = {**ROLES, **LABEL_ROLES, **NOTE_ROLES}
    begins = "|".join(map(re.escape, roles))
    for text in texts:
        for pair in re.split(rf",(?=\s*(?:{begins})\s*=)", text):
            role, _, name = map(str.strip, pair.partition("="))
            if role not in roles or not (name or role in OPTIONAL):
                problem = f"write ROLE=COLUMN, a role of {', '.join(roles)}"
                raise InputError(f"--columns {text}: {problem}")
            columns[role] = name
    return columns


def alike(texts: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Return whether units, or items, differ in their case or the sign of micro alone."""
    first, second = ([MICRO.sub("u", text).lower() for text in pair] for pair in (texts, others))
    return first == second


def read_like(path: Path) -> Earlier:
    """Return what an earlier output says of the flags, each checked like a typed one.

    ``path`` may also be the description itself, or the folder of a model with its ``import.json``.
    """
    file = path / "import.json" if path.is_dir() else description_path(path)
    try:
        content = read_json(file)
        arguments = dict(content["arguments"]) if content[output.MADE_BY].endswith(COMMAND) else {}
        found = arguments.pop("read_as", {})
        medians = {str(name): float(x) for name, x in found.pop("medians", {}).items()}
        read_as = {
            kind: {str(name): tuple(map(str, texts)) for name, texts in by_name.items()}
            for kind, by_name in found.items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        arguments = {}
    if not arguments:
        problem = f"there is no description of an output of {COMMAND} in {file.name}"
        advice = ": give the training table, or a shared copy of the model" if path.is_dir() else ""
        raise InputError(f"--like {path}: {problem}{advice}")
    rows: dict[str, Flag] = flags_of(LongRequest)
    values = {
        name: rows[name].read(value, f"--like {path}")
        for name, value in arguments.items()
        if name in rows and rows[name].stored != NEVER and value not in ("", [])
    }
    form = {name: values.pop(name) for name in [*values] if rows[name].stored == FORM}
    columns = read_columns(values.pop("columns", ()))
    return Earlier(values, form, columns, values.pop("series", ()), **read_as, medians=medians)
