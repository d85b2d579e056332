"""Simple models that every result stands beside: logistic regressions and boosted trees."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from medgemma_clinical.data.small_cells import rarer_patients
from medgemma_clinical.evaluation.calibration import log_odds

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

LOGISTIC, BOOSTING = "logistic regression", "gradient boosting"
BLEND = "blend"
"""The mean of the logits of logistic regression and boosted trees."""
WITH_FACTS = " with facts"
FACTS_ALONE = "facts alone"
COMBINED = "combined"
"""The mean of the logits of the model that is judged and of the blend that knows the most."""

MEANINGS = {
    "last value": "knows the last value of each series alone",
    "number of observations": (
        "knows only how often a patient was measured; where it does well, the measuring itself "
        "gives the outcome away"
    ),
    LOGISTIC: (
        "a weighted sum of the first, last, lowest, highest and mean value, slope, count and span "
        "of each series"
    ),
    BOOSTING: f"decision trees on the same summaries as {LOGISTIC}",
    BLEND: f"the mean of the log-odds of {LOGISTIC} and {BOOSTING}",
    **{
        model + WITH_FACTS: f"{model} that also reads the facts of a patient, such as age"
        for model in (LOGISTIC, BOOSTING)
    },
    BLEND + WITH_FACTS: (
        f"the mean of the log-odds of {LOGISTIC}{WITH_FACTS} and {BOOSTING}{WITH_FACTS}"
    ),
    FACTS_ALONE: "a logistic regression on the facts of a patient, such as age, without any series",
    COMBINED: "the mean of the log-odds of the model and of the blend that knows the most",
}
"""What the simple models are, for readers who are no statisticians."""
STAGE_1, STAGE_2 = "stage 1 (trajectory alone)", "stage 2 (classification)"
"""Earlier stages, which stand among the baselines of the stages that build on them."""

FOLDS = 5
FEWEST_TUNED = 100
"""Training patients with the event, and without it, from which on the settings are tuned: with
fewer a fold has too few events to tell settings apart."""

ROWS_A_THREAD = 10_000
"""Training rows from which on another thread speeds the trees up; on a busy machine threads that
wait for each other slow them down many times."""

Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Positions within the training part: to fit on, to score."""


def baseline_tables(
    dataset: TrajectoryDataset, train_rows: NDArray[np.int64]
) -> dict[str, pd.DataFrame]:
    """Return the inputs of each baseline by its name, N rows each.

    The tables of the data set, the patients' facts, each ``logistic regression`` also with them,
    and those tables again for boosted trees.

    Args:
        dataset: all rows.
        train_rows: positions of the training part, which decides on the facts.
    """
    tables = dict(dataset.baseline_inputs())
    facts = dataset.fact_table(dataset.choose_facts(train_rows))
    if not facts.empty:
        tables[FACTS_ALONE] = facts
        tables[LOGISTIC + WITH_FACTS] = tables[LOGISTIC].join(facts)
    logistic = {name: table for name, table in tables.items() if name.startswith(LOGISTIC)}
    return tables | {name.replace(LOGISTIC, BOOSTING): table for name, table in logistic.items()}


def describe_baselines(names: Collection[str]) -> dict[str, str]:
    """Return what the simple models among some names are; of a name not known nothing is said."""
    return {name: MEANINGS[name] for name in names if name in MEANINGS}


def fit_baselines(
    tables: dict[str, pd.DataFrame],
    labels: NDArray[np.float64],
    groups: NDArray[Any],
    split: dict[str, NDArray[np.int64]],
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Fit each baseline on the training part, and blend those on the same table.

    Args:
        tables: from ``baseline_tables``; a name that begins with ``gradient boosting`` gets boosted
            trees, each other one a logistic regression.
        labels: (N,) of 0 and 1.
        groups: (N,) patient of each row.
        split: positions of ``train``, ``val`` and ``test``.

    Returns:
        By name the probabilities (n,) of the rows of ``val`` and of ``test``.
    """
    train = split["train"]
    folds = draw_folds(labels[train], groups[train])
    result = {}
    for name, table in tables.items():
        if name.startswith(BOOSTING):
            # Trees cannot bin a column without any value.
            fitted_on = [train, *(train[rows] for rows, _ in folds)]
            known = np.all([table.iloc[rows].notna().any() for rows in fitted_on], axis=0)
            table = table[table.columns[known]]
            model = tuned_trees(folds)
        else:
            model = tuned_regression(folds)
        inputs = table.to_numpy()
        with threadpool_limits(min(openmp_threads(), 1 + len(train) // ROWS_A_THREAD), "openmp"):
            model.fit(inputs[train], labels[train])
        result[name] = {
            part: model.predict_proba(inputs[split[part]])[:, 1] for part in ("val", "test")
        }
    for name in [name for name in result if name.startswith(BOOSTING)]:
        pair = result[name], result[name.replace(BOOSTING, LOGISTIC)]
        blended = {part: blend_risks(*(risks[part] for risks in pair)) for part in ("val", "test")}
        result[name.replace(BOOSTING, BLEND)] = blended
    return result


def openmp_threads() -> int:
    """Return the threads that the trees may take, as the environment allows."""
    pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"]
    return max(pools, default=1)


def draw_folds(labels: NDArray[np.float64], groups: NDArray[Any]) -> Folds:
    """Return folds of the training part, no patient on both sides; none with few patients.

    Args:
        labels: (n,) of 0 and 1.
        groups: (n,) patient of each row.
    """
    if rarer_patients(labels, groups) < FEWEST_TUNED:
        return []
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(folds.split(labels, labels, groups))


def tuned_regression(folds: Folds) -> Any:
    """Return a logistic regression that chooses its penalty in the folds; without, a usual one."""
    model = make_pipeline(
        SimpleImputer(add_indicator=True, keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(max_iter=2000),
    )
    return _tuned(model, {"logisticregression__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1]}, folds)


def tuned_trees(folds: Folds) -> Any:
    """Return boosted trees that choose their size in the folds; without, of 8 leaves."""
    # Small trees, slowly: the library's defaults overfit a few thousand patients.
    model = HistGradientBoostingClassifier(
        learning_rate=0.03,
        max_iter=200,
        max_leaf_nodes=8,
        l2_regularization=1.0,
        random_state=0,
    )
    return _tuned(model, {"max_leaf_nodes": [3, 8]}, folds)


def _tuned(model: Any, settings: dict[str, list[Any]], folds: Folds) -> Any:
    if not folds:
        return model
    return GridSearchCV(model, settings, scoring="neg_log_loss", cv=folds)


def blend_risks(*risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probabilities (n,) whose logit is the mean of those of several, (n,) each."""
    blended: NDArray[np.float64] = expit(np.mean([log_odds(risk) for risk in risks], axis=0))
    return blended


def richest_blend(names: Collection[str]) -> str | None:
    """Return the blend among some models that knows the most; None where none is there."""
    return next((name for name in (BLEND + WITH_FACTS, BLEND) if name in names), None)
