"""What is evaluated: a label is the target that nobody left early; weights, and what they hide."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cohorts import noisy, repeated
from medgemma_clinical.evaluation import metrics_table
from medgemma_clinical.evaluation.censoring import CensoringRegression, Watched
from medgemma_clinical.evaluation.metrics import LOGIT, of_labels
from medgemma_clinical.evaluation.target import (
    DEPENDS,
    LABEL,
    UNCENSORED,
    Target,
    is_risk,
    read_weights,
    targets_of,
    weighed,
    weight_columns,
)
from medgemma_clinical.evaluation.time_metrics import CLOGLOG, known_at, uncensored_probability
from test_evaluation.test_censoring import waiting_list
from test_evaluation.test_time_metrics import HORIZON, population
from time_rows import EVENTS, MODEL, TARGETS, make_times, weighed_targets

DEATH = TARGETS[0]
FIELDS = "case", "draws", "weights", "fitted", "fitted_weights"


def all_metrics(known, risk):
    """Return all that is known of risks in each weighting, by name."""
    at = np.array([0.1, 0.3])
    found = known.ranking(risk) | known.level(risk) | known.calibration(risk)
    found |= known.distances(risk) | known.shares(risk >= 0.3)
    return found | {"net_benefit": known.net_benefit(risk, at)}


def listed(rows=400, seed=0, **more):
    """Return a waiting list as a table of predictions, and what its ends may depend on."""
    hours, event, inputs, _, risk = waiting_list(rows, seed, **more)
    table = pd.DataFrame({"event_hours": hours, "event": event})
    table["patient"] = np.arange(rows).astype(str)
    return table.assign(**{DEATH.column(MODEL): risk}), inputs


# --------------------------------------------------------------------------- labels and times


@pytest.fixture
def complete():
    """Rows that nobody left before the horizon, with their labels and risks."""
    hours, event, risk, *_ = population(300, censoring=0)
    late = hours > HORIZON
    hours, event = np.where(late, [*[HORIZON, 500.0] * 150], hours), np.where(late, 0, event)
    label = ((event == 1) & (hours <= HORIZON)).astype(int)
    table = pd.DataFrame({"id": np.arange(300), "label": label, "patient": np.arange(300) // 2})
    table[["model", "other"]] = np.stack([risk, noisy(risk, 1)], axis=1)
    times = {DEATH.column(name): table[name] for name in ("model", "other")}
    return table, table[["id", "patient"]].assign(event_hours=hours, event=event, **times)


@pytest.mark.parametrize("link", [LOGIT, CLOGLOG])
def test_a_label_is_the_target_that_nobody_left_early(complete, link):
    labels, times = complete
    target, risk = replace(DEATH, link=link), labels["model"].to_numpy()
    draws = np.random.default_rng(0).integers(0, 4, (5, 300)).astype(float)
    part = np.arange(10, 200)
    for own in (slice(None), part):
        expected, found = (x.known(y, draws, own) for x, y in ((LABEL, labels), (target, times)))
        for field in FIELDS:
            assert np.array_equal(getattr(found, field), getattr(expected, field)), field
        assert not found.has_weights
        values, others = (all_metrics(known, risk[own]) for known in (expected, found))
        for name, value in values.items():
            depends = name in ("intercept", "slope", "ici", "e50", "e90") and link is CLOGLOG
            assert np.array_equal(value, others[name], equal_nan=True) != depends, name
    known = of_labels(labels["label"].to_numpy(float))
    assert all_metrics(known, risk)["auroc"] == all_metrics(target.known(times), risk)["auroc"]


def test_a_table_of_metrics_is_that_of_labels_to_the_bit(complete):
    target = replace(DEATH, link=LOGIT)
    expected, found = (
        metrics_table.evaluate(rows, 0, 0.3, split=np.arange(300) // 2 % 3, targets=[own])
        for rows, own in zip(complete, (LABEL, target), strict=True)
    )
    assert found.counts == expected.counts
    pd.testing.assert_frame_equal(found.at(target).table, expected.table, check_exact=True)


# --------------------------------------------------------------------------- draws of rows


WEIGHTS = ["nobody left", "Kaplan-Meier", "given"]


@pytest.mark.parametrize("ends", [(), (2,)])
@pytest.mark.parametrize("way", WEIGHTS)
def test_whole_weights_equal_repeated_rows(way, ends):
    rows, _ = listed(200, step=4.0)
    risk = rows[DEATH.column(MODEL)].to_numpy().round(2)  # ties
    if way == "nobody left":
        rows["event"] = rows["event"].replace(0, 3)
    elif way == "given":
        given = np.random.default_rng(1).uniform(0.3, 1, 200)
        rows[f"{UNCENSORED}{DEATH.name}"] = given
    target = replace(DEATH, ends=ends)
    draws = np.random.default_rng(0).integers(0, 4, (6, 200)).astype(float)
    part = np.arange(20, 190)
    for own in (slice(None), part):
        found = all_metrics(read_weights([target], rows)[0].known(rows, draws, own), risk[own])
        for k, draw in enumerate(draws[:, own]):
            again = np.arange(200)[own][repeated(draw)]
            sample = rows.iloc[again]
            (alone,) = read_weights([target], sample)
            expected = all_metrics(alone.known(sample), risk[again])
            for name, value in expected.items():
                np.testing.assert_allclose(found[name][k], value[0], rtol=1e-6, atol=1e-9)


def test_a_draw_of_kaplan_meier_is_that_of_repeated_rows():
    rows, _ = listed(200, step=4.0)
    hours, event = rows["event_hours"].to_numpy(), rows["event"].to_numpy()
    draws = np.random.default_rng(0).integers(0, 4, (6, 200)).astype(float)
    found = uncensored_probability(hours, event, HORIZON, draws)
    for draw, of_draw in zip(draws, found, strict=True):
        again = repeated(draw)
        expected = uncensored_probability(hours[again], event[again], HORIZON)
        np.testing.assert_allclose(of_draw[again], expected, rtol=1e-12)


def test_a_draw_refits_the_regression_of_the_censoring():
    """Beside a regression that is fitted anew on the drawn rows, whose folds are other ones."""
    rows, inputs = listed(600)
    hours, event = rows["event_hours"].to_numpy(), rows["event"].to_numpy()
    row = np.arange(600)

    def regression(own):
        is_censored = event[own] == 0
        return CensoringRegression(hours[own], is_censored, inputs[own], HORIZON, own, 0)

    usual = regression(row)
    draws = np.random.default_rng(0).multinomial(600, np.full(600, 1 / 600), 8).astype(float)
    moved = Watched([usual]).under(draws)
    groups = inputs[:, 1] > 0.5, inputs[:, 1] < -0.5  # it depends on this input
    changes = []
    for draw, probability in zip(draws, moved, strict=True):
        again = repeated(draw)
        anew = regression(again).probability
        for group in groups:
            own = group[again]
            before = usual.probability[again][own].mean()
            refitted, moves = anew[own].mean() - before, probability[again][own].mean() - before
            changes.append((refitted, moves))
    # Other folds add about the same to all draws.
    for found in np.reshape(changes, (len(draws), len(groups), 2)).transpose(1, 2, 0):
        assert np.polyfit(*found[::-1], 1)[0] == pytest.approx(1, abs=0.3)
        assert np.corrcoef(found)[0, 1] > 0.9
    np.testing.assert_allclose(usual.under(np.ones((1, 600)))[0], usual.probability)


def test_weights_of_draws_are_those_of_their_regressions():
    rows, inputs = listed(600)
    targets = weighed(TARGETS[::2], rows, lambda: inputs, "regression", 0)
    draws = np.random.default_rng(0).multinomial(600, np.full(600, 1 / 600), 3).astype(float)
    for target, reasons in zip(targets, ([0], [0, 2]), strict=True):
        hours, event = target.follow_up(rows)
        given = inputs, target.horizon, rows["patient"].to_numpy(str), 0
        fits = [CensoringRegression(hours, event == reason, *given) for reason in reasons]
        alone = np.prod([fit.probability for fit in fits], axis=0)
        known, drawn = target.known(rows), target.known(rows, draws)
        own = *target.times(rows), target.horizon
        for found, weights, probability in (
            (known, np.ones((1, 600)), alone),
            (drawn, draws, np.prod([fit.under(draws) for fit in fits], axis=0)),
        ):
            expected = known_at(*own, weights, probability)
            np.testing.assert_allclose(found.weights, expected.weights)
        assert not np.allclose(drawn.weights, known_at(*own, draws, alone).weights, rtol=0.01)


# --------------------------------------------------------------------------- what decides nothing


@pytest.mark.parametrize("censoring", ["km", "regression"])
def test_what_happens_after_the_horizon_changes_nothing(censoring):
    rows, inputs = listed(500)
    draws = np.random.default_rng(0).integers(0, 3, (2, 500)).astype(float)
    for target in TARGETS[::2]:
        later = rows["event_hours"] > target.horizon
        others = rows.assign(
            event=rows["event"].mask(later, np.random.default_rng(1).integers(0, 3, 500)),
            event_hours=rows["event_hours"].mask(later, target.horizon + 0.1 + np.arange(500)),
        )
        ended = rows.assign(
            event=rows["event"].mask(later, 0),
            event_hours=rows["event_hours"].clip(upper=target.horizon),
        )
        knowns = []
        for table in (rows, others, ended):
            (own,) = weighed([target], table, lambda: inputs, censoring, 0)
            knowns.append(own.known(table, draws))
            assert own.note == (DEPENDS if censoring == "km" else "")
        for known in knowns[1:]:
            for field in FIELDS:
                np.testing.assert_allclose(getattr(known, field), getattr(knowns[0], field))


# --------------------------------------------------------------------------- refusals, files


def test_a_problem_says_why_there_are_no_metrics():
    labels = pd.DataFrame({"label": [0, 1, 0]})
    assert LABEL.problem(labels) == ""
    for same in (labels.iloc[[1]], labels.iloc[[0, 2]]):
        assert "all have, or all lack, the event" in LABEL.problem(same)
    assert LABEL.problem(labels.iloc[:0]) == DEATH.problem(listed()[0].iloc[:0]) == "none left"
    rows, _ = listed()
    assert DEATH.problem(rows) == ""
    assert "horizon 24" in DEATH.problem(rows.assign(event=2, event_hours=1.0))
    late = np.flatnonzero(rows["event_hours"] >= 24)
    few = rows.drop(index=late[9:])
    assert "9 rows are at risk" in DEATH.problem(few)
    assert DEATH.problem(rows.drop(index=late[10:])) == ""
    nobody = rows.assign(event=rows["event"].replace(1, 0))
    assert "no row has event 1" in DEATH.problem(nobody)
    early = pd.DataFrame({"event_hours": [1.0, *[5.0] * 480, *[30.0] * 20], "event": 0})
    early.loc[0, "event"] = 1
    assert "4.0% of the rows would be uncensored" in DEATH.problem(early)
    # What is not measured has no value.
    table = metrics_table.evaluate(few.assign(id="x"), 0, targets=[DEATH]).at(DEATH).of(MODEL)
    assert table["value"].dropna().index.tolist() == ["effective_n"]


def test_labels_of_a_target_are_unknown_where_the_record_ends_before():
    rows = pd.DataFrame({"event_hours": [5.0, 5, 5, 24, 30, 24], "event": [0, 1, 2, 0, 1, 1]})
    expected = [np.nan, 1, 0, 0, 0, 1]
    np.testing.assert_array_equal(DEATH.labels(rows), expected)
    without = replace(DEATH, ends=(2,))
    np.testing.assert_array_equal(without.labels(rows), [np.nan, 1, np.nan, 0, 0, 1])


def test_targets_are_read_as_they_were_written():
    for target in (LABEL, *TARGETS, replace(DEATH, link=LOGIT)):
        assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target
    rows = make_times(50)
    weighed_ones = weighed_targets(rows)
    assert [Target.from_json(x.to_json()) for x in weighed_ones] == [*TARGETS]  # of no rows
    assert targets_of(None) == (LABEL,)
    assert [x.name for x in TARGETS] == [*EVENTS.risk_names]
    assert [bool(x.assumption) for x in TARGETS] == [False, False, True, True]
    assert len({x.key("auroc") for x in TARGETS}) == len({x.column("m") for x in TARGETS}) == 4


def test_a_table_of_predictions_brings_models_and_weights():
    rows = make_times(60)
    for target in TARGETS:
        assert target.models(rows) == [MODEL, "blend"]
    columns = weight_columns(weighed_targets(rows))
    assert [*columns] == [f"{UNCENSORED}{x.name}" for x in TARGETS[2:]]
    assert not any(is_risk(name) for name in (*columns, "id", "patient", "event", "label", "fold"))
    pd.testing.assert_frame_equal(pd.DataFrame(columns), rows[[*columns]])


# --------------------------------------------------------------------------- tests of censoring


def ended(seed, effect, patients):
    """Draw two rows a patient, whose follow-up ends by the first of four inputs."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(patients, 4))
    hazards = np.stack([0.03 * np.exp(effect * inputs[:, 0]), np.full(patients, 0.02)])
    ends, row = rng.exponential(1 / hazards), np.arange(patients).repeat(2)
    rows = pd.DataFrame({"event_hours": ends.min(axis=0), "event": ends.argmin(axis=0)})
    return rows.assign(patient=np.arange(patients).astype(str)).iloc[row], inputs[row]


def depends(seed, effect, patients):
    rows, inputs = ended(seed, effect, patients)
    hours, event = DEATH.follow_up(rows)
    given = inputs, HORIZON, rows["patient"].to_numpy(), seed
    return CensoringRegression(hours, event == 0, *given).depends


@pytest.mark.slow
def test_censoring_is_not_said_to_depend_on_noise_and_a_strong_dependence_is_found():
    assert sum(depends(seed, 0.0, 60) for seed in range(100)) <= 9  # of 5 expected
    assert sum(depends(seed, 1.5, 100) for seed in range(10)) >= 9


@pytest.mark.parametrize(
    ("effect", "censoring", "note"),
    [(1.5, "km", DEPENDS), (1.5, "regression", ""), (0.0, "km", ""), (0.0, "regression", "")],
)
def test_a_note_says_that_the_inputs_tell_whose_follow_up_ends(effect, censoring, note):
    rows, inputs = ended(0, effect, 100)
    (target,) = weighed([DEATH], rows, lambda: inputs, censoring, 0)
    assert target.note == note
    assert (target.watched is None) == (censoring == "km")


# --------------------------------------------------------------------------- calibrated risks


def cohort_of(kind, rows, seed):
    """Return what is known of rows, and their true risks."""
    effect = 0.5 if kind == "given" else 0.0
    hours, event, risk, x, _ = population(rows, seed=seed, effect=effect)
    if kind == "label":
        return of_labels((np.random.default_rng(seed).random(rows) < risk).astype(float)), risk
    given = np.exp(-0.02 * np.exp(effect * x) * np.minimum(hours, HORIZON))
    weights = given if kind == "given" else None
    return known_at(hours, event, HORIZON, np.ones((1, rows)), weights), risk


@pytest.mark.parametrize("kind", ["label", "Kaplan-Meier", "given"])
def test_the_ideal_distance_is_that_of_calibrated_risks(kind):
    found, ideal, off = [], [], []
    for seed in range(40):
        known, risk = cohort_of(kind, 400, seed)
        found.append(known.distances(risk)["ici"].item())
        ideal.append(known.ideal_distance(risk, np.arange(400), seed))
        wrong = known.link.moved(risk, 0.4, -0.8)
        ideal_of_wrong = known.ideal_distance(wrong, np.arange(400), seed)
        off.append((known.distances(wrong)["ici"].item(), ideal_of_wrong))
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(ideal) == pytest.approx(np.mean(found), abs=3 * error)
    assert np.mean(ideal) == pytest.approx(np.mean(found), rel=0.2)
    distance, of_wrong = np.mean(off, axis=0)
    assert of_wrong < 1.3 * np.mean(found) < distance  # of other risks, too
