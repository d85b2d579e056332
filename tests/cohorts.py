"""Simulated patients of known risk, tables of their predictions, and slow plain metrics."""

import numpy as np
import pandas as pd
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression

from medgemma_clinical.evaluation.baselines import blend
from medgemma_clinical.evaluation.metrics import bootstrap_weights
from medgemma_clinical.evaluation.metrics_table import evaluate

POPULATION = 300_000
"""Rows whose metrics are taken for the truth."""


def simulate(rng, rows, *, rows_a_patient=1, slope=1.0):
    """Draw labels, risks and patients; the risks' log-odds are ``slope`` times the true ones."""
    patients = rows // rows_a_patient
    shared = rng.normal(size=patients).repeat(rows_a_patient)
    odds = -0.8 + 0.9 * shared + 0.6 * rng.normal(size=rows)
    labels = (rng.random(rows) < expit(odds)).astype(float)
    return labels, expit(slope * odds), np.arange(patients).repeat(rows_a_patient).astype(str)


def noisy(risk, seed, scale=1.0):
    """Blur risks on the scale of their log-odds."""
    return expit(logit(risk) + scale * np.random.default_rng(seed).normal(size=len(risk)))


def predictions(simulated, **others):
    """Make the table of predictions of ``model`` and of others; ``_`` of a name is a space."""
    labels, risk, patients = simulated
    ids = [f"row {k}" for k in range(len(labels))]
    others = {name.replace("_", " "): each for name, each in others.items()}
    tested = {"id": ids, "label": labels.astype(int), "patient": patients}
    return pd.DataFrame({**tested, "model": risk, **others})


def cohort(rows=120, **others):
    """Predict rows of 60 patients, in no order, by a model and by others."""
    labels, risk, patients = simulate(np.random.default_rng(0), rows, rows_a_patient=2)
    table = predictions((labels, noisy(risk, 9), patients), **others)
    return table.sample(frac=1, random_state=0, ignore_index=True)


def blended(rows=120):
    """Predict by a model, a baseline, two blends and the ensemble of model and better blend."""
    _, risk, _ = simulate(np.random.default_rng(0), rows, rows_a_patient=2)
    blends = {"blend": noisy(risk, 1, 2), "blend_with_statics": noisy(risk, 2)}
    ensemble = blend(noisy(risk, 9), blends["blend_with_statics"])
    return cohort(rows, last_value=noisy(risk, 3, 3), **blends, ensemble=ensemble)


def repeated(weight):
    """Return the positions that a sample with such weights holds."""
    return np.repeat(np.arange(len(weight)), np.asarray(weight).astype(int))


def plain_metrics(labels, risk):
    """Compute each metric of a model by scikit-learn."""
    brier = sklearn_metrics.brier_score_loss(labels, risk)
    prevalence = np.full(len(labels), np.mean(labels))
    return {
        "auroc": sklearn_metrics.roc_auc_score(labels, risk),
        "auprc": sklearn_metrics.average_precision_score(labels, risk),
        "brier": brier,
        "log_loss": sklearn_metrics.log_loss(labels, risk),
        "scaled_brier": 1 - brier / sklearn_metrics.brier_score_loss(labels, prevalence),
    }


def plain_shares(labels, positive):
    """Compute the shares at a threshold by scikit-learn; NaN where undefined."""
    sides = {"pos_label": 1, "zero_division": np.nan}, {"pos_label": 0, "zero_division": np.nan}
    return {
        "sensitivity": sklearn_metrics.recall_score(labels, positive, **sides[0]),
        "specificity": sklearn_metrics.recall_score(labels, positive, **sides[1]),
        "ppv": sklearn_metrics.precision_score(labels, positive, **sides[0]),
        "npv": sklearn_metrics.precision_score(labels, positive, **sides[1]),
        "positives": np.mean(positive),
    }


def plain_level(labels, risk):
    """Compute shares of observed and of expected events."""
    observed, expected = np.mean(labels), np.mean(risk)
    return {"observed": observed, "mean_risk": expected, "oe": observed / expected}


def plain_benefit(labels, risk, threshold):
    """Compute the net benefit of acting from a risk on, row by row."""
    cost = threshold / (1 - threshold)
    return np.mean(np.where(risk >= threshold, labels - (1 - labels) * cost, 0))


def plain_line(labels, risk):
    """Compute slope and shift by logistic regression without penalty."""
    fit = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    fit.fit(logit(np.asarray(risk))[:, None], labels)
    return fit.coef_[0, 0], fit.intercept_[0]


def plain_calibration(labels, risk):
    """Compute the slope by scikit-learn, the intercept by a root of the score."""
    odds = logit(risk)
    intercept = brentq(lambda a: (expit(odds + a) - labels).sum(), -50, 50)
    return {"intercept": intercept, "slope": plain_line(labels, risk)[0]}


def plain_distances(labels, risk):
    """Compute distances from a logistic fit on a natural cubic spline, made of scipy's."""
    odds = logit(risk)
    knots = np.unique(np.quantile(odds, [0.05, 0.35, 0.65, 0.95]))
    basis = CubicSpline(knots, np.eye(len(knots)), bc_type="natural")
    inside = odds.clip(knots[0], knots[-1])
    columns = basis(inside) + basis(inside, 1) * (odds - inside)[:, None]  # straight beyond
    columns = columns[:, 1:]  # all of them add up to the constant
    fit = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    fit.fit(columns, labels)
    distance = np.abs(fit.predict_proba(columns)[:, 1] - risk)
    return {"ici": distance.mean(), "e50": np.median(distance), "e90": np.quantile(distance, 0.9)}


def samples_of(rows, seed):
    """Yield all rows, then the rows of each draw, as repeated positions."""
    yield np.arange(len(rows))
    for weights in bootstrap_weights(rows["patient"].to_numpy(str), seed):
        yield from map(repeated, weights)


def plain_table(rows, seed, threshold, split):
    """Compute value and draws of each metric of each model, one sample and model at a time."""
    parts = np.zeros(len(rows)) if split is None else split
    first = rows.columns[3]
    found = []
    for sample in samples_of(rows, seed):
        labels, line = rows["label"].to_numpy()[sample], {}
        for model in rows.columns[3:]:
            risk = rows[model].to_numpy()[sample]
            of_parts = [
                plain_metrics(labels[own], risk[own])
                for own in (parts[sample] == part for part in np.unique(parts))
            ]
            own = {name: np.mean([x[name] for x in of_parts]) for name in of_parts[0]}
            own |= plain_level(labels, risk)
            if model == first or not found:  # further models: of all rows alone
                own |= plain_calibration(labels, risk)
            if not found:
                own |= plain_distances(labels, risk)
            if threshold is not None and model == first:
                own |= plain_shares(labels, risk >= threshold)
                own["net_benefit"] = plain_benefit(labels, risk, threshold)
            line |= {(model, name): value for name, value in own.items()}
        found.append(line)
    table = pd.DataFrame(found)
    return table.iloc[0], table.iloc[1:]


def coverage(sets, rows, rows_a_patient, seed):
    """Return, by metric, the share of data sets whose interval holds the truth."""
    rng = np.random.default_rng(seed)
    labels, risk, _ = simulate(rng, POPULATION, rows_a_patient=rows_a_patient)
    truth = plain_metrics(labels, risk) | plain_shares(labels, risk >= 0.35)
    truth |= plain_calibration(labels, risk) | plain_level(labels, risk)
    truth["net_benefit"] = plain_benefit(labels, risk, 0.35)
    covered = dict.fromkeys(truth, 0)
    for _ in range(sets):
        drawn = simulate(rng, rows, rows_a_patient=rows_a_patient)
        own = evaluate(predictions(drawn), 0, threshold=0.35).of("model")
        for name, value in truth.items():
            covered[name] += int(own.low[name] <= value <= own.high[name])
    return {name: count / sets for name, count in covered.items()}


def waiting(n, seed=0):
    """Draw rows of a file: the last value decides who dies early, and some leave before that."""
    rng = np.random.default_rng(seed)
    sick = rng.normal(size=n)
    times = rng.exponential(np.exp([4.2 - 0.9 * sick, 4.6 - 0.5 * sick, np.full(n, 4.4)]))
    values = [f"{20 + 3 * x:.1f} (0h) -> {20 + 5 * x:.1f} (6h)" for x in sick]
    rows = pd.DataFrame({"subject_id": [f"{seed}-{k}" for k in range(n)]})
    rows["clinical_trajectory"] = values
    rows["event_hours"] = times.min(axis=0).round(1)
    rows["event"] = np.array([1, 2, 0])[times.argmin(axis=0)]
    return rows
