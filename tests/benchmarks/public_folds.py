"""Train stage 1 on published folds of PhysioNet 2012; write a row beside published figures.

    python tests/benchmarks/public_folds.py --folder DIR --folds FILE.json --out DIR [trainer flags]

``--folder`` holds the sets as `physionet2012.py` reads them. FILE.json is of the form of
``data/splits/physionet_2012_5fold.json`` of https://github.com/jack-k737/DBVT: ``folds``, a list of
``train_ids``, ``val_ids`` and ``test_ids`` (RecordIDs), and ``n_folds``. Each fold is trained as
given. Started again, the same command continues: a finished fold is not run again. After each fold
``predictions.csv`` (test rows, all models) and ``comparison.md`` are written: the row, protocol and
differences. A run without all sets, stays or folds is called a trial, which is not to be published.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import machine, members_table, train, write
from physionet2012 import dka_table, find_sets, read_sets, write_table
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from medgemma_clinical.commands.prediction_files import shared_models
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.provenance import read_run

PARTS = ("train", "val", "test")
SETS = ["set-a", "set-b", "set-c"]
AUROC, TRAPEZOID, PRECISION = "AUROC", "AUPRC, trapezoids", "AUPRC, average precision"
METRICS = {
    AUROC: roc_auc_score,
    TRAPEZOID: lambda labels, risks: auc(*precision_recall_curve(labels, risks)[1::-1]),
    PRECISION: average_precision_score,
}
"""Source: jack-k737/DBVT src/utils/evaluator.py; mims-harvard/Raindrop code/Raindrop.py."""

LOGS = "means of its logs in `outputs/physionet_2012`"
DBVT, RAINDROP = "DBVT's five", "Raindrop's five"
PUBLISHED = pd.DataFrame(
    [
        ("DBVT", DBVT, "86.9 ± 1.4", "56.1 ± 4.5", "", "README of jack-k737/DBVT"),
        ("MTM, by DBVT's authors", DBVT, "86.5 ± 1.4", "54.8 ± 4.2", "", LOGS),
        ("STraTS, by DBVT's authors", DBVT, "86.1 ± 1.8", "52.9 ± 4.7", "", LOGS),
        ("Hi-Patch, by DBVT's authors", DBVT, "85.7 ± 1.0", "53.0 ± 3.8", "", LOGS),
        ("MTM", RAINDROP, "88.0 ± 1.0", "", "58.6 ± 4.1", "arXiv 2509.17809"),
        ("TRIAGE", RAINDROP, "87.3", "", "59.0 ± 3.4", "arXiv 2606.09030, table 3"),
        ("KEDGN, by TRIAGE's authors", RAINDROP, "87.8", "", "58.3", "arXiv 2606.09030"),
        ("GARLIC", "own, five seeds", "86.4", "", "56.9", "ICLR 2026"),
    ],
    columns=["Model", "Folds", AUROC, TRAPEZOID, PRECISION, "Source"],
)
"""In percent."""

MISSING = "listed, not in these sets"
TRIAL = "**A trial, not to be published: sets, stays or folds are missing.**"
PAGE = """\
# Stage 1 on published folds of PhysioNet 2012

{verdict} Percent, mean ± standard deviation (n - 1) over the folds.

{rows}

## Protocol

- Data: {sets} of the PhysioNet/CinC Challenge 2012; {stays} in hospital. Left out: {left_out}.
- Question: death in hospital, whenever, asked 48 hours after admission to the ICU. No later value
  is read.
- Inputs: {inputs}.
- Folds: {folds}.
- Flags: {flags}; commit {commit}; {machine}.

## Differences to the papers

{differences}"""
DIFFERENCES = """\
- Only rows of the same folds are of the same test stays. DBVT's five are
  `data/splits/physionet_2012_5fold.json` of its repository: compare with them if that file was run.
- Stage 1's recipe and the choices of the trees were settled on test folds of set A, a third of
  these stays, which favours all models of this run slightly.
- Of each hour the last value is read; DBVT reads each measurement.
- Static features are age, sex, weight and type of unit; DBVT and Raindrop also read the height.
- The validation part chooses stage 1's epochs by log loss, and regressions and trees learn from it,
  too; DBVT keeps the epoch of its highest AUPRC.
- DBVT's AUPRC is the area by trapezoids, Raindrop's script averages the precision. Which of both a
  paper on Raindrop's splits gives was not checked; its figure stands under the second.
"""


def read_folds(path):
    """Return the RecordIDs of train, val and test of each fold; refuse a stay in two parts."""
    content = json.loads(path.read_text())
    keys = [f"{part}_ids" for part in PARTS]
    folds = content.get("folds") if isinstance(content, dict) else None
    if not folds or not all(isinstance(fold, dict) and {*keys} <= {*fold} for fold in folds):
        raise SystemExit(f"{path}: give folds, a list of {', '.join(keys)}")
    parts = [
        pd.concat(pd.Series(part, pd.Index(fold[f"{part}_ids"], dtype=int)) for part in PARTS)
        for fold in folds
    ]
    for number, split in enumerate(parts, 1):
        if twice := split.index.duplicated().sum():
            raise SystemExit(f"{path}: fold {number}: {twice} stays are listed twice")
    return [split.rename("split") for split in parts]


def train_fold(table, split, folder, seed, flags):
    """Train stage 1 on a fold unless it is finished; return test risks and ``run.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table.join(split, how="inner"), data := folder / "data.csv")
    words = ["--trajectory_only", "--data_path", data, "--output_dir", folder, "--seed", seed]
    words += ["--seeds", 1, "--max_samples", 0, "--log_file", "none"]
    train(*words, *flags)
    run = folder / f"seed_{seed}" / "trajectory"
    return members_table(run, data).drop(columns="patient"), read_run(run)


def fold_metrics(table):
    """Return the metrics of each model in percent; models are rows."""
    labels = table["label"].astype(int)
    values = {
        model: [100 * metric(labels, table[model]) for metric in METRICS.values()]
        for model in LABEL.models(table)
    }
    return pd.DataFrame.from_dict(values, orient="index", columns=[*METRICS])


def own_rows(tables, folds):
    """Return mean and standard deviation over the folds of each model, stage 1 first."""
    values = pd.concat([fold_metrics(table) for table in tables]).groupby(level=0, sort=False)
    text = values.mean().map("{:.1f}".format)
    if len(tables) > 1:
        text += " ± " + values.std().map("{:.1f}".format)  # n - 1, as DBVT's script
    order = sorted(text.index, key=lambda model: not model.startswith("stage 1"))
    rows = text.loc[order].rename_axis("Model").reset_index()
    return rows.assign(Folds=folds, Source="this run")[[*PUBLISHED]]


def markdown(table):
    """Return a table as lines of Markdown."""
    lines = [[*table], ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def count_stays(stays, table, folds):
    """Return how many of the read and the listed stays are left out, by reason."""
    listed = np.unique(np.concatenate([split.index for split in folds]))
    is_there = np.isin(listed, stays)
    return {
        MISSING: (~is_there).sum(),
        "without an outcome, or a value by hour 48": (
            is_there & ~np.isin(listed, table.index)
        ).sum(),
        "in no fold": (~np.isin(stays, listed)).sum(),
    }


def describe_folds(path, tables, splits):
    """Return which folds were run, and how many stays their parts have."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    sizes = pd.DataFrame([split.value_counts() for split in splits])
    texts = [f"{part} {sizes[part].min():,} to {sizes[part].max():,}" for part in PARTS]
    run = f"{len(tables)} of {len(splits)} run"
    return f"`{path.name}` (SHA-256 {digest}), {run}; stays: {', '.join(texts)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--folds", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only_fold", type=int, nargs="+", help="run these alone, from 1")
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args(argv)
    listed = read_folds(arguments.folds)
    rows, died = read_sets(arguments.folder)
    table = dka_table(rows, died).dropna(subset="label_escalation")
    table["label_escalation"] = table["label_escalation"].astype(int)
    splits = [split[split.index.isin(table.index)] for split in listed]
    sets, left_out = [*find_sets(arguments.folder)], count_stays(rows.index.unique(), table, listed)
    series, static = (table.filter(like=word).shape[1] for word in ("trajectory", "static_"))
    tables = {}
    for number in arguments.only_fold or range(1, len(splits) + 1):
        began, folder = time.perf_counter(), arguments.out / f"fold_{number}"
        tables[number], run = train_fold(table, splits[number - 1], folder, arguments.seed, flags)
        write(f"fold {number}: {time.perf_counter() - began:.0f} s")
        write(fold_metrics(tables[number]).round(1).to_string())
        shared = shared_models([*tables.values()], LABEL)
        joined = pd.concat(dict(zip(tables, shared, strict=True)), names=["fold"])
        joined.reset_index("fold").to_csv(arguments.out / "predictions.csv", index=False)
        is_whole = sets == SETS and not left_out[MISSING] and len(tables) == len(splits)
        ours = own_rows(shared, f"`{arguments.folds.name}`")
        text = PAGE.format(
            verdict="All sets, stays and folds were run." if is_whole else TRIAL,
            rows=markdown(pd.concat([ours, PUBLISHED])),
            sets=", ".join(sets),
            stays=f"{len(table):,} stays, of which {table['label_escalation'].sum():,} died",
            left_out="; ".join(f"{count:,} {reason}" for reason, count in left_out.items()),
            inputs=f"{series} series by the hour, {static} static columns",
            folds=describe_folds(arguments.folds, tables, splits),
            flags=" ".join(["--seed", str(arguments.seed), *flags]),
            commit=run["git_commit"],
            machine=machine("torch", "scikit-learn", "lightgbm"),
            differences=DIFFERENCES,
        )
        (arguments.out / "comparison.md").write_text(text, encoding="utf-8")
    write(f"{arguments.out / 'comparison.md'}\n{markdown(ours)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
