"""Calibration: logistic recalibration fits for many weightings at once, and calibration bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from medgemma_clinical.evaluation.bootstrap import Figures

NEWTON_STEPS, NEWTON_PRECISION, LONGEST_STEP = 40, 1e-9, 1.0
EQUAL_LOG_ODDS = 1e-9
"""Log-odds whose relative spread is smaller count as equal: the spread is rounding."""


def log_odds(probability: NDArray[Any]) -> NDArray[np.float64]:
    """Return the logit of probabilities (n,), those of 0 and 1 moved by float64's precision."""
    smallest = np.finfo(np.float64).eps
    odds: NDArray[np.float64] = logit(np.clip(probability, smallest, 1 - smallest))
    return odds


def weighted_calibration(
    labels: NDArray[Any], probability: NDArray[Any], weights: NDArray[np.float64]
) -> Figures:
    """Compute calibration slope, intercept, calibration in the large and Brier skill.

    Slope and intercept are those of a logistic fit of the label on the logit: with a slope below 1
    the risks are too extreme. Calibration in the large is the intercept with the slope held at 1:
    below 0 the risks are too high on average. The Brier skill compares with a constant prediction
    of the prevalence: 0 is no better, 1 is perfect.

    Source: Cox 1958; Steyerberg 2019, "Clinical Prediction Models", chapter 15; Murphy 1973.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        weights: (R, n), how often each row counts.

    Returns:
        (R,) values of each figure; NaN where no fit exists.
    """
    odds = log_odds(probability)
    mean, spread = odds.mean(), odds.std()
    equal = spread <= EQUAL_LOG_ODDS * (1 + abs(mean))
    scaled = np.zeros_like(odds) if equal else (odds - mean) / spread
    all_rows = np.ones((1, len(labels)))
    prevalence_alone = np.array([log_odds(labels.mean()), 0.0])
    start = fit_logistic(labels, scaled, all_rows, prevalence_alone, fit_slope=True)[0]
    fitted = fit_logistic(labels, scaled, weights, start, fit_slope=True)
    slope = fitted[:, 1] / spread
    unchanged = np.array([mean, spread])  # the model's log-odds, expressed on the scaled logit
    unchanged[0] = fit_logistic(labels, scaled, all_rows, unchanged, fit_slope=False)[0, 0]
    in_the_large = fit_logistic(labels, scaled, weights, unchanged, fit_slope=False)[:, 0] - mean
    share = weights / weights.sum(axis=1, keepdims=True)
    prevalence = share @ labels
    with np.errstate(divide="ignore", invalid="ignore"):
        skill = 1 - share @ (probability - labels) ** 2 / (prevalence * (1 - prevalence))
    return {
        "calibration_slope": slope,
        "calibration_intercept": fitted[:, 0] - slope * mean,
        "calibration_in_the_large": in_the_large,
        "brier_skill": skill,
    }


def fit_logistic(
    labels: NDArray[Any],
    odds: NDArray[np.float64],
    weights: NDArray[np.float64],
    start: NDArray[np.float64],
    *,
    fit_slope: bool,
) -> NDArray[np.float64]:
    """Fit log-odds = a + b * odds by maximum likelihood, for all weightings at once.

    Newton's method with steps of limited length.

    Args:
        labels: (n,) of 0 and 1.
        odds: (n,) log-odds at about unit scale.
        weights: (R, n).
        start: (2,) initial a and b.
        fit_slope: fit b too; otherwise b stays as in ``start``.

    Returns:
        (R, 2) a and b; NaN where no finite fit exists (classes that ``odds`` separates).
    """
    fitted = np.tile(start, (len(weights), 1))
    steps = np.zeros_like(fitted)
    for _ in range(NEWTON_STEPS):
        # (R, n); expit by its tanh, which is faster than scipy's in the bootstrap's inner loop
        risk = 0.5 + 0.5 * np.tanh((fitted[:, :1] + fitted[:, 1:] * odds) / 2)
        residual, curvature = weights * (labels - risk), weights * risk * (1 - risk)
        g0, h00 = residual.sum(axis=1), curvature.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if fit_slope:
                g1, h01, h11 = residual @ odds, curvature @ odds, curvature @ odds**2
                steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1)
                steps /= (h00 * h11 - h01**2)[:, None]
            else:
                steps[:, 0] = g0 / h00
        fitted = fitted + steps.clip(-LONGEST_STEP, LONGEST_STEP)
        if not (np.abs(steps) > NEWTON_PRECISION).any():  # NaN compares false and stays NaN
            break
    fitted[(np.abs(steps) > NEWTON_PRECISION).any(axis=1)] = np.nan
    return fitted


def calibration_bins(
    labels: NDArray[np.float64], probability: NDArray[np.float64]
) -> list[NDArray[np.bool_]]:
    """Sort rows into two to ten bins of about equal size by risk; equal risks share a bin.

    A bin holds about five rows of the rarer class or more.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.

    Returns:
        The rows (n,) of each bin that has any, by rising risk.
    """
    rarer = min(labels.sum(), (1 - labels).sum())
    count = int(np.clip(rarer // 5, 2, 10))
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, count + 1)))
    places = np.searchsorted(edges, probability, side="right") - 1
    places = np.clip(places, 0, max(len(edges) - 2, 0))
    return [places == place for place in np.unique(places)]
