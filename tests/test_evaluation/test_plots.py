"""Figures: their curves are those of the model, in one style."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from scipy.special import expit, logit

from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.metrics import net_benefit, of_labels
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.topics.calibration import (
    calibration_table,
    plot_calibration,
    plot_risks,
    smooth_curve,
)
from medgemma_clinical.evaluation.topics.cohort import plot_learning
from medgemma_clinical.evaluation.topics.decision_curve import (
    TREAT_ALL,
    decision_curve,
    plot_decision_curve,
    threshold_table,
)
from medgemma_clinical.evaluation.topics.discrimination import plot_precision_recall, plot_roc
from medgemma_clinical.evaluation.verdicts import BETTER, UNDECIDED, WORSE
from pages import MODEL, THRESHOLD, Page, make_evaluated, make_rows

FIGURES = True


@pytest.fixture(scope="module", params=[None, 1], ids=["distinct", "tied"])
def rows(request):
    """Predictions, with many equal risks where they are rounded."""
    rows = make_rows(600, rows_a_patient=2)
    return rows if request.param is None else rows.round({MODEL: request.param})


def lines_of(figure):
    lines = [line for axes in figure.axes for line in axes.lines]
    return {str(line.get_label()): np.array(line.get_data(), dtype=float) for line in lines}


def evaluated_of(rows):
    """Two models, of which the blend is the planned comparison."""
    return make_evaluated(rows.drop(columns=["last value", ENSEMBLE]))


def arrays(rows, *names):
    return rows["label"].to_numpy(float), [rows[name].to_numpy(float) for name in names]


def test_the_areas_of_the_curves_are_the_metrics_of_the_table(rows):
    value = evaluate(rows, 0, THRESHOLD).table["value"]
    labels, risks = arrays(rows, MODEL, "blend")
    point = 1 - value[MODEL, "specificity"], value[MODEL, "sensitivity"]
    known = of_labels(labels)
    roc = lines_of(plot_roc(known, risks, point)[0])
    recall = lines_of(plot_precision_recall(known, risks)[0])
    for line, model in (("model", MODEL), ("baseline", "blend")):
        x, y = roc[line]
        assert np.trapezoid(y, x) == pytest.approx(value[model, "auroc"], abs=1e-12)
        x, y = recall[line]
        assert -(np.diff(x) * y[:-1]).sum() == pytest.approx(value[model, "auprc"], abs=1e-12)
    positive, event = rows[MODEL] >= THRESHOLD, rows["label"] == 1
    expected = [positive[~event].mean(), positive[event].mean()]
    assert roc["threshold"].ravel() == pytest.approx(expected)


def test_the_calibration_curve_has_bins_of_equal_size():
    rows = make_rows(600)
    _, (risk,) = arrays(rows, MODEL)
    table = calibration_table(rows, risk, LABEL, 0)
    assert table["n"].max() - table["n"].min() <= 1
    smooth = smooth_curve(rows, risk, LABEL, 0)
    figure, _ = plot_calibration(table, smooth, risk)
    for name, drawn in (("bins [95 %]", table), ("observed [95 %]", smooth)):
        predicted, observed = lines_of(figure)[name]
        assert predicted == pytest.approx(100 * drawn["predicted"])
        assert observed == pytest.approx(100 * drawn["observed"])
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == len(rows)


def test_the_smooth_curve_is_the_share_of_events_that_goes_with_a_risk():
    rng = np.random.default_rng(3)
    odds = rng.normal(-1, 1, 4000)
    truth = lambda z: expit(0.3 + 0.6 * z)  # noqa: E731
    rows = pd.DataFrame({"id": "", "label": rng.random(4000) < truth(odds)})
    rows = rows.assign(label=rows["label"].astype(int), patient=np.arange(4000).astype(str))
    curve = smooth_curve(rows, expit(odds), LABEL, 0)
    ends = np.quantile(expit(odds), [0.01, 0.99])
    assert curve["predicted"].iloc[[0, -1]].tolist() == pytest.approx(ends)
    expected = truth(logit(curve["predicted"]))
    assert np.abs(curve["observed"] - expected).max() < 0.05
    assert curve["predicted"].is_monotonic_increasing
    assert ((curve["low"] < expected) & (expected < curve["high"])).mean() > 0.8
    assert (curve["high"] - curve["low"]).between(0.01, 0.2).all()


def test_the_table_of_thresholds_counts_what_acting_at_each_brings(rows):
    labels, risks = arrays(rows, MODEL, "blend")
    cuts = [0.1, 0.35, 0.6]
    table = threshold_table(evaluated_of(rows), cuts)
    values = table.pivot(index="threshold", columns="metric", values="value")
    for cut, found in values.iterrows():
        weight, n = cut / (1 - cut), len(rows)
        positive = risks[0] >= cut
        event = labels == 1
        assert found["sensitivity"] == pytest.approx((positive & event).sum() / event.sum())
        assert found["specificity"] == pytest.approx((~positive & ~event).sum() / (~event).sum())
        assert found["positives"] == pytest.approx(positive.mean())
        own, other, everyone = (
            ((acted & event).sum() - weight * (acted & ~event).sum()) / n
            for acted in (positive, risks[1] >= cut, np.ones(n, dtype=bool))
        )
        assert found["net benefit"] == pytest.approx(own)
        assert found["minus blend"] == pytest.approx(own - other)
        assert found[f"minus {TREAT_ALL}"] == pytest.approx(own - max(everyone, 0))
    known = table.dropna()
    assert (known["low"] <= known["value"]).all()
    assert (known["value"] <= known["high"]).all()


def test_the_distribution_of_risks_holds_each_class_whole(rows):
    labels, (risk,) = arrays(rows, MODEL)
    figure, _ = plot_risks(labels, risk)
    for axes, label in zip(figure.axes, (1, 0), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)
        assert axes.lines[0].get_xdata()[0] == pytest.approx(100 * np.median(risk[labels == label]))


def test_the_decision_curve_is_that_of_model_baseline_and_treat_all(rows):
    labels, (risk, other) = arrays(rows, MODEL, "blend")
    table = decision_curve(evaluated_of(rows))
    lines = lines_of(plot_decision_curve(table, [MODEL, "blend"])[0])
    at, one = lines["model"][0] / 100, np.ones((1, len(rows)))
    everyone = np.ones(len(rows))
    for name, each in (("model", risk), ("baseline", other), ("treat all", everyone)):
        assert lines[name][1] == pytest.approx(net_benefit(labels, each, at, one)[0])


def epochs(*aurocs, averaged=(1,)):
    numbers = {"train_loss": 0.40, "val_loss": 0.41}
    return [
        {"epoch": k, **numbers, "val_auroc": auroc, "averaged_epochs": averaged}
        for k, auroc in enumerate(aurocs, 1)
    ]


def test_the_learning_curve_shades_the_epochs_that_are_averaged_on_whole_axes():
    figure, alt = plot_learning(epochs(0.71, None, 0.72, 0.7, averaged=[1, 3]))
    upper, lower = figure.axes
    (auroc,) = lower.lines
    assert np.isnan(np.array(auroc.get_ydata(), dtype=float)).tolist() == [0, 1, 0, 0]
    for axes in (upper, lower):
        assert [(p.get_x(), p.get_width()) for p in axes.patches] == [(0.5, 1), (2.5, 1)]
    assert "2 of them" in alt
    assert upper.get_ylim()[0] == 0
    assert lower.get_ylim() == (0.5, 1)
    assert plot_learning(epochs(0.37))[0].axes[1].get_ylim() == pytest.approx((0.3, 1))
    assert len(plot_learning(epochs(None))[0].axes) == 1  # of times to events


def test_the_forest_plot_shows_each_difference_with_its_verdict():
    numbers = {"stage 1": [0.7, np.nan, np.nan, np.nan], "a": [0.75, 0.05, 0.02, 0.09]}
    numbers |= {"b": [0.69, -0.01, -0.03, 0.01], "ensemble": [0.6, -0.1, -0.2, -0.04]}
    table = pd.DataFrame.from_dict(numbers, orient="index")
    table.columns = ["value", "difference", "difference_low", "difference_high"]
    table["reference"] = ["stage 1", "stage 1", "stage 1", "b"]
    table.index = pd.MultiIndex.from_product([table.index, ["auroc"]], names=["model", "metric"])
    counts = {"n": 99, "patients": 99, "events": 40, "minority_patients": 40}
    figure, _ = plots.plot_forest(Metrics(counts, table, "a", ["a", "b", "ensemble"]))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["stage 1, reference", "a", "b", "ensemble minus b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first model stands at the top"
    marks = {line.get_marker(): line for line in axes.lines if line.get_marker() in "^Dv"}
    segments = {
        tuple(segment[0]) + tuple(segment[1])
        for bars in axes.collections
        for segment in bars.get_segments()
    }
    for position, (model, verdict) in enumerate(
        {"a": BETTER, "b": UNDECIDED, "ensemble": WORSE}.items(), 1
    ):
        row = table.loc[model, "auroc"]
        marker, colour = plots.MARKS[verdict]
        assert marks[marker].get_xydata().tolist() == [[row["difference"], position]]
        assert same_color(marks[marker].get_color(), colour)
        ends = row["difference_low"], position, row["difference_high"], position
        assert any(segment == pytest.approx(ends) for segment in segments)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [verdict.words for verdict in (BETTER, UNDECIDED, WORSE)]


def test_a_forest_plot_of_one_model_makes_no_drama_of_noise():
    (axes,) = plots.plot_forest(evaluate(make_rows(100, baselines=False), 0))[0].axes
    assert axes.get_xlim()[1] >= plots.MIN_DIFFERENCE


def test_a_figure_has_the_same_bytes_each_time_and_leaves_users_words_alone():
    images, words = [], f'cost $x$ id="a" {plots.INK} url(#a)'
    for _ in range(2):
        with plots.plot_style():
            figure, (axes,) = plots.new_figure()
            axes.plot([0, 1], [0, 1], "o-", color=plots.MODEL)
            axes.set_xlabel(words)
            images.append(plots.to_image(figure, f"<b> {words}"))
    assert images[0] == images[1]
    page = Page(images[0].inline("roc"))
    ((alt, svg),) = page.images()
    assert alt == f"<b> {words}"
    assert f">{words}<" in svg
    tags = [value for _, attributes in page.tags[1:] for value in attributes.values()]
    assert not re.search("#[0-9a-f]{6}", " ".join(tags)), "each colour is the page's"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    references = re.findall(r"#([^\s)]+)", " ".join(tags))
    assert {*references} <= {each for each in ids if each.startswith("roc-")}
    assert {"model", "ink", "grid"} == {*re.findall(r"var\(--(\w+)\)", " ".join(tags))}
    assert axes.xaxis.label.get_parse_math() is False
    assert same_color(figure.get_facecolor(), "white")
    assert Figure().subplots().spines["top"].get_visible() is not False, "nothing leaks"
