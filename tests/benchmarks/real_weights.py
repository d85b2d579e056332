"""What a real Gemma 3 adds to stage 1, over the test parts of several seeded splits.

    python tests/benchmarks/real_weights.py --model_name FOLDER_OR_HUB_ID --output_dir DIR \\
        [--data FILE] [--seeds 3] [flags of stage 2, as --series_text none --epochs 2]

Each seed splits, initialises and trains anew, stage 1 and then stage 2 on top of it, through the
trainer's own command line; what is finished already is not made again. Prints the test figures of
each split and the mean paired difference over the splits with a 95 % interval: patients are drawn
once for all splits, each with all the rows that any test part holds of him.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[2]))
import medgemma_trainer as trainer

STAGES = {"stage 1": "trajectory", "stage 2": "classification"}


def run(words: list[str], folder: Path) -> None:
    """Run a stage unless its folder holds that very result.

    Raises:
        SystemExit: the run failed.
    """
    args = trainer.resolve(trainer.build_parser().parse_args(words))
    if trainer.finished(folder, args, trainer.load_data(args)):
        sys.stdout.write(f"already there: {folder}\n")
    elif code := trainer.main(words):
        raise SystemExit(code)


def one_seed(seed: int, arguments: argparse.Namespace, flags: list[str]) -> Path:
    """Train both stages of a seed; give the folder of the run."""
    place = arguments.output_dir / f"seed_{seed}"
    shared = ["--data_path", str(arguments.data), "--output_dir", str(place), "--seed", str(seed)]
    run([*shared, "--trajectory_only"], place / "trajectory")
    llm = ["--model_name", arguments.model_name, *flags]
    llm += ["--ode_checkpoint", str(place / trainer.TRAJECTORY_FILE)]
    run([*shared, *llm], place / "classification")
    return place


def predictions(runs: list[Path], stage: str) -> pd.DataFrame:
    """Stack the test predictions of all runs, with the number of their split."""
    tables = [pd.read_csv(run / stage / "predictions_test.csv") for run in runs]
    return pd.concat([table.assign(split=k) for k, table in enumerate(tables)], ignore_index=True)


def mean_difference(one: pd.DataFrame, two: pd.DataFrame) -> dict[str, float]:
    """Give the mean over splits of AUROC(two) less AUROC(one), with its interval.

    Raises:
        RuntimeError: the two were not tested on the same patients.
    """
    if not one[["id", "label", "split"]].equals(two[["id", "label", "split"]]):
        raise RuntimeError("the two stages were not tested on the same patients")
    labels = one["label"].to_numpy(dtype=float)
    draws = trainer.patient_draws(labels, one["id"].astype(str).to_numpy(dtype=np.str_), seed=0)
    value, replicates = [], []
    for split in one["split"].unique():
        rows = (one["split"] == split).to_numpy()
        risks = [table["probability"].to_numpy()[rows] for table in (two, one)]
        own = [trainer.weighted_metrics(labels[rows], r, draws[:, rows])["auroc"] for r in risks]
        value.append(float(np.subtract(*(roc_auc_score(labels[rows], r) for r in risks))))
        replicates.append(own[0] - own[1])
    return trainer.interval(float(np.mean(value)), np.mean(replicates, axis=0))


def report(runs: list[Path]) -> str:
    """Lay out each split and the mean."""
    lines = []
    for run_folder in runs:
        for name, stage in STAGES.items():
            figures = json.loads((run_folder / stage / "metrics.json").read_text())
            test = figures["test"]
            lines.append(
                {
                    "run": run_folder.name,
                    "model": name,
                    "validation AUROC": figures["validation"]["auroc"]["value"],
                    "test AUROC": test["auroc"]["value"],
                    "AUPRC": test["auprc"]["value"],
                    "Brier": test["brier"]["value"],
                }
            )
            if name == "stage 2":
                for baseline, scores in figures["baselines"].items():
                    auroc = scores["test"]["auroc"]["value"]
                    lines.append({"run": run_folder.name, "model": baseline, "test AUROC": auroc})
    table = pd.DataFrame(lines)
    means = table.groupby("model", sort=False).mean(numeric_only=True)
    pooled = mean_difference(*(predictions(runs, stage) for stage in STAGES.values()))
    return (
        f"{table.round(4).to_string(index=False)}\n\nmeans\n{means.round(4).to_string()}\n\n"
        f"stage 2 - stage 1, mean of {len(runs)} splits: {pooled['value']:+.4f} "
        f"[{pooled['low']:+.4f}, {pooled['high']:+.4f}]\n"
    )


def main() -> int:
    """Train what is missing and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=trainer.SAMPLE_DATA)
    parser.add_argument("--seeds", type=int, default=3)
    arguments, flags = parser.parse_known_args()
    runs = [one_seed(seed, arguments, flags) for seed in range(arguments.seeds)]
    sys.stdout.write(report(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
