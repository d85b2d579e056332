"""All figures of a cohort with their intervals, from one bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.case_mix import join_bands
from medgemma_clinical.data.small_cells import (
    RiskBands,
    any_small,
    is_small,
    merge_bands,
    rarer_patients,
    risk_bands,
)
from medgemma_clinical.evaluation.baselines import COMBINED, blend_risks, richest_blend
from medgemma_clinical.evaluation.bootstrap import Estimate, Figures, bootstrap, estimate
from medgemma_clinical.evaluation.calibration import calibration_bins, weighted_calibration
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.judgement.verdict import FEWEST_PATIENTS
from medgemma_clinical.evaluation.metrics import (
    Share,
    benefit_gain,
    net_benefit,
    threshold_shares,
    weighted_metrics,
    weighted_shares,
)
from medgemma_clinical.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

UNKNOWN = Estimate(None)

SAME_RISK = 1e-6
"""Difference of probabilities up to which they are equal, as of float32."""

MOST_BINS = 10
"""Points of a calibration curve whose bands are joined."""

DECIMALS = 4
"""Of the figures in metrics.json where small cells are hidden: all digits of one tell counts."""


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

    @property
    def combined(self) -> NDArray[np.float64] | None:
        """The model and the richest blend of simple models as one: (n,) probabilities.

        The model's logit is that of ``probability``, after recalibration. None without a blend.
        """
        blend = richest_blend(self.baselines)
        return None if blend is None else blend_risks(self.probability, self.baselines[blend])

    @property
    def same(self) -> list[str]:
        """Names of the baselines that give each row the model's risk."""
        return [
            name
            for name, risk in self.baselines.items()
            if np.allclose(self.probability, risk, rtol=0, atol=SAME_RISK)
        ]

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
    """Every figure of a cohort that may be shown, all intervals from the same draws of patients.

    Where few patients have the event, or lack it, each figure is unknown: AUROC, Brier score and
    calibration together tell their number.

    Attributes:
        n: rows.
        events: rows with label 1; None where few patients have the event, or lack it.
        patients: number of different patients.
        rarer: patients that have the outcome that fewer patients have; None as for ``events``.
        fewest: patients of the smallest cell that is shown; 0 shows all.
        threshold: at which sensitivity and the other shares are taken.
        estimates: metrics, calibration and shares by name, in the order of metrics.json.
        baselines: metrics of each simple model by its name.
        same: names of the baselines that give each row the model's risk, see ``Cohort.same``.
        differences: metrics of the model minus those of each simple model, paired.
        combined: metrics of ``Cohort.combined``; empty, as the next, without a blend.
        combined_minus_blend: those metrics minus the blend's own, paired.
        benefit: net benefit by threshold risk, at those that show no small cell.
        benefit_gain: net benefit at ``threshold`` minus that of an alarm for all or for none,
            whichever is larger.
        bands: the risks as finely as a curve may show them.
        bins: calibration curve, the observed share of events by mean predicted risk.
        subgroups: those that have any row; neighbours with few patients are one.
        before: ``estimates`` before recalibration, empty without; the alarms are the same.
    """

    n: int
    events: int | None
    patients: int
    rarer: int | None
    fewest: int
    threshold: float
    estimates: dict[str, Estimate]
    baselines: dict[str, dict[str, Estimate]]
    same: list[str]
    differences: dict[str, dict[str, Estimate]]
    combined: dict[str, Estimate]
    combined_minus_blend: dict[str, Estimate]
    benefit: dict[float, Estimate]
    benefit_gain: Estimate
    bands: RiskBands
    bins: dict[float, Estimate]
    subgroups: list[Subgroup]
    before: dict[str, Estimate]

    @property
    def prevalence(self) -> float | None:
        """Share of rows with the event; None where their number is not shown."""
        return None if self.events is None else self.events / self.n

    @property
    def auroc(self) -> Estimate:
        """Area under the ROC curve."""
        return self.estimates["auroc"]

    @property
    def best_baseline(self) -> str | None:
        """Name of the baseline with the largest AUROC on these rows, None without baselines.

        One that gives each row the model's risk, as stage 1 at weight 0, is no rival.
        """
        known = {
            name: each["auroc"].value or 0
            for name, each in self.baselines.items()
            if name not in self.same
        }
        return max(known, key=known.__getitem__, default=None)

    @property
    def others(self) -> dict[str, dict[str, Estimate]]:
        """Metrics that stand beside the model's: the baselines' and, last, the combined model's."""
        return self.baselines | ({COMBINED: self.combined} if self.combined else {})

    def to_json(self, estimates: dict[str, Estimate]) -> dict[str, Any]:
        """Return an object of metrics.json: n, events, and each of the estimates by name."""
        digits = DECIMALS if self.fewest else None
        shown = {name: each.to_json(digits) for name, each in estimates.items()}
        return {"n": self.n, "events": self.events, **shown}


def cohort_figures(
    cohort: Cohort, threshold: float, seed: int, fewest: int, *, hide: bool = False
) -> CohortFigures:
    """Compute every figure of a cohort with its 95 % interval, from one bootstrap.

    Args:
        cohort: the rows.
        threshold: of the decision rule.
        seed: of the bootstrap.
        fewest: patients of the smallest cell that is shown, see ``small_cells``; 0 shows all.
        hide: show no figure, as where few patients have the event.

    Raises:
        ValueError: the labels hold one class only.
    """
    labels, risk = cohort.labels, cohort.probability
    groups = np.unique(cohort.groups, return_inverse=True)[1]  # counted faster than names
    hidden = hide or is_small(rarer_patients(labels, groups), fewest)
    bands = risk_bands(risk, labels, groups, fewest, threshold)
    bins = [] if hidden else _bins(labels, risk, bands)
    subgroups = {} if hidden else subgroup_rows(cohort.subgroups, labels, groups, fewest)
    judged = {
        key: rows
        for key, rows in subgroups.items()
        if rarer_patients(labels[rows], groups[rows]) >= FEWEST_PATIENTS
    }
    at_threshold = threshold_shares(labels, risk, threshold)
    shares: dict[Any, Share] = {("model", name): share for name, share in at_threshold.items()}
    shares |= {("bin", k): (rows & (labels == 1), rows) for k, rows in enumerate(bins)}
    known = _estimates(cohort, groups, shares, judged, bands.thresholds, threshold, seed)
    unshown = hidden_figures(cohort, groups, threshold, fewest)
    known |= dict.fromkeys([name for name in known if hidden or name in unshown], UNKNOWN)

    def under(*prefix: str) -> dict[Any, Estimate]:
        """Return the estimates whose names begin so, by the rest of the name."""
        return {key[-1]: each for key, each in known.items() if key[:-1] == prefix}

    model, before, aurocs = under("model"), under("before"), under("subgroup")
    return CohortFigures(
        n=len(labels),
        events=None if hidden else int(labels.sum()),
        patients=int(groups.max()) + 1,
        rarer=None if hidden else rarer_patients(labels, groups),
        fewest=fewest,
        threshold=threshold,
        estimates=model,
        baselines={name: under("baseline", name) for name in cohort.baselines},
        same=cohort.same,
        differences={name: under("difference", name) for name in cohort.baselines},
        combined=under(COMBINED),
        combined_minus_blend=under("combined minus blend"),
        benefit={} if hidden else under("benefit"),
        benefit_gain=known["benefit gain",],
        bands=bands,
        bins={float(risk[rows].mean()): under("bin")[k] for k, rows in enumerate(bins)},
        subgroups=[
            _subgroup(key, cohort, rows, aurocs.get(key)) for key, rows in subgroups.items()
        ],
        before=model | before if before else {},
    )


def _bins(
    labels: NDArray[np.float64], risk: NDArray[np.float64], bands: RiskBands
) -> list[NDArray[np.bool_]]:
    """Return the rows (n,) of each bin of the calibration curve; more than ten bands are joined."""
    if bands.edges is None:
        return calibration_bins(labels, risk)
    places, sizes = np.unique(bands.place, return_counts=True)
    joined = places
    if len(places) > MOST_BINS:  # each band joins the tenth of the rows that holds its middle
        joined = MOST_BINS * (2 * sizes.cumsum() - sizes) // (2 * len(risk))
    of_row = joined[np.searchsorted(places, bands.place)]
    return [of_row == each for each in np.unique(joined)]


def _subgroup(
    name: str, cohort: Cohort, rows: NDArray[np.int64], auroc: Estimate | None
) -> Subgroup:
    labels, risk = cohort.labels[rows], cohort.probability[rows]
    return Subgroup(name, len(rows), int(labels.sum()), float(risk.mean()), auroc)


def subgroup_rows(
    subgroups: pd.DataFrame, labels: NDArray[np.float64], groups: NDArray[np.int64], fewest: int
) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each subgroup by its name; neighbours with small cells are one.

    Args:
        subgroups: n rows of ordered categories.
        labels: (n,) of 0 and 1.
        groups: (n,) number of each row's patient.
        fewest: patients that a cell needs.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for name, column in subgroups.items():
        levels = column.cat.remove_unused_categories().cat
        codes = levels.codes.to_numpy().astype(np.int64)
        merged = merge_bands(codes, len(levels.categories), labels, groups, fewest)
        if merged.any() or len(merged) == 1:  # else all are one, the cohort itself
            place = merged[codes]
            for k in range(merged.max() + 1):
                level = join_bands(levels.categories[merged == k].astype(str).tolist())
                found[f"{name}: {level}"] = np.flatnonzero(place == k)
    return found


def hides_accuracy(
    labels: NDArray[np.float64], risk: NDArray[np.float64], groups: NDArray[Any], fewest: int
) -> bool:
    """Return whether the accuracy at 0.5 would tell of a few patients with or without alarm."""
    return any_small(2 * (labels == 1) + (risk >= 0.5), groups, 4, fewest)


def hidden_figures(
    cohort: Cohort, groups: NDArray[np.int64], threshold: float, fewest: int
) -> set[tuple[str, ...]]:
    """Return the names of the estimates that would show a cell of few patients with alarm."""
    labels = cohort.labels
    models: dict[tuple[str, ...], Any] = {
        ("model",): cohort.probability,
        ("before",): cohort.uncalibrated,
        (COMBINED,): cohort.combined,
    }
    models |= {("baseline", name): risk for name, risk in cohort.baselines.items()}
    hidden: set[tuple[str, ...]] = set()
    for model, risk in models.items():
        if risk is not None and hides_accuracy(labels, risk, groups, fewest):
            hidden.add((*model, "accuracy"))
    alarm = cohort.probability >= threshold
    if any_small(2 * (labels == 1) + alarm, groups, 4, fewest):
        hidden |= {("model", share) for share in threshold_shares(labels, labels, 0.5)}
        hidden.add(("benefit gain",))
    # A difference and one of its two figures give the other.
    paired: set[tuple[str, ...]] = {
        ("difference", name, key[-1])
        for key in hidden
        for name in cohort.baselines
        if key[0] == "model" or key[:-1] == ("baseline", name)
    }
    added = (COMBINED,), ("baseline", richest_blend(cohort.baselines))
    paired |= {("combined minus blend", key[-1]) for key in hidden if key[:-1] in added}
    return hidden | paired


def _estimates(
    cohort: Cohort,
    groups: NDArray[np.int64],
    shares: dict[Any, Share],
    judged: dict[str, Any],
    at: NDArray[np.float64],
    threshold: float,
    seed: int,
) -> dict[Any, Estimate]:
    """Return all estimates; names are tuples, as ("model", "auroc").

    ``judged`` holds the positions of the rows of each subgroup that gets an AUROC, ``at`` the
    threshold risks of the net benefit, ``threshold`` that of the decision rule.
    """
    labels = cohort.labels
    # An AUROC of 0 or 1 rests on as many pairs of patients as have the rarer outcome.
    models: list[tuple[str, ...]] = [("model",), ("before",), (COMBINED,)]
    models += [("baseline", name) for name in cohort.baselines]
    patients: dict[Any, int] = {
        **{name: len(np.unique(groups[among])) for name, (_, among) in shares.items()},
        **{(*model, "auroc"): rarer_patients(labels, groups) for model in models},
        **{
            ("subgroup", key): rarer_patients(labels[rows], groups[rows])
            for key, rows in judged.items()
        },
    }
    statistics = partial(_weighted_figures, cohort, shares, judged, at, threshold)
    replicates = bootstrap(labels, groups, seed, statistics)
    return {
        name: estimate(float(value[0]), replicates[name], patients.get(name))
        for name, value in statistics(np.ones((1, len(labels)))).items()
    }


def _weighted_figures(
    cohort: Cohort,
    shares: dict[Any, Share],
    judged: dict[str, Any],
    at: NDArray[np.float64],
    threshold: float,
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
    if (combined := cohort.combined) is not None:
        blend = richest_blend(cohort.baselines)
        for name, values in weighted_metrics(labels, combined, weights).items():
            result[COMBINED, name] = values
            result["combined minus blend", name] = values - result["baseline", blend, name]
    benefit = net_benefit(labels, model_risk, at, weights)
    result |= {("benefit", p): values for p, values in zip(at.tolist(), benefit.T, strict=True)}
    result["benefit gain",] = benefit_gain(labels, model_risk, threshold, weights)
    for key, rows in judged.items():
        inside = weighted_metrics(labels[rows], model_risk[rows], weights[:, rows])
        result["subgroup", key] = inside["auroc"]
    return result
