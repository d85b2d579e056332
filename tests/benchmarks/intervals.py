"""The share of 95 % intervals that hold the true value, by metric.

Usage:
    python tests/benchmarks/intervals.py --sets 2000 --rows 1000

Draws data sets from a population whose metrics are known, with one and with two rows a patient,
computes the intervals as a run does, and prints the share of data sets in which they hold the true
value, with its standard error.
"""

import argparse
import sys

import pandas as pd
from common import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cohorts import coverage  # noqa: E402  (needs the path above)


def main():
    parser = argparse.ArgumentParser(description="Coverage of the intervals of a report.")
    parser.add_argument("--sets", type=int, default=2000, help="data sets to draw")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shares = {
        f"{rows} rows a patient": coverage(args.sets, args.rows, rows, args.seed) for rows in (1, 2)
    }
    sys.stdout.write(f"{pd.DataFrame(shares).map('{:.3f}'.format).to_string()}\n")
    error = (0.95 * 0.05 / args.sets) ** 0.5
    sys.stdout.write(f"{args.sets} data sets; standard error of a share {error:.4f}\n")


if __name__ == "__main__":
    main()
