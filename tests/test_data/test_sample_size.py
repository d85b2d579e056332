"""Riley's sample size: the examples that its authors publish, and the predictors of a run."""

import logging

import numpy as np
import pytest

from medgemma_clinical.data.checks import check
from medgemma_clinical.data.sample_size import describe_sample_size, sample_sizes
from medgemma_clinical.evaluation.baselines import LOGISTIC
from trajectories import dataset_of


def test_published_examples():
    # pmsampsize(type = "b", csrsquared = 0.288, parameters = 24, prevalence = 0.174), its manual
    assert sample_sizes(24, 0.174, 0.288) == (623, 662, 221)
    assert max(sample_sizes(30, 0.05, 0.05)) == 5249  # pre-eclampsia, Riley 2020
    maximum = 1 - np.exp(2 * (0.2 * np.log(0.2) + 0.8 * np.log(0.8)))  # of a constant risk
    assert sample_sizes(10, 0.2) == sample_sizes(10, 0.2, 0.15 * maximum)


def test_the_predictors_are_the_columns_of_the_logistic_regression_with_statics():
    dataset = dataset_of(["20 (0h) -> 21 (4h)"] * 40, static_age=np.arange(40))
    columns = dataset.baseline_inputs()[LOGISTIC].shape[1] + 1
    text = describe_sample_size(dataset, ["static_age"], np.arange(30))
    needed = max(sample_sizes(columns, 0.5))
    assert f"on {columns} predictors needs {needed:,} patients" in text
    assert text.endswith("the training part has 30")


@pytest.mark.parametrize(
    ("rows", "columns", "suggested"),
    [
        (3900, {}, True),
        (4100, {}, False),
        (300, {"split": ["train", "train", "val", "val", "test", "test"] * 50}, False),
    ],
)
def test_folds_are_suggested_where_a_drawn_test_part_has_few_events(
    rows, columns, suggested, caplog
):
    dataset = dataset_of(["20 (0h)"] * rows, **columns)
    with caplog.at_level(logging.INFO):
        check(lambda: dataset)
    found = [record for record in caplog.records if "--folds" in record.getMessage()]
    assert [record.levelname for record in found] == ["INFO"] * suggested
    assert caplog.messages[-1].startswith("ready")
