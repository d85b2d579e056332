"""Time how long the program takes to answer, and to take its first step.

    python tests/benchmarks/startup.py [--repeats 5]

In new processes, in turn: imports, help, a refused flag, and stage 1 on the sample data with its
defaults up to its first step; then ``predict_proba`` of one row of stage 1, after the first call.
Times are those of the processor, since other work on a machine lengthens the elapsed time.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

import pandas as pd
from common import ROOT, SAMPLE, machine, spread, write

ANSWERS = ["medgemma_trainer --help", "medgemma_trainer --epochs 0"]
ANSWERS += ["dataset_format from_long --help", "medgemma_clinical predict --help"]
ANSWERS += ["medgemma_clinical pool --help", "medgemma_clinical compare --help"]
FIRST_STEP = """
import os, sys
import medgemma_trainer as trainer
step = trainer.step
def first(*arguments):
    step(*arguments)
    os._exit(0)
trainer.step = first
sys.exit(trainer.main(sys.argv[1:]) or 1)
"""


def ways(folder):
    """Return the arguments of Python for each way; those of a refused flag hold a 0."""
    stage1 = ["--trajectory_only", "--data_path", str(SAMPLE), "--output_dir", folder]
    return {
        "import torch": ["-c", "import torch"],
        "import TrajectoryModel": ["-c", "from medgemma_trainer import TrajectoryModel"],
        **{words: ["-m", *words.split()] for words in ANSWERS},
        "first step of stage 1": ["-c", FIRST_STEP, *stage1],
    }


def processor_seconds(words, folder):
    """Return the processor time of a new Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command, quiet = [sys.executable, *words], subprocess.DEVNULL
    done = subprocess.run(command, stdout=quiet, stderr=quiet, cwd=folder, env=environment)
    assert done.returncode == (2 if "0" in words else 0), words
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_row(calls):
    """Return processor milliseconds of each call of ``predict_proba`` with one row of stage 1."""
    from medgemma_trainer import fit_trajectory

    table = pd.read_csv(SAMPLE, nrows=300)
    model, row = fit_trajectory(table, trajectory_epochs=1), table.iloc[[3]]
    took = []
    for _ in range(calls + 1):
        began = time.process_time()
        model.predict_proba(row)
        took.append(1000 * (time.process_time() - began))
    return took[1:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    took = {}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, words in ways(folder).items():
                took.setdefault(name, []).append(processor_seconds(words, folder))
    for name, seconds in took.items():
        write(f"{name:33} {spread(seconds, 2)} s")
    write(f"one row of stage 1: {spread(time_row(40 * arguments.repeats), 2)} ms")
    write(f"{machine('torch', 'pandas')}; median (minimum to maximum) of {arguments.repeats}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
