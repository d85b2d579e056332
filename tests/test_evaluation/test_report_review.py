"""Written reports compared with their rows: verdict, form, numbers, trends, invented numbers."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.evaluation.report_review import ReportReview, review_report
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import SYNTHETIC, filler, history_row, removed, write_folder
from trajectories import GAP, dataset_of, random_text, table_of


def one_row(series="24 (0h) -> 20 (2h) -> 12.5 (6h)", description=None, **cells):
    columns = {f"trajectory_{name}": cell for name, cell in cells.items()}
    context = "54-year-old woman, surgical ICU"
    table = table_of([series], clinical_context=context, label_escalation=1, **columns)
    return MIMICtrajectoryDataset(table, description=description or GAP)


@cache
def own():
    return one_row()


@cache
def several():
    values = {"potassium": "3 (0h) -> 6 (1h) -> 4 (3h)", "lactate": "4.5 (0h) -> 1.5 (4h)"}
    return one_row(**values, ph="", glucose="90 (1h)")


TRUE = ReportReview(1, True, 10, 10, 1, 1, 0)
ALL_TRUE = ReportReview(1, True, 20, 20, 3, 3, 0)


def review_of_change(dataset, old, new):
    """Review the true report after one change."""
    assert old in dataset.report(0)
    return review_report(dataset, 0, dataset.report(0).replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "fields"),
    [
        ("", "", {}),
        ("yes", "no", {"verdict": 0}),
        ("first 24", "first 24.0", {}),
        ("first 24", "first 25", {"true": 9, "invented": 1}),
        ("first 24", "first 54", {"true": 9}),  # the context says 54
        ("first 24 mEq/L at 0 h", "first 25 mEq/L at 7 h", {"true": 8, "invented": 2}),
        ("-2 mEq/L an hour", "-3 mEq/L an hour", {"true": 9, "invented": 1}),
        ("Net change -11.5", "Net change 11.5", {"true": 9, "invented": 1}),
        ("falling.", "falling. pH 7.4", {"parses": False, "stated": 11, "invented": 1}),
        ("falling.", "falling. Aged 54.", {"parses": False, "stated": 11}),
        ("falling.", "falling. 5.", {"parses": False, "stated": 11, "invented": 1}),  # not of 12.5
        ("falling.", "falling, range 12.5-24", {"parses": False, "stated": 12}),  # no sign
        ("falling.", "rising.", {"right_trends": 0}),
        ("Net change", "Change", {"parses": False, "true": 8, "right_trends": 0}),
        ("Escalation: yes. ", "", {"verdict": None, "parses": False}),
        ("Escalation: yes", "Escalation: yesterday", {"verdict": None, "parses": False}),
    ],
)
def test_a_report_is_compared_number_by_number(old, new, fields):
    assert review_of_change(own(), old, new) == replace(TRUE, **fields)


@pytest.mark.parametrize(
    ("old", "new", "fields"),
    [
        ("", "", {}),
        ("from 3 at", "from 6 at", {"true": 19}),
        ("at 3 h, rising", "at 3 h, falling", {"right_trends": 2}),
        (" potassium: from", " sodium: from", {"parses": False, "true": 16, "right_trends": 2}),
        ("0 h, last", "0 h. potassium: last", {"parses": False, "true": 12, "right_trends": 2}),
        ("0 h, last", "0 h. It was last", {"parses": False, "true": 14}),
        (". lactate", "\nlactate", {"parses": False}),
        ("first 24 mEq/L at 0 h, ", "", {"parses": False, "stated": 18, "true": 18}),
        ("ph: not measured", "ph: normal", {"parses": False}),
        ("falling. ", "falling. Na: 9 at 0 h. ", {"parses": False, "stated": 22, "invented": 1}),
    ],
)
def test_a_statement_is_that_of_the_label_before_it_in_the_same_sentence(old, new, fields):
    assert review_of_change(several(), old, new) == replace(ALL_TRUE, **fields)


def test_a_number_is_true_once_and_at_its_own_position():
    report = own().report(0)
    swapped = report.replace("first 24", "first 12.5").replace("last 12.5", "last 24")
    assert review_report(own(), 0, swapped) == replace(TRUE, true=8)
    assert review_report(own(), 0, report * 2) == replace(TRUE, parses=False, stated=20)


@pytest.mark.parametrize(
    ("text", "verdict", "stated", "invented"),
    [
        ("", None, 0, 0),
        ("5 5 24", None, 3, 2),
        ("Escalation: no", 0, 0, 0),
        ("The patient. Escalation: yes.", None, 0, 0),
        ("1e999 .", None, 1, 1),
    ],
)
def test_any_text_can_be_reviewed(text, verdict, stated, invented):
    expected = ReportReview(verdict, False, stated, 0, 1, 0, invented)
    assert review_report(own(), 0, text) == expected


def test_a_report_that_breaks_off_states_at_most_one_wrong_number():
    for end in range(0, 200, 7):
        review = review_report(several(), 0, several().report(0)[:end])
        assert review.stated - review.true <= 2  # a value before its time is no statement yet
        assert review.invented <= 1


@pytest.mark.parametrize(
    ("series", "unit", "outcome"),
    [
        ("PaCO2", "mmHg", "Escalation"),
        ("White cells", "10^9/L", "Sepsis (3rd)"),
        ("CO2. total", "mEq. per L", "Outcome: death"),
        ("rising level", "mEq/L", "Death"),
    ],
)
def test_digits_points_and_words_within_names_state_nothing(series, unit, outcome):
    dataset = one_row(description=Description(series=series, unit=unit, outcome=outcome))
    assert review_of_change(dataset, "", "") == TRUE
    wrong = review_of_change(dataset, "first 24", "first 25")
    assert wrong == replace(TRUE, true=9, invented=1)
    other = dataset.report(0).replace(f"{series}: first", "falling level: first")
    review = review_report(dataset, 0, other)
    assert (review.parses, review.true) == (False, 0)  # all is said of another series


NESTED = {
    "names": (dict.fromkeys(("vitamin B1", "vitamin B12"), "7 (1h) -> 8 (3h)"), 3),
    "units": (dict.fromkeys(("PaCO2 [10^3/mL]", "x [1]"), "7 (1h) -> 8 (3h)"), 3),
    "within no time": ({"lactate": "3 (1h) -> 4 (1h)", "ph": "7.2 (1h)"}, 1),  # is no trend
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "kidney", "liver", *NESTED])
def test_true_reports_are_wholly_true(name):
    cells, trends = NESTED.get(name, ({}, None))
    dataset = one_row(**cells)
    if name == "random":
        rng = np.random.default_rng(4)
        dataset = dataset_of([random_text(rng) for _ in range(200)])
    if name in ("kidney", "liver"):
        dataset = SRTRTrajectoryDataset(SYNTHETIC, name)
    for i in range(len(dataset)):
        review = review_report(dataset, i, dataset.report(i))
        assert (review.verdict, review.parses, review.invented) == (dataset.labels[i], True, 0)
        assert (review.true, review.right_trends) == (review.stated, review.trends)
        assert trends in (None, review.trends)


def test_a_row_without_label_is_reviewed_as_well():
    table = table_of(["24 (0h) -> 20 (2h)"], label_escalation=np.nan)
    dataset = MIMICtrajectoryDataset(table, require_labels=False)
    assert review_report(dataset, 0, "Escalation: no. 3").invented == 1


def on_the_list(folder, rows):
    """A liver registration with a history of its own: its true report, and how to review one."""
    cand, history = filler()
    write_folder(folder, [*cand, removed(13, 120)], history + rows)
    dataset = SRTRTrajectoryDataset(folder, "liver")
    i = dataset.ids.tolist().index("1")
    return dataset.prompt(i), dataset.report(i), partial(review_report, dataset, i)


def test_reports_of_a_waiting_list_count_in_days(tmp_path):
    rows = [
        history_row(1, 0, CANHX_STAT_CD=6222, CANHX_SRTR_LAB_MELD=6222, CANHX_BILI=3.2),
        history_row(1, 30, CANHX_STAT_CD=6999, CANHX_SRTR_LAB_MELD=6225),
    ]
    _, report, review = on_the_list(tmp_path, rows)
    wrong = report.replace("yes", "no").replace("MELD 25", "MELD 26").replace("rising", "level")
    assert review(wrong.replace("inactive", "active")) == ReportReview(0, True, 8, 7, 1, 0, 1)
    assert review(report.replace("day 30", "day 720")).invented == 2


def test_days_that_the_prompt_leaves_out_are_not_invented(tmp_path):
    rows = [history_row(1, 7 * k, CANHX_SRTR_LAB_MELD=6240) for k in range(10)]
    prompt, report, review = on_the_list(tmp_path, rows)
    assert "(day 7)" not in prompt  # of the latest eight
    for day, invented in ((7, 0), (8, 1)):
        assert review(report.replace("at day 0", f"at day {day}")).invented == invented
