"""What the figures of a cohort say, each finding with its verdict, in words for a clinician."""

from __future__ import annotations

from dataclasses import dataclass

from medgemma_clinical.evaluation.baselines import COMBINED, richest_blend
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.cohort import CohortFigures
from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    CHANCE,
    FEW,
    FEWEST_PATIENTS,
    SAME,
    UNDECIDED,
    USEFUL_AUROC,
    WORSE,
    Verdict,
    difference_of_parts,
    is_of_no_use,
    judge_interval,
)

FOR_ALL_OR_NONE = "an alarm for all or for none"
ONE_RISK = "the average risk for everyone"
MODEL_IS, RISKS_ARE, ALARMS_ARE = "this model is", "its risks are", "its alarms are"


@dataclass(frozen=True)
class Finding:
    """A verdict, what it compares with, and the figures behind it.

    Attributes:
        verdict: on the scale.
        heading: the verdict as a sentence, as "this model is worse than chance".
        text: sentences.
    """

    verdict: Verdict
    heading: str
    text: str

    @property
    def title(self) -> str:
        """The heading as the beginning of a sentence."""
        return f"{self.heading[0].upper()}{self.heading[1:]}."

    def __str__(self) -> str:
        """Return symbol, heading and text in one line."""
        return f"{self.verdict.symbol} {self.title} {self.text}"


@dataclass(frozen=True)
class Judgement:
    """The result in words.

    Attributes:
        findings: in the order in which they are read.
        caution: sentence on validation and test that disagree; empty where they agree.
    """

    findings: list[Finding]
    caution: str = ""

    @property
    def verdict(self) -> Verdict:
        """The least favourable verdict of all findings: better only where each says better."""
        order = (WORSE, FEW, UNDECIDED, SAME, BETTER)
        return min((finding.verdict for finding in self.findings), key=order.index)

    def lines(self) -> list[str]:
        """Return a line for each finding, and the caution."""
        return [*map(str, self.findings), *([self.caution] if self.caution else [])]


def few_events_sentence(rows: int, fewest: int) -> str:
    """Return why no figure of some rows is shown."""
    return (
        f"Fewer than {fewest} of the patients of these {rows:,} rows have, or lack, the event: no "
        "figure is shown (--min_cell 0 shows all, where the data use agreement allows it)."
    )


def judge(figures: CohortFigures, outcome: str, validation: Estimate | None = None) -> Judgement:
    """Put the figures into words: discrimination, baselines, calibration, usefulness.

    Args:
        figures: of the rows on which the model is judged.
        outcome: the event in a few words.
        validation: AUROC of the part on which the model was chosen, if there is one.
    """
    if figures.rarer is None:
        hidden = few_events_sentence(figures.n, figures.fewest)
        return Judgement([Finding(FEW, FEW.words, hidden)])
    findings = [
        _ranking(figures, outcome),
        _beside_baseline(figures),
        _calibration(figures),
        _usefulness(figures),
    ]
    return Judgement(findings, caution_sentence(validation, figures.auroc) or "")


def _ranking(figures: CohortFigures, outcome: str) -> Finding:
    score = figures.auroc
    verdict = judge_interval(score, figures.rarer, CHANCE)
    text = f"The interval of the AUROC, {score.text()}, includes 0.5, which is chance."
    if verdict == FEW:
        text = (
            f"Only {figures.rarer} of {figures.patients} patients have the rarer outcome; "
            f"{FEWEST_PATIENTS} are needed for a judgement: AUROC {score.text()}, 0.5 is chance."
        )
    elif verdict == BETTER and score.value is not None:
        text = (
            f"Of two rows, one with the event ({outcome}) and one without, the model gives the row "
            f"with the event the higher risk {100 * score.value:.0f}\N{NO-BREAK SPACE}% of the "
            f"time (AUROC {score.text()}); chance is 50\N{NO-BREAK SPACE}%."
        )
    elif verdict == WORSE:
        text = f"The model ranks rows in reverse (AUROC {score.text()}; 0.5 is chance)."
    return Finding(verdict, verdict.sentence(MODEL_IS, "chance"), text)


def judge_baseline(figures: CohortFigures, name: str) -> Verdict:
    """Return the verdict on the model beside one baseline, by the paired difference of AUROC."""
    if name in figures.same:
        return SAME
    return judge_interval(figures.differences[name]["auroc"], figures.rarer)


def _beside_baseline(figures: CohortFigures) -> Finding:
    name = figures.best_baseline
    if name is None:
        heading = "this model is not compared with a simpler one"
        text = "Baselines are fitted when a model is trained; the report of that run shows them."
        return Finding(UNDECIDED, heading, text)
    verdict = judge_baseline(figures, name)
    difference = figures.differences[name]["auroc"]
    text = (
        f"Its AUROC is {figures.baselines[name]['auroc'].text()}; the paired difference is "
        f"{difference.text('+.3f')}"
    )
    text += ", which includes 0." if verdict == UNDECIDED else "."
    return Finding(verdict, verdict.sentence(MODEL_IS, f"the best baseline, {name}"), text)


def _calibration(figures: CohortFigures) -> Finding:
    """Judge the risks: worse where they are shown to be miscalibrated."""
    slope = figures.estimates["calibration_slope"]
    large = figures.estimates["calibration_in_the_large"]
    skill = figures.estimates["brier_skill"]
    verdict = judge_interval(skill, figures.rarer)
    if FEW in (verdict, *(judge_interval(each, figures.rarer) for each in (slope, large))):
        text = "Too few patients have, or lack, the event to judge the calibration."
        return Finding(FEW, FEW.sentence(RISKS_ARE, ONE_RISK), text)
    faults = []
    if slope.below(1):
        faults.append("too extreme (high risks too high, low risks too low)")
    elif slope.above(1):
        faults.append("too close to the average")
    if large.below(0):
        faults.append("too high on average")
    elif large.above(0):
        faults.append("too low on average")
    shown = (
        f"calibration slope {slope.text('.2f')}, 1 is ideal; calibration in the large "
        f"{large.text('+.2f')}, 0 is ideal"
    )
    if faults:
        heading = WORSE.sentence(RISKS_ARE, "those of a calibrated model")
        return Finding(WORSE, heading, f"They are {' and '.join(faults)} ({shown}).")
    text = f"They agree with what happened, as far as these rows can show ({shown})."
    return Finding(verdict, verdict.sentence(RISKS_ARE, ONE_RISK), text)


def _usefulness(figures: CohortFigures) -> Finding:
    """Judge the alarms at the chosen threshold, by net benefit."""
    gain, risk = figures.benefit_gain, threshold_text(figures.threshold)
    if is_of_no_use(figures.auroc, gain, figures.rarer):
        return Finding(
            WORSE,
            "this model is of no use as it stands",
            f"Even the upper end of the AUROC, {figures.auroc.text()}, is below {USEFUL_AUROC:g}, "
            f"and at the chosen threshold, a risk of {risk}, "
            f"{judge_interval(gain, figures.rarer).sentence(ALARMS_ARE, FOR_ALL_OR_NONE)}.",
        )
    verdict = judge_interval(gain, figures.rarer)
    text = (
        f"At the chosen threshold, a risk of {risk}, the net benefit (true alarms per 100 rows, "
        "false ones subtracted) differs from that of the better of the two by "
        f"{gain.text('+.1f', 100)}"
    )
    if gain.value is None:
        text = "The alarms at the chosen threshold are not shown"
    elif verdict == UNDECIDED:
        text += ": this includes 0"
    return Finding(verdict, verdict.sentence(ALARMS_ARE, FOR_ALL_OR_NONE), f"{text}.")


def caution_sentence(validation: Estimate | None, test: Estimate) -> str | None:
    """Return a warning where the AUROC of both parts differs by more than chance usually makes."""
    if validation is None:
        return None
    difference = difference_of_parts(test, validation)
    if not (difference.above(0) or difference.below(0)):
        return None
    reading = "The test figure may be high by luck: --seeds 5 repeats the run on other splits."
    if difference.below(0):
        reading = "The model was chosen on the validation part: the test part is the fair judge."
    return (
        f"Validation and test disagree by more than chance usually makes: AUROC "
        f"{validation.text()} on the validation part, {test.text()} on the test part, difference "
        f"{difference.text('+.3f')}. {reading}"
    )


def combined_finding(figures: CohortFigures) -> Finding | None:
    """Return what the model adds to the blend of simple models; None where that is not known."""
    blend = richest_blend(figures.baselines)
    if not figures.combined or figures.events is None or blend is None:
        return None
    gain = figures.combined_minus_blend
    verdict = judge_interval(gain["auroc"], figures.rarer)
    headings = {
        BETTER: f"this model adds to the {blend}",
        UNDECIDED: f"this model is not shown to add to the {blend}",
        WORSE: f"this model makes the {blend} worse",
        FEW: f"{FEW.words} whether this model adds to the {blend}",
    }
    return Finding(
        verdict,
        headings[verdict],
        f"Both together ({COMBINED}: the mean of their log-odds) minus the {blend} alone, paired: "
        f"AUROC {gain['auroc'].text('+.3f')}, Brier score {gain['brier'].text('+.4f')}.",
    )
