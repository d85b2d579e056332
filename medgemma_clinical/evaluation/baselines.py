"""Simple models that every result stands beside: logistic regressions and boosted trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset

LOGISTIC, BOOSTING = "logistic regression", "gradient boosting"


def baseline_tables(
    dataset: TrajectoryDataset, train_rows: NDArray[np.int64], fewest: int
) -> dict[str, pd.DataFrame]:
    """Return the inputs of each baseline by its name, N rows each.

    The tables of the data set, each ``logistic regression`` also with the numbers and words of the
    contexts, and those tables again for boosted trees.

    Args:
        dataset: all rows.
        train_rows: positions of the training part, which decides what a context contributes.
        fewest: patients there who must have a word or number of a context.
    """
    tables = dict(dataset.baseline_inputs())
    facts = dataset.fact_table(dataset.choose_facts(train_rows, fewest))
    if not facts.empty:
        tables[f"{LOGISTIC} with facts"] = tables[LOGISTIC].join(facts)
    logistic = {name: table for name, table in tables.items() if name.startswith(LOGISTIC)}
    return tables | {name.replace(LOGISTIC, BOOSTING): table for name, table in logistic.items()}


def fit_baselines(
    tables: dict[str, pd.DataFrame],
    labels: NDArray[np.float64],
    split: dict[str, NDArray[np.int64]],
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Fit each baseline on the training part, with the usual settings.

    Args:
        tables: from ``baseline_tables``; a name that begins with ``gradient boosting`` gets boosted
            trees, each other one a logistic regression.
        labels: (N,) of 0 and 1.
        split: positions of ``train``, ``val`` and ``test``.

    Returns:
        By name the probabilities (n,) of the rows of ``val`` and of ``test``.
    """
    train = split["train"]
    result = {}
    for name, table in tables.items():
        if name.startswith(BOOSTING):
            # Small trees, slowly: the library's defaults overfit a few thousand patients.
            model: Any = HistGradientBoostingClassifier(
                learning_rate=0.03,
                max_iter=200,
                max_leaf_nodes=8,
                l2_regularization=1.0,
                random_state=0,
            )
            table = table.loc[:, table.iloc[train].notna().any()]  # it cannot bin empty columns
        else:
            model = make_pipeline(
                SimpleImputer(add_indicator=True, keep_empty_features=True),
                StandardScaler(),
                LogisticRegression(max_iter=2000),
            )
        inputs = table.to_numpy()
        model.fit(inputs[train], labels[train])
        result[name] = {
            part: model.predict_proba(inputs[split[part]])[:, 1] for part in ("val", "test")
        }
    return result
