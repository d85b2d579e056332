"""Rows to be scored, and which of them can be."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.files import InputError

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset


logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What shows while a source is read, whole or in chunks, and is logged once at its end.

    Attributes:
        source: as errors name it.
        strict: whether an unreadable row refuses the source.
        problems: if not strict, the first problem of each unreadable row by the row's number;
            names the column, never a cell's content.
        counts: rows by what there is to say of them.
        notes: what there is to say of the source; an ordered set.
        warnings: what seems to be a mistake in it; an ordered set.
        ids: rows by their name.
    """

    source: str
    strict: bool = True
    problems: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    ids: Counter[str] = field(default_factory=Counter)

    def reject(
        self, bad: pd.Series, column: str, problem: str, cells: pd.Series | None = None
    ) -> None:
        """Refuse the source for its bad rows (by number) or, if not strict, note them.

        Args:
            bad: whether each row is bad.
            column: of the bad cells; empty where a row is bad as a whole.
            problem: of each of them.
            cells: content of the column, shown on request alone.
        """
        rows = bad.index[bad.to_numpy(bool)].tolist()
        if rows and self.strict:
            count = f" ({len(rows):,} cells, the last in row {rows[-1]})" if len(rows) > 1 else ""
            where = f"{self.source}, row {rows[0]}" + (f", column {column}" if column else "")
            value = None if cells is None else cells[rows[0]]
            raise InputError(f"{where}: {problem}{count}", value)
        for row in rows:
            self.problems.setdefault(row, f"column {column}: {problem}" if column else problem)

    def log(self) -> None:
        """Log notes, warnings and counts; problems are the caller's to report."""
        for note in self.notes:
            logger.info("%s: %s", self.source, note)
        for warning in self.warnings:
            logger.warning("warning: %s: %s", self.source, warning)
        for text, rows in self.counts.items():
            if rows:
                logger.info("%s: %s rows %s", self.source, f"{rows:,}", text)


@dataclass(frozen=True)
class ScoringRows:
    """Some rows to be scored, in the input's order.

    Attributes:
        ids: (n,) the name of each row.
        numbers: (n,) its number in the file.
        dataset: the m of them that can be read.
        positions: (m,) positions of those among the n.
        read: bytes or rows of the input up to here.
    """

    ids: NDArray[Any]
    numbers: NDArray[np.int64]
    dataset: TrajectoryDataset
    positions: NDArray[np.int64]
    read: int

    def without(self, bad: NDArray[np.bool_], problem: str, findings: Findings) -> ScoringRows:
        """Return the rows without those of the data set that ``bad`` (m,) marks; note why.

        Raises:
            InputError: there are such rows, and the findings are strict.
        """
        if not bad.any():
            return self
        findings.reject(pd.Series(bad, self.numbers[self.positions]), "", problem)
        good = np.flatnonzero(~bad)
        return replace(self, dataset=self.dataset.subset(good), positions=self.positions[good])


def count_unknown_static(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows that lack a static feature which a model reads."""
    for name, column in zip(dataset.static_inputs, dataset.static_values().T, strict=True):
        lacking = f"lack the static feature {name}: taken as unknown"
        findings.counts[lacking] += int(np.isnan(column).sum())
