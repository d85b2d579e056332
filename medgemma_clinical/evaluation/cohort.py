"""All figures of a cohort with their intervals, from one bootstrap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation.bootstrap import Estimate, Figures, bootstrap, estimates
from medgemma_clinical.evaluation.calibration import calibration_bins, weighted_calibration
from medgemma_clinical.evaluation.metrics import (
    Share,
    net_benefit,
    threshold_shares,
    weighted_metrics,
    weighted_shares,
)
from medgemma_clinical.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

BENEFIT_RISKS = np.arange(1, 100) / 100
"""Threshold risks of the decision curve."""

FEWEST_PATIENTS = 10
"""Patients with and patients without the event that a judgement needs."""


@dataclass(frozen=True)
class Cohort:
    """Rows on which a model is judged; no fitting has seen them, unless they are the validation's.

    Attributes:
        labels: (n,) float64 of 0 and 1.
        probability: (n,) float64 of the event.
        groups: (n,) patient of each row.
        ids: (n,) of each row.
        subgroups: n rows of ordered categories, may have no column.
        baselines: probabilities (n,) of each simple model on the same rows, may be empty.
        uncalibrated: (n,) probabilities before recalibration, None without recalibration.
        uncalibrated_threshold: chosen for ``uncalibrated``.
    """

    labels: NDArray[np.float64]
    probability: NDArray[np.float64]
    groups: NDArray[Any]
    ids: NDArray[Any]
    subgroups: pd.DataFrame
    baselines: dict[str, NDArray[np.float64]]
    uncalibrated: NDArray[np.float64] | None = None
    uncalibrated_threshold: float = 0.5

    @classmethod
    def from_predictions(
        cls,
        dataset: TrajectoryDataset,
        predictions: Predictions,
        baselines: dict[str, NDArray[np.float64]],
        uncalibrated: Predictions | None = None,
    ) -> Cohort:
        """Collect what a data set knows of the predicted rows.

        Args:
            dataset: which ``predictions.rows`` points into.
            predictions: of one part.
            baselines: probabilities (n,) of each simple model for the same rows.
            uncalibrated: the same log-odds under the rule without recalibration, if another.
        """
        rows = predictions.rows
        return cls(
            predictions.labels,
            predictions.probability,
            dataset.groups[rows],
            dataset.ids[rows],
            dataset.subgroups().iloc[rows],
            baselines,
            None if uncalibrated is None else uncalibrated.probability,
            0.5 if uncalibrated is None else uncalibrated.rule.threshold,
        )


@dataclass(frozen=True)
class BaselineFigures:
    """Metrics of a simple model, and the paired differences model less baseline, by metric."""

    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar risk: their mean predicted risk, number, and observed share of events."""

    risk: float
    rows: int
    observed: Estimate


@dataclass(frozen=True)
class Subgroup:
    """One level of a subgroup column; ``auroc`` is None with too few patients of a class."""

    column: str
    level: str
    rows: int
    events: int
    risk: float
    auroc: Estimate | None


@dataclass(frozen=True)
class CohortFigures:
    """Every figure of a cohort, all intervals from the same draws of patients.

    Attributes:
        n: rows.
        events: rows with label 1.
        patients: number of different patients.
        rarer: patients that have the outcome that fewer patients have.
        threshold: at which sensitivity and the other shares are taken.
        estimates: metrics, calibration and shares by name, in the order of metrics.json.
        baselines: by name, of each simple model.
        benefit: net benefit at each of ``BENEFIT_RISKS``.
        bins: of the calibration curve, by rising risk.
        subgroups: those that have any row.
        before: ``estimates`` before recalibration, None without recalibration.
    """

    n: int
    events: int
    patients: int
    rarer: int
    threshold: float
    estimates: dict[str, Estimate]
    baselines: dict[str, BaselineFigures]
    benefit: tuple[Estimate, ...]
    bins: tuple[CalibrationBin, ...]
    subgroups: tuple[Subgroup, ...]
    before: dict[str, Estimate] | None = None

    @property
    def prevalence(self) -> float:
        """Share of rows with the event."""
        return self.events / self.n

    @property
    def auroc(self) -> Estimate:
        """Area under the ROC curve."""
        return self.estimates["auroc"]

    @property
    def best_baseline(self) -> str | None:
        """Name of the baseline with the largest AUROC on these rows, None without baselines."""
        known = {name: each.estimates["auroc"].value or 0 for name, each in self.baselines.items()}
        return max(known, key=known.__getitem__, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the part's object in metrics.json: n, events, and each estimate by name."""
        return self._with_counts(self.estimates)

    def baselines_json(self, name: str) -> dict[str, Any]:
        """Return the object of one baseline in metrics.json: n, events, and each metric."""
        return self._with_counts(self.baselines[name].estimates)

    def before_json(self) -> dict[str, Any] | None:
        """Return ``to_json`` as before recalibration, None without recalibration."""
        return None if self.before is None else self._with_counts(self.before)

    def _with_counts(self, estimates: dict[str, Estimate]) -> dict[str, Any]:
        shown = {name: each.to_json() for name, each in estimates.items()}
        return {"n": self.n, "events": self.events, **shown}


def rarer_patients(labels: NDArray[Any], groups: NDArray[Any]) -> int:
    """Count the patients that have the outcome (label 0 or 1) that fewer patients have."""
    return min(len(np.unique(groups[labels == label])) for label in (0, 1))


def cohort_figures(cohort: Cohort, threshold: float, seed: int) -> CohortFigures:
    """Compute every figure of a cohort with its 95 % interval, from one bootstrap.

    Args:
        cohort: the rows.
        threshold: chosen on the validation part.
        seed: of the bootstrap.

    Raises:
        ValueError: the labels hold one class only.
    """
    labels, groups = cohort.labels, np.unique(cohort.groups, return_inverse=True)[1]
    cohort = replace(cohort, groups=groups)  # numbers are counted faster than names
    plan = _Plan.of(cohort, threshold)
    replicates = bootstrap(labels, groups, seed, plan.figures)
    values = plan.figures(np.ones((1, len(labels))))
    known = estimates(values, replicates, plan.share_patients())

    def under(*prefix: str) -> dict[Any, Estimate]:
        """Return the estimates whose names begin so, by the rest of the name."""
        return {key[-1]: each for key, each in known.items() if key[:-1] == prefix}

    aurocs = under("subgroup")
    return CohortFigures(
        n=len(labels),
        events=int(labels.sum()),
        patients=len(np.unique(groups)),
        rarer=rarer_patients(labels, groups),
        threshold=threshold,
        estimates=under("model"),
        baselines={
            name: BaselineFigures(under("baseline", name), under("difference", name))
            for name in cohort.baselines
        },
        benefit=tuple(under("benefit").values()),
        bins=tuple(
            CalibrationBin(float(cohort.probability[rows].mean()), int(rows.sum()), observed)
            for rows, observed in zip(plan.bins, under("bin").values(), strict=True)
        ),
        subgroups=tuple(
            Subgroup(
                *key,
                rows=len(rows),
                events=int(labels[rows].sum()),
                risk=float(cohort.probability[rows].mean()),
                auroc=aurocs.get(key),
            )
            for key, rows in plan.subgroups.items()
        ),
        before=under("before") or None,
    )


@dataclass(frozen=True)
class _Plan:
    """What is computed under each draw of patients; names are tuples, as ("model", "auroc").

    ``models``: probabilities (n,) that get all figures; ``shares``: of those and of the bins;
    ``bins``: rows (n,) bool; ``subgroups``: positions of the rows, by column and level; ``judged``:
    those with patients enough of both classes.
    """

    cohort: Cohort
    models: dict[str, NDArray[np.float64]]
    shares: dict[Any, Share]
    bins: list[NDArray[np.bool_]]
    subgroups: dict[tuple[str, str], NDArray[np.int64]]
    judged: dict[tuple[str, str], NDArray[np.int64]]

    @classmethod
    def of(cls, cohort: Cohort, threshold: float) -> _Plan:
        labels = cohort.labels
        models, thresholds = {"model": cohort.probability}, {"model": threshold}
        if cohort.uncalibrated is not None:
            models["before"] = cohort.uncalibrated
            thresholds["before"] = cohort.uncalibrated_threshold
        shares: dict[Any, Share] = {
            (model, name): share
            for model, risk in models.items()
            for name, share in threshold_shares(labels, risk, thresholds[model]).items()
        }
        bins = calibration_bins(labels, cohort.probability)
        shares |= {("bin", k): (rows & (labels == 1), rows) for k, rows in enumerate(bins)}
        subgroups = subgroup_rows(cohort.subgroups)
        judged = {
            key: rows
            for key, rows in subgroups.items()
            if rarer_patients(labels[rows], cohort.groups[rows]) >= FEWEST_PATIENTS
        }
        return cls(cohort, models, shares, bins, subgroups, judged)

    def figures(self, weights: NDArray[np.float64]) -> Figures:
        """Compute all figures under weights (R, n)."""
        labels = self.cohort.labels
        result: Figures = {}
        for model, risk in self.models.items():
            metrics = weighted_metrics(labels, risk, weights)
            metrics |= weighted_calibration(labels, risk, weights)
            result |= {(model, name): values for name, values in metrics.items()}
        result |= weighted_shares(self.shares, weights)
        for baseline, risk in self.cohort.baselines.items():
            for name, values in weighted_metrics(labels, risk, weights).items():
                result["baseline", baseline, name] = values
                result["difference", baseline, name] = result["model", name] - values
        benefit = net_benefit(labels, self.cohort.probability, BENEFIT_RISKS, weights)
        result |= {("benefit", k): values for k, values in enumerate(benefit.T)}
        for key, rows in self.judged.items():
            risk = self.cohort.probability[rows]
            inside = weighted_metrics(labels[rows], risk, weights[:, rows])
            result["subgroup", key] = inside["auroc"]
        return result

    def share_patients(self) -> dict[Any, int]:
        """Return the patients behind each share; an AUROC is one of the rarer outcome's patients.

        An AUROC of 0 or 1 rests on as many pairs of patients as have the rarer outcome.
        """
        labels, groups = self.cohort.labels, self.cohort.groups
        rarer = rarer_patients(labels, groups)
        patients = {key: len(np.unique(groups[rows])) for key, (_, rows) in self.shares.items()}
        patients |= {(model, "auroc"): rarer for model in self.models}
        patients |= {("baseline", name, "auroc"): rarer for name in self.cohort.baselines}
        for key, rows in self.judged.items():
            patients["subgroup", key] = rarer_patients(labels[rows], groups[rows])
        return patients


def subgroup_rows(table: pd.DataFrame) -> dict[tuple[str, str], NDArray[np.int64]]:
    """Return the positions of the rows of each group that has any, by column and level.

    Args:
        table: n rows of categories.
    """
    return {
        (str(column), str(level)): rows
        for column in table
        for level in table[column].cat.categories
        if len(rows := np.flatnonzero(table[column] == level))
    }
