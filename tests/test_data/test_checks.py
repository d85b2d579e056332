"""Tests of the check of a data set: its summary, its suspicions, its verdict."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.checks import implausible_series, log_check, summarize
from trajectories import dataset_of, table_of


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


def test_quantiles_have_enough_patients_beyond_and_are_values_that_occur() -> None:
    values = [f"{k * k} (0h)" for k in range(1, 401)]
    text = "\n".join(summarize(dataset_of(values), 11))
    # Eleven of four hundred lie at or below 121, and eleven above 389 squared.
    assert f"94 % within {11**2} to 1.513e+05" in text
    few = "\n".join(summarize(dataset_of(values[:43]), 11))
    assert "median 484;" in few
    assert "quartiles" not in few
    assert "too few patients for a median" in "\n".join(summarize(dataset_of(values[:21]), 11))
    assert "median 484, quartiles" in "\n".join(summarize(dataset_of(values[:44]), 11))


def test_rows_without_a_label_are_not_counted_by_the_others() -> None:
    labels = [k % 2 for k in range(97)] + [np.nan] * 3
    table = table_of(["1 (0h)"] * 100).assign(label_escalation=labels)
    dataset = MIMICtrajectoryDataset(table, require_labels=False)
    text = "\n".join(summarize(dataset, 11))
    assert "'Escalation': 48 events" in text
    assert "97" not in text
    assert "48 events in 97 labelled rows" in "\n".join(summarize(dataset, 0))
