"""Each page in a headless Chromium: phone and screen, light and dark, and on paper.

Needs ``pip install playwright`` and a Chromium: the system's, or that of ``playwright install``.
"""

import importlib.util
import io
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import pages
import patient_rows
import site_files
import time_rows
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.distributions import describe
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.aggregate import pool_sites
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.monitor_page import monitor_page
from medgemma_clinical.evaluation.monitoring import MonitorRule, monitor
from medgemma_clinical.evaluation.patients import Curves
from medgemma_clinical.evaluation.report import comparison_page, write_report
from medgemma_clinical.evaluation.sites_page import sites_page
from medgemma_clinical.evaluation.tables import COST
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.calibration import calibration_updates
from medgemma_clinical.evaluation.topics.instability import instability, repeat_metrics
from medgemma_clinical.evaluation.updating import evaluate_updates
from test_evaluation.test_monitoring import cohort, development

FIGURES = True
pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = ("chromium", "chromium-browser", "google-chrome")
MAX_HEIGHT = 6000
"""Pixels of a page on a screen of 1280."""


def no_browser(problem):
    """Skip the pages, or fail where the caller promises a browser."""
    leave = pytest.fail if "BROWSER_EXPECTED" in os.environ else pytest.skip
    leave(f"pages not looked at: {problem}")


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        no_browser("playwright is missing (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        own = started.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own)
        if not Path(path).exists():
            no_browser("no Chromium (apt install chromium)")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def report(folder):
    """A report with all sections, many baselines, and long words."""
    rows = pages.make_rows()
    rows = rows.assign(
        **{name: rows["blend"] for name in baselines.meanings(of_times=False) if name not in rows}
    )
    card = {f"Line {k}": "Words of the model card that fill a line or two. " * 2 for k in range(12)}
    static = {"inputs": {"static": [f"static_{k}" for k in range(60)]}}
    pages.write_page(folder, rows, card=card, config=static, list_patients=True)
    return folder / "report.html"


def external(folder):
    """A report of several sites, with an update and a written report."""
    rows, words = pages.make_rows(), "bicarbonate 20 (0h) -> 21 (6h). " * 12
    tried = partial(calibration_updates, tried=evaluate_updates(rows, pages.MODEL, (LABEL,), 0))
    names = np.repeat(["a clinic of a longer name", "b", "c", "d"], 100)
    example = {"prompt": words, "target": words, "text": words.replace("21", "22")}
    results = [*prediction_topics((LABEL,))[-3:], tried]
    pages.write_page(folder, rows, results=results, sites=names, example=example)
    return folder / "report.html"


def repeats(folder):
    """Folds that were drawn three times."""
    rows, rng = pages.make_rows(), np.random.default_rng(0)
    risks = {f"repeat_{k}": rng.uniform(0, 1, len(rows)) for k in range(3)}
    by_repeat = pd.DataFrame({"seed": range(3), "threshold": 0.3, "auroc": 0.7})
    table = rows[["id", "label", "patient"]].assign(**risks)
    results = [repeat_metrics, partial(instability, table=table, by_repeat=by_repeat)]
    pages.write_page(folder, rows, results=results, folds=5, history=[])
    return folder / "report.html"


def comparison(folder):
    path = folder / "compare.html"
    cost = pd.DataFrame(12345.0, [pages.MODEL], [*COST])
    rows = pages.make_rows()
    rows = rows.assign(**{f"runs/of a longer name/{k}": rows["blend"] for k in range(9)})
    table = pd.DataFrame({"Split": ["seed 0"], pages.MODEL: ["0.700 [0.600, 0.800]"]})
    page = comparison_page(
        evaluate(rows, 0, compared=rows.columns[-9:]),
        title="Models",
        sentences=["A sentence."],
        card={"Seed": "0"},
        models=baselines.meanings(of_times=False),
        cost=cost,
        splits=table,
    )
    write_report(path, page)
    return path


def pooled(folder):
    """What sites say together, of long names and with many inputs."""
    names = "a hospital of a longer name", "b", "c", "d"
    contents = map(site_files.make_site, site_files.parts(pages.make_rows(1600)))
    sites = dict(zip(names, contents, strict=True))
    write_report(folder / "sites.html", sites_page(sites, *pool_sites(sites)))
    return folder / "sites.html"


def monitored(folder):
    """A year of changed odds, two sites, and an input that changes its unit."""
    rows = cohort(begin=6, odds_ratio=3)
    rows["site"] = np.where(np.arange(len(rows)) % 2, "A", "B")
    values = pd.DataFrame({"glucose": np.random.default_rng(0).normal(140, 30, len(rows))})
    training = {"static": {}, **describe(pd.concat({"series": values}, axis=1))}
    values[rows["date"] > "2026-10-15"] /= 18
    numbers = {"reference": development(), "rule": MonitorRule(), "seed": 0}
    result = monitor(rows, values, threshold=0.3, training=training, period="month", **numbers)
    page = monitor_page(
        result, "Death after go-live", ["patients without a score: 3"], {"Rule": "-"}
    )
    write_report(folder / "monitor.html", page)
    return folder / "monitor.html"


def patients(folder):
    """Two rows with all that a card can hold, one of them with many series."""
    first = replace(patient_rows.ROW, report="pH 7.2 " * 40, without_soft_prompt=0.45)
    names = tuple(f"series of a longer name {k}" for k in range(8))
    many = replace(
        first,
        features=names,
        units=("mmol/L",) * 8,
        references=((8, 10),) * 8,
        spreads=np.ones(8),
        values=np.random.default_rng(0).normal(9, 1, (3, 8)),
        observations=tuple(", ".join(f"{name} 9 mmol/L" for name in names) for _ in range(3)),
        without=dict.fromkeys(names, 0.3),
    )
    return patient_rows.write_page(folder, first, many)


def times(folder):
    """A report on times to events."""
    rows = time_rows.make_times()
    shown = {
        "targets": time_rows.weighed_targets(rows),
        "config": {**time_rows.OUTCOME.config, "metrics": {}},
    }
    pages.write_page(folder, rows, threshold=0.25, **shown)
    return folder / "report.html"


def times_of_patients(folder):
    """Two rows with the incidences of more events than usual."""
    names = ("death", *(f"an event of a longer name {k}" for k in range(4)))
    events = CompetingEvents(names, (24.0, 72.0))
    incidence = np.outer(np.linspace(0.1, 0.25, 5), [0, 0.5, 0.8])
    curves = Curves(events, np.array([0, 24.0, 72]), incidence)
    row = replace(patient_rows.ROW, curves=curves)
    return patient_rows.write_page(folder, row, replace(row, id="second"))


PAGES = report, external, repeats, comparison, pooled, monitored, patients, times
PAGES += (times_of_patients,)


@pytest.fixture(scope="module", params=PAGES)
def page(request, browser, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("page"))


MEASURE = """() => {
  const root = document.documentElement, all = [...document.querySelectorAll("*")];
  const shown = each => each.getClientRects().length > 0;
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = each => {
    for (let at = each; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const ratio = (colour, each) => {
    const pair = [light(numbers(colour)), light(ground(each))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const ink = each => getComputedStyle(each)[each instanceof SVGElement ? "fill" : "color"];
  const colours = each => ["fill", "stroke"].map(name => getComputedStyle(each)[name])
    .filter(colour => colour !== "none");
  const drawn = [...document.querySelectorAll("svg g > :is(path, use)")]
    .filter(each => colours(each).length > 0 && !each.outerHTML.includes("var(--grid)"));
  const texts = all.filter(each => shown(each) && [...each.childNodes]
    .some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
  const images = [...document.querySelectorAll("svg")];
  const ids = [...document.querySelectorAll("[id]")].map(each => each.id);
  return {
    wide: root.scrollWidth, high: root.scrollHeight, texts: texts.length,
    faint: texts.filter(each => ratio(ink(each), each) < 4.5)
      .map(each => each.outerHTML.slice(0, 99)),
    drawn: drawn.length,
    pale: drawn.filter(each => colours(each).every(colour => ratio(colour, each) < 3))
      .map(each => each.outerHTML.slice(0, 99)),
    unnamed: images.filter(each => each.getAttribute("aria-label").length < 20).length,
    doubled: ids.length - new Set(ids).size,
    verdict: Math.max(0, ...[...document.querySelectorAll("td .mark")]
      .map(each => each.getBoundingClientRect().right)),
    cut: [...document.querySelectorAll(".scroll")]
      .filter(each => each.scrollWidth > each.clientWidth).length,
    scale: Math.min(...images.map(each => each.getScreenCTM().a * 72 / 96)),
    auroc: Math.max(0, ...[...document.querySelectorAll("thead th")]
      .filter(each => each.textContent.startsWith("AUROC"))
      .map(each => each.getBoundingClientRect().right)),
  };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_readable_on_phone_and_screen_in_light_and_dark(browser, page, width, scheme):
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    view, said = context.new_page(), []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(page.as_uri())
    found = view.evaluate(MEASURE)
    context.close()
    assert said == []
    assert found["wide"] == width
    assert found["texts"] > 10
    assert found["faint"] == []
    assert found["drawn"] > 10
    assert found["pale"] == []
    assert (found["unnamed"], found["doubled"]) == (0, 0)
    assert max(found["auroc"], found["verdict"]) <= width, "seen without scrolling"
    assert found["scale"] > (0.66 if width < 1280 else 0.92)  # 12 pixels keep 8, or 11
    assert width < 1280 or found["high"] < MAX_HEIGHT
    assert width < 1280 or not found["cut"], "each column is seen on a screen"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_prints_dark_on_white_on_five_sheets_at_most(browser, page, scheme):
    context = browser.new_context(color_scheme=scheme)
    view = context.new_page()
    view.goto(page.as_uri())
    printed = view.pdf(format="A4")
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.body).color") == "rgb(29, 36, 48)"
    context.close()
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_shows_that_it_scrolls_and_keeps_its_first_column(browser, tmp_path, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 900}, color_scheme=scheme)
    view = context.new_page()
    view.goto(report(tmp_path).as_uri())
    table = view.locator(".scroll", has_text="Verdict")
    first, (shade, ground) = [], ([], [])
    for end in (0, 9999):
        table.evaluate(f"each => each.scrollLeft = {end}")
        first.append(table.locator("th").first.bounding_box()["x"])
        pixels = np.array(Image.open(io.BytesIO(table.screenshot())).convert("L"), dtype=int)
        shade.append(pixels[5, -1])
        ground.append(pixels[5, pixels.shape[1] // 2])
    context.close()
    assert first[0] == first[1]
    assert abs(shade[0] - ground[0]) > 40
    assert abs(shade[1] - ground[1]) < 3
