"""Tests of the texts of a DKA file: prompt, report, how true a report is."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.reports.score import ReportScore
from medgemma_clinical.data.texts import PromptOptions
from trajectories import LABEL, SERIES, dataset_of, one_series, random_text

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")

BICARBONATE = Description(
    series="Serum bicarbonate",
    unit="mmol/L",
    question="Will the patient die in hospital?",
    outcome="In-hospital death",
)


def described(
    series: str, label: float, description: Description, context: str = ""
) -> MIMICtrajectoryDataset:
    table = pd.DataFrame({SERIES: [series], LABEL: [label], "clinical_context": [context]})
    return MIMICtrajectoryDataset(table, description=description, require_labels=False)


def test_texts_of_the_users_example_are_these() -> None:
    dataset = described("24 (0h) -> 20 (2h) -> 16 (4h) -> 12.5 (6h)", 0, Description())
    assert dataset.prompt(0) == (
        "Anion gap (mEq/L): 24 (0h) -> 20 (2h) -> 16 (4h) -> 12.5 (6h). "
        "Will care have to be escalated?\n"
    )
    assert dataset.report(0) == (
        "Escalation: no. Anion gap: first 24 mEq/L at 0 h, last 12.5 mEq/L at 6 h, "
        "lowest 12.5 mEq/L at 6 h, highest 24 mEq/L at 0 h. "
        "Net change -11.5 mEq/L, -2 mEq/L an hour: falling."
    )


def test_texts_take_context_and_clinical_words_from_the_description() -> None:
    dataset = described("26 (1.5h) -> 28 (5.5h)", 1, BICARBONATE, "54-year-old woman.")
    assert dataset.prompt(0) == (
        "54-year-old woman. Serum bicarbonate (mmol/L): 26 (1.5h) -> 28 (5.5h). "
        "Will the patient die in hospital?\n"
    )
    assert dataset.report(0) == (
        "In-hospital death: yes. Serum bicarbonate: first 26 mmol/L at 1.5 h, last 28 mmol/L at "
        "5.5 h, lowest 26 mmol/L at 1.5 h, highest 28 mmol/L at 5.5 h. "
        "Net change 2 mmol/L, 0.5 mmol/L an hour: rising."
    )


def test_every_number_in_the_texts_is_the_patients_own() -> None:
    rng = np.random.default_rng(3)
    texts = [random_text(rng) for _ in range(200)]
    dataset = dataset_of(texts)
    for i in range(200):
        times, values = one_series(dataset, i)
        numbers = [float(n) for n in NUMBER.findall(dataset.prompt(i))]
        assert numbers == [n for pair in zip(values, times, strict=True) for n in pair]
        low, high = values.index(min(values)), values.index(max(values))
        places = [(values[k], times[k]) for k in (0, -1, low, high)]
        change = values[-1] - values[0]
        stated = [float(n) for n in NUMBER.findall(dataset.report(i))]
        assert stated[:8] == [n for pair in places for n in pair]
        assert stated[8] == pytest.approx(change, abs=1e-6)
        assert len(stated) <= 10


def test_a_writer_finds_what_it_would_have_to_compute_in_its_prompt() -> None:
    rng = np.random.default_rng(4)
    dataset = dataset_of([random_text(rng) for _ in range(100)])
    computing = PromptOptions(computed=True)
    shortened = PromptOptions(computed=True, latest=1)
    for i in range(100):
        computed = dataset.report(i)[dataset.report(i).index("lowest") :]
        assert computed in dataset.prompt(i, computing)
        assert computed in dataset.prompt(i, shortened)  # of the whole series, not of its end


@pytest.mark.parametrize(
    ("last", "rate"), [("20.1", "0.001"), ("24.003", "0.04"), ("18.7", "-0.01"), ("1000", "10")]
)
def test_the_rate_has_one_significant_figure_however_small(last: str, rate: str) -> None:
    dataset = described(f"20 (0h) -> {last} (100h)", 0, Description())
    assert f", {rate} mEq/L an hour: " in dataset.report(0)


@pytest.mark.parametrize(
    ("series", "word"),
    [
        ("1 (0h) -> 2 (1h)", "rising"),
        ("2 (0h) -> 3 (1h) -> 1 (2h)", "falling"),
        ("2 (0h) -> 9 (1h) -> 2 (2h)", "level"),
        ("2 (0h)", "level"),
        ("5 (1h) -> 3 (1h)", "falling"),
    ],
)
def test_the_direction_is_that_of_last_to_first(series: str, word: str) -> None:
    report = described(series, 0, Description()).report(0)
    found = [w for w in ("rising", "falling", "level") if w in report]
    assert found == [word]
    assert "nan" not in report
    assert "inf" not in report


def test_no_report_is_made_up_where_the_label_is_unknown() -> None:
    dataset = described("24 (0h)", math.nan, Description())
    assert dataset.prompt(0)
    with pytest.raises(ValueError, match="series 0"):
        dataset.report(0)


# --------------------------------------------------------------------------- scores of reports

OWN = described("24 (0h) -> 20 (2h) -> 12.5 (6h)", 1, Description())


@pytest.mark.parametrize(
    ("change", "score"),
    [
        (("", ""), ReportScore(verdict=1, parses=True, stated=10, true=10)),
        (("yes", "no"), ReportScore(verdict=0, parses=True, stated=10, true=10)),
        (("first 24", "first 25"), ReportScore(verdict=1, parses=True, stated=10, true=9)),
        (("first 24", "first 24.0"), ReportScore(verdict=1, parses=True, stated=10, true=10)),
        (("12.5 mEq/L at 6 h", "12.5 mEq/L at 7 h"), ReportScore(1, True, 10, 8)),
        (("-2 mEq/L an hour", "-3 mEq/L an hour"), ReportScore(1, True, 10, 9)),
        (("Net change -11.5", "Net change 11.5"), ReportScore(1, True, 10, 9)),
        (("falling.", "falling. pH 7.4"), ReportScore(1, False, 11, 10)),
        (("Escalation: yes. ", ""), ReportScore(None, False, 10, 10)),
        (("Escalation: yes", "Escalation: yesterday"), ReportScore(None, False, 10, 10)),
    ],
    ids=lambda value: repr(value[1]) if isinstance(value, tuple) else "",
)
def test_a_report_is_scored_number_by_number(change: tuple[str, str], score: ReportScore) -> None:
    assert OWN.score_report(0, OWN.report(0).replace(*change)) == score


def test_true_numbers_at_the_wrong_place_do_not_count() -> None:
    swapped = OWN.report(0).replace("first 24", "first 12.5").replace("last 12.5", "last 24")
    assert OWN.score_report(0, swapped).true == 8


def test_a_number_repeated_is_true_once() -> None:
    report = OWN.report(0)
    score = OWN.score_report(0, report + report)
    assert (score.parses, score.stated, score.true) == (False, 20, 10)


@pytest.mark.parametrize(
    ("text", "verdict", "stated"),
    [
        ("", None, 0),
        ("5 5 5", None, 3),
        ("Escalation: yes", 1, 0),
        ("Escalation: no", 0, 0),
        ("The patient. Escalation: yes.", None, 0),
    ],
)
def test_any_text_can_be_scored(text: str, verdict: int | None, stated: int) -> None:
    assert OWN.score_report(0, text) == ReportScore(verdict, False, stated, 0)


@pytest.mark.parametrize(
    ("series", "unit", "outcome"),
    [
        ("PaCO2", "mmHg", "Escalation"),
        ("eGFR", "mL/min/1.73 m2", "28-day death"),
        ("White cells", "10^9/L", "Sepsis (3rd)"),
        ("Base excess, arterial", "mmol/L", "Death"),
        ("K+: serum", "mEq. per L", "Outcome: death"),
    ],
)
def test_digits_and_signs_within_names_and_units_are_no_stated_numbers(
    series: str, unit: str, outcome: str
) -> None:
    description = Description(series=series, unit=unit, outcome=outcome)
    dataset = described("40 (0h) -> 38.5 (3h)", 1, description)
    report = dataset.report(0)
    assert dataset.score_report(0, report) == ReportScore(1, True, 10, 10)
    wrong = report.replace("first 40 ", "first 41 ")
    assert dataset.score_report(0, wrong) == ReportScore(1, True, 10, 9)


def test_the_own_reports_of_random_series_are_wholly_true() -> None:
    rng = np.random.default_rng(4)
    dataset = dataset_of([random_text(rng) for _ in range(200)])
    for i in range(200):
        score = dataset.score_report(i, dataset.report(i))
        assert score.parses
        assert score.verdict == i % 2
        assert score.stated == score.true > 8


def test_within_no_time_there_is_no_rate() -> None:
    table = pd.DataFrame({"clinical_trajectory": ["24 (5h) -> 20 (5h)"], "label_escalation": [0]})
    dataset = MIMICtrajectoryDataset(table)
    report = dataset.report(0)
    assert report.endswith("Net change -4 mEq/L: falling.")
    score = dataset.score_report(0, report)
    assert score.parses
    assert (score.stated, score.true) == (9, 9)


def test_words_within_the_name_of_a_series_are_not_free() -> None:
    """The direction may be wrong in a report of the right form; the name of a series may not."""
    dataset = described("24 (0h) -> 20 (2h)", 1, Description(series="rising level"))
    report = dataset.report(0)
    assert dataset.score_report(0, report).parses
    assert dataset.score_report(0, report.replace(": falling.", ": level.")).parses
    renamed = report.replace("rising level: first", "falling level: first")
    score = dataset.score_report(0, renamed)
    assert not score.parses
    assert score.true == 0  # all is said of another series


def test_options_of_the_prompt_leave_the_data_set_as_it_is() -> None:
    context = "54-year-old woman"
    dataset = described("24 (0h) -> 20 (2h) -> 16 (4h)", 1, Description(), context)
    whole = dataset.prompt(0)
    assert dataset.prompt(0, PromptOptions(latest=2)) == whole.replace("24 (0h) -> ", "")
    assert dataset.prompt(0, PromptOptions(latest=9)) == whole
    assert dataset.prompt(0, PromptOptions(context=False)) == whole.removeprefix(f"{context}. ")
    assert dataset.prompt(0) == whole
