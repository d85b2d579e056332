"""A patient's text as one number: a ridge regression on its words, or on an encoder's states.

Letters: N rows, W words and pairs of words or hidden states, C events of times (1 of a label), J
intervals of follow-up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.model_selection import StratifiedGroupKFold

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients, minority_patients
from medgemma_clinical.data.terms import frequent_terms, term_vectorizer
from medgemma_clinical.data.trajectories import Rows, TrajectoryDataset
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.simple_models import (
    Regression,
    from_plain,
    hazards_of,
    read_numbers,
    to_plain,
)

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse penalties of the ridge regression that are tried in folds."""

USUAL_PENALTY = 1.0
"""Where there are too few patients to choose."""

CROSS_FITS = 5
"""Folds in which a training text's number comes from the texts of other patients."""

WORDS, FROZEN = "words", "frozen"
"""Kinds of readings, as ``--text_features`` names them."""

Folds = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]


# ------------------------------------------------------------------ what is read of a text


@dataclass(frozen=True)
class Reading:
    """How texts become a table (N, W) whose rows have a length of about 1."""

    vocabulary: list[str]  # W words and pairs; empty: an encoder's states are read
    encoder: Mapping[str, str | None]  # record of the language encoder; empty: words are read
    center: Array  # (W,) what is taken off states
    scale: Array  # (W,) of words the inverse document frequency

    @property
    def kind(self) -> str:
        """``words`` or ``frozen``."""
        return FROZEN if self.encoder else WORDS

    @classmethod
    def fitted(cls, dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> Self:
        """Return the reading that suits the texts of some rows."""
        if kind_of(dataset) == FROZEN:
            assert dataset.text_states is not None
            states = dataset.text_states[rows].astype(np.float64)
            spread = np.nanstd(states, axis=0).clip(1e-6)
            scale = 1 / (spread * np.sqrt(len(spread)))
            return cls([], dataset.text_encoder, np.nanmean(states, axis=0), scale)
        texts = dataset.contexts[rows]
        vocabulary = frequent_terms(texts, dataset.groups[rows])
        frequencies = term_vectorizer(vocabulary).fit(texts).idf_
        # Rounded, so that they tell no count of rows.
        scale = np.array([float(f"{x:.3g}") for x in frequencies])
        return cls(vocabulary, {}, np.zeros(len(vocabulary)), scale)

    def table(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> Any:
        """Return the table (n, W) of the texts of some rows, sparse of words."""
        if self.kind == WORDS:
            texts = dataset.contexts[rows]
            if not len(texts):  # which the vectorizer refuses
                return csr_matrix((0, len(self.vocabulary)))
            vectorizer = term_vectorizer(self.vocabulary)
            vectorizer.idf_ = self.scale
            return vectorizer.transform(texts)
        assert dataset.text_states is not None
        states = dataset.text_states[rows].astype(np.float64)
        return np.nan_to_num((states - self.center) * self.scale)  # no text: as the mean


def kind_of(dataset: TrajectoryDataset) -> str:
    """Return what can be read of the texts of a data set: their words, or an encoder's states."""
    return FROZEN if dataset.text_encoder else WORDS


def can_read_text(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> bool:
    """Return whether a regression on the texts of some rows can be fitted."""
    groups = dataset.groups[rows]
    if minority_patients(dataset.labels[rows], groups) < CROSS_FITS:
        return False
    if kind_of(dataset) == FROZEN:
        return count_patients(groups, dataset.contexts[rows] != "") >= MIN_CELL
    return bool(frequent_terms(dataset.contexts[rows], groups))


# ------------------------------------------------------------------ the regression


@dataclass(frozen=True)
class TextModel:
    """What a text adds to the log-odds of a label, or to the log-hazards of each event."""

    reading: Reading
    coefficients: Array  # (C, W)
    shift: Array  # (C,) which makes the mean of the training texts 0
    level: Array  # (1, 1) log-odds, or log-hazards (C, J), of a text whose number is 0
    beside: Regression | None = None  # on the numbers, summaries and static features

    def numbers(self, dataset: TrajectoryDataset, rows: Rows = slice(None)) -> Array:
        """Return what the texts of some rows add, (n, C); 0 is a usual text."""
        numbers: Array = self.reading.table(dataset, rows) @ self.coefficients.T + self.shift
        return numbers

    def risks(self, numbers: Array) -> Array:
        """Return the risks (n,), or hazards (n, C, J), by texts alone."""
        if self.level.size > 1:
            return hazards_of(numbers[..., None] + self.level)
        risks: Array = expit(numbers[:, 0] + self.level[0, 0])
        return risks

    def risks_beside(self, table: pd.DataFrame, numbers: Array) -> Array:
        """Return the risks, or hazards, of the regression with text on other columns (n rows)."""
        assert self.beside is not None
        columns = dict(zip(text_columns(len(self.coefficients)), numbers.T, strict=True))
        return self.beside.risks(table.assign(**columns))

    def to_json(self) -> str:
        """Return the text of the file, in which each number is exact."""
        content = to_plain(self)
        content["reading"] = to_plain(self.reading)
        content["beside"] = self.beside and to_plain(self.beside)
        return json.dumps(content) + "\n"

    @property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` has written."""
        content: dict[str, Any] = json.loads(text)
        reading, beside = content.pop("reading"), content.pop("beside")
        for name in ("center", "scale"):
            reading[name] = read_numbers(reading[name])
        numbers = {name: read_numbers(values) for name, values in content.items()}
        regression: Any = beside and from_plain(beside)
        return cls(Reading(**reading), **numbers, beside=regression)


def text_columns(events: int) -> list[str]:
    """Return the names of the numbers of a text among other columns, one an event."""
    return ["text"] if events == 1 else [f"text, event {k}" for k in range(1, events + 1)]


# ------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class TextSettings:
    """What was chosen on the training part."""

    penalty: float
    has_beside: bool  # whether there is a regression with text
    beside_penalty: float | None = None  # its own; None: not tuned


def tune_text(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    fits: Any,  # of the same rows
    folds: Folds,
    beside: pd.DataFrame | None,  # columns (N rows) of the regression with text
) -> TextSettings | None:
    """Choose the penalties of regressions on the texts of some rows; None without any word."""
    if not can_read_text(dataset, rows):
        return None
    if not folds:
        return TextSettings(USUAL_PENALTY, beside is not None)
    table = Reading.fitted(dataset, rows).table(dataset, rows)
    settings = TextSettings(tuned_penalty(fits, table, folds), beside is not None)
    if beside is None:
        return settings
    values = with_numbers(beside, dataset, rows, fits, table, settings.penalty)
    return replace(settings, beside_penalty=fits.tune_penalty(values, folds))


def tuned_penalty(fits: Any, table: Any, folds: Folds) -> float:
    """Return the penalty whose loss in the folds is the lowest."""
    losses = np.zeros(len(PENALTIES))
    for train, test in folds:
        for k, penalty in enumerate(PENALTIES):
            coefficients, level = fits.of(train).fit_text(table[train], penalty)
            losses[k] += fits.of(test).text_loss(table[test] @ coefficients.T, level)
    return PENALTIES[int(losses.argmin())]


def fit_text(
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    fits: Any,  # of the same rows
    settings: TextSettings,
    beside: pd.DataFrame | None,  # as for ``tune_text``
) -> TextModel:
    """Fit the regression on texts of some rows, and the one with text on top of it."""
    reading = Reading.fitted(dataset, rows)
    table = reading.table(dataset, rows)
    coefficients, level = fits.fit_text(table, settings.penalty)
    mean = mean_numbers(table, coefficients)
    model = TextModel(reading, coefficients, -mean, level + mean[:, None])
    if beside is None or not settings.has_beside:
        return model
    values = with_numbers(beside, dataset, rows, fits, table, settings.penalty)
    columns = [*beside.columns, *text_columns(len(coefficients))]
    return replace(model, beside=fits.fit_regression(values, settings.beside_penalty, columns))


def with_numbers(
    beside: pd.DataFrame,
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    fits: Any,
    table: Any,
    penalty: float,
) -> Array:
    """Return columns of some rows and, behind them, the numbers of their texts.

    What is fitted on top must not learn from numbers that know the row's own outcome: each is by
    a model that has not seen the patient.
    """
    labels, groups = dataset.labels[rows], dataset.groups[rows]
    folds = StratifiedGroupKFold(CROSS_FITS, shuffle=True, random_state=0)
    parts = []
    for train, test in folds.split(labels, labels, groups):
        coefficients, _ = fits.of(train).fit_text(table[train], penalty)
        numbers = table[test] @ coefficients.T - mean_numbers(table[train], coefficients)
        parts.append(pd.DataFrame(numbers, test))
    numbers = pd.concat(parts).sort_index().to_numpy()
    return np.column_stack([beside.to_numpy()[rows], numbers])


def mean_numbers(table: Any, coefficients: Array) -> Array:
    """Return the mean (C,) of the numbers of texts."""
    means: Array = np.asarray(table.mean(axis=0)).ravel() @ coefficients.T
    return means
