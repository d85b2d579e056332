"""Metrics of the risk of an event by a horizon, where events compete and rows are censored.

Arrays in, numbers out. Letters: n rows, R weightings, K times, C kinds of events. ``hours`` (n,) is
the time of the event or the end of follow-up, from the prediction time, and ``horizon`` has its
unit; ``event`` (n,) is 0 where a row is censored, 1 for the event that the risk is about, and 2, 3,
... for competing events. At the same time events come before censorings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medgemma_clinical.evaluation.metrics import Array, Known, Link, Terms

MIN_UNCENSORED, MIN_AT_RISK = 0.05, 10
"""Share of rows that are uncensored, and number of rows at risk, that a horizon needs."""

MAX_WEIGHT = 20.0
"""The weight at which those of a regression are cut: lower ones make risks look too low."""

NEIGHBOURS, NEIGHBOUR_SHARE = 50, 0.05
"""Rows on either side, and at least this share of all, that the calibration error averages."""

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
        ``auroc`` of rows with event 1 by the horizon against all other rows; ``auprc``;
        ``log_loss``; ``brier``; ``scaled_brier``, the gain over the observed risk as everyone's;
        ``oe``, observed over mean risk, weighted alike; ``intercept``, with the slope held at 1,
        and ``slope`` on the complementary log-log scale; ``ici``, ``e50``, ``e90``: mean, median
        and 90th percentile of the distances between mean and observed risk of rows of similar risk;
        ``observed``, the observed risk (Aalen-Johansen; a weighted share with ``censoring``);
        ``mean_risk``, the mean of ``risk``; ``effective_n``, the number of rows that the weights
        are worth. NaN where undefined, such as the slope of few different risks.

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
    once, regression = np.ones((1, len(hours))), None if censoring is None else uncensored
    known = known_at(hours, event, horizon, once, regression)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = known.ranking(risk) | known.level(risk) | known.calibration(risk)
        values |= known.distances(risk)
    found = {name: float(value[0]) for name, value in values.items()}
    found = {name: x if np.isfinite(x) else np.nan for name, x in found.items()}
    return found | {"effective_n": known.effective_n}


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


def known_at(
    hours: Array,
    event: Array,
    horizon: float,
    draws: Array,
    uncensored: Array | None = None,  # (n,) or (R, n) ``censoring`` of ``metrics_at``
    link: Link | None = None,
) -> Known:
    """Return what is known of n rows at a horizon, which draws (R, n) count as whole numbers.

    Kaplan-Meier's weights and the pseudo-values are those of each draw. Where nobody's follow-up
    ended early, each row has a label, and nothing needs a weight.
    """
    link = CLOGLOG if link is None else link
    hours, event = _until(hours, event, horizon)
    case = (event == 1).astype(np.float64)
    has_status = (event > 0) | (hours == horizon)
    if has_status.all():
        return Known(case, draws, draws, case, draws, link)
    if uncensored is None:
        table = _LifeTable(hours, event, draws)
        inverse = has_status / table.uncensored[:, table.position].clip(TINY)
        pseudo_values = _pseudo_values(table, event, draws)
        return Known(case, draws, draws * inverse, pseudo_values, draws, link)
    inverse = np.broadcast_to(has_status / uncensored.clip(TINY), draws.shape)
    cut = float((inverse[0] > MAX_WEIGHT)[has_status].mean())
    weights = draws * np.minimum(inverse, MAX_WEIGHT)
    return Known(case, draws, weights, case, weights, link, cut)


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


def uncensored_probability(
    hours: Array, event: Array, horizon: float, draws: Array | None = None
) -> Array:
    """Return Kaplan-Meier's probability (n,) of ``censoring`` in ``metrics_at``; (R, n) of draws.

    Source: Kaplan and Meier 1958; a censored row counts as at risk of an event of the same time.
    """
    hours, event = _until(hours, event, horizon)
    table = _LifeTable(hours, event, np.ones((1, len(hours))) if draws is None else draws)
    probability: Array = table.uncensored[:, table.position]
    return probability[0] if draws is None else probability


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


def inverse_cloglog(scaled: Array) -> Array:
    """Return the risks whose complementary log-log is given."""
    risk: Array = -np.expm1(-np.exp(scaled))
    return risk


def squared_distance(outcome: Array, scaled: Array) -> Array:
    """Return half the squared distance (..., n) of outcomes from scaled risks."""
    loss: Array = (outcome - inverse_cloglog(scaled.clip(max=MAX_CLOGLOG))) ** 2 / 2
    return loss


def cloglog_terms(outcome: Array, scaled: Array) -> Terms:
    """Return the ``Link.terms`` of ``squared_distance``.

    Source: ``geese`` of R's geepack with Gaussian variance, as van Geloven et al. 2022 use it.
    """
    exponential = np.exp(scaled.clip(max=MAX_CLOGLOG))
    residual = outcome + np.expm1(-exponential)
    change = exponential * np.exp(-exponential)  # the derivative of the risk
    slope, curvature = change * residual, change**2
    return slope, curvature, curvature - slope * (1 - exponential)


def neighbour_curve(outcome: Array, risk: Array, weights: Array, at: Array) -> Array:
    """Return the outcomes (R, G) that go with risks (G,): a moving average of outcomes (R, n).

    A risk differs from its curve as the mean risk of the neighbours does from their mean outcome,
    by the rank of the risk, which is the same on all scales. ``weights`` (R, n) count outcomes.
    """
    outcome, weights = np.broadcast_arrays(np.atleast_2d(outcome), weights)
    values, position = np.unique(risk, return_inverse=True)
    rows, sums = (_sums(x, position) for x in (weights, weights * (outcome - risk)))
    stops = rows.cumsum(axis=1)
    total = stops[:, -1:]
    radius = np.maximum(NEIGHBOURS, NEIGHBOUR_SHARE * total)
    low, high = np.maximum(stops - rows - radius, 0), np.minimum(stops + radius, total)
    # The weightings stand one behind the other: one look-up serves all.
    shift = np.pad((total + 1).cumsum(axis=0)[:-1], ((1, 0), (0, 0)))
    places = (shift + np.pad(stops, ((0, 0), (1, 0)))).ravel()
    cumulated = np.pad(sums.cumsum(axis=1), ((0, 0), (1, 0))).ravel()
    excess = np.interp(high + shift, places, cumulated) - np.interp(low + shift, places, cumulated)
    curve = values + excess / (high - low)
    right = np.searchsorted(values, at).clip(max=len(values) - 1)
    left = np.where(values[right] == at, right, (right - 1).clip(0))
    share = (at - values[left]) / np.where(right > left, values[right] - values[left], 1)
    return curve[:, left] + share * (curve[:, right] - curve[:, left])


def draw_outcomes(risk: Array, away: Array, chances: Array) -> Array:
    """Return outcomes (R, n) of calibrated risks (n,), as far away as those that are known.

    Source: Wu 1986, "Jackknife, bootstrap and other resampling methods in regression analysis".
    """
    outcomes: Array = risk + np.where(chances < 0.5, -away, away)
    return outcomes


CLOGLOG = Link(
    cloglog,
    inverse_cloglog,
    squared_distance,
    cloglog_terms,
    100,
    neighbour_curve,
    draw_outcomes,
)
