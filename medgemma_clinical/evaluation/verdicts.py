"""The result in words: fixed sentences, and a symbol made of an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import EXPECTED, MINORITY_PATIENTS, Metrics
from medgemma_clinical.evaluation.target import LABEL, Target

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
    link: str = ""  # a page to which it leads

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
    value: float, low: float, high: float, form: str = "z.3f", scale: float = 1
) -> str:
    """Write ``value [low, high]``, each times ``scale``, or what of both is defined."""
    if math.isnan(value):
        return NO_VALUE
    texts = [f"{scale * number:{form}}" for number in (value, low, high)]
    # Within the brackets a line does not break.
    return texts[0] if math.isnan(low) else f"{texts[0]} [{texts[1]},\N{NO-BREAK SPACE}{texts[2]}]"


def value_text(row: Any, form: str = "z.3f", scale: float = 1) -> str:
    """Write value and interval of a line of a metrics table."""
    return interval_text(row.value, row.low, row.high, form, scale)


def json_text(metric: Mapping[str, Any], form: str = ".3f", scale: float = 1) -> str:
    """Write value and interval of a metric of ``metrics.json``, in which None is undefined."""
    return value_text(pd.Series(metric, dtype=float), form, scale)


def difference_text(row: Any, form: str = "+z.3f") -> str:
    """Write the difference of a line to its reference, with its interval."""
    return interval_text(row.difference, row.difference_low, row.difference_high, form)


def percent(value: float) -> str:
    """Write a share in percent, of small ones two digits; a dash where undefined."""
    if math.isnan(value):
        return NO_VALUE
    number = f"{100 * value:.1f}" if value >= 0.01 or value == 0 else f"{100 * value:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def at_threshold(threshold: float, choice: str) -> str:
    """Return how a sentence about a threshold begins; ``choice`` is ``describe_threshold``'s."""
    return f"At the threshold of {percent(threshold)}, {choice}"


def primary_baseline(metrics: Metrics) -> str | None:
    """Return the baseline of the planned comparison; None where there is nothing to compare."""
    is_compared = metrics.primary in metrics.models[1:]
    return metrics.primary if is_compared else None


def planned_above_chance(metrics: Metrics) -> str | None:
    """Return the planned comparison if it is shown to rank better than chance, else None."""
    if (name := primary_baseline(metrics)) is None:
        return None
    auroc = metrics.row(name, "auroc")
    level = verdict(auroc.low, auroc.high, CHANCE, metrics.counts["minority_patients"])
    return name if level is BETTER else None


def multiplicity_sentence(metrics: Metrics) -> str:
    """Return how to read the differences that have no verdict; nothing where all have one."""
    if len(metrics.models) - 1 == len(metrics.planned):
        return ""
    return (
        "Only comparisons that were planned before the results have a verdict. Of the other "
        "intervals about one in twenty excludes 0 by chance alone, and the best of several models "
        "looks better than it is."
    )


def counts_text(
    counts: Mapping[str, int], noun: str = "predictions", event: str = LABEL.title
) -> str:
    """Return how many rows, called ``noun``, there are, of how many patients, and the events."""
    rows = "" if counts["n"] == counts["patients"] else f"{counts['n']:,} {noun} of "
    return f"{rows}{counts['patients']:,} patients, {counts['events']:,} with {event}"


def sentences(
    metrics: Metrics,
    beginning: str,
    noun: str = "predictions",
    advice: str = "",
    *,
    targets: Sequence[Target] = (LABEL,),
) -> list[Finding]:
    """Return the result in words: ranking, decision, other models, calibration, certainty.

    ``beginning`` is ``at_threshold``'s; ``noun`` names the rows;
    ``advice`` is what helps where there are few events. Further targets have their calibration.
    """
    of_first = metrics.at(targets[0])
    values, minority = of_first.of(metrics.models[0]), metrics.counts["minority_patients"]
    findings = [_ranking(values.loc["auroc"], minority, targets[0])]
    if "positives" in values.index and values.loc["positives"].value > 0:
        findings.append(Finding(None, _decision(values, beginning, noun)))
    findings += comparison(of_first)
    findings += [Finding(None, _calibration(metrics.at(target), target)) for target in targets]
    findings += [Finding(None, text) for text in _without(metrics, targets)]
    counted = counts_text(metrics.counts, noun, targets[0].title)
    certainty = _certainty(values.loc["auroc"], counted, advice)
    notes = dict.fromkeys(target.note for target in targets)
    return [*findings, *(Finding(None, note) for note in notes if note), Finding(None, certainty)]


def _calibration(metrics: Metrics, target: Target) -> str:
    """Return whether the risks for a target may be taken literally."""
    values = metrics.of(metrics.models[0])
    # A rule that these rows taught fits them by construction: only its interval says something.
    is_moved = f"{EXPECTED}ici" in values.index
    start = EXPECTED if is_moved else ""
    of_target = f" of {target.title}" if target.metric_ending or target.horizon else ""
    risks = f"the recalibrated risks{of_target}" if is_moved else f"the risks{of_target}"
    if math.isnan(values.loc["oe"].value):
        return f"Not measured: {risks}, as few are watched until then, or no event is seen."
    slope, intercept = (values.loc[f"{start}{name}"] for name in ("slope", "intercept"))
    return literal_risks(
        risks, slope, intercept, values.loc[f"{start}ici"], values.loc["ici_ideal"]
    )


def _without(metrics: Metrics, targets: Sequence[Target]) -> list[str]:
    """Return what a model says of risks if some events did not happen, beside the usual ones."""
    usual = {target.horizon: target for target in targets if not target.ends}
    texts = []
    for target in (target for target in targets if target.ends):
        values, beside = (
            metrics.at(x).of(metrics.models[0]) for x in (target, usual[target.horizon])
        )
        mean, other = values.loc["mean_risk"].value, beside.loc["mean_risk"].value
        if math.isnan(mean) or math.isnan(other):
            continue  # hidden, or too few rows
        observed = value_text(values.loc["observed"], ".1f", 100)
        cut, largest = (values.loc[name].value for name in ("weights_cut", "largest_weight"))
        texts.append(
            f"The model says: the mean risk of {target.title} is {percent(mean)}, that of "
            f"{usual[target.horizon].title} is {percent(other)}. The observed risk of the former, "
            f"estimated by weights, is approximately {observed} %; {percent(cut)} of the weights "
            f"were cut, and the largest is {largest:.1f}."
        )
    return texts


def comparison(metrics: Metrics) -> list[Finding]:
    """Return in words how the model, and the ensemble, compare with other models."""
    findings, minority = [], metrics.counts["minority_patients"]
    if name := primary_baseline(metrics):
        row, own = metrics.row(name, "auroc"), metrics.row(metrics.models[0], "auroc")
        level = difference_verdict(row, minority)
        statics = "; statics: static features, such as age" if "statics" in name else ""
        text = (
            f"{COMPARED[level]} the simple model ({name}{statics}): AUROC {own.value:.3f} and "
            f"{row.value:.3f}, the simple one minus this one {difference_text(row)}."
        )
        findings.append(Finding(OPPOSITE.get(level, level), text))
    # Another model that --use names is not in the ensemble.
    if ENSEMBLE in metrics.models[1:] and metrics.models[0] in STAGE_NAMES.values():
        row = metrics.row(ENSEMBLE, "auroc")
        level = difference_verdict(row, minority)
        both = f"the ensemble of this model and {row.reference}"
        text = (
            f"{ADDS[level].format(both)} {row.reference} alone: AUROC {value_text(row)}, ensemble "
            f"minus {row.reference} {difference_text(row)}."
        )
        findings.append(Finding(level, f"{text[:1].upper()}{text[1:]}"))
    return findings


OPPOSITE = {BETTER: WORSE, WORSE: BETTER}

COMPARED = {
    BETTER: "It ranks worse than",
    UNDECIDED: "It is not shown to rank better or worse than",
    WORSE: "It ranks better than",
    TOO_FEW: "Too few events to compare it with",
}
"""By the verdict on the AUROC of the simple model minus that of this one."""

ADDS = {
    BETTER: "{} ranks better than",
    UNDECIDED: "{} is not shown to rank better than",
    WORSE: "{} ranks worse than",
    TOO_FEW: "Too few events to say whether {} ranks better than",
}
RANKS = {0.9: "very well", 0.8: "well", 0.7: "fairly well", 0.0: "better than chance"}
"""Words for an AUROC whose interval begins at this value or above."""

WIDE_SLOPE = 0.5
"""A slope whose interval is wider does not show that risks are right, nor that they are wrong."""


def _ranking(auroc: Any, minority: int, target: Target) -> Finding:
    level = verdict(auroc.low, auroc.high, CHANCE, minority)
    how = next(words for limit, words in RANKS.items() if not auroc.low < limit)
    beginning = {
        BETTER: f"It ranks {how}: of two patients, one with {target.title} and one without it, the "
        f"first has the higher risk in {percent(auroc.value)} of pairs,",
        UNDECIDED: "It is not shown to rank better than chance:",
        WORSE: "It ranks worse than chance:",
        TOO_FEW: "Too few events to say how well it ranks:",
    }
    return Finding(level, f"{beginning[level]} AUROC {value_text(auroc)}; 0.5 is chance.")


def literal_risks(risks: str, slope: Any, level: Any, ici: Any, ideal: Any) -> str:
    """Return whether some risks may be taken literally, by lines of a metrics table."""
    too_few = f"Too few events to say whether {risks} may be taken literally"
    if math.isnan(slope.low):
        return f"{too_few}."
    faults = []
    if slope.high < 1:
        faults.append("high risks are too high and low ones too low")
    if slope.low > 1:
        faults.append("high risks are too low and low ones too high")
    if level.high < 0:
        faults.append("they are too high on average")
    if level.low > 0:
        faults.append("they are too low on average")
    differ = (
        f"they differ from the observed share by {100 * ici.value:.1f} percentage points on "
        f"average, where calibrated risks would differ by {100 * ideal.value:.1f} by chance "
        f"(slope {value_text(slope, '.2f')}, 1 is ideal)."
    )
    subject = f"{risks[:1].upper()}{risks[1:]}"
    if faults:
        return f"{subject} may not be taken literally, as {' and '.join(faults)}: {differ}"
    is_narrow = slope.high - slope.low < WIDE_SLOPE
    return f"{f'{subject} may be taken literally' if is_narrow else too_few}: {differ}"


def _decision(values: Any, beginning: str, noun: str) -> str:
    positives, right, found = (
        values.loc[name].value for name in ("positives", "ppv", "sensitivity")
    )
    return (
        f"{beginning}, {100 * positives:.1f} of 100 {noun} are predicted positive. Of these "
        f"{percent(right)} have the event, and {percent(found)} of all events are among them."
    )


def _certainty(auroc: Any, counted: str, advice: str) -> str:
    text = f"Tested on {counted}"
    if not math.isnan(auroc.low):
        half = (auroc.high - auroc.low) / 2
        text += f": chance alone may move the AUROC by about ±{half:.3f}"
    return f"{text}. {advice}".strip()
