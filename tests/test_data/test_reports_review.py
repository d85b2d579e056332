"""Written reports judged by their rows: abnormal values, trends, inventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.reports.review import abnormal_values, review_report
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import filler, history_row, removed, write_folder

RANGES = Description(
    reference=(3.0, 12.0),
    references={"potassium": (3.5, 5.0), "lactate": (None, 2.0), "ph": (7.35, None)},
)


def dataset_of(description: Description = RANGES, **cells: str) -> MIMICtrajectoryDataset:
    """A row of an anion gap of 24, 20 and 12.5, and of further series."""
    table = pd.DataFrame(
        {
            "clinical_trajectory": ["24 (0h) -> 20 (2h) -> 12.5 (6h)"],
            "label_escalation": [1],
            "clinical_context": ["54-year-old woman, surgical ICU"],
            **{f"trajectory_{name}": [cell] for name, cell in cells.items()},
        }
    )
    return MIMICtrajectoryDataset(table, description=description)


ALL = dataset_of(
    potassium="3 (0h) -> 6 (1h) -> 4 (3h)", lactate="4.5 (0h) -> 1.5 (4h)", ph="", glucose="90 (1h)"
)
TRUE = ALL.report(0)


def test_the_most_abnormal_value_of_each_side_is_to_be_named() -> None:
    assert abnormal_values(ALL, 0) == [
        {("Anion gap", "24", "0")},
        {("potassium", "3", "0")},
        {("potassium", "6", "1")},
        {("lactate", "4.5", "0")},
    ]


def test_an_abnormal_value_may_be_named_at_any_of_its_times() -> None:
    dataset = dataset_of(lactate="4 (0h) -> 5 (1h) -> 5 (3h)")
    assert {("lactate", "5", "1"), ("lactate", "5", "3")} in abnormal_values(dataset, 0)
    assert review_report(dataset, 0, dataset.report(0)).named == 2


@pytest.mark.parametrize(
    ("reference", "count"),
    [((3.0, 24.0), 0), ((12.5, 24.0), 0), ((13.0, None), 1), ((None, 23.9), 1), (None, 0)],
)
def test_a_value_at_the_end_of_the_range_is_not_abnormal(reference: Any, count: int) -> None:
    assert len(abnormal_values(dataset_of(Description(reference=reference)), 0)) == count


def test_the_true_report_is_right_in_all_that_it_states() -> None:
    review = review_report(ALL, 0, TRUE)
    assert (review.abnormal, review.named, review.nameable) == (4, 3, 3)  # 6 is neither first, last
    assert (review.trends, review.right_trends, review.invented) == (3, 3, 0)
    assert review.expected == review.score.stated == review.score.true
    assert review.quality == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("first 24 mEq/L at 0 h", "first 24 mEq/L at 1 h"), 3),  # it is also the highest
        (("24 mEq/L at 0 h", "24 mEq/L at 1 h"), 2),
        (("24 mEq/L at 0 h", "23 mEq/L at 0 h"), 2),
        (("lactate: from 4.5 at 0 h", "lactate: from 4.5 at 4 h"), 2),
        (("from 3 at 0 h to 4 at 3 h", "from 6 at 1 h to 4 at 3 h"), 3),
        ((" potassium", " sodium"), 2),
        (("lactate: from 4.5 at 0 h", "lactate: from 4.50 at 0.0 h"), 3),
    ],
)
def test_an_abnormal_value_is_named_by_its_series_value_and_time(
    change: tuple[str, str], named: int
) -> None:
    text = TRUE.replace(*change)
    assert text != TRUE
    assert review_report(ALL, 0, text).named == named


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (("an hour: falling", "an hour: rising"), 2),
        (("last 12.5 mEq/L at 6 h", "last 12.5 mEq/L at 60 h"), 2),
        (("first 24 mEq/L at 0 h", "first 24 mEq/L at 1 h"), 2),
        (("last 12.5", "last 12"), 3),  # the value is wrong, the trend is not
        (("lowest 12.5 mEq/L at 6 h", "lowest 12.5 mEq/L at 2 h"), 3),
        (("4 at 3 h, rising", "4 at 3 h, falling"), 2),
        (("4 at 3 h, rising", "4 at 2 h, rising"), 2),
        (("4 at 3 h, rising", "4 at 3.0 h, rising"), 3),
        (("mEq/L at 0 h, last", "mEq/L at 0 h. potassium: last"), 2),  # that of another series
        (("Net change", "Change"), 2),
    ],
)
def test_a_trend_is_right_in_direction_and_duration(change: tuple[str, str], right: int) -> None:
    text = TRUE.replace(*change)
    assert text != TRUE
    assert review_report(ALL, 0, text).right_trends == right


def test_within_no_time_there_is_no_trend() -> None:
    dataset = dataset_of(lactate="3 (1h) -> 4 (1h)", ph="7.2 (1h)")
    review = review_report(dataset, 0, dataset.report(0))
    assert (review.trends, review.right_trends) == (1, 1)


@pytest.mark.parametrize(
    ("change", "invented"),
    [
        (("", ""), 0),
        (("first 24", "first 25"), 1),
        (("first 24 mEq/L at 0 h", "first 20 mEq/L at 2 h"), 0),  # wrong, but of the row
        (("first 24 mEq/L at 0 h", "first 25 mEq/L at 7 h"), 2),
        (("first 24", "first 24.00"), 0),
        (("first 24", "first 54"), 0),  # the context says so, in another place
        (("an hour: falling", "an hour: falling, last 9 mEq/L at 7 h"), 1),
        (("falling. ", "falling. The patient smokes. "), 1),
        (("falling. ", "falling. 5. "), 1),  # that of 12.5 is no number of the row
        (("falling. ", "falling. 54-year-old woman. "), 0),  # the context says so
        (("falling. ", "falling. Sodium: from 120 at 0 h to 130 at 4 h, rising. "), 1),
        (("ph: not measured", "ph: from 7.1 at 0 h to 7.3 at 4 h, rising"), 1),
        (("ph: not measured. ", ""), 0),  # what is left out is not invented
        ((". lactate", "\nlactate"), 0),  # another form of what the row holds
        (("yes", "no"), 0),  # the verdict is no fact of the row
        (("Escalation: yes", "Escalation: certain"), 1),
    ],
)
def test_what_the_row_does_not_hold_is_invented(change: tuple[str, str], invented: int) -> None:
    assert change[0] in TRUE
    review = review_report(ALL, 0, TRUE.replace(*change, 1))
    assert review.invented == invented


@pytest.mark.parametrize("end", range(0, len(TRUE), 7))
def test_a_report_that_breaks_off_invents_no_more_than_half_a_statement(end: int) -> None:
    assert review_report(ALL, 0, TRUE[:end]).invented <= 1


@pytest.mark.parametrize(
    ("text", "invented"), [("", 0), ("5 5 5", 1), ("I cannot tell, really.", 2), ("24", 0)]
)
def test_any_text_can_be_judged(text: str, invented: int) -> None:
    review = review_report(ALL, 0, text)
    assert (review.named, review.right_trends, review.quality) == (0, 0, 0)
    assert review.invented == invented


def test_what_is_left_out_lowers_the_quality() -> None:
    short = TRUE[: TRUE.index(", lowest")]
    review = review_report(ALL, 0, short)
    assert review.score.stated == review.score.true == 4
    assert review.quality == pytest.approx((4 + 0 + 1) / (20 + 3 + 3))


def test_the_quality_falls_with_each_fault() -> None:
    faults = [
        ("4 at 3 h, rising", "4 at 3 h, falling"),
        ("lactate: from 4.5", "lactate: from 4"),
        ("falling.", "falling. The patient smokes."),
        (". glucose: only 90 at 1 h", ""),
    ]
    text, qualities = TRUE, [1.0]
    for fault in faults:
        assert fault[0] in text
        text = text.replace(*fault)
        qualities.append(review_report(ALL, 0, text).quality)
    assert qualities == sorted(set(qualities), reverse=True)


def test_a_row_without_label_is_judged_as_well() -> None:
    table = pd.DataFrame({"clinical_trajectory": ["24 (0h) -> 20 (2h)"]})
    dataset = MIMICtrajectoryDataset(table, require_labels=False)
    assert review_report(dataset, 0, "Escalation: no. 3").invented == 1


def test_reports_on_a_waiting_list_count_in_days(tmp_path: Path) -> None:
    rows = [
        history_row(1, 0, CANHX_STAT_CD=6222, CANHX_SRTR_LAB_MELD=6222, CANHX_BILI=3.2),
        history_row(1, 30, CANHX_STAT_CD=6999, CANHX_SRTR_LAB_MELD=6225, CANHX_BILI=4),
    ]
    cand, history = filler()
    write_folder(tmp_path, [*cand, removed(13, 120)], history + rows)
    dataset = SRTRTrajectoryDataset(tmp_path, "liver")
    i = dataset.ids.tolist().index("1")
    assert abnormal_values(dataset, i) == [{("bilirubin", "4", "30")}]  # MELD has no reference
    report = dataset.report(i)
    review = review_report(dataset, i, report)
    assert (review.named, review.trends, review.right_trends) == (1, 2, 2)
    assert (review.invented, review.quality) == (0, 1)
    assert review_report(dataset, i, report.replace("day 30", "day 29")).right_trends == 0
    other = review_report(dataset, i, report.replace("inactive", "active"))
    assert other.invented == 1, "a state that is not the patient's"
