"""How the cells of a column are read: a class a form, each with its SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from medgemma_clinical.data.importers import duck
from medgemma_clinical.data.roles import MAX_ID, NO_ID

LARGEST_WHOLE = 10**10  # of a key, and of an offset in minutes, which a timestamp holds
MAX_WORD = 300  # characters kept of a unit, a code, a ward

MOMENT = r"\d\d\d\d-\d\d-\d\d([ T]\d\d?:\d\d(:\d\d(\.\d+)?)?)?"
"""A time as text; DuckDB alone would drop AM, PM, a zone and any other word behind it."""

ZONED = r"\d\d\d\d-\d\d-\d\d[ T]\d\d?:\d\d(:\d\d(\.\d+)?)?( ?(Z|[+-]\d\d(:?\d\d)?))"
"""A time as text with its zone, as ISO 8601 writes it."""

MICROSECONDS = {"minutes": 60_000_000, "hours": 3_600_000_000, "days": 86_400_000_000}
"""Units of times that are numbers, counted from an arbitrary day."""

EXCEL_DAYS = 20_000, 80_000  # from 1954 to 2119
EXCEL_1970 = 25_569  # day 0 is 30 December 1899

CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p")
DAY_FIRST = ("%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%d-%b-%Y", "%d/%m/%y", "%d.%m.%y")
MONTH_FIRST = ("%m/%d/%Y", "%m-%d-%Y", "%m/%d/%y")  # with points the day comes first everywhere
YEAR_FIRST = ("%Y/%m/%d", "%Y.%m.%d")
ORDERS = [
    tuple(date + clock for date in dates for clock in CLOCKS)
    for dates in (DAY_FIRST, MONTH_FIRST, YEAR_FIRST)
]
"""Formats of times that are not in ISO's form; the first of each stands for all."""
ISO_FORMATS = tuple(
    f"%Y-%m-%d{clock}" for clock in ("", " %H:%M", " %H:%M:%S", "T%H:%M:%S", "T%H:%M")
)

YES = ("yes", "y", "true", "1", "1.0", "ja", "j", "oui", "si", "sí", "sì")
NO = ("no", "n", "false", "0", "0.0", "nein", "non")
NOT_KNOWN = ("", "nan", "?", "-", "n/a", "na", "unknown", "unbekannt", "inconnu", "desconocido")
"""Words of a label, in small letters: 1, 0 and neither."""


def trimmed(raw: str) -> str:
    """Return SQL for the text of a raw cell."""
    # As text 4.1 of 32 bits stays 4.1; without trim the reader itself would cast, and raise.
    return f"trim({raw}::VARCHAR)"


def count_cells(count: int) -> str:
    """Return the subject and verb of what is wrong with some cells."""
    return "1 cell is" if count == 1 else f"{count:,} cells are"


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a column is read; each form of its cells is a subclass."""

    may_be_empty: bool = False  # an empty word is an empty text
    optional: bool = False  # the file may lack it; its cells are empty then
    source: str = ""  # column of the file, by default that of the same name
    advice: str = ""  # for cells that cannot be read

    # Of a ``raw`` cell or its trimmed text ``cell``, and whether a ``value`` is wrong.
    sql: ClassVar[str] = "{cell}"
    wrong_sql: ClassVar[str] = "{value} IS NULL"
    empty: ClassVar[tuple[str, ...]] = ("", "nan")  # in small letters

    @property
    def unreadable(self) -> str:
        """What a cell is that cannot be read."""
        return "empty"

    def steps(self, raw: str) -> dict[str, str]:
        """Return SQL that ``typed`` needs many times, by the name it has there, in this order."""
        return {}

    def typed(self, raw: str) -> str:
        """Return SQL for the value of a raw cell, NULL (of a text: empty) where there is none."""
        return self.sql.format(raw=raw, cell=trimmed(raw))

    def is_wrong(self, raw: str) -> str:
        """Return SQL for whether a raw cell cannot be read, or is empty and may not be."""
        cell = trimmed(raw)
        is_wrong = self.wrong_sql.format(value=self.typed(raw), raw=raw, cell=cell)
        is_filled = f"NOT coalesce(lower({cell}), '') IN {self.empty}"
        return f"{is_filled} AND {is_wrong}" if self.may_be_empty else is_wrong

    def problem(self, count: int) -> str:
        """Return what is wrong with some cells."""
        says_empty = self.may_be_empty or self.unreadable.startswith("empty")
        problem = self.unreadable if says_empty else f"empty or {self.unreadable}"
        return f"{count_cells(count)} {problem}{self.advice and f': {self.advice}'}"


class Word(Column):
    """A short text."""

    sql = f"coalesce(trim(left({{raw}}::VARCHAR, {MAX_WORD})), '')"
    wrong_sql = "{value} = ''"

    def is_wrong(self, raw: str) -> str:
        """Return SQL for whether a raw cell is empty and may not be."""
        return "false" if self.may_be_empty else super().is_wrong(raw)


class WrittenId(Word):
    """The id of a patient: 10001.0 is 10001, and 010001 stays."""

    sql = rf"regexp_replace({Word.sql}, '^(\d+)(\.0+)?$', '\1')"


class Id(Word):
    """The key of a patient: 10001.0 and 010001 are 10001."""

    sql = rf"regexp_replace({Word.sql}, '^0*(\d+)(\.0+)?$', '\1')"
    wrong_sql = (
        "{value} = '' OR typeof({raw}) = 'VARCHAR' "  # others need no look
        f"AND (length({{cell}}) > {MAX_ID} OR regexp_matches({{cell}}, '{NO_ID}'))"
    )
    unreadable = f"empty, over {MAX_ID} characters, rounded (1.2E+16) or with control characters"


class Number(Column):
    """A number; NaN, which would be above all others, is none."""

    sql = "nullif(TRY_CAST({cell} AS DOUBLE), 'nan'::DOUBLE)"
    unreadable = "not a number"


class Whole(Column):
    """A whole number, as a key is."""

    sql = f"TRY_CAST({Number.sql} AS BIGINT)"
    # BIGINT has rounded 1.5; a CASE in ``sql`` would be slow.
    wrong_sql = (
        "coalesce(TRY_CAST({cell} AS DOUBLE) % 1 != 0 "
        f"OR abs(TRY_CAST({{cell}} AS DOUBLE)) >= {LARGEST_WHOLE}, true)"
    )
    unreadable = "not a whole number"


@dataclass(frozen=True, kw_only=True)
class Label(Column):
    """1 for the words of ``positive`` and 0 for all others, by default for yes and no."""

    positive: tuple[str, ...] = ()

    empty = NOT_KNOWN
    unreadable = "neither 0 nor 1, Yes nor No"

    def typed(self, raw: str) -> str:
        """Return SQL for 1, 0 or NULL."""
        ones = ", ".join(duck.literal(word.strip().lower()) for word in self.positive or YES)
        is_zero = f"NOT IN {NOT_KNOWN}" if self.positive else f"IN {NO}"
        word = f"lower({trimmed(raw)})"
        return f"CASE WHEN {word} IN ({ones}) THEN 1 WHEN {word} {is_zero} THEN 0 END"


@dataclass(frozen=True, kw_only=True)
class Instant(Column):
    """A time in ISO's order or in one of some formats; with a zone it becomes UTC."""

    formats: tuple[str, ...] = ()
    zoned: bool = False

    sql = (
        f"CASE WHEN regexp_full_match({{cell}}, '{MOMENT}') "
        "THEN TRY_CAST({cell} AS TIMESTAMP) END"
    )

    @property
    def unreadable(self) -> str:
        """What a cell is that cannot be read."""
        with_zone = self.zoned and not self.formats
        example = "2150-01-31T08:30:00+02:00" if with_zone else "2150-01-31 08:30:00, without zone"
        return f"not a time such as {example}"

    def typed(self, raw: str) -> str:
        """Return SQL for the time of a raw cell."""
        cell = trimmed(raw)
        if self.formats:
            formats = sorted(self.formats, key=lambda form: "%y" not in form)
            listed = ", ".join(map(duck.literal, formats))
            time = f"try_strptime({cell}, [{listed}])::TIMESTAMP"
            return f"CASE WHEN year({time}) > 999 THEN {time} END"  # %Y takes 24 for the year 24
        if self.zoned:
            local = f"TRY_CAST(left({cell}, -length(zone_of({cell}))) AS TIMESTAMP)"
            time = f"{local} - to_minutes(zone_minutes(zone_of({cell})))"
            return f"CASE WHEN regexp_full_match({cell}, '{ZONED}') THEN {time} END"
        return super().typed(raw)


class Time(Instant):
    """A time that is cut to seconds."""

    sql = f"date_trunc('second', {Instant.sql})"


class ExcelDay(Instant):
    """A time as Excel stores it, in days."""

    sql = (
        f"CASE WHEN {Number.sql} BETWEEN {EXCEL_DAYS[0]} AND {EXCEL_DAYS[1]} THEN "
        f"make_timestamp((round(({Number.sql} - {EXCEL_1970}) * 86400) * 1000000)::BIGINT) END"
    )
    unreadable = f"not a day of Excel between {EXCEL_DAYS[0]} and {EXCEL_DAYS[1]}"


@dataclass(frozen=True)
class Counted(Instant):
    """A time that is counted from an arbitrary day, in a unit of MICROSECONDS."""

    unit: str

    unreadable = "not a finite number"

    def typed(self, raw: str) -> str:
        """Return SQL for the time of a number."""
        count = f"round({NUMBER.typed(raw)} * {MICROSECONDS[self.unit]})"
        return f"make_timestamp(TRY_CAST({count} AS BIGINT))"


class Text(Column):
    """A whole text, empty where there is none."""

    sql = "coalesce({cell}, '')"
    wrong_sql = "false"


class Zone(Text):
    """The zone of a time."""

    sql = "coalesce(nullif(zone_of({cell}), ''), 'Z')"


class Line(Text):
    """The number of a line, equal for equal lines."""

    sql = "{raw}"


@dataclass(frozen=True, kw_only=True)
class Value(Text):
    """A number, or else a text, with its decimal sign and whether a flag stood beside it."""

    decimal: str = ""  # sign of decimals, ``comma`` or ``point``; empty: either
    stored: str = "false"  # SQL for whether a cell is stored as a number, not as a text

    def steps(self, raw: str) -> dict[str, str]:
        """Return SQL for the whole cell, without a flag, and with a decimal point."""
        # Within each other these macros are a hundred times as long, and slow to plan.
        whole, cell, pointed = value_steps(raw)
        with_point = f"with_point({cell}, '{self.decimal}')"
        return {
            whole: trimmed(raw),
            cell: f"without_flag({whole})",
            pointed: f"CASE WHEN {self.stored} THEN {cell} ELSE {with_point} END",
        }

    def typed(self, raw: str) -> str:
        """Return SQL for number, text, sign, thousands and flagged, of the steps."""
        whole, cell, pointed = value_steps(raw)
        number, empty = NUMBER.typed(pointed), f"lower({cell}) IN ('', 'nan')"
        text = f"left(CASE WHEN is_limit({pointed}) THEN {pointed} ELSE {cell} END, {MAX_WORD})"
        text = f"CASE WHEN {number} IS NULL AND NOT {empty} THEN {text} END"
        sign = f"CASE WHEN {self.stored} THEN '' ELSE sign_of({cell}) END"
        flagged = f"CASE WHEN {self.stored} THEN false ELSE {cell} != {whole} END"
        return (
            f"{{'number': {number}, 'text': {text}, 'sign': {sign}, "
            f"'thousands': may_be_thousands({cell}), 'flagged': {flagged}}}"
        )


def value_steps(raw: str) -> list[str]:
    """Return the quoted names of the steps of a raw cell."""
    column = raw.strip('"')
    return [duck.quoted(f"{step} {column}") for step in ("whole", "cell", "pointed")]


KEY, KEY_OR_EMPTY = Whole(), Whole(may_be_empty=True)
NUMBER, NUMBER_OR_EMPTY = Number(), Number(may_be_empty=True)
TIME, TIME_OR_EMPTY = Time(), Time(may_be_empty=True)
WORD, WORD_OR_EMPTY = Word(), Word(may_be_empty=True)
