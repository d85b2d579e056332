"""Simple models that every result stands beside: logistic regressions and boosted trees."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from lightgbm import LGBMClassifier
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.data.trajectories import Rows, TrajectoryDataset
from medgemma_clinical.evaluation.decision import DecisionRule, fit_decision_rule
from medgemma_clinical.evaluation.metrics import Array, log_odds
from medgemma_clinical.evaluation.simple_models import (
    WORD,
    Regression,
    Trees,
    Words,
    read_names,
    to_plain,
    word_table,
)

STAGE_NAMES = {
    "trajectory": "stage 1 (trajectory alone)",
    "classification": "stage 2 (classification)",
    "generative": "stage 3 (written reports)",
}
"""The model of each stage among other models."""

LOGISTIC, BOOSTING, BLEND = "logistic regression", "gradient boosting", "blend"
WITH_STATICS, STATICS_ALONE = " with statics", "statics alone"
WORDS = "words of the context"
ENSEMBLE = "ensemble"

STATISTICS = "first, last, lowest, highest and mean value, slope, count and span of each series"
MEANINGS = {
    "last value": "the last value of each series alone",
    "number of observations": "how often a patient was measured; where it does well, the measuring "
    "itself gives the outcome away",
    LOGISTIC: f"a weighted sum of {STATISTICS}",
    BOOSTING: f"decision trees on {STATISTICS}",
    BLEND: f"the mean log-odds of {LOGISTIC} and {BOOSTING}",
    STATICS_ALONE: "a logistic regression on static features, such as age, without any series",
    WORDS: "a logistic regression on which words a context holds, without its numbers",
    **{
        name + WITH_STATICS: f"{name} that also reads static features, such as age"
        for name in (LOGISTIC, BOOSTING, BLEND)
    },
    ENSEMBLE: "the mean log-odds of this model and of the blend with the most inputs",
}

FOLDS, MIN_TUNED = 5, 100
"""Folds in which settings are tuned, and the training patients with, and without, the event from
which on they are: with fewer a fold has too few events to tell settings apart."""

PENALTIES = {"logisticregression__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1]}

MIN_WORD_SHARE, MAX_WORDS = 0.01, 1_000
"""Share of the training contexts that must hold, and lack, a word that is read; the most words."""

SMALL_DATA = 10_000
"""Training rows up to which trees learn slowly: the library's rate overfits a few thousand
patients; 200 slow trees underfit more."""

Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Positions within the training part: to fit on, to score."""


@dataclass(frozen=True)
class Baselines:
    """Fitted baselines, which give the risks of any rows."""

    models: dict[str, Regression | Trees]
    words: Words | None
    inputs: dict[str, Any]  # what they read beside the series, as in ``Data.description``
    tuned: bool | None = None  # penalties and sizes, in folds; None in files that do not say it

    @property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The two models of each blend."""
        names = {BLEND + end: (LOGISTIC + end, BOOSTING + end) for end in ("", WITH_STATICS)}
        return {name: pair for name, pair in names.items() if {*pair} <= self.models.keys()}

    @property
    def names(self) -> list[str]:
        """The names of all baselines and blends, as ``risks`` gives them."""
        return [*self.models, *([WORDS] if self.words else []), *self.pairs]

    def risks(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> dict[str, Array]:
        """Return probabilities (n,) of baselines, then blends; NaN where the data lack columns."""
        table, risks = self._table(dataset).iloc[rows], {}
        for name, model in self.models.items():
            has_columns = {*model.columns} <= {*table.columns}
            risks[name] = model.risks(table) if has_columns else np.full(len(table), np.nan)
        if self.words:
            risks[WORDS] = self.words.risks(dataset.contexts[rows])
        return risks | {name: blend(risks[a], risks[b]) for name, (a, b) in self.pairs.items()}

    def _table(self, dataset: TrajectoryDataset) -> pd.DataFrame:
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
        models = {name: to_plain(model) for name, model in self.models.items()}
        words = self.words and to_plain(self.words)
        return json.dumps({**vars(self), "models": models, "words": words}) + "\n"

    @property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Check and return; see ``simple_models``."""
        content = json.loads(text)
        models: dict[str, Regression | Trees] = {
            name: (Trees if "text" in fitted else Regression).from_json(fitted)
            for name, fitted in content["models"].items()
        }
        words = content["words"] and Words.from_json(content["words"])
        static, time = read_names(content["inputs"]["static"]), content["inputs"]["prediction_time"]
        if (tuned := content.get("tuned")) not in (None, True, False):
            raise ValueError(f"tuned: {tuned!r}")
        return cls(models, words, {"static": static, "prediction_time": bool(time)}, tuned)


def fit_baselines(
    dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str]
) -> Baselines:
    """Fit the baselines on some rows; ``static`` names the features that these rows can teach."""
    labels, inputs = dataset.labels[train], dict(dataset.baseline_inputs())
    folds = tuning_folds(labels, dataset.groups[train])
    endings, statics = [""], dataset.static_table(static)
    if static:
        endings.append(WITH_STATICS)
        inputs[STATICS_ALONE] = statics
        inputs[LOGISTIC + WITH_STATICS] = inputs[LOGISTIC].join(statics)
    models: dict[str, Regression | Trees] = {}
    for name, table in inputs.items():
        fitted = _fit(tuned_regression(folds), table.to_numpy()[train], labels)
        models[name] = Regression.of(fitted, [*table.columns])
    for ending in endings:
        table = inputs[LOGISTIC + ending]
        fitted = _fit(tuned_trees(folds, len(train)), table.to_numpy()[train], labels)
        models[BOOSTING + ending] = Trees.of(fitted.booster_, [*table.columns])
    words = None
    if vocabulary := frequent_words(dataset.contexts[train]):
        seen = word_table(vocabulary, dataset.contexts[train])
        scaler, model = (x for _, x in _fit(tuned_words(folds), seen, labels).steps)
        words = Words(vocabulary, scaler.scale_, model.coef_[0], model.intercept_)
    read = {"static": [*static], "prediction_time": dataset.hours_read is not None}
    return Baselines(models, words, read, bool(folds))


def baseline_names(
    dataset: TrajectoryDataset, train: NDArray[np.int64], static: Sequence[str]
) -> list[str]:
    """Return the names of the baselines that ``fit_baselines`` fits, in no order."""
    names = [*dataset.baseline_inputs(), BOOSTING, BLEND]
    if static:
        names += [STATICS_ALONE, *(name + WITH_STATICS for name in (LOGISTIC, BOOSTING, BLEND))]
    return [*names, WORDS] if frequent_words(dataset.contexts[train]) else names


def _fit(model: Any, values: Any, labels: Array) -> Any:
    """Return the fitted model, of a search the best."""
    model.fit(values, labels)
    return getattr(model, "best_estimator_", model)


def tuning_folds(labels: Array, groups: NDArray[Any]) -> Folds:
    """Return folds of the training part, no patient on both sides; none with few patients."""
    if minority_patients(labels, groups) < MIN_TUNED:
        return []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(folds.split(labels, labels, groups))


def describe_tuning(tuned: Sequence[bool | None]) -> str:
    """Return whether the baselines of each of some models were tuned, in words."""
    if all(tuned):
        return f"tuned in {FOLDS} folds of the training part"
    of = f" of {len(tuned) - sum(map(bool, tuned))} of {len(tuned)} models" if any(tuned) else ""
    return (
        f"not tuned: fewer than {MIN_TUNED} patients of the training part{of} have, or lack, the "
        "event"
    )


def tuned_regression(folds: Folds) -> Any:
    """Return a logistic regression that chooses its penalty in the folds; without, a usual one."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    model = make_pipeline(imputer, StandardScaler(), LogisticRegression(max_iter=2000))
    return _tuned(model, PENALTIES, folds)


def frequent_words(contexts: NDArray[np.object_]) -> list[str]:
    """Return the words that are frequent in the training contexts, at most ``MAX_WORDS``."""
    counter = CountVectorizer(
        binary=True,
        min_df=MIN_WORD_SHARE,
        max_df=1 - MIN_WORD_SHARE,
        max_features=MAX_WORDS,
        token_pattern=WORD,
    )
    with contextlib.suppress(ValueError):  # no word, or none that is frequent
        return counter.fit(contexts).get_feature_names_out().tolist()
    return []


def tuned_words(folds: Folds) -> Any:
    """Return a regression on a sparse table of words; see ``tuned_regression``."""
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=2000))
    return _tuned(model, PENALTIES, folds)


def tuned_trees(folds: Folds, rows: int) -> Any:
    """Return boosted trees that choose their size in the folds; without, of 8 leaves."""
    model = LGBMClassifier(
        n_estimators=200,
        learning_rate=0.03 if rows <= SMALL_DATA else 0.1,
        num_leaves=8,
        min_child_samples=20,
        min_child_weight=1e-3,
        reg_lambda=1.0,
        deterministic=True,
        force_row_wise=True,
        n_jobs=1,
        random_state=0,
        verbose=-1,
    )
    return _tuned(model, {"num_leaves": [3, 8]}, folds)


def _tuned(model: Any, settings: dict[str, list[Any]], folds: Folds) -> Any:
    return GridSearchCV(model, settings, scoring="neg_log_loss", cv=folds) if folds else model


def blend(*risks: Array) -> Array:
    """Return the probabilities (n,) whose log-odds are the mean of those of several, (n,) each."""
    blended: Array = expit(np.mean([log_odds(risk) for risk in risks], axis=0))
    return blended


def model_risks(
    stage: str, risk: Array, baselines: Mapping[str, Array], rules: Mapping[str, DecisionRule]
) -> dict[str, Array]:
    """Return the probability (n,) of each model; ``rules`` recalibrate all but the stage."""
    risks = {stage: risk}
    for name, baseline_risk in baselines.items():
        risks[name] = rules[name].probability(log_odds(baseline_risk))
    if best := best_blend(baselines):
        risks[ENSEMBLE] = rules[ENSEMBLE].probability(log_odds(blend(risk, risks[best])))
    return risks


def fit_rules(
    labels: Array, stage: str, risk: Array, baselines: Mapping[str, Array], calibrate: str
) -> dict[str, DecisionRule]:
    """Fit the decision rule of each model beside the stage, on the validation part."""
    rules = {
        name: fit_decision_rule(labels, log_odds(baseline_risk), calibrate)
        for name, baseline_risk in baselines.items()
    }
    risks = model_risks(stage, risk, baselines, {**rules, ENSEMBLE: DecisionRule()})
    return {**rules, ENSEMBLE: fit_decision_rule(labels, log_odds(risks[ENSEMBLE]), calibrate)}


def best_blend(names: Collection[str]) -> str | None:
    """Return the blend among some models that reads the most; None where none is there."""
    return next((name for name in (BLEND + WITH_STATICS, BLEND) if name in names), None)
