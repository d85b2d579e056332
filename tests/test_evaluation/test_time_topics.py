"""Sections of a report on times: closed forms of their numbers, figures, words, small counts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cohorts import repeated
from medgemma_clinical.evaluation.metrics import net_benefit
from medgemma_clinical.evaluation.time_metrics import metrics_at, net_benefit_at, observed_risk
from medgemma_clinical.evaluation.time_table import evaluate_times, time_sentences
from medgemma_clinical.evaluation.topics import times
from medgemma_clinical.evaluation.topics.calibration import calibration_table
from medgemma_clinical.evaluation.topics.decision_curve import decision_curve
from medgemma_clinical.evaluation.topics.topic import NO_CURVES
from medgemma_clinical.evaluation.verdicts import value_text
from pages import Page, make_evaluated, write_page
from test_evaluation.test_time_metrics import incidence_at
from time_rows import EVENTS, MODEL, OUTCOME, make_times

FIGURES = True
FIRST = EVENTS.risk_names[0]


@pytest.fixture(scope="module")
def rows():
    return make_times()


@pytest.fixture(scope="module")
def metrics(rows):
    return replace(evaluate_times(rows, EVENTS, 0), primary="blend")


def evaluated(rows, metrics, min_cell=0):
    return make_evaluated(rows, metrics, min_cell=min_cell, threshold=0.25)


def uncensored(rows):
    """The rows without censoring, and without events that compete."""
    hours = np.where(rows["event"] == 1, rows["event_hours"], 1000.0)
    return rows.assign(event_hours=hours, event=(rows["event"] == 1) * 1.0)


def test_curves_of_groups_are_aalen_johansens_and_count_who_is_at_risk(rows, metrics):
    table = times.group_table(EVENTS, evaluated(rows, metrics))
    edges = np.quantile(rows[MODEL], [1 / 3, 2 / 3])
    for k, name in enumerate(["low risk", "middle risk", "high risk"]):
        own = rows[np.searchsorted(edges, rows[MODEL], side="right") == k]
        found = table[table["group"] == name].set_index("hours")
        hours, event = own["event_hours"].to_numpy(), own["event"].to_numpy()
        for hour in (0, *EVENTS.horizons, *found.index[5:50:9]):
            line = found.loc[hour]
            assert line["observed"] == pytest.approx(incidence_at(hours, event, hour))
            assert line["at_risk"] == (hours >= hour).sum()
        means = [own[f"{MODEL} {risk}"].mean() for risk in EVENTS.risk_names[:2]]
        assert found["predicted"].dropna().to_dict() == pytest.approx(
            {24.0: means[0], 72.0: means[1]}
        )
    figure, alt = times.plot_incidence(table, EVENTS)
    curve = figure.axes[0].lines[0]
    own = table[table["group"] == "low risk"]
    assert curve.get_ydata().tolist() == (100 * own["observed"]).tolist()
    counts = own.loc[own["hours"].isin([0, 24, 72]), "at_risk"]
    assert [text.get_text() for text in figure.axes[1].texts][:3] == [*map(str, counts)]
    assert EVENTS.names[0] in alt


@pytest.mark.parametrize(("cases", "groups"), [(9, 1), (25, 2), (60, 3)])
def test_few_events_make_fewer_groups(rows, metrics, cases, groups):
    few = rows["event"].where((rows["event"] != 1) | ((rows["event"] == 1).cumsum() <= cases), 2)
    few = rows.assign(event=few, event_hours=rows["event_hours"].clip(upper=71))
    assert times.group_table(EVENTS, evaluated(few, metrics))["group"].nunique() == groups


@pytest.mark.parametrize("by_regression", [False, True])
def test_observed_risks_are_those_of_the_table_and_of_each_group(rows, by_regression):
    hours, event = rows["event_hours"].to_numpy(), rows["event"].to_numpy()
    given = np.random.default_rng(1).uniform(0.3, 1, len(rows)) if by_regression else None
    members = np.stack([np.ones(len(rows), bool), rows[MODEL] > 0.2, np.zeros(len(rows), bool)], 1)
    drawn = np.random.default_rng(2).multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
    weights = np.stack([np.ones(len(rows)), drawn])
    found = observed_risk(hours, event, 24.0, given, weights, members)
    expected = metrics_at(hours, event, rows[MODEL], 24.0, censoring=given)["observed"]
    assert found[0, 0] == pytest.approx(expected)
    assert np.isnan(found[:, 2]).all()
    if given is None:
        again = repeated(drawn * members[:, 1])
        assert found[1, 1] == pytest.approx(incidence_at(hours[again], event[again], 24.0))


def test_without_censoring_bins_and_net_benefit_are_those_of_labels(rows, metrics):
    view, observed = times.at_horizon(EVENTS, evaluated(uncensored(rows), metrics), FIRST)
    assert view.labels.sum() == ((rows["event"] == 1) & (rows["event_hours"] <= 24)).sum()
    for table, of_times in (
        (
            calibration_table(view.rows, MODEL, 0),
            calibration_table(view.rows, MODEL, 0, None, observed),
        ),
        (
            decision_curve(view.rows, view.names, 0),
            decision_curve(view.rows, view.names, 0, lambda *x: net_benefit_at(observed, *x)),
        ),
    ):
        pd.testing.assert_frame_equal(table, of_times)


def test_true_positives_are_the_incidence_of_those_predicted_positive(rows, metrics):
    view, observed = times.at_horizon(EVENTS, evaluated(rows, metrics), FIRST)
    risk, ones = rows[MODEL].to_numpy(), np.ones((1, len(rows)))
    (found,) = net_benefit_at(observed, risk, np.array([0.1, 0.3, 0.999]), ones)
    hours, event = rows["event_hours"].to_numpy(), rows["event"].to_numpy()
    for benefit, threshold in zip(found, (0.1, 0.3), strict=False):
        positive = risk >= threshold
        true = positive.mean() * incidence_at(hours[positive], event[positive], 24.0)
        assert benefit == pytest.approx(
            true - (positive.mean() - true) * threshold / (1 - threshold)
        )
    assert found[2] == 0, "nobody is predicted positive"
    plain = net_benefit(view.labels, risk, np.array([0.1]), ones)[0, 0]
    assert found[0] > plain, "a censored patient is no false positive"


def test_the_risk_without_an_intervention_takes_it_for_the_end_of_a_record(rows, metrics):
    name = EVENTS.risk_names[2]
    view, observed = times.at_horizon(EVENTS, evaluated(rows, metrics), name)
    assert view.rows[MODEL].equals(rows[f"{MODEL} {name}"])
    everyone = np.ones((len(rows), 1), bool)
    given = rows[f"uncensored {name}"].to_numpy()
    event = rows["event"].replace(2, 0)
    expected = metrics_at(rows["event_hours"], event, rows[MODEL], 24.0, censoring=given)
    assert observed(np.ones((1, len(rows))), everyone)[0, 0] == pytest.approx(expected["observed"])


def test_a_report_has_these_sections_and_hides_small_counts(rows, metrics, tmp_path):
    found = {}
    for min_cell in (0, 10):
        view = evaluated(rows, metrics, min_cell)
        source = write_page(
            tmp_path, evaluated=view, results=OUTCOME.topics(), config=OUTCOME.config
        )
        found[min_cell] = Page(source)
        bins = pd.read_csv(tmp_path / "figures" / "calibration.csv")
        assert {*bins["risk"]} == {*EVENTS.risk_names}
        for name, part in bins.groupby("risk"):
            view, _ = times.at_horizon(EVENTS, evaluated(rows, metrics), name)
            by_risk = view.labels[np.argsort(view.rows[MODEL].to_numpy())]
            for own in np.split(by_risk, part["n"].cumsum())[:-1]:
                assert min(own.sum(), (1 - own).sum()) >= min_cell
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    calibration = {f"calibration_{name}" for name in EVENTS.risk_names}
    assert names == {"learning_curve", *calibration}
    assert [found[k].text.count(NO_CURVES) for k in found] == [0, 2]
    sections = "Calibration", "Decision curve"
    assert all(f"{title} " in found[k].text for title in sections for k in found)
    assert ["Cumulative incidence" in found[k].text for k in found] == [True, False]


def test_a_risk_that_is_not_measured_has_no_figure(rows, metrics):
    table = metrics.table.copy()
    table.loc[(MODEL, ["oe", "oe_72h"]), "value"] = np.nan
    fewer = evaluated(rows, replace(metrics, table=table))
    measured = [f"calibration_{name}" for name in EVENTS.risk_names[2:]]
    assert [*times.calibration(EVENTS, fewer).figures] == ["cumulative_incidence", *measured]
    assert times.decision(EVENTS, fewer) is None


def test_a_site_has_its_own_metrics_at_the_first_horizon(rows, metrics):
    at = np.where(np.arange(len(rows)) % 3 == 0, "north", "south")
    view = make_evaluated(rows, metrics, sites=at, threshold=0.25)
    topic = times.time_topics(EVENTS)[-1](view)
    table = topic.numbers["sites"].set_index("site")
    for name, risk in (("north", at == "north"), ("south", at == "south")):
        own = rows[risk]
        horizon = EVENTS.horizons[0]
        found = metrics_at(own["event_hours"], own["event"], own[f"{MODEL} {FIRST}"], horizon)
        line = table.loc[name]
        for metric in ("auroc", "oe", "slope"):
            assert line[metric] == pytest.approx(found[metric])
        assert line["prevalence"] == pytest.approx(found["observed"])


def test_the_box_says_both_risks_their_difference_and_the_planned_comparison(rows, metrics):
    texts = [str(finding) for finding in time_sentences(metrics, EVENTS)]
    for by, risk, without in zip(
        ("24h", "72h"), EVENTS.risk_names, EVENTS.risk_names[2:], strict=False
    ):
        (text,) = (text for text in texts if f"says that by {by}" in text)
        mean = rows[f"{MODEL} {risk}"].mean()
        assert f"{100 * mean:.1f}\xa0%" in text
        other = rows[f"{MODEL} {without}"].mean()
        assert f"{100 * other:.1f}\xa0%" in text
        assert f"{100 * (other - mean):+.1f} percentage points" in text
    assert sum("(blend)" in text for text in texts) == 1
    for title, end in (
        ("death by 72h", "72h"),
        ("death by 72h without transplant", "without_transplant_72h"),
    ):
        ratio = value_text(metrics.row(MODEL, f"oe_{end}"), ".2f")
        (text,) = (text for text in texts if f"risks of {title} may " in text)
        assert f"O/E {ratio}, 1 is ideal" in text
    alone = time_sentences(replace(metrics, primary=None), EVENTS)
    assert not any("blend" in str(finding) for finding in alone)
    table = metrics.table.copy()
    table.loc[(MODEL, "mean_risk_without_transplant_24h"), "value"] = np.nan  # hidden
    fewer = [str(finding) for finding in time_sentences(replace(metrics, table=table), EVENTS)]
    assert [text for text in texts if "says that by 24h" not in text][-3:] == fewer[-3:]
    assert not any("nan" in text or "says that by 24h" in text for text in fewer)
