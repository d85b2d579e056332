"""Time stage 1 from file to report on synthetic patients of two sizes, and extrapolate.

    python tests/benchmarks/scale.py [--rows 20000 200000] [--batch_size 256] [--threads 1]

The program reads, trains for one epoch, scores and reports as a user runs it, each size in
processes of its own, both sizes in turn. Prints seconds of each part and peak memory; then, by the
slope between the medians of the two sizes, an extrapolation to 1, 10 and 100 million patients.
``--threads`` applies to every library.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, machine, peak_mib, spread

from data import apart

PARTS = ("reading", "an epoch", "figures")
LARGER = (1_000_000, 10_000_000, 100_000_000)


def run(words: list[str], folder: Path) -> dict[str, float]:
    """Run stage 1 for an epoch in this process; return seconds of its parts and MiB."""
    import time

    sys.path.insert(0, str(ROOT))
    import torch

    import medgemma_trainer as trainer
    from medgemma_clinical.commands import results

    torch.set_num_threads(int(words.pop(0)))
    marks: list[float] = [time.perf_counter()]

    def marked(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            result = real(*given, **named)
            marks.append(time.perf_counter())
            return result

        setattr(module, name, call)

    marked(trainer, "read_dataset")
    marked(trainer, "fit")
    marked(results, "write_results")
    code = trainer.main([*words, "--output_dir", str(folder)])
    if code:
        raise SystemExit(code)
    read, trained, written = (b - a for a, b in itertools.pairwise(marks))
    return {"reading": read, "an epoch": trained, "figures": written, "MiB": peak_mib()}


def measure(data: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run on the patients of a file in a process of its own."""
    threads = str(arguments.threads)
    libraries = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    words = [threads, "--trajectory_only", "--data_path", str(data), "--max_samples", "0"]
    words += ["--trajectory_epochs", "1", "--log_file", "none"]
    words += ["--batch_size", str(arguments.batch_size)]
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, __file__, "--run", f"{place}/run", *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dict.fromkeys(libraries, threads)},
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def line(label: str, figures: dict[str, float]) -> str:
    parts = "".join(f"{figures[part]:12,.1f}" for part in PARTS)
    return f"{label:>28}{parts}{figures['MiB'] / 1024:12,.2f}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, nargs=2, default=(20_000, 200_000))
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size (3)")
    if sys.argv[1:2] == ["--run"]:
        result = run(sys.argv[3:], Path(sys.argv[2]))
        sys.stdout.write(f"\n{json.dumps(result)}\n")
        return 0
    arguments = parser.parse_args()
    few, many = arguments.rows
    found: dict[int, list[dict[str, float]]] = {few: [], many: []}
    with tempfile.TemporaryDirectory() as name:
        for rows in found:
            (Path(name) / str(rows)).mkdir()
            apart("--write", "dka", f"{name}/{rows}", str(rows), "1")
        for _ in range(arguments.repeats):
            for rows, runs in found.items():
                runs.append(measure(Path(name) / str(rows) / "data.csv", arguments))
    for rows, runs in found.items():
        parts = (f"{part} {spread([run[part] for run in runs])} s" for part in PARTS)
        sys.stdout.write(f"{rows:,} patients: {', '.join(parts)}\n")
    small, large = (
        {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for runs in found.values()
    )
    sys.stdout.write(
        f"\n{'seconds; patients':>28}{''.join(f'{part:>12}' for part in PARTS)}{'peak GiB':>12}\n"
        f"{line(f'{few:,}', small)}{line(f'{many:,}', large)}"
    )
    slope = {key: (large[key] - small[key]) / (many - few) for key in small}
    for rows in LARGER:
        further = {key: large[key] + slope[key] * (rows - many) for key in large}
        sys.stdout.write(line(f"{rows:,} (extrapolated)", further))
    speed = 1 / slope["an epoch"]
    sys.stdout.write(
        f"{speed:,.0f} patients a second of an epoch, validation included; batch "
        f"{arguments.batch_size}\n"
        f"{machine('torch', 'pandas', 'scikit-learn', threads=arguments.threads)}; medians (least "
        f"to most) of {arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
