"""What the series and the label of a DKA file mean, and which series its columns hold."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.dka.series_cells import LARGEST_VALUE
from medgemma_clinical.data.texts import FORMULA_STARTS, NUMBER, Reference
from medgemma_clinical.data.trajectories import FLOW_COLUMNS
from medgemma_clinical.files import InputError, file_hash, one_line, read_json

MAIN_COLUMN = "clinical_trajectory"

LABEL = "label_escalation"
"""Default of ``--label_column``."""

SERIES_COLUMN = re.compile(r"trajectory_([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]+)\]\s*)?")
"""A column of one more series: its name, and its unit if it has one."""

MOST_NAMES, MOST_UNREAD = 20, 10
"""Names that an error lists, and columns that are not read which the log lists."""

MOST_ROWS = 10**12
"""Rows that a flow may count."""

LEAST_LIKENESS = 0.85
"""Of two names by ``difflib``, so that one is a misspelling of the other."""

LONGEST_NAME, LONGEST_SENTENCE = 200, 2_000
"""Characters of a name (a series, a unit, an outcome) and of any other text."""


@dataclass(frozen=True)
class Description:
    """What the series and the label of a DKA file mean, for texts and checks.

    Read from a JSON object in a file of the same name beside the data (``data.csv``,
    ``data.json``); absent keys keep these defaults, keys that are not known are refused.

    Attributes:
        series: name of the main series as a clinician writes it.
        unit: unit of its values, empty where it has none.
        question: the question about a patient, a sentence.
        outcome: what label 1 means, in a word or two; a report begins with it.
        plausible: lowest and highest value that a living patient shows; None where unknown,
            and where the JSON names another series without them.
        limits: the same for further series, by name.
        reference: reference range of the main series, None where unknown. Laboratories differ, so
            the anion gap has none by default.
        references: the same for further series, by name.
        prediction_time: when the question is asked, in words; empty where unknown.
        horizon: how far the question looks ahead, in words; empty where unknown.
        flow: ``rule``, ``removed``, ``left`` of each rule by which data came to their rows.
        labels: ``outcome`` and ``question`` of further label columns, by the column's name.
        csv_sha256: SHA-256 of the table that it was written with; empty where unknown.
        time_scale: hours that are one unit of time to the encoder; None leaves the format's.
    """

    series: str = "Anion gap"
    unit: str = "mEq/L"
    question: str = "Will care have to be escalated?"
    outcome: str = "Escalation"
    plausible: tuple[float, float] | None = (-5.0, 60.0)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    reference: Reference | None = None
    references: dict[str, Reference] = field(default_factory=dict)
    prediction_time: str = ""
    horizon: str = ""
    flow: tuple[dict[str, Any], ...] = ()
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    csv_sha256: str = ""
    time_scale: float | None = None

    def for_label(self, column: str) -> Description:
        """Return the description with the outcome of a label column as its own.

        A column without an entry in ``labels`` is no outcome that the file describes, but for
        ``label_escalation``: the outcome has the column's name then.

        Raises:
            InputError: the name is no text for a report.
        """
        entry = self.labels.get(column)
        if column == LABEL:
            return replace(self, **(entry or {}))
        words = column.removeprefix("label_").replace("_", " ").strip() or column
        outcome = words[:1].upper() + words[1:]
        _check_outcome(f"--label_column {column}", outcome)
        question = f"Will the outcome {outcome} occur?"
        horizon = self.horizon if entry else ""
        named = replace(self, outcome=outcome, question=question, horizon=horizon)
        return replace(named, **(entry or {}))

    @classmethod
    def beside(cls, path: Path) -> Description:
        """Read the description of the data file ``path``, or return the default.

        Raises:
            InputError: the JSON file exists and cannot be read, or a key has a wrong value.
        """
        file = description_path(path)
        if not os.path.lexists(file):
            return cls()
        if not file.is_file():
            raise InputError(f"{file}: not a file: remove it, or describe {path.name} there")
        try:
            content = read_json(file, _read_object)
            if not isinstance(content, dict):
                raise TypeError
            return cls._from_json(content)
        except InputError as error:
            raise InputError(f"{file}, {error}") from error
        except (ValueError, TypeError, OSError) as error:
            raise InputError(
                f"{file}: not a description of {path.name}: write a JSON object in UTF-8, such as "
                '{"series": "Lactate", "unit": "mmol/L", "outcome": "Death"}'
            ) from error

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Description:
        """Check and convert the known keys of a description."""
        check_keys("", content, [*(f.name for f in fields(cls)), *ORIGIN])
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        ranges = _named("limits", known.pop("limits", {}))
        healthy = _named("references", known.pop("references", {}))
        reference = _reference("reference", known.pop("reference", None))
        labels = _object_of("labels", known.pop("labels", {}))
        flow = known.pop("flow", [])
        pair = known.pop("plausible", None)
        hours = _hours("time_scale", known.pop("time_scale")) if "time_scale" in known else None
        _check_texts("", known)
        if "series" in known and "unit" not in known:
            raise InputError("key series: give unit beside it, empty where there is none")
        for name, texts in labels.items():
            check_text("key labels", name, LONGEST_NAME)
            check_keys(f"labels.{name}.", _object_of(f"labels.{name}", texts), LABEL_KEYS)
            _check_texts(f"labels.{name}.", texts)
        if "series" in known or "plausible" in content:
            known["plausible"] = _rising("plausible", pair)
        limits = {comparable(name): _rising(f"limits.{name}", ranges[name]) for name in ranges}
        known["limits"] = {name: pair for name, pair in limits.items() if pair}
        bounds = {comparable(n): _reference(f"references.{n}", healthy[n]) for n in healthy}
        known["references"] = {name: pair for name, pair in bounds.items() if pair}
        known["flow"] = tuple(map(_read_rule, flow if isinstance(flow, list) else [None]))
        return cls(**known, labels=labels, time_scale=hours, reference=reference)

    def warnings(self, path: Path) -> list[str]:
        """Return the warning that the description of ``path`` was written with another table."""
        if self.csv_sha256 in ("", file_hash(path)):
            return []
        name = description_path(path).name
        return [f"{name} was made with another {path.name}: check that it describes this one"]


NAMES = ("series", "unit", "outcome")
"""Texts of a description that are no sentences."""

OPTIONAL_TEXTS = ("unit", "prediction_time", "horizon", "csv_sha256")
"""Texts of a description that may be empty; a pH has no unit."""

LABEL_KEYS = ("outcome", "question")
"""Keys of an entry of ``labels``."""

ORIGIN = (
    *("made_by", "rows", "values", "definitions", "arguments", "source", "tables_sha256"),
    *("versions", "licence", "license", "citation", "note"),
)
"""Keys that say where data come from, for people."""


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object.

    Raises:
        InputError: a key stands twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InputError(f"key {twice[:LONGEST_NAME]}: stands twice: remove one")
    return content


def _object_of(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"key {key[:LONGEST_NAME]}: give an object, as {{name: value}}")
    return value


def _named(key: str, value: Any) -> dict[str, Any]:
    """Return an object whose keys are names of series."""
    content = _object_of(key, value)
    for name in content:
        check_text(f"key {key}", name, LONGEST_NAME)
    return content


def _read_rule(rule: Any) -> dict[str, Any]:
    """Check a rule of ``flow``.

    Raises:
        InputError: another form, or as ``check_text``.
    """
    texts = isinstance(rule, dict) and isinstance(rule.get("rule"), str)
    if not texts or not all(_is_count(rule.get(key)) for key in ("removed", "left")):
        form = '[{"rule": "under 18", "removed": 3, "left": 97}]'
        raise InputError(f"key flow: give a list of rules with counts of rows, as {form}")
    check_text("key flow", rule["rule"], LONGEST_SENTENCE)
    return {key: rule[key] for key in FLOW_COLUMNS}


def check_keys(within: str, content: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that nothing reads: a misspelt one would leave a default in silence.

    Raises:
        InputError: names the key and the one that is meant.
    """
    for key in [key for key in content if key not in known]:
        near = difflib.get_close_matches(key[:LONGEST_NAME], known, 1)
        advice = f"did you mean {near[0]}?" if near else f"the keys are {join_names(known)}"
        raise InputError(f"key {within}{key[:LONGEST_NAME]}: no such key: {advice}")


def _check_texts(within: str, texts: dict[str, Any]) -> None:
    """Check names and sentences, each under its key.

    Raises:
        InputError: as ``check_text``, no text, or an outcome that a spreadsheet would take for a
            formula.
    """
    for key, text in texts.items():
        place = f"key {within}{key}"
        if not isinstance(text, str) or not (text or key in OPTIONAL_TEXTS):
            raise InputError(f"{place}: give a text")
        check_text(place, text, LONGEST_NAME if key in NAMES else LONGEST_SENTENCE)
        if key == "outcome":
            _check_outcome(place, text)


def _check_outcome(place: str, outcome: str) -> None:
    check_text(place, outcome, LONGEST_NAME)
    if outcome.startswith(FORMULA_STARTS):
        problem = "a spreadsheet would take it for a formula: begin it with a letter"
        raise InputError(f"{place}: {problem}")


def check_text(place: str, text: str, longest: int) -> None:
    """Refuse a text that is too long, or that could forge lines of a log or a terminal's title.

    Raises:
        InputError: names the place; shows the beginning of the text, escaped.
    """
    if len(text) > longest:
        raise InputError(f"{place}: longer than {longest:,} characters: shorten it")
    if not text.isprintable():
        problem = "holds a line break, a no-break space or another character that is not printable"
        raise InputError(f"{place}: {problem}: {text[:LONGEST_NAME]}")


def description_path(path: Path) -> Path:
    """Return the place of the description of a data file."""
    name = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    return path.with_name(name).with_suffix(".json")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MOST_ROWS


def _rising(key: str, pair: Any) -> tuple[float, float] | None:
    """Return two numbers, or None where they are unknown."""
    if pair is None:
        return None
    numbers = isinstance(pair, list) and all(type(number) in (int, float) for number in pair)
    if not numbers or len(pair) != 2 or not -LARGEST_VALUE <= pair[0] < pair[1] <= LARGEST_VALUE:
        raise InputError(f"key {key}: give two rising numbers, as [3, 60], or null")
    return float(pair[0]), float(pair[1])


def _reference(key: str, pair: Any) -> Reference | None:
    """Return the two ends of a reference range, or None where it is unknown.

    Raises:
        InputError: another form, or ends that do not rise.
    """
    if pair is None:
        return None
    known = [end for end in pair if end is not None] if isinstance(pair, list) else []
    numbers = all(type(end) in (int, float) and abs(end) <= LARGEST_VALUE for end in known)
    if not (numbers and known and len(pair) == 2 and known == sorted(set(known))):
        form = "two rising numbers, as [3.5, 5.1], one of which may be null, as [null, 2]"
        raise InputError(f"key {key}: give {form}; or null")
    low, high = (None if end is None else float(end) for end in pair)
    return low, high


def _hours(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= LARGEST_VALUE:
        raise InputError(f"key {key}: give hours, a number above 0")
    return float(value)


def comparable(name: str) -> str:
    """Return the name of a series for comparison: ``Urea_Nitrogen`` is ``urea nitrogen``."""
    return " ".join(name.replace("_", " ").lower().split())


@dataclass(frozen=True)
class Series:
    """One series of a file: its column, its name in texts, its unit, empty where it has none."""

    column: str
    name: str
    unit: str


def find_series(
    table: pd.DataFrame, description: Description, chosen: Sequence[str] | None, source: str
) -> list[Series]:
    """Find the series of a table: the main one first, then those of further columns.

    Args:
        table: as read.
        description: names the main series.
        chosen: names in the wanted order, the main one first; None takes all.
        source: named in errors.

    Raises:
        InputError: a column whose name cannot be read, two of one name, or an unknown choice.
    """
    main = Series(MAIN_COLUMN, description.series, description.unit)
    found = {comparable(main.name): main}
    for column in map(str, table.columns):
        if column.lower().startswith("trajectory"):
            series = _parse_column_name(column, source)
            if comparable(series.name) in found:
                where = f"{source}, row 1, column {' '.join(column.split())}"
                raise InputError(f"{where}: another column is a series of that name: rename one")
            found[comparable(series.name)] = series
    if chosen is None:
        return list(found.values())
    wanted = [comparable(name) for name in chosen]
    for name in chosen:
        if comparable(name) not in found:
            known = join_names([series.name for series in found.values()])
            raise InputError(f"{source}: --series {name}: no such series among: {known}")
    if len(set(wanted)) < len(wanted) or not wanted:
        raise InputError(f"{source}: --series: name each series once, and one at least")
    return [found[name] for name in wanted]


def describe_unused(table: pd.DataFrame, description: Description, source: str) -> list[str]:
    """Return a warning of each key that names no series, or no label column, of a table.

    Args:
        table: as read.
        description: of the table.
        source: named in errors.
    """
    further = [comparable(s.name) for s in find_series(table, description, None, source)[1:]]
    columns = list(map(str, table.columns))
    warnings = []
    for key, names, known, what in (
        ("limits", description.limits, further, "series beside the main one"),
        ("references", description.references, further, "series beside the main one"),
        ("labels", description.labels, columns, "column"),
    ):
        for name in [name for name in names if name not in known][:MOST_UNREAD]:
            shown = [each[:LONGEST_NAME] for each in known]
            near = difflib.get_close_matches(name, shown, 1, LEAST_LIKENESS)
            meant = f": did you mean {list_unread(near)}?" if near else ""
            warnings.append(f"key {key}.{name} of the JSON file: no such {what}{meant}")
    return warnings


def _parse_column_name(column: str, source: str) -> Series:
    """Read the name and the unit of a further series from the name of its column."""
    match = SERIES_COLUMN.fullmatch(column)
    name, unit = match.groups("") if match else ("", "")
    name, unit = " ".join(name.replace("_", " ").split()), unit.strip()
    if unit == "1":  # UCUM's way to write that there is none
        unit = ""
    place = f"{source}, row 1, column {' '.join(column[:LONGEST_NAME].split())}"
    for text in (name, unit):
        check_text(place, text, LONGEST_NAME)
    if not name or "," in name or re.fullmatch(NUMBER, name) or re.fullmatch(NUMBER, unit):
        raise InputError(
            f"{place}: write trajectory_NAME or trajectory_NAME [unit], in words without comma"
        )
    return Series(column, name, unit)


def list_columns(columns: Sequence[str]) -> str:
    """Return the columns of a table for an error, unless they seem to be a patient's cells."""
    if any(map(seems_cell, columns)):
        return "the first row seems to hold data: is the header missing?"
    return f"the columns are {join_names(columns)}"


def list_unread(columns: Sequence[str]) -> str:
    """Return columns that are not read for the log; those that seem to be cells are counted."""
    named = [one_line(name) for name in columns if not seems_cell(name)][:MOST_UNREAD]
    return join_names(named, others=len(columns) - len(named))


def join_names(names: Sequence[str], others: int = 0) -> str:
    """Return the first of some names, shortened, and the number of all others."""
    shown = [name[:LONGEST_NAME] for name in names[:MOST_NAMES]]
    others += len(names) - len(shown)
    return ", ".join(shown) + (f" and {others:,} more" if others else "")


def seems_cell(name: str) -> bool:
    """Return whether the name of a column looks like a patient's cell."""
    return "->" in name or re.match(rf"\s*{NUMBER}", name) is not None
