"""What reading a source finds, and the flow of its rows, as they are logged."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd

from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What shows while a source is read, whole or in chunks, and is logged once at its end."""

    source: str
    strict: bool = True  # an unreadable row refuses the source
    advice: str = ""  # what to do then
    # If not strict: the first problem of each unreadable row, by its number; no cell's content.
    problems: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # rows by what there is to say of them
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set
    warnings: dict[str, None] = field(default_factory=dict)
    ids: Counter[str] = field(default_factory=Counter)
    misfits: list[str] = field(default_factory=list)  # to the training patients, logged at once

    def reject(
        self, bad: pd.Series, column: str, problem: str, cells: pd.Series | None = None
    ) -> None:
        """Refuse the source for its ``bad`` rows (by number) or, if not strict, note them."""
        rows = bad.index[bad.to_numpy(bool)].tolist()
        if rows and self.strict:
            count = f" ({len(rows):,} cells, the last in row {rows[-1]})" if len(rows) > 1 else ""
            where = f"{self.source}, row {rows[0]}" + (f", column {column}" if column else "")
            value = None if cells is None else cells[rows[0]]  # shown on request alone
            raise InputError(f"{where}: {problem}{count}{self.advice}", value)
        for row in rows:
            self.problems.setdefault(row, f"column {column}: {problem}" if column else problem)

    def log(self) -> None:
        """Log notes, warnings and counts; problems are the caller's to report."""
        for note in self.notes:
            logger.info("%s: %s", self.source, note)
        log_warnings(self.warnings, self.source)
        for text, rows in self.counts.items():
            if rows:
                logger.info("%s: %s rows %s", self.source, f"{rows:,}", text)


def log_warnings(warnings: Iterable[str], source: str = "") -> None:
    """Log lines as warnings, with their source if there is one."""
    for line in warnings:
        logger.warning("warning: %s%s", f"{source}: " if source else "", line)


def flow_lines(flow: pd.DataFrame) -> list[str]:
    """Return a flow (columns rule, removed, left), without the rules that remove nothing."""
    return [
        f"{removed:>15,} out, {left:>9,} left: {rule}"
        for rule, removed, left in flow[["rule", "removed", "left"]].itertuples(index=False)
        if removed
    ]
