"""report.html: its sentences, its page, and what it must not tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from sklearn import metrics

from cohorts import make_cohort, simulate
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import Cohort, cohort_figures
from medgemma_clinical.evaluation.report import INTERVALS, PAGE_MARK, Verdict, judge
from medgemma_clinical.evaluation.report_tables import shift_table
from pages import OUTCOME, Page, make_content, write_page


def verdict_of(cohort: Cohort) -> Verdict:
    return judge(cohort_figures(cohort, 0.3, 0, 0), "Death")


def words_of(cohort: Cohort) -> str:
    return " ".join(verdict_of(cohort).sentences)


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 200)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels, risk, groups = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    worse = expit(log_odds(risk) + np.random.default_rng(1).normal(size=400))
    mix = {"rows": 400.0, "patients": 200.0, "prevalence": 0.3}
    shift = shift_table({**mix, "age_q1": 40, "age_median": 50, "age_q3": 60}, mix)
    cohort = make_cohort((labels, risk, groups), last_value=worse)
    return write_page(cohort, tmp_path_factory.mktemp("page"), make_content(shift=shift))


# --------------------------------------------------------------------------- sentences


def test_a_model_no_better_than_chance_is_not_called_useful() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = simulate(rng, 500)
    chance = rng.permutation(risk)
    text = words_of(make_cohort((labels, chance, groups), last_value=risk))
    assert "not shown to be better than chance" in text
    assert "the interval includes 0.5" in text
    assert "It is worse than its best baseline, last value" in text
    assert "ranks rows in reverse" in words_of(make_cohort((labels, 1 - risk, groups)))


def test_a_model_that_is_not_better_than_its_best_baseline_is_told_so() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = simulate(rng, 500)
    noisy = expit(log_odds(risk) + 0.1 * rng.normal(size=500))
    flat = np.full(500, 0.5)
    text = words_of(make_cohort((labels, noisy, groups), number=flat, other_model=risk))
    assert "Of two rows, one with the event (Death)" in text
    assert "It is not shown to be better than its best baseline, other model" in text
    close = make_cohort((labels, risk, groups), other_model=noisy)  # ahead, but by chance
    gain = cohort_figures(close, 0.3, 0, 0).differences["other model"]["auroc"]
    assert gain.low is not None
    assert gain.value is not None
    assert gain.low < 0 < gain.value
    assert "It is not shown to be better than its best baseline, other model" in words_of(close)
    verdict = verdict_of(make_cohort((labels, risk, groups), number=flat))
    assert verdict.good
    assert "It is better than its best baseline, number" in verdict.sentences[1]
    assert "No baseline was scored" in words_of(make_cohort((labels, risk, groups)))


def test_a_model_is_not_praised_that_is_miscalibrated_or_stands_beside_no_baseline() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 800)
    sure = expit(3 * log_odds(risk))
    flat = {"number": np.full(800, 0.5)}
    for probability, baselines, praised in (
        (risk, flat, True),
        (sure, flat, False),
        (risk, {}, False),
    ):
        verdict = verdict_of(make_cohort((labels, probability, groups), **baselines))
        assert verdict.good == praised, verdict.sentences


def test_the_page_says_what_the_model_adds_to_the_blend(tmp_path: Path) -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400)
    blend = expit(log_odds(risk) + np.random.default_rng(1).normal(size=400))
    cohort = make_cohort((labels, risk, groups), blend=blend)
    text = Page(write_page(cohort, tmp_path, make_content())).text
    assert "It is better than its best baseline, blend" in text
    assert "The model adds to what the tables say: combined" in text.split("Baselines")[1]
    assert "combined" not in text.split("Baselines")[0]


@pytest.mark.parametrize(("shift", "word"), [(1.5, "too high"), (-1.5, "too low")])
def test_the_sentence_says_on_which_side_the_risks_are(shift: float, word: str) -> None:
    labels, risk, groups = simulate(np.random.default_rng(3), 2000)
    moved = expit(log_odds(risk) + shift)
    assert f"miscalibrated: {word} on average" in words_of(make_cohort((labels, moved, groups)))


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (2.5, "too extreme"),
        (0.4, "too close to the average"),
        (1.0, "Its risks agree with the observed shares"),
    ],
)
def test_the_sentence_says_whether_risks_are_extreme(slope: float, words: str) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(1), 2000, slope=slope))
    assert words in words_of(cohort)


def test_few_events_judge_no_model() -> None:
    labels, risk = np.zeros(60), np.linspace(0.1, 0.6, 60)
    labels[-3:] = 1
    groups = np.arange(60).astype(str)
    verdict = verdict_of(make_cohort((labels, risk, groups), number=np.full(60, 0.5)))
    assert not verdict.good
    assert verdict.sentences[0].startswith("Only 3 of 60 patients")
    assert "cannot show" in verdict.sentences[2]


# --------------------------------------------------------------------------- the page


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    read = Page(page)
    assert read.open == []
    tags = [tag for tag, _ in read.tags]
    assert not {"script", "iframe", "object", "embed"} & set(tags)
    for tag, attributes in read.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:")) or not target, (tag, target)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(http" not in page
    assert "@import" not in page
    assert PAGE_MARK in page[:2000]


def test_each_picture_has_a_text_in_its_place(page: str) -> None:
    images = Page(page).images()
    assert len(images) == 5
    assert all(len(alt) > 60 for alt, _ in images)
    drawn = "".join(svg for _, svg in images)
    for label in (
        "false alarms, % of rows without event",
        "sensitivity, % of events",
        "predicted risk, %",
        "observed, %",
        "threshold risk, %",
        "net benefit, true alarms per 100 rows",
        "epoch (dotted: the one kept)",
    ):
        assert label in drawn


def test_what_a_user_writes_stays_text(page: str) -> None:
    assert OUTCOME not in page
    assert escape(OUTCOME, quote=False) in page


def test_figures_of_the_page_are_scikit_learns(page: str) -> None:
    labels, risk, _ = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    assert f"{metrics.roc_auc_score(labels, risk):.3f} " in page
    assert f"{metrics.average_precision_score(labels, risk):.3f} " in page


def test_small_subgroups_share_a_line_and_are_counted_in_patients(page: str) -> None:
    rows = re.findall(r"<th scope=\"row\">size: (\w+)</th>(.*?)</tr>", page, re.S)
    assert [name for name, _ in rows] == ["many"]
    labels, risk, _ = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    assert f"{metrics.roc_auc_score(labels[15:], risk[15:]):.3f} " in rows[0][1]
    text = Page(page).text
    assert "fewer than 10 patients with the event or fewer than 10 without it" in text
    assert "(rows in brackets): size: few (15)." in text


def test_the_case_mix_of_another_cohort_stands_beside_the_development(page: str) -> None:
    text = Page(page).text
    assert "Age in years, median [quartiles] 50 [40, 60] not known" in text


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    few = make_cohort(simulate(np.random.default_rng(0), 15))
    card = {"Model": "ODE-RNN", "Intervals": INTERVALS, "SHA-256 of the data": "c0ffee"}
    text = Page(write_page(few, tmp_path, make_content(history=None, card=card))).text
    for words in (
        *(
            "The same model in subgroups",
            "Learning curve",
            "Case mix",
            "Written reports",
            "Largest errors",
        ),
        *("Split by", "Before and after"),
    ):
        assert words not in text
    assert "None was scored on these rows" in text
    assert "No subgroup has enough patients" in text
    assert text.index("c0ffee") > text.index("Model card") > text.index("Baselines")
    assert "1,000 draws of patients" in text


def test_a_page_with_all_sections_shows_recalibration_reports_and_the_ten_largest_errors(
    page: str, tmp_path: Path
) -> None:
    labels, risk, groups = simulate(np.random.default_rng(1), 300, slope=2.5)
    mended = replace(make_cohort((labels, expit(0.4 * log_odds(risk)), groups)), uncalibrated=risk)
    figures = cohort_figures(mended, 0.3, 0, 0)
    slopes = [each["calibration_slope"].text() for each in (figures.before, figures.estimates)]
    reports = dict.fromkeys(("reports", "numbers_stated"), 40.0)
    reports |= {"parse_share": 0.975, "true_number_share": 0.5}
    source = write_page(mended, tmp_path, make_content(reports=reports), list_patients=True)
    text = Page(source).text.split("Before and after")[-1]
    assert text.index("As trained") < text.index("Recalibrated")
    assert 0 < text.index(slopes[0]) < text.index(slopes[1])
    assert "Reports of the expected form 98 %" in text
    worst = np.argsort(-np.abs(labels - mended.probability))[:10]
    assert re.findall(r"MARKER-row-(\d+)", text) == [str(i) for i in worst]
    assert f"{mended.probability[worst[0]]:.3f}" in text
    assert "MARKER-patient" not in source
    assert "MARKER" not in page
