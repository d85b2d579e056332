"""The DKA format: a table with a row a patient and its series as text, read into flat arrays."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.roles import (
    MAX_ID,
    NO_ID,
    SITE_INPUT,
    from_long_command,
    is_site,
)
from medgemma_clinical.data.split import PARTS
from medgemma_clinical.data.texts import NUMBER, Reference
from medgemma_clinical.data.trajectories import FLOW_COLUMNS, UNKNOWN
from medgemma_clinical.files import InputError, did_you_mean, file_hash, one_line, read_json

MAIN_COLUMN, LABEL, HOURS = "clinical_trajectory", "label_escalation", "prediction_hours"
EVENT_COLUMNS = EVENT_HOURS, EVENT = "event_hours", "event"
STATIC = "static_"  # beginning of the name of a static feature's column
PATIENTS = ("subject_id", "id")
COLUMNS = (MAIN_COLUMN, *PATIENTS, "clinical_context", HOURS, "split")
"""Columns that are read, beside the label, further series and static features."""

SERIES_COLUMN = re.compile(r"trajectory_([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]+)\]\s*)?")
"""Column of a further series: its name, and its unit if it has one."""

ARROW = "->|\u2192"
OBSERVATION = rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*[hH](?:(?:[oO][uU])?[rR][sS]?)?\s*\)\s*"
NO_NUMBER = str.maketrans(dict.fromkeys("()hHoOuUrRsS\u2192", " "))
CELL = re.compile(rf"{OBSERVATION}(?:(?:{ARROW}){OBSERVATION})*")
NO_NAME = re.compile(
    rf"{CELL.pattern}|\s*[<>\u2264\u2265]?\s*[+-]?\d+(?:[.,]\d+)*(?:[eE][+-]?\d+)?\s*"
    r"|\s*\d{1,4}[-./](?:\d{1,2}|[A-Za-z]{3})[-./]\d{1,4}(?:\D.*)?"
)
"""A cell of data that is the name of no column: a series, a number or a time."""

MAX_VALUE = float(np.finfo(np.float32).max)
MAX_HOUR = 1e6  # 114 years
MAX_DROPPED = 0.01  # share of a series' values that may be left out in silence
MAX_EVENT = 99  # number of an event that nothing names
BLOCK_ROWS = 50_000  # rows that are parsed at a time: bounds the memory

# --------------------------------------------------------------------------- description

ORIGIN = (
    *("rows", "values", "definitions", "source", "tables_sha256"),
    *("versions", "licence", "license", "citation", "note"),
)
"""Keys of the JSON file that say where data come from; nothing reads them."""

OPTIONAL_TEXTS = ("unit", "prediction_time", "horizon", "csv_sha256", "made_by")

NAMING = {
    "series_name": "DKA without JSON: name of the main series",
    "unit": "DKA without JSON: its unit, '' for none",
    "outcome": "DKA without JSON: meaning of label 1",
}
"""Help of the flags that replace a missing description."""


@dataclass(frozen=True)
class Description:
    """What the JSON file beside a DKA file says of series and labels; empty where it is silent."""

    series: str = ""  # name of the main series
    unit: str = ""  # empty where it has none
    question: str = ""
    outcome: str = ""  # what label 1 means
    plausible: tuple[float, float] | None = None  # of a living patient
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)  # of further series
    reference: Reference | None = None  # of a healthy adult; laboratories differ
    references: dict[str, Reference] = field(default_factory=dict)  # of further series
    prediction_time: str = ""  # when the question is asked, in words
    horizon: str = ""  # how far it looks ahead, in words
    flow: tuple[dict[str, Any], ...] = ()  # FLOW_COLUMNS
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)  # outcome, question
    csv_sha256: str = ""  # of the table that it was written with
    time_scale: float | None = None  # hours that are one unit of time to the encoder
    events: tuple[str, ...] = ()  # names of the events 1, 2, ...
    interventions: tuple[int, ...] = ()  # those that a treatment decision brings
    dropped: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Of a series the share of values that could not be read, and the end where they lie."""
    made_by: str = ""  # command that made the table
    arguments: dict[str, Any] = field(default_factory=dict)  # its flags, plain types

    def for_label(self, column: str) -> Description:
        """Return the description with the outcome of a label column, or of events, as its own."""
        outcome, question = self._meaning(column)
        stated = self.labels.get(column, {})
        outcome = stated.get("outcome", outcome)
        question = stated.get("question", question)
        if not question:
            usual = {about.outcome: about.question for about in (USUAL, NEUTRAL)}
            question = usual.get(outcome, f"Will the outcome {outcome} occur?")
        is_described = column in (LABEL, *self.labels) or (column == EVENT and bool(self.events))
        horizon = self.horizon if is_described else ""
        return replace(self, outcome=outcome, question=question, horizon=horizon)

    def _meaning(self, column: str) -> tuple[str, str]:
        """Return outcome and question of a column, but for what ``labels`` says of it."""
        if column == LABEL:
            return self.outcome or USUAL.outcome, self.question
        if column == EVENT and self.events:
            first = self.events[0]
            return first, self.question if self.outcome == first else ""
        name = column.removeprefix("label_").replace("_", " ").strip() or column
        return name[:1].upper() + name[1:], ""

    def completed(
        self, table: pd.DataFrame, label: str, other: Description
    ) -> tuple[Description, list[str]]:
        """Take from another description what this one lacks of a table; return it in words, too."""
        about, guesses = self, []
        if other.series and MAIN_COLUMN in table and not self.series:
            limits = self.plausible or other.plausible
            about = replace(about, series=other.series, unit=other.unit, plausible=limits)
            guesses.append(f"{MAIN_COLUMN} is taken for {Feature(other.series, other.unit).title}")
        described = label in self.labels or {LABEL: self.outcome, EVENT: self.events}.get(label)
        if other.outcome and label in table and not described:
            about = replace(about, labels={**self.labels, label: {"outcome": other.outcome}})
            guesses.append(f"{label} is taken for {other.outcome}")
        return about, guesses


USUAL = Description(
    "Anion gap", "mEq/L", "Will care have to be escalated?", "Escalation", (-5.0, 60.0)
)
"""What a file of the two columns holds that nothing describes."""

NEUTRAL = Description("Main series", question="Will the outcome occur?", outcome="Outcome")
"""The same of a file with more columns: it need not be of ketoacidosis."""

BOOKKEEPING = re.compile(r"(?:.*_)?id|split|(?:unnamed: \d+)?", re.IGNORECASE)
"""Columns beside the two that say nothing of patients: ids, the split, the index of pandas."""

Meaning = Description | Mapping[str, Any] | str | os.PathLike[str]
"""A description, its JSON as a dict, or the path of the JSON or of the table beside it."""


def name_series(
    table: pd.DataFrame, about: Description, label: str, flags: Description, findings: Findings
) -> Description:
    """Name by flags, ``named``, or else with a warning, what a description does not say."""
    about, guesses = about.completed(table, label, flags)
    if len(guesses) < bool(flags.series or flags.unit) + bool(flags.outcome):
        problem = "each describes a column that no JSON file describes; a unit needs a name"
        raise InputError(f"{findings.source}: --series_name, --unit, --outcome: {problem}")
    others = {*map(str, table)} - {MAIN_COLUMN, LABEL}
    usual = USUAL if all(map(BOOKKEEPING.fullmatch, others)) else NEUTRAL
    if label != LABEL:  # named by its column
        usual = replace(usual, outcome="")
    about, guesses = about.completed(table, label, usual)
    about = replace(about, outcome=about.outcome or usual.outcome)  # of rows without label, too
    if guesses:
        advice = "name it by --series_name, --unit and --outcome"
        if findings.source == "DataFrame":
            advice = "give the JSON or its path as description="
        findings.warnings[f"no description: {', '.join(guesses)}: {advice}"] = None
    return about


def description_path(path: Path) -> Path:
    """Return where the description of a data file lies, or would lie."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).with_suffix(".json")


def read_description(
    source: Any, findings: Findings | None = None, given: Meaning | None = None
) -> Description:
    """Return the description that is given, or beside a data file; without one it says nothing."""
    if given is not None:
        return as_description(given)
    if isinstance(source, pd.DataFrame) or not os.path.lexists(description_path(Path(source))):
        return Description()
    about = as_description(source)
    if findings and about.csv_sha256 and about.csv_sha256 != file_hash(Path(source)):
        file, path = description_path(Path(source)), Path(source)
        findings.warnings[f"{file.name} was made with another {path.name}: is it current?"] = None
    return about


def as_description(meaning: Meaning) -> Description:
    """Return the description that a caller gives in any form."""
    if isinstance(meaning, Description):
        return meaning
    where, form, content = "description", "a Description, a dict or a path", meaning
    try:
        if isinstance(meaning, (str, os.PathLike)):
            path = description_path(Path(meaning))
            where, form = str(path), "a JSON object in UTF-8"
            content = read_json(path)
        content = _read_keys(content, [key.name for key in fields(Description)])
        if ("series" in content) != ("unit" in content):
            raise InputError("key series: goes with the key unit, which is empty for none")
    except InputError as error:
        raise InputError(f"{where}, {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file: give the description or its path") from error
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(f"{where}: not {form}") from error
    return Description(**content)


def _read_keys(content: Any, keys: Sequence[str], within: str = "") -> dict[str, Any]:
    """Check and convert a JSON object; a misspelt key would leave a default in silence."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in keys and key not in ORIGIN:
            hint = did_you_mean(key, keys) or f": the keys are {', '.join(keys)}"
            raise InputError(f"key {within}{key}: no such key{hint}")
        try:
            values |= {key: _read_value(key, value)} if key in keys else {}
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
            raise InputError(f"key {within}{key}: not as docs/data.md shows it") from error
    return values


def _read_value(key: str, value: Any) -> Any:
    """Convert a value; one of another form raises any error."""
    match key:
        case "plausible" | "reference":
            return None if value is None else _range(value, both=key == "plausible")
        case "limits" | "references":
            ranges = {comparable(name): pair for name, pair in value.items() if pair is not None}
            return {name: _range(pair, both=key == "limits") for name, pair in ranges.items()}
        case "labels":
            keys = ("outcome", "question")
            return {name: _read_keys(x, keys, f"labels.{name}.") for name, x in value.items()}
        case "flow":
            known = [k for k in FLOW_COLUMNS[1:] if k != "patients" or k in value[0]]
            return tuple({"rule": x["rule"], **{k: int(x[k]) for k in known}} for x in value)
        case "dropped":
            return {name: (float(x["share"]), str(x["end"])) for name, x in value.items()}
        case "time_scale":
            return _range([0, value], both=True)[1]
        case "events":
            names = [_read_value("outcome", value[str(k + 1)]) for k in range(len(value))]
            if not 0 < len({*names}) == len(names) <= MAX_EVENT:
                raise ValueError("no names, or equal ones")
            return tuple(names)
        case "made_by" | "arguments":  # of any form: a user may have written them
            if key == "made_by":
                return value if isinstance(value, str) else ""
            return json.loads(json.dumps(value)) if isinstance(value, dict) else {}
        case "interventions":
            if not all(isinstance(event, int) and event > 1 for event in value):
                raise ValueError("not numbers of events behind the first")
            return tuple(sorted({*value}))
    if not value.split() and key not in OPTIONAL_TEXTS:
        raise ValueError("an empty text")
    return " ".join(value.split())


def _range(pair: Any, *, both: bool) -> tuple[float | None, ...]:
    """Return two rising numbers, of which one may be None unless ``both`` are needed."""
    low, high = (None if end is None else float(end) for end in pair)
    ends = [end for end in (low, high) if end is not None]
    if len(ends) < 1 + both or not np.isfinite(ends).all() or ends != sorted(set(ends)):
        raise ValueError("not rising numbers")
    return low, high


# --------------------------------------------------------------------------- cells


def text_of(table: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as stripped text, empty where missing; whole floats as integers: 1.0 is 1."""
    column = table[name] if name in table else pd.Series(None, table.index, dtype=object)
    is_filled = column.notna()
    if pd.api.types.is_float_dtype(column.dtype):
        column = pd.Series(column.to_numpy(np.float64, na_value=np.nan), table.index)
        whole = is_filled & (column % 1 == 0) & (column.abs() < 2**53)
        column = column.astype(object).where(~whole, column.where(whole, 0).astype("int64"))
    return column.astype(str).where(is_filled, "").str.strip().astype(object)


def numbers_of(
    table: pd.DataFrame, name: str, findings: Findings, max_value: float = MAX_VALUE
) -> NDArray[np.float64]:
    """Return a column of numbers, true or false, (rows,), NaN where empty."""
    if str(table[name].dtype) in ("int64", "float64"):  # ten times as fast as by its text
        numbers = table[name].to_numpy(np.float64)
        if not np.abs(numbers).max(initial=0, where=~np.isnan(numbers)) > max_value:
            return numbers
    text = text_of(table, name).str.lower().replace({"true": "1", "false": "0"})
    numbers = text.where(text.str.fullmatch(NUMBER), "nan").to_numpy(np.float64)
    findings.reject((text != "") & ~(np.abs(numbers) <= max_value), name, "not a number", text)
    return numbers


def labels_of(
    table: pd.DataFrame, label: str, findings: Findings, *, refuse: bool
) -> NDArray[np.float64]:
    """Return labels, (rows,), NaN where empty; wrong ones are refused, or counted as unknown."""
    text = text_of(table, label).str.lower().replace({"false": "0", "true": "1"})
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    labels = np.where(np.isin(numbers, [0, 1]), numbers, np.nan)
    wrong = (text != "") & np.isnan(labels)
    if refuse:
        findings.reject(wrong, label, "not 0 or 1: write 1 for the event", text)
    problem = f"have a {label} that is neither 0 nor 1: taken as unknown"
    findings.counts[problem] += int(wrong.sum())
    return labels


def events_of(
    table: pd.DataFrame, max_event: int, findings: Findings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return events and their hours, each (rows,), NaN where both cells are empty or missing."""
    if not {*EVENT_COLUMNS} <= {*table}:
        return np.full(len(table), np.nan), np.full(len(table), np.nan)
    hours = numbers_of(table, EVENT_HOURS, findings, MAX_HOUR)
    events = numbers_of(table, EVENT, findings)
    problem = "before the prediction time: leave such rows out"
    findings.reject(pd.Series(hours < 0, table.index), EVENT_HOURS, problem, table[EVENT_HOURS])
    wrong = ~np.isnan(events) & ~((events >= 0) & (events <= max_event) & (events % 1 == 0))
    problem = f"not 0 for censored or the number of an event, 1 to {max_event}"
    findings.reject(pd.Series(wrong, table.index), EVENT, problem, table[EVENT])
    single = pd.Series(np.isnan(hours) != np.isnan(events), table.index)
    findings.reject(single, EVENT, f"this cell or {EVENT_HOURS} is empty: fill both or none")
    return events, hours


def competing_events(
    table: pd.DataFrame,
    about: Description,
    horizon_hours: Sequence[float] | None,
    findings: Findings,
) -> CompetingEvents:
    """Return what the events of a table are, by the description's names or by their numbers."""
    horizons = np.atleast_1d(np.array([] if horizon_hours is None else horizon_hours, np.float64))
    is_rising = (np.diff(horizons, prepend=0) > 0).all() and np.isfinite(horizons).all()
    if not len(horizons) or not is_rising:
        problem = "times to events need hours at which risks are wanted, rising, as 24,72"
        raise InputError(f"--horizon_hours: {problem}")
    events, _ = events_of(table, len(about.events) or MAX_EVENT, findings)
    count = int(events.max(initial=1, where=~np.isnan(events)))
    numbered = [f"event {k}" for k in range(1, count + 1)]
    numbered[0] = about.labels.get(EVENT, {}).get("outcome", numbered[0])
    names = about.events or tuple(numbered)
    if about.interventions and about.interventions[-1] > len(names):
        problem = f"there is no event {about.interventions[-1]} among {join_names(names)}"
        raise InputError(f"{findings.source}: key interventions of the JSON file: {problem}")
    return CompetingEvents(names, tuple(horizons.tolist()), about.interventions)


def parts_of(table: pd.DataFrame, findings: Findings) -> NDArray[np.str_] | None:
    """Return the part of the split of each row as the data bring it, None where they do not."""
    if "split" not in table:
        return None
    parts = text_of(table, "split").str.lower().replace("validation", "val")
    findings.reject(~parts.isin(PARTS), "split", "not train, val or test", parts)
    moved = parts != parts.groupby(patients_of(table, findings)[0]).transform("first")
    findings.reject(moved, "split", "another part than in an earlier row of the patient")
    return parts.to_numpy(dtype=np.str_)


def patients_of(table: pd.DataFrame, findings: Findings) -> tuple[pd.Series, NDArray[np.str_]]:
    """Return the patient of each row, 1, 1.0 and 01 being one, and the row's name as written."""
    columns = [name for name in PATIENTS if name in table]
    texts = [text_of(table, name) for name in columns] or [table.index.to_series().astype(str)]
    patients = texts[0].str.replace(r"^0*([0-9]+)(?:\.0+)?$", r"\1", regex=True)
    bad, column = patients == "", columns[0] if columns else ""
    findings.reject(bad, column, "is empty: name the patient of each row")
    names = texts[-1].where(texts[-1] != "", texts[0])
    for column, text in zip(columns, texts, strict=False):
        bad = text.str.contains(NO_ID) | (text.str.len() > MAX_ID)
        problem = f"over {MAX_ID} characters, rounded (1.2E+16) or with control characters"
        findings.reject(bad, column, problem, text)
        names = names.mask(bad, names[bad].map(one_line))  # a table of predictions has its lines
    return patients, names.to_numpy(dtype=np.str_)


def sites_of(table: pd.DataFrame, name: str, source: str) -> NDArray[np.str_]:
    """Return the site of each row as the column ``name`` says it, ``not known`` where empty."""
    if name not in table:
        columns = join_names(list(map(str, table)))
        raise InputError(f"{source}, column {name}: no such column of sites among {columns}")
    return text_of(table, name).replace("", UNKNOWN).to_numpy(dtype=np.str_)


def number_equal(ids: NDArray[np.str_], findings: Findings) -> NDArray[np.str_]:
    """Number the ids that repeat one of an earlier row of the source: 7, 7 (2)."""
    seen, numbered = findings.ids, []
    for name in ids.tolist():
        new = name
        while name and new in seen:  # an id may itself be "7 (2)"
            seen[name] += 1
            new = f"{name} ({seen[name]})"
        seen[new] += 1
        numbered.append(new)
    unique = np.array(numbered, dtype=np.str_)
    findings.counts["repeat an earlier id: numbered, as in ID (2)"] += int((unique != ids).sum())
    return unique


# --------------------------------------------------------------------------- columns


def comparable(name: str) -> str:
    """Return a name for comparison: ``Urea_Nitrogen`` is ``urea nitrogen``."""
    return " ".join(name.replace("_", " ").lower().split())


def join_names(names: Sequence[str], max_names: int = 20) -> str:
    """Return the first of some names, and the number of the others."""
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(one_line(name[:200]) for name in names[:max_names]) + more


NO_HEADER = "row 1 holds data, no header: write the names of the columns above it"


def holds_data(header: Iterable[str]) -> bool:
    """Return whether the first row of a table is one of its data, whose cells no message shows."""
    return any(map(NO_NAME.fullmatch, header))


def check_header(
    table: pd.DataFrame, source: str, outcome: Sequence[str], *, labelled: bool
) -> None:
    """Refuse a table without a series, or without outcome columns where it has to be labelled."""
    columns = [*map(str, table)]
    has_further = any(name.startswith("trajectory_") for name in columns)
    needed = {MAIN_COLUMN: not has_further, **dict.fromkeys(outcome, labelled)}
    missing = next((x for x, is_needed in needed.items() if is_needed and x not in columns), None)
    if missing:
        if command := from_long_command(columns, source):
            raise InputError(f"{source}: holds one value a row: make a file of it by {command}")
        hint = f"{did_you_mean(missing, columns)}; the columns are {join_names(columns)}"
        if missing in outcome:
            hint += "; rows without outcomes can only be scored, by predict"
        if holds_data(columns):
            hint = f": {NO_HEADER}"
        raise InputError(f"{source}, column {missing}: no such column{hint}")
    if outcome[0].startswith(STATIC):
        raise InputError(f"{source}, column {outcome[0]}: a static feature cannot be the label")
    for name in columns:
        is_read = name in (*COLUMNS, *outcome) or name.startswith(STATIC)
        if is_read and columns.count(name) > 1:
            raise InputError(f"{source}, column {name}: appears twice: remove one")


def note_columns(
    table: pd.DataFrame,
    outcome: Sequence[str],  # the columns that hold it
    description: Description,
    findings: Findings,
    site: str | None = None,
) -> None:
    """Warn of what a table lacks or should not hold; note the columns that are not read."""
    columns = [*map(str, table)]
    series = find_features(table, description, None, "")
    static = [name for name in columns if name.startswith(STATIC)]
    warnings = []
    if not set(PATIENTS) & set(columns):
        warnings.append("no column subject_id: each row is a patient of its own")
    for name, (share, end) in description.dropped.items():
        if share > MAX_DROPPED:
            where = f"; those that begin with a number lie at its {end} end" if end else ""
            warnings.append(f"{name}: {share:.1%} of its values were not read{where}")
    flags = {name for name in static if text_of(table, name).isin(["", *"01", "0.0", "1.0"]).all()}
    if sites := [name for name in static if is_site(name, is_category=name in flags)]:
        warnings.append(f"{join_names(sites, 3)}: {SITE_INPUT}")
    inputs = {*COLUMNS, *outcome, site, *(feature.keys[0] for feature in series)}
    extra = [name for name in columns if name not in inputs and not name.startswith(STATIC)]
    if extra:
        findings.notes[f"columns not read: {join_names(extra, 10)}"] = None
    for name in (*COLUMNS, *outcome):
        if name not in columns and (hint := did_you_mean(name, extra, 0.75)):
            warnings.append(f"no column {name}{hint}")
    findings.warnings |= dict.fromkeys(warnings)


def find_features(
    table: pd.DataFrame, description: Description, names: Sequence[str] | None, source: str
) -> list[Feature]:
    """Find all series of a table, ``MAIN_COLUMN`` first, or those of ``names``."""
    about, limits, references = description, description.limits, description.references
    main = Feature(about.series, about.unit, (MAIN_COLUMN,), about.plausible, about.reference)
    features = {comparable(main.name): main} if MAIN_COLUMN in table else {}
    for column in [name for name in map(str, table) if name.lower().startswith("trajectory")]:
        match = SERIES_COLUMN.fullmatch(column)
        name, unit = match.groups("") if match else ("", "")
        name, key = " ".join(name.replace("_", " ").split()), comparable(name)
        problem = "another column is a series of that name" if key in features else ""
        if not name or "," in name or re.fullmatch(NUMBER, name):
            problem = "not trajectory_NAME [unit], the name in words without comma"
        if problem:
            raise InputError(f"{source}, column {column}: {problem}")
        unit = "" if unit.strip() == "1" else unit.strip()  # UCUM's way to write that there is none
        features[key] = Feature(name, unit, (column,), limits.get(key), references.get(key))
    keys = [*features] if names is None else list(map(comparable, names))
    for key in keys:
        if key not in features:
            series = join_names([feature.name for feature in features.values()])
            raise InputError(f"{source}: --series {key}: no such series among {series}")
    if len(set(keys)) < max(len(keys), 1):
        raise InputError(f"{source}: --series: name each series once, and one at least")
    return [features[key] for key in keys]


# --------------------------------------------------------------------------- series


Observations = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""By row and time: (n,) position of the row, (n,) hours, (n, F) values, NaN where not measured."""


def parse_series(table: pd.DataFrame, columns: Sequence[str], findings: Findings) -> Observations:
    """Read F columns of series; observations are the union of their times."""
    starts = range(0, max(len(table), 1), BLOCK_ROWS)
    blocks = [_parse_block(table[k : k + BLOCK_ROWS], columns, findings, k) for k in starts]
    row, times, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return row, times, values


def _parse_block(
    table: pd.DataFrame, columns: Sequence[str], findings: Findings, start: int
) -> Observations:
    series, unsorted = [], np.zeros(len(table), dtype=bool)
    for f, column in enumerate(columns):
        text = text_of(table, column)
        readable = text.str.fullmatch(CELL).astype(bool)
        problem = "not of the form VALUE (HOURSh), as 24 (0h) -> 20.5 (2h)"
        findings.reject((text != "") & ~readable, column, problem, text)
        cells = text[readable]
        numbers = " ".join(cells).replace("->", " ").translate(NO_NUMBER)
        # Spreadsheets bring no-break spaces, which numpy does not read.
        pairs = np.fromstring(" ".join(numbers.split()), sep=" ").reshape(-1, 2)
        row = np.repeat(np.flatnonzero(readable), cells.str.count(ARROW).to_numpy(np.int64) + 1)
        large = row[(np.abs(pairs) > (MAX_VALUE, MAX_HOUR)).any(axis=1)]
        too_large = pd.Series(np.isin(np.arange(len(text)), large), text.index)
        findings.reject(too_large, column, "holds a number that is too large", text)
        unsorted[row[1:][(pairs[1:, 1] < pairs[:-1, 1]) & (np.diff(row) == 0)]] = True
        series.append((row, pairs[:, 1], np.full(len(row), f), pairs[:, 0]))
    findings.counts["were not in time order; sorted"] += int(unsorted.sum())
    row, times, feature, values = map(np.concatenate, zip(*series, strict=True))
    order = np.lexsort((feature, times, row))
    row, times, feature, values = row[order], times[order], feature[order], values[order]
    # Number the values of a series at one time, 0, 1, ...; k-th values share an observation.
    first = np.flatnonzero(_changes(row, times, feature))
    again = np.arange(len(row)) - np.repeat(first, np.diff(first, append=len(row)))
    order = np.lexsort((again, times, row))
    new = _changes(row[order], times[order], again[order])
    joined = np.full((int(new.sum()), len(columns)), np.nan)
    joined[np.cumsum(new) - 1, feature[order]] = values[order]
    return row[order][new] + start, times[order][new], joined


def _changes(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where sorted rows (n,) differ from the row before."""
    new = np.ones(len(columns[0]), dtype=bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


# --------------------------------------------------------------------------- rows to score


def as_trained(
    table: pd.DataFrame, about: Description, config: Mapping[str, Any], findings: Findings
) -> tuple[Description, list[str]]:
    """Complete a description from a checkpoint's; return it and the columns of absent series."""
    source = findings.source
    events = tuple(config["events"]["names"]) if config.get("events") else ()
    label = EVENT if events else config["read_options"].get("label_column", LABEL)
    check_header(table, source, (label,), labelled=False)
    trained = [Feature(*pair) for pair in zip(config["features"], config["units"], strict=True)]
    features = {comparable(x.name): x for x in find_features(table, about, None, source)}
    main = next((x for x in trained if comparable(x.name) not in features), Feature(""))
    usual = Description(series=main.name, unit=main.unit or "", outcome=config["outcome"])
    about, guesses = about.completed(table, label, usual)
    if guesses:
        findings.notes[f"no description: {', '.join(guesses)}, as in the training data"] = None
    if "" in features:  # the main series, which had no name
        unnamed = features.pop("")
        features[comparable(about.series)] = replace(unnamed, name=about.series, unit=about.unit)
    if config.get("prompts", {}).get("context") and "clinical_context" not in table:
        findings.warnings["no column clinical_context: the model reads an empty text"] = None
    missing = absent_series(trained, features, config, source)
    check_static(table, config["inputs"], source)
    outcome, expected = about.for_label(label).outcome, config["outcome"]
    if events and about.events:
        outcome, expected = join_names(about.events), join_names(events)
    if label in table and outcome != expected:
        raise InputError(f"{source}, column {label}: is {outcome}, the model predicts {expected}")
    return about, missing


def absent_series(
    trained: Sequence[Feature],
    features: Mapping[str, Feature],  # of the table, by comparable name
    config: Mapping[str, Any],
    source: str,
) -> list[str]:
    """Return the columns of series that a table lacks; refuse one that is read, or another unit."""
    missing, read = list[str](), config["inputs"].get("series", config["features"])
    for series in trained:
        column, feature = f"trajectory_{series.title}", features.get(comparable(series.name))
        if feature is None and series.name in read:
            names = join_names([x.name for x in features.values()])
            problem = f"the model reads it, the table has only {names}"
            raise InputError(f"{source}, column {column}: {problem}")
        if feature is None:
            missing.append(column)
        elif feature.unit != series.unit:
            units = f"in {feature.unit or 'no unit'}, the model reads {series.unit or 'no unit'}"
            raise InputError(f"{source}, column {feature.keys[0]}: {series.name} is {units}")
    return missing


def check_static(table: pd.DataFrame, inputs: Mapping[str, Any], source: str) -> None:
    """Refuse a table without a static feature, or the prediction time, that a model reads."""
    hours = [HOURS] if inputs["prediction_time"] else []
    for name in [*inputs["static"], *hours]:
        if name not in table:
            same = [x for x in map(str, table) if x.partition(" [")[0] == name.partition(" [")[0]]
            problem = f", not {same[0]}" if same else "; its cells may be empty where unknown"
            raise InputError(f"{source}, column {name}: the model reads it{problem}")
