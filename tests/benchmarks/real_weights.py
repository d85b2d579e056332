"""What a real Gemma 3 adds to stage 1, over the test parts of several seeded splits.

    python tests/benchmarks/real_weights.py --model_name FOLDER_OR_HUB_ID --output_dir DIR \\
        [--data FILE] [--seeds 0 1 2] [--only "soft prompt alone"] [flags of stage 2]

Each seed splits, initialises and trains anew, through the trainer's own command line, the variants
of its ``--ablation``, or stage 1 and those named by ``--only``; what is finished is not made again.
Prints the test AUROC of each split, then for every model and baseline the mean, and its mean paired
differences with 95 % intervals: patients are drawn once for all splits, each with all the rows that
any test part holds of him.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))
import medgemma_trainer as trainer

FIRST = "stage 1 alone"
REFERENCES = (FIRST, "text alone", "logistic regression with context")
Draws = dict[str, dict[str, NDArray[np.float64]]]


def one_seed(seed: int, arguments: argparse.Namespace, flags: list[str]) -> pd.DataFrame:
    """Train the variants of a seed; give the test part: id, label, probability of each model.

    Raises:
        SystemExit: a run failed.
    """
    place = arguments.output_dir / f"seed_{seed}"
    words = ["--data_path", str(arguments.data), "--seed", str(seed)]
    llm = ["--model_name", arguments.model_name, *flags]
    columns = {}
    for name in (FIRST, *arguments.only):
        shared = words if name == FIRST else [*words, *llm]
        folder, command = trainer.variant(name, shared, place)
        args = trainer.resolve(trainer.build_parser().parse_args(command))
        data = trainer.load_data(args)
        if trainer.finished(folder, args, data):
            sys.stdout.write(f"already there: {folder}\n")
        elif code := trainer.main(command):
            raise SystemExit(code)
        table = pd.read_csv(folder / "predictions_test.csv", dtype={"id": str})
        columns[name] = table["probability"]
    if table["id"].tolist() != data.dataset.ids[data.split["test"]].tolist():
        raise RuntimeError(f"{folder} was not tested on the test part of seed {seed}")
    columns |= {name: pd.Series(p["test"]) for name, p in trainer.baselines(data).items()}
    return pd.DataFrame({"seed": seed, "id": table["id"], "label": table["label"], **columns})


def score(tables: list[pd.DataFrame]) -> tuple[pd.DataFrame, Draws]:
    """Give figures of each split and model, and the mean over splits for each draw of patients."""
    whole = pd.concat(tables, ignore_index=True)
    labels, models = whole["label"].to_numpy(dtype=float), whole.columns[3:]
    draws = trainer.patient_draws(labels, whole["id"].to_numpy(dtype=np.str_), seed=0)
    figures, replicates = [], []
    for seed, table in whole.groupby("seed"):
        rows = table.index.to_numpy()
        for model in models:
            risk = table[model].to_numpy()
            figures.append({"seed": seed, "model": model, **trainer.metrics_of(labels[rows], risk)})
            replicates.append((model, trainer.weighted_metrics(labels[rows], risk, draws[:, rows])))
    means = {
        model: {
            metric: np.mean([own[metric] for name, own in replicates if name == model], axis=0)
            for metric in ("auroc", "auprc", "brier")
        }
        for model in models
    }
    return pd.DataFrame(figures), means


def report(tables: list[pd.DataFrame]) -> str:
    """Lay out the test AUROC of each split, then means and paired differences."""
    figures, draws = score(tables)
    splits = figures.pivot_table(index="model", columns="seed", values="auroc", sort=False)
    means = figures.groupby("model", sort=False)[["auroc", "auprc", "brier"]].mean()
    table = means.round(4)
    for reference in (name for name in REFERENCES if name in draws):
        cells = []
        for model in draws:
            value = means.loc[model, "auroc"] - means.loc[reference, "auroc"]
            spread = draws[model]["auroc"] - draws[reference]["auroc"]
            known = trainer.interval(float(value), spread)
            cells.append("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**known))
        table[f"AUROC minus {reference}"] = cells
    return (
        f"test AUROC of each seed\n{splits.round(4).to_string()}\n\n"
        f"mean of {len(tables)} seeds\n{table.to_string()}\n"
    )


def main() -> int:
    """Train what is missing and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    others = [name for name in trainer.VARIANTS if name != FIRST]
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=trainer.SAMPLE_DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=others, default=others)
    arguments, flags = parser.parse_known_args()
    tables = [one_seed(seed, arguments, flags) for seed in arguments.seeds]
    sys.stdout.write(report(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
