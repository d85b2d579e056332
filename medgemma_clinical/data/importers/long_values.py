"""from_long's table of values: from its cells to the series of the patients, in one unit each."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from medgemma_clinical.data import analytes
from medgemma_clinical.data.dka import comparable, join_names
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, events, tables
from medgemma_clinical.data.importers.events import MICRO
from medgemma_clinical.data.importers.long_request import LongRequest, alike
from medgemma_clinical.data.importers.questions import OpenQuestions, Question, unclear
from medgemma_clinical.data.importers.sources import Seen, Source
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError, did_you_mean, one_line

logger = logging.getLogger(__name__)

MAX_SERIES, MAX_WORDS, MAX_LETTERS, MAX_ITEMS = 100, 10, 30, 500
SAME, MISSING = (0.8, 1.25), (0.6, 1.67)
"""Ratios of medians within which 1 is proposed for another unit, and for values without one."""
SYNONYMS, KNOWN_SYNONYMS = 1.5, 3.0
"""Ratios of medians below which items named alike, or known as one quantity, may be one series."""
SPECIAL = re.compile(
    r"\b(urin\w*|csf|liquor|lcr|ioni\w+|free|frei\w*|libre|direct\w*|direkt\w*|dir)\b"
)
"""Words of items that are another quantity than that of the same name without."""
MAX_RATIO, MIN_OF_UNIT, SURE = 5.0, 5, 4.0
"""Medians of a series by unit that differ so many times are refused, each of so many values, where
the difference is so many times what chance makes."""


def load_series(database: duck.Database, request: LongRequest, seen: Seen) -> int:
    """Make the view ``record`` and the table ``named`` of the series; return how many lines repeat.

    ``seen`` keeps the series in their units.
    """
    source = seen.sources[0]
    repeated = load_values(database, source, request, seen)
    series = wanted_series(request) or find_series(database, source.file.path)
    events.name_codes(database, {"series": series})
    seen.series = convert_units(database, series, request)
    check_medians(database, request.table)
    return repeated


def load_values(database: duck.Database, source: Source, request: LongRequest, seen: Seen) -> int:
    """Make the view ``record`` of the values in the windows; return how many were repeated."""
    file, names = source.file, source.names
    roles = {
        "subject_id": events.SUBJECT,
        "item": cells.Word(),
        "value": file.value(names["value"], request.decimal),
        "unit": cells.Word(may_be_empty=True),
        **{r: replace(t, may_be_empty=r == "storetime") for r, t in source.times.items()},
    }
    columns = {name: roles[role] for role, name in names.items()}
    columns[tables.LINE] = cells.Line(optional=True)
    source.log()
    factors, series = request.factors(), wanted_series(request)
    if request.earlier.series and not request.no_labels:
        ask_absent(database, source, series)
    codes = [code for feature in series for code in feature.keys]
    events.load_events(database, request, [file], names, columns, codes, factors=factors)
    if series:
        log_unread(database, source)
    warn_of_zeros(database, file, names["subject_id"])
    repeated = drop_repeated(database, file.path)
    seen.signs |= check_texts(
        database,
        "read",
        names["value"],
        file,
        request,
        patient=duck.quoted(names["subject_id"]),
        item=duck.quoted(names["item"]),
    )
    return repeated


def log_unread(database: duck.Database, source: Source) -> None:
    """Log the items that are of no series, those of most values first."""
    rows = database.rows(
        f"SELECT code, n FROM ({count_items(source)}) WHERE NOT EXISTS "
        f"(SELECT 1 FROM read WHERE {duck.quoted(source.names['item'])} = code) "
        "ORDER BY n DESC, code"
    )
    texts = [f"{one_line(code)} ({n:,} values)" for code, n in rows]
    if texts:
        logger.info("%s: items not read: %s", source.file.path, join_names(texts, MAX_WORDS))


def count_items(source: Source) -> str:
    """Return SQL for the items of a table with the numbers of their lines."""
    code = cells.Word().typed(source.file.raw(source.names["item"]))
    return f"SELECT {code} AS code, count(*) AS n FROM {source.file.rows()} GROUP BY 1"


def warn_of_zeros(database: duck.Database, file: tables.TableFile, column: str) -> None:
    """Warn of patients whose ids differ in leading zeros alone, and who are taken as one."""
    raw = file.raw(column)
    key, written = (form.typed(raw) for form in (cells.Id(), cells.WrittenId()))
    (count,) = database.row(
        f"SELECT count(*) FROM (SELECT {key} AS key FROM {file.rows()} GROUP BY key "
        f"HAVING min({written}) != max({written}))"
    )
    if count:
        text = "warning: %s, column %s: ids that differ in leading zeros alone, taken as one: %s"
        logger.warning(text, file.path, column, f"{count:,}")


def drop_repeated(database: duck.Database, path: Path) -> int:
    """Keep one of equal lines; return how many others there were."""
    lines, different = database.row(
        f"SELECT count(*), count(DISTINCT {duck.quoted(tables.LINE)}) FROM read"
    )
    if different < lines:
        database.run("CREATE OR REPLACE TABLE read AS SELECT DISTINCT * FROM read")
        logger.info("%s: %s lines are repeated: dropped", path, f"{lines - different:,}")
    return int(lines - different)


# ---------------------------------------------------------------------------- cells


class TextCounts(NamedTuple):
    """Counts of the cells of a column of values, and the letters behind numbers."""

    total: int  # numbers and texts
    flagged: int
    below: int
    above: int
    numeric: int  # look like numbers of another form
    other: int
    with_unit: int
    letters: Sequence[str]
    commas: int
    points: int


def check_texts(
    database: duck.Database,
    loaded: str,
    column: str,
    file: tables.TableFile,
    request: LongRequest,
    *,
    patient: str,
    item: str = "NULL",
) -> set[str]:
    """Refuse what only a flag says how to read, log what is left out; return signs of decimals."""
    where = f"{file.path}, column {column}"
    cell = f"unnest({duck.quoted(column)})"
    texts = f"SELECT {patient} AS patient, {item} AS item, {cell} FROM {loaded}"
    counts = count_texts(database, texts)
    asked = ask_decimal(database, texts, counts, file.separator, request)
    asked += ask_texts(counts, request)
    if asked:
        raise unclear(asked, where)
    if counts.flagged:
        logger.info(
            "%s: %s numbers with a laboratory's flag are read", where, f"{counts.flagged:,}"
        )
    if counts.below + counts.above:
        at_limits = f"{counts.below:,} values below a limit, {counts.above:,} above one"
        logger.info("%s: %s: --below_limit %s", where, at_limits, request.below_limit)
    if counts.numeric + counts.other:
        log_dropped(database, texts, where, counts.total)
    signs = {"comma": counts.commas, "point": counts.points}
    return {name for name, count in signs.items() if count}


def count_texts(database: duck.Database, texts: str) -> TextCounts:
    """Count the cells of each form."""
    row = database.row(
        "SELECT count(number) + count(text), count(*) FILTER (flagged), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('<', '≤')), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('>', '≥')), "
        "count(*) FILTER (NOT is_limit(text) AND looks_numeric(text)), "
        "count(*) FILTER (NOT looks_numeric(text)), count(*) FILTER (holds_unit(text)), "
        "coalesce(list_distinct(list(letters_behind(text)) "
        "FILTER (letters_behind(text) != '')), []), "
        f"count(*) FILTER (sign = ','), count(*) FILTER (sign = '.') FROM ({texts})"
    )
    return TextCounts(*row)


def ask_decimal(
    database: duck.Database, texts: str, counts: TextCounts, separator: str, request: LongRequest
) -> list[Question]:
    """Ask for the sign of decimals where the numbers do not tell, and what other ones are."""
    signs = ("comma", "point") if counts.commas > counts.points else ("point", "comma")
    unclear_texts = [] if request.decimal else unclear_signs(database, texts, separator)
    asked = [Question(text, "decimal", signs) for text in unclear_texts]
    if not counts.numeric or (request.decimal and request.bad_values):
        return asked
    forms = database.rows(
        f"SELECT regexp_replace(text, '\\d', '#', 'g') AS form FROM ({texts}) "
        "WHERE NOT is_limit(text) AND looks_numeric(text) GROUP BY 1 ORDER BY count(*) DESC, 1"
    )
    shown = join_names([f"'{form}'" for (form,) in forms], 3)
    problem = f"{counts.numeric:,} cells look like numbers of another form, as {shown}"
    if request.decimal:
        return [*asked, Question(problem, "bad_values", ("drop",), advice="write all alike")]
    return [*asked, Question(problem, "decimal", signs, advice="--decimal comma or point")]


def ask_texts(counts: TextCounts, request: LongRequest) -> list[Question]:
    """Ask what the texts of a column of values are: limits, units, flags, other words."""
    asked = list[Question]()
    if (limits := counts.below + counts.above) and not request.below_limit:
        problem = f"{cells.count_cells(limits)} at a limit"
        advice = '--below_limit half, value or drop (of "<5": 2.5, 5 or empty)'
        asked.append(Question(problem, "below_limit", ("half", "value", "drop"), advice=advice))
    if counts.with_unit:
        problem = f"{cells.count_cells(counts.with_unit)} with a unit behind the number"
        asked.append(Question(problem, "", advice="write the unit in a column of its own"))
    for word in sorted(counts.letters):
        problem = f"numbers have {word} behind them, a unit or the laboratory's flag"
        advice = f"--result_flags {word}, or a column of the unit"
        asked.append(Question(problem, "result_flags", (word,), advice=advice))
    if counts.other > counts.with_unit and not request.bad_values and not counts.letters:
        problem = f"{cells.count_cells(counts.other)} not a number"
        advice = "--bad_values drop leaves it out"
        asked.append(Question(problem, "bad_values", ("drop",), advice=advice))
    return asked


def log_dropped(database: duck.Database, texts: str, where: str, total: int) -> None:
    """Log the forms of the texts that are dropped, those of numbers as a warning.

    Letters are shown of texts of many patients alone: a rare one may be a remark on one.
    """
    text_form = "regexp_replace(text, '\\d+', '#', 'g')"
    number_form = f"regexp_replace({text_form}, '\\p{{L}}{{3,}}', '...', 'g')"
    is_number = "regexp_matches(text, '^[<>≤≥+-]*\\s*\\d')"
    kinds = ((number_form, is_number, 1), (text_form, f"NOT {is_number}", MIN_CELL))
    for form, condition, fewest in kinds:
        words = database.rows(
            f"SELECT left({form}, {MAX_LETTERS + 1}) AS word, count(*) AS count, "
            f"count(DISTINCT patient) >= {fewest} FROM ({texts}) "
            f"WHERE text IS NOT NULL AND NOT is_limit(text) AND {condition} "
            "GROUP BY word ORDER BY count DESC, word"
        )
        count = sum(count for _, count, _ in words)
        shown = [(x, n) for x, n, may_be in words if may_be and len(x) <= MAX_LETTERS][:MAX_WORDS]
        listed = [f'{n:,} values "{one_line(word)}"' for word, n in shown]
        rest = count - sum(n for _, n in shown)
        listed += [f"{rest:,} other texts"] if rest else []
        if count and fewest == 1:
            share = f"{count:,} cells that begin with a number ({count / total:.1%})"
            logger.warning("warning: %s: dropped %s: %s", where, share, ", ".join(listed))
        elif count:
            logger.info("%s: dropped %s", where, ", ".join(listed))


def unclear_signs(database: duck.Database, texts: str, separator: str) -> list[str]:
    """Return what is unclear of the signs of numbers: decimals, or between thousands."""
    rows = database.rows(
        "SELECT item, count(*) FILTER (sign = ','), count(*) FILTER (sign = '.'), "
        "count(*) FILTER (sign != '' AND NOT thousands), "
        "count(*) FILTER (sign = '' AND (number IS NOT NULL OR is_limit(text))) "
        f"FROM ({texts}) GROUP BY item ORDER BY item"
    )
    commas, points, decimals = (sum(row[k] for row in rows) for k in (1, 2, 3))
    is_text = separator in (";", "\t", "|")  # where commas are free to be decimal
    if commas and (points or not is_text):
        counts = f"{commas:,} numbers have a comma and {points:,} a point"
        return [f"{counts}: --decimal comma or point says which is decimal"]
    unclear = [
        item
        for item, *signs, decimals_of_item, whole in rows
        if sum(signs) and not decimals_of_item and (whole or (is_text and not decimals))
    ]
    if not unclear:
        return []
    items = f" of {join_names(unclear)}" if unclear != [None] else ""
    sign = "comma" if commas else "point"
    problem = f"each {sign}{items} has three digits behind it, as thousands have"
    return [f"{problem}: --decimal comma or point says which is decimal"]


# ---------------------------------------------------------------------------- series


def wanted_series(request: LongRequest) -> list[Feature]:
    """Return the series of --series; with --like those of it, with the items that are given."""
    given = events.parse_features("series", request.series, code_needed=False)
    earlier = events.parse_features("series", request.earlier.series, code_needed=False)
    by_name = {comparable(feature.name): feature for feature in given}
    series = list[Feature]()
    for feature in earlier:
        other = by_name.pop(comparable(feature.name), feature)
        if other.unit and feature.unit and not alike((other.unit,), (feature.unit,)):
            problem = f"the series of --like is in {feature.unit}: convert by --factor"
            raise InputError(f"--series '{other.title}=': {problem}")
        series.append(replace(feature, keys=other.keys))
    return series + list(by_name.values())


def ask_absent(database: duck.Database, source: Source, series: Sequence[Feature]) -> None:
    """Ask for the items of the series of --like of which the table has none."""
    path = source.file.path
    with tables.readable(path):
        codes = [code for code, _ in database.rows(f"{count_items(source)} ORDER BY n DESC, code")]
    present = set(map(comparable, codes))
    absent = [x for x in series if is_absent(x, present)]
    if not absent:
        return
    taken = {comparable(str(key)) for x in series if x not in absent for key in x.keys}
    items = [code for code in codes if comparable(code) not in taken][:MAX_ITEMS]
    asked = [question for x in absent for question in ask_items(str(path), x, items)]
    problem = f"{path}: no item of {join_names([x.title for x in absent])}"
    first = absent[0].title
    advice = f"--series '{first}=ITEM', or '{first}=' of one that is not measured here"
    raise OpenQuestions(f"{problem}: {advice}; the items are {join_names(items, 12)}", asked)


def is_absent(series: Feature, present: set[str]) -> bool:
    """Return whether a table has none of the items of a series; one with a star has some."""
    keys = [str(key) for key in series.keys]
    has_star = any(key.endswith("*") for key in keys)
    return bool(keys) and not has_star and present.isdisjoint(map(comparable, keys))


def ask_items(where: str, series: Feature, items: Sequence[str]) -> list[Question]:
    """Return the questions which items are a series, those of its quantity first."""
    problem = (
        f"{where}: which items are {series.name}: none is {join_names([*map(str, series.keys)])}"
    )
    is_known, kind = bool(analytes.pattern_of(series.name)), kind_of_item(series.name)
    hint = "" if is_known else did_you_mean(series.name, items, 0.5)
    near = [code for code in items if kind_of_item(split_title(code)[0]) == kind]
    near += [code for code in items if code not in near and f" {code}?" in hint]
    none = f"{series.title}="
    answers = [[f"{none}{code}", none] for code in near[:MAX_WORDS]] or [[none]]
    return [Question(problem, "series", tuple(answer)) for answer in answers]


def kind_of_item(name: str) -> str:
    """Return what items of one quantity share: their entry among units, or else the first word."""
    words = comparable(name)
    special = " ".join(sorted(SPECIAL.findall(words)))
    first = re.sub(r"[^\w]", " ", words).split()[:1]
    return f"{special} {analytes.pattern_of(name) or ''.join(first)}"


@dataclass(frozen=True, eq=False)
class Item:
    """An item of the table, whatever its case, as a series: its keys are its spellings."""

    series: Feature
    size: int  # number of its values
    middle: float  # their median, in the unit of most of them


def find_series(database: duck.Database, path: Path) -> list[Feature]:
    """Return each item with values in the windows as a series, that of most values first."""
    items = read_items(database)
    mains = find_synonyms(items)
    # What may be one series counts as one: the main series is that of most values.
    sizes = Counter[Item]()
    for item in items:
        sizes[mains.get(item, item)] += item.size
    rank = {item: k for k, item in enumerate(items)}
    items.sort(key=lambda x: (-sizes[mains.get(x, x)], rank[mains.get(x, x)]))
    check_items(items, mains, path)
    logger.info("series: %s", join_names([item.series.title for item in items]))
    return [item.series for item in items]


def read_items(database: duck.Database) -> list[Item]:
    """Return the items with values in the windows, those of most values first."""
    rows = database.frame(
        "SELECT code, any_value(unit_within(code)) AS within, count(*) AS n, "
        "CASE WHEN converted THEN '' ELSE coalesce(unit, '') END AS unit, median(value) AS middle "
        "FROM record JOIN prediction USING (subject) WHERE value IS NOT NULL "
        "AND time BETWEEN opens AND prediction_time AND known <= prediction_time "
        "GROUP BY code, 4 ORDER BY n DESC, code, unit"
    )
    key = rows["code"].map(lambda code: comparable(MICRO.sub("u", code)))
    items = [make_item(of_item) for _, of_item in rows.groupby(key)]
    shared = Counter(comparable(item.series.name) for item in items)
    for k, item in enumerate(items):
        if shared[comparable(item.series.name)] > 1:  # without its unit it is named like another
            items[k] = replace(item, series=replace(item.series, name=str(item.series.keys[0])))
    return sorted(items, key=lambda item: -item.size)


def make_item(rows: pd.DataFrame) -> Item:
    """Return the item of its rows: one a spelling and unit, that of most values first."""
    sizes = rows.groupby("code")["n"].sum().sort_values(ascending=False, kind="stable")
    codes = [str(code) for code in sizes.index]
    name, unit = split_title(codes[0], rows["within"].iloc[0])
    unit = next((x for x in rows["unit"] if x), unit)
    by_sign = dict[str, str]()
    for code in codes:
        by_sign.setdefault(MICRO.sub("u", code).lower(), code)
    series = Feature(name, unit, tuple(by_sign.values()))
    return Item(series, int(sizes.sum()), float(rows["middle"].iloc[0]))


def check_items(items: Sequence[Item], mains: Mapping[Item, Item], path: Path) -> None:
    """Refuse items of which each as a series is no sure guess."""
    if not 1 <= len(items) <= MAX_SERIES:
        problem = f"{len(items):,} items have values in the windows, and 1 to {MAX_SERIES} may be"
        asked = ask_series(items[:MAX_SERIES], f"{path}: {problem}", {}, guess=False)
        raise OpenQuestions(f"{path}: {problem}: choose by --series", asked)
    problems = list[str]()
    if unnamed := [x.series.name for x in items if not events.is_name(x.series.name)]:
        example = f"--series '{name_from(unnamed[0])} [unit]={unnamed[0]}'"
        problems.append(f"item {join_names(unnamed)}: not the name of a column: as {example}")
    for item in items:
        if item in mains:
            main = mains[item].series.name
            example = f"--series '{name_from(main)}={item.series.keys[0]}'"
            problems.append(f"is {item.series.name} the series {main}: as {example}")
    if problems:
        text = f"{path}: {'; '.join(problems)}; name all series that are read"
        raise OpenQuestions(text, ask_series(items, str(path), mains, guess=True))


def find_synonyms(items: Sequence[Item]) -> dict[Item, Item]:
    """Return which item may be the same quantity as which earlier one."""
    first = dict[str, Item]()
    pairs = [(item, first.setdefault(kind_of_item(item.series.name), item)) for item in items]
    return {item: main for item, main in pairs if item is not main and may_be_one(item, main)}


def may_be_one(item: Item, main: Item) -> bool:
    """Return whether the medians of two items are near, as they are or by a known factor."""
    name = item.series.name
    ratio = item.middle / main.middle if main.middle else 0.0
    factors = (1.0, *analytes.unit_ratios(name))
    factors += ratios(item.series.unit or "", main.series.unit or "")
    limit = KNOWN_SYNONYMS if analytes.pattern_of(name) else SYNONYMS
    return any(1 / limit < ratio / x**sign < limit for x in factors for sign in (1, -1))


def split_title(item: str, unit: str = "") -> tuple[str, str]:
    """Return name and unit of an item such as ``Kreatinin [µmol/L]``, or with ``(unit)``."""
    if match := events.TITLE.fullmatch(item):
        name, unit = match[1], match[2] or unit
        return name.removesuffix(f"({unit})").strip() if unit else name, unit
    return item, ""


def name_from(item: str) -> str:
    """Return a name that a series or a static feature can have, made of another."""
    name = " ".join(re.sub(r"[\[\],*=\x00-\x1f]", " ", item).split())
    return name if events.is_name(name) else f"item {name}".strip()


def ask_series(
    items: Sequence[Item], where: str, mains: Mapping[Item, Item], *, guess: bool
) -> list[Question]:
    """Return a question for each item, which series it is: that of its name, or a synonym's."""
    asked = []
    for item in items:
        name, candidates = item.series.name, [item]
        is_guess, problem = guess and events.is_name(name), where
        if item in mains:
            candidates = [mains[item], item]
            is_guess, problem = False, f"{where}: is {name} the series {mains[item].series.name}"
        elif guess and not is_guess:
            problem = f"{where}: {name} is not the name of a column"
        titles = [replace(x.series, name=name_from(x.series.name)).title for x in candidates]
        for key in item.series.keys:
            answers = tuple(dict.fromkeys(f"{title}={key}" for title in titles))
            asked.append(Question(problem, "series", answers, guessed=is_guess))
    return asked


# ---------------------------------------------------------------------------- units


def plain_unit(unit: str) -> str:
    """Return ``103/ul`` of ``10^3/µL``."""
    signs = "[\\sx\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}^*]|(?<=10)e(?=\\d)"
    return re.sub(signs, "", MICRO.sub("u", unit).lower())


def ratios(unit: str, target: str) -> tuple[float, ...]:
    """Return what a unit is multiplied by to be another one, where their texts tell."""
    one, other = (analytes.COUNTS.get(plain_unit(x), 0.0) for x in (unit, target))
    return (one / other,) if one and other else analytes.prefix_ratios(unit, target)


class Group(NamedTuple):
    """Values of a series that share item and unit."""

    name: str  # of the series
    wanted: str  # unit of the series, empty: not said
    converted: bool
    code: str
    unit: str
    middle: float | None  # median; None: all are left out


def convert_units(
    database: duck.Database, series: Sequence[Feature], request: LongRequest
) -> list[Feature]:
    """Return the series with their one unit; refuse two units, warn of a factor without a use."""
    factors, groups = request.factors(), read_groups(database)
    warn_of_unused(factors, groups)
    units, asked = dict[str, str](), list[tuple[str, Question]]()
    for name in dict.fromkeys(x.name for x in groups):
        of_series = [x for x in groups if x.name == name and x.middle is not None]
        if not of_series:
            continue
        where, first = f"{request.table}: {name}", of_series[0]
        if first.converted and not first.wanted:
            problem = "all values are converted: give the unit"
            raise InputError(f"{request.table}: {problem} by --series '{name} [unit]'")
        units[name] = first.wanted or first.unit
        usual = request.earlier.medians.get(name)
        asked += ask_factors(where, units[name], of_series, factors, usual)
    if asked:
        texts = dict.fromkeys(text for text, _ in asked)
        raise OpenQuestions("; ".join(texts), [question for _, question in asked])
    return [replace(x, unit=units.get(x.name, x.unit)) for x in series]


def read_groups(database: duck.Database) -> list[Group]:
    """Return the values of each series by item and unit, those that are not converted first."""
    rows = database.rows(
        "SELECT name, any_value(named.unit), converted, min(code), min(record.unit), median(value) "
        "FROM record JOIN named USING (code) "
        "WHERE record.unit IS NOT NULL AND (value IS NOT NULL OR isinf(scale)) "
        "GROUP BY name, converted, comparable_unit(code), comparable_unit(record.unit) "
        "ORDER BY name, converted, min(record.unit) = '', count(*) DESC, 4, 5"
    )
    return [Group(*row) for row in rows]


def warn_of_unused(factors: Mapping[tuple[str, str], float], groups: Sequence[Group]) -> None:
    """Warn of a factor whose item and unit no value has."""
    for item, unit in factors:
        units = [x.unit for x in groups if alike((x.code,), (item,))]
        if not any(alike((unit,), (other,)) for other in units):
            present = join_names([x or "no unit" for x in units]) or "no value of it"
            problem = f"no value in a window has this item and this unit: there is {present}"
            logger.warning("warning: --factor '%s:%s=': %s", item, unit, problem)


def ask_factors(
    where: str,
    target: str,
    groups: Sequence[Group],  # those that are not converted first
    factors: Mapping[tuple[str, str], float],
    usual: float | None,  # median of the series in an earlier import
) -> list[tuple[str, Question]]:
    """Return what to refuse and ask of values that are not in the unit of their series.

    What their texts tell is proposed, 1 for medians alike, or a known ratio near that of medians.
    """
    asked = list[tuple[str, Question]]()
    right = [x for x in groups if alike((x.unit,), (target,)) != x.converted]
    middle = right[0].middle if right else usual
    read = [(x.middle, 1.0) for x in right if x.middle and not x.converted]
    for group in groups:
        if group in right:
            continue
        if group.converted:
            asked += ask_converted(where, group, factors)
            continue
        ratio = middle / group.middle if middle and group.middle else 0.0
        factor = propose_factor(group, target, ratio, read)
        if factor and group.middle:
            read.append((group.middle, factor))
        asked.append(ask_factor(where, target, group, ratio, factor))
    return asked


def ask_converted(
    where: str, group: Group, factors: Mapping[tuple[str, str], float]
) -> list[tuple[str, Question]]:
    """Return what to refuse of values that a factor, but for 1, takes out of their unit."""
    code, unit = group.code, group.unit
    factor = next(x for pair, x in factors.items() if alike(pair, (code, unit)))
    if factor == 1:
        return []
    problem = f"{where} is in {unit} already"
    text = f"{problem}: --factor '{code}:{unit}={plain(factor)}' converts it once more"
    return [(text, Question(problem, ""))]


def ask_factor(
    where: str, target: str, group: Group, ratio: float, factor: float
) -> tuple[str, Question]:
    """Return what to refuse and ask of values in another unit; a ratio or factor of 0: unknown."""
    item = f"{group.code}:{group.unit}"
    problem = f"{where} has values in {target} and in {group.unit or 'no unit'}"
    text = f"{problem}: --factor '{item}=NUMBER' converts"
    answers = (f"{item}={factor:.4g}", f"{item}=drop") if factor else (f"{item}=drop",)
    problem += f", whose medians are as {ratio:.3g} to 1" if ratio else ""
    problem += "" if factor else ": a number in place of drop converts"
    return text, Question(problem, "factor", answers)


def propose_factor(
    group: Group,
    target: str,
    ratio: float,  # of medians, that of values in the unit of the series to these; 0: not known
    read: Sequence[tuple[float, float]],  # medians of other groups of the series, their factors
) -> float:
    """Return the one factor that units or medians suggest, 0 where there is none."""
    if by_text := ratios(group.unit, target):
        is_near = not ratio or 1 / MAX_RATIO < ratio / by_text[0] < MAX_RATIO
        return by_text[0] if is_near else 0.0
    if not group.unit and group.middle:
        low, high = MISSING
        near = {factor for middle, factor in read if low < middle / group.middle < high}
        if len(near) == 1:
            return near.pop()
    if SAME[0] < ratio < SAME[1]:
        return 1.0
    known = [x**sign for x in analytes.unit_ratios(group.name) for sign in (1, -1)]
    known = [x for x in known if 0.7 < ratio / x < 1.4]
    return known[0] if len(known) == 1 else 0.0


def check_medians(database: duck.Database, path: Path) -> None:
    """Refuse a series whose items or units have very different medians once converted."""
    rows = database.frame(
        "SELECT name, code, record.unit, count(*) AS n, median(ln(value)) AS middle, "
        "quantile_cont(ln(value), 0.75) - quantile_cont(ln(value), 0.25) AS spread "
        "FROM record JOIN named USING (code) WHERE value > 0 "
        f"GROUP BY name, code, record.unit HAVING n >= {MIN_OF_UNIT} ORDER BY name, n DESC, code, 3"
    )
    for name, groups in rows.groupby("name"):
        variance = groups["spread"] ** 2 / groups["n"]  # of a median
        difference = (groups["middle"] - groups["middle"].iloc[0]).abs()
        chance = SURE * np.sqrt(variance + variance.iloc[0])
        wrong = groups[difference > np.maximum(math.log(MAX_RATIO), chance)]
        if len(wrong):
            medians = " and ".join(map(median_text, (groups.iloc[0], wrong.iloc[0])))
            problem = f"{name}: values of one unit have the medians {medians}"
            advice = "correct --factor, or make two series of them"
            raise unclear([Question(problem, "factor", advice=advice)], str(path))


def median_text(group: pd.Series) -> str:
    """Return the median of a group of values with its item and unit."""
    median = plain(float(f"{math.exp(group['middle']):.3g}"))
    unit = f" in {group['unit']}" if group["unit"] else ""
    return f"{median} ({group['code']}{unit})"


def describe_values(
    database: duck.Database, path: Path, repeated: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what a description says of values that are left out, and the medians of the series."""
    left_out = {"repeated": repeated} | count_left_out(database, path)
    return {"values": left_out, "dropped": count_dropped(database)}, find_medians(database)


def count_left_out(database: duck.Database, path: Path) -> dict[str, int]:
    """Count and log the values in the windows that are left out or converted."""
    row = database.row(
        "SELECT count(*) FILTER (value IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND known IS NULL), "
        "count(*) FILTER (value IS NOT NULL AND converted) FROM record JOIN named USING (code)"
    )
    counts = dict(zip(("without a number", "never stored", "converted"), row, strict=True))
    for words, count in counts.items():
        if count:
            logger.info("%s: %d values %s", path, count, words)
    return counts


def count_dropped(database: duck.Database) -> dict[str, dict[str, Any]]:
    """Return the share of each series' values that is dropped, and the end where they lie."""
    rows = database.rows(
        "SELECT name, avg((value IS NULL)::INTEGER) AS share, "
        "median(scale * number_within(text)) FILTER (value IS NULL) AS dropped, "
        "quantile_cont(value, 0.1) AS low, quantile_cont(value, 0.9) AS high "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL OR text IS NOT NULL "
        "GROUP BY name HAVING share > 0 ORDER BY name"
    )
    found = dict[str, dict[str, Any]]()
    for name, share, dropped, low, high in rows:
        is_end = None not in (dropped, low) and not low < dropped < high
        end = ("low" if dropped <= low else "high") if is_end else ""
        found[name] = {"share": round(share, 4), "end": end}
    return found


def find_medians(database: duck.Database) -> dict[str, float]:
    """Return the median of the values of each series, for the units of a later import."""
    rows = database.rows(
        "SELECT name, median(value) FROM record JOIN named USING (code) "
        "WHERE value IS NOT NULL GROUP BY name ORDER BY name"
    )
    return {name: float(f"{median:.3g}") for name, median in rows}
