"""Write the sample data as the tables that two hospitals would export.

    python tests/benchmarks/spreadsheet.py --out DIR [--rows 3850]

``labs.csv`` has a laboratory value a row, ``patients.csv`` a stay; ``new_labs.csv`` and
``new_patients.csv`` hold the last twenty stays without outcome, in place of new patients. A quarter
of the stays are those of another hospital, with other names, signs and units: ``chem_b.csv`` and
``stays_b.csv``. The dates are invented, the values are real.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd
from common import ROOT

NAMES = {
    "clinical_trajectory": "Bicarbonate",
    "trajectory_creatinine [mg/dL]": "Creatinine",
    "trajectory_lactate [mmol/L]": "Lactate",
}
OTHER_NAMES = {"Bicarbonate": ("HCO3", "mmol/L"), "Creatinine": ("CREA", "umol/L")}
UNITS = ("coronary", "cardiac_surgery", "medical")
NEW = 20
CHEMISTRY = ROOT / "tests" / "data" / "physionet2012_chemistry.csv.gz"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args(argv)
    stays = pd.read_csv(CHEMISTRY, nrows=arguments.rows)
    admitted = pd.Timestamp("2012-03-01 08:00") + pd.to_timedelta(6 * stays.index, "h")
    stays["admitted"] = admitted
    first = len(stays) - len(stays) // 4
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_first(stays[:first], arguments.out)
    write_other(stays[first:], arguments.out)
    return 0


def values_of(stays):
    """Return patient, time, name and value of each measurement."""
    values = [
        (patient, start + pd.Timedelta(hours=float(hours)), name, value)
        for column, name in NAMES.items()
        for patient, start, cell in zip(
            stays["subject_id"], stays["admitted"], stays[column].fillna(""), strict=True
        )
        for value, hours in re.findall(r"([\d.]+) \(([\d.]+)h\)", cell)
    ]
    return pd.DataFrame(values, columns=["Patient", "Collected", "Analyte", "Result"])


def write_first(stays, folder):
    """Write the tables of the hospital that trains, and of its new patients."""
    labs = values_of(stays)
    labs["Collected"] = labs["Collected"].dt.strftime("%m/%d/%Y %H:%M")
    patients = pd.DataFrame(
        {
            "Patient": stays["subject_id"],
            "Admitted": stays["admitted"].dt.strftime("%m/%d/%Y %H:%M"),
            "Age": stays["static_age [years]"],
            "Sex": stays["static_sex_male"].map({1: "M", 0: "F"}),
            "Died": stays["label_escalation"].map({1: "Yes", 0: "No"}),
        }
    )
    new = patients.drop(columns="Died").tail(NEW)
    labs.to_csv(folder / "labs.csv", index=False)
    patients.to_csv(folder / "patients.csv", index=False)
    labs[labs["Patient"].isin(new["Patient"])].to_csv(folder / "new_labs.csv", index=False)
    new.to_csv(folder / "new_patients.csv", index=False)


def write_other(stays, folder):
    """Write the tables of the other hospital, which measures no lactate."""
    labs = values_of(stays)
    labs = labs[labs["Analyte"].isin(OTHER_NAMES)]
    names, units = (labs["Analyte"].map(lambda x, k=k: OTHER_NAMES[x][k]) for k in (0, 1))
    values = labs["Result"].astype(float)
    values = values.where(units != "umol/L", (88.4 * values).round(1))
    lines = {"MRN": labs["Patient"], "TAKEN": labs["Collected"].dt.strftime("%d.%m.%Y %H:%M")}
    lines |= {"TEST": names, "VALUE": values, "UNIT": units}
    pd.DataFrame(lines).to_csv(folder / "chem_b.csv", index=False, sep=";", decimal=",")
    wards = stays[[f"static_unit_{name}" for name in UNITS]].set_axis(UNITS, axis=1)
    people = {
        "MRN": stays["subject_id"],
        "ARRIVAL": stays["admitted"].dt.strftime("%d.%m.%Y %H:%M"),
        "AGE": stays["static_age [years]"],
        "GENDER": stays["static_sex_male"].map({1: "male", 0: "female"}),
        "WARD": wards.idxmax(axis=1).where(wards.any(axis=1), "surgical"),
        "DECEASED": stays["label_escalation"],
    }
    pd.DataFrame(people).to_csv(folder / "stays_b.csv", index=False, sep=";")


if __name__ == "__main__":
    sys.exit(main())
