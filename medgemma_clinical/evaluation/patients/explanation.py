"""What explains the risk of one row, as arrays and words: computed elsewhere, shown on a page.

Letters: L observations, F features, n points of the curve of risks: L, and one more where the
question is asked later than the last observation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.texts import Reference, plain
from medgemma_clinical.evaluation.bootstrap import NO_VALUE
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.patients.report_marks import Mark

MOST_CHANGES = 12
"""Lines of the table of changes; a longer series shows its largest ones."""

LONGEST_IN_HOURS, LONGEST_IN_DAYS = 96.0, 3 * 8766.0
"""Spans of more hours are shown in days, and of yet more in years."""


def signed(change: float, digits: int) -> str:
    """Write a change with its sign; what rounds to zero is +0."""
    return f"{round(change, digits) + 0.0:+.{digits}f}"


@dataclass(frozen=True)
class TimeUnit:
    """The unit of a time axis: its name in the singular, and its length in hours."""

    name: str
    hours: float

    def text(self, hours: float) -> str:
        """Write a time in this unit, to two decimals."""
        return plain(round(hours / self.hours, 2))


@dataclass(frozen=True)
class Explanation:
    """The risk of one row over time, and what it rests on.

    Attributes:
        id: of the row, as in the predictions.
        probability: of the event, as in the predictions.
        features: F names.
        units: F units, empty where a feature has none.
        times: (L,) float64 hours on the row's clock, not decreasing.
        values: (L, F) float64 raw units, NaN where not measured.
        references: F reference ranges, None where unknown.
        spreads: (F,) float64 standard deviation of the last values of training rows, raw units,
            NaN where unknown.
        observations: L texts, what was measured at each time.
        hours: (n,) float64 hours of the points of the curve.
        risks: (n,) float64, the risk with what was known at each of them; the last one is
            ``probability``.
        facts: name and value of each fact that was read, in words.
        without: the probability with one measured series left out, by its name; None where such a
            row cannot be scored.
        without_soft_prompt: the probability without soft tokens, stage 1's log-odds kept; None for
            a model without soft prompt, or whose language model has weight 0.
        report: the report of stage 3 in pieces, its numbers marked; None for other stages.
        problem: of the report, as in the predictions; empty for none.
        in_training: whether the row trained the model, in a word or two.
    """

    id: str
    probability: float
    features: tuple[str, ...]
    units: tuple[str, ...]
    times: NDArray[np.float64]
    values: NDArray[np.float64]
    references: tuple[Reference | None, ...]
    spreads: NDArray[np.float64]
    observations: tuple[str, ...]
    hours: NDArray[np.float64]
    risks: NDArray[np.float64]
    facts: dict[str, str]
    without: dict[str, float | None]
    without_soft_prompt: float | None = None
    report: tuple[Mark, ...] | None = None
    problem: str = ""
    in_training: str = "not known"

    @property
    def time_unit(self) -> TimeUnit:
        """Hours, days or years, by the span of the row."""
        span = float(self.hours[-1] - self.hours[0])
        if span <= LONGEST_IN_HOURS:
            return TimeUnit("hour", 1.0)
        return TimeUnit("day", 24.0) if span <= LONGEST_IN_DAYS else TimeUnit("year", 8766.0)

    def changes(self) -> pd.DataFrame:
        """Return what each observation changed, at most ``MOST_CHANGES`` lines in order of time."""
        unit = self.time_unit
        moved = np.diff(100 * self.risks, prepend=np.nan)
        words = (*self.observations, "no observation until the question is asked")
        largest = np.argsort(-np.nan_to_num(np.abs(moved), nan=np.inf), kind="stable")
        shown = np.sort(largest[:MOST_CHANGES])
        lines = [
            (
                unit.text(self.hours[k]),
                words[k],
                f"{100 * self.risks[k]:.1f}",
                NO_VALUE if k == 0 else signed(moved[k], 1),
            )
            for k in shown.tolist()
        ]
        names = [unit.name.capitalize(), "Observed", "Risk after (%)", "Change (points)"]
        return pd.DataFrame(lines, columns=names)

    def effects(self) -> pd.DataFrame:
        """Return the change of the log-odds when each series is left out, the largest first."""
        own = log_odds(np.array([self.probability]))[0]
        known = {name: risk for name, risk in self.without.items() if risk is not None}
        change = {name: log_odds(np.array([risk]))[0] - own for name, risk in known.items()}
        ordered = sorted(known, key=lambda name: -abs(change[name]))
        lines = [(name, signed(change[name], 2), f"{100 * known[name]:.1f}") for name in ordered]
        lines += [(name, NO_VALUE, NO_VALUE) for name in self.without if name not in known]
        names = ["Series", "Change when left out (log-odds)", "Risk without it (%)"]
        return pd.DataFrame(lines, columns=names)
