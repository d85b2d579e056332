"""A preview of from_long: the real run, with an answer in place of each open question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.dka import MAIN_COLUMN, join_names, parse_series
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.importers import cells, tables
from medgemma_clinical.data.importers.long_request import LongRequest
from medgemma_clinical.data.importers.long_table import make_long
from medgemma_clinical.data.importers.long_values import name_from
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.data.importers.sources import Seen, Source
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError, one_line

ROWS, WIDTH, MAX_LINES = 3, 28, 10  # finished rows, characters of a cell, lines of a part
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass
class Preview:
    """How far the run came, with which answers."""

    request: LongRequest  # what is given, and guessed
    assumed: LongRequest  # with an answer to each open question, too
    seen: Seen = field(default_factory=Seen)
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
    answer: Any = question.assumed or question.answers[0]
    if isinstance(current, bool):
        answer = True
    elif isinstance(current, tuple):
        answer = (*current, answer)
    return replace(request, **{question.flag: answer})


def run(request: LongRequest, begin: Callable[[], None]) -> Preview:
    """Run until no question is left, each time with the first answers to those that are."""
    shown = Preview(request, request)
    while True:
        begin()
        shown.seen = Seen(is_preview=True, cells=shown.seen.cells)
        try:
            shown.rows, shown.about = make_long(shown.assumed, shown.seen)
            return shown
        except OpenQuestions as error:
            fresh = [x for x in error.questions if x not in shown.questions]
            shown.questions += fresh
            if not fresh or not all(x.answers for x in fresh):
                shown.problem = str(error)
                return shown
            for question in fresh:
                shown.assumed = answered(shown.assumed, question)
                if question.guessed:
                    shown.request = answered(shown.request, question)
        except InputError as error:
            shown.problem = str(error)
            return shown


def settled(shown: Preview) -> LongRequest:
    """Return the flags that are given, guessed or recognised."""
    request, seen = shown.request, shown.seen
    changes: dict[str, Any] = {
        "columns": tuple({text.partition("=")[0]: text for text in request.columns}.values())
    }
    is_asked = any(x.flag == "series" for x in shown.questions)
    if not request.series and not request.earlier.series and not is_asked:
        pairs = [(x.title, key) for x in seen.series for key in x.keys]
        changes["series"] = tuple(f"{title}={key}" for title, key in pairs)
    if any(source.file.encoding == tables.WINDOWS for source in seen.sources):
        changes["encoding"] = request.encoding or tables.WINDOWS
    if len(seen.signs) == 1:
        changes["decimal"] = request.decimal or min(seen.signs)
    forms = tuple(dict.fromkeys(form for used in seen.formats.values() for form in used))
    orders = [{*order} for order in cells.ORDERS if {*order} & {*forms}]
    if len(orders) == 1 and {*forms} <= orders[0]:  # else one would read the times of the other
        changes["time_format"] = request.time_format or forms
    return replace(request, **changes)


def suggested(shown: Preview) -> dict[str, list[str]]:
    """Return elements of lists that the user may want: columns of labels that are not read."""
    unread = [name for source in shown.seen.sources[1:2] for name in source.unread]
    return {"static": [f"{name_from(name)}={name}" for name in unread], "keep": unread}


# ---------------------------------------------------------------------------- the screen


def describe(shown: Preview, notes: Sequence[str]) -> list[str]:
    """Return the lines of the screen; ``notes`` are what the run said."""
    lines = []
    for source in shown.seen.sources:
        lines += describe_source(shown, source)
    lines += describe_series(shown)
    lines += cut(notes)
    if len(shown.rows):
        counts = [f"{shown.about['rows'][name]:,}" for name in ("rows", "patients", "events")]
        lines.append(f"{counts[0]} rows of {counts[1]} patients, {counts[2]} events; the first:")
        lines += describe_rows(shown.rows)
    return lines + describe_questions(shown.open)


def cut(lines: Sequence[str]) -> list[str]:
    """Return the first lines of a part, and how many there are besides."""
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"  and {more:,} more"] if more > 1 else [*lines]


def describe_source(shown: Preview, source: Source) -> list[str]:
    """Return what a file is, and what its columns are taken for."""
    file, kept = source.file, {f"keep {name}": name for name in source.kept}
    kind = "Parquet" if file.is_parquet else f"Excel, sheet {file.sheets[0]}" if file.sheets else ""
    if len(file.sheets) > 1:
        kind += f" (others: {join_names(file.sheets[1:])})"
    kind = kind or f"{file.encoding}, separated by {SEPARATORS[file.separator]}"
    lines = []
    for role, name in {**source.names, **source.taken, **kept}.items():
        texts = [f"  {role:<18} {one_line(name)}"]
        if role == "prediction_time" and shown.assumed.prediction_time:
            texts[0] = f"  {role:<18} {one_line(shown.assumed.prediction_time)}"
        if used := shown.seen.formats.get(role):
            texts.append(f"as {' or '.join(used)}")
        if role == "value" and shown.seen.signs:
            texts.append(f"decimal {' and '.join(sorted(shown.seen.signs))}")
        taken = {f"{role}={name}"}
        taken |= {shown.assumed.prediction_time} if role == "prediction_time" else {*()}
        taken |= {name} if role in ("label", "end_time") else {*()}
        asked = [x for x in shown.questions if taken & {*x.answers[:1]}]
        texts += ["guessed" if x.guessed else "asked below" for x in asked[:1]]
        lines.append(", ".join(texts))
    hint = " (--static 'NAME [unit]=COLUMN' reads, --keep carries along)"
    hint = hint if source.unread and "prediction_time" in source.names else ""
    if source.names:  # else a problem names them, unless they are data
        lines.append(f"  {'not read':<18} {join_names(source.unread) or 'nothing'}{hint}")
    return [f"{file.path}: {kind}", *lines]


def describe_series(shown: Preview) -> list[str]:
    """Return name, unit, number and median of the values of each series, in the finished rows."""
    if not len(shown.rows):
        return []
    series = shown.seen.series
    titles = [MAIN_COLUMN, *(f"trajectory_{feature.title}" for feature in series[1:])]
    _, _, values = parse_series(shown.rows[titles].fillna(""), titles, Findings("rows"))
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
