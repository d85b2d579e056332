"""Metrics of predicted risks under many weightings of the rows at once, as a bootstrap needs them.

Arrays in, arrays out. Letters: n rows, R weightings, K thresholds. scikit-learn scores one
weighting a call; tests hold both equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

Array = NDArray[np.float64]

REPLICATES = 1000
CHUNK_CELLS = 2**20
"""Draws times rows that are held at a time: 8 MiB an array."""

PRECISION, MAX_STEP = 1e-9, 1.0
NEAR = 0.3
"""Step below which the loss's own curvature saves steps; far from the minimum it leads astray."""

MAX_SHIFT = 50.0

MIN_DIFFERENT = 20
"""Different risks that a calibration slope needs, such as those of the same risk in each fold."""

RANKING = "auroc", "auprc", "log_loss", "brier", "scaled_brier"
LEVEL = "observed", "mean_risk", "oe"
FITTED = "intercept", "slope"
DISTANCES = "ici", "e50", "e90"
SHARES = "sensitivity", "specificity", "ppv", "npv", "positives"
"""Metrics of ``Known``, by the method that returns them."""

SPLINE_KNOTS = 0.05, 0.35, 0.65, 0.95
"""Quantiles at which the calibration curve may bend. Source: Harrell 2015, table 2.3."""

IDEAL_DRAWS = 100
"""Draws in which calibrated risks show their distances."""


def metrics(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    """Compute discrimination and overall error of the risks.

    Args:
        labels: (n,) of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n), how often each row counts in each weighting.

    Returns:
        (R,) values of auroc, auprc (average precision), brier, log_loss and
        scaled_brier (gain over the observed risk as everyone's). Not finite where undefined:
        auroc and scaled_brier without both classes, auprc without events, all without weight.

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
            "scaled_brier": 1 - brier / (prevalence * (1 - prevalence)),
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


def has_slope(scaled: Array) -> bool:
    """Return whether risks on a scale (n,) differ enough to have a slope, rounding apart."""
    return len(np.unique(scaled.round(9))) >= MIN_DIFFERENT


def spline_curve(labels: Array, risk: Array, weights: Array, at: Array) -> Array:
    """Compute a flexible calibration curve: the share of events that goes with a risk.

    A logistic fit of the label on a restricted cubic spline of the logit of the risk, with knots at
    its 5th, 35th, 65th and 95th percentile; a straight line where fewer than three of these differ.

    Args:
        labels: (n,) or (R, n), most often of 0 and 1.
        risk: (n,) probability of the event.
        weights: (R, n), or (1, n) for all.
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
    once, none = np.ones((1, len(risk))), np.zeros(basis.shape[1])
    start = newton_steps(LOGIT, np.atleast_2d(labels)[0], basis.T, once, none)[0]
    curve: Array = expit(newton_steps(LOGIT, labels, basis.T, weights, start) @ points.T)
    return curve


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


def newton_steps(
    link: Link,
    outcome: Array,
    columns: Array,
    weights: Array,
    start: ArrayLike,
    offset: Array | float = 0.0,
) -> Array:
    """Fit scaled risks = offset + coefficients @ columns by Newton's method.

    Outcomes are (n,) or (R, n), ``columns`` (p, n) at about unit scale, ``offset`` (n,). Returns
    the coefficients (R, p) under all weightings (R, n), NaN where no finite fit exists, as where
    the classes are separated.
    """
    pairs = (columns[:, None] * columns).reshape(-1, columns.shape[1]).T  # (n, p * p)
    outcome, weights = np.broadcast_arrays(np.atleast_2d(outcome), weights)
    fitted = np.tile(np.asarray(start, dtype=np.float64), (len(weights), 1))
    active = np.arange(len(weights))
    for _ in range(link.max_steps):
        scaled = fitted[active] @ columns + offset
        slope, curvature, own_curvature = link.terms(outcome[active], scaled)
        score = (weights[active] * slope) @ columns.T
        steps = _solve((weights[active] * curvature) @ pairs, score)
        if own_curvature is not None:
            near = np.flatnonzero((np.abs(steps) < NEAR).all(axis=1))
            exact = (weights[active[near]] * own_curvature[near]) @ pairs
            convex = _is_convex(exact)
            steps[near[convex]] = _solve(exact[convex], score[near[convex]])
        fitted[active] += steps.clip(-MAX_STEP, MAX_STEP)
        active = active[(np.abs(steps) > PRECISION).any(axis=1)]  # NaN is false and stays NaN
        if not len(active):
            break
    fitted[active] = np.nan
    return fitted


def _squares(curvature: Array) -> Array:
    """Return curvatures (R, p * p) as matrices (R, p, p)."""
    size = math.isqrt(curvature.shape[1])
    return curvature.reshape(-1, size, size)


def _is_convex(curvature: Array) -> NDArray[np.bool_]:
    """Return whether curvatures (R, p * p) are those of a minimum."""
    lowest = np.linalg.eigvalsh(_squares(curvature))[:, 0]
    return np.asarray(lowest > 0)


def _solve(curvature: Array, score: Array) -> Array:
    """Return steps (R, p) from curvatures (R, p * p) and scores (R, p); NaN where singular."""
    matrices = _squares(curvature).copy()
    with np.errstate(invalid="ignore"):
        singular = ~(np.abs(np.linalg.det(matrices)) > 0)  # NaN too
    matrices[singular] = np.eye(score.shape[1])
    steps = np.linalg.solve(matrices, score[:, :, None])[:, :, 0].astype(np.float64)
    steps[singular] = np.nan
    return steps


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


Terms = tuple[Array, Array, Array | None]


def logistic_terms(outcome: Array, scaled: Array) -> Terms:
    """Return the ``Link.terms`` of the cross-entropy at log-odds."""
    risk = 0.5 + 0.5 * np.tanh(scaled / 2)  # expit, faster in the bootstrap's inner loop
    return outcome - risk, risk * (1 - risk), None


class Link(NamedTuple):
    """The scale on which risks are calibrated."""

    scale: Callable[[Array], Array]  # of risks
    risk: Callable[[Array], Array]  # the inverse
    # Of outcomes and scaled risks, (..., n) each.
    loss: Callable[[Array, Array], Array]
    # The loss's negative slope, its expected curvature, and its own where that is another.
    terms: Callable[[Array, Array], Terms]
    max_steps: int  # of Newton's method; no finite fit takes more
    # From outcomes, risks (n,), weights (R, n) and risks (G,) to the outcomes that go with the
    # latter, (R, G).
    curve: Callable[[Array, Array, Array, Array], Array]
    # From calibrated risks, the outcomes' distances from their curve (n,) and numbers (R, n) within
    # 0 and 1 to outcomes (R, n).
    draw: Callable[[Array, Array, Array], Array]

    def moved(self, risk: Array, slope: float | Array, shift: float | Array) -> Array:
        """Return risks (n,) whose scaled values are multiplied and shifted."""
        return self.risk(shift + slope * self.scale(risk))


def draw_labels(risk: Array, away: Array, chances: Array) -> Array:
    """Return labels (R, n) of calibrated risks (n,)."""
    return (chances < risk).astype(np.float64)


LOGIT = Link(log_odds, expit, row_losses, logistic_terms, 40, spline_curve, draw_labels)


@dataclass(frozen=True)
class Known:
    """What is known of n rows, in each of R weightings, whatever the risk."""

    case: Array  # (n,) whether the event is known to have come
    draws: Array  # (R, n) how often each row counts
    weights: Array  # (R, n) the same over the chance that the status is known; 0: it is not
    fitted: Array  # (n,) or (R, n) the outcome that calibration fits
    fitted_weights: Array  # (R, n) that go with it
    link: Link
    cut: float = 0.0  # share of the known rows whose weight was cut, each row counting once

    def ranking(self, risk: Array) -> dict[str, Array]:
        """Return ``RANKING`` (R,) of risks (n,)."""
        return metrics(self.case, risk, self.weights)

    def level(self, risk: Array) -> dict[str, Array]:
        """Return the observed risk, the mean risk, and observed over expected events, (R,) each."""
        with np.errstate(divide="ignore", invalid="ignore"):
            observed = self.weights @ self.case / self.weights.sum(axis=1)
            expected = self.fitted_weights @ risk / self.fitted_weights.sum(axis=1)
            mean_risk = self.draws @ risk / self.draws.sum(axis=1)
            return {"observed": observed, "mean_risk": mean_risk, "oe": observed / expected}

    def calibration(self, risk: Array) -> dict[str, Array]:
        """Return the intercept with the slope held at 1, and the slope, (R,) each.

        Below 0 the risks are too high on average, below 1 too extreme. NaN where no finite fit
        exists; a slope needs 20 different risks.

        Source: Cox 1958; Steyerberg 2019, "Clinical Prediction Models", chapter 15; for times van
        Geloven et al. 2022, BMJ 377:e069249.
        """
        return {"intercept": self.fit_level(risk), "slope": self.fit_line(risk)[0]}

    def fit_line(self, risk: Array) -> tuple[Array, Array]:
        """Return the slope and shift (R,) by which scaled risks (n,) fit the outcome."""
        odds = self.link.scale(risk)
        if not has_slope(odds):
            nothing = np.full(len(self.draws), np.nan)
            return nothing, nothing
        scaled, mean, spread = _scaled(odds)
        fit = self._fit(np.stack([np.ones_like(odds), scaled]), [mean, spread], 0.0)
        slope = fit[:, 1] / spread
        return slope, fit[:, 0] - slope * mean

    def fit_level(self, risk: Array, slope: float = 1.0) -> Array:
        """Return the shift (R,) by which scaled risks (n,), times a slope, fit the outcome."""
        offset = slope * self.link.scale(risk)
        return self._fit(np.ones((1, len(risk))), [0.0], offset)[:, 0]

    def mean_shift(self, risk: Array) -> float:
        """Return the shift by which scaled risks (n,) have the outcome's mean; NaN where none does.

        Least squares would weigh high risks more.
        """
        outcome, weights = np.atleast_2d(self.fitted)[0], self.fitted_weights[0]
        scaled = self.link.scale(risk)

        def excess(shift: float) -> float:
            """Return the expected minus the observed events."""
            return float(weights @ (self.link.risk(scaled + shift) - outcome))

        if not excess(-MAX_SHIFT) < 0 < excess(MAX_SHIFT):
            return np.nan
        return float(brentq(excess, -MAX_SHIFT, MAX_SHIFT, xtol=PRECISION))

    def _fit(self, columns: Array, start: list[float], offset: Array | float) -> Array:
        """Fit the outcome in each weighting, from where the fit of all rows ends."""
        once = np.ones((1, columns.shape[1]))
        outcome = np.atleast_2d(self.fitted)[0]
        first = newton_steps(self.link, outcome, columns, once, start, offset)[0]
        begin = first if np.isfinite(first).all() else start
        return newton_steps(self.link, self.fitted, columns, self.fitted_weights, begin, offset)

    def distances(self, risk: Array) -> dict[str, Array]:
        """Return mean, median and 90th percentile (R,) of the distances from the curve.

        Source: Austin and Steyerberg 2019, "The Integrated Calibration Index (ICI) and related
        metrics for quantifying the calibration of logistic regression models", Statistics in
        Medicine 38:4051; Gerds et al. 2014, Statistics in Medicine 33:3191, for pseudo-values.
        """
        curve = self.link.curve(self.fitted, risk, self.fitted_weights, risk)
        distance = np.abs(curve - risk)
        draws = np.broadcast_to(self.draws, distance.shape)
        mean = (draws * distance).sum(axis=1) / draws.sum(axis=1)
        ends = [quantile(distance, draws, q)[:, 0] for q in (0.5, 0.9)]
        return dict(zip(DISTANCES, [mean, *ends], strict=True))

    def ideal_distance(self, risk: Array, patients: NDArray[np.generic], seed: int) -> float:
        """Return the mean distance that calibrated risks of n such rows would show.

        The rows of a patient (n,) have their outcomes together.
        """
        outcome, weights = np.atleast_2d(self.fitted)[0], self.fitted_weights[:1]
        order = np.lexsort([outcome, risk])  # neither the rows' order nor names change anything
        index = np.empty(len(risk), np.int64)
        index[order], names = pd.factorize(patients[order])
        chances = np.random.default_rng(seed).random((IDEAL_DRAWS, len(names)))[:, index]
        away = outcome - self.link.curve(outcome, risk, weights, risk)[0]
        drawn = self.link.draw(risk, away, chances)
        distances = np.abs(self.link.curve(drawn, risk, weights, risk) - risk).mean(axis=1)
        defined = distances[np.isfinite(distances)]
        return float(defined.mean()) if len(defined) else np.nan

    def shares(self, positive: NDArray[np.bool_]) -> dict[str, Array]:
        """Return ``SHARES`` (R,) of who is predicted positive, (n,)."""
        shares = confusion_shares(self.case, positive, self.weights)
        # Of a prediction, all is known.
        shares["positives"] = self.draws @ positive / self.draws.sum(axis=1)
        return shares

    def net_benefit(self, risk: Array, thresholds: Array) -> Array:
        """Return the net benefit (R, K) of acting on risks (n,) from thresholds (K,) on."""
        return net_benefit(self.case, risk, thresholds, self.weights)

    @property
    def has_weights(self) -> bool:
        """Whether the status of some row is unknown."""
        return self.weights is not self.draws

    @property
    def largest_weight(self) -> float:
        """The largest weight of a row that counts once."""
        return float(self.weights[0].max())

    @property
    def effective_n(self) -> float:
        """The number of rows that the weights of the first weighting are worth."""
        weights, draws = self.weights[0], self.draws[0]
        squares = weights**2 / np.where(draws > 0, draws, 1)
        return float(weights.sum() ** 2 / squares.sum()) if squares.any() else 0.0


def of_labels(labels: Array, draws: Array | None = None) -> Known:
    """Return what labels (n,) tell, under weights (R, n); each row counts once where None."""
    draws = np.ones((1, len(labels))) if draws is None else draws
    return Known(labels, draws, draws, labels, draws, LOGIT)


def quantile(values: Array, weights: Array, q: float) -> Array:
    """Return numpy's quantile (R, 1) of values (R, n) that are repeated as whole weights say."""
    order = np.argsort(values, axis=1)
    values = np.take_along_axis(values, order, axis=1)
    stops = np.take_along_axis(weights, order, axis=1).cumsum(axis=1)
    place = q * (stops[:, -1:] - 1)
    low, high = (
        np.take_along_axis(values, columns.clip(max=values.shape[1] - 1), axis=1)
        for columns in (
            (stops <= index).sum(axis=1, keepdims=True)
            for index in (np.floor(place), np.floor(place) + 1)
        )
    )
    return low + (place - np.floor(place)) * (high - low)


def bootstrap_weights(patients: NDArray[np.generic], seed: int) -> Iterator[Array]:
    """Draw patients with replacement, all rows of a patient together.

    No draw depends on the outcome: fixed numbers of each class would make the intervals of metrics
    that depend on the prevalence too narrow, and leaving out draws that lack a class in some part
    of the rows would draw too many of the rarer class.

    Args:
        patients: (n,) patient of each row.
        seed: seed of the draws, which do not depend on how they are cut into chunks.

    Yields:
        (r, n) how often each row counts in each of r draws, ``REPLICATES`` draws in all.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
    """
    names, patient = np.unique(patients, return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    rng, left = np.random.default_rng(seed), REPLICATES
    while left:
        size = min(left, max(1, CHUNK_CELLS // len(patients)))
        yield rng.multinomial(len(names), chances, size=size).astype(np.float64)[:, patient]
        left -= size
