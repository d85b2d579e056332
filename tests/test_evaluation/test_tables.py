"""Tables of text: one of the models, and those of a report."""

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.evaluation import tables
from medgemma_clinical.evaluation.demographics import demographic_bands
from medgemma_clinical.evaluation.metrics_table import ORDER, evaluate
from medgemma_clinical.evaluation.suppress import suppress_table
from medgemma_clinical.evaluation.topics.cohort import case_mix_cells, count_cells, part_table
from medgemma_clinical.evaluation.topics.subgroups import subgroup_cells, subgroup_table
from medgemma_clinical.evaluation.verdicts import NO_VALUE, TOO_FEW
from pages import MODEL, THRESHOLD, make_patients, make_rows
from time_rows import TARGETS, make_times

FEW = "observations: 1"


@pytest.fixture(scope="module")
def metrics():
    return evaluate(make_rows(), 0, THRESHOLD)


def test_a_models_verdict_needs_patients():
    table = tables.model_table(evaluate(make_rows(20), 0))
    assert table["Verdict"].tolist()[1:] == ["", str(TOO_FEW), str(TOO_FEW)]


def test_cost_stands_beside_the_models_that_have_it(metrics):
    cost = {MODEL: {"tokens": 1234.0, "memory_mib": None}, "other": {"residual_weight": 1.0}}
    table = tables.model_table(metrics, pd.DataFrame.from_dict(cost, orient="index"))
    assert table["Tokens"].tolist() == ["1,234", "", "", ""]
    assert "Memory (MiB)" not in table
    assert "Weight" not in table
    assert tables.model_table(metrics, pd.DataFrame()).equals(tables.model_table(metrics))


def test_over_several_splits_the_spread_is_shown():
    rows = make_rows(200, baselines=False)
    split = np.arange(200) % 2
    table = tables.model_table(evaluate(rows, 0, split=split))
    aurocs = [evaluate(rows[split == k], 0).table["value"][MODEL, "auroc"] for k in (0, 1)]
    assert table["SD over splits"].tolist() == [f"{np.std(aurocs, ddof=1):.3f}"]


def test_several_targets_stand_below_each_other():
    metrics, targets = evaluate(make_times(), 0, targets=TARGETS[:2]), TARGETS[:2]
    table = tables.model_table(metrics, targets=targets)
    assert table["Risk"].tolist() == [x.title for x in targets for _ in metrics.models]
    for target, part in zip(targets, (table.iloc[:2], table.iloc[2:]), strict=True):
        alone = tables.model_table(metrics.at(target))
        pd.testing.assert_frame_equal(part.drop(columns="Risk"), alone)


def test_every_metric_is_in_the_registry_with_its_meaning():
    assert {*ORDER} <= {*tables.METRICS}
    assert all(metric.title and metric.meaning for metric in tables.METRICS.values())


def test_a_subgroup_of_few_patients_has_no_auroc():
    rows = make_rows()
    groups = subgroup_table(rows, MODEL, demographic_bands(make_patients(400)), 0)
    table = subgroup_cells(groups, "stays").set_index("Subgroup")
    assert list(table.index) == [FEW, "observations: 10 to 19"]
    assert table.loc[FEW, "AUROC [95 %]"] == NO_VALUE
    assert table.loc[FEW, "Stays"] == "15"
    assert table.loc[FEW, "Observed"] != NO_VALUE
    hidden = subgroup_cells(suppress_table(groups, 20, by="group"), "patients")
    hidden = hidden.set_index("Subgroup")
    assert hidden.loc[FEW, "Patients"] == "fewer than 20"
    assert hidden.loc[FEW, "Observed"] == NO_VALUE


def test_parts_of_the_split_are_counted():
    labels, groups = np.array([1.0, 0, 0, 1, 0]), np.array(["a", "a", "b", "c", "d"])
    split = {"train": np.array([0, 1, 2]), "val": np.array([3]), "test": np.array([4])}
    table = part_table(labels, groups, split)
    assert table[["part", "rows", "patients", "events"]].to_numpy().tolist() == [
        ["training", 3, 2, 1],
        ["validation", 1, 1, 1],
        ["test", 1, 1, 0],
    ]


@pytest.mark.parametrize("noun", ["patients", "stays"])
def test_counts_are_of_rows_and_of_patients_where_these_differ(noun):
    parts = part_table(np.array([1.0, 0]), np.array(["a", "a"]), {"train": np.arange(2)})
    flow = pd.DataFrame({"rule": ["no label"], "removed": [3], "left": [200]})
    mix = case_mix_cells({"here": {"rows": 200, "patients": 80}}, noun)["Case mix"]
    names = list(dict.fromkeys([noun.capitalize(), "Patients"]))
    assert mix.tolist() == names
    assert count_cells(parts, noun).columns.tolist()[1:-2] == names
    assert all(noun.capitalize() in title for title in count_cells(flow, noun).columns[1:])


def test_case_mixes_stand_side_by_side():
    mix = {"patients": 4000.0, "prevalence": 0.25, "age_q1": 40.0, "age_median": 50, "age_q3": 60.0}
    table = case_mix_cells(
        {"Training data": mix, "Scored here": {"women": 0.5}}, "patients"
    ).set_index("Case mix")
    assert table.loc["Patients"].tolist() == ["4,000", NO_VALUE]
    assert table.loc["Age in years, median (quartiles)"].tolist() == ["50 (40 to 60)", NO_VALUE]
    assert table.loc["Women"].tolist() == [NO_VALUE, "50.0\N{NO-BREAK SPACE}%"]
