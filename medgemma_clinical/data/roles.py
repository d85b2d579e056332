"""Tables with one value a row: what their columns hold, found by their usual names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

MAX_ID = 300  # characters
NO_ID = r"[\x00-\x1f\x7f-\x9f]|^[0-9](?:[.,][0-9]+)?[eE]\+[0-9]+$"
"""Control characters, which end a line of a table, and a long number that Excel has rounded."""

SUBJECT_NAMES = (
    *("subject_id", "subject", "patient_id", "patient", "patient_no", "patient_number"),
    *("mrn", "record_id", "pid", "id"),
)
TIME_NAMES = ("time", "charttime", "collected", "collection_time", "drawn", "date_time")
ROLES = {
    "subject_id": SUBJECT_NAMES,
    "time": (*TIME_NAMES, "collection_date", "timestamp", "date"),
    "item": ("item", "itemid", "analyte", "test", "test_name", "lab", "parameter", "code"),
    "value": ("valuenum", "value", "result"),  # beside a number, MIMIC's value is a text
    "unit": ("unit", "units", "valueuom", "uom"),
    "storetime": ("storetime", "result_time", "resulted", "reported"),
}
"""Columns of a table by what they hold, and their usual names."""

LABEL_ROLES = {
    "labels.subject_id": SUBJECT_NAMES,
    "prediction_time": ("prediction_time",),
    "label": ("label", "label_escalation", "outcome", "event"),
    "id": (),  # of a row, as a stay number
    "end_time": (),  # of the stay
    "event_time": (),  # or the end of the record
    "event": (),  # its number or word, by then
}
NOTE_ROLES = {
    "notes.subject_id": SUBJECT_NAMES,
    "notes.time": TIME_NAMES,
    "notes.storetime": ROLES["storetime"],
    "notes.text": ("text", "note", "note_text", "report", "free_text"),
}
MALE = ("male", "m", "man", "männlich", "mann", "homme", "hombre", "uomo")
FEMALE = ("female", "f", "w", "v", "woman", "vrouw", "weiblich", "frau", "femme", "mujer", "donna")
SEXES = ("male", "female")
OTHER_SEX = ("d", "x", "o", "u", "diverse", "divers", "other", "unknown", "unbekannt")
SEX = re.compile(r"sexe?|sexo|sesso|gender|genre|geschlecht|geslacht", re.IGNORECASE)
SITE_COLUMN = re.compile(
    r"(?:static_)?(?:hospital|site|cent(?:er|re)|clinic|facility|ward|department|klinik|krankenhaus|"
    r"station|abteilung)(?:[ _]?(?:id|name|code|no))?([ _].+)?",
    re.IGNORECASE,
)
SITE_INPUT = (
    "a hospital or ward is an input: a model of it cannot read the file of another hospital, which "
    "lacks its columns"
)
SEX_COLUMN = re.compile(
    r"static_(?:sexe?|sexo|sesso|gender|genre|geschlecht|geslacht)[ _](.+)", re.IGNORECASE
)
WORDS = {
    role: re.compile(words, re.IGNORECASE)
    for role, words in {
        "subject_id": r"pat|subject|person|mrn|\bpid|\bipp|\bnhc|bsn|case.?id",
        "time": r"collect|taken|drawn|specim|sample|chart|draw|abnahme|entnahme|pr[ée]l[eè]v"
        r"|extracc|afname|prelievo|toma|time|zeit|heure|hora|tijd",
        "storetime": r"result|stor|report|releas|valid|verif|final|freigabe|befund|rendu|autoris"
        r"|referto|uitslag|informe",
        "item": r"item|test|analy|component|param|lab|untersuch|exam|prueba|bepaling|libell"
        r"|determin|name|bezeich|omschr|descri",
        "value": r"value|result|wert|ergebnis|valeur|r[ée]sultat|valor|risultato|uitslag|waarde",
        "unit": r"unit|einheit|unidad|eenheid",
        "prediction_time": r"admi|aufnahme|entr[ée]e|ingreso|ricovero|opname|begin|start|index"
        r"|arriv",
        "end_time": r"disch|\bleft\b|depart|entlass|sortie|\balta\b|dimission|ontslag|\bexit"
        r"|\bend|leave|ende\b",
        "age": r"\bage\b|alter\b|\bâge\b|edad|\bet[aà]\b|leeftijd",
        "birth": r"birth|geb|naiss|nacim|nascita|\bdob\b",
        "death": r"death|dea?d|died|tod|verst|d[ée]c[eè]s|fallec|defunc|decess|overl|exitus",
    }.items()
}
"""Words in the names of columns, in some languages, by what these may hold."""
EVENT_ROLES = ("event_time", "event")
OPTIONAL = ("unit", "storetime", "id", "notes.storetime", "end_time", *EVENT_ROLES)
HINTS = {
    "prediction_time": ", or --prediction_time 'COLUMN + 48 h'",
    "label": ", or --event_time and --event, or --no_labels",
}


def find_column(header: Sequence[str], *names: str) -> str | None:
    """Return the column of the first name that a header has; case and signs do not count."""
    columns = {_normalized(name): name for name in reversed(header)} | {
        name: name for name in header
    }
    matches = (columns.get(name, columns.get(_normalized(name))) for name in names if name)
    return next((name for name in matches if name is not None), None)


def columns_alike(header: Sequence[str], column: str, *names: str) -> list[str]:
    """Return the columns that one of some names could mean as well as ``column``."""
    if column in names:
        return [name for name in header if name == column]
    return [name for name in header if _normalized(name) == _normalized(column)]


def _normalized(name: str) -> str:
    """Return ``patientid`` of ``Patient_ID``, ``result`` of ``Result (mg/dL)``."""
    return re.sub(r"[\W_]+", "", re.sub(r"[(\[].*", "", name)).casefold()


def sex_of_column(name: str) -> str | None:
    """Return the sex of those with 1 in a static column: man, woman, or another word; else None."""
    found, bare = SEX_COLUMN.fullmatch(name), name.removeprefix("static_").casefold()
    word = found[1].casefold() if found else bare if len(bare) > 1 else ""
    if word in (*MALE, *FEMALE):
        return "man" if word in MALE else "woman"
    return word if found else None


def is_site(name: str, *, is_category: bool = False) -> bool:
    """Return whether a column names hospitals or wards, or one of them if it is a category's."""
    found = SITE_COLUMN.fullmatch(name)
    return found is not None and (is_category or not found[1])


def find_roles(
    header: Sequence[str], roles: Mapping[str, Sequence[str]], mapped: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each role that a header has, by its own name where one is mapped."""
    names = {role: (mapped[role],) if role in mapped else roles[role] for role in roles}
    columns = {role: find_column(header, *names[role]) for role in roles}
    return {role: name for role, name in columns.items() if name is not None}


def from_long_command(header: Sequence[str], source: str) -> str:
    """Return the command to type for a table with one value a row, nothing for any other."""
    columns = find_roles(header, ROLES, {})
    if len({"subject_id", "time", "item", "value"} & columns.keys()) < 3 or "value" not in columns:
        return ""
    table = "TABLE.csv" if source == "DataFrame" else source
    words = ["python", "dataset_format.py", "from_long", "--preview", "--table", table]
    return f"{shlex.join(words)} --labels PATIENTS.csv --out data.csv"
