"""Write copies of a DKA file whose column ``split`` makes the test part large.

    python tests/benchmarks/splits.py --out DIR [--data FILE.csv] [--seeds 3] [--rows 2000]

A language model takes minutes an epoch on a CPU, and the usual tenth for the test decides nothing:
of the rows that are kept, 50 % train, 15 % validate and 35 % test, drawn by patient and stratified
by the label. DIR/split_SEED.csv is used as ``--data_path DIR/split_{seed}.csv --seeds N``.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
from common import SAMPLE
from sklearn.model_selection import train_test_split

LABEL = "label_escalation"
VALIDATION, TEST = 0.15, 0.35


def split_rows(data: Path, seed: int, rows: int) -> pd.DataFrame:
    """Return a file's rows of ``rows`` patients, one row each, with the column ``split``."""
    table = pd.read_csv(data, dtype=str)
    assert table["subject_id"].is_unique, "one row a patient"
    kept, _ = train_test_split(table, train_size=rows, stratify=table[LABEL], random_state=seed)
    train, rest = train_test_split(
        kept, test_size=VALIDATION + TEST, stratify=kept[LABEL], random_state=seed
    )
    share = TEST / (VALIDATION + TEST)
    val, test = train_test_split(rest, test_size=share, stratify=rest[LABEL], random_state=seed)
    parts = {"train": train, "val": val, "test": test}
    return pd.concat(part.assign(split=name) for name, part in parts.items())


def main() -> None:
    """Write a file for each seed, and the description beside it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        path = arguments.out / f"split_{seed}.csv"
        split_rows(arguments.data, seed, arguments.rows).to_csv(path, index=False)
        description = arguments.data.with_name(f"{arguments.data.name.split('.')[0]}.json")
        shutil.copy(description, path.with_suffix(".json"))


if __name__ == "__main__":
    main()
