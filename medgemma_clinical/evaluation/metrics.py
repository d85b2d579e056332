"""Metrics of predicted risks under many weightings of the rows at once, as a bootstrap needs them.

Arrays in, arrays out. Letters: n rows, R weightings, K thresholds. scikit-learn scores one
weighting a call; tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

Array = NDArray[np.float64]

REPLICATES = 1000
CHUNK_CELLS = 2**20
"""Draws times rows that are held at a time: 8 MiB an array."""

NEWTON_STEPS, PRECISION, MAX_STEP = 40, 1e-9, 1.0


def metrics(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    """Compute discrimination and accuracy of the risks.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n), how often each row counts in each weighting.

    Returns:
        (R,) values of auroc, auprc (average precision), accuracy at a risk of 0.5, brier, log_loss
        and brier_skill (gain over the prevalence as everyone's risk); NaN without both classes.

    Source: scikit-learn's definitions; Brier 1950; Murphy 1973 for the skill.
    """
    order = np.argsort(-risk, kind="stable")
    events = weights[:, order] * labels[order]
    others = weights[:, order] - events
    first_of_ties = np.flatnonzero(np.diff(-risk[order], prepend=-np.inf))
    if len(first_of_ties) < len(order):
        events = np.add.reduceat(events, first_of_ties, axis=1)
        others = np.add.reduceat(others, first_of_ties, axis=1)
    true, false = events.cumsum(axis=1), others.cumsum(axis=1)  # positives, by falling threshold
    total = weights.sum(axis=1)  # divides last: a share of all is exactly 1
    likelihood = np.where(labels == 1, risk, 1 - risk)
    smallest = np.finfo(risk.dtype).eps  # as scikit-learn: no infinite loss
    losses = -np.log(likelihood.clip(smallest, 1 - smallest))
    brier, prevalence = weights @ (risk - labels) ** 2 / total, weights @ labels / total
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = true / np.maximum(true + false, 1e-300)
        return {
            "auroc": (others * (true - events / 2)).sum(axis=1) / (true[:, -1] * false[:, -1]),
            "auprc": (events * precision).sum(axis=1) / true[:, -1],
            "accuracy": weights @ ((risk >= 0.5) == labels) / total,
            "brier": brier,
            "log_loss": weights @ losses / total,
            "brier_skill": 1 - brier / (prevalence * (1 - prevalence)),
        }


def confusion_shares(
    labels: Array, positive: NDArray[np.bool_], weights: Array
) -> dict[str, Array]:
    """Compute sensitivity, specificity, PPV, NPV and the share of predicted positives.

    Args:
        labels: (n,) of 0 and 1.
        positive: (n,) whether the event is predicted.
        weights: (R, n).

    Returns:
        (R,) shares by name; NaN where the denominator is 0.
    """
    event = labels == 1
    tp, fp = weights @ (positive & event), weights @ (positive & ~event)
    fn, tn = weights @ (~positive & event), weights @ (~positive & ~event)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "positives": (tp + fp) / (tp + fp + fn + tn),
        }


def calibration(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    """Compute calibration slope, intercept, calibration in the large and E-average.

    Slope and intercept are those of a logistic fit of the label on the logit of the risk; in the
    large is the intercept with the slope held at 1: below 0 the risks are too high on average.
    E-average is the mean distance of the risks from the logistic fit's.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n).

    Returns:
        (R,) values by name; NaN where no finite fit exists.

    Source: Cox 1958; Steyerberg 2019, "Clinical Prediction Models", chapter 15; Harrell 2015,
    "Regression Modeling Strategies", section 10.9, for the E-average.
    """
    odds, everyone = log_odds(risk), np.ones((1, len(risk)))
    mean, spread = float(odds.mean()), float(odds.std())
    equal = spread <= PRECISION * (1 + abs(mean))  # the spread is rounding
    scaled = np.zeros_like(odds) if equal else (odds - mean) / spread
    # Each fit starts where that of all rows ends.
    start = (float(log_odds(labels.mean())), 0.0)
    a, b = fit_logistic(labels, scaled, everyone, start, slope=True)[0]
    fitted = fit_logistic(labels, scaled, weights, (a, b), slope=True)  # (R, 2)
    a, b = fit_logistic(labels, scaled, everyone, (mean, spread), slope=False)[0]
    level = fit_logistic(labels, scaled, weights, (a, b), slope=False)[:, 0]
    error = np.abs(expit(fitted[:, :1] + fitted[:, 1:] * scaled) - risk)  # (R, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = fitted[:, 1] / spread
    return {
        "calibration_slope": slope,
        "calibration_intercept": fitted[:, 0] - slope * mean,
        "calibration_in_the_large": level - mean,
        "e_average": (weights * error).sum(axis=1) / weights.sum(axis=1),
    }


def log_odds(risk: Array | float) -> Array:
    """Return the logit of probabilities, those of 0 and 1 moved by float64's precision."""
    smallest = np.finfo(np.float64).eps
    odds: Array = logit(np.clip(risk, smallest, 1 - smallest))
    return odds


def fit_logistic(
    labels: Array, x: Array, weights: Array, start: tuple[float, float], *, slope: bool
) -> Array:
    """Fit log-odds = a + b * x, without ``slope`` a alone, by Newton's method.

    ``x`` (n,) is at about unit scale. Returns a and b (R, 2) under all weightings, NaN where no
    finite fit exists, as where ``x`` separates the classes.
    """
    fitted = np.tile(start, (len(weights), 1))
    steps = np.zeros_like(fitted)
    for _ in range(NEWTON_STEPS):
        # (R, n); expit by its tanh, which is faster in the bootstrap's inner loop
        risk = 0.5 + 0.5 * np.tanh((fitted[:, :1] + fitted[:, 1:] * x) / 2)
        residual, curvature = weights * (labels - risk), weights * risk * (1 - risk)
        g0, h00 = residual.sum(axis=1), curvature.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if slope:
                g1, h01, h11 = residual @ x, curvature @ x, curvature @ x**2
                steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1)
                steps /= (h00 * h11 - h01**2)[:, None]
            else:
                steps[:, 0] = g0 / h00
        fitted = fitted + steps.clip(-MAX_STEP, MAX_STEP)
        if not (np.abs(steps) > PRECISION).any():  # NaN compares false and stays NaN
            break
    fitted[(np.abs(steps) > PRECISION).any(axis=1)] = np.nan
    return fitted


def net_benefit(labels: Array, risk: Array, thresholds: Array, weights: Array) -> Array:
    """Compute the net benefit TP/n - FP/n * p/(1 - p) at threshold risks p.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event; ones to treat all.
        thresholds: (K,) within (0, 1).
        weights: (R, n).

    Returns:
        (R, K).

    Source: Vickers and Elkin 2006, "Decision curve analysis".
    """
    order = np.argsort(-risk)
    positive = np.searchsorted(-risk[order], -thresholds, side="right")  # (K,) at the threshold too
    ordered = np.pad(weights[:, order], ((0, 0), (1, 0)))  # none is positive: 0
    event = np.append(0, labels[order])
    true = np.cumsum(ordered * event, axis=1)[:, positive]
    false = np.cumsum(ordered * (1 - event), axis=1)[:, positive]
    benefit: Array = true - false * thresholds / (1 - thresholds)
    return benefit / weights.sum(axis=1, keepdims=True)


def bootstrap_weights(
    labels: Array,
    patients: NDArray[np.generic],
    seed: int,
    split: NDArray[np.generic] | None = None,
) -> Iterator[Array]:
    """Draw patients with replacement, all rows of a patient together.

    Both classes are drawn together: fixed numbers of each would make the intervals of metrics that
    depend on the prevalence too narrow. A draw that lacks a class is drawn again.

    Args:
        labels: (n,) of 0 and 1.
        patients: (n,) patient of each row.
        seed: seed of the draws, which do not depend on how they are cut into chunks.
        split: (n,) divides the rows; each part holds both classes in each draw.

    Yields:
        (r, n) how often each row counts in each of r draws, ``REPLICATES`` draws in all.

    Raises:
        ValueError: a class is missing.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
    """
    parts = np.zeros(len(labels)) if split is None else split
    needed = [(parts == part) & (labels == label) for part in np.unique(parts) for label in (0, 1)]
    if not all(rows.any() for rows in needed):
        raise ValueError("the rows need both labels 0 and 1: with one class no metric is defined")
    names, patient = np.unique(patients, return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    rng, left = np.random.default_rng(seed), REPLICATES
    while left:
        size = min(left, max(1, CHUNK_CELLS // len(labels)))
        weights = rng.multinomial(len(names), chances, size=size).astype(np.float64)[:, patient]
        weights = weights[np.all([weights[:, rows].any(axis=1) for rows in needed], axis=0)]
        left -= len(weights)
        yield weights
