"""Synthetic SRTR folders: time and peak memory of reading them, or stage 1 beside its baselines.

    python tests/benchmarks/srtr.py [--organ both]      # folders of growing size, read one by one
    python tests/benchmarks/srtr.py --train 6000 [flags of the trainer]    # stage 1 on one folder

Each folder is written as CSV and read in processes of their own, ``--repeats`` times in turn with
the others. Time should grow as the number of registrations does, memory by what the cohort keeps.
In the folder to train on the risk climbs with the last MELD (liver) or falls with the GFR (kidney)
and is drawn at random.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, spread

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
print(len(dataset), len(dataset.times), seconds, idle, peak)
"""


def run(code: str, *words: str) -> list[str]:
    """Run code in a fresh process, for its own peak memory; return the words it prints."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def train(organ: str, registrations: int, flags: list[str]) -> None:
    """Train stage 1 and pass on what it prints."""
    with tempfile.TemporaryDirectory() as place:
        run(WRITE, place, organ, str(registrations), "graded")
        words = ["--trajectory_only", "--dataset", "srtr", "--organ", organ, "--data_dir", place]
        words += ["--output_dir", f"{place}/run", "--log_file", "none", *flags]
        command = [sys.executable, str(ROOT / "medgemma_trainer.py"), *words]
        subprocess.run(command, cwd=place, check=True)


def growth(organ: str, sizes: list[int], repeats: int) -> None:
    """Read folders of several sizes in turn; print seconds, MiB, and how they grow."""
    with tempfile.TemporaryDirectory() as place:
        folders = {size: Path(place) / str(size) for size in sizes}
        rows = {}
        for size, folder in folders.items():
            folder.mkdir()
            rows[size] = int(run(WRITE, str(folder), organ, str(size), "MELD")[0])
        found: dict[int, list[list[str]]] = {size: [] for size in sizes}
        for _ in range(repeats):
            for size, folder in folders.items():
                found[size].append(run(READ, str(folder), organ))
    seconds = {size: [float(each[2]) for each in found[size]] for size in sizes}
    for size in sizes:
        kept, observations, _, idle, peak = found[size][0]
        sys.stdout.write(
            f"{organ}, {size:,} registrations, {rows[size]:,} history rows: "
            f"{spread(seconds[size], 2)} s, {float(peak):.0f} MiB at the peak, {float(idle):.0f} "
            f"of it imports; kept {kept} with {observations} observations\n"
        )
    first, *_, last = sizes
    ratio = statistics.median(seconds[last]) / statistics.median(seconds[first])
    sys.stdout.write(
        f"{organ}: {last / first:.3g} times the registrations take {ratio:.2f} times the time\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of reading an SRTR folder.")
    parser.add_argument("--registrations", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--organ", choices=("kidney", "liver", "both"), default="both")
    parser.add_argument("--train", type=int, metavar="REGISTRATIONS")
    parser.add_argument("--repeats", type=int, default=3, help="readings of each folder (3)")
    options, flags = parser.parse_known_args()
    organs = ("kidney", "liver") if options.organ == "both" else (options.organ,)
    if options.train:
        for organ in organs:
            train(organ, options.train, flags)
        return
    for organ in organs:
        growth(organ, options.registrations, options.repeats)
    sys.stdout.write(
        f"{machine('numpy', 'pandas')}; medians (least to most) of {options.repeats}\n"
    )


if __name__ == "__main__":
    main()
