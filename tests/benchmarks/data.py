"""How long and how much memory reading a large DKA file takes.

Usage:
    python tests/benchmarks/data.py --rows 1000000
    python tests/benchmarks/data.py --rows 200000 --series 9

Writes a synthetic file (3 to 8 observations a series; further series are measured at the times of
the first, or missing, or at times of their own), reads it in a fresh process, prints seconds and
that process's peak memory; the same for a tenth of the rows, so that the growth can be seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def series_text(rng: np.random.Generator, hours: list[float]) -> str:
    """Write a falling anion gap at the given hours."""
    values = rng.normal(24, 4, len(hours)).tolist()
    pairs = zip(values, hours, strict=True)
    return " -> ".join(f"{value - 0.2 * hour:.1f} ({hour:.2f}h)" for value, hour in pairs)


def write_file(path: Path, rows: int, series: int) -> int:
    """Write ``rows`` patients; give the number of values, each of which must be read."""
    rng = np.random.default_rng(0)
    total = 0
    further = "".join(f",trajectory_x{k} [u]" for k in range(1, series))
    with path.open("w", encoding="utf-8") as file:
        file.write(f"subject_id,clinical_trajectory,clinical_context,label_escalation{further}\n")
        for i in range(rows):
            hours = rng.exponential(4.0, rng.integers(3, 9)).cumsum().tolist()
            cells = [series_text(rng, hours)]
            total += len(hours)
            for kind in rng.integers(0, 3, series - 1).tolist():
                own = [hours, [], [hour + 0.5 for hour in hours]][kind]
                cells.append(series_text(rng, own))
                total += len(own)
            label = int(rng.random() < 0.14)
            rest = "".join(f",{cell}" for cell in cells[1:])
            file.write(f"{i},{cells[0]},{20 + i % 70}-year-old; medical ICU,{label}{rest}\n")
    return total


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(path: Path) -> dict[str, float]:
    """Read the file in this process; give seconds and MiB, imports apart."""
    sys.path.insert(0, str(ROOT))
    from dataset_format import MIMICtrajectoryDataset

    before = peak_mib()
    start = time.perf_counter()
    dataset = MIMICtrajectoryDataset(path)
    read = time.perf_counter() - start
    dataset.split(0)
    split = time.perf_counter() - start - read
    held = sum(
        array.nbytes for array in (dataset.times, dataset.values, dataset.ids, dataset.contexts)
    )
    return {
        "rows": len(dataset),
        "observations": len(dataset.times),
        "values": int((~np.isnan(dataset.values)).sum()),
        "read_s": read,
        "split_s": split,
        "imports_mib": before,
        "peak_mib": peak_mib(),
        "arrays_mib": held / 2**20,
    }


def measure_apart(rows: int, series: int, folder: Path) -> dict[str, float]:
    """Write a file and measure it in a fresh process."""
    path = folder / f"synthetic_{rows}.csv"
    values = write_file(path, rows, series)
    command = [sys.executable, __file__, "--measure", str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    if (figures["rows"], figures["values"]) != (rows, values):
        raise RuntimeError(f"{path.name}: {rows} rows, {values} values written, {figures} read")
    figures["file_mib"] = path.stat().st_size / 2**20
    path.unlink()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the larger file")
    parser.add_argument("--series", type=int, default=1, help="series a patient")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sizes = (max(1, arguments.rows // 10), arguments.rows)
        table = pd.DataFrame(
            [measure_apart(rows, arguments.series, Path(folder)) for rows in sizes]
        )
    sys.stdout.write(f"{table.to_string(index=False, float_format='{:.1f}'.format)}\n")
    sys.stdout.write(
        f"{platform.machine()}, {platform.system()}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, pandas {pd.__version__}, torch {torch.__version__}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
