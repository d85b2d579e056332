"""Stages 1 and 2 with a real Gemma 3 on a seeded part of the sample data.

    python tests/benchmarks/real_weights.py --model_name FOLDER_OR_HUB_ID --output_dir DIR

1,200 stays train, 300 validate, 1,000 are tested, so that the interval is narrow enough to read;
both stages run through the trainer's own command line, stage 2 for one epoch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))
import medgemma_trainer as trainer

SIZES = {"train": 1200, "val": 300, "test": 1000}


def main() -> int:
    """Write the split beside the results, then run both stages on it."""
    parser = argparse.ArgumentParser(description="Stages 1 and 2 with real weights.")
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(trainer.SAMPLE_DATA, dtype=str)
    chosen = np.random.default_rng(arguments.seed).permutation(len(table))[: sum(SIZES.values())]
    table = table.iloc[chosen].assign(split=np.repeat(list(SIZES), list(SIZES.values())))
    data = arguments.output_dir / "data.csv"
    table.to_csv(data, index=False)
    description = trainer.SAMPLE_DATA.with_suffix(".json").read_text(encoding="utf-8")
    data.with_suffix(".json").write_text(description, encoding="utf-8")
    shared = ["--data_path", str(data), "--output_dir", str(arguments.output_dir)]
    shared += ["--seed", str(arguments.seed), "--precision", arguments.precision]
    encoder = str(arguments.output_dir / trainer.TRAJECTORY_FILE)
    llm = ["--model_name", arguments.model_name, "--epochs", "1", "--ode_checkpoint", encoder]
    code = trainer.main([*shared, "--trajectory_only"])
    return code or trainer.main([*shared, *llm])


if __name__ == "__main__":
    sys.exit(main())
