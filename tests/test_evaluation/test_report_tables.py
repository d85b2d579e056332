"""Tables of figures: in words, for the page and the console."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from cohorts import make_cohort, simulate
from medgemma_clinical.evaluation.baselines import STAGE_1
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.calibration import log_odds
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures, cohort_figures
from medgemma_clinical.evaluation.judgement.sentences import combined_finding, judge_baseline
from medgemma_clinical.evaluation.judgement.verdict import BETTER, SAME, UNDECIDED
from medgemma_clinical.evaluation.report_tables import (
    AT_THRESHOLD,
    baseline_table,
    example_reports,
    few_subgroups,
    figure_table,
    flow_table,
    percent,
    result_sentence,
    results_table,
    split_table,
    stage_table,
    subgroup_table,
    written_table,
)


@pytest.fixture(scope="module")
def figures() -> CohortFigures:
    labels, risk, groups = simulate(np.random.default_rng(0), 400)
    other = expit(log_odds(risk) + np.random.default_rng(1).normal(size=400))
    return cohort_figures(make_cohort((labels, risk, groups), last_value=other), 0.3, 0, 0)


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0"), (0.00123, "0.12"), (0.0456, "4.6"), (0.876, "88"), (1, "100")]
)
def test_shares_are_written_with_two_digits(share: float, text: str) -> None:
    assert percent(share) == f"{text}\N{NO-BREAK SPACE}%"


def test_the_console_table_holds_model_and_baselines_of_both_parts(figures: CohortFigures) -> None:
    other = cohort_figures(
        make_cohort(simulate(np.random.default_rng(9), 100), last_value=np.full(100, 0.5)),
        0.3,
        0,
        0,
    )
    text = results_table("stage 1", {"validation": other, "test": figures})
    head, model, baseline, *rest = text.splitlines()
    assert "validation AUROC [95 %]" in head
    assert "test AUPRC" in head
    assert model.split()[:3] == ["stage", "1", f"{other.auroc.value:.3f}"]
    assert figures.auroc.text() in model
    assert figures.baselines["last value"]["auroc"].text() in baseline
    assert figures.differences["last value"]["auroc"].text("+.3f") in baseline
    assert rest == [f"test part: 400 rows, {figures.events} events"]


def test_the_console_says_what_recalibration_changed() -> None:
    labels, risk, groups = simulate(np.random.default_rng(1), 300, slope=2.5)
    plain = make_cohort((labels, risk, groups))
    mended = Cohort(labels, expit(0.4 * log_odds(risk)), groups, groups, plain.subgroups, {}, risk)
    found = cohort_figures(mended, 0.3, 0, 0)
    slopes = [each["calibration_slope"].text() for each in (found.before, found.estimates)]
    text = results_table("model", {"validation": found, "test": found})
    assert re.search(rf"Slope \(1 is ideal\) +{re.escape(slopes[0])} +{re.escape(slopes[1])}", text)


def test_written_reports_are_told_in_words(figures: CohortFigures) -> None:
    reports = {
        "reports": 1385,
        "parse_share": Estimate(0.9, 0.85, 0.94).to_json(),
        "true_number_share": Estimate(0.7512, 0.7, 0.8).to_json(),
        "numbers_stated": 4000,
    }
    lines = {
        "Reports": "1,385",
        "Expected form (%)": "90.0 [85.0, 94.0]",
        "Numbers stated": "4,000",
        "True numbers (%)": "75.1 [70.0, 80.0]",
    }
    assert written_lines(reports) == lines
    text = results_table("stage 3", {"validation": figures, "test": figures}, reports)
    assert text.splitlines()[-4:] == [f"{name}: {value}" for name, value in lines.items()]


def written_lines(reports: dict[str, Any]) -> dict[str, str]:
    """Return value by figure; each has a meaning."""
    table = written_table(reports)
    assert table is not None
    assert table["Meaning"].str.len().min() > 5
    return dict(table[["Figure", "Value [95 %]"]].values.tolist())


def test_abnormal_values_that_are_not_judged_are_left_out_and_shares_of_nothing_are_dashes() -> (
    None
):
    unknown = Estimate(None).to_json()
    shares = dict.fromkeys(("true_number_share", "abnormal_named_share"), unknown)
    reports = {"reports": 40, "numbers_stated": 0, "abnormal_values": None, **shares}
    assert written_lines(reports) == {
        "Reports": "40",
        "Numbers stated": "0",
        "True numbers (%)": "\N{EN DASH}",
    }


def examples_of(*qualities: float) -> list[tuple[str, str]]:
    """Return title and row of the examples among reports of these qualities."""
    judged = {"parses": True, "probability": 0.25}
    judged |= dict.fromkeys(("named", "abnormal", "right_trends", "trends", "invented"), 1)
    texts = {"text": "written", "target": "true"}
    lines = [
        {"id": f"r{k}", "quality": each, **judged, **texts} for k, each in enumerate(qualities)
    ]
    examples = example_reports(lines, np.ones(len(lines)))
    assert {example[2:] for example in examples} == {("written", "true")}
    rows = [(title, about["Row"]) for title, about, *_ in examples]
    assert all(
        row.endswith(", with the event, predicted risk 25\N{NO-BREAK SPACE}%") for _, row in rows
    )
    return [(title, row.partition(",")[0]) for title, row in rows]


def test_an_example_without_abnormal_value_has_none_to_name() -> None:
    line = {"id": "r", "quality": 1.0, "parses": True, "probability": 0.25, "invented": 0}
    line |= {"text": "written", "target": "true", "named": 0, "right_trends": 0, "trends": 0}
    lines = [line | {"abnormal": n, "quality": n} for n in range(3)]
    examples = example_reports(lines, np.ones(3))
    named = [about["Abnormal values named"] for _, about, *_ in examples]
    assert named == ["0 of 2", "0 of 1", "none to name"]
    assert examples[0][1]["Trends right"] == "no trend"
    unjudged = example_reports([line | {"abnormal": 0}], np.ones(1))
    assert "Abnormal values named" not in unjudged[0][1]


@pytest.mark.parametrize(
    ("qualities", "expected"),
    [
        ((0.5, 0.9, 0.1, 0.6, 0.2), [("Best", "r1"), ("Median", "r0"), ("Worst", "r2")]),
        ((0.5, 0.9, 0.1, 0.6), [("Best", "r1"), ("Median", "r0"), ("Worst", "r2")]),
        ((0.1, 0.9, 0.9, 0.1, 0.5), [("Best", "r1"), ("Median", "r4"), ("Worst", "r0")]),
        ((0.5, 0.9), [("Best", "r1"), ("Median", "r0")]),
        ((0.5,), [("The first of equal ones", "r0")]),
        ((0.5, 0.5, 0.5), [("The first of equal ones", "r0")]),
    ],
)
def test_the_best_the_median_and_the_worst_report_are_examples(
    qualities: tuple[float, ...], expected: list[tuple[str, str]]
) -> None:
    assert examples_of(*qualities) == expected


def test_differences_stand_beside_the_baselines(figures: CohortFigures) -> None:
    table = baseline_table(figures).set_index("Model")
    assert table.loc["this model", "AUROC, difference"] == ""
    difference = figures.differences["last value"]["brier"]
    assert table.loc["last value", "Brier, difference"] == difference.text("+.4f")


def test_the_threshold_table_names_the_threshold(figures: CohortFigures) -> None:
    table = figure_table(figures, AT_THRESHOLD, scale=100).set_index("Figure")
    assert "at least 30.0\N{NO-BREAK SPACE}%" in str(table.loc["Alarms (%)", "Meaning"])
    assert table.loc["PPV (%)", "Value [95 %]"] == figures.estimates["ppv"].text(".1f", 100)


def test_subgroups_are_shown_if_one_can_be_judged(figures: CohortFigures) -> None:
    table = subgroup_table(figures)
    assert table is not None
    assert table["Group"].tolist() == ["size: many"]
    assert few_subgroups(figures) == "size: few (15)"
    few = cohort_figures(make_cohort(simulate(np.random.default_rng(0), 15)), 0.3, 0, 0)
    assert few.subgroups
    assert subgroup_table(few) is None
    level = few.subgroups[0]
    names = ("size: few", "size: many", "sex: woman")
    several = replace(few, subgroups=[replace(level, name=name) for name in names])
    assert few_subgroups(several) == "size: few (15), many (15); sex: woman (15)"


def test_parts_of_the_split_are_counted() -> None:
    labels, groups = np.array([1.0, 0, 0, 1, 0]), np.array(["a", "a", "b", "c", "d"])
    split = {"train": np.array([0, 1, 2]), "val": np.array([3]), "test": np.array([4])}
    table = split_table(labels, groups, split, 0)
    assert table.to_numpy().tolist() == [
        ["training", "3", "2", "1 (33\N{NO-BREAK SPACE}%)"],
        ["validation", "1", "1", "1 (100\N{NO-BREAK SPACE}%)"],
        ["test", "1", "1", "0 (0\N{NO-BREAK SPACE}%)"],
    ]


def test_the_flow_has_the_pages_words() -> None:
    flow = pd.DataFrame({"rule": ["died"], "removed": [3], "left": [7]})
    table = flow_table(flow, 0)
    assert table is not None
    assert table.to_dict("records") == [{"Left out": "died", "Rows": "3", "Rows left": "7"}]
    assert flow_table(None, 0) is None


def test_the_result_is_one_sentence_with_the_best_baseline(figures: CohortFigures) -> None:
    sentence = result_sentence(figures)
    best = figures.best_baseline
    assert best is not None
    assert sentence.startswith(f"Test AUROC {figures.auroc.text()} on {figures.n:,} rows")
    assert f"{best}, has {figures.baselines[best]['auroc'].text()}" in sentence
    assert figures.differences[best]["auroc"].text("+.3f") in sentence
    assert f"events: {BETTER.symbol} this model is better than chance; the best" in sentence
    assert sentence.endswith(f"{BETTER.symbol} this model is better than {best}.")
    few = cohort_figures(make_cohort(simulate(np.random.default_rng(0), 15)), 0.3, 0, 0)
    assert result_sentence(few).endswith("too few to say whether this model is better than chance.")


def test_the_console_shows_what_the_page_shows_of_reports(figures: CohortFigures) -> None:
    share = Estimate(None).to_json()
    reports = {"reports": 3, "true_number_share": share, "numbers_stated": 0}
    table = results_table("model", {"validation": figures, "test": figures}, reports)
    assert "Reports: 3\nNumbers stated: 0\n" in table
    assert "True numbers (%): \N{EN DASH}" in table


def beside_stage_1(rows: int, noise: float, fewest: int = 0) -> CohortFigures:
    """A model of some noise beside a stage 1 of noise 1."""
    labels, risk, groups = simulate(np.random.default_rng(0), rows)
    rng = np.random.default_rng(1)
    own, other = (expit(log_odds(risk) + k * rng.normal(size=rows)) for k in (noise, 1))
    others = {STAGE_1: own if noise == 1 else other, "blend": other}
    return cohort_figures(make_cohort((labels, own, groups), **others), 0.3, 0, fewest)


@pytest.mark.parametrize(("rows", "fewest"), [(1000, 0), (15, 0), (1000, 999)])
def test_a_model_that_repeats_another_row_by_row_is_the_same_however_few_rows_there_are(
    rows: int, fewest: int
) -> None:
    figures = beside_stage_1(rows, 1, fewest)
    table = stage_table(figures)
    assert table is not None
    assert table["This model is"].tolist() == ["", SAME]
    assert str(SAME) == "= the same"
    console = results_table("stage 2", {"validation": figures, "test": figures}).splitlines()
    (line,) = [line for line in console if line.strip().startswith(STAGE_1)]
    assert line.endswith(" = the same")


def test_a_model_of_the_same_order_but_other_risks_is_not_the_same() -> None:
    labels, risk, groups = simulate(np.random.default_rng(0), 400)
    moved = expit(log_odds(risk) + 1e-4)
    cohort = make_cohort((labels, risk, groups), moved=moved, rounded=risk.astype(np.float32))
    figures = cohort_figures(cohort, 0.3, 0, 0)
    assert figures.differences["moved"]["auroc"].value == 0
    assert figures.same == ["rounded"]
    assert judge_baseline(figures, "moved") == UNDECIDED


def test_earlier_stages_have_a_table_of_their_own() -> None:
    figures = beside_stage_1(1000, 0.2)
    stages, baselines = stage_table(figures), baseline_table(figures)
    assert stages is not None
    assert stages["Model"].tolist() == ["this model", STAGE_1]
    difference = figures.differences[STAGE_1]["auroc"].text("+.3f")
    assert stages["AUROC, difference"].tolist() == ["", difference]
    assert baselines["Model"].tolist() == ["this model", "blend", "combined"]
    text = results_table("stage 2", {"validation": figures, "test": figures})
    assert f"{STAGE_1} " in text
    assert difference in text


def test_without_earlier_stages_there_is_no_table_of_them(figures: CohortFigures) -> None:
    assert stage_table(figures) is None


def blended_figures(noise: float, fewest: int = 0) -> CohortFigures:
    """A model beside a blend of other knowledge, or of more of it."""
    labels, risk, groups = simulate(np.random.default_rng(0), 1000)
    rng = np.random.default_rng(1)
    own, blend = (expit(log_odds(risk) + k * rng.normal(size=1000)) for k in (noise, 1))
    return cohort_figures(make_cohort((labels, own, groups), blend=blend), 0.3, 0, fewest)


def test_the_combined_model_is_the_last_row_and_is_compared_with_no_model() -> None:
    figures = blended_figures(0.5)
    table = baseline_table(figures).set_index("Model")
    assert list(table.index) == ["this model", "blend", "combined"]
    assert table.loc["combined", "AUROC"] == figures.combined["auroc"].text()
    assert table.loc["combined", "AUROC, difference"] == ""
    text = results_table("stage 1", {"validation": figures, "test": figures})
    row = text.splitlines()[3]
    assert row.split()[0] == "combined"
    assert row.count(figures.combined["auroc"].text()) == 2
    assert str(combined_finding(figures)) in text
    assert "the best baseline, blend, has" in result_sentence(figures)
