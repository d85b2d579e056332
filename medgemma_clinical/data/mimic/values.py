"""Laboratory values of the wanted admissions: whose a value is, and when it was known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.mimic.analytes import DIGITS, GAP_COMPONENTS
from medgemma_clinical.data.mimic.cells import decode
from medgemma_clinical.data.mimic.tables import KEY, LAB_KEYS, CellType

BEFORE_ADMISSION = np.timedelta64(24 * 3600, "s")
"""A value that names its admission may precede it so long: the emergency department."""

COMPUTED_GAP = -1
"""Item of the computed anion gap, which MIMIC-IV does not have."""

Kept = tuple[pd.DataFrame, Counter[str]]
"""Values of a chunk, and counts of those left out by reason."""


@dataclass(frozen=True)
class Stays:
    """Admissions as laboratory values look them up, (A,) each; a place counts from 0.

    Attributes:
        subject: int64.
        hadm: int64.
        start: of the admission, ``datetime64[s]``.
        end: discharge or death, ``datetime64[s]``, NaT where unknown.
        wanted: bool, whether values of an admission are kept.
    """

    subject: NDArray[np.int64]
    hadm: NDArray[np.int64]
    start: NDArray[np.datetime64]
    end: NDArray[np.datetime64]
    wanted: NDArray[np.bool_]


class LabKeeper:
    """Keeps the values of some items in some admissions.

    Args:
        items: itemids.
        stays: all admissions: a value without ``hadm_id`` belongs to the only one around it.
    """

    def __init__(self, items: Iterable[int], stays: Stays) -> None:
        """Sort once what is looked up often."""
        self.items, self.stays = np.array(sorted(items)), stays
        self.by_hadm = np.argsort(stays.hadm, kind="stable")
        self.subjects = np.unique(stays.subject[stays.wanted])
        place = np.arange(len(stays.subject))
        same_patient = np.isin(stays.subject, self.subjects)
        self.places = pd.DataFrame(
            {"subject_id": stays.subject[same_patient], "stay": place[same_patient]}
        )

    def __call__(self, cells: pd.DataFrame, types: dict[str, CellType]) -> Kept:
        """Return the values of a chunk, a row each, and counts of those left out by reason.

        Columns: ``stay`` (place), ``item``, ``chart`` and ``known`` (the later of charted and
        stored, NaT where the table has no time for a value), ``value``, ``unit`` (category).
        """
        rows = decode(cells[self.needed(cells)], types)
        counts: Counter[str] = Counter()
        numeric = np.isfinite(rows["valuenum"])
        counts["without a number"] = int((~numeric).sum())
        rows = rows[numeric]
        stay = self._stays_of(rows, counts)
        rows, stay = rows[stay >= 0], stay[stay >= 0]
        chart = rows["charttime"]
        # The demo has no storetime at all: a value then counts as known when it is charted.
        stored = rows.get("storetime", chart)
        counts["without a time of storing: no input, outcome alone"] = int(stored.isna().sum())
        kept = pd.DataFrame(
            {
                "stay": stay.astype(np.int32),
                "item": rows["itemid"].astype(np.int32),
                "chart": chart,
                "known": stored.where(~(stored < chart), chart),
                "value": rows["valuenum"],
                "unit": rows["valueuom"].astype("category"),
            }
        )
        return kept, counts

    def needed(self, cells: pd.DataFrame) -> NDArray[np.bool_]:
        """Return which rows hold one of the items, of a patient with a wanted admission, (n,)."""
        keys = decode(cells[list(LAB_KEYS)], dict.fromkeys(LAB_KEYS, KEY))
        here = keys["itemid"].isin(self.items) & keys["subject_id"].isin(self.subjects)
        return here.to_numpy()

    def _stays_of(self, rows: pd.DataFrame, counts: Counter[str]) -> NDArray[np.int64]:
        """Return the place of each row's admission, (n,); -1 where none that is wanted."""
        stays, named = self.stays, rows["hadm_id"].notna().to_numpy()
        chart = rows["charttime"].to_numpy()
        place = np.full(len(rows), -1)
        hadm = rows["hadm_id"].to_numpy()[named].astype(np.int64)
        found = np.searchsorted(stays.hadm[self.by_hadm], hadm).clip(max=len(stays.hadm) - 1)
        found = self.by_hadm[found]
        subject = rows["subject_id"].to_numpy()[named].astype(np.int64)
        same = (stays.hadm[found] == hadm) & (stays.subject[found] == subject)
        counts["whose hadm_id is no admission of the patient"] = int((~same).sum())
        begun = chart[named] >= stays.start[found] - BEFORE_ADMISSION
        place[named] = np.where(same & begun & (chart[named] <= stays.end[found]), found, -1)
        place[~named] = self._only_stay(rows[~named])
        counts["without hadm_id, within one admission: taken"] = int((place[~named] >= 0).sum())
        counts["without hadm_id, within none or several"] = int((place[~named] < 0).sum())
        counts["outside the admission that they name"] = int((place[named][same] < 0).sum())
        return np.where((place >= 0) & stays.wanted[place], place, -1)

    def _only_stay(self, rows: pd.DataFrame) -> NDArray[np.int64]:
        """Return the one admission around the time of each row, -1 where none or several."""
        numbered = rows[["subject_id", "charttime"]].assign(row=np.arange(len(rows)))
        pairs = numbered.merge(self.places, on="subject_id")
        chart, stay = pairs["charttime"].to_numpy(), pairs["stay"].to_numpy()
        pairs = pairs[(self.stays.start[stay] <= chart) & (chart <= self.stays.end[stay])]
        place = np.full(len(rows), -1)
        place[pairs["row"]] = pairs["stay"]
        place[pairs["row"][pairs["row"].duplicated(keep=False)]] = -1
        return place


def join_values(kept: Sequence[Kept]) -> Kept:
    """Join what was kept of all chunks, sorted: the order of the table does not matter."""
    counts: Counter[str] = Counter()
    for _, chunk_counts in kept:
        counts.update(chunk_counts)
    frames = [frame for frame, _ in kept]
    units = sorted({unit for frame in frames for unit in frame["unit"].cat.categories})
    for frame in frames:
        frame["unit"] = frame["unit"].cat.set_categories(units)
    values = pd.concat(frames, ignore_index=True)
    return sort_values(values, "unit"), counts


def sort_values(values: pd.DataFrame, *last: str) -> pd.DataFrame:
    """Sort by admission, time charted, time known, item and value; then by further columns."""
    keys = ["stay", "chart", "known", "item", "value", *last]
    return values.sort_values(keys, kind="stable", ignore_index=True)


def computed_gaps(values: pd.DataFrame) -> pd.DataFrame:
    """Compute the anion gap wherever serum sodium, chloride and bicarbonate were drawn together.

    Of several values at one time the one known first counts. The gap is known when all three are,
    and NaT where that is not recorded for one of them.

    Args:
        values: from ``join_values``, converted: sorted by time known, then value.

    Returns:
        Rows of ``COMPUTED_GAP`` with ``stay``, ``chart``, ``known`` and ``value`` in mEq/L.

    Source: gap = sodium - chloride - bicarbonate in mEq/L, as in Kitabchi 2009.
    """
    components = values[values["item"].isin(GAP_COMPONENTS)]
    first = components.drop_duplicates(["stay", "chart", "item"])
    drawn = [first[first["item"] == item].set_index(["stay", "chart"]) for item in GAP_COMPONENTS]
    sodium, chloride, bicarbonate = (rows["value"] for rows in drawn)
    gap = (sodium - chloride - bicarbonate).dropna().round(DIGITS)
    known = pd.concat([rows["known"] for rows in drawn], axis=1).max(axis=1, skipna=False)
    table = pd.DataFrame({"item": COMPUTED_GAP, "known": known.reindex(gap.index), "value": gap})
    return table.reset_index()
