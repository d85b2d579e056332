"""Time and memory of from_long and from_meds on many events, all of them within windows.

Usage:
    python tests/benchmarks/events.py --events 6000000 [--memory_limit 200MB] [--threads 1]

Writes made-up events, a thousand a subject, as a long table (CSV) and as a MEDS folder of two
shards, with two labels a subject whose windows hold all events. Each command runs ``--repeats``
times in a fresh process. Memory is measured as by ``mimic.py``. Writing needs pyarrow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, spread
from mimic import ROOT, measure

EVENTS_A_SUBJECT = 1_000
ITEMS = ("lactate", "sodium", "glucose", "urea", "gap")
START = pd.Timestamp("2150-01-01")


def write_events(folder: Path, events: int) -> None:
    """Write events and labels in both forms."""
    rng = np.random.default_rng(0)
    subject = np.arange(events) // EVENTS_A_SUBJECT
    minutes = rng.integers(1, 48 * 60, events)
    table = pd.DataFrame({"subject_id": subject, "time": START + pd.to_timedelta(minutes, "min")})
    table["item"] = rng.choice(ITEMS, events)
    table["value"] = rng.integers(5, 1_500, events) / 10
    table.to_csv(folder / "long.csv", index=False)
    columns = {"item": "code", "value": "numeric_value"}
    table = table.rename(columns=columns).astype({"time": "datetime64[us]"})
    (folder / "data").mkdir()
    for shard, rows in table.groupby(table["subject_id"] % 2):
        rows.astype({"numeric_value": "float32"}).to_parquet(folder / "data" / f"{shard}.parquet")
    labels = pd.DataFrame({"subject_id": np.unique(subject).repeat(2)})
    labels["prediction_time"] = [START + pd.Timedelta(1, "D"), START + pd.Timedelta(2, "D")] * (
        len(labels) // 2
    )
    labels["label"] = labels.index % 2
    labels.to_csv(folder / "labels.csv", index=False)
    labels = labels.astype({"prediction_time": "datetime64[us]"})
    labels.rename(columns={"label": "integer_value"}).to_parquet(folder / "labels.parquet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--events", type=int, default=6_000_000, help="number of events")
    parser.add_argument("--memory_limit", default="400MB", help="of the commands (400MB)")
    parser.add_argument("--threads", default="0", help="of the commands (0)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_events(folder, options.events)
        common = ["--memory_limit", options.memory_limit, "--threads", options.threads]
        common += [word for item in ITEMS for word in ("--series", f"{item}={item}")]
        long = ["--table", str(folder / "long.csv"), "--labels", str(folder / "labels.csv")]
        meds = ["--meds_dir", place, "--labels", str(folder / "labels.parquet"), "--no_splits"]
        for name, words in {"from_long": long, "from_meds": meds}.items():
            command = [sys.executable, str(ROOT / "dataset_format.py"), name, *words, *common]
            command += ["--out", str(folder / f"{name}.csv")]
            runs = [measure(command) for _ in range(options.repeats)]
            shown = {key: spread([run[key] for run in runs]) for key in runs[0]}
            sys.stdout.write(
                f"{name}, {options.events:,} events: {shown['seconds']} s, of the processor "
                f"{shown['processor s']}; {shown['MiB']} MiB\n"
            )
    sys.stdout.write(f"{options}; {machine('pandas', 'numpy', 'pyarrow')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
