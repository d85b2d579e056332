"""The trajectory contract: irregular series with labels, patients and texts.

A data set holds N series raggedly: flat ``times`` (hours) and ``values`` (raw units), cut by
``offsets``. ``collate`` pads any choice of them to a batch; ``split`` keeps the rows of a patient
in one part. Letters: N series, B a batch of them, L observations, F features.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NotRequired, Self, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.case_mix import ages_of, bands_of, case_mix_of, people_of, sexes_of
from medgemma_clinical.data.small_cells import count_patients, is_small
from medgemma_clinical.data.splits import draw_split, given_split
from medgemma_clinical.data.summaries import context_facts, summary_features
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.data.texts import (
    WHOLE_PROMPT,
    Clause,
    PromptOptions,
    ReportScore,
    clause_text,
    score_report,
)
from medgemma_clinical.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FAR_OUT = 10.0
"""Without declared limits a value is implausible so many interquartile ranges outside."""

FLOW_COLUMNS = ("rule", "removed", "left")
"""Columns of ``flow``: a rule, the rows that it removed, the rows left after it."""


class Batch(TypedDict):
    """Padded series: B patients, L observations, F features.

    times (B, L) float32 hours since the patient's first observation, zero in padding;
    values (B, L, F) float32 raw units, zero where not measured; observed (B, L, F) bool, all False
    in padding rows; labels (B,) float32, NaN where unknown; index (B,) int64 into the data set;
    plan: what an encoder that plans computes ahead of these series.
    """

    times: Tensor
    values: Tensor
    observed: Tensor
    labels: Tensor
    index: Tensor
    plan: NotRequired[Any]


class TrajectoryDataset:
    """N irregular series with labels, patients and text; subclasses bring the clinical words.

    Attributes:
        name: the data set's key among the program's data sets, ``--dataset``.
        kind: the data's format, in a report's words.
        source_flag: the trainer's flag for the place of the data, without dashes.
        options: the trainer's flags that the constructor takes as keywords, None where not given.
        times: (all observations,) float64 hours, not decreasing within a series.
        values: (all observations, F) float64 raw units, NaN where not measured.
        offsets: (N + 1,) int64; series i has rows ``offsets[i]:offsets[i + 1]``.
        labels: (N,) float64 of 0 and 1, NaN where unknown.
        ids: (N,) str, the name of a row in prediction files.
        groups: (N,) str, the patient; the rows of a patient are in one part of a split.
        contexts: (N,) str, what else an LLM may read, may be empty.
        parts: (N,) str of train, val, test where the data bring their own split, else None.
        features: F names.
        units: F units, empty where a feature has none.
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
    row_columns: ClassVar[tuple[str, ...]] = ("labels", "ids", "groups", "contexts", "parts")
    """Attributes with one entry a series; a subclass that has more names them too."""

    features: tuple[str, ...]
    units: tuple[str, ...]
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

    times: NDArray[np.float64]
    values: NDArray[np.float64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.float64]
    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    contexts: NDArray[np.object_]
    parts: NDArray[np.str_] | None

    # ------------------------------------------------------------------ what a subclass brings

    def limits(self, feature: int) -> tuple[float, float] | None:
        """Return the declared plausible range of a feature, None where none is declared."""
        raise NotImplementedError

    def series_text(self, i: int, options: PromptOptions) -> str:
        """Return series ``i`` in words as ``options`` ask, ``series`` not being ``none``.

        Ends with a space, unless it is empty.
        """
        raise NotImplementedError

    def report_clauses(self, i: int) -> list[Clause]:
        """Return the statements of a report behind its verdict; joined they are its text."""
        raise NotImplementedError

    @classmethod
    def scoring_rows(
        cls, source: Path, config: dict[str, Any], findings: Findings, most: int
    ) -> Iterator[ScoringRows]:
        """Read rows to be scored, as a checkpoint's data were read, ``most`` at a time.

        Args:
            source: file or folder.
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

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Observations a series, (N,)."""
        return np.diff(self.offsets)

    def longest_gaps(self) -> NDArray[np.float64]:
        """Return the longest time between two observations of each series in hours, (N,)."""
        gaps = np.diff(self.times, prepend=self.times[:1])
        gaps[self.offsets[:-1]] = 0.0  # nothing precedes the first observation of a series
        return np.maximum.reduceat(gaps, self.offsets[:-1]) if len(self) else np.empty(0)

    def longest_gap(self) -> float:
        """Return the longest time between two observations of one series, in hours."""
        return float(self.longest_gaps().max())

    def measured(self, i: int) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Yield position, times and values of each feature of series ``i`` that was measured."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        for f, values in enumerate(self.values[rows].T):
            present = ~np.isnan(values)
            if present.any():
                yield f, self.times[rows][present], values[present]

    def check_measured(self, train: NDArray[np.int64], fewest: int) -> None:
        """Refuse a series that the training part never measures, or in a few patients alone.

        The weights keep the mean of each series: of one patient it is the patient's own value.

        Args:
            train: positions of the training part.
            fewest: patients that a series needs.

        Raises:
            InputError: its name, and how to go on without it.
        """
        measured = ~np.isnan(self.values[self.rows_of(train)])
        groups = np.repeat(self.groups[train], self.lengths[train])
        patients = [count_patients(groups, column) for column in measured.T]
        never = [name for name, n in zip(self.features, patients, strict=True) if n == 0]
        few = [n for n, k in zip(self.features, patients, strict=True) if is_small(k, fewest)]
        rest = ",".join(name for name in self.features if name not in {*never, *few})
        without = f'go on without it by --series "{rest}"'
        if never and not self.fixed_features:  # which nobody has chosen
            raise InputError(
                f"{self.source}: the training part never measures {', '.join(never)}: {without}"
            )
        if few:
            allow = "allow it by --min_cell 0"
            advice = allow if self.fixed_features or not rest else f"{without}, or {allow}"
            raise InputError(
                f"{self.source}: fewer than {fewest} patients of the training part have "
                f"{', '.join(few)}, and the weights would keep their values: {advice}"
            )

    @property
    def n_patients(self) -> int:
        """Number of different patients."""
        return len(np.unique(self.groups))

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the chosen series to one batch, in the given order.

        Args:
            indices: B positions in the data set.

        Returns:
            A ``Batch``; its L is the longest chosen series.
        """
        import torch  # loading takes a second that checking a file, and --help, need not wait

        index = np.asarray(indices, dtype=np.int64)
        positions, present = self._positions(index)
        rows = np.where(present, positions, positions[:, :1])  # padding repeats the first: hour 0
        times = self.times[rows] - self.times[positions[:, :1]]
        values = self.values[rows].astype(np.float32)  # (B, L, F)
        observed = ~np.isnan(values) & present[..., None]
        return Batch(
            times=torch.from_numpy(times.astype(np.float32)),
            values=torch.from_numpy(np.where(observed, values, np.float32(0))),
            observed=torch.from_numpy(observed),
            labels=torch.from_numpy(self.labels[index].astype(np.float32)),
            index=torch.from_numpy(index),
        )

    def _positions(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return flat rows (B, L) from the start of each chosen series, and which belong to it."""
        starts = self.offsets[index][:, None]
        lengths = self.offsets[index + 1][:, None] - starts
        steps = np.arange(lengths.max(initial=0))
        return starts + steps, steps < lengths

    def rows_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the flat rows of the chosen series, joined."""
        positions, present = self._positions(index)
        return positions[present]

    # ------------------------------------------------------------------ choice of rows

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """Return a data set of the chosen series only, in the given order."""
        chosen = copy.copy(self)
        rows = self.rows_of(indices)
        chosen.times, chosen.values = self.times[rows], self.values[rows]
        chosen.offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(chosen, name, None if column is None else column[indices])
        return chosen

    def sample_patients(self, most: int, seed: int) -> Self:
        """Return all series of at most ``most`` patients, drawn by ``seed``; 0 means all.

        Rows that are not drawn appear in the log and in ``flow``.
        """
        patients = np.unique(self.groups)
        if most == 0 or len(patients) <= most:
            return self
        drawn = np.random.default_rng(seed).choice(patients, size=most, replace=False)
        sample = self.subset(np.flatnonzero(np.isin(self.groups, drawn)))
        rule = (f"not drawn (--max_samples {most})", len(self) - len(sample), len(sample))
        drawing = pd.DataFrame([rule], columns=list(FLOW_COLUMNS))
        sample.flow = drawing if self.flow is None else pd.concat([self.flow, drawing])
        drawn_of = f"{most} of {len(patients)} patients drawn (--max_samples)"
        logger.info("%s: %s, with %d of %d rows", self.source, drawn_of, len(sample), len(self))
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
        findings = "".join(map(clause_text, self.report_clauses(i)))
        return f"{self.outcome}: {verdict}. {findings}."

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with the numbers of series ``i``, each in its place."""
        names = [*self.features, *self.units]
        return score_report(text, self.outcome, self.report_clauses(i), names)

    def asked(self) -> dict[str, str]:
        """Return in words what is predicted, when, and from what."""
        inputs = (
            f"{name} ({unit})" if unit else name
            for name, unit in zip(self.features, self.units, strict=True)
        )
        return {
            "Question": self.question,
            "Outcome (label 1)": self.outcome,
            "Prediction time": (
                "after the last observation of each row; the file does not say how that moment "
                "was chosen"
            ),
            "Horizon": "fixed by the labels; the file does not say it",
            "Series": ", ".join(inputs),
        }

    # ------------------------------------------------------------------ tables

    def context_facts(self, train: NDArray[np.int64], fewest: int) -> pd.DataFrame:
        """Return words and numbers of the contexts, N rows; see ``summaries.context_facts``."""
        return context_facts(self.contexts.tolist(), train, self.groups, fewest)

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Return what each simple model beside the encoder may see, N rows each.

        The number of observations alone detects leaks: a good model of it shows that sampling
        gives the outcome away.
        """
        table = summary_features(self.times, self.values, self.lengths, self.features)
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

    def case_mix(self, rows: NDArray[np.int64], fewest: int) -> dict[str, float]:
        """Describe the patients of some rows, at least one; see ``case_mix.case_mix_of``."""
        return case_mix_of(self.people().iloc[rows], self.labels[rows], self.groups[rows], fewest)

    # ------------------------------------------------------------------ hashes

    def fingerprint(self) -> str:
        """Return a hash of all that a run can learn from: series, labels, patients, text, split."""
        numbers = (self.times, self.values, self.offsets, self.labels)
        return hash_columns(numbers, (self.ids, self.groups, self.contexts, self.parts))

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


@dataclass(frozen=True)
class ScoringRows:
    """Some rows to be scored, in the input's order.

    Attributes:
        ids: (n,) the name of each row.
        numbers: (n,) its number in the file.
        dataset: the m of them that can be read.
        places: (m,) positions of those among the n.
        read: bytes or rows of the input up to here.
    """

    ids: NDArray[Any]
    numbers: NDArray[np.int64]
    dataset: TrajectoryDataset
    places: NDArray[np.int64]
    read: int

    def without(self, bad: NDArray[np.bool_], problem: str, findings: Findings) -> ScoringRows:
        """Return the rows without those of the data set that ``bad`` (m,) marks; note why.

        Raises:
            InputError: there are such rows, and the findings are strict.
        """
        if not bad.any():
            return self
        for number in self.numbers[self.places[bad]].tolist():
            findings.add_problem(number, problem)
        good = np.flatnonzero(~bad)
        return replace(self, dataset=self.dataset.subset(good), places=self.places[good])
