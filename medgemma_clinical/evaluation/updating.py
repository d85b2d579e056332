"""Update of a model's decision rule in a new cohort: which one tests choose, and what it brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.metrics import Array, log_odds, row_losses
from medgemma_clinical.evaluation.metrics_table import (
    DIFFERENCE,
    MINORITY_PATIENTS,
    bootstrap,
    with_interval,
)
from medgemma_clinical.evaluation.target import Target
from medgemma_clinical.evaluation.verdicts import difference_text

CHOSEN = "as the tests choose"
"""The method that tests choose anew on each half: what the whole procedure brings."""

DIVISIONS = 20
"""Divisions of the patients into two halves, over which metrics are averaged."""


@dataclass(frozen=True)
class Update:
    """What updates of a model's risks for a target bring in n rows."""

    target: Target
    method: str  # of ``METHODS``, chosen on all rows
    multiplier: float  # of this method: it multiplies scaled risks
    shift: float
    # Index (method, metric); columns ``VALUE``, of log_loss also ``DIFFERENCE`` to the
    # risks that are not updated. Updates of the other half of the patients predict a row.
    table: pd.DataFrame
    risks: pd.DataFrame  # (n, methods) mean over the divisions, for the figure

    @property
    def gain(self) -> str:
        """Change of the log loss in halves that the update has not seen, as text."""
        return difference_text(self.table.loc[(CHOSEN, "log_loss")], "+z.4f")


def crosswise(
    target: Target,
    rows: pd.DataFrame,
    risk: Array,  # (n,)
    half: NDArray[np.int64],  # (n,) 0 or 1
    *,
    with_slope: bool,
) -> pd.DataFrame:
    """Return the risks (n,) by each method, those of a half fitted on the other one."""
    updated = pd.DataFrame(dict.fromkeys((*decision.METHODS, CHOSEN), risk))
    patients = rows["patient"].to_numpy(str)
    for k in (0, 1):
        other = np.flatnonzero(half != k)
        known = target.known(rows, part=other)
        chosen_method, updates = decision.choose_update(
            known, risk[other], patients[other], with_slope=with_slope
        )
        for name in updated:
            method = chosen_method if name == CHOSEN else str(name)
            least = updates.get(decision.INTERCEPT, (1.0, 0.0))
            moved = target.link.moved(risk[half == k], *updates.get(method, least))
            updated.loc[half == k, name] = moved
    return updated


def evaluate_updates(
    rows: pd.DataFrame, model: str, targets: Sequence[Target], seed: int
) -> list[Update] | None:
    """Choose an update for each target on n rows and estimate its effect in new rows.

    None where a half of the patients has too few with, or without, the event of the first target;
    further ones that are as rare have no update.
    """
    updates = [evaluate_update(rows, model, target, seed) for target in targets]
    return [x for x in updates if x is not None] if updates[0] is not None else None


def evaluate_update(rows: pd.DataFrame, model: str, target: Target, seed: int) -> Update | None:
    """Return what updates for a target bring; None with too few patients."""
    known, risk = target.known(rows), rows[target.column(model)].to_numpy(float)
    labels, patients = target.labels(rows), rows["patient"].to_numpy(str)
    few = minority_patients(labels, patients) < 2 * MINORITY_PATIENTS
    if few or target.problem(rows):
        return None
    case, with_slope = known.case, np.nansum(labels) >= decision.MIN_SLOPE_EVENTS
    names = (*decision.METHODS, CHOSEN)
    halves: dict[Any, list[float]] = {}
    risks, losses = (np.zeros((len(names), len(rows))) for _ in range(2))  # means
    for division in np.random.default_rng(seed).integers(2**32, size=DIVISIONS).tolist():
        half = draw_folds(patients, case, 2, division)
        updated = crosswise(target, rows, risk, half, with_slope=bool(with_slope))
        values = updated.to_numpy().T  # (methods, n)
        risks += values / DIVISIONS
        losses += row_losses(case, log_odds(values)) / DIVISIONS
        for k in (0, 1):  # pooled, the error of one half would cancel that of the other
            in_half = np.flatnonzero(half == k)
            of_half = target.known(rows, part=in_half)
            for name, half_risk in zip(names, values[:, in_half], strict=True):
                slope = of_half.calibration(half_risk)["slope"].item()
                distance = of_half.distances(half_risk)["ici"].item()
                for metric, number in (("slope", slope), ("ici", distance)):
                    halves.setdefault((name, metric), []).append(number)

    def statistic(draws: Array) -> dict[Any, Array]:
        weights = target.known(rows, draws).weights
        means = weights @ losses.T / weights.sum(axis=1, keepdims=True)  # (R, methods)
        return {(name, "log_loss"): mean for name, mean in zip(names, means.T, strict=True)}

    value, drawn = bootstrap(patients, seed, statistic)
    table = with_interval(value, drawn)
    none = decision.NOT_UPDATED, "log_loss"
    table[DIFFERENCE] = with_interval(value - value[none], drawn.sub(drawn[none], axis=0))
    for key, numbers in halves.items():
        table.loc[key, "value"] = np.mean([x for x in numbers if np.isfinite(x)] or [np.nan])
    method, updates = decision.choose_update(known, risk, patients, with_slope=bool(with_slope))
    by_method = pd.DataFrame(risks.T, columns=list(names), index=rows.index)
    table = table.rename_axis(["method", "metric"])
    return Update(target, method, *updates[method], table, by_method)
