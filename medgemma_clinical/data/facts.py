"""Facts of a patient: declared columns, and the words and numbers of the contexts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.data.texts import NUMBER

CONTEXT_NUMBER = re.compile(
    rf"(?:(?<![^\W\d_])([^\W\d_]++)[ :=]++)?({NUMBER})(?:[ -]?([^\W\d_]+|%))?"
)
"""A number in a context with the word before or behind it. A word is tried from its first letter
alone: from each letter on, a long word would take the square of its length."""

NUMBER_ENDING = " (number)"
"""Ending of the name of a context's number; names of words have none."""

CONTEXT_FACT = re.compile(rf"(?:[^\W\d_]|%)+(?:{re.escape(NUMBER_ENDING)})?")
"""Name of a word or number of a context; a declared fact has an underscore or a space in it."""

LARGEST_NUMBER, LONGEST_WORD, MOST_WORDS = 1e9, 100, 1_000
"""Larger numbers, longer words, and words that are less frequent than so many are no facts."""

RAREST_WORD = 0.01
"""Share of the training contexts that must hold a word or number for it to become a fact."""

FEWEST_PATIENTS = 5
"""Training patients that a fact or a summary needs: of fewer, a weight would only fit noise."""


def facts_of(context: str) -> dict[str, float]:
    """Return the words of a text, and its numbers by the word behind or before them."""
    facts = {word.lower(): 1.0 for word in re.findall(r"[^\W\d_]{2,}", context)}
    for word, number in _numbers_of(context):
        facts.pop(word, None)
        facts[word + NUMBER_ENDING] = float(number[2])
    return facts


def numbers_as_written(context: str) -> dict[str, str]:
    """Return each number of a text with its word as both stand there, by its name as a fact."""
    return {word + NUMBER_ENDING: number[0] for word, number in _numbers_of(context)}


def _numbers_of(context: str) -> Iterator[tuple[str, re.Match[str]]]:
    for number in CONTEXT_NUMBER.finditer(context):
        word = (number[3] or number[1] or "").lower()
        if word and abs(float(number[2])) <= LARGEST_NUMBER:
            yield word, number


def fact_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Group the names of facts by their source, as a page shows them; no group is empty."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = "words of the context"
        if not CONTEXT_FACT.fullmatch(name):
            group = "declared"
        elif name.endswith(NUMBER_ENDING):
            group = "numbers of the context, by their word"
        groups.setdefault(group, []).append(name.removesuffix(NUMBER_ENDING))
    return groups


def context_table(contexts: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """Return chosen words and numbers of the contexts, one column a name.

    Args:
        contexts: N texts; an empty one says nothing.
        names: keys of ``facts_of``.

    Returns:
        N rows; each number under its word (``54-year-old``, ``76 kg``, ``BMI 27``), NaN where
        absent; 1 or 0 for each other word, NaN where the context is empty.
    """
    rows = [facts_of(context) for context in contexts]
    cells = [row.get(name, np.nan) for row in rows for name in names]
    table = np.array(cells, dtype=float).reshape(len(rows), len(names))
    told = np.array([bool(row) for row in rows], dtype=bool)
    words = np.array([not name.endswith(NUMBER_ENDING) for name in names], dtype=bool)
    table[np.isnan(table) & told[:, None] & words] = 0.0
    return pd.DataFrame(table, columns=list(names))


def frequent_words(contexts: Sequence[str]) -> list[str]:
    """Return, sorted, the words and numbers that at least ``RAREST_WORD`` of some contexts hold."""
    names = [name for text in contexts for name in facts_of(text) if len(name) <= LONGEST_WORD]
    counts = pd.Series(names, dtype=object).value_counts()
    return sorted(counts.index[counts >= RAREST_WORD * len(contexts)][:MOST_WORDS])


def patients_behind(column: NDArray[np.float64], groups: NDArray[np.str_]) -> int:
    """Count the patients whose values decide mean and spread of a column, which weights keep.

    Args:
        column: (n,) float64, NaN where unknown.
        groups: (n,) the patient of each row.

    Returns:
        Patients with a known value; where most rows share one of several, those with another.
    """
    counted = ~np.isnan(column)
    values, counts = np.unique(column[counted], return_counts=True)
    if len(values) > 1 and 2 * counts.max() > counts.sum():
        counted &= column != values[counts.argmax()]
    return count_patients(groups, counted)


def few_patients(column: NDArray[np.float64], groups: NDArray[np.str_]) -> bool:
    """Return whether too few patients are behind a column for a weight to be learnt from them."""
    return patients_behind(column, groups) < FEWEST_PATIENTS


def unusable_facts(table: pd.DataFrame, groups: NDArray[np.str_]) -> dict[str, str]:
    """Return the facts that a model cannot learn from, and why.

    Args:
        table: facts of the n rows of the training part, NaN where unknown.
        groups: (n,) the patient of each row.
    """
    unusable = {}
    for name in map(str, table):
        column = table[name].to_numpy()
        if len(np.unique(column[~np.isnan(column)])) < 2:
            unusable[name] = "the training part knows one value of it at most"
        elif few_patients(column, groups):
            unusable[name] = (
                f"fewer than {FEWEST_PATIENTS} training patients have it, or another value than "
                "the most frequent one"
            )
    return unusable
