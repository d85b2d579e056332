"""The command from_mimic: escalation of care in adults with ketoacidosis, from MIMIC-IV.

Population: hospital admissions of adults (18 at admission), one row each. ``--cohort dka``: coded
    as ketoacidosis (ICD-9-CM 250.1x, ICD-10-CM E08.1x to E13.1x), in hindsight, since codes are
    given at discharge; ``biochemical``: by values known at the prediction time, glucose above 250
    mg/dL, bicarbonate at most 18 and gap above 12 mEq/L, any pH at most 7.30; ``all``.
Prediction time: 12 hours (``--window_hours``) after the first value of the main series, the anion
    gap without potassium unless another is chosen.
Read: laboratory values charted within this window and stored by its end, from 24 hours before the
    admission that they name; age, sex, ward and hours since admission; with ``--notes_dir`` notes
    written by then, but for the discharge summary of the admission itself.
Label: within the next 72 hours (``--horizon_hours``) any of death in this admission; a stay in
    intensive care that begins, not asked of a patient who is there already; an anion gap above
    12 mEq/L that stays or comes back. A discharge alive before is a competing event, 0.
Times, but for ``all``: of a gap open at the prediction time, hours until it is first measured at
    or below 12 mEq/L (1), else until death (2) or discharge alive (3) ends the admission.
Exclusions, in this order: under 18 or of unknown age; not coded (``dka``); no value of the main
    series known within a window; prediction time before the admission; dead by then; discharged by
    then; fewer than two values (``--min_observations``); not in ketoacidosis (``biochemical``); in
    intensive care (``--outcome icu`` alone); discharged alive within the horizon (``--discharged
    exclude``); gap not measured again, where it is asked for and the patient stays in hospital.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.analytes import ANALYTES, GAP_ITEM, feature_of
from medgemma_clinical.data.dka import comparable
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, tables
from medgemma_clinical.data.importers.cohort import CohortRequest, HospitalTables, make_cohort
from medgemma_clinical.data.importers.notes import NoteRequest, add_notes, load_notes
from medgemma_clinical.files import InputError
from medgemma_clinical.flags import TAKEN, row

logger = logging.getLogger(__name__)

OPTIONAL_NUMBER = cells.Number(may_be_empty=True, optional=True)
OPTIONAL_TIME = cells.Time(may_be_empty=True, optional=True)
OPTIONAL_WORD = cells.Word(may_be_empty=True, optional=True)

COLUMNS: dict[str, dict[str, cells.Column]] = {
    "hosp/patients": {
        "subject_id": cells.KEY,
        "gender": cells.WORD_OR_EMPTY,
        "anchor_age": cells.NUMBER_OR_EMPTY,
        "anchor_year": cells.NUMBER_OR_EMPTY,
    },
    "hosp/admissions": {
        "subject_id": cells.KEY,
        "hadm_id": cells.KEY,
        "admittime": cells.TIME,
        "dischtime": cells.TIME_OR_EMPTY,
        "deathtime": cells.TIME_OR_EMPTY,
        "hospital_expire_flag": cells.NUMBER_OR_EMPTY,
    },
    "icu/icustays": {
        "hadm_id": cells.KEY,
        "intime": cells.TIME_OR_EMPTY,
        "outtime": cells.TIME_OR_EMPTY,
        "first_careunit": cells.WORD_OR_EMPTY,
    },
    "hosp/diagnoses_icd": {
        "hadm_id": cells.KEY,
        "icd_code": cells.WORD_OR_EMPTY,
        "icd_version": cells.NUMBER,
    },
    "hosp/d_labitems": {
        "itemid": cells.KEY,
        "label": cells.WORD_OR_EMPTY,
        "fluid": OPTIONAL_WORD,
        "category": OPTIONAL_WORD,
    },
    "hosp/labevents": {
        "itemid": cells.KEY,
        "subject_id": cells.KEY,
        "hadm_id": cells.KEY_OR_EMPTY,
        "charttime": cells.TIME,
        "storetime": OPTIONAL_TIME,
        "valuenum": cells.NUMBER_OR_EMPTY,
        "valueuom": cells.WORD_OR_EMPTY,
        "ref_range_lower": OPTIONAL_NUMBER,
        "ref_range_upper": OPTIONAL_NUMBER,
    },
}
"""Columns that are read, of each table. Source: mimic.mit.edu, MIMIC-IV, modules hosp and icu."""

UNIQUE = {
    "hosp/patients": "subject_id",
    "hosp/admissions": "hadm_id",
    "hosp/d_labitems": "itemid",
}

RADIOLOGY = {
    "subject": "subject_id",
    "charted": "charttime",
    "stored": "storetime",
    "text": "text",
}
NOTES = {"discharge": {**RADIOLOGY, "stay": "hadm_id"}, "radiology": RADIOLOGY}
"""Columns by their role. A discharge summary tells what came after the prediction time of its own
stay. Source: MIMIC-IV-Note 2.2."""

KETOACIDOSIS = """
    regexp_matches(upper(replace(icd_code, '.', '')), '^2501') AND icd_version = 9
    OR regexp_matches(upper(replace(icd_code, '.', '')), '^E(08|09|10|11|13)1') AND icd_version = 10
"""
"""Codes by ICD version. Source: ICD-9-CM and ICD-10-CM; E08.0 and E11.0 are the hyperosmolar
state."""


@dataclass(frozen=True, kw_only=True)
class MimicRequest(CohortRequest, NoteRequest):
    """A request for rows from MIMIC-IV."""

    mimic_dir: Path = row(Path, None, "folder of MIMIC-IV with hosp/ and icu/", required=True)
    item: str = row(str, str(GAP_ITEM), "itemid of the series, or its name in d_labitems", TAKEN)
    notes_dir: Path | None = row(Path, None, "folder note/ of MIMIC-IV-Note, for the context")


class MimicTables(HospitalTables):
    """The folder of MIMIC-IV."""

    command = "from_mimic"
    source = "MIMIC-IV (PhysioNet), under its data use agreement"
    labs = "hosp/labevents"
    columns = COLUMNS
    unique = UNIQUE

    def load_admissions(self) -> None:
        """Make patients, admissions, icustays, ketoacidosis and d_labitems."""
        for name in self.columns:
            if name != self.labs:
                self.load(name)
        self.database.run("ALTER TABLE admissions ADD COLUMN id BIGINT")
        self.database.run("UPDATE admissions SET id = hadm_id")
        self.database.run(
            "CREATE TABLE ketoacidosis AS SELECT hadm_id, NULL::TIMESTAMP AS entered "
            f"FROM diagnoses_icd WHERE {KETOACIDOSIS}"
        )

    def choose_features(self, request: MimicRequest) -> list[Feature]:
        """Return the features that are asked for, the main one first."""
        if request.series:
            return super().choose_features(request)
        return [self.find_item(request.item, request.gap_item)]

    def load_labs(self, items: set[int]) -> None:
        """Make labs of the values of some items, of patients with a wanted admission."""
        has_item = f"{{itemid}} IN ({', '.join(map(str, sorted(items)))})"
        has_patient = "{subject_id} IN (SELECT subject_id FROM wanted)"
        file = self.load(self.labs, [has_item, has_patient], keys=("itemid", "subject_id"))
        self.database.run("ALTER TABLE labevents RENAME TO labs")
        if "storetime" not in file.header:
            self.usable = "charted by then"
            problem = "no column storetime: values count as known when charted"
            logger.warning("%s: %s", file.path, problem)
            self.database.run("UPDATE labs SET storetime = charttime")

    def find_item(self, item_text: str, gap_item: int) -> Feature:
        """Find the one item of a number or name."""
        items = self.database.frame("SELECT * FROM d_labitems ORDER BY itemid")
        has_label = items["label"].map(comparable) == comparable(item_text)
        rows = items[(items["itemid"].astype(str) == item_text.strip()) | has_label]
        if len(rows) != 1:
            details = rows[["itemid", "fluid", "category"]].astype(str).values
            several = "; ".join(", ".join(filter(None, row)) for row in details)
            problem = f"several, name one by its itemid: {several}" if several else "no such item"
            raise InputError(f"{self.paths['hosp/d_labitems']}: --item {item_text}: {problem}")
        item = int(rows["itemid"].iloc[0])
        if item in ANALYTES:
            return feature_of(ANALYTES[item], gap_item, (item,))
        return Feature(str(rows["label"].iloc[0]), None, (item,))


def make_mimic(request: MimicRequest) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format from MIMIC-IV, and their description."""
    if request.series and request.item != str(GAP_ITEM):
        raise InputError(f"--item {request.item}: does not go with --series")
    with duck.open_database(request.out, request.memory_limit, request.threads) as database:
        hospital = MimicTables(database, "--mimic_dir", request.mimic_dir)
        folder = request.notes_dir
        paths = [tables.find_file(folder, name, "--notes_dir") for name in NOTES] if folder else []
        rows, description = make_cohort(database, request, hospital)
        if paths:
            contexts = rows["clinical_context"]
            rows["clinical_context"], hashes = read_notes(database, paths, request, contexts)
            description["tables_sha256"] |= hashes
        return rows, description


def read_notes(
    database: duck.Database, paths: Sequence[Path], request: MimicRequest, contexts: pd.Series
) -> tuple[pd.Series, dict[str, str]]:
    """Return the contexts with the notes of the patients, and the SHA-256 of each file."""
    database.run(
        "CREATE TABLE target AS SELECT row_number() OVER (ORDER BY kept.stay) - 1 AS number, "
        "subject_id AS subject, hadm_id AS stay, first AS start, time AS prediction_time "
        "FROM kept JOIN stays USING (stay) JOIN windows USING (stay)"
    )
    hashes = {}
    for (name, columns), path in zip(NOTES.items(), paths, strict=True):
        file = tables.open_table(database, path, {})
        hashes[f"note/{name}"] = file.sha256
        load_notes(database, file, columns, cells.KEY, request.max_note_words)
    return add_notes(database, contexts, request.max_note_words), hashes
