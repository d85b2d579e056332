"""Rows to be scored, and which of them can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.facts import NUMBER_ENDING
from medgemma_clinical.data.tables import Findings

if TYPE_CHECKING:
    from medgemma_clinical.data.trajectories import TrajectoryDataset


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


def count_unknown_facts(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows that lack a number which a model reads; a word says nothing where absent.

    Args:
        dataset: with the facts of ``with_inputs``.
        findings: get the counts.
    """
    assert dataset.facts is not None
    for name, column in zip(dataset.fact_names, dataset.facts.T, strict=True):
        if name in dataset.static_names or name.endswith(NUMBER_ENDING):
            lacking = f"lack the fact {name}: taken as unknown"
            findings.counts[lacking] += int(np.isnan(column).sum())
