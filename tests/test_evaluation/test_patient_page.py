"""The page of patients: what it says, what it escapes, its pictures, and its tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgemma_clinical.evaluation.patients.explanation import MOST_CHANGES, Explanation, signed
from medgemma_clinical.evaluation.patients.patient_page import write_patients
from medgemma_clinical.evaluation.patients.report_marks import ELSEWHERE, FOREIGN, RIGHT, Mark
from medgemma_clinical.evaluation.report import PAGE_MARK
from pages import Page
from patient_rows import CONTENT, ROW


def page_of(tmp_path: Path, *rows: Explanation) -> str:
    path = tmp_path / "out.patients.html"
    write_patients(path, rows, CONTENT)
    return path.read_text(encoding="utf-8")


def test_the_page_says_what_it_holds_and_what_its_figures_are_not(tmp_path: Path) -> None:
    source = page_of(tmp_path, ROW)
    text = Page(source).text
    assert PAGE_MARK in source[:2000]
    assert "This page holds patients' data: do not share it." in text
    assert "Only its owner can read the file" in text
    assert "Only the last point of each curve is a prediction that the model was trained to" in text
    assert "It shows no cause" in text
    assert "Not a medical device" in text
    assert "Soft prompt" not in text
    assert "Written report" not in text
    assert "<script" not in source
    assert "http" not in source.replace("http-equiv", "")


def test_what_a_file_holds_stays_text(tmp_path: Path) -> None:
    told = replace(
        ROW, report=(Mark("<b>x</b> "), Mark("24", RIGHT)), facts={"<u>f</u>": "<u>v</u>"}
    )
    page = Page(page_of(tmp_path, told))
    assert not page.open
    assert "<i>7</i> & $x$" in page.text
    assert "<u>f</u> <u>v</u>" in page.text
    assert "<b>x</b> 24" in page.text
    assert not {"i", "u"} & {tag for tag, _ in page.tags}


def test_the_picture_shows_the_measured_series_and_the_risk_and_says_so(tmp_path: Path) -> None:
    ((alt, svg),) = Page(page_of(tmp_path, ROW)).images()
    assert "lactate from 2 to 4.5 mmol/L in 2 values; pH from 7.2 to 7.3 in 2 values" in alt
    assert "10.0 % at hour 0, 40.0 % at hour 48, highest 40.0 %; the threshold is 25.0 %" in alt
    assert "never" not in alt + svg
    for words in ("lactate (mmol/L)", "pH", "dashed: threshold 25.0 %", "hours"):
        assert words in svg
    once = replace(ROW, values=np.where(np.arange(3)[:, None] == 1, ROW.values, np.nan))
    alt = Page(page_of(tmp_path, once)).images()[0][0]
    assert "pH 7.2 at hour 5" in alt


def test_the_same_row_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(tmp_path, ROW) == page_of(tmp_path, ROW)


@pytest.mark.parametrize(
    ("hours", "unit", "last"), [(96, "Hour", "96"), (240, "Day", "10"), (43830, "Year", "5")]
)
def test_one_axis_of_hours_days_or_years(hours: int, unit: str, last: str) -> None:
    row = replace(ROW, hours=np.array([0.0, 5.0, 30.0, hours]))
    table = row.changes()
    assert table.columns[0] == unit
    assert table.iloc[-1, 0] == last


def test_each_observation_has_its_change_in_points() -> None:
    table = ROW.changes()
    assert table["Observed"].tolist()[:3] == list(ROW.observations)
    assert table["Observed"][3] == "no observation until the question is asked"
    assert table["Risk after (%)"].tolist() == ["10.0", "35.0", "30.0", "40.0"]
    assert table["Change (points)"].tolist() == ["\N{EN DASH}", "+25.0", "-5.0", "+10.0"]


def test_a_long_series_shows_its_largest_changes_in_order(tmp_path: Path) -> None:
    count = MOST_CHANGES + 10
    risks = np.full(count, 0.2)
    risks[15:] = 0.6
    times = np.arange(count, dtype=float)
    row = replace(
        ROW,
        features=("lactate",),
        units=("",),
        times=times,
        values=np.ones((count, 1)),
        observations=("lactate 1",) * count,
        hours=times,
        risks=risks,
    )
    table = row.changes()
    assert len(table) == MOST_CHANGES
    assert table["Change (points)"].tolist().count("+40.0") == 1
    hours = table["Hour"].astype(float).tolist()
    assert hours == sorted(hours)
    assert {0.0, 15.0} <= set(hours)
    assert "The largest changes, in order of time" in Page(page_of(tmp_path, row)).text
    assert "The largest changes" not in Page(page_of(tmp_path, ROW)).text


def test_a_share_is_the_change_of_the_log_odds_and_no_cause(tmp_path: Path) -> None:
    table = ROW.shares()
    expected = np.log(0.4 / 0.6) - np.log(0.2 / 0.8)
    assert table.iloc[0].tolist() == ["lactate", f"{expected:+.2f}", "20.0"]
    assert table.iloc[1].tolist() == ["pH", "\N{EN DASH}", "\N{EN DASH}"]
    assert "No cause is shown" in Page(page_of(tmp_path, ROW)).text
    alone = Page(page_of(tmp_path, replace(ROW, without={}))).text
    assert "one series alone: without it there is nothing to score" in alone


def test_the_soft_prompt_is_compared_with_its_absence(tmp_path: Path) -> None:
    text = Page(page_of(tmp_path, replace(ROW, without_soft_prompt=0.45))).text
    assert "scored again with its soft tokens removed. The text stays." in text
    assert "With soft prompt 40.0 % Without 45.0 % Difference -5.0 points" in text


def test_no_change_has_no_minus() -> None:
    assert signed(-0.04, 1) == "+0.0"
    assert signed(-0.06, 1) == "-0.1"


def test_each_number_of_a_report_is_marked_in_words_too(tmp_path: Path) -> None:
    report = (Mark("pH "), Mark("7.2", RIGHT), Mark(" to "), Mark("8", FOREIGN), Mark("."))
    page = Page(page_of(tmp_path, replace(ROW, report=report)))
    counts = "Numbers: 1 right (\N{CHECK MARK}), 0 elsewhere in the row (?), 1 not of this row ("
    assert counts in page.text
    labels = [found["aria-label"] for tag, found in page.tags if "aria-label" in found]
    assert labels[-2:] == ["right", "not of this row"]
    assert "7.2 \N{CHECK MARK} to 8 \N{BALLOT X} ." in page.text
    other = Page(page_of(tmp_path, replace(ROW, report=(Mark("7.3", ELSEWHERE),))))
    assert "7.3 ?" in other.text
    assert [found["aria-label"] for _, found in other.tags if "aria-label" in found][-1] == (
        "elsewhere in the row"
    )
    silent = Page(page_of(tmp_path, replace(ROW, report=(Mark("no."),)))).text
    assert "The report states no number. no." in silent
