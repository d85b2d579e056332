"""How long and how much memory a report on many patients takes.

Usage:
    python tests/benchmarks/report.py --patients 100000

Draws labels, risks of a model and of six baselines, and subgroups, writes the report in a fresh
process, prints seconds (passed, and of the processor) and that process's peak memory; in turn with
a tenth of the patients, so that the growth can be seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, peak_mib, spread

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINES = 6


def measure(patients: int) -> dict[str, float]:
    """Write a report in this process; give seconds and MiB, imports apart."""
    sys.path.insert(0, str(ROOT))
    import medgemma_trainer as trainer
    from dataset_format import AGE_BANDS, OBSERVATION_BANDS, banded

    rng = np.random.default_rng(0)
    told = -2 + rng.normal(size=patients)
    labels = (rng.random(patients) < 1 / (1 + np.exp(-told))).astype(float)
    ids = np.arange(patients).astype(str)
    observations = banded(rng.integers(1, 30, patients), OBSERVATION_BANDS)
    ages = banded(rng.uniform(18, 95, patients), AGE_BANDS)
    others = {
        f"baseline {k}": 1 / (1 + np.exp(-told - 0.5 * rng.normal(size=patients)))
        for k in range(BASELINES)
    }
    subgroups = pd.DataFrame({"observations": observations, "age": ages})
    cohort = trainer.Cohort(labels, 1 / (1 + np.exp(-told)), ids, ids, subgroups, others)
    history = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": 1 / k, "val_auroc": 0.7, "improved": True}
        for k in range(1, 20)
    ]
    page = trainer.Told("Benchmark", "Event", {}, {}, {}, history=history)
    before, start, busy = peak_mib(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        trainer.write_report(path, cohort, page, threshold=0.15, seed=0)
        size = path.stat().st_size
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "imports_and_data_mib": before,
        "peak_mib": peak_mib(),
        "file_kib": size / 2**10,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--patients", type=int, default=100_000, help="of the larger report")
    parser.add_argument("--repeats", type=int, default=3, help="reports of each size (3)")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure)) + "\n")
        return 0
    sizes = (arguments.patients // 10, arguments.patients)
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(arguments.repeats):
        for size in sizes:
            command = [sys.executable, __file__, "--measure", str(size)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[size].append(json.loads(result.stdout.splitlines()[-1]))
    for size, each in found.items():
        told = {key: spread([run[key] for run in each]) for key in each[0]}
        sys.stdout.write(
            f"{size:,} patients: {told['seconds']} s, of the processor {told['cpu_seconds']}; peak "
            f"{told['peak_mib']} MiB, {told['imports_and_data_mib']} of it imports and data; "
            f"{told['file_kib']} KiB of file\n"
        )
    small, large = (statistics.median(run["cpu_seconds"] for run in found[s]) for s in sizes)
    sys.stdout.write(
        f"ten times the patients take {large / small:.1f} times the processor's time\n"
    )
    sys.stdout.write(
        f"{machine('numpy', 'pandas', 'scikit-learn')}; medians (least to most) of "
        f"{arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
