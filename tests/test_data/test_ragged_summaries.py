"""Tests of the tables that simple models read: statistics of series; the time of searches."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.case_mix import AGE
from medgemma_clinical.data.dka.description import SERIES_COLUMN
from medgemma_clinical.data.dka.series_cells import CELL, DATE, UNIT
from medgemma_clinical.data.facts import CONTEXT_NUMBER
from medgemma_clinical.data.report_review import STATED
from medgemma_clinical.data.srtr.saf import BEHIND
from trajectories import LABEL, SERIES, dataset_of, one_series

THREE_SERIES = pd.DataFrame(
    {
        SERIES: ["24 (0h) -> 20 (2h)", "", "7 (1h)"],
        "trajectory_glucose [mg/dL]": ["300 (2h) -> 250 (2.5h)", "90 (4h)", None],
        "trajectory_Blood_urea": ["", "5 (4h) -> 6 (1h)", ""],
        LABEL: [0, 1, 0],
    }
)


def test_summary_features_agree_with_a_slow_reference() -> None:
    rng = np.random.default_rng(2)
    texts = [
        " -> ".join(f"{rng.normal(20, 5):.3f} ({k + rng.random():.3f}h)" for k in range(length))
        for length in rng.integers(1, 15, 100)
    ]
    dataset = dataset_of(texts)
    table = dataset.baseline_inputs()["logistic regression"]
    assert table.shape == (100, 8)
    for i in range(100):
        t, v = (np.array(numbers) for numbers in one_series(dataset, i))
        expected = {
            "first": v[0],
            "last": v[-1],
            "min": v.min(),
            "max": v.max(),
            "mean": v.mean(),
            "slope": np.polyfit(t, v, 1)[0] if len(t) > 1 else 0.0,
            "count": len(v),
            "span": t[-1] - t[0],
        }
        row = {name: table.loc[i, f"Anion gap {name}"] for name in expected}
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_summary_features_of_equal_times_have_no_slope() -> None:
    # 0.7 less the mean of seven times 0.7 is 1e-16, not zero.
    series = " -> ".join(f"{value} (0.7h)" for value in (1, 5, 2, 8, 3, 9, 4))
    table = dataset_of([series, "1 (2h) -> 5 (2h)"]).baseline_inputs()["logistic regression"]
    assert table[["Anion gap slope", "Anion gap span"]].to_numpy().tolist() == [[0, 0]] * 2


def test_summary_features_of_an_unmeasured_feature_are_unknown() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"])
    dataset.features, dataset.units = ("a", "b"), ("u", "u")
    dataset.values = np.array([[1.0, 9.0], [2.0, np.nan], [3.0, np.nan]])
    table = dataset.baseline_inputs()["logistic regression"]
    described = table[["b first", "b last", "b mean", "b slope"]].to_numpy()
    assert described[0].tolist() == [9, 9, 9, 0]
    assert np.isnan(described[1]).all()


def test_the_baselines_see_the_last_value_the_count_or_everything() -> None:
    dataset = dataset_of(["1 (0h) -> 2 (1h)", "3 (0h)"])
    inputs = dataset.baseline_inputs()
    assert list(inputs) == ["last value", "number of observations", "logistic regression"]
    assert inputs["last value"].to_numpy().tolist() == [[2], [3]]
    assert inputs["number of observations"].to_numpy().tolist() == [[2], [1]]
    assert inputs["logistic regression"].shape == (2, 8)


def test_summary_features_hold_eight_numbers_of_every_series() -> None:
    table = MIMICtrajectoryDataset(THREE_SERIES).baseline_inputs()["logistic regression"]
    statistics = ("first", "last", "min", "max", "mean", "slope", "count", "span")
    names = [f"{n} {s}" for n, s in itertools.product(("Anion gap", "glucose"), statistics)]
    assert set(names) <= set(table.columns)
    assert table.shape == (3, 24)
    assert table.loc[1, "Blood urea slope"] == pytest.approx(-1 / 3)
    assert (table.loc[1, "Blood urea span"], table.loc[0, "glucose span"]) == (3, 0.5)
    assert (table.loc[1, "Blood urea count"], table.loc[1, "glucose count"]) == (2, 1)
    assert table.loc[2, ["glucose last", "Blood urea mean"]].isna().all()


def seconds(search: Callable[[str], object], text: str) -> float:
    def once() -> float:
        start = time.process_time()
        search(text)
        return time.process_time() - start

    return min(once() for _ in range(5))


SEARCHES: dict[str, tuple[Callable[[str], object], str, str]] = {
    "a word of a context": (CONTEXT_NUMBER.findall, "", "a"),
    "words of a context": (CONTEXT_NUMBER.findall, "", "ab ="),
    "spaces of a context": (CONTEXT_NUMBER.findall, "a", " "),
    "digits of a context": (STATED.findall, "", "1"),
    "signs of a context": (STATED.findall, "", "1-"),
    "a number of a cell": (CELL.fullmatch, "", "1"),
    "spaces of a cell": (CELL.fullmatch, "1", " "),
    "pieces of a cell": (CELL.fullmatch, "1", " (0h) -> 1"),
    "days of a date": (DATE.search, "1 (", "1"),
    "spaces of a date": (DATE.search, "1 (", " "),
    "numbers of a unit": (UNIT.fullmatch, "1 (", "1"),
    "spaces of a unit": (UNIT.fullmatch, "1 (1", " "),
    "letters of a unit": (UNIT.fullmatch, "1 (1", "m"),
    "spaces of an age": (AGE.search, "aged", " "),
    "words of a column": (SERIES_COLUMN.fullmatch, "trajectory_", "a [ "),
    "spaces of a column": (SERIES_COLUMN.fullmatch, "trajectory_a", " "),
    "spaces of an SRTR cell": (lambda text: re.sub(BEHIND, "", text), " 1", " "),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_time_of_a_search_grows_with_the_text_not_with_its_square(name: str) -> None:
    search, start, piece = SEARCHES[name]
    short, long = (seconds(search, start + piece * count + "!") for count in (5_000, 20_000))
    assert long < 8 * max(short, 1e-4), "four times as long a text: its square would take 16 times"
