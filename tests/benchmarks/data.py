"""How long and how much memory reading a large DKA file takes.

Usage:
    python tests/benchmarks/data.py --rows 1000000

Writes a synthetic file (3 to 8 observations a row), reads it in a fresh process, prints seconds
and that process's peak memory; the same for a tenth of the rows, so that the growth can be seen.
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
BLOCK = 100_000
"""Rows written at a time."""


def write_file(path: Path, rows: int) -> int:
    """Write ``rows`` patients as falling anion gaps; give the number of observations."""
    rng = np.random.default_rng(0)
    total = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("subject_id,clinical_trajectory,clinical_context,label_escalation\n")
        for start in range(0, rows, BLOCK):
            lengths = rng.integers(3, 9, min(BLOCK, rows - start))
            total += int(lengths.sum())
            labels = rng.random(len(lengths)) < 0.14
            for i, (length, label) in enumerate(zip(lengths, labels, strict=True), start):
                hours = rng.exponential(4.0, length).cumsum()
                values = rng.normal(24, 4, length) - 0.2 * hours
                pairs = zip(values.tolist(), hours.tolist(), strict=True)
                series = " -> ".join(f"{value:.1f} ({hour:.2f}h)" for value, hour in pairs)
                file.write(f'{i},"{series}","{20 + i % 70}-year-old, medical ICU",{int(label)}\n')
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
        "read_s": read,
        "split_s": split,
        "imports_mib": before,
        "peak_mib": peak_mib(),
        "arrays_mib": held / 2**20,
    }


def measure_apart(rows: int, folder: Path) -> dict[str, float]:
    """Write a file and measure it in a fresh process."""
    path = folder / f"synthetic_{rows}.csv"
    observations = write_file(path, rows)
    command = [sys.executable, __file__, "--measure", str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    if (figures["rows"], figures["observations"]) != (rows, observations):
        raise RuntimeError(f"{path.name}: {rows} rows written, {figures} read")
    figures["file_mib"] = path.stat().st_size / 2**20
    path.unlink()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the larger file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sizes = (max(1, arguments.rows // 10), arguments.rows)
        table = pd.DataFrame([measure_apart(rows, Path(folder)) for rows in sizes])
    sys.stdout.write(f"{table.to_string(index=False, float_format='{:.1f}'.format)}\n")
    sys.stdout.write(
        f"{platform.machine()}, {platform.system()}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, pandas {pd.__version__}, torch {torch.__version__}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
