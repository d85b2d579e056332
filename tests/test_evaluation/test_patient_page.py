"""The page of patients: what it says, what it escapes, its pictures, and its tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgemma_clinical.evaluation.patients.explanation import MOST_CHANGES, Explanation, signed
from medgemma_clinical.evaluation.patients.patient_page import write_patients
from medgemma_clinical.evaluation.patients.patient_plot import axis_limits, plot_patient
from medgemma_clinical.evaluation.patients.report_marks import ELSEWHERE, FOREIGN, RIGHT, Mark
from medgemma_clinical.evaluation.report import PAGE_MARK
from pages import OUTCOME, Page
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
    assert "It was written readable by its owner alone." in text
    assert "Only the last point of each curve is a prediction that the model was trained to" in text
    assert "On the sample data risks at early times were less accurate and too extreme." in text
    assert "what the model's risk rests on, and no cause" in text
    assert "removes the times at which this series alone was measured" in text
    assert "the effects do not add up to the whole" in text
    assert "Not a medical device" in text
    assert "oft prompt" not in text
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
    assert "<u>f</u>: <u>v</u>" in page.text
    assert "<b>x</b> 24" in page.text
    assert not {"i", "u"} & {tag for tag, _ in page.tags}


def test_the_picture_shows_the_measured_series_and_the_risk_and_says_so(tmp_path: Path) -> None:
    ((alt, svg),) = Page(page_of(tmp_path, ROW)).images()
    assert "lactate from 2 to 4.5 mmol/L in 2 values (reference up to 2); pH from 7.2 to" in alt
    assert "7.3 in 2 values (reference 7.35 to 7.45). Below" in alt
    assert "10.0 % at hour 0, 40.0 % at hour 48, highest 40.0 %; the alarm threshold is 25.3" in alt
    assert "never" not in alt + svg
    for words in (
        "lactate",
        "mmol/L",
        "pH",
        "dashed: threshold",
        "25.3\N{NO-BREAK SPACE}%",
        "hours",
    ):
        assert words in svg
    once = replace(ROW, values=np.where(np.arange(3)[:, None] == 1, ROW.values, np.nan))
    alt = Page(page_of(tmp_path, once)).images()[0][0]
    assert "pH 7.2 at hour 5" in alt


def test_the_caption_says_what_axes_span_and_what_is_grey(tmp_path: Path) -> None:
    axes, grey = "a change within the usual spread looks small", "Grey: reference range"
    unknown = replace(ROW, spreads=np.full(3, np.nan), references=(None, None, (1.0, 2.0)))
    for row, said in ((ROW, True), (unknown, False)):
        text = Page(page_of(tmp_path, row)).text
        assert (axes in text) == (grey in text) == said


@pytest.mark.parametrize(
    ("values", "reference", "spread", "limits"),
    [
        ([139, 141], None, 5.0, (134, 146)),  # a small change looks small
        ([120, 150], None, 5.0, (117, 153)),  # a large one fills the panel
        ([139, 141], (135, 145), 2.0, (134, 146)),
        ([3, 4], (None, 1), 0.1, (0.7, 4.3)),
        ([1, 1], None, 5.0, (0, 12)),  # no axis goes below zero for a count or a concentration
        ([-2, -1], None, 5.0, (-7.5, 4.5)),
        ([7, 7], None, np.nan, (6, 8)),
        ([70, 70], None, np.nan, (63, 77)),
        ([0, 0], None, np.nan, (0, 2)),
    ],
)
def test_an_axis_shows_reference_range_and_two_standard_deviations(
    values: list[float],
    reference: tuple[float | None, float | None] | None,
    spread: float,
    limits: tuple[float, float],
) -> None:
    assert axis_limits(np.array(values), reference, spread) == pytest.approx(limits)


def test_states_and_counts_have_whole_ticks_and_points_at_an_edge_are_whole() -> None:
    values = np.array([[0.0, 7.0, 1.0], [1.0, 7.2, 1.0], [1.0, 7.4, 1.0]])
    row = replace(ROW, values=values, references=(None,) * 3, spreads=np.array([0.5, 0.1, np.nan]))
    figure, _ = plot_patient(row, OUTCOME, 0.2)
    state, measured, constant, _ = figure.axes
    bottom, _ = state.get_ylim()
    assert bottom == 0, "where the first point lies"
    assert {0.0, 1.0} <= {*state.get_yticks()}
    assert not any(tick % 1 for axes in (state, constant) for tick in axes.get_yticks())
    assert {0.0, 1.0} <= {*constant.get_yticks()}
    whole = replace(row, values=np.array([[28.0], [21], [21]]) * np.ones(3), spreads=np.full(3, 3))
    axes = plot_patient(whole, OUTCOME, 0.2)[0].axes[0]
    assert sum(20.3 <= tick <= 28.7 for tick in axes.get_yticks()) == 2, "one tick is no scale"
    assert any(tick % 1 for tick in measured.get_yticks())
    points = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
    assert len(points) == 4
    assert not any(line.get_clip_on() for line in points)


def test_a_long_name_keeps_both_ends_in_the_picture(tmp_path: Path) -> None:
    row = replace(ROW, features=("arterial pressure of oxygen, left", "pH", "never"))
    ((alt, svg),) = Page(page_of(tmp_path, row)).images()
    assert "arterial pressure of oxygen, left from 2" in alt
    assert "arterial p\N{HORIZONTAL ELLIPSIS}gen, left" in svg


def test_the_page_says_which_rows_are_alarms_and_of_none_that_the_event_will_come(
    tmp_path: Path,
) -> None:
    low = replace(ROW, id="low", probability=0.25, hours=ROW.times, risks=ROW.risks[:3])
    low = replace(low, in_training="no")
    text = Page(page_of(tmp_path, ROW, low)).text
    assert "Row Risk Alarm threshold of 25.3 % Trained the model" in text
    assert "$x$ 40.0 % alarm not known low 25.0 % no alarm no" in text
    assert "Risk 40.0 % , at or above the alarm threshold of 25.3 %: alarm." in text
    assert "Risk 25.0 % , below the alarm threshold of 25.3 %: no alarm." in text
    assert "predicted" not in text
    assert text.count("the last at hour 30. The question is asked at hour 48.") == 1


def test_the_threshold_has_one_rounding(tmp_path: Path) -> None:
    write_patients(tmp_path / "page.html", [ROW], replace(CONTENT, threshold=0.07084))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    ((alt, svg),) = page.images()
    assert re.findall(r"\b(7\.\d*)\s%", page.text + alt + svg) == ["7.1"] * 4


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


def test_an_effect_is_the_change_of_the_log_odds_and_no_cause(tmp_path: Path) -> None:
    table = ROW.effects()
    expected = np.log(0.2 / 0.8) - np.log(0.4 / 0.6)
    assert table.iloc[0].tolist() == ["lactate", f"{expected:+.2f}", "20.0"]
    assert table.iloc[1].tolist() == ["pH", "\N{EN DASH}", "\N{EN DASH}"]
    text = Page(page_of(tmp_path, ROW)).text
    assert "Effect of leaving a series out No cause is shown." in text
    assert "Change when left out (log-odds)" in text
    alone = Page(page_of(tmp_path, replace(ROW, without={}))).text
    assert "one series alone: without it there is nothing to score" in alone


def test_the_soft_prompt_is_compared_with_its_absence(tmp_path: Path) -> None:
    text = Page(page_of(tmp_path, replace(ROW, without_soft_prompt=0.45))).text
    assert "to score the row again without its soft tokens. The text stays." in text
    assert "Soft prompt Without it the risk is 45.0 % instead of 40.0 %." in text


def test_a_language_model_of_weight_zero_is_named_first_and_no_soft_prompt(tmp_path: Path) -> None:
    path, sentence = tmp_path / "out.patients.html", "These are the predictions of stage 1."
    told = replace(CONTENT, overlap="They trained.", unused=sentence, warning="It is random.")
    write_patients(path, [ROW, ROW], told)
    text = Page(path.read_text(encoding="utf-8")).text
    assert f"alone. They trained. {sentence} It is random. Shown are all." in text
    assert text.count(sentence) == 1, "in the box alone"
    assert "oft prompt" not in text


def test_no_change_has_no_minus() -> None:
    assert signed(-0.04, 1) == "+0.0"
    assert signed(-0.06, 1) == "-0.1"


def test_the_problem_of_a_report_stands_in_bold_above_its_text(tmp_path: Path) -> None:
    told = replace(ROW, report=(Mark("no."),), problem="the report breaks off: do not rely")
    source = page_of(tmp_path, told)
    assert "<b>The report breaks off: do not rely.</b>" in source
    text = Page(source).text
    assert "Written report The report breaks off: do not rely. The report states no n" in text
    assert "<b>.</b>" not in page_of(tmp_path, replace(ROW, report=(Mark("no."),)))


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
    both = replace(ROW, report=report), replace(ROW, report=report)
    assert Page(page_of(tmp_path, *both)).text.count("but of another series or time") == 1
    assert "Behind each number" not in Page(page_of(tmp_path, ROW)).text
    silent = Page(page_of(tmp_path, replace(ROW, report=(Mark("no."),)))).text
    assert "The report states no number. no." in silent
