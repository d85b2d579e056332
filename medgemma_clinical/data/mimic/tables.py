"""The tables of MIMIC-IV: where the files lie, which columns are read, and the series by item."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from medgemma_clinical.data.dka.description import comparable
from medgemma_clinical.data.duck import (
    KEY,
    KEY_OR_EMPTY,
    NUMBER,
    NUMBER_OR_EMPTY,
    TIME,
    TIME_OR_EMPTY,
    WORD_OR_EMPTY,
    Column,
    Database,
    TableFile,
    check_rows,
    find_file,
    load_table,
    open_table,
)
from medgemma_clinical.data.mimic.analytes import ANALYTES, ItemSeries, choose_series, series_of
from medgemma_clinical.data.mimic.request import COHORTS, Extraction
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

MIMIC_VERSIONS = "this reads MIMIC-IV 2.x and 3.x, whose folder holds hosp/ and icu/"

OPTIONAL_WORD, OPTIONAL_TIME, OPTIONAL_NUMBER = (
    replace(column, optional=True) for column in (WORD_OR_EMPTY, TIME_OR_EMPTY, NUMBER_OR_EMPTY)
)
TABLES: dict[str, dict[str, Column]] = {
    "hosp/patients": {
        "subject_id": KEY,
        "gender": WORD_OR_EMPTY,
        "anchor_age": NUMBER_OR_EMPTY,
        "anchor_year": NUMBER_OR_EMPTY,
    },
    "hosp/admissions": {
        "subject_id": KEY,
        "hadm_id": KEY,
        "admittime": TIME,
        "dischtime": TIME_OR_EMPTY,
        "deathtime": TIME_OR_EMPTY,
        "hospital_expire_flag": NUMBER_OR_EMPTY,
    },
    "icu/icustays": {
        "hadm_id": KEY,
        "intime": TIME_OR_EMPTY,
        "outtime": TIME_OR_EMPTY,
        "first_careunit": WORD_OR_EMPTY,
    },
    "hosp/diagnoses_icd": {"hadm_id": KEY, "icd_code": WORD_OR_EMPTY, "icd_version": NUMBER},
    "hosp/d_labitems": {
        "itemid": KEY,
        "label": WORD_OR_EMPTY,
        "fluid": OPTIONAL_WORD,
        "category": OPTIONAL_WORD,
    },
    "hosp/labevents": {
        "itemid": KEY,
        "subject_id": KEY,
        "hadm_id": KEY_OR_EMPTY,
        "charttime": TIME,
        "storetime": OPTIONAL_TIME,
        "valuenum": NUMBER_OR_EMPTY,
        "valueuom": WORD_OR_EMPTY,
        "ref_range_lower": OPTIONAL_NUMBER,
        "ref_range_upper": OPTIONAL_NUMBER,
    },
}
"""Columns that are read, of each table. Source: mimic.mit.edu, MIMIC-IV, modules hosp and icu."""

UNIQUE = {"hosp/patients": "subject_id", "hosp/admissions": "hadm_id", "hosp/d_labitems": "itemid"}
"""Columns that hold each value once."""

KETOACIDOSIS = """
    regexp_matches(upper(replace(icd_code, '.', '')), '^2501') AND icd_version = 9
    OR regexp_matches(upper(replace(icd_code, '.', '')), '^E(08|09|10|11|13)1') AND icd_version = 10
"""
"""Codes by ICD version. Source: ICD-9-CM and ICD-10-CM; E08.0 and E11.0 are the hyperosmolar
state."""


class MimicTables:
    """The folder of MIMIC-IV as tables of a database: a ``Hospital``."""

    source = "MIMIC-IV (PhysioNet), under its data use agreement"
    command = "from_mimic"
    cohorts = COHORTS

    def __init__(self, database: Database, request: Extraction) -> None:
        """Find all files, so that the absence of one shows before minutes are spent."""
        self.database, self.request = database, request
        self.name = f"--mimic_dir {request.mimic_dir}"
        self.hashes: dict[str, str] = {}
        self.paths = {name: find_table(request.mimic_dir, name) for name in TABLES}
        self.labs_path = self.paths["hosp/labevents"]
        self.has_storing_times = True

    def load_admissions(self) -> None:
        """Make patients, admissions, icustays, ketoacidosis and d_labitems."""
        for name in ("hosp/patients", "hosp/admissions", "icu/icustays", "hosp/d_labitems"):
            table = name.partition("/")[2]
            self._load(name, table)
            check_rows(self.database, table, self.paths[name], UNIQUE.get(name, ""))
        self._load("hosp/diagnoses_icd", "diagnoses_icd")
        check_rows(self.database, "diagnoses_icd", self.paths["hosp/diagnoses_icd"])
        self.database.run(
            "CREATE TABLE ketoacidosis AS SELECT hadm_id, NULL::TIMESTAMP AS entered "
            f"FROM diagnoses_icd WHERE {KETOACIDOSIS}"
        )

    def choose_series(self) -> list[ItemSeries]:
        """Return the series that are asked for, the main one first."""
        if self.request.series:
            return choose_series(self.request.series, self.request.compute_gap)
        return [self._find_item(self.request.item)]

    def load_labs(self, items: set[int]) -> None:
        """Make labs of the values of some items, of patients with a wanted admission."""
        file = self._open("hosp/labevents")
        keys = [
            TABLES["hosp/labevents"][name].typed(file.raw(name))
            for name in ("itemid", "subject_id")
        ]
        chosen = ", ".join(map(str, sorted(items)))
        keep = f"{keys[0]} IN ({chosen}) AND {keys[1]} IN (SELECT subject_id FROM wanted)"
        load_table(
            self.database,
            "labs",
            file,
            TABLES["hosp/labevents"],
            keep,
            keys=("itemid", "subject_id"),
        )
        self.has_storing_times = "storetime" in file.header
        if not self.has_storing_times:
            problem = "no column storetime: values count as known when charted"
            logger.warning("%s: %s", file.path, problem)
            self.database.run("UPDATE labs SET storetime = charttime")

    def _open(self, name: str) -> TableFile:
        path, header = self.paths[name], ""
        file = open_table(self.database, path, {}, "")
        if "row_id" in {column.lower() for column in file.header}:
            header = "these are columns of MIMIC-III: "
        file.check_columns(TABLES[name], f"{header}{MIMIC_VERSIONS}")
        self.hashes[name] = file.sha256
        return file

    def _load(self, name: str, table: str) -> None:
        load_table(self.database, table, self._open(name), TABLES[name])

    def _find_item(self, wanted: str) -> ItemSeries:
        """Find an item by number or name.

        Raises:
            InputError: it is not in d_labitems, or several items bear its name.
        """
        items = self.database.frame("SELECT * FROM d_labitems ORDER BY itemid")
        named = items["label"].map(comparable) == comparable(wanted)
        found = items[(items["itemid"].astype(str) == wanted.strip()) | named]
        if len(found) != 1:
            several = "; ".join(
                ", ".join(text for text in (str(item), fluid, category) if text)
                for item, fluid, category in found[["itemid", "fluid", "category"]].values
            )
            problem = f"several, name one by its itemid: {several}" if several else "no such item"
            raise InputError(f"{self.paths['hosp/d_labitems']}: --item {wanted}: {problem}")
        item = int(found["itemid"].iloc[0])
        if item in ANALYTES:
            return series_of(ANALYTES[item], self.request.compute_gap, (item,))
        return ItemSeries(str(found["label"].iloc[0]), (item,), (item,), None, None)


def find_table(folder: Path, name: str) -> Path:
    """Find a table such as ``hosp/patients`` in one of its forms.

    Raises:
        InputError: it is missing or present twice, or the folder is no MIMIC-IV.
    """
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for an overlong name too
        raise InputError(f"--mimic_dir {folder}: no such folder: give the one with hosp/ and icu/")
    module = name.partition("/")[0]
    if not (folder / module).is_dir():
        names = {path.name.lower().partition(".")[0] for path in folder.iterdir()}
        kind = "MIMIC-III" if {"admissions", "d_labitems", "icustays"} & names else "not MIMIC-IV"
        kind = "MIMIC-IV before 2.0" if "core" in names else kind
        raise InputError(f"--mimic_dir {folder}: no folder {module}/ ({kind}?): {MIMIC_VERSIONS}")
    return find_file(folder, name, "--mimic_dir")
