"""How often the 95 % intervals of a report hold the truth, for each kind of figure.

Usage:
    python tests/benchmarks/intervals.py --sets 2000 --rows 1000

Draws so many data sets from a population whose figures are known, with one and with two rows a
patient, makes the intervals as a run does, and prints the share of data sets in which they hold the
true value, with its standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cohorts import coverage  # noqa: E402  (found only now)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the intervals of a report.")
    parser.add_argument("--sets", type=int, default=2000, help="data sets to draw")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = {
        f"{a_patient} a patient": coverage(args.sets, args.rows, a_patient, args.seed)
        for a_patient in (1, 2)
    }
    table = pd.DataFrame(columns)
    sys.stdout.write(f"{table.map('{:.3f}'.format).to_string()}\n")
    error = (0.95 * 0.05 / args.sets) ** 0.5
    sys.stdout.write(
        f"{args.sets} data sets of {args.rows} rows; standard error of a share {error:.4f}\n"
    )


if __name__ == "__main__":
    main()
