"""How long, and with how much memory, large data are read, from their files and from the cache.

Usage:
    python tests/benchmarks/data.py                                  # both kinds, the sizes below
    python tests/benchmarks/data.py --rows 200000 --series 9 --registrations 0

Writes made-up data of a size and of a tenth of it: DKA files (3 to 8 observations a series; further
series are measured at the times of the first, or missing, or at times of their own) and folders of
liver registrations with 13 history rows each. Of each it prints seconds (that pass, and of the
processor: beside other work the first are longer) and peak memory of reading it, of reading it with
--cache_dir for the first time, and again, every one in a process of its own. The three must give
data of the same hash.

Peak memory is the kernel's own (``resource``). A process inherits that of whoever started it, so
this one imports nothing large; each process tells with what it began.
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

from common import machine, spread

ROOT = Path(__file__).resolve().parents[2]
HISTORY_ROWS = 13
MOST_SECONDS, MOST_GB = 60.0, {"dka": 1.5, "srtr": 4.0}
"""What reading the larger size may take, with a cache for the first time too; 10^9 bytes."""

BEGAN_SMALL = 64.0
"""MiB that a process may begin with: more was its parent's."""


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_dka(path: Path, rows: int, series: int) -> int:
    """Write ``rows`` patients; give the number of values, each of which must be read."""
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
    """Write liver registrations; give the number of history rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    from srtr_files import random_tables, write_folder

    cand, history = random_tables(registrations, "liver", 0, history_rows=HISTORY_ROWS)
    write_folder(folder, cand, history, "liver", dates="ddmonyyyy")
    return len(history)


def flags(kind: str, place: Path) -> list[str]:
    """Give the trainer's flags that read what was written."""
    if kind == "dka":
        return ["--data_path", str(place / "data.csv")]
    return ["--dataset", "srtr", "--organ", "liver", "--data_dir", str(place)]


def measure(words: list[str]) -> dict[str, Any]:
    """Read data in this process; give seconds and MiB."""
    import time

    began = peak_mib()
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import medgemma_trainer as trainer

    args = trainer.resolve(trainer.build_parser().parse_args(words))
    imports = peak_mib()
    start, work = time.perf_counter(), time.process_time()
    read = trainer.read_cached(args) if args.cache_dir else trainer.read_data(args)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    values = int((~np.isnan(read.dataset.values)).sum())
    return {
        **{"rows": len(read.dataset), "values": values, "sha256": read.fingerprint},
        **{"seconds": seconds, "work": work},
        **{"began": began, "imports": imports, "peak": peak_mib()},
    }


def apart(*words: str) -> dict[str, Any]:
    """Run one step in a process of its own."""
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(kind: str, size: int, series: int, repeats: int) -> dict[str, dict[str, float]]:
    """Write data of one size, read them in three ways, print.

    Returns:
        Of each way: median seconds that passed and of the processor, and the most GB.
    """
    with tempfile.TemporaryDirectory() as name:
        place, cache = Path(name) / "data", Path(name) / "cache"
        place.mkdir()
        written = apart("--write", kind, str(place), str(size), str(series))["written"]
        bytes_ = sum(path.stat().st_size for path in place.iterdir())
        words = flags(kind, place)
        ways: dict[str, list[dict[str, Any]]] = {}
        for _ in range(repeats):
            for path in cache.iterdir() if cache.exists() else ():
                path.unlink()
            keep = ["--cache_dir", str(cache)]
            for way, more in (("files", []), ("first with cache", keep), ("from cache", keep)):
                ways.setdefault(way, []).append(apart("--measure", *words, *more))
        runs = [run for each in ways.values() for run in each]
        if len({run["sha256"] for run in runs}) > 1:
            raise RuntimeError("the cache gives other data")
        if kind == "dka" and (runs[0]["rows"], runs[0]["values"]) != (size, written):
            raise RuntimeError(f"{size} rows, {written} values written, {runs[0]} read")
        if max(run["began"] for run in runs) > BEGAN_SMALL:
            raise RuntimeError("a process began with another's memory")
        held = sum(path.stat().st_size for path in cache.iterdir())
    unit = "values" if kind == "dka" else "history rows"
    line = f"{kind} {size:,} ({written:,} {unit}, {bytes_ / 2**20:,.0f} MiB; "
    sys.stdout.write(f"{line}cache {held / 2**20:,.0f} MiB)\n")
    found = {}
    for way, each in ways.items():
        times = {key: [run[key] for run in each] for key in ("seconds", "work")}
        peak, imports = max(run["peak"] for run in each), each[0]["imports"]
        sys.stdout.write(
            f"  {way:18s}{spread(times['seconds'])} s, of the processor {spread(times['work'])}; "
            f"peak {peak:,.0f} MiB, imports {imports:,.0f}\n"
        )
        medians = {key: statistics.median(values) for key, values in times.items()}
        found[way] = {**medians, "GB": peak * 2**20 / 1e9}
    sys.stdout.flush()
    return found


def judge(
    kind: str, small: dict[str, dict[str, float]], large: dict[str, dict[str, float]]
) -> None:
    """Print what the larger size took beside what it may take, and how it grew."""
    for way in ("files", "first with cache"):
        seconds, size = large[way]["seconds"], large[way]["GB"]
        reached = seconds <= MOST_SECONDS and size <= MOST_GB[kind]
        sys.stdout.write(
            f"  {way}: {seconds:.1f} s of {MOST_SECONDS:.0f}, {size:.2f} GB of {MOST_GB[kind]}: "
            f"{'reached' if reached else 'MISSED'}\n"
        )
    growth = large["files"]["work"] / small["files"]["work"]
    sys.stdout.write(f"  ten times the data take {growth:.1f} times the processor's time\n")


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
        small = compare(kind, max(1, size // 10), arguments.series, arguments.repeats)
        judge(kind, small, compare(kind, size, arguments.series, arguments.repeats))
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
