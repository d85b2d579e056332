"""The rows whose risk is farthest from the outcome, by name."""

from __future__ import annotations

import pandas as pd

from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import percent

MAX_ERRORS = 10


def largest_errors(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None unless patients are listed."""
    if not evaluated.list_patients:
        return None
    rows, model = evaluated.rows, evaluated.model
    error = (rows["label"] - rows[model]).abs()
    worst = rows.loc[error.sort_values(ascending=False, kind="stable").index[:MAX_ERRORS]]
    outcome = worst["label"].map({1: "event", 0: "no event"})
    risk = worst[model].map(percent)
    cells = pd.DataFrame({"Id": worst["id"].astype(str), "Outcome": outcome, "Risk": risk})
    caption = "The risks that are farthest from what happened"
    return Topic("Largest errors", tables=[Cells(cells, caption)])
