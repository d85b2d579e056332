"""Tests of the check of a data set: its summary, its suspicions, its verdict."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.checks import (
    describe_cut,
    describe_long_spans,
    implausible_series,
    log_check,
    log_refusal,
    summarize,
)
from medgemma_clinical.data.dka.description import Description
from trajectories import table_of

SOUND = ["20 (0h) -> 21 (4h)"] * 200
FEW_EVENTS = "warning: fewer than 10 patients of the test part have, or lack, the event: "


def dataset_of(series: list[str], **columns: Any) -> MIMICtrajectoryDataset:
    """Return a data set whose rows are named patients."""
    patients = [f"p{k}" for k in range(len(series))]
    table = table_of(series, **{"subject_id": patients, **columns})
    return MIMICtrajectoryDataset(table, require_labels=False)


def checked(
    caplog: pytest.LogCaptureFixture, dataset: MIMICtrajectoryDataset, fewest: int = 0
) -> list[str]:
    """Return what the check says of a data set."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_check(dataset, fewest)
    return caplog.messages


def test_a_sound_data_set_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    *_, split, verdict = checked(caplog, dataset_of(SOUND))
    assert split == (
        "split drawn by --seed 0: train 160 rows, 160 patients, 80 events; val 20 rows, 20 "
        "patients, 10 events; test 20 rows, 20 patients, 10 events"
    )
    assert verdict == "ready"


def test_few_patients_and_few_events_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    messages = checked(caplog, dataset_of(SOUND[:98]))
    assert "warning: fewer than 100 patients: figures of a model will be undecided" in messages
    assert any(line.startswith(FEW_EVENTS) for line in messages)
    assert messages[-1] == "ready, with warnings"
    messages = checked(caplog, dataset_of(SOUND[:100]))
    assert not any("fewer than 100 patients" in line for line in messages)
    messages = checked(caplog, dataset_of(SOUND, label_escalation=[1] * 90 + [0] * 110))
    assert next(line for line in messages if "warning" in line).startswith(FEW_EVENTS)


def test_a_warning_of_the_reader_counts(caplog: pytest.LogCaptureFixture) -> None:
    assert checked(caplog, dataset_of(SOUND, context="54 years"))[-1] == "ready, with warnings"


def test_a_series_that_is_mostly_implausible_is_a_wrong_unit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    messages = checked(caplog, dataset_of(["180 (0h) -> 21 (4h)"] * 200))
    assert (
        "warning: Anion gap: 200 of 400 values lie outside -5 to 60 mEq/L: most of them: convert "
        "the unit"
    ) in messages
    assert messages[-1] == "ready, with warnings"


def test_a_given_split_is_shown_as_such(caplog: pytest.LogCaptureFixture) -> None:
    split = ["train"] * 80 + ["val"] * 60 + ["test"] * 60
    messages = checked(caplog, dataset_of(SOUND, split=split), 11)
    (line,) = (line for line in messages if line.startswith("split"))
    assert line.startswith("split of the column split: train 80 rows, 80 patients, 40 events; val")


def test_a_split_tells_no_small_cell(caplog: pytest.LogCaptureFixture) -> None:
    """Parts are stratified: the events of all rows, or of one part, tell those of the others."""
    text = "\n".join(checked(caplog, dataset_of(SOUND), 11))
    assert "test 20 rows, 20 patients; number of events not shown" in text
    assert not re.search(r"\d events", text)
    assert "fewer than 11 patients of the test part have, or lack, the event" in text
    text = "\n".join(checked(caplog, dataset_of(SOUND[:90]), 11))
    assert "split drawn by --seed 0: not shown, a part has fewer than 11 patients" in text
    assert "test 10" not in text


def test_an_unlabelled_data_set_is_ready_to_predict_on(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(SOUND)
    dataset.labels[:] = np.nan
    messages = checked(caplog, dataset)
    assert messages[-1] == "ready to predict on, no labels to train on"
    assert "fewer than 250 patients: figures" in "\n".join(checked(caplog, dataset, 250))
    assert "outcome 'Escalation': no labels" in caplog.messages
    dataset.labels[20:] = 0
    end = "ready to predict on, not to train on: {} have no label: fill or remove these rows"
    assert checked(caplog, dataset, 11)[-1] == end.format("20 of 200 rows")
    assert checked(caplog, dataset, 21)[-1] == end.format("rows of fewer than 21 patients")
    dataset.labels[:190] = np.nan
    assert checked(caplog, dataset, 11)[-1] == end.format("all but rows of fewer than 11 patients")
    assert not any(line.startswith("split") for line in caplog.messages)


def test_too_few_events_are_refused_behind_the_summary(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="fewer than 3 patients with an event"):
        checked(caplog, dataset_of(["20 (0h)"] * 3))
    assert "rows 3, patients 3" in caplog.messages
    with caplog.at_level(logging.INFO), pytest.raises(InputError), log_refusal():
        log_check(dataset_of(["20 (0h)"] * 3), 0)
    assert caplog.messages[-1] == "not ready"


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


def test_implausible_values_of_few_patients_are_not_counted() -> None:
    cells = ["240 (0h) -> 241 (1h) -> 242 (2h)"] * 5 + ["20 (0h)"] * 30
    (line,) = implausible_series(dataset_of(cells), 11)
    assert line.startswith("Anion gap: values of fewer than 11 patients lie outside -5 to 60 mEq/L")
    (line,) = implausible_series(dataset_of(["240 (0h)"] * 30 + ["20 (0h)"] * 5), 11)
    assert line.startswith("Anion gap: all but values of fewer than 11 patients lie outside")
    (line,) = implausible_series(dataset_of(["240 (0h)"] * 11 + ["20 (0h)"] * 30), 11)
    assert line.startswith("Anion gap: 11 of 41 values lie outside")


@pytest.mark.parametrize("count", [1, 40])
def test_a_file_of_one_patient_tells_no_count_of_patients_or_events(count: int) -> None:
    rows = ["20 (0h)"] * count
    text = "\n".join(summarize(dataset_of(rows, subject_id="a", label_escalation=1), 11))
    assert "patients fewer than 11\noutcome 'Escalation': number of events not shown" in text
    assert ("rows fewer than 11" in text) == (count == 1)


def test_events_are_hidden_where_no_split_can_be_made(caplog: pytest.LogCaptureFixture) -> None:
    dataset = dataset_of(SOUND, split=["train"] * 198 + ["val", "test"])
    for fewest, hidden in ((0, False), (10, False), (11, True)):
        with pytest.raises(InputError, match="column split"):
            checked(caplog, dataset, fewest)
        line = next(line for line in caplog.messages if line.startswith("outcome"))
        assert ("not shown" in line) == hidden, line
    dataset.labels[:] = 0
    with pytest.raises(InputError, match="column split"):
        checked(caplog, dataset, 12)
    assert "outcome 'Escalation': 0 events in 200 labelled rows (0.0%)" in caplog.messages


def test_the_share_within_quantiles_does_not_reveal_the_few_patients_without_a_series() -> None:
    def line_of(missing: int) -> str:
        lactate = [f"{k}.5 (0h)" for k in range(60 - missing)] + [""] * missing
        return summarize(dataset_of(SOUND[:60], trajectory_lactate=lactate), 11)[-1]

    for missing in (1, 5, 10):
        assert "56 % within" in line_of(missing), "11 of 50 on each side, of 50 at least"
        assert "in all patients but fewer than 11" in line_of(missing)
    assert "63 % within" in line_of(0)


def test_a_count_of_one_is_singular(caplog: pytest.LogCaptureFixture) -> None:
    split = ["train", "train", "val", "val", "test", "test"]
    (line,) = (
        m for m in checked(caplog, dataset_of(SOUND[:6], split=split)) if "column split" in m
    )
    assert line.endswith("test 2 rows, 2 patients, 1 event")


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


def years(hours: float, rows: int = 200, **description: Any) -> MIMICtrajectoryDataset:
    """Return a data set whose rows, but for a tenth, span so many hours."""
    short = rows // 10
    series = [f"20 (0h) -> 21 ({hours}h)"] * (rows - short) + ["20 (0h) -> 21 (4h)"] * short
    table = table_of(series, subject_id=[f"p{k}" for k in range(rows)])
    return MIMICtrajectoryDataset(table, description=Description(**description))


def test_spans_far_beyond_an_assumed_time_scale_are_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (line,) = describe_long_spans(years(43_812.5), 11)
    assert line == (
        "the median span of a row, 43,812 h, is beyond 10 time scales of 72 h, which makes very "
        'many solver steps: train with --time_scale 44000, or write "time_scale": 44000 in the '
        "JSON file beside the data"
    )
    messages = checked(caplog, years(43_812.5), 11)
    assert f"warning: {line}" in messages
    assert messages[-1] == "ready, with warnings"
    assert len(describe_long_spans(years(721), 11)) == 1
    assert describe_long_spans(years(720), 11) == []


def test_a_time_scale_of_the_description_brings_no_warning() -> None:
    assert describe_long_spans(years(43_812.5, time_scale=72.0), 11) == []


def test_a_median_span_of_few_patients_is_not_shown() -> None:
    assert len(describe_long_spans(years(9_000, 22), 11)) == 1
    assert describe_long_spans(years(9_000, 21), 11) == []
    assert len(describe_long_spans(years(9_000, 21), 0)) == 1


def cut(lengths: list[int], rows_a_patient: int = 1) -> str:
    """Describe rows cut to 20 observations."""
    groups = np.arange(len(lengths)) // rows_a_patient
    return describe_cut(np.array(lengths), groups, 20)


def test_who_loses_observations_is_counted_by_patient() -> None:
    end = "as rows are longer than 20: the most recent are kept"
    assert cut([48] * 30 + [20] * 70) == (
        f"30 of 100 patients lose observations, {end}; --max_len 48 keeps more"
    )
    assert cut([48] * 60 + [20] * 140, 2).startswith("30 of 100 patients")


def test_few_patients_who_lose_or_keep_observations_are_not_counted() -> None:
    text = cut([48] * 10 + [20] * 90)
    assert text.startswith("fewer than 11 of 100 patients lose observations")
    assert text.endswith("a larger --max_len keeps more")
    assert cut([48] * 90 + [20] * 10).startswith("all but fewer than 11 of 100 patients")
    assert cut([48] * 100).startswith("100 of 100 patients")
    assert cut([48] * 5).startswith("fewer than 11 of fewer than 11 patients")


def test_the_longest_row_of_few_patients_is_not_told() -> None:
    assert "kept; --max_len 48 keeps more" in cut([777] * 10 + [48] * 30 + [20] * 70)
