"""Meta-analysis: what several sites say together."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import t

from medgemma_clinical.evaluation.metrics import Array

MIN_POOLED = 3
"""Sites that a pooled value needs."""

MIN_PREDICTED = 5
"""Sites that a prediction interval needs."""


def random_effects(effects: Array, variances: Array) -> dict[str, float]:
    """Pool effects (k,) of known variances (k,) by a random-effects meta-analysis; NaN with few.

    Source: Viechtbauer 2005 for the REML estimate of tau2; Hartung and Knapp 2001 for the interval,
    Röver et al. 2015 for its lower bound; Higgins and Thompson 2002 for I2; Riley et al. 2011 for
    the prediction interval, Partlett and Riley 2017 for what it covers.
    """
    k, nan = len(effects), float("nan")
    ends = ("low", "high", "prediction_low", "prediction_high")
    if k < MIN_POOLED:
        return dict.fromkeys(("value", "i2", "tau2", *ends), nan)

    def pooled(tau2: float) -> tuple[Array, float, float]:
        weights = 1 / (variances + tau2)
        mean = float(weights @ effects / weights.sum())
        return weights, mean, float(weights @ (effects - mean) ** 2)

    def loss(tau2: float) -> float:
        weights, _, squares = pooled(tau2)
        return float(np.log(weights.sum()) - np.log(weights).sum() + squares)

    top = 10 * effects.var(ddof=1) + 1e-9
    minimum = minimize_scalar(loss, bounds=(0, top), method="bounded", options={"xatol": 1e-9})
    tau2 = float(minimum.x) if minimum.fun < loss(0) else 0.0
    weights, mean, squares = pooled(tau2)
    # At least the error of a common effect: where effects agree by chance, it would be 0.
    error = np.sqrt(max(1.0, squares / (k - 1)) / weights.sum())
    fixed = 1 / variances
    typical = (k - 1) * fixed.sum() / (fixed.sum() ** 2 - (fixed**2).sum())
    reach = t.ppf(0.975, k - 1) * error
    beyond = nan
    if k >= MIN_PREDICTED:
        beyond = t.ppf(0.975, k - 2) * np.sqrt(tau2 + error**2)
    intervals = (mean - reach, mean + reach, mean - beyond, mean + beyond)
    summary = {"value": mean, "i2": tau2 / (tau2 + typical), "tau2": tau2}
    return summary | dict(zip(ends, map(float, intervals), strict=True))
