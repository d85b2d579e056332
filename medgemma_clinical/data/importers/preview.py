"""A preview of from_long: the real run, with an answer in place of each open question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.dka import MAIN_COLUMN, join_names, parse_series
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.importers import duck
from medgemma_clinical.data.importers.long_table import LongRequest, Reading, make_long, name_from
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError, one_line

ROWS, WIDTH, MAX_LINES = 3, 28, 10  # finished rows, characters of a cell, lines of a part
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass
class Preview:
    """How far the run came, with which answers."""

    request: LongRequest  # what is given, and guessed
    assumed: LongRequest  # with an answer to each open question, too
    reading: Reading = field(default_factory=lambda: Reading(guesses=True))
    questions: list[Question] = field(default_factory=list)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)
    about: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""  # what no answer gets past

    @property
    def open(self) -> list[Question]:
        """The questions that the user answers."""
        return [question for question in self.questions if not question.guessed]


def answered(request: LongRequest, question: Question) -> LongRequest:
    """Return the flags with the first answer to a question."""
    current = getattr(request, question.flag)
    answer = question.assumed or question.answers[0]
    value: Any = (*current, answer) if isinstance(current, tuple) else answer
    changed: dict[str, Any] = {question.flag: True if isinstance(current, bool) else value}
    return replace(request, **changed)


def run(request: LongRequest, begin: Callable[[], None]) -> Preview:
    """Run until no question is left, each time with the first answers to those that are."""
    seen = Preview(request, request)
    while True:
        begin()
        seen.reading = Reading(guesses=True)
        try:
            seen.rows, seen.about = make_long(seen.assumed, seen.reading)
            return seen
        except OpenQuestions as error:
            fresh = [x for x in error.questions if x not in seen.questions]
            seen.questions += fresh
            if not fresh or not all(x.answers for x in fresh):
                seen.problem = str(error)
                return seen
            for question in fresh:
                seen.assumed = answered(seen.assumed, question)
                if question.guessed:
                    seen.request = answered(seen.request, question)
        except InputError as error:
            seen.problem = str(error)
            return seen


def settled_flags(seen: Preview) -> dict[str, Any]:
    """Return the flags that are given, guessed or recognised."""
    flags = {name: value for name, value in vars(seen.request).items() if name != "read_as"}
    reading = seen.reading
    flags["columns"] = tuple({text.partition("=")[0]: text for text in flags["columns"]}.values())
    if not flags["series"] and not any(x.flag == "series" for x in seen.questions):
        flags["series"] = tuple(f"{x.title}={key}" for x in reading.series for key in x.keys)
    if any(file.encoding == duck.WINDOWS for file in reading.files):
        flags["encoding"] = flags["encoding"] or duck.WINDOWS
    if len(reading.signs) == 1:
        flags["decimal"] = flags["decimal"] or min(reading.signs)
    forms = list(dict.fromkeys(form for used in reading.formats.values() for form in used))
    orders = [{*order} for order in duck.ORDERS if {*order} & {*forms}]
    if len(orders) == 1 and {*forms} <= orders[0]:  # else one would read the times of the other
        flags["time_format"] = flags["time_format"] or tuple(forms)
    return flags


def suggested_flags(seen: Preview) -> dict[str, list[str]]:
    """Return elements of lists that the user may want: columns that are not read."""
    unread = list[str]()
    for file, columns in zip(seen.reading.files[1:2], seen.reading.columns[1:2], strict=False):
        unread = [name for name in file.header if name not in columns.values()]
    return {
        "static": [f"{name_from(name)}={name}" for name in unread],
        "keep": unread,
    }


# ---------------------------------------------------------------------------- the screen


def describe(seen: Preview, notes: Sequence[str]) -> list[str]:
    """Return the lines of the screen; ``notes`` are what the run said."""
    lines = []
    found = seen.reading.columns or [{} for _ in seen.reading.files]  # the run ended before
    for file, columns in zip(seen.reading.files, found, strict=True):
        lines += describe_file(seen, file, columns)
    lines += describe_series(seen)
    lines += cut(notes)
    if len(seen.rows):
        counts = [f"{seen.about['rows'][name]:,}" for name in ("rows", "patients", "events")]
        lines.append(f"{counts[0]} rows of {counts[1]} patients, {counts[2]} events; the first:")
        lines += describe_rows(seen.rows)
    return lines + describe_questions(seen.open)


def cut(lines: Sequence[str]) -> list[str]:
    """Return the first lines of a part, and how many there are besides."""
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"  and {more:,} more"] if more > 1 else [*lines]


def describe_file(seen: Preview, file: duck.TableFile, columns: Mapping[str, str]) -> list[str]:
    """Return what a file is, and what its columns are taken for."""
    kind = "Parquet" if file.is_parquet else f"Excel, sheet {file.sheets[0]}" if file.sheets else ""
    if len(file.sheets) > 1:
        kind += f" (others: {join_names(file.sheets[1:])})"
    kind = kind or f"{file.encoding}, separated by {SEPARATORS[file.separator]}"
    lines = []
    for role, name in columns.items():
        texts = [f"  {role:<18} {one_line(name)}"]
        if used := seen.reading.formats.get(role):
            texts.append(f"as {' or '.join(used)}")
        if role == "value" and seen.reading.signs:
            texts.append(f"decimal {' and '.join(sorted(seen.reading.signs))}")
        if role == "prediction_time" and seen.assumed.prediction_time:
            texts[0] = f"  {role:<18} {one_line(seen.assumed.prediction_time)}"
        taken = {f"{role}={name}"}
        taken |= {seen.assumed.prediction_time} if role == "prediction_time" else {*()}
        taken |= {name} if role in ("label", "end_time") else {*()}
        asked = [x for x in seen.questions if taken & {*x.answers[:1]}]
        texts += ["guessed" if x.guessed else "asked below" for x in asked[:1]]
        lines.append(", ".join(texts))
    unread = [name for name in file.header if name not in columns.values()]
    hint = " (--static 'NAME [unit]=COLUMN' reads, --keep carries along)"
    hint = hint if unread and "prediction_time" in columns else ""
    if columns:  # else a problem names them, unless they are data
        lines.append(f"  {'not read':<18} {join_names(unread) or 'nothing'}{hint}")
    return [f"{file.path}: {kind}", *lines]


def describe_series(seen: Preview) -> list[str]:
    """Return name, unit, number and median of the values of each series, in the finished rows."""
    if not len(seen.rows):
        return []
    series = seen.reading.series
    titles = [MAIN_COLUMN, *(f"trajectory_{feature.title}" for feature in series[1:])]
    _, _, values = parse_series(seen.rows[titles].fillna(""), titles, Findings("rows"))
    lines = []
    for feature, column in zip(series, values.T, strict=True):
        known = column[~np.isnan(column)]
        median = f", median {plain(float(f'{np.median(known):.4g}'))}" if len(known) else ""
        unit = feature.unit or "no unit"
        lines.append(f"  {one_line(feature.name):<18} {unit}, {len(known):,} values{median}")
    return ["series, the first is the main one:", *cut(lines)]


def describe_rows(rows: pd.DataFrame) -> list[str]:
    """Return the first rows, a column of the file a line."""
    lines = []
    for name in map(str, rows):
        texts = ["" if pd.isna(cell) else one_line(str(cell)) for cell in rows[name].head(ROWS)]
        short = [text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..." for text in texts]
        lines.append(
            f"  {name[:28]:<28} " + " ".join(f"{text:<{WIDTH}}" for text in short).rstrip()
        )
    return cut(lines)


def describe_questions(questions: Sequence[Question]) -> list[str]:
    """Return the open questions, each with its flag, one line for those of one text."""
    by_text: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        by_text.setdefault((question.flag, question.text), []).append(question)
    lines = []
    for (flag, text), asked in by_text.items():
        first = [f"'{x.answers[0]}'" for x in asked if x.answers]
        others = [x for question in asked for x in question.answers[1:]]
        shown = join_names(first, 3) or "VALUE"
        shown += f" (or {join_names(others, 6)})" if others else ""
        shown = "" if first == ["'true'"] else f" {shown}"  # a switch
        lines.append(f"  --{flag}{shown}: {text}" if flag else f"  no flag: {text}")
    head = "open questions, with the answers that this preview took:"
    return [head, *lines] if lines else []
