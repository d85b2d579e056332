"""Simple models that every result stands beside: logistic regressions and boosted trees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medgemma_clinical.data.small_cells import MIN_CELL, minority_patients
from medgemma_clinical.data.trajectories import Rows, TrajectoryDataset
from medgemma_clinical.evaluation.metrics import Array, log_odds, row_losses
from medgemma_clinical.evaluation.simple_models import (
    INTERVAL,
    Regression,
    Tree,
    Trees,
    from_plain,
    kept_text,
    read_numbers,
    to_plain,
)
from medgemma_clinical.evaluation.text_features import (
    TextModel,
    TextSettings,
    can_read_text,
    fit_text,
    kind_of,
    tune_text,
)
from medgemma_clinical.files import InputError

STAGE_NAMES = {
    "trajectory": "stage 1 (trajectory alone)",
    "classification": "stage 2 (classification)",
    "generative": "stage 3 (written reports)",
}
"""The model of each stage among other models."""

LOGISTIC, BOOSTING, BLEND = "logistic regression", "gradient boosting", "blend"
WITH_STATICS, STATICS_ALONE = " with statics", "statics alone"
WORDS, FROZEN, WITH_TEXT = "words of the context", "frozen text", "regression with text"
TEXT_ALONE = {"words": WORDS, "frozen": FROZEN}
"""The baseline of each kind of reading."""
NULL = "Aalen-Johansen"
ENSEMBLE = "ensemble"

STATISTICS = "first, last, lowest, highest and mean value, slope, count and span of each series"
FOLDS, MIN_TUNED = 5, 100
"""Folds in which settings are tuned, and the training patients with, and without, the event from
which on they are: with fewer a fold has too few events to tell settings apart."""

PENALTY = "logisticregression__C"
PENALTIES = {PENALTY: [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]}

BINARY = {"objective": "binary", "metric": "binary_logloss"}
TREES: dict[str, Any] = {
    "min_data_in_leaf": 20,
    "min_sum_hessian_in_leaf": 1e-3,
    "bagging_freq": 1,
    "lambda_l2": 10,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "seed": 0,
    "verbose": -1,
}
SIZES: list[dict[str, Any]] = [
    {"num_leaves": leaves, "feature_fraction": columns, "bagging_fraction": 0.7}
    for leaves in (4, 8)
    for columns in (0.3, 0.6)
]
FEWER_ROWS: dict[str, Any] = {"bagging_fraction": 0.4}
MAX_TREES, TREES_WITHOUT_GAIN = 500, 50
"""Settings of boosted trees, and what is chosen in the folds: leaves of a tree, the shares of the
columns and rows that a tree reads, and the number of trees, at most so many, of which the last so
many may be no better."""

USUAL_TREES: dict[str, Any] = {**SIZES[0], "trees": 150}
"""Where there are too few patients to choose."""

SMALL_DATA = 10_000
"""Training rows up to which trees learn slowly: few rows overfit, many need more trees."""

Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Positions within the training part: to fit on, to score."""


def meanings(*, of_times: bool) -> dict[str, str]:
    """Return what the models are whose names any run may have, of labels or of times."""
    mean, regression = "the mean log-odds of", "logistic"
    if of_times:
        mean, regression = "the mean hazards of", "Poisson"
    models = {
        LOGISTIC: f"a weighted sum of {STATISTICS}",
        BOOSTING: f"decision trees on {STATISTICS}",
        BLEND: f"{mean} {LOGISTIC} and {BOOSTING}",
    }
    with_statics = {
        name + WITH_STATICS: f"{name} that also reads static features, such as age"
        for name in models
    }
    return {
        "last value": "the last value of each series alone",
        "number of observations": "how often a patient was measured; where it does well, the "
        "measuring itself gives the outcome away",
        **models,
        STATICS_ALONE: f"a {regression} regression on static features, such as age, without any "
        "series",
        WORDS: f"a {regression} ridge regression on the words and pairs of words of a text, "
        "without its numbers",
        FROZEN: f"a {regression} ridge regression on what a language encoder, which is not "
        "trained, makes of a text",
        **with_statics,
        WITH_TEXT: f"{LOGISTIC} that also reads static features and what the text alone predicts",
        ENSEMBLE: f"{mean} this model and of the blend with the most inputs",
    }


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines, which predict any rows."""

    models: dict[str, Any]  # a ``Regression`` or ``Trees`` by name
    inputs: dict[str, Any]  # what they read beside the series, as in ``Data.description``
    tuned: bool | None = None  # penalties and sizes, in folds; None in files that do not say it
    leaf_patients: int = 0  # fewest training patients behind a leaf; 0: not counted
    null: Array | None = None  # (C, J) hazards of everyone; None of a label
    text: TextModel | None = None  # kept in a file of its own, as it holds patients' words

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The two models of each blend."""
        names = {BLEND + end: (LOGISTIC + end, BOOSTING + end) for end in ("", WITH_STATICS)}
        return {name: pair for name, pair in names.items() if {*pair} <= self.models.keys()}

    @property
    def names(self) -> list[str]:
        """The names of all baselines and blends, as ``forecasts`` gives them."""
        null = [] if self.null is None else [NULL]
        return [*null, *self.models, *text_names(self.text), *self.pairs]

    def risks(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> dict[str, Array]:
        """Return the probabilities (n,) of baselines, then blends; of times hazards (n, C, J).

        NaN where the data lack columns, which are there for some rows, or for none.
        """
        table = self.table(dataset).iloc[rows].assign(**{INTERVAL: 0.0})
        risks = {} if self.null is None else {NULL: np.tile(self.null, (len(table), 1, 1))}
        for name, model in self.models.items():
            missing = {*model.columns} - {*table.columns}
            risk = model.risks(table.reindex(columns=[*table, *missing]))
            risks[name] = np.full_like(risk, np.nan) if missing else risk
        if self.text:
            numbers = self.text.numbers(dataset, rows)
            alone, *beside = text_names(self.text)
            risks[alone] = self.text.risks(numbers)
            risks |= {name: self.text.risks_beside(table, numbers) for name in beside}
        blended = blend if self.null is None else blend_hazards
        return risks | {name: blended(risks[a], risks[b]) for name, (a, b) in self.pairs.items()}

    def forecasts(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> dict[str, Array]:
        """Return ``risks`` as the model's outcome combines them: of a label log-odds (n,)."""
        risks = self.risks(dataset, rows)
        if self.null is not None:
            return risks
        return {name: log_odds(risk) for name, risk in risks.items()}

    def table(self, dataset: TrajectoryDataset) -> pd.DataFrame:
        """Return all columns that baselines may read, N rows, whatever the stage reads."""
        reads_time = self.inputs["prediction_time"] and dataset.prediction_hours is not None
        selected = dataset.with_inputs((), prediction_time=reads_time)
        static = [name for name in self.inputs["static"] if name in selected.static_names]
        table = pd.concat(
            [*selected.baseline_inputs().values(), selected.static_table(static)], axis=1
        )
        return table.loc[:, ~table.columns.duplicated()]

    def to_json(self) -> str:
        """Return the text of the file, in which each number is exact."""
        content: dict[str, Any] = {**vars(self)}
        del content["text"]
        content["models"] = {name: to_plain(model) for name, model in self.models.items()}
        if self.null is None:
            del content["null"]
        return json.dumps(content, default=np.ndarray.tolist) + "\n"

    @property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` has written."""
        content: dict[str, Any] = json.loads(text)
        content["models"] = {name: from_plain(x) for name, x in content["models"].items()}
        if "null" in content:
            content["null"] = read_numbers(content["null"])
        return cls(**content)


@dataclass(frozen=True)
class Settings:
    """What was chosen on the training part, before any model is fitted on all rows that may be."""

    static: list[str]  # features that these rows can teach
    penalties: dict[str, float]  # of the regressions, by name; empty: not tuned
    trees: dict[str, Any]  # of all boosted trees
    text: TextSettings | None = None  # None: no text is read


@dataclass(frozen=True)
class LabelFits:
    """How baselines are fitted to labels."""

    null: ClassVar[Array | None] = None
    labels: Array  # (n,)
    patients: NDArray[Any]  # (n,)

    def of(self, rows: NDArray[np.int64]) -> LabelFits:
        """Return those of some rows."""
        return LabelFits(self.labels[rows], self.patients[rows])

    def fit_text(self, table: Any, penalty: float) -> tuple[Array, Array]:
        """Return the coefficients (1, W) and the level (1, 1) of a ridge regression on texts."""
        model = LogisticRegression(C=penalty, max_iter=2000).fit(table, self.labels)
        return model.coef_, model.intercept_[:, None]

    def text_loss(self, numbers: Array, level: Array) -> float:
        """Return the log loss, a sum, of what texts add (n, 1) to a level (1, 1)."""
        return float(row_losses(self.labels, (numbers + level)[:, 0]).sum())

    def tune_trees(self, values: Array, folds: Folds) -> dict[str, Any]:
        """Return the settings whose log loss in the folds is the lowest."""
        return tuned_trees(values, self.labels, folds)

    def tune_penalty(self, values: Array, folds: Folds) -> float:
        """Return the penalty whose log loss in the folds is the lowest."""
        return tuned_penalty(regression(), values, self.labels, folds)

    def fit_trees(
        self, values: Array, settings: Mapping[str, Any], columns: list[str]
    ) -> tuple[Trees, int]:
        """Return boosted trees, and the fewest patients behind a leaf: ``MIN_CELL`` if possible."""
        patients = pd.factorize(self.patients)[0]
        min_rows = TREES["min_data_in_leaf"]
        while True:
            size = {**settings, "min_data_in_leaf": min_rows}
            fitted = Trees(columns, kept_text(fit_trees(values, self.labels, size)))
            fewest = min(leaf_patients(tree, values, patients) for tree in fitted.forests[0])
            if fewest >= MIN_CELL or min_rows > len(values):
                return fitted, fewest
            min_rows *= 2

    def fit_regression(
        self, values: Array, penalty: float | None, columns: list[str]
    ) -> Regression:
        """Return a logistic regression."""
        return Regression.of(regression(penalty).fit(values, self.labels), columns)


def leaf_patients(tree: Tree, values: Array, patients: NDArray[np.int64]) -> int:
    """Return the fewest of patients (N,), numbers from 0, behind a leaf of a tree."""
    is_there = np.zeros((len(tree.leaf), patients.max() + 1), dtype=bool)
    is_there[tree.leaves(values), patients] = True
    return int(is_there.sum(axis=1).min())


def label_fits(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> LabelFits:
    """Return how baselines are fitted to the labels of some rows."""
    return LabelFits(dataset.labels[rows], dataset.groups[rows])


def tune_baselines(
    dataset: TrajectoryDataset,
    train: NDArray[np.int64],
    static: Sequence[str],
    fits: Any = None,  # of the same rows, by default to their labels
    *,
    text: TextSettings | None = None,  # of ``text_settings``, where something reads text
) -> Settings:
    """Choose the settings of the baselines in folds of some rows, where these are enough."""
    fits = fits or label_fits(dataset, train)
    folds = tuning_folds(dataset.labels[train], dataset.groups[train])
    tables = {
        name: table.to_numpy()[train] for name, table in baseline_tables(dataset, static).items()
    }
    boosted = [name for name in tables if name.startswith(BOOSTING)]
    trees = fits.tune_trees(tables[boosted[-1]], folds)  # by the table with the most columns
    penalties: dict[str, float] = {}
    if folds:
        for name in tables.keys() - boosted:
            penalties[name] = fits.tune_penalty(tables[name], folds)
    text = text or tune_text(dataset, train, fits, folds, None)
    return Settings([*static], penalties, trees, text)


def text_settings(
    dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str], fits: Any
) -> TextSettings | None:
    """Choose the settings of regressions on texts, also of the one with other columns."""
    folds = tuning_folds(dataset.labels[train], dataset.groups[train])
    return tune_text(dataset, train, fits, folds, beside_text(dataset, static))


def fit_baselines(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    settings: Settings,
    fits: Any = None,  # of the same rows, by default to their labels
    text: TextModel | None = None,  # of the same rows, where it is fitted already
) -> Baselines:
    """Fit the baselines on some rows."""
    fits = fits or label_fits(dataset, rows)
    models: dict[str, Any] = {}
    fewest = []
    for name, table in baseline_tables(dataset, settings.static).items():
        values, columns = table.to_numpy()[rows], [*table.columns]
        if name.startswith(BOOSTING):
            models[name], patients = fits.fit_trees(values, settings.trees, columns)
            fewest.append(patients)
        else:
            models[name] = fits.fit_regression(values, settings.penalties.get(name), columns)
    inputs = {"static": settings.static, "prediction_time": dataset.hours_read is not None}
    if text is None and settings.text is not None:
        text = fit_text(dataset, rows, fits, settings.text, beside_text(dataset, settings.static))
    tuned = bool(settings.penalties)
    return Baselines(models, inputs, tuned, min(fewest), fits.null, text)


def beside_text(dataset: TrajectoryDataset, static: Sequence[str]) -> pd.DataFrame:
    """Return the columns (N rows) that the regression with text reads beside the text."""
    tables = baseline_tables(dataset, static)
    return tables[LOGISTIC + (WITH_STATICS if static else "")]


def text_names(text: TextModel | None) -> list[str]:
    """Return the names of the baselines that read a text."""
    if text is None:
        return []
    return [TEXT_ALONE[text.reading.kind], *([WITH_TEXT] if text.beside else [])]


def baseline_tables(dataset: TrajectoryDataset, static: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the table (N rows) of each baseline but those of text and the blends."""
    inputs, statics = {**dataset.baseline_inputs()}, dataset.static_table(static)
    if static:
        inputs[STATICS_ALONE] = statics
        inputs[LOGISTIC + WITH_STATICS] = inputs[LOGISTIC].join(statics)
    endings = ("", WITH_STATICS) if static else ("",)
    return inputs | {BOOSTING + ending: inputs[LOGISTIC + ending] for ending in endings}


def baseline_names(
    dataset: TrajectoryDataset,
    train: NDArray[np.int64],
    static: Sequence[str],
    fits: Any,
    *,
    with_text: bool = False,
) -> list[str]:
    """Return the names of the baselines that ``fit_baselines`` fits, where it can; in no order."""
    load_lightgbm()
    names = [*baseline_tables(dataset, static), BLEND]
    if static:
        names.append(BLEND + WITH_STATICS)
    if fits.null is not None:
        names.append(NULL)
    if can_read_text(dataset, train):
        names.append(TEXT_ALONE[kind_of(dataset)])
        names += [WITH_TEXT] if with_text else []
    return names


def tuning_folds(labels: Array, groups: NDArray[Any]) -> Folds:
    """Return folds of the training part, no patient on both sides; none with few patients."""
    if minority_patients(labels, groups) < MIN_TUNED:
        return []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(folds.split(labels, labels, groups))


def describe_tuning(tuned: Sequence[bool | None]) -> str:
    """Return whether the baselines of each of some models were tuned, in words."""
    fitted = "fitted on training and validation part; for the validation part on the first alone"
    if all(tuned):
        return f"tuned in {FOLDS} folds of the training part, then {fitted}"
    of = f" of {len(tuned) - sum(map(bool, tuned))} of {len(tuned)} models" if any(tuned) else ""
    return (
        f"not tuned: fewer than {MIN_TUNED} patients of the training part{of} have, or lack, the "
        f"event; {fitted}"
    )


def regression(penalty: float | None = None) -> Any:
    """Return a logistic regression that fills in and marks unknown values."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    model = LogisticRegression(C=penalty or 1.0, max_iter=2000)
    return make_pipeline(imputer, StandardScaler(), model)


def tuned_penalty(model: Any, values: Any, labels: Array, folds: Folds) -> float:
    """Return the penalty whose log loss in the folds is the lowest."""
    search = GridSearchCV(model, PENALTIES, scoring="neg_log_loss", cv=folds, refit=False)
    return float(search.fit(values, labels).best_params_[PENALTY])


def load_lightgbm() -> Any:
    """Return LightGBM; refuse a machine that lacks its OpenMP, as a Mac does."""
    try:
        import lightgbm  # only to fit trees: kept ones need nothing of it
    except OSError as error:
        advice = "install libomp (brew install libomp; on Linux libgomp1)"
        raise InputError(f"lightgbm cannot be loaded: {advice}") from error
    return lightgbm


def tuned_trees(
    values: Array,
    labels: Array,
    folds: Folds,
    weights: Array | None = None,
    objective: Mapping[str, Any] = BINARY,
    given: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the settings of boosted trees whose loss in the folds is the lowest.

    ``given`` are sizes to be tried in place of all.

    Source: Friedman 2002, "Stochastic gradient boosting"; Ke et al. 2017, "LightGBM".
    """
    rate = {"learning_rate": 0.03 if len(labels) <= SMALL_DATA else 0.1}
    if not folds:
        return {**rate, **USUAL_TREES}
    lightgbm = load_lightgbm()

    def lowest_loss(size: dict[str, Any]) -> tuple[float, int]:
        table = lightgbm.Dataset(values, labels, weight=weights, free_raw_data=False)
        stop = lightgbm.early_stopping(TREES_WITHOUT_GAIN, verbose=False)
        settings = {**TREES, **objective, **rate, **size}
        curves: Any = lightgbm.cv(settings, table, MAX_TREES, folds=folds, callbacks=[stop])
        losses: list[float] = curves[f"valid {objective['metric']}-mean"]
        return min(losses), int(np.argmin(losses)) + 1

    sizes = [*(given or SIZES)]
    results = [lowest_loss(size) for size in sizes]
    if given is None:
        sizes.append({**sizes[results.index(min(results))], **FEWER_ROWS})
        results.append(lowest_loss(sizes[-1]))
    best = results.index(min(results))
    return {**rate, **sizes[best], "trees": results[best][1]}


def fit_trees(
    values: Array,
    labels: Array,
    settings: Mapping[str, Any],
    weights: Array | None = None,
    objective: Mapping[str, Any] = BINARY,
) -> Any:
    """Return a ``lightgbm.Booster`` of given settings, fitted."""
    lightgbm, size = load_lightgbm(), {k: x for k, x in settings.items() if k != "trees"}
    table = lightgbm.Dataset(values, labels, weight=weights)
    return lightgbm.train({**TREES, **objective, **size}, table, settings["trees"])


def blend(*risks: Array) -> Array:
    """Return the probabilities (n,) whose log-odds are the mean of those of several, (n,) each."""
    blended: Array = expit(np.mean([log_odds(risk) for risk in risks], axis=0))
    return blended


def blend_hazards(*hazards: Array) -> Array:
    """Return the mean hazards of several models, (n, C, J) each."""
    # The mean of logarithms is lower, and so would be the risks.
    blended: Array = np.mean(hazards, axis=0)
    return blended


def best_blend(names: Collection[str]) -> str | None:
    """Return the blend among some models that reads the most; None where none is there."""
    return next((name for name in (BLEND + WITH_STATICS, BLEND) if name in names), None)
