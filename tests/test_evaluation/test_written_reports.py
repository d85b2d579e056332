"""Metrics of written reports, compared with each patient's numbers."""

import json

import numpy as np
import pytest
from scipy.special import expit

from medgemma_clinical.evaluation.report_review import ReportReview
from medgemma_clinical.evaluation.topics.written_reports import (
    report_metrics,
    score_reports,
    state_risk,
)
from trajectories import dataset_of


def scored(dataset, texts=None, first=0):
    """Score one text a row from ``first`` on, the true reports where none are given."""
    n = len(dataset)
    texts = texts or {i: dataset.report(i) for i in range(n)}
    rows = np.arange(first, n)[::-1]
    return score_reports(dataset, texts, rows, expit(rows / 10 - 1), threshold=0.5, seed=0)


@pytest.mark.parametrize(
    ("answer", "risk", "said"),
    [
        ("yes", 0.182, "yes (risk 18.2 %, above the threshold of 11.0 %)."),
        ("yes", 0.11, "yes (risk 11 %, above the threshold of 11 %)."),
        ("no", 0.10999, "no (risk 10.999 %, below the threshold of 11 %)."),
        ("no", 0.004, "no (risk 0.4 %, below the threshold of 11.0 %)."),
    ],
)
def test_a_note_states_the_risk_and_its_side_of_the_threshold(answer, risk, said):
    text = state_risk(f"Death (any): {answer}. Death (any): yes.", "Death (any)", risk, 0.11)
    assert text.replace("\xa0", " ") == f"Death (any): {said} Death (any): yes."
    assert state_risk("Another form.", "Death (any)", risk, 0.11) == "Another form."


def test_each_report_is_compared_with_its_patient():
    series = [[f"{8 + k + n * n} ({5 * n}h)" for n in range(1 + k % 5)] for k in range(16)]
    names = [f"patient {k}" for k in range(16)]
    dataset = dataset_of([" -> ".join(each) for each in series], subject_id=names)
    lines, metrics = scored(dataset, first=3)
    for line, i in zip(json.loads(json.dumps(lines)), range(15, 2, -1), strict=True):
        text = dataset.report(i)
        answer, rest = text.split(".", 1)
        assert line["text"].startswith(f"{answer} (risk "), "behind yes or no"
        assert line["text"].endswith(f"){'.' + rest}")
        expected = {"id": f"patient {i}", "target": text, "verdict": i % 2}
        assert line.items() >= (expected | {"parses": True, "invented": 0}).items()
        assert line["probability"] == pytest.approx(1 / (1 + np.exp(1 - i / 10)))
    assert metrics["reports"] == 13
    ones = ("right_answer_share", "parse_share", "true_number_share")
    assert [metrics[name]["value"] for name in ones] == [1, 1, 1]
    _, metrics = scored(dataset, {i: dataset.report((i + 1) % 16) for i in range(16)})
    assert metrics["true_number_share"]["value"] < 0.5
    assert metrics["right_answer_share"]["value"] == 0  # of the next patient, who has the other
    assert 0.5 < metrics["parse_share"]["value"] < 1  # one observation has no rate: another form


@pytest.mark.parametrize("over_time", [0, 10, 40])
def test_trends_are_counted_where_time_passes(over_time):
    series = ["40 (0h) -> 20 (5h)" if k < over_time else "20 (0h)" for k in range(40)]
    share = scored(dataset_of(series))[1]["right_trend_share"]
    assert share["value"] == (1 if over_time else None)
    assert (share["low"] is None) == (over_time == 0)


def test_invented_numbers_are_counted_and_the_reports_that_hold_one():
    dataset = dataset_of(["24 (0h)"] * 4)
    texts = {k: dataset.report(k) for k in range(4)}
    texts[1] += " The lactate was 4.1 at 3 h."
    lines, metrics = scored(dataset, texts)
    assert [line["invented"] for line in lines] == [0, 0, 2, 0]
    assert (metrics["invented"], metrics["inventing_share"]["value"]) == (2, 0.25)


def test_shares_have_intervals_by_patient():
    rng = np.random.default_rng(0)
    stated = rng.integers(5, 20, 60)
    true, labels, groups = rng.binomial(stated, 0.7), np.arange(60) % 2, np.arange(60)
    numbers = zip(stated.tolist(), true.tolist(), strict=True)
    reviews = [ReportReview(1, True, n, k, 0, 0, 0) for n, k in numbers]
    metrics = report_metrics(reviews, labels, groups, seed=0)
    share = metrics["true_number_share"]
    assert share["value"] == true.sum() / stated.sum()
    error = np.std(true - share["value"] * stated) / stated.mean() / np.sqrt(60)  # of a ratio
    assert share["high"] - share["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert 0.9 < metrics["parse_share"]["low"] < metrics["parse_share"]["high"] == 1
    assert json.loads(json.dumps(metrics)) == metrics
    again = report_metrics(reviews * 2, np.tile(labels, 2), np.tile(groups, 2), seed=0)
    assert again["true_number_share"] == pytest.approx(share)
