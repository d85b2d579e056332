"""All metrics of several models on the same rows: one tidy table from one bootstrap of patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, best_blend
from medgemma_clinical.evaluation.metrics import (
    Array,
    bootstrap_weights,
    calibration,
    calibration_error,
    confusion_shares,
    metrics,
)

TESTED = ["id", "label", "patient"]
"""Columns of a table of predictions that say what was predicted; each other one is a model."""

COUNTS = ("n", "patients", "events", "minority_patients")
FOLD_MINORITY = "fold_minority_patients"
"""Counts of the rows, and of several splits the lowest of their ``minority_patients``."""

VALUE = ["value", "low", "high"]
DIFFERENCE = ["difference", "difference_low", "difference_high"]
SPREAD = ["sd", "min", "max"]
"""Columns of the table; the last ones, over several splits, only where there are several."""

MAX_UNDEFINED = 0.05
"""Share of the draws in which a metric may be undefined; beyond it there is no interval."""

MINORITY_PATIENTS = 10
"""Patients with, and without, the event that a verdict and a subgroup's AUROC need."""

Statistic = Callable[[Array], Any]
"""From weights (R, n) to values (R,) by any key, or to values (R, K) of K positions."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of the models on one part of the data, as in ``metrics.json``."""

    counts: dict[str, int]  # ``COUNTS``; minority: with the outcome that fewer patients have
    # Of splits also ``FOLD_MINORITY``.
    # Index (model, metric); columns ``VALUE``, ``DIFFERENCE``, reference, of splits ``SPREAD``.
    # The difference is the model minus its reference, paired.
    table: pd.DataFrame
    primary: str | None  # the baseline that the first model is compared with, whatever its result
    planned: list[str]  # compared by a choice before the results; other models get no verdict

    @property
    def models(self) -> list[str]:
        """The models; the first one is the reference of all but the ensemble."""
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
        spread = [name for name in SPREAD if name in self.table]
        defined: Any = self.table.astype(object).where(self.table.notna(), None)
        first, *others = self.models
        models = {}
        for model in others:
            rows = defined.loc[model]
            numbers = rows[VALUE + DIFFERENCE + spread].to_dict("index")
            models[model] = {"reference": rows["reference"].iloc[0], **numbers}
        return {
            **self.counts,
            "model": first,
            "primary": self.primary,
            "planned": self.planned,
            **defined.loc[first][VALUE + spread].to_dict("index"),
            "models": models,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read a part of ``metrics.json``; KeyError, TypeError or AttributeError if it is none."""
        not_metrics = (*COUNTS, FOLD_MINORITY, "model", "primary", "planned", "models")
        first = {name: metric for name, metric in content.items() if name not in not_metrics}
        models = {
            content["model"]: {"reference": content["model"], **first},
            **content["models"],
        }
        lines = {
            (model, name): {**metric, "reference": numbers["reference"]}
            for model, numbers in models.items()
            for name, metric in numbers.items()
            if name != "reference"
        }
        index = pd.MultiIndex.from_tuples(lines, names=["model", "metric"])
        table = pd.DataFrame(list(lines.values()), index)
        numbers = [*VALUE, *DIFFERENCE, *(name for name in SPREAD if name in table)]
        table = table.reindex(columns=[*numbers, "reference"])
        counts = {name: content[name] for name in COUNTS}
        counts |= {name: content[name] for name in (FOLD_MINORITY,) if name in content}
        table = table.astype(dict.fromkeys(numbers, float))
        # Runs of earlier versions did not name what was planned.
        return cls(counts, table, content.get("primary"), content.get("planned", []))


def bootstrap(
    labels: Array, patients: NDArray[np.generic], seed: int, statistic: Statistic
) -> tuple[pd.Series[float], pd.DataFrame]:
    """Compute statistics on all rows (by key), and in each draw of patients (a column a key)."""
    chunks = [pd.DataFrame(statistic(w)) for w in bootstrap_weights(labels, patients, seed)]
    value = pd.DataFrame(statistic(np.ones((1, len(labels))))).iloc[0]
    return value, pd.concat(chunks, ignore_index=True)


def with_interval(
    value: pd.Series[float], drawn: pd.DataFrame, behind: Mapping[Any, int] | None = None
) -> pd.DataFrame:
    """Return value, low and high by key: the 95 % percentile interval of the draws.

    Source: Efron and Tibshirani 1993, percentile method; Clopper and Pearson 1934.
    """
    drawn = drawn.where(np.isfinite(drawn))
    ends = drawn.quantile([0.025, 0.975]).T
    ends.columns = pd.Index(VALUE[1:])
    ends[(drawn.isna().mean() > MAX_UNDEFINED) | ~np.isfinite(value)] = np.nan
    # The draws of a share of 0 or 1 do not vary: it gets the exact interval of its patients.
    for key, patients in (behind or {}).items():
        if value[key] in (0, 1):
            exact = binomtest(int(value[key]) * patients, patients).proportion_ci()
            ends.loc[key, VALUE[1:]] = exact.low, exact.high
    ends.insert(0, "value", value.where(np.isfinite(value)))
    return ends


def evaluate(
    rows: pd.DataFrame,  # ``TESTED``, then the risk of each model
    seed: int,
    threshold: float | Array | None = None,  # (n,) of several rules; gives calibration and shares
    reference: str | None = None,  # by default the first model
    split: NDArray[np.generic] | None = None,  # (n,); metrics are means over the splits
    primary: str | None = None,  # by default the blend that reads most
    compared: Sequence[str] = (),  # planned comparisons beside stages and ensemble
) -> Metrics:
    """Compute the metrics of all models on n rows, with intervals and paired differences."""
    risks = {str(name): rows[name].to_numpy(float) for name in rows.columns.drop(TESTED)}
    first = reference or next(iter(risks))
    risks = {first: risks[first], **risks}
    labels, risk, patients = label_risk_patient(rows, first)
    parts = [np.arange(len(rows))]
    if split is not None:
        parts = [np.flatnonzero(split == label) for label in np.unique(split)]
    positive = None if threshold is None else risk >= threshold

    def statistic(weights: Array) -> dict[Any, Array]:
        by_part = [_metrics_of_all(labels, risks, weights, part) for part in parts]
        values_by_key = {
            key: mean_of_defined([part[key] for part in by_part]) for key in by_part[0]
        }
        if positive is not None:
            of_first = calibration(labels, risk, weights)
            of_first |= confusion_shares(labels, positive, weights)
            values_by_key |= {(first, name): values for name, values in of_first.items()}
        return values_by_key

    # Patients are drawn once for all splits.
    value, drawn = bootstrap(labels, patients, seed, statistic)
    behind = {} if positive is None else patients_behind_shares(labels, positive, patients)
    table = with_interval(value, drawn, {(first, name): n for name, n in behind.items()})
    of_parts = None
    if split is not None:
        one = np.ones((1, len(rows)))
        of_parts = spread([_metrics_of_all(labels, risks, one, part) for part in parts])
    if positive is not None:  # A distance grows by the noise of the draws: it has no interval.
        for name, distance in calibration_error(labels, risk).items():
            table.loc[(first, name), "value"] = distance
    counts = count_parts(labels, patients, parts)
    return compared_models(table, value, drawn, [*risks], counts, of_parts, primary, compared)


def compared_models(
    table: pd.DataFrame,  # ``VALUE`` by model and metric
    value: pd.Series[float],
    drawn: pd.DataFrame,  # of ``bootstrap``, as ``value``
    models: Sequence[str],  # the first is the reference
    counts: dict[str, int],
    of_parts: pd.DataFrame | None = None,  # ``SPREAD`` over several splits
    primary: str | None = None,
    compared: Sequence[str] = (),
) -> Metrics:
    """Add paired differences to the metrics of several models, and say which were planned."""
    first, best = models[0], best_blend(models)
    references = dict.fromkeys(models, first)  # of the ensemble the best blend
    if ENSEMBLE in models[1:]:
        references[ENSEMBLE] = best or first
    keys = pd.MultiIndex.from_tuples([(references[model], name) for model, name in value.index])
    beside = value.index.get_indexer(keys)
    differences = value - value.to_numpy()[beside], drawn - drawn.to_numpy()[:, beside]
    table[DIFFERENCE] = with_interval(*differences)
    table.loc[first, DIFFERENCE] = np.nan
    if of_parts is not None:
        table[SPREAD] = of_parts
    table["reference"] = [references[model] for model, _ in table.index]
    primary = primary if primary in models else best
    plan = {primary, ENSEMBLE, *STAGE_NAMES.values(), *compared}
    planned = [name for name in models if name in plan and name != first]
    table = table.rename_axis(["model", "metric"]).loc[list(models)]
    return Metrics(counts, table, primary, planned)


def spread(parts: Sequence[Mapping[Any, Array]]) -> pd.DataFrame:
    """Return standard deviation, lowest and highest of each metric over several parts."""
    lines = pd.concat(map(pd.DataFrame, parts))
    return lines.where(np.isfinite(lines)).agg(["std", "min", "max"]).T


def mean_of_defined(values: Sequence[Array]) -> Array:
    """Return the mean (R,) of those of several arrays (R,) that are finite; NaN where none is."""
    is_finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(is_finite, values, 0).sum(axis=0) / is_finite.sum(axis=0)
    return mean


def label_risk_patient(rows: pd.DataFrame, model: str) -> tuple[Array, Array, NDArray[np.str_]]:
    """Return labels, the risk of a model, and patients, (n,) each."""
    labels, risk = rows["label"].to_numpy(float), rows[model].to_numpy(float)
    return labels, risk, rows["patient"].to_numpy(str)


def _metrics_of_all(
    labels: Array, risks: Mapping[str, Array], weights: Array, part: NDArray[np.intp]
) -> dict[tuple[str, str], Array]:
    """Return the metrics (R,) of all models on some rows, by model and metric."""
    return {
        (model, name): values
        for model, risk in risks.items()
        for name, values in metrics(labels[part], risk[part], weights[:, part]).items()
    }


def patients_behind_shares(
    labels: Array, positive: NDArray[np.bool_], patients: NDArray[np.generic]
) -> dict[str, int]:
    """Return the patients in the denominator of each of ``confusion_shares``."""
    among = {"sensitivity": labels == 1, "specificity": labels == 0, "ppv": positive}
    among |= {"npv": ~positive, "positives": np.ones_like(positive)}
    return {name: count_patients(patients, is_member) for name, is_member in among.items()}


def evaluate_splits(
    tables: Sequence[pd.DataFrame], seed: int, reference: str | None = None, **plan: Any
) -> Metrics:
    """Compute the metrics of the same models on the test parts of several splits."""
    split = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return evaluate(pd.concat(tables), seed, reference=reference, split=split, **plan)


def count_parts(
    labels: Array, patients: NDArray[np.generic], parts: Sequence[NDArray[np.intp]]
) -> dict[str, int]:
    """Return the ``COUNTS`` of all rows, of several parts also ``FOLD_MINORITY``."""
    counts = count(labels, patients)
    if len(parts) > 1:
        counts[FOLD_MINORITY] = min(minority_patients(labels[p], patients[p]) for p in parts)
    return counts


def count(labels: Array, patients: NDArray[np.generic]) -> dict[str, int]:
    """Return the ``COUNTS`` of some rows."""
    numbers = len(labels), len(np.unique(patients)), int(labels.sum())
    return dict(zip(COUNTS, (*numbers, minority_patients(labels, patients)), strict=True))
