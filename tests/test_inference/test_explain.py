"""Single rows: the risk over time, series left out, the soft prompt, static features."""

import numpy as np
import pandas as pd
import pytest
import torch

import dte_encoder
import medgemma_trainer as trainer
from conftest import DATA
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.explain import explain, prefixes
from medgemma_clinical.inference.scoring import prediction_table, scoring_rows
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.model_card import model_card
from medgemma_trainer import TrajectoryModel
from predicting import SERIES, STAGES, write_data
from stages import arguments, data_for, make_stage

CHEMISTRY = DATA / "physionet2012_chemistry.csv.gz"
THREE = ("Serum bicarbonate", "potassium", "ph")
COLUMNS = (SERIES, "trajectory_potassium [mEq/L]", "trajectory_ph")


def explained(model, table):
    """Explain each row of a table as ``--explain`` does."""
    findings = Findings("DataFrame", strict=False)
    (rows,) = scoring_rows(table, model.config, trainer.DATASETS, findings, len(table))
    lines, scored = prediction_table(rows, model.trained, findings, 32)
    return [
        explain(line, scored.rows.dataset.subset(np.array([k])), model.trained, 32)
        for k, line in enumerate(lines.to_dict("records"))
    ]


@pytest.fixture(scope="module")
def models(runs):
    """The model of each stage, of one series."""
    return {stage: TrajectoryModel.from_pretrained(runs / stage) for stage in STAGES}


@pytest.fixture(scope="module")
def stays():
    """80 stays with three series; the second of them has a single one."""
    table = pd.read_csv(CHEMISTRY, nrows=80, dtype=str).fillna("")
    table.loc[1, list(COLUMNS[1:])] = ""
    return table


@pytest.fixture(scope="module")
def several(stays, tmp_path_factory):
    """A stage 1 of three series that nobody trained."""
    place = tmp_path_factory.mktemp("several") / "trajectory"
    words = ["--trajectory_only", "--data_path", str(write_data(stays, place.parent / "data.csv"))]
    args = arguments(*words, "--series", ",".join(THREE))
    stage = make_stage(args, data_for(args))
    stage.save(place, stage.config)
    return TrajectoryModel.from_pretrained(place.parent / TRAJECTORY_FILE)


@pytest.fixture(scope="module")
def unread(stays, tmp_path_factory):
    """A stage 1 that does not read one of its two series, whose rows include one of it alone."""
    place = tmp_path_factory.mktemp("unread") / "trajectory"
    rows = stays[[SERIES, "label_escalation"]].assign(trajectory_rare="", split="train")
    rows.loc[:9, "trajectory_rare"] = "5 (1h)"
    rows.loc[60:69, ["trajectory_rare", "split"]] = "5 (1h)", "val"
    rows.loc[70:, ["trajectory_rare", "split"]] = "5 (1h)", "test"
    args = arguments("--trajectory_only", "--data_path", str(write_data(rows, place.parent / "a")))
    stage = make_stage(args, data_for(args))
    stage.save(place, stage.config)
    table = rows.head(4).drop(columns="split")
    table.loc[2, SERIES] = ""
    return place.parent / TRAJECTORY_FILE, table


def test_a_row_without_a_series_that_is_read_has_a_problem_and_no_score(unread):
    path, table = unread
    model, never = TrajectoryModel.from_pretrained(path), table.assign(trajectory_rare="")
    lines = model.predictions(table)
    assert (lines["problem"] != "").tolist() == lines["probability"].isna().tolist()
    assert lines["probability"].isna().tolist() == [False, False, True, False]
    good = table.drop(index=2)
    risks = model.predict_proba(good)
    np.testing.assert_array_equal(risks, model.predict_proba(never.drop(index=2)))
    without = good.drop(columns="trajectory_rare")
    np.testing.assert_array_equal(risks, model.predict_proba(without))
    curve = model.risk_over_time(good).groupby("id", sort=False)["probability"].last()
    np.testing.assert_allclose(curve, risks[:, 1], atol=1e-6)
    for score in (model.predict_proba, model.risk_over_time, model.plot_patient):
        with pytest.raises(InputError, match="row 0"):
            score(table.loc[[2]])


def test_explanation_and_card_name_no_series_that_is_not_read(unread):
    path, table = unread
    model = TrajectoryModel.from_pretrained(path)
    assert "rare" not in repr(model) + model_card(model.config)
    for row in explained(model, table.drop(index=2)):
        assert len(row.features) == len(row.units) == row.values.shape[1] == len(row.spreads) == 1
        assert row.without == {}
        assert "rare" not in str(row)


def test_a_model_of_a_time_before_its_series_were_chosen_reads_all(unread, tmp_path):
    path, table = unread
    content = torch.load(path, weights_only=True)
    del content["config"]["inputs"]["series"]
    torch.save(content, tmp_path / TRAJECTORY_FILE)
    model = TrajectoryModel.from_pretrained(tmp_path / TRAJECTORY_FILE)
    assert model.predictions(table)["probability"].notna().all()
    assert "rare" in repr(model)


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
    again = model.risk_over_time(altered)["probability"]
    ends = risks["id"] != risks["id"].shift(-1)
    np.testing.assert_allclose(risks["probability"][~ends], again[~ends], rtol=0, atol=1e-7)
    assert not np.allclose(risks["probability"][ends], again[ends])


@pytest.mark.parametrize("stage", STAGES)
def test_each_point_is_the_prediction_of_the_row_that_ends_there(stage, models, table):
    model, row = models[stage], table.iloc[[2]]
    cells = str(row[SERIES].iloc[0]).split(" -> ")
    assert len(cells) > 2
    risks = model.risk_over_time(row)
    for k in range(len(cells)):
        cut = row.assign(**{SERIES: " -> ".join(cells[: k + 1])})
        assert risks["probability"][k] == pytest.approx(model.predict_proba(cut)[0, 1], abs=1e-6)
        assert risks["hours"][k] == float(cells[k].split("(")[1][:-2])


def test_a_later_prediction_time_is_a_point_of_its_own():
    rows = pd.DataFrame({SERIES: ["1 (0h) -> 2 (5h)", "3 (1h)"], "label_escalation": [0, 1]})
    cut, owner = prefixes(MIMICtrajectoryDataset(rows.assign(prediction_hours=["9", "1"])))
    assert owner.tolist() == [0, 0, 0, 1]
    assert cut.prediction_times().tolist() == [0, 5, 9, 1]
    assert cut.lengths.tolist() == [1, 2, 2, 1]
    assert cut.values[:, 0].tolist() == [1, 1, 2, 1, 2, 3]
    cut, owner = prefixes(MIMICtrajectoryDataset(rows.assign(prediction_hours=["", "1"])))
    assert owner.tolist() == [0, 0, 1]
    assert np.isnan(cut.summaries()[:, -1]).tolist() == [True, True, False]


# --------------------------------------------------------------------------- explanations


@pytest.mark.parametrize("stage", STAGES)
def test_an_explanation_is_of_the_row_and_ends_at_its_prediction(stage, models, table):
    rows, model = explained(models[stage], table.head(4)), models[stage]
    for row, probability in zip(rows, model.predict_proba(table.head(4))[:, 1], strict=True):
        assert row.risks[-1] == pytest.approx(probability, abs=1e-6)
        assert row.probability == pytest.approx(probability, abs=1e-6)
        np.testing.assert_array_equal(row.hours, row.times)
        assert row.without == {}, "a single series leaves nothing to score"
        assert (row.without_soft_prompt is None) == (stage == "trajectory")
    written = model.write_reports(table.head(4)) if stage == "generative" else [None] * 4
    assert [row.report for row in rows] == written


def test_a_series_is_left_out_with_all_that_comes_of_it(several, stays):
    few = stays.head(5)
    rows = explained(several, few)
    assert rows[1].without == {}
    checked = 0
    for name, column in zip(THREE, COLUMNS, strict=True):
        gone = several.predictions(few.assign(**{column: ""}))["probability"]
        for k in (0, 2, 3, 4):
            if name in rows[k].without:
                assert rows[k].without[name] == pytest.approx(gone[k], abs=1e-6)
                assert abs(gone[k] - rows[k].probability) > 1e-6
                checked += 1
    assert checked >= 8
    assert len(rows[0].without) == sum(bool(cell) for cell in few.loc[0, list(COLUMNS)])


def test_a_row_without_a_score_when_a_series_is_left_out_has_no_effect(several, stays, monkeypatch):
    monkeypatch.setattr(dte_encoder, "MAX_SCALED_GAP", 10.0)  # 720 hours
    gap = {SERIES: "20 (0h) -> 21 (900h)", COLUMNS[1]: "4 (450h)", COLUMNS[2]: ""}
    (row,) = explained(several, stays.head(1).assign(**gap))
    assert [risk is None for risk in row.without.values()] == [False, True]
    told = {SERIES: "20 (0h) -> 21.5 (3h)", COLUMNS[1]: "4 (3h)", COLUMNS[2]: ""}
    (row,) = explained(several, stays.head(1).assign(**told))
    last = "Serum bicarbonate 21.5 mmol/L, potassium 4 mEq/L"
    assert row.observations == ("Serum bicarbonate 20 mmol/L", last)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_without_soft_prompt_the_model_reads_the_text_alone(stage, models, table, monkeypatch):
    """Compared with a model whose projection is taken out."""
    rows, llm = explained(models[stage], table.head(3)), models[stage].trained.model
    with monkeypatch.context() as patch:
        patch.setitem(llm._modules, "projection", None)
        expected = models[stage].predict_proba(table.head(3))[:, 1]
        assert explained(models[stage], table.head(1))[0].without_soft_prompt is None
    for row, risk in zip(rows, expected, strict=True):
        assert row.without_soft_prompt == pytest.approx(risk, rel=2e-5)
        assert risk != pytest.approx(row.probability, rel=1e-4)
    monkeypatch.setattr(llm, "residual_weight", 0.0)
    assert explained(models[stage], table.head(1))[0].without_soft_prompt is None


@pytest.mark.parametrize("stage", STAGES)
def test_the_spread_is_that_of_the_last_values_of_training_rows(stage, runs, table):
    model, dataset = TrajectoryModel.from_pretrained(runs / stage), trainer.DATASETS["dka"](table)
    (spread,) = explained(model, table.head(1))[0].spreads
    position = dataset.summary_names().index(f"{dataset.features[0]} last")
    last = dataset.summaries()[dataset.split(0)["train"], position]
    assert spread == pytest.approx(last.std(), rel=1e-5)
    if stage == "trajectory":
        scaler = model.trained.model.members[0].head.summary_scaler
        scaler.fit(torch.full((9, len(scaler.std)), 3.0))  # constant
        assert np.isnan(explained(model, table.head(1))[0].spreads).all()


def test_static_features_are_those_that_the_model_reads(models, table):
    row = table.head(1).assign(clinical_context="54-year-old woman of Rome, medical ICU")
    row = row.assign(**{"static_age [years]": "54", "static_weight [kg]": "", "static_other": "7"})
    shown = explained(models["trajectory"], row)[0].static
    assert (shown["age [years]"], shown["weight [kg]"]) == ("54", "unknown")
    assert "sex_male" in {**shown, **dict.fromkeys(shown["0 or no"].split(", "))}
    assert not {"other", "static_other"} & {*shown}, "the model does not read it"
    assert "Rome" not in str(shown)
    read = explained(models["classification"], row)[0].static.values()
    assert row["clinical_context"].iloc[0] in read
