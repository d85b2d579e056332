"""Synthetic SRTR folders: time and peak memory of reading them, or stage 1 beside its baselines.

    python tests/benchmarks/srtr.py [--organ both]      # folders of growing size, read one by one
    python tests/benchmarks/srtr.py --train 6000        # stage 1 with its defaults on one folder

Each folder is written as CSV and read in a process of its own. Time should grow as the number of
registrations does, memory by what the cohort keeps. In the folder to train on the risk climbs with
the last MELD (liver) or falls with the GFR (kidney) and is drawn at random: no real world.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from srtr_files import random_tables, write_folder
cand, history = random_tables(int(sys.argv[3]), sys.argv[2], seed=0, risk=sys.argv[4])
write_folder(Path(sys.argv[1]), cand, history, sys.argv[2], dates="ddmonyyyy")
print(len(history))
"""

READ = """
import resource, sys, time
from srtr_dataset import SRTRTrajectoryDataset
unit = 2**20 if sys.platform == "darwin" else 2**10
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
start = time.perf_counter()
dataset = SRTRTrajectoryDataset(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
print(len(dataset), len(dataset.times), f"{seconds:.2f} {idle:.0f} {peak:.0f}")
"""


def run(code: str, *words: str) -> list[str]:
    """Run code in a fresh process, whose memory is its own alone; give the words it prints."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def train(organ: str, registrations: int) -> None:
    """Train stage 1 with its defaults and pass on what it prints."""
    with tempfile.TemporaryDirectory() as place:
        run(WRITE, place, organ, str(registrations), "graded")
        words = ["--trajectory_only", "--dataset", "srtr", "--organ", organ, "--data_dir", place]
        words += ["--output_dir", f"{place}/run", "--log_file", "none"]
        command = [sys.executable, str(ROOT / "medgemma_trainer.py"), *words]
        subprocess.run(command, cwd=place, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of reading an SRTR folder.")
    parser.add_argument("--registrations", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--organ", choices=("kidney", "liver", "both"), default="both")
    parser.add_argument("--train", type=int, metavar="REGISTRATIONS")
    options = parser.parse_args()
    organs = ("kidney", "liver") if options.organ == "both" else (options.organ,)
    if options.train:
        for organ in organs:
            train(organ, options.train)
        return
    row = "{:6s} {:>13s} {:>12s} {:>8s} {:>12s} {:>8s} {:>12s} {:>11s}\n"
    head = "organ,registrations,history rows,kept,observations,seconds,MiB at start,MiB at peak"
    sys.stdout.write(row.format(*head.split(",")))
    for organ in organs:
        for n in options.registrations:
            with tempfile.TemporaryDirectory() as place:
                written = run(WRITE, place, organ, str(n), "MELD")
                figures = run(READ, place, organ)
            sys.stdout.write(row.format(organ, str(n), *written, *figures))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
