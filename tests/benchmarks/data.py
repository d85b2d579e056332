"""Measure the time and memory of reading large data.

    python tests/benchmarks/data.py                                  # both kinds, the sizes below
    python tests/benchmarks/data.py --rows 200000 --series 9 --registrations 0

Writes synthetic data of a size and of a tenth of it: DKA files (3 to 8 observations a series;
further series are measured at the times of the first, or missing, or at times of their own) and
folders of liver registrations with 13 history rows each. Reads each in a process of its own and
prints elapsed seconds, processor seconds (other work on the machine lengthens the elapsed ones
only) and peak memory.

Peak memory is the kernel's own (``resource``). A process inherits that of its parent, so this one
imports nothing large, and each process reports what it began with.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, machine, spread

HISTORY_ROWS = 13
MOST_SECONDS, MOST_GB = 60.0, {"dka": 1.6, "srtr": 4.0}
"""Most that reading the larger size may take; a GB is 10^9 bytes."""

BEGAN_SMALL = 64.0
"""Most MiB that a process may begin with: more is its parent's."""


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_dka(path: Path, rows: int, series: int) -> int:
    """Write ``rows`` patients; return the number of values, each of which must be read."""
    import numpy as np

    rng = np.random.default_rng(0)
    total = 0

    def text(hours: list[float]) -> str:
        """Write a falling anion gap."""
        pairs = zip(rng.normal(24, 4, len(hours)).tolist(), hours, strict=True)
        return " -> ".join(f"{value - 0.2 * hour:.1f} ({hour:.2f}h)" for value, hour in pairs)

    further = "".join(f",trajectory_x{k} [u]" for k in range(1, series))
    with path.open("w", encoding="utf-8") as file:
        file.write(f"subject_id,clinical_trajectory,clinical_context,label_escalation{further}\n")
        for i in range(rows):
            hours = rng.exponential(4.0, rng.integers(3, 9)).cumsum().tolist()
            cells = [text(hours)]
            total += len(hours)
            for kind in rng.integers(0, 3, series - 1).tolist():
                own = [hours, [], [hour + 0.5 for hour in hours]][kind]
                cells.append(text(own))
                total += len(own)
            label = int(rng.random() < 0.14)
            rest = "".join(f",{cell}" for cell in cells[1:])
            file.write(f"{i},{cells[0]},{20 + i % 70}-year-old; medical ICU,{label}{rest}\n")
    return total


def write_srtr(folder: Path, registrations: int) -> int:
    """Write liver registrations; return the number of history rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    from srtr_files import random_tables, write_folder

    cand, history = random_tables(registrations, "liver", 0, history_rows=HISTORY_ROWS)
    write_folder(folder, cand, history, "liver", dates="ddmonyyyy")
    return len(history)


def flags(kind: str, place: Path) -> list[str]:
    """Return the trainer's flags that read the written data."""
    if kind == "dka":
        return ["--data_path", str(place / "data.csv")]
    return ["--dataset", "srtr", "--organ", "liver", "--data_dir", str(place)]


def measure(words: list[str]) -> dict[str, Any]:
    """Read data in this process; return seconds and MiB."""
    import time

    began = peak_mib()
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import medgemma_trainer as trainer

    args = trainer.build_parser().parse_args(words)
    imports = peak_mib()
    start, work = time.perf_counter(), time.process_time()
    dataset = trainer.read_dataset(args)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    values = int((~np.isnan(dataset.values)).sum())
    return {
        **{"rows": len(dataset), "values": values, "seconds": seconds, "work": work},
        **{"began": began, "imports": imports, "peak": peak_mib()},
    }


def apart(*words: str) -> dict[str, Any]:
    """Run one step in a process of its own."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def time_reading(kind: str, size: int, series: int, repeats: int) -> dict[str, float]:
    """Write data of one size and read them; print and return the medians.

    Returns:
        Median of elapsed seconds and of processor seconds, and the most GB.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        written = apart("--write", kind, name, str(size), str(series))["written"]
        mib = sum(path.stat().st_size for path in place.iterdir()) / 2**20
        runs = [apart("--measure", *flags(kind, place)) for _ in range(repeats)]
    if kind == "dka" and (runs[0]["rows"], runs[0]["values"]) != (size, written):
        raise RuntimeError(f"{size} rows, {written} values written, {runs[0]} read")
    if max(run["began"] for run in runs) > BEGAN_SMALL:
        raise RuntimeError("a process began with another's memory")
    seconds, work = ([run[key] for run in runs] for key in ("seconds", "work"))
    peak, unit = max(run["peak"] for run in runs), "values" if kind == "dka" else "history rows"
    sys.stdout.write(
        f"{kind} {size:,} ({written:,} {unit}, {mib:,.0f} MiB): {spread(seconds)} s, processor "
        f"{spread(work)}; peak {peak:,.0f} MiB, imports {runs[0]['imports']:,.0f}\n"
    )
    sys.stdout.flush()
    return {
        "seconds": statistics.median(seconds),
        "work": statistics.median(work),
        "GB": peak * 2**20 / 1e9,
    }


def judge(kind: str, small: dict[str, float], large: dict[str, float]) -> None:
    """Print the larger size beside its limits, and the growth."""
    reached = large["seconds"] <= MOST_SECONDS and large["GB"] <= MOST_GB[kind]
    sys.stdout.write(
        f"  {large['seconds']:.1f} s of {MOST_SECONDS:.0f}, {large['GB']:.2f} GB of "
        f"{MOST_GB[kind]}: {'reached' if reached else 'MISSED'}; ten times the data take "
        f"{large['work'] / small['work']:.1f} times the processor's time\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the DKA file, 0 for none")
    parser.add_argument("--series", type=int, default=1, help="series a DKA patient")
    parser.add_argument("--registrations", type=int, default=200_000, help="SRTR, 0 for none")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for kind, size in (("dka", arguments.rows), ("srtr", arguments.registrations)):
        if not size:
            continue
        small = time_reading(kind, max(1, size // 10), arguments.series, arguments.repeats)
        judge(kind, small, time_reading(kind, size, arguments.series, arguments.repeats))
    sys.stdout.write(
        f"{machine('numpy', 'pandas', 'torch')}; medians (least to most) of {arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.stdout.write(json.dumps(measure(sys.argv[2:])) + "\n")
    elif sys.argv[1:2] == ["--write"]:
        kind, place, size, series = sys.argv[2:]
        number = (
            write_dka(Path(place, "data.csv"), int(size), int(series))
            if kind == "dka"
            else write_srtr(Path(place), int(size))
        )
        sys.stdout.write(json.dumps({"written": number}) + "\n")
    else:
        sys.exit(main())
