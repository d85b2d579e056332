"""Make the table of sepsis of a set of PhysioNet 2019, for `stage1.py` and `competing.py`.

    python tests/benchmarks/physionet2019.py --folder training_setB --out sepsis.csv [--ids FILE]

The folder holds the PhysioNet/CinC Challenge 2019 as it comes, one ``.psv`` a stay and one line an
hour; with ``--ids`` only stays of that table's ``subject_id`` are read. All 34 series are read of
the first six hours. ``event_hours`` counts from hour 6 to the onset of sepsis (event 1), six hours
after the first positive label of the challenge, or to the end of the record (2). Stays of six
hours or fewer, and those whose label is positive at the first hour, so that they were septic by
hour 6, are left out.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from common import write

HOURS, LABEL_IS_EARLY, WITHIN = 6, 6, 24
STATIC = {
    "Age": "static_age [years]",
    "Gender": "static_sex_male",
    "Unit1": "static_unit_1",
    "Unit2": "static_unit_2",
    "HospAdmTime": "static_hours_before_icu [h]",
}
HOUR, SEPSIS = "ICULOS", "SepsisLabel"


def one_stay(hours):
    """Return the row of a stay of the challenge's lines, or None where it is left out."""
    positive = hours.loc[hours[SEPSIS] == 1, HOUR]
    event, end = (1, positive.min()) if len(positive) else (2, hours[HOUR].max() - HOURS)
    if end <= (LABEL_IS_EARLY - HOURS + 1 if event == 1 else 0):
        return None
    early = hours[hours[HOUR] <= HOURS]
    row = {"prediction_hours": HOURS, "event_hours": int(end), "event": event}
    row["label_sepsis_24h"] = int(event == 1 and end <= WITHIN)
    for name in hours.columns.drop([HOUR, SEPSIS, *STATIC]):
        known = early[[HOUR, name]].dropna()
        cell = " -> ".join(f"{value:g} ({hour:.0f}h)" for hour, value in known.to_numpy())
        row[f"trajectory_{name.lower()}"] = cell or None
    static = hours.iloc[0][[*STATIC]].rename(STATIC)
    static["static_hours_before_icu [h]"] *= -1
    return row | static.to_dict()


def read_set(folder, ids=None):
    """Return the table of all stays of a folder that are not left out, and how many it holds."""
    paths = [path for path in sorted(folder.glob("*.psv")) if ids is None or path.stem in ids]
    if not paths:
        raise SystemExit(f"{folder}: holds no .psv of these stays")
    rows = {path.stem: one_stay(pd.read_csv(path, sep="|")) for path in paths}
    kept = {name: row for name, row in rows.items() if row is not None}
    return pd.DataFrame.from_dict(kept, orient="index").rename_axis("subject_id"), len(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ids", type=Path)
    arguments = parser.parse_args(argv)
    ids = arguments.ids and set(pd.read_csv(arguments.ids, usecols=["subject_id"])["subject_id"])
    table, stays = read_set(arguments.folder, ids)
    events = table["label_sepsis_24h"].sum()
    write(f"{stays:,} stays, {stays - len(table):,} left out; {events:,} septic within {WITHIN} h")
    table.dropna(axis=1, how="all").to_csv(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
