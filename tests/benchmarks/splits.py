"""Write copies of a DKA file whose column ``split`` makes the test part large.

    python tests/benchmarks/splits.py --out DIR [--data FILE.csv] [--seeds 3] [--rows 2000]

A language model takes minutes per epoch on a CPU, and a test part of a tenth is too small for a
comparison. Of the rows that are kept, 50 % train, 15 % validate and 35 % test, stratified by the
label. Use them by ``--data_path DIR/split_{seed}.csv --seeds N``.
"""

import argparse
import shutil
import sys
from pathlib import Path

import pandas as pd
from common import SAMPLE
from sklearn.model_selection import train_test_split

LABEL = "label_escalation"
VALIDATION, TEST = 0.15, 0.35


def split_rows(data, seed, rows):
    """Return ``rows`` rows of a file with one row per patient, with the column ``split``."""
    table = pd.read_csv(data, dtype=str)
    assert table["subject_id"].is_unique
    more = {"random_state": seed}
    kept, _ = train_test_split(table, train_size=rows, stratify=table[LABEL], **more)
    train, rest = train_test_split(kept, test_size=VALIDATION + TEST, stratify=kept[LABEL], **more)
    share = TEST / (VALIDATION + TEST)
    val, test = train_test_split(rest, test_size=share, stratify=rest[LABEL], **more)
    parts = {"train": train, "val": val, "test": test}
    return pd.concat(part.assign(split=name) for name, part in parts.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    description = arguments.data.with_name(f"{arguments.data.name.partition('.')[0]}.json")
    for seed in range(arguments.seeds):
        path = arguments.out / f"split_{seed}.csv"
        split_rows(arguments.data, seed, arguments.rows).to_csv(path, index=False)
        shutil.copy(description, path.with_suffix(".json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
