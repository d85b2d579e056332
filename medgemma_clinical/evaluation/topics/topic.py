"""What a topic of a report is, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.plots import Plot
from medgemma_clinical.evaluation.verdicts import Finding, at_threshold, primary_baseline, sentences

NO_CURVES = "Small counts are hidden: no curve of single rows is drawn."


class Cells(NamedTuple):
    """A table as a page shows it; its cells are text or verdicts."""

    frame: pd.DataFrame
    caption: str
    is_wide: bool = False  # it stands below the figures


class Details(NamedTuple):
    """What a page unfolds under a line of summary."""

    summary: str
    text: str = ""
    table: Cells | None = None
    terms: Mapping[str, str] | None = None  # names and what they are


@dataclass(frozen=True)
class Topic:
    """A section of a report, whose small counts are hidden."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    tables: Sequence[Cells] = ()
    figures: Mapping[str, tuple[Plot, str]] = field(default_factory=dict)  # with their captions
    numbers: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # behind tables and figures
    details: Sequence[Details] = ()
    note: str = ""  # below the tables


@dataclass(frozen=True)
class ReportContent:
    """What a report says beside the metrics; None and empty leave a part of the page out."""

    title: str
    question: Mapping[str, str]  # what is predicted, when, from what
    data: Mapping[str, str]
    card: Mapping[str, str]  # about the model; hashes and versions stand last
    threshold: float  # risk from which on the event is predicted
    threshold_choice: str  # how it was chosen, on which rows
    seed: int  # of the bootstrap
    bands: pd.DataFrame  # subgroups of the evaluated rows: ordered categories, a column a grouping
    noun: str = "patients"  # what the rows are
    before: Array | None = None  # risks (n,) before the recalibration: their calibration is shown
    recalibration: str = ""  # how the model that is handed over is recalibrated, in words
    flow: pd.DataFrame | None = None  # columns rule, removed, left
    split: pd.DataFrame | None = None  # a ``part_table``
    table_one: pd.DataFrame | None = None  # a ``table_one``
    history: Sequence[Mapping[str, Any]] | None = None  # as in history.jsonl
    reports: Mapping[str, Any] | None = None  # metrics of ``score_reports``
    example: Mapping[str, Any] | None = None  # prompt, text, target of a row
    stage1_page: str | None = None  # where the results are stage 1's: its page, empty if unknown
    case_mix: tuple[dict[str, Any], dict[str, Any]] | None = None  # of training, of these rows
    sites: NDArray[Any] | None = None  # hospital or unit of each row
    leaves_out: bool = False  # each site by a model of the other sites
    updates: Any = None  # of the decision rule in these rows
    tries_updates: bool = False  # whether there is a section on updates, with or without any
    methods: Mapping[str, str] | None = None  # what ``tripod.md`` says of the training
    notice: str = ""  # a banner
    advice: str = ""  # what helps where there are few events
    first: Sequence[str] = ()  # sentences that the result begins with
    last: Sequence[str] = ()  # sentences that it ends with
    has_tripod: bool = True  # times to events have no ``tripod.md`` yet
    describe: Callable[..., list[Finding]] = sentences  # metrics in words
    folds: int = 0  # models whose risks of their own folds are evaluated together; 0: one model
    # Of folds that were drawn several times: ``TESTED`` and a column of risks a repeat; a line a
    # repeat, its threshold on these risks and its auroc.
    repeats: tuple[pd.DataFrame, pd.DataFrame] | None = None

    @property
    def at_threshold(self) -> str:
        """How a sentence about the threshold begins."""
        return at_threshold(self.threshold, self.threshold_choice)

    def findings(self, metrics: Metrics) -> list[Finding]:
        """Return the result in words."""
        return self.describe(metrics, self.at_threshold, self.noun, self.advice)


@dataclass(frozen=True)
class Evaluated:
    """Predictions, their metrics, and what is known beside: what each topic is made from."""

    rows: pd.DataFrame  # ``TESTED``, then the risk of each model
    metrics: Metrics  # small counts hidden
    content: ReportContent
    min_cell: int  # smaller counts are hidden
    has_few: bool  # fewer patients than ``min_cell`` have, or lack, the event
    list_patients: bool = False

    @property
    def model(self) -> str:
        """The model of the report."""
        return self.metrics.models[0]

    @property
    def names(self) -> list[str]:
        """The model and, if there is one, the baseline of the planned comparison."""
        return [self.model, *filter(None, [primary_baseline(self.metrics)])]

    @property
    def beside(self) -> str:
        """What the caption of a figure says of the baseline."""
        return "".join(f" (baseline: {name})" for name in self.names[1:])

    @property
    def labels(self) -> Array:
        """Labels, (n,)."""
        return self.rows["label"].to_numpy(float)

    @property
    def no_curves(self) -> list[str]:
        """What a topic says where it leaves out figures of single rows."""
        return [NO_CURVES] if self.min_cell else []

    @property
    def hides_events(self) -> bool:
        """Whether the number of events of some part is hidden."""
        split = self.content.split
        few = split is not None and (split["minority_patients"] < self.min_cell).any()
        return self.has_few or bool(few)


TopicBuilder = Callable[[Evaluated], Topic | None]
"""Returns a topic, or None where the content has nothing of it."""
