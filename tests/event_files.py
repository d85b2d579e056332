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
GAP_SERIES, GLUCOSE_SERIES = f"anion gap [mEq/L]={GAP}", f"glucose [mg/dL]={GLUCOSE}"


def moment(hours):
    return pd.NaT if pd.isna(hours) else (EPOCH + pd.Timedelta(hours, "h")).round("us")


def moments(hours):
    return pd.Series([moment(each) for each in hours], dtype="datetime64[us]")


def name_of(label):
    """The id of a label's row."""
    return f"{label['subject']} {moment(label['hours']):%Y-%m-%dT%H:%M:%S}"


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
        unit = ("mg/dL" if code == GLUCOSE else "mEq/L") if unit is None else unit
        self.events.append(dict(locals()))
        return self

    def write_meds(self, folder):
        """Write the events in a shard for each part of the split."""
        events = pd.DataFrame(self.events)
        table = pd.DataFrame({"subject_id": events["subject"], "time": moments(events["hours"])})
        table = table.assign(code=events["code"], numeric_value=events["value"].astype("float32"))
        table["text_value"] = events["text"].astype("string")
        for part, shard in table.groupby(table["subject_id"].map(self.splits).fillna("train")):
            write_table(shard, folder / "data" / part / "0.parquet")
        splits = pd.DataFrame(list(self.splits.items()), columns=["subject_id", "split"])
        write_table(splits, folder / "metadata" / "subject_splits.parquet")
        labels = self.label_table("boolean_value", "boolean")
        write_table(labels, folder / "task" / "deep" / "0.parquet")
        return folder

    def label_table(self, column="label", kind="Int64"):
        labels = pd.DataFrame(self.labels)
        table = {"subject_id": labels["subject"], "prediction_time": moments(labels["hours"])}
        return pd.DataFrame({**table, column: labels["label"].astype("Int64").astype(kind)})

    def long(self):
        events = pd.DataFrame(self.events).dropna(subset="hours").reset_index(drop=True)
        names = {"subject": "subject_id", "hours": "charttime", "code": "item"}
        names |= {"value": "value", "unit": "unit", "stored": "storetime"}
        table = events[[*names]].rename(columns=names)
        return table.assign(**{name: moments(table[name]) for name in ("charttime", "storetime")})


def random_events(rng, subjects=30):
    """Labels, some not known, and values, some on an edge of a window; each is stored later."""
    mini = Mini()
    for subject in range(subjects):
        mini.measure(subject, -50 * YEAR - subject, None, "MEDS_BIRTH")
        mini.measure(subject, None, None, f"GENDER//{'FM'[subject % 2]}")
        asked = {float(hours) / 60 for hours in rng.integers(24 * 60, 60 * 60, 2)}
        for hours in asked:
            mini.ask(subject, hours, rng.choice([0, 1, 0, 1, 0, 1, None]))
        edges = [h - k for h in asked for k in (0, 12, 24, 30, -0.4 / 3600)]
        for hour in [*rng.uniform(0, 90, 30), *rng.choice(edges, 10)]:
            code = (GAP, GLUCOSE, LACTATE, "DRUG//insulin")[rng.integers(4)]
            value = None if code.startswith("DRUG") else float(rng.integers(1, 300))
            stored = rng.choice([hour, hour + rng.exponential(3)])
            mini.measure(subject, float(hour), value, code, stored=float(stored))
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
    flags = {"out": folder / "out.csv", "labels": folder / "labels.csv", **flags}
    flags = {"table": folder / "table.csv", **flags}
    write_table(table, folder / "table.csv")
    write_table(labels, folder / "labels.csv")
    return make_rows("from_long", **flags)


def long(mini, folder, labels=None, **flags):
    return long_file(mini, folder, labels, **flags)[0]
