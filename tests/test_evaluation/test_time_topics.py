"""Sections of a report on times: closed forms of their numbers, figures, words, small counts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cohorts import repeated
from medgemma_clinical.evaluation.metrics import LOGIT
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.evaluation.topics import all_topics, incidence
from medgemma_clinical.evaluation.topics.calibration import calibration_table, smooth_curve
from medgemma_clinical.evaluation.topics.decision_curve import decision_curve, threshold_table
from medgemma_clinical.evaluation.topics.subgroups import site_table
from medgemma_clinical.evaluation.topics.topic import NO_CURVES
from medgemma_clinical.evaluation.verdicts import sentences, value_text
from pages import Page, make_evaluated, write_page
from test_evaluation.test_time_metrics import incidence_at
from time_rows import EVENTS, MODEL, OUTCOME, TARGETS, make_times, weighed_targets

FIGURES = True
FIRST, _, WITHOUT, _ = TARGETS
USUAL = TARGETS[:2]
RISK = FIRST.column(MODEL)
THRESHOLD = 0.25


@pytest.fixture(scope="module")
def rows():
    return make_times()


@pytest.fixture(scope="module")
def metrics(rows):
    thresholds = [THRESHOLD] * len(TARGETS)
    return evaluate(rows, 0, thresholds, primary="blend", targets=weighed_targets(rows))


def evaluated(rows, metrics, min_cell=0, **more):
    about = {"threshold": THRESHOLD, "targets": weighed_targets(rows), "min_cell": min_cell}
    return make_evaluated(rows, metrics, **about, **more)


def test_curves_of_groups_are_aalen_johansens_and_count_who_is_at_risk(rows, metrics):
    table = incidence.group_table(evaluated(rows, metrics), USUAL)
    edges = np.quantile(rows[RISK], [1 / 3, 2 / 3])
    for k, name in enumerate(["low risk", "middle risk", "high risk"]):
        own = rows[np.searchsorted(edges, rows[RISK], side="right") == k]
        found = table[table["group"] == name].set_index("hours")
        hours, event = own["event_hours"].to_numpy(), own["event"].to_numpy()
        for hour in (0, *EVENTS.horizons, *found.index[5:50:9]):
            line = found.loc[hour]
            assert line["observed"] == pytest.approx(incidence_at(hours, event, hour))
            assert line["at_risk"] == (hours >= hour).sum()
        means = [own[target.column(MODEL)].mean() for target in USUAL]
        assert found["predicted"].dropna().to_dict() == pytest.approx(
            {24.0: means[0], 72.0: means[1]}
        )
    figure, alt = incidence.plot_incidence(table, USUAL)
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
    table = incidence.group_table(evaluated(few, metrics), USUAL)
    assert table["group"].nunique() == groups


@pytest.mark.parametrize("target", [FIRST, WITHOUT], ids=lambda target: target.name)
def test_observed_risks_of_groups_are_those_of_their_rows_alone(rows, target):
    (target,) = (x for x in weighed_targets(rows) if x.name == target.name)
    hours, event = target.times(rows)
    members = np.flatnonzero(rows[RISK] > 0.2)
    drawn = np.random.default_rng(2).multinomial(len(rows), np.full(len(rows), 1 / len(rows)))
    draws = np.stack([np.ones(len(rows)), drawn])
    found = target.known(rows, draws, members).level(rows[RISK].to_numpy()[members])["observed"]
    for observed, draw in zip(found, draws, strict=True):
        own = repeated(draw * np.isin(np.arange(len(rows)), members))
        given = None if target.watched is None else target.watched.probability[own]
        risk = rows[RISK].to_numpy()[own]
        expected = metrics_at(hours[own], event[own], risk, 24.0, censoring=given)["observed"]
        assert observed == pytest.approx(expected)
        if given is None:
            assert observed == pytest.approx(incidence_at(hours[own], event[own], 24.0))


def test_without_censoring_the_tables_are_those_of_labels(rows):
    case = (rows["event"] == 1) & (rows["event_hours"] <= 24)
    rows = rows.assign(event_hours=np.where(case, 12.0, 1000.0), event=case * 1.0, label=case * 1)
    target = replace(FIRST, link=LOGIT)
    names = {target.column(model): model for model in (MODEL, "blend")}
    labels = rows[["id", "label", "patient", *names]].rename(columns=names)
    views = [
        make_evaluated(labels, threshold=THRESHOLD),
        make_evaluated(
            rows,
            evaluate(rows, 0, THRESHOLD, targets=[target]),
            threshold=THRESHOLD,
            targets=[target],
        ).at(target),
    ]
    site = np.where(np.arange(len(rows)) % 3 == 0, "north", "south")
    tables = [
        [
            calibration_table(view.rows, view.risk(), view.target, 0),
            smooth_curve(view.rows, view.risk(), view.target, 0),
            threshold_table(view, [0.1, THRESHOLD]),
            decision_curve(view),
            site_table(view.rows, MODEL, site, 0, view.target),
        ]
        for view in views
    ]
    assert [view.target.name for view in views] == [LABEL.name, FIRST.name]
    for of_labels, of_times in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(of_labels, of_times, rtol=1e-12)


def test_the_risk_without_an_intervention_takes_it_for_the_end_of_a_record(rows, metrics):
    view = evaluated(rows, metrics).at(weighed_targets(rows)[2])
    assert view.rows[MODEL].tolist() == rows[WITHOUT.column(MODEL)].tolist()
    given = rows["uncensored_risk_without_transplant_24h"].to_numpy()
    event = rows["event"].replace(2, 0)
    expected = metrics_at(rows["event_hours"], event, view.risk(), 24.0, censoring=given)
    assert view.known.level(view.risk())["observed"] == pytest.approx(expected["observed"])
    assert view.metrics.row(MODEL, "auroc").value == pytest.approx(expected["auroc"])


@pytest.mark.slow
def test_a_report_has_these_sections_and_hides_small_counts(rows, metrics, tmp_path):
    found, topics = {}, all_topics.prediction_topics(weighed_targets(rows))
    for min_cell in (0, 10):
        view, folder = evaluated(rows, metrics, min_cell), tmp_path / str(min_cell)
        folder.mkdir()
        source = write_page(folder, evaluated=view, results=topics, config=OUTCOME.config)
        found[min_cell] = Page(source)
        for target in view.targets:
            own = view.at(target)
            bins = pd.read_csv(folder / "figures" / f"{target.key('calibration')}.csv")
            by_risk = own.labels[np.argsort(own.risk())]  # NaN where unknown
            assert bins["n"].sum() == len(rows)
            for part in np.split(by_risk, bins["n"].cumsum())[:-1]:
                assert min((part == 1).sum(), (part == 0).sum()) >= min_cell
    names = {path.stem for path in (tmp_path / "10" / "figures").glob("*.svg")}
    assert names == {"learning_curve", *(target.key("calibration") for target in TARGETS)}
    assert [found[k].text.count(NO_CURVES) > 0 for k in found] == [False, True]
    sections = "Risks", "Discrimination", "Calibration", "Decision curve", "Baselines", "Subgroups"
    assert all(title in found[k].text for title in sections for k in found)
    titles = [f"The same for {target.title}" for target in TARGETS[1:]]
    assert all(title in found[k].text for title in titles for k in found)
    assert ["Over time" in found[k].text for k in found] == [True, False]


@pytest.mark.slow
def test_a_risk_that_is_not_measured_has_no_section(rows, metrics):
    table = metrics.table.copy()
    table.loc[(MODEL, ["oe", "oe_72h"]), "value"] = np.nan
    view = evaluated(rows, replace(metrics, table=table))
    topics = [build(view) for build in all_topics.prediction_topics(view.targets)]
    figures = {name for topic in topics if topic for name in topic.figures}
    shown = {name for name in figures if name.startswith(("calibration", "cumulative"))}
    assert shown == {"cumulative_incidence", *(x.key("calibration") for x in TARGETS[2:])}
    assert "decision_curve" not in figures


@pytest.mark.slow
def test_a_site_has_its_own_metrics_at_each_horizon(rows, metrics):
    at = np.where(np.arange(len(rows)) % 3 == 0, "north", "south")
    view = evaluated(rows, metrics, sites=at)
    topics = [build(view) for build in all_topics.prediction_topics(view.targets)]
    numbers = {name: x for topic in topics if topic for name, x in topic.numbers.items()}
    for target in USUAL:
        table = numbers[target.key("sites")].set_index("site")
        for name in ("north", "south"):
            own = rows[at == name]
            risk, horizon = own[target.column(MODEL)], target.horizon
            found = metrics_at(own["event_hours"], own["event"], risk, horizon)
            line = table.loc[name]
            for metric in ("auroc", "oe", "slope"):
                assert line[metric] == pytest.approx(found[metric])
            assert line["prevalence"] == pytest.approx(found["observed"])


def test_the_box_says_both_risks_and_the_planned_comparison(rows, metrics):
    targets = weighed_targets(rows)
    texts = [str(finding) for finding in sentences(metrics, "At it", targets=targets)]
    assert f"one with {FIRST.title}" in texts[0]
    for usual, without in zip(USUAL, TARGETS[2:], strict=True):
        (text,) = (text for text in texts if f"the mean risk of {without.title}" in text)
        mean, other = (rows[target.column(MODEL)].mean() for target in (usual, without))
        assert f"{100 * mean:.1f}\xa0%" in text
        assert f"{100 * other:.1f}\xa0%" in text
        own = metrics.at(without).of(MODEL)
        assert value_text(own.loc["observed"], ".1f", 100) in text
        assert f"the largest is {own.loc['largest_weight'].value:.1f}" in text
    assert sum("(blend)" in text for text in texts) == 1
    for target in TARGETS:
        slope = value_text(metrics.at(target).row(MODEL, "slope"), ".2f")
        assert sum(f"risks of {target.title} may" in x and slope in x for x in texts) == 1, target
    alone = sentences(replace(metrics, primary=None), "At it", targets=targets)
    assert not any("blend" in str(finding) for finding in alone)
    table = metrics.table.copy()
    table.loc[(MODEL, WITHOUT.key("mean_risk")), "value"] = np.nan  # hidden
    fewer = sentences(replace(metrics, table=table), "At it", targets=targets)
    nobody = evaluate(rows.assign(event=1.0), 0, THRESHOLD, targets=TARGETS)
    assert "largest is 1.0" in str(sentences(nobody, "At it", targets=TARGETS))
    hidden = f"the mean risk of {WITHOUT.title}"
    assert [str(x) for x in fewer] == [text for text in texts if hidden not in text]
