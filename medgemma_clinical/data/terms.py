"""Words of texts and pairs of them, as simple models read them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from medgemma_clinical.data.small_cells import MIN_CELL

WORD, CLAUSE_END = re.compile(r"[^\W\d_]{2,}"), re.compile(r"[.;:!?\n]")
"""A word, of which numbers are none, and what parts clauses: no pair of words lies across it."""

MAX_TERMS = 5_000
"""The most words and pairs that are read, the most frequent ones."""


def terms(text: str) -> list[str]:
    """Return the words of a text and the pairs of words within a clause, in lower case."""
    found = []
    for clause in CLAUSE_END.split(text.lower()):
        words = WORD.findall(clause)
        found += [*words, *map(" ".join, itertools.pairwise(words))]
    return found


def frequent_terms(texts: NDArray[np.object_], groups: NDArray[Any]) -> list[str]:
    """Return the words and pairs that enough patients' texts hold, and lack: a rare one is a name.

    ``groups`` are the patients (N,).
    """
    counter = CountVectorizer(binary=True, analyzer=terms)
    try:
        holds = counter.fit_transform(texts)
    except ValueError:  # no word
        return []
    names, owners = np.unique(groups, return_inverse=True)
    of_patient = csr_matrix((np.ones(len(texts)), (owners, np.arange(len(texts)))))
    patients = np.asarray((of_patient @ holds > 0).sum(axis=0)).ravel()
    enough = (patients >= MIN_CELL) & (patients <= len(names) - MIN_CELL)
    order = np.argsort(-patients[enough], kind="stable")[:MAX_TERMS]
    return sorted(counter.get_feature_names_out()[enough][order].tolist())


def term_vectorizer(vocabulary: Sequence[str]) -> Any:
    """Return what makes weights of words and pairs, a row of them of length 1, or 0 without any."""
    return TfidfVectorizer(vocabulary=vocabulary, sublinear_tf=True, analyzer=terms)
