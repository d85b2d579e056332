"""All metrics of several models on the same rows: one tidy table from one bootstrap of patients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest

from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.evaluation import metrics as of_risks
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, WITH_TEXT, best_blend
from medgemma_clinical.evaluation.decision import Recalibrated
from medgemma_clinical.evaluation.metrics import Array, bootstrap_weights
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.evaluation.time_metrics import MIN_AT_RISK

MODEL = "model_sha256"
"""Column of a file of predictions that names the model by its hash; see ``named_model``."""

COUNTS = ("n", "patients", "events", "minority_patients")
FOLD_MINORITY = "fold_minority_patients"
"""Counts of the rows, and of several splits the lowest of their ``minority_patients``; events and
minorities of further targets have their endings."""

ORDER = [
    *(*of_risks.RANKING, *of_risks.LEVEL, *of_risks.FITTED, *of_risks.DISTANCES, "ici_ideal"),
    *("net_benefit", *of_risks.SHARES, "effective_n", "weights_cut", "largest_weight"),
]
"""All metrics, as tables have them."""

VALUE = ["value", "low", "high"]
DIFFERENCE = ["difference", "difference_low", "difference_high"]
SPREAD = ["sd", "min", "max"]
"""Columns of the table; the last ones, over several splits, only where there are several."""

SHARED_TRAINING = 1.4
"""Multiple of Nadeau and Bengio's term by which models that learn from each other's test patients
widen an interval; ``tests/benchmarks/simulations.py`` chose it."""

ON_LOGIT = ("auroc", "auprc", "mean_risk", "sensitivity", "specificity", "ppv", "npv", "positives")
NOT_WIDENED = ("observed",)
"""Beginnings of the names of metrics that are widened on the logit scale, and of those that are no
result of a model."""

MAX_UNDEFINED = 0.05
"""Share of the draws in which a metric may be undefined; beyond it there is no interval."""

MINORITY_PATIENTS = 10
"""Patients with, and without, the event that a verdict and a subgroup's AUROC need."""

EXPECTED = "expected_"
"""Beginning of the names of metrics of a rule that was fitted on the rows themselves."""

NAMES = [*ORDER, *(f"{EXPECTED}{name}" for name in ORDER)]

Statistic = Callable[[Array], Any]
"""From weights (R, n) to values (R,) by any key, or to values (R, K) of K positions."""


def named_model(table: pd.DataFrame) -> tuple[pd.DataFrame, str | None]:
    """Return predictions without ``MODEL``, and the model that it names; None without one.

    Raises ValueError where rows are of several models.
    """
    if MODEL not in table:
        return table, None
    names = table[MODEL].unique()
    if len(names) > 1:
        raise ValueError("rows of several models")
    return table.drop(columns=MODEL), str(names[0]) if len(names) and names[0] else None


@dataclass(frozen=True)
class Metrics:
    """Metrics of the models on one part of the data, as in ``metrics.json``."""

    counts: dict[str, int]  # ``COUNTS``; minority: with the outcome that fewer patients have
    # Of splits also ``FOLD_MINORITY``, of further targets their events and minorities.
    # Index (model, metric); columns ``VALUE``, ``DIFFERENCE``, reference, of splits ``SPREAD``.
    # The difference is the model minus its reference, paired.
    table: pd.DataFrame
    primary: str | None  # the baseline that the first model is compared with, whatever its result
    planned: list[str]  # compared by a choice before the results; other models get no verdict
    widening: float = 1.0  # of the intervals, see ``widening_of``

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

    def at(self, target: Target) -> Self:
        """Return the metrics of one of several targets, under their own names."""
        end = target.metric_ending
        names = {
            f"{start}{name}{end}": f"{start}{name}" for start in ("", EXPECTED) for name in ORDER
        }
        is_own = self.table.index.get_level_values("metric").isin([*names])
        table = self.table[is_own].rename(index=names, level="metric")
        own = {name: self.counts.get(f"{name}{end}", count) for name, count in self.counts.items()}
        return replace(self, counts=own, table=table)

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
            "widening": self.widening,
            **defined.loc[first][VALUE + spread].to_dict("index"),
            "models": models,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read a part of ``metrics.json``; KeyError, TypeError or AttributeError if it is none."""
        plan = [content[name] for name in ("primary", "planned", "widening")]
        about = {"model", "primary", "planned", "widening"}
        first = {k: x for k, x in content.items() if isinstance(x, dict) and k != "models"}
        counts = {k: x for k, x in content.items() if not isinstance(x, dict) and k not in about}
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
        assert {*COUNTS} <= counts.keys()
        return cls(counts, table.astype(dict.fromkeys(numbers, float)), *plan)


def bootstrap(
    patients: NDArray[np.generic], seed: int, statistic: Statistic
) -> tuple[pd.Series[float], pd.DataFrame]:
    """Compute statistics on all rows (by key), and in each draw of patients (a column a key)."""
    chunks = [pd.DataFrame(statistic(w)) for w in bootstrap_weights(patients, seed)]
    value = pd.DataFrame(statistic(np.ones((1, len(patients))))).iloc[0]
    return value, pd.concat(chunks, ignore_index=True)


def with_interval(
    value: pd.Series[float],
    drawn: pd.DataFrame,
    behind: Mapping[Any, int] | None = None,
    widening: float = 1.0,
) -> pd.DataFrame:
    """Return value, low and high by key: the 95 % percentile interval of the draws, widened.

    Source: Efron and Tibshirani 1993, percentile method; Clopper and Pearson 1934.
    """
    drawn = drawn.where(np.isfinite(drawn))
    ends = drawn.quantile([0.025, 0.975]).T
    ends[drawn.isna().mean() > MAX_UNDEFINED] = np.nan
    ends = ends.set_axis(VALUE[1:], axis=1).reindex(value.index)
    ends[~np.isfinite(value)] = np.nan
    if widening > 1:
        ends = ends.apply(_widen, args=(value, widening))
    # The draws of a share of 0 or 1 do not vary: it gets the exact interval of its patients.
    for key, patients in (behind or {}).items():
        if value[key] in (0, 1):
            exact = binomtest(int(value[key]) * patients, patients).proportion_ci()
            ends.loc[key, VALUE[1:]] = exact.low, exact.high
    ends.insert(0, "value", value.where(np.isfinite(value)))
    return ends


def _widen(end: pd.Series[float], value: pd.Series[float], widening: float) -> pd.Series[float]:
    """Move an end of intervals away from the values, AUROC and shares on the logit scale."""
    names = end.index.get_level_values(-1).astype(str)
    moved = value + widening * (end - value)
    is_share = names.str.startswith(ON_LOGIT)
    moved[is_share] = moved[is_share].clip(0, 1)
    has_logit = is_share & end.between(0, 1, "neither") & value.between(0, 1, "neither")
    odds = logit(value[has_logit])
    moved[has_logit] = expit(odds + widening * (logit(end[has_logit]) - odds))
    return moved.where(~names.str.startswith(NOT_WIDENED), end)


def widening_of(
    patients: NDArray[np.generic], split: NDArray[np.generic] | None, trained: float | None = None
) -> float:
    """Return the factor by which intervals of results over several splits are widened.

    Draws of patients do not show that models which learn from each other's test patients err
    together. Repeats of the folds test no more patients, so they narrow no interval.

    Args:
        patients: (n,) patient of each row.
        split: (n,) split that tests the row; None: one model tests all, and nothing is widened.
        trained: patients that each model learned from; None: all that its split does not test.

    Source: Nadeau and Bengio 2003, "Inference for the generalization error", Machine Learning
    52:239.
    """
    if split is None:
        return 1.0
    everyone = len(np.unique(patients))
    tested = np.array([len(np.unique(patients[split == k])) for k in np.unique(split)])
    learned = trained or np.maximum(everyone - tested, 1)
    ratio = everyone * (tested / learned).sum() / tested.sum()
    return float(np.sqrt(1 + SHARED_TRAINING * ratio))


@dataclass(frozen=True)
class Drawn:
    """Metrics of several models on n rows by model and metric, also in draws of patients."""

    value: pd.Series[float]  # the reference's first
    draws: pd.DataFrame  # without the metrics that have no interval
    counts: dict[str, int]
    behind: dict[Any, int]  # patients in the denominators of shares
    of_parts: pd.DataFrame | None  # ``SPREAD`` over several splits
    widening: float
    seed: int  # of the draws


def mean_of_repeats(repeats: Sequence[Drawn]) -> Drawn:
    """Return the means over several predictions of the same rows, in the same draws of patients."""
    first, columns = repeats[0], repeats[0].draws.columns
    # Draws of another seed would be other patients, and their mean would vary less.
    assert all(repeat.seed == first.seed for repeat in repeats)
    values = pd.concat([repeat.value for repeat in repeats], axis=1)
    draws = mean_of_defined([repeat.draws[columns].to_numpy() for repeat in repeats])
    behind = {key: min(repeat.behind[key] for repeat in repeats) for key in first.behind}
    return replace(
        first,
        value=values.mean(axis=1),
        draws=pd.DataFrame(draws, columns=columns),
        behind=behind,
        of_parts=spread([{k: np.array([x]) for k, x in each.value.items()} for each in repeats]),
    )


def evaluate(
    rows: pd.DataFrame,  # of predictions: what happened, and the risks of each model
    seed: int,
    threshold: float | Sequence[float] | None = None,  # of each target; gives shares
    reference: str | None = None,  # by default the first model
    split: NDArray[np.generic] | None = None,  # (n,) K folds, over whose metrics means are taken
    primary: str | None = None,  # by default the regression with text, or the blend that reads most
    compared: Sequence[str] = (),  # planned comparisons beside stages and ensemble
    trained: float | None = None,  # patients that a model learned from: see ``widening_of``
    *,
    targets: Sequence[Target] = (LABEL,),
) -> Metrics:
    """Compute the metrics of all models on n rows, with intervals and paired differences."""
    options: dict[str, Any] = {"targets": targets, "reference": reference, "trained": trained}
    drawn = draw_metrics(rows, seed, threshold, split, **options)
    return compared_models(drawn, primary, compared)


def draw_metrics(
    rows: pd.DataFrame,
    seed: int,
    threshold: float | Sequence[float] | None = None,
    split: NDArray[np.generic] | None = None,
    *,
    targets: Sequence[Target] = (LABEL,),
    reference: str | None = None,
    trained: float | None = None,
    recalibrated: Mapping[str, Recalibrated] | None = None,  # of targets, by name
) -> Drawn:
    """Compute the metrics of all models on n rows and in draws of patients; see ``evaluate``.

    All metrics of the first model have intervals; those of others that need a fit have none.
    """
    models, patients = targets[0].models(rows), rows["patient"].to_numpy(str)
    first = reference or models[0]
    models = list(dict.fromkeys([first, *models]))
    parts: list[Any] = []
    if split is not None:
        parts = [np.flatnonzero(split == label) for label in np.unique(split)]
    thresholds = [] if threshold is None else np.atleast_1d(threshold).tolist()
    views = [
        _View(target, rows, models, at, (recalibrated or {}).get(target.name))
        for target, at in itertools.zip_longest(targets, thresholds)
    ]

    def statistic(draws: Array) -> dict[Any, Array]:
        values: dict[Any, Array] = {}
        for view in views:
            values |= view.ranking(draws, parts or [slice(None)]) | view.pooled(draws)
        return values

    # Patients are drawn once for all splits.
    value, drawn = bootstrap(patients, seed, statistic)
    behind: dict[Any, int] = {}
    for view in views:
        value = pd.concat([value, pd.Series(view.fixed(seed))])
        behind |= view.patients_behind(patients)
        if not view.is_measured:
            names = [view.target.key(name) for name in ORDER if name != "effective_n"]
            value[value.index.get_level_values(1).isin(names)] = np.nan
    counts = count_targets(targets, rows, patients, parts)
    order = [(model, view.target.key(x)) for model in models for view in views for x in NAMES]
    assert {*value.index} <= {*order}, "a metric that ``ORDER`` lacks"
    value = value[[key for key in order if key in value.index]]
    of_parts = None
    if split is not None:
        one = np.ones((1, len(rows)))
        of_parts = spread([_joined([view.ranking(one, [p]) for view in views]) for p in parts])
    widening = widening_of(patients, split, trained)
    return Drawn(value, drawn, counts, behind, of_parts, widening, seed)


def count_targets(
    targets: Sequence[Target],
    rows: pd.DataFrame,
    patients: NDArray[np.str_],
    parts: Sequence[NDArray[np.int64]],
) -> dict[str, int]:
    """Return ``count_parts`` of each target; rows and patients are the same for all."""
    counts: dict[str, int] = {}
    for target in targets:
        of_target = count_parts(target.labels(rows), patients, parts)
        if counts:
            del of_target["n"], of_target["patients"]
            of_target = {target.key(name): count for name, count in of_target.items()}
        counts |= of_target
    return counts


def _joined(parts: Sequence[Mapping[Any, Array]]) -> dict[Any, Array]:
    return {key: x for part in parts for key, x in part.items()}


class _View:
    """The risks of several models for one target, the first model in the centre."""

    def __init__(
        self,
        target: Target,
        rows: pd.DataFrame,
        models: Sequence[str],
        threshold: float | None,
        recalibrated: Recalibrated | None,
    ) -> None:
        self.target, self.rows, self.threshold = target, rows, threshold
        self.risks = {model: rows[target.column(model)].to_numpy(float) for model in models}
        self.first, self.risk = models[0], self.risks[models[0]]
        # The risks whose calibration is measured, and what moves them.
        self.before = self.risk if recalibrated is None else recalibrated.before
        self.moved = recalibrated if recalibrated and recalibrated.rule.is_moved else None
        self.known = target.known(rows)

    def of(self, model: str, values: Mapping[str, Any], start: str = "") -> dict[Any, Any]:
        """Return values under the names of their model and metric."""
        return {(model, self.target.key(f"{start}{name}")): x for name, x in values.items()}

    def ranking(self, draws: Array, parts: Sequence[Any]) -> dict[Any, Array]:
        """Return the mean over parts of what compares risks, (R,) each."""
        known = [self.target.known(self.rows, draws, part) for part in parts]
        values: dict[Any, Array] = {}
        for model, risk in self.risks.items():
            found = [x.ranking(risk[part]) for x, part in zip(known, parts, strict=True)]
            means = {name: mean_of_defined([x[name] for x in found]) for name in found[0]}
            values |= self.of(model, means)
        return values

    def pooled(self, draws: Array) -> dict[Any, Array]:
        """Return what all rows together tell, (R,) each."""
        known = self.target.known(self.rows, draws)
        values: dict[Any, Array] = {}
        for model, risk in self.risks.items():
            values |= self.of(model, known.level(risk))
        values |= self.of(self.first, known.calibration(self.before))
        if self.moved:
            values |= self.of(self.first, self.moved.expected(known), EXPECTED)
        if self.threshold is not None:
            benefit = known.net_benefit(self.risk, np.array([self.threshold]))[:, 0]
            shares = known.shares(self.risk >= self.threshold)
            values |= self.of(self.first, {"net_benefit": benefit} | shares)
        return values

    def fixed(self, seed: int) -> dict[Any, float]:
        """Return what has no interval: a distance grows by the noise of draws."""
        values: dict[Any, float] = {}
        for model, risk in self.risks.items():
            found = self.known.distances(self.before if model == self.first else risk)
            found |= {} if model == self.first else self.known.calibration(risk)
            values |= self.of(model, {name: x.item() for name, x in found.items()})
        ideal = self.known.ideal_distance(self.before, self.rows["patient"].to_numpy(str), seed)
        of_first = {"ici_ideal": ideal}
        if self.known.has_weights or self.target.ends:
            of_first["effective_n"] = self.known.effective_n
            of_first["weights_cut"] = self.known.cut
            of_first["largest_weight"] = self.known.largest_weight
        values |= self.of(self.first, of_first)
        if self.moved:
            distance = self.known.distances(self.moved.after)["ici"].item()
            values |= self.of(self.first, {"ici": distance}, EXPECTED)
        return values

    def patients_behind(self, patients: NDArray[np.generic]) -> dict[Any, int]:
        """Return the patients in the denominators of shares."""
        if self.threshold is None:
            return {}
        labels, positive = self.target.labels(self.rows), self.risk >= self.threshold
        return self.of(self.first, patients_behind_shares(labels, positive, patients))

    @property
    def is_measured(self) -> bool:
        """Whether the rows have an answer, and not by weights that few rows carry."""
        few = self.known.has_weights and self.known.effective_n < MIN_AT_RISK
        return not few and not self.target.problem(self.rows)


def compared_models(
    drawn: Drawn, primary: str | None = None, compared: Sequence[str] = ()
) -> Metrics:
    """Return the metrics of several models with intervals and paired differences to a reference.

    ``primary`` and ``compared`` name what was planned, as ``evaluate`` takes them.
    """
    value, draws = drawn.value, drawn.draws
    models = list(dict.fromkeys(value.index.get_level_values(0)))
    first, best = models[0], best_blend(models)
    references = dict.fromkeys(models, first)  # of the ensemble the best blend
    if ENSEMBLE in models[1:]:
        references[ENSEMBLE] = best or first
    table = with_interval(value, draws, drawn.behind, drawn.widening)
    keys = pd.MultiIndex.from_tuples([(references[model], name) for model, name in value.index])
    difference = value.to_numpy() - value.reindex(keys).to_numpy()
    own, beside = (draws.reindex(columns=index).to_numpy() for index in (value.index, keys))
    differences = pd.Series(difference), pd.DataFrame(own - beside)  # by number: no shares
    table[DIFFERENCE] = with_interval(*differences, widening=drawn.widening).to_numpy()
    table.loc[first, DIFFERENCE] = np.nan
    if drawn.of_parts is not None:
        table[SPREAD] = drawn.of_parts
    table["reference"] = [references[model] for model, _ in table.index]
    if primary not in models:  # a model that reads text is compared with one that does
        primary = WITH_TEXT if WITH_TEXT in models else best
    plan = {primary, ENSEMBLE, *STAGE_NAMES.values(), *compared}
    planned = [name for name in models if name in plan and name != first]
    table = table.rename_axis(["model", "metric"]).loc[models]
    return Metrics(drawn.counts, table, primary, planned, drawn.widening)


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


def patients_behind_shares(
    labels: Array, positive: NDArray[np.bool_], patients: NDArray[np.generic]
) -> dict[str, int]:
    """Return the patients in the denominator of each of ``confusion_shares``.

    Labels are NaN where unknown.
    """
    is_known = ~np.isnan(labels)
    among = {"sensitivity": labels == 1, "specificity": labels == 0, "ppv": positive & is_known}
    among |= {"npv": ~positive & is_known, "positives": np.ones_like(positive)}
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
    """Return the ``COUNTS`` of some rows, whose labels are NaN where unknown."""
    numbers = len(labels), len(np.unique(patients)), int(np.nansum(labels))
    return dict(zip(COUNTS, (*numbers, minority_patients(labels, patients)), strict=True))
