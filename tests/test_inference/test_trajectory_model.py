"""TrajectoryModel: equal to --predict, a classifier for scikit-learn, clear in its refusals."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV, CalibrationDisplay
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import RocCurveDisplay, roc_auc_score

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.merge import export_merged
from medgemma_trainer import TrajectoryModel
from predicting import MARKER, SERIES, STAGES, predicted

LABEL = "label_escalation"


@pytest.fixture(scope="module")
def models(runs):
    """The model of each stage."""
    return {stage: TrajectoryModel.from_pretrained(runs / stage) for stage in STAGES}


# --------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_those_of_the_command_whatever_holds_the_rows(
    stage, models, runs, table, tmp_path
):
    written = predicted(runs / stage, runs / "train.csv", tmp_path / "out.csv")
    model = models[stage]
    described = MIMICtrajectoryDataset(table, description=Description.beside(runs / "train.csv"))
    for rows in (table, runs / "train.csv", str(runs / "train.csv"), described):
        probability = model.predict_proba(rows)
        assert probability.shape == (len(table), 2)
        assert probability.dtype == np.float64
        np.testing.assert_allclose(probability[:, 1], written["probability"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=0, atol=1e-12)
        assert model.predict(rows).tolist() == written["prediction"].tolist()
    lines = model.predictions(table)
    assert list(lines) == list(written)
    assert lines["id"].tolist() == written["id"].tolist()
    if stage == "generative":
        assert model.write_reports(table) == written["report"].tolist()
        assert lines["report"].tolist() == written["report"].tolist()


@pytest.mark.parametrize("stage", STAGES)
def test_the_batch_size_does_not_matter(stage, runs, table):
    one = TrajectoryModel.from_pretrained(runs / stage, batch_size=7, device="cpu")
    other = TrajectoryModel.from_pretrained(runs / stage)
    assert one.batch_size == 7
    rows = table.head(20)
    np.testing.assert_allclose(one.predict_proba(rows), other.predict_proba(rows), atol=1e-6)


def test_labels_are_not_needed_and_do_not_matter(models, table):
    model = models["trajectory"]
    before = model.predict_proba(table)
    flipped = table.assign(**{LABEL: 1 - table[LABEL].astype(int)})
    for rows in (table.drop(columns=LABEL), flipped):
        np.testing.assert_array_equal(model.predict_proba(rows), before)


def test_a_row_that_cannot_be_scored_is_refused_with_its_place_or_listed(models, table):
    spoilt = table.head(5).copy()
    spoilt.loc[3, SERIES] = f"24 (0h) -> {MARKER}"
    for model in models.values():
        with pytest.raises(InputError, match=rf"DataFrame, row 3, column {SERIES}") as refused:
            model.predict_proba(spoilt)
        assert MARKER not in str(refused.value)
        with pytest.raises(InputError, match="row 3"):
            model.predict(spoilt)
        lines = model.predictions(spoilt)
        assert lines["probability"].isna().tolist() == [False, False, False, True, False]
        assert SERIES in lines["problem"][3]
        kept = model.predict_proba(spoilt.drop(index=3))[:, 1]
        np.testing.assert_allclose(lines["probability"].drop(3), kept, atol=1e-6)


def test_rows_of_other_series_are_refused(models, table):
    model = models["trajectory"]
    other = table.assign(**{"trajectory_Serum bicarbonate [mg/dL]": table[SERIES]})
    with pytest.raises(InputError, match=r"the checkpoint reads Serum bicarbonate in mmol/L unit"):
        model.predict_proba(other)
    with pytest.raises(InputError, match=r"its features: \['Anion gap'\], the model"):
        model.predict_proba(MIMICtrajectoryDataset(table))
    outcome = Description(series="Serum bicarbonate", unit="mmol/L", outcome="Discharge")
    with pytest.raises(InputError, match="its outcome: Discharge, the model reads"):
        model.predict_proba(MIMICtrajectoryDataset(table, description=outcome))


def test_a_data_set_that_was_read_in_another_way_is_refused(models, runs, table):
    model = models["trajectory"]
    described = Description.beside(runs / "train.csv")
    short = MIMICtrajectoryDataset(table, max_len=2, description=described)
    with pytest.raises(InputError, match="its max_len: 2, the model reads 20"):
        model.predict_proba(short)
    silent = table.drop(columns="clinical_context")
    with pytest.raises(InputError, match="reads facts of the context, which no row has"):
        model.predict_proba(MIMICtrajectoryDataset(silent, description=described))
    for rows in (None, table[SERIES], table.to_numpy()):
        with pytest.raises(InputError, match="give a DataFrame, the path of a file"):
            model.predict_proba(rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("precision", "fp16"), ("quantization", "int8"), ("attention", "fast")),
        *(("device", "foo"), ("batch_size", 0)),
    ],
)
def test_a_wrong_keyword_of_loading_is_named(name, value, runs):
    for stage in STAGES[:2]:
        with pytest.raises(InputError, match=name):
            TrajectoryModel.from_pretrained(runs / stage, **{name: value})


def test_the_main_series_may_stand_under_its_own_name(models, table):
    model = models["trajectory"]
    named = table.rename(columns={SERIES: "trajectory_Serum bicarbonate [mmol/L]"}).assign(
        **{SERIES: ""}
    )
    np.testing.assert_array_equal(model.predict_proba(named), model.predict_proba(table))


# --------------------------------------------------------------------------- as of scikit-learn


def test_scikit_learn_takes_the_model_for_a_fitted_classifier(models, table):
    model, labels = models["trajectory"], table[LABEL].astype(int)
    assert is_classifier(model)
    assert model.classes_.tolist() == [0, 1]
    probability = model.predict_proba(table)[:, 1]
    shown = RocCurveDisplay.from_estimator(model, table, labels)
    assert shown.roc_auc == pytest.approx(roc_auc_score(labels, probability))
    CalibrationDisplay.from_estimator(model, table, labels)
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid")
    calibrated.fit(table, labels)
    again = calibrated.predict_proba(table)[:, 1]
    slope = np.corrcoef(again, probability)[0, 1]
    assert abs(slope) == pytest.approx(1, abs=0.05)
    assert not np.allclose(again, probability)


# --------------------------------------------------------------------------- risk over time


def test_the_risk_over_time_ends_at_the_prediction_and_knows_no_later_value(models, table):
    model = models["trajectory"]
    risks = model.risk_over_time(table)
    last = risks.groupby("id", sort=False).last()
    assert last.index.tolist() == table["id"].tolist()
    np.testing.assert_allclose(last["probability"], model.predict_proba(table)[:, 1], atol=1e-6)
    counts = table[SERIES].str.count("->") + 1
    assert risks.groupby("id", sort=False).size().tolist() == counts.tolist()
    cells = table[SERIES].str.split(" -> ")
    ordered = cells.map(lambda row: sorted(row, key=lambda x: float(x.split("(")[1][:-2])))
    altered = table.assign(**{SERIES: [" -> ".join([*row[:-1], "999 (9000h)"]) for row in ordered]})
    again = model.risk_over_time(altered)
    ends = risks["id"] != risks["id"].shift(-1)
    np.testing.assert_allclose(
        risks["probability"][~ends], again["probability"][~ends], rtol=0, atol=1e-7
    )
    assert not np.allclose(risks["probability"][ends], again["probability"][ends])


@pytest.mark.parametrize("stage", STAGES)
def test_each_point_is_the_prediction_of_the_row_that_ends_there(stage, models, table):
    model, row = models[stage], table.iloc[[2]]
    cells = str(row[SERIES].iloc[0]).split(" -> ")
    assert len(cells) > 2
    risks = model.risk_over_time(row)
    for k in range(len(cells)):
        cut = row.assign(**{SERIES: " -> ".join(cells[: k + 1])})
        expected = model.predict_proba(cut)[0, 1]
        assert risks["probability"][k] == pytest.approx(expected, abs=1e-6)
        assert risks["hours"][k] == float(cells[k].split("(")[1][:-2])


def test_a_later_prediction_time_is_a_point_of_its_own(tmp_path):
    from medgemma_clinical.inference.risk_over_time import beginnings_of

    rows = pd.DataFrame({SERIES: ["1 (0h) -> 2 (5h)", "3 (1h)"], LABEL: [0, 1]})
    rows["prediction_hours"] = ["9", "1"]
    dataset = MIMICtrajectoryDataset(rows)
    beginnings, owner = beginnings_of(dataset)
    assert owner.tolist() == [0, 0, 0, 1]
    assert beginnings.prediction_times().tolist() == [0, 5, 9, 1]
    assert beginnings.lengths.tolist() == [1, 2, 2, 1]
    assert beginnings.values[:, 0].tolist() == [1, 1, 2, 1, 2, 3]
    rows["prediction_hours"] = ["", "1"]
    beginnings, owner = beginnings_of(MIMICtrajectoryDataset(rows))
    assert owner.tolist() == [0, 0, 1]
    assert np.isnan(beginnings.summaries()[:, -1]).tolist() == [True, True, False]


# --------------------------------------------------------------------------- what it says


def test_methods_of_another_stage_say_so(models, table):
    with pytest.raises(ValueError, match="write_reports needs a model of stage generative"):
        models["classification"].write_reports(table)


def test_the_repr_says_stage_series_base_and_data(models, runs):
    shown = repr(models["classification"])
    for words in (
        "stage: classification",
        "series: Serum bicarbonate",
        "base model: tiny",
        "data: dka",
    ):
        assert words in shown
    assert "base model" not in repr(models["trajectory"])
    assert str(runs) not in shown


def test_the_repr_of_an_export_names_the_base_model_that_was_merged(runs, tmp_path):
    export_merged(runs / "classification", tmp_path / "out", TrajectoryModel.program.builders)
    shown = repr(TrajectoryModel.from_pretrained(tmp_path / "out"))
    assert "; base model: tiny, its adapter merged; " in shown


def test_the_figures_of_the_run_come_along(models):
    for stage, model in models.items():
        assert model.metrics is not None
        assert model.metrics["stage"] == stage
        assert model.threshold == model.metrics["threshold"]


def test_results_have_two_parts(models):
    with pytest.raises(ValueError, match="choose test or validation"):
        models["trajectory"].results("val")


def test_what_holds_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        TrajectoryModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no trained model"):
        TrajectoryModel.from_pretrained(tmp_path)
