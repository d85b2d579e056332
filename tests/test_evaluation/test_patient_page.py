"""The page of patients: what it says, what it escapes, its figures, and its tables."""

import re
from dataclasses import replace

import numpy as np
import pytest

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.patients import Curves, axis_limits, plot_curves, plot_patient
from medgemma_clinical.evaluation.verdicts import percent
from pages import OUTCOME, Page
from patient_rows import ROW, THRESHOLD, write_page

FIGURES = True
REPORT = replace(
    ROW, id="low", probability=0.25, without={}, without_soft_prompt=0.45, report="<b>pH</b> 7.2"
)
REPORT = replace(REPORT, problem="the report breaks off", hours=ROW.times, risks=ROW.risks[:3])


@pytest.mark.slow
def test_the_page_says_what_it_holds_and_what_its_numbers_are_not(tmp_path, assert_approved):
    source = write_page(tmp_path, ROW, REPORT).read_text()
    assert_approved("patients", Page(source).sentences)
    assert source == write_page(tmp_path, ROW, REPORT).read_text()
    links = re.findall(r'<a href="#([\w-]+)"', source)
    assert len(links) == 2
    assert all(f'<section id="{link}">' in source for link in links), "the index leads to each row"


def test_what_a_file_holds_stays_text_and_nothing_is_loaded(tmp_path):
    row = replace(REPORT, static={"<u>f</u>": "<u>v</u>"}, features=("<s>1</s>", "$a$", "never"))
    source = write_page(tmp_path, ROW, row).read_text()
    page = Page(source)
    assert not page.open
    for text in ("<i>7</i> & $x$", "<u>f</u> <u>v</u>", "<b>pH</b> 7.2"):
        assert text in page.text
    assert not {"i", "u", "s", "script"} & {tag for tag, _ in page.tags}
    assert "http" not in re.sub("http-equiv|http://www.w3.org", "", source)


def test_the_figure_shows_the_measured_series_and_the_risk_and_says_so(tmp_path):
    ((alt, svg),) = Page(write_page(tmp_path, ROW).read_text()).images()
    for words in (
        "lactate 2 to 4.5 mmol/L",
        "to 2)",
        "pH 7.2 to 7.3",
        "from 7.35 to 7.45",
        OUTCOME,
    ):
        assert words in alt
    for number in (percent(0.1), percent(0.4), percent(THRESHOLD), "hour 48"):
        assert number in alt
    assert "never" not in alt + svg
    for words in ("lactate mmol/L", "pH", percent(THRESHOLD), "hours"):
        assert words in svg
    lactate, ph, risk = plot_patient(ROW, OUTCOME, THRESHOLD)[0].axes
    assert lactate.lines[0].get_xydata().tolist() == [[0, 2], [5, 4.5]]
    assert ph.lines[0].get_xydata().tolist() == [[5, 7.2], [30, 7.3]]
    assert list(risk.lines[0].get_ydata()) == [pytest.approx(100 * THRESHOLD)] * 2
    assert risk.lines[-1].get_xydata()[-1].tolist() == [48, pytest.approx(40)]
    later = replace(ROW, times=ROW.times + 7, hours=np.array([0, 5, 30, 240.0]) + 7)
    days, _ = plot_patient(later, OUTCOME, THRESHOLD)
    assert days.axes[-1].lines[-1].get_xydata()[-1, 0] == 10, "since the first value"
    assert days.axes[0].lines[0].get_xydata()[0, 0] == 0
    assert later.changes()["Time"].iloc[[0, -1]].tolist() == ["day 0", "day 10"]


def test_incidences_stand_above_each_other_and_are_read_at_the_horizons(tmp_path):
    events = CompetingEvents(("death", "transplant"), (48.0, 240.0), unit="d")
    incidence = np.array([[0, 0.1, 0.2, 0.3], [0, 0.2, 0.3, 0.6]])
    curves = Curves(events, np.array([0, 24.0, 48, 240]), incidence)
    figure, alt = plot_curves(curves)
    first, second = (layer.get_paths()[0].vertices for layer in figure.axes[0].collections)
    assert [first[:, 1].max(), second[:, 1].max()] == pytest.approx([30, 90])
    assert first[:, 0].max() == second[:, 0].max() == 10
    words = "death 20.0\xa0% by 2d, 30.0\xa0% by 10d; transplant 30.0\xa0% by 2d, 60.0\xa0% by 10d"
    assert curves.words == words
    assert words in alt
    page = Page(write_page(tmp_path, replace(ROW, curves=curves), ROW).read_text())
    assert len(page.images()) == 3
    assert " ".join(words.split()) in page.text


@pytest.mark.parametrize("references", [ROW.references, (None, None, (1, 2)), (None,) * 3])
def test_a_reference_range_is_explained_where_it_is_drawn(references, tmp_path):
    row = replace(ROW, references=references)
    drawn = any(axes.patches for axes in plot_patient(row, OUTCOME, THRESHOLD)[0].axes)
    assert drawn == ("Grey" in Page(write_page(tmp_path, row).read_text()).text)
    assert drawn == (references == ROW.references)


@pytest.mark.parametrize(
    ("values", "reference", "spread", "limits"),
    [
        ([139, 141], (135, 145), 2.0, (134, 146)),
        ([3, 4], (None, 1), 0.1, (0.7, 4.3)),
        ([1, 1], None, 5.0, (0, 12)),  # no axis goes below zero for a count or a concentration
        ([-2, -1], None, 5.0, (-7.5, 4.5)),
        ([7, 7], None, np.nan, (6, 8)),
    ],
)
def test_an_axis_shows_reference_range_and_two_standard_deviations(
    values, reference, spread, limits
):
    assert axis_limits(np.array(values), reference, spread) == pytest.approx(limits)


def test_each_observation_has_its_change_and_each_series_its_effect():
    changes = ROW.changes().to_numpy().tolist()
    assert [row[1] for row in changes[:3]] == list(ROW.observations)
    assert [row[3] for row in changes[1:]] == ["+25.0", "-5.0", "+10.0"]
    flat = replace(ROW, risks=np.array([0.1, 0.09999, 0.1, 0.1])).changes()
    assert flat.iloc[1, 3] == "+0.0", "no minus where nothing changes"
    expected = np.log(0.2 / 0.8) - np.log(0.4 / 0.6)
    lactate, ph = ROW.effects().to_numpy().tolist()
    assert lactate == ["lactate", f"{expected:+.2f}", percent(0.2)]
    assert ph == ["pH", "\N{EN DASH}", "\N{EN DASH}"]
