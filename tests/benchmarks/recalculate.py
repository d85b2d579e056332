"""Compute all metrics of a run, of folds and of an external cohort a second time, by other code.

    python tests/benchmarks/recalculate.py [--rows 1200] [--epochs 8] [--folds 3]

Trains stage 1 on the first rows of the sample, once and in folds, and predicts the other rows with
``--site``. From the predictions it computes each figure by scikit-learn and scipy, without the
program's code: metrics.json of the run and of the folds, and the numbers on the page of the
external cohort. Prints how many figures were compared and the largest difference of each kind;
intervals are compared with a bootstrap of other draws. Ends with 1 where a figure differs.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import SAMPLE, machine, train, write  # first: it sets the path
from sklearn.metrics import roc_auc_score

from cohorts import plain_calibration, plain_calibration_error, plain_metrics, plain_shares

LARGEST = 1e-6
"""A figure that differs by more is wrong."""

DRAWS = 400
TESTED = ["id", "label", "patient", "fold", "model_sha256"]
TITLES = {
    **{"auroc": "AUROC", "auprc": "AUPRC", "ici": "ICI"},
    **{"calibration_slope": "Slope", "calibration_in_the_large": "Calibration in the large"},
    **{"calibration_intercept": "Intercept", "e50": "E50", "e90": "E90", "brier": "Brier score"},
    **{
        "log_loss": "Log loss",
        "brier_skill": "Scaled Brier score",
        "ppv": "PPV (%)",
        "npv": "NPV (%)",
    },
    **{"sensitivity": "Sensitivity (%)", "specificity": "Specificity (%)"},
    "positives": "Positives (%)",
}
"""How a page names a metric."""


def mean_of_folds(labels, risk, folds):
    """Return each metric that compares risks, a mean over the folds."""
    parts = [plain_metrics(labels[folds == k], risk[folds == k]) for k in np.unique(folds)]
    return {name: np.mean([part[name] for part in parts]) for name in parts[0]}


def of_model(labels, risk, threshold, folds):
    """Return every metric of the model that a part of metrics.json is about."""
    found = mean_of_folds(labels, risk, folds) | plain_calibration(labels, risk)
    found |= plain_calibration_error(labels, risk)
    return found | plain_shares(labels, risk >= threshold)


def check_part(part, table, threshold, folds):
    """Return by kind the differences of a part of metrics.json from a second computation."""
    labels = table["label"].to_numpy(float)
    own = of_model(labels, table["probability"].to_numpy(), threshold, folds)
    found = {"value": [part[name]["value"] - value for name, value in own.items()]}
    found["difference"], others = [], {}
    for name in table.columns.drop(TESTED, errors="ignore"):
        others[name] = mean_of_folds(labels, table[name].to_numpy(), folds)
    for name, metrics in part["models"].items():
        beside = others.get(metrics["reference"], others["probability"])
        for metric, value in others[name].items():
            found["value"].append(metrics[metric]["value"] - value)
            found["difference"].append(metrics[metric]["difference"] - value + beside[metric])
    counts = len(labels), table["patient"].nunique(), labels.sum()
    found["count"] = [part[k] - n for k, n in zip(("n", "patients", "events"), counts, strict=True)]
    found["end of an interval"] = check_intervals(part, table, folds)
    return found


def check_intervals(part, table, folds):
    """Return how far the AUROC's intervals are from those of a bootstrap with other draws."""
    rng, draws = np.random.default_rng(77), {}
    positions = [np.flatnonzero(table["patient"] == x) for x in table["patient"].unique()]
    labels = table["label"].to_numpy()
    for _ in range(DRAWS):
        drawn = rng.integers(len(positions), size=len(positions))
        rows = np.concatenate([positions[k] for k in drawn])
        for name in table.columns.drop(TESTED, errors="ignore"):
            risk, own = table[name].to_numpy()[rows], folds[rows]
            parts = [(labels[rows][own == k], risk[own == k]) for k in np.unique(own)]
            known = [roc_auc_score(*each) for each in parts if len({*each[0]}) == 2]
            draws.setdefault(name, []).append(np.mean(known))
    found = []
    for name, values in draws.items():
        stored = (part if name == "probability" else part["models"][name])["auroc"]
        found += (np.quantile(values, [0.025, 0.975]) - [stored["low"], stored["high"]]).tolist()
    return found


def cells(page, title):
    """Return the texts beside a title in the first table that has it, None where none has."""
    row = re.search(rf'<th scope="row">{re.escape(title)}</th>(.*?)</tr>', page, re.S)
    return row and re.findall(r"<td>(.*?)</td>", row[1], re.S)


def first_number(text):
    return float(text.replace("\N{NO-BREAK SPACE}", " ").split()[0])


def check_page(page, table, threshold):
    """Return differences of a page from a second computation, in units of its last digit."""
    labels, risk = table["label"].to_numpy(float), table["probability"].to_numpy()
    found = {"number on the page": [], "number of a site": []}
    for name, value in of_model(labels, risk, threshold, np.zeros(len(labels))).items():
        shown = cells(page, TITLES[name])[0].split()[0]
        digits = len(shown.partition(".")[2])
        value *= 100 if TITLES[name].endswith("(%)") else 1
        found["number on the page"].append((float(shown) - value) * 10**digits)
    for site, own in table.groupby("site"):
        shown, part = cells(page, site), (own["label"].to_numpy(float), own["probability"])
        values = [len(own), part[0].sum(), 100 * part[0].mean(), 100 * part[1].mean()]
        scales = [1, 1, 10, 10]
        if len(shown) > 4:  # the AUROC stands first
            shown = [*shown[1:5], shown[0], *shown[5:]]
        if len(shown) > 4 and any(char.isdigit() for char in shown[4]):
            values += [roc_auc_score(*part), part[0].sum() / part[1].sum()]
            values += [plain_calibration(part[0], part[1].to_numpy())["calibration_slope"]]
            scales += [1000, 100, 100]
        for text, value, scale in zip(shown, values, scales, strict=False):
            found["number of a site"].append((first_number(text.replace(",", "")) - value) * scale)
    return found


def report(title, differences):
    """Print the largest difference of each kind; return whether one is too large."""
    wrong = False
    for kind, each in differences.items():
        # Of a rounded number half of its last digit may be missing, of two bootstraps the noise.
        page, ends = "number" in kind, "interval" in kind
        limit = 0.05 if ends else 0.5001 if page else LARGEST
        largest = np.abs(each).max()
        wrong |= not largest <= limit
        unit = " of its last digit" if page else ""
        write(f"{title}: {len(each)} times a {kind}: largest difference {largest:.2g}{unit}")
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--folds", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = pd.read_csv(SAMPLE, dtype=str, keep_default_na=False)
    rows["site"] = np.array(["north", "south", "west"])[np.arange(len(rows)) % 3]
    text, wrong = {"id": str, "patient": str}, False
    with tempfile.TemporaryDirectory() as folder:
        data, others, run = (Path(folder, name) for name in ("rows.csv", "others.csv", "run"))
        rows.iloc[: arguments.rows].to_csv(data, index=False)
        rows.iloc[arguments.rows :].to_csv(others, index=False)
        words = ["--trajectory_only", "--data_path", data, "--trajectory_epochs", arguments.epochs]
        words += ["--log_file", "none", "--output_dir", run]
        train(*words)
        stage, whole = run / "trajectory", run / "folds_trajectory"
        content = json.loads((stage / "metrics.json").read_text())
        for part, name in (("val", "validation"), ("test", "test")):
            table = pd.read_csv(stage / f"predictions_{part}.csv", dtype=text)
            one = np.zeros(len(table))
            found = check_part(content[name], table, content["threshold"], one)
            if part == "val":  # few events: two bootstraps differ
                del found["end of an interval"]
            wrong |= report(name, found)

        train(*words, "--folds", arguments.folds)
        table = pd.read_csv(whole / "predictions_folds.csv", dtype=text)
        own = table["fold"].to_numpy()
        paths = [whole / f"fold_{k}" / "trajectory" for k in range(arguments.folds)]
        thresholds = [
            json.loads((path / "metrics.json").read_text())["threshold"] for path in paths
        ]
        folds = json.loads((whole / "metrics.json").read_text())["folds"]
        wrong |= report("folds", check_part(folds, table, np.array(thresholds)[own], own))

        out = Path(folder, "out.csv")
        train(
            "predict",
            "--checkpoint",
            stage,
            "--data_path",
            others,
            "--predictions",
            out,
            "--site",
            "site",
        )
        table = pd.read_csv(out).assign(site=rows["site"].iloc[arguments.rows :].to_numpy())
        labels = rows["label_escalation"].iloc[arguments.rows :].astype(float)
        table["label"] = labels.to_numpy()
        page = out.with_suffix(".report.html").read_text(encoding="utf-8")
        wrong |= report("external cohort", check_page(page, table, content["threshold"]))
    write(f"{arguments.rows} rows, {arguments.epochs} epochs; {machine('torch', 'scikit-learn')}")
    write("a figure differs" if wrong else "all figures agree")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
