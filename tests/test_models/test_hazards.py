"""Discrete-time hazards: loss, cut points and risks, against slow computations and known truth."""

import math

import numpy as np
import pytest
import torch

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.models.hazards import Hazards

EVENTS = CompetingEvents(("death", "transplant", "improved"), (24.0, 72.0), (2,))
GRID = Hazards(EVENTS, (10.0, 24.0, 72.0), (1.0, 2.0, 4.0))


def risks_of(grid, outputs):
    return grid.target_risks(grid.cumulative(outputs))


def population(n, seed=0, rates=(0.01, 0.02, 0.005), censored=0.004):
    """Targets (n, 3) of constant hazards an hour."""
    rng = np.random.default_rng(seed)
    times = np.stack([rng.exponential(1 / rate, n) for rate in (censored, *rates)])
    return np.column_stack([np.zeros(n), times.min(axis=0), times.argmin(axis=0)])


def truth(hours, rates=(0.01, 0.02, 0.005), without=()):
    """Risk of the first event by some hours under constant hazards."""
    total = sum(rate for k, rate in enumerate(rates, 1) if k not in without)
    return rates[0] / total * (1 - math.exp(-total * hours))


def slow_losses(grid, logits, targets):
    """The negative log-likelihood of each cause, interval by interval."""
    losses = [0.0] * len(grid.events.names)
    for row, (entry, hours, event) in zip(logits.tolist(), targets.tolist(), strict=True):
        for cause in range(len(losses)):
            begin = 0.0
            for k, end in enumerate(grid.cuts):
                place = cause * (len(grid.cuts) + 1)
                hazard = math.log1p(math.exp(row[place + k] + row[place + len(grid.cuts)]))
                entered, width = max(begin, entry), end - begin
                ends_here = hours <= end and (hours > begin or k == 0)
                losses[cause] += hazard * max(min(end, hours) - entered, 0) / width
                if event == cause + 1 and ends_here:
                    losses[cause] -= math.log(hazard)
                begin = end
    return losses


ROWS = torch.tensor(
    [
        *([0.0, 5, 1], [0, 10, 1], [0, 24, 2], [0, 24.5, 3], [0, 0, 1], [0, 0, 0], [0, 72, 1]),
        *([0, 90, 1], [0, 30, 0], [4, 9, 2], [12, 20, 1], [15, 60, 3], [24, 80, 0], [80, 90, 1]),
    ],
    dtype=torch.float64,
)


def test_losses__are_those_of_each_interval_in_which_a_row_was_watched():
    logits = torch.randn(2, len(ROWS), 12, generator=torch.Generator().manual_seed(0)).double()
    found = GRID.losses(logits, ROWS).sum(dim=1)
    expected = [slow_losses(GRID, each, ROWS) for each in logits]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    weighted = (found / torch.tensor(GRID.null)).sum(dim=1)
    torch.testing.assert_close(GRID.loss(logits, ROWS), weighted)


def test_losses__of_a_row_that_ended_before_it_was_watched_are_zero():
    assert not GRID.losses(torch.zeros(1, 1, 12), torch.tensor([[80.0, 90, 1]])).any()


def test_loss__has_finite_gradients_at_extreme_logits():
    for size in (-60.0, 60.0):
        logits = torch.full((1, len(ROWS), 12), size / 2, requires_grad=True)
        GRID.loss(logits, ROWS.float()).sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.slow
def test_start_and_shift__recover_the_incidence_of_constant_hazards():
    targets = population(200_000)
    grid = Hazards.fitted(EVENTS, targets)
    start = grid.start(targets)
    expected = [truth(24), truth(72), truth(24, without=(2,)), truth(72, without=(2,))]
    risks = risks_of(grid, torch.from_numpy(start))
    np.testing.assert_allclose(risks, expected, atol=0.003)
    logits = np.tile(start + np.repeat([0.4, -0.3, 0.0], len(grid.cuts) + 1), (len(targets), 1))
    shift = grid.shift(logits, targets)
    np.testing.assert_allclose(
        risks_of(grid, torch.from_numpy(logits[0] + shift)), risks, atol=1e-4
    )


def test_fitted__without_censoring_the_null_models_incidence_is_the_observed_one():
    targets = population(5_000, censored=1e-9)
    grid = Hazards.fitted(EVENTS, targets)
    incidence = grid.incidence(
        grid.cumulative(torch.from_numpy(grid.start(targets))), EVENTS.horizons
    )
    for cause in range(3):
        for place, horizon in enumerate(EVENTS.horizons):
            observed = ((targets[:, 2] == cause + 1) & (targets[:, 1] <= horizon)).mean()
            assert incidence[cause, place].item() == pytest.approx(observed, abs=0.004)


def test_fitted__cuts_at_horizons_and_quantiles_of_the_first_cause_but_at_no_patients_time():
    targets = population(3_000)
    grid = Hazards.fitted(EVENTS, targets)
    assert {*EVENTS.horizons} <= {*grid.cuts}
    assert grid.cuts == tuple(sorted(grid.cuts))
    assert grid.cuts[-1] == EVENTS.horizons[-1]
    assert not np.isin(grid.cuts[:-1], targets[:, 1]).any()
    by = [((targets[:, 2] == 1) & (targets[:, 1] <= cut)).sum() for cut in (0, *grid.cuts)]
    assert len(grid.cuts) > 5
    few = Hazards.fitted(EVENTS, targets[:120])
    assert few.cuts == EVENTS.horizons
    assert np.diff(by).max() < 3 * np.median(np.diff(by))
    everyone = torch.from_numpy(grid.start(targets)).expand(1, len(targets), -1)
    loss = grid.loss(everyone, torch.from_numpy(targets)) / len(targets)
    assert loss.item() == pytest.approx(len(EVENTS.names))  # each cause relative to its null


def test_risks__rise_with_the_horizon_and_fall_where_others_compete():
    logits = torch.randn(500, 12, generator=torch.Generator().manual_seed(1)).double() * 3
    day, three_days, alone, three_alone = risks_of(GRID, logits).T
    assert (day <= three_days).all()
    assert (day <= alone).all()
    assert (three_days <= three_alone).all()
    incidence = GRID.incidence(GRID.cumulative(logits), GRID.cuts)
    free = torch.exp(-GRID.cumulative(logits).sum(dim=(1, 2)))
    torch.testing.assert_close(incidence[..., -1].sum(dim=1) + free, torch.ones(500).double())


def test_start__is_exact_in_an_interval_in_which_most_rows_end():
    rates = (0.5 / 24, 3 / 24)
    events = CompetingEvents(("death", "discharge"), (24.0,), (2,))
    grid = Hazards(events, (24.0,), (1.0, 1.0))
    targets = population(400_000, rates=rates)
    risks = risks_of(grid, torch.from_numpy(grid.start(targets)))
    expected = [truth(24, rates), truth(24, rates, without=(2,))]
    np.testing.assert_allclose(risks, expected, atol=0.005)


def test_early_observations__watched_from_the_prediction_time_on_give_the_same_hazards():
    rates, rng = (0.01, 0.02), np.random.default_rng(3)
    events = CompetingEvents(("death", "discharge"), (24.0, 72.0))
    late = population(100_000, rates=rates)
    moved = rng.uniform(0, 60, len(late))
    early = late + np.column_stack([moved, moved, 0 * moved])
    grid = Hazards.fitted(events, late)
    both = [risks_of(grid, torch.from_numpy(grid.start(x))) for x in (late, early)]
    np.testing.assert_allclose(*both, atol=0.01)
    naive = early * [0, 1, 1]  # as if an event could have come before the prediction time
    assert risks_of(grid, torch.from_numpy(grid.start(naive)))[0] < both[0][0] - 0.05


def test_config__is_plain_and_gives_the_same_grid_again():
    assert Hazards.from_config(GRID.config) == GRID
    assert EVENTS.risk_names == (
        *("risk_24h", "risk_72h", "risk_without_transplant_24h", "risk_without_transplant_72h"),
    )
    several = CompetingEvents(("x", "living donor", "deceased"), (24.0,), (2, 3))
    assert several.risk_names[1] == "risk_without_living_donor_or_deceased_24h"
    assert "living donor or deceased" in several.assumption
    assert CompetingEvents(("x",), (24.0, 8760.0), unit="d").horizon_names == ("1d", "365d")
