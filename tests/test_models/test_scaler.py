"""The normal scores of values, summaries and static features."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.models.scaler import BINS, MAX_SCORE, MIN_BIN, Scaler


def fitted(column):
    """A scaler, fitted to one column (n,)."""
    scaler = Scaler(1)
    scaler.fit(torch.as_tensor(column)[:, None])
    return scaler


def scores_of(scaler, values):
    return scaler(torch.as_tensor(values).float()[:, None])[:, 0].numpy()


def columns():
    """Columns of different distributions; the mean of 8.4s depends on their number."""
    rng, n = np.random.default_rng(0), 2997
    skewed, half = rng.lognormal(size=n), rng.random(n) < 0.5
    return {
        "skewed": skewed,
        "lower_tail": -1e4 * skewed,
        "tied": np.where(half, 8.4, (7.4 + skewed).round(1)),
        "far_from_zero": 1e5 + rng.integers(0, 3, size=n),
        "binary": np.where(half, 0.0, 1.0),
        "rare": np.where(rng.random(n) < 0.05, 1.0, 0.0),
        "often_unknown": np.where(half, np.nan, skewed),
    }


def rank_scores(known):
    """Return the mean normal score of the ranks that equal values share."""
    ranks = pd.Series(known).rank(method="first")
    return (
        pd.Series(norm.ppf((ranks - 0.5) / len(known))).groupby(known).transform("mean").to_numpy()
    )


@pytest.mark.parametrize("name", columns())
def test_scores_are_those_of_the_ranks_between_the_outer_bins_and_rise_beyond(name):
    column = columns()[name]
    scaler, known = fitted(column), column[~np.isnan(column)]
    assert not scores_of(scaler, column)[np.isnan(column)].any()
    low, high = scaler.knots[0, [0, -1]].numpy()
    inside = (low <= known.astype(np.float32)) & (known.astype(np.float32) <= high)
    errors = np.abs(scores_of(scaler, known) - rank_scores(known))[inside]
    assert inside.mean() > 0.9
    assert errors.max() < 0.15
    assert errors.mean() < 0.07
    tail = np.geomspace(1e-3, 1e30, 500)
    rising = scores_of(scaler, np.sort(np.concatenate([known, tail, -tail, [-np.inf, np.inf]])))
    assert (np.diff(rising) >= -1e-6).all()
    assert (rising[0], rising[-1]) == (-MAX_SCORE, MAX_SCORE)


@pytest.mark.parametrize("column", [[], [3.0], *([x] * 50 for x in (0.0, 0.1, -7 / 3, 1e6 / 3))])
def test_a_column_that_says_nothing_reads_as_zero_ever_after(column):
    unknown = [math.nan] * 7
    scaler = fitted(np.array([*unknown, *column]))
    assert not scores_of(scaler, [*column, *unknown, 7.0, -1e30, math.inf]).any()


@pytest.mark.parametrize("n", [2, 2 * MIN_BIN - 1])
def test_few_values_give_z_scores(n):
    values = np.random.default_rng(3).normal(9, 4, size=n)
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(scores_of(fitted(values), values), expected, rtol=0, atol=1e-5)


def test_a_scaler_that_is_not_fitted_clips_alone():
    values = [-math.inf, -5.0, -3.9, 0.0, 0.1, 4.0, 1e30, math.nan]
    expected = np.float32([-MAX_SCORE, -MAX_SCORE, -3.9, 0.0, 0.1, MAX_SCORE, MAX_SCORE, 0.0])
    np.testing.assert_allclose(scores_of(Scaler(1), values), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change", [np.exp, np.cbrt, lambda x: 9 - 1e-3 / x**3], ids=["exp", "cbrt", "power"]
)
def test_scores_at_the_knots_are_those_of_any_rising_function_of_the_values(change):
    values = np.random.default_rng(1).lognormal(size=700).astype(np.float32)
    plain, changed = fitted(values), fitted(change(values.astype(float)))
    assert torch.equal(changed.scores, plain.scores)
    for scaler in (plain, changed):
        np.testing.assert_allclose(scaler(scaler.knots.T), scaler.scores.T, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 2 * MIN_BIN - 1, 2 * MIN_BIN, BINS * MIN_BIN - 1, 1003])
def test_each_value_moves_one_knot_by_a_small_share(n):
    values, moves = np.random.default_rng(2).permutation(n).astype(float), []
    knots = fitted(values).knots[0].unique()
    for k in range(n):
        moved = fitted(values + 0.5 * (np.arange(n) == k)).knots[0].unique()
        moves.append((moved - knots).numpy())
    assert np.shape(moves) == (n, max(1, min(BINS, n // MIN_BIN)))
    assert (np.count_nonzero(moves, axis=1) == 1).all()
    np.testing.assert_array_less(0.0, np.sum(moves, axis=1))
    np.testing.assert_array_less(moves, 0.501 / min(n, MIN_BIN))


@pytest.mark.parametrize("values_a_patient", [1, 2, 3, 40])
@pytest.mark.parametrize("heavy", [0, 45, 400])
def test_each_number_that_is_kept_stands_for_twenty_values_of_eleven_patients(
    heavy, values_a_patient
):
    """Of ``heavy`` equal values of one patient, above all others, none is left."""
    rng = np.random.default_rng(4)
    groups = np.append(np.arange(150).repeat(values_a_patient), [999] * heavy)
    values = np.append(rng.normal(24, 3, 150 * values_a_patient), [91.37] * heavy)
    scaler = Scaler(1)
    scaler.fit(torch.from_numpy(values)[:, None], torch.from_numpy(groups))
    order, knots = np.argsort(values, kind="stable"), scaler.knots[0].unique().double()
    ordered, fewest, start = values[order], [], 0
    for knot in knots.tolist():  # each is the mean of the next values
        means = ordered[start:].cumsum() / np.arange(1, len(ordered) - start + 1)
        (ends,) = np.nonzero(abs(means - knot) < 1e-5 * abs(knot))
        members = order[start : start + 1 + ends[-1]]
        assert len(members) >= MIN_BIN
        fewest.append(len({*groups[members]}))
        start += len(members)
    assert start == len(values)
    assert scaler.patients.item() == min(fewest) >= MIN_CELL
    if not heavy and values_a_patient == 1:
        plain = fitted(values)
        assert torch.equal(plain.knots, scaler.knots)
        assert plain.patients == scaler.patients
