"""Metrics of predicted risks under many weightings of the rows at once, as a bootstrap needs them.

Arrays in, arrays out. Letters: n rows, R weightings, K thresholds. scikit-learn scores one
weighting a call; tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

Array = NDArray[np.float64]

REPLICATES = 1000
CHUNK_CELLS = 2**20
"""Draws times rows that are held at a time: 8 MiB an array."""

NEWTON_STEPS, PRECISION, MAX_STEP = 40, 1e-9, 1.0

MIN_DIFFERENT = 20
"""Different risks that a calibration slope needs, such as those of the same risk in each fold."""

SPLINE_KNOTS = 0.05, 0.35, 0.65, 0.95
"""Quantiles at which the calibration curve may bend. Source: Harrell 2015, table 2.3."""


def metrics(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    """Compute discrimination and overall error of the risks.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n), how often each row counts in each weighting.

    Returns:
        (R,) values of auroc, auprc (average precision), brier, log_loss and
        brier_skill (gain over the prevalence as everyone's risk). Not finite where undefined:
        auroc and brier_skill without both classes, auprc without events, all without weight.

    Source: scikit-learn's definitions; Brier 1950; Murphy 1973 for the skill.
    """
    order = np.argsort(-risk, kind="stable")
    events = weights[:, order] * labels[order]
    non_events = weights[:, order] - events
    first_of_ties = np.flatnonzero(np.diff(-risk[order], prepend=-np.inf))
    if len(first_of_ties) < len(order):
        events = np.add.reduceat(events, first_of_ties, axis=1)
        non_events = np.add.reduceat(non_events, first_of_ties, axis=1)
    true, false = (
        events.cumsum(axis=1),
        non_events.cumsum(axis=1),
    )  # by falling threshold
    total = weights.sum(axis=1)  # divides last: a share of all is exactly 1
    likelihood = np.where(labels == 1, risk, 1 - risk)
    smallest = np.finfo(risk.dtype).eps  # as scikit-learn: no infinite loss
    losses = -np.log(likelihood.clip(smallest, 1 - smallest))
    with np.errstate(divide="ignore", invalid="ignore"):
        brier, prevalence = weights @ (risk - labels) ** 2 / total, weights @ labels / total
        precision = true / np.maximum(true + false, 1e-300)
        return {
            "auroc": (non_events * (true - events / 2)).sum(axis=1) / (true[:, -1] * false[:, -1]),
            "auprc": (events * precision).sum(axis=1) / true[:, -1],
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
    """Compute calibration slope, intercept and calibration in the large.

    Slope and intercept are those of a logistic fit of the label on the logit of the risk; in the
    large is the intercept with the slope held at 1: below 0 the risks are too high on average.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n).

    Returns:
        (R,) values by name; NaN where no finite fit exists. Slope and intercept need 20 different
        risks.

    Source: Cox 1958; Steyerberg 2019, "Clinical Prediction Models", chapter 15.
    """
    odds, everyone = log_odds(risk), np.ones((1, len(risk)))
    scaled, mean, spread = _scaled(odds)
    columns = np.stack([np.ones_like(odds), scaled])
    # Each fit starts where that of all rows ends.
    start = fit_logistic(labels, columns, everyone, [float(log_odds(labels.mean())), 0.0])[0]
    fitted = fit_logistic(labels, columns, weights, start)  # (R, 2)
    start = fit_logistic(labels, columns[:1], everyone, [0.0], odds)[0]
    level = fit_logistic(labels, columns[:1], weights, start, odds)[:, 0]
    if not has_slope(odds):
        fitted[:] = np.nan
    slope = fitted[:, 1] / spread
    return {
        "calibration_slope": slope,
        "calibration_intercept": fitted[:, 0] - slope * mean,
        "calibration_in_the_large": level,
    }


def has_slope(scaled: Array) -> bool:
    """Return whether risks on a scale (n,) differ enough to have a slope, rounding apart."""
    return len(np.unique(scaled.round(9))) >= MIN_DIFFERENT


def calibration_curve(labels: Array, risk: Array, weights: Array, at: Array) -> Array:
    """Compute a flexible calibration curve: the share of events that goes with a risk.

    A logistic fit of the label on a restricted cubic spline of the logit of the risk, with knots at
    its 5th, 35th, 65th and 95th percentile; a straight line where fewer than three of these differ.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n).
        at: (G,) risks at which the curve is read.

    Returns:
        (R, G) shares; NaN where no finite fit exists.

    Source: Harrell 2015, "Regression Modeling Strategies", section 2.4, for spline and knots.
    """
    scaled, mean, spread = _scaled(log_odds(risk))
    knots = np.unique(np.quantile(scaled, SPLINE_KNOTS))
    columns, points = (
        _spline_columns(x, knots) if np.isfinite(spread) else np.ones((len(x), 1))
        for x in (scaled, (log_odds(at) - mean) / spread)
    )
    # Orthogonal columns span the same curves, and Newton's steps stay small.
    basis, triangle = np.linalg.qr(columns)
    basis, points = (
        np.sqrt(len(risk)) * basis,
        np.sqrt(len(risk)) * points @ np.linalg.pinv(triangle),
    )
    start = fit_logistic(labels, basis.T, np.ones((1, len(risk))), np.zeros(basis.shape[1]))[0]
    curve: Array = expit(fit_logistic(labels, basis.T, weights, start) @ points.T)
    return curve


def calibration_error(labels: Array, risk: Array) -> dict[str, float]:
    """Compute how far the risks lie from their ``calibration_curve``.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.

    Returns:
        ``ici``, ``e50``, ``e90``: mean, median and 90th percentile of the distances; NaN where no
        finite fit exists.

    Source: Austin and Steyerberg 2019, "The Integrated Calibration Index (ICI) and related metrics
    for quantifying the calibration of logistic regression models", Statistics in Medicine 38:4051.
    """
    curve = calibration_curve(labels, risk, np.ones((1, len(risk))), risk)[0]
    distance = np.abs(curve - risk)
    values = distance.mean(), *np.quantile(distance, [0.5, 0.9])
    return dict(zip(("ici", "e50", "e90"), map(float, values), strict=True))


def _scaled(odds: Array) -> tuple[Array, float, float]:
    """Return log-odds (n,) as z-scores, their mean and spread; infinite where rounding is all."""
    mean, spread = float(odds.mean()), float(odds.std())
    if spread <= PRECISION * (1 + abs(mean)):
        return np.zeros_like(odds), mean, np.inf
    return (odds - mean) / spread, mean, spread


def _spline_columns(x: Array, knots: Array) -> Array:
    """Return 1, x and the curved columns of Harrell's restricted cubic spline, (n, p)."""
    columns = [np.ones_like(x), x]
    if len(knots) < 3:
        return np.stack(columns, axis=1)
    *inner, last, top = knots

    def cube(knot: float) -> Array:
        cubes: Array = np.maximum(x - knot, 0) ** 3
        return cubes

    columns += [
        (cube(k) - (cube(last) * (top - k) - cube(top) * (last - k)) / (top - last))
        / (top - inner[0]) ** 2
        for k in inner
    ]
    return np.stack(columns, axis=1)


def log_odds(risk: Array | float) -> Array:
    """Return the logit of probabilities, those of 0 and 1 moved by float64's precision."""
    smallest = np.finfo(np.float64).eps
    odds: Array = logit(np.clip(risk, smallest, 1 - smallest))
    return odds


def row_losses(labels: Array, odds: Array) -> Array:
    """Return the log loss (..., n) of each row, whose log-odds of the event are (..., n)."""
    losses: Array = np.logaddexp(0, np.where(labels == 1, -odds, odds))
    return losses


def clustered_error(values: Array, patients: NDArray[np.generic]) -> Array:
    """Return the standard error (...,) of the mean of rows (..., n), which counts patients (n,).

    Source: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models".
    """
    sums = patient_sums(values - values.mean(axis=-1, keepdims=True), patients)
    clusters = len(sums) / max(len(sums) - 1, 1)
    error: Array = np.sqrt(clusters * (sums**2).sum(axis=0)) / len(patients)
    return error


def patient_sums(values: Array, patients: NDArray[np.generic]) -> Array:
    """Return the sums of the rows (..., n) of each patient (n,), (patients, ...)."""
    names, patient = np.unique(patients, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[:-1]))
    np.add.at(sums, patient, np.moveaxis(values, -1, 0))
    return sums


def fit_logistic(
    labels: Array, columns: Array, weights: Array, start: ArrayLike, offset: Array | float = 0.0
) -> Array:
    """Fit log-odds = offset + coefficients @ columns by Newton's method.

    ``columns`` (p, n) are at about unit scale, ``offset`` is (n,). Returns the coefficients (R, p)
    under all weightings (R, n), NaN where no finite fit exists, as where the classes are separated.
    """
    size = len(columns)
    pairs = (columns[:, None] * columns).reshape(size**2, -1).T  # (n, p * p)
    fitted = np.tile(np.asarray(start, dtype=np.float64), (len(weights), 1))
    steps = np.zeros_like(fitted)
    for _ in range(NEWTON_STEPS):
        # (R, n); expit by its tanh, which is faster in the bootstrap's inner loop
        risk = 0.5 + 0.5 * np.tanh((fitted @ columns + offset) / 2)
        score = (weights * (labels - risk)) @ columns.T  # (R, p)
        curvature = ((weights * risk * (1 - risk)) @ pairs).reshape(-1, size, size)
        with np.errstate(invalid="ignore"):
            singular = ~(np.abs(np.linalg.det(curvature)) > 0)  # NaN too
        curvature[singular] = np.eye(size)
        steps = np.linalg.solve(curvature, score[:, :, None])[:, :, 0].astype(np.float64)
        steps[singular] = np.nan
        fitted += steps.clip(-MAX_STEP, MAX_STEP)
        if not (np.abs(steps) > PRECISION).any():  # NaN compares false and stays NaN
            break
    fitted[~(np.abs(steps) <= PRECISION).all(axis=1)] = np.nan
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


def bootstrap_weights(labels: Array, patients: NDArray[np.generic], seed: int) -> Iterator[Array]:
    """Draw patients with replacement, all rows of a patient together.

    No draw depends on the labels: fixed numbers of each class would make the intervals of metrics
    that depend on the prevalence too narrow, and leaving out draws that lack a class in some part
    of the rows would draw too many of the rarer class.

    Args:
        labels: (n,) of 0 and 1.
        patients: (n,) patient of each row.
        seed: seed of the draws, which do not depend on how they are cut into chunks.

    Yields:
        (r, n) how often each row counts in each of r draws, ``REPLICATES`` draws in all.

    Raises:
        ValueError: a class is missing.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
    """
    if not ((labels == 0).any() and (labels == 1).any()):
        raise ValueError("the rows need both labels 0 and 1: with one class no metric is defined")
    names, patient = np.unique(patients, return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    rng, left = np.random.default_rng(seed), REPLICATES
    while left:
        size = min(left, max(1, CHUNK_CELLS // len(labels)))
        yield rng.multinomial(len(names), chances, size=size).astype(np.float64)[:, patient]
        left -= size
