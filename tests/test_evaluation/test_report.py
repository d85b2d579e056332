"""report.html: its sentences, its page, and what it must not tell."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import cohort_figures
from medgemma_clinical.evaluation.judgement.sentences import combined_finding, judge, judge_baseline
from medgemma_clinical.evaluation.judgement.verdict import BETTER, SAME, SCALE, UNDECIDED, WORSE
from medgemma_clinical.evaluation.report_tables import results_table, risk_beside_label, shift_table
from scipy.special import expit
from sklearn import metrics

from cohorts import make_cohort, simulate
from medgemma_clinical.evaluation.report import INTERVALS, PAGE_MARK, PATIENTS_NOTICE, write_report
from pages import OUTCOME, Page, make_content, write_page

pytestmark = pytest.mark.usefixtures("few_draws")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels, risk, groups = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    worse = expit(log_odds(risk) + np.random.default_rng(1).normal(size=400))
    mix = {"rows": 400.0, "patients": 200.0, "prevalence": 0.3}
    shift = shift_table({**mix, "age_q1": 40, "age_median": 50, "age_q3": 60}, mix)
    cohort = make_cohort((labels, risk, groups), last_value=worse)
    return write_page(cohort, tmp_path_factory.mktemp("page"), make_content(shift=shift))


def test_the_page_and_the_console_show_the_same_verdicts(tmp_path: Path) -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400)
    rng = np.random.default_rng(1)
    others = {
        "flat": np.full(400, 0.5),
        "same": risk,
        "close": expit(log_odds(risk) + 0.1 * rng.normal(size=400)),
        "blend": expit(log_odds(risk) + rng.normal(size=400)),
        "truth": 0.3 * risk + 0.7 * labels,
    }
    cohort = make_cohort((labels, risk, groups), **others)
    figures = cohort_figures(cohort, 0.3, 0, 0)
    page = write_page(cohort, tmp_path, make_content())
    console = results_table("model", {"validation": figures, "test": figures}).splitlines()
    seen = set()
    for name in others:
        verdict = judge_baseline(figures, name)
        seen.add(verdict)
        (line,) = [line for line in console if line.strip().startswith(f"{name} ")]
        assert line.endswith(f" {verdict}")
        (row,) = re.findall(rf'<th scope="row">{name}</th>(.*?)</tr>', page, re.S)
        assert f'<span class="mark {verdict.style}">' in row
        assert f"{verdict.symbol}</span>&nbsp;{verdict.words}</span>" in row
    assert seen == {BETTER, UNDECIDED, WORSE, SAME}
    assert not any(str(each) in console[1] for each in SCALE), "a model is beside no baseline"
    combined = combined_finding(figures)
    assert combined is not None
    assert str(combined) in console
    top = Page(page).text.split("Question")[0]
    for finding in (*judge(figures, OUTCOME).findings, combined):
        assert " ".join(str(finding).split()) in Page(page).text
    assert "This model is worse than the best baseline, truth." in top
    assert '<section class="verdict verdict-worse"' in page


def test_the_page_and_the_console_point_out_that_validation_and_test_disagree(
    tmp_path: Path,
) -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400)
    cohort = make_cohort((labels, risk, groups))
    found = cohort_figures(cohort, 0.3, 0, 0)
    fit = cohort_figures(make_cohort((labels, 0.3 * risk + 0.7 * labels, groups)), 0.3, 0, 0)
    words = "Validation and test disagree"
    for validation, warned in ((fit, True), (found, False)):
        page = write_page(cohort, tmp_path, make_content(validation=validation.auroc))
        console = results_table("model", {"validation": validation, "test": found})
        assert (words in Page(page).text, words in console) == (warned, warned)


def test_the_threshold_has_one_rounding_on_the_whole_page(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 400))
    path, figures = tmp_path / "page.html", cohort_figures(cohort, 0.07083, 0, 0)
    write_report(path, cohort, figures, make_content())
    page = Page(path.read_text(encoding="utf-8"))
    shown = " ".join([page.text, *(alt for alt, _ in page.images())])
    assert re.findall(r"a risk of (?:at least )?(7[.\d]*)\s%", shown) == ["7.1", "7.1"]
    assert "7.08" not in shown


def test_technical_measures_are_behind_a_fold(page: str) -> None:
    folds = r"<details>.*?</details>"
    folded = "".join(re.findall(folds, page, re.S))
    assert "Log loss" in folded
    assert "-ln(risk given to what happened)" in folded
    assert "knows the last value of each series alone" in folded
    assert "Log loss" not in re.sub(folds, "", page, flags=re.S)


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
    assert "Age in years, median (quartiles) 50 (40 to 60) not known" in text


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
    share = Estimate(0.975, 0.9, 0.99).to_json()
    reports = {"reports": 40, "parse_share": share, "inventing_share": share}
    source = write_page(mended, tmp_path, make_content(reports=reports), list_patients=True)
    text = Page(source).text.split("Before and after")[-1]
    assert "Abnormal values are not judged" in text
    assert "Three reports" not in text
    assert text.index("As trained") < text.index("Recalibrated")
    assert 0 < text.index(slopes[0]) < text.index(slopes[1])
    assert "Expected form (%) 97.5 [90.0, 99.0]" in text
    worst = np.argsort(-np.abs(labels - mended.probability))[:10]
    assert re.findall(r"MARKER-row-(\d+)", text) == [str(i) for i in worst]
    k = worst[0]
    words = risk_beside_label(labels[k], mended.probability[k])
    assert words.replace("\N{NO-BREAK SPACE}", " ") in text
    assert "MARKER-patient" not in source
    assert "MARKER" not in page


def test_a_page_says_which_earlier_stage_is_not_shown(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    line = "Stage 2 is not shown: <b>."
    assert line in Page(write_page(cohort, tmp_path, make_content(unshown=[line]))).text
    assert "Stages side by side" not in write_page(cohort, tmp_path, make_content())


def test_three_reports_stand_on_the_page_only_if_patients_are_listed(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    share = Estimate(0.75, 0.6, 0.9).to_json()
    shares = ("parse_share", "inventing_share", "abnormal_named_share")
    figures = {"reports": 60, "abnormal_values": 5, **dict.fromkeys(shares, share)}
    content = make_content(reports=figures)
    counts = dict.fromkeys(("named", "abnormal", "right_trends", "trends", "invented"), 2)
    lines = [
        {"id": f"MARKER-{k}", "quality": k / 60, "parses": k > 30, "probability": 0.5, **counts}
        | {"text": f"MARKERTEXT{k} <b>", "target": f"MARKERTRUE{k}"}
        for k in range(60)
    ]
    source = write_page(cohort, tmp_path, content, list_patients=True, reports=lines)
    text = Page(source).text
    assert "Abnormal named (%) 75.0 [60.0, 90.0]" in text
    first = "Of the 60 written reports 75.0 [60.0, 90.0] % have the expected form, and 75.0 [60.0, "
    assert text.index(first) < text.index("than chance")
    assert text.index(PATIENTS_NOTICE) < text.index(first)
    assert "Abnormal values are not judged" not in text
    assert "with the highest, the median and the lowest score" in text
    assert re.findall(r"MARKERTEXT(\d+) <b>", text) == ["59", "29", "0"]
    assert re.findall(r"MARKERTRUE(\d+)", text) == ["59", "29", "0"]
    assert "Form: not as expected; Abnormal values named: 2 of 2" in text
    without = write_page(cohort, tmp_path, content, list_patients=False, reports=lines)
    assert "MARKER" not in without
    assert PATIENTS_NOTICE not in without
    assert "75" in Page(without).text


def test_a_long_report_without_a_space_is_folded_too(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    line = {"id": "1", "quality": 1.0, "parses": True, "probability": 0.5, "target": "true"}
    line |= dict.fromkeys(("named", "abnormal", "right_trends", "trends", "invented"), 0)
    share = Estimate(0.5).to_json()
    content = make_content(reports={"reports": 60, "parse_share": share, "inventing_share": share})
    lines = [line | {"text": "w" * 200}] * 60
    page = write_page(cohort, tmp_path, content, list_patients=True, reports=lines)
    assert f"<b>Written:</b> {'w' * 70}&nbsp;&hellip;</summary>" in page


@pytest.mark.parametrize(("words", "folds"), [(9, 0), (60, 2)])
def test_a_long_report_is_folded_behind_its_beginning(
    words: int, folds: int, tmp_path: Path
) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    line = {"id": "1", "quality": 1.0, "parses": True, "probability": 0.5, "invented": 0}
    line |= dict.fromkeys(("named", "abnormal", "right_trends", "trends"), 0)
    line["text"] = line["target"] = " ".join(f"w{k}" for k in range(words))
    share = Estimate(0.5).to_json()
    figures = {"reports": 60, "parse_share": share, "inventing_share": share}
    content = make_content(reports=figures)

    def section_of(line: dict[str, object]) -> Page:
        page = write_page(cohort, tmp_path, content, list_patients=True, reports=[line] * 60)
        return Page("<div>" + page.split('<div class="row texts">')[1].split("</section>")[0])

    other = section_of(line | {"target": f"{line['text']} !"})
    assert [tag for tag, _ in other.tags].count("details") == folds
    assert re.findall(r"w(\d+)", other.text) == [str(k) for k in range(words)] * 2
    same = section_of(line)
    assert "True: the same, word for word" in same.text
    assert [tag for tag, _ in same.tags].count("details") == folds // 2
