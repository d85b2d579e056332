"""Train stage 1 on synthetic SRTR tables, beside its baselines.

    python tests/benchmarks/srtr.py [--organ liver] [--rows 6000] [flags of the trainer]

The risk in these tables rises with the last MELD (liver) or falls with the GFR (kidney), and the
outcome is drawn from it. The trainer prints the metrics.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import common  # noqa: F401  (puts the next ones on the path)

import medgemma_trainer
from srtr_files import random_tables, write_folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--organ", choices=("kidney", "liver"), default="liver")
    parser.add_argument("--rows", type=int, default=6000, help="registrations")
    arguments, flags = parser.parse_known_args(argv)
    organ = arguments.organ
    with tempfile.TemporaryDirectory() as folder:
        tables = random_tables(arguments.rows, organ, seed=0, risk="graded")
        write_folder(Path(folder), *tables, organ, dates="ddmonyyyy")
        words = ["--trajectory_only", "--dataset", "srtr", "--organ", organ, "--data_dir", folder]
        words += ["--output_dir", f"{folder}/run", "--log_file", "none"]
        return medgemma_trainer.main([*words, *flags])


if __name__ == "__main__":
    sys.exit(main())
