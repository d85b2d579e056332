"""The trajectory contract: batches, prediction times, choice of rows, inputs, hashes."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.summaries import SINCE_LAST, STATISTICS
from medgemma_clinical.files import InputError
from trajectories import dataset_of
from visits import cohort

CELLS = ["1 (2h) -> 3 (5h)", "7 (-1h)", "4 (0h) -> 5 (1h) -> 9 (9h)"]
NAN = float("nan")
NO_TIME = {"prediction_time": False}


def known(*hours, static=("static_x",)):
    """Return three rows with their prediction times and what a model reads of them."""
    columns = {"prediction_hours": hours, "static_x": [0.5, NAN, 2], "static_y": [1, 2, 3]}
    return dataset_of(CELLS, **columns).with_inputs(static, prediction_time=True)


# --------------------------------------------------------------------------- batches


def test_collate_pads_behind_with_hours_since_the_first_observation():
    dataset = dataset_of(["24 (-5h) -> 20 (2.5h) -> 16 (4h)", "7 (100h)", "1 (0h) -> 2 (1h)"])
    batch = dataset.collate([2, 0, 1])
    assert batch["times"].tolist() == [[0, 1, 0], [0, 7.5, 9], [0, 0, 0]]
    assert batch["values"].tolist() == [[[1], [2], [0]], [[24], [20], [16]], [[7], [0], [0]]]
    observed = [[True, True, False], [True, True, True], [True, False, False]]
    assert batch["observed"].squeeze(2).tolist() == observed
    assert batch["labels"].tolist() == [0, 0, 1]
    assert batch["index"].tolist() == [2, 0, 1]
    for name in ("times", "values", "labels", "prediction_hours", "summaries", "static"):
        assert batch[name].dtype == torch.float32
    assert (batch["observed"].dtype, batch["index"].dtype) == (torch.bool, torch.int64)


def test_collate_takes_the_difference_of_times_before_it_rounds():
    # In float32, 900,000 h and a minute later are the same.
    batch = dataset_of(["1 (9e5h) -> 2 (900000.015625h)", "1 (0h)"]).collate([0])
    assert batch["times"].tolist() == [[0.0, 0.015625]]


def test_collate_marks_an_unmeasured_feature():
    batch = dataset_of(["1 (0h)", "3 (0h)"], trajectory_b=["5 (1h)", "4 (0h)"]).collate([0])
    assert batch["observed"].tolist() == [[[True, False], [False, True]]]
    assert batch["values"].tolist() == [[[1.0, 0.0], [0.0, 5.0]]]


def test_a_batch_costs_its_own_rows_and_not_all():
    peaks = []
    for rows in (200, 20_000):
        dataset = dataset_of(["20 (0h) -> 18 (2h) -> 16 (4h)"] * rows, static_x=1)
        dataset = dataset.with_inputs(["static_x"], prediction_time=False)
        dataset.collate(range(16))
        tracemalloc.start()
        dataset.collate(range(100, 116))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1000


def test_a_batch_holds_the_static_features_that_a_model_reads_in_its_order():
    batch = known(8, 8, 9, static=("static_y", "static_x")).collate([1, 0])
    assert batch["static"].nan_to_num(9).tolist() == [[2, 9], [1, 0.5]]
    for dataset in (known(8, 8, 9, static=()), dataset_of(CELLS)):
        assert dataset.collate([0, 1])["static"].shape == (2, 0)


def test_a_batch_holds_the_summaries_and_the_prediction_times_of_its_rows():
    dataset = known(8, NAN, 9.25)
    names = [*(f"Anion gap {statistic}" for statistic in STATISTICS), SINCE_LAST]
    assert dataset.summary_names() == names
    batch = dataset.collate([2, 0, 1])
    assert batch["prediction_hours"].tolist() == [9.25, 6, 0]
    rows = pd.DataFrame(batch["summaries"].numpy(), columns=names)
    assert rows.loc[0, ["Anion gap last", "Anion gap count"]].tolist() == [9, 3]
    assert rows.loc[1, ["Anion gap mean", "Anion gap span"]].tolist() == [2, 3]
    np.testing.assert_array_equal(rows[SINCE_LAST], [0.25, 3, NAN])


# --------------------------------------------------------------------------- prediction times


def test_a_model_that_reads_no_prediction_time_sees_nothing_of_it():
    dataset = known(8, 8, 20)
    dataset.summaries()  # computed once with the time
    without = dataset.with_inputs([], prediction_time=False)
    assert SINCE_LAST not in without.summary_names()
    assert without.longest_gaps().max() == 8
    for each in (without, dataset_of(CELLS)):  # the question follows the last observation
        batch = each.collate([0, 1, 2])
        assert batch["prediction_hours"].tolist() == [3, 0, 9]
        assert batch["summaries"].shape == (3, len(STATISTICS))
    assert SINCE_LAST in dataset.summary_names()


TIMES = st.lists(st.integers(-50, 50), min_size=1, max_size=4).map(sorted)
WAITS = st.one_of(st.none(), st.integers(0, 60))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TIMES, WAITS), min_size=1, max_size=5))
def test_gaps_reach_to_the_prediction_time_as_those_of_a_plain_loop(rows):
    hours = [NAN if wait is None else times[-1] + wait for times, wait in rows]
    cells = [" -> ".join(f"1 ({t}h)" for t in times) for times, _ in rows]
    subjects = [str(k) for k in range(len(rows))]
    dataset = dataset_of(cells, prediction_hours=hours, subject_id=subjects)
    whole = [[*times, times[-1] + (wait or 0)] for times, wait in rows]
    assert dataset.longest_gaps().tolist() == [max(np.diff(times)) for times in whole]
    assert dataset.prediction_times().tolist() == [times[-1] for times in whole]


# --------------------------------------------------------------------------- choice of rows


def test_a_sample_holds_all_rows_of_the_drawn_patients_and_is_a_step_of_the_flow():
    dataset = MIMICtrajectoryDataset(cohort())
    sample, again, other = (dataset.sample_patients(50, seed=seed) for seed in (1, 1, 2))
    drawn = set(sample.groups)
    assert len(drawn) == 50
    assert len(sample) == sum(patient in drawn for patient in dataset.groups)
    assert sample.fingerprint() == again.fingerprint()
    assert drawn != set(other.groups)
    smaller = sample.sample_patients(20, seed=1)
    left, removed = [len(sample), len(smaller)], len(dataset) - len(sample)
    assert dataset.flow is None
    assert smaller.flow["left"].tolist() == left
    assert smaller.flow["removed"].tolist() == [removed, left[0] - left[1]]
    for max_patients in (0, 200, 10_000):
        assert dataset.sample_patients(max_patients, seed=1) is dataset


def test_a_subset_equals_the_chosen_rows_in_their_order():
    table = cohort(20).assign(split="train")
    table["id"] = table.index  # equal ones are numbered in their order
    table["static_x"] = table["prediction_hours"] = np.arange(len(table)) + 20.0
    dataset, chosen = MIMICtrajectoryDataset(table), [7, 0, 19, 3]
    dataset.summaries()
    subset = dataset.subset(np.array(chosen))
    assert subset.fingerprint() == MIMICtrajectoryDataset(table.iloc[chosen]).fingerprint()
    read = [each.with_inputs(["static_x"], prediction_time=True) for each in (dataset, subset)]
    whole, part = read[0].collate(chosen), read[1].collate([0, 1, 2, 3])
    for name in ("values", "prediction_hours", "summaries", "static"):
        assert torch.equal(whole[name], part[name])
    assert [subset.prompt(k) for k in range(4)] == [dataset.prompt(i) for i in chosen]


def test_rows_without_some_observations_are_those_that_never_had_them():
    dataset, fewer = dataset_of(CELLS), dataset_of(["3 (5h)", "7 (-1h)", "4 (0h) -> 9 (9h)"])
    dataset.summaries()  # computed of all observations
    dataset.keep_observations(np.array([False, True, True, True, False, True]))
    for name in ("times", "values", "offsets"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(fewer, name))
    np.testing.assert_array_equal(dataset.summaries(), fewer.summaries())


def test_rows_up_to_an_observation_are_those_that_end_there_and_are_predicted_there():
    dataset, shorter = known(8, NAN, 9.25), ["1 (2h)", "7 (-1h)", "4 (0h) -> 5 (1h)"]
    dataset.summaries()  # computed of all observations
    fewer = dataset_of(shorter, prediction_hours=[2, NAN, 1])
    before, cut = dataset.fingerprint(), dataset.up_to(np.array([1, 1, 2]))
    for name in ("times", "values", "offsets", "prediction_hours"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(fewer, name))
    np.testing.assert_array_equal(cut.summaries(), fewer.summaries())
    assert dataset.fingerprint() == before
    assert dataset.up_to(np.array([9, 9, 9])).lengths.tolist() == dataset.lengths.tolist()


# --------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "lacking", [{"static": ["static_z"]}, {"prediction_time": True}, {"series": ["z"]}]
)
def test_an_input_that_the_data_lack_is_refused(lacking):
    with pytest.raises(InputError, match=r"static_z|prediction_hours|reads z"):
        dataset_of(CELLS).with_inputs(**{"static": [], "prediction_time": False, **lacking})


def test_nothing_is_left_of_a_series_that_is_not_read():
    rare = ["5 (0h)", "6 (-1h) -> 7 (3h)", ""]
    dataset, names = dataset_of(CELLS, trajectory_rare=rare), ["Anion gap"]
    never, before = dataset_of(CELLS, trajectory_rare=""), dataset.fingerprint()
    for read in (dataset.with_series(names), dataset.with_inputs([], **NO_TIME, series=names)):
        assert read.fingerprint() == never.fingerprint()
        np.testing.assert_array_equal(read.summaries(), never.summaries())
        assert "rare" not in read.prompt(1) + read.report(1) + read.task_description()["Series"]
        assert read.with_inputs([], **NO_TIME).series_read == [0], "as before"
    other = dataset.with_series(["rare"])
    assert (other.lengths.tolist(), other.main) == ([1, 2, 0], 1)
    assert dataset.fingerprint() == before
    with pytest.raises(InputError, match="lactate"):
        dataset.with_series(["lactate"])
