"""The chemistry that is read from labevents, and its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medgemma_clinical.data.dka.description import comparable
from medgemma_clinical.data.mimic.request import ALL_SERIES, ALWAYS, COMPUTED_GAP, GAP_ITEM
from medgemma_clinical.data.texts import Reference
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


@dataclass(frozen=True)
class ItemSeries:
    """A series of the rows.

    Attributes:
        name: in texts and columns.
        items: itemids of its values.
        sources: itemids that have to be read for it; they may not lose a value.
        unit: of its values, "" where it has none, None where the table has to tell it.
        plausible: lowest and highest value of a living patient, None where unknown.
        reference: the most frequent reference range beside its values, None where there is none.
    """

    name: str
    items: tuple[int, ...]
    sources: tuple[int, ...]
    unit: str | None
    plausible: tuple[float, float] | None
    reference: Reference | None = None


def series_of(analyte: Analyte, compute_gap: str, items: tuple[int, ...] = ()) -> ItemSeries:
    """Return the series of an analyte; of some of its items where they are given."""
    items = items or analyte.items
    if analyte is not ANION_GAP:
        return ItemSeries(analyte.name, items, items, analyte.unit, analyte.plausible)
    if compute_gap == ALWAYS:
        # Another quantity than the reported gap: no model of one may pass for one of the other.
        name = f"{analyte.name} without potassium"
        return ItemSeries(name, (COMPUTED_GAP,), GAP_COMPONENTS, analyte.unit, analyte.plausible)
    gaps = (GAP_ITEM, COMPUTED_GAP)  # of each admission only the one that it uses is an input
    return ItemSeries(analyte.name, gaps, items, analyte.unit, analyte.plausible)


def choose_series(names: Sequence[str], compute_gap: str) -> list[ItemSeries]:
    """Return the series of some analytes by name, or of all, the anion gap first.

    Raises:
        InputError: no such analyte, or one twice.
    """
    known = {comparable(analyte.name): analyte for analyte in CHEMISTRY}
    wanted = [comparable(name) for name in names]
    wanted = list(known) if wanted == [ALL_SERIES] else wanted
    for name, shown in zip(wanted, names, strict=False):
        if name not in known:
            all_names = ", ".join(analyte.name for analyte in CHEMISTRY)
            raise InputError(f"--series {shown}: no such series: all, or some of {all_names}")
    if len(set(wanted)) < len(wanted):
        raise InputError("--series: name each series once")
    return [series_of(known[name], compute_gap) for name in wanted]


def find_factors(units: pd.DataFrame, series: Sequence[ItemSeries], path: str) -> pd.DataFrame:
    """Find the factors that convert the values of each item to one unit.

    Args:
        units: ``item``, ``unit`` as written, empty where there is none, ``count`` of its values.
        series: whose values may not be left out.
        path: of the table, for errors.

    Returns:
        ``item``, ``unit``, ``factor``, ``count``; a factor of NaN where a unit is unknown.

    Raises:
        InputError: an item of a series has an unknown unit, or several that nothing converts.
    """
    sources = {item for each in series for item in each.sources}
    factors = pd.Series(np.nan, index=units.index)
    for item in units["item"].unique().tolist():
        rows = units["item"] == item
        written = units.loc[rows, "unit"]
        spelling = {unit.lower(): unit for unit in sorted(set(written), reverse=True)}
        known = _factors(item, spelling)
        if item in sources:
            _check_units(item, spelling, known, path)
        factors[rows] = written.str.lower().map(known)
    return units.assign(factor=factors.astype(float))


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
