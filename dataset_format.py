"""The trajectory contract, and the DKA (MIMIC) file that fills it.

A data set holds N irregular series raggedly: flat ``times`` (hours) and ``values`` (raw units),
cut by ``offsets``. ``collate`` pads any choice of them to a batch; ``split`` keeps every patient
on one side.

Usage:
    python dataset_format.py check dka_training_data.csv     # validate a file, print its summary
    python dataset_format.py from_mimic --mimic_dir DIR --out dka_training_data.csv   # make one

The file has a column ``clinical_trajectory`` such as ``24 (0h) -> 20 (2h) -> 16 (4h)`` and a column
``label_escalation`` (0 or 1). Each column ``trajectory_NAME [unit]`` is a further series of the
same form with its own times; ``subject_id`` (or ``id``), ``clinical_context`` and ``split`` are
used when present. A JSON file of the same name beside it may say what the series and the outcome
are (see ``Description``); without one they are the anion gap in mEq/L and escalation of care.

Letters: N series, B a batch of them, L observations, F features.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypedDict, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
COLUMNS = (
    "clinical_trajectory",
    "label_escalation",
    "subject_id",
    "id",
    "clinical_context",
    "split",
)
FURTHER_SERIES = re.compile(r"trajectory_([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]+)\]\s*)?")
"""A column of one more series: its name, and its unit if it has one."""

SHOW_VALUES = "an error about a cell shows what the cell holds"
"""Help of the flag ``--show_values``."""

MAX_LEN, MAX_LEN_SEVERAL = 20, 64
"""Observations kept of one series, and of several, whose times add up."""

SERIES_TEXT = ("all", "main", "last", "none")
"""How much of the series enters the text: each in full, the main one, last values, nothing."""

HELD_OUT_SHARE = 0.1
"""Share of the patients in each of val and test; the rest trains."""

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
PIECE = rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*h\s*\)\s*"
SERIES = re.compile(rf"{PIECE}(?:->{PIECE})*")
PUNCTUATION = {ord(c): " " for c in map(chr, range(0x3001)) if c in "()h" or c.isspace()}
"""What stands around the numbers of a readable series, spaces of every alphabet included."""
CONTEXT_NUMBER = re.compile(rf"(?:([^\W\d_]+)[ :=]+)?({NUMBER})(?:[ -]?([^\W\d_]+|%))?")
"""A number in a context, and the word in front of it or behind it."""
FIGURE = " (number)"
RAREST_FACT = 0.01
"""Share of the contexts that must hold a fact for a simple model to use it."""

ALL_TEXT = "surrogatepass"
"""How text is written so that every string comes back, also one that is no valid Unicode."""

PARSE_ROWS = 100_000
"""Rows parsed at a time: bounds the memory that the intermediate text takes."""

PARTIAL, OUTGOING = ".partial", ".old"
"""Endings of hidden names: of what is being written, and of what it replaces."""

LARGEST = (np.finfo(np.float32).max, 1e6)
"""Greatest absolute value that float32 holds, and a time of 114 years."""

FAR_OUT = 10.0
"""Without limits for a series, a value is suspicious so many interquartile ranges outside."""

AGE_BANDS = {
    "under 18": 18.0,
    "18 to 39": 40.0,
    "40 to 59": 60.0,
    "60 to 74": 75.0,
    "75 or older": np.inf,
}
OBSERVATION_BANDS = {
    "1": 2.0,
    "2": 3.0,
    "3 to 4": 5.0,
    "5 to 9": 10.0,
    "10 to 19": 20.0,
    "20 or more": np.inf,
}
"""Subgroups of a report: each band with the number that lies just above it."""

UNKNOWN = "not known"
AGE = re.compile(r"\b([0-9]{1,3})[- ]years?[- ]old\b|\baged?[ :=]+([0-9]{1,3})\b", re.IGNORECASE)
SEXES = {
    "woman": re.compile(r"\b(?:woman|female|girl)\b", re.IGNORECASE),
    "man": re.compile(r"\b(?:man|male|boy)\b", re.IGNORECASE),
}
"""How a context tells age (years) and sex."""

DIRECTIONS = ("level", "rising", "falling")
USUAL_SPAN_HOURS = (0.5, 24 * 60)
"""A median series shorter or longer than this was probably not written in hours."""


class InputError(ValueError):
    """A mistake in what the user gave; its text is one line: what, where, what to do.

    Args:
        text: never shows what a patient's cell holds.
        value: what the cell holds, for whoever asks for it by ``--show_values``.
    """

    def __init__(self, text: str, value: object = None) -> None:
        """Keep both apart, and the text one line, whatever names of files and columns hold."""
        super().__init__(one_line(text))
        self.value = value

    def told(self, *, show_value: bool) -> str:
        """Give the text, with the cell's content where that is asked for and known."""
        shown = show_value and self.value is not None
        return f"{self}: it holds {self.value!r}" if shown else str(self)


def one_line(text: str) -> str:
    """Write line breaks, and whatever else cannot be seen, as Python does: ``\\n``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def parse_known_args(self, *given: Any, **more: Any) -> Any:
        """Refuse ``--flag=--`` too, of which Python 3.11 makes an empty list."""
        found = super().parse_known_args(*given, **more)
        if empty := [name for name, value in vars(found[0]).items() if value == []]:
            self.error(f"argument --{empty[0]}: expected one argument")
        return found

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"error: {one_line(message)} (see --help)\n")


class Batch(TypedDict):
    """Padded series: B patients, L observations, F features.

    times (B, L) float32 hours since the patient's first observation, zero in padding;
    values (B, L, F) float32 raw units, zero where not measured; observed (B, L, F) bool, all False
    in padding rows; labels (B,) float32, NaN where unknown; index (B,) int64 into the data set.
    """

    times: Tensor
    values: Tensor
    observed: Tensor
    labels: Tensor
    index: Tensor


class TrajectoryDataset:
    """N irregular series with labels, patients and text; subclasses bring the clinical words.

    Attributes:
        times: (all observations,) float64 hours, not decreasing within a series.
        values: (all observations, F) float64 raw units, NaN where not measured.
        offsets: (N + 1,) int64; series i owns rows ``offsets[i]:offsets[i + 1]``.
        labels: (N,) float64 of 0 and 1, NaN where unknown.
        ids: (N,) str, the name of a row in prediction files.
        groups: (N,) str, the patient; no patient is on two sides of a split.
        contexts: (N,) str, what else an LLM may read, may be empty.
        parts: (N,) str of train, val, test where the data bring their own split, else None.
        features: F names.
        units: F units.
        question: what is asked of a series, a sentence.
        outcome: the event in a few words; a report begins with it.
        time_scale: hours that are one unit of time to the encoder.
        source: where the data come from, as an error shall name it.
        reading: what reads other data in the same way: the kind of ``dataset``, and the arguments
            that decide what a row is and which of its observations are kept; plain types.
        main: position of the series that stands for the others in texts.
        series_text: how much of the series ``prompt`` tells, one of ``SERIES_TEXT``.
        text_context: whether ``prompt`` tells the context.
        text_computed: whether ``prompt``, where it tells series value by value, also tells what a
            report has to compute from them: a language model copies well and reckons badly.
        fixed_features: the features belong to the format: one that nobody measured is no mistake.
        named: the data name their patients; else each row is one, known by its number.
        flow: how the data came to their rows: columns rule, removed, left; None where not known.
    """

    features: tuple[str, ...]
    units: tuple[str, ...]
    question: str
    outcome: str
    time_scale: float
    main: int = 0
    series_text: str = "all"
    text_context: bool = True
    text_computed: bool = False
    fixed_features: bool = False
    named: bool = True
    flow: pd.DataFrame | None = None

    times: NDArray[np.float64]
    values: NDArray[np.float64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.float64]
    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    contexts: NDArray[np.object_]
    parts: NDArray[np.str_] | None
    source: str
    reading: dict[str, Any]

    row_columns: tuple[str, ...] = ("labels", "ids", "groups", "contexts", "parts")
    """Attributes with one entry a series; a subclass that brings more names them too."""

    def __len__(self) -> int:
        """Give N."""
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Observations a series, (N,)."""
        return np.diff(self.offsets)

    def longest_gap(self) -> float:
        """Give the longest time between two observations of one series, in hours."""
        return float(self.longest_gaps().max())

    def longest_gaps(self) -> NDArray[np.float64]:
        """Give the longest time between two observations of each series in hours, (N,)."""
        gaps = np.diff(self.times, prepend=self.times[:1])
        gaps[self.offsets[:-1]] = 0.0  # the first observation of a series follows nothing
        return np.maximum.reduceat(gaps, self.offsets[:-1]) if len(self) else np.empty(0)

    def measured(self, i: int) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Give each feature of series ``i`` that was measured: its place, times and values."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        for f, values in enumerate(self.values[rows].T):
            seen = ~np.isnan(values)
            if seen.any():
                yield f, self.times[rows][seen], values[seen]

    def plausible(self, feature: int) -> tuple[float, float]:
        """Give the lowest and highest value of a feature that a living patient shows."""
        raise NotImplementedError

    def refuse_unmeasured(self, train: NDArray[np.int64]) -> None:
        """Refuse a series of the user's that the training part never measures.

        Raises:
            InputError: its name, and how to go on without it.
        """
        rows = self.rows_of(train)
        seen = np.count_nonzero(~np.isnan(self.values[rows]), axis=0)
        never = [name for name, count in zip(self.features, seen, strict=True) if count == 0]
        if never and not self.fixed_features:
            rest = ",".join(name for name in self.features if name not in never)
            raise InputError(
                f"{self.source}: the training part never measures {', '.join(never)}: nothing can "
                f'be learned from it: go on without it by --series "{rest}"'
            )

    def prompt(self, i: int, most: int | None = None) -> str:
        """Give the text that an LLM reads about series ``i``: context, series, question.

        Args:
            i: position in the data set.
            most: tell only so many of the latest observations of each feature.
        """
        context = f"{self.contexts[i].rstrip('. ')}. " if self.contexts[i] else ""
        told = "" if self.series_text == "none" else self._tell(i, most)
        return f"{context if self.text_context else ''}{told}{self.question}\n"

    def _tell(self, i: int, most: int | None) -> str:
        """Put the series of ``i`` into words as ``series_text`` asks, with a space behind."""
        raise NotImplementedError

    def report(self, i: int) -> str:
        """Give the text that an LLM learns to write: the verdict, then what the series show.

        Raises:
            ValueError: the label of series ``i`` is unknown.
        """
        if np.isnan(self.labels[i]):
            raise ValueError(f"series {i} has no label, so there is no report to learn")
        verdict = "yes" if self.labels[i] == 1 else "no"
        findings = "".join("".join(clause) for clause in self._clauses(i))
        return f"{self.outcome}: {verdict}. {findings}."

    def _clauses(self, i: int) -> list[list[str]]:
        """Give what a report says behind its verdict: clauses, each words and numbers in turn."""
        raise NotImplementedError

    words: tuple[str, ...] = DIRECTIONS
    """Of a report, those that may be exchanged for one another without spoiling its form."""

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with the numbers of series ``i``, each in its own place."""
        clauses = self._clauses(i)
        patterns = [
            "".join(f"({NUMBER})" if k % 2 else re.escape(part) for k, part in enumerate(clause))
            for clause in clauses
        ]
        free = "|".join(self.words)
        patterns = [re.sub(rf"\b(?:{free})\b", f"(?:{free})", pattern) for pattern in patterns]
        true = 0
        for clause, pattern in zip(clauses, patterns, strict=True):
            written = re.search(pattern.removeprefix(re.escape(", ")), text)
            true += sum(map(str.__eq__, clause[1::2], written.groups())) if written else 0
        head = rf"{re.escape(self.outcome)}: (yes|no)"
        verdict = re.match(rf"{head}\b", text)
        # Digits of names and units are no claims: PaCO2, vitamin B12.
        said = {self.outcome, *self.features, *self.units} - {""}
        names = "|".join(
            rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(said, key=len, reverse=True)
        )
        return ReportScore(
            verdict=None if verdict is None else int(verdict[1] == "yes"),
            parses=re.fullmatch(rf"{head}\. {''.join(patterns)}\.\s*", text) is not None,
            stated=len(re.findall(NUMBER, re.sub(names, "", text))),
            true=true,
        )

    def subset(self, indices: NDArray[np.int64]) -> TrajectoryDataset:
        """Give a data set of the chosen series only, in the given order."""
        chosen = copy.copy(self)
        rows = self.rows_of(indices)
        chosen.times, chosen.values = self.times[rows], self.values[rows]
        chosen.offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(chosen, name, None if column is None else column[indices])
        return chosen

    def sample_patients(self, most: int, seed: int) -> TrajectoryDataset:
        """Give all series of at most ``most`` patients, drawn by ``seed``; 0 means all."""
        patients = np.unique(self.groups)
        if most == 0 or len(patients) <= most:
            return self
        drawn = np.random.default_rng(seed).choice(patients, size=most, replace=False)
        return self.subset(np.flatnonzero(np.isin(self.groups, drawn)))

    def fingerprint(self) -> str:
        """Hash everything a run can learn from: series, labels, ids, patients, text, split."""
        digest = hashlib.sha256()
        for array in (self.times, self.values, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        self._add_rows(digest)
        return digest.hexdigest()

    def row_fingerprint(self) -> str:
        """Hash who is in the data, whatever of his series is read: labels, ids, patients, split."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        self._add_rows(digest)
        return digest.hexdigest()

    def _add_rows(self, digest: hashlib._Hash) -> None:
        for column in (self.ids, self.groups, self.contexts, self.parts):
            cells = [] if column is None else column.tolist()
            digest.update(json.dumps(cells).encode())

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the chosen series to one batch, in the given order.

        Args:
            indices: B positions in the data set.

        Returns:
            A ``Batch``; its L is the longest chosen series.
        """
        import torch  # 1.3 s that checking a file, and --help, need not wait

        index = np.asarray(indices, dtype=np.int64)
        places, present = self._places(index)
        rows = np.where(present, places, places[:, :1])  # in padding the first, at hour zero
        times = self.times[rows] - self.times[places[:, :1]]
        measured = self.values[rows].astype(np.float32)  # (B, L, F)
        observed = ~np.isnan(measured) & present[..., None]
        return Batch(
            times=torch.from_numpy(times.astype(np.float32)),
            values=torch.from_numpy(np.where(observed, measured, np.float32(0))),
            observed=torch.from_numpy(observed),
            labels=torch.from_numpy(self.labels[index].astype(np.float32)),
            index=torch.from_numpy(index),
        )

    def _places(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give flat rows (B, L) counted from the start of each chosen series, and which are its."""
        starts = self.offsets[index][:, None]
        lengths = self.offsets[index + 1][:, None] - starts  # not self.lengths: that is of all N
        steps = np.arange(lengths.max(initial=0))
        return starts + steps, steps < lengths

    def rows_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the flat rows of the chosen series, joined."""
        places, present = self._places(index)
        return places[present]

    def split(self, seed: int) -> dict[str, NDArray[np.int64]]:
        """Divide into train, val and test, 80/10/10 of the patients.

        Stratified: of the patients with an event and of those without, each part gets its share.
        The order of the rows in the file does not matter. ``parts`` overrides all of it.

        Args:
            seed: decides which patients go where.

        Returns:
            Positions in the data set for each of ``train``, ``val``, ``test``, ascending.

        Raises:
            InputError: a part would lack one of the classes or share a patient with another.
        """
        if self.parts is not None:
            return self._given_split(self.parts)
        owner, event = patient_events(self.groups, self.labels)
        rng = np.random.default_rng(seed)
        part = np.zeros(len(event), dtype=np.int64)
        for outcome, name in ((True, "with"), (False, "without")):
            order = rng.permutation(np.flatnonzero(event == outcome))
            if len(order) < len(PARTS):
                raise InputError(
                    f"{self.source}: {len(order)} patients {name} an event: train, val and test "
                    "need one each at least, else nothing can be learned and checked"
                )
            held_out = max(1, round(HELD_OUT_SHARE * len(order)))
            part[order[:held_out]] = PARTS.index("val")
            part[order[held_out : 2 * held_out]] = PARTS.index("test")
        return {name: np.flatnonzero(part[owner] == k) for k, name in enumerate(PARTS)}

    def _given_split(self, parts: NDArray[np.str_]) -> dict[str, NDArray[np.int64]]:
        """Take the split that the data bring, if it is a fair one."""
        result = {name: np.flatnonzero(parts == name) for name in PARTS}
        owner, event = patient_events(self.groups, self.labels)
        for name, indices in result.items():
            if len(np.unique(event[owner[indices]])) < 2:
                raise InputError(
                    f"{self.source}, column split: {name} ({len(indices)} rows) lacks patients "
                    "with or without an event: each of train, val, test needs both"
                )
        return result

    def summary_features(self) -> pd.DataFrame:
        """Describe each series by the numbers that a simple model would use.

        Returns:
            N rows; per feature ``first``, ``last``, ``min``, ``max``, ``mean`` (raw units),
            ``slope`` (units an hour, least squares), ``count``, ``span`` (hours); NaN where the
            feature was never measured.
        """
        owner = np.repeat(np.arange(len(self)), self.lengths)
        columns = {}
        for f, name in enumerate(self.features):
            seen = ~np.isnan(self.values[:, f])
            long = pd.DataFrame({"t": self.times[seen], "v": self.values[seen, f]})
            by_owner = long.groupby(owner[seen])
            table = by_owner["v"].agg(["first", "last", "min", "max", "mean", "count"])
            centred = long - by_owner.transform("mean")
            product = (centred["t"] * centred["v"]).groupby(owner[seen]).sum()
            square = centred["t"].pow(2).groupby(owner[seen]).sum()
            table["span"] = by_owner["t"].max() - by_owner["t"].min()
            table["slope"] = (product / square).where(table["span"] > 0, 0.0)  # or only rounding
            for statistic, column in table.items():
                columns[f"{name} {statistic}"] = column.reindex(range(len(self)))
        return pd.DataFrame(columns, index=range(len(self)))

    def context_facts(self, train: NDArray[np.int64]) -> pd.DataFrame:
        """Take the contexts apart into what a simple model can use.

        Args:
            train: positions of the training part; what is rare there, or stands everywhere, is
                left out.

        Returns:
            N rows; each number under the word that it belongs to (``54-year-old``, ``76 kg``,
            ``BMI 27``), NaN where absent, and 1 or 0 for each other word.
        """
        rows = [facts_of(context) for context in self.contexts.tolist()]
        counts = Counter(name for i in train for name in rows[i])
        kept = sorted(
            name
            for name, count in counts.items()
            if count >= RAREST_FACT * len(train) and (count < len(train) or name.endswith(FIGURE))
        )
        chosen = [{name: row[name] for name in kept if name in row} for row in rows]
        table = pd.DataFrame(chosen, columns=kept, index=range(len(self)), dtype=float)
        return table.fillna({name: 0.0 for name in kept if not name.endswith(FIGURE)})

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Give what each simple model beside the encoder may see, N rows each.

        The number of observations alone detects leaks: where it does well, sampling gives the
        outcome away.
        """
        table = self.summary_features()
        return {
            "last value": table[[f"{name} last" for name in self.features]],
            "number of observations": pd.DataFrame({"count": self.lengths}),
            "logistic regression": table,
        }

    def ages(self) -> NDArray[np.float64]:
        """Give the age of each row in years, (N,), NaN where the data do not tell it."""
        found = (AGE.search(context) for context in self.contexts.tolist())
        return np.array([np.nan if m is None else float(m[1] or m[2]) for m in found])

    def sexes(self) -> NDArray[np.str_]:
        """Give ``woman``, ``man`` or ``not known`` for each row, (N,)."""
        rows = []
        for context in self.contexts.tolist():
            named = [sex for sex, words in SEXES.items() if words.search(context)]
            rows.append(named[0] if len(named) == 1 else UNKNOWN)
        return np.array(rows, dtype=np.str_)

    def people(self) -> pd.DataFrame:
        """Give what reports tell rows apart by.

        Returns:
            N rows: ``observations``, ``age`` in years (NaN where unknown), ``sex`` (a category).
        """
        sexes = pd.Categorical(self.sexes(), [*SEXES, UNKNOWN], ordered=True)
        return pd.DataFrame({"observations": self.lengths, "age": self.ages(), "sex": sexes})

    def subgroups(self) -> pd.DataFrame:
        """Sort the rows into the groups that a report looks at apart; see ``bands_of``."""
        return bands_of(self.people())

    def case_mix(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Describe who stands in some rows, one at least; see ``case_mix_of``."""
        return case_mix_of(self.people().iloc[rows], self.labels[rows], self.groups[rows])

    def asked(self) -> dict[str, str]:
        """Say in words what is predicted, when, and from what."""
        inputs = (
            f"{name} ({unit})" if unit else name
            for name, unit in zip(self.features, self.units, strict=True)
        )
        return {
            "Question": self.question,
            "Outcome (label 1)": self.outcome,
            "Prediction time": (
                "after the last observation of each row; which day that is was decided by whoever "
                "made the file, which does not say it"
            ),
            "Horizon": "fixed by whoever gave the labels; the file does not say it",
            "Series": ", ".join(inputs),
        }


def bands_of(people: pd.DataFrame) -> pd.DataFrame:
    """Put people into bands: no value of a patient is left.

    Args:
        people: as from ``TrajectoryDataset.people``.

    Returns:
        N rows; ordered categories ``observations`` and, where anything is known of them, ``age``
        (years) and ``sex``; other columns as they are.
    """
    columns: dict[str, Any] = {
        "observations": banded(people["observations"].to_numpy(), OBSERVATION_BANDS)
    }
    if people["age"].notna().any():
        columns["age"] = banded(people["age"].to_numpy(), AGE_BANDS)
    unknown = [] if (people["sex"] != UNKNOWN).any() else ["sex"]
    rest = people.drop(columns=["observations", "age", *unknown])
    return pd.DataFrame(columns, index=people.index).join(rest)


def case_mix_of(
    people: pd.DataFrame, labels: NDArray[np.float64], groups: NDArray[Any]
) -> dict[str, float]:
    """Describe who stands in n rows, by counts, shares and quartiles alone.

    Args:
        people: as from ``TrajectoryDataset.people``.
        labels: (n,), NaN where unknown.
        groups: (n,) patient of each row.

    Returns:
        ``rows``, ``patients``, ``prevalence`` (share of known labels), ``observations`` and ``age``
        (years), each as ``_q1``, ``_median``, ``_q3``, and ``women`` (share of known sexes); what
        the data do not tell is left out.
    """
    mix = {"rows": float(len(people)), "patients": float(len(np.unique(groups)))}
    for name in ("observations", "age"):
        if len(column := people[name].dropna()):
            quartiles = np.quantile(column, [0.25, 0.5, 0.75]).tolist()
            mix |= {
                f"{name}_{place}": q
                for place, q in zip(("q1", "median", "q3"), quartiles, strict=True)
            }
    if not np.isnan(labels).all():
        mix["prevalence"] = float(np.nanmean(labels))
    known = people["sex"][people["sex"] != UNKNOWN]
    if len(known):
        mix["women"] = float((known == "woman").mean())
    return mix


def banded(values: NDArray[Any], bands: dict[str, float]) -> pd.Categorical:
    """Put numbers into bands, NaN into ``not known``; ``bands`` as ``AGE_BANDS``."""
    names = [*bands, UNKNOWN]
    place = np.searchsorted(list(bands.values()), values, side="right")  # NaN comes last
    return pd.Categorical([names[k] for k in place], categories=names, ordered=True)


def facts_of(context: str) -> dict[str, float]:
    """Give the words of a text, and its numbers by the word behind or in front of them."""
    facts = {word.lower(): 1.0 for word in re.findall(r"[^\W\d_]{2,}", context)}
    for before, value, behind in re.findall(CONTEXT_NUMBER, context):
        if word := (behind or before).lower():
            facts.pop(word, None)
            facts[word + FIGURE] = float(value)
    return facts


def patient_events(
    groups: NDArray[np.str_], labels: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give the patient of each row, (n,), and whether any row of a patient has an event."""
    patients, owner = np.unique(groups, return_inverse=True)
    event = np.zeros(len(patients), dtype=bool)
    np.logical_or.at(event, owner, labels == 1)
    return owner, event


DatasetT = TypeVar("DatasetT", bound=TrajectoryDataset)

FLOW = ("rule", "removed", "left")
"""What is told of each rule by which data came to their rows."""


@dataclass(frozen=True)
class Description:
    """What a DKA file's series and label mean, for texts and checks.

    Read from a JSON object in a file of the same name beside the data (``data.csv``,
    ``data.json``); keys that are absent keep these defaults, other keys are ignored.

    Attributes:
        series: name of the series as a clinician writes it.
        unit: unit of its values.
        question: the sentence that is asked about a patient.
        outcome: what label 1 means, in a word or two; a report begins with it.
        plausible: lowest and highest value that a living patient shows.
        limits: the same for further series, by name.
        prediction_time: when it is asked, in words; empty where the file does not say it.
        horizon: how far the question looks ahead, in words; empty likewise.
        flow: how the rows came about: ``rule``, ``removed``, ``left`` of each rule.
    """

    series: str = "Anion gap"
    unit: str = "mEq/L"
    question: str = "Will care have to be escalated?"
    outcome: str = "Escalation"
    plausible: tuple[float, float] = (-5.0, 60.0)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    prediction_time: str = ""
    horizon: str = ""
    flow: tuple[dict[str, Any], ...] = ()

    @classmethod
    def beside(cls, path: Path) -> Description:
        """Read the description of the data file ``path``, or give the default.

        Raises:
            InputError: the JSON file is there and cannot be read.
        """
        file = description_path(path)
        if not file.is_file():
            return cls()
        try:
            content = dict(json.loads(file.read_text(encoding="utf-8")).items())
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            plausible = _rising(known.pop("plausible", cls.plausible))
            limits = {plainly(k): _rising(v) for k, v in known.pop("limits", {}).items()}
            flow = tuple({key: rule[key] for key in FLOW} for rule in known.pop("flow", ()))
            filled = (bool(text) or key == "unit" for key, text in known.items())  # a pH has none
            if not all(isinstance(text, str) for text in known.values()) or not all(filled):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file}: not a description of {path.name}: expected a JSON object with texts "
                "series, unit, question, outcome, two rising numbers plausible, and limits with "
                "two rising numbers for each further series"
            ) from error
        if "csv_sha256" in content and content["csv_sha256"] != hash_of(path):
            logger.warning(
                "%s was made with another %s: make sure that it tells of this one", file, path.name
            )
        return cls(**known, plausible=plausible, limits=limits, flow=flow)


def hash_of(path: Path) -> str | None:
    """Hash a file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def description_path(path: Path) -> Path:
    """Give the place where the description of a data file is looked for."""
    name = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
    return path.with_name(name).with_suffix(".json")


def _rising(pair: Sequence[float]) -> tuple[float, float]:
    low, high = map(float, pair)
    if not low < high:
        raise ValueError
    return low, high


def plainly(name: str) -> str:
    """Give the name of a series as people compare it: ``Urea_Nitrogen`` is ``urea nitrogen``."""
    return " ".join(name.replace("_", " ").lower().split())


class Series(NamedTuple):
    """One series of a file: its column, its name in texts, its unit, empty where it has none."""

    column: str
    name: str
    unit: str


def find_series(
    table: pd.DataFrame, description: Description, chosen: Sequence[str] | None, source: str
) -> list[Series]:
    """Find the series of a table: the user's own first, then those of further columns.

    Args:
        table: as read.
        description: names the user's own series.
        chosen: names in the order that is wanted, the main one first; None takes all.
        source: named in errors.

    Raises:
        InputError: a column whose name cannot be read, two of one name, or an unknown choice.
    """
    found: dict[str, Series] = {}
    own = Series("clinical_trajectory", description.series, description.unit)
    for column in map(str, table.columns):
        if not column.lower().startswith("trajectory"):
            continue
        where = f"{source}, row 1, column {' '.join(column.split())}"
        match = FURTHER_SERIES.fullmatch(column)
        name = " ".join(match[1].replace("_", " ").split()) if match else ""
        unit = (match[2] or "").strip() if match else ""
        unit = "" if unit == "1" else unit  # how UCUM writes that there is none
        numbers = re.fullmatch(NUMBER, name) or re.fullmatch(NUMBER, unit)
        if not name or "," in name or numbers:
            raise InputError(
                f"{where}: write trajectory_NAME or trajectory_NAME [unit], in words without comma"
            )
        if plainly(name) in (*found, plainly(own.name)):
            raise InputError(f"{where}: a series of that name is there")
        found[plainly(name)] = Series(column, name, unit)
    found = {plainly(own.name): own, **found}
    if chosen is None:
        return list(found.values())
    found[plainly(own.column)] = own  # whoever does not know its name may give its column
    for name in chosen:
        if plainly(name) not in found:
            known = ", ".join(dict.fromkeys(series.name for series in found.values()))
            raise InputError(f"{source}: --series {name}: no such series among: {known}")
    wanted = [found[plainly(name)] for name in chosen]
    if len(set(wanted)) < len(wanted) or not wanted:
        raise InputError(f"{source}: --series: name each series once, and one at least")
    return wanted


class Findings:
    """What shows while a file is read, in one or in many pieces, and is told once at its end.

    Attributes:
        source: the file, as an error shall name it.
        strict: whether a row that cannot be read refuses the file.
        problems: where it does not, the first problem of each such row, by the row's number; names
            the column, never shows what a patient's cell holds.
        counts: rows by what is to be said of them.
        notes: what is to be said of the file.
    """

    def __init__(self, source: str, *, strict: bool = True) -> None:
        """Begin with nothing."""
        self.source = source
        self.strict = strict
        self.problems: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.notes: dict[str, None] = {}

    def tell(self) -> None:
        """Log all of it but the problems."""
        for note in self.notes:
            logger.info("%s: %s", self.source, note)
        for text, rows in self.counts.items():
            if rows:
                logger.info("%s: %d rows %s", self.source, rows, text)


@dataclass(frozen=True)
class ReportScore:
    """How true a written report is.

    Attributes:
        verdict: 1 for yes, 0 for no, None when the report does not begin with either.
        parses: the report has the full expected form.
        stated: how many numbers it states.
        true: how many of them are the patient's own, in their place.
    """

    verdict: int | None
    parses: bool
    stated: int
    true: int


class MIMICtrajectoryDataset(TrajectoryDataset):
    """Trajectories of patients in diabetic ketoacidosis, in the DKA format of one or more series.

    The observations of a row are the union of the times of its series; what was not measured at a
    time is NaN there.

    Args:
        source: path of a CSV (.csv, .csv.gz) or Parquet file, or a DataFrame of the same columns.
        max_len: only the most recent so many observations are kept; by default 20 of one series
            and 64 of several.
        description: what main series and label mean; by default read beside the file.
        require_labels: refuse rows without label; False where new patients are scored.
        series: names of the series to read, the main one first; rows without any value of them
            are left out. None reads all.
        series_text: how much of them the prompt tells, one of ``SERIES_TEXT``.
        findings: of a file of which ``source`` is one piece, from ``read_pieces``. Nothing is
            logged then, ``split`` is not read, and unless the findings are strict, rows that
            cannot be read are noted and left out, maybe all, and wrong labels count as unknown.

    Raises:
        InputError: anything that cannot be read, with file, row and column. Rows count as a
            spreadsheet shows them: the header is row 1 (for a DataFrame or Parquet: from 0).
    """

    time_scale = 72.0  # hours; resolution of ketoacidosis takes one to three days

    def __init__(
        self,
        source: str | Path | pd.DataFrame,
        max_len: int | None = None,
        *,
        description: Description | None = None,
        require_labels: bool = True,
        series: Sequence[str] | None = None,
        series_text: str = "all",
        findings: Findings | None = None,
    ) -> None:
        """Read, check and sort everything at once."""
        if max_len is not None and max_len < 1:
            raise InputError(f"max_len must be positive, got {max_len}")
        if series_text not in SERIES_TEXT:
            raise ValueError(f"series_text must be one of {SERIES_TEXT}, got {series_text!r}")
        if isinstance(source, pd.DataFrame):
            self.source = findings.source if findings else "DataFrame"
            table = source if findings else plain_columns(source)
        else:
            self.source, table = str(source), read_table(Path(source))
            description = description or Description.beside(Path(source))
        self._findings, self._whole = findings or Findings(self.source), findings is None
        self.description = description or Description()
        self.question = self.description.question
        self.outcome = self.description.outcome
        if self.description.flow:
            self.flow = pd.DataFrame(self.description.flow, columns=list(FLOW))
        self.series_text = series_text
        check_header(table, self.source, ["label_escalation"] if require_labels else [])
        if table.empty:
            raise InputError(f"{self.source}: no rows below the header: nothing to read")
        found = find_series(table, self.description, series, self.source)
        self.features = tuple(each.name for each in found)
        self.units = tuple(each.unit for each in found)
        self._read_labels(table, require_labels)
        self._read_patients(table)
        used = {*COLUMNS, *(each.column for each in found)}
        if unread := [str(name) for name in table if name not in used]:
            self._findings.notes[f"columns not read: {', '.join(unread)}"] = None
        several = len(found) > 1
        most = max_len or (MAX_LEN_SEVERAL if several else MAX_LEN)
        self.reading = {"dataset": "dka", "max_len": most}
        self._read_series(table, [each.column for each in found], most, leave_out=bool(series))
        if self._whole:
            self._findings.tell()

    def plausible(self, feature: int) -> tuple[float, float]:
        """Give the described range, or, without one, what is not far outside the quartiles."""
        if limits := self.described_limits(feature):
            return limits
        seen = self.values[:, feature][~np.isnan(self.values[:, feature])]
        if not len(seen):
            return -np.inf, np.inf
        q1, q3 = np.quantile(seen, [0.25, 0.75])
        reach = FAR_OUT * (q3 - q1) if q3 > q1 else np.inf
        return float(q1 - reach), float(q3 + reach)

    def described_limits(self, feature: int) -> tuple[float, float] | None:
        """Give the range that the description names for a feature, if it does."""
        name = self.features[feature]
        if name == self.description.series:
            return self.description.plausible
        return self.description.limits.get(plainly(name))

    def asked(self) -> dict[str, str]:
        """Say what the description says of prediction time and horizon, where it does."""
        told = {
            "Prediction time": self.description.prediction_time,
            "Horizon": self.description.horizon,
        }
        return {**super().asked(), **{key: text for key, text in told.items() if text}}

    def _tell(self, i: int, most: int | None) -> str:
        """Name series with unit: value and hour of each observation, or of the last alone."""
        seen = {f: (times, values) for f, times, values in self.measured(i)}
        if self.series_text == "last":
            last = [
                f"{name} {plain(seen[f][1][-1])}{_unit(unit)} ({plain(seen[f][0][-1])}h)"
                if f in seen
                else f"{name} not measured"
                for f, (name, unit) in enumerate(zip(self.features, self.units, strict=True))
            ]
            return f"Last values: {', '.join(last)}. "
        told = [self.main] if self.series_text == "main" else range(len(self.features))
        lines = []
        for f in told:
            unit = f" ({self.units[f]})" if self.units[f] else ""
            times, values = seen.get(f, ((), ()))
            latest = zip(times[-(most or 0) :], values[-(most or 0) :], strict=True)
            pairs = (f"{plain(v)} ({plain(t)}h)" for t, v in latest)
            lines.append(f"{self.features[f]}{unit}: {' -> '.join(pairs) or 'not measured'}. ")
            if self.text_computed and f == self.main and f in seen:
                lines.append("".join(_change_clause(_unit(self.units[f]), *seen[f])) + ". ")
        return "".join(lines)

    def _clauses(self, i: int) -> list[list[str]]:
        """Give the main series in full, of the others first, last and direction."""
        seen = {f: (times, values) for f, times, values in self.measured(i)}
        clauses = []
        for f, (name, unit) in enumerate(zip(self.features, self.units, strict=True)):
            start = f"{'' if f == 0 else '. '}{name}: "
            if f not in seen:
                clauses.append([f"{start}not measured"])
            elif f == self.main:
                clauses += _main_clauses(start, _unit(unit), *seen[f])
                change = _change_clause(_unit(unit), *seen[f])
                clauses.append([f". {change[0]}", *change[1:]])
            else:
                clauses.append(_short_clause(start, _unit(unit), *seen[f]))
        return clauses

    def _read_labels(self, table: pd.DataFrame, require: bool) -> None:
        name = "label_escalation"
        text = column_text(table, name) if name in table else pd.Series("", index=table.index)
        self.labels = pd.to_numeric(text.where(text != ""), errors="coerce").to_numpy(np.float64)
        empty = (text == "").to_numpy()
        wrong = ~np.isin(self.labels, [0, 1]) & ~empty
        if self._whole:
            self._refuse(wrong, table, name, "must be 0 or 1")
        else:  # whoever wants a prediction can do without
            self.labels = np.where(wrong, np.nan, self.labels)
            unknown = f"have a {name} that is neither 0 nor 1: taken as unknown"
            self._findings.counts[unknown] += int(wrong.sum())
        if require:
            self._refuse(
                empty, table, name, "is empty: each row to learn from needs a label 0 or 1"
            )

    def _read_patients(self, table: pd.DataFrame) -> None:
        patients = patients_of(table)
        if "subject_id" in table or "id" in table:
            name = "subject_id" if "subject_id" in table else "id"
            self._refuse(patients == "", table, name, "is empty: name the patient of each row")
        else:
            self.named = False
            self._findings.notes["no column subject_id: each row is a patient of its own"] = None
        self.groups = patients.to_numpy(dtype=np.str_)
        self.ids = ids_of(table).to_numpy(dtype=np.str_)
        has_context = "clinical_context" in table
        contexts = (
            column_text(table, "clinical_context") if has_context else patients.map(lambda _: "")
        )
        self.contexts = contexts.to_numpy(dtype=object)
        self.parts = None
        if "split" in table and self._whole:
            parts = column_text(table, "split").str.lower().replace("validation", "val")
            self._refuse(~parts.isin(PARTS), table, "split", "must be train, val or test")
            moved = parts != parts.groupby(patients).transform("first")
            problem = "puts a patient (subject_id) on another side than an earlier row does"
            self._refuse(moved, table, "split", problem)
            self.parts = parts.to_numpy(dtype=np.str_)

    def _read_series(
        self, table: pd.DataFrame, columns: list[str], max_len: int, *, leave_out: bool
    ) -> None:
        """Set times, values and offsets; see the class for what is kept and what is left out."""
        parsed = [self._parse_column(table, column) for column in columns]
        feature = np.repeat(np.arange(len(columns)), [len(values) for _, _, values in parsed])
        owner, times, values = (np.concatenate(arrays) for arrays in zip(*parsed, strict=True))
        del parsed
        if problems := self._findings.problems:  # a row with one bad series is left out whole
            good = ~table.index.isin(list(problems))[owner]
            owner, feature, times, values = (a[good] for a in (owner, feature, times, values))
        within = (np.diff(owner) == 0) & (np.diff(feature) == 0)
        unsorted = np.unique(owner[1:][(np.diff(times) < 0) & within])
        if len(unsorted):
            order = np.lexsort((times, owner, feature))  # stable: equal times keep their order
            owner, times, values = owner[order], times[order], values[order]
            self._findings.counts["were not in time order; sorted"] += len(unsorted)
        lengths = np.bincount(owner, minlength=len(table))
        if not leave_out or not self._whole:
            where = columns[0] if len(columns) == 1 else "clinical_trajectory"
            problem = "is empty" if len(columns) == 1 else "no series of this row holds a value"
            self._refuse(lengths == 0, table, where, problem)
        values = values[:, None]
        if len(columns) > 1:
            owner, times, values = _union(owner, feature, times, values[:, 0], len(columns))
            lengths = np.bincount(owner, minlength=len(table))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        max_len = min(max_len, len(owner))  # within the integers of an array, whatever was asked
        recent = np.arange(len(owner)) >= offsets[owner + 1] - max_len
        if not recent.all():
            longer = f"are longer than {max_len} observations: the most recent are kept"
            self._findings.counts[longer] += int((lengths > max_len).sum())
        self._say_lost(owner, values, recent, len(table))
        self.times, self.values = times[recent], values[recent]
        self.offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_len))])
        if not lengths.all():
            self._leave_out(np.flatnonzero(lengths == 0))

    def _say_lost(
        self,
        owner: NDArray[np.int64],
        values: NDArray[np.float64],
        recent: NDArray[np.bool_],
        rows: int,
    ) -> None:
        """Tell of series whose every value in a row is older than what is kept."""
        for name, column in zip(self.features, values.T, strict=True):
            seen = ~np.isnan(column)
            had, kept = (np.bincount(owner[s], minlength=rows) > 0 for s in (seen, seen & recent))
            if lost := int((had & ~kept).sum()):
                losing = f"lose every value of {name}: raise --max_len to keep them"
                self._findings.counts[losing] += lost

    def _leave_out(self, rows: NDArray[np.int64]) -> None:
        """Drop rows that hold no value of the chosen series, or have a problem."""
        if self._whole:
            self._findings.counts["without a value are left out"] += len(rows)
        if len(rows) == len(self) and self._whole:
            raise InputError(f"{self.source}: no row holds a value of {', '.join(self.features)}")
        self.offsets = np.delete(self.offsets, rows)
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(self, name, None if column is None else np.delete(column, rows))

    def _parse_column(
        self, table: pd.DataFrame, name: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Read one series of every row: owner (position of the row), times, values, all flat."""
        text = column_text(table, name)
        rows = np.flatnonzero(text != "")
        text = text.iloc[rows]
        readable = text.str.fullmatch(SERIES).to_numpy(dtype=bool)
        if not readable.all():
            self._refuse(~readable, text, name, map(_bad_piece, text[~readable]))
            rows, text = rows[readable], text[readable]
        blocks = [_parse(text.iloc[k : k + PARSE_ROWS]) for k in range(0, len(text), PARSE_ROWS)]
        values, times = np.concatenate([np.empty((0, 2)), *blocks]).T
        lengths = text.str.count("->").to_numpy(np.int64) + 1
        place = np.repeat(np.arange(len(rows)), lengths)
        huge = (np.abs(values) > LARGEST[0]) | (np.abs(times) > LARGEST[1])
        bad = np.bincount(place, huge, len(rows)) > 0
        self._refuse(bad, text, name, "holds a number that is too large")
        return rows[place], times, values

    def _refuse(
        self,
        bad: Any,
        table: pd.DataFrame | pd.Series,
        column: str,
        problem: str | Iterable[str],
    ) -> None:
        """Raise with the place of the first bad row, or note all where findings are not strict.

        Never shows what a patient's cell holds. ``problem`` is one for all bad rows or one each.
        """
        rows = table.index[np.asarray(bad)]
        told = itertools.repeat(problem) if isinstance(problem, str) else problem
        for row, text in zip(rows, told, strict=False):
            if self._findings.strict:
                others = f" ({len(rows)} such rows)" if len(rows) > 1 and self._whole else ""
                where = f"{self.source}, row {row}, column {column}"
                cell = table[column] if isinstance(table, pd.DataFrame) else table
                raise InputError(f"{where}: {text}{others}", str(cell[row]))
            self._findings.problems.setdefault(row, f"column {column}: {text}")


def _bad_piece(text: str) -> str:
    """Say which piece of a series cannot be read."""
    pieces = enumerate(text.split("->"), 1)
    k = next(k for k, piece in pieces if not re.fullmatch(PIECE, piece))
    return f"piece {k} is not of the form VALUE (HOURSh), as 24 (0h)"


def patients_of(table: pd.DataFrame) -> pd.Series:
    """Give the patient of each row: subject_id, or id, or the row's number."""
    for name in ("subject_id", "id"):
        if name in table:
            return column_text(table, name)
    return pd.Series(table.index.astype(str), index=table.index)


def ids_of(table: pd.DataFrame) -> pd.Series:
    """Give the name of each row in prediction files: id, or its patient."""
    return column_text(table, "id") if "id" in table else patients_of(table)


def _union(
    owner: NDArray[np.int64],
    feature: NDArray[np.int64],
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    features: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Join the series of each owner at common times.

    Where a series holds a time more than once, its k-th value there shares an observation with the
    k-th of the others.

    Args:
        owner: (n,), ascending within a feature.
        feature: (n,), ascending.
        times: (n,) ascending within an owner's feature.
        values: (n,).
        features: F.

    Returns:
        owner (m,), times (m,) and values (m, F), NaN where not measured.
    """
    number = np.arange(len(owner))
    again = (np.diff(owner) == 0) & (np.diff(feature) == 0) & (np.diff(times) == 0)
    first = np.concatenate([[True], ~again]) if len(owner) else np.empty(0, dtype=bool)
    repeat = number - np.maximum.accumulate(np.where(first, number, 0))
    order = np.lexsort((repeat, times, owner))
    owner, times, repeat = owner[order], times[order], repeat[order]
    new = np.ones(len(owner), dtype=bool)
    new[1:] = (np.diff(owner) != 0) | (np.diff(times) != 0) | (np.diff(repeat) != 0)
    table = np.full((int(new.sum()), features), np.nan)
    table[np.cumsum(new) - 1, feature[order]] = values[order]
    return owner[new], times[new], table


def _main_clauses(
    start: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[list[str]]:
    """Say of a series: first, last, lowest, highest."""
    low, high = int(values.argmin()), int(values.argmax())
    places = {f"{start}first ": 0, ", last ": -1, ", lowest ": low, ", highest ": high}
    return [
        [words, plain(values[k]), f"{unit} at ", plain(times[k]), " h"]
        for words, k in places.items()
    ]


def _change_clause(unit: str, times: NDArray[np.float64], values: NDArray[np.float64]) -> list[str]:
    """Say of a series: net change, rate, direction.

    The rate has one significant figure: it is to be read. The times between which it holds are
    those of first and last value.
    """
    change, span = values[-1] - values[0], times[-1] - times[0]
    clause = ["Net change ", plain(round(change, 6)), unit]
    if span > 0:  # within no time there is no rate
        clause[-1] += ", "
        clause += [plain(float(f"{change / span:.1g}")), f"{unit} an hour"]
    clause[-1] += f": {DIRECTIONS[int(np.sign(change))]}"
    return clause


def _short_clause(
    start: str, unit: str, times: NDArray[np.float64], values: NDArray[np.float64]
) -> list[str]:
    """Say of a series: first, last, direction."""
    first, last = ([plain(values[k]), f"{unit} at ", plain(times[k])] for k in (0, -1))
    if len(values) == 1:
        return [f"{start}only ", *first, " h"]
    direction = DIRECTIONS[int(np.sign(values[-1] - values[0]))]
    return [f"{start}from ", *first, " h to ", *last, f" h, {direction}"]


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def plain(number: float) -> str:
    """Write a number in the shortest form that reads back exactly, without exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def _parse(text: pd.Series) -> NDArray[np.float64]:
    """Read rows that match ``SERIES`` in one pass: (observations, 2) of value and hours."""
    joined = " ".join(text).replace("->", " ").translate(PUNCTUATION)
    return np.fromstring(joined, dtype=np.float64, sep=" ").reshape(-1, 2)


class Piece(NamedTuple):
    """So many rows of a file, its index their numbers, and the bytes that lead up to their end."""

    table: pd.DataFrame
    read: int


def read_table(path: Path) -> pd.DataFrame:
    """Read a file as text, CSV (also within gzip) or Parquet; the index holds the row numbers.

    Raises:
        InputError: the file is missing, empty, damaged, or its rows do not fit its header.
    """
    with contextlib.closing(read_pieces(path, Findings(str(path)))) as pieces:
        return next(pieces).table


def read_pieces(
    path: Path, findings: Findings, rows: int | None = None
) -> Generator[Piece, None, None]:
    """Read a file at most so many rows at a time, or all at once; at least one piece, maybe empty.

    Raises:
        InputError: as ``read_table``; a row that does not fit its header only where findings are
            strict.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_pieces(path, rows)
        else:
            with path.open("rb") as file, _text_of(path, file) as text:
                yield from _csv_pieces(path, file, text, findings, rows)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: save it as CSV UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


def _text_of(path: Path, file: BinaryIO) -> io.TextIOWrapper:
    """Give the text of a file that is open, whether it is packed or not."""
    opened: Any = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")


def _csv_pieces(
    path: Path, file: BinaryIO, text: Iterable[str], findings: Findings, most: int | None
) -> Iterator[Piece]:
    """Read rows and their numbers, the header being 1; blank rows are left out.

    Args:
        path: of the file, for errors.
        file: its bytes, which tell how far reading has come.
        text: its text.
        findings: get what is wrong with single rows.
        most: rows a piece.
    """
    rows = _numbered_rows(path, text)
    _, names = next(rows, (0, None))
    if names is None:
        raise InputError(f"{path}: the file is empty")
    header = [name.strip() for name in names]
    for first in itertools.count():
        numbers, cells = [], []
        for number, row in itertools.islice(rows, most):
            if any(row[len(header) :]):
                problem = (
                    f"{len(row)} fields where the header has {len(header)}: put texts that hold "
                    'commas between quotes "'
                )
                if findings.strict:
                    raise InputError(f"{path}, row {number}: {problem}")
                findings.problems[number] = problem
            row[len(header) :] = []
            row += [""] * (len(header) - len(row))
            numbers.append(number)
            cells.append(row)
        if numbers or first == 0:
            table = pd.DataFrame(cells, columns=header, index=numbers, dtype=object)
            yield Piece(table, file.tell())
        if most is None or len(numbers) < most:
            return


def _numbered_rows(path: Path, text: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Give the rows of a CSV that are not blank, with their numbers.

    Below the header a quote in the wrong place is an error: it would else swallow all rows up to
    the next one, or to the end.
    """
    csv.field_size_limit(2**31 - 1)  # a series of 20,000 observations is one field
    lines, number, strict = iter(text), 0, False
    readers = [csv.reader(lines, skipinitialspace=True, strict=s) for s in (False, True)]
    try:
        while (cells := next(readers[strict], None)) is not None:
            number += 1
            if any(map(str.strip, cells)):
                yield number, cells
                strict = strict or len(cells) > 1  # a header without commas is refused by itself
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: {error}: check its quotes") from error


def _parquet_pieces(path: Path, most: int | None) -> Iterator[Piece]:
    """Read rows and their numbers, the first being 0."""
    try:
        import pyarrow  # not among the requirements: only who holds Parquet needs it
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        if most is None:
            yield Piece(plain_columns(pd.read_parquet(path, engine="pyarrow")), 0)
            return
        whole, done, size = parquet.ParquetFile(path), 0, path.stat().st_size
        for batch in whole.iter_batches(most):
            # A pandas index stays a column; whole numbers stay whole beside missing ones.
            table = batch.to_pandas(ignore_metadata=True, integer_object_nulls=True)
            table = plain_columns(table).set_index(pd.RangeIndex(done, done + len(table)))
            done += len(table)
            yield Piece(table, size * done // whole.metadata.num_rows)
        if not done:
            yield Piece(plain_columns(whole.schema_arrow.empty_table().to_pandas()), size)
    except pyarrow.ArrowException as error:
        problem = "not a whole Parquet file, or one with a column twice"
        raise InputError(f"{path}: {problem}") from error


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Give a table with rows numbered from 0; an index that is a column of the format stays one."""
    table = table.rename(columns=lambda name: str(name).strip())
    index = table.index.to_frame(index=False)
    index = index[[name for name in index if name in COLUMNS and name not in table]]
    return pd.concat([index, table.reset_index(drop=True)], axis=1)


def check_header(table: pd.DataFrame, where: str, labels: list[str]) -> None:
    """Refuse a table that lacks a column or has one twice.

    Raises:
        InputError: a name is missing, or stands there twice and so leaves open which one is meant.
    """
    for name in ("clinical_trajectory", *labels):
        if name not in table:
            semicolons = ";" in "".join(map(str, table.columns))
            hint = "; it looks separated by ';' where ',' is expected" if semicolons else ""
            raise InputError(
                f"{where}, row 1, column {name}: no such column among {len(table.columns)}{hint}: "
                "the header must name clinical_trajectory,label_escalation"
            )
    for name in COLUMNS:
        if list(table.columns).count(name) > 1:
            raise InputError(f"{where}, row 1, column {name}: stands there twice: leave one")


def column_text(table: pd.DataFrame, name: str) -> pd.Series:
    """Give a column as stripped text, empty where nothing stands."""
    column = table[name]
    return column.astype(object).where(column.notna(), "").astype(str).str.strip()


def pack(dataset: TrajectoryDataset) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Take a data set apart, so that ``unpack`` gives the same one to the last bit.

    Returns:
        Arrays of numbers: texts of one width as code points, others joined, a table by columns;
        and all else, in what JSON can hold.
    """
    arrays: dict[str, NDArray[Any]] = {}
    rest: dict[str, Any] = {}
    for name, value in vars(dataset).items():
        if isinstance(value, pd.DataFrame):
            index = value.index.name
            table = value if index is None else value.reset_index()
            rest[name] = {"columns": list(table), "index": index}
            for key, column in table.items():
                if isinstance(column.dtype, pd.CategoricalDtype):
                    rest[f"{name}.{key}"] = column.cat.categories.tolist()
                    arrays[f"{name}.{key}"] = column.cat.codes.to_numpy()
                elif pd.api.types.is_numeric_dtype(column.dtype):
                    arrays[f"{name}.{key}"] = column.to_numpy()
                else:
                    rest[f"{name}.{key}"] = column.tolist()
        elif isinstance(value, np.ndarray) and value.dtype == object:
            text = "".join(value)
            arrays[f"{name}.text"] = np.frombuffer(text.encode("utf-8", ALL_TEXT), dtype=np.uint8)
            arrays[f"{name}.ends"] = np.cumsum([0, *map(len, value)], dtype=np.int64)
        elif isinstance(value, np.ndarray) and value.dtype.kind == "U":
            width = value.dtype.itemsize // np.dtype("U1").itemsize
            arrays[f"{name}.points"] = value.view(np.uint32).reshape(len(value), width)
        elif isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, Description):
            rest[name] = vars(value)
        elif not name.startswith("_"):  # that was of use while reading alone
            rest[name] = value
    return arrays, rest


def unpack(kind: type[DatasetT], arrays: dict[str, NDArray[Any]], rest: dict[str, Any]) -> DatasetT:
    """Put together what ``pack`` took apart.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none, or not of this kind.
    """
    dataset, left = kind.__new__(kind), dict(arrays)
    for name, value in rest.items():
        if isinstance(value, dict) and set(value) == {"columns", "index"}:
            columns: dict[str, Any] = {}
            for key in value["columns"]:
                column, words = left.pop(f"{name}.{key}", None), rest.get(f"{name}.{key}")
                columns[key] = words if column is None else column
                if column is not None and words is not None:
                    columns[key] = pd.Categorical.from_codes(column, words)
            table = pd.DataFrame(columns)
            setattr(dataset, name, table.set_index(value["index"]) if value["index"] else table)
        elif name == "description":
            limits = {series: _rising(pair) for series, pair in value["limits"].items()}
            plausible = _rising(value["plausible"])
            known = {"plausible": plausible, "limits": limits, "flow": tuple(value["flow"])}
            setattr(dataset, name, Description(**{**value, **known}))
        elif "." not in name:
            setattr(dataset, name, tuple(value) if isinstance(value, list) else value)
    for name in [name for name in left if name.endswith(".text")]:
        text, ends = left.pop(name).tobytes().decode("utf-8", ALL_TEXT), left[f"{name[:-5]}.ends"]
        cuts = left.pop(f"{name[:-5]}.ends").tolist()
        if not _rises(ends, len(text)):
            raise ValueError(f"{name} is not cut from its beginning to its end")
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        setattr(dataset, name[:-5], np.array([*pieces, None], dtype=object)[:-1])
    for name, array in left.items():
        if name.endswith(".points"):
            if array.max(initial=0) > sys.maxunicode:
                raise ValueError(f"{name} holds no text")
            array = array.view(f"U{array.shape[1]}").reshape(len(array))
        setattr(dataset, name.removesuffix(".points"), array)
    _refuse_unsound(dataset)
    return dataset


def _rises(ends: NDArray[Any], last: int) -> bool:
    """Tell whether these are offsets that go from 0 to ``last`` without a step back."""
    sound = ends.dtype == np.int64 and ends.ndim == 1 and len(ends) > 0
    return bool(sound and ends[0] == 0 and ends[-1] == last and (np.diff(ends) >= 0).all())


def _refuse_unsound(dataset: TrajectoryDataset) -> None:
    """Refuse a data set whose arrays do not fit each other.

    Raises:
        ValueError: naming one.
    """
    rows, observations = len(dataset.labels), len(dataset.times)
    if not _rises(dataset.offsets, observations) or len(dataset.offsets) != rows + 1:
        raise ValueError("offsets do not cut the observations into rows")
    if dataset.values.shape != (observations, len(dataset.features)):
        raise ValueError("values are not those of the features")
    if len(dataset.units) != len(dataset.features):
        raise ValueError("units are not those of the features")
    for name in ("times", "values", "labels"):
        if getattr(dataset, name).dtype != np.float64:
            raise ValueError(f"{name} are of another kind")
    for name in dataset.row_columns:
        column = getattr(dataset, name)
        if column is not None and len(column) != rows:
            raise ValueError(f"{name} are not one a row")


def summarize(dataset: TrajectoryDataset) -> list[str]:
    """Describe a data set in plain lines: sizes, events, observations, spans, values."""
    known = dataset.labels[~np.isnan(dataset.labels)]
    spans = dataset.times[dataset.offsets[1:] - 1] - dataset.times[dataset.offsets[:-1]]
    lines = [
        f"rows {len(dataset):,}, patients {len(np.unique(dataset.groups)):,}",
        f"outcome {dataset.outcome!r}: {int(known.sum()):,} events in {len(known):,} labelled rows"
        + (f" ({known.mean():.1%})" if len(known) else ""),
        f"observations a row: {_quartiles(dataset.lengths)}",
        f"span in hours: {_quartiles(spans)}",
    ]
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    patients = len(np.unique(dataset.groups))
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        seen = ~np.isnan(dataset.values[:, f])
        named = f"{name} in {unit}" if unit else name
        if not seen.any():
            lines.append(f"{named}: never measured")
            continue
        counts = np.bincount(owner[seen])
        share = len(np.unique(dataset.groups[np.unique(owner[seen])])) / patients
        lines.append(
            f"{named}: {_quartiles(dataset.values[seen, f])}; in {share:.1%} of the patients, "
            f"{np.median(counts[counts > 0]):g} values a row that has any, "
            f"{outside(dataset, f):,} implausible"
        )
    return lines


def suspicions(dataset: MIMICtrajectoryDataset) -> list[str]:
    """Name units that look wrong: values no patient shows, series too short or too long."""
    found = implausible(dataset)
    several = dataset.lengths > 1
    starts, ends = dataset.offsets[:-1][several], dataset.offsets[1:][several] - 1
    span = float(np.median(dataset.times[ends] - dataset.times[starts])) if several.any() else 1.0
    if not USUAL_SPAN_HOURS[0] <= span <= USUAL_SPAN_HOURS[1]:
        found.append(f"the median series spans {span:.3g} h: are its times written in hours?")
    return found


def implausible(dataset: TrajectoryDataset) -> list[str]:
    """Name the series that hold values outside their plausible range."""
    found = []
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        low, high = dataset.plausible(f)
        if count := outside(dataset, f):
            seen = int((~np.isnan(dataset.values[:, f])).sum())
            found.append(
                f"{name}: {count:,} of {seen:,} values lie outside {low:g} to "
                f"{high:g}{_unit(unit)}: is the unit right?"
            )
    return found


def outside(dataset: TrajectoryDataset, feature: int) -> int:
    """Count the values of a feature that lie outside its plausible range."""
    low, high = dataset.plausible(feature)
    values = dataset.values[:, feature]
    return int(((values < low) | (values > high)).sum())


def _quartiles(numbers: NDArray[Any]) -> str:
    # No extreme: that would be a single patient's value.
    low, q1, median, q3, high = np.quantile(numbers, [0.01, 0.25, 0.5, 0.75, 0.99])
    return (
        f"median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, 98 % within {low:.4g} to {high:.4g}"
    )


def partial_of(path: Path) -> Path:
    """Give the name under which a file or folder is written before it is whole."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; what is written there takes its place if all is well.

    The content reaches the disk before its name does, so that no loss of power leaves half of it.
    """
    temporary = partial_of(path)
    remove(temporary)
    try:
        yield temporary
        flush(temporary)
        if path.is_dir():  # a folder cannot be replaced in one step
            outgoing = path.with_name(f".{path.name}{OUTGOING}")
            remove(outgoing)
            path.rename(outgoing)
            try:
                temporary.rename(path)
            except BaseException:  # a signal, say: one of the two must stand there
                outgoing.rename(path)
                raise
            remove(outgoing)
        else:
            os.replace(temporary, path)
        flush_entry(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name it
        raise
    finally:
        remove(temporary)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, lies on the disk."""
    if path.is_dir():
        for each in path.iterdir():
            flush(each)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------- from MIMIC-IV: tables


PIECE_BYTES = 2**24
"""Of a table's text, held and parsed at a time by each process."""

BEFORE_ADMISSION = np.timedelta64(24 * 3600, "s")
"""A value that names its admission counts from so long before it: the emergency department."""

ADULT_YEARS, OLDEST_TOLD = 18, 89
"""Ages in years; MIMIC-IV writes all above 89 as 91. Source: mimic.mit.edu, patients."""

GAP_ITEM, COMPUTED = 50868, -1
"""Item of the laboratory's own anion gap, and how the computed one is known in here."""

CLOSED_GAP = 12.0
"""mEq/L; a gap at or below it is closed. Source: Kitabchi 2009, resolution of ketoacidosis."""

MIMIC_FORMS = (".csv", ".csv.gz", ".parquet")
ANOTHER_MIMIC = "this reads MIMIC-IV 2.x and 3.x, whose folder holds hosp/ and icu/"

EQUIVALENT = {"meq/l": 1.0, "mmol/l": 1.0}  # of ions with one charge


class Analyte(NamedTuple):
    """What a laboratory measures: its unit, MIMIC-IV's items, limits, and factors of units.

    The first item is the serum's, others are the blood gas machine's. ``factors`` turns values of
    a unit, in small letters, into ``unit``.

    Source: itemid and valueuom, d_labitems and labevents of MIMIC-IV; molar masses of glucose
    180.16, creatinine 113.12, lactate 90.08, nitrogen of urea 28.01 g/mol.
    """

    name: str
    unit: str
    items: tuple[int, ...]
    plausible: tuple[float, float]
    factors: dict[str, float]


CHEMISTRY = (
    Analyte("anion gap", "mEq/L", (GAP_ITEM,), (-5.0, 60.0), EQUIVALENT),
    Analyte("bicarbonate", "mEq/L", (50882,), (3.0, 60.0), EQUIVALENT),
    Analyte("chloride", "mEq/L", (50902, 50806), (50.0, 160.0), EQUIVALENT),
    Analyte("creatinine", "mg/dL", (50912,), (0.1, 30.0), {"mg/dl": 1.0, "umol/l": 0.011312}),
    Analyte("glucose", "mg/dL", (50931, 50809), (5.0, 2500.0), {"mg/dl": 1.0, "mmol/l": 18.016}),
    Analyte("lactate", "mmol/L", (50813,), (0.1, 40.0), {"mmol/l": 1.0, "mg/dl": 0.11101}),
    Analyte("pH", "", (50820,), (6.5, 8.0), {"units": 1.0, "ph": 1.0, "": 1.0}),
    Analyte("potassium", "mEq/L", (50971, 50822), (1.0, 12.0), EQUIVALENT),
    Analyte("sodium", "mEq/L", (50983, 50824), (90.0, 200.0), EQUIVALENT),
    Analyte("urea nitrogen", "mg/dL", (51006,), (1.0, 300.0), {"mg/dl": 1.0, "mmol/l": 2.801}),
)
ANALYTES = {item: each for each in CHEMISTRY for item in each.items}
GAP_PARTS = (50983, 50902, 50882)
"""Serum sodium, chloride and bicarbonate: the gap is the first less the others."""


class Kind(NamedTuple):
    """How a cell is read: as ``number``, ``whole`` number, ``time`` or ``word``; may be empty."""

    form: str
    empty: bool = False


NAME, NUMBER_CELL, TIME, WORD = Kind("whole"), Kind("number"), Kind("time"), Kind("word")
NO_NAME, NO_NUMBER, NO_TIME, NO_WORD = (
    Kind(form, empty=True) for form in ("whole", "number", "time", "word")
)
MIMIC_TABLES: dict[str, dict[str, Kind]] = {
    "hosp/patients": {
        "subject_id": NAME,
        "gender": NO_WORD,
        "anchor_age": NO_NUMBER,
        "anchor_year": NO_NUMBER,
    },
    "hosp/admissions": {
        "subject_id": NAME,
        "hadm_id": NAME,
        "admittime": TIME,
        "dischtime": NO_TIME,
        "deathtime": NO_TIME,
        "hospital_expire_flag": NO_NUMBER,
    },
    "icu/icustays": {
        "hadm_id": NAME,
        "intime": NO_TIME,
        "outtime": NO_TIME,
        "first_careunit": NO_WORD,
    },
    "hosp/diagnoses_icd": {"hadm_id": NAME, "icd_code": NO_WORD, "icd_version": NUMBER_CELL},
    "hosp/d_labitems": {"itemid": NAME, "label": NO_WORD, "fluid": NO_WORD, "category": NO_WORD},
    "hosp/labevents": {
        "itemid": NAME,
        "subject_id": NAME,
        "hadm_id": NO_NAME,
        "charttime": TIME,
        "storetime": NO_TIME,
        "valuenum": NO_NUMBER,
        "valueuom": NO_WORD,
    },
}
"""Columns that are read, of each table. Source: mimic.mit.edu, MIMIC-IV, modules hosp and icu."""

LAB_KEYS = ("itemid", "subject_id")
"""Columns of labevents that say whether a row is needed."""

MAY_LACK = {"storetime", "fluid", "category"}
"""Columns without which a table is read all the same; others are refused."""


class BadCellError(ValueError):
    """A cell that cannot be read: which row of its piece, and what is wrong; no content."""

    def __init__(self, row: int, problem: str) -> None:
        """Keep both, so that another process can hand them over."""
        super().__init__(row, problem)
        self.row, self.problem = row, problem


class TablePiece(NamedTuple):
    """Some rows of a table: where the first stands, and how many bytes are read with them.

    ``rows`` are CSV text, its length alone, or as read; ``place`` is that of the text's first byte
    in its file, None within gzip.
    """

    rows: bytes | int | pd.DataFrame
    first: int
    read: int
    place: int | None = None


class Table(NamedTuple):
    """A found table: its file, the columns it has in their order, and those of them to be read."""

    path: Path
    header: list[str]
    kinds: dict[str, Kind]


class Hashed:
    """A file that is hashed as it is read, once, from its beginning to its end."""

    mode = "rb"

    def __init__(self, file: BinaryIO) -> None:
        """Begin before the first byte."""
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """Read as any file does."""
        piece = self.file.read(size)
        self.digest.update(piece)
        self.count += len(piece)
        return piece


def find_mimic(folder: Path, name: str) -> Path:
    """Find a table such as ``hosp/patients`` in one of its forms.

    Raises:
        InputError: it is missing, stands there twice, or the folder is another one.
    """
    if not os.path.isdir(folder):  # False also for a name that no disk takes
        raise InputError(f"--mimic_dir {folder}: no such folder: give the one with hosp/ and icu/")
    module = name.partition("/")[0]
    if not (folder / module).is_dir():
        listed = {path.name.lower().partition(".")[0] for path in folder.iterdir()}
        kind = "MIMIC-III" if {"admissions", "d_labitems", "icustays"} & listed else "not MIMIC-IV"
        kind = "MIMIC-IV before 2.0" if "core" in listed else kind
        raise InputError(f"--mimic_dir {folder}: no folder {module}/ ({kind}?): {ANOTHER_MIMIC}")
    found = [path for form in MIMIC_FORMS if (path := folder / f"{name}{form}").is_file()]
    if len(found) != 1:
        problem = f"stands there {len(found)} times: leave one" if found else "is not there"
        raise InputError(
            f"--mimic_dir {folder}: the table {name} ({', '.join(MIMIC_FORMS)}) {problem}"
        )
    return found[0]


def columns_of(path: Path, name: str, header: list[str]) -> Table:
    """Give the columns that are to be read, checked against those that are there.

    Raises:
        InputError: a column is missing; of MIMIC-III they have other names.
    """
    wanted = MIMIC_TABLES[name]
    missing = [column for column in wanted if column not in header and column not in MAY_LACK]
    if missing:
        third = "row_id" in {column.lower() for column in header}
        another = f"these are columns of MIMIC-III: {ANOTHER_MIMIC}" if third else ANOTHER_MIMIC
        raise InputError(f"{path}: no column {missing[0]} among {len(header)}: {another}")
    if twice := [column for column in wanted if header.count(column) > 1]:
        raise InputError(f"{path}: the column {twice[0]} stands there twice")
    return Table(path, header, {column: wanted[column] for column in wanted if column in header})


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one line.

    Raises:
        InputError: naming the file, never what it holds.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


def csv_table(path: Path, name: str, raw: Hashed) -> tuple[Table, Iterator[TablePiece]]:
    """Open a CSV, also within gzip: its columns, and its rows in pieces.

    Raises:
        InputError: as ``columns_of``; in the pieces a last row that is cut off.
    """
    stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[call-overload]
    text = stream.read(PIECE_BYTES)
    first, _, rest = text.partition(b"\n")
    names_of = next(csv.reader([first.decode("utf-8-sig", "replace").strip()]), [])
    place = None if path.suffix == ".gz" else len(first) + 1
    return columns_of(path, name, [each.strip() for each in names_of]), csv_pieces(
        path, raw, stream, rest, place
    )


def csv_pieces(
    path: Path, raw: Hashed, stream: Any, text: bytes, place: int | None
) -> Iterator[TablePiece]:
    """Cut a CSV behind its header at the ends of rows; the lines of its text count from 1."""
    line = 2
    while True:
        more = stream.read(PIECE_BYTES)
        text += more
        cut = row_end(text) if more else len(text)
        if not more and text and not text.endswith(b"\n"):
            raise InputError(f"{path}: it ends without a line break, within a row: copy it again")
        if cut:
            yield TablePiece(text[:cut], line, raw.count, place)
        elif len(text) > 8 * PIECE_BYTES:
            raise InputError(f"{path}, line {line}: a quote that is never closed: copy it again")
        line += text.count(b"\n", 0, cut)
        place = None if place is None else place + cut
        text = text[cut:]
        if not more:
            return


def row_end(text: bytes) -> int:
    """Give the place behind the last line break that stands in no quotes, 0 if there is none."""
    cut = text.rfind(b"\n") + 1
    odd = text.count(b'"', 0, cut) % 2
    while odd and cut:
        earlier = text.rfind(b"\n", 0, cut - 1) + 1
        odd = (odd - text.count(b'"', earlier, cut)) % 2
        cut = earlier
    return cut


def parquet_table(path: Path, name: str) -> tuple[Table, Iterator[TablePiece]]:
    """Open a Parquet file: its columns, and its rows in pieces, counted from 0.

    Raises:
        InputError: as ``columns_of``, or it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow  # not among the requirements: only who holds Parquet needs it
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        whole = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file: copy it again") from error
    table = columns_of(path, name, list(whole.schema_arrow.names))

    def pieces() -> Iterator[TablePiece]:
        """Give the rows, so many at a time, with the bytes that lead up to their end."""
        done, size = 0, path.stat().st_size
        try:
            for batch in whole.iter_batches(PIECE_BYTES // 64, columns=list(table.kinds)):
                rows = batch.to_pandas(ignore_metadata=True, strings_to_categorical=True)
                done += len(rows)
                read = size * done // whole.metadata.num_rows
                yield TablePiece(rows, done - len(rows), read)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a whole Parquet file: copy it again") from error

    return table, pieces()


EMPTY_ALONE: Any = {"header": None, "keep_default_na": False, "na_values": [""]}
"""How pandas reads MIMIC-IV's CSV: nothing but an empty cell is missing."""


def cells_of(text: bytes, table: Table) -> pd.DataFrame:
    """Parse rows of CSV: numbers as such, all else as text, NaN where nothing stands.

    Raises:
        BadCellError: rows that do not fit the header, or text that is none.
    """
    beyond = "beyond the header"
    columns: Any = {"names": [*table.header, beyond], "usecols": [*table.kinds, beyond]}
    stored: Any = {
        name: np.float64 if kind.form in ("whole", "number") else str
        for name, kind in table.kinds.items()
    }
    stored[beyond] = str
    text = b"," * len(table.header) + b"\n" + text  # or fields beyond the header would be lost
    try:
        try:
            cells = pd.read_csv(io.BytesIO(text), dtype=stored, **columns, **EMPTY_ALONE)
        except ValueError:  # one cell is no number: read as text, it can be found and named
            cells = pd.read_csv(io.BytesIO(text), dtype=str, **columns, **EMPTY_ALONE)
    except ValueError as error:
        raise BadCellError(0, "from here on rows do not fit the header, or are no text") from error
    cells = cells.iloc[1:].reset_index(drop=True)
    if (extra := cells.pop(beyond).notna().to_numpy()).any():
        raise BadCellError(int(extra.argmax()), "more fields than the header has")
    return cells


def narrowed(text: bytes, table: Table, keep: LabKeeper) -> tuple[bytes, NDArray[np.int64] | None]:
    """Cut out the lines that are needed, so that times and units of others are never parsed.

    Returns:
        The lines and their numbers; all of them and None where lines are not rows one by one, or
        a cell is damaged.
    """
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n")) + 1
    columns: Any = {"names": table.header, "usecols": list(LAB_KEYS)}
    try:
        head = pd.read_csv(io.BytesIO(text), dtype=np.float64, **columns, **EMPTY_ALONE)
        here = keep.needs(head)
    except ValueError:
        return text, None
    # A line break within quotes, an empty line; both at once where none stands at the end.
    if len(head) != len(ends) or not text.endswith(b"\n"):
        return text, None
    return data[np.repeat(here, np.diff(ends, prepend=0))].tobytes(), np.flatnonzero(here)


def decoded(cells: pd.DataFrame, kinds: dict[str, Kind]) -> pd.DataFrame:
    """Turn the cells of columns into what they mean.

    Returns:
        float64, ``datetime64[s]`` or stripped text; NaN, NaT and "" where nothing stands.

    Raises:
        BadCellError: a cell of another kind, or an empty one that may not be empty.
    """
    columns = {}
    for name, kind in kinds.items():
        column = cells[name]
        if kind.form == "word":
            columns[name] = column.astype(object).where(column.notna(), "").astype(str).str.strip()
            continue
        if kind.form == "time":
            value = moments(column)
        else:
            value = pd.to_numeric(column, errors="coerce").astype(np.float64)
        empty = column.isna() | (column.astype(str).str.strip() == "" if is_text(column) else False)
        wrong = value.isna() & ~empty
        if kind.form == "whole":
            wrong |= (value % 1 != 0) & ~empty
        for bad, problem in ((wrong, f"no {kind.form}"), (empty & (not kind.empty), "empty")):
            if bad.any():
                row = int(cells.index[int(bad.to_numpy().argmax())])
                raise BadCellError(row, f"column {name}: {problem}")
        columns[name] = value
    return pd.DataFrame(columns, index=cells.index)


def is_text(column: pd.Series) -> bool:
    """Say whether a column holds text or objects."""
    return column.dtype == object or pd.api.types.is_string_dtype(column.dtype)


def moments(column: pd.Series) -> pd.Series:
    """Read times of day as ``datetime64[s]``, NaT where there is none."""
    if not pd.api.types.is_datetime64_any_dtype(column.dtype):
        text = column.astype(object).where(column.notna(), None)
        try:
            column = pd.to_datetime(text, format="ISO8601", errors="coerce")
        except ValueError as error:
            raise BadCellError(0, "times of several time zones from here on") from error
    return column.dt.tz_localize(None).dt.floor("s").astype("datetime64[s]")


Keep = Callable[[pd.DataFrame, dict[str, Kind]], Any]
"""Takes from the cells of a piece what is needed later."""

_work: list[tuple[Table, Keep]] = []
"""What a process is to do with each piece; set when it begins."""


def begin_work(table: Table, keep: Keep) -> None:
    """Tell a new process what its pieces are; Ctrl-C is its parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work[:] = [(table, keep)]


def do_work(piece: TablePiece) -> Any:
    """Handle a piece in a process of its own."""
    table, keep = _work[0]
    if isinstance(piece.rows, int):
        with told_of(table.path), table.path.open("rb") as file:
            file.seek(piece.place or 0)
            piece = piece._replace(rows=file.read(piece.rows))
    return kept_of(piece, table, keep)


def light(piece: TablePiece) -> TablePiece:
    """Give only the length of text that another process can read from the file itself.

    The file's pages are in memory, since its parent has just hashed them; a pipe costs five times
    as much as reading them again.
    """
    if piece.place is None or not isinstance(piece.rows, bytes):
        return piece
    return piece._replace(rows=len(piece.rows))


def kept_of(piece: TablePiece, table: Table, keep: Keep) -> Any:
    """Parse a piece and keep of it what is needed.

    Raises:
        InputError: naming file and row.
    """
    rows, numbers = piece.rows, None
    assert not isinstance(rows, int)  # it was read from its place
    try:
        if isinstance(rows, pd.DataFrame):
            return keep(rows, table.kinds)
        if isinstance(keep, LabKeeper):
            rows, numbers = narrowed(rows, table, keep)
        return keep(cells_of(rows, table), table.kinds)
    except BadCellError as error:
        unit = "line" if isinstance(rows, bytes) else "row"
        row = error.row if numbers is None else int(numbers[error.row])
        where = f"{table.path}, {unit} {piece.first + row}"
        raise InputError(f"{where}: {error.problem}: copy the table again") from error


def worked(
    pieces: Iterable[TablePiece], table: Table, keep: Keep, processes: int
) -> Iterator[tuple[int, Any]]:
    """Give what is kept of each piece, in their order, and the bytes read so far.

    Several processes hold a few pieces at a time, however many there are.
    """
    if processes < 2:
        yield from ((piece.read, kept_of(piece, table, keep)) for piece in pieces)
        return
    # Forked, a process has what its parent holds and begins at once; elsewhere it imports anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=begin_work, initargs=(table, keep)
    ) as pool:
        waiting: deque[tuple[int, Future[Any]]] = deque()
        for piece in pieces:
            waiting.append((piece.read, pool.submit(do_work, light(piece))))
            if len(waiting) > processes:
                read, result = waiting.popleft()
                yield read, result.result()
        yield from ((read, result.result()) for read, result in waiting)


def read_mimic(
    folder: Path, name: str, keep: Keep, processes: int = 1
) -> tuple[list[Any], str, list[str]]:
    """Read the needed columns of a table once, a piece at a time, hashing its file along the way.

    Args:
        folder: with hosp/ and icu/.
        name: of the table, such as ``hosp/labevents``.
        keep: takes from each piece what is needed.
        processes: that parse; a file of one piece needs no more than this one. Parquet brings its
            own threads.

    Returns:
        What was kept of each piece, the file's SHA-256, and its columns.

    Raises:
        InputError: it is missing, damaged, or not MIMIC-IV's.
    """
    path = find_mimic(folder, name)
    size = path.stat().st_size
    with told_of(path), path.open("rb") as file:
        raw = Hashed(file)
        if path.suffix == ".parquet":
            table, pieces = parquet_table(path, name)
            processes = 1
        else:
            table, pieces = csv_table(path, name, raw)
            processes = processes if size > PIECE_BYTES // 8 else 1  # gzip packs eight to one
        kept = []
        with progress_bar(f"reading {name}", size) as shown:
            for read, result in worked(pieces, table, keep, processes):
                kept.append(result)
                shown.update(read - shown.n)
        while raw.read(2**20):  # a Parquet file was read by others
            pass
    return kept, raw.digest.hexdigest(), table.header


def progress_bar(what: str, size: int) -> Any:
    """Give a progress bar over bytes, off where stderr is no terminal."""
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, leave=False, disable=not shown)


# --------------------------------------------------------------------------- from MIMIC-IV: values


class Stays(NamedTuple):
    """Admissions as the laboratory's rows find them, (A,) each; a place counts from 0.

    subject and hadm int64; start (admission) and end (discharge or death) ``datetime64[s]``, NaT
    where unknown; wanted bool, whether values of an admission are kept.
    """

    subject: NDArray[np.int64]
    hadm: NDArray[np.int64]
    start: NDArray[np.datetime64]
    end: NDArray[np.datetime64]
    wanted: NDArray[np.bool_]


class LabKeeper:
    """Keeps of labevents the values of some items in some admissions.

    Args:
        items: itemids.
        stays: all admissions, since a row without ``hadm_id`` belongs to the only one it lies in.
    """

    def __init__(self, items: Iterable[int], stays: Stays) -> None:
        """Sort what is looked up often."""
        self.items, self.stays = np.array(sorted(items)), stays
        self.by_hadm = np.argsort(stays.hadm, kind="stable")
        self.subjects = np.unique(stays.subject[stays.wanted])
        place = np.arange(len(stays.subject))
        named = np.isin(stays.subject, self.subjects)
        self.places = pd.DataFrame({"subject_id": stays.subject[named], "stay": place[named]})

    def __call__(
        self, cells: pd.DataFrame, kinds: dict[str, Kind]
    ) -> tuple[pd.DataFrame, Counter[str]]:
        """Give the values of a piece, a row each, and how many were left out and why.

        Returns:
            stay (place), item, chart and known (the later of charted and stored, NaT where it is
            not recorded when a value was stored), value, unit.
        """
        rows = decoded(cells[self.needs(cells)], kinds)
        counts: Counter[str] = Counter()
        numeric = np.isfinite(rows["valuenum"])
        counts["without a number"] = int((~numeric).sum())
        rows = rows[numeric]
        stay = self.stays_of(rows, counts)
        rows = rows[stay >= 0]
        chart = rows["charttime"]
        # The demo has no storetime at all; then a value counts as known when it is charted.
        stored = rows.get("storetime", chart)
        counts["without a time of storing: no input, outcome alone"] = int(stored.isna().sum())
        kept = pd.DataFrame(
            {
                "stay": stay[stay >= 0].astype(np.int32),
                "item": rows["itemid"].astype(np.int32),
                "chart": chart,
                "known": stored.where(~(stored < chart), chart),
                "value": rows["valuenum"],
                "unit": rows["valueuom"].astype("category"),
            }
        )
        return kept, counts

    def needs(self, cells: pd.DataFrame) -> NDArray[np.bool_]:
        """Say which rows hold one of the items of a patient with a wanted admission."""
        keys = decoded(cells[list(LAB_KEYS)], dict.fromkeys(LAB_KEYS, NAME))
        here = keys["itemid"].isin(self.items) & keys["subject_id"].isin(self.subjects)
        return here.to_numpy()

    def stays_of(self, rows: pd.DataFrame, counts: Counter[str]) -> NDArray[np.int64]:
        """Give the place of the admission of each row, -1 where it has none that is wanted."""
        stays, named = self.stays, rows["hadm_id"].notna().to_numpy()
        chart = rows["charttime"].to_numpy()
        place = np.full(len(rows), -1)
        hadm = rows["hadm_id"].to_numpy()[named].astype(np.int64)
        found = np.searchsorted(stays.hadm[self.by_hadm], hadm).clip(max=len(stays.hadm) - 1)
        found = self.by_hadm[found]
        subject = rows["subject_id"].to_numpy()[named].astype(np.int64)
        same = (stays.hadm[found] == hadm) & (stays.subject[found] == subject)
        counts["whose hadm_id is no admission of the patient"] = int((~same).sum())
        begun = chart[named] >= stays.start[found] - BEFORE_ADMISSION
        place[named] = np.where(same & begun & (chart[named] <= stays.end[found]), found, -1)
        place[~named] = self.only_stay(rows[~named])
        counts["without hadm_id, within one admission: taken"] = int((place[~named] >= 0).sum())
        counts["without hadm_id, within none or several"] = int((place[~named] < 0).sum())
        counts["outside the admission that they name"] = int((place[named][same] < 0).sum())
        return np.where((place >= 0) & stays.wanted[place], place, -1)

    def only_stay(self, rows: pd.DataFrame) -> NDArray[np.int64]:
        """Give the one admission that each row lies in by its time, -1 where none or several."""
        numbered = rows[["subject_id", "charttime"]].assign(row=np.arange(len(rows)))
        pairs = numbered.merge(self.places, on="subject_id")
        chart, stay = pairs["charttime"].to_numpy(), pairs["stay"].to_numpy()
        pairs = pairs[(self.stays.start[stay] <= chart) & (chart <= self.stays.end[stay])]
        place = np.full(len(rows), -1)
        place[pairs["row"]] = pairs["stay"]
        place[pairs["row"][pairs["row"].duplicated(keep=False)]] = -1
        return place


def join_values(
    kept: Sequence[tuple[pd.DataFrame, Counter[str]]],
) -> tuple[pd.DataFrame, Counter[str]]:
    """Join what was kept of all pieces: equal rows whatever their order in the table was."""
    counts: Counter[str] = Counter()
    for _, part in kept:
        counts.update(part)
    frames = [frame for frame, _ in kept]
    units = sorted({unit for frame in frames for unit in frame["unit"].cat.categories})
    for frame in frames:
        frame["unit"] = frame["unit"].cat.set_categories(units)
    values = pd.concat(frames, ignore_index=True)
    keys = ["stay", "chart", "known", "item", "value", "unit"]
    return values.sort_values(keys, kind="stable", ignore_index=True), counts


def convert_units(
    values: pd.DataFrame, needed: Sequence[int], path: str
) -> tuple[pd.DataFrame, str, Counter[str]]:
    """Bring the values of each item to one unit.

    Args:
        values: from ``join_values``; ``unit`` as it is written, empty where none stands.
        needed: the items of the series, which may not lose a value.
        path: of the table, for errors.

    Returns:
        The values whose unit is known, the unit of the series, and how many were left out.

    Raises:
        InputError: a needed item has an unknown unit, or several that nothing converts.
    """
    factor = np.full(len(values), np.nan)
    counts: Counter[str] = Counter()
    series_unit = ANALYTES[needed[0]].unit if needed[0] in ANALYTES else ""
    for item in np.unique(values["item"]).tolist():
        rows = np.flatnonzero(values["item"] == item)
        units = values["unit"].iloc[rows].astype(str)
        spelled = {unit.lower(): unit for unit in sorted(set(units), reverse=True)}
        named = sorted(filter(None, spelled))
        analyte = ANALYTES.get(item)
        factors = analyte.factors if analyte else {named[0] if named else "": 1.0}
        unknown = [unit for unit in named if unit not in factors]
        if item in needed and unknown:
            told = ", ".join(repr(spelled[unit]) for unit in named)
            known = f"known are {', '.join(factors)}" if analyte else "nothing converts them"
            raise InputError(f"{path}: item {item} has values in {told}: {known}")
        if item == needed[0] and not analyte:
            series_unit = spelled[next(iter(factors))]
        factor[rows] = units.str.lower().map(factors).to_numpy(np.float64)
        if left := int(np.isnan(factor[rows]).sum()):
            name = analyte.name if analyte else f"item {item}"
            counts[f"of {name} in no unit or an unknown one"] = left
    converted = values["value"] * factor
    converted = converted.where(factor == 1, converted.round(6))  # as a laboratory would print it
    kept = ~np.isnan(factor)
    return values.assign(value=converted)[kept].reset_index(drop=True), series_unit, counts


# --------------------------------------------------------------------------- from MIMIC-IV: cohort


COHORTS = {
    "dka": (
        "adult admissions coded as diabetic ketoacidosis (ICD-9-CM 250.1x; ICD-10-CM E08.1x, "
        "E09.1x, E10.1x, E11.1x, E13.1x). Codes are given at discharge: this cohort is chosen in "
        "hindsight, and a model of it cannot be used at a bedside as it is"
    ),
    "all": "all adult admissions with enough values",
    "biochemical": (
        "adult admissions with, among the values known within the window, glucose above 250 mg/dL, "
        "bicarbonate at most 18 mEq/L, an anion gap above 12 mEq/L and, where any pH is known, one "
        "of at most 7.30 (ketones are not asked for)"
    ),
}
"""Who is in. Source of biochemical: Kitabchi 2009, diagnosis, its gap that of moderate
ketoacidosis; without ketones."""

KETOACIDOSIS = {9: ("2501",), 10: ("E081", "E091", "E101", "E111", "E131")}
"""How codes begin, by version. Source: ICD-9-CM and ICD-10-CM; E08.0 and E11.0 are another state,
hyperosmolarity."""

HIGH_GLUCOSE, LOW_BICARBONATE, LOW_PH = 250.0, 18.0, 7.30
"""mg/dL, mEq/L, and none. Source: Kitabchi 2009, diagnosis of ketoacidosis."""


OPEN_AT_DISCHARGE = "outcome not known: discharged within the horizon with an open gap"
NOT_MEASURED = "outcome not known: anion gap not measured after the prediction time"


class Part(NamedTuple):
    """One part of the outcome: its name in a report, the end of its question, its definition."""

    outcome: str
    question: str
    definition: str


OUTCOMES = {
    "death": Part(
        "In-hospital death",
        "die in hospital",
        "death in this hospital admission within the horizon (deathtime; the time of discharge "
        "where only hospital_expire_flag says so). Whoever is discharged alive counts 0",
    ),
    "icu": Part(
        "ICU admission",
        "be admitted to an intensive care unit",
        "a stay in intensive care that begins within the horizon, in this admission; not asked of "
        "whoever is in intensive care at the prediction time (empty)",
    ),
    "unresolved": Part(
        "Anion gap not resolved",
        "keep or regain an anion gap above 12 mEq/L",
        "of a gap above 12 mEq/L at the prediction time: no value at or below 12 within the "
        "horizon, or one and a later value above it; of a closed one: a value above 12 within the "
        "horizon. Whoever dies with an open gap counts 1. Not known (empty) where an open gap is "
        "not measured again, or is not seen to close before a discharge within the horizon",
    ),
}
"""The parts of escalation, which is any of them."""

REPORTED = "reported"
GAPS = {
    REPORTED: (
        "as the laboratory reports it (item 50868), in MIMIC-IV mostly with potassium and so about "
        "4 mEq/L above sodium - chloride - bicarbonate"
    ),
    "missing": (
        "as the laboratory reports it (item 50868; mostly with potassium), and sodium - chloride - "
        "bicarbonate in admissions without a reported one"
    ),
    "always": "sodium - chloride - bicarbonate, without potassium as in guidelines, for everyone",
}
"""Whose anion gap is computed, and what the gap then is."""

ESCALATION = Part("Escalation", "need escalation of care", "any of death, icu and unresolved")


@dataclass(frozen=True)
class Extraction:
    """What is asked of MIMIC-IV.

    Attributes:
        mimic_dir: folder with hosp/ and icu/.
        out: CSV to be written.
        cohort: one of ``COHORTS``.
        item: itemid, or a name in d_labitems.
        window_hours: from the first value to the prediction time.
        horizon_hours: from the prediction time on.
        min_observations: values known within the window, at least.
        outcome: names of ``OUTCOMES``; all of them are escalation.
        compute_gap: one of ``GAPS``: whose anion gap is computed.
    """

    mimic_dir: Path
    out: Path
    cohort: str = "dka"
    item: str = str(GAP_ITEM)
    window_hours: float = 12.0
    horizon_hours: float = 72.0
    min_observations: int = 2
    outcome: tuple[str, ...] = tuple(OUTCOMES)
    compute_gap: str = REPORTED

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            InputError: with the flag and its value.
        """
        for name in ("window_hours", "horizon_hours"):
            if not 0 < getattr(self, name) <= LARGEST[1]:
                raise InputError(f"--{name} {getattr(self, name)}: must be a number above 0")
        if self.min_observations < 1:
            raise InputError(f"--min_observations {self.min_observations}: must be 1 at least")
        if self.compute_gap not in GAPS:
            raise InputError(f"--compute_gap {self.compute_gap}: {', '.join(GAPS)}")

    @property
    def window(self) -> np.timedelta64:
        """The window in whole seconds."""
        return np.timedelta64(round(self.window_hours * 3600), "s")

    @property
    def horizon(self) -> np.timedelta64:
        """The horizon in whole seconds."""
        return np.timedelta64(round(self.horizon_hours * 3600), "s")

    @property
    def part(self) -> Part:
        """The words of the chosen outcome."""
        if set(self.outcome) == set(OUTCOMES):
            return ESCALATION
        parts = [OUTCOMES[name] for name in self.outcome]
        return Part(*(" or ".join(words) for words in zip(*parts, strict=True)))


class Tables:
    """The small tables of MIMIC-IV, and where all that was read came from.

    Attributes:
        admissions: (A rows) subject_id, hadm_id, start, end, death (NaT where none in hospital),
            age (years), over (whether that is the least possible age), gender, coded (as
            ketoacidosis).
        icu: hadm_id, intime, outtime, first_careunit.
        items: itemid, label, fluid, category.
        hashes: SHA-256 of each file that was read.
        stored: whether labevents say when a value was stored; known once it is read.
    """

    stored = True

    def __init__(self, folder: Path) -> None:
        """Read all but labevents.

        Raises:
            InputError: as ``read_mimic``, or a name that should be unique is not.
        """
        self.folder, self.hashes = folder, dict[str, str]()
        patients = self.read("hosp/patients", unique="subject_id")
        admissions = self.read("hosp/admissions", unique="hadm_id")
        self.icu = self.read("icu/icustays").dropna(subset=["intime"])
        coded = self.read("hosp/diagnoses_icd", keep_ketoacidosis)["hadm_id"]
        self.items = self.read("hosp/d_labitems", unique="itemid")
        find_mimic(folder, "hosp/labevents")  # its absence shall show before minutes are spent
        self.admissions = describe_admissions(admissions, patients, coded)

    def read(self, name: str, keep: Keep = decoded, unique: str = "") -> pd.DataFrame:
        """Read one table whole."""
        pieces, self.hashes[name], header = read_mimic(self.folder, name, keep)
        lacking = [each for each in MIMIC_TABLES[name] if each not in header]
        table = pd.concat(pieces or [pd.DataFrame(columns=list(MIMIC_TABLES[name]))])
        table = table.reset_index(drop=True).assign(**dict.fromkeys(lacking, ""))
        if table.empty and name != "hosp/diagnoses_icd":
            raise InputError(f"{find_mimic(self.folder, name)}: no rows below the header")
        if unique and table[unique].duplicated().any():
            raise InputError(
                f"{find_mimic(self.folder, name)}, column {unique}: not each stands there once: "
                "copy the table again"
            )
        return table


def keep_ketoacidosis(cells: pd.DataFrame, kinds: dict[str, Kind]) -> pd.DataFrame:
    """Keep the diagnoses that are codes of diabetic ketoacidosis."""
    table = decoded(cells, kinds)
    code = table["icd_code"].str.replace(".", "").str.upper()
    of_each = [
        code.str.startswith(v) & (table["icd_version"] == k) for k, v in KETOACIDOSIS.items()
    ]
    return table[np.logical_or.reduce(of_each)]


def describe_admissions(
    admissions: pd.DataFrame, patients: pd.DataFrame, coded: pd.Series
) -> pd.DataFrame:
    """Give what is known of each admission, by ascending patient and admission.

    The stay of whoever dies in hospital ends by his death. A death after the discharge counts on
    the same day only, since discharges of the dead often bear a date without a time; on a later day
    it was no death in hospital. Ages are those of the year of admission, the least possible ones of
    whoever is over 89 in his anchor year.

    Source: mimic.mit.edu, MIMIC-IV, patients (anchor_age, anchor_year) and admissions.
    """
    table = admissions.merge(patients, on="subject_id", how="left")
    flagged = pd.to_numeric(table["hospital_expire_flag"]) == 1
    death = table["deathtime"].fillna(table["dischtime"].where(flagged))
    day, last_day = death.dt.normalize(), table["dischtime"].dt.normalize()
    death = death.mask((death > table["dischtime"]) & (day != last_day))
    since = table["admittime"].dt.year - table["anchor_year"]
    over = table["anchor_age"] > OLDEST_TOLD  # how far above is not told
    table = table.assign(
        start=table["admittime"],
        end=death.fillna(table["dischtime"]),
        death=death,
        age=(table["anchor_age"] + since).mask(over, OLDEST_TOLD + 1.0 + since.clip(upper=0)),
        over=over,
        coded=table["hadm_id"].isin(coded),
    )
    table = table.astype({"subject_id": np.int64, "hadm_id": np.int64})
    return table.sort_values(["subject_id", "hadm_id"], ignore_index=True)


def find_item(wanted: str, tables: Tables) -> tuple[int, str]:
    """Find an item by number or name; its name as texts say it.

    Raises:
        InputError: it is not in d_labitems, or its name stands there more than once.
    """
    items = tables.items
    named = items["label"].map(plainly) == plainly(wanted)
    found = items[(items["itemid"].astype(np.int64).astype(str) == wanted.strip()) | named]
    if len(found) != 1:
        several = "; ".join(
            ", ".join(filter(None, (f"{number:.0f}", fluid, category)))
            for number, _, fluid, category in found[["itemid", "label", "fluid", "category"]].values
        )
        problem = f"several, name one by its itemid: {several}" if several else "no such item"
        path = find_mimic(tables.folder, "hosp/d_labitems")
        raise InputError(f"{path}: --item {wanted}: {problem}")
    item = int(found["itemid"].iloc[0])
    name = ANALYTES[item].name if item in ANALYTES else str(found["label"].iloc[0])
    return item, name if name[1:] != name[1:].lower() else name[:1].upper() + name[1:]


def computed_gaps(values: pd.DataFrame) -> pd.DataFrame:
    """Compute the anion gap wherever serum sodium, chloride and bicarbonate were drawn together.

    Of several values at one time the one known first counts. The gap is known when all three are,
    and no input where that is not recorded of one.

    Source: gap = sodium - chloride - bicarbonate in mEq/L, as in Kitabchi 2009.
    """
    parts = values[values["item"].isin(GAP_PARTS)]
    first = parts.drop_duplicates(["stay", "chart", "item"])  # sorted by known, then value
    drawn = [first[first["item"] == item].set_index(["stay", "chart"]) for item in GAP_PARTS]
    sodium, chloride, bicarbonate = (each["value"] for each in drawn)
    gap = (sodium - chloride - bicarbonate).dropna().round(6)
    known = pd.concat([each["known"] for each in drawn], axis=1).max(axis=1, skipna=False)
    table = pd.DataFrame({"item": COMPUTED, "known": known.reindex(gap.index), "value": gap})
    return table.reset_index()


class Windows(NamedTuple):
    """Who is asked when, by place of the admission: (A,) each.

    first: first value that counts, NaT where there is none; time: of the prediction; gap_item:
    whether the reported or the computed anion gap speaks for the admission.
    """

    first: pd.Series
    time: pd.Series
    gap_item: pd.Series


def find_windows(values: pd.DataFrame, main: int, asked: Extraction, count: int) -> Windows:
    """Find the first value of each admission and so its prediction time.

    A value is the first only if it is stored within the window that it opens: else nobody could
    know at the prediction time when that is. No series mixes reported and computed gaps, which
    differ by potassium: an admission gets a computed one whole, if every one does or no reported
    one is known by then.
    """
    timely = values[values["known"] <= values["chart"] + asked.window]

    def first_of(item: int) -> pd.Series:
        of_item = timely[timely["item"] == item]
        return of_item.groupby("stay")["chart"].min().reindex(range(count))

    if asked.compute_gap != "missing":
        gap = GAP_ITEM if asked.compute_gap == REPORTED else COMPUTED
        first = first_of(gap if main == GAP_ITEM else main)
        return Windows(first, first + asked.window, pd.Series(gap, index=first.index))
    first = first_of(main)
    time = first + asked.window
    reported = timely if main == GAP_ITEM else values
    reported = reported[reported["item"] == GAP_ITEM]
    known = reported.groupby("stay")["known"].min().reindex(first.index)
    if main != GAP_ITEM:
        return Windows(first, time, known.le(time).map({True: GAP_ITEM, False: COMPUTED}))
    computed = first_of(COMPUTED)
    gap_item = (known > computed + asked.window) | known.isna()
    first = first.mask(gap_item, computed)
    gap_item = gap_item.map({True: COMPUTED, False: GAP_ITEM})
    return Windows(first, first + asked.window, gap_item)


def of(values: pd.DataFrame, column: pd.Series) -> Any:
    """Give for each value what a column says of its admission."""
    return column.to_numpy()[values["stay"].to_numpy()]


def known_inputs(values: pd.DataFrame, windows: Windows) -> pd.DataFrame:
    """Keep the values charted within the window and stored by its end: all that a model may see."""
    first, time = (of(values, each) for each in (windows.first, windows.time))
    within = (first <= values["chart"]) & (values["chart"] <= time) & (values["known"] <= time)
    return values[within]


def judge(
    table: pd.DataFrame, icu: pd.DataFrame, gaps: pd.DataFrame, windows: Windows, asked: Extraction
) -> pd.DataFrame:
    """Decide each part of the outcome within the horizon.

    Args:
        table: A admissions, as ``Tables.admissions``.
        icu: as ``Tables.icu``.
        gaps: values of the gap, stay, chart, value, whenever they were stored.
        windows: of the A admissions.
        asked: gives the horizon.

    Returns:
        A rows: ``death``, ``icu``, ``unresolved`` of 0, 1 and NaN; ``unit`` of intensive care at
        the prediction time, empty where none; ``why`` unresolved is not known, empty where it is.
    """
    time = windows.time
    until = time + asked.horizon
    death = ((table["death"] > time) & (table["death"] <= until)).astype(float)
    stays = icu.assign(stay=icu["hadm_id"].map(pd.Series(table.index, index=table["hadm_id"])))
    stays = stays.dropna(subset=["stay"]).sort_values(["stay", "intime", "outtime"])
    then, last = (stays["stay"].map(each) for each in (time, until))
    here = stays[(stays["intime"] <= then) & ~(stays["outtime"] <= then)]
    unit = here.groupby("stay")["first_careunit"].last().reindex(table.index)
    comes = stays["stay"][(stays["intime"] > then) & (stays["intime"] <= last)]
    admitted = pd.Series(table.index.isin(comes), index=table.index, dtype=float)
    result = judge_gap(table, gaps, windows, until, death == 1)
    return result.assign(death=death, icu=admitted.mask(unit.notna()), unit=unit)


def judge_gap(
    table: pd.DataFrame,
    gaps: pd.DataFrame,
    windows: Windows,
    until: pd.Series,
    died: pd.Series,
) -> pd.DataFrame:
    """Decide whether the gap closes and stays closed; see ``OUTCOMES`` and ``judge``.

    Of values charted at one time one that is closed decides.
    """
    gaps = gaps.groupby(["stay", "chart"])["value"].min().reset_index()
    then = of(gaps, windows.time)
    closed = gaps["value"] <= CLOSED_GAP
    before, after = gaps["chart"] <= then, (gaps["chart"] > then)
    after &= gaps["chart"] <= of(gaps, until)

    def edge(rows: pd.Series, which: str) -> pd.Series:
        return gaps[rows].groupby("stay")["chart"].agg(which).reindex(table.index)

    opened, shut = edge(before & ~closed, "max"), edge(before & closed, "max")
    open_then = opened.notna() & ~(opened <= shut)
    closed_then = shut.notna() & ~open_then
    closes = edge(after & closed, "min").mask(closed_then, windows.time)
    last_open = edge(after & ~closed, "max")
    unresolved = (last_open > closes).astype(float)  # reopened
    never, unmeasured = closes.isna(), edge(after, "max").isna()
    unresolved = unresolved.mask(never, 1.0)
    why = pd.Series("", index=table.index)
    # Whoever leaves alive and open, nobody knows whether his gap closed by the horizon.
    why = why.mask(never & (table["end"] < until) & ~died, OPEN_AT_DISCHARGE)
    why = why.mask(never & unmeasured, NOT_MEASURED)
    why = why.mask(died & (open_then | ~unmeasured), "")
    return pd.DataFrame({"unresolved": unresolved.mask(why != ""), "why": why})


def analyte_names(inputs: pd.DataFrame, windows: Windows) -> pd.Series:
    """Name what each value measures; of the two anion gaps only the one that speaks for a stay."""
    gap = inputs["item"] == of(inputs, windows.gap_item)
    names_of = inputs["item"].map({i: a.name for i, a in ANALYTES.items() if i != GAP_ITEM})
    return names_of.mask(gap, CHEMISTRY[0].name)


def in_ketoacidosis(inputs: pd.DataFrame, windows: Windows, count: int) -> pd.Series:
    """Say which admissions are in ketoacidosis by what is known within the window; (A,) bool."""
    analyte = analyte_names(inputs, windows)
    by_stay = inputs["value"].groupby([inputs["stay"], analyte])
    low, high = (each.unstack().reindex(range(count)) for each in (by_stay.min(), by_stay.max()))
    all_names = [each.name for each in CHEMISTRY]
    low, high = (each.reindex(columns=all_names).astype(float) for each in (low, high))
    return (
        (high["glucose"] > HIGH_GLUCOSE)
        & (low["bicarbonate"] <= LOW_BICARBONATE)
        & (high["anion gap"] > CLOSED_GAP)
        & ~(low["pH"] > LOW_PH)
    )


def label_of(judged: pd.DataFrame, outcome: Sequence[str]) -> pd.Series:
    """Join the chosen parts: 1 where any is, else NaN where one is not known, else 0."""
    parts = judged[list(outcome)]
    unknown = parts.isna()
    if len(outcome) > 1 and "icu" in unknown:  # of whoever is there already the others are asked
        unknown["icu"] = False
    label = (parts == 1).any(axis=1).astype(float)
    return label.mask(unknown.any(axis=1) & (label == 0))


def flow_of(rules: dict[str, pd.Series]) -> tuple[pd.Series, list[dict[str, Any]]]:
    """Say for each admission which rule took it first, and count.

    Args:
        rules: (A,) bool each, in the order in which they apply.

    Returns:
        (A,) bool whether it is kept; and for each rule the admissions removed and left.
    """
    left = pd.Series(True, index=next(iter(rules.values())).index)
    flow = []
    for rule, taken in rules.items():
        removed = int((left & taken).sum())
        left &= ~taken
        flow.append({"rule": rule, "removed": removed, "left": int(left.sum())})
    return left, flow


# --------------------------------------------------------------------------- from MIMIC-IV: file


def write_series(inputs: pd.DataFrame, windows: Windows) -> pd.Series:
    """Write each admission's values as the format wants them, hours since the first."""
    hours = (inputs["chart"] - of(inputs, windows.first)).dt.total_seconds() / 3600
    pairs = [
        f"{plain(v)} ({plain(round(h, 2))}h)" for v, h in zip(inputs["value"], hours, strict=True)
    ]
    return pd.Series(pairs, index=inputs.index).groupby(inputs["stay"]).agg(" -> ".join)


def write_context(
    table: pd.DataFrame, inputs: pd.DataFrame, windows: Windows, main: int
) -> pd.Series:
    """Say in words what else was known at the prediction time.

    Args:
        table: admissions with age, over, gender, start and unit.
        inputs: from ``known_inputs``.
        windows: of all admissions.
        main: the item that the series tells.

    Returns:
        A sentence without full stop for each admission: age as known, sex, unit, hours since
        admission, the last value of each other analyte.
    """
    told = ANALYTES[main].name if main in ANALYTES else ""
    units = {a.name: f" ({a.unit})" if a.unit else "" for a in CHEMISTRY}
    other = inputs.assign(name=analyte_names(inputs, windows))
    other = other[other["name"].notna() & other["name"].ne(told)]
    last = other.sort_values(["stay", "name", "chart", "known", "value"])
    last = last.drop_duplicates(["stay", "name"], keep="last")
    words = [
        f"{name} {plain(value)}{units[name]}"
        for name, value in zip(last["name"], last["value"], strict=True)
    ]
    chemistry = pd.Series(words, index=last["stay"], dtype=object).groupby(level=0).agg(", ".join)
    hours = ((windows.time.loc[table.index] - table["start"]).dt.total_seconds() / 3600).round(1)
    sex = table["gender"].str.upper().map({"F": "woman", "M": "man"}).fillna("patient")
    known = table["age"].where(~table["over"], table["age"] - 1).clip(upper=OLDEST_TOLD)
    over = table["over"] | (table["age"] > OLDEST_TOLD)
    age = over.map({True: "over ", False: ""}) + known.map("{:.0f}-year-old".format)
    unit = (
        table["unit"]
        .where(table["unit"].fillna("") != "", "intensive care")
        .where(table["unit"].notna(), "not in intensive care")
    )
    text = age.str.capitalize() + " " + sex + ", " + unit + ", " + hours.map(plain)
    text += " h since admission"
    return text + (", " + chemistry.reindex(table.index)).fillna("")


class Item(NamedTuple):
    """The item that the series tells: itemid, its name in texts, its unit."""

    number: int
    name: str
    unit: str


class Findable(NamedTuple):
    """All that rows are made of, by place of the admission: see ``extract``."""

    table: pd.DataFrame
    series: pd.DataFrame
    inputs: pd.DataFrame
    windows: Windows
    judged: pd.DataFrame


def extract(asked: Extraction, processes: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Build the rows of the DKA file from MIMIC-IV.

    Args:
        asked: what is wanted.
        processes: that parse labevents.

    Returns:
        The rows by ascending patient and admission, and the description beside them.

    Raises:
        InputError: the tables cannot be read, or no admission is left.
    """
    tables = Tables(asked.mimic_dir)
    number, name = find_item(asked.item, tables)
    rules = {"under 18 at admission, or of unknown age": ~(tables.admissions["age"] >= ADULT_YEARS)}
    if asked.cohort == "dka":
        rules["not coded as diabetic ketoacidosis"] = ~tables.admissions["coded"]
    needed: tuple[int, ...] = (number,)
    if number == GAP_ITEM and asked.compute_gap == "always":
        # Another quantity than the reported gap: no model of one shall pass for one of the other.
        needed, name = GAP_PARTS, f"{name} without potassium"
    values, unit, counts = read_values(tables, ~pd.DataFrame(rules).any(axis=1), needed, processes)
    item = Item(number, name, unit)
    found = find_rows(tables, values, item, asked)
    left, flow = flow_of(rules | further_rules(found, asked))
    say_flow(flow, len(left), asked)
    rows = rows_of(found, left, item, asked)
    return rows, description_of(rows, found, flow, counts, item, tables, asked)


def read_values(
    tables: Tables, wanted: pd.Series, needed: Sequence[int], processes: int
) -> tuple[pd.DataFrame, str, Counter[str]]:
    """Read labevents: the needed items and the other chemistry in the wanted admissions.

    Returns:
        As ``convert_units``; the counts are those of all rows that were left out or resolved.
    """
    table = tables.admissions
    subject, hadm = table["subject_id"].to_numpy(), table["hadm_id"].to_numpy()
    start, end = table["start"].to_numpy(), table["end"].to_numpy()
    stays = Stays(subject, hadm, start, end, wanted.to_numpy())
    keeper = LabKeeper({*needed, *ANALYTES}, stays)
    kept, digest, header = read_mimic(tables.folder, "hosp/labevents", keeper, processes)
    tables.hashes["hosp/labevents"] = digest
    path = str(find_mimic(tables.folder, "hosp/labevents"))
    if not kept:
        raise InputError(f"{path}: no rows below the header")
    tables.stored = "storetime" in header
    if not tables.stored:
        logger.warning("%s: no column storetime: values count as known when charted", path)
    values, counts = join_values(kept)
    values, unit, unknown = convert_units(values, needed, path)
    for reason, rows in (counts + unknown).items():
        logger.info("%s: %d values %s", path, rows, reason)
    return values, unit, counts + unknown


def find_rows(tables: Tables, values: pd.DataFrame, item: Item, asked: Extraction) -> Findable:
    """Find for each admission when it is asked, what is known then, and what becomes of it."""
    table = tables.admissions
    if asked.compute_gap != REPORTED:
        values = pd.concat([values, computed_gaps(values)], ignore_index=True)
        keys = ["stay", "chart", "known", "item", "value"]
        values = values.sort_values(keys, kind="stable", ignore_index=True)
    windows = find_windows(values, item.number, asked, len(table))
    inputs = known_inputs(values, windows)
    gaps = values[values["item"] == of(values, windows.gap_item)]
    judged = judge(table, tables.icu, gaps, windows, asked)
    own = of(inputs, windows.gap_item) if item.number == GAP_ITEM else item.number
    return Findable(table, inputs[inputs["item"] == own], inputs, windows, judged)


def further_rules(found: Findable, asked: Extraction) -> dict[str, pd.Series]:
    """Give what else takes an admission out, in this order; (A,) bool each."""
    table, time = found.table, found.windows.time
    observations = found.series.groupby("stay").size().reindex(table.index, fill_value=0)
    rules = {
        "no value of the series known within a window of the admission": time.isna(),
        "prediction time before the admission": time < table["start"],
        "died by the prediction time": table["death"] <= time,
        "discharged by the prediction time": ~(table["end"] > time),
        f"fewer than {asked.min_observations} values known within the window": (
            observations < asked.min_observations
        ),
    }
    if asked.cohort == "biochemical":
        sick = in_ketoacidosis(found.inputs, found.windows, len(table))
        rules["not in ketoacidosis by what is known within the window"] = ~sick
    if tuple(asked.outcome) == ("icu",):
        rules["in intensive care at the prediction time"] = found.judged["unit"].notna()
    label = label_of(found.judged, asked.outcome)
    for reason in (OPEN_AT_DISCHARGE, NOT_MEASURED):
        rules[reason] = label.isna() & (found.judged["why"] == reason)
    return rules


def say_flow(flow: list[dict[str, Any]], admissions: int, asked: Extraction) -> None:
    """Log how the admissions became rows, and what the cohort is.

    Raises:
        InputError: none is left.
    """
    if not flow[-1]["left"]:
        taken = "; ".join(f"{each['rule']} {each['removed']}" for each in flow if each["removed"])
        raise InputError(
            f"--mimic_dir {asked.mimic_dir}: of {admissions} admissions none is left: {taken}"
        )
    logger.info("%s: %d admissions", asked.mimic_dir, admissions)
    for each in flow:
        logger.info("  %6d out, %7d left: %s", each["removed"], each["left"], each["rule"])
    logger.warning("cohort %s: %s", asked.cohort, COHORTS[asked.cohort])


def rows_of(found: Findable, left: pd.Series, item: Item, asked: Extraction) -> pd.DataFrame:
    """Write the admissions that are left in the DKA format."""
    judged, inputs = found.judged[left], found.inputs[of(found.inputs, left)]
    table = found.table[left].assign(unit=judged["unit"])
    series = found.series[of(found.series, left)]
    parts = {f"label_{name}": judged[name].astype("Int8") for name in OUTCOMES}
    return pd.DataFrame(
        {
            "subject_id": table["subject_id"],
            "hadm_id": table["hadm_id"],
            "clinical_trajectory": write_series(series, found.windows),
            "clinical_context": write_context(table, inputs, found.windows, item.number),
            "label_escalation": label_of(judged, asked.outcome).astype("Int8"),
            **parts,
        }
    ).reset_index(drop=True)


def description_of(
    rows: pd.DataFrame,
    found: Findable,
    flow: list[dict[str, Any]],
    counts: Counter[str],
    item: Item,
    tables: Tables,
    asked: Extraction,
) -> dict[str, Any]:
    """Say all that a reader of the rows must know; see ``Description`` for the first keys."""
    hours = {"window": plain(asked.window_hours), "horizon": plain(asked.horizon_hours)}
    inside = found.table["hadm_id"].isin(rows["hadm_id"])
    stored = "charted and stored by then" if tables.stored else "charted by then (no storetime)"
    return {
        "series": item.name,
        "unit": item.unit,
        "question": f"Will the patient {asked.part.question} within {hours['horizon']} hours?",
        "outcome": asked.part.outcome,
        "plausible": plausible_of(found.series["value"], item.number),
        "prediction_time": (
            f"{hours['window']} hours after the first value of each admission, for whoever is then "
            f"in hospital; only values {stored} are read"
        ),
        "horizon": f"{hours['horizon']} hours from then on",
        "flow": flow,
        "rows": {
            "rows": len(rows),
            "patients": int(rows["subject_id"].nunique()),
            "events": int(rows["label_escalation"].sum()),
            "computed_gaps": int((found.windows.gap_item[inside] == COMPUTED).sum()),
        },
        "values": dict(sorted(counts.items())),
        "definitions": {
            "cohort": COHORTS[asked.cohort],
            "anion_gap": GAPS[asked.compute_gap],
            "label_escalation": asked.part.definition,
            **{f"label_{name}": part.definition for name, part in OUTCOMES.items()},
        },
        "arguments": {
            each.name: getattr(asked, each.name)
            for each in fields(asked)
            if each.name not in ("mimic_dir", "out")
        },
        "source": "MIMIC-IV (PhysioNet), under its data use agreement",
        "tables_sha256": dict(sorted(tables.hashes.items())),
        "versions": {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        },
        MADE_BY: "dataset_format.py from_mimic",
    }


def plausible_of(values: pd.Series, item: int) -> tuple[float, float]:
    """Give the limits of a known analyte, or what lies far outside the quartiles of another."""
    if item in ANALYTES:
        return ANALYTES[item].plausible
    q1, q3 = np.quantile(values, [0.25, 0.75])
    reach = FAR_OUT * max(q3 - q1, abs(q3), 1.0)
    return round(float(q1 - reach), 3), round(float(q3 + reach), 3)


MADE_BY = "made_by"
"""Key of the description by which a file of this command is known."""


def refuse_target(asked: Extraction) -> None:
    """Refuse a place where the output cannot stand, before minutes are spent on it.

    Raises:
        InputError: another ending, no folder that can be written to, or a file that this command
            did not make.
    """
    out = asked.out
    if out.suffix != ".csv":
        raise InputError(f"--out {out}: must end in .csv")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}: make it first")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror}): choose another folder"
        raise InputError(f"--out {out}: {out.parent} {problem}") from None
    beside = out.with_suffix(".json")
    if not out.exists() and not beside.exists():
        return
    try:
        own = MADE_BY in json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, OSError, TypeError):
        own = False
    if not own:
        raise InputError(
            f"--out {out}: it, or {beside.name}, is there and not of this command: choose another "
            "name"
        )


def write_rows(rows: pd.DataFrame, description: dict[str, Any], out: Path) -> None:
    """Write the CSV and the description beside it: both or none, for their owner alone.

    The description is renamed first: a table without it would be read as something else.
    """
    with atomic(out) as csv_file, atomic(out.with_suffix(".json")) as beside:
        rows.to_csv(csv_file, index=False, lineterminator="\n")
        digest = hashlib.sha256(csv_file.read_bytes()).hexdigest()
        text = json.dumps({**description, "csv_sha256": digest}, indent=2, ensure_ascii=False)
        beside.write_text(f"{text}\n", encoding="utf-8")


def run_from_mimic(asked: Extraction) -> int:
    """Build the file, log what became of the admissions; 0, 2 for bad input, 3 for a fault."""
    stream = forgiving(sys.stdout)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
    own_mask = os.umask(0o077)  # what is made holds patients
    own_end = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes end, too
    try:
        refuse_target(asked)
        rows, description = extract(asked, usable_cores())
        write_rows(rows, description, asked.out)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted: nothing was written\n")
        return 130
    except OSError as error:
        place = one_line(str(error.filename))
        sys.stderr.write(f"error: {place}: {error.strerror}: make room or choose another place\n")
        return 3
    except (MemoryError, BrokenExecutor):
        sys.stderr.write("error: the machine has too little memory: choose a smaller cohort\n")
        return 3
    finally:
        os.umask(own_mask)
        signal.signal(signal.SIGTERM, own_end)
    told = description["rows"]
    logger.info(
        "%s: %d rows of %d patients, %d events", asked.out, *(told[k] for k in list(told)[:3])
    )
    return 0


def usable_cores() -> int:
    """Give the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the file can be trained on or is made, 2 when not."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    if arguments.pop("command") == "from_mimic":
        try:
            asked = Extraction(**arguments)
        except InputError as error:
            parser.error(str(error))
        return run_from_mimic(asked)
    file, shown = arguments.pop("file"), arguments.pop("show_values")
    return run_check(
        lambda: MIMICtrajectoryDataset(file, **arguments), suspicions, show_values=shown
    )


def build_parser() -> Parser:
    """Give the parser of both commands."""
    parser = Parser(
        prog="dataset_format.py",
        description="Check a DKA trajectory file, or make one from MIMIC-IV.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file and print its summary")
    check.add_argument("file", type=Path, help="CSV (.csv, .csv.gz) or Parquet in the DKA format")
    check.add_argument("--series", type=names, metavar="NAME,NAME", help="read these series only")
    check.add_argument("--max_len", type=int, help="most recent observations kept of a row")
    check.add_argument("--show_values", action="store_true", help=SHOW_VALUES)
    default = {each.name: each.default for each in fields(Extraction)}
    make = commands.add_parser(
        "from_mimic", help="make a file from MIMIC-IV tables", allow_abbrev=False
    )
    add = make.add_argument
    add("--mimic_dir", type=Path, required=True, help="folder of MIMIC-IV with hosp/ and icu/")
    add("--out", type=Path, required=True, help="CSV to write; a JSON description comes beside it")
    add("--cohort", choices=tuple(COHORTS), help="admissions to take")
    add("--item", help="itemid of the series, or its name in d_labitems")
    add("--window_hours", type=float, help="from the first value to the prediction time")
    add("--horizon_hours", type=float, help="hours looked ahead from then on")
    add("--min_observations", type=int, help="values known within the window, at least")
    add("--outcome", type=outcomes_of, help="escalation, or some of death,icu,unresolved")
    add(
        "--compute_gap",
        nargs="?",
        const="missing",
        choices=tuple(GAPS),
        help="anion gap from Na, Cl, HCO3: where none is reported, or always",
    )
    make.set_defaults(**{name: value for name, value in default.items() if value is not MISSING})
    return parser


def outcomes_of(text: str) -> tuple[str, ...]:
    """Read the parts of the outcome, as a flag names them."""
    chosen = names(text)
    if chosen == ["escalation"]:
        return tuple(OUTCOMES)
    if not chosen or not set(chosen) <= set(OUTCOMES):
        known = ", ".join(OUTCOMES)
        raise argparse.ArgumentTypeError(f"{text}: escalation, or some of {known} between commas")
    return tuple(name for name in OUTCOMES if name in chosen)


def names(text: str) -> list[str]:
    """Read names between commas, as a flag gives them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def forgiving(stream: TextIO) -> TextIO:
    """Let a stream write what its encoding lacks as Python does: a file's name may be no text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def run_check(
    read: Callable[[], DatasetT],
    doubts: Callable[[DatasetT], list[str]],
    *,
    show_values: bool = False,
) -> int:
    """Read a data set, log its summary and what looks wrong; 0, or 2 when it cannot be used."""
    stream = forgiving(sys.stdout)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
    try:
        dataset = read()
        for line in summarize(dataset):
            logger.info(line)
        for line in doubts(dataset):
            logger.warning("warning: %s", line)
        dataset.refuse_unmeasured(dataset.split(seed=0)["train"])
    except InputError as error:
        sys.stderr.write(f"error: {error.told(show_value=show_values)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    logger.info("fit to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
