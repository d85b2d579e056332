"""From a model's log-odds to a probability and a prediction: weight, recalibration, threshold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score, roc_curve

from medgemma_clinical.evaluation.metrics import (
    Array,
    calibration,
    clustered_error,
    log_odds,
    patient_sums,
    row_losses,
)

logger = logging.getLogger(__name__)

RESIDUAL_WEIGHTS = np.linspace(0, 1, 11)
"""Weights of a language model's logit beside stage 1's that are tried on the validation part."""

NOT_UPDATED, INTERCEPT, BOTH = "not updated", "intercept", "intercept and slope"
METHODS = (NOT_UPDATED, INTERCEPT, BOTH)
"""What of a rule is recalibrated."""

MIN_SLOPE_EVENTS = 100
"""Events from which on a slope is tried: with fewer it is too uncertain to improve the risks."""

LEVEL = 0.05
"""Significance level of the tests."""

YOUDEN = "by Youden's index (sensitivity plus specificity)"
GOALS = "sensitivity", "specificity"
"""What ``--threshold`` may ask of a threshold."""

MIN_CHOOSING_EVENTS = 100
"""Events of the rows from which on their losses choose the model that is recommended."""


@dataclass(frozen=True)
class DecisionRule:
    """How log-odds become a probability and a prediction; kept with the model's weights."""

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5  # the lowest probability that predicts the event

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecisionRule:
        """Read the rule of a checkpoint's config; without one the log-odds stay as they are."""
        if "decision" not in config:
            return cls()
        stored = config["decision"]
        try:
            rule = cls(*(float(stored[name]) for name in ("slope", "intercept", "threshold")))
        except (TypeError, ValueError, KeyError):
            rule = cls(math.nan)
        if not (rule.slope > 0 and all(map(math.isfinite, asdict(rule).values()))):
            raise ValueError(f"decision rule {stored!r}: not three finite numbers, slope above 0")
        return rule

    @property
    def method(self) -> str:
        """What of ``METHODS`` the rule moves."""
        if self.slope != 1:
            return BOTH
        return INTERCEPT if self.intercept else NOT_UPDATED

    @property
    def is_moved(self) -> bool:
        """Whether log-odds are recalibrated."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    def probability(self, logit: Array) -> Array:
        """Return the probability (n,) of log-odds (n,), both float64."""
        probability: Array = expit(self.intercept + self.slope * logit)
        return probability

    def positive(self, probability: Array) -> NDArray[np.bool_]:
        """Return which of n probabilities predict the event."""
        return probability >= self.threshold


class Recalibrated(NamedTuple):
    """Risks (n,) of a model, and the rule that was fitted on the rows that measure it."""

    before: Array
    rule: DecisionRule

    @property
    def after(self) -> Array:
        """The risks (n,) by the rule."""
        return self.rule.probability(log_odds(self.before))

    def expected(self, labels: Array, weights: Array) -> dict[str, Array]:
        """Return slope and level (R,) of the rule in new rows: 1 and 0, with the rule's error.

        The rule is refitted under weights (R, n), and tried on all rows.
        """
        fit = calibration(labels, self.after, weights)
        slope = fit["calibration_slope"]
        return {
            "calibration_slope": slope if self.rule.slope == 1 else 1 / slope,
            "calibration_in_the_large": -fit["calibration_in_the_large"],
        }


@dataclass(frozen=True)
class Predictions:
    """Log-odds of the rows of one part, in the order of the data set."""

    losses: Array  # (N,) mean over all terms, of each member
    labels: Array  # (n,) of 0 and 1
    logit: Array  # (n,) log-odds of the event as the model gives them
    rows: NDArray[np.int64]  # (n,) positions in the data set
    offset: Array  # (n, Q) the share of ``outputs`` that is not a language model's
    rule: DecisionRule = field(default_factory=DecisionRule)
    hazards: Array | None = None  # (n, Q) of times to events; ``logit`` is of their first risk

    @property
    def loss(self) -> float:
        """Mean loss of the members."""
        return float(self.losses.mean())

    @property
    def outputs(self) -> Array:
        """What the model gives, (n, Q): the log-odds of a label, or hazards."""
        return self.logit[:, None] if self.hazards is None else self.hazards

    @property
    def probability(self) -> Array:
        """Probability of the event, (n,)."""
        return self.rule.probability(self.logit)

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which rows are predicted to have the event, (n,)."""
        return self.rule.positive(self.probability)

    def auroc(self) -> float | None:
        """Return the area under the ROC curve of both labels; None of times to events."""
        if self.hazards is not None:
            return None
        return float(roc_auc_score(self.labels, self.probability))


@dataclass(frozen=True)
class DecisionOptions:
    """What the user chose of a decision rule."""

    recalibration: str = "none"  # or platt, a method, or tests: these choose the method
    threshold: str | None = None  # as ``--threshold`` is written; None: Youden's

    @classmethod
    def chosen(cls, calibrate: str, threshold: str | None, auto: str = "none") -> DecisionOptions:
        """Return what ``--calibrate`` and ``--threshold`` choose, and what "auto" means here."""
        return cls(auto if calibrate == "auto" else calibrate, threshold)


def fit_decision_rule(
    labels: Array, logit: Array, patients: NDArray[Any], options: DecisionOptions
) -> DecisionRule:
    """Fit recalibration and threshold on n rows that the model did not learn from.

    Source: Platt 1999, without the smoothed targets: the logistic fit whose slope and intercept
    measure calibration.
    """
    rule = DecisionRule()
    risk = rule.probability(logit)
    if options.recalibration == "tests":
        with_slope = labels.sum() >= MIN_SLOPE_EVENTS
        method, updates = choose_update(labels, risk, patients, with_slope=with_slope)
        rule = DecisionRule(*updates[method])
    elif options.recalibration not in ("none", NOT_UPDATED):
        method = BOTH if options.recalibration == "platt" else options.recalibration
        rule = DecisionRule(*fit_updates(labels, risk).get(method, (1.0, 0.0)))
    threshold = choose_threshold(options.threshold, labels, rule.probability(logit))
    return replace(rule, threshold=threshold)


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
    clustered, bread = clustered_covariance(labels, columns, offset, patients, fit)
    distance, chosen = (fit - null)[tested], np.ix_(tested, tested)
    # Wald statistics with clustered and with usual errors scale the ratio.
    wald = [distance @ np.linalg.solve(v[chosen], distance) for v in (clustered, bread)]
    losses = row_losses(labels, offset + np.stack([null, fit]) @ columns).sum(axis=1)
    with np.errstate(invalid="ignore"):
        ratio = 2 * (losses[0] - losses[1]) * wald[0] / wald[1]
    return float(chi2.sf(ratio, len(tested)))


def clustered_covariance(
    labels: Array,  # (n,)
    columns: Array,  # (p, n)
    offset: Array,  # (n,) log-odds that are added to those of the columns
    patients: NDArray[np.generic],  # (n,)
    fit: Array,  # (p,) coefficients
) -> tuple[Array, Array]:
    """Return the covariance (p, p) of logistic coefficients, clustered by patient, and the usual.

    Source: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models".
    """
    risk = expit(offset + fit @ columns)
    bread: Array = np.linalg.inv((risk * (1 - risk) * columns) @ columns.T)
    sums = patient_sums((labels - risk) * columns, patients)  # (patients, p)
    return bread @ (sums.T @ sums) @ bread * len(sums) / (len(sums) - 1), bread


def fit_residual_weight(
    offset: Array,  # (n, Q) stage 1's outputs
    outputs: Array,  # (n, Q) with all that a language model adds
    patients: NDArray[Any],  # (n,)
    losses: Callable[[Array], Array],  # (weights, n) of outputs (weights, n, Q)
    auroc: Callable[[Array], float],  # of outputs (n, Q)
) -> float:
    """Choose the weight of what a language model adds to stage 1's outputs.

    Source: Breiman et al. 1984, "Classification and Regression Trees", for the standard error.
    """
    tried = offset + RESIDUAL_WEIGHTS[:, None, None] * (outputs - offset)  # (weights, n, Q)
    # The smallest weight whose loss is within a standard error of the lowest.
    index = int(np.argmax(near_lowest(losses(tried), patients)))
    improves = auroc(tried[index]) > auroc(offset)
    # 0 where the AUROC does not improve: on this part a language model never harms.
    return float(RESIDUAL_WEIGHTS[index]) if improves else 0.0


def recommended_model(
    names: Sequence[str],
    losses: Array,  # (models, n) of rows that have not trained them
    events: int,
    patients: NDArray[Any],
    preferred: Sequence[str],
    planned: str | None,
) -> str | None:
    """Return the first preferred model with nearly the lowest log loss, else the model with the
    lowest; ``preferred`` begins with the simplest. Of few events return ``planned``."""
    if events < MIN_CHOOSING_EVENTS:
        return planned  # losses of few events cannot tell models apart
    near = dict(zip(names, near_lowest(losses, patients), strict=True))
    lowest = names[losses.mean(axis=1).argmin()]
    return next((name for name in preferred if near.get(name)), lowest)


def near_lowest(losses: Array, patients: NDArray[Any]) -> NDArray[np.bool_]:
    """Return whose mean of losses (K, n) is within a standard error of the lowest, (K,)."""
    above = losses - losses[losses.mean(axis=1).argmin()]  # of the same rows
    # The error counts patients, not rows.
    near: NDArray[np.bool_] = above.mean(axis=1) <= clustered_error(above, patients)
    return near


def parse_threshold(text: str) -> tuple[str, float]:
    """Read ``--threshold``: a goal, empty for the risk itself, and its number within (0, 1)."""
    goal, _, number = text.strip().rpartition(" ")
    value = float(number)
    if goal not in ("", *GOALS) or not 0 < value < 1:
        raise ValueError(text)
    return goal, value


def describe_threshold(choice: str | None, rows: str) -> str:
    """Return how a threshold was chosen, on which rows, in words; None: by Youden's index."""
    goal, value = ("", math.nan) if choice is None else parse_threshold(choice)
    if choice is not None and not goal:
        return "set by the user"
    rule = f"for a {goal} of at least {100 * value:g} %" if goal else YOUDEN
    return f"chosen {rule} on {rows}"


def choose_threshold(
    choice: str | None, labels: Array, probability: Array, weights: Array | None = None
) -> float:
    """Return the threshold of a ``--threshold``, chosen on n rows; None: Youden's.

    A goal gets the threshold that reaches it and is best for the other of both shares.
    """
    if choice is None:
        return youden_threshold(labels, probability, weights)
    goal, value = parse_threshold(choice)
    if not goal:
        return value
    options: dict[str, Any] = {"sample_weight": weights, "drop_intermediate": False}
    false_rate, sensitivity, thresholds = roc_curve(labels, probability, **options)
    if goal == "sensitivity":  # it rises along the curve, specificity falls
        return _midway(thresholds, np.flatnonzero(sensitivity >= value)[0])
    return _midway(thresholds, np.flatnonzero(1 - false_rate >= value)[-1])


def youden_threshold(
    labels: NDArray[Any], probability: NDArray[Any], weights: Array | None = None
) -> float:
    """Return the lowest threshold with the largest sensitivity + specificity.

    Source: Youden 1950, "Index for rating diagnostic tests".
    """
    options: dict[str, Any] = {"sample_weight": weights, "drop_intermediate": False}
    false_rate, sensitivity, thresholds = roc_curve(labels, probability, **options)
    index = sensitivity - false_rate
    best = np.flatnonzero(np.isclose(index, index.max(), rtol=0, atol=1e-12))[-1]
    return _midway(thresholds, best)


def _midway(thresholds: Array, k: np.intp) -> float:
    """Return the middle of the falling risks k and k + 1: rounding moves no row across."""
    lower = thresholds[k + 1] if k + 1 < len(thresholds) else 0.0
    return float((min(thresholds[k], 1.0) + lower) / 2)  # scikit-learn's first is infinite
