"""The scale of verdicts: each border, with intervals that include the limit and that exclude it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import medgemma_clinical.evaluation
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    CHANCE,
    FEW,
    FEWEST_PATIENTS,
    SCALE,
    UNDECIDED,
    WORSE,
    Verdict,
    difference_of_parts,
    group_by_verdict,
    is_of_no_use,
    judge_interval,
)

PAGE = Path(medgemma_clinical.evaluation.__file__).parent / "templates" / "page.html.j2"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.2, BETTER),
        (0.0, 0.2, UNDECIDED),
        (-0.001, 0.2, UNDECIDED),
        (-0.2, 0.2, UNDECIDED),
        (-0.2, 0.001, UNDECIDED),
        (-0.2, 0.0, UNDECIDED),
        (-0.2, -0.001, WORSE),
        (0.0, 0.0, UNDECIDED),
    ],
)
def test_only_an_interval_that_excludes_the_limit_says_better_or_worse(
    low: float, high: float, verdict: Verdict
) -> None:
    difference = Estimate((low + high) / 2, low, high)
    assert judge_interval(difference, 50) == verdict
    opposite = {BETTER: WORSE, WORSE: BETTER}.get(verdict, verdict)
    assert judge_interval(difference, 50, lower_is_better=True) == opposite
    auroc = Estimate(0.5 + (low + high) / 2, 0.5 + low, 0.5 + high)
    assert judge_interval(auroc, 50, CHANCE) == verdict


def test_few_patients_say_nothing_whatever_the_interval() -> None:
    sure = Estimate(0.9, 0.8, 1.0)
    assert judge_interval(sure, FEWEST_PATIENTS, CHANCE) == BETTER
    for rarer in (FEWEST_PATIENTS - 1, None):
        assert judge_interval(sure, rarer, CHANCE) == FEW
    for unknown in (Estimate(None), Estimate(0.9)):
        assert judge_interval(unknown, 50, CHANCE) == FEW


@pytest.mark.parametrize(
    ("high", "gain_low", "rarer", "useless"),
    [
        (0.599, -0.01, 50, True),
        (0.6, -0.01, 50, False),
        (0.599, 0.001, 50, False),
        (0.599, 0.0, 50, True),
        (0.599, -0.01, FEWEST_PATIENTS - 1, False),
        (0.599, -0.01, None, False),
        (1.0, -0.2, 50, False),
    ],
)
def test_of_no_use_is_said_only_where_the_intervals_exclude_a_use(
    high: float, gain_low: float, rarer: int | None, useless: bool
) -> None:
    gain = Estimate(0.01, gain_low, 0.02)
    assert is_of_no_use(Estimate(0.5, 0.25, high), gain, rarer) == useless


def test_each_verdict_differs_by_words_symbol_and_colour() -> None:
    for name in ("words", "symbol", "marker", "style", "colour", "dark"):
        assert len({getattr(verdict, name) for verdict in SCALE}) == len(SCALE) == 4
    assert str(UNDECIDED) == f"{UNDECIDED.symbol} not shown to be better"


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (BETTER, "its alarms are better than chance"),
        (UNDECIDED, "its alarms are not shown to be better than chance"),
        (WORSE, "its alarms are worse than chance"),
        (FEW, "too few to say whether its alarms are better than chance"),
    ],
)
def test_a_comparison_is_a_sentence_with_a_subject(verdict: Verdict, words: str) -> None:
    assert verdict.sentence("its alarms are", "chance") == words


def test_the_page_has_the_colours_of_the_scale() -> None:
    found = re.findall(r"\.(verdict-\w+) \{ --verdict: (#\w{6}); \}", PAGE.read_text())
    assert found[:4] == [(each.style, each.colour) for each in SCALE]
    assert found[4:] == [(each.style, each.dark) for each in SCALE]


def test_the_difference_of_two_parts_has_an_interval_of_both() -> None:
    test, validation = Estimate(0.70, 0.64, 0.76), Estimate(0.80, 0.72, 0.84)
    difference = difference_of_parts(test, validation)
    assert difference.value == pytest.approx(-0.10)
    # By hand: 0.06 and 0.04 below, 0.06 and 0.08 above, at right angles.
    assert difference.low == pytest.approx(-0.10 - 0.0052**0.5)
    assert difference.high == pytest.approx(-0.10 + 0.0100**0.5)
    assert difference_of_parts(test, Estimate(None)) == Estimate(None)
    assert difference_of_parts(test, Estimate(0.8)).low is None


def test_names_are_grouped_in_the_order_of_the_scale() -> None:
    verdicts = {"a": WORSE, "b": BETTER, "c": UNDECIDED, "d": BETTER}
    assert group_by_verdict(verdicts) == f"{BETTER}: b, d; {UNDECIDED}: c; {WORSE}: a."
    assert group_by_verdict({}) == ""
