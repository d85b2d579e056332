"""Time and memory of from_mimic on a large labevents, beside pandas in chunks.

Usage:
    python tests/benchmarks/mimic.py --rows 20000000 [--form .csv.gz] [--cohort dka]

Writes a synthetic MIMIC-IV whose labevents has so many rows (all columns of MIMIC-IV 3.1; a fifth
of the rows is chemistry that is read, half of all name no admission; 1 admission in 200 is coded
as ketoacidosis) and another of a tenth. Then, ``--repeats`` times in turn, each in a fresh process:
the command on the smaller and on the larger, so that the growth can be seen; pandas.read_csv of the
larger table in chunks, which keeps nothing; and the command's imports. Writing needs pyarrow.
Memory is the sum of what all processes of the command hold at their worst moment, seen every 50 ms.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import machine, spread  # noqa: E402

from mimic_files import EPOCH, ITEMS, LABEVENTS, UNITS  # noqa: E402

CHEMISTRY = [item for item in ITEMS if item != 51221]
A_BLOCK = 200_000
LABS_A_STAY = 120
"""Rows of labevents for each admission, in MIMIC-IV 3.1 about 290."""

COMMAND = [sys.executable, str(ROOT / "dataset_format.py"), "from_mimic"]
PLAIN = (
    "import sys, pandas; "
    "print(sum(map(len, pandas.read_csv(sys.argv[1], chunksize=1_000_000, low_memory=False))))"
)


def times(hours: Any) -> Any:
    """Write hours since ``EPOCH`` as MIMIC-IV does, (n,) text."""
    moments = np.datetime64(EPOCH, "s") + (hours * 60).round().astype("timedelta64[m]")
    text = np.datetime_as_string(moments, unit="s")
    text.view(np.uint32).reshape(len(text), -1)[:, 10] = ord(" ")  # in place of the T
    return text


def write_small_tables(folder: Path, stays: int) -> None:
    """Write an admission a patient, in steps of two hours; one in three was in intensive care."""
    (folder / "hosp").mkdir(parents=True)
    (folder / "icu").mkdir()
    number = np.arange(stays)
    start = 2.0 * (number % 40_000)
    subject, hadm = number + 10_000_000, number + 20_000_000
    columns = {"subject_id": subject, "gender": "F", "anchor_age": 40 + number % 50}
    patients = pd.DataFrame({**columns, "anchor_year": 2150, "dod": ""})
    admissions = pd.DataFrame({"subject_id": subject, "hadm_id": hadm, "admittime": times(start)})
    admissions["dischtime"] = times(start + 150)
    admissions["deathtime"], admissions["hospital_expire_flag"] = "", 0
    code = np.where(number % 200 == 0, "E1010", "I10")
    diagnoses = pd.DataFrame({"subject_id": subject, "hadm_id": hadm, "seq_num": 1})
    diagnoses["icd_code"], diagnoses["icd_version"] = code, 10
    icu = admissions[["subject_id", "hadm_id"]].assign(stay_id=number + 30_000_000)
    icu["intime"], icu["outtime"] = times(start + 5), times(start + 50)
    icu["first_careunit"] = "Medical Intensive Care Unit (MICU)"
    items = pd.DataFrame({"itemid": list(ITEMS), "label": list(ITEMS.values())})
    tables = {"hosp/patients": patients, "hosp/admissions": admissions, "icu/icustays": icu[::3]}
    tables |= {"hosp/diagnoses_icd": diagnoses, "hosp/d_labitems": items}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv.gz", index=False)


def write_labevents(file: Any, rows: int, stays: int) -> None:
    """Write labevents by blocks; a patient's rows stand together, as in MIMIC-IV."""
    import pyarrow
    from pyarrow import csv

    rng = np.random.default_rng(0)
    for done in range(0, rows, A_BLOCK):
        n = min(A_BLOCK, rows - done)
        stay = (done + np.arange(n)) * stays // rows
        hour = 2.0 * (stay % 40_000) + rng.uniform(0, 140, n)
        chemistry = rng.random(n) < 0.2
        item = np.where(chemistry, rng.choice(CHEMISTRY, n), rng.integers(51_300, 53_000, n))
        value = rng.integers(5, 150, n)
        named = pyarrow.array(stay + 20_000_000, mask=rng.random(n) < 0.5)
        empty = pyarrow.nulls(n, pyarrow.string())
        columns = dict.fromkeys(LABEVENTS, empty)
        columns |= {"labevent_id": done + np.arange(n), "subject_id": stay + 10_000_000}
        columns |= {"hadm_id": named, "specimen_id": rng.integers(10**7, 10**8, n)}
        columns |= {"itemid": item, "charttime": times(hour), "storetime": times(hour + 1)}
        columns |= {"value": value, "valuenum": value, "ref_range_lower": np.full(n, 8)}
        units = pd.Series(item).map(UNITS).fillna("mEq/L").to_numpy(dtype=str)
        comments = np.where(value < 20, "___ said to be low.", "")
        columns |= {"valueuom": units, "order_provider_id": np.full(n, "P69FQC")}
        columns |= {"priority": np.full(n, "ROUTINE"), "comments": comments}
        table = pyarrow.table({name: columns[name] for name in LABEVENTS})
        options = csv.WriteOptions(include_header=done == 0, quoting_style="none")
        csv.write_csv(table, file, options)


def write_folder(folder: Path, rows: int, form: str) -> Path:
    """Write all tables; return the path of labevents."""
    stays = max(200, rows // LABS_A_STAY)
    write_small_tables(folder, stays)
    path = folder / "hosp" / f"labevents{form}"
    if form == ".csv.gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            write_labevents(file, rows, stays)
    else:
        with path.open("wb") as file:
            write_labevents(file, rows, stays)
    return path


def memory_mib(process: int) -> float:
    """Return what a process and its children hold now; shared pages count by share."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True
    ).stdout.split()
    total = 0.0
    for number in (str(process), *children):
        try:
            text = Path(f"/proc/{number}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        share = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0")
        total += int(share.split()[1]) / 1024
    return total


def processor_seconds() -> float:
    """Return the processor time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, those of the processor, and its peak memory in MiB."""
    start, before, most = time.perf_counter(), processor_seconds(), 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output)
        while process.poll() is None:
            most = max(most, memory_mib(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {text}")
    return {"seconds": seconds, "processor s": processor_seconds() - before, "MiB": most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows of labevents")
    parser.add_argument("--form", choices=(".csv", ".csv.gz"), default=".csv")
    parser.add_argument("--cohort", choices=("dka", "all"), default="dka")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sizes = (options.rows // 10, options.rows)
        outputs = {rows: Path(place) / f"rows_{rows}.csv" for rows in sizes}
        commands, paths = {}, {}
        for rows in sizes:
            folder = Path(place) / f"mimic_{rows}"
            paths[rows] = write_folder(folder, rows, options.form)
            command = [*COMMAND, "--mimic_dir", str(folder), "--out", str(outputs[rows])]
            flags = ["--cohort", options.cohort, "--compute_gap", "reported"]
            commands[f"from_mimic, {rows:,} rows"] = [*command, *flags]
        commands["pandas"] = [sys.executable, "-c", PLAIN, str(paths[options.rows])]
        commands["imports"] = [*COMMAND, "--help"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                found[name].append(measure(command))
        description = json.loads(outputs[options.rows].with_suffix(".json").read_text())
        size = paths[options.rows].stat().st_size / 2**20
    made = description["rows"]["rows"]
    sys.stdout.write(f"labevents{options.form} of {size:,.0f} MiB; {made} rows made\n")
    show(found, options.rows)
    sys.stdout.write(
        f"{machine('pandas', 'numpy', 'pyarrow')}; medians (least to most) of {options.repeats}\n"
    )
    return 0


def show(found: dict[str, list[dict[str, float]]], rows: int) -> None:
    """Print each command's figures, and how from_mimic compares and grows."""
    median = {}
    for name, runs in found.items():
        shown = {key: spread([run[key] for run in runs]) for key in runs[0]}
        median[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sys.stdout.write(
            f"{name:30s} {shown['seconds']} s, of the processor {shown['processor s']}; "
            f"{shown['MiB']} MiB\n"
        )
    small, large, plain, imports = (median[name] for name in found)
    shares = {key: large[key] / plain[key] for key in large}
    work = [each["processor s"] - imports["processor s"] for each in (small, large)]
    sys.stdout.write(
        f"from_mimic takes {shares['seconds']:.2f} of plain pandas' time, "
        f"{shares['processor s']:.2f} of its processor's and {shares['MiB']:.2f} of its memory, "
        f"{rows / large['seconds']:,.0f} rows a second; beyond the imports ten times the rows take "
        f"{work[1] / work[0]:.1f} times the processor's seconds\n"
    )


if __name__ == "__main__":
    sys.exit(main())
