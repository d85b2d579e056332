"""From labels and events to rows of the DKA format: what from_meds and from_long share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.dka import MAIN_COLUMN, comparable
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, output, tables
from medgemma_clinical.data.importers.questions import Question, unclear
from medgemma_clinical.data.texts import NUMBER, plain
from medgemma_clinical.files import InputError
from medgemma_clinical.flags import HOURS, POSITIVE, TAKEN, Texts, row, texts

logger = logging.getLogger(__name__)

SQL = Path(__file__).parent / "sql"
NAME = re.compile(r"[^\[\],*=\x00-\x1f]*[^\[\],*=\s]")
TITLE = re.compile(rf"({NAME.pattern})\s*(?:\[([^\[\],\x00-\x1f]+)\]\s*)?")
SUBJECT = cells.Id()
# Columns of the labels beside those of a file, of which no name begins with a space.
PATIENT = " patient"  # as it is written
RULE = " rule "  # begins the name of a column that tells which rows a rule leaves out
MICRO = re.compile("\N{MICRO SIGN}|\N{GREEK SMALL LETTER MU}|\\bmc(?=g)")  # written u, too
MAX_PAIRS = 200_000  # of a prediction and an event of its subject, joined at a time
MAX_AT_MIDNIGHT = 0.1  # share of events above which they seem to have dates in place of times


@dataclass(frozen=True, kw_only=True)
class EventRequest(output.TableRequest):
    """What every command needs that makes rows of labels and events."""

    labels: Path = row(Path, None, "labels as ACES writes them: Parquet", required=True)
    series: Texts = texts("'NAME [unit]=CODE'; the first is the main series")
    window_hours: float = row(HOURS, 24.0, "hours before the prediction time that are read", TAKEN)
    hours_from: str = row(("window", "first"), "window", "hour 0: window or first value", TAKEN)
    min_observations: int = row(POSITIVE, 1, "fewest values of the main series", TAKEN)
    outcome: str = row(str, "Event", "meaning of label 1", TAKEN)
    question: str = row(str, "", "question about a patient; by default from --outcome", TAKEN)
    prediction_time: str = ""  # a column and hours to add to it; by default a column of its own


def is_name(name: str) -> bool:
    """Return whether a column of a series can have a name."""
    return NAME.fullmatch(name) is not None and re.fullmatch(NUMBER, name) is None


def parse_features(flag: str, texts: Iterable[str], *, code_needed: bool = True) -> list[Feature]:
    """Read ``NAME [unit]=CODE`` of a flag; a repeated name joins its codes.

    ``NAME`` alone is its own code, ``NAME=`` has none: it is not measured.
    """
    features: dict[str, Feature] = {}
    for text in texts:
        title, sign, code = map(str.strip, text.partition("="))
        match = TITLE.fullmatch(title)
        name, unit = match.groups("") if match else ("", "")
        advice = f"--{flag} {text}: write 'NAME [unit]=CODE'"
        if code_needed and not code:
            raise InputError(advice)
        if not is_name(name):
            words = "name and unit without comma and bracket, the name without star and ="
            raise InputError(f"{advice}, {words}")
        no_code = () if sign else (name,)
        feature = Feature(name, unit, (code,) if code else no_code)
        key = comparable(feature.name)
        earlier = features.setdefault(key, replace(feature, keys=()))
        if earlier.unit != feature.unit:
            raise InputError(f"--{flag} {text}: {feature.name} has two units: give one")
        features[key] = replace(earlier, keys=earlier.keys + feature.keys)
    return list(features.values())


# ---------------------------------------------------------------------------- tables


def add_windows(database: duck.Database, request: EventRequest, time_unit: int = 0) -> None:
    """Make the tables of ``windows.sql`` from ``label``; ``time_unit`` is in microseconds."""
    labels, predictions = database.row(
        "SELECT count(*), count(DISTINCT (subject, prediction_time)) FROM label"
    )
    if predictions < labels:
        problem = "subject_id and prediction_time appear twice: keep one label of each"
        raise InputError(f"{request.labels}: {problem}")
    database.set(width=round(request.window_hours * 3_600_000_000), time_unit=time_unit)
    database.run_file(SQL / "windows.sql")


def any_code(code: str, codes: Iterable[Any], default: str) -> str:
    """Return SQL for whether a code is one of some codes, ``default`` where there are none."""
    texts = [duck.literal(str(text)) for text in dict.fromkeys(codes)]
    return " OR ".join(f"is_code({code}, {text})" for text in texts) or default


def load_events(
    database: duck.Database,
    request: EventRequest,
    files: Iterable[tables.TableFile],
    names: Mapping[str, str],  # columns of subject_id, item, time, value; perhaps unit, storetime
    columns: Mapping[str, cells.Column],
    codes: Sequence[Any],  # read within the ``span`` of their subject; empty: all
    always: Sequence[str] = (),  # codes that are read at any time
    factors: Mapping[tuple[str, str], float] | None = None,  # of values, by item and unit
) -> None:
    """Make the view ``record`` of the events of the subjects of --labels; refuse to find none."""
    keys = [names[role] for role in ("subject_id", "item", "time")]
    counts = []
    for number, file in enumerate(files):
        subject, code, time = (columns[name].typed(file.raw(name)) for name in keys)
        has_code = any_code(code, codes, "true")
        keep = (
            f"closes IS NOT NULL AND (coalesce({time} BETWEEN opens AND closes, true) "
            f"AND ({has_code}) OR {any_code(code, always, 'false')})"
        )
        join = f"LEFT JOIN span ON subject = {subject}"
        tables.load_table(database, "loaded", file, columns, [keep], join, keys[:2])
        select = (
            f"SELECT count(DISTINCT subject), count(*), count(*) FILTER ({time} < opens), "
            f"count(*) FILTER ({time} > closes), count(*) FILTER (closes IS NULL)"
        )
        counts.append(database.row(f"{select} FROM {file.rows()} {join} WHERE {has_code}"))
        append = "INSERT INTO read FROM loaded; DROP TABLE loaded"
        database.run(append if number else "ALTER TABLE loaded RENAME TO read")
    make_record(database, names, columns, factors or {})
    check_windows(database, request, [sum(column) for column in zip(*counts, strict=True)])


def make_record(
    database: duck.Database,
    names: Mapping[str, str],
    columns: Mapping[str, cells.Column],
    factors: Mapping[tuple[str, str], float],  # infinite of what is left out
) -> None:
    """Make the view ``record`` of ``read``: subject, code, time, known, value, unit, converted.

    ``text`` is what stands in place of a value, ``scale`` what a value is multiplied by.
    """
    rows = [(code, unit, factor) for (code, unit), factor in factors.items()]
    database.add("factors", pd.DataFrame(rows, columns=["code", "unit", "factor"]))
    sql = {role: f"read.{duck.quoted(name)}" for role, name in names.items()}
    value, text = sql["value"], "NULL::VARCHAR"
    empty = "''" if "unit" in sql else "NULL"
    units = f"nullif({sql.get('unit', empty)}, ''), nullif(unit_within({sql['item']}), '')"
    unit = f"coalesce({units}, {empty})::VARCHAR"
    if isinstance(columns[names["value"]], cells.Value):
        value, text = f"coalesce({value}.number, at_limit({value}.text))", f"{value}.text"
    database.run(
        f"CREATE VIEW record AS SELECT {sql['subject_id']} AS subject, {sql['item']} AS code, "
        f"{sql['time']} AS time, {sql.get('storetime', sql['time'])} AS known, "
        f"CASE WHEN isfinite({value}) AND isfinite(coalesce(factor, 1)) "
        f"THEN coalesce(tidy({value} * factor), {value}) END AS value, "
        f"{unit} AS unit, factor IS NOT NULL AS converted, {text} AS text, "
        "coalesce(factor, 1) AS scale FROM read LEFT JOIN factors "
        f"ON comparable_unit(factors.code::VARCHAR) = comparable_unit({sql['item']}) "
        f"AND comparable_unit(factors.unit::VARCHAR) = comparable_unit({unit})"
    )


def check_windows(database: duck.Database, request: EventRequest, counts: Sequence[int]) -> None:
    """Log the events outside the windows; refuse labels without any event in their windows."""
    subjects, events, early, late, unlabelled = counts
    measured, labelled = database.row(
        "SELECT (SELECT count(DISTINCT subject) FROM record), (SELECT count(*) FROM span)"
    )
    window = f"the windows ({plain(request.window_hours)} hours up to a prediction time)"
    outside = f"{early:,} lie before {window}, {late:,} after them"
    if early + late + unlabelled:
        foreign = f"{unlabelled:,} are of subjects that --labels lacks"
        logger.info("of %s values %s, %s", f"{events:,}", outside, foreign)
    cause = f"of their values {outside}"
    if 2 * subjects < labelled:
        cause = "are subjects named alike in both tables?"
    if not events:
        cause = "no event has a code of --series"
    missing = f"{labelled - measured:,} of the {labelled:,} subjects of --labels have no value in"
    problem = f"{missing} their windows: {cause}"
    if not measured:
        raise InputError(problem)
    if 2 * measured < labelled:
        logger.warning("warning: %s", problem)


def name_codes(database: duck.Database, features_of: Mapping[str, Sequence[Feature]]) -> None:
    """Make the table ``named``: which code of ``record`` belongs to which feature of which flag."""
    rows = [
        (flag, feature.name, feature.unit, position, feature.title, code)
        for flag, features in features_of.items()
        for position, feature in enumerate(features)
        for code in feature.keys
    ]
    columns = ["kind", "name", "unit", "position", "title", "code"]
    table = pd.DataFrame(rows, columns=columns, dtype="string").astype({"position": "int32"})
    database.add("wanted", table)
    database.run(
        "CREATE TABLE named AS SELECT DISTINCT present.code, kind, name, unit, position FROM "
        "wanted JOIN (SELECT DISTINCT code FROM record) AS present "
        "ON is_code(present.code, wanted.code)"
    )
    unseen = "FROM wanted WHERE NOT EXISTS (FROM named WHERE is_code(named.code, wanted.code))"
    for code in database.rows(f"SELECT kind, title, code {unseen} ORDER BY ALL"):
        problem = "no subject of --labels has an event of this code in a window"
        logger.warning("warning: --%s %s=%s: %s", *code, problem)


# ---------------------------------------------------------------------------- rows


def make_trajectories(
    database: duck.Database,
    request: EventRequest,
    equal_times: str = "keep",  # empty: asked where there are any
    *,
    is_stored: bool = False,  # whether a storetime is known
) -> pd.DataFrame:
    """Return each trajectory: number (of its prediction), series, observations, hours, text."""
    rule = equal_times or "keep"
    database.set(max_pairs=MAX_PAIRS, hours_from=request.hours_from, equal_times=rule)
    database.run_file(SQL / "events.sql")
    midnight, events = database.row(
        "SELECT count(*) FILTER (date_trunc('day', time) = time OR date_trunc('day', known) = "
        "known), count(*) FROM event"
    )
    if midnight > MAX_AT_MIDNIGHT * events:
        problem = "a date without a time counts as known from the beginning of its day"
        logger.warning("warning: %d of %d events are at midnight: %s", midnight, events, problem)
    batches, several = [], 0
    for first, last in database.rows("FROM batch ORDER BY first") or [(0, 0)]:
        database.set(first=first, last=last)
        database.run_file(SQL / "trajectories.sql")
        trajectories = database.frame("FROM trajectory")
        batches.append(trajectories.astype({"text": object}))  # a copy shares the texts
        (count,) = database.row(
            "SELECT count(*) FROM (SELECT number FROM usable GROUP BY number, position, time "
            "HAVING count(DISTINCT value) > 1)"
        )
        several += count
    if several and not equal_times:
        choices = ("last", "mean", "keep") if is_stored else ("mean", "keep")
        problem = f"{several:,} times have several different values of a series"
        advice = f"--equal_times {', '.join(choices)}"
        raise unclear([Question(problem, "equal_times", choices, advice=advice)])
    if several:
        logger.info("%s times with several values of a series: %s", f"{several:,}", rule)
    return pd.concat(batches, ignore_index=True)


def first_event(
    hours: NDArray[np.float64],  # (N, K) of each event, NaN where it did not come
    are_dates: NDArray[np.bool_],  # (K,) whether an event has dates, of which ``hours`` is the end
    end: NDArray[np.float64],  # (N,) of the record, NaN where it is not known
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (N,) hours and number of what comes first, 0 at the end, NaN where nothing is known.

    Of two at one time the one that is named first counts; a date may be any moment of its day.
    """
    moments = hours.copy()
    for k in np.flatnonzero(are_dates):
        others = np.delete(hours, k, axis=1)[:, ~np.delete(are_dates, k)]
        day = hours[:, [k]]
        within = np.where((others >= day - 24) & (others < day), others, np.inf)
        moments[:, k] = np.fmin(hours[:, k], within.min(axis=1, initial=np.inf))
    moments[np.isnan(hours)] = np.inf
    first = moments.argmin(axis=1)
    at = moments.min(axis=1)
    has_event = np.isfinite(at)
    event = np.where(has_event, first + 1.0, np.where(np.isnan(end), np.nan, 0.0))
    return np.where(has_event, at, end), event


def make_rows(
    database: duck.Database,
    request: EventRequest,
    series: Sequence[Feature],
    trajectories: pd.DataFrame,
    static: pd.DataFrame,  # context and static columns by number of the prediction
    parts: pd.Series | None = None,  # of the split, by subject
    *,
    keep_all: bool = False,  # removed rows stay without values, so that no new patient is lost
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return the rows of the DKA format, and how the labels became rows."""
    labels = database.frame(
        "SELECT *, person IN (SELECT person FROM event) AS measured FROM prediction ORDER BY number"
    ).set_index("number")
    columns = columns_of_series(series, trajectories)
    fewest, main = request.min_observations, series[0].name
    too_few = f"no value of {main}" if fewest == 1 else f"fewer than {fewest} values of {main}"

    rules = rules_of_labels(labels, parts)
    is_candidate = ~rules.any(axis=1)
    rules["no value of any series from the first window to the last"] = ~labels["measured"]
    counts = columns[MAIN_COLUMN]["observations"].reindex(labels.index)
    rules[f"{too_few} in the window"] = ~counts.ge(fewest)
    left, flow = output.apply_rules(rules, f"--labels {request.labels}", labels["subject"])
    if not keep_all:
        lost = ~left[is_candidate]
        log_lost(labels[is_candidate], lost, f"{too_few} in the window", request)

    kept = is_candidate if keep_all else left
    labels, left = labels[kept], left[kept]
    rows = join_columns(labels, columns, static)
    if not left.all():
        rows.loc[~left, [*columns, "prediction_hours"]] = None
        problem = f"{too_few}, as no row of a training has: kept without values"
        logger.warning("warning: %d rows have %s and risk", int((~left).sum()), problem)
    if parts is not None:
        rows["split"] = labels["subject"].map(parts)
    if unlabelled := int(rows["label_escalation"].isna().sum()):
        logger.info("%s of %s rows have no label", f"{unlabelled:,}", f"{len(rows):,}")
    return rows.reset_index(drop=True), flow


def columns_of_series(
    series: Sequence[Feature], trajectories: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Return the trajectories of each series, by number of the prediction, by their column."""
    titles = [MAIN_COLUMN, *(f"trajectory_{feature.title}" for feature in series[1:])]
    return {
        title: trajectories[trajectories["series"] == feature.name].set_index("number")
        for title, feature in zip(titles, series, strict=True)
    }


def rules_of_labels(labels: pd.DataFrame, parts: pd.Series | None) -> pd.DataFrame:
    """Return which labels each rule leaves out that asks for no value."""
    rules = labels.filter(regex=f"^{RULE}").fillna(value=False).astype(bool)
    rules.columns = rules.columns.str.removeprefix(RULE)
    if parts is not None:
        rules["subject in no part of the split"] = ~labels["subject"].isin(parts.index)
    return rules


def log_lost(labels: pd.DataFrame, is_lost: pd.Series, problem: str, request: EventRequest) -> None:
    """Log how many rows, patients and events have too few values."""
    if not is_lost.any():
        return
    is_event = labels["label"].eq(1)
    patients = labels["subject"].nunique()
    gone = patients - labels["subject"][~is_lost].nunique()
    shares = f"{is_lost.sum():,} of {len(labels):,} rows ({is_lost.mean():.1%})"
    shares += f", {gone:,} of {patients:,} patients"
    shares += f" and {(is_lost & is_event).sum():,} of {is_event.sum():,} events"
    hours = plain(request.window_hours)
    logger.info("%s are lost, with %s: --window_hours %s sets its length", shares, problem, hours)


def join_columns(
    labels: pd.DataFrame, columns: Mapping[str, pd.DataFrame], static: pd.DataFrame
) -> pd.DataFrame:
    """Return the rows of the DKA format, by number of the prediction."""
    patient = labels[PATIENT] if PATIENT in labels else labels["subject"]
    cells_of_rows = {
        "id": labels.get("id", patient + " " + labels["shown"]),
        "subject_id": patient,
        "prediction_time": labels["shown"],
        **{title: table["text"] for title, table in columns.items()},
        "prediction_hours": columns[MAIN_COLUMN]["hours"],
        **static,
        "label_escalation": labels["label"].astype("Int8"),
    }
    return pd.DataFrame(cells_of_rows, index=labels.index)


def describe_rows(
    request: EventRequest,
    main: Feature,
    usable: str,  # events of a window that are read, in words
    rows: pd.DataFrame,
    flow: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the description of rows, but for its origin."""
    event = "the event" if request.outcome == "Event" else f"the outcome {request.outcome!r}"
    time = request.prediction_time or "given with each label"
    window = f"of the {plain(request.window_hours)} hours up to then, both ends included"
    patients, events = rows["subject_id"].nunique(), rows["label_escalation"].sum()
    return {
        "series": main.name,
        "unit": main.unit,
        "question": request.question or f"Will {event} occur?",
        "outcome": request.outcome,
        "plausible": None,
        "prediction_time": f"{time}; {window}, {usable} are read",
        "flow": flow,
        "rows": {"rows": len(rows), "patients": int(patients), "events": int(events)},
    }
