"""The small tables of MIMIC-IV: admissions and patients, intensive care, diagnoses, items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from medgemma_clinical.data.description import comparable
from medgemma_clinical.data.mimic.analytes import ANALYTES
from medgemma_clinical.data.mimic.cells import decode
from medgemma_clinical.data.mimic.reading import Keeper, read_table
from medgemma_clinical.data.mimic.tables import TABLES, CellType, find_table
from medgemma_clinical.files import InputError

OLDEST_AGE = 89
"""Years; MIMIC-IV writes all ages above as 91. Source: mimic.mit.edu, patients."""

KETOACIDOSIS = {9: ("2501",), 10: ("E081", "E091", "E101", "E111", "E131")}
"""Beginnings of codes, by ICD version. Source: ICD-9-CM and ICD-10-CM; E08.0 and E11.0 are the
hyperosmolar state."""

DIAGNOSES = "hosp/diagnoses_icd"


class SmallTables:
    """All tables but labevents, and the origin of everything that was read.

    Attributes:
        folder: with hosp/ and icu/.
        admissions: see ``describe_admissions``.
        icu: hadm_id, intime, outtime, first_careunit.
        items: itemid, label, fluid, category.
        hashes: SHA-256 of each file that was read; the reader of labevents adds its own.
    """

    def __init__(self, folder: Path) -> None:
        """Read them.

        Raises:
            InputError: as ``read_table``, or a key is there twice.
        """
        self.folder, self.hashes = folder, dict[str, str]()
        patients = self._read("hosp/patients", unique="subject_id")
        admissions = self._read("hosp/admissions", unique="hadm_id")
        self.icu = self._read("icu/icustays").dropna(subset=["intime"])
        coded = self._read(DIAGNOSES, keep_ketoacidosis)["hadm_id"]
        self.items = self._read("hosp/d_labitems", unique="itemid")
        find_table(folder, "hosp/labevents")  # its absence shows before minutes are spent
        self.admissions = describe_admissions(admissions, patients, coded)

    def _read(self, name: str, keep: Keeper = decode, unique: str = "") -> pd.DataFrame:
        """Read one table whole; lacking optional columns are empty."""
        read = read_table(self.folder, name, keep)
        self.hashes[name] = read.sha256
        lacking = [column for column in TABLES[name] if column not in read.header]
        table = pd.concat(read.kept or [pd.DataFrame(columns=list(TABLES[name]))])
        table = table.reset_index(drop=True).assign(**dict.fromkeys(lacking, ""))
        if table.empty and name != DIAGNOSES:
            raise InputError(f"{find_table(self.folder, name)}: no rows below the header")
        if unique and table[unique].duplicated().any():
            raise InputError(
                f"{find_table(self.folder, name)}, column {unique}: a value is there more than "
                "once: copy the table again"
            )
        return table


def keep_ketoacidosis(cells: pd.DataFrame, types: dict[str, CellType]) -> pd.DataFrame:
    """Keep the diagnoses that are codes of diabetic ketoacidosis."""
    table = decode(cells, types)
    code = table["icd_code"].str.replace(".", "").str.upper()
    matches = [
        code.str.startswith(beginnings) & (table["icd_version"] == version)
        for version, beginnings in KETOACIDOSIS.items()
    ]
    return table[np.logical_or.reduce(matches)]


def describe_admissions(
    admissions: pd.DataFrame, patients: pd.DataFrame, coded: pd.Series
) -> pd.DataFrame:
    """Return what is known of each admission, by ascending patient and admission.

    A death in hospital ends the stay. A death after the discharge counts on the same day only,
    since discharges of the dead often bear a date without a time; on a later day it was no death
    in hospital. Ages are those of the year of admission; a patient over 89 in the anchor year has
    the least possible one.

    Args:
        admissions: decoded, as patients.
        patients: one row each.
        coded: hadm_id of admissions coded as ketoacidosis.

    Returns:
        A rows: the columns of both tables, ``start``, ``end``, ``death`` (NaT where none in
        hospital), ``age`` (years), ``over`` (whether that is the least possible age), ``coded``.

    Source: mimic.mit.edu, MIMIC-IV, patients (anchor_age, anchor_year) and admissions.
    """
    table = admissions.merge(patients, on="subject_id", how="left")
    flagged = pd.to_numeric(table["hospital_expire_flag"]) == 1
    death = table["deathtime"].fillna(table["dischtime"].where(flagged))
    day, last_day = death.dt.normalize(), table["dischtime"].dt.normalize()
    death = death.mask((death > table["dischtime"]) & (day != last_day))
    since = table["admittime"].dt.year - table["anchor_year"]
    over = table["anchor_age"] > OLDEST_AGE
    table = table.assign(
        start=table["admittime"],
        end=death.fillna(table["dischtime"]),
        death=death,
        age=(table["anchor_age"] + since).mask(over, OLDEST_AGE + 1.0 + since.clip(upper=0)),
        over=over,
        coded=table["hadm_id"].isin(coded),
    )
    table = table.astype({"subject_id": np.int64, "hadm_id": np.int64})
    return table.sort_values(["subject_id", "hadm_id"], ignore_index=True)


def find_item(wanted: str, tables: SmallTables) -> tuple[int, str]:
    """Find an item by number or name; return its itemid and its name as texts write it.

    Raises:
        InputError: it is not in d_labitems, or several items bear its name.
    """
    items = tables.items
    named = items["label"].map(comparable) == comparable(wanted)
    found = items[(items["itemid"].astype(np.int64).astype(str) == wanted.strip()) | named]
    if len(found) != 1:
        several = "; ".join(
            ", ".join(text for text in (f"{item:.0f}", fluid, category) if text)
            for item, fluid, category in found[["itemid", "fluid", "category"]].values
        )
        problem = f"several, name one by its itemid: {several}" if several else "no such item"
        path = find_table(tables.folder, "hosp/d_labitems")
        raise InputError(f"{path}: --item {wanted}: {problem}")
    item = int(found["itemid"].iloc[0])
    name = ANALYTES[item].name if item in ANALYTES else str(found["label"].iloc[0])
    has_capitals = name[1:] != name[1:].lower()  # pH stays as it is
    return item, name if has_capitals else name[:1].upper() + name[1:]
