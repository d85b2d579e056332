"""Pictures: they show what they name, in one style."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures, cohort_figures
from medgemma_clinical.evaluation.judgement.verdict import BETTER, FEW, SAME, UNDECIDED, WORSE
from medgemma_clinical.evaluation.report_tables import percent

from cohorts import make_cohort, ones, simulate
from medgemma_clinical.evaluation.metrics import net_benefit
from medgemma_clinical.evaluation.plots import (
    EQUALS,
    LEAST_DIFFERENCE,
    MODEL,
    new_figure,
    plot_calibration,
    plot_decision_curve,
    plot_forest,
    plot_learning,
    plot_roc,
    plot_style,
    report_images,
    to_image,
)


@pytest.fixture(scope="module")
def judged() -> tuple[Cohort, CohortFigures]:
    cohort = make_cohort(simulate(np.random.default_rng(2), 600))
    return cohort, cohort_figures(cohort, 0.3, 0, 0)


def lines_of(figure: Figure) -> dict[str, np.ndarray]:
    lines = [line for axes in figure.axes for line in axes.lines]
    return {str(line.get_label()): np.array(line.get_data(), dtype=float) for line in lines}


def test_the_roc_curve_marks_the_threshold(judged: tuple[Cohort, CohortFigures]) -> None:
    cohort, figures = judged
    figure, alt = plot_roc(cohort, figures)
    alarm, event = cohort.probability >= 0.3, cohort.labels == 1
    point = [100 * alarm[~event].mean(), 100 * alarm[event].mean()]
    assert lines_of(figure)["chosen threshold"].ravel() == pytest.approx(point)
    assert f"finds {percent(alarm[event].mean())} of the events" in alt
    assert figures.auroc.text() in alt


def test_the_decision_curve_stands_beside_treating_all(
    judged: tuple[Cohort, CohortFigures],
) -> None:
    cohort, figures = judged
    figure, alt = plot_decision_curve(cohort, figures)
    lines = lines_of(figure)
    at, everyone = lines["treat all"]
    expected = net_benefit(cohort.labels, np.ones(600), at / 100, ones(600))[0]
    assert everyone == pytest.approx(100 * expected)
    model = net_benefit(cohort.labels, cohort.probability, at / 100, ones(600))[0]
    assert lines["model [95 %]"][1] == pytest.approx(100 * model)
    above = (100 * model > np.maximum(everyone, 0) + 1e-9).sum()
    assert (
        f"lies above both at {above} of {len(at)} threshold risks from 1.0\N{NO-BREAK SPACE}%"
        in alt
    )


def test_the_calibration_curve_shows_observed_over_predicted(
    judged: tuple[Cohort, CohortFigures],
) -> None:
    cohort, figures = judged
    figure, alt = plot_calibration(cohort, figures)
    predicted, observed = lines_of(figure)["observed [95 %]"]
    assert len(predicted) == 10
    assert predicted.mean() == pytest.approx(100 * cohort.probability.mean(), abs=0.5)
    assert observed.mean() == pytest.approx(100 * cohort.labels.mean(), abs=0.5)
    assert f"{predicted[-1]:.0f} % predicted, {observed[-1]:.0f} % observed" in alt


def test_the_learning_curve_marks_the_epoch_that_was_kept_and_bears_missing_numbers() -> None:
    history: list[dict[str, Any]] = [
        {"epoch": k, "train_loss": 1.0, "val_loss": 1.0, "val_auroc": 0.6, "improved": k in (1, 3)}
        for k in range(1, 6)
    ]
    history[1]["val_auroc"] = None
    figure, alt = plot_learning(history)
    auroc, kept = figure.axes[1].lines
    assert math.isnan(np.array(auroc.get_ydata(), dtype=float)[1])
    assert kept.get_xdata() == [3, 3]
    assert "epoch 3 was kept" in alt


def test_the_axes_of_the_learning_curve_hold_the_whole_scale() -> None:
    history = [
        {"epoch": k, "train_loss": 0.40, "val_loss": 0.41, "val_auroc": auroc, "improved": k == 1}
        for k, auroc in enumerate((0.71, 0.72, None), 1)
    ]
    upper, lower = plot_learning(history)[0].axes
    assert upper.get_ylim()[0] == 0
    assert lower.get_ylim() == (0.5, 1)
    history[1]["val_auroc"] = 0.37
    assert plot_learning(history)[0].axes[1].get_ylim() == pytest.approx((0.3, 1))
    for name in ("train_loss", "val_loss", "val_auroc"):
        history[0][name] = None
    assert plot_learning(history[:1])[0].axes[1].get_ylim() == (0.5, 1)


def test_without_a_history_there_is_no_learning_curve(
    judged: tuple[Cohort, CohortFigures],
) -> None:
    assert set(report_images(*judged, [])) == {"roc", "precision", "calibration", "decision_curve"}


def test_a_picture_has_the_same_bytes_each_time_and_leaves_users_words_alone() -> None:
    sources = []
    for _ in range(2):
        with plot_style():
            figure, (axes,) = new_figure()
            axes.plot([0, 1], [0, 1], color=MODEL, label="cost $x$ and $y$")
            axes.set_xlabel("cost $x$")
            sources.append(to_image(figure, "alt").source)
    assert sources[0] == sources[1]
    assert axes.xaxis.label.get_parse_math() is False
    assert not axes.spines["top"].get_visible()
    assert same_color(figure.get_facecolor(), "white")
    assert Figure().subplots().spines["top"].get_visible() is not False, "nothing leaks"


def test_no_step_of_a_curve_holds_a_few_patients() -> None:
    labels, risk, groups = simulate(np.random.default_rng(2), 600)
    cohort = make_cohort((labels, risk, groups), other=np.random.default_rng(3).random(600))
    figures = cohort_figures(cohort, 0.3, 0, 11)
    roc, _ = plot_roc(cohort, figures)
    for name in ("model", "best baseline"):
        false_alarms, found = lines_of(roc)[name] / 100
        steps = [np.diff(false_alarms) * (labels == 0).sum(), np.diff(found) * labels.sum()]
        for counts in np.abs(np.round(steps)).ravel():
            assert counts == 0 or counts >= 11
        assert len(found) > 5
    calibration, _ = plot_calibration(cohort, figures)
    bars = calibration.axes[1].patches
    assert all(isinstance(bar, Rectangle) for bar in bars)
    edges = np.array([bar.get_x() for bar in bars if isinstance(bar, Rectangle)] + [100.0]) / 100
    assert figures.bands.edges is not None
    assert edges[1:-1] == pytest.approx(figures.bands.edges)
    counts, _ = np.histogram(risk, edges)
    assert not [count for count in counts if 0 < count < 11]


HISTORY = [{"epoch": 1, "train_loss": 1, "val_loss": 1, "val_auroc": 0.5, "improved": True}]


@pytest.mark.parametrize("events", [8, 11, 20])
def test_a_few_events_make_no_curve(events: int) -> None:
    labels = (np.arange(300) < events).astype(float)
    risk = np.linspace(0.9, 0.1, 300)
    risk[:2] = 0.95
    cohort = make_cohort((labels, risk, np.arange(300).astype(str)))
    assert set(report_images(cohort, cohort_figures(cohort, 0.5, 0, 11), HISTORY)) == {"learning"}
    assert len(report_images(cohort, cohort_figures(cohort, 0.5, 0, 0), HISTORY)) == 5


@pytest.mark.parametrize("seed", range(12))
def test_events_just_enough_draw_without_fault(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (np.arange(300) < rng.integers(11, 40)).astype(float)
    risk = np.clip(rng.uniform(0.005, 0.06, 300) + 0.3 * labels * rng.random(300), 0, 1)
    risk[0] = 0.5
    cohort = make_cohort((labels, risk, np.arange(300).astype(str)))
    images = report_images(cohort, cohort_figures(cohort, 0.1, 0, 11), HISTORY)
    assert len(images) in (1, 5)


def test_a_coarse_decision_curve_counts_the_risks_that_it_shows() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(2), 600))
    figures = cohort_figures(cohort, 0.3, 0, 11)
    figure, alt = plot_decision_curve(cohort, figures)
    at, value = lines_of(figure)["model [95 %]"]
    assert at / 100 == pytest.approx([risk for risk in figures.benefit if risk <= at.max() / 100])
    expected = net_benefit(cohort.labels, cohort.probability, at / 100, ones(600))[0]
    assert value == pytest.approx(100 * expected)
    assert f"of {len(at)} threshold" in alt


def test_where_another_part_hides_the_figures_nothing_is_drawn_of_this_one() -> None:
    cohort = make_cohort(simulate(np.random.default_rng(2), 600))
    figures = cohort_figures(cohort, 0.3, 0, 11, hide=True)
    assert figures.events is None
    assert set(report_images(cohort, figures, HISTORY)) == {"learning"}


def test_the_forest_plot_shows_each_difference_with_its_verdict() -> None:
    differences = {
        "a": (Estimate(0.03, 0.01, 0.05), BETTER),
        "b": (Estimate(-0.002, -0.012, 0.008), UNDECIDED),
        "c": (Estimate(-0.06, -0.08, -0.04), WORSE),
        "d": (Estimate(0.01), FEW),
        "e": (Estimate(None), FEW),
        "f": (Estimate(0.0, 0.0, 0.0), SAME),
    }
    figure, alt = plot_forest(differences, "stage 1")
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["stage 1, reference", *differences]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first model stands at the top"
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    segments = [segment for each in lines for segment in each.get_segments()]
    known = [
        (row, each) for row, (each, _) in enumerate(differences.values(), 1) if each.low is not None
    ]
    for segment, (row, each) in zip(segments, known, strict=True):
        assert segment.tolist() == [[each.low, row], [each.high, row]]
    marks = axes.lines[2:]
    shown = [pair for pair in differences.values() if pair[0].value is not None]
    for mark, (each, verdict) in zip(marks, shown, strict=True):
        assert np.array(mark.get_xdata()).tolist() == [each.value]
        assert same_color(mark.get_color(), verdict.colour)
        assert mark.get_marker() == (EQUALS if verdict == SAME else verdict.marker)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [verdict.words for verdict in (BETTER, UNDECIDED, WORSE, FEW, SAME)]
    assert f"{BETTER}: a; {UNDECIDED}: b; {WORSE}: c; {FEW}: d, e; = the same: f." in alt
    assert "from that of stage 1" in alt


def test_the_forest_plot_makes_no_drama_of_noise_and_bears_a_model_alone() -> None:
    figure, _ = plot_forest({"a": (Estimate(0.001, -0.002, 0.004), UNDECIDED)}, "b")
    low, high = figure.axes[0].get_xlim()
    assert low <= -LEAST_DIFFERENCE < LEAST_DIFFERENCE <= high
    figure, alt = plot_forest({}, "b")
    assert not figure.legends
    assert "No other model is judged." in alt
