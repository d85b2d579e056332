"""How long the metrics and the report of many patients take, and how much memory.

Usage:
    python tests/benchmarks/report.py --patients 100000

Draws labels, risks of a model and of six baselines, and subgroups; computes the metrics and writes
the report in a fresh process; prints seconds (wall clock and processor) and the peak memory of that
process. Runs a tenth of the patients in turn, to show the growth.
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
from common import ROOT, machine, peak_mib, spread

BASELINES = 6


def measure(patients: int) -> dict[str, float]:
    """Write a report in this process; return seconds and MiB, imports apart."""
    sys.path.insert(0, str(ROOT))
    from medgemma_clinical.evaluation.case_mix import AGE_EDGES, OBSERVATION_EDGES, banded
    from medgemma_clinical.evaluation.metrics_table import evaluate
    from medgemma_clinical.evaluation.report import ReportContent, write_report

    rng = np.random.default_rng(0)
    odds = -2 + rng.normal(size=patients)
    labels = rng.random(patients) < 1 / (1 + np.exp(-odds))
    ids = np.arange(patients).astype(str)
    rows = pd.DataFrame({"id": ids, "label": labels.astype(int), "patient": ids})
    rows["model"] = 1 / (1 + np.exp(-odds))
    for k in range(BASELINES):
        rows[f"baseline {k}"] = 1 / (1 + np.exp(-odds - 0.5 * rng.normal(size=patients)))
    observations = banded(rng.integers(1, 30, patients), OBSERVATION_EDGES, "1", "more")
    ages = banded(rng.uniform(18, 95, patients), AGE_EDGES, "under 18", "older")
    bands = pd.DataFrame({"observations": observations, "age": ages})
    history = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": 1 / k, "val_auroc": 0.7, "improved": True}
        for k in range(1, 20)
    ]
    content = ReportContent("Benchmark", {}, {}, {}, 0.15, 0, bands, history=history)
    before, start, busy = peak_mib(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        write_report(path, rows, evaluate(rows, 0, 0.15), content, folder=Path(folder))
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
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(arguments.repeats):
        for size in sizes:
            command = [sys.executable, __file__, "--measure", str(size)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[size].append(json.loads(result.stdout.splitlines()[-1]))
    for size, each in runs.items():
        shown = {key: spread([run[key] for run in each]) for key in each[0]}
        sys.stdout.write(
            f"{size:,} patients: {shown['seconds']} s, processor {shown['cpu_seconds']} s; peak "
            f"{shown['peak_mib']} MiB, of them {shown['imports_and_data_mib']} imports and data; "
            f"file {shown['file_kib']} KiB\n"
        )
    small, large = (statistics.median(run["cpu_seconds"] for run in runs[s]) for s in sizes)
    sys.stdout.write(f"ten times the patients take {large / small:.1f} times the processor time\n")
    sys.stdout.write(
        f"{machine('numpy', 'pandas', 'scikit-learn')}; medians (least to most) of "
        f"{arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
