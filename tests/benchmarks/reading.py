"""Processor time and peak memory of reading large synthetic tables.

    python tests/benchmarks/reading.py --what dka --rows 100000
    python tests/benchmarks/reading.py --what srtr --rows 20000
    python tests/benchmarks/reading.py --what from_mimic --rows 2000000 [flags of the command]
    python tests/benchmarks/reading.py --what from_long --rows 1000000 [flags of the command]
    python tests/benchmarks/reading.py --what from_meds --rows 1000000 [flags of the command]

``dka`` and ``srtr`` read a data set as training does; the others run that command of
dataset_format.py. Rows are patients, registrations, rows of labevents, or events. Each of the
``--repeats`` is a new process. The time is that of the processor, since other work on a machine
lengthens the elapsed time. Needs pyarrow.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, peak_mib, spread, write

START = pd.Timestamp("2150-01-01")
SRTR_ROWS = 13
"""Mean number of history rows per registration."""

LABS_PER_STAY, BLOCK = 120, 200_000
"""Rows of labevents per admission (about 290 in MIMIC-IV 3.1); rows written at a time."""

FEWEST_STAYS = 400
EVENTS_PER_SUBJECT = 1_000
ITEMS = ("lactate", "sodium", "glucose", "urea", "gap")

# --------------------------------------------------------------------------- what is written


def write_dka(folder, rows):
    """Write patients with 3 to 8 values of an anion gap that falls."""
    rng = np.random.default_rng(0)
    with (folder / "data.csv").open("w") as file:
        file.write("subject_id,clinical_trajectory,clinical_context,label_escalation\n")
        for i, label in enumerate(rng.random(rows) < 0.14):
            hours = rng.exponential(4.0, rng.integers(3, 9)).cumsum()
            values = rng.normal(24, 4, len(hours)) - 0.2 * hours
            pairs = zip(values.tolist(), hours.tolist(), strict=True)
            series = " -> ".join(f"{value:.1f} ({hour:.2f}h)" for value, hour in pairs)
            file.write(f"{i},{series},{20 + i % 70}-year-old; medical ICU,{int(label)}\n")


def write_srtr(folder, rows):
    """Write liver registrations with their history as CSV."""
    from srtr_files import random_tables, write_folder

    tables = random_tables(rows, "liver", 0, history_rows=SRTR_ROWS)
    write_folder(folder, *tables, "liver", dates="ddmonyyyy")


def mimic_times(hours):
    """Return hours since ``START`` as MIMIC-IV writes times, (n,) text."""
    moments = np.datetime64(START, "s") + (hours * 60).round().astype("timedelta64[m]")
    text = np.datetime_as_string(moments, unit="s")
    text.view(np.uint32).reshape(len(text), -1)[:, 10] = ord(" ")  # ISO 8601 has a T here
    return text


def write_mimic(folder, rows):
    """Write a MIMIC-IV with so many rows of labevents, in all columns of version 3.1.

    A patient has one admission. One in 200 is coded as ketoacidosis and one in three was in
    intensive care.
    """
    from mimic_files import ITEMS as LABS

    for name in ("hosp", "icu"):
        (folder / name).mkdir(parents=True)
    stays = max(FEWEST_STAYS, rows // LABS_PER_STAY)
    number = np.arange(stays)
    start = 2.0 * (number % 40_000)
    subject = pd.DataFrame({"subject_id": number + 10_000_000})
    stay = subject.assign(hadm_id=number + 20_000_000)
    age = {"anchor_age": 40 + number % 50, "anchor_year": 2150}
    times = {"admittime": mimic_times(start), "dischtime": mimic_times(start + 150)}
    code = np.where(number % 200 == 0, "E1010", "I10")
    icu = {"intime": mimic_times(start + 5), "outtime": mimic_times(start + 50)}
    icu |= {"stay_id": number + 30_000_000, "first_careunit": "Medical Intensive Care Unit (MICU)"}
    tables = {
        "hosp/patients": subject.assign(gender="F", **age, dod=""),
        "hosp/admissions": stay.assign(**times, deathtime="", hospital_expire_flag=0),
        "hosp/diagnoses_icd": stay.assign(seq_num=1, icd_code=code, icd_version=10),
        "hosp/d_labitems": pd.DataFrame({"itemid": list(LABS), "label": list(LABS.values())}),
        "icu/icustays": stay.assign(**icu)[::3],
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv.gz", index=False)
    with (folder / "hosp" / "labevents.csv").open("wb") as file:
        write_labevents(file, rows, stays)


def write_labevents(file, rows, stays):
    """Write labevents in blocks: a fifth are items that are read, half name no admission."""
    import pyarrow  # here, for a measured process does not need it
    from pyarrow import csv

    from mimic_files import ITEMS, LABEVENTS, UNITS

    rng = np.random.default_rng(0)
    for done in range(0, rows, BLOCK):
        n = min(BLOCK, rows - done)
        stay = (done + np.arange(n)) * stays // rows  # a patient's rows stand together
        hour = 2.0 * (stay % 40_000) + rng.uniform(0, 140, n)
        read = rng.random(n) < 0.2
        item = np.where(read, rng.choice(list(ITEMS), n), rng.integers(51_300, 53_000, n))
        value = rng.integers(5, 150, n)
        columns = dict.fromkeys(LABEVENTS, pyarrow.nulls(n, pyarrow.string()))
        columns |= {"labevent_id": done + np.arange(n), "subject_id": stay + 10_000_000}
        columns["hadm_id"] = pyarrow.array(stay + 20_000_000, mask=rng.random(n) < 0.5)
        columns |= {"specimen_id": rng.integers(10**7, 10**8, n), "itemid": item}
        columns |= {"charttime": mimic_times(hour), "storetime": mimic_times(hour + 1)}
        columns |= {"value": value, "valuenum": value, "ref_range_lower": np.full(n, 8)}
        columns["valueuom"] = pd.Series(item).map(UNITS).fillna("mEq/L").to_numpy(dtype=str)
        columns |= {"order_provider_id": np.full(n, "P69FQC"), "priority": np.full(n, "ROUTINE")}
        columns["comments"] = np.where(value < 20, "___ said to be low.", "")
        options = csv.WriteOptions(include_header=done == 0, quoting_style="none")
        csv.write_csv(pyarrow.table(columns), file, options)


def event_tables(rows):
    """Return events, and two labels per subject at whose times all or half have happened."""
    rng = np.random.default_rng(0)
    subject = np.arange(rows) // EVENTS_PER_SUBJECT
    time = START + pd.to_timedelta(rng.integers(1, 48 * 60, rows), "min")
    events = pd.DataFrame({"subject_id": subject, "time": time, "item": rng.choice(ITEMS, rows)})
    events["value"] = rng.integers(5, 1_500, rows) / 10
    labels = pd.DataFrame({"subject_id": np.unique(subject).repeat(2)})
    labels["prediction_time"] = START + pd.to_timedelta(1 + labels.index % 2, "D")
    return events, labels.assign(label=labels.index % 2)


def write_long(folder, rows):
    """Write a long table of events and its labels as CSV."""
    for name, table in zip(("long", "labels"), event_tables(rows), strict=True):
        table.to_csv(folder / f"{name}.csv", index=False)


def write_meds(folder, rows):
    """Write a MEDS folder of two shards and its labels."""
    events, labels = event_tables(rows)
    events = events.rename(columns={"item": "code", "value": "numeric_value"})
    events = events.astype({"time": "datetime64[us]", "numeric_value": "float32"})
    (folder / "data").mkdir()
    for shard, part in events.groupby(events["subject_id"] % 2):
        part.to_parquet(folder / "data" / f"{shard}.parquet")
    labels = labels.astype({"prediction_time": "datetime64[us]"})
    labels.rename(columns={"label": "boolean_value"}).astype({"boolean_value": bool}).to_parquet(
        folder / "labels.parquet"
    )


WRITE = {
    **{"dka": write_dka, "srtr": write_srtr, "from_mimic": write_mimic},
    **{"from_long": write_long, "from_meds": write_meds},
}

# --------------------------------------------------------------------------- what is measured


def command(what, folder):
    """Return the flags of a command of dataset_format.py that reads the written folder."""
    words = [what, "--out", str(folder / "made.csv")]
    if what == "from_mimic":
        return [*words, "--mimic_dir", str(folder), "--compute_gap", "reported"]
    words += [word for item in ITEMS for word in ("--series", f"{item}={item}")]
    if what == "from_long":
        words += ["--table", str(folder / "long.csv"), "--equal_times", "keep"]
        return [*words, "--labels", str(folder / "labels.csv")]
    words += ["--meds_dir", str(folder), "--labels", str(folder / "labels.parquet")]
    return [*words, "--no_splits"]


def measure(what, folder, flags):
    """Read in this process; return processor seconds and MiB, and those before reading."""
    import dataset_format
    import srtr_dataset

    imports = {"import s": time.process_time(), "import MiB": peak_mib()}
    began = time.process_time()
    if what == "dka":
        dataset_format.MIMICtrajectoryDataset(folder / "data.csv")
    elif what == "srtr":
        srtr_dataset.SRTRTrajectoryDataset(folder, "liver")
    elif code := dataset_format.main([*command(what, folder), *flags]):
        raise SystemExit(code)
    return {"s": time.process_time() - began, "MiB": peak_mib(), **imports}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--what", choices=tuple(WRITE), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        WRITE[arguments.what](folder, arguments.rows)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        runs = []
        for _ in range(arguments.repeats):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                runs.append(process.submit(measure, arguments.what, folder, flags).result())
    shown = {name: spread([run[name] for run in runs]) for name in runs[0]}
    write(
        f"{' '.join([arguments.what, *flags])}, {arguments.rows:,} rows, {size:,.0f} MiB: "
        f"processor {shown['s']} s, peak {shown['MiB']} MiB; imports before it {shown['import s']} "
        f"s, {shown['import MiB']} MiB\n"
        f"{machine('pandas', 'duckdb')}; median (minimum to maximum) of {arguments.repeats}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
