"""Baselines of times: person-period rows, hazards, and what is kept of them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation import baselines
from medgemma_clinical.evaluation.time_baselines import (
    NULL,
    fit_regressions,
    fold_losses,
    hazards_of,
    null_hazards,
    periods_of,
)
from medgemma_clinical.evaluation.time_metrics import aalen_johansen
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import TimeOutcome

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
    hours, event = np.array([30.0, 30.0, 100.0, 24.0]), np.array([0.0, 2.0, 1.0, 1.0])
    found = np.column_stack(periods(hours, event)[0][:4]).tolist()
    assert found == [
        *([0, 0, 0, 1], [0, 1, 0, 0.25]),  # censored a quarter into the second
        *([1, 0, 0, 1], [1, 1, 2, 1]),
        *([2, 0, 0, 1], [2, 1, 0, 1], [2, 2, 0, 1]),
        [3, 0, 1, 1],
    ]


def test_a_joined_row_has_its_last_event_and_its_share_of_all_intervals():
    hours, event = np.array([30.0, 30.0, 100.0, 24.0]), np.array([0.0, 2.0, 0.0, 1.0])
    found = periods(hours, event)[0].joined()
    assert found.event.tolist() == [0, 2, 0, 1]
    assert found.weight.tolist() == pytest.approx([1.25 / 3, 1, 1, 1])
    assert found.shape == (2, 1)


def test_hazards_within_an_interval_return_the_chances():
    rates, days = np.array([0.02, 0.05]), 7.0
    free = np.exp(-rates.sum() * days)
    chances = np.array([[free, *(rates / rates.sum() * (1 - free))]])
    np.testing.assert_allclose(hazards_of(chances)[:, 0], rates * days)
    assert (hazards_of(np.array([[1.0, 0.0, 0.0]])) > 0).all()  # its logarithm is taken


def test_the_null_model_has_the_incidences_of_aalen_and_johansen():
    _, _, hours, event = population(400)
    hours, grid = hours.round(), periods(hours, event)[1]
    times, incidence = aalen_johansen(hours, event)
    expected = incidence[:, np.searchsorted(times, CUTS, side="right") - 1]
    null = torch.from_numpy(null_hazards(hours, event, CUTS))
    np.testing.assert_allclose(grid.incidence(null, CUTS), expected, rtol=1e-12)


def test_a_regression_is_the_multinomial_one_of_person_periods():
    x, _, hours, event = population(600)
    table = np.column_stack([x, np.where(x > 1, np.nan, x**2)])
    found, _ = periods(hours, event)
    (model,) = fit_regressions(table, found, [0.1], ["x", "square"])
    filled = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    filled = np.column_stack([filled, np.isnan(table[:, 1])])
    scaled = (filled - filled.mean(axis=0)) / filled.std(axis=0)
    design = np.column_stack([scaled[found.row], 30 * np.eye(3)[found.interval]])
    plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8)
    plain.fit(design, found.event, sample_weight=found.weight)
    new = np.column_stack([np.repeat(scaled[:5], 3, axis=0), 30 * np.tile(np.eye(3), (5, 1))])
    expected = hazards_of(plain.predict_proba(new).reshape(5, 3, 3))
    risks = model.risks(pd.DataFrame(table[:5], columns=["x", "square"]))
    np.testing.assert_allclose(risks, expected, rtol=2e-3)


def test_the_penalty_is_chosen_by_the_first_event():
    """Of a rare event that nothing predicts, beside a frequent one that much does."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1500, 30))
    second = np.exp(-4 + values[:, :10].sum(axis=1) / 2)
    times = rng.exponential(1 / np.array([np.full(1500, np.exp(-6.0)), second]))
    hours, event = times.min(axis=0), 1.0 + times.argmin(axis=0)
    found, _ = periods(hours, event)
    parts = np.arange(0, 1000), np.arange(1000, 1500)
    losses = fold_losses(values, found, *parts)
    assert int(np.argmin(losses)) <= 1
    models = fit_regressions(
        values, found.of(parts[0]), baselines.PENALTIES[baselines.PENALTY], [*range(30)]
    )
    held_out, every = found.of(parts[1]), []
    for model in models:
        odds = model.scaled(pd.DataFrame(values))[held_out.row] @ model.coefficients.T
        chances = softmax(odds + model.intercept[held_out.interval], axis=1)
        every.append(
            -(held_out.weight * np.log(chances[np.arange(len(odds)), held_out.event])).sum()
        )
    assert int(np.argmin(every)) > int(np.argmin(losses))


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
    outcome = TimeOutcome(Hazards.fitted(dataset.competing_events, dataset.targets()))
    settings = outcome.tune_baselines(dataset, rows, ["static_age [years]"])
    return outcome, settings, outcome.fit_baselines(dataset, rows, settings)


def test_baselines_find_the_risks_of_a_known_population(fitted):
    outcome, settings, models = fitted
    assert settings.trees.keys() == {"1", "2"}
    assert {*models.names} == {
        *outcome.baseline_names(with_times(50)[0], [], ["static_age [years]"])
    }
    new, rates = with_times(2000, seed=5)
    total = rates[:2].sum(axis=0)
    truth = rates[0] / total * (1 - np.exp(-72 * total))
    risks = {k: outcome.risks("m", x)["m risk_72h"] for k, x in models.risks(new).items()}
    distance = pd.Series({name: np.abs(risk - truth).mean() for name, risk in risks.items()})
    assert distance["logistic regression"] < 0.02
    assert distance["gradient boosting with statics"] < 0.04
    assert distance[NULL] > 0.08
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
    grid = TimeOutcome(Hazards(dataset.competing_events, (72.0,), (1.0, 1.0)))
    rows, (found, _) = np.arange(800), periods(table["event_hours"], table["event"], (72.0,))
    settings = grid.tune_baselines(dataset, rows, [])
    hazards = grid.fit_baselines(dataset, rows, settings).risks(dataset)["gradient boosting"]
    shares = np.bincount(found.event, found.weight)[1:] / found.weight.sum()
    np.testing.assert_allclose(1 - np.exp(-hazards[0].sum()), shares.sum(), rtol=0.02)


def test_kept_baselines_give_the_same_hazards(fitted):
    outcome, _, models = fitted
    again = outcome.read_baselines(models.to_json())
    rows = with_times(40, seed=7)[0]
    found, expected = again.risks(rows), models.risks(rows)
    assert [*found] == [*expected] == models.names
    for name, hazards in expected.items():
        np.testing.assert_array_equal(found[name], hazards)
        assert hazards.shape == (40, 2, len(outcome.hazards.cuts))


def test_a_blend_is_the_mean_of_the_hazards(fitted):
    models = fitted[2].risks(with_times(40, seed=7)[0])
    pair = models["logistic regression"], models["gradient boosting"]
    np.testing.assert_allclose(models["blend"], np.mean(pair, axis=0))


@pytest.mark.parametrize(
    "alter",
    [
        lambda content: content["null"].pop(),
        lambda content: content["null"][0].append(1.0),
        lambda content: content["null"][0].__setitem__(0, -1.0),
        lambda content: content["models"]["gradient boosting"].update(intervals=10**9),
        lambda content: content["models"]["gradient boosting"]["text"].pop(),
        lambda content: content["models"]["last value"]["intercept"].pop(),
        lambda content: content["models"]["last value"]["coefficients"].pop(),
    ],
)
def test_altered_hazards_are_refused(fitted, alter):
    content = json.loads(fitted[2].to_json())
    alter(content)
    with pytest.raises((ValueError, IndexError)):
        fitted[0].read_baselines(json.dumps(content))


def test_later_rows_change_no_hazard_of_another(fitted):
    models = fitted[2]
    rows = with_times(40, seed=7)[0]
    alone = models.risks(rows, np.array([3]))
    for name, hazards in models.risks(rows).items():
        np.testing.assert_allclose(alone[name][0], hazards[3], rtol=1e-12)
