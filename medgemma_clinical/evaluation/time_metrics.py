"""Metrics of the risk of an event by a horizon, where events compete and rows are censored.

Arrays in, numbers out. Letters: n rows, R weightings, K times, C kinds of events. ``hours`` (n,) is
the time of the event or the end of follow-up, from the prediction time, and ``horizon`` has its
unit; ``event`` (n,) is 0 where a row is censored, 1 for the event that the risk is about, and 2, 3,
... for competing events. At the same time events come before censorings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medgemma_clinical.evaluation.metrics import (
    PRECISION,
    Array,
    confusion_shares,
    has_slope,
    metrics,
)

MIN_UNCENSORED, MIN_AT_RISK = 0.05, 10
"""Share of rows that are uncensored, and number of rows at risk, that a horizon needs."""

MAX_WEIGHT = 0.99
"""Quantile at which the weights of a regression are cut."""

NEIGHBOURS, NEIGHBOUR_SHARE = 50, 0.05
"""Rows on either side, and at least this share of all, that the calibration error averages."""

MAX_STEPS, MAX_STEP, NEAR = 100, 1.0, 0.3

MAX_CLOGLOG = 6.0
"""Beyond it 1 - exp(-exp(x)) is 1 in float64."""

TINY = 1e-300


def metrics_at(
    hours: ArrayLike,
    event: ArrayLike,
    risk: ArrayLike,
    horizon: float,
    *,
    censoring: ArrayLike | None = None,
) -> dict[str, float]:
    """Compute discrimination, overall error and calibration of risks of event 1 by a horizon.

    Args:
        hours: (n,) time of the event or the end of follow-up.
        event: (n,) 0 censored, 1 the event that the risk is about, 2, 3, ... competing events.
        risk: (n,) probability of event 1 by the horizon.
        horizon: in the unit of ``hours``.
        censoring: (n,) probability of being uncensored just before the row's time or the horizon,
            whichever is first, by a regression; by Kaplan-Meier where None.

    Returns:
        ``auroc`` of rows with event 1 by the horizon against all other rows; ``brier``;
        ``scaled_brier``, the gain over the observed risk as everyone's; ``oe``, observed over mean
        risk; ``intercept``, with the slope held at 1, and ``slope`` on the complementary log-log
        scale; ``ici``, ``e50``, ``e90``: mean, median and 90th percentile of the distances between
        mean and observed risk of rows of similar risk; ``observed``, the observed risk
        (Aalen-Johansen; a weighted share with ``censoring``); ``mean_risk``, the mean of ``risk``;
        ``effective_n``, the number of rows that the weights are worth. NaN where undefined, such as
        the slope of few different risks.

    Raises:
        ValueError: the arrays do not fit together or hold impossible values, or the data cannot
            answer the question at this horizon.

    Source: van Geloven et al. 2022, "Validation of prediction models in the presence of competing
    risks", BMJ 377:e069249; Blanche et al. 2013, Statistics in Medicine 32:5381, for the AUROC;
    Gerds et al. 2014, Statistics in Medicine 33:3191, for pseudo-values of similar risks.
    """
    hours, event, risk = (np.asarray(x, dtype=np.float64) for x in (hours, event, risk))
    uncensored = np.asarray(np.ones_like(hours) if censoring is None else censoring, np.float64)
    if hours.ndim != 1 or not hours.shape == event.shape == risk.shape == uncensored.shape:
        raise ValueError("hours, event, risk and censoring must be arrays of one length")
    requirements = {
        "hours must be finite and not negative": np.isfinite(hours) & (hours >= 0),
        "event must be 0, 1, 2, ...": (event >= 0) & (event == np.floor(event)),
        "risk must be within 0 and 1": (risk >= 0) & (risk <= 1),
        "censoring must be above 0 and at most 1": (uncensored > 0) & (uncensored <= 1),
    }
    for requirement, met in requirements.items():
        if not met.all():
            raise ValueError(f"{requirement}: row {np.argmin(met)} is not")
    check_horizon(hours, event, horizon)
    weights, regression = np.ones((1, len(hours))), None if censoring is None else uncensored
    values = metrics_of_draws(hours, event, risk, horizon, weights, regression)
    return {name: float(value[0]) for name, value in values.items()}


def check_horizon(hours: Array, event: Array, horizon: float) -> None:
    """Raise ValueError where ``metrics_at`` has no answer at the horizon, whatever the risk."""
    at_risk = int((hours >= horizon).sum())
    if at_risk < MIN_AT_RISK:
        raise ValueError(
            f"horizon {horizon:g}: {at_risk} rows are at risk then, {MIN_AT_RISK} are needed; "
            "choose an earlier horizon"
        )
    uncensored = uncensored_probability(hours, event, horizon).min()
    if uncensored < MIN_UNCENSORED:
        raise ValueError(
            f"horizon {horizon:g}: {uncensored:.1%} of the rows would be uncensored until then, "
            f"{MIN_UNCENSORED:.0%} are needed; choose an earlier horizon"
        )
    if not ((event == 1) & (hours <= horizon)).any():
        raise ValueError(f"horizon {horizon:g}: no row has event 1 by then; choose a later horizon")


def metrics_of_draws(
    hours: Array,
    event: Array,
    risk: Array,
    horizon: float,
    weights: Array,
    censoring: Array | None = None,
) -> dict[str, Array]:
    """Return ``metrics_at`` (R,) under weights (R, n), which say how often each row counts.

    Kaplan-Meier's weights, Aalen-Johansen's estimate and the pseudo-values are those of each
    weighting. The weights are whole numbers: a pseudo-value leaves out one of them.
    """
    statuses = statuses_at(hours, event, horizon, weights, censoring)
    return {
        **statuses.ranking(risk),
        **statuses.calibration(risk),
        **statuses.calibration_error(risk),
    }


class Statuses(NamedTuple):
    """What is known of n rows at a horizon, in each of R weightings, whatever the risk."""

    case: Array  # (n,) whether event 1 was seen by then
    weights: Array  # (R, n) how often each row counts
    inverse: Array  # (R, n) of the probability of being watched until then; 0: status unknown
    outcome: Array  # (R, n) pseudo-value, or ``case`` with weights of a regression
    outcome_weights: Array  # (R, n) that go with it

    @property
    def shares(self) -> Array:
        """How much each row of known status counts, (R, n)."""
        return self.weights * self.inverse

    def ranking(self, risk: Array) -> dict[str, Array]:
        """Return AUROC, Brier score and its gain over the same risk for everyone, (R,) each."""
        found = metrics(self.case, risk, self.shares)
        scaled = found["brier_skill"]
        return _finite(auroc=found["auroc"], brier=found["brier"], scaled_brier=scaled)

    def calibration(self, risk: Array) -> dict[str, Array]:
        """Return O/E, the observed risk, intercept, slope, rows that weights are worth, (R,)."""
        shares = self.shares
        with np.errstate(divide="ignore", invalid="ignore"):
            observed = shares @ self.case / shares.sum(axis=1)
            expected = self.outcome_weights @ risk / self.outcome_weights.sum(axis=1)
            values = _calibration(self.outcome, risk, self.outcome_weights)
            values["mean_risk"] = self.weights @ risk / self.weights.sum(axis=1)
            values["effective_n"] = shares.sum(axis=1) ** 2 / (shares * self.inverse).sum(axis=1)
            return _finite(oe=observed / expected, observed=observed, **values)

    def calibration_error(self, risk: Array) -> dict[str, Array]:
        """Return ICI, E50 and E90, (R,) each."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = _calibration_error(self.outcome, risk, self.weights, self.outcome_weights)
        return _finite(**values)

    def confusion(self, positive: NDArray[np.bool_]) -> dict[str, Array]:
        """Return sensitivity and the other shares (R,) at a threshold."""
        found = confusion_shares(self.case, positive, self.shares)
        with np.errstate(invalid="ignore"):
            found["positives"] = self.weights @ positive / self.weights.sum(axis=1)  # all are known
        return _finite(**found)


def _finite(**values: Array) -> dict[str, Array]:
    return {name: np.where(np.isfinite(value), value, np.nan) for name, value in values.items()}


def statuses_at(
    hours: Array, event: Array, horizon: float, weights: Array, censoring: Array | None = None
) -> Statuses:
    """Return what is known of the rows at a horizon, under weights (R, n)."""
    hours, event = _until(hours, event, horizon)
    case = (event == 1).astype(np.float64)
    has_status = (event > 0) | (hours == horizon)
    if censoring is None:
        table = _LifeTable(hours, event, weights)
        inverse = has_status / table.uncensored[:, table.position].clip(TINY)
        return Statuses(case, weights, inverse, _pseudo_values(table, event, weights), weights)
    inverse = np.tile(has_status / censoring, (len(weights), 1))
    inverse = np.minimum(inverse, _quantile(inverse, weights * has_status, MAX_WEIGHT))
    outcome = np.tile(case, (len(weights), 1))
    return Statuses(case, weights, inverse, outcome, weights * inverse)


def aalen_johansen(
    hours: ArrayLike, event: ArrayLike, weights: Array | None = None
) -> tuple[Array, Array]:
    """Compute the cumulative incidence of each kind of event.

    Args:
        hours: (n,) time of the event or the end of follow-up.
        event: (n,) 0 censored, 1, 2, ... the kinds of events.
        weights: (R, n), how often each row counts in each weighting; each row once where None.

    Returns:
        The different times (K,), and the incidences up to and with them, (C, K); (R, C, K) with
        weights.

    Source: Aalen and Johansen 1978; as a sum of inverse probabilities of being uncensored,
    Satten and Datta 2001, The American Statistician 55:207.
    """
    hours, event = np.asarray(hours, dtype=np.float64), np.asarray(event)
    everyone = np.ones((1, len(hours))) if weights is None else weights
    table = _LifeTable(hours, event, everyone)
    counts = [table.sums(everyone * (event == kind)) for kind in range(1, int(event.max()) + 1)]
    incidence = np.array([table.incidence(count) for count in counts]).reshape(
        len(counts), *table.uncensored.shape
    )
    return np.unique(hours), incidence[:, 0] if weights is None else incidence.swapaxes(0, 1)


def uncensored_probability(hours: Array, event: Array, horizon: float) -> Array:
    """Return Kaplan-Meier's probability (n,) of ``censoring`` in ``metrics_at``.

    Source: Kaplan and Meier 1958; a censored row counts as at risk of an event of the same time.
    """
    hours, event = _until(hours, event, horizon)
    table = _LifeTable(hours, event, np.ones((1, len(hours))))
    probability: Array = table.uncensored[0, table.position]
    return probability


def observed_risk(
    hours: Array,
    event: Array,
    horizon: float,
    censoring: Array | None,
    weights: Array,
    members: NDArray[np.bool_],
) -> Array:
    """Return the observed risk (R, G) in groups of members (n, G) under weights (R, n).

    It is Aalen-Johansen's estimate, a weighted share with ``censoring`` (n,) as in ``metrics_at``;
    NaN where no row counts.
    """
    hours, event = _until(hours, event, horizon)
    case, has_status = event == 1, (event > 0) | (hours == horizon)
    with np.errstate(invalid="ignore"):
        if censoring is not None:
            limit = np.quantile(1 / censoring[has_status], MAX_WEIGHT)
            shares = weights * has_status * np.minimum(1 / censoring, limit)
            weighted: Array = (shares * case) @ members / (shares @ members)
            return weighted
        observed = np.full((len(weights), members.shape[1]), np.nan)
        for k, rows in enumerate(members.T):
            if rows.any():
                counts = weights[:, rows]
                table = _LifeTable(hours[rows], event[rows], counts)
                incidence = table.incidence(table.sums(counts * case[rows]))
                observed[:, k] = np.where(table.total > 0, incidence, np.nan)[:, -1]
        return observed


def net_benefit_at(
    observed: Callable[[Array, NDArray[np.bool_]], Array],
    risk: Array,
    thresholds: Array,
    weights: Array,
) -> Array:
    """Return the net benefit (R, K) of acting on a risk (n,) from thresholds (K,) on.

    ``observed`` returns the ``observed_risk``: it decides how many positives are true.

    Source: Vickers et al. 2008, "Extensions to decision curve analysis", BMC Medical Informatics
    and Decision Making 8:53.
    """
    positive = risk[:, None] >= thresholds
    share = weights @ positive / weights.sum(axis=1, keepdims=True)
    true = share * np.nan_to_num(observed(weights, positive))
    benefit: Array = true - (share - true) * thresholds / (1 - thresholds)
    return benefit


def _until(hours: Array, event: Array, horizon: float) -> tuple[Array, Array]:
    """Return the rows as if follow-up ended at the horizon."""
    return np.minimum(hours, horizon), np.where(hours <= horizon, event, 0)


class _LifeTable:
    """Who is at risk, has an event or is censored at each of K times, in each of R weightings."""

    def __init__(self, hours: Array, event: Array, weights: Array) -> None:
        self.position = np.unique(hours, return_inverse=True)[1]  # (n,) of the time of each row
        rows = self.sums(weights)
        self.total = rows.sum(axis=1, keepdims=True)
        self.at_risk = rows[:, ::-1].cumsum(axis=1)[:, ::-1]  # (R, K), as the two below
        self.events = self.sums(weights * (event > 0))
        event_free = (self.at_risk - self.events).clip(TINY)
        steps = np.cumprod(1 - (rows - self.events) / event_free, axis=1)
        self.uncensored = _before(steps, 1.0)  # the probability just before each time

    def sums(self, values: Array) -> Array:
        """Return the sums (R, K) of values (R, n) at each time."""
        return _sums(values, self.position)

    def incidence(self, counts: Array) -> Array:
        """Return the cumulative incidence (R, K) of events that count (R, K) at each time."""
        steps: Array = np.cumsum(counts / (self.total * self.uncensored).clip(TINY), axis=1)
        return steps


def _sums(values: Array, position: NDArray[np.int64]) -> Array:
    """Return sums (R, K) of the values (R, n) of rows that share one of K positions (n,)."""
    order = np.argsort(position, kind="stable")
    firsts = np.flatnonzero(np.diff(position[order], prepend=-1))
    return np.add.reduceat(values[:, order], firsts, axis=1)


def _before(steps: Array, first: float) -> Array:
    """Return a step function's values (R, K) just before each time."""
    return np.pad(steps[:, :-1], ((0, 0), (1, 0)), constant_values=first)


def _pseudo_values(table: _LifeTable, event: Array, weights: Array) -> Array:
    """Return the pseudo-value (R, n) of each row's event 1 by the last time of the table.

    N times the cumulative incidence of N rows, minus N - 1 times that without the row: the steps of
    one row less at risk up to the row's time, then those of all rows.

    Source: Andersen, Klein and Rosthoj 2003, Biometrika 90:15.
    """
    first = table.sums(weights * (event == 1))
    incidence = table.incidence(first)
    event_free = np.cumprod(1 - table.events / table.at_risk.clip(TINY), axis=1)
    later = np.where(event_free > 0, incidence[:, -1:] - incidence, 0) / event_free.clip(TINY)
    fewer = np.maximum(table.at_risk - 1, 1)  # 0 where no event counts
    free_before = _before(np.cumprod(1 - table.events / fewer, axis=1), 1.0)
    incidence_before = _before(np.cumsum(free_before * first / fewer, axis=1), 0.0)
    # (R, K) of a censored row; what the row's own event adds to the two counts is taken out again.
    of_censored = incidence_before + free_before * (first + (fewer - table.events) * later) / fewer
    of_event = free_before / fewer
    left_out = of_censored[:, table.position]
    left_out += np.where(event > 0, (of_event * later)[:, table.position], 0)
    left_out -= np.where(event == 1, of_event[:, table.position], 0)
    return table.total * incidence[:, -1:] - (table.total - 1) * left_out


def cloglog(risk: Array) -> Array:
    """Return log(-log(1 - risk)), risks of 0 and 1 moved by float64's precision."""
    smallest = np.finfo(np.float64).eps
    scaled: Array = np.log(-np.log1p(-risk.clip(smallest, 1 - smallest)))
    return scaled


def _calibration(outcome: Array, risk: Array, weights: Array) -> dict[str, Array]:
    """Return intercept and slope (R,) of outcomes (R, n) on the risk's complementary log-log.

    Source: ``geese`` of R's geepack with Gaussian variance, as van Geloven et al. 2022 use it.
    """
    scaled = cloglog(risk)
    mean, spread = float(scaled.mean()), float(scaled.std())
    one = np.ones((1, len(risk)))
    slope = np.full(len(weights), np.nan)
    if has_slope(scaled):
        columns = np.concatenate([one, (scaled[None] - mean) / spread])
        slope = fit_cloglog(outcome, columns, weights, [mean, spread])[:, 1] / spread
    intercept = fit_cloglog(outcome, one, weights, [0.0], scaled)[:, 0]
    return {"intercept": intercept, "slope": slope}


def fit_cloglog(
    outcome: Array, columns: Array, weights: Array, start: ArrayLike, offset: Array | float = 0.0
) -> Array:
    """Fit 1 - exp(-exp(offset + coefficients @ columns)) to outcomes (R, n) by least squares.

    ``columns`` (p, n) are at about unit scale. Returns the coefficients (R, p) by Gauss-Newton
    steps, near the end by Newton steps; NaN where no finite fit exists.
    """
    pairs = (columns[:, None] * columns).reshape(-1, columns.shape[1]).T  # (n, p * p)
    fitted = np.tile(np.asarray(start, dtype=np.float64), (len(weights), 1))
    active = np.arange(len(weights))
    for _ in range(MAX_STEPS):
        exponential = np.exp((fitted[active] @ columns + offset).clip(max=MAX_CLOGLOG))
        residual = outcome[active] + np.expm1(-exponential)
        change = exponential * np.exp(-exponential)  # the derivative
        weighted = weights[active] * change
        score = (weighted * residual) @ columns.T
        curvature = (weighted * change) @ pairs
        steps = _solve(curvature, score)
        # The residuals' own curvature saves most steps, but leads astray far from the minimum.
        curvature -= (weighted * residual * (1 - exponential)) @ pairs
        near = np.flatnonzero((np.abs(steps) < NEAR).all(axis=1))
        squares = curvature[near].reshape(len(near), *2 * [len(columns)])
        near = near[(np.linalg.eigvalsh(squares) > 0).all(axis=1)]
        steps[near] = _solve(curvature[near], score[near])
        fitted[active] += steps.clip(-MAX_STEP, MAX_STEP)
        active = active[(np.abs(steps) > PRECISION).any(axis=1)]  # NaN is false and stays NaN
        if not len(active):
            break
    fitted[active] = np.nan
    return fitted


def _solve(curvature: Array, score: Array) -> Array:
    """Return steps (R, p) from curvatures (R, p * p) and scores (R, p); NaN where singular."""
    size = score.shape[1]
    matrices = curvature.reshape(-1, size, size).copy()
    singular = ~(np.abs(np.linalg.det(matrices)) > 0)  # NaN too
    matrices[singular] = np.eye(size)
    steps = np.linalg.solve(matrices, score[:, :, None])[:, :, 0].astype(np.float64)
    steps[singular] = np.nan
    return steps


def _calibration_error(
    outcome: Array, risk: Array, weights: Array, outcome_weights: Array
) -> dict[str, Array]:
    """Return mean and quantiles (R,) over rows of the distance between mean risk and mean outcome.

    The means are those of neighbours by the rank of the risk, which is the same on all scales.
    ``outcome`` (R, n) counts as ``outcome_weights`` (R, n) say, rows as ``weights`` (R, n).
    """
    position = np.unique(risk, return_inverse=True)[1]
    rows, *sums = (
        _sums(values, position)
        for values in (weights, outcome_weights, outcome_weights * (outcome - risk))
    )
    stops = rows.cumsum(axis=1)
    total = stops[:, -1:]
    radius = np.maximum(NEIGHBOURS, NEIGHBOUR_SHARE * total)
    low, high = np.maximum(stops - rows - radius, 0), np.minimum(stops + radius, total)
    # The weightings stand one behind the other: one look-up serves all.
    shift = np.pad((total + 1).cumsum(axis=0)[:-1], ((1, 0), (0, 0)))
    places = (shift + np.pad(stops, ((0, 0), (1, 0)))).ravel()
    cumulated = [np.pad(x.cumsum(axis=1), ((0, 0), (1, 0))).ravel() for x in sums]
    weight, excess = (
        np.interp(high + shift, places, x) - np.interp(low + shift, places, x) for x in cumulated
    )
    distance = np.abs(excess / weight)
    middle, upper = (_quantile(distance, rows, q)[:, 0] for q in (0.5, 0.9))
    return {"ici": (rows * distance).sum(axis=1) / total[:, 0], "e50": middle, "e90": upper}


def _quantile(values: Array, weights: Array, q: float) -> Array:
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
