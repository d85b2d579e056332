"""Time an epoch of stage 1 by its threads, idle and beside a spinning process a core.

    python tests/benchmarks/threads.py [--data FILE] [--rows 2400] [--repeats 3] [--threads 1 2]

One training learns the label of the rows, another one made-up times on the same rows: an event
within 96 hours where the label is 1, a discharge elsewhere. Load and threads change from epoch to
epoch, in turns, so that what else the machine does meets all of them. Other cores: begin with
``taskset -c 0,1``.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from common import ROOT, machine, spread, write

import medgemma_trainer

CHEMISTRY = ROOT / "tests" / "data" / "physionet2012_chemistry.csv.gz"
LABEL = "label_escalation"


@contextlib.contextmanager
def spinning(processes):
    """Let processes compute for the length of a block."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def with_times(table):
    """The same rows, with made-up times in place of the label."""
    hours = np.random.default_rng(0).integers(1, 97, len(table))
    times = {"prediction_hours": 48, "event_hours": hours, "event": 2 - table[LABEL]}
    return table.drop(columns=LABEL).assign(**times)


def epochs(table, threads, repeats, **flags):
    """Train, and return the seconds of epochs by number of spinning processes and of threads."""
    loads = 0, len(os.sched_getaffinity(0))
    turns = [*itertools.product(loads, threads)] * repeats
    seconds, waiting = {turn: [] for turn in turns}, [None, *turns]  # the first epoch warms up
    with contextlib.ExitStack() as beside:

        def next_turn(metrics):
            turn = waiting.pop(0)
            beside.close()
            if turn is not None:
                seconds[turn].append(metrics["seconds"])
            if waiting:
                processes, count = waiting[0]
                torch.set_num_threads(count)
                beside.enter_context(spinning(processes))
            return not waiting

        length = {"trajectory_epochs": len(waiting), "patience": len(waiting)}
        search = {"test": False, "baselines": False, "on_epoch": next_turn}
        medgemma_trainer.fit_trajectory(table, **length, **search, **flags)
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--data", default=CHEMISTRY, help=f"with {LABEL} (nine series of the tests)"
    )
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args(argv)
    table = pd.read_csv(arguments.data, nrows=arguments.rows)
    words = arguments.threads, arguments.repeats
    found = {
        "labels": epochs(table, *words),
        "times": epochs(with_times(table), *words, horizon_hours="24,48"),
    }
    first = arguments.threads[0]
    write("| Learned | Spinning processes | Threads | Seconds | Times the first | Times labels |")
    write("|---|---|---|---|---|---|")
    for kind, seconds in found.items():
        for (load, threads), each in seconds.items():
            median = statistics.median(each)
            bases = seconds[load, first], found["labels"][load, threads]
            shares = [f"{median / statistics.median(base):.2f}" for base in bases]
            write(f"| {' | '.join([kind, str(load), str(threads), spread(each, 2), *shares])} |")
    write(f"\n{machine('torch')}; median (minimum to maximum) of {arguments.repeats} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
