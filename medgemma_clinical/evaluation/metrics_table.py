"""Every metric of several models on the same rows: one tidy table, from one bootstrap of patients.

``metrics.json`` is its dump; console, report, card, comparison and tracker select from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.evaluation.baselines import ENSEMBLE, best_blend
from medgemma_clinical.evaluation.metrics import (
    Array,
    bootstrap_weights,
    calibration,
    confusion_shares,
    metrics,
    net_benefit,
)

TESTED = ["id", "label", "patient"]
"""Columns of a table of predictions that say what was predicted; each other one is a model."""

VALUE = ["value", "low", "high"]
DIFFERENCE = ["difference", "difference_low", "difference_high"]
SPREAD = ["sd", "min", "max"]
"""Columns of the table; the last ones, over several splits, only where there are several."""

MAX_UNDEFINED = 0.05
"""Share of the draws in which a metric may be undefined; beyond it there is no interval."""

MINORITY_PATIENTS = 10
"""Patients with, and without, the event that a verdict and a subgroup's AUROC need."""

MAX_BINS, EVENTS_A_BIN = 10, 5

Statistic = Callable[[Array], dict[Any, Array]]
"""From weights (R, n) to values (R,) by any key."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of the models on one part of the data.

    Attributes:
        counts: n (rows), patients, events, minority_patients (patients that have the outcome which
            fewer patients have).
        table: index (model, metric); columns value, low, high, and difference, difference_low,
            difference_high: this row minus the model ``reference``, paired. The first model is the
            reference of all, but for the ensemble, whose reference is the best blend. Over several
            splits also sd, min, max.
    """

    counts: dict[str, int]
    table: pd.DataFrame

    @property
    def models(self) -> list[str]:
        """The models; the first one is the reference."""
        return list(dict.fromkeys(self.table.index.get_level_values("model")))

    def metric(self, name: str) -> Any:
        """Return a metric of all models that have it, by model."""
        return self.table.xs(name, level="metric")

    def row(self, model: str, name: str) -> Any:
        """Return a line of the table."""
        return self.table.loc[(model, name)]

    def of(self, model: str) -> Any:
        """Return all metrics of a model, by name."""
        return self.table.loc[model]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a part of ``metrics.json``; what is undefined is None."""
        first, *others = self.models
        spread = [name for name in SPREAD if name in self.table]

        def plain(model: str, columns: list[str]) -> dict[str, Any]:
            rows = (
                self.of(model)[columns].astype(object).where(self.of(model)[columns].notna(), None)
            )
            return {str(name): row for name, row in rows.to_dict("index").items()}

        return {
            **self.counts,
            "model": first,
            **plain(first, VALUE + spread),
            "models": {
                name: {
                    "reference": self.of(name)["reference"].iloc[0],
                    **plain(name, VALUE + DIFFERENCE + spread),
                }
                for name in others
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read a part of ``metrics.json``.

        Raises:
            KeyError, TypeError, AttributeError: the content is no such part.
        """
        known = dict(content)
        counts = {name: known.pop(name) for name in COUNTS}
        first, others = known.pop("model"), known.pop("models")
        lines = {(first, name): {"reference": first, **row} for name, row in known.items()}
        for model, each in others.items():
            own = {name: row for name, row in each.items() if name != "reference"}
            lines |= {
                (model, name): {"reference": each["reference"], **row} for name, row in own.items()
            }
        table = pd.DataFrame.from_dict(lines, orient="index")
        table.index = pd.MultiIndex.from_tuples(lines, names=["model", "metric"])
        numbers = [name for name in (*VALUE, *DIFFERENCE, *SPREAD) if name in table]
        table = table.reindex(
            columns=[*VALUE, *DIFFERENCE, *(n for n in SPREAD if n in table), "reference"]
        )
        return cls(counts, table.astype(dict.fromkeys(numbers, float)))


COUNTS = ("n", "patients", "events", "minority_patients")


def bootstrap(
    labels: Array,
    patients: NDArray[np.generic],
    seed: int,
    statistic: Statistic,
    split: NDArray[np.generic] | None = None,
) -> tuple[pd.Series[float], pd.DataFrame]:
    """Compute statistics on all rows (by key), and in each draw of patients (a column a key)."""
    chunks = [pd.DataFrame(statistic(w)) for w in bootstrap_weights(labels, patients, seed, split)]
    value = pd.DataFrame(statistic(np.ones((1, len(labels))))).iloc[0]
    return value, pd.concat(chunks, ignore_index=True)


def with_interval(
    value: pd.Series[float], drawn: pd.DataFrame, behind: Mapping[Any, int] | None = None
) -> pd.DataFrame:
    """Return value, low and high by key: the 95 % percentile interval of the draws.

    A share of 0 or 1, whose draws do not vary, gets the exact interval of the patients ``behind``
    it, by key.

    Source: Efron and Tibshirani 1993, percentile method; Clopper and Pearson 1934.
    """
    drawn = drawn.where(np.isfinite(drawn))
    ends = drawn.quantile([0.025, 0.975]).T
    ends.columns = pd.Index(VALUE[1:])
    ends[(drawn.isna().mean() > MAX_UNDEFINED) | ~np.isfinite(value)] = np.nan
    for key, patients in (behind or {}).items():
        if value[key] in (0, 1):
            exact = binomtest(int(value[key]) * patients, patients).proportion_ci()
            ends.loc[key, VALUE[1:]] = exact.low, exact.high
    ends.insert(0, "value", value.where(np.isfinite(value)))
    return ends


def evaluate(
    rows: pd.DataFrame,
    seed: int,
    threshold: float | None = None,
    reference: str | None = None,
    split: NDArray[np.generic] | None = None,
) -> Metrics:
    """Compute the metrics of all models, each with interval and paired difference.

    Args:
        rows: a table of predictions: the columns ``TESTED``, then the risk of each model.
        seed: seed of the bootstrap.
        threshold: of the first model's decision rule, which gets calibration and the shares at this
            threshold; None for models side by side.
        reference: the model that the others are compared with, the first where None.
        split: (n,) the split that each row is from; each metric is then the mean over the splits,
            and patients are drawn once for all splits.

    Raises:
        ValueError: a class is missing.
    """
    risks = {str(name): rows[name].to_numpy(float) for name in rows.columns.drop(TESTED)}
    first = reference or next(iter(risks))
    risks = {first: risks[first], **risks}
    labels, patients = rows["label"].to_numpy(float), rows["patient"].to_numpy(str)
    parts = [np.arange(len(rows))]
    if split is not None:
        parts = [np.flatnonzero(split == each) for each in np.unique(split)]

    def by_part(weights: Array) -> list[dict[Hashable, Array]]:
        return [
            {
                (model, name): values
                for model, risk in risks.items()
                for name, values in metrics(labels[p], risk[p], weights[:, p]).items()
            }
            for p in parts
        ]

    def statistic(weights: Array) -> dict[Any, Array]:
        each = by_part(weights)
        known = {key: np.mean([part[key] for part in each], axis=0) for key in each[0]}
        if threshold is not None:
            own = calibration(labels, risks[first], weights)
            own |= confusion_shares(labels, risks[first] >= threshold, weights)
            known |= {(first, name): values for name, values in own.items()}
        return known

    value, drawn = bootstrap(labels, patients, seed, statistic, split)
    blend = best_blend(risks)
    references = dict.fromkeys(risks, first)
    if ENSEMBLE in risks and blend and first != ENSEMBLE:
        references[ENSEMBLE] = blend
    keys: Any = [key for key in value.index if key[0] != first]
    others = [(references[model], name) for model, name in keys]
    behind = {}
    if threshold is not None:
        positive = risks[first] >= threshold
        among = {"sensitivity": labels == 1, "specificity": labels == 0, "ppv": positive}
        among |= {"npv": ~positive, "positives": np.ones(len(rows), bool)}
        behind = {(first, name): count_patients(patients, own) for name, own in among.items()}
    table = with_interval(value, drawn, behind)
    if threshold is not None:  # a distance grows by the noise of the draws: they give no interval
        table.loc[(first, "e_average"), VALUE[1:]] = np.nan
    table[DIFFERENCE] = np.nan
    if keys:
        columns = pd.MultiIndex.from_tuples(keys)
        minus = pd.DataFrame(drawn[keys].to_numpy() - drawn[others].to_numpy(), columns=columns)
        own = pd.Series(value[keys].to_numpy() - value[others].to_numpy(), columns)
        table.loc[columns, DIFFERENCE] = with_interval(own, minus).to_numpy()
    if split is not None:
        ones = by_part(np.ones((1, len(rows))))
        spread = pd.DataFrame({key: [part[key][0] for part in ones] for key in ones[0]})
        table[SPREAD] = spread.agg(["std", "min", "max"]).T.set_axis(SPREAD, axis=1)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", "metric"])
    table["reference"] = [references[model] for model in table.index.get_level_values("model")]
    return Metrics(count(labels, patients), table.loc[list(risks)])


def evaluate_splits(
    tables: Sequence[pd.DataFrame], seed: int, reference: str | None = None
) -> Metrics:
    """Compute the metrics of the same models on the test parts of several splits."""
    split = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return evaluate(pd.concat(tables), seed, reference=reference, split=split)


def count(labels: Array, patients: NDArray[np.generic]) -> dict[str, int]:
    """Return the ``COUNTS`` of some rows."""
    numbers = len(labels), len(np.unique(patients)), int(labels.sum())
    return dict(zip(COUNTS, (*numbers, minority_patients(labels, patients)), strict=True))


def subgroup_table(rows: pd.DataFrame, model: str, bands: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return size, events, mean risk and AUROC of each subgroup.

    Args:
        rows: a table of predictions.
        model: the column of the model.
        bands: n rows of ordered categories, a column a grouping.
        seed: seed of the bootstrap.

    Returns:
        A line a subgroup that has any row: group, level, n, patients, events, minority_patients,
        risk (mean), and the AUROC with its interval as auroc, auroc_low, auroc_high, NaN where
        fewer than ``MINORITY_PATIENTS`` have, or lack, the event.
    """
    labels, risk = rows["label"].to_numpy(float), rows[model].to_numpy(float)
    patients = rows["patient"].to_numpy(str)
    chosen = {
        (str(name), str(level)): np.flatnonzero(column.to_numpy() == level)
        for name, column in bands.items()
        for level in column.cat.categories
    }
    lines = [
        {
            "group": group,
            "level": level,
            **count(labels[own], patients[own]),
            "risk": risk[own].mean(),
        }
        for (group, level), own in chosen.items()
        if len(own)
    ]
    table = pd.DataFrame(lines)
    judged = [
        (line["group"], line["level"])
        for line in lines
        if line["minority_patients"] >= MINORITY_PATIENTS
    ]
    if not judged:
        return table.assign(auroc=np.nan, auroc_low=np.nan, auroc_high=np.nan)

    def statistic(weights: Array) -> dict[Any, Array]:
        return {
            key: metrics(labels[own], risk[own], weights[:, own])["auroc"]
            for key, own in ((key, chosen[key]) for key in judged)
        }

    known = with_interval(*bootstrap(labels, patients, seed, statistic))
    known.columns = pd.Index(["auroc", "auroc_low", "auroc_high"])
    known.index = pd.MultiIndex.from_tuples(known.index)
    return table.join(known, on=["group", "level"]) if len(table) else table


def calibration_table(rows: pd.DataFrame, model: str, seed: int) -> pd.DataFrame:
    """Return the calibration curve in bins of equal size by rising risk.

    Returns:
        A line a bin: n, predicted (mean risk), observed (share of events) with low and high.
    """
    labels, risk = rows["label"].to_numpy(float), rows[model].to_numpy(float)
    minority = min(labels.sum(), (1 - labels).sum())
    bins = int(np.clip(minority // EVENTS_A_BIN, 2, MAX_BINS))
    observed, predicted = calibration_curve(labels, risk, n_bins=bins, strategy="quantile")
    edges = np.percentile(risk, 100 * np.linspace(0, 1, bins + 1))[1:-1]
    index = np.searchsorted(edges, risk)  # as scikit-learn bins
    members = [index == k for k in np.unique(index)]

    def statistic(weights: Array) -> dict[Any, Array]:
        with np.errstate(invalid="ignore"):
            return {
                k: (weights @ (own * labels)) / (weights @ own) for k, own in enumerate(members)
            }

    patients, sizes = rows["patient"].to_numpy(str), [int(own.sum()) for own in members]
    behind = {k: count_patients(patients, own) for k, own in enumerate(members)}
    known = with_interval(*bootstrap(labels, patients, seed, statistic), behind)
    return known.assign(n=sizes, predicted=predicted, observed=observed)[
        ["n", "predicted", "observed", "low", "high"]
    ]


def decision_curve(rows: pd.DataFrame, models: list[str], seed: int) -> pd.DataFrame:
    """Return the net benefit at threshold risks of whole percents, up to those of use.

    Returns:
        By threshold: the first model's net benefit with low and high, that of each other model by
        its name, and treat_all; to treat none has zero.
    """
    labels, risk = rows["label"].to_numpy(float), rows[models[0]].to_numpy(float)
    prevalence = labels.mean()
    highest = min(0.99, max(0.05, 2 * prevalence, float(np.quantile(risk, 0.99))))
    thresholds = np.arange(1, math.floor(100 * highest) + 1) / 100

    def statistic(weights: Array) -> dict[Any, Array]:
        benefit = net_benefit(labels, risk, thresholds, weights)
        return dict(zip(thresholds.tolist(), benefit.T, strict=True))

    table = with_interval(*bootstrap(labels, rows["patient"].to_numpy(str), seed, statistic))
    table = table.rename_axis("threshold").rename(columns={"value": models[0]})
    one = np.ones((1, len(rows)))
    for name in models[1:]:
        table[name] = net_benefit(labels, rows[name].to_numpy(float), thresholds, one)[0]
    return table.assign(treat_all=net_benefit(labels, np.ones(len(rows)), thresholds, one)[0])
