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
import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
HELD_OUT_SHARE = 0.1
"""Share of the patients in each of val and test; the rest trains."""

NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
PIECE = rf"\s*{NUMBER}\s*\(\s*{NUMBER}\s*h\s*\)\s*"
SERIES = re.compile(rf"{PIECE}(?:->{PIECE})*")
PUNCTUATION = str.maketrans("()h", "   ")
PARSE_ROWS = 100_000
"""Rows parsed at a time: bounds the memory that the intermediate text takes."""

LARGEST = (np.finfo(np.float32).max, 1e6)
"""Greatest absolute value that float32 holds, and a time of 114 years."""

USUAL_SPAN_HOURS = (0.5, 24 * 60)
"""A median series shorter or longer than this was probably not written in hours."""


class InputError(ValueError):
    """A mistake in what the user gave; its text is one line: what, where, what to do."""


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
    contexts: NDArray[np.str_]
    parts: NDArray[np.str_] | None

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
        for name in ("labels", "ids", "groups", "contexts", "parts"):
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
            digest.update("\0".join([] if column is None else column).encode())
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
        patients, owner = np.unique(self.groups, return_inverse=True)
        event = np.zeros(len(patients), dtype=bool)
        np.logical_or.at(event, owner, self.labels == 1)
        rng = np.random.default_rng(seed)
        part = np.zeros(len(patients), dtype=np.int64)
        for outcome, name in ((True, "with"), (False, "without")):
            order = rng.permutation(np.flatnonzero(event == outcome))
            if len(order) < len(PARTS):
                raise InputError(
                    f"only {len(order)} patients {name} an event: train, validation and test need "
                    "one each at least, so nothing can be learned and checked from this file"
                )
            held_out = max(1, round(HELD_OUT_SHARE * len(order)))
            part[order[:held_out]] = PARTS.index("val")
            part[order[held_out : 2 * held_out]] = PARTS.index("test")
        return {name: np.flatnonzero(part[owner] == k) for k, name in enumerate(PARTS)}

    def _given_split(self, parts: NDArray[np.str_]) -> dict[str, NDArray[np.int64]]:
        """Take the split that the data bring, if it is a fair one."""
        sides = pd.Series(parts).groupby(self.groups).nunique()
        if (sides > 1).any():
            raise InputError(
                f"column split puts {int((sides > 1).sum())} patients on two sides: "
                "give all rows of a subject_id the same part"
            )
        result = {name: np.flatnonzero(parts == name) for name in PARTS}
        for name, indices in result.items():
            if len(np.unique(self.labels[indices])) < 2:
                raise InputError(
                    f"column split leaves part {name} ({len(indices)} rows) without both classes: "
                    "each of train, val, test needs labels 0 and 1"
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
        main = self.features[0]
        return {
            "last value": table[[f"{main} last"]],
            "number of observations": table[[f"{main} count"]],
            "logistic regression": table,
        }


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
            content = json.loads(file.read_text(encoding="utf-8"))
            known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            low, high = known.get("plausible", cls.plausible)
            known["plausible"] = (float(low), float(high))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file}: not a description of {path.name}: expected a JSON object with texts "
                "series, unit, question, outcome and two numbers plausible"
            ) from error
        wrong = [
            key for key, value in known.items() if key != "plausible" and type(value) is not str
        ]
        if wrong:
            raise InputError(f"{file}: {wrong[0]} must be text")
        return cls(**known)


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
            table, where, first_row = source, "DataFrame", 0
        else:
            table, where, first_row = read_table(Path(source)), str(source), 2
            description = description or Description.beside(Path(source))
        self.description = description or Description()
        self.features = (self.description.series,)
        self.units = (self.description.unit,)
        self.question = self.description.question
        self.outcome = self.description.outcome
        require_columns(table, where, ["clinical_trajectory"])
        row_numbers = np.arange(first_row, first_row + len(table))
        kept = ~table.isna().all(axis=1).to_numpy()  # blank lines
        table, row_numbers = table[kept].reset_index(drop=True), row_numbers[kept]
        if table.empty:
            raise InputError(f"{where}: no rows below the header: nothing to read")
        self._where, self._row_numbers = where, row_numbers
        self._read_labels(table, require_labels)
        self._read_patients(table)
        self._read_series(table["clinical_trajectory"], max_len)

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
        return f"{self.outcome}: {verdict}. {self._findings(i)}"

    def score_report(self, i: int, text: str) -> ReportScore:
        """Compare a written report with the patient's own numbers, place by place."""
        head = re.match(rf"{re.escape(self.outcome)}: (yes|no)\b", text)
        verdict = None if head is None else int(head[1] == "yes")
        expected, written = self._findings(i), text[head.end() :] if head else text
        # The words between the numbers name their places; a number counts only in its own place.
        truth = dict(_numbers_by_place(expected))
        claims = _numbers_by_place(written.removeprefix(". "))
        own = sum(truth.get(place) == number for place, number in claims)
        form = [re.sub(NUMBER, "#", words) for words in (expected, written.removeprefix(". "))]
        tail = r"(?:rising|falling|level)\.$"
        parses = head is not None and re.sub(tail, "", form[0]) == re.sub(
            tail, "", form[1].rstrip()
        )
        return ReportScore(verdict, parses, len(claims), own)

    def _findings(self, i: int) -> str:
        """State first, last, lowest, highest value with their hours, change, rate, direction."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        times, values, unit = self.times[rows], self.values[rows, 0], self.units[0]
        places = (
            ("first", 0),
            ("last", len(values) - 1),
            ("lowest", int(values.argmin())),
            ("highest", int(values.argmax())),
        )
        stated = ", ".join(
            f"{n} {plain(values[k])} {unit} at {plain(times[k])} h" for n, k in places
        )
        change, span = values[-1] - values[0], times[-1] - times[0]
        rate = change / span if span > 0 else 0.0
        direction = "rising" if change > 0 else "falling" if change < 0 else "level"
        return (
            f"{self.features[0]}: {stated}. Net change {plain(round(change, 6))} {unit} over "
            f"{plain(round(span, 6))} h, {plain(round(rate, 2))} {unit} an hour: {direction}."
        )

    def _read_labels(self, table: pd.DataFrame, require: bool) -> None:
        name = "label_escalation"
        if require:
            require_columns(table, self._where, [name])
        text = column_text(table, name) if name in table else pd.Series([""] * len(table))
        self.labels = pd.to_numeric(text.where(text != ""), errors="coerce").to_numpy(np.float64)
        empty = (text == "").to_numpy()
        self._refuse(~np.isin(self.labels, [0, 1]) & ~empty, name, "must be 0 or 1")
        if require:
            self._refuse(empty, name, "is empty: each row to learn from needs a label 0 or 1")

    def _read_patients(self, table: pd.DataFrame) -> None:
        by_row = pd.Series(self._row_numbers.astype(str))
        if "subject_id" in table or "id" in table:
            name = "subject_id" if "subject_id" in table else "id"
            patients = column_text(table, name)
            self._refuse(
                (patients == "").to_numpy(), name, "is empty: name the patient of each row"
            )
        else:
            patients = by_row
            logger.info("%s: no column subject_id: each row is a patient of its own", self._where)
        self.groups = patients.to_numpy(dtype=np.str_)
        ids = column_text(table, "id") if "id" in table else patients
        self.ids = ids.to_numpy(dtype=np.str_)
        context = column_text(table, "clinical_context") if "clinical_context" in table else None
        self.contexts = (by_row.map(lambda _: "") if context is None else context).to_numpy(np.str_)
        self.parts = None
        if "split" in table:
            parts = column_text(table, "split").str.lower().replace("validation", "val")
            self._refuse(~parts.isin(PARTS).to_numpy(), "split", "must be train, val or test")
            self.parts = parts.to_numpy(dtype=np.str_)

    def _read_series(self, column: pd.Series, max_len: int) -> None:
        name = "clinical_trajectory"
        text = column_text(column.to_frame(), name)
        self._refuse((text == "").to_numpy(), name, "is empty")
        readable = text.str.fullmatch(SERIES).to_numpy(dtype=bool)
        if not readable.all():
            pieces = text[int(readable.argmin())].split("->")
            k = next((k for k, p in enumerate(pieces, 1) if not re.fullmatch(PIECE, p)), 1)
            self._refuse(
                ~readable, name, f"piece {k} is not of the form VALUE (HOURSh), as 24 (0h)"
            )
        pairs = np.concatenate(
            [_parse(text[k : k + PARSE_ROWS]) for k in range(0, len(text), PARSE_ROWS)]
        )
        lengths = text.str.count("->").to_numpy(np.int64) + 1
        owner = np.repeat(np.arange(len(text)), lengths)
        huge = (np.abs(pairs) > LARGEST).any(axis=1)
        self._refuse(
            np.bincount(owner, huge, len(text)) > 0, name, "holds a number that is too large"
        )
        values, times = pairs.T
        unsorted = np.unique(owner[1:][(np.diff(times) < 0) & (np.diff(owner) == 0)])
        if len(unsorted):
            order = np.lexsort((times, owner))  # stable: equal times keep their order
            values, times = values[order], times[order]
            logger.info("%s: %d rows were not in time order; sorted", self._where, len(unsorted))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        recent = np.arange(len(owner)) >= offsets[owner + 1] - max_len
        if not recent.all():
            message = "%s: %d rows are longer than %d observations: the most recent are kept"
            logger.info(message, self._where, int((lengths > max_len).sum()), max_len)
        self.times, self.values = times[recent], values[recent, None]
        self.offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_len))])

    def _refuse(self, bad: NDArray[np.bool_], column: str, problem: str) -> None:
        """Raise with the place of the first bad row; never shows what a patient's cell holds."""
        if bad.any():
            row = self._row_numbers[int(bad.argmax())]
            others = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
            raise InputError(f"{self._where}, row {row}, column {column}: {problem}{others}")


def plain(number: float) -> str:
    """Write a number in the shortest form that reads back exactly, without exponent: 24, 4.08."""
    return np.format_float_positional(number + 0.0, trim="-")


def _numbers_by_place(text: str) -> list[tuple[str, str]]:
    """Pair each number of a report with its place: clause, unit behind it."""
    found = []
    for sentence in re.split(r"(?<=[^0-9])\. |: ", text):
        for clause in sentence.split(", "):
            for k, match in enumerate(re.finditer(NUMBER, clause)):
                place = re.sub(NUMBER, "#", clause)
                found.append((f"{place}|{k}", match[0]))
    return found


def _parse(text: pd.Series) -> NDArray[np.float64]:
    """Read rows that match ``SERIES`` in one pass: (observations, 2) of value and hours."""
    joined = " ".join(text).replace("->", " ").translate(PUNCTUATION)
    return np.fromstring(joined, dtype=np.float64, sep=" ").reshape(-1, 2)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file as text, each row in its place.

    Raises:
        InputError: the file is missing, empty, binary, or its rows do not fit its header.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path,
                dtype=str,
                encoding="utf-8-sig",
                skip_blank_lines=False,
                index_col=False,
                skipinitialspace=True,
            )
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: give the CSV by --data_path") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: the file is empty") from error
    except (UnicodeDecodeError, UnicodeError) as error:
        raise InputError(f"{path}: not a text file in UTF-8: save it as CSV UTF-8") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        detail = str(error).replace("Error tokenizing data. C error: ", "").strip()
        raise InputError(
            f"{path}: rows and header do not fit ({' '.join(detail.split())}): "
            'put texts that hold commas between quotes "'
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    table.columns = table.columns.str.strip()
    return table


def require_columns(table: pd.DataFrame, where: str, names: list[str]) -> None:
    """Refuse a table that lacks a column, with what it has instead.

    Raises:
        InputError: a name is missing.
    """
    missing = [name for name in names if name not in table]
    if not missing:
        return
    header = str(table.columns[0]) if len(table.columns) else ""
    hint = "; it looks separated by ';' where ',' is expected" if ";" in header else ""
    raise InputError(
        f"{where}, row 1, column {missing[0]}: no such column among {len(table.columns)}{hint}: "
        "the header must name clinical_trajectory,label_escalation"
    )


def column_text(table: pd.DataFrame, name: str) -> pd.Series:
    """Give a column as stripped text, empty where nothing stands.

    Raises:
        InputError: the column stands there twice.
    """
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
        lines.append(f"{name} in {unit}: {_quartiles(seen)}")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module as a command; 0 when the file can be trained on, 2 when not."""
    parser = argparse.ArgumentParser(
        prog="dataset_format.py", description="Check a DKA trajectory file.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file and print its summary")
    check.add_argument("file", type=Path, help="CSV in the DKA format")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        dataset = MIMICtrajectoryDataset(arguments.file)
        for line in summarize(dataset):
            logger.info(line)
        for line in suspicions(dataset):
            logger.warning("warning: %s", line)
        dataset.split(seed=0)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logger.info("fit to train on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
