"""What sources of events share: labels and events become windows, and windows become rows."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.database.connection import Database
from medgemma_clinical.data.database.flags import TableRequest, flag
from medgemma_clinical.data.database.output import Made, apply_rules
from medgemma_clinical.data.description import (
    LONGEST_NAME,
    LONGEST_SENTENCE,
    MAIN_COLUMN,
    check_text,
    comparable,
)
from medgemma_clinical.data.small_cells import FEWEST, count_text
from medgemma_clinical.data.texts import FORMULA_STARTS, NUMBER, plain
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

TITLE = re.compile(r"\s*([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]+)\]\s*)?")
LONGEST_WINDOW = 10**6
STEPS = Path(__file__).parent

MOST_AT_MIDNIGHT = 0.1
"""Share of events at midnight above which they seem to have dates in place of times."""


@dataclass(frozen=True, kw_only=True)
class EventRequest(TableRequest):
    """The flags of every command that makes rows of labels and events.

    Raises:
        InputError: an impossible value, named with its flag.
    """

    labels: Path = flag("who is asked about, when, and the answer")
    series: tuple[str, ...] = flag("'NAME [unit]=CODE', the main series first", (), repeated=True)
    window_hours: float = flag("hours up to the prediction time that are read", 24.0)
    hours_from: str = flag(
        "hours begin with it: window or first", "window", choices=("window", "first")
    )
    min_observations: int = flag("fewest values of the main series in the window", 1)
    outcome: str = flag("what label 1 means", "Event")
    question: str = flag("the question about a patient; by default made of --outcome", "")

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        in_range = 0 < self.window_hours <= LONGEST_WINDOW
        self._check(in_range, "window_hours", f"must be above 0 and at most {LONGEST_WINDOW:,}")
        self._check(self.min_observations >= 1, "min_observations", "must be at least 1")
        named = self.outcome != "" and not self.outcome.startswith(FORMULA_STARTS)
        self._check(named, "outcome", "must begin with a letter")
        check_text("--outcome", self.outcome, LONGEST_NAME)
        check_text("--question", self.question, LONGEST_SENTENCE)


# --------------------------------------------------------------------------- series and codes


@dataclass(frozen=True)
class CodedSeries:
    """A series, or a fact of the context: name, unit (or empty) and codes of its events.

    A trailing ``*`` of a code stands for any ending.
    """

    name: str
    unit: str
    codes: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name and unit, as a column has them."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


def is_match(code: str, wanted: str) -> bool:
    """Return whether a code is the wanted one, or begins like it up to its ``*``."""
    return code.startswith(wanted[:-1]) if wanted.endswith("*") else code == wanted


def match_sql(cell: str, codes: Iterable[str]) -> str:
    """Return SQL for whether a cell holds one of some codes."""
    tests = ["false"]
    for code in codes:
        text = "'" + code.removesuffix("*").replace("'", "''") + "'"
        tests.append(f"starts_with({cell}, {text})" if code.endswith("*") else f"{cell} = {text}")
    return f"({' OR '.join(tests)})"


def parse_series(name: str, texts: Iterable[str], *, code_needed: bool = True) -> list[CodedSeries]:
    """Read the values of a flag; a name that is given twice joins its codes.

    Args:
        name: of the flag.
        texts: ``NAME [unit]=CODE`` each.
        code_needed: whether NAME alone is refused; else it is the code as well.

    Raises:
        InputError: a value of another form, or two units of one series.
    """
    found: dict[str, CodedSeries] = {}
    for text in texts:
        title, _, code = map(str.strip, text.partition("="))
        match = TITLE.fullmatch(title)
        if not match or (code_needed and not code):
            raise InputError(f"--{name} {text}: write 'NAME [unit]=CODE'")
        series = CodedSeries(match[1], match[2] or "", (code or match[1],))
        check_title(f"--{name} {text}", series)
        earlier = found.get(comparable(series.name), CodedSeries(series.name, series.unit, ()))
        if earlier.unit != series.unit:
            problem = f"earlier {series.name} has {earlier.unit or 'no unit'}: give one unit"
            raise InputError(f"--{name} {text}: {problem}")
        joined = CodedSeries(earlier.name, earlier.unit, earlier.codes + series.codes)
        found[comparable(series.name)] = joined
    return list(found.values())


def check_title(place: str, series: CodedSeries) -> None:
    """Refuse a name or unit that a column of the DKA format cannot have.

    Raises:
        InputError: names the place.
    """
    for text in (series.name, series.unit):
        check_text(place, text, LONGEST_NAME)
        if re.search(r"[\[\],*]", text) or re.fullmatch(NUMBER, text):
            problem = "name and unit are words without comma, bracket and star"
            raise InputError(f"{place}: {problem}: give --series 'NAME [unit]=CODE'")


def name_codes(
    database: Database, wanted: Mapping[str, Sequence[CodedSeries]], known: Callable[[], list[str]]
) -> None:
    """Make the table ``named``: which code of ``record`` belongs to which series.

    Args:
        database: with the events of subjects with a label.
        wanted: series by the flag that names them.
        known: returns the codes of all events.

    Raises:
        InputError: a wanted code has no event of any subject.
    """
    codes = database.frame("SELECT DISTINCT code FROM record ORDER BY code")["code"].tolist()
    rows = []
    for name, group in wanted.items():
        for position, series in enumerate(group):
            for code in series.codes:
                matching = [each for each in codes if is_match(each, code)]
                rows += [(each, name, series.name, series.unit, position) for each in matching]
                if not matching:
                    _check_known(f"--{name} {series.title}={code}", code, known())
    columns = ["code", "kind", "name", "unit", "position"]
    named = pd.DataFrame(rows, columns=columns).drop_duplicates()
    database.add("named", named.astype(dict.fromkeys(columns[:-1], "string")))


def _check_known(place: str, code: str, known: list[str]) -> None:
    """Warn that a code has no event of a subject with a label.

    Raises:
        InputError: it has no event at all.
    """
    if not any(is_match(each, code) for each in known):
        near = " or ".join(difflib.get_close_matches(code, known, 3))
        raise InputError(f"{place}: no event has this code" + (near and f": did you mean {near}?"))
    logger.warning("%s: no subject with a label has an event of this code", place)


# --------------------------------------------------------------------------- rows


def cut_windows(database: Database, request: EventRequest, equal_times: str = "keep") -> None:
    """Make the tables of ``events.sql``; warn where events seem to have dates without a time.

    Raises:
        InputError: two labels of one subject at one time.
    """
    (twice,) = database.row(
        "SELECT count(*) - count(DISTINCT (subject, prediction_time)) FROM label"
    )
    if twice:
        problem = "a subject_id and prediction_time stand twice: keep one label of each"
        raise InputError(f"{request.labels}: {problem}")
    width = round(request.window_hours * 3_600_000_000)
    database.set(width=width, hours_from=request.hours_from, equal_times=equal_times)
    database.run_file(STEPS / "events.sql")
    midnight, events = database.row(
        "SELECT count(*) FILTER (time = date_trunc('day', time)), count(*) FROM event"
    )
    if midnight > MOST_AT_MIDNIGHT * events:
        logger.warning(
            "warning: %s of %s events are at midnight: a date without a time counts as known from "
            "the beginning of its day, hours before it was",
            *(count_text(number, FEWEST) for number in (midnight, events)),
        )


def make_rows(
    database: Database,
    request: EventRequest,
    series: Sequence[CodedSeries],
    known: str,
    about: pd.DataFrame | None = None,
    parts: pd.Series | None = None,
) -> Made:
    """Return the rows of the DKA format and their description, but for its origin.

    Args:
        database: in which windows were cut.
        request: of the command.
        series: the main one first.
        known: which events of a window are read, in words.
        about: context and static columns by the number of the question.
        parts: of the split by subject; a subject in none is left out.
    """
    main, fewest = series[0], request.min_observations
    asked = database.frame(
        "SELECT *, plain(round_even(hours_between(start, prediction_time), 2)) AS hours, "
        "subject IN (SELECT subject FROM event) AS measured "
        "FROM asked JOIN clock USING (number) ORDER BY number"
    ).set_index("number")
    found = database.frame("FROM trajectory").set_index("number")
    counts = found.loc[found["series"] == main.name, "observations"].reindex(asked.index)
    rules = {"label not known": asked["label"].isna()}
    if parts is not None:
        rules["subject in no part of the split"] = ~asked["subject"].isin(parts.index)
    rules["no value of any series at any time"] = ~asked["measured"]
    few = "no value" if fewest == 1 else f"fewer than {fewest} values"
    rules[f"{few} of {main.name} in the window"] = ~counts.ge(fewest)
    left, flow = apply_rules(pd.DataFrame(rules), f"--labels {request.labels}")
    asked = asked[left]
    texts = found.pivot(columns="series", values="text")
    texts = texts.reindex(index=asked.index, columns=[each.name for each in series])
    texts.columns = [MAIN_COLUMN, *(f"trajectory_{each.title}" for each in series[1:])]
    rows = pd.DataFrame(
        {
            "id": asked["subject"] + " " + asked["shown"],
            "subject_id": asked["subject"],
            "prediction_time": asked["shown"],
            **texts,
            "prediction_hours": asked["hours"],
            **({} if about is None else about),
            "label_escalation": asked["label"].astype("Int8"),
        },
        index=asked.index,
    )
    if parts is not None:
        rows["split"] = asked["subject"].map(parts)
    patients, events = rows["subject_id"].nunique(), rows["label_escalation"].sum()
    return rows.reset_index(drop=True), {
        **_describe(request, main, known),
        "flow": flow,
        "rows": {"rows": len(rows), "patients": int(patients), "events": int(events)},
    }


def _describe(request: EventRequest, main: CodedSeries, known: str) -> dict[str, Any]:
    asks = "the event" if request.outcome == "Event" else f"the outcome {request.outcome!r}"
    window = f"of the {plain(request.window_hours)} hours up to then, both ends included"
    return {
        "series": main.name,
        "unit": main.unit,
        "question": request.question or f"Will {asks} occur?",
        "outcome": request.outcome,
        "plausible": None,
        "prediction_time": f"given with each label; {window}, {known} are read",
        "horizon": "given by the labels",
    }
