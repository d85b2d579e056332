"""Update of the risks of times in a new cohort, at each horizon, by pseudo-values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.metrics import Array, log_odds, row_losses
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS, bootstrap, with_interval
from medgemma_clinical.evaluation.time_metrics import Statuses, cloglog, fit_cloglog
from medgemma_clinical.evaluation.time_table import (
    evaluated_events,
    horizon_problem,
    statuses_of,
)
from medgemma_clinical.evaluation.updating import DIVISIONS
from medgemma_clinical.evaluation.verdicts import value_text


@dataclass(frozen=True)
class TimeUpdates:
    """What moves of the risks bring in n rows."""

    methods: dict[str, str]  # of ``decision.METHODS``, by risk
    moves: dict[str, tuple[float, float]]  # slope and intercept on the complementary log-log
    gain: str  # change of the log loss in halves that the moves have not seen

    @property
    def method(self) -> str:
        """What was chosen, in words."""
        if {*self.methods.values()} == {decision.NOT_UPDATED}:
            return decision.NOT_UPDATED
        return ", ".join(f"{name}: {method}" for name, method in self.methods.items())


def moved_risk(risk: Array, slope: Array | float = 1.0, intercept: Array | float = 0.0) -> Array:
    """Return risks whose complementary log-log is moved."""
    if np.all(slope == 1.0) and np.all(intercept == 0.0):  # exactly as they are
        return risk
    moved: Array = -np.expm1(-np.exp(intercept + slope * cloglog(risk)))
    return moved


def fit_moves(statuses: Statuses, risk: Array) -> dict[str, tuple[float, float]]:
    """Return slope and intercept by method, by which risks (n,) fit what was observed."""
    fit = {name: x.item() for name, x in statuses.calibration(risk).items()}
    moves = {decision.NOT_UPDATED: (1.0, 0.0)}
    if np.isfinite(fit["intercept"]):
        moves[decision.INTERCEPT] = 1.0, fit["intercept"]
    if fit["slope"] > 0:  # NaN is not above 0
        scaled = fit["slope"] * cloglog(risk)
        level = fit_cloglog(
            statuses.outcome, np.ones((1, len(risk))), statuses.outcome_weights, [0.0], scaled
        )
        moves[decision.BOTH] = fit["slope"], level.item()
    return moves


def evaluate_time_updates(
    rows: pd.DataFrame, model: str, events: CompetingEvents, seed: int
) -> TimeUpdates | None:
    """Choose the moves of each risk on n rows; None where a half of them has too few events."""
    hours, event = rows["event_hours"].to_numpy(float), rows["event"].to_numpy(float)
    patients = rows["patient"].to_numpy(str)
    case = ((event == 1) & (hours <= events.horizons[0])).astype(float)
    if minority_patients(case, patients) < 2 * MINORITY_PATIENTS:
        return None
    methods, moves, change = {}, {}, np.zeros(len(rows))
    divisions = np.random.default_rng(seed).integers(2**32, size=DIVISIONS).tolist()
    halves = [draw_folds(patients, case, 2, division) for division in divisions]
    for name, (horizon, _) in evaluated_events(events).items():
        if horizon_problem(rows, horizon):
            methods[name], moves[name] = decision.NOT_UPDATED, (1.0, 0.0)
            continue
        risk, whole = rows[f"{model} {name}"].to_numpy(float), statuses_of(rows, events, name)
        with_slope = whole.case.sum() >= decision.MIN_SLOPE_EVENTS
        tried = decision.METHODS if with_slope else decision.METHODS[:2]
        losses = np.zeros((len(tried), len(rows)))
        for half in halves:
            for k in (0, 1):
                other, own = np.flatnonzero(half != k), half == k
                found = fit_moves(statuses_of(rows, events, name, part=other), risk[other])
                for row, method in enumerate(tried):
                    move = found.get(method, found[decision.NOT_UPDATED])
                    odds = log_odds(moved_risk(risk[own], *move))
                    losses[row, own] += row_losses(whole.case[own], odds) / DIVISIONS
        losses *= whole.inverse
        # The simplest method that is within a standard error of the best.
        chosen = int(np.argmax(decision.near_lowest(losses, patients)))
        methods[name] = tried[chosen]
        fitted = fit_moves(whole, risk)
        if tried[chosen] not in fitted:
            methods[name], chosen = decision.NOT_UPDATED, 0
        moves[name] = fitted[methods[name]]
        change += losses[chosen] - losses[0]

    def mean(weights: Array) -> dict[Any, Array]:
        return {"change": weights @ change / weights.sum(axis=1)}

    gain = with_interval(*bootstrap(case, patients, seed, mean)).loc["change"]
    return TimeUpdates(methods, moves, value_text(gain, "+.4f"))
