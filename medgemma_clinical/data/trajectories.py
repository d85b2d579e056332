"""The trajectory contract: irregular series with labels, patients and texts."""

# Shapes: N trajectories, B in a batch, L observations, F features, S summaries, K static features.

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NotRequired, Self, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.small_cells import MIN_CELL, count_patients, patients_behind
from medgemma_clinical.data.split import Split, draw_split, given_split
from medgemma_clinical.data.summaries import summary_features, summary_names
from medgemma_clinical.data.texts import (
    WHOLE_PROMPT,
    Clause,
    PromptOptions,
    Reference,
    plain,
    with_space,
)
from medgemma_clinical.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

FAR_OUT = 10.0
"""Without declared limits a value is implausible so many interquartile ranges outside."""

FLOW_COLUMNS = ("rule", "removed", "left", "patients")
"""Columns of ``flow``: a rule, rows that it removed, rows and, where known, patients left."""

TARGETS = ("entry", "hours", "event")
"""What is learned of times: hours from the prediction time at which a row begins to be watched, and
ends; the event then, 0 where it is censored."""

UNKNOWN = "not known"
"""Stands for an empty cell among the names of sites, and for an age or sex that is unknown."""

AGE = ("static_age [years]", "static_age")
"""Names of the static feature that holds the age, in every data set."""

MIN_TIME_SCALE = 0.1
"""Least hours that are one unit of time to the encoder: shorter ones make endless solver steps."""

Rows = NDArray[np.int64] | slice


class Batch(TypedDict):
    """Padded trajectories."""

    times: Tensor  # (B, L) float32 hours since the patient's first observation, 0 in padding
    values: Tensor  # (B, L, F) float32 raw units, zero where not measured
    observed: Tensor  # (B, L, F) bool, all False in padding rows
    prediction_hours: Tensor  # (B,) float32 on the clock of times; unknown: the last observation
    summaries: Tensor  # (B, S) float32, NaN where unknown
    static: Tensor  # (B, K) float32, NaN where unknown
    labels: Tensor  # (B,) float32, NaN where unknown
    outcomes: Tensor  # (B,) float32 labels, or (B, 3) of ``TARGETS``; NaN where unknown
    index: Tensor  # (B,) int64 into the data set
    plan: NotRequired[Any]  # what an encoder that plans computes ahead of these trajectories
    prefix_lengths: NotRequired[Tensor]  # (B,) int64 observations read a second time in training
    prefix_summaries: NotRequired[Tensor]  # (B, S) of these observations
    prefix_outcomes: NotRequired[Tensor]  # as ``outcomes``, asked at the last of them


class TrajectoryDataset:
    """N trajectories with labels, patients and text; subclasses bring the clinical words."""

    name: ClassVar[str]  # the data set's key among the program's data sets, ``--dataset``
    kind: ClassVar[str] = ""  # what the files are, in a report's words
    source_flag: ClassVar[str]  # the trainer's flag for the path of the data, without dashes
    options: ClassVar[tuple[str, ...]] = ()  # flags that the constructor takes as keywords
    row_noun: ClassVar[str] = "stays"  # a clinician's word for rows, where patients have several
    merging: ClassVar[str] = "give it the number of another event in the column event"
    """What to do where too few rows have one of the competing events."""
    report_hours: ClassVar[float] = 1.0  # hours that are one unit of time in reports

    row_columns: ClassVar[tuple[str, ...]] = (
        *("labels", "ids", "groups", "contexts", "parts", "static", "prediction_hours"),
        *("sites", "events", "event_hours", "entry_hours", "text_states", "_summaries"),
    )
    """Attributes with one entry a row; a subclass that has more names them too."""

    times: NDArray[np.float64]  # (all observations,) hours, not decreasing within a trajectory
    values: NDArray[np.float64]  # (all observations, F) raw units, NaN where not measured
    offsets: NDArray[np.int64]  # (N + 1,); trajectory i has rows offsets[i]:offsets[i + 1]
    # (N,) of 0 and 1, NaN where unknown; of times to events, whether event 1 was seen.
    labels: NDArray[np.float64]
    ids: NDArray[np.str_]  # (N,) names of the rows in prediction files
    groups: NDArray[np.str_]  # (N,) patients; the rows of a patient are in one part of a split
    contexts: NDArray[np.object_]  # (N,) texts for a language model, may be empty
    static: NDArray[np.float64]  # (N, number of static_names), NaN where unknown
    prediction_hours: NDArray[np.float64] | None = None
    """(N,) when the question is asked, on the clock of ``times``; NaN where unknown, None where the
    data do not contain it."""
    parts: NDArray[np.str_] | None = None  # (N,) of train, val, test where the data bring a split
    parts_origin: str = "given by the column split"
    competing_events: CompetingEvents | None = None  # None: the outcome is a label
    events: NDArray[np.float64] | None = None
    """(N,) 0 where the record ended before any event, else its number; NaN where unknown."""
    event_hours: NDArray[np.float64] | None = None
    """(N,) hours from the prediction time to the event, or to the end of the record."""
    entry_hours: NDArray[np.float64] | None = None  # (N,) from which on events are seen; None: 0
    sites: NDArray[np.str_] | None = None  # (N,) hospitals or units, where they were asked for
    text_states: NDArray[np.float32] | None = None
    """(N, D) mean last hidden state of each context by an encoder; NaN where it is empty."""
    text_encoder: Mapping[str, str | None] = {}  # its record; empty: none has read the contexts
    held_out: tuple[str, ...] = ("val", "test")  # parts of a drawn split; the other rows train
    _summaries: NDArray[np.float64] | None = None

    features: tuple[str, ...]  # F names
    units: tuple[str, ...]  # F units, empty where a feature has none
    measures: tuple[Feature, ...] = ()  # F, with their ranges; empty where none are declared
    static_names: tuple[str, ...] = ()  # of all static features, ``static_NAME [unit]``
    static_inputs: tuple[str, ...] = ()  # K of them that a model reads; none before the choice
    series_inputs: tuple[str, ...] | None = None  # features that a model reads; None: all
    reads_prediction_time: bool = True  # whether a model reads prediction_hours, where it can
    question: str  # about a trajectory, a sentence
    outcome: str  # the event in a few words; a report begins with it
    time_scale: float  # hours that are one unit of time to the encoder
    assumed_time_scale: bool = False  # it is the format's default, which may not fit the data
    source: str  # where the data come from, as errors name it
    read_options: dict[str, Any]
    """Arguments that decide what a row is and which of its observations are kept, plain types: a
    checkpoint stores them to read other data in the same way."""
    main: int = 0  # position of the feature that stands for the others in texts
    has_patient_ids: bool = True  # False: the data name no patients, each row is one
    recipe: Mapping[str, Any] = {}
    """``arguments`` of the command that made the data, and its name ``made_by``; empty: unknown."""
    flow: pd.DataFrame | None = None  # how the data came to their rows, FLOW_COLUMNS
    warnings: tuple[str, ...] = ()  # suspected mistakes in the source, logged when it was read

    # ------------------------------------------------------------------ what a subclass brings

    def limits(self, feature: int) -> tuple[float, float] | None:
        """Return the declared plausible range of a feature, None where none is declared."""
        return self.measures[feature].plausible if self.measures else None

    def reference(self, feature: int) -> Reference | None:
        """Return the reference range of a feature in a healthy adult, None where unknown."""
        return self.measures[feature].reference if self.measures else None

    def series_text(self, i: int, options: PromptOptions) -> str:
        """Return the series of row ``i`` in words, empty or with a space at the end."""
        raise NotImplementedError

    def report_clauses(self, i: int) -> list[Clause]:
        """Return the statements of a report behind its verdict, the first of them with a label."""
        raise NotImplementedError

    @classmethod
    def scoring_rows(
        cls,
        source: Any,
        config: Mapping[str, Any],
        findings: Findings,
        max_rows: int,
        description: Any = None,  # of a table that none lies beside
    ) -> Iterator[ScoringRows]:
        """Yield rows to be scored, read as by a checkpoint's ``config``; note unreadable rows."""
        raise NotImplementedError

    # ------------------------------------------------------------------ observations

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Observations of each row, (N,)."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The row of each observation, (all observations,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def last_times(self) -> NDArray[np.float64]:
        """Hours of the last observation of each row, (N,)."""
        return self.times[self.offsets[1:] - 1]

    @property
    def n_patients(self) -> int:
        """Number of different patients."""
        return len(np.unique(self.groups))

    @property
    def noun(self) -> str:
        """What a clinician calls the rows of these data."""
        return "patients" if self.n_patients == len(self) else self.row_noun

    @property
    def hours_read(self) -> NDArray[np.float64] | None:
        """The ``prediction_hours`` that a model reads, None without."""
        return self.prediction_hours if self.reads_prediction_time else None

    @property
    def outcome_kind(self) -> str:
        """``label``, or ``time`` of events that compete."""
        return "label" if self.competing_events is None else "time"

    @property
    def note_problem(self) -> str:
        """Why no note states what comes true of a row; empty where one does."""
        if self.competing_events is None:
            return ""
        return "not for times to events: use --mode classification"

    @property
    def event_kinds(self) -> dict[str, NDArray[np.bool_]]:
        """Which rows (N,) have each of the events that compete, or none; empty of a label."""
        if self.competing_events is None or self.events is None:
            return {}
        kinds = {name: self.events == k for k, name in enumerate(self.competing_events.names, 1)}
        return kinds | ({"censored": self.events == 0} if (self.events == 0).any() else {})

    def targets(self, rows: Rows = slice(None)) -> NDArray[np.float64]:
        """Return what a model learns of some rows: labels (N,), or ``TARGETS`` (N, 3)."""
        if self.events is None or self.event_hours is None:
            return self.labels[rows]
        hours = self.event_hours[rows]
        entry = np.zeros(len(hours)) if self.entry_hours is None else self.entry_hours[rows]
        return np.column_stack([entry, hours, self.events[rows]])

    def observed(self, rows: NDArray[np.int64]) -> pd.DataFrame:
        """Return what a table of predictions says of some rows but their risks."""
        happened = {"label": self.labels[rows].astype(int)}
        if self.events is not None and self.event_hours is not None:
            happened = {"event_hours": self.event_hours[rows], "event": self.events[rows]}
        patients = self.groups[rows]
        return pd.DataFrame({"id": self.ids[rows], **happened, "patient": patients})

    def prediction_times(self, rows: Rows = slice(None)) -> NDArray[np.float64]:
        """Return when the question of some rows is asked; the last observation where unknown."""
        last = self.times[self.offsets[1:][rows] - 1]
        if self.hours_read is None:
            return last
        hours = self.hours_read[rows]
        return np.where(np.isnan(hours), last, hours)

    def longest_gaps(self) -> NDArray[np.float64]:
        """Return the longest time without an observation of each row in hours, (N,)."""
        if not len(self):
            return np.empty(0)
        gaps = np.diff(self.times, prepend=self.times[:1])
        gaps[self.offsets[:-1]] = 0.0  # nothing precedes the first observation of a row
        waits = self.prediction_times() - self.last_times
        return np.maximum(np.maximum.reduceat(gaps, self.offsets[:-1]), waits)

    def measured(self, i: int) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Yield position, times and values of each feature of row ``i`` that was measured."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        for f, values in enumerate(self.values[rows].T):
            present = ~np.isnan(values)
            if present.any():
                yield f, self.times[rows][present], values[present]

    def summary_names(self) -> list[str]:
        """Return the S names of the columns of ``summaries``."""
        return summary_names(self.features, prediction_time=self.hours_read is not None)

    def summaries(self) -> NDArray[np.float64]:
        """Return the statistics of each row, (N, S), named by ``summary_names``; computed once."""
        if self._summaries is None:
            self._summaries = summary_features(self.times, self.values, self.lengths)
            if self.hours_read is not None:
                since = self.hours_read - self.last_times
                self._summaries = np.column_stack([self._summaries, since])
        return self._summaries

    def plausible(self, feature: int) -> tuple[float, float]:
        """Return the declared limits of a feature, or what is not far outside its quartiles."""
        if limits := self.limits(feature):
            return limits
        values = self.values[:, feature]
        numbers = values[~np.isnan(values)]
        if not len(numbers):
            return -np.inf, np.inf
        q1, q3 = np.quantile(numbers, [0.25, 0.75])
        reach = FAR_OUT * (q3 - q1) if q3 > q1 else np.inf
        return float(q1 - reach), float(q3 + reach)

    # ------------------------------------------------------------------ batches and choices

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the rows at B positions to one batch, in the given order."""
        import torch  # loading takes a second that checking a file, and --help, need not wait

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.float32))

        index = np.asarray(indices, dtype=np.int64)
        positions, present = self._positions(index)
        rows = np.where(present, positions, positions[:, :1])  # padding repeats the first: hour 0
        start = self.times[positions[:, 0]]
        values = self.values[rows].astype(np.float32)  # (B, L, F)
        observed = ~np.isnan(values) & present[..., None]
        return Batch(
            times=tensor(self.times[rows] - start[:, None]),
            values=torch.from_numpy(np.where(observed, values, np.float32(0))),
            observed=torch.from_numpy(observed),
            prediction_hours=tensor(self.prediction_times(index) - start),
            summaries=tensor(self.summaries()[index]),
            static=tensor(self.static_values(index)),
            labels=tensor(self.labels[index]),
            outcomes=tensor(self.targets(index)),
            index=torch.from_numpy(index),
        )

    def _positions(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return flat rows (B, L) from the start of each trajectory, and which belong to it."""
        starts = self.offsets[index][:, None]
        lengths = self.offsets[index + 1][:, None] - starts
        steps = np.arange(lengths.max(initial=0))
        return starts + steps, steps < lengths

    def rows_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the flat rows of the chosen trajectories, joined."""
        positions, present = self._positions(index)
        return positions[present]

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """Return a data set of the chosen rows only, in the given order."""
        chosen_rows = copy.copy(self)
        rows = self.rows_of(indices)
        chosen_rows.times, chosen_rows.values = self.times[rows], self.values[rows]
        chosen_rows.offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(chosen_rows, name, None if column is None else column[indices])
        return chosen_rows

    def keep_observations(self, mask: NDArray[np.bool_]) -> None:
        """Keep the observations that a mask marks."""
        sizes = np.bincount(self.owner[mask], minlength=len(self))
        self.times, self.values = self.times[mask], self.values[mask]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._summaries = None

    def keep_latest(self, max_len: int) -> None:
        """Keep the most recent observations of each row."""
        # An array's integers hold no more than its length, whatever max_len was given.
        first = self.offsets[1:][self.owner] - min(max_len, len(self.times))
        self.keep_observations(np.arange(len(self.times)) >= first)

    def up_to(self, lengths: NDArray[np.int64]) -> Self:
        """Return the first ``lengths`` (N,) observations of each row, predicted at the last one."""
        beginning = copy.copy(self)
        position = np.arange(len(self.times)) - np.repeat(self.offsets[:-1], self.lengths)
        beginning.keep_observations(position < np.repeat(lengths, self.lengths))
        if self.prediction_hours is not None:
            is_unknown = np.isnan(self.prediction_hours)
            # An unknown prediction time stays unknown.
            beginning.prediction_hours = np.where(is_unknown, np.nan, beginning.last_times)
        if self.event_hours is not None:  # nobody in the data has an event before the later moment
            moved = self.prediction_times() - beginning.prediction_times()
            beginning.entry_hours, beginning.event_hours = moved, self.event_hours + moved
        return beginning

    def sample_patients(self, max_patients: int, seed: int) -> Self:
        """Return all rows of at most so many patients, drawn by ``seed``; 0 means all."""
        patients = np.unique(self.groups)
        if max_patients == 0 or len(patients) <= max_patients:
            return self
        sample = np.random.default_rng(seed).choice(patients, size=max_patients, replace=False)
        rule = f"not among {max_patients:,} of {len(patients):,} patients drawn (--max_samples)"
        return self.keep_rows(np.isin(self.groups, sample), rule)

    def keep_rows(self, mask: NDArray[np.bool_], rule: str) -> Self:
        """Return the rows that a mask marks; ``flow`` says that a rule removed the others."""
        rows = self.subset(np.flatnonzero(mask))
        rows.add_rule(rule, len(self) - len(rows))
        return rows

    def add_rule(self, rule: str, removed: int) -> None:
        """Add a rule to ``flow``, and how many rows it has removed."""
        counts = removed, len(self), self.n_patients
        line = pd.DataFrame([(rule, *counts)], columns=list(FLOW_COLUMNS))
        self.flow = line if self.flow is None else pd.concat([self.flow, line])

    def split(self, seed: int) -> Split:
        """Divide the rows 80/10/10 by patient, stratified by event; ``parts`` overrides."""
        if self.parts is not None:
            return given_split(self.groups, self.labels, self.parts, self.source)
        split = draw_split(self.groups, self.labels, seed, self.source)
        for part in {"val", "test"} - {*self.held_out}:
            split["train"] = np.sort(np.concatenate([split["train"], split[part]]))
            split[part] = split[part][:0]
        return split

    def describe_origin(self, seed: int) -> str:
        """Return how the parts of ``split`` come about, in words."""
        if self.parts is not None:
            return self.parts_origin
        if not self.held_out:
            return "all patients train, none is held out"
        if "test" not in self.held_out:
            return f"drawn by seed {seed}, a tenth validates, all others train"
        return f"drawn by seed {seed}, 80/10/10, stratified by event"

    # ------------------------------------------------------------------ inputs

    @property
    def series_read(self) -> list[int]:
        """Positions of the features that a model reads."""
        names = self.features if self.series_inputs is None else self.series_inputs
        return [f for f, name in enumerate(self.features) if name in names]

    def series_patients(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Count the patients of some rows that have a value of each feature that is read."""
        patients = pd.factorize(self.groups[rows])[0]  # numbers are counted faster
        owners = np.repeat(patients, self.lengths[rows])
        mask = ~np.isnan(self.values[self.rows_of(rows)])
        return {self.features[f]: count_patients(owners, mask[:, f]) for f in self.series_read}

    def unusable_series(self, train: NDArray[np.int64]) -> dict[str, str]:
        """Return the series that too few training patients have, and why; refuse if all are so."""
        counts = self.series_patients(train)
        reason = f"fewer than {MIN_CELL} training patients have it"
        unusable = {name: reason for name, count in counts.items() if count < MIN_CELL}
        if len(unusable) == len(counts):
            raise InputError(
                f"{self.source}: no series has values of {MIN_CELL} training patients "
                f"({', '.join(unusable)}): train on more patients"
            )
        return unusable

    def static_table(self, names: Sequence[str]) -> pd.DataFrame:
        """Return static features by their names, N rows, NaN where unknown."""
        return pd.DataFrame(self.static, columns=list(self.static_names))[list(names)]

    def static_values(self, rows: Rows = slice(None)) -> NDArray[np.float64]:
        """Return the static features of some rows that a model reads, (n, K), NaN where unknown."""
        positions = [self.static_names.index(name) for name in self.static_inputs]
        return self.static[rows][:, positions]

    def unusable_static(self, train: NDArray[np.int64]) -> dict[str, str]:
        """Return the static features that no model can learn from on the training part, and why."""
        unusable = {}
        for name, column in zip(self.static_names, self.static[train].T, strict=True):
            if len(np.unique(column[~np.isnan(column)])) < 2:
                unusable[name] = "the training part holds no two different values of it"
            elif patients_behind(column, self.groups[train]) < MIN_CELL:
                unusable[name] = (
                    f"fewer than {MIN_CELL} training patients have it, or another value than the "
                    "most frequent one"
                )
        return unusable

    def with_inputs(
        self, static: Sequence[str], *, prediction_time: bool, series: Sequence[str] | None = None
    ) -> Self:
        """Choose what a model reads, ``series`` None: as before; refuse data that lack an input."""
        missing = [name for name in static if name not in self.static_names]
        if prediction_time and self.prediction_hours is None:
            missing.append("prediction_hours")
        self._refuse(missing)
        view = copy.copy(self) if series is None else self.with_series(series)
        view.static_inputs, view.reads_prediction_time = tuple(static), prediction_time
        view._summaries = None
        return view

    def _refuse(self, names: Sequence[str]) -> None:
        """Refuse data that lack inputs of a model."""
        if names:
            raise InputError(
                f"{self.source}: the model reads {', '.join(names)}: add the columns, their "
                "cells empty where unknown"
            )

    def with_series(self, series: Sequence[str]) -> Self:
        """Return the rows with all other series blank; a row may lose all its observations."""
        self._refuse([name for name in series if name not in self.features])
        view = copy.copy(self)
        view.series_inputs = tuple(series)
        positions = view.series_read
        if self.series_read != positions:
            view.values = self.values.copy()
            view.values[:, np.setdiff1d(np.arange(len(self.features)), positions)] = np.nan
            view.keep_observations(np.asarray(~np.isnan(view.values).all(axis=1)))
            view.main = self.main if self.main in positions else positions[0]
        return view

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Return the columns that each simple model beside the encoder reads, N rows each."""
        table = pd.DataFrame(self.summaries(), columns=self.summary_names())
        return {
            "last value": table[[f"{name} last" for name in self.features]],
            # A good model of it shows a leak: sampling gives the outcome away.
            "number of observations": pd.DataFrame({"count": self.lengths}),
            "logistic regression": table,
        }

    # ------------------------------------------------------------------ texts

    def value_text(self, feature: int, value: float) -> str:
        """Return a value of a feature with its unit."""
        return f"{plain(value)}{with_space(self.units[feature])}"

    def observation_text(self, position: int) -> str:
        """Return what was measured in one row of ``values``: potassium 4.1 mmol/L."""
        values = self.values[position].tolist()
        features = [f for f, value in enumerate(values) if not np.isnan(value)]
        return ", ".join(f"{self.features[f]} {self.value_text(f, values[f])}" for f in features)

    def prompt(self, i: int, options: PromptOptions = WHOLE_PROMPT) -> str:
        """Return the text that an LLM reads about row ``i``: context, series, question."""
        context = self.contexts[i].rstrip(". ") if options.context else ""
        series = "" if options.series == "none" else self.series_text(i, options)
        return f"{f'{context}. ' if context else ''}{series}{self.question}\n"

    def report(self, i: int) -> str:
        """Return the text that an LLM learns to write: the verdict, then what the series show."""
        if np.isnan(self.labels[i]):
            raise ValueError(f"row {i} has no label, so there is no report to learn")
        verdict = "yes" if self.labels[i] == 1 else "no"
        findings = "".join(clause.text for clause in self.report_clauses(i))
        return f"{self.outcome}: {verdict}{findings}."

    def task_description(self) -> dict[str, str]:
        """Return in words what is predicted, when, and from what."""
        inputs = (
            f"{name} ({unit})" if unit else name
            for name, unit in ((self.features[f], self.units[f]) for f in self.series_read)
        )
        moment = "after the last observation of each row"
        if self.prediction_hours is not None:
            moment = "at the hour that is given with each row"
        return {
            "Question": self.question,
            f"Outcome ({'label' if self.competing_events is None else 'event'} 1)": self.outcome,
            "Prediction time": f"{moment}; the file does not say how that moment was chosen",
            "Horizon": "not stated: ask whoever made the labels until when an event counts",
            "Series": ", ".join(inputs),
        }

    # ------------------------------------------------------------------ hashes

    def fingerprint(self) -> str:
        """Return a hash of all that a run can learn from: series, labels, patients, text, split."""
        numbers = [self.times, self.values, self.offsets, self.labels, self.static]
        numbers += [] if self.prediction_hours is None else [self.prediction_hours]
        numbers += [] if self.competing_events is None else [self.targets()]
        texts = [self.ids, self.groups, self.contexts, self.parts]
        texts += [np.array(self.static_names)] if self.static_names else []
        return hash_columns(numbers, texts)

    def row_fingerprint(self) -> str:
        """Return a hash of who is in the data, whichever series and texts are read."""
        return hash_columns([self.targets()], [self.ids, self.groups, self.parts])


@dataclass(frozen=True)
class ScoringRows:
    """Some n rows to be scored, in the input's order, of which m can be read."""

    ids: NDArray[Any]  # (n,)
    numbers: NDArray[np.int64]  # (n,) of the rows in the file
    dataset: TrajectoryDataset  # m rows
    positions: NDArray[np.int64]  # (m,) of those among the n
    read: int  # bytes or rows of the input up to here

    def without(self, bad: NDArray[np.bool_], problem: str, findings: Findings) -> ScoringRows:
        """Return the rows without those of the data set that ``bad`` (m,) marks; note why."""
        if not bad.any():
            return self
        findings.reject(pd.Series(bad, self.numbers[self.positions]), "", problem)
        good = np.flatnonzero(~bad)
        return replace(self, dataset=self.dataset.subset(good), positions=self.positions[good])


def hash_columns(numbers: Iterable[NDArray[Any]], texts: Iterable[NDArray[Any] | None]) -> str:
    """Return the SHA-256 of columns in their order, None being an empty one."""
    digest = hashlib.sha256()
    for array in numbers:
        digest.update(np.ascontiguousarray(array).tobytes())
    for column in texts:
        digest.update(json.dumps([] if column is None else column.tolist()).encode())
    return digest.hexdigest()
