"""Hand-written MIMIC-IV folders for tests and benchmark: admissions by hours, any form of file.

No real patient. Hours count from the first of January 2150; there are columns that nobody reads.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from table_requests import make_rows

DEMO = Path(__file__).parent / "data" / "mimic_iv_demo"
EPOCH = pd.Timestamp("2150-01-01")
ITEMIDS = (50868, 50882, 50902, 50912, 50931, 50820, 50983)
GAP, BICARBONATE, CHLORIDE, CREATININE, GLUCOSE, PH, SODIUM = ITEMIDS
UNITS = {CREATININE: "mg/dL", GLUCOSE: "mg/dL", 50809: "mg/dL", PH: "units"}
NAMES = ("Anion Gap", "Bicarbonate", "Chloride", "Creatinine", "Glucose", "pH", "Sodium")
ITEMS = {**dict(zip(ITEMIDS, NAMES, strict=True)), 50809: "Glucose", 51221: "Hematocrit"}
LABEVENTS = (
    *("labevent_id", "subject_id", "hadm_id", "specimen_id", "itemid", "order_provider_id"),
    *("charttime", "storetime", "value", "valuenum", "valueuom", "ref_range_lower"),
    *("ref_range_upper", "flag", "priority", "comments"),
)


def moment(hour):
    """Write an hour as MIMIC-IV writes times, empty for None."""
    return "" if hour is None else f"{EPOCH + pd.Timedelta(hour, 'h'):%Y-%m-%d %H:%M:%S}"


class Mini:
    """A MIMIC-IV that grows by single rows; hours are those since ``EPOCH``."""

    def __init__(self):
        tables = ("hosp/patients", "hosp/admissions", "hosp/diagnoses_icd", "hosp/d_labitems")
        self.rows = {name: [] for name in (*tables, "hosp/labevents", "icu/icustays")}
        for item, label in ITEMS.items():
            row = {"itemid": item, "label": label, "fluid": "Blood", "category": "Chemistry"}
            self.rows["hosp/d_labitems"].append(row)

    def subject(self, hadm):
        admissions = self.rows["hosp/admissions"]
        return next(row["subject_id"] for row in admissions if row["hadm_id"] == hadm)

    def admit(self, hadm, start=0.0, end=200.0, *, subject=None, age=50, gender="F", **more):
        """Add an admission, and its patient where new; each has its own unless given."""
        subject = 10_000 + hadm if subject is None else subject
        death = more.get("death")
        if subject not in [row["subject_id"] for row in self.rows["hosp/patients"]]:
            patient = {"subject_id": subject, "gender": gender, "anchor_year": 2150, "dod": ""}
            patient["anchor_age"] = "" if age is None else age
            self.rows["hosp/patients"].append(patient)
        row = {"subject_id": subject, "hadm_id": hadm, "admittime": moment(start)}
        row |= {"dischtime": moment(end), "deathtime": moment(death), "admission_type": "URGENT"}
        row["hospital_expire_flag"] = more.get("expired", int(death is not None))
        self.rows["hosp/admissions"].append(row)
        codes = [("4019", 9), (more.get("code", "E1010"), more.get("version", 10))]
        for k, (code, version) in enumerate(codes, 1):
            row = {"hadm_id": hadm, "seq_num": k, "icd_code": code, "icd_version": version}
            self.rows["hosp/diagnoses_icd"].append({"subject_id": subject, **row})
        return self

    def lab(self, hadm, hour, value, item=GAP, *, stored=-1.0, unit=None, named=True, **columns):
        """Add a value of an admission's patient; stored an hour after it is charted."""
        number = len(self.rows["hosp/labevents"]) + 1
        row = dict.fromkeys(LABEVENTS, "")
        row |= {"labevent_id": number, "subject_id": self.subject(hadm), "value": "___"}
        row |= {"hadm_id": hadm if named else "", "itemid": item, "charttime": moment(hour)}
        row["storetime"] = moment(hour + 1 if stored == -1.0 else stored)
        row["valuenum"] = "" if value is None else value
        row["valueuom"] = UNITS.get(item, "mEq/L") if unit is None else unit
        row |= {"priority": "STAT", "comments": 'said "high", ___.'}
        self.rows["hosp/labevents"].append(row | columns)
        return self

    def settling(self, hadm, start=0):
        """Add two open gaps within the window of 12 h and a closed one after it: no event."""
        for hour, value in ((1, 20), (4, 18), (40, 9)):
            self.lab(hadm, start + hour, value)
        return self

    def trio(self, hadm, hour, sodium, **words):
        """Add sodium, chloride 100 and bicarbonate 20, drawn together."""
        self.lab(hadm, hour, sodium, SODIUM, **words).lab(hadm, hour, 100, CHLORIDE, **words)
        return self.lab(hadm, hour, 20, BICARBONATE, **words)

    def icu(self, hadm, start, end):
        row = {"subject_id": self.subject(hadm), "hadm_id": hadm, "intime": moment(start)}
        row |= {"stay_id": 30_000_000 + len(self.rows["icu/icustays"]), "outtime": moment(end)}
        unit = "Medical Intensive Care Unit (MICU)"
        self.rows["icu/icustays"].append(row | {"first_careunit": unit, "last_careunit": unit})
        return self

    def tables(self):
        made = {name: pd.DataFrame(rows).astype(str) for name, rows in self.rows.items()}
        if made["icu/icustays"].empty:  # a hospital has an intensive care unit
            row = {"subject_id": "1", "hadm_id": "1", "stay_id": "1", "intime": moment(0)}
            row |= {"outtime": moment(1), "first_careunit": "TSICU", "last_careunit": "TSICU"}
            made["icu/icustays"] = pd.DataFrame([row])
        return made

    def write(self, folder, form=".csv"):
        return write_tables(folder, self.tables(), form)


def read_tables(folder):
    """Read a folder of .csv.gz as text, empty where nothing stands."""
    paths = sorted(folder.glob("*/*.csv.gz"))
    names = [f"{path.parent.name}/{path.name.partition('.')[0]}" for path in paths]
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in paths]
    return dict(zip(names, tables, strict=True))


NUMBERS = ("_id", "itemid", "seq_num", "_version", "anchor_age", "anchor_year", "_flag")


def write_tables(folder, tables, form=".csv"):
    """Write tables of text in a form; in Parquet numbers are numbers and times are times."""
    for name, table in tables.items():
        path = folder / f"{name}{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == ".parquet":
            typed = table.copy()
            for column in table:
                if str(column).endswith(NUMBERS):
                    typed[column] = pd.to_numeric(table[column]).astype("Int64")
                elif str(column).endswith("time"):
                    typed[column] = pd.to_datetime(table[column].replace("", None))
                elif column == "valuenum":
                    typed[column] = pd.to_numeric(table[column])
            typed.to_parquet(path)
        elif form == ".csv.gz":
            path.write_bytes(gzip.compress(table.to_csv(index=False).encode(), 1, mtime=0))
        else:
            table.to_csv(path, index=False)
    return folder


def shuffled(table, seed):
    return table.iloc[np.random.default_rng(seed).permutation(len(table))]


class Extracted(NamedTuple):
    """The rows of an extraction, by admission, and their description."""

    rows: pd.DataFrame
    description: dict

    def removed(self):
        return {r["rule"]: r["removed"] for r in self.description["flow"] if r["removed"]}

    def series(self, hadm):
        return str(self.rows.loc[hadm, "clinical_trajectory"])

    def context(self, hadm):
        return str(self.rows.loc[hadm, "clinical_context"])

    def inputs(self):
        """Every column but the outcomes, as text, of each admission."""
        columns = [name for name in self.rows if not str(name).startswith(("label_", "event"))]
        cells = self.rows[columns].astype(str).itertuples()
        return {hadm: tuple(row) for hadm, *row in cells}


def extracted(folder, outcome=("escalation",), **request):
    """Extract all adults of a folder by the reported gap, unless another cohort is requested."""
    wanted = {"cohort": "all", "compute_gap": "reported", "out": folder.parent / "o.csv", **request}
    rows, description = make_rows("from_mimic", mimic_dir=folder, outcome=tuple(outcome), **wanted)
    return Extracted(rows.set_index("hadm_id"), description)


def with_storing_times(tables, seed):
    """Return the demo with storing times, most soon after, some hours after."""
    labs = tables["hosp/labevents"].copy()
    rng = np.random.default_rng(seed)
    chart = pd.to_datetime(labs["charttime"])
    delay = rng.exponential(1.5, len(labs)) * np.where(rng.random(len(labs)) < 0.1, 8, 1)
    stored = (chart + pd.to_timedelta(delay, unit="h")).dt.floor("s")
    labs["storetime"] = stored.astype(str)
    return {**tables, "hosp/labevents": labs}
