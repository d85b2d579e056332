"""Compare stage 1 with its baselines on one or several files, every patient predicted out-of-fold.

    python tests/benchmarks/stage1.py --out DIR [--data FILE.csv[=LABEL_COLUMN] ...] [trainer flags]

Trains stage 1 with five members on the folds; the first of them is the model of one member. The
trainer fits the baselines. Prints as Markdown, a column a file: AUROC, AUROC and log loss minus
those of the blend, which was fixed before the results, and calibration slopes, with 95 % intervals
as wide as those of folds; in bold differences whose interval excludes 0. Metrics are means over the
folds, slopes of all rows; one bootstrap draw of patients serves all folds. ``--final`` adds one
member by ``--folds --final`` on all patients but those of a fold, whom it then predicts, so trains
five times as long. What is finished in DIR is not made again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from common import SAMPLE, machine, members_table, train, write

from medgemma_clinical.commands.prediction_files import shared_models
from medgemma_clinical.evaluation.baselines import best_blend
from medgemma_clinical.evaluation.metrics_table import DIFFERENCE, VALUE, evaluate, evaluate_splits
from medgemma_clinical.evaluation.target import LABEL
from medgemma_trainer import TrajectoryModel

FINAL = "stage 1, 1 member, --final"


def train_folds(data, label, folds, out, *flags):
    """Train stage 1 on folds, once."""
    words = ["--trajectory_only", "--data_path", data, "--label_column", label, "--folds", folds]
    train(*words, "--max_samples", 0, "--output_dir", out, "--log_file", "none", *flags)


def final_risks(data, label, folds, out, table, flags):
    """Return the risks of a fold by ``--final`` on all other patients."""
    rows = pd.read_csv(data, dtype=str)
    is_test = rows["subject_id"].isin(table["patient"])
    description = data.with_name(data.name.partition(".")[0]).with_suffix(".json")
    out.mkdir(exist_ok=True)
    for name, part in (("others", rows[~is_test]), ("test", rows[is_test])):
        part.to_csv(out / f"{name}.csv", index=False)
        if description.is_file():
            (out / f"{name}.json").write_text(description.read_text())
    train_folds(out / "others.csv", label, folds, out / "run", "--final", *flags)
    model = TrajectoryModel.from_pretrained(out / "run" / "trajectory")
    return table["id"].map(model.predictions(out / "test.csv").set_index("id")["probability"])


def run(data, label, arguments, flags):
    """Return the test predictions of the folds of one file."""
    out, count = arguments.out / data.name.partition(".")[0], arguments.folds
    train_folds(data, label, count, out, "--members", arguments.members, *flags)
    folds = [out / "folds_trajectory" / f"fold_{k}" for k in range(count)]
    tables = shared_models([members_table(fold / "trajectory", data) for fold in folds], LABEL)
    if arguments.final:
        for k, table in enumerate(tables):
            of_fold = final_risks(data, label, count, out / f"final_{k}", table, flags)
            tables[k] = table.assign(**{FINAL: of_fold})
    return tables


def cell(values, form, *, bold=False):
    """Return a value with its interval."""
    text = "{0:{form}} [{1:{form}}, {2:{form}}]".format(*values, form=form)
    return f"**{text}**" if bold and values.iloc[1] * values.iloc[2] > 0 else text


def columns(tables):
    """Return each table's column of one file: a cell for each model."""
    names = LABEL.models(tables[0])
    blend = best_blend(names)
    metrics = evaluate_splits(tables, 0, blend)
    whole, found = pd.concat(tables), {}
    folds = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    rows = {metric: {x: metrics.row(x, metric) for x in names} for metric in ("auroc", "log_loss")}
    found["AUROC"] = {name: cell(row[VALUE], ".3f") for name, row in rows["auroc"].items()}
    for metric, title in (("auroc", "AUROC"), ("log_loss", "Log loss")):
        found[f"{title}, minus {blend}"] = {
            name: cell(row[DIFFERENCE], "+.4f", bold=True)
            for name, row in rows[metric].items()
            if name != blend
        }
    found["Calibration slope"] = {
        name: cell(evaluate(whole, 0, 0.5, name, folds).row(name, "slope")[VALUE], ".2f")
        for name in names
        if "stage 1" in name or name == blend
    }
    return found, f"{metrics.counts}, intervals {metrics.widening:.2f} times as wide as of rows"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", action="append", help="FILE, or FILE=LABEL_COLUMN")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--final", action="store_true")
    arguments, flags = parser.parse_known_args(argv)
    shown = {}
    write(f"{' '.join(flags)}; {machine('torch', 'scikit-learn', 'lightgbm')}")
    for each in arguments.data or [str(SAMPLE)]:
        began, (path, _, label) = time.perf_counter(), each.partition("=")
        data = Path(path)
        found, counts = columns(run(data, label or "label_escalation", arguments, flags))
        write(f"{data.name}: {json.dumps(found)}; {counts}; {time.perf_counter() - began:.0f} s")
        for title, cells in found.items():
            shown.setdefault(title, {})[data.name.partition(".")[0]] = cells
    for title, by_file in shown.items():
        lines = pd.DataFrame(by_file).fillna("")
        heads = [title, *lines.columns]
        write("\n".join(f"| {' | '.join(x)} |" for x in (heads, ["---"] * len(heads))))
        write("\n".join(f"| {name} | {' | '.join(row)} |" for name, *row in lines.itertuples()))
        write("")
    return 0


if __name__ == "__main__":
    sys.exit(main())
