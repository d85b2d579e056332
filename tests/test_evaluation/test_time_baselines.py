"""Baselines of times: person-period rows, hazards, and what is kept of them."""

import numpy as np
import pandas as pd
import pytest
import simulations
import torch
from scipy.optimize import minimize

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.time_baselines import (
    fit_period_trees,
    fit_regressions,
    fold_losses,
    null_hazards,
    periods_of,
    person_periods,
)
from medgemma_clinical.evaluation.time_metrics import aalen_johansen
from medgemma_clinical.models.hazards import Hazards

CUTS = (24.0, 48.0, 72.0)


def population(n=3000, seed=0):
    """Two hazards that a value decides, and a third of the rows censored."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    rates = np.exp([-5.2 + 0.9 * x, -4.6 + 0.4 * x, np.full(n, -5.5)])
    times = rng.exponential(1 / rates)
    return x, rates, times.min(axis=0), np.array([1.0, 2.0, 0.0])[times.argmin(axis=0)]


def periods(hours, event, cuts=CUTS):
    grid = Hazards(CompetingEvents(("death", "leave"), (72.0,)), cuts, ())
    watched = grid.watched(torch.from_numpy(np.column_stack([0 * hours, hours, event])))
    return periods_of(watched.exposure.numpy(), watched.is_event.numpy()), grid


def test_a_row_stands_in_the_intervals_in_which_it_was_watched():
    hours, event = np.array([30.0, 30.0, 100.0, 24.0, 0.0]), np.array([0.0, 2.0, 1.0, 1.0, 2.0])
    found = periods(hours, event)[0]
    assert found.exposure.tolist() == [
        [1, 0.25, 0],
        [1, 0.25, 0],  # up to the event
        [1, 1, 1],
        [1, 0, 0],
        [pytest.approx(0, abs=1e-5), 0, 0],
    ]
    assert found.exposure[4, 0] > 0  # it has an event at once
    assert np.argwhere(found.is_event).tolist() == [[1, 1, 1], [3, 0, 0], [4, 1, 0]]


def test_a_person_period_has_events_per_expected_events():
    hours, event = np.array([30.0, 30.0, 12.0, 24.0]), np.array([0.0, 2.0, 1.0, 1.0])
    row, values, targets = person_periods(
        np.array([[5.0], [6.0], [7.0], [8.0]]), periods(hours, event)[0]
    )
    assert row.tolist() == [0, 0, 1, 1, 2, 3]
    assert values.tolist() == [[5, 0], [5, 1], [6, 0], [6, 1], [7, 0], [8, 0]]
    first, second = 2 / 3.5, 1 / 0.5  # hazards of everyone: of event 1 early, of event 2 later
    np.testing.assert_allclose(targets[0][1], [first, 0, first, 0, first / 2, first], atol=1e-8)
    np.testing.assert_allclose(targets[1][1], [0, second / 4, 0, second / 4, 0, 0], atol=1e-8)
    for event, (rates, expected) in enumerate(targets, 1):
        events = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]][event - 1]
        np.testing.assert_allclose(rates * expected, events, atol=1e-8)


def test_an_event_that_no_row_has_stays_possible():
    x, _, hours, event = population(300)
    found, _ = periods(hours, np.where(event == 2, 0, event))
    (model,) = fit_regressions(x[:, None], found, [1.0], ["x"])
    trees = fit_period_trees(x[:, None], found, dict.fromkeys("12", baselines.USUAL_TREES), ["x"])
    table = pd.DataFrame({"x": [-1e6, 0.0, 1e6]})
    for hazards in (model.risks(table), trees.risks(table)):
        assert (hazards > 0).all()  # their logarithms are taken
        assert np.isfinite(hazards).all()
        assert hazards[:, -1].max() < 1e-6


def test_the_null_model_has_the_incidences_of_aalen_and_johansen():
    _, _, hours, event = population(400)
    hours, grid = hours.round(), periods(hours, event)[1]
    times, incidence = aalen_johansen(hours, event)
    expected = incidence[:, np.searchsorted(times, CUTS, side="right") - 1]
    null = torch.from_numpy(null_hazards(hours, event, CUTS))
    np.testing.assert_allclose(grid.incidence(null, CUTS), expected, rtol=1e-12)


def test_a_regression_has_the_exact_likelihood_of_constant_hazards():
    x, _, hours, event = population(600)
    table = np.column_stack([x, np.where(x > 1, np.nan, x**2)])
    found, _ = periods(hours, event)
    (model,) = fit_regressions(table, found, [0.1], ["x", "square"])
    filled = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    filled = np.column_stack([filled, np.isnan(table[:, 1])])
    scaled = (filled - filled.mean(axis=0)) / filled.std(axis=0)
    hazards = model.risks(pd.DataFrame(table, columns=["x", "square"]))
    for cause in (0, 1):

        def loss(numbers, cause=cause):
            log_hazard = numbers[:3] + (scaled @ numbers[3:])[:, None]
            lost = found.exposure * np.exp(log_hazard) - found.is_event[:, cause] * log_hazard
            return lost.sum() + (numbers[3:] ** 2).sum() / (2 * 0.1)

        best = minimize(loss, np.r_[-2, -2, -2, 0, 0, 0], method="BFGS").x
        expected = np.exp(best[:3] + (scaled @ best[3:])[:, None])
        np.testing.assert_allclose(hazards[:, cause], expected, rtol=5e-3)


def test_the_penalty_is_chosen_by_the_first_event():
    """Of a rare event that nothing predicts, beside a frequent one that much does."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1500, 30))
    second = np.exp(-4 + values[:, :10].sum(axis=1) / 2)
    times = rng.exponential(1 / np.array([np.full(1500, np.exp(-6.0)), second]))
    hours, event = times.min(axis=0), 1.0 + times.argmin(axis=0)
    parts = np.arange(0, 1000), np.arange(1000, 1500)
    losses, frequent = (
        fold_losses(values, periods(hours, numbers)[0], *parts) for numbers in (event, 3 - event)
    )
    assert int(np.argmin(losses)) <= 1
    assert int(np.argmin(frequent)) > int(np.argmin(losses))


@pytest.mark.parametrize("baseline", ["regression", "trees"])
@pytest.mark.parametrize("intervals", [1, 2])
def test_risks_without_interventions_are_true_in_wide_intervals(intervals, baseline):
    """Of a rare death, beside frequent other ends that few of the sickest outlive."""
    rates = simulations.RATES["rare deaths"]
    of_all, of_sickest = simulations.risk_distances(6000, intervals, rates, baseline)[1]
    assert abs(of_all) < 0.01
    assert abs(of_sickest) < 0.06


def with_times(n=3000, seed=0):
    x, rates, hours, event = population(n, seed)
    table = pd.DataFrame(
        {
            "subject_id": [f"p{k}" for k in range(n)],
            "clinical_trajectory": [f"20 (0h) -> {20 + 5 * v:.2f} (6h)" for v in x],
            "static_age [years]": np.random.default_rng(9).integers(20, 80, n),
            "event_hours": hours,
            "event": event,
        }
    )
    options = {"outcome_kind": "time", "horizon_hours": [24.0, 72.0]}
    return MIMICtrajectoryDataset(table, **options), rates


@pytest.fixture(scope="module")
def fitted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "FOLDS", 2)
        return fit_on(with_times(2000)[0])


def fit_on(dataset):
    rows = np.arange(len(dataset))
    outcome = Hazards.fitted(dataset.competing_events, dataset.targets())
    fits = outcome.fits(dataset, rows)
    settings = baselines.tune_baselines(dataset, rows, ["static_age [years]"], fits)
    return outcome, settings, baselines.fit_baselines(dataset, rows, settings, fits)


@pytest.mark.slow
def test_baselines_find_the_risks_of_a_known_population(fitted):
    outcome, settings, models = fitted
    assert settings.trees.keys() == {"1", "2"}
    few, rows = with_times(50)[0], np.arange(50)
    names = baselines.baseline_names(few, rows, ["static_age [years]"], outcome.fits(few, rows))
    assert {*models.names} == {*names}
    new, rates = with_times(2000, seed=5)
    total = rates[:2].sum(axis=0)
    truth = rates[0] / total * (1 - np.exp(-72 * total))
    risks = {name: outcome.risks(x)[:, 1] for name, x in models.forecasts(new).items()}
    distance = pd.Series({name: np.abs(risk - truth).mean() for name, risk in risks.items()})
    assert distance["logistic regression"] < 0.02
    assert distance["gradient boosting with statics"] < 0.04
    assert distance[baselines.NULL] > 0.08
    assert risks["blend"].mean() == pytest.approx(truth.mean(), rel=0.08)


def test_trees_count_an_interval_by_the_share_of_it_that_was_watched():
    """Of a constant hazard, most rows censored; the trees know nothing of the rows."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"clinical_trajectory": ["20 (0h) -> 20 (6h)"] * 800})
    times, censored = rng.exponential(60.0, (2, 800)), rng.uniform(0, 72, 800)
    table["event_hours"] = np.minimum(times.min(axis=0), censored)
    table["event"] = np.where(times.min(axis=0) < censored, 1 + times.argmin(axis=0), 0)
    options = {"outcome_kind": "time", "horizon_hours": [72.0]}
    dataset = MIMICtrajectoryDataset(table, **options)
    grid = Hazards(dataset.competing_events, (72.0,), (1.0, 1.0))
    rows, (found, _) = np.arange(800), periods(table["event_hours"], table["event"], (72.0,))
    fits = grid.fits(dataset, rows)
    settings = baselines.tune_baselines(dataset, rows, [], fits)
    fitted = baselines.fit_baselines(dataset, rows, settings, fits)
    hazards = fitted.risks(dataset)["gradient boosting"]
    np.testing.assert_allclose(hazards[0], found.level, rtol=0.02)


def test_kept_baselines_give_the_same_hazards(fitted):
    outcome, _, models = fitted
    again = baselines.Baselines.from_json(models.to_json())
    rows = with_times(40, seed=7)[0]
    found, expected = again.risks(rows), models.risks(rows)
    assert [*found] == [*expected] == models.names
    for name, hazards in expected.items():
        np.testing.assert_array_equal(found[name], hazards)
        assert hazards.shape == (40, 2, len(outcome.cuts))


def test_a_blend_is_the_mean_of_the_hazards(fitted):
    models = fitted[2].risks(with_times(40, seed=7)[0])
    pair = models["logistic regression"], models["gradient boosting"]
    np.testing.assert_allclose(models["blend"], np.mean(pair, axis=0))
    np.testing.assert_array_equal(fitted[0].blend(*pair), models["blend"])


def test_later_rows_change_no_hazard_of_another(fitted):
    models = fitted[2]
    rows = with_times(40, seed=7)[0]
    alone = models.risks(rows, np.array([3]))
    for name, hazards in models.risks(rows).items():
        np.testing.assert_allclose(alone[name][0], hazards[3], rtol=1e-12)
