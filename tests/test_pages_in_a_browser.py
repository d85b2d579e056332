"""Each page in a headless Chromium: phone and screen, light and dark, and on paper.

Needs ``pip install playwright`` and a Chromium: the system's, or that of ``playwright install``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

import medgemma_trainer as trainer
import patient_rows
from cohorts import make_cohort, simulate
from medgemma_clinical.commands import demo
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.comparison import compare_models, write_comparison
from medgemma_clinical.evaluation.report_tables import WRITTEN
from pages import make_content, write_page
from patient_rows import ROW

NAMES = ("chromium", "chromium-browser", "google-chrome")
LONGEST, CARD = 5000, 800
"""Pixels of a page's height, and of a patient's, on a screen of 1280."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("pages not looked at: playwright is missing (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        own = started.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own)
        if not Path(path).exists():
            pytest.skip("pages not looked at: no Chromium (apt install chromium)")
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def full_report(folder: Path) -> Path:
    """A report with all sections of a stage, and with points on its curves."""
    labels, risk, groups = simulate(np.random.default_rng(0), 1200, rows_a_patient=2)
    rng = np.random.default_rng(1)
    names = ("last value", "facts alone", "logistic regression", "gradient boosting", "blend")
    others = {name: expit(log_odds(risk) + rng.normal(size=1200)) for name in names}
    cohort = replace(
        make_cohort((labels, risk, groups), **others),
        uncalibrated=expit(2 * log_odds(risk)),
        subgroups=pd.DataFrame(
            {
                name: pd.Categorical(rng.choice(levels, 1200), levels, ordered=True)
                for name, levels in {
                    "age": ["18 to 39", "40 to 59", "60 to 74", "75 or older"],
                    "sex": ["woman", "man"],
                }.items()
            }
        ),
    )
    parts = {"Source": "file.csv", "Facts": ", ".join(f"fact {k}" for k in range(20))}
    share = Estimate(0.5, 0.4, 0.6).to_json()
    content = make_content(
        notice="The language model of this run is random.",
        data=parts,
        card={
            f"Line {k}": "Words of the model card that fill a line or two. " * 2 for k in range(16)
        },
        split=pd.DataFrame({"Part": ["training"], "Rows": ["80"], "Patients": ["80"]}),
        flow=pd.DataFrame({"Left out": ["no label"], "Rows": ["3"], "Rows left": ["80"]}),
        reports={
            "reports": 40,
            "numbers_stated": 9,
            **{key: share for key, *_ in WRITTEN if key.endswith("share")},
        },
    )
    text = (
        "In-hospital death: no. " + "potassium: from 4.4 at 10.62 h to 4 at 33.12 h, falling. " * 8
    )
    line = {"parses": True, "probability": 0.5, "text": text, "target": text + "."}
    line |= dict.fromkeys(("named", "abnormal", "right_trends", "trends", "invented"), 1)
    reports = [line | {"id": str(k), "quality": k / 1200} for k in range(1200)]
    write_page(cohort, folder, content, fewest=11, list_patients=True, reports=reports)
    return folder / "report.html"


def comparison(folder: Path) -> Path:
    labels, risk, groups = simulate(np.random.default_rng(0), 300)
    ids = np.arange(300).astype(str)
    table = pd.DataFrame({"id": ids, "patient": groups, "label": labels, "stage 1": risk})
    table["logistic regression with facts"] = expit(log_odds(risk) / 2)
    results = compare_models([table], "stage 1", seed=0, fewest=0)
    write_comparison(
        folder, "both", results, "stage 1", title="Two models", sentences=[], card={"Seed": "0"}
    )
    return folder / "both.html"


def patients(folder: Path) -> Path:
    """Two rows with all that a card can hold, one of them with many series."""
    first = replace(ROW, report="pH 7.2 to 7.3.", without_soft_prompt=0.45)
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


def demo_with_patients(folder: Path) -> Path:
    """The page of stage 3 after a short demo with ``--report_patients``."""
    short = {"max_samples": 200, "trajectory_epochs": 2, "epochs": 1, "report_patients": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **short})
        assert trainer.main(["--demo", "--output_dir", str(folder), "--log_file", "none"]) == 0
    return folder / "generative" / "report.html"


def twelve_patients(folder: Path) -> Path:
    """Twelve rows of nine series and a soft prompt."""
    numbers = np.random.default_rng(0)
    names = ("serum bicarbonate", *(f"series {k}" for k in range(8)))
    row = replace(
        ROW,
        features=names,
        units=("mmol/L",) * 9,
        times=np.arange(40.0),
        values=numbers.normal(9, 1, (40, 9)),
        references=((8, 10),) * 9,
        spreads=np.ones(9),
        observations=(", ".join(f"{name} 9 mmol/L" for name in names),) * 40,
        hours=np.arange(40.0),
        risks=numbers.uniform(0, 1, 40),
        statics={
            "words and numbers of the context": "54-year, 88 kg, icu, medical, woman",
            "context that the language model reads": "54-year-old woman, medical ICU, 88 kg",
        },
        without=dict.fromkeys(names, 0.3),
        without_soft_prompt=0.45,
    )
    return patient_rows.write_page(folder, *(replace(row, id=f"patient {k}") for k in range(12)))


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "report": full_report,
    "stage 3": demo_with_patients,
    "comparison": comparison,
    "patients": patients,
}


@pytest.fixture(scope="module", params=BUILDERS)
def page(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 100)
        return BUILDERS[request.param](tmp_path_factory.mktemp(request.param))


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
  const ratio = each => {
    const pair = [light(numbers(getComputedStyle(each).color)), light(ground(each))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const texts = all.filter(each => shown(each) && [...each.childNodes]
    .some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
  const images = [...document.querySelectorAll("img")];
  const hint = each => each.querySelector(".hint");
  const cut = [...document.querySelectorAll(".scroll")]
    .filter(each => each.scrollWidth > each.clientWidth + 1);
  return {
    wide: root.scrollWidth, seen: root.clientWidth, high: root.scrollHeight,
    faint: texts.filter(each => ratio(each) < 4.5).map(each => each.outerHTML.slice(0, 99)),
    texts: texts.length,
    unhinted: cut.filter(each => !hint(each) || !shown(hint(each)))
      .map(each => each.getAttribute("aria-label")),
    broken: images.filter(each => each.naturalWidth === 0).length,
    heights: images.map(each => Math.round(each.getBoundingClientRect().height)),
    scale: Math.min(...images.map(each => each.getBoundingClientRect().width / each.naturalWidth)),
    unnamed: images.filter(each => each.alt.length < 20).length + [...document
      .querySelectorAll("svg")].filter(each => !each.getAttribute("aria-label")).length,
  };
}"""


def look(browser: Any, page: Path, width: int, scheme: str) -> tuple[dict[str, Any], list[str]]:
    """Return what a page measures, and what the console says."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    view, said = context.new_page(), []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(page.as_uri())
    measured: dict[str, Any] = view.evaluate(MEASURE)
    context.close()
    return measured, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_readable_on_phone_and_screen_in_light_and_dark(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    found, said = look(browser, page, width, scheme)
    assert said == []
    assert found["wide"] <= found["seen"] == width
    assert found["unhinted"] == []
    assert found["texts"] > 10
    assert found["faint"] == []
    assert found["broken"] == found["unnamed"] == 0
    assert found["scale"] > 0.66  # letters of 9 points, 12 pixels, keep 8
    if page.name == "report.html":
        assert len(found["heights"]) == 5
        assert len(set(found["heights"])) == 1
    if width == 1280:
        assert found["high"] < LONGEST


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_prints_dark_on_white_on_four_sheets_at_most(
    browser: Any, page: Path, scheme: str
) -> None:
    context = browser.new_context(color_scheme=scheme)
    view = context.new_page()
    view.goto(page.as_uri())
    printed = view.pdf(format="A4")
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.body).color") == "rgb(29, 36, 48)"
    context.close()
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 4


def test_twelve_patients_print_on_seven_sheets_and_each_is_seen_at_once(
    browser: Any, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    view = context.new_page()
    view.goto(twelve_patients(tmp_path).as_uri())
    heights = view.eval_on_selector_all(
        "section.patient", "all => all.map(each => each.getBoundingClientRect().height)"
    )
    assert len(heights) == 12
    assert max(heights) < CARD
    printed = view.pdf(format="A4")
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.querySelector('.patient')).breakInside") == (
        "avoid"
    )
    context.close()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 7
