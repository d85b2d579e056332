"""The result in words: four fixed sentences, and a symbol made of an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS, Metrics

NO_VALUE = "\N{EN DASH}"
CHANCE = 0.5


class Verdict(NamedTuple):
    """A level of the scale: its words, a symbol that needs no colour, its class on a page."""

    words: str
    symbol: str
    style: str

    def __str__(self) -> str:
        """Return symbol and words."""
        return f"{self.symbol} {self.words}"


BETTER = Verdict("better", "\N{BLACK UP-POINTING TRIANGLE}", "verdict-better")
UNDECIDED = Verdict("no difference shown", "\N{WHITE DIAMOND}", "verdict-undecided")
WORSE = Verdict("worse", "\N{BLACK DOWN-POINTING TRIANGLE}", "verdict-worse")
TOO_FEW = Verdict("too few to say", "\N{WHITE CIRCLE}", "verdict-few")


class Finding(NamedTuple):
    """A sentence of the result; calibration has no verdict."""

    verdict: Verdict | None
    text: str

    def __str__(self) -> str:
        """Return symbol and sentence in one line."""
        return f"{self.verdict.symbol} {self.text}" if self.verdict else self.text


def verdict(low: float, high: float, limit: float, minority: int) -> Verdict:
    """Compare an interval, larger being better, with a limit; only one that excludes it decides."""
    if minority < MINORITY_PATIENTS or math.isnan(low):
        return TOO_FEW
    return BETTER if low > limit else WORSE if high < limit else UNDECIDED


def difference_verdict(row: Any, minority: int) -> Verdict:
    """Return the verdict on a line of the AUROC beside its reference."""
    return verdict(row.difference_low, row.difference_high, 0, minority)


def interval_text(
    value: float, low: float, high: float, form: str = ".3f", scale: float = 1
) -> str:
    """Write ``value [low, high]``, each times ``scale``, or what of both is defined."""
    if math.isnan(value):
        return NO_VALUE
    texts = [f"{scale * number:{form}}" for number in (value, low, high)]
    # Within the brackets a line does not break.
    return texts[0] if math.isnan(low) else f"{texts[0]} [{texts[1]},\N{NO-BREAK SPACE}{texts[2]}]"


def value_text(row: Any, form: str = ".3f", scale: float = 1) -> str:
    """Write value and interval of a line of a metrics table."""
    return interval_text(row.value, row.low, row.high, form, scale)


def json_text(metric: Mapping[str, Any], form: str = ".3f", scale: float = 1) -> str:
    """Write value and interval of a metric of ``metrics.json``, in which None is undefined."""
    return value_text(pd.Series(metric, dtype=float), form, scale)


def difference_text(row: Any, form: str = "+.3f") -> str:
    """Write the difference of a line to its reference, with its interval."""
    return interval_text(row.difference, row.difference_low, row.difference_high, form)


def percent(value: float) -> str:
    """Write a share in percent, of small ones two digits; a dash where undefined."""
    if math.isnan(value):
        return NO_VALUE
    number = f"{100 * value:.1f}" if value >= 0.01 or value == 0 else f"{100 * value:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def primary_baseline(metrics: Metrics) -> str | None:
    """Return the baseline of the planned comparison; None where there is nothing to compare."""
    is_compared = metrics.primary in metrics.models[1:]
    return metrics.primary if is_compared else None


def multiplicity_sentence(metrics: Metrics) -> str:
    """Return how to read the differences that have no verdict; nothing where all have one."""
    if len(metrics.models) - 1 == len(metrics.planned):
        return ""
    return (
        "Only comparisons that were planned before the results have a verdict. Of the other "
        "intervals about one in twenty excludes 0 by chance alone, and the best of several models "
        "looks better than it is."
    )


def counts_text(counts: Mapping[str, int], noun: str = "predictions") -> str:
    """Return how many rows, called ``noun``, there are, of how many patients, and the events."""
    rows = "" if counts["n"] == counts["patients"] else f"{counts['n']:,} {noun} of "
    return f"{rows}{counts['patients']:,} patients, {counts['events']:,} with the event"


def sentences(metrics: Metrics, noun: str = "predictions") -> list[Finding]:
    """Return the result in words, without a baseline of a model alone; ``noun`` names the rows."""
    counts, values = metrics.counts, metrics.of(metrics.models[0])
    minority, row = counts["minority_patients"], values.loc["auroc"]
    level = verdict(row.low, row.high, CHANCE, minority)
    words = {BETTER: "better than", UNDECIDED: "not shown to differ from", WORSE: "worse than"}
    few = f"too few to compare ({minority} patients have the rarer outcome) with"
    text = (
        f"AUROC {value_text(row)} on {counts_text(counts, noun)}: {words.get(level, few)} chance "
        "(0.5)."
    )
    if row.low == 1:
        text += " All are ranked correctly: the interval has no width."
    findings = [Finding(level, text)]
    if name := primary_baseline(metrics):
        row = metrics.row(name, "auroc")
        level = difference_verdict(row, minority)
        beside = {BETTER: "the baseline is better", WORSE: "this model is better"}
        text = (
            f"The baseline of the planned comparison, {name}, has AUROC {value_text(row)}; its "
            f"AUROC minus that of this model is {difference_text(row)}: "
            f"{beside.get(level, level.words)}."
        )
        findings.append(Finding(None, text))  # a symbol would seem to praise this model
    if "ici" in values.index:
        slope = value_text(values.loc["calibration_slope"], ".2f")
        large = value_text(values.loc["calibration_in_the_large"], "+.2f")
        text = (
            f"Calibration: slope {slope} (1 is ideal), in the large {large} (0 is ideal), "
            f"ICI {value_text(values.loc['ici'])} (0 is ideal)."
        )
        findings.append(Finding(None, text))
    # Another model that --use names is not in the ensemble.
    if ENSEMBLE in metrics.models[1:] and metrics.models[0] in STAGE_NAMES.values():
        row = metrics.row(ENSEMBLE, "auroc")
        level = difference_verdict(row, minority)
        adds = {BETTER: "adds", UNDECIDED: "is not shown to add", WORSE: "takes away"}
        text = (
            f"Beside {row.reference} this model {adds.get(level, 'has too few patients to tell')}: "
            f"the ensemble of both has AUROC {value_text(row)}, difference {difference_text(row)}."
        )
        findings.append(Finding(level, text))
    return findings
