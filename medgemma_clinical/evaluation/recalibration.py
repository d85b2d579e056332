"""Intercept and slope that correct the risks of a model, and tests whether they are needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import chi2

from medgemma_clinical.evaluation.metrics import (
    Array,
    calibration,
    log_odds,
    patient_sums,
    row_losses,
)

NOT_UPDATED, INTERCEPT, BOTH = "not updated", "intercept", "intercept and slope"
METHODS = (NOT_UPDATED, INTERCEPT, BOTH)

MIN_SLOPE_EVENTS = 100
"""Events from which on a slope is tried: with fewer it is too uncertain to improve the risks."""

LEVEL = 0.05
"""Significance level of the tests."""


def fit_updates(labels: Array, risk: Array) -> dict[str, tuple[float, float]]:
    """Return slope and intercept by method, from log-odds of a risk (n,) to those of labels (n,).

    Source: Steyerberg et al. 2004, "Validation and updating of predictive logistic regression
    models", Statistics in Medicine 23:2567.
    """
    fitted = calibration(labels, risk, np.ones((1, len(labels))))
    fit = {name.removeprefix("calibration_"): values.item() for name, values in fitted.items()}
    updates = {NOT_UPDATED: (1.0, 0.0), INTERCEPT: (1.0, fit["in_the_large"])}
    if fit["slope"] > 0:  # events become more frequent with the risk; NaN is not above 0
        updates[BOTH] = fit["slope"], fit["intercept"]
    return updates


def choose_update(
    labels: Array, risk: Array, patients: NDArray[np.generic], *, with_slope: bool
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return the method that a closed test chooses, and ``fit_updates``; arrays are (n,).

    Source: Vergouwe et al. 2017, "A closed testing procedure to select an appropriate method for
    updating prediction models", Statistics in Medicine 36:4529.
    """
    updates, odds, one = fit_updates(labels, risk), log_odds(risk), np.ones((1, len(labels)))
    _, level = updates[INTERCEPT]
    if with_slope and BOTH in updates:
        model = labels, np.stack([one[0], odds]), np.zeros_like(odds), patients
        fit = np.array(updates[BOTH][::-1])
        p = clustered_p_value(*model, fit, np.array([0.0, 1.0]), [0, 1])  # against no update
        if not p < LEVEL:
            return NOT_UPDATED, updates
        p = clustered_p_value(*model, fit, np.array([level, 1.0]), [1])  # against the intercept
        return BOTH if p < LEVEL else INTERCEPT, updates
    p = clustered_p_value(labels, one, odds, patients, np.array([level]), np.zeros(1), [0])
    return INTERCEPT if p < LEVEL else NOT_UPDATED, updates


def clustered_p_value(
    labels: Array,  # (n,)
    columns: Array,  # (p, n) of the larger model
    offset: Array,  # (n,) log-odds that are added to those of the columns
    patients: NDArray[np.generic],  # (n,)
    fit: Array,  # (p,) coefficients of the larger model
    null: Array,  # (p,) of the smaller one
    tested: list[int],  # positions of the coefficients that the smaller model fixes
) -> float:
    """Return the p value of a likelihood-ratio test of logistic models, clustered by patient.

    Source: Chandler and Bate 2007, "Inference for clustered data using the independence
    loglikelihood", Biometrika 94:167, equation 17.
    """
    risk = expit(offset + fit @ columns)
    bread = np.linalg.inv((risk * (1 - risk) * columns) @ columns.T)
    sums = patient_sums((labels - risk) * columns, patients)  # (patients, p)
    clustered = bread @ (sums.T @ sums) @ bread * len(sums) / (len(sums) - 1)
    distance, chosen = (fit - null)[tested], np.ix_(tested, tested)
    # Wald statistics with clustered and with usual errors scale the ratio.
    wald = [distance @ np.linalg.solve(v[chosen], distance) for v in (clustered, bread)]
    losses = row_losses(labels, offset + np.stack([null, fit]) @ columns).sum(axis=1)
    with np.errstate(invalid="ignore"):
        ratio = 2 * (losses[0] - losses[1]) * wald[0] / wald[1]
    return float(chi2.sf(ratio, len(tested)))
