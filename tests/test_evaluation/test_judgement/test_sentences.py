"""What the figures of a cohort say in words, each finding with its verdict."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from cohorts import make_cohort, simulate
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures, cohort_figures
from medgemma_clinical.evaluation.judgement.sentences import (
    Judgement,
    caution_sentence,
    combined_finding,
    judge,
)
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    FEW,
    FEWEST_PATIENTS,
    SAME,
    SCALE,
    UNDECIDED,
    WORSE,
    Verdict,
)

pytestmark = pytest.mark.usefixtures("few_draws")


def judgement_of(cohort: Cohort) -> Judgement:
    return judge(cohort_figures(cohort, 0.3, 0, 0), "Death")


def words_of(cohort: Cohort) -> str:
    return " ".join(judgement_of(cohort).lines())


def with_auroc(*numbers: float, gain: tuple[float, float, float] | None = None) -> Judgement:
    """Judge a model of 500 patients whose AUROC, or gain in net benefit, is given."""
    figures = cohort_figures(make_cohort(simulate(np.random.default_rng(0), 500)), 0.3, 0, 0)
    estimates = {**figures.estimates, "auroc": Estimate(*numbers)}
    benefit = figures.benefit_gain if gain is None else Estimate(*gain)
    return judge(replace(figures, estimates=estimates, benefit_gain=benefit), "Death")


def test_a_model_no_better_than_chance_is_not_called_useful() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = simulate(rng, 500)
    chance = rng.permutation(risk)
    text = words_of(make_cohort((labels, chance, groups), last_value=risk))
    assert f"{UNDECIDED.symbol} This model is not shown to be better than chance." in text
    assert "includes 0.5, which is chance" in text
    assert f"{WORSE.symbol} This model is worse than the best baseline, last value." in text
    assert "ranks rows in reverse" in words_of(make_cohort((labels, 1 - risk, groups)))


@pytest.mark.parametrize(
    ("auroc", "verdict"),
    [
        ((0.750, 0.250, 1.000), UNDECIDED),
        ((0.681, 0.485, 0.850), UNDECIDED),
        ((0.52, 0.5, 0.54), UNDECIDED),
        ((0.52, 0.501, 0.54), BETTER),
        ((0.45, 0.41, 0.499), WORSE),
    ],
)
def test_the_ranking_is_judged_by_its_interval(
    auroc: tuple[float, float, float], verdict: Verdict
) -> None:
    ranking = with_auroc(*auroc).findings[0]
    assert (ranking.verdict, ranking.heading) == (
        verdict,
        f"this model is {verdict.words} than chance",
    )


def test_an_undecided_model_is_not_called_of_no_use() -> None:
    for auroc in ((0.750, 0.250, 1.000), (0.681, 0.485, 0.850), (0.55, 0.49, 0.6)):
        assert "no use" not in " ".join(with_auroc(*auroc).lines())
    useless = with_auroc(0.52, 0.45, 0.59, gain=(-0.01, -0.02, 0.0)).findings[3]
    assert (useless.verdict, useless.heading) == (WORSE, "this model is of no use as it stands")
    assert useless.text.startswith("Even the upper end")
    assert "its alarms are not shown to be better than an alarm for all" in useless.text
    gains = with_auroc(0.52, 0.45, 0.59, gain=(0.01, 0.001, 0.02))
    assert "no use" not in " ".join(gains.lines())


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ((0.02, 0.001, 0.03), BETTER),
        ((0.01, -0.001, 0.03), UNDECIDED),
        ((-0.02, -0.03, -0.001), WORSE),
    ],
)
def test_usefulness_is_judged_by_the_gain_in_net_benefit(
    gain: tuple[float, float, float], verdict: Verdict
) -> None:
    finding = with_auroc(0.7, 0.65, 0.75, gain=gain).findings[3]
    assert finding.verdict == verdict
    assert finding.heading == f"its alarms are {verdict.words} than an alarm for all or for none"
    assert Estimate(*gain).text("+.1f", 100) in finding.text
    assert "a risk of 30.0\N{NO-BREAK SPACE}%" in finding.text


def test_alarms_that_are_hidden_are_not_judged() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 500)
    figures = cohort_figures(make_cohort((labels, risk, groups)), 0.88, 0, 11)
    assert figures.estimates["alarms"].value is None
    assert figures.auroc.value is not None
    assert figures.benefit_gain == Estimate(None)
    finding = judge(figures, "Death").findings[3]
    assert (finding.verdict, finding.text) == (
        FEW,
        "The alarms at the chosen threshold are not shown.",
    )


def test_a_model_that_is_not_better_than_its_best_baseline_is_told_so() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = simulate(rng, 500)
    noisy = expit(log_odds(risk) + 0.1 * rng.normal(size=500))
    flat = np.full(500, 0.5)
    text = words_of(make_cohort((labels, noisy, groups), number=flat, other_model=risk))
    assert "Of two rows, one with the event (Death)" in text
    undecided = "This model is not shown to be better than the best baseline, other model."
    assert undecided in text
    close = make_cohort((labels, risk, groups), other_model=noisy)  # ahead, but by chance
    gain = cohort_figures(close, 0.3, 0, 0).differences["other model"]["auroc"]
    assert gain.low is not None
    assert gain.value is not None
    assert gain.low < 0 < gain.value
    assert undecided in words_of(close)
    judgement = judgement_of(make_cohort((labels, risk, groups), number=flat))
    assert judgement.verdict == BETTER
    assert judgement.findings[1].heading == ("this model is better than the best baseline, number")
    alone = words_of(make_cohort((labels, risk, groups)))
    assert "This model is not compared with a simpler one. Baselines are fitted when" in alone


def test_a_baseline_that_the_model_repeats_is_no_rival() -> None:
    """As stage 1, where the language model has weight 0."""
    labels, risk, groups = simulate(np.random.default_rng(0), 500)
    cohort = make_cohort((labels, risk, groups), other=risk, flat=np.full(500, 0.5))
    finding = judgement_of(cohort).findings[1]
    assert str(finding).startswith("\N{BLACK UP-POINTING TRIANGLE} This model is better than the ")
    assert "the best baseline, flat." in finding.title
    assert SAME.style == UNDECIDED.style, "no praise"


def test_a_model_is_not_praised_that_is_miscalibrated_or_stands_beside_no_baseline() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 800)
    sure = expit(3 * log_odds(risk))
    flat = {"number": np.full(800, 0.5)}
    for probability, baselines, verdict in (
        (risk, flat, BETTER),
        (sure, flat, WORSE),
        (risk, {}, UNDECIDED),
    ):
        judgement = judgement_of(make_cohort((labels, probability, groups), **baselines))
        assert judgement.verdict == verdict, judgement.lines()


@pytest.mark.parametrize(("shift", "word"), [(1.5, "too high"), (-1.5, "too low")])
def test_the_sentence_says_on_which_side_the_risks_are(shift: float, word: str) -> None:
    labels, risk, groups = simulate(np.random.default_rng(3), 2000)
    moved = expit(log_odds(risk) + shift)
    calibration = judgement_of(make_cohort((labels, moved, groups))).findings[2]
    assert calibration.heading == "its risks are worse than those of a calibrated model"
    assert f"They are {word} on average" in calibration.text


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (2.5, "too extreme"),
        (0.4, "too close to the average"),
        (1.0, "They agree with what happened, as far as these rows can show"),
    ],
)
def test_the_sentence_says_whether_risks_are_extreme(slope: float, words: str) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(1), 2000, slope=slope))
    assert words in words_of(cohort)


def test_few_events_judge_no_model() -> None:
    labels, risk = np.zeros(60), np.linspace(0.1, 0.6, 60)
    labels[-3:] = 1
    groups = np.arange(60).astype(str)
    judgement = judgement_of(make_cohort((labels, risk, groups), number=np.full(60, 0.5)))
    assert [finding.verdict for finding in judgement.findings] == [FEW] * 4
    assert judgement.findings[0].text.startswith("Only 3 of 60 patients have the rarer outcome")
    assert "Too few patients" in judgement.findings[2].text


def test_hidden_figures_are_too_few_to_say() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    judgement = judge(cohort_figures(cohort, 0.3, 0, 99), "Death")
    assert judgement.verdict == FEW
    assert "no figure is shown" in judgement.findings[0].text


VALIDATION = Estimate(0.80, 0.74, 0.86)


@pytest.mark.parametrize(
    ("test", "warned"),
    [
        (Estimate(0.80, 0.74, 0.86), False),
        (Estimate(0.72, 0.66, 0.78), False),  # 0.08 apart, 0.085 are allowed
        (Estimate(0.71, 0.65, 0.77), True),
        (Estimate(0.89, 0.83, 0.95), True),
        (Estimate(None), False),
    ],
)
def test_validation_and_test_that_disagree_are_pointed_out(test: Estimate, warned: bool) -> None:
    sentence = caution_sentence(VALIDATION, test)
    assert (sentence is not None) == warned
    assert caution_sentence(None, test) is None
    if sentence:
        assert f"{VALIDATION.text()} on the validation part, {test.text()} on the test" in sentence
        luck = (test.value or 0) > (VALIDATION.value or 0)
        assert ("may be high by luck" in sentence) == luck
        assert ("the test part is the fair judge" in sentence) == (not luck)


def test_the_caution_is_the_last_line_of_the_result() -> None:
    figures = cohort_figures(make_cohort(simulate(np.random.default_rng(0), 500)), 0.3, 0, 0)
    judgement = judge(figures, "Death", Estimate(0.99, 0.98, 1.0))
    assert judgement.lines()[-1] == judgement.caution
    assert judgement.caution.startswith("Validation and test disagree")
    assert judge(figures, "Death", figures.auroc).caution == ""


def test_each_heading_is_a_sentence_with_a_subject_and_the_words_of_its_verdict() -> None:
    subject = re.compile("(?:this model is|its (?:risks|alarms) are) ")
    for noise in (0.0, 9.0):
        labels, risk, groups = simulate(np.random.default_rng(0), 400)
        own = expit(log_odds(risk) + noise * np.random.default_rng(1).normal(size=400))
        for finding in judgement_of(make_cohort((labels, own, groups), blend=risk**2)).findings:
            assert finding.verdict in SCALE
            assert subject.match(finding.heading)
            assert finding.verdict.words in finding.heading
            assert str(finding).startswith(f"{finding.verdict.symbol} {finding.title} ")


def blended_figures(noise: float, fewest: int = 0) -> CohortFigures:
    """A model beside a blend of other knowledge, or of more of it."""
    labels, risk, groups = simulate(np.random.default_rng(0), 1000)
    rng = np.random.default_rng(1)
    own, blend = (expit(log_odds(risk) + k * rng.normal(size=1000)) for k in (noise, 1))
    return cohort_figures(make_cohort((labels, own, groups), blend=blend), 0.3, 0, fewest)


@pytest.mark.parametrize(
    ("noise", "few", "verdict", "heading"),
    [
        (0.5, False, BETTER, "this model adds to the blend"),
        (2.0, False, UNDECIDED, "this model is not shown to add to the blend"),
        (9.0, False, WORSE, "this model makes the blend worse"),
        (0.5, True, FEW, "too few to say whether this model adds to the blend"),
    ],
)
def test_a_finding_says_whether_the_model_adds_to_the_blend(
    noise: float, few: bool, verdict: Verdict, heading: str
) -> None:
    figures = blended_figures(noise)
    finding = combined_finding(replace(figures, rarer=FEWEST_PATIENTS - 1) if few else figures)
    assert finding is not None
    assert (finding.verdict, finding.heading) == (verdict, heading)
    assert figures.combined_minus_blend["auroc"].text("+.3f") in finding.text
    assert figures.combined_minus_blend["brier"].text("+.4f") in finding.text


def test_nothing_is_said_of_a_blend_that_is_missing_or_hidden() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 100))
    assert combined_finding(cohort_figures(cohort, 0.3, 0, 0)) is None
    assert combined_finding(blended_figures(0.5, fewest=999)) is None
