"""Measure predictions a second and peak memory of a trained model on many new rows.

    python tests/benchmarks/predict.py [--rows 200000] [--labels]
    python tests/benchmarks/predict.py --checkpoint RUN/classification --rows 2000

Without --checkpoint stage 1 is first trained for one epoch on the sample data. The rows are those
of the sample data, repeated, each a patient, as CSV without labels, or with labels to see what the
figures cost. Scores a tenth of the rows and all of them in turn, each in a fresh process, and
prints rows a second (without imports and loading) and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import SAMPLE, machine, peak_mib, spread

import medgemma_trainer as trainer


def train_one(folder: Path) -> Path:
    """Train stage 1 for an epoch; return its folder."""
    words = ["--trajectory_only", "--trajectory_epochs", "1", "--log_file", "none"]
    words += ["--data_path", str(SAMPLE), "--output_dir", str(folder)]
    if trainer.main(words):
        raise RuntimeError("stage 1 could not be trained")
    return folder / "trajectory"


def write_rows(path: Path, data: Path, rows: int, labels: bool) -> None:
    """Write so many rows from the sample data, and its description beside them."""
    table = pd.read_csv(data, dtype=str)
    if not labels:
        table = table.drop(columns="label_escalation")
    for start in range(0, rows, len(table)):
        chunk = table.head(rows - start).copy()
        chunk["subject_id"] = np.arange(start, start + len(chunk))
        chunk.to_csv(path, index=False, mode="a", header=start == 0)
    name = data.name.removesuffix(".gz").removesuffix(".csv")
    shutil.copy(data.with_name(f"{name}.json"), path.with_suffix(".json"))


def measure(checkpoint: str, data: str, out: str, threads: int) -> None:
    """Score the rows in this process; print seconds and MiB."""
    torch.set_num_threads(threads)
    before, loaded = peak_mib(), 0.0
    load = trainer.TrajectoryModel.from_pretrained

    def timed(*arguments: Any, **keywords: Any) -> trainer.TrajectoryModel:
        nonlocal loaded
        start = time.perf_counter()
        model = load(*arguments, **keywords)
        loaded = time.perf_counter() - start
        return model

    trainer.TrajectoryModel.from_pretrained = timed  # type: ignore[method-assign]
    words = ["--predict", "--checkpoint", checkpoint, "--data_path", data, "--predictions", out]
    start = time.perf_counter()
    if trainer.main(words):
        raise RuntimeError("no predictions")
    seconds = time.perf_counter() - start
    figures = {"s": seconds - loaded, "load_s": loaded, "imports_mib": before, "mib": peak_mib()}
    sys.stdout.write(json.dumps(figures) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the larger file")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a stage; without it stage 1 is trained"
    )
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--labels", action="store_true", help="with labels, so with figures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="scorings of each file (3)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        parts: list[str] = arguments.measure
        measure(parts[0], parts[1], parts[2], arguments.threads)
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = arguments.checkpoint or train_one(folder)
        sizes = (max(1, arguments.rows // 10), arguments.rows)
        files = {rows: folder / f"rows_{rows}.csv" for rows in sizes}
        for rows, data in files.items():
            write_rows(data, arguments.data, rows, arguments.labels)
        found: dict[int, list[dict[str, float]]] = {rows: [] for rows in sizes}
        for _ in range(arguments.repeats):
            for rows, data in files.items():
                command = [sys.executable, __file__, "--threads", str(arguments.threads)]
                command += ["--measure", str(checkpoint), str(data), str(folder / "out.csv")]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                found[rows].append(json.loads(result.stdout.splitlines()[-1]))
    for rows, each in found.items():
        shown = {key: spread([run[key] for run in each]) for key in each[0]}
        rate = spread([rows / run["s"] for run in each], 0)
        sys.stdout.write(
            f"{rows:,} rows: {shown['s']} s, {rate} a second, loading {shown['load_s']} s; peak "
            f"{shown['mib']} MiB, {shown['imports_mib']} of it imports\n"
        )
    few, many = (statistics.median(run["s"] for run in found[rows]) for rows in sizes)
    sys.stdout.write(
        f"{sizes[1] / sizes[0]:.3g} times the rows take {many / few:.1f} times the time\n"
        f"{machine('torch', 'pandas', threads=arguments.threads)}; medians (least to most) of "
        f"{arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
