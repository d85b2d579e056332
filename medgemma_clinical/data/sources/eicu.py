"""The command from_eicu: eICU's tables in the form of MIMIC-IV's, for the same cohort."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data import duck
from medgemma_clinical.data.mimic.analytes import ANION_GAP, CHEMISTRY, ItemSeries, choose_series
from medgemma_clinical.data.mimic.extraction import make_cohort
from medgemma_clinical.data.mimic.request import COHORTS, CohortRequest

STEPS = Path(__file__).parent

TABLES = {
    "patient": (
        *("patientunitstayid", "patienthealthsystemstayid", "uniquepid", "gender", "age"),
        *("hospitaladmitoffset", "hospitaldischargeoffset", "hospitaldischargestatus"),
        *("unittype", "unitstaytype", "unitdischargeoffset"),
    ),
    "admissionDx": ("patientunitstayid", "admitdxenteredoffset", "admitdxpath"),
    "lab": (
        *("labname", "patientunitstayid", "labresultoffset", "labresultrevisedoffset"),
        *("labresult", "labmeasurenamesystem"),
    ),
}
"""Columns that are read. Source: eicu-crd.mit.edu, version 2.0; an offset is minutes from the
admission to the unit."""

HINT, UNIQUE = "this reads eICU 2.0", {"patient": "patientunitstayid"}

ITEMS = {analyte.name.replace("urea nitrogen", "BUN"): analyte.items[0] for analyte in CHEMISTRY}
"""MIMIC-IV's item of each labname. Others mean something else: bedside glucose is a finger prick,
HCO3 and Total CO2 are computed by the blood gas machine."""

STAYS = (
    "eICU holds patients of its units alone: an admission begins with the first stay in one; left "
    "out are hospital stays of unknown hospitaldischargestatus or age"
)
DEFINITIONS = {name: f"{text}; {STAYS}" for name, text in COHORTS.items()} | {
    "dka": "adult admissions with APACHE's admission diagnosis of diabetic ketoacidosis, entered "
    f"by the prediction time; {STAYS}"
}


@dataclass(frozen=True, kw_only=True)
class EicuRequest(CohortRequest):
    """A request for rows from eICU."""

    eicu_dir: Path


class EicuTables:
    """The folder of eICU as tables of a database: a ``Hospital``."""

    source = "eICU Collaborative Research Database (PhysioNet), under its data use agreement"
    command = "from_eicu"
    cohorts = DEFINITIONS
    has_storing_times = True

    def __init__(self, database: duck.Database, request: EicuRequest) -> None:
        """Find all files."""
        self.database, self.request = database, request
        self.name = f"--eicu_dir {request.eicu_dir}"
        self.hashes: dict[str, str] = {}
        self.paths = {name: duck.find_file(request.eicu_dir, name, "--eicu_dir") for name in TABLES}
        self.labs_path = self.paths["lab"]

    def load_admissions(self) -> None:
        """Make patients, admissions, icustays and ketoacidosis."""
        self._load("patient")
        self._load("admissionDx")
        self.database.run_file(STEPS / "eicu_admissions.sql")

    def choose_series(self) -> list[ItemSeries]:
        """Return the series that are asked for, the main one first."""
        return choose_series(self.request.series or (ANION_GAP.name,), self.request.compute_gap)

    def load_labs(self, items: set[int]) -> None:
        """Make labs of the values of some items, of patients with a wanted admission."""
        self.database.add("items", pd.DataFrame(ITEMS.items(), columns=["labname", "itemid"]))
        self._load(
            "lab",
            "{labname} IN (FROM items SELECT labname) AND {patientunitstayid} IN "
            "(SELECT patientunitstayid FROM unit_stays SEMI JOIN wanted USING (subject_id))",
        )
        self.database.run_file(STEPS / "eicu_labs.sql")

    def _load(self, name: str, keep: str = "true") -> None:
        columns = {column: _kind(column) for column in TABLES[name]}
        file = duck.open_table(self.database, self.paths[name], columns, HINT)
        self.hashes[name] = file.sha256
        cells = {column: kind.typed(file.raw(column)) for column, kind in columns.items()}
        keys = ("labname", "patientunitstayid") if name == "lab" else ()
        duck.load_table(self.database, name, file, columns, keep.format(**cells), keys=keys)
        if name != "lab":
            duck.check_rows(self.database, name, file.path, UNIQUE.get(name, ""))


def _kind(column: str) -> duck.Column:
    if column.endswith(("stayid", "offset")):
        return duck.Column("whole", may_be_empty=column == "labresultrevisedoffset")
    form = "number" if column == "labresult" else "word"
    return duck.Column(form, may_be_empty=column != "uniquepid")


def extract_eicu(request: EicuRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format from eICU.

    Raises:
        InputError: the tables cannot be read, or no admission is left.
    """
    return make_cohort(request, EicuTables)
