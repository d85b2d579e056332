"""The chemistry that is read from labevents, and its units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medgemma_clinical.data.mimic.request import GAP_ITEM
from medgemma_clinical.files import InputError

EQUIVALENT = {"meq/l": 1.0, "mmol/l": 1.0}
"""Factors of units for ions of one charge."""


@dataclass(frozen=True)
class Analyte:
    """A measured substance.

    Attributes:
        name: as texts write it.
        unit: of all values here.
        items: MIMIC-IV's itemids: the serum's first, then the blood gas machine's.
        plausible: lowest and highest value of a living patient.
        factors: of each unit in small letters, to convert to ``unit``.

    Source: itemid and valueuom, d_labitems and labevents of MIMIC-IV; molar masses of glucose
    180.16, creatinine 113.12, lactate 90.08, nitrogen of urea 28.01 g/mol.
    """

    name: str
    unit: str
    items: tuple[int, ...]
    plausible: tuple[float, float]
    factors: dict[str, float]


ANION_GAP = Analyte("anion gap", "mEq/L", (GAP_ITEM,), (-5.0, 60.0), EQUIVALENT)
CHEMISTRY = (
    ANION_GAP,
    Analyte("bicarbonate", "mEq/L", (50882,), (3.0, 60.0), EQUIVALENT),
    Analyte("chloride", "mEq/L", (50902, 50806), (50.0, 160.0), EQUIVALENT),
    Analyte("creatinine", "mg/dL", (50912,), (0.1, 30.0), {"mg/dl": 1.0, "umol/l": 0.011312}),
    Analyte("glucose", "mg/dL", (50931, 50809), (5.0, 2500.0), {"mg/dl": 1.0, "mmol/l": 18.016}),
    Analyte("lactate", "mmol/L", (50813,), (0.1, 40.0), {"mmol/l": 1.0, "mg/dl": 0.11101}),
    Analyte("pH", "", (50820,), (6.5, 8.0), {"units": 1.0, "ph": 1.0, "": 1.0}),
    Analyte("potassium", "mEq/L", (50971, 50822), (1.0, 12.0), EQUIVALENT),
    Analyte("sodium", "mEq/L", (50983, 50824), (90.0, 200.0), EQUIVALENT),
    Analyte("urea nitrogen", "mg/dL", (51006,), (1.0, 300.0), {"mg/dl": 1.0, "mmol/l": 2.801}),
)
ANALYTES = {item: analyte for analyte in CHEMISTRY for item in analyte.items}

GAP_COMPONENTS = (50983, 50902, 50882)
"""Serum sodium, chloride and bicarbonate: the gap is the first less the others."""

DIGITS = 6
"""Decimals of converted and computed values, as exact as any laboratory prints."""


@dataclass(frozen=True)
class ConvertedValues:
    """Values in one unit for each item: ``table``; the series' unit; counts of those left out."""

    table: pd.DataFrame
    series_unit: str
    left_out: Counter[str]


def convert_units(values: pd.DataFrame, series_items: Sequence[int], path: str) -> ConvertedValues:
    """Convert the values of each item to one unit; values of other units are left out.

    Args:
        values: columns ``item``, ``value``, and ``unit`` as written, empty where there is none.
        series_items: items of the series, which may not lose a value; the first gives its unit.
        path: of the table, for errors.

    Raises:
        InputError: an item of the series has an unknown unit, or several that nothing converts.
    """
    factor = np.full(len(values), np.nan)
    left_out: Counter[str] = Counter()
    main = series_items[0]
    series_unit = ANALYTES[main].unit if main in ANALYTES else ""
    for item in np.unique(values["item"]).tolist():
        rows = np.flatnonzero(values["item"] == item)
        units = values["unit"].iloc[rows].astype(str)
        spelling = {unit.lower(): unit for unit in sorted(set(units), reverse=True)}
        factors = _factors(item, spelling)
        if item in series_items:
            _check_units(item, spelling, factors, path)
        if item == main and item not in ANALYTES:
            series_unit = spelling[next(iter(factors))]
        factor[rows] = units.str.lower().map(factors).to_numpy(np.float64)
        if missing := int(np.isnan(factor[rows]).sum()):
            name = ANALYTES[item].name if item in ANALYTES else f"item {item}"
            left_out[f"of {name} in no unit or an unknown one"] = missing
    converted = values["value"] * factor
    converted = converted.where(factor == 1, converted.round(DIGITS))
    known = ~np.isnan(factor)
    table = values.assign(value=converted)[known].reset_index(drop=True)
    return ConvertedValues(table, series_unit, left_out)


def _factors(item: int, spelling: dict[str, str]) -> dict[str, float]:
    """Return the factors of an analyte's units, or of any other item's first unit alone."""
    if item in ANALYTES:
        return ANALYTES[item].factors
    return {min((unit for unit in spelling if unit), default=""): 1.0}


def _check_units(item: int, spelling: dict[str, str], factors: dict[str, float], path: str) -> None:
    named = sorted(unit for unit in spelling if unit)
    if all(unit in factors for unit in named):
        return
    units = ", ".join(repr(spelling[unit]) for unit in named)
    known = f"known are {', '.join(factors)}" if item in ANALYTES else "nothing converts them"
    raise InputError(f"{path}: item {item} has values in {units}: {known}")
