"""The command from_eicu: the question of from_mimic, from eICU's tables in the form of MIMIC-IV's.

Population: hospital stays of adults (18, an age of "> 89" as 90), one row each, that begin with
    the first stay in a unit: what happened in hospital before is not known. ``--cohort dka``:
    APACHE's admission diagnosis of diabetic ketoacidosis, entered by the prediction time, so that,
    unlike MIMIC-IV's codes, it is no hindsight; ``biochemical`` and ``all`` as in from_mimic.
Prediction time: as in from_mimic, 12 hours after the first value of the main series.
Read: laboratory values (``lab``) of this window, known when they were last revised and not before
    the unit stay that files them begins; age, sex, unit, hours since that first stay. No notes.
Label, times: as in from_mimic. A death is at the hospital discharge, since only that is known.
    Stays in step-down units are no intensive care.
Exclusions: before all others hospital stays of unknown discharge status or age; then those of
    from_mimic in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.analytes import CHEMISTRY
from medgemma_clinical.data.importers import cells, duck
from medgemma_clinical.data.importers.cohort import (
    COHORTS,
    SQL,
    CohortRequest,
    HospitalTables,
    make_cohort,
)
from medgemma_clinical.flags import row

ITEMS = {analyte.name.replace("urea nitrogen", "BUN"): analyte.keys[0] for analyte in CHEMISTRY}
"""MIMIC-IV's item of each labname. Others mean something else: bedside glucose is a finger prick,
HCO3 and Total CO2 are computed by the blood gas machine."""

STAYS = (
    "eICU holds patients of its units alone: an admission begins with the first stay in one; left "
    "out are hospital stays of unknown hospitaldischargestatus or age"
)

COLUMNS = {
    "patient": {
        "patientunitstayid": cells.KEY,
        "patienthealthsystemstayid": cells.KEY,
        "uniquepid": cells.WORD,
        "gender": cells.WORD_OR_EMPTY,
        "age": cells.WORD_OR_EMPTY,
        "hospitalid": cells.KEY,
        "hospitaladmitoffset": cells.KEY,
        "hospitaldischargeoffset": cells.KEY,
        "hospitaldischargestatus": cells.WORD_OR_EMPTY,
        "unittype": cells.WORD_OR_EMPTY,
        "unitstaytype": cells.WORD_OR_EMPTY,
        "unitdischargeoffset": cells.KEY,
    },
    "admissionDx": {
        "patientunitstayid": cells.KEY,
        "admitdxenteredoffset": cells.KEY,
        "admitdxpath": cells.WORD_OR_EMPTY,
    },
    "lab": {
        "labname": cells.WORD_OR_EMPTY,
        "patientunitstayid": cells.KEY,
        "labresultoffset": cells.KEY,
        "labresultrevisedoffset": cells.KEY_OR_EMPTY,
        "labresult": cells.NUMBER_OR_EMPTY,
        "labmeasurenamesystem": cells.WORD_OR_EMPTY,
    },
}
"""Source: eicu-crd.mit.edu, version 2.0; an offset is minutes from the admission to the unit."""

UNIQUE = {"patient": "patientunitstayid"}

DEFINITIONS = {name: f"{text}; {STAYS}" for name, text in COHORTS.items()} | {
    "dka": "adult admissions with APACHE's admission diagnosis of diabetic ketoacidosis, "
    f"entered by the prediction time; {STAYS}"
}


@dataclass(frozen=True, kw_only=True)
class EicuRequest(CohortRequest):
    """A request for rows from eICU."""

    eicu_dir: Path = row(Path, None, "folder with patient, admissionDx and lab", required=True)


class EicuTables(HospitalTables):
    """The folder of eICU."""

    command = "from_eicu"
    source = "eICU Collaborative Research Database (PhysioNet), under its data use agreement"
    labs = "lab"
    columns = COLUMNS
    unique = UNIQUE
    cohorts = DEFINITIONS

    def load_admissions(self) -> None:
        """Make patients, admissions, icustays and ketoacidosis."""
        self.load("patient")
        self.load("admissionDx")
        self.database.run_file(SQL / "eicu_admissions.sql")

    def load_labs(self, items: set[int]) -> None:
        """Make labs of all names in ``ITEMS``, of patients with a wanted admission."""
        self.database.add("items", pd.DataFrame(ITEMS.items(), columns=["labname", "itemid"]))
        has_name = "{labname} IN (FROM items SELECT labname)"
        stays = "FROM unit_stays SEMI JOIN wanted USING (subject_id) SELECT patientunitstayid"
        keep = [has_name, f"{{patientunitstayid}} IN ({stays})"]
        self.load("lab", keep, keys=("patientunitstayid",))
        self.database.run_file(SQL / "eicu_labs.sql")


def make_eicu(request: EicuRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format from eICU, and their description."""
    with duck.open_database(request.out, request.memory_limit, request.threads) as database:
        hospital = EicuTables(database, "--eicu_dir", request.eicu_dir)
        rows, description = make_cohort(database, request, hospital)
        hospitals = "SELECT hadm_id, min(hospitalid) AS hospital FROM unit_stays GROUP BY hadm_id"
        hospital_of = database.frame(hospitals).set_index("hadm_id")["hospital"]
        rows.insert(3, "hospital", rows["hadm_id"].map(hospital_of))
        return rows, description
