"""The trajectory contract: irregular series with labels, patients and texts.

A data set holds N series raggedly: flat ``times`` (hours) and ``values`` (raw units), cut by
``offsets``. ``collate`` pads any choice of them to a batch; ``split`` keeps the rows of a patient
in one part. Letters: N series, B a batch of them, L observations, F features.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.case_mix import ages_of, bands_of, case_mix_of, people_of, sexes_of
from medgemma_clinical.data.facts import (
    CONTEXT_FACT,
    context_table,
    frequent_words,
    patients_behind,
    unusable_facts,
)
from medgemma_clinical.data.ragged import RaggedSeries
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.data.splits import draw_split, given_split
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
    from medgemma_clinical.data.scoring import ScoringRows

FAR_OUT = 10.0
"""Without declared limits a value is implausible so many interquartile ranges outside."""

FLOW_COLUMNS = ("rule", "removed", "left")
"""Columns of ``flow``: a rule, the rows that it removed, the rows left after it."""


class TrajectoryDataset(RaggedSeries):
    """N irregular series with labels, patients and text; subclasses bring the clinical words.

    Attributes, beside those of ``RaggedSeries``:
        name: the data set's key among the program's data sets, ``--dataset``.
        kind: the data's format, in a report's words.
        source_flag: the trainer's flag for the place of the data, without dashes.
        options: the trainer's flags that the constructor takes as keywords, None where not given.
        ids: (N,) str, the name of a row in prediction files.
        groups: (N,) str, the patient; the rows of a patient are in one part of a split.
        contexts: (N,) str, what else an LLM may read, may be empty.
        statics: (N, number of ``static_names``) float64, declared facts, NaN where unknown.
        parts: (N,) str of train, val, test where the data bring their own split, else None.
        units: F units, empty where a feature has none.
        static_names: names of the declared facts.
        question: the question about a series, a sentence.
        outcome: the event in a few words; a report begins with it.
        time_scale: hours that are one unit of time to the encoder.
        assumed_time_scale: whether it is the format's default, which may not fit the data.
        source: where the data come from, as errors name it.
        reading: the arguments that decide what a row is and which of its observations are kept;
            plain types. A checkpoint stores them to read other data in the same way.
        main: position of the series that stands for the others in texts.
        fixed_features: the features belong to the format: one that is never measured is no mistake.
        named: whether the data name their patients; else each row is one, known by its number.
        flow: how the data came to their rows, ``FLOW_COLUMNS``; None where unknown.
        warnings: what seems to be a mistake in the source, as logged when it was read.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    source_flag: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    fixed_features: ClassVar[bool] = False
    reads_contexts: ClassVar[bool] = True
    """Whether words and numbers of the contexts are facts beside the declared ones."""
    report_hours: ClassVar[float] = 1.0
    """Hours that are one unit of time in reports."""

    row_columns: ClassVar[tuple[str, ...]] = (
        *RaggedSeries.row_columns,
        *("ids", "groups", "contexts", "parts", "statics"),
    )
    """Attributes with one entry a series; a subclass that has more names them too."""

    units: tuple[str, ...]
    static_names: tuple[str, ...] = ()
    question: str
    outcome: str
    time_scale: float
    assumed_time_scale: bool = False
    source: str
    reading: dict[str, Any]
    main: int = 0
    named: bool = True
    flow: pd.DataFrame | None = None
    warnings: tuple[str, ...] = ()

    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    contexts: NDArray[np.object_]
    parts: NDArray[np.str_] | None
    statics: NDArray[np.float64] | None = None

    # ------------------------------------------------------------------ what a subclass brings

    def limits(self, feature: int) -> tuple[float, float] | None:
        """Return the declared plausible range of a feature, None where none is declared."""
        raise NotImplementedError

    def reference(self, feature: int) -> Reference | None:
        """Return the reference range of a feature in a healthy adult, None where unknown."""
        return None

    def series_text(self, i: int, options: PromptOptions) -> str:
        """Return series ``i`` in words as ``options`` ask, ``series`` not being ``none``.

        Ends with a space, unless it is empty.
        """
        raise NotImplementedError

    def report_clauses(self, i: int) -> list[Clause]:
        """Return the statements of a report behind its verdict, the first of them with a label."""
        raise NotImplementedError

    @classmethod
    def scoring_rows(
        cls, source: Any, config: dict[str, Any], findings: Findings, most: int
    ) -> Iterator[ScoringRows]:
        """Read rows to be scored, as a checkpoint's data were read, ``most`` at a time.

        Args:
            source: file or folder, or what else a subclass reads.
            config: of the checkpoint; ``Data.description`` is part of it.
            findings: gets the problems of rows that cannot be read.
            most: rows at a time.

        Raises:
            InputError: the source is not what the checkpoint reads, or cannot be read.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ series

    def plausible(self, feature: int) -> tuple[float, float]:
        """Return the declared limits of a feature, or what is not far outside its quartiles."""
        if limits := self.limits(feature):
            return limits
        values = self.values[:, feature]
        measured = values[~np.isnan(values)]
        if not len(measured):
            return -np.inf, np.inf
        q1, q3 = np.quantile(measured, [0.25, 0.75])
        reach = FAR_OUT * (q3 - q1) if q3 > q1 else np.inf
        return float(q1 - reach), float(q3 + reach)

    def check_measured(self, train: NDArray[np.int64]) -> None:
        """Refuse a series, or a prediction time, that no patient of the training part has.

        Args:
            train: positions of the training part.

        Raises:
            InputError: its name, and how to go on without it.
        """
        if self.hours_read is not None and np.isnan(self.hours_read[train]).all():
            raise InputError(
                f"{self.source}: no patient of the training part has a prediction time: fill the "
                "column prediction_hours, or leave it unread by --prediction_time off"
            )
        unknown = np.isnan(self.values[self.rows_of(train)])
        never = [
            name for name, column in zip(self.features, unknown.T, strict=True) if column.all()
        ]
        if never and not self.fixed_features:  # which nobody has chosen
            rest = ",".join(name for name in self.features if name not in never)
            raise InputError(
                f"{self.source}: the training part never measures {', '.join(never)}: go on "
                f'without it by --series "{rest}"'
            )

    def patients_behind(self, train: NDArray[np.int64]) -> dict[str, dict[str, int]]:
        """Count the training patients behind each input whose mean a stage 1 keeps.

        Args:
            train: positions of the training part.

        Returns:
            ``series``: patients with a value; ``statics``: see ``facts.patients_behind``, with
            ``prediction_hours`` where a model reads them.
        """
        groups, hours = self.groups[train], self.hours_read
        measured = ~np.isnan(self.values[self.rows_of(train)])
        owners = np.repeat(groups, self.lengths[train])
        statics = zip(self.fact_names, self.known_facts()[train].T, strict=True)
        behind = {name: patients_behind(column, groups) for name, column in statics}
        if hours is not None:
            behind["prediction_hours"] = count_patients(groups, ~np.isnan(hours[train]))
        series = [count_patients(owners, column) for column in measured.T]
        return {"series": dict(zip(self.features, series, strict=True)), "statics": behind}

    @property
    def n_patients(self) -> int:
        """Number of different patients."""
        return len(np.unique(self.groups))

    # ------------------------------------------------------------------ choice of rows

    def sample_patients(self, most: int, seed: int) -> Self:
        """Return all series of at most ``most`` patients, drawn by ``seed``; 0 means all.

        Rows that are not drawn appear in ``flow``.
        """
        patients = np.unique(self.groups)
        if most == 0 or len(patients) <= most:
            return self
        drawn = np.random.default_rng(seed).choice(patients, size=most, replace=False)
        sample = self.subset(np.flatnonzero(np.isin(self.groups, drawn)))
        rule = f"not among {most:,} of {len(patients):,} patients drawn (--max_samples)"
        line = (rule, len(self) - len(sample), len(sample))
        drawing = pd.DataFrame([line], columns=list(FLOW_COLUMNS))
        sample.flow = drawing if self.flow is None else pd.concat([self.flow, drawing])
        return sample

    def split(self, seed: int) -> dict[str, NDArray[np.int64]]:
        """Divide the rows 80/10/10 by patient, stratified by event; ``parts`` overrides.

        Args:
            seed: decides the part of each patient.

        Returns:
            Ascending positions in the data set for each of ``train``, ``val``, ``test``.

        Raises:
            InputError: a part would lack patients with or without an event.
        """
        if self.parts is not None:
            return given_split(self.groups, self.labels, self.parts, self.source)
        return draw_split(self.groups, self.labels, seed, self.source)

    # ------------------------------------------------------------------ texts

    def value_text(self, feature: int, value: float) -> str:
        """Return a value of a feature with its unit."""
        return f"{plain(value)}{with_space(self.units[feature])}"

    def observation_text(self, place: int) -> str:
        """Return what was measured in one row of ``values``: potassium 4.1 mmol/L."""
        values = self.values[place].tolist()
        known = [f for f, value in enumerate(values) if not np.isnan(value)]
        return ", ".join(f"{self.features[f]} {self.value_text(f, values[f])}" for f in known)

    def prompt(self, i: int, options: PromptOptions = WHOLE_PROMPT) -> str:
        """Return the text that an LLM reads about series ``i``: context, series, question."""
        context = self.contexts[i].rstrip(". ") if options.context else ""
        series = "" if options.series == "none" else self.series_text(i, options)
        return f"{f'{context}. ' if context else ''}{series}{self.question}\n"

    def report(self, i: int) -> str:
        """Return the text that an LLM learns to write: the verdict, then what the series show.

        Raises:
            ValueError: the label of series ``i`` is unknown.
        """
        if np.isnan(self.labels[i]):
            raise ValueError(f"series {i} has no label, so there is no report to learn")
        verdict = "yes" if self.labels[i] == 1 else "no"
        findings = "".join(clause.text for clause in self.report_clauses(i))
        return f"{self.outcome}: {verdict}{findings}."

    def asked(self) -> dict[str, str]:
        """Return in words what is predicted, when, and from what."""
        inputs = (
            f"{name} ({unit})" if unit else name
            for name, unit in zip(self.features, self.units, strict=True)
        )
        moment = "after the last observation of each row"
        if self.prediction_hours is not None:
            moment = "at the hour that is given with each row"
        return {
            "Question": self.question,
            "Outcome (label 1)": self.outcome,
            "Prediction time": f"{moment}; the file does not say how that moment was chosen",
            "Horizon": "fixed by the labels; the file does not say it",
            "Series": ", ".join(inputs),
        }

    # ------------------------------------------------------------------ inputs beside the series

    def choose_facts(self, train: NDArray[np.int64]) -> list[str]:
        """Return the names of the facts that a model may learn from.

        Args:
            train: positions of the training part, which alone decides.
        """
        part = self.subset(train)
        words = frequent_words(part.contexts.tolist()) if self.reads_contexts else []
        table = part.fact_table([*self.static_names, *words])
        unusable = unusable_facts(table, part.groups)
        return [name for name in map(str, table) if name not in unusable]

    def fact_table(self, names: Sequence[str]) -> pd.DataFrame:
        """Return facts of each row by their names, N rows; NaN where unknown."""
        words = [name for name in names if name not in self.static_names]
        table = pd.DataFrame(index=range(len(self)))
        if words:
            table = context_table(self.contexts.tolist(), words)
        if self.statics is not None:
            table[list(self.static_names)] = self.statics
        return table[list(names)]

    def with_inputs(self, facts: Sequence[str], *, prediction_time: bool) -> Self:
        """Return the same rows with the inputs of a model beside the series.

        Args:
            facts: names of the facts.
            prediction_time: whether the prediction time is read.

        Raises:
            InputError: the data do not have a declared fact, or no prediction time.
        """
        lacking = [
            name
            for name in facts
            if name not in self.static_names
            and not (self.reads_contexts and CONTEXT_FACT.fullmatch(name))
        ]
        if prediction_time and self.prediction_hours is None:
            lacking.append("prediction_hours")
        if lacking:
            raise InputError(
                f"{self.source}: the model reads {', '.join(lacking)}: add the columns, their "
                "cells empty where unknown"
            )
        chosen = copy.copy(self)
        chosen.fact_names, chosen.facts = tuple(facts), self.fact_table(facts).to_numpy()
        chosen._summaries = None
        chosen.reads_prediction_time = prediction_time
        return chosen

    # ------------------------------------------------------------------ tables

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Return what each simple model beside the encoder may see, N rows each.

        The number of observations alone detects leaks: a good model of it shows that sampling
        gives the outcome away.
        """
        table = pd.DataFrame(self.summaries(), columns=self.summary_names())
        return {
            "last value": table[[f"{name} last" for name in self.features]],
            "number of observations": pd.DataFrame({"count": self.lengths}),
            "logistic regression": table,
        }

    def people(self) -> pd.DataFrame:
        """Return what reports distinguish rows by: N rows, see ``case_mix.people_of``."""
        texts = self.contexts.tolist()
        return people_of(self.lengths, ages_of(texts), sexes_of(texts))

    def subgroups(self) -> pd.DataFrame:
        """Return the subgroups of each row that a report looks at; see ``case_mix.bands_of``."""
        return bands_of(self.people())

    def case_mix(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Describe the patients of some rows, at least one; see ``case_mix.case_mix_of``."""
        return case_mix_of(self.people().iloc[rows], self.labels[rows], self.groups[rows])

    # ------------------------------------------------------------------ hashes

    def fingerprint(self) -> str:
        """Return a hash of all that a run can learn from: series, labels, patients, text, split."""
        numbers = [self.times, self.values, self.offsets, self.labels]
        numbers += [x for x in (self.statics, self.prediction_hours) if x is not None]
        texts = [self.ids, self.groups, self.contexts, self.parts]
        texts += [np.array(self.static_names)] if self.static_names else []
        return hash_columns(numbers, texts)

    def row_fingerprint(self) -> str:
        """Return a hash of who is in the data, whichever series and texts are read."""
        return hash_columns((self.labels,), (self.ids, self.groups, self.parts))


def hash_columns(numbers: Sequence[NDArray[Any]], texts: Sequence[NDArray[Any] | None]) -> str:
    """Return the SHA-256 of columns in their order, None being an empty one."""
    digest = hashlib.sha256()
    for array in numbers:
        digest.update(np.ascontiguousarray(array).tobytes())
    for column in texts:
        digest.update(json.dumps([] if column is None else column.tolist()).encode())
    return digest.hexdigest()
