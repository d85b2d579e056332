"""report.html: its sentences, its page, and what it must not tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

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


def test_small_subgroups_are_grey_and_counted_in_patients(page: str) -> None:
    pattern = r"<tr( class=\"grey\")?>\s*<th scope=\"row\">size: (\w+)</th>(.*?)</tr>"
    rows = re.findall(pattern, page, re.S)
    assert [(bool(grey), name) for grey, name, _ in rows] == [(True, "few"), (False, "many")]
    assert "too few" in rows[0][2]
    labels, risk, _ = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    assert f"{metrics.roc_auc_score(labels[15:], risk[15:]):.3f} " in rows[1][2]
    text = Page(page).text
    assert "fewer than 10 patients with the event or fewer than 10 without it" in text


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
    assert "Abnormal values are not judged" in text
    assert "Three reports" not in text
    assert text.index("As trained") < text.index("Recalibrated")
    assert 0 < text.index(slopes[0]) < text.index(slopes[1])
    assert "Reports of the expected form 98 %" in text
    worst = np.argsort(-np.abs(labels - mended.probability))[:10]
    assert re.findall(r"MARKER-row-(\d+)", text) == [str(i) for i in worst]
    assert f"{mended.probability[worst[0]]:.3f}" in text
    assert "MARKER-patient" not in source
    assert "MARKER" not in page


def test_a_page_says_which_earlier_stage_is_not_shown(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    line = "Stage 2 is not shown: <b>."
    assert line in Page(write_page(cohort, tmp_path, make_content(unshown=[line]))).text
    assert "Stages side by side" not in write_page(cohort, tmp_path, make_content())


def test_three_reports_stand_on_the_page_only_if_patients_are_listed(tmp_path: Path) -> None:
    cohort = make_cohort(simulate(np.random.default_rng(0), 60))
    figures = {"reports": 60.0, "abnormal_values": 5.0, "abnormal_named_share": 0.75}
    content = make_content(reports=figures)
    counts = dict.fromkeys(("named", "abnormal", "right_trends", "trends", "invented"), 2)
    lines = [
        {"id": f"MARKER-{k}", "quality": k / 60, "parses": k > 30, "probability": 0.5, **counts}
        | {"text": f"MARKERTEXT{k} <b>", "target": f"MARKERTRUE{k}"}
        for k in range(60)
    ]
    source = write_page(cohort, tmp_path, content, list_patients=True, reports=lines)
    text = Page(source).text
    assert "Abnormal values that are named 75 %" in text
    assert "Abnormal values are not judged" not in text
    assert "with the highest, the median and the lowest score" in text
    assert re.findall(r"MARKERTEXT(\d+) <b>", text) == ["59", "29", "0"]
    assert re.findall(r"MARKERTRUE(\d+)", text) == ["59", "29", "0"]
    assert "not as expected" in text
    without = write_page(cohort, tmp_path, content, list_patients=False, reports=lines)
    assert "MARKER" not in without
    assert "75" in Page(without).text


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``. Source: WCAG 2.1."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_letters_have_contrast_enough_in_light_and_dark(page: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for ink in ("ink", "soft", "link", "good", "doubt"):
            for ground in ("page", "panel"):
                pair = sorted(luminance(colours[name]) for name in (ink, ground))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<!DOCTYPE html><body><iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const pictures = [...inside.querySelectorAll("img")].filter(p => p.naturalWidth > 0);
  const boxes = pictures.map(p => p.getBoundingClientRect());
  document.getElementById("found").textContent = JSON.stringify({{
    wide: root.scrollWidth, seen: root.clientWidth,
    pictures: boxes.filter(p => p.width > 200 && p.height > 150).length,
    scale: Math.min(...pictures.map(p => p.getBoundingClientRect().width / p.naturalWidth)) }});
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: not looked at")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_of_it(page: str, width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=escape(page)), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1300,1000", outer.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout)
    assert match, result.stderr
    found: dict[str, Any] = json.loads(match[1])
    assert found["wide"] <= found["seen"]
    assert found["seen"] >= width - 20
    assert found["pictures"] == 5
    assert found["scale"] > 0.8  # letters of 9 points keep 10 pixels
