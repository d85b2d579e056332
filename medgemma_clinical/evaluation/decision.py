"""From a model's risks to those that are delivered, and predictions: weight, rule, threshold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.metrics import roc_curve

from medgemma_clinical.evaluation.metrics import (
    LOGIT,
    Array,
    Known,
    Link,
    clustered_error,
    patient_sums,
)

logger = logging.getLogger(__name__)

RESIDUAL_WEIGHTS = np.linspace(0, 1, 11)
"""Weights of a language model's logit beside stage 1's that are tried on the validation part."""

NOT_UPDATED, INTERCEPT, BOTH = "not updated", "intercept", "intercept and slope"
METHODS = (NOT_UPDATED, INTERCEPT, BOTH)
"""What of a rule is recalibrated."""

TESTS = "tests"
"""In place of one of ``METHODS``: a closed test chooses it."""

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
    """How risks of a target become those that are delivered, and predictions.

    Scaled risks, the log-odds of a label, are multiplied and shifted.
    """

    multiplier: float = 1.0
    shift: float = 0.0
    threshold: float = 0.5  # the lowest delivered risk that predicts the event

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> DecisionRule:
        """Check and return a stored rule."""
        try:
            rule = cls(*(float(stored[name]) for name in ("multiplier", "shift", "threshold")))
        except (TypeError, ValueError, KeyError):
            rule = cls(math.nan)
        if not (rule.multiplier > 0 and all(map(math.isfinite, asdict(rule).values()))):
            raise ValueError(f"decision rule {stored!r}: not three finite numbers")
        return rule

    @property
    def method(self) -> str:
        """What of ``METHODS`` the rule moves."""
        if self.multiplier != 1:
            return BOTH
        return INTERCEPT if self.shift else NOT_UPDATED

    @property
    def is_moved(self) -> bool:
        """Whether risks are recalibrated."""
        return (self.multiplier, self.shift) != (1.0, 0.0)

    def risk(self, risk: Array, link: Link) -> Array:
        """Return the delivered risks of those of a model, (n,)."""
        return link.moved(risk, self.multiplier, self.shift) if self.is_moved else risk

    def followed_by(self, multiplier: float, shift: float, link: Link) -> DecisionRule:
        """Return the rule and a further move; it predicts the event for the same rows."""
        threshold = link.moved(np.array([self.threshold]), multiplier, shift)
        return DecisionRule(
            multiplier * self.multiplier, shift + multiplier * self.shift, float(threshold[0])
        )


Rules = Mapping[str, DecisionRule]
"""The rules of a model, by the name of the target."""


def read_rules(stored: Mapping[str, Any]) -> dict[str, DecisionRule]:
    """Check and return the stored rules of a model."""
    return {name: DecisionRule.read(rule) for name, rule in stored.items()}


class Recalibrated(NamedTuple):
    """Risks (n,) of a model, and the rule that was fitted on the rows that measure it."""

    before: Array
    rule: DecisionRule
    link: Link

    @property
    def after(self) -> Array:
        """The risks (n,) by the rule."""
        return self.rule.risk(self.before, self.link)

    def expected(self, known: Known) -> dict[str, Array]:
        """Return slope and intercept (R,) of the rule in new rows: 1 and 0, with its error.

        The rule is refitted in each draw, and tried on all rows.
        """
        fit = known.calibration(self.after)
        slope = fit["slope"]
        return {
            "slope": slope if self.rule.multiplier == 1 else 1 / slope,
            "intercept": -fit["intercept"],
        }


@dataclass(frozen=True)
class Predictions:
    """What a model gives for the rows of one part, in the order of the data set."""

    losses: Array  # (N,) mean over all terms, of each member
    outputs: Array  # (n, Q) the log-odds of a label, or hazards
    rows: NDArray[np.int64]  # (n,) positions in the data set
    offset: Array  # (n, Q) the share of ``outputs`` that is not a language model's or text's
    share: Array | None = None  # (n, Q) what text adds, once its weight is known

    @property
    def loss(self) -> float:
        """Mean loss of the members."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class DecisionOptions:
    """What the user chose of a decision rule."""

    method: str = NOT_UPDATED  # of ``METHODS``, or ``TESTS``
    threshold: str | None = None  # as ``--threshold`` is written; None: Youden's


@dataclass(frozen=True)
class EvaluationOptions:
    """How predictions are evaluated and shown, by the flags of the same names."""

    seed: int
    censoring: str
    calibrate: str
    threshold: str | None
    primary: str | None
    min_cell: int
    report_patients: bool

    @classmethod
    def of(cls, flags: Any) -> Self:
        """Return what the arguments of a command choose."""
        return cls(**{x.name: getattr(flags, x.name) for x in fields(cls)})

    def decision(self, auto: str = NOT_UPDATED) -> DecisionOptions:
        """Return what is chosen of a decision rule, and what "auto" means here."""
        methods = {"none": NOT_UPDATED, "platt": BOTH, "auto": auto}
        return DecisionOptions(methods[self.calibrate], self.threshold)


def fit_rule(
    known: Known, risk: Array, patients: NDArray[Any], options: DecisionOptions
) -> DecisionRule:
    """Fit recalibration and threshold on n rows that the model did not learn from.

    Source: Platt 1999, without the smoothed targets: the logistic fit whose slope and intercept
    measure calibration.
    """
    if options.method == TESTS:
        method, updates = choose_update(known, risk, patients)
    else:
        method, updates = options.method, fit_updates(known, risk)
    rule = DecisionRule(*updates.get(method, updates[NOT_UPDATED]))
    threshold = choose_threshold(options.threshold, known, rule.risk(risk, known.link))
    return replace(rule, threshold=threshold)


def fit_updates(known: Known, risk: Array) -> dict[str, tuple[float, float]]:
    """Return multiplier and shift by method, from scaled risks (n,) to those of the outcome.

    Source: Steyerberg et al. 2004, "Validation and updating of predictive logistic regression
    models", Statistics in Medicine 23:2567.
    """
    updates = {NOT_UPDATED: (1.0, 0.0)}
    if np.isfinite(level := known.mean_shift(risk)):
        updates[INTERCEPT] = 1.0, level
    slope, shift = (x.item() for x in known.fit_line(risk))
    if slope > 0:  # events become more frequent with the risk; NaN is not above 0
        updates[BOTH] = slope, shift
    return updates


def choose_update(
    known: Known, risk: Array, patients: NDArray[np.generic], *, with_slope: bool | None = None
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return the method that a closed test chooses, and ``fit_updates``; arrays are (n,).

    A slope takes ``MIN_SLOPE_EVENTS`` events where nothing else is said.

    Source: Vergouwe et al. 2017, "A closed testing procedure to select an appropriate method for
    updating prediction models", Statistics in Medicine 36:4529.
    """
    if with_slope is None:
        with_slope = (known.case * (known.weights[0] > 0)).sum() >= MIN_SLOPE_EVENTS
    updates, scaled = fit_updates(known, risk), known.link.scale(risk)
    one, none = np.ones((1, len(risk))), np.zeros_like(scaled)
    level = known.fit_level(risk).item()
    if INTERCEPT not in updates or not np.isfinite(level):
        return NOT_UPDATED, updates
    if with_slope and BOTH in updates:
        fit = np.array([x.item() for x in known.fit_line(risk)[::-1]])
        both = np.stack([one[0], scaled])
        # against no update, then against the intercept
        if not clustered_p_value(known, both, none, patients, fit, [0.0, 1.0], [0, 1]) < LEVEL:
            return NOT_UPDATED, updates
        p = clustered_p_value(known, both, none, patients, fit, [level, 1.0], [1])
        return BOTH if p < LEVEL else INTERCEPT, updates
    p = clustered_p_value(known, one, scaled, patients, np.array([level]), [0.0], [0])
    return INTERCEPT if p < LEVEL else NOT_UPDATED, updates


def clustered_p_value(
    known: Known,
    columns: Array,  # (p, n) of the larger model
    offset: Array,  # (n,) scaled risks that are added to those of the columns
    patients: NDArray[np.generic],  # (n,)
    fit: Array,  # (p,) coefficients of the larger model
    null: Sequence[float],  # (p,) of the smaller one
    tested: list[int],  # positions of the coefficients that the smaller model fixes
) -> float:
    """Return the p value of a likelihood-ratio test of two models, clustered by patient.

    Source: Chandler and Bate 2007, "Inference for clustered data using the independence
    loglikelihood", Biometrika 94:167, equation 17.
    """
    outcome, weights = np.atleast_2d(known.fitted)[0], known.fitted_weights[0]
    model = outcome, columns, offset, weights, patients, fit, known.link
    clustered, bread = clustered_covariance(*model)
    distance, chosen = (fit - null)[tested], np.ix_(tested, tested)
    # Wald statistics with clustered and with usual errors scale the ratio.
    wald = [distance @ np.linalg.solve(v[chosen], distance) for v in (clustered, bread)]
    losses = [
        weights @ known.link.loss(outcome, offset + np.asarray(x) @ columns) for x in (null, fit)
    ]
    with np.errstate(invalid="ignore"):
        ratio = 2 * (losses[0] - losses[1]) * wald[0] / wald[1]
    return float(chi2.sf(ratio, len(tested)))


def clustered_covariance(
    outcome: Array,  # (n,)
    columns: Array,  # (p, n)
    offset: Array,  # (n,) scaled risks that are added to those of the columns
    weights: Array,  # (n,)
    patients: NDArray[np.generic],  # (n,)
    fit: Array,  # (p,) coefficients
    link: Link = LOGIT,
) -> tuple[Array, Array]:
    """Return the covariance (p, p) of coefficients, clustered by patient, and the usual one.

    Source: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models".
    """
    slope, curvature, _ = link.terms(outcome, offset + fit @ columns)
    bread = np.linalg.inv((weights * curvature * columns) @ columns.T).astype(np.float64)
    sums = patient_sums(weights * slope * columns, patients)  # (patients, p)
    meat: Array = (sums.T @ sums) * (len(sums) / (len(sums) - 1))
    clustered: Array = bread @ meat @ bread
    return clustered, bread


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


def fit_text_weight(
    offset: Array,  # (n, Q) stage 1's outputs
    outputs: Array,  # (n, Q) with all that a regression on text adds
    losses: Callable[[Array], Array],  # (weights, n) of outputs (weights, n, Q)
) -> float:
    """Choose the weight of what a ridge regression adds: that with the lowest loss.

    Its penalty has shrunk it already: a smaller weight loses more by far than noise costs.
    """
    tried = offset + RESIDUAL_WEIGHTS[:, None, None] * (outputs - offset)
    return float(RESIDUAL_WEIGHTS[losses(tried).mean(axis=1).argmin()])


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


def choose_threshold(choice: str | None, known: Known, risk: Array) -> float:
    """Return the threshold of a ``--threshold``, chosen on n rows; None: Youden's.

    A goal gets the threshold that reaches it and is best for the other of both shares.

    Source: Youden 1950, "Index for rating diagnostic tests"; of equal ones the lowest threshold.
    """
    goal, value = parse_threshold(choice) if choice else ("", math.nan)
    if choice and not goal:
        return value
    weights = known.weights[0]
    is_known = weights > 0
    case = known.case[is_known]
    if len({*case.tolist()}) < 2:
        text = "nothing to choose a threshold by, as all rows have, or lack, the event: %g is taken"
        logger.warning(text, DecisionRule().threshold)
        return DecisionRule().threshold
    false_rate, sensitivity, thresholds = roc_curve(
        case, risk[is_known], sample_weight=weights[is_known], drop_intermediate=False
    )
    if goal == "sensitivity":  # it rises along the curve, specificity falls
        return _midway(thresholds, np.flatnonzero(sensitivity >= value)[0])
    if goal:
        return _midway(thresholds, np.flatnonzero(1 - false_rate >= value)[-1])
    index = sensitivity - false_rate
    best = np.flatnonzero(np.isclose(index, index.max(), rtol=0, atol=1e-12))[-1]
    return _midway(thresholds, best)


def _midway(thresholds: Array, k: np.intp) -> float:
    """Return the middle of the falling risks k and k + 1: rounding moves no row across."""
    lower = thresholds[k + 1] if k + 1 < len(thresholds) else 0.0
    return float((min(thresholds[k], 1.0) + lower) / 2)  # scikit-learn's first is infinite
