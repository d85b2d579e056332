"""How report.html is built: its order, colours, tiles and tables; no browser needed."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from cohorts import make_cohort, simulate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import cohort_figures
from medgemma_clinical.evaluation.judgement.verdict import BETTER, FEW, SCALE, UNDECIDED, WORSE
from medgemma_clinical.evaluation.plots import DARK, INK, MODEL, OTHER, PAPER
from medgemma_clinical.evaluation.report import headline
from pages import Page, make_content, write_page

pytestmark = pytest.mark.usefixtures("few_draws")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels, risk, groups = simulate(np.random.default_rng(0), 400, rows_a_patient=2)
    worse = expit(log_odds(risk) + np.random.default_rng(1).normal(size=400))
    cohort = make_cohort((labels, risk, groups), last_value=worse)
    return write_page(cohort, tmp_path_factory.mktemp("page"))


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``. Source: WCAG 2.1."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(luminance(colour) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def test_letters_and_marks_have_contrast_enough_in_light_and_dark(page: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(blocks) == 2
    verdicts = [each.colour for each in SCALE], [each.dark for each in SCALE]
    for block, marks in zip(blocks, verdicts, strict=True):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        inks = [colours[name] for name in ("ink", "soft", "link", "doubt", "model")]
        for ink in (*inks, *marks):
            for ground in ("page", "panel"):
                assert contrast(ink, colours[ground]) >= 4.5, (ink, ground)


def test_pictures_have_contrast_enough_and_follow_a_dark_screen(page: str) -> None:
    dark_page = re.findall(r":root \{.*?--page: (#\w{6})", page, re.S)[1]
    assert DARK[PAPER] == dark_page
    for ink in (INK, MODEL, OTHER):
        assert contrast(ink, PAPER) >= 4.5
        assert contrast(DARK[ink], DARK[PAPER]) >= 4.5
    for _, svg in Page(page).images():
        rules, _, drawn = svg.partition("</style>")
        assert "@media screen and (prefers-color-scheme: dark)" in rules
        assert set(re.findall(r"#[0-9a-f]{6}", drawn)) <= DARK.keys(), "a colour stays light"
        assert "<text" not in drawn.replace('<text style="', ""), "letters without a colour"
        assert all("fill: #" in style for style in re.findall(r'<text style="([^"]+)"', drawn))


def test_headings_descend_by_one_and_the_result_comes_first(page: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(page).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    text = page[page.index("<body>") :]
    order = ["Discrimination", "Calibration", "Usefulness", "Baselines", "Subgroups", "Methods"]
    marks = ["The result in words", 'class="tiles"', *(f"<h2>{name}</h2>" for name in order)]
    places = [text.index(words) for words in [*marks, "<h3>Model card</h3>"]]
    assert places == sorted(places)


def test_tiles_show_on_which_side_of_the_reference_the_interval_lies() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 800)
    sure = headline(cohort_figures(make_cohort((labels, risk, groups)), 0.3, 0, 0))
    assert [tile.verdict for tile in sure] == [BETTER, BETTER, None, BETTER]
    assert f"chance is {labels.mean():.2f}, " in sure[1].comparison
    auroc = sure[0].place
    assert auroc["reference"] == 50 < auroc["low"] < auroc["value"] < auroc["high"] < 100
    odds = log_odds(risk)
    extreme = headline(cohort_figures(make_cohort((labels, expit(4 * odds), groups)), 0.3, 0, 0))
    assert extreme[2].verdict == WORSE
    backwards = headline(cohort_figures(make_cohort((labels, 1 - risk, groups)), 0.3, 0, 0))
    assert [tile.verdict for tile in backwards] == [WORSE] * 4
    assert backwards[2].place["high"] < 0, "beyond the scale"
    mixed = np.random.default_rng(1).permutation(risk)
    chance = headline(cohort_figures(make_cohort((labels, mixed, groups)), 0.3, 0, 0))
    assert chance[0].verdict == UNDECIDED
    few = headline(cohort_figures(make_cohort(simulate(np.random.default_rng(0), 15)), 0.3, 0, 0))
    assert [tile.verdict for tile in few] == [FEW] * 4


def test_tiles_show_the_symbol_of_their_verdict_and_read_its_words_out(page: str) -> None:
    tiles = page[page.index('class="tiles"') : page.index("Square brackets")]
    shown = re.findall(r'<b><span class="mark (\S+)"><span aria-hidden="true">(.)</span>', tiles)
    assert shown == [(BETTER.style, BETTER.symbol)] * 3
    assert tiles.count(f'<span class="unseen">{BETTER.words}:</span>') == 3
    assert '<div class="">Calibration slope <b>' in tiles


def test_an_arrow_stands_where_an_interval_leaves_its_scale(page: str, tmp_path: Path) -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 500)
    backwards = write_page(make_cohort((labels, 1 - risk, groups)), tmp_path, make_content())
    left, right = "&#9664;</text>", "&#9654;</text>"
    assert (page.count(left), page.count(right)) == (0, 0)
    assert (backwards.count(left), backwards.count(right)) == (2, 0), "slope and Brier skill"


def test_a_banner_stands_above_the_result_where_there_is_one(page: str, tmp_path: Path) -> None:
    assert 'class="notice"' not in page
    few = make_cohort(simulate(np.random.default_rng(0), 60))
    banner = write_page(few, tmp_path, make_content(notice="A <random> model."))
    shown = '<p class="notice" role="note">A &lt;random&gt; model.</p>'
    assert banner.index("<h1>") < banner.index(shown) < banner.index("The result in words")


def test_a_first_sentence_stands_at_the_head_of_the_result(page: str, tmp_path: Path) -> None:
    few = make_cohort(simulate(np.random.default_rng(0), 60))
    shown = write_page(few, tmp_path, make_content(first="All <is> stage 1."))
    box = re.findall(r'<section class="verdict.*?</section>', shown, re.S)[0]
    assert re.findall("<p>(.*?)</p>", box, re.S)[0] == "<strong>All &lt;is&gt; stage 1.</strong>"
    assert "<p><strong>" not in page


def test_a_table_that_may_be_cut_says_so_and_others_stack(page: str) -> None:
    assert page.count('class="scroll wide"') == page.count('class="hint"') == 2
    assert page.count('class="stack"') == 4
    wide = page[page.index('class="scroll wide"') :]
    assert wide.index('class="hint"') < wide.index("<table>")
