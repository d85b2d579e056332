"""Hand-written events and labels, as a MEDS folder or as a long table. No real patient.

Hours count from the first of January 2150.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dataset_format import REQUESTS
from medgemma_clinical.data.sources.long_table import LongRequest
from table_requests import make_rows, table_request

MEDS_DEMO = Path(__file__).parent / "data" / "mimic_iv_demo_meds"
EPOCH = pd.Timestamp("2150-01-01")
GAP, GLUCOSE = "LAB//gap", "LAB//glucose"
UNITS = {GLUCOSE: "mg/dL"}
GAP_SERIES, GLUCOSE_SERIES = f"anion gap [mEq/L]={GAP}", f"glucose [mg/dL]={GLUCOSE}"


def moment(hours: float | None) -> Any:
    return pd.NaT if hours is None else (EPOCH + pd.Timedelta(hours, "h")).round("us")


@dataclass
class Mini:
    """Events and labels of a few subjects; each method returns it."""

    events: list[dict[str, Any]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)
    splits: dict[int, str] = field(default_factory=dict)

    def ask(self, subject: int, hours: float, label: int | None = 0, part: str = "train") -> Mini:
        self.labels.append({"subject": subject, "hours": hours, "label": label})
        self.splits[subject] = part
        return self

    def measure(
        self,
        subject: int,
        hours: float | None,
        value: float | None,
        code: str = GAP,
        *,
        stored: float | None = None,
        unit: str | None = None,
    ) -> Mini:
        unit = UNITS.get(code, "mEq/L") if unit is None else unit
        event = {"subject": subject, "hours": hours, "code": code, "value": value}
        self.events.append({**event, "stored": hours if stored is None else stored, "unit": unit})
        return self

    def write_meds(self, folder: Path) -> Path:
        """Write the events in a shard for each part of the split."""
        events = pd.DataFrame(self.events)
        table = pd.DataFrame(
            {
                "subject_id": events["subject"].astype("int64"),
                "time": pd.Series([moment(h) for h in events["hours"]], dtype="datetime64[us]"),
                "code": events["code"],
                "numeric_value": events["value"].astype("float32"),
            }
        )
        (folder / "metadata").mkdir(parents=True)
        for part, shard in table.groupby(table["subject_id"].map(self.splits).fillna("train")):
            place = folder / "data" / str(part)
            place.mkdir(parents=True)
            shard.to_parquet(place / "0.parquet", index=False)
        splits = pd.DataFrame(list(self.splits.items()), columns=["subject_id", "split"])
        splits.to_parquet(folder / "metadata" / "subject_splits.parquet")
        (folder / "task" / "deep").mkdir(parents=True)
        self.label_table("boolean_value", "boolean").to_parquet(folder / "task/deep/0.parquet")
        return folder

    def label_table(self, column: str, kind: Any) -> pd.DataFrame:
        labels = pd.DataFrame(self.labels)
        times = pd.Series([moment(h) for h in labels["hours"]], dtype="datetime64[us]")
        answers = {column: labels["label"].astype("Int64").astype(kind)}
        return pd.DataFrame({"subject_id": labels["subject"], "prediction_time": times, **answers})

    def long(self, *, stored: bool = True, unit: bool = True) -> pd.DataFrame:
        events = pd.DataFrame(self.events).dropna(subset="hours")
        table = pd.DataFrame(
            {
                "subject_id": events["subject"],
                "charttime": [moment(h) for h in events["hours"]],
                "item": events["code"],
                "value": events["value"],
                "unit": events["unit"],
                "storetime": [moment(h) for h in events["stored"]],
            }
        )
        left_out = [name for name, kept in (("storetime", stored), ("unit", unit)) if not kept]
        return table.drop(columns=left_out)


def write_table(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    return path


def meds(folder: Path, series: Sequence[str] = (GAP_SERIES,), **flags: Any) -> pd.DataFrame:
    """Rows of ``make_meds``."""
    flags = {"labels": folder / "task", "out": folder / "out.csv", **flags}
    return make_rows("from_meds", meds_dir=folder, series=tuple(series), **flags)[0]


def long_request(
    mini: Mini | pd.DataFrame, folder: Path, labels: pd.DataFrame | None = None, **flags: Any
) -> LongRequest:
    table = mini.long() if isinstance(mini, Mini) else mini
    if labels is None:
        assert isinstance(mini, Mini)
        labels = mini.label_table("label", "Int64")
    write_table(labels, folder / "labels.csv")
    place = write_table(table, folder / "table.csv")
    request = {"table": place, "labels": folder / "labels.csv", "out": folder / "out.csv"}
    return table_request("from_long", **{**request, **flags})


def long(
    mini: Mini | pd.DataFrame, folder: Path, labels: pd.DataFrame | None = None, **flags: Any
) -> pd.DataFrame:
    """Rows of ``make_long``."""
    return REQUESTS["from_long"][1](long_request(mini, folder, labels, **flags))[0]
