"""Simple models that every result stands beside: logistic regressions and boosted trees."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.evaluation.metrics import Array, log_odds

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

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


def fit_baselines(
    dataset: TrajectoryDataset, split: dict[str, NDArray[np.int64]], static: Sequence[str]
) -> dict[str, dict[str, Array]]:
    """Fit the baselines on the training part; return probabilities (n,) of ``val`` and ``test``.

    ``static``: names of the static features that the training part can teach.
    """
    train, inputs = split["train"], dict(dataset.baseline_inputs())
    folds = draw_folds(dataset.labels[train], dataset.groups[train])
    endings, statics = [""], dataset.static_table(static)
    if static:
        endings.append(WITH_STATICS)
        inputs[STATICS_ALONE] = statics
        inputs[LOGISTIC + WITH_STATICS] = inputs[LOGISTIC].join(statics)
    models = {name: (tuned_regression(folds), table) for name, table in inputs.items()}
    for ending in endings:
        models[BOOSTING + ending] = tuned_trees(folds, len(train)), inputs[LOGISTIC + ending]
    fitted_on = [train, *(train[rows] for rows, _ in folds)]
    result = {}
    for name, (model, table) in models.items():
        if name.startswith(BOOSTING):  # trees cannot bin a column without any value
            known = np.all([table.iloc[rows].notna().any() for rows in fitted_on], axis=0)
            table = table[table.columns[known]]
        values = table.to_numpy()
        model.fit(values[train], dataset.labels[train])
        result[name] = {p: model.predict_proba(values[split[p]])[:, 1] for p in ("val", "test")}
    if (words := context_words(dataset.contexts, train)) is not None:
        model = tuned_words(folds).fit(words[train], dataset.labels[train])
        result[WORDS] = {p: model.predict_proba(words[split[p]])[:, 1] for p in ("val", "test")}
    for ending in endings:
        pair = result[LOGISTIC + ending], result[BOOSTING + ending]
        result[BLEND + ending] = {p: blend(*(each[p] for each in pair)) for p in pair[0]}
    return result


def draw_folds(labels: Array, groups: NDArray[Any]) -> Folds:
    """Return folds of the training part, no patient on both sides; none with few patients."""
    if minority_patients(labels, groups) < MIN_TUNED:
        return []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(folds.split(labels, labels, groups))


def tuned_regression(folds: Folds) -> Any:
    """Return a logistic regression that chooses its penalty in the folds; without, a usual one."""
    imputer = SimpleImputer(add_indicator=True, keep_empty_features=True)
    model = make_pipeline(imputer, StandardScaler(), LogisticRegression(max_iter=2000))
    return _tuned(model, PENALTIES, folds)


def context_words(contexts: NDArray[np.object_], train: NDArray[np.int64]) -> Any:
    """Return which frequent words of the training contexts each context holds, a sparse (N, words).

    None where the training part has no such word.
    """
    counter = CountVectorizer(
        binary=True,
        min_df=MIN_WORD_SHARE,
        max_df=1 - MIN_WORD_SHARE,
        max_features=MAX_WORDS,
        token_pattern=r"[^\W\d_]{2,}",
    )
    with contextlib.suppress(ValueError):  # no word, or none that is frequent
        return counter.fit(contexts[train]).transform(contexts).tocsr()
    return None


def tuned_words(folds: Folds) -> Any:
    """Return a regression on a sparse table of words; see ``tuned_regression``."""
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=2000))
    return _tuned(model, PENALTIES, folds)


def tuned_trees(folds: Folds, rows: int) -> Any:
    """Return boosted trees that choose their size in the folds; without, of 8 leaves."""
    model = HistGradientBoostingClassifier(
        learning_rate=0.03 if rows <= SMALL_DATA else 0.1,
        max_iter=200,
        max_leaf_nodes=8,
        l2_regularization=1.0,
        early_stopping=False,  # the library would hold out rows, not patients
        random_state=0,
    )
    return _tuned(model, {"max_leaf_nodes": [3, 8]}, folds)


def _tuned(model: Any, settings: dict[str, list[Any]], folds: Folds) -> Any:
    return GridSearchCV(model, settings, scoring="neg_log_loss", cv=folds) if folds else model


def blend(*risks: Array) -> Array:
    """Return the probabilities (n,) whose log-odds are the mean of those of several, (n,) each."""
    blended: Array = expit(np.mean([log_odds(risk) for risk in risks], axis=0))
    return blended


def best_blend(names: Collection[str]) -> str | None:
    """Return the blend among some models that reads the most; None where none is there."""
    return next((name for name in (BLEND + WITH_STATICS, BLEND) if name in names), None)
