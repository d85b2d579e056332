"""Fitted simple models as plain numbers: kept as JSON, computed here, by no library's reader.

Each has ``risks``, and ``from_json``, which reads what ``to_plain`` gives and refuses all else.
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
from sklearn.feature_extraction.text import CountVectorizer

from medgemma_clinical.evaluation.metrics import Array

WORD = r"[^\W\d_]{2,}"
"""Pattern of a word; numbers are none."""

END_OF_TREES = "\n\nend of trees\n"

OF_ROWS = re.compile(
    r"^(?:tree_sizes|split_gain|leaf_weight|leaf_count|internal_\w+)=.*\n", re.MULTILINE
)
EXTREMES = re.compile(r"(?<=[= ])\[\S+:\S+\]")
"""What LightGBM's text tells of training rows, and no prediction needs: lines, and the lowest and
highest value of a column."""

MAX_TREES, MAX_LEAVES = 1000, 255
"""Bounds of what a file may hold: each split takes a pass over the rows."""

LEFT, NAN = 2, 8
"""Bits of LightGBM's decision type: missing values go left; a branch of their own knows them."""


def read_array(values: Any, *shape: int) -> Array:
    """Return finite numbers of a shape."""
    array = np.array(values, np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"not finite numbers of the shape {shape}")
    return array


def read_names(values: Any) -> list[str]:
    """Return different names."""
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise TypeError("not a list of names")
    if len({*values}) < len(values):
        raise ValueError("the same name twice")
    return values


def to_plain(model: Any) -> dict[str, Any]:
    """Return a model as lists of numbers, names and text."""
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in values.items()}


@dataclass(frozen=True)
class Regression:
    """A logistic regression on K columns, unknown values filled in by means and marked."""

    columns: list[str]
    means: Array  # (K,)
    marked: list[str]  # the M columns whose lack is a further column
    center: Array  # (K + M,)
    scale: Array  # (K + M,)
    coefficients: Array  # (K + M,)
    intercept: Array  # (1,)

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

    def scaled(self, table: pd.DataFrame) -> Array:
        """Return what is weighed, (N, K + M)."""
        values = table[self.columns].to_numpy(np.float64)
        unknown = table[self.marked].isna().to_numpy(np.float64)
        filled = np.hstack([np.where(np.isnan(values), self.means, values), unknown])
        scaled: Array = (filled - self.center) / self.scale
        return scaled

    def risks(self, table: pd.DataFrame) -> Array:
        """Return the probability (N,) of each row of a table that has the columns."""
        risks: Array = expit(self.scaled(table) @ self.coefficients + self.intercept)
        return risks

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Check and return; see the module."""
        columns, marked = read_names(content["columns"]), read_names(content["marked"])
        size = len(columns) + len(marked)
        center, scale = (read_array(content[name], size) for name in ("center", "scale"))
        if not {*marked} <= {*columns} or not (scale > 0).all():
            raise ValueError("an unknown marked column, or a scale that is not above 0")
        means = read_array(content["means"], len(columns))
        weights = cls.read_weights(content, size)
        return cls(columns, means, marked, center, scale, *weights)

    @classmethod
    def read_weights(cls, content: Mapping[str, Any], size: int) -> tuple[Array, Array]:
        """Check and return coefficients and intercept."""
        return read_array(content["coefficients"], size), read_array(content["intercept"], 1)


@dataclass(frozen=True)
class Words:
    """A logistic regression on which words a text holds."""

    vocabulary: list[str]  # W words
    scale: Array  # (W,)
    coefficients: Array  # (W,)
    intercept: Array  # (1,)

    def risks(self, texts: NDArray[np.object_]) -> Array:
        """Return the probability (N,) of each text."""
        table = word_table(self.vocabulary, texts)
        risks: Array = expit(table @ (self.coefficients / self.scale) + self.intercept)
        return risks

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Check and return; see the module."""
        words = read_names(content["vocabulary"])
        names = ("scale", "coefficients")
        scale, weights = (read_array(content[name], len(words)) for name in names)
        if not words or not (scale > 0).all():
            raise ValueError("no word, or a scale that is not above 0")
        return cls(words, scale, weights, read_array(content["intercept"], 1))


def word_table(vocabulary: Sequence[str], texts: NDArray[np.object_]) -> Any:
    """Return which words each text holds, a sparse (N, W) of 0 and 1."""
    return CountVectorizer(vocabulary=vocabulary, binary=True, token_pattern=WORD).transform(texts)


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
    """Boosted trees on K columns, in LightGBM's text form; its C++ reader never sees a file."""

    columns: list[str]
    text: str

    @classmethod
    def of(cls, booster: Any, columns: Sequence[str]) -> Self:
        """Return a fitted LightGBM, without counts and extreme values of the training rows."""
        text = booster.model_to_string().partition(END_OF_TREES)[0] + END_OF_TREES
        return cls([*columns], EXTREMES.sub("none", OF_ROWS.sub("", text)))

    @cached_property
    def trees(self) -> list[Tree]:
        """The trees, checked."""
        blocks = self.text.removesuffix(END_OF_TREES).split("\nTree=")[1:]
        if len(blocks) > MAX_TREES:
            raise ValueError("too many trees")
        return [_read_tree(block, len(self.columns)) for block in blocks]

    def totals(self, table: pd.DataFrame) -> Array:
        """Return the sum (N,) of all trees for each row of a table that has the columns."""
        values = table[self.columns].to_numpy(np.float64)
        total = np.zeros(len(values))
        for tree in self.trees:
            total += tree.leaf[tree.leaves(values)]
        return total

    def risks(self, table: pd.DataFrame) -> Array:
        """Return the probability (N,) of each row of a table that has the columns."""
        risks: Array = expit(self.totals(table))
        return risks

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Check and return; see the module."""
        model = cls(read_names(content["columns"]), content["text"])
        if not model.trees:
            raise ValueError("no trees")
        return model


def _read_tree(block: str, columns: int) -> Tree:
    """Return a tree of LightGBM's text: no loop, no categories, nothing out of range."""
    fields = dict(line.split("=", 1) for line in block.split("\n")[1:] if line)
    words = {name: text.split() for name, text in fields.items()}
    leaf = read_array(words["leaf_value"], len(words["leaf_value"]))
    splits = len(leaf) - 1
    if splits >= MAX_LEAVES:
        raise ValueError("too many leaves")
    names = ("split_feature", "decision_type", "left_child", "right_child")
    feature, kind, left, right = (np.array(words[name], np.int64) for name in names)
    # Known or not is a split of its own, at infinity.
    threshold = np.nan_to_num(np.array(words["threshold"], np.float64), nan=np.nan)
    threshold = read_array(threshold, splits)
    own, children = np.arange(splits), np.stack([left, right])
    allowed = (
        splits >= 0 and fields["num_cat"] == fields["is_linear"] == "0",
        feature.shape == kind.shape == left.shape == (splits,),
        ((feature >= 0) & (feature < columns) & np.isin(kind, [0, LEFT, NAN, NAN | LEFT])).all(),
        ((children >= -splits - 1) & (children < splits)).all(),
        ((children < 0) | (children > own)).all(),
    )
    if not all(allowed):
        raise ValueError("a tree out of range")
    # Without the bit, no training row lacked the value, and LightGBM reads 0 in its place.
    missing = np.where(kind & NAN, (kind & LEFT) > 0, threshold >= 0)
    return Tree(feature, threshold, missing, left, right, leaf)
