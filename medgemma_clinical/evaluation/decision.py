"""From a model's log-odds to a probability and a prediction: recalibration and threshold."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score, roc_curve

from medgemma_clinical.evaluation.calibration import weighted_calibration

logger = logging.getLogger(__name__)


RESIDUAL_WEIGHTS = np.linspace(0, 1, 11)
"""Weights of a language model's logit beside stage 1's that are tried on the validation part."""


@dataclass(frozen=True)
class DecisionRule:
    """How log-odds become a probability and a prediction; kept with the model's weights.

    The probability is sigmoid(intercept + slope * logit). Rows whose probability is at least the
    threshold are predicted to have the event.
    """

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecisionRule:
        """Read the rule of a checkpoint's config; without one the log-odds stay as they are.

        Raises:
            ValueError: the rule is incomplete, not finite, or reverses the order of the patients.
        """
        stored = config.get("decision")
        if stored is None:
            return cls()
        try:
            rule = cls(**{field.name: float(stored[field.name]) for field in fields(cls)})
            sound = rule.slope > 0 and all(map(math.isfinite, asdict(rule).values()))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"decision rule {stored!r}: not three finite numbers, slope above 0")
        return rule

    def to_config(self) -> dict[str, float]:
        """Return the rule as plain types."""
        return asdict(self)

    @property
    def recalibrates(self) -> bool:
        """Whether the log-odds are changed at all."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    def probability(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability (n,) of log-odds (n,), both float64."""
        probability: NDArray[np.float64] = expit(self.intercept + self.slope * logit)
        return probability


def fit_decision_rule(
    labels: NDArray[np.float64], logit: NDArray[np.float64], calibrate: str
) -> DecisionRule:
    """Fit recalibration and threshold on the validation part.

    Source: Platt 1999, without the smoothed targets: the logistic fit whose slope and intercept
    measure calibration.

    Args:
        labels: (n,) of 0 and 1.
        logit: (n,) float64, log-odds of the model.
        calibrate: ``platt``, or ``none`` to leave the log-odds as they are.
    """
    rule = DecisionRule()
    if calibrate == "platt":
        fit = weighted_calibration(labels, rule.probability(logit), np.ones((1, len(labels))))
        slope, intercept = fit["calibration_slope"].item(), fit["calibration_intercept"].item()
        if slope > 0:
            rule = DecisionRule(slope, intercept)
        else:  # NaN too
            logger.warning(
                "not recalibrated: on the validation part events do not become more frequent with "
                "the risk (slope %.3g), or the risks separate them completely",
                slope,
            )
    return replace(rule, threshold=youden_threshold(labels, rule.probability(logit)))


def threshold_text(threshold: float) -> str:
    """Write a threshold risk in percent, in one rounding wherever a page names it."""
    number = f"{100 * threshold:.1f}" if threshold >= 0.01 else f"{100 * threshold:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def fit_residual_weight(
    labels: NDArray[np.float64], offset: NDArray[np.float64], logit: NDArray[np.float64]
) -> float:
    """Choose the weight of a language model's logit beside stage 1's, on the validation part.

    The weight is the smallest one whose loss is within a standard error of the lowest. Where its
    AUROC is not above that of stage 1 the weight is 0, so that on this part a language model never
    harms.

    Source: Breiman et al. 1984, "Classification and Regression Trees", for the standard error.

    Args:
        labels: (n,) of 0 and 1, both there.
        offset: (n,) log-odds of stage 1.
        logit: (n,) log-odds with all that the language model adds.
    """
    tried = offset + RESIDUAL_WEIGHTS[:, None] * (logit - offset)  # (weights, n)
    losses = np.logaddexp(0, np.where(labels == 1, -tried, tried))
    above_lowest = losses - losses[losses.mean(axis=1).argmin()]  # of the same rows
    error = above_lowest.std(axis=1, ddof=1) / math.sqrt(len(labels))
    chosen = int(np.argmax(above_lowest.mean(axis=1) <= error))  # the first
    improves = roc_auc_score(labels, tried[chosen]) > roc_auc_score(labels, offset)
    return float(RESIDUAL_WEIGHTS[chosen]) if improves else 0.0


def youden_threshold(labels: NDArray[Any], probability: NDArray[Any]) -> float:
    """Return the threshold with the largest sensitivity + specificity; of several the lowest.

    The threshold lies midway to the next lower probability, so that rounding moves no row across.

    Source: Youden 1950, "Index for rating diagnostic tests".

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
    """
    false_alarms, sensitivity, thresholds = roc_curve(labels, probability, drop_intermediate=False)
    index = sensitivity - false_alarms
    best = np.flatnonzero(np.isclose(index, index.max(), rtol=0, atol=1e-12))[-1]
    lower = thresholds[best + 1] if best + 1 < len(thresholds) else 0.0
    return float((thresholds[best] + lower) / 2)
