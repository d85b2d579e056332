"""Train, resume, load, export every tested type of language model in NF4 and bf16, in both stages.

    python tests/benchmarks/model_types.py
    python tests/benchmarks/model_types.py --approve     # keep the table: docs/training.md shows it

Random checkpoints of two layers, on the CPU: one minute. Exit code 1 if a step failed.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from common import ROOT, machine, write

import decoders

KEPT = ROOT / "tests" / "approved" / "decoders.txt"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--approve", action="store_true", help="keep the table")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # each case would warn of the patients' column names
    with tempfile.TemporaryDirectory() as folder:
        table, failed = decoders.matrix(Path(folder))
    logging.disable(logging.NOTSET)
    write(f"{table}\n{machine('torch', 'transformers', 'peft', 'bitsandbytes')}")
    for case, error in failed.items():
        write(f"- {', '.join(case)}: {type(error).__name__}: {error}")
    if arguments.approve:
        KEPT.write_text(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
