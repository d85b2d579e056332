"""TrajectoryModel: equal to predict, a classifier for scikit-learn, clear in its refusals."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import RocCurveDisplay, roc_auc_score

import time_rows
from arrow_tables import ArrowStream
from dataset_format import MIMICtrajectoryDataset, read_description
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.trajectory_model import RESULTS, results_table
from medgemma_trainer import TrajectoryModel
from predicting import MARKER, SERIES, STAGES, predicted, write_data

pytestmark = pytest.mark.slow

LABEL = "label_escalation"


@pytest.fixture(scope="module")
def models(runs):
    """The model of each stage."""
    return {stage: TrajectoryModel.from_pretrained(runs / stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_those_of_the_command_whatever_holds_the_rows(
    stage, models, runs, table, tmp_path
):
    table, model = table.head(9), models[stage]
    data = write_data(table, tmp_path / "rows.csv")
    written = predicted(runs / stage, data, tmp_path / "out.csv")
    described = MIMICtrajectoryDataset(table, description=read_description(data))
    for rows in (table, ArrowStream(table), data, str(data), described):
        probability = model.predict_proba(rows)
        assert (probability.shape, probability.dtype) == ((len(table), 2), np.float64)
        np.testing.assert_allclose(probability[:, 1], written["probability"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=0, atol=1e-12)
        assert model.predict(rows).tolist() == written["prediction"].tolist()
    lines = model.predictions(table)
    assert list(lines) == list(written)
    assert lines["id"].tolist() == written["id"].tolist()
    if stage == "generative":
        assert model.write_reports(table) == written["report"].tolist()
        assert lines["report"].tolist() == written["report"].tolist()


def test_a_row_that_cannot_be_scored_is_refused_with_its_place_or_listed(models, table):
    spoilt = table.head(5).copy()
    spoilt.loc[3, SERIES] = f"24 (0h) -> {MARKER}"
    for model in models.values():
        for method in (model.predict_proba, model.predict, model.risk_over_time):
            with pytest.raises(InputError, match=f"row 3, column {SERIES}") as refused:
                method(spoilt)
            assert MARKER not in str(refused.value)
        lines = model.predictions(spoilt)
        assert lines["probability"].isna().tolist() == [k == 3 for k in range(5)]
        assert SERIES in lines["problem"][3]
        kept = model.predict_proba(spoilt.drop(index=3))[:, 1]
        np.testing.assert_allclose(lines["probability"].drop(3), kept, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "fp16"),
        ("quantization", "int8"),
        ("attention", "fast"),
        ("device", "foo"),
        ("batch_size", 0),
        ("revision", "main"),
    ],
)
def test_a_wrong_keyword_of_loading_is_named(name, value, runs):
    with pytest.raises(InputError, match=name):
        TrajectoryModel.from_pretrained(runs / "trajectory", **{name: value})


def test_scikit_learn_takes_the_model_for_a_fitted_classifier(models, table):
    model, labels = models["trajectory"], table[LABEL].astype(int)
    assert is_classifier(model)
    assert model.classes_.tolist() == [0, 1]
    probability = model.predict_proba(table)[:, 1]
    shown = RocCurveDisplay.from_estimator(model, table, labels)
    assert shown.roc_auc == pytest.approx(roc_auc_score(labels, probability))
    CalibrationDisplay.from_estimator(model, table, labels)
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid")
    again = calibrated.fit(table, labels).predict_proba(table)[:, 1]
    assert abs(np.corrcoef(again, probability)[0, 1]) == pytest.approx(1, abs=0.05)
    assert not np.allclose(again, probability)
    with pytest.raises(ValueError, match="FrozenEstimator"):
        model.fit(table, labels)


@pytest.mark.parametrize("stage", STAGES)
def test_figures_show_the_risk_over_time_and_leave_matplotlib_as_it_was(stage, models, table):
    model, few = models[stage], table.head(3)
    before = (dict(matplotlib.rcParams), plt.get_fignums())
    curves = model.risk_over_time(few)
    chosen = curves["id"].iloc[-1]
    *series, risk = model.plot_patient(few, chosen).axes
    lines = [line.get_ydata() for line in model.plot_risk(few).axes[0].lines[:3]]
    expected = [100 * curves.loc[curves["id"] == x, "probability"] for x in curves["id"].unique()]
    for drawn, known in zip(
        [*lines, risk.lines[1].get_ydata()], [*expected, expected[-1]], strict=True
    ):
        np.testing.assert_allclose(drawn, known, atol=1e-3)
    assert len(series) == 1
    assert model.plot_patient(few)._repr_png_(), "a notebook shows it"
    assert len(model.plot_risk(table.head(20)).axes[0].lines) == 21
    with pytest.raises(ValueError, match="nobody"):
        model.plot_patient(few, "nobody")
    assert (dict(matplotlib.rcParams), plt.get_fignums()) == before


@pytest.mark.parametrize("stage", STAGES)
def test_the_metrics_of_the_run_come_along(stage, models, runs):
    model = models[stage]
    assert model.metrics == json.loads((runs / stage / "metrics.json").read_text())
    assert (model.stage, model.threshold) == (stage, model.metrics["threshold"])
    for part in ("test", "validation"):
        results, own = model.results(part), model.metrics[part]
        assert results.index.tolist() == [own["model"], *own["models"]]
        assert results["auroc"].iloc[0] == own["auroc"]["value"]
        assert np.isnan(results["difference"].iloc[0])
        for name, metrics in own["models"].items():
            assert results.loc[name, "brier_low"] == metrics["brier"]["low"]
            difference = metrics["auroc"]["value"] - own["auroc"]["value"]
            if metrics.get("reference", own["model"]) == own["model"]:
                assert results.loc[name, "difference"] == pytest.approx(difference)
    with pytest.raises(ValueError, match="val"):
        model.results("val")


def test_results_of_times_have_the_risk_in_their_index():
    rows = time_rows.make_times()
    targets = time_rows.weighed_targets(rows)
    metrics = evaluate(rows, 0, targets=targets)
    content = {"targets": [x.to_json() for x in targets], "test": metrics.to_json()}
    found = results_table(json.loads(json.dumps(content)), "test")
    assert found.index.names[0] == "risk"
    assert found.index.tolist() == [(x.name, name) for x in targets for name in metrics.models]
    for target in targets:
        of_target = metrics.at(target)
        for model in metrics.models:
            line = found.loc[(target.name, model)]
            for name in RESULTS:
                assert line[name] == of_target.row(model, name)["value"]
            assert line["difference"] == pytest.approx(
                of_target.row(model, "auroc")["difference"], nan_ok=True
            )


def test_labels_and_the_name_of_the_main_series_do_not_matter(models, table):
    model, named = models["trajectory"], "trajectory_Serum bicarbonate [mmol/L]"
    for rows in (
        table.drop(columns=LABEL),
        table.assign(**{LABEL: ["", "2", "yes", "1"] * 25, "split": "nowhere"}),
        table.assign(**{named: table[SERIES], SERIES: ""}),
    ):
        np.testing.assert_array_equal(model.predict_proba(rows), model.predict_proba(table))


def test_what_cannot_be_read_is_refused_with_what_differs(models, runs, table, tmp_path):
    own = read_description(runs / "train.csv")
    ageless = table.drop(columns="static_age [years]")
    for rows, named in (
        (table.assign(**{"trajectory_Serum bicarbonate [mg/dL]": table[SERIES]}), "mmol/L"),
        (write_data(table, tmp_path / "unit.csv", unit="mg/dL"), "mg/dL"),
        (write_data(table, tmp_path / "outcome.csv", outcome="Stroke"), "Stroke"),
        (MIMICtrajectoryDataset(table), "Main series"),
        (MIMICtrajectoryDataset(table, max_len=2, description=own), "max_len: 2"),
        (MIMICtrajectoryDataset(ageless, description=own), "static_age"),
        (None, "NoneType"),
        (table.to_numpy(), "ndarray"),
    ):
        with pytest.raises(InputError, match=named):
            models["trajectory"].predict_proba(rows)
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=str(path)):
            TrajectoryModel.from_pretrained(path)
    with pytest.raises(ValueError, match="generative"):
        models["classification"].write_reports(table)
    with pytest.raises(InputError, match="stage 1"):
        models["trajectory"].prompt_embeds(table)
