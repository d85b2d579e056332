"""All figures of a cohort with their intervals, from one bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation.bootstrap import Estimate, Figures, bootstrap, estimate
from medgemma_clinical.evaluation.calibration import calibration_bins, weighted_calibration
from medgemma_clinical.evaluation.decision import DecisionRule
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
    """

    labels: NDArray[np.float64]
    probability: NDArray[np.float64]
    groups: NDArray[Any]
    ids: NDArray[Any]
    subgroups: pd.DataFrame
    baselines: dict[str, NDArray[np.float64]]
    uncalibrated: NDArray[np.float64] | None = None

    @classmethod
    def from_predictions(
        cls,
        dataset: TrajectoryDataset,
        predictions: Predictions,
        baselines: dict[str, NDArray[np.float64]],
    ) -> Cohort:
        """Collect what a data set knows of the rows of ``predictions``."""
        rows, rule = predictions.rows, predictions.rule
        uncalibrated = DecisionRule().probability(predictions.logit) if rule.recalibrates else None
        return cls(
            predictions.labels,
            predictions.probability,
            dataset.groups[rows],
            dataset.ids[rows],
            dataset.subgroups().iloc[rows],
            baselines,
            uncalibrated,
        )


@dataclass(frozen=True)
class Subgroup:
    """One level of a subgroup column; ``auroc`` is None with too few patients of a class."""

    name: str
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
        baselines: metrics of each simple model by its name.
        differences: metrics of the model minus those of each simple model, paired.
        benefit: net benefit at each of ``BENEFIT_RISKS``.
        bins: calibration curve, the observed share of events by mean predicted risk.
        subgroups: those that have any row.
        before: ``estimates`` before recalibration, empty without; the alarms are the same.
    """

    n: int
    events: int
    patients: int
    rarer: int
    threshold: float
    estimates: dict[str, Estimate]
    baselines: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    benefit: list[Estimate]
    bins: dict[float, Estimate]
    subgroups: list[Subgroup]
    before: dict[str, Estimate]

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
        known = {name: each["auroc"].value or 0 for name, each in self.baselines.items()}
        return max(known, key=known.__getitem__, default=None)

    def to_json(self, estimates: dict[str, Estimate]) -> dict[str, Any]:
        """Return an object of metrics.json: n, events, and each of the estimates by name."""
        shown = {name: each.to_json() for name, each in estimates.items()}
        return {"n": self.n, "events": self.events, **shown}


def rarer_patients(labels: NDArray[Any], groups: NDArray[Any]) -> int:
    """Count the patients that have the outcome (label 0 or 1) that fewer patients have."""
    return min(len(np.unique(groups[labels == label])) for label in (0, 1))


def cohort_figures(cohort: Cohort, threshold: float, seed: int) -> CohortFigures:
    """Compute every figure of a cohort with its 95 % interval, from one bootstrap.

    Args:
        cohort: the rows.
        threshold: of the decision rule.
        seed: of the bootstrap.

    Raises:
        ValueError: the labels hold one class only.
    """
    labels, risk = cohort.labels, cohort.probability
    groups = np.unique(cohort.groups, return_inverse=True)[1]  # counted faster than names
    bins = calibration_bins(labels, risk)
    subgroups: dict[str, Any] = {
        f"{name}: {level}": rows
        for name, column in cohort.subgroups.items()
        for level, rows in column.groupby(column, observed=True).indices.items()
    }
    judged = {
        key: rows
        for key, rows in subgroups.items()
        if rarer_patients(labels[rows], groups[rows]) >= FEWEST_PATIENTS
    }
    shares: dict[Any, Share] = {
        ("model", name): share for name, share in threshold_shares(labels, risk, threshold).items()
    }
    shares |= {("bin", k): (rows & (labels == 1), rows) for k, rows in enumerate(bins)}
    known = _estimates(cohort, groups, shares, judged, seed)

    def under(*prefix: str) -> dict[Any, Estimate]:
        """Return the estimates whose names begin so, by the rest of the name."""
        return {key[-1]: each for key, each in known.items() if key[:-1] == prefix}

    model, before, aurocs = under("model"), under("before"), under("subgroup")
    return CohortFigures(
        n=len(labels),
        events=int(labels.sum()),
        patients=int(groups.max()) + 1,
        rarer=rarer_patients(labels, groups),
        threshold=threshold,
        estimates=model,
        baselines={name: under("baseline", name) for name in cohort.baselines},
        differences={name: under("difference", name) for name in cohort.baselines},
        benefit=list(under("benefit").values()),
        bins={float(risk[rows].mean()): under("bin")[k] for k, rows in enumerate(bins)},
        subgroups=[
            Subgroup(
                name,
                rows=len(rows),
                events=int(labels[rows].sum()),
                risk=float(risk[rows].mean()),
                auroc=aurocs.get(name),
            )
            for name, rows in subgroups.items()
        ],
        before=model | before if before else {},
    )


def _estimates(
    cohort: Cohort,
    groups: NDArray[np.int64],
    shares: dict[Any, Share],
    judged: dict[str, Any],
    seed: int,
) -> dict[Any, Estimate]:
    """Return all estimates; names are tuples, as ("model", "auroc").

    ``judged`` holds the positions of the rows of each subgroup that gets an AUROC.
    """
    labels = cohort.labels
    # An AUROC of 0 or 1 rests on as many pairs of patients as have the rarer outcome.
    aurocs = [("model",), ("before",), *(("baseline", name) for name in cohort.baselines)]
    patients: dict[Any, int] = {
        **{name: len(np.unique(groups[among])) for name, (_, among) in shares.items()},
        **{(*model, "auroc"): rarer_patients(labels, groups) for model in aurocs},
        **{
            ("subgroup", key): rarer_patients(labels[rows], groups[rows])
            for key, rows in judged.items()
        },
    }
    statistics = partial(_weighted_figures, cohort, shares, judged)
    replicates = bootstrap(labels, groups, seed, statistics)
    return {
        name: estimate(float(value[0]), replicates[name], patients.get(name))
        for name, value in statistics(np.ones((1, len(labels)))).items()
    }


def _weighted_figures(
    cohort: Cohort,
    shares: dict[Any, Share],
    judged: dict[str, Any],
    weights: NDArray[np.float64],
) -> Figures:
    """Compute all figures under weights (R, n)."""
    labels, model_risk = cohort.labels, cohort.probability
    result: Figures = {}
    for model, risk in (("model", model_risk), ("before", cohort.uncalibrated)):
        if risk is not None:
            scores = weighted_metrics(labels, risk, weights)
            scores |= weighted_calibration(labels, risk, weights)
            result |= {(model, name): values for name, values in scores.items()}
    result |= weighted_shares(shares, weights)
    for baseline, risk in cohort.baselines.items():
        for name, values in weighted_metrics(labels, risk, weights).items():
            result["baseline", baseline, name] = values
            result["difference", baseline, name] = result["model", name] - values
    benefit = net_benefit(labels, model_risk, BENEFIT_RISKS, weights)
    result |= {("benefit", k): values for k, values in enumerate(benefit.T)}
    for key, rows in judged.items():
        inside = weighted_metrics(labels[rows], model_risk[rows], weights[:, rows])
        result["subgroup", key] = inside["auroc"]
    return result
