"""tripod.md: each item of the guideline once, filled from what the report shows."""

import re

import numpy as np
import pandas as pd
import pytest

import time_rows
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.tables import METRICS
from pages import OUTCOME, make_rows, write_page

LETTERS = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef"}
LETTERS |= {20: "abc", 23: "ab", 27: "abc"}
ITEMS = [f"{n}{letter}" for n in range(1, 28) for letter in LETTERS.get(n, [""])]


@pytest.fixture
def filled(tmp_path):
    def fill(rows=None, **options):
        write_page(tmp_path, rows, **options)
        text = (tmp_path / "tripod.md").read_text(encoding="utf-8")
        cells = re.findall(r"^\| (\d+[a-g]?) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
        assert [number for number, _, _ in cells] == ITEMS
        return text, {number: answer for number, _, answer in cells}

    return fill


@pytest.mark.slow
def test_each_item_stands_once_and_what_the_run_does_not_know_is_marked(filled, assert_approved):
    rule = pd.DataFrame({"rule": ["no | label"], "removed": [3], "left": [200]})
    text, answers = filled(flow=rule)
    assert_approved("tripod", text)
    assert f"`{OUTCOME}`" in answers["8a"]
    assert answers["17"] == "**for the author**"
    assert not [words for words in ("None", "nan", "Undefined", "MARKER") if words in text]


@pytest.mark.slow
def test_a_part_that_does_not_exist_is_left_out(filled):
    everyone = {"split": {"all folds": np.arange(200)}, "folds": 5, "methods": {}, "flow": None}
    _, answers = filled(make_rows(60, baselines=False), **everyone)
    assert answers["12a"] == answers["20c"] == "**for the author**"
    assert "no other model" in answers["12e"]


@pytest.mark.slow
def test_times_have_the_performance_of_each_risk_and_say_what_it_means(filled):
    rows = time_rows.make_times()
    targets = time_rows.weighed_targets(rows)
    _, answers = filled(rows, targets=targets)
    metrics = evaluate(rows, 0, targets=targets)
    for target in targets:
        for name, title in (("auroc", "AUROC"), ("slope", "Calibration slope")):
            text = METRICS[name].text(metrics.at(target).row(time_rows.MODEL, name))
            assert f"{title} ({target.title}) {text}" in answers["23a"]
        assert f"`{target.title}`" in answers["15"]
    assert answers["12e"].count(time_rows.EVENTS.assumption) == 1
    assert "by weights" in answers["12e"]


@pytest.mark.slow
def test_small_counts_are_hidden(filled):
    rows = make_rows(300)
    rows.loc[rows.index[rows["label"] == 1][10:], "label"] = 0
    _, shown = filled(rows)
    _, hidden = filled(rows, min_cell=11)
    assert "AUROC 0." in shown["23a"]
    assert "AUROC 0." not in hidden["23a"]
    for number in ("20a", "21"):
        assert "validation 20 patients, with the event: 5" in shown[number]
        assert "validation 20 patients, with the event: fewer than 11" in hidden[number]
    assert ("(3)" in shown["6b"], "(fewer than 11)" in hidden["6b"]) == (True, True)
