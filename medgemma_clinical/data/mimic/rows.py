"""Rows of the DKA format: series and context in words, and the description beside them."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.mimic.admissions import OLDEST_AGE
from medgemma_clinical.data.mimic.analytes import ANALYTES, CHEMISTRY
from medgemma_clinical.data.mimic.outcome import combine
from medgemma_clinical.data.mimic.request import COHORTS, GAPS, OUTCOMES, Extraction
from medgemma_clinical.data.mimic.values import COMPUTED_GAP
from medgemma_clinical.data.mimic.windows import Windows, analyte_names, of_stay
from medgemma_clinical.data.texts import plain
from medgemma_clinical.provenance import code_hash

FAR_OUT = 10.0
"""Without limits for an item, a value is suspicious so many interquartile ranges outside."""

MADE_BY = "made_by"
"""Key of the description that marks a file of this command."""


@dataclass(frozen=True)
class Item:
    """The item of the series: itemid, its name in texts, its unit."""

    number: int
    name: str
    unit: str


@dataclass(frozen=True)
class Candidates:
    """Everything that rows are made of, by place of the admission.

    Attributes:
        admissions: (A rows), see ``describe_admissions``.
        series: inputs that belong to the series.
        inputs: see ``known_inputs``.
        windows: of the A admissions.
        judged: (A rows), see ``judge``.
    """

    admissions: pd.DataFrame
    series: pd.DataFrame
    inputs: pd.DataFrame
    windows: Windows
    judged: pd.DataFrame


def make_rows(found: Candidates, left: pd.Series, item: Item, request: Extraction) -> pd.DataFrame:
    """Return the admissions that are left as rows of the DKA format.

    Args:
        found: of all A admissions.
        left: (A,) bool.
        item: of the series.
        request: names the outcome.
    """
    judged, inputs = found.judged[left], found.inputs[of_stay(found.inputs, left)]
    admissions = found.admissions[left].assign(unit=judged["unit"])
    series = found.series[of_stay(found.series, left)]
    components = {f"label_{name}": judged[name].astype("Int8") for name in OUTCOMES}
    return pd.DataFrame(
        {
            "subject_id": admissions["subject_id"],
            "hadm_id": admissions["hadm_id"],
            "clinical_trajectory": _series_text(series, found.windows),
            "clinical_context": _context(admissions, inputs, found.windows, item.number),
            "label_escalation": combine(judged, request.outcome).astype("Int8"),
            **components,
        }
    ).reset_index(drop=True)


def _series_text(series: pd.DataFrame, windows: Windows) -> pd.Series:
    """Write each admission's values with hours since the first."""
    hours = (series["chart"] - of_stay(series, windows.first)).dt.total_seconds() / 3600
    pairs = [
        f"{plain(v)} ({plain(round(h, 2))}h)" for v, h in zip(series["value"], hours, strict=True)
    ]
    return pd.Series(pairs, index=series.index).groupby(series["stay"]).agg(" -> ".join)


def _context(
    admissions: pd.DataFrame, inputs: pd.DataFrame, windows: Windows, item: int
) -> pd.Series:
    """Write what else is known at the prediction time, a sentence without full stop each.

    Age as known, sex, unit, hours since admission, the last value of each other analyte.
    """
    hours = (windows.time.loc[admissions.index] - admissions["start"]).dt.total_seconds() / 3600
    sex = admissions["gender"].str.upper().map({"F": "woman", "M": "man"}).fillna("patient")
    age = admissions["age"]
    years = age.where(~admissions["over"], age - 1).clip(upper=OLDEST_AGE)
    over = (admissions["over"] | (age > OLDEST_AGE)).map({True: "over ", False: ""})
    person = (over + years.map("{:.0f}-year-old".format)).str.capitalize() + " " + sex
    unit = admissions["unit"]
    place = unit.where(unit.fillna("") != "", "intensive care")
    place = place.where(unit.notna(), "not in intensive care")
    text = person + ", " + place + ", " + hours.round(1).map(plain) + " h since admission"
    chemistry = _last_chemistry(inputs, windows, item)
    return text + (", " + chemistry.reindex(admissions.index)).fillna("")


def _last_chemistry(inputs: pd.DataFrame, windows: Windows, item: int) -> pd.Series:
    """List the last value of each analyte but the series' own, by place of the admission."""
    of_series = ANALYTES[item].name if item in ANALYTES else ""
    units = {a.name: f" ({a.unit})" if a.unit else "" for a in CHEMISTRY}
    other = inputs.assign(name=analyte_names(inputs, windows))
    other = other[other["name"].notna() & other["name"].ne(of_series)]
    last = other.sort_values(["stay", "name", "chart", "known", "value"])
    last = last.drop_duplicates(["stay", "name"], keep="last")
    words = [
        f"{name} {plain(value)}{units[name]}"
        for name, value in zip(last["name"], last["value"], strict=True)
    ]
    return pd.Series(words, index=last["stay"], dtype=object).groupby(level=0).agg(", ".join)


@dataclass(frozen=True)
class Origin:
    """Where rows come from.

    Attributes:
        flow: ``rule``, ``removed`` and ``left`` of each rule.
        left_out: counts of values by the reason for which they were left out or resolved.
        stored: whether labevents has times of storing.
        hashes: SHA-256 of each table.
    """

    flow: list[dict[str, Any]]
    left_out: Counter[str]
    stored: bool
    hashes: dict[str, str]


def describe_rows(
    rows: pd.DataFrame, found: Candidates, item: Item, origin: Origin, request: Extraction
) -> dict[str, Any]:
    """Describe the rows for their readers: texts of the data set, definitions, counts, origin."""
    window, horizon = plain(request.window_hours), plain(request.horizon_hours)
    extracted = found.admissions["hadm_id"].isin(rows["hadm_id"])
    stored = "charted and stored by then" if origin.stored else "charted by then (no storetime)"
    text = request.outcome_text
    return {
        "series": item.name,
        "unit": item.unit,
        "question": f"Will the patient {text.question} within {horizon} hours?",
        "outcome": text.outcome,
        "plausible": _plausible(found.series["value"], item.number),
        "prediction_time": (
            f"{window} hours after the first value of each admission, for whoever is then "
            f"in hospital; only values {stored} are read"
        ),
        "horizon": f"{horizon} hours from then on",
        "flow": origin.flow,
        "rows": {
            "rows": len(rows),
            "patients": int(rows["subject_id"].nunique()),
            "events": int(rows["label_escalation"].sum()),
            "computed_gaps": int((found.windows.gap_item[extracted] == COMPUTED_GAP).sum()),
        },
        "values": dict(sorted(origin.left_out.items())),
        "definitions": {
            "cohort": COHORTS[request.cohort],
            "anion_gap": GAPS[request.compute_gap],
            "label_escalation": text.definition,
            **{f"label_{name}": outcome.definition for name, outcome in OUTCOMES.items()},
        },
        "arguments": {
            field.name: getattr(request, field.name)
            for field in fields(request)
            if field.name not in ("mimic_dir", "out")
        },
        "source": "MIMIC-IV (PhysioNet), under its data use agreement",
        "tables_sha256": dict(sorted(origin.hashes.items())),
        "versions": {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "code_sha256": code_hash(),
        },
        MADE_BY: "dataset_format.py from_mimic",
    }


def _plausible(values: pd.Series, item: int) -> tuple[float, float]:
    """Return the limits of a known analyte; of another item those far outside its quartiles."""
    if item in ANALYTES:
        return ANALYTES[item].plausible
    q1, q3 = np.quantile(values, [0.25, 0.75])
    reach = FAR_OUT * max(q3 - q1, abs(q3), 1.0)
    return round(float(q1 - reach), 3), round(float(q3 + reach), 3)
