"""The trajectory contract, and the DKA (MIMIC) file that fills it.

A data set holds N irregular series raggedly: flat ``times`` (hours) and ``values`` (raw units),
cut by ``offsets``. ``collate`` pads any choice of them to a batch; ``split`` keeps every patient
on one side.

Usage:
    python dataset_format.py check dka_training_data.csv     # validate a file, print its summary

The file has a column ``clinical_trajectory`` such as ``24 (0h) -> 20 (2h) -> 16 (4h)`` and a column
``label_escalation`` (0 or 1). Each column ``trajectory_NAME [unit]`` is a further series of the
same form with its own times; ``subject_id`` (or ``id``), ``clinical_context`` and ``split`` are
used when present. A JSON file of the same name beside it may say what the series and the outcome
are (see ``Description``); without one they are the anion gap in mEq/L and escalation of care.

Letters: N series, B a batch of them, L observations, F features.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
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
        rows, _ = self._rows(train)
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
        rows, _ = self._rows(indices)
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
        rows, present = self._rows(index)
        begin = np.repeat(self.times[self.offsets[index]], present.sum(axis=1))
        times = np.zeros(present.shape, dtype=np.float32)  # (B, L)
        times[present] = self.times[rows] - begin
        measured = self.values[rows]
        seen = ~np.isnan(measured)
        values = np.zeros((*present.shape, len(self.features)), dtype=np.float32)  # (B, L, F)
        values[present] = np.where(seen, measured, 0.0)
        observed = np.zeros(values.shape, dtype=bool)
        observed[present] = seen
        return Batch(
            times=torch.from_numpy(times),
            values=torch.from_numpy(values),
            observed=torch.from_numpy(observed),
            labels=torch.from_numpy(self.labels[index].astype(np.float32)),
            index=torch.from_numpy(index),
        )

    def _rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give the flat rows of the chosen series, joined, and their places (B, L) in a batch."""
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts  # not self.lengths: that is of all N
        steps = np.arange(lengths.max(initial=0))
        present = steps < lengths[:, None]
        return (starts[:, None] + steps)[present], present

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
    """

    series: str = "Anion gap"
    unit: str = "mEq/L"
    question: str = "Will care have to be escalated?"
    outcome: str = "Escalation"
    plausible: tuple[float, float] = (-5.0, 60.0)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)

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
            if not all(isinstance(text, str) and text for text in known.values()):
                raise ValueError
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file}: not a description of {path.name}: expected a JSON object with texts "
                "series, unit, question, outcome, two rising numbers plausible, and limits with "
                "two rising numbers for each further series"
            ) from error
        return cls(**known, plausible=plausible, limits=limits)


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
    return next(read_pieces(path, Findings(str(path)))).table


def read_pieces(path: Path, findings: Findings, rows: int | None = None) -> Iterator[Piece]:
    """Read a file at most so many rows at a time, or all at once; at least one piece, maybe empty.

    Raises:
        InputError: as ``read_table``; a row that does not fit its header only where findings are
            strict.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_pieces(path, rows)
        else:
            with path.open("rb") as file:
                yield from _csv_pieces(path, file, findings, rows)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: save it as CSV UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: copy it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error


def _csv_pieces(
    path: Path, file: BinaryIO, findings: Findings, most: int | None
) -> Iterator[Piece]:
    """Read rows and their numbers, the header being 1; blank rows are left out."""
    opened: Any = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
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
                    column = column.cat.codes
                arrays[f"{name}.{key}"] = column.to_numpy()
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
            columns = {}
            for key in value["columns"]:
                column = left.pop(f"{name}.{key}")
                words = rest.get(f"{name}.{key}")
                columns[key] = column if words is None else pd.Categorical.from_codes(column, words)
            table = pd.DataFrame(columns)
            setattr(dataset, name, table.set_index(value["index"]) if value["index"] else table)
        elif name == "description":
            limits = {series: _rising(pair) for series, pair in value["limits"].items()}
            plausible = _rising(value["plausible"])
            described = Description(**{**value, "plausible": plausible, "limits": limits})
            setattr(dataset, name, described)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the file can be trained on, 2 when not."""
    parser = Parser(
        prog="dataset_format.py", description="Check a DKA trajectory file.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file and print its summary")
    check.add_argument("file", type=Path, help="CSV (.csv, .csv.gz) or Parquet in the DKA format")
    check.add_argument("--series", type=names, metavar="NAME,NAME", help="read these series only")
    check.add_argument("--max_len", type=int, help="most recent observations kept of a row")
    check.add_argument("--show_values", action="store_true", help=SHOW_VALUES)
    arguments = parser.parse_args(argv)
    options = {"max_len": arguments.max_len, "series": arguments.series}
    return run_check(
        lambda: MIMICtrajectoryDataset(arguments.file, **options),
        suspicions,
        show_values=arguments.show_values,
    )


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
    logger.info("fit to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
