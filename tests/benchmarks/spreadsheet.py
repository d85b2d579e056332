"""Write the sample data as the tables that a hospital would export.

    python tests/benchmarks/spreadsheet.py --out DIR [--rows 3850]

``labs.csv`` has a laboratory value a row, ``patients.csv`` a stay; ``new_labs.csv`` and
``new_patients.csv`` hold the last twenty stays without outcome, in place of new patients. The dates
are invented, the values are real.
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
NEW = 20
CHEMISTRY = ROOT / "tests" / "data" / "physionet2012_chemistry.csv.gz"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args(argv)
    stays = pd.read_csv(CHEMISTRY, nrows=arguments.rows)
    admitted = pd.Timestamp("2012-03-01 08:00") + pd.to_timedelta(6 * stays.index, "h")
    labs = [
        (patient, f"{start + pd.Timedelta(hours=float(hours)):%m/%d/%Y %H:%M}", name, value)
        for column, name in NAMES.items()
        for patient, start, cell in zip(
            stays["subject_id"], admitted, stays[column].fillna(""), strict=True
        )
        for value, hours in re.findall(r"([\d.]+) \(([\d.]+)h\)", cell)
    ]
    labs = pd.DataFrame(labs, columns=["Patient", "Collected", "Analyte", "Result"])
    patients = pd.DataFrame(
        {
            "Patient": stays["subject_id"],
            "Admitted": admitted.strftime("%m/%d/%Y %H:%M"),
            "Age": stays["static_age [years]"],
            "Sex": stays["static_sex_male"].map({1: "M", 0: "F"}),
            "Died": stays["label_escalation"].map({1: "Yes", 0: "No"}),
        }
    )
    new = patients.drop(columns="Died").tail(NEW)
    arguments.out.mkdir(parents=True, exist_ok=True)
    labs.to_csv(arguments.out / "labs.csv", index=False)
    patients.to_csv(arguments.out / "patients.csv", index=False)
    labs[labs["Patient"].isin(new["Patient"])].to_csv(arguments.out / "new_labs.csv", index=False)
    new.to_csv(arguments.out / "new_patients.csv", index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
