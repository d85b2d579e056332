"""Updates of times: known moves are found and undone, and noise moves nothing."""

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.evaluation.time_updates import evaluate_time_updates, moved_risk
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import TimeOutcome

EVENTS = CompetingEvents(("death", "leaving"), (24.0, 72.0))
STAGE = "stage 1 (trajectory alone)"


def cohort(n, seed=0, move=(1.0, 0.0), ends=150.0):
    """Rows whose risks are the true ones, moved; the true risks (2, n)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    rates = np.exp([-5 + 0.8 * x, -4.5 + 0.3 * x])
    times, censored = rng.exponential(1 / rates), rng.exponential(ends, n)
    hours, total = times.min(axis=0), rates.sum(axis=0)
    event = np.where(hours < censored, 1 + times.argmin(axis=0), 0)
    table = {"event_hours": np.minimum(hours, censored), "event": event.astype(float)}
    table["patient"] = np.arange(n).astype(str)
    truth = [rates[0] / total * (1 - np.exp(-total * horizon)) for horizon in EVENTS.horizons]
    for name, risk in zip(EVENTS.risk_names, truth, strict=True):
        table[f"m {name}"] = moved_risk(risk, *move)
    return pd.DataFrame(table), truth


def test_a_known_move_is_undone_at_each_horizon():
    rows, truth = cohort(3000, move=(0.6, -1.0))
    found = evaluate_time_updates(rows, "m", EVENTS, 0)
    assert {*found.methods.values()} == {decision.BOTH}
    assert found.gain.startswith("-")
    for name, horizon, risk in zip(EVENTS.risk_names, EVENTS.horizons, truth, strict=True):
        again = moved_risk(rows[f"m {name}"].to_numpy(), *found.moves[name])
        values = metrics_at(rows["event_hours"], rows["event"], again, horizon)
        assert values["slope"] == pytest.approx(1, abs=1e-6)
        assert values["oe"] == pytest.approx(1, abs=0.03)
        assert np.abs(again - risk).mean() < 0.02


def test_true_risks_stay_though_a_fit_to_the_same_rows_would_improve_them():
    kept = [evaluate_time_updates(cohort(400, k)[0], "m", EVENTS, k) for k in range(8)]
    methods = [method for found in kept for method in found.methods.values()]
    assert methods.count(decision.NOT_UPDATED) >= 14


def test_a_level_needs_no_slope_where_events_are_few():
    rows, _ = cohort(500, 1, move=(1.0, 1.0))
    found = evaluate_time_updates(
        rows.drop(columns="m risk_72h").assign(**{"m risk_72h": rows["m risk_24h"]}), "m", EVENTS, 0
    )
    assert ((rows["event"] == 1) & (rows["event_hours"] <= 24)).sum() < decision.MIN_SLOPE_EVENTS
    assert found.methods["risk_24h"] == decision.INTERCEPT
    assert found.moves["risk_24h"][0] == 1


def test_rows_that_were_not_watched_until_the_horizon_are_not_free_of_the_event():
    """As such they would speak for risks that are too low."""
    rows, _ = cohort(3000, 2, move=(1.0, -0.7), ends=25.0)
    assert (rows.loc[rows["event_hours"] < 72, "event"] == 0).mean() > 0.5
    found = evaluate_time_updates(rows, "m", EVENTS, 0)
    assert decision.NOT_UPDATED not in found.methods.values()
    assert found.gain.startswith("-")


def test_a_threshold_does_not_depend_on_rows_whose_outcome_is_not_known():
    outcome = TimeOutcome(Hazards(EVENTS, EVENTS.horizons, (1.0, 1.0)))
    rows, _ = cohort(2000, 3, ends=30.0)
    rows["m"] = rows["m risk_24h"]
    first = outcome.choose_threshold("specificity 0.8", rows, "m")
    rows.loc[(rows["event"] == 0) & (rows["event_hours"] <= 24), "m"] = 0.99
    assert outcome.choose_threshold("specificity 0.8", rows, "m") == first


def test_a_horizon_that_nobody_reaches_is_not_moved():
    rows, _ = cohort(2000, move=(1.0, 1.0))
    is_late = rows["event_hours"] > 30
    rows.loc[is_late, ["event_hours", "event"]] = [30.0, 0.0]
    found = evaluate_time_updates(rows, "m", EVENTS, 0)
    assert found.methods == {"risk_24h": decision.INTERCEPT, "risk_72h": decision.NOT_UPDATED}
    assert found.moves["risk_72h"] == (1.0, 0.0)


@pytest.mark.parametrize("used", [STAGE, "blend"])
def test_two_updates_of_a_model_are_one_after_the_other_and_touch_no_other_model(used):
    outcome = TimeOutcome(Hazards(EVENTS, EVENTS.horizons, (1.0, 1.0)))
    config = {"stage": "trajectory", "models": {"blend": {}}, "decision": {}}
    rule, moves = DecisionRule(threshold=0.2), []
    for seed in range(2):
        rows = cohort(3000, seed, move=(0.7, 0.5))[0]
        found = evaluate_time_updates(rows, "m", EVENTS, 0)
        config = outcome.updated(config, used, rule, found, rows)
        moves.append(found.moves)
        stored = config["decision"] if used == STAGE else config["models"][used]
        rule = DecisionRule.from_config({"decision": stored})
    risk = np.linspace(0.01, 0.9, 9)
    assert [*config["moves"]] == [used]
    for name in EVENTS.risk_names:
        one_by_one = moved_risk(moved_risk(risk, *moves[0][name]), *moves[1][name])
        np.testing.assert_allclose(moved_risk(risk, *config["moves"][used][name]), one_by_one)
    twice = moved_risk(moved_risk(np.array([0.2]), *moves[0]["risk_24h"]), *moves[1]["risk_24h"])
    assert rule.threshold == pytest.approx(twice.item())


def test_moved_curves_do_not_fall_and_leave_room_for_all_events():
    outcome = TimeOutcome(Hazards(EVENTS, (24.0, 48.0, 72.0), (1.0, 1.0)))
    forecast = np.random.default_rng(0).exponential(1.0, (200, 2, 3))
    moves = {"risk_24h": (0.8, 1.5), "risk_72h": (1.3, -0.5)}
    hours = np.arange(0, 73, 4.0)
    _, _, curves = outcome.curves(forecast, hours, moves)
    assert (np.diff(curves[:, 0]) >= -1e-12).all()
    assert curves.sum(axis=1).max() <= 1 + 1e-12
    risks = outcome.risks("m", forecast, moves)
    for name, horizon in zip(EVENTS.risk_names, EVENTS.horizons, strict=True):
        at = curves[:, 0, hours.tolist().index(horizon)]
        np.testing.assert_allclose(at, np.maximum(risks[f"m {name}"], at), rtol=1e-12)
    assert (risks["m risk_72h"] >= risks["m risk_24h"]).all()
