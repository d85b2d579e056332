"""Tests of ragged series: prediction times, summaries and facts, and the batches made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.ragged import SINCE_LAST, STATISTICS
from medgemma_clinical.files import InputError
from trajectories import dataset_of, table_of

SERIES = ["1 (2h) -> 3 (5h)", "7 (-1h)", "4 (0h) -> 5 (1h) -> 9 (9h)"]
NAN = float("nan")


def rows_with(**columns: Any) -> MIMICtrajectoryDataset:
    """Return the three rows with further columns."""
    return MIMICtrajectoryDataset(table_of(SERIES, **columns))


def known(*hours: float, facts: tuple[str, ...] = ("static_x",)) -> MIMICtrajectoryDataset:
    """Return three rows with their prediction times and what a model reads of them."""
    columns = {"prediction_hours": hours, "static_x": [0.5, NAN, 2], "static_y": [1, 2, 3]}
    return rows_with(**columns).with_inputs(facts, prediction_time=True)


def test_a_batch_holds_the_prediction_time_since_the_first_observation() -> None:
    batch = known(8, NAN, 9.25).collate([2, 1, 0])
    assert batch["prediction_hours"].tolist() == [9.25, 0, 6]
    assert batch["prediction_hours"].dtype == torch.float32


def test_without_prediction_times_the_question_follows_the_last_observation() -> None:
    dataset = rows_with()
    assert dataset.collate([0, 1, 2])["prediction_hours"].tolist() == [3, 0, 9]
    assert dataset.prediction_times().tolist() == [5, -1, 9]


def test_a_batch_holds_the_facts_that_a_model_reads_in_its_order() -> None:
    batch = known(8, 8, 9, facts=("static_y", "static_x")).collate([1, 0])
    assert batch["facts"].nan_to_num(9).tolist() == [[2, 9], [1, 0.5]]
    assert known(8, 8, 9, facts=()).collate([0, 1])["facts"].shape == (2, 0)
    assert rows_with().collate([0, 1])["facts"].shape == (2, 0)


def test_a_batch_holds_the_summaries_of_its_rows() -> None:
    dataset = known(8, NAN, 9.25)
    names = [*(f"Anion gap {statistic}" for statistic in STATISTICS), SINCE_LAST]
    assert dataset.summary_names() == names
    batch = dataset.collate([2, 0])
    rows = [dict(zip(names, row, strict=True)) for row in batch["summaries"].tolist()]
    assert (rows[0]["Anion gap last"], rows[0]["Anion gap count"]) == (9, 3)
    assert (rows[1]["Anion gap mean"], rows[1]["Anion gap span"]) == (2, 3)
    assert (rows[0][SINCE_LAST], rows[1][SINCE_LAST]) == (0.25, 3)
    assert np.isnan(dataset.summaries()[1, -1])


def test_a_model_that_does_not_read_the_prediction_time_sees_nothing_of_it() -> None:
    dataset = known(8, 8, 20)
    dataset.summaries()  # computed once with the time
    without = dataset.with_inputs([], prediction_time=False)
    assert SINCE_LAST not in without.summary_names()
    batch = without.collate([0, 1, 2])
    assert batch["prediction_hours"].tolist() == [3, 0, 9]
    assert batch["summaries"].shape == (3, len(STATISTICS))
    assert without.longest_gap() == 8
    assert SINCE_LAST in dataset.summary_names()


def test_the_longest_gap_reaches_to_the_prediction_time() -> None:
    assert known(8, 50, 10).longest_gaps().tolist() == [3, 51, 8]
    assert known(9.5, NAN, NAN).longest_gaps().tolist() == [4.5, 0, 8]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(-50, 50), min_size=1, max_size=4).map(sorted),
            st.one_of(st.none(), st.integers(0, 60)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_gaps_are_those_of_a_plain_loop(rows: list[tuple[list[int], int | None]]) -> None:
    hours = [NAN if wait is None else times[-1] + wait for times, wait in rows]
    cells = [" -> ".join(f"1 ({t}h)" for t in times) for times, _ in rows]
    dataset = dataset_of(
        cells, prediction_hours=hours, subject_id=[str(k) for k in range(len(rows))]
    )
    expected = [
        max(b - a for a, b in zip(times, [*times[1:], times[-1] + (wait or 0)], strict=True))
        for times, wait in rows
    ]
    assert dataset.longest_gaps().tolist() == expected
    asked = [times[-1] + (wait or 0) for times, wait in rows]
    assert dataset.prediction_times().tolist() == asked


def test_a_subset_keeps_facts_prediction_times_and_summaries() -> None:
    dataset = known(8, NAN, 9.25)
    dataset.summaries()
    chosen = np.array([2, 0])
    subset = dataset.subset(chosen)
    assert subset.static_names == ("static_x", "static_y")
    assert subset.statics is not None
    assert subset.statics.tolist() == [[2, 3], [0.5, 1]]
    whole, part = dataset.collate(chosen.tolist()), subset.collate([0, 1])
    for name in ("prediction_hours", "summaries", "facts"):
        assert torch.equal(whole[name], part[name])
    again = subset.with_inputs(["static_y"], prediction_time=True)
    assert again.facts is not None
    assert again.facts.tolist() == [[3], [1]]


def test_series_without_some_observations_are_those_that_never_had_them() -> None:
    dataset, fewer = rows_with(), dataset_of(["3 (5h)", "7 (-1h)", "4 (0h) -> 9 (9h)"])
    dataset.summaries()  # computed of all observations
    dataset.keep_observations(np.array([False, True, True, True, False, True]))
    for name in ("times", "values", "offsets"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(fewer, name))
    np.testing.assert_array_equal(dataset.summaries(), fewer.summaries())


@pytest.mark.parametrize(
    "change", [{"static_x": [0.5, NAN, 3]}, {"prediction_hours": [8, NAN, 10]}]
)
def test_the_fingerprint_changes_with_facts_and_prediction_times(
    change: dict[str, list[float]],
) -> None:
    columns = {"prediction_hours": [8, NAN, 9], "static_x": [0.5, NAN, 2]}
    before = rows_with(**columns).fingerprint()
    assert before == rows_with(**columns).fingerprint()
    assert before != rows_with(**{**columns, **change}).fingerprint()


def test_a_prediction_time_that_no_training_patient_has_is_refused():
    hours = [5.0 if k % 4 == 0 else NAN for k in range(40)]
    dataset, train = dataset_of(["1 (0h)"] * 40, prediction_hours=hours), np.arange(40)
    dataset.check_measured(train)
    with pytest.raises(InputError, match="column prediction_hours"):
        dataset.check_measured(train[1:4])
    dataset.with_inputs([], prediction_time=False).check_measured(train[1:4])
