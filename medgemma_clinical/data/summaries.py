"""Series and contexts as tables of numbers: the inputs of the simple models beside the encoder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.texts import NUMBER

CONTEXT_NUMBER = re.compile(
    rf"(?:(?<![^\W\d_])([^\W\d_]++)[ :=]++)?({NUMBER})(?:[ -]?([^\W\d_]+|%))?"
)
"""A number in a context with the word before or behind it. A word is tried from its first letter
alone: from each letter on, a long word would take the square of its length."""

NUMBER_ENDING = " (number)"
"""Ending of the column of a context's number; columns of words have none."""

RAREST_FACT = 0.01
"""Share of the training contexts that must hold a word or number for it to become a column."""


def summary_features(
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    lengths: NDArray[np.int64],
    features: Sequence[str],
) -> pd.DataFrame:
    """Return statistics of each series.

    Args:
        times: (all observations,) hours.
        values: (all observations, F) raw units, NaN where not measured.
        lengths: (N,) observations of each series, in order.
        features: F names.

    Returns:
        N rows; per feature ``first``, ``last``, ``min``, ``max``, ``mean`` (raw units), ``slope``
        (units an hour, least squares), ``count``, ``span`` (hours); NaN where never measured.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    columns = {}
    for f, name in enumerate(features):
        measured = ~np.isnan(values[:, f])
        long = pd.DataFrame({"t": times[measured], "v": values[measured, f]})
        by_owner = long.groupby(owner[measured])
        table = by_owner["v"].agg(["first", "last", "min", "max", "mean", "count"])
        centred = long - by_owner.transform("mean")
        product = (centred["t"] * centred["v"]).groupby(owner[measured]).sum()
        square = centred["t"].pow(2).groupby(owner[measured]).sum()
        table["span"] = by_owner["t"].max() - by_owner["t"].min()
        table["slope"] = (product / square).where(table["span"] > 0, 0.0)  # 0 / 0 within no time
        for statistic, column in table.items():
            columns[f"{name} {statistic}"] = column.reindex(range(len(lengths)))
    return pd.DataFrame(columns, index=range(len(lengths)))


def context_facts(
    contexts: Sequence[str], train: NDArray[np.int64], groups: NDArray[np.str_], fewest: int
) -> pd.DataFrame:
    """Return the words and numbers of the contexts as columns.

    Args:
        contexts: N texts.
        train: positions of the training part; what is rare there, and words that each context
            there holds, are left out.
        groups: (N,) the patient of each text.
        fewest: patients of the training part that must have a word or number.

    Returns:
        N rows; each number under its word (``54-year-old``, ``76 kg``, ``BMI 27``), NaN where
        absent, and 1 or 0 for each other word.
    """
    rows = [facts_of(context) for context in contexts]
    counts = Counter(name for i in train for name in rows[i])
    patients = Counter(name for _, name in {(groups[i], name) for i in train for name in rows[i]})
    kept = sorted(
        name
        for name, count in counts.items()
        if count >= RAREST_FACT * len(train)
        and patients[name] >= fewest
        and (count < len(train) or name.endswith(NUMBER_ENDING))
    )
    chosen = [{name: row[name] for name in kept if name in row} for row in rows]
    table = pd.DataFrame(chosen, columns=kept, index=range(len(contexts)), dtype=float)
    return table.fillna({name: 0.0 for name in kept if not name.endswith(NUMBER_ENDING)})


def facts_of(context: str) -> dict[str, float]:
    """Return the words of a text, and its numbers by the word behind or before them."""
    facts = {word.lower(): 1.0 for word in re.findall(r"[^\W\d_]{2,}", context)}
    for before, value, behind in re.findall(CONTEXT_NUMBER, context):
        if word := (behind or before).lower():
            facts.pop(word, None)
            facts[word + NUMBER_ENDING] = float(value)
    return facts
