"""Compute all metrics of runs, of folds and of an external cohort a second time, by other code.

    python tests/benchmarks/recalculate.py [--rows 1200] [--epochs 8] [--folds 3]

Trains stage 1 on the first rows of the sample, once and in folds, and predicts the other rows with
``--site``. Then it trains on times to events that compete, with an intervention, in two folds. From
the predictions it computes each metric, at each horizon and of each model, by plain loops,
scikit-learn and scipy, without the program's code: metrics.json of the run and of the folds, and
the numbers on the page of the external cohort. Prints how many metrics were compared and the
largest difference of each kind; what is drawn at random is compared with other draws. Ends with 1
where a metric differs.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from common import SAMPLE, machine, train, write  # first: it sets the path
from scipy.optimize import least_squares
from scipy.special import expit, logit
from sklearn import metrics
from times import HORIZONS, LOG_RATES, population

from cohorts import plain_calibration, plain_distances

LARGEST = 1e-6
"""A metric that differs by more is wrong."""

BY_DRAWS = {"end of an interval": 0.05, "ideal distance": 0.005}
"""The same of what other draws tell."""

DRAWS, IDEAL_DRAWS = 400, 50
MAX_WEIGHT = 20.0
NEIGHBOURS, NEIGHBOUR_SHARE = 50, 0.05
MIN_DIFFERENT = 20
NO_RISKS = ["id", "label", "event_hours", "event", "patient", "fold", "model_sha256"]
TITLES = {
    **{"auroc": "AUROC", "auprc": "AUPRC", "log_loss": "Log loss", "brier": "Brier score"},
    **{"scaled_brier": "Scaled Brier score", "intercept": "Intercept", "slope": "Slope"},
    **{"ici": "ICI", "e50": "E50", "e90": "E90", "ppv": "PPV (%)", "npv": "NPV (%)"},
    **{"sensitivity": "Sensitivity (%)", "specificity": "Specificity (%)", "oe": "O/E"},
    **{"positives": "Positives (%)", "observed": "Observed (%)", "mean_risk": "Mean risk (%)"},
    "net_benefit": "Net benefit",
}
"""How a page names a metric."""


# --------------------------------------------------------------------------- what is known


class Known(NamedTuple):
    """What rows tell of the event by a horizon; a label is known of all."""

    case: np.ndarray
    weights: np.ndarray
    outcome: np.ndarray  # that calibration fits, with its weights
    outcome_weights: np.ndarray
    cut: float = 0.0


def known_by(rows, target):
    """Return what rows of a table of predictions tell of a target, as metrics.json describes it."""
    if target["event"] == "label":
        labels = rows["label"].to_numpy(float)
        return Known(labels, np.ones(len(rows)), labels, np.ones(len(rows)))
    horizon, hours = target["horizon"], rows["event_hours"].to_numpy().clip(max=target["horizon"])
    event = rows["event"].where(rows["event_hours"] <= horizon, 0).to_numpy()
    event = np.where(np.isin(event, target["ends"]), 0, event)
    case, has_status = (event == 1).astype(float), (event > 0) | (hours == horizon)
    column = f"uncensored_{target['name']}"
    if column not in rows:
        weights = has_status / kaplan_meier(hours, event)
        return Known(case, weights, pseudo_values(hours, event, horizon), np.ones(len(rows)))
    weights = has_status / rows[column].to_numpy()
    cut = np.mean(weights[has_status] > MAX_WEIGHT)
    weights = weights.clip(max=MAX_WEIGHT)
    return Known(case, weights, case, weights, cut)


def kaplan_meier(hours, event):
    """Return the probability of being uncensored just before the time of each row."""
    before, uncensored = {}, 1.0
    for time in np.unique(hours):
        before[time] = uncensored
        at_risk = (hours >= time).sum() - ((hours == time) & (event > 0)).sum()  # events come first
        censored = ((hours == time) & (event == 0)).sum()
        uncensored *= 1 - censored / at_risk if at_risk else 1
    return np.array([before[time] for time in hours])


def aalen_johansen(hours, event, horizon):
    """Return the cumulative incidence of event 1 by a horizon."""
    event_free, incidence = 1.0, 0.0
    for time in np.unique(hours[(event > 0) & (hours <= horizon)]):
        at_risk, kinds = (hours >= time).sum(), event[hours == time]
        incidence += event_free * (kinds == 1).sum() / at_risk
        event_free *= 1 - (kinds > 0).sum() / at_risk
    return incidence


def pseudo_values(hours, event, horizon):
    """Return the jackknife pseudo-value of each row."""
    n, rows = len(hours), np.arange(len(hours))
    others = [aalen_johansen(hours[rows != k], event[rows != k], horizon) for k in rows]
    return n * aalen_johansen(hours, event, horizon) - (n - 1) * np.array(others)


# --------------------------------------------------------------------------- metrics


def ranking(known, risk):
    """Return the metrics that compare risks."""
    seen = known.weights > 0
    case, risk, weights = known.case[seen], risk[seen], known.weights[seen]
    brier = metrics.brier_score_loss(case, risk, sample_weight=weights)
    mean = np.full(len(case), np.average(case, weights=weights))
    return {
        "auroc": metrics.roc_auc_score(case, risk, sample_weight=weights),
        "auprc": metrics.average_precision_score(case, risk, sample_weight=weights),
        "log_loss": metrics.log_loss(case, risk, sample_weight=weights),
        "brier": brier,
        "scaled_brier": 1 - brier / metrics.brier_score_loss(case, mean, sample_weight=weights),
    }


def level(known, risk, target, rows):
    """Return observed and mean risk, and their ratio, without the weights where there are none."""
    observed = np.average(known.case, weights=known.weights)
    if target["horizon"] and not target["ends"]:
        observed = aalen_johansen(rows["event_hours"], rows["event"], target["horizon"])
    expected = np.average(risk, weights=known.outcome_weights)
    return {"observed": observed, "mean_risk": risk.mean(), "oe": observed / expected}


def cloglog(risk):
    return np.log(-np.log1p(-risk))


def fitted_risk(columns, coefficients, offset=0.0):
    return -np.expm1(-np.exp(offset + columns @ coefficients))


def calibration(known, risk):
    """Return intercept and slope by least squares on the complementary log-log scale."""
    scaled, roots = cloglog(risk), np.sqrt(known.outcome_weights)
    one = np.ones((len(risk), 1))

    def fit(columns, start, offset):
        def residuals(coefficients):
            return roots * (fitted_risk(columns, coefficients, offset) - known.outcome)

        exact = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "jac": "3-point"}
        return least_squares(residuals, start, **exact).x

    slope = fit(np.column_stack([one, scaled]), [0.0, 1.0], 0.0)[1]
    return {"intercept": fit(one, [0.0], scaled)[0], "slope": slope}


def neighbour_curve(known, risk):
    """Return the outcome that goes with each risk: a mean over the rows of similar rank."""
    weights, excess = known.outcome_weights, known.outcome - risk
    order = np.argsort(risk, kind="stable")
    groups = [order[risk[order] == value] for value in np.unique(risk)]
    mass = np.array([weights[rows].sum() for rows in groups])
    sums = np.array([weights[rows] @ excess[rows] for rows in groups])
    stops = mass.cumsum()
    starts = stops - mass
    radius = max(NEIGHBOURS, NEIGHBOUR_SHARE * stops[-1])
    curve = np.empty(len(risk))
    for k, rows in enumerate(groups):
        low, high = max(starts[k] - radius, 0), min(stops[k] + radius, stops[-1])
        shared = (np.minimum(stops, high) - np.maximum(starts, low)).clip(0)  # with each group
        within = np.divide(shared, mass, out=np.zeros(len(mass)), where=mass > 0) @ sums
        curve[rows] = risk[rows] + within / (high - low)
    return curve


def distances(known, risk):
    away = np.abs(neighbour_curve(known, risk) - risk)
    return {"ici": away.mean(), "e50": np.median(away), "e90": np.quantile(away, 0.9)}


def ideal_distance(known, risk, target):
    """Return the mean distance of calibrated risks, as other draws tell it."""
    rng, found = np.random.default_rng(77), []
    away = known.outcome - neighbour_curve(known, risk)
    for _ in range(IDEAL_DRAWS):
        if target["link"] == "logit":
            drawn = plain_distances((rng.random(len(risk)) < risk).astype(float), risk)
        else:
            outcome = risk + rng.choice([-1, 1], len(risk)) * away
            drawn = distances(known._replace(outcome=outcome), risk)
        found.append(drawn["ici"])
    return np.mean(found)


def shares(known, risk, threshold):
    """Return the shares and the net benefit at a threshold."""
    positive, weights, share = risk >= threshold, known.weights, np.average
    event, none = weights * known.case, weights * (1 - known.case)
    cost = threshold / (1 - threshold)
    gain = np.where(positive, known.case - (1 - known.case) * cost, 0)
    return {
        "sensitivity": share(positive, weights=event),
        "specificity": share(~positive, weights=none),
        "ppv": share(known.case, weights=weights * positive),
        "npv": share(1 - known.case, weights=weights * ~positive),
        "positives": positive.mean(),
        "net_benefit": share(gain, weights=weights),
    }


def of_weights(known):
    """Return what is said of the weights, if there are any."""
    weights = known.weights
    if (weights == 1).all():
        return {}
    effective = weights.sum() ** 2 / (weights**2).sum()
    return {"effective_n": effective, "weights_cut": known.cut, "largest_weight": weights.max()}


def of_model(rows, risk, target, folds):
    """Return every metric of a model that needs no threshold."""
    parts = [(known_by(rows[folds == k], target), risk[folds == k]) for k in np.unique(folds)]
    found = [ranking(*part) for part in parts]
    found = {name: np.mean([part[name] for part in found]) for name in found[0]}
    known = known_by(rows, target)
    found |= level(known, risk, target, rows)
    if target["link"] == "logit":
        found |= plain_calibration(known.case, risk) | plain_distances(known.case, risk)
    else:
        found |= calibration(known, risk) | distances(known, risk)
    return found if len(np.unique(risk.round(9))) >= MIN_DIFFERENT else {**found, "slope": np.nan}


# --------------------------------------------------------------------------- metrics.json


def models_of(table, target, first):
    """Return the columns of risks of a target by model, the first model's own first."""
    end = target["column_ending"]
    columns = {first: target["output"]}
    for name in table.columns.drop(NO_RISKS, errors="ignore"):
        if name.endswith(end) and not name.startswith(("uncensored_", "probability")):
            columns.setdefault(name.removesuffix(end), name)
    columns.pop(target["output"], None)
    return columns


def check_part(part, table, targets, thresholds, folds):
    """Return by kind the differences of a part of metrics.json from a second computation."""
    found = {kind: [] for kind in ("value", "difference", "count", *BY_DRAWS)}
    compared = set()
    for target, threshold in zip(targets, thresholds, strict=True):
        first, end = part["model"], target["metric_ending"]
        columns = models_of(table, target, first)
        assert {*columns} == {first, *part["models"]}
        own = {
            model: of_model(table, table[column].to_numpy(), target, folds)
            for model, column in columns.items()
        }
        risk, known = table[columns[first]].to_numpy(), known_by(table, target)
        own[first] |= of_weights(known) | shares(known, risk, threshold)
        for model, values in own.items():
            stored = part if model == first else part["models"][model]
            for name, value in values.items():
                compared.add(f"{name}{end}")
                found["value"].append(distance(stored[f"{name}{end}"]["value"], value))
                if model != first:
                    beside = own[stored["reference"]].get(name, np.nan)
                    difference = stored[f"{name}{end}"]["difference"]
                    found["difference"].append(distance(difference, value - beside))
        ideal = part[f"ici_ideal{end}"]["value"] - ideal_distance(known, risk, target)
        found["ideal distance"].append(ideal)
        compared.add(f"ici_ideal{end}")
        seen = known.weights > 0
        minority = min(table["patient"][seen & (known.case == x)].nunique() for x in (0, 1))
        counts = {"events": known.case.sum(), "minority_patients": minority}
        found["count"] += [part[f"{name}{end}"] - count for name, count in counts.items()]
        if f"uncensored_{target['name']}" not in table:  # these weights are drawn, too
            found["end of an interval"] += check_intervals(part, table, target, columns, folds)
    counts = {"n": len(table), "patients": table["patient"].nunique()}
    found["count"] += [part[name] - count for name, count in counts.items()]
    left = {name for name, x in part.items() if isinstance(x, dict) and name != "models"} - compared
    assert not left, left
    return found


def distance(stored, value):
    """Return the distance of two numbers, 0 where both are undefined."""
    both = np.array([stored, value], float)
    return 0.0 if np.isnan(both).all() else both[0] - both[1]


def check_intervals(part, table, target, columns, folds):
    """Return how far the AUROC's intervals are from those of a bootstrap with other draws."""
    rng, draws = np.random.default_rng(77), {model: [] for model in columns}
    patients, rows_of = table["patient"].to_numpy(), {}
    for row, patient in enumerate(patients):
        rows_of.setdefault(patient, []).append(row)
    names, drawn_in = [*rows_of], [np.flatnonzero(folds == k) for k in np.unique(folds)]
    for _ in range(DRAWS):
        drawn = rng.integers(len(names), size=len(names))
        rows = np.concatenate([rows_of[names[k]] for k in drawn])
        parts = [rows[np.isin(rows, own)] for own in drawn_in]
        known = [known_for_auroc(table.iloc[own], target) for own in parts]
        for model, column in columns.items():
            risk = table[column].to_numpy()
            aurocs = [
                metrics.roc_auc_score(x.case, risk[own], sample_weight=x.weights)
                for x, own in zip(known, parts, strict=True)
                if len({*x.case[x.weights > 0]}) == 2
            ]
            draws[model].append(np.mean(aurocs))
    found = []
    for model, values in draws.items():
        stored = part if model == part["model"] else part["models"][model]
        stored = stored[f"auroc{target['metric_ending']}"]
        ends, odds = np.quantile(values, [0.025, 0.975]), logit(stored["value"])
        wide = expit(odds + part["widening"] * (logit(ends) - odds))
        found += (wide - [stored["low"], stored["high"]]).tolist()
    return found


def known_for_auroc(rows, target):
    """Return ``known_by`` without the pseudo-values, which no AUROC needs."""
    if target["event"] == "label":
        return known_by(rows, target)
    hours, horizon = rows["event_hours"].to_numpy().clip(max=target["horizon"]), target["horizon"]
    event = rows["event"].where(rows["event_hours"] <= horizon, 0).to_numpy()
    weights = ((event > 0) | (hours == horizon)) / kaplan_meier(hours, event)
    return Known((event == 1).astype(float), weights, None, None)


# --------------------------------------------------------------------------- a page


def cells(page, title):
    """Return the texts beside a title in the first table that has it, None where none has."""
    row = re.search(rf'<th scope="row">{re.escape(title)}</th>(.*?)</tr>', page, re.S)
    return row and re.findall(r"<td>(.*?)</td>", row[1], re.S)


def first_number(text):
    return float(text.replace("\N{NO-BREAK SPACE}", " ").split()[0])


def check_page(page, table, target, threshold):
    """Return differences of a page from a second computation, in units of its last digit."""
    found = {"number on the page": [], "number of a site": []}
    risk = table["probability"].to_numpy()
    own = of_model(table, risk, target, np.zeros(len(table)))
    own |= shares(known_by(table, target), risk, threshold)
    for name, value in own.items():
        if not (shown := cells(page, TITLES[name])):
            continue
        text = shown[0].split()[0]
        digits = len(text.partition(".")[2])
        value *= 100 if TITLES[name].endswith("(%)") else 1
        found["number on the page"].append((float(text) - value) * 10**digits)
    for site, rows in table.groupby("site"):
        shown, labels, risk = cells(page, site), rows["label"], rows["probability"].to_numpy()
        values = [len(rows), labels.sum(), 100 * labels.mean(), 100 * risk.mean()]
        scales = [1, 1, 10, 10]
        if len(shown) > 4:  # the AUROC stands first
            shown = [*shown[1:5], shown[0], *shown[5:]]
        if len(shown) > 4 and any(char.isdigit() for char in shown[4]):
            values += [metrics.roc_auc_score(labels, risk), labels.sum() / risk.sum()]
            values += [plain_calibration(labels.to_numpy(float), risk)["slope"]]
            scales += [1000, 100, 100]
        for text, value, scale in zip(shown, values, scales, strict=False):
            found["number of a site"].append((first_number(text.replace(",", "")) - value) * scale)
    return found


def report(title, differences):
    """Print the largest difference of each kind; return whether one is too large."""
    wrong = False
    for kind, numbers in differences.items():
        if not numbers:
            continue
        # Of a rounded number half of its last digit may be missing.
        page, largest = "number" in kind, np.abs(numbers).max()
        wrong |= not largest <= (0.5001 if page else BY_DRAWS.get(kind, LARGEST))
        unit = " of its last digit" if page else ""
        write(f"{title}: {len(numbers)} times a {kind}: largest difference {largest:.2g}{unit}")
    return wrong


# --------------------------------------------------------------------------- runs


def read(path):
    return pd.read_csv(path, dtype={"id": str, "patient": str})


def check_folds(title, whole):
    """Compute what folds say together a second time; return whether a metric differs."""
    content = json.loads((whole / "metrics.json").read_text())
    table = read(whole / "predictions_folds.csv")
    thresholds = [rule["threshold"] for rule in content["decided"]["decision"].values()]
    folds = table["fold"].to_numpy()
    return report(title, check_part(content["folds"], table, content["targets"], thresholds, folds))


def check_labels(folder, rows, epochs, folds):
    """Train on labels, once and in folds, and predict other rows; return whether one differs."""
    table = pd.read_csv(SAMPLE, dtype=str, keep_default_na=False)
    table["site"] = np.array(["north", "south", "west"])[np.arange(len(table)) % 3]
    data, others, run = (folder / name for name in ("rows.csv", "others.csv", "run"))
    table.iloc[:rows].to_csv(data, index=False)
    table.iloc[rows:].to_csv(others, index=False)
    words = ["--trajectory_only", "--data_path", data, "--trajectory_epochs", epochs]
    words += ["--calibrate", "none", "--log_file", "none", "--output_dir", run]
    train(*words)
    stage, wrong = run / "trajectory", False
    content = json.loads((stage / "metrics.json").read_text())
    (target,), threshold = content["targets"], content["threshold"]
    for part, name in (("val", "validation"), ("test", "test")):
        scored = read(stage / f"predictions_{part}.csv")
        found = check_part(content[name], scored, [target], [threshold], np.zeros(len(scored)))
        if part == "val":  # few events: two sets of draws differ
            for kind in BY_DRAWS:
                del found[kind]
        wrong |= report(name, found)
    train(*words, "--folds", folds)
    wrong |= check_folds("folds", run / "folds_trajectory")
    out = folder / "out.csv"
    place = ["--checkpoint", stage, "--data_path", others, "--predictions", out, "--site", "site"]
    train("predict", *place)
    predicted = pd.read_csv(out).assign(site=table["site"].iloc[rows:].to_numpy())
    predicted["label"] = table["label_escalation"].iloc[rows:].astype(float).to_numpy()
    page = out.with_suffix(".report.html").read_text(encoding="utf-8")
    return wrong | report("external cohort", check_page(page, predicted, target, threshold))


def check_times(folder, rows, epochs):
    """Train on times to events in two folds; return whether a metric differs."""
    data, run = folder / "waiting.csv", folder / "times"
    population(rows, 0)[0].to_csv(data, index=False)
    events = {str(k): name for k, name in enumerate(LOG_RATES, 1)}
    about = {"series": "severity", "unit": "points", "time_scale": 1900}
    about |= {"events": events, "interventions": [2]}
    data.with_suffix(".json").write_text(json.dumps(about))
    words = ["--trajectory_only", "--data_path", data, "--trajectory_epochs", epochs]
    words += ["--horizon_hours", ",".join(f"{24 * days}" for days in HORIZONS), "--folds", 2]
    train(*words, "--calibrate", "none", "--log_file", "none", "--output_dir", run)
    return check_folds("times", run / "folds_trajectory")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--folds", type=int, default=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        wrong = check_times(Path(folder), arguments.rows, arguments.epochs)
        wrong |= check_labels(Path(folder), arguments.rows, arguments.epochs, arguments.folds)
    write(f"{arguments.rows} rows, {arguments.epochs} epochs; {machine('torch', 'scikit-learn')}")
    write("a metric differs" if wrong else "all metrics agree")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
