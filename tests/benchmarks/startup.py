"""Time how long the program takes to answer, and to take its first step.

    python tests/benchmarks/startup.py [--repeats 5]

In fresh processes, in turn: an empty Python, one that imports torch, one that imports
TrajectoryModel, --help, and stage 1 on the sample data with its defaults up to its first step; then
predict_proba of one row of stage 1, after the first call. Prints elapsed seconds and processor
seconds: other work on the machine lengthens the elapsed ones only.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time

from common import ROOT, SAMPLE, machine, spread

FIRST_STEP = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import medgemma_trainer as trainer
step = trainer.step
def first(*arguments):
    step(*arguments)
    os._exit(0)
trainer.step = first
sys.exit(trainer.main(sys.argv[1:]) or 1)
"""
IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); from medgemma_trainer import TrajectoryModel"
ROW_CALLS = 200
TARGETS = {"first step of stage 1": 5.0}


def ways(folder: str) -> dict[str, list[str]]:
    """Return the arguments of Python for each way."""
    stage_1 = ["--trajectory_only", "--data_path", str(SAMPLE), "--output_dir", folder]
    return {
        "empty Python": ["-c", ""],
        "import torch": ["-c", "import torch"],
        "import TrajectoryModel": ["-c", IMPORT, str(ROOT)],
        "--help": [str(ROOT / "medgemma_trainer.py"), "--help"],
        "first step of stage 1": ["-c", FIRST_STEP, str(ROOT), *stage_1],
    }


def time_row() -> list[float]:
    """Return processor milliseconds of each call of ``predict_proba`` with one row of stage 1."""
    sys.path.insert(0, str(ROOT))
    import pandas as pd

    from medgemma_trainer import fit_trajectory

    table = pd.read_csv(SAMPLE, nrows=300)
    model, row = fit_trajectory(table, trajectory_epochs=1), table.iloc[[3]]
    model.predict_proba(row)
    passed = []
    for _ in range(ROW_CALLS):
        began = time.process_time()
        model.predict_proba(row)
        passed.append(1000 * (time.process_time() - began))
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    passed: dict[str, list[float]] = {}
    worked: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, words in ways(folder).items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                began = time.perf_counter()
                command = [sys.executable, *words]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
                passed.setdefault(name, []).append(time.perf_counter() - began)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                worked.setdefault(name, []).append(work)
    for name, seconds in passed.items():
        target = f", to be below {TARGETS[name]}" if name in TARGETS else ""
        shown = [f"{spread(each, 2)} s" for each in (seconds, worked[name])]
        sys.stdout.write(f"{name:22s} {shown[0]}, processor {shown[1]}{target}\n")
    row = spread(time_row(), 2)
    sys.stdout.write(f"one row of stage 1: processor {row} ms, to be below 5\n")
    sys.stdout.write(
        f"{machine('torch', 'pandas')}; medians (least to most) of {arguments.repeats}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
