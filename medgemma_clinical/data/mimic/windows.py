"""Prediction times: when each admission is asked, and what is known by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from medgemma_clinical.data.mimic.analytes import ANALYTES, ANION_GAP, CHEMISTRY
from medgemma_clinical.data.mimic.request import GAP_ITEM, MISSING, REPORTED, Extraction
from medgemma_clinical.data.mimic.values import COMPUTED_GAP

HIGH_GLUCOSE, LOW_BICARBONATE, LOW_PH = 250.0, 18.0, 7.30
"""mg/dL, mEq/L, and no unit. Source: Kitabchi 2009, diagnosis of ketoacidosis."""

CLOSED_GAP = 12.0
"""mEq/L; a gap at or below it is closed. Source: Kitabchi 2009, resolution of ketoacidosis."""


@dataclass(frozen=True)
class Windows:
    """Window of each admission, (A,) by its place.

    Attributes:
        first: time of the first value that counts, NaT where there is none.
        time: the prediction time.
        gap_item: item of the anion gap, reported or computed, that the admission uses.
    """

    first: pd.Series
    time: pd.Series
    gap_item: pd.Series


def find_windows(values: pd.DataFrame, item: int, request: Extraction, count: int) -> Windows:
    """Find the first value of each admission and so its prediction time.

    A value is the first only if it is stored within the window that it opens: else nobody could
    know at the prediction time when that is. No series mixes reported and computed gaps, which
    differ by potassium: an admission uses computed ones alone if all admissions do, or if it has
    no reported one by then.

    Args:
        values: ``stay``, ``item``, ``chart``, ``known``.
        item: of the series.
        request: gives the window, and whose gap is computed.
        count: of the admissions, A.
    """
    timely = values[values["known"] <= values["chart"] + request.window]

    def first_of(wanted: int) -> pd.Series:
        of_item = timely[timely["item"] == wanted]
        return of_item.groupby("stay")["chart"].min().reindex(range(count))

    if request.compute_gap != MISSING:
        gap = GAP_ITEM if request.compute_gap == REPORTED else COMPUTED_GAP
        first = first_of(gap if item == GAP_ITEM else item)
        return Windows(first, first + request.window, pd.Series(gap, index=first.index))
    first = first_of(item)
    time = first + request.window
    reported = timely if item == GAP_ITEM else values
    reported = reported[reported["item"] == GAP_ITEM]
    known = reported.groupby("stay")["known"].min().reindex(first.index)
    if item != GAP_ITEM:
        return Windows(first, time, known.le(time).map({True: GAP_ITEM, False: COMPUTED_GAP}))
    computed = first_of(COMPUTED_GAP)
    uses_computed = (known > computed + request.window) | known.isna()
    first = first.mask(uses_computed, computed)
    gap_item = uses_computed.map({True: COMPUTED_GAP, False: GAP_ITEM})
    return Windows(first, first + request.window, gap_item)


def of_stay(values: pd.DataFrame, column: pd.Series) -> Any:
    """Return for each value the entry of its admission in a column, (n,)."""
    return column.to_numpy()[values["stay"].to_numpy()]


def known_inputs(values: pd.DataFrame, windows: Windows) -> pd.DataFrame:
    """Keep the values charted within the window and stored by its end: a model's only inputs."""
    first, time = of_stay(values, windows.first), of_stay(values, windows.time)
    within = (first <= values["chart"]) & (values["chart"] <= time) & (values["known"] <= time)
    return values[within]


def analyte_names(inputs: pd.DataFrame, windows: Windows) -> pd.Series:
    """Name the analyte of each value; of the two anion gaps only the one its admission uses."""
    names = {item: a.name for item, a in ANALYTES.items() if item != GAP_ITEM}
    gap = inputs["item"] == of_stay(inputs, windows.gap_item)
    return inputs["item"].map(names).mask(gap, ANION_GAP.name)


def in_ketoacidosis(inputs: pd.DataFrame, windows: Windows, count: int) -> pd.Series:
    """Return which admissions are in ketoacidosis by what is known within the window, (A,)."""
    by_stay = inputs["value"].groupby([inputs["stay"], analyte_names(inputs, windows)])
    names = [analyte.name for analyte in CHEMISTRY]

    def table(extreme: pd.Series) -> pd.DataFrame:
        return extreme.unstack().reindex(index=range(count), columns=names).astype(float)

    low, high = table(by_stay.min()), table(by_stay.max())
    return (
        (high["glucose"] > HIGH_GLUCOSE)
        & (low["bicarbonate"] <= LOW_BICARBONATE)
        & (high[ANION_GAP.name] > CLOSED_GAP)
        & ~(low["pH"] > LOW_PH)
    )
