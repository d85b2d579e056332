"""The scale of four verdicts: made of an interval and a count, alike on page, table and console."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from medgemma_clinical.evaluation.bootstrap import Estimate

FEWEST_PATIENTS = 10
"""Patients with and patients without the event that a judgement needs."""

CHANCE = 0.5
"""AUROC of a model that knows nothing."""

USEFUL_AUROC = 0.6
"""The least AUROC that may be of use. Source: Tape, "Interpreting diagnostic tests", whose lowest
grade ends there; here the number of observations alone often reaches as much."""


@dataclass(frozen=True)
class Verdict:
    """One level of the scale.

    Attributes:
        words: of the verdict, in lower case.
        symbol: one character, which tells the levels apart without colour.
        marker: the symbol as matplotlib names it.
        style: class on a page, where ``page.html.j2`` gives its colour.
        colour: the same, on a white ground.
        dark: the same, on a dark screen.
    """

    words: str
    symbol: str
    marker: str
    style: str
    colour: str
    dark: str

    def __str__(self) -> str:
        """Return symbol and words."""
        return f"{self.symbol} {self.words}"

    def sentence(self, subject: str, other: str) -> str:
        """Return the verdict on a comparison as a sentence, in lower case and without its point.

        Args:
            subject: with its verb, as "this model is".
            other: what it is compared with.
        """
        if self == FEW:
            return f"{self.words} whether {subject} better than {other}"
        return f"{subject} {self.words} {'as' if self == SAME else 'than'} {other}"


BETTER = Verdict(
    "better", "\N{BLACK UP-POINTING TRIANGLE}", "^", "verdict-better", "#17693a", "#7ddc9f"
)
UNDECIDED = Verdict(
    "not shown to be better", "\N{WHITE DIAMOND}", "D", "verdict-undecided", "#855300", "#ffc46b"
)
WORSE = Verdict(
    "worse", "\N{BLACK DOWN-POINTING TRIANGLE}", "v", "verdict-worse", "#a3211f", "#ff9d94"
)
FEW = Verdict("too few to say", "\N{WHITE CIRCLE}", "o", "verdict-few", "#566070", "#a9b2c0")

SCALE = (BETTER, UNDECIDED, WORSE, FEW)

SAME = replace(UNDECIDED, words="the same", symbol="=")
"""Beside a model that gives each row the same risk, which is no matter of an interval."""


def judge_interval(
    estimate: Estimate, rarer: int | None, limit: float = 0.0, *, lower_is_better: bool = False
) -> Verdict:
    """Return the verdict on a figure, or on a difference of figures, beside a limit.

    Only an interval that excludes the limit says better or worse.

    Args:
        estimate: of a figure, or of the paired difference of two.
        rarer: patients that have the outcome that fewer patients have; None where hidden.
        limit: what the figure is compared with: 0 for a difference, ``CHANCE`` for an AUROC.
        lower_is_better: as of a Brier score.
    """
    if rarer is None or rarer < FEWEST_PATIENTS or estimate.low is None:
        return FEW
    if estimate.above(limit):
        return WORSE if lower_is_better else BETTER
    if estimate.below(limit):
        return BETTER if lower_is_better else WORSE
    return UNDECIDED


def is_of_no_use(auroc: Estimate, gain: Estimate, rarer: int | None) -> bool:
    """Return whether the intervals exclude what would be useful.

    The whole interval of the AUROC lies below ``USEFUL_AUROC``, and at the chosen threshold the
    decision curve is not shown to lie above those of an alarm for all and for none.

    Args:
        auroc: of the model.
        gain: in net benefit, as ``CohortFigures.benefit_gain``.
        rarer: as for ``judge_interval``.
    """
    enough = rarer is not None and rarer >= FEWEST_PATIENTS
    return enough and auroc.below(USEFUL_AUROC) and not gain.above(0)


def difference_of_parts(one: Estimate, other: Estimate) -> Estimate:
    """Return the first figure minus the second, of two parts that share no patient.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures".
    """
    if one.value is None or other.value is None:
        return Estimate(None)
    value = one.value - other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Estimate(value)
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, value - below, value + above)


def group_by_verdict(verdicts: Mapping[str, Verdict]) -> str:
    """Return the names that each verdict has in one sentence; empty without names."""
    found = {
        verdict: [name for name, own in verdicts.items() if own == verdict]
        for verdict in (*SCALE, SAME)
    }
    groups = [f"{verdict}: {', '.join(names)}" for verdict, names in found.items() if names]
    return f"{'; '.join(groups)}." if groups else ""
