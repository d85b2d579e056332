"""A table of the DKA format read slowly: cell by cell, by the rules of the page on data files."""

import re

MAIN, LABEL, HOURS = "clinical_trajectory", "label_escalation", "prediction_hours"
UNITS = ("h", "hr", "hrs", "hour", "hours")
LARGEST = 3.4028234663852886e38


def number(text):
    """Read a sign, digits with a point among them, an exponent; None for all else."""
    mantissa, letter, exponent = text.replace("E", "e").partition("e")
    mantissa, exponent = (part[part[:1] in ("+", "-") :] for part in (mantissa, exponent))
    digits = mantissa.replace(".", "", 1)
    if not digits or set(digits + exponent) - set("0123456789"):
        return None
    return float(text) if exponent or not letter else None


def observations(text):
    """Read (hours, value) in the order of writing; None where the contract refuses the text."""
    pairs = []
    for part in text.replace("\u2192", "->").split("->"):
        value, _, rest = part.partition("(")
        inner, bracket, behind = rest.partition(")")
        time, letter, more = inner.lower().partition("h")
        found, hour = number(value.strip()), number(time.strip())
        if not bracket or behind.strip() or (letter + more).strip() not in UNITS:
            return None
        if found is None or hour is None or abs(found) > LARGEST or abs(hour) > 1e6:
            return None
        pairs.append((hour, found))
    return pairs


def union(series, most):
    """Join series by time: the k-th value at a time stands with the k-th of the others."""
    table = {}
    for f, pairs in enumerate(series):
        seen = {}
        for hours, value in pairs:
            seen[hours] = seen.get(hours, -1) + 1
            table.setdefault((hours, seen[hours]), [None] * len(series))[f] = value
    return [(hours, *values) for (hours, _), values in sorted(table.items())][-most:]


def statics(row):
    return [name for name in row if name.startswith("static_")]


def read_slowly(rows, series, most, *, chunk=False):
    """Read rows of text by their number; of a chunk to score neither split nor label is refused.

    Returns:
        Each row's name, patient, label, context, part, prediction time, static features and
        observations; and the wrong cells as (number, column).
    """
    content, wrong, parts, names_before = {}, set(), {}, set()
    for n, cells in rows.items():
        row = {name: cell.strip() for name, cell in cells.items()}
        found = [observations(row[name]) if row[name] else [] for name in series]
        bad = {name for name, pairs in zip(series, found, strict=True) if pairs is None}
        empty = not any(row[name] for name in series)  # leaves a training, and has no risk
        bad |= {MAIN} if empty and chunk else set()
        text = {"true": "1", "false": "0"}.get(row[LABEL].lower(), row[LABEL])
        label = number(text) if text and number(text) in (0, 1) else None
        bad |= {LABEL} if label is None and not chunk else set()
        names = [name for name in ("subject_id", "id") if name in row]
        patient, name = (row[names[k]] if names else str(n) for k in (0, -1))
        name = name or patient
        numbered = (f"{name} ({k})" for k in range(2, 99)) if name else ()
        name = next((x for x in (name, *numbered) if x not in names_before), name)
        names_before.add(name)
        bad |= set() if patient else {names[0]}
        bad |= {column for column in names if re.search(r"[\x00-\x1f]", row[column])}
        patient = re.sub(r"^0*([0-9]+)(\.0+)?$", r"\1", patient)
        part = row.get("split", "").lower().replace("validation", "val")
        if "split" in row and not chunk:
            known = part in ("train", "val", "test") and parts.setdefault(patient, part) == part
            bad |= set() if known else {"split"}
        numbers = {}
        for column in [*statics(row), *[HOURS] * (HOURS in row)]:
            text = {"true": "1", "false": "0"}.get(row[column].lower(), row[column])
            largest = 1e6 if column == HOURS else LARGEST
            numbers[column] = number(text) if text else None
            if text and (numbers[column] is None or abs(numbers[column]) > largest):
                bad.add(column)
        asked = numbers.get(HOURS)
        if not (bad or empty) and asked is not None:
            bad |= {HOURS} if asked < max(hour for pairs in found for hour, _ in pairs) else set()
        wrong |= {(n, column) for column in bad}
        if not (bad or empty):
            static = [numbers[column] for column in statics(row)]
            about = label, row.get("clinical_context", ""), part, asked, static
            content[n] = (name, patient, *about, union(found, most))
    return content, wrong
