"""Stage 1 from file to figures on made-up patients of two sizes, and what larger ones would take.

    python tests/benchmarks/scale.py [--rows 20000 200000] [--batch_size 256] [--threads 1]

Each size is read, trained for one epoch, scored and reported by the program as a user runs it, in a
process of its own. Prints seconds of each part and peak memory; then, by the slope between the two
sizes, what 1, 10 and 100 million patients would take: an extrapolation, not a measurement.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data import apart, peak_mib

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("reading", "an epoch", "figures")
LARGER = (1_000_000, 10_000_000, 100_000_000)


def run(words: list[str], folder: Path) -> dict[str, float]:
    """Run stage 1 for an epoch in this process; give seconds of its parts and MiB."""
    import time

    sys.path.insert(0, str(ROOT))
    import torch

    import medgemma_trainer as trainer

    torch.set_num_threads(int(words.pop(0)))
    marks: list[float] = [time.perf_counter()]

    def marked(name: str) -> None:
        real = getattr(trainer, name)

        def call(*given: Any, **named: Any) -> Any:
            result = real(*given, **named)
            marks.append(time.perf_counter())
            return result

        setattr(trainer, name, call)

    for name in ("load_data", "run_stage", "write_results"):
        marked(name)
    code = trainer.main([*words, "--output_dir", str(folder)])
    if code:
        raise SystemExit(code)
    read, trained, written = (b - a for a, b in itertools.pairwise(marks))
    return {"reading": read, "an epoch": trained, "figures": written, "MiB": peak_mib()}


def measure(rows: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Write so many patients and run on them in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        apart("--write", "dka", str(place), str(rows), "1")
        words = [
            str(arguments.threads),
            "--trajectory_only",
            "--data_path",
            str(place / "data.csv"),
        ]
        words += ["--max_samples", "0", "--trajectory_epochs", "1", "--log_file", "none"]
        words += ["--batch_size", str(arguments.batch_size)]
        command = [sys.executable, __file__, "--run", str(place / "run"), *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def told(label: str, seconds: dict[str, float]) -> str:
    parts = "".join(f"{seconds[part]:12,.1f}" for part in PARTS)
    return f"{label:>26}{parts}{seconds['MiB'] / 1024:12,.2f}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, nargs=2, default=(20_000, 200_000))
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    if sys.argv[1:2] == ["--run"]:
        result = run(sys.argv[3:], Path(sys.argv[2]))
        sys.stdout.write(f"\n{json.dumps(result)}\n")
        return 0
    arguments = parser.parse_args()
    few, many = arguments.rows
    sys.stdout.write(
        f"{platform.machine()}, {arguments.threads} threads, batch {arguments.batch_size}\n"
        f"{'seconds; patients':>26}{''.join(f'{part:>12}' for part in PARTS)}{'peak GiB':>12}\n"
    )
    small = measure(few, arguments)
    sys.stdout.write(told(f"{few:,}", small))
    large = measure(many, arguments)
    sys.stdout.write(told(f"{many:,}", large))
    slope = {key: (large[key] - small[key]) / (many - few) for key in small}
    for rows in LARGER:
        further = {key: large[key] + slope[key] * (rows - many) for key in large}
        sys.stdout.write(told(f"{rows:,} (on paper)", further))
    speed = 1 / slope["an epoch"]
    sys.stdout.write(f"{speed:,.0f} patients a second of an epoch, validation included\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
