"""Discrimination, errors, shares at a threshold and net benefit, for many weightings at once.

scikit-learn scores one weighting a call, and a bootstrap needs 1,000. Tests hold both equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.evaluation.bootstrap import Figures

METRICS = ("auroc", "auprc", "accuracy", "brier", "log_loss")

Share = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Rows (n,) that count, among rows (n,)."""


def weighted_metrics(
    labels: NDArray[Any], probability: NDArray[Any], weights: NDArray[np.float64]
) -> Figures:
    """Compute ``METRICS`` as scikit-learn defines them; the accuracy is that at 0.5.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        weights: (R, n), how often each row counts in each of R weightings.

    Returns:
        (R,) values of each metric; NaN where a weighting lacks a class.
    """
    order = np.argsort(-probability, kind="stable")
    first_of_ties = np.flatnonzero(np.diff(-probability[order], prepend=-np.inf))
    ordered = weights[:, order]
    events = ordered * labels[order]
    others = ordered - events
    if len(first_of_ties) < len(order):
        events = np.add.reduceat(events, first_of_ties, axis=1)
        others = np.add.reduceat(others, first_of_ties, axis=1)
    hits, false_alarms = events.cumsum(axis=1), others.cumsum(axis=1)  # by falling threshold
    pairs_in_order = (others * (hits - events / 2)).sum(axis=1)
    share = weights / weights.sum(axis=1, keepdims=True)
    likelihood = np.where(labels == 1, probability, 1 - probability)
    smallest = np.finfo(probability.dtype).eps  # as scikit-learn: no infinite loss
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = pairs_in_order / (hits[:, -1] * false_alarms[:, -1])
        precision = hits / np.maximum(hits + false_alarms, 1e-300)
        auprc = (events * precision).sum(axis=1) / hits[:, -1]
    return {
        "auroc": auroc,
        "auprc": auprc,
        "accuracy": share @ ((probability >= 0.5) == labels),
        "brier": share @ (probability - labels) ** 2,
        "log_loss": share @ -np.log(likelihood.clip(smallest, 1 - smallest)),
    }


def threshold_shares(
    labels: NDArray[Any], probability: NDArray[Any], threshold: float
) -> dict[str, Share]:
    """Return sensitivity, specificity, predictive values and share of alarms, each as a ``Share``.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event; an alarm is a probability of at least ``threshold``.
        threshold: from the decision rule.
    """
    event, alarm = labels == 1, probability >= threshold
    return {
        "sensitivity": (event & alarm, event),
        "specificity": (~event & ~alarm, ~event),
        "ppv": (event & alarm, alarm),
        "npv": (~event & ~alarm, ~alarm),
        "alarms": (alarm, np.ones_like(alarm)),
    }


def weighted_shares(shares: dict[Any, Share], weights: NDArray[np.float64]) -> Figures:
    """Compute shares under weights (R, n).

    Returns:
        (R,) values by name, NaN where the denominator is empty.
    """
    counted = np.stack([rows for rows, _ in shares.values()], axis=1).astype(float)
    among = np.stack([rows for _, rows in shares.values()], axis=1).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (weights @ counted) / (weights @ among)
    return dict(zip(shares, values.T, strict=True))


def net_benefit(
    labels: NDArray[Any],
    probability: NDArray[Any],
    risks: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Compute the net benefit TP/n - FP/n * p/(1 - p) at threshold risks p.

    Source: Vickers and Elkin 2006, "Decision curve analysis".

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        risks: (K,) threshold risks p within (0, 1), rising.
        weights: (R, n), how often each row counts.

    Returns:
        (R, K). To treat all has the benefit of a ``probability`` of ones, to treat none has zero.
    """
    alarms_up_to = np.searchsorted(risks, probability, side="right")  # alarm at the first so many
    order = np.argsort(alarms_up_to, kind="stable")
    first_alarm = np.searchsorted(alarms_up_to[order], np.arange(1, len(risks) + 1))
    counts = []
    for rows in (labels, 1 - labels):
        cumulative = np.cumsum(weights[:, order] * rows[order], axis=1)
        cumulative = np.pad(cumulative, ((0, 0), (1, 0)))
        counts.append(cumulative[:, -1:] - cumulative[:, first_alarm])
    true_alarms, false_alarms = counts
    benefit: NDArray[np.float64] = true_alarms - false_alarms * risks / (1 - risks)
    return benefit / weights.sum(axis=1, keepdims=True)


def benefit_gain(
    labels: NDArray[Any],
    probability: NDArray[Any],
    threshold: float,
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Compute by how much alarms at a threshold beat both an alarm for all and for none.

    The gain is the net benefit of the alarms minus the larger of the two others.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event; an alarm is a probability of at least ``threshold``.
        threshold: from the decision rule.
        weights: (R, n), how often each row counts.

    Returns:
        (R,); NaN where the threshold is no risk within (0, 1).
    """
    if not 0 < threshold < 1:
        return np.full(len(weights), np.nan)
    event, alarm = labels == 1, probability >= threshold
    price = threshold / (1 - threshold)
    share = weights / weights.sum(axis=1, keepdims=True)
    prevalence = share @ event
    everyone = prevalence - (1 - prevalence) * price
    own = share @ (event & alarm) - share @ (~event & alarm) * price
    gain: NDArray[np.float64] = own - np.maximum(everyone, 0)
    return gain
