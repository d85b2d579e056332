"""from_long's table of values: from its cells to the series of the patients, in one unit each."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medgemma_clinical.data import analytes
from medgemma_clinical.data.dka import comparable, join_names
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, events, tables
from medgemma_clinical.data.importers.events import MICRO
from medgemma_clinical.data.importers.long_request import LongRequest, alike
from medgemma_clinical.data.importers.questions import OpenQuestions, Question
from medgemma_clinical.data.importers.sources import Seen, Source
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
    item = duck.quoted(names["item"])
    seen.signs |= check_texts(database, "read", names["value"], file, request, item)
    return repeated


def log_unread(database: duck.Database, source: Source) -> None:
    """Log the items that are of no series, those of most values first."""
    rows = database.run(
        f"SELECT code, n FROM ({count_items(source)}) WHERE NOT EXISTS "
        f"(SELECT 1 FROM read WHERE {duck.quoted(source.names['item'])} = code) "
        "ORDER BY n DESC, code"
    ).fetchall()
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


def check_texts(
    database: duck.Database,
    loaded: str,
    column: str,
    file: tables.TableFile,
    request: LongRequest,
    item: str = "NULL",
) -> set[str]:
    """Refuse what only a flag says how to read, log what is left out; return signs of decimals."""
    where = f"{file.path}, column {column}"
    texts = f"SELECT {item} AS item, unnest({duck.quoted(column)}) FROM {loaded}"
    total, flagged, below, above, numeric, other, with_unit, letters, commas, points = database.row(
        "SELECT count(number) + count(text), count(*) FILTER (flagged), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('<', '≤')), "
        "count(*) FILTER (is_limit(text) AND text[1] IN ('>', '≥')), "
        "count(*) FILTER (NOT is_limit(text) AND looks_numeric(text)), "
        "count(*) FILTER (NOT looks_numeric(text)), count(*) FILTER (holds_unit(text)), "
        "list_distinct(list(letters_behind(text)) FILTER (letters_behind(text) != '')), "
        f"count(*) FILTER (sign = ','), count(*) FILTER (sign = '.') FROM ({texts})"
    )
    asked = list[tuple[str, str, str, tuple[str, ...]]]()  # problem, advice, flag, its values
    signs = ("comma", "point") if commas > points else ("point", "comma")
    unclear = [] if request.decimal else unclear_signs(database, texts, file.separator)
    asked += [(text, "", "decimal", signs) for text in unclear]
    if numeric and not (request.decimal and request.bad_values):
        forms = (
            f"SELECT regexp_replace(text, '\\d', '#', 'g') AS form FROM ({texts}) "
            "WHERE NOT is_limit(text) AND looks_numeric(text) GROUP BY 1 ORDER BY count(*) DESC, 1"
        )
        shown = join_names([f"'{form}'" for (form,) in database.run(forms).fetchall()], 3)
        problem = f"{numeric:,} cells look like numbers of another form, as {shown}"
        if request.decimal:
            asked.append((problem, ": write all alike", "bad_values", ("drop",)))
        else:
            asked.append((problem, ": --decimal comma or point", "decimal", signs))
    if below + above and not request.below_limit:
        flag = ': --below_limit half, value or drop (of "<5": 2.5, 5 or empty)'
        problem = f"{cells.count_cells(below + above)} at a limit"
        asked.append((problem, flag, "below_limit", ("half", "value", "drop")))
    if with_unit:
        advice = ": write the unit in a column of its own"
        problem = f"{cells.count_cells(with_unit)} with a unit behind the number"
        asked.append((problem, advice, "", ()))
    for word in sorted(letters or ()):
        problem = f"numbers have {word} behind them, a unit or the laboratory's flag"
        advice = f": --result_flags {word}, or a column of the unit"
        asked.append((problem, advice, "result_flags", (word,)))
    if other > with_unit and not request.bad_values and not letters:
        problem = f"{cells.count_cells(other)} not a number"
        asked.append((problem, ": --bad_values drop leaves it out", "bad_values", ("drop",)))
    if asked:
        problems = "; ".join(problem + advice for problem, advice, *_ in asked)
        questions = [Question(f"{where}: {x}", flag, values) for x, _, flag, values in asked]
        raise OpenQuestions(f"{where}: {problems}", questions)
    if flagged:
        logger.info("%s: %s numbers with a laboratory's flag are read", where, f"{flagged:,}")
    if below + above:
        counts = f"{below:,} values below a limit, {above:,} above one"
        logger.info("%s: %s: --below_limit %s", where, counts, request.below_limit)
    if numeric + other:
        log_dropped(database, texts, where, total)
    return {name for name, count in (("comma", commas), ("point", points)) if count}


def log_dropped(database: duck.Database, texts: str, where: str, total: int) -> None:
    """Log the forms of the texts that are dropped, those of numbers all and as a warning."""
    text_form = "regexp_replace(text, '\\d+', '#', 'g')"
    number_form = f"regexp_replace({text_form}, '[[:alpha:]]{{3,}}', '...', 'g')"
    is_number = "regexp_matches(text, '^[<>≤≥+-]*\\s*\\d')"
    kinds = ((number_form, is_number, True), (text_form, f"NOT {is_number}", False))
    for form, condition, warns in kinds:
        words = database.run(
            f"SELECT left({form}, {MAX_LETTERS + 1}) AS word, count(*) AS count FROM ({texts}) "
            f"WHERE text IS NOT NULL AND NOT is_limit(text) AND {condition} "
            "GROUP BY word ORDER BY count DESC, word"
        ).fetchall()
        count = sum(count for _, count in words)
        shown = [x for x in words if len(x[0]) <= MAX_LETTERS][:MAX_WORDS]
        if len(words) > MAX_WORDS:  # a rare one may be a remark on a patient
            shown = [(word, count) for word, count in shown if count > 1]
        listed = [f'{count:,} values "{one_line(word)}"' for word, count in shown]
        rest = count - sum(count for _, count in shown)
        listed += [f"{rest:,} other texts"] if rest else []
        if count and warns:
            share = f"{count:,} cells that begin with a number ({count / total:.1%})"
            logger.warning("warning: %s: dropped %s: %s", where, share, ", ".join(listed))
        elif count:
            logger.info("%s: dropped %s", where, ", ".join(listed))


def unclear_signs(database: duck.Database, texts: str, separator: str) -> list[str]:
    """Return what is unclear of the signs of numbers: decimals, or between thousands."""
    rows = database.run(
        "SELECT item, count(*) FILTER (sign = ','), count(*) FILTER (sign = '.'), "
        "count(*) FILTER (sign != '' AND NOT thousands), "
        "count(*) FILTER (sign = '' AND (number IS NOT NULL OR is_limit(text))) "
        f"FROM ({texts}) GROUP BY item ORDER BY item"
    ).fetchall()
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


def choose_series(database: duck.Database, source: Source, request: LongRequest) -> list[Feature]:
    """Return the series, and make the table ``named`` of their items."""
    series = wanted_series(request) or find_series(database, source.file.path)
    events.name_codes(database, {"series": series})
    return series


def ask_absent(database: duck.Database, source: Source, series: Sequence[Feature]) -> None:
    """Ask for the items of the series of --like of which the table has none."""
    path = source.file.path
    with tables.readable(path):
        rows = database.run(f"{count_items(source)} ORDER BY n DESC, code").fetchall()
    codes = [code for code, _ in rows]
    present = set(map(comparable, codes))
    keys = {feature.name: [*map(str, feature.keys)] for feature in series}
    absent = [x for x in series if keys[x.name] and not present & {*map(comparable, keys[x.name])}]
    absent = [x for x in absent if not any(key.endswith("*") for key in keys[x.name])]
    if not absent:
        return
    taken = {comparable(key) for x in series if x not in absent for key in keys[x.name]}
    items = [code for code in codes if comparable(code) not in taken][:MAX_ITEMS]
    asked = list[Question]()
    for feature in absent:
        none, title = join_names(keys[feature.name]), feature.title
        problem = f"{path}: which items are {feature.name}: none is {none}"
        is_known, kind = bool(analytes.pattern_of(feature.name)), kind_of_item(feature.name)
        hint = "" if is_known else did_you_mean(feature.name, items, 0.5) or ""
        near = [code for code in items if kind_of_item(split_title(code)[0]) == kind]
        near += [code for code in items if code not in near and f" {code}?" in hint]
        answers = [(f"{title}={code}", f"{title}=") for code in near[:MAX_WORDS]]
        asked += [Question(problem, "series", pair) for pair in answers]
        asked += [] if answers else [Question(problem, "series", (f"{title}=",))]
    problem = f"{path}: no item of {join_names([x.title for x in absent])}"
    first = absent[0].title
    advice = f"--series '{first}=ITEM', or '{first}=' of one that is not measured here"
    raise OpenQuestions(f"{problem}: {advice}; the items are {join_names(items, 12)}", asked)


def kind_of_item(name: str) -> str:
    """Return what items of one quantity share: their entry among units, or else the first word."""
    words = comparable(name)
    special = " ".join(sorted(SPECIAL.findall(words)))
    first = re.sub(r"[^\w]", " ", words).split()[:1]
    return f"{special} {analytes.pattern_of(name) or ''.join(first)}"


def find_series(database: duck.Database, path: Path) -> list[Feature]:
    """Return each item with values in the windows, whatever its case, that of most values first."""
    rows = database.frame(
        "SELECT code, any_value(unit_within(code)) AS within, count(*) AS n, "
        "CASE WHEN converted THEN '' ELSE coalesce(unit, '') END AS unit, median(value) AS middle "
        "FROM record JOIN prediction USING (subject) WHERE value IS NOT NULL "
        "AND time BETWEEN opens AND prediction_time AND known <= prediction_time "
        "GROUP BY code, 4 ORDER BY n DESC, code, unit"
    )
    rows["key"] = rows["code"].map(lambda code: comparable(MICRO.sub("u", code)))
    totals = rows.groupby("key")["n"].sum().sort_values(ascending=False, kind="stable")
    spellings, names = dict[str, list[str]](), dict[str, tuple[str, str]]()
    for key in totals.index:
        of_item = rows[rows["key"] == key]
        counts = of_item.groupby("code")["n"].sum().sort_values(ascending=False, kind="stable")
        spellings[key] = [*counts.index]
        names[key] = split_title(spellings[key][0], of_item["within"].iloc[0])
    shared = Counter(comparable(name) for name, _ in names.values())
    items, middles = list[Feature](), list[float]()
    for key, codes in spellings.items():
        of_item, (name, unit) = rows[rows["key"] == key], names[key]
        name = name if shared[comparable(name)] == 1 else codes[0]
        unit = next((x for x in of_item["unit"] if x), unit)
        by_sign = {MICRO.sub("u", code).lower(): code for code in codes[::-1]}
        items.append(Feature(name, unit, tuple([*by_sign.values()][::-1])))
        middles.append(float(of_item["middle"].iloc[0]))
    # What may be one series counts as one: the main series is that of most values.
    synonyms = find_synonyms(items, middles)
    main_of, sizes = [synonyms.get(k, k) for k in range(len(items))], Counter[int]()
    for main, n in zip(main_of, totals, strict=True):
        sizes[main] += int(n)
    order = sorted(range(len(items)), key=lambda k: (-sizes[main_of[k]], main_of[k], k))
    items, middles = [items[k] for k in order], [middles[k] for k in order]
    if not 1 <= len(items) <= MAX_SERIES:
        problem = f"{len(items):,} items have values in the windows, and 1 to {MAX_SERIES} may be"
        asked = ask_series(items[:MAX_SERIES], f"{path}: {problem}", {}, guess=False)
        raise OpenQuestions(f"{path}: {problem}: choose by --series", asked)
    mains = find_synonyms(items, middles)
    unnamed = [item.name for item in items if not events.is_name(item.name)]
    problems = []
    if unnamed:
        example = f"--series '{name_from(unnamed[0])} [unit]={unnamed[0]}'"
        problems.append(f"item {join_names(unnamed)}: not the name of a column: as {example}")
    for k, main in mains.items():
        example = f"--series '{name_from(items[main].name)}={items[k].keys[0]}'"
        problems.append(f"is {items[k].name} the series {items[main].name}: as {example}")
    if problems:
        text = f"{path}: {'; '.join(problems)}; name all series that are read"
        raise OpenQuestions(text, ask_series(items, str(path), mains, guess=True))
    logger.info("series: %s", join_names([item.title for item in items]))
    return items


def find_synonyms(items: Sequence[Feature], middles: Sequence[float]) -> dict[int, int]:
    """Return which item may be the same quantity as which earlier one."""
    mains, first = dict[int, int](), dict[str, int]()
    for k, item in enumerate(items):
        main = first.setdefault(kind_of_item(item.name), k)
        if main == k:
            continue
        ratio = middles[k] / middles[main] if middles[main] else 0.0
        known = (1.0, *analytes.unit_ratios(item.name))
        known += ratios(item.unit or "", items[main].unit or "")
        limit = KNOWN_SYNONYMS if analytes.pattern_of(item.name) else SYNONYMS
        if any(1 / limit < ratio / x**sign < limit for x in known for sign in (1, -1)):
            mains[k] = main
    return mains


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
    items: Sequence[Feature], where: str, mains: Mapping[int, int], *, guess: bool
) -> list[Question]:
    """Return a question for each item, which series it is: that of its name, or a synonym's."""
    asked = []
    titles = [replace(item, name=name_from(item.name)).title for item in items]
    for k, item in enumerate(items):
        main = mains.get(k, k)
        problem, is_guess = where, guess and events.is_name(item.name)
        if main != k:
            is_guess, problem = False, f"{where}: is {item.name} the series {items[main].name}"
        elif guess and not is_guess:
            problem = f"{where}: {item.name} is not the name of a column"
        for key in item.keys:
            answers = tuple(dict.fromkeys(f"{titles[i]}={key}" for i in (main, k)))
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
    path, factors = request.table, request.factors()
    rows = database.run(
        "SELECT name, any_value(named.unit), converted, min(code), min(record.unit), median(value) "
        "FROM record JOIN named USING (code) "
        "WHERE record.unit IS NOT NULL AND (value IS NOT NULL OR isinf(scale)) "
        "GROUP BY name, converted, comparable_unit(code), comparable_unit(record.unit) "
        "ORDER BY name, converted, min(record.unit) = '', count(*) DESC, 4, 5"
    ).fetchall()
    groups = [Group(*row) for row in rows]
    for item, unit in factors:
        units = [x.unit for x in groups if alike((x.code,), (item,))]
        if not any(alike((unit,), (other,)) for other in units):
            units_text = join_names([x or "no unit" for x in units]) or "no value of it"
            problem = f"no value in a window has this item and this unit: there is {units_text}"
            logger.warning("warning: --factor '%s:%s=': %s", item, unit, problem)
    found, asked = dict[str, str](), list[tuple[str, Question]]()
    for name in dict.fromkeys(x.name for x in groups):
        of_series = [x for x in groups if x.name == name and x.middle is not None]
        if not of_series:
            continue
        wanted, first = of_series[0].wanted, of_series[0]
        if first.converted and not wanted:
            problem = "all values are converted: give the unit"
            raise InputError(f"{path}: {problem} by --series '{name} [unit]'")
        found[name] = wanted or first.unit
        usual = request.earlier.medians.get(name)
        asked += ask_factors(f"{path}: {name}", found[name], of_series, factors, usual)
    if asked:
        texts = dict.fromkeys(text for text, _ in asked)
        raise OpenQuestions("; ".join(texts), [question for _, question in asked])
    return [replace(x, unit=found.get(x.name, x.unit)) for x in series]


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
    asked, read = list[tuple[str, Question]](), list[tuple[float, float]]()
    right = [x for x in groups if alike((x.unit,), (target,)) != x.converted]
    middle = right[0].middle if right else usual
    read += [(x.middle, 1.0) for x in right if x.middle and not x.converted]
    for group in groups:
        code, unit = group.code, group.unit
        if group in right:
            continue
        if group.converted:
            factor = next(x for pair, x in factors.items() if alike(pair, (code, unit)))
            problem = f"{where} is in {unit} already"
            text = f"{problem}: --factor '{code}:{unit}={plain(factor)}' converts it once more"
            asked += [(text, Question(problem, ""))] if factor != 1 else []
            continue
        ratio = middle / group.middle if middle and group.middle else 0.0
        factor = propose_factor(group, target, ratio, read)
        answers = (f"{code}:{unit}={factor:.4g}",) if factor else ()
        read += [(group.middle, factor)] if factor and group.middle else []
        problem = f"{where} has values in {target} and in {unit or 'no unit'}"
        text = f"{problem}: --factor '{code}:{unit}=NUMBER' converts"
        problem += f", whose medians are as {ratio:.3g} to 1" if ratio else ""
        problem += "" if factor else ": a number in place of drop converts"
        asked.append((text, Question(problem, "factor", (*answers, f"{code}:{unit}=drop"))))
    return asked


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
        "SELECT name, code, record.unit, count(*) AS n, "
        "quantile_cont(ln(value), 0.25) AS low, median(ln(value)) AS middle, "
        "quantile_cont(ln(value), 0.75) AS high "
        "FROM record JOIN named USING (code) WHERE value > 0 "
        f"GROUP BY name, code, record.unit HAVING n >= {MIN_OF_UNIT} ORDER BY name, n DESC, code, 3"
    )
    for name, groups in rows.groupby("name"):
        median = groups["middle"].to_numpy()
        spread = groups["high"].to_numpy() - groups["low"].to_numpy()
        variance = spread**2 / groups["n"].to_numpy()  # of a median
        difference = np.abs(median[1:] - median[0])
        chance = SURE * np.sqrt(variance[1:] + variance[0])
        wrong = np.flatnonzero(difference > np.maximum(math.log(MAX_RATIO), chance))
        if not len(wrong):
            continue
        texts = []
        for k in (0, wrong[0] + 1):
            code, unit = groups.iloc[k][["code", "unit"]]
            of_unit = f" in {unit}" if unit else ""
            texts.append(f"{plain(float(f'{math.exp(median[k]):.3g}'))} ({code}{of_unit})")
        problem = f"{path}: {name}: values of one unit have the medians {' and '.join(texts)}"
        advice = "correct --factor, or make two series of them"
        raise OpenQuestions(f"{problem}: {advice}", [Question(problem, "factor")])


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
    rows = database.run(
        "SELECT name, avg((value IS NULL)::INTEGER) AS share, "
        "median(scale * number_within(text)) FILTER (value IS NULL) AS dropped, "
        "quantile_cont(value, 0.1) AS low, quantile_cont(value, 0.9) AS high "
        "FROM record JOIN named USING (code) WHERE value IS NOT NULL OR text IS NOT NULL "
        "GROUP BY name HAVING share > 0 ORDER BY name"
    ).fetchall()
    found = dict[str, dict[str, Any]]()
    for name, share, dropped, low, high in rows:
        is_end = None not in (dropped, low) and not low < dropped < high
        end = ("low" if dropped <= low else "high") if is_end else ""
        found[name] = {"share": round(share, 4), "end": end}
    return found


def find_medians(database: duck.Database) -> dict[str, float]:
    """Return the median of the values of each series, for the units of a later import."""
    select = (
        "SELECT name, median(value) FROM record JOIN named USING (code) WHERE value IS NOT NULL"
    )
    rows = database.run(f"{select} GROUP BY name ORDER BY name").fetchall()
    return {name: float(f"{median:.3g}") for name, median in rows}
