"""Compare stage 1 with its baselines on all signals of PhysioNet 2012, fold by fold.

    python tests/benchmarks/physionet2012.py --folder DIR [--folds FILE.json] [flags of the trainer]
    python tests/benchmarks/physionet2012.py --folder DIR --out FILE.csv    # writes the table alone

DIR holds the PhysioNet/CinC Challenge 2012 as it comes: ``set-a`` with one file a stay, and
``Outcomes-a.txt``; sets b and c where they are there. All 37 series are read, the last value of
each hour, and age, sex, weight and type of unit as static features. FILE.json lists RecordIDs: per
fold ``train``, ``val`` and ``test`` (or ``train_ids``, ...), or the test part alone, and a tenth of
the other stays validates. Without it five folds are drawn. Prints AUROC and AUPRC of each fold.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import machine, members_table, train_stage1, write
from sklearn.model_selection import StratifiedKFold, train_test_split

from medgemma_clinical.evaluation.metrics import metrics
from medgemma_clinical.evaluation.target import LABEL

MAIN, WEIGHT = "HCO3", "Weight"
GENERAL = ["RecordID", "Age", "Gender", "Height", "ICUType"]
"""Parameters at 00:00 that are no series; the weight is both."""

UNITS = {1: "coronary", 2: "cardiac_surgery", 3: "medical", 4: "surgical"}
DESCRIPTION = {
    "series": MAIN,
    "unit": "mmol/L",
    "question": "Will the patient die in hospital?",
    "outcome": "In-hospital death",
    "prediction_time": "48 hours after admission to the ICU",
    "horizon": "the rest of the hospital stay, however long",
    "source": "PhysioNet/CinC Challenge 2012",
    "licence": "Open Data Commons Attribution 1.0",
}


def read_sets(folder):
    """Return Time, Parameter and Value of all stays by RecordID, and whether each patient died."""
    stays = {int(path.stem): pd.read_csv(path) for path in sorted(folder.glob("set-?/*.txt"))}
    if not stays:
        raise SystemExit(f"{folder}: holds no set-a/RecordID.txt, nor a set b or c")
    tables = [pd.read_csv(path, index_col=0) for path in sorted(folder.glob("Outcomes-?.txt"))]
    return pd.concat(stays).droplevel(1), pd.concat(tables)["In-hospital_death"]


def dka_table(rows, died):
    """Return the table in the DKA format, by RecordID; a negative value is an unknown one."""
    rows = rows.rename_axis("subject_id").reset_index()
    general = rows[rows["Time"] == "00:00"].drop_duplicates(["subject_id", "Parameter"])
    general = general.pivot(index="subject_id", columns="Parameter", values="Value")
    general = general.where(general >= 0).reindex(columns=[*GENERAL, WEIGHT])
    known = rows[(rows["Value"] >= 0) & ~rows["Parameter"].isin(GENERAL)]
    hour = known["Time"].str.partition(":")[0].astype(int).rename("hour")
    last = known.groupby(["subject_id", "Parameter", hour])["Value"].last().reset_index()
    last["piece"] = last["Value"].map("{:g}".format) + " (" + last["hour"].astype(str) + "h)"
    cells = last.groupby(["subject_id", "Parameter"])["piece"].agg(" -> ".join).unstack()
    cells = cells.dropna(how="all", subset=cells.columns.drop(WEIGHT, errors="ignore"))
    names = {name: f"trajectory_{name.lower()}" for name in cells} | {MAIN: "clinical_trajectory"}
    cells = cells[[MAIN, *cells.columns.drop(MAIN)]].rename(columns=names)
    general = general.loc[cells.index]
    static = {"age [years]": general["Age"].astype("Int64")}
    static["sex_male"] = general["Gender"].astype("Int64")
    static["weight [kg]"] = general[WEIGHT].round()
    for number, unit in UNITS.items():
        static[f"unit_{unit}"] = (general["ICUType"] == number).astype(int)
    table = cells.join(pd.DataFrame(static).add_prefix("static_"))
    return table.assign(label_escalation=died.reindex(table.index))


def read_folds(path):
    """Return the RecordIDs of each part of each fold."""
    content = json.loads(path.read_text())
    content = content.get("folds", content) if isinstance(content, dict) else content
    folds = list(content.values()) if isinstance(content, dict) else content
    parts = [fold if isinstance(fold, dict) else {"test": fold} for fold in folds]
    return [{name.removesuffix("_ids"): ids for name, ids in each.items()} for each in parts]


def draw_folds(labels, seed):
    """Return five folds that are stratified by the label."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return [{"test": labels.index[test]} for _, test in folds.split(labels, labels)]


def with_parts(table, fold, seed):
    """Return the rows of a fold with the column ``split``."""
    if "train" not in fold:
        others = table.loc[table.index.difference(fold["test"]), "label_escalation"]
        parts = train_test_split(others, test_size=0.1, stratify=others, random_state=seed)
        fold = {"train": parts[0].index, "val": parts[1].index, **fold}
    split = pd.concat(pd.Series(name, index=pd.Index(ids)) for name, ids in fold.items())
    return table.join(split.rename("split"), how="inner")


def write_table(table, path):
    """Write the table in the DKA format, and its description beside it."""
    table.to_csv(path)
    path.with_suffix(".json").write_text(json.dumps(DESCRIPTION))


def fold_metrics(table, seed, flags):
    """Train stage 1 with one and five members on a fold; return the test metrics by model."""
    with tempfile.TemporaryDirectory() as folder:
        write_table(table, data := Path(folder, "data.csv"))
        train_stage1(data, seed, folder, "--members", 5, *flags)
        rows = members_table(Path(folder, "trajectory"), data)
    labels, everyone = rows["label"].to_numpy(float), np.ones((1, len(rows)))
    found = {m: metrics(labels, rows[m].to_numpy(), everyone) for m in LABEL.models(rows)}
    return pd.DataFrame(found).loc[["auroc", "auprc"]].map(np.ndarray.item).stack()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--folds", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments, flags = parser.parse_known_args(argv)
    torch.set_num_threads(arguments.threads)
    began, seed = time.perf_counter(), arguments.seed
    rows, died = read_sets(arguments.folder)
    table, stays = dka_table(rows, died), rows.index.nunique()
    labels = table["label_escalation"]
    write(f"{stays:,} stays, {stays - len(table)} without any value; {labels.sum():,.0f} deaths")
    if arguments.out:
        write_table(table, arguments.out)
        return 0
    folds = read_folds(arguments.folds) if arguments.folds else draw_folds(labels, seed)
    results = {}
    for number, fold in enumerate(folds, 1):
        own, listed = with_parts(table, fold, seed), np.concatenate(list(fold.values()))
        write(
            f"fold {number}: {own['split'].value_counts().to_dict()}; "
            f"{(~np.isin(listed, own.index)).sum():,} of {len(listed):,} listed stays are not there"
        )
        results[number] = fold_metrics(own, seed, flags)
        write(results[number].unstack(0).round(4).to_string())
    shown = pd.DataFrame(results)
    shown = shown.assign(mean=shown.mean(axis=1), sd=shown.std(axis=1))
    write(f"{machine('torch', 'scikit-learn', threads=arguments.threads)}, seed {seed}")
    write(f"{shown.round(4).to_string()}\n{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
