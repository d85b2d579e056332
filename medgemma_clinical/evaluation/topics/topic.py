"""What a page is made of: topics, and what the builders of those on predictions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation.metrics import Array, Known
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.plots import Plot
from medgemma_clinical.evaluation.suppress import few_endings, suppressed
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.evaluation.verdicts import Finding, at_threshold, primary_baseline

NO_CURVES = "Small counts are hidden: no curve of single rows is drawn."


class Cells(NamedTuple):
    """A table as a page shows it; its cells are text or verdicts."""

    frame: pd.DataFrame
    caption: str
    is_wide: bool = False  # it stands below the figures
    links: Sequence[str] = ()  # the anchor of the topic that each row leads to


class Details(NamedTuple):
    """What a page unfolds under a line of summary."""

    summary: str
    text: str = ""
    table: Cells | None = None
    terms: Mapping[str, str] | None = None  # names and what they are


@dataclass(frozen=True)
class Topic:
    """A section of a page, whose small counts are hidden."""

    title: str  # empty: the section has no heading
    text: Sequence[str] = ()  # paragraphs
    tables: Sequence[Cells] = ()
    figures: Mapping[str, tuple[Plot, str]] = field(default_factory=dict)  # with their captions
    numbers: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # behind tables and figures
    details: Sequence[Details] = ()
    note: str = ""  # below the tables
    terms: Mapping[str, str] = field(default_factory=dict)  # names and what they are
    anchor: str = ""  # by which a table leads to the section
    summary: str = ""  # the line under which the section is folded; empty: it is open


@dataclass(frozen=True)
class Page:
    """All that a page shows."""

    title: str
    findings: Sequence[Finding]  # the result in words, of which the first stands out
    topics: Sequence[Topic]
    card: Mapping[str, str]  # methods
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluated:
    """Predictions and their metrics: what the topics of a report are made from."""

    rows: pd.DataFrame  # of predictions: what happened, and the risks of each model
    exact: Metrics  # of all targets, or of the target
    patients: pd.DataFrame  # ``demographics`` of the rows
    seed: int  # of the bootstrap
    thresholds: Sequence[float]  # of the targets: risks from which on the event is predicted
    threshold_choice: str  # how they were chosen, on which rows
    noun: str = "patients"  # what the rows are
    min_cell: int = 0  # smaller counts are hidden
    folds: int = 0  # models whose risks of their own folds are evaluated together; 0: one model
    leaves_out: bool = False  # each site is tested by a model of the other sites
    targets: Sequence[Target] = (LABEL,)
    few: bool | None = None  # set by ``at``

    def at(self, target: Target) -> Evaluated:
        """Return the same of one target, whose risks stand in the columns of the models."""
        names = [each.name for each in self.targets]
        models = {name: self.rows[target.column(name)] for name in self.exact.models}
        return replace(
            self,
            rows=self.rows.assign(**models),
            exact=self.exact.at(target),
            thresholds=[self.thresholds[names.index(target.name)]],
            targets=[replace(target, column_ending="", metric_ending="")],
            few=target.metric_ending in few_endings(self.exact.counts, self.min_cell),
        )

    @property
    def target(self) -> Target:
        """What the first risk is about."""
        return self.targets[0]

    @property
    def threshold(self) -> float:
        """The threshold of the first target."""
        return self.thresholds[0]

    @cached_property
    def metrics(self) -> Metrics:
        """The metrics, small counts hidden."""
        return suppressed(self.exact, self.min_cell)

    @property
    def at_threshold(self) -> str:
        """How a sentence about the threshold begins."""
        return at_threshold(self.threshold, self.threshold_choice)

    @property
    def has_few(self) -> bool:
        """Whether fewer patients than ``min_cell`` have, or lack, the event."""
        few = "" in few_endings(self.exact.counts, self.min_cell)
        return few if self.few is None else self.few

    @property
    def model(self) -> str:
        """The model of the report."""
        return self.exact.models[0]

    @property
    def names(self) -> list[str]:
        """The model and, if there is one, the baseline of the planned comparison."""
        return [self.model, *filter(None, [primary_baseline(self.exact)])]

    @property
    def beside(self) -> str:
        """What the caption of a figure says of the baseline."""
        return "".join(f" (baseline: {name})" for name in self.names[1:])

    @cached_property
    def known(self) -> Known:
        """What is known of the rows."""
        return self.target.known(self.rows)

    @property
    def labels(self) -> Array:
        """Whether the event came, (n,); NaN where that is unknown."""
        return self.target.labels(self.rows)

    @property
    def patient(self) -> NDArray[np.str_]:
        """The patient of each row, (n,)."""
        return self.rows["patient"].to_numpy(str)

    def risk(self, name: str | None = None) -> Array:
        """Return the risks (n,) of a model, by default of that of the report."""
        return self.rows[name or self.model].to_numpy(float)

    @property
    def no_curves(self) -> list[str]:
        """What a topic says where it leaves out figures of single rows."""
        return [NO_CURVES] if self.min_cell else []


TopicBuilder = Callable[[Evaluated], Topic | None]
"""Returns a topic, or None where there is nothing to show."""
