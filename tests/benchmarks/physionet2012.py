"""Make the table of all signals of PhysioNet 2012, for the trainer and `stage1.py`.

    python tests/benchmarks/physionet2012.py --folder DIR --out FILE.csv

DIR holds the PhysioNet/CinC Challenge 2012 as it comes: ``set-a`` with one file a stay, or
``set-a.tar.gz``, and ``Outcomes-a.txt``; sets b and c where they are there. All 37 series are read
until hour 48, the last value of each hour, and age, sex, weight and type of unit as static
features. `public_folds.py` trains on it in published folds.
"""

import argparse
import json
import sys
import tarfile
from pathlib import Path

import pandas as pd
from common import write

MAIN, WEIGHT = "HCO3", "Weight"
GENERAL = ["RecordID", "Age", "Gender", "Height", "ICUType"]
"""Parameters at 00:00 that are no series; the weight is both."""

UNITS = {1: "coronary", 2: "cardiac_surgery", 3: "medical", 4: "surgical"}
PREDICTION_MINUTE = 48 * 60
DESCRIPTION = {
    "series": MAIN,
    "unit": "mmol/L",
    "question": "Will the patient die in hospital?",
    "outcome": "In-hospital death",
    "prediction_time": "48 hours after admission to the ICU",
    "horizon": "the rest of the hospital stay, however long",
    "source": "PhysioNet/CinC Challenge 2012",
    "licence": "Open Data Commons Attribution 1.0",
}


def read_set(path):
    """Return Time, Parameter and Value of each stay of a set, a folder or a tar file."""
    if path.is_dir():
        return {int(stay.stem): pd.read_csv(stay) for stay in sorted(path.glob("*.txt"))}
    stays = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name)
            if member.isfile() and name.suffix == ".txt" and name.stem.isdigit():
                stays[int(name.stem)] = pd.read_csv(archive.extractfile(member))
    return stays


def find_sets(folder):
    """Return the path of each set by its name, the folder where a tar file lies beside it."""
    sets = {path.name.partition(".")[0]: path for path in folder.glob("set-?.tar*")}
    sets |= {path.name: path for path in folder.glob("set-?") if path.is_dir()}
    return dict(sorted(sets.items()))


def read_sets(folder):
    """Return Time, Parameter and Value of all stays by RecordID, and whether each patient died."""
    stays = {}
    for path in find_sets(folder).values():
        stays |= read_set(path)
    if not stays:
        raise SystemExit(f"{folder}: holds no set-a/RecordID.txt or set-a.tar.gz, nor a set b or c")
    tables = [pd.read_csv(path, index_col=0) for path in sorted(folder.glob("Outcomes-?.txt"))]
    return pd.concat(stays).droplevel(1), pd.concat(tables)["In-hospital_death"]


def dka_table(rows, died):
    """Return the table in the DKA format, by RecordID; a negative value is an unknown one."""
    rows = rows.rename_axis("subject_id").reset_index()
    general = rows[rows["Time"] == "00:00"].drop_duplicates(["subject_id", "Parameter"])
    general = general.pivot(index="subject_id", columns="Parameter", values="Value")
    general = general.where(general >= 0).reindex(columns=[*GENERAL, WEIGHT])
    clock = rows["Time"].str.split(":", expand=True).astype(int)
    by_then = 60 * clock[0] + clock[1] <= PREDICTION_MINUTE
    known = rows[by_then & (rows["Value"] >= 0) & ~rows["Parameter"].isin(GENERAL)]
    hour = clock.loc[known.index, 0].rename("hour")
    last = known.groupby(["subject_id", "Parameter", hour])["Value"].last().reset_index()
    last["piece"] = last["Value"].map("{:g}".format) + " (" + last["hour"].astype(str) + "h)"
    cells = last.groupby(["subject_id", "Parameter"])["piece"].agg(" -> ".join).unstack()
    cells = cells.dropna(how="all", subset=cells.columns.drop(WEIGHT, errors="ignore"))
    names = {name: f"trajectory_{name.lower()}" for name in cells} | {MAIN: "clinical_trajectory"}
    cells = cells[[MAIN, *cells.columns.drop(MAIN)]].rename(columns=names)
    general = general.loc[cells.index]
    static = {"age [years]": general["Age"].astype("Int64")}
    static["sex_male"] = general["Gender"].astype("Int64")
    static["weight [kg]"] = general[WEIGHT].round()
    for number, unit in UNITS.items():
        static[f"unit_{unit}"] = (general["ICUType"] == number).astype(int)
    table = cells.join(pd.DataFrame(static).add_prefix("static_"))
    return table.assign(label_escalation=died.reindex(table.index))


def write_table(table, path):
    """Write the table in the DKA format, and its description beside it."""
    table.to_csv(path)
    path.with_suffix(".json").write_text(json.dumps(DESCRIPTION))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    rows, died = read_sets(arguments.folder)
    table, stays = dka_table(rows, died), rows.index.nunique()
    deaths = table["label_escalation"].sum()
    write(f"{stays:,} stays, {stays - len(table)} without any value; {deaths:,.0f} deaths")
    write_table(table, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
