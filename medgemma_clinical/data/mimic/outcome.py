"""Outcomes within the horizon: death, intensive care, an anion gap that stays or comes back."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from medgemma_clinical.data.mimic.request import Extraction
from medgemma_clinical.data.mimic.windows import CLOSED_GAP, Windows, of_stay

OPEN_AT_DISCHARGE = "outcome not known: discharged within the horizon with an open gap"
NOT_MEASURED = "outcome not known: anion gap not measured after the prediction time"


def judge(
    admissions: pd.DataFrame,
    icu: pd.DataFrame,
    gaps: pd.DataFrame,
    windows: Windows,
    request: Extraction,
) -> pd.DataFrame:
    """Decide each component of the outcome; ``OUTCOMES`` defines them.

    Args:
        admissions: A rows, see ``describe_admissions``.
        icu: stays in intensive care.
        gaps: all values of the gap, ``stay``, ``chart``, ``value``, whenever they were stored.
        windows: of the A admissions.
        request: gives the horizon.

    Returns:
        A rows: ``death``, ``icu``, ``unresolved`` of 0, 1 and NaN; ``unit`` of intensive care at
        the prediction time, NaN where none; ``why`` unresolved is unknown, empty where it is known.
    """
    time, until = windows.time, windows.time + request.horizon
    death = ((admissions["death"] > time) & (admissions["death"] <= until)).astype(float)
    place = pd.Series(admissions.index, index=admissions["hadm_id"])
    stays = icu.assign(stay=icu["hadm_id"].map(place)).dropna(subset=["stay"])
    stays = stays.sort_values(["stay", "intime", "outtime"])
    then, last = stays["stay"].map(time), stays["stay"].map(until)
    here = stays[(stays["intime"] <= then) & ~(stays["outtime"] <= then)]
    unit = here.groupby("stay")["first_careunit"].last().reindex(admissions.index)
    comes = stays["stay"][(stays["intime"] > then) & (stays["intime"] <= last)]
    admitted = pd.Series(admissions.index.isin(comes), index=admissions.index, dtype=float)
    result = _judge_gap(admissions, gaps, windows, until, died=death == 1)
    return result.assign(death=death, icu=admitted.mask(unit.notna()), unit=unit)


def _judge_gap(
    admissions: pd.DataFrame,
    gaps: pd.DataFrame,
    windows: Windows,
    until: pd.Series,
    *,
    died: pd.Series,
) -> pd.DataFrame:
    """Decide whether the gap closes and stays closed; of values at one time a closed one decides.

    Returns:
        A rows: ``unresolved`` and ``why``, see ``judge``.
    """
    gaps = gaps.groupby(["stay", "chart"])["value"].min().reset_index()
    closed = gaps["value"] <= CLOSED_GAP
    before = gaps["chart"] <= of_stay(gaps, windows.time)
    after = ~before & (gaps["chart"] <= of_stay(gaps, until))

    def chart_of(rows: pd.Series, which: str) -> pd.Series:
        """Return the first or last time charted of some rows in each admission."""
        return gaps[rows].groupby("stay")["chart"].agg(which).reindex(admissions.index)

    last_open_before = chart_of(before & ~closed, "max")
    last_closed_before = chart_of(before & closed, "max")
    open_then = last_open_before.notna() & ~(last_open_before <= last_closed_before)
    closed_then = last_closed_before.notna() & ~open_then
    closes = chart_of(after & closed, "min").mask(closed_then, windows.time)
    reopened = chart_of(after & ~closed, "max") > closes
    never_closes, unmeasured = closes.isna(), chart_of(after, "max").isna()
    unresolved = reopened.astype(float).mask(never_closes, 1.0)
    why = pd.Series("", index=admissions.index)
    # Right-censored: discharged alive with an open gap.
    discharged = (admissions["end"] < until) & ~died
    why = why.mask(never_closes & discharged, OPEN_AT_DISCHARGE)
    why = why.mask(never_closes & unmeasured, NOT_MEASURED)
    why = why.mask(died & (open_then | ~unmeasured), "")
    return pd.DataFrame({"unresolved": unresolved.mask(why != ""), "why": why})


def combine(judged: pd.DataFrame, outcome: Sequence[str]) -> pd.Series:
    """Combine components: 1 where any is 1, else NaN where one is unknown, else 0."""
    components = judged[list(outcome)]
    unknown = components.isna()
    if len(outcome) > 1 and "icu" in unknown:  # in intensive care already: the others are asked
        unknown["icu"] = False
    label = (components == 1).any(axis=1).astype(float)
    return label.mask(unknown.any(axis=1) & (label == 0))
