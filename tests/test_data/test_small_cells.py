"""Small cells: no band, rule or sum of them shows a few patients."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgemma_clinical.data.small_cells import (
    any_small,
    count_text,
    flow_lines,
    is_small,
    merge_bands,
    merge_flow,
    patient_quantiles,
    risk_bands,
    share_text,
)

FEWEST = 11


def cells(band: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> list[int]:
    """Patients of each band, without and with the event."""
    return [
        len(set(groups[(band == k) & (labels == label)])) for k in set(band) for label in (0, 1)
    ]


@pytest.mark.parametrize(
    ("count", "fewest", "text"),
    [
        (0, 11, "0"),
        (1, 11, "fewer than 11"),
        (10, 11, "fewer than 11"),
        (11, 11, "11"),
        (3, 0, "3"),
    ],
)
def test_counts_of_a_few_are_not_written(count: int, fewest: int, text: str) -> None:
    assert count_text(count, fewest) == text
    assert is_small(count, fewest) == text.startswith("fewer")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(30, 400), st.integers(1, 12), st.integers(1, 4))
def test_merged_bands_have_no_small_cell(seed: int, rows: int, count: int, repeats: int) -> None:
    rng = np.random.default_rng(seed)
    bands = rng.integers(count, size=rows)
    labels = (rng.random(rows) < rng.uniform(0.02, 0.6)).astype(float)
    groups = rng.integers(max(1, rows // repeats), size=rows)
    merged = merge_bands(bands, count, labels, groups, FEWEST)
    assert merged[0] == 0
    assert set(np.diff(merged)) <= {0, 1}, "neighbours only"
    whole = [len(set(groups[labels == label])) for label in (0, 1)]
    if any(is_small(k, FEWEST) for k in whole):
        assert not merged.any()
    else:
        assert not any(is_small(k, FEWEST) for k in cells(merged[bands], labels, groups))


def test_bands_that_are_large_enough_stay_and_patients_count_once() -> None:
    bands = np.repeat([0, 1, 2], 40)
    labels = np.tile([0.0, 1.0], 60)
    alone = np.arange(120)
    assert merge_bands(bands, 3, labels, alone, FEWEST).tolist() == [0, 1, 2]
    few_patients = np.where(bands == 1, alone % 6, alone)
    assert merge_bands(bands, 3, labels, few_patients, FEWEST).tolist() == [0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(60, 600), st.floats(0.05, 0.95))
def test_risk_bands_keep_the_threshold_where_its_cells_allow(
    seed: int, rows: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    risk, groups = rng.random(rows), np.arange(rows)
    labels = (rng.random(rows) < risk).astype(float)
    bands = risk_bands(risk, labels, groups, FEWEST, threshold)
    assert bands.edges is not None
    assert (np.diff(bands.place[np.argsort(risk)]) >= 0).all(), "risks keep their order"
    allowed = not any_small(2 * (labels == 1) + (risk >= threshold), groups, 4, FEWEST)
    if allowed:
        assert threshold in bands.edges
    for edge in bands.edges:  # an edge cuts between two bands and through none
        assert not set(bands.place[risk < edge]) & set(bands.place[risk >= edge])
    if not any_small((labels == 1).astype(int), groups, 2, FEWEST):
        assert not any(is_small(k, FEWEST) for k in cells(bands.place, labels, groups))


def test_without_a_limit_each_risk_is_a_band() -> None:
    risk = np.array([0.2, 0.1, 0.2, 0.9])
    bands = risk_bands(risk, np.array([0.0, 1, 0, 1]), np.arange(4), 0)
    assert bands.place.tolist() == [1, 0, 1, 2]
    assert bands.edges is None


def flow_of(*removed: int) -> pd.DataFrame:
    left = 1000 - np.cumsum(removed)
    rules = [f"rule {k}" for k in range(len(removed))]
    return pd.DataFrame({"rule": rules, "removed": removed, "left": left})


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ((20, 30), [("rule 0", "20", "980"), ("rule 1", "30", "950")]),
        ((3, 30), [("rule 0; rule 1", "33", "967")]),
        ((20, 3), [("rule 0; rule 1", "23", "977")]),
        ((20, 3, 3), [("rule 0; rule 1; rule 2", "26", "974")]),
        ((20, 0, 3), [("rule 0; rule 1; rule 2", "23", "977")]),
        ((0, 3), [("rule 0; rule 1", "fewer than 11", "997")]),
        ((20, 975), [("rule 0", "20", "980"), ("rule 1", "975", "fewer than 11")]),
    ],
)
def test_rules_that_remove_a_few_join_their_neighbours(
    removed: tuple[int, ...], expected: list[tuple[str, str, str]]
) -> None:
    merged = merge_flow(flow_of(*removed), FEWEST)
    assert list(merged.itertuples(index=False, name=None)) == expected


def test_without_a_limit_a_flow_stays_as_it_is() -> None:
    merged = merge_flow(flow_of(3, 0, 1), 0)
    assert merged["removed"].tolist() == ["3", "0", "1"]
    assert merged["left"].tolist() == ["997", "997", "996"]


def test_lines_of_a_flow_leave_out_rules_that_remove_nothing() -> None:
    lines = flow_lines(flow_of(0, 20, 0, 30), FEWEST)
    assert [line.split() for line in lines] == [
        ["20", "out,", "980", "left:", "rule", "1"],
        ["30", "out,", "950", "left:", "rule", "3"],
    ]


def test_a_patient_with_many_numbers_counts_once_in_a_quantile() -> None:
    numbers = np.r_[np.arange(99.0), np.full(400, 2.5)]
    groups = np.r_[np.arange(99), np.full(400, 99)]
    assert patient_quantiles(numbers, groups, (0.01, 0.25, 0.5, 0.75)) == [0, 23, 48, 73]
    assert patient_quantiles(np.arange(1.0, 6), np.arange(5), (0.2, 0.5, 1.0)) == [1, 3, 5]


def test_a_share_of_few_patients_is_not_counted() -> None:
    chosen, groups = np.arange(40) < 15, np.arange(40) // 3
    assert share_text(chosen, groups, 5, "rows") == "15 of 40 rows"
    assert share_text(chosen, groups, 6, "rows") == "rows of fewer than 6 patients"
    assert share_text(~chosen, groups, 6, "rows") == "all but rows of fewer than 6 patients"
    assert share_text(chosen, groups, 0, "rows") == "15 of 40 rows"
