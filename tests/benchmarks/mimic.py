"""How fast and with how much memory from_mimic reads labevents, beside plain pandas.

Usage:
    python tests/benchmarks/mimic.py --rows 20000000 [--form .csv.gz] [--cohort dka]

Writes a synthetic MIMIC-IV whose labevents has so many rows (all columns of MIMIC-IV 3.1; a fifth
of the rows is chemistry that is read, half of all name no admission; 1 admission in 200 is coded
as ketoacidosis), runs the command on it in a fresh process, and on a tenth, so that the growth can
be seen; then reads the larger table whole by one pandas.read_csv in another fresh process. Memory
is the sum of what all processes of the command hold at their worst moment, seen every 50 ms.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mimic_files import EPOCH, ITEMS, LABEVENTS, UNITS  # noqa: E402

CHEMISTRY = [item for item in ITEMS if item != 51221]
A_BLOCK = 200_000
LABS_A_STAY = 120
"""Rows of labevents for each admission, in MIMIC-IV 3.1 about 290."""

PLAIN = "import sys, pandas; print(len(pandas.read_csv(sys.argv[1])))"


def times(hours: Any) -> list[str]:
    """Write hours since ``EPOCH`` as MIMIC-IV does."""
    moments = EPOCH + pd.to_timedelta((hours * 60).round(), unit="min")
    text: list[str] = moments.strftime("%Y-%m-%d %H:%M:%S").tolist()
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


def write_labevents(file: IO[str], rows: int, stays: int) -> None:
    """Write labevents by blocks; a patient's rows stand together, as in MIMIC-IV."""
    rng = np.random.default_rng(0)
    for done in range(0, rows, A_BLOCK):
        n = min(A_BLOCK, rows - done)
        stay = np.sort((done + np.arange(n)) * stays // rows)
        hour = 2.0 * (stay % 40_000) + rng.uniform(0, 140, n)
        chemistry = rng.random(n) < 0.2
        item = np.where(chemistry, rng.choice(CHEMISTRY, n), rng.integers(51_000, 53_000, n))
        value = rng.integers(5, 150, n)
        table = pd.DataFrame({"labevent_id": done + np.arange(n), "subject_id": stay + 10_000_000})
        named = pd.Series((stay + 20_000_000).astype(str)).where(rng.random(n) < 0.5, "")
        table["hadm_id"], table["specimen_id"] = named, rng.integers(10**7, 10**8, n)
        table["itemid"], table["order_provider_id"] = item, "P69FQC"
        table["charttime"], table["storetime"] = times(hour), times(hour + 1)
        table["value"], table["valuenum"] = value, value
        table["valueuom"] = pd.Series(item).map(UNITS).fillna("mEq/L")
        table["ref_range_lower"], table["ref_range_upper"], table["flag"] = 8, 20, ""
        table["priority"], table["comments"] = (
            "ROUTINE",
            np.where(value < 20, 'said "low", ok.', ""),
        )
        table[list(LABEVENTS)].to_csv(file, index=False, header=done == 0)


def write_folder(folder: Path, rows: int, form: str) -> Path:
    """Write all tables; give the path of labevents."""
    stays = max(200, rows // LABS_A_STAY)
    write_small_tables(folder, stays)
    path = folder / "hosp" / f"labevents{form}"
    if form == ".csv.gz":
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            write_labevents(file, rows, stays)
    else:
        with path.open("w", encoding="utf-8") as file:
            write_labevents(file, rows, stays)
    return path


def memory_mib(process: int) -> float:
    """Give what a process and its children hold now; pages that they share count once a share."""
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


def measure(command: list[str]) -> tuple[float, float, str]:
    """Run a command; give seconds, the most memory that was seen, and what it printed."""
    start, most = time.perf_counter(), 0.0
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
    return seconds, most, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows of labevents")
    parser.add_argument("--form", choices=(".csv", ".csv.gz"), default=".csv")
    parser.add_argument("--cohort", choices=("dka", "all"), default="dka")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    script = str(ROOT / "dataset_format.py")
    with tempfile.TemporaryDirectory() as place:
        for rows in (options.rows // 10, options.rows):
            folder, out = Path(place) / f"mimic_{rows}", Path(place) / f"rows_{rows}.csv"
            path = write_folder(folder, rows, options.form)
            command = [sys.executable, script, "from_mimic", "--mimic_dir", str(folder)]
            command += ["--out", str(out), "--cohort", options.cohort]
            seconds, most, _ = measure(command)
            made = json.loads(out.with_suffix(".json").read_text())["rows"]["rows"]
            found.append({"what": "from_mimic", "rows": rows, "seconds": seconds, "MiB": most})
            found[-1] |= {"rows/s": rows / seconds, "made": made}
            found[-1]["file MiB"] = path.stat().st_size / 2**20
        seconds, most, _ = measure([sys.executable, "-c", PLAIN, str(path)])
        found.append({"what": "pandas whole", "rows": options.rows, "seconds": seconds})
        found[-1] |= {"MiB": most, "rows/s": options.rows / seconds}
    idle, imports, _ = measure([sys.executable, script, "from_mimic", "--help"])
    found.append({"what": "imports", "seconds": idle, "MiB": imports})
    sys.stdout.write(
        f"{pd.DataFrame(found).to_string(index=False, float_format='{:.1f}'.format)}\n"
    )
    sys.stdout.write(
        f"from_mimic takes {found[1]['seconds'] / found[2]['seconds']:.2f} of plain pandas' time "
        f"and {found[1]['MiB'] / found[2]['MiB']:.2f} of its memory; {os.cpu_count()} cores, "
        f"{platform.machine()}; Python {platform.python_version()}, pandas {pd.__version__}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
