"""Fitted simple models as plain numbers: kept as JSON, computed here, by no library's reader.

Letters: N rows, K columns, M marks, C events of times, J intervals of follow-up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from medgemma_clinical.evaluation.metrics import Array

INTERVAL = "interval of follow-up"
"""Column of the boosted trees of times."""

SMALLEST, LARGEST = 1e-9, 100.0
"""Bounds of the cumulative hazard of an event in an interval."""

END_OF_TREES = "\n\nend of trees\n"

OF_ROWS = re.compile(
    r"^(?:tree_sizes|split_gain|leaf_weight|leaf_count|internal_\w+)=.*\n", re.MULTILINE
)
EXTREMES = re.compile(r"(?<=[= ])\[\S+:\S+\]")
"""What LightGBM's text tells of training rows, and no prediction needs: lines, and the lowest and
highest value of a column."""

LEFT, NAN = 2, 8
"""Bits of LightGBM's decision type: missing values go left; a branch of their own knows them."""


def hazards_of(log_hazards: Array) -> Array:
    """Return cumulative hazards within bounds."""
    hazards: Array = np.exp(log_hazards.clip(*np.log([SMALLEST, LARGEST])))
    return hazards


def to_plain(model: Any) -> dict[str, Any]:
    """Return a model as lists of numbers, names and text."""
    plain = {}
    for field in fields(model):
        value = getattr(model, field.name)
        if value is not None:
            plain[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return plain


def read_numbers(values: Any) -> Array:
    """Return finite numbers."""
    array = np.array(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError("numbers that are not finite")
    return array


def from_plain(content: Mapping[str, Any]) -> Regression | Trees:
    """Return the model that ``to_plain`` gave."""
    kind: Any = Trees if "text" in content else Regression
    texts = ("columns", "marked", "text")
    model: Regression | Trees = kind(
        **{name: x if name in texts else read_numbers(x) for name, x in content.items()}
    )
    if isinstance(model, Trees) and not all(model.forests):
        raise ValueError("no trees")
    return model


@dataclass(frozen=True)
class Regression:
    """A regression on K columns, unknown values filled in by means and marked.

    It is logistic; of times a Poisson regression of each event, with an intercept an interval.
    """

    columns: list[str]
    means: Array  # (K,)
    marked: list[str]  # the M columns whose lack is a further column
    center: Array  # (K + M,)
    scale: Array  # (K + M,)
    coefficients: Array  # (K + M,), or (C, K + M)
    intercept: Array  # (1,), or (C, J)

    @classmethod
    def of(cls, pipeline: Any, columns: Sequence[str]) -> Self:
        """Return a fitted pipeline of SimpleImputer, StandardScaler and LogisticRegression."""
        imputer, scaler, model = (step for _, step in pipeline.steps)
        # The share of a mark, and the mean of its column, may be of few patients: both become part
        # of the weights.
        marks, size = imputer.indicator_.features_, len(scaler.mean_)
        means = imputer.statistics_.copy()
        weights = model.coef_[0] / scaler.scale_
        intercept = model.intercept_ - scaler.mean_ @ weights
        weights[len(columns) :] += weights[marks] * means[marks]
        means[marks] = 0
        means = np.array([float(f"{mean:.6g}") for mean in means])
        marked = [columns[k] for k in marks]
        return cls([*columns], means, marked, np.zeros(size), np.ones(size), weights, intercept)

    def risks(self, table: pd.DataFrame) -> Array:
        """Return the risk (N,), or hazards (N, C, J), of rows of a table that has the columns."""
        values = table[self.columns].to_numpy(np.float64)
        unknown = table[self.marked].isna().to_numpy(np.float64)
        filled = np.hstack([np.where(np.isnan(values), self.means, values), unknown])
        total = ((filled - self.center) / self.scale) @ self.coefficients.T
        if self.coefficients.ndim == 2:
            return hazards_of(total[..., None] + self.intercept)
        risks: Array = expit(total + self.intercept)
        return risks


class Tree(NamedTuple):
    """A binary tree of S splits: each child is a later split, or ~leaf."""

    feature: NDArray[np.int64]  # (S,)
    threshold: Array  # (S,) values up to it go left
    missing_left: NDArray[np.bool_]  # (S,)
    left: NDArray[np.int64]  # (S,)
    right: NDArray[np.int64]  # (S,)
    leaf: Array  # (S + 1,) log-odds, or logarithms of rates

    def leaves(self, values: Array) -> NDArray[np.int64]:
        """Return the number (N,) of the leaf of each row of values (N, K)."""
        at = np.full(len(values), 0 if len(self.feature) else ~0)
        for k, feature in enumerate(self.feature):  # children come later
            here = np.flatnonzero(at == k)
            value = values[here, feature]
            left = np.where(np.isnan(value), self.missing_left[k], value <= self.threshold[k])
            at[here] = np.where(left, self.left[k], self.right[k])
        return ~at


@dataclass(frozen=True)
class Trees:
    """Boosted trees on K columns, in LightGBM's text form; its C++ reader never sees a file.

    Of times each event has trees; their last column is the interval.
    """

    columns: list[str]
    text: str | list[str]  # of times one an event
    intercept: Array | None = None  # (C, J) log-hazards of times to which the trees of a row add

    @cached_property
    def forests(self) -> list[list[Tree]]:
        """The trees of a label, or of each event, checked."""
        texts = [self.text] if isinstance(self.text, str) else self.text
        return [read_forest(text, len(self.columns)) for text in texts]

    def totals(self, table: pd.DataFrame) -> Array:
        """Return the sums (N, C) of all trees of an event; C is 1 of a label."""
        values = table[self.columns].to_numpy(np.float64)
        totals = np.zeros((len(values), len(self.forests)))
        for event, forest in enumerate(self.forests):
            for tree in forest:
                totals[:, event] += tree.leaf[tree.leaves(values)]
        return totals

    def risks(self, table: pd.DataFrame) -> Array:
        """Return the risk (N,), or hazards (N, C, J), of rows of a table that has the columns."""
        if self.intercept is None:
            risks: Array = expit(self.totals(table)[:, 0])
            return risks
        intervals = range(self.intercept.shape[1])
        totals = [self.totals(table.assign(**{INTERVAL: k})) for k in intervals]
        return hazards_of(np.stack(totals, axis=2) + self.intercept)


def kept_text(booster: Any) -> str:
    """Return a fitted LightGBM as text, without counts and extreme values of the training rows."""
    text = booster.model_to_string().partition(END_OF_TREES)[0] + END_OF_TREES
    return EXTREMES.sub("none", OF_ROWS.sub("", text))


def read_forest(text: str, columns: int) -> list[Tree]:
    """Return the trees of LightGBM's text: no categories, no loop, nothing out of range."""
    trees = []
    for block in text.removesuffix(END_OF_TREES).split("\nTree=")[1:]:
        lines = dict(line.split("=", 1) for line in block.split("\n")[1:] if line)
        feature, kind, left, right = (
            np.array(lines[name].split(), np.int64)
            for name in ("split_feature", "decision_type", "left_child", "right_child")
        )
        leaf = np.array(lines["leaf_value"].split(), np.float64)
        # Known or not is a split of its own, at infinity.
        threshold = np.nan_to_num(np.array(lines["threshold"].split(), np.float64))
        children, count = np.stack([left, right]), len(leaf) - 1
        is_later = (children < 0) | (children > np.arange(count))
        is_there = (children >= ~count) & (children < count)
        is_column = (feature >= 0) & (feature < columns)
        if not (is_later & is_there & is_column).all():
            raise ValueError("a tree out of range")
        # Without the bit, no training row lacked the value, and LightGBM reads 0 in its place.
        missing = np.where(kind & NAN, (kind & LEFT) > 0, threshold >= 0)
        trees.append(Tree(feature, threshold, missing, left, right, leaf))
    return trees
