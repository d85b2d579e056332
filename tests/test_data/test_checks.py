"""Tests of the check of a data set: its summary, its suspicions, its verdict."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dataset_format import InputError
from medgemma_clinical.data.checks import implausible_series, log_check, summarize
from trajectories import dataset_of


def test_a_labelled_data_set_is_fit_to_train_on(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(["20 (0h) -> 21 (4h)"] * 20)
    with caplog.at_level(logging.INFO):
        log_check(dataset, 0)
    assert caplog.messages[-1] == "fit to train on"


def test_an_unlabelled_data_set_is_fit_to_predict_on(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(["20 (0h) -> 21 (4h)"])
    dataset.labels = np.array([np.nan])
    with caplog.at_level(logging.INFO):
        log_check(dataset, 0)
    assert caplog.messages[-1] == "1 of 1 rows have no label: fit to predict on, not to train on"


def test_too_few_events_are_refused() -> None:
    with pytest.raises(InputError, match="1 patients with an event"):
        log_check(dataset_of(["20 (0h)"] * 3), 0)


def test_no_extreme_stands_in_the_summary() -> None:
    dataset = dataset_of(["20 (0h)"] * 200 + ["59.25 (777h) -> 20 (0h)"])
    text = "\n".join(summarize(dataset, 0))
    assert "59.25" not in text
    assert "777" not in text


def test_suspicions_name_the_series() -> None:
    dataset = dataset_of(["240 (0h) -> 20 (9h)", "21 (0h)"])
    assert implausible_series(dataset, 0) == [
        "Anion gap: 1 of 3 values lie outside -5 to 60 mEq/L: is the unit right?"
    ]
