"""Hand-written events and labels, as a MEDS folder or as a long table. No real patient.

Hours count from the first of January 2150.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from table_requests import make_rows

MEDS_DEMO = Path(__file__).parent / "data" / "mimic_iv_demo_meds"
EPOCH = pd.Timestamp("2150-01-01")
YEAR = 8766.0
GAP, GLUCOSE, LACTATE = "LAB//gap", "LAB//glucose", "LAB//lactate"
UNITS = {GLUCOSE: "mg/dL"}
GAP_SERIES, GLUCOSE_SERIES = f"anion gap [mEq/L]={GAP}", f"glucose [mg/dL]={GLUCOSE}"


def moment(hours):
    return pd.NaT if hours is None else (EPOCH + pd.Timedelta(hours, "h")).round("us")


def moments(hours):
    return pd.Series([moment(each) for each in hours], dtype="datetime64[us]")


@dataclass
class Mini:
    """Events and labels of a few subjects; each method returns it."""

    events: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    splits: dict = field(default_factory=dict)

    def ask(self, subject, hours, label=0, part="train"):
        self.labels.append({"subject": subject, "hours": hours, "label": label})
        self.splits[subject] = part
        return self

    def measure(self, subject, hours, value, code=GAP, *, stored=None, unit=None, text=None):
        stored = hours if stored is None else stored
        unit = UNITS.get(code, "mEq/L") if unit is None else unit
        self.events.append(dict(locals()))
        return self

    def write_meds(self, folder):
        """Write the events in a shard for each part of the split."""
        events = pd.DataFrame(self.events)
        table = pd.DataFrame(
            {
                "subject_id": events["subject"].astype("int64"),
                "time": moments(
                    events["hours"].astype(object).where(events["hours"].notna(), None)
                ),
                "code": events["code"],
                "numeric_value": events["value"].astype("float32"),
                "text_value": events["text"].astype("string"),
            }
        )
        (folder / "metadata").mkdir(parents=True)
        for part, shard in table.groupby(table["subject_id"].map(self.splits).fillna("train")):
            (folder / "data" / part).mkdir(parents=True)
            shard.to_parquet(folder / "data" / part / "0.parquet", index=False)
        splits = pd.DataFrame(list(self.splits.items()), columns=["subject_id", "split"])
        splits.to_parquet(folder / "metadata" / "subject_splits.parquet")
        (folder / "task" / "deep").mkdir(parents=True)
        self.label_table("boolean_value", "boolean").to_parquet(folder / "task/deep/0.parquet")
        return folder

    def label_table(self, column="label", kind="Int64"):
        labels = pd.DataFrame(self.labels)
        table = {"subject_id": labels["subject"], "prediction_time": moments(labels["hours"])}
        return pd.DataFrame({**table, column: labels["label"].astype("Int64").astype(kind)})

    def long(self, **left_out):
        events = pd.DataFrame(self.events).dropna(subset="hours")
        table = pd.DataFrame(
            {
                "subject_id": events["subject"],
                "charttime": [moment(each) for each in events["hours"]],
                "item": events["code"],
                "value": events["value"],
                "unit": events["unit"],
                "storetime": [moment(each) for each in events["stored"]],
            }
        )
        return table.drop(columns=[name for name, kept in left_out.items() if not kept])


def random_events(rng, subjects=60):
    """Two labels a subject, values that are stored later, birth and sex."""
    mini = Mini()
    for subject in range(subjects):
        mini.measure(subject, -50 * YEAR - subject, None, "MEDS_BIRTH")
        mini.measure(subject, None, None, f"GENDER//{'FM'[subject % 2]}")
        for hours in {*rng.integers(24 * 60, 60 * 60, 2)}:
            mini.ask(subject, hours / 60, int(rng.integers(2)))
        for hour in rng.uniform(0, 90, 40):
            code = (GAP, GLUCOSE, LACTATE, "DRUG//insulin")[rng.integers(4)]
            value = None if code.startswith("DRUG") else float(rng.integers(1, 300))
            mini.measure(subject, hour, value, code, stored=hour + rng.exponential(3))
    return mini


def write_table(table, path):
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    return path


def meds_file(folder, series=(GAP_SERIES,), **flags):
    """Rows and description of from_meds."""
    flags = {"labels": folder / "task", "out": folder / "out.csv", **flags}
    return make_rows("from_meds", meds_dir=folder, series=tuple(series), **flags)


def meds(folder, series=(GAP_SERIES,), **flags):
    return meds_file(folder, series, **flags)[0]


def long_file(mini, folder, labels=None, **flags):
    """Rows and description of from_long on a Mini, or on a table and labels."""
    table, labels = (mini.long(), mini.label_table()) if labels is None else (mini, labels)
    paths = {"table": folder / "table.csv", "labels": folder / "labels.csv"}
    paths = {"out": folder / "out.csv", **paths}
    write_table(table, paths["table"])
    write_table(labels, paths["labels"])
    return make_rows("from_long", **{**paths, **flags})


def long(mini, folder, labels=None, **flags):
    return long_file(mini, folder, labels, **flags)[0]
