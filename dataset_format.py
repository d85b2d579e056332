"""The trajectory contract, and the DKA (MIMIC) file that fills it.

A data set holds N irregular series raggedly: flat ``times`` (hours) and ``values`` (raw units),
cut by ``offsets``. ``collate`` pads any choice of them to a batch; ``split`` keeps every patient
on one side.

Usage:
    python dataset_format.py check dka_training_data.csv     # validate a file, print its summary

The file has a column ``clinical_trajectory`` such as ``24 (0h) -> 20 (2h) -> 16 (4h)`` and a column
``label_escalation`` (0 or 1); ``subject_id`` (or ``id``), ``clinical_context`` and ``split`` are
used when present. A JSON file of the same name beside it may say what the series and the outcome
are (see ``Description``); without one they are the anion gap in mEq/L and escalation of care.

Letters: N series, B a batch of them, L observations, F features.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypedDict, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
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
HELD_OUT_SHARE = 0.1
"""Share of the patients in each of val and test; the rest trains."""

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
PIECE = rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*h\s*\)\s*"
SERIES = re.compile(rf"{PIECE}(?:->{PIECE})*")
PUNCTUATION = {ord(c): " " for c in map(chr, range(0x3001)) if c in "()h" or c.isspace()}
"""What stands around the numbers of a readable series, spaces of every alphabet included."""
PARSE_ROWS = 100_000
"""Rows parsed at a time: bounds the memory that the intermediate text takes."""

LARGEST = (np.finfo(np.float32).max, 1e6)
"""Greatest absolute value that float32 holds, and a time of 114 years."""

USUAL_SPAN_HOURS = (0.5, 24 * 60)
"""A median series shorter or longer than this was probably not written in hours."""


class InputError(ValueError):
    """A mistake in what the user gave; its text is one line: what, where, what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


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
    """

    features: tuple[str, ...]
    units: tuple[str, ...]
    question: str
    outcome: str
    time_scale: float

    times: NDArray[np.float64]
    values: NDArray[np.float64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.float64]
    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    contexts: NDArray[np.object_]
    parts: NDArray[np.str_] | None
    source: str

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
        gaps = np.diff(self.times, prepend=self.times[:1])
        gaps[self.offsets[:-1]] = 0.0  # the first observation of a series follows nothing
        return float(gaps.max())

    def prompt(self, i: int) -> str:
        """Give the text that an LLM reads about series ``i``: context, series, question."""
        raise NotImplementedError

    def report(self, i: int) -> str:
        """Give the text that an LLM learns to write; begins with ``outcome: yes`` or ``no``."""
        raise NotImplementedError

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with what series ``i`` really holds."""
        raise NotImplementedError

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
        for column in (self.ids, self.groups, self.contexts, self.parts):
            cells = [] if column is None else column.tolist()
            digest.update(json.dumps(cells).encode())
        return digest.hexdigest()

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the chosen series to one batch, in the given order.

        Args:
            indices: B positions in the data set.

        Returns:
            A ``Batch``; its L is the longest chosen series.
        """
        index = np.asarray(indices, dtype=np.int64)
        rows, present = self._rows(index)
        times = np.zeros(present.shape)  # (B, L)
        times[present] = self.times[rows]
        times = np.where(present, times - times[:, :1], 0.0)
        values = np.full((*present.shape, len(self.features)), np.nan)  # (B, L, F)
        values[present] = self.values[rows]
        observed = ~np.isnan(values)
        return Batch(
            times=torch.from_numpy(times.astype(np.float32)),
            values=torch.from_numpy(np.where(observed, values, 0.0).astype(np.float32)),
            observed=torch.from_numpy(observed),
            labels=torch.from_numpy(self.labels[index].astype(np.float32)),
            index=torch.from_numpy(index),
        )

    def _rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give the flat rows of the chosen series, joined, and their places (B, L) in a batch."""
        starts, lengths = self.offsets[index], self.lengths[index]
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
            table["slope"] = (product / square.where(square > 0)).fillna(0.0)
            table["span"] = by_owner["t"].max() - by_owner["t"].min()
            for statistic, column in table.items():
                columns[f"{name} {statistic}"] = column.reindex(range(len(self)))
        return pd.DataFrame(columns, index=range(len(self)))

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


def patient_events(
    groups: NDArray[np.str_], labels: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give the patient of each row, (n,), and whether any row of a patient has an event."""
    patients, owner = np.unique(groups, return_inverse=True)
    event = np.zeros(len(patients), dtype=bool)
    np.logical_or.at(event, owner, labels == 1)
    return owner, event


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
    """

    series: str = "Anion gap"
    unit: str = "mEq/L"
    question: str = "Will care have to be escalated?"
    outcome: str = "Escalation"
    plausible: tuple[float, float] = (-5.0, 60.0)

    @classmethod
    def beside(cls, path: Path) -> Description:
        """Read the description of the data file ``path``, or give the default.

        Raises:
            InputError: the JSON file is there and cannot be read.
        """
        file = path.with_suffix(".json")
        if not file.is_file():
            return cls()
        try:
            content = dict(json.loads(file.read_text(encoding="utf-8")).items())
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            low, high = map(float, known.pop("plausible", cls.plausible))
            if not low < high or not all(isinstance(text, str) and text for text in known.values()):
                raise ValueError
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(
                f"{file}: not a description of {path.name}: expected a JSON object with texts "
                "series, unit, question, outcome and two rising numbers plausible"
            ) from error
        return cls(**known, plausible=(low, high))


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
    """Trajectories of patients in diabetic ketoacidosis, in the two-column DKA format.

    Args:
        source: path of a CSV file, or a DataFrame with the same columns.
        max_len: only the most recent so many observations of a series are kept.
        description: what series and label mean; by default read beside the file.
        require_labels: refuse rows without label; False where new patients are scored.

    Raises:
        InputError: anything that cannot be read, with file, row and column. Rows count as a
            spreadsheet shows them: the header is row 1 (for a DataFrame: from 0, no header).
    """

    time_scale = 72.0  # hours; resolution of ketoacidosis takes one to three days

    def __init__(
        self,
        source: str | Path | pd.DataFrame,
        max_len: int = 20,
        *,
        description: Description | None = None,
        require_labels: bool = True,
    ) -> None:
        """Read, check and sort everything at once."""
        if max_len < 1:
            raise ValueError(f"max_len must be positive, got {max_len}")
        if isinstance(source, pd.DataFrame):
            self.source, table = "DataFrame", source.reset_index(drop=True)
        else:
            self.source, table = str(source), read_table(Path(source))
            description = description or Description.beside(Path(source))
        self.description = description or Description()
        self.features = (self.description.series,)
        self.units = (self.description.unit,)
        self.question = self.description.question
        self.outcome = self.description.outcome
        check_header(table, self.source, ["label_escalation"] if require_labels else [])
        if table.empty:
            raise InputError(f"{self.source}: no rows below the header: nothing to read")
        self._read_labels(table, require_labels)
        self._read_patients(table)
        self._read_series(table, max_len)

    def prompt(self, i: int) -> str:
        """Give context, series with its hours, and question of series ``i``."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        series = " -> ".join(
            f"{plain(v)} ({plain(t)}h)"
            for t, v in zip(self.times[rows], self.values[rows, 0], strict=True)
        )
        context = f"{self.contexts[i].rstrip('. ')}. " if self.contexts[i] else ""
        return f"{context}{self.features[0]} ({self.units[0]}): {series}. {self.question}\n"

    def report(self, i: int) -> str:
        """Give the verdict, then what the series of patient ``i`` shows.

        Raises:
            ValueError: the label of series ``i`` is unknown.
        """
        if np.isnan(self.labels[i]):
            raise ValueError(f"series {i} has no label, so there is no report to learn")
        verdict = "yes" if self.labels[i] == 1 else "no"
        *places, change = ("".join(clause) for clause in self._clauses(i))
        first, last = self.values[[self.offsets[i], self.offsets[i + 1] - 1], 0]
        direction = "rising" if last > first else "falling" if last < first else "level"
        findings = f"{self.features[0]}: {', '.join(places)}. {change}: {direction}."
        return f"{self.outcome}: {verdict}. {findings}"

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with the patient's own numbers, each in its own place."""

        def form(patterns: list[str]) -> str:
            places, change = ", ".join(patterns[:-1]), patterns[-1]
            return (
                rf"{re.escape(self.features[0])}: {places}\. {change}: (?:rising|falling|level)\."
            )

        names = (*self.features, *self.units)
        return score_clauses(text, self.outcome, self._clauses(i), form, names)

    def _clauses(self, i: int) -> list[list[str]]:
        """Give the clauses of a report, each as words and numbers in turn, words first."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        times, values, unit = self.times[rows], self.values[rows, 0], self.units[0]
        low, high = int(values.argmin()), int(values.argmax())
        places = {"first": 0, "last": -1, "lowest": low, "highest": high}
        clauses = [
            [f"{name} ", plain(values[k]), f" {unit} at ", plain(times[k]), " h"]
            for name, k in places.items()
        ]
        change, span = values[-1] - values[0], times[-1] - times[0]
        net = [
            "Net change ",
            plain(round(change, 6)),
            f" {unit} over ",
            plain(round(span, 6)),
            " h",
        ]
        if span > 0:  # within no time there is no rate
            net[-1] += ", "
            net += [plain(float(f"{change / span:.3g}")), f" {unit} an hour"]
        return [*clauses, net]

    def _read_labels(self, table: pd.DataFrame, require: bool) -> None:
        name = "label_escalation"
        text = column_text(table, name) if name in table else pd.Series("", index=table.index)
        self.labels = pd.to_numeric(text.where(text != ""), errors="coerce").to_numpy(np.float64)
        empty = (text == "").to_numpy()
        self._refuse(~np.isin(self.labels, [0, 1]) & ~empty, table, name, "must be 0 or 1")
        if require:
            self._refuse(
                empty, table, name, "is empty: each row to learn from needs a label 0 or 1"
            )

    def _read_patients(self, table: pd.DataFrame) -> None:
        by_row = pd.Series(table.index.astype(str), index=table.index)
        if "subject_id" in table or "id" in table:
            name = "subject_id" if "subject_id" in table else "id"
            patients = column_text(table, name)
            self._refuse(patients == "", table, name, "is empty: name the patient of each row")
        else:
            patients = by_row
            logger.info("%s: no column subject_id: each row is a patient of its own", self.source)
        self.groups = patients.to_numpy(dtype=np.str_)
        ids = column_text(table, "id") if "id" in table else patients
        self.ids = ids.to_numpy(dtype=np.str_)
        has_context = "clinical_context" in table
        contexts = (
            column_text(table, "clinical_context") if has_context else by_row.map(lambda _: "")
        )
        self.contexts = contexts.to_numpy(dtype=object)
        self.parts = None
        if "split" in table:
            parts = column_text(table, "split").str.lower().replace("validation", "val")
            self._refuse(~parts.isin(PARTS), table, "split", "must be train, val or test")
            moved = parts != parts.groupby(patients).transform("first")
            problem = "puts a patient (subject_id) on another side than an earlier row does"
            self._refuse(moved, table, "split", problem)
            self.parts = parts.to_numpy(dtype=np.str_)

    def _read_series(self, table: pd.DataFrame, max_len: int) -> None:
        name = "clinical_trajectory"
        text = column_text(table, name)
        self._refuse(text == "", table, name, "is empty")
        readable = text.str.fullmatch(SERIES).to_numpy(dtype=bool)
        if not readable.all():
            pieces = text.iloc[int(readable.argmin())].split("->")
            k = next(k for k, piece in enumerate(pieces, 1) if not re.fullmatch(PIECE, piece))
            problem = f"piece {k} is not of the form VALUE (HOURSh), as 24 (0h)"
            self._refuse(~readable, table, name, problem)
        pairs = np.concatenate(
            [_parse(text.iloc[k : k + PARSE_ROWS]) for k in range(0, len(text), PARSE_ROWS)]
        )
        lengths = text.str.count("->").to_numpy(np.int64) + 1
        owner = np.repeat(np.arange(len(text)), lengths)
        huge = (np.abs(pairs) > LARGEST).any(axis=1)
        bad = np.bincount(owner, huge, len(text)) > 0
        self._refuse(bad, table, name, "holds a number that is too large")
        values, times = pairs.T
        unsorted = np.unique(owner[1:][(np.diff(times) < 0) & (np.diff(owner) == 0)])
        if len(unsorted):
            order = np.lexsort((times, owner))  # stable: equal times keep their order
            values, times = values[order], times[order]
            logger.info("%s: %d rows were not in time order; sorted", self.source, len(unsorted))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        recent = np.arange(len(owner)) >= offsets[owner + 1] - max_len
        if not recent.all():
            message = "%s: %d rows are longer than %d observations: the most recent are kept"
            logger.info(message, self.source, int((lengths > max_len).sum()), max_len)
        self.times, self.values = times[recent], values[recent, None]
        self.offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_len))])

    def _refuse(self, bad: Any, table: pd.DataFrame, column: str, problem: str) -> None:
        """Raise with the place of the first bad row; never shows what a patient's cell holds."""
        rows = table.index[np.asarray(bad)]
        if len(rows):
            others = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
            raise InputError(f"{self.source}, row {rows[0]}, column {column}: {problem}{others}")


def score_clauses(
    text: str,
    outcome: str,
    clauses: list[list[str]],
    form: Callable[[list[str]], str],
    names: Sequence[str],
) -> ReportScore:
    """Compare a written report with a patient's own numbers, each in its own place.

    Args:
        text: the report.
        outcome: what it begins with.
        clauses: true clauses, each as words and numbers in turn, words first.
        form: makes of the clauses' patterns the pattern of all that follows the verdict.
        names: of series and units; they may hold digits that are no claims: PaCO2.
    """
    patterns = [
        "".join(f"({NUMBER})" if k % 2 else re.escape(part) for k, part in enumerate(clause))
        for clause in clauses
    ]
    true = 0
    for clause, pattern in zip(clauses, patterns, strict=True):
        written = re.search(pattern, text)
        true += sum(map(str.__eq__, clause[1::2], written.groups())) if written else 0
    head = re.match(rf"{re.escape(outcome)}: (yes|no)\b", text)
    whole = rf"{re.escape(outcome)}: (?:yes|no)\. {form(patterns)}\s*"
    stated = re.findall(NUMBER, re.sub("|".join(map(re.escape, (outcome, *names))), "", text))
    return ReportScore(
        verdict=None if head is None else int(head[1] == "yes"),
        parses=re.fullmatch(whole, text) is not None,
        stated=len(stated),
        true=true,
    )


def plain(number: float) -> str:
    """Write a number in the shortest form that reads back exactly, without exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def _parse(text: pd.Series) -> NDArray[np.float64]:
    """Read rows that match ``SERIES`` in one pass: (observations, 2) of value and hours."""
    joined = " ".join(text).replace("->", " ").translate(PUNCTUATION)
    return np.fromstring(joined, dtype=np.float64, sep=" ").reshape(-1, 2)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file as text; blank rows are left out, the index holds the others' numbers.

    Raises:
        InputError: the file is missing, empty, binary, or its rows do not fit its header.
    """
    numbers, rows, number = [], [], 0
    csv.field_size_limit(2**31 - 1)  # a series of 20,000 observations is one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, cells in enumerate(csv.reader(file, skipinitialspace=True), 1):
                if any(map(str.strip, cells)):
                    numbers.append(number)
                    rows.append(cells)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8: save it as CSV UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: {error}: check its quotes") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not rows:
        raise InputError(f"{path}: the file is empty")
    header = [name.strip() for name in rows[0]]
    for number, cells in zip(numbers, rows, strict=True):
        if any(cells[len(header) :]):
            raise InputError(
                f"{path}, row {number}: {len(cells)} fields where the header has {len(header)}: "
                'put texts that hold commas between quotes "'
            )
        cells[len(header) :] = []
        cells += [""] * (len(header) - len(cells))
    return pd.DataFrame(rows[1:], columns=header, index=numbers[1:], dtype=object)


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
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        seen = dataset.values[:, f][~np.isnan(dataset.values[:, f])]
        lines.append(f"{name} in {unit}: {_quartiles(seen) if len(seen) else 'never measured'}")
    return lines


def suspicions(dataset: MIMICtrajectoryDataset) -> list[str]:
    """Name units that look wrong: values no patient shows, series too short or too long."""
    low, high = dataset.description.plausible
    outside = (dataset.values < low) | (dataset.values > high)
    found = []
    if outside.any():
        found.append(
            f"{int(outside.sum()):,} of {outside.size:,} values lie outside {plain(low)} to "
            f"{plain(high)} {dataset.units[0]}: is the unit right?"
        )
    several = dataset.lengths > 1
    starts, ends = dataset.offsets[:-1][several], dataset.offsets[1:][several] - 1
    span = float(np.median(dataset.times[ends] - dataset.times[starts])) if several.any() else 1.0
    if not USUAL_SPAN_HOURS[0] <= span <= USUAL_SPAN_HOURS[1]:
        found.append(f"the median series spans {span:.3g} h: are its times written in hours?")
    return found


def _quartiles(numbers: NDArray[Any]) -> str:
    low, q1, median, q3, high = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1])
    return f"median {median:.4g}, quartiles {q1:.4g} to {q3:.4g}, range {low:.4g} to {high:.4g}"


DatasetT = TypeVar("DatasetT", bound=TrajectoryDataset)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the file can be trained on, 2 when not."""
    parser = Parser(
        prog="dataset_format.py", description="Check a DKA trajectory file.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file and print its summary")
    check.add_argument("file", type=Path, help="CSV in the DKA format")
    arguments = parser.parse_args(argv)
    return run_check(lambda: MIMICtrajectoryDataset(arguments.file), suspicions)


def run_check(read: Callable[[], DatasetT], doubts: Callable[[DatasetT], list[str]]) -> int:
    """Read a data set, log its summary and what looks wrong; 0, or 2 when it cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        dataset = read()
        for line in summarize(dataset):
            logger.info(line)
        for line in doubts(dataset):
            logger.warning("warning: %s", line)
        dataset.split(seed=0)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logger.info("fit to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
