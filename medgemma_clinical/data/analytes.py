"""The chemistry of a hospital's laboratory: items, units and the factors between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medgemma_clinical.data.dka import comparable
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.files import InputError

GAP_ITEM = 50868
"""Item of the anion gap that the laboratory reports. Source: d_labitems of MIMIC-IV."""

COMPUTED_GAP = -1  # item of the computed anion gap, which MIMIC-IV does not have

GAP_COMPONENTS = (50983, 50902, 50882)
"""Serum sodium, chloride and bicarbonate: the gap is the first less the others."""

ALL_SERIES = "all"

CHEMISTRY = (
    Feature("anion gap", "mEq/L", (GAP_ITEM,), (-5.0, 60.0)),
    Feature("bicarbonate", "mEq/L", (50882,), (3.0, 60.0)),
    Feature("chloride", "mEq/L", (50902, 50806), (50.0, 160.0)),
    Feature("creatinine", "mg/dL", (50912,), (0.1, 30.0)),
    Feature("glucose", "mg/dL", (50931, 50809), (5.0, 2500.0)),
    Feature("lactate", "mmol/L", (50813,), (0.1, 40.0)),
    Feature("pH", "", (50820,), (6.5, 8.0)),
    Feature("potassium", "mEq/L", (50971, 50822), (1.0, 12.0)),
    Feature("sodium", "mEq/L", (50983, 50824), (90.0, 200.0)),
    Feature("urea nitrogen", "mg/dL", (51006,), (1.0, 300.0)),
)
"""Keys are MIMIC-IV's itemids: the serum's first, then the blood gas machine's.
Source: itemid and valueuom, d_labitems and labevents of MIMIC-IV."""

FACTORS = {
    "creatinine": {"mg/dl": 1.0, "umol/l": 0.011312},
    "glucose": {"mg/dl": 1.0, "mmol/l": 18.016},
    "lactate": {"mmol/l": 1.0, "mg/dl": 0.11101},
    "pH": {"units": 1.0, "ph": 1.0, "": 1.0},
    "urea nitrogen": {"mg/dl": 1.0, "mmol/l": 2.801},
}
"""Factors of units in small letters, to convert to the unit above; those of the others are
``EQUIVALENT``. Source: molar masses of glucose 180.16, creatinine 113.12, lactate 90.08, nitrogen
of urea 28.01 g/mol."""

UNIT_RATIOS = {
    r"crea|krea|creatinine?|kreatinin\w*|cr[eé]atinin\w*": (88.40,),  # umol/L to a mg/dL
    r"glucose|glukose|glicose|glyc[eé]mie|blutzucker": (18.016,),  # mg/dL to a mmol/L
    r"lactate?|laktat|lactato": (9.008,),  # mg/dL to a mmol/L
    # mg/dL of nitrogen, and of urea, to a mmol/L of urea; urea to its nitrogen.
    r"urea|bun|harnstoff\w*|ur[eé]e|ureia": (2.801, 6.006, 2.144),
    r"h(a?e)?moglobin\w*|h(ä|é)moglobin\w*|hgb|hb": (10.0, 1.611, 16.11),  # g/L, g/dL, mmol/L
    r"bilirubin\w*": (17.10,),  # umol/L to a mg/dL
}
"""Ratios of the units in use, by a word of a series' name, the whole of it.
Source: molar masses as above; urea 60.06, bilirubin 584.7, haemoglobin's monomer 16,114 g/mol."""

PREFIXES = {"": 1, "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "\N{MICRO SIGN}": 1e-6, "n": 1e-9}
PREFIXES |= {"\N{GREEK SMALL LETTER MU}": 1e-6, "p": 1e-12, "k": 1e3}
QUANTITY = re.compile(rf"({'|'.join(sorted(PREFIXES, reverse=True))})(g|mol|[lL]|I?U|eq|Eq)(?=/|$)")

EQUIVALENT = {"meq/l": 1.0, "mmol/l": 1.0}  # factors of units for ions of one charge

ANALYTES = {int(item): analyte for analyte in CHEMISTRY for item in analyte.keys}


def feature_of(analyte: Feature, gap_item: int, items: tuple[int | str, ...] = ()) -> Feature:
    """Return the feature of an analyte's items, or of some of them, with the gap that is used."""
    if GAP_ITEM not in analyte.keys or gap_item == GAP_ITEM:
        return Feature(analyte.name, analyte.unit, items or analyte.keys, analyte.plausible)
    # Another quantity than the reported gap: no model of one may pass for one of the other.
    name = f"{analyte.name} without potassium"
    return Feature(name, analyte.unit, (COMPUTED_GAP,), analyte.plausible)


def unit_ratios(name: str) -> tuple[float, ...]:
    """Return the ratios of the units in which laboratories give a series, none where unknown."""
    words = re.findall(r"\w+", comparable(name))
    return next(
        (x for pattern, x in UNIT_RATIOS.items() if any(re.fullmatch(pattern, w) for w in words)),
        (),
    )


def prefix_ratios(unit: str, target: str) -> tuple[float, ...]:
    """Return the ratio of units that differ in their prefixes alone, as mg/dL and mg/L."""
    parts = [QUANTITY.findall(text) for text in (unit, target)]
    bases = [[base.lower() for _, base in part] for part in parts]
    if len(parts[0]) != 2 or bases[0] != bases[1]:
        return ()
    one, other = (PREFIXES[above] / PREFIXES[below] for (above, _), (below, _) in parts)
    return (one / other,)


def choose_features(names: Sequence[str], gap_item: int) -> list[Feature]:
    """Return the features of some analytes by name, or of all, the anion gap first."""
    analytes = {comparable(analyte.name): analyte for analyte in CHEMISTRY}
    keys = [comparable(name) for name in names]
    keys = list(analytes) if keys == [ALL_SERIES] else keys
    for key, name in zip(keys, names, strict=False):
        if key not in analytes:
            all_names = ", ".join(analyte.name for analyte in CHEMISTRY)
            raise InputError(f"--series {name}: no such series: all, or some of {all_names}")
    if len(set(keys)) < len(keys):
        raise InputError("--series: name each series once")
    return [feature_of(analytes[key], gap_item) for key in keys]


def items_to_read(features: Sequence[Feature]) -> set[int]:
    """Return the items whose values features are made of."""
    items = {int(key) for feature in features for key in feature.keys}
    return items - {COMPUTED_GAP} | (set(GAP_COMPONENTS) if COMPUTED_GAP in items else set())


def find_factors(units: pd.DataFrame, features: Sequence[Feature], path: str) -> pd.DataFrame:
    """Add ``factor`` to items and units, NaN where unknown; refuse such units of ``features``."""
    factors = pd.Series(np.nan, index=units.index)
    for item in units["item"].unique().tolist():
        unit_texts = units.loc[units["item"] == item, "unit"]
        lower = unit_texts.str.lower()
        # Of an item that is no analyte the one unit is read that it has.
        factor_of = {min(filter(None, lower), default=""): 1.0}
        if item in ANALYTES:
            factor_of = FACTORS.get(ANALYTES[item].name, EQUIVALENT)
        if item in items_to_read(features) and not set(lower) - {""} <= factor_of.keys():
            units_text = ", ".join(map(repr, sorted(set(unit_texts) - {""})))
            problem = "nothing converts them"
            if item in ANALYTES:
                problem = f"the units must be among {', '.join(factor_of)}"
            raise InputError(f"{path}: item {item} has values in {units_text}: {problem}")
        factors[unit_texts.index] = lower.map(factor_of)
    return units.assign(factor=factors.astype(float))
