"""Rows to be scored: what is said of the static features that they lack."""

from medgemma_clinical.data.scoring import Findings, count_unknown_static
from trajectories import dataset_of


def test_rows_that_lack_a_static_feature_that_is_read_are_counted():
    columns = {
        "static_age": ["50", "", "60", ""],
        "static_given": ["1"] * 4,
        "static_off": [""] * 4,
    }
    dataset, findings = dataset_of(["1 (0h)"] * 4, **columns), Findings("x")
    names = ["static_age", "static_given"]
    count_unknown_static(dataset.with_inputs(names, prediction_time=False), findings)
    assert list((+findings.counts).items()) == [
        ("lack the static feature static_age: taken as unknown", 2)
    ]
