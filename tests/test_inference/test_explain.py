"""Explanations of single rows: the curve, series left out, the soft prompt, reports."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.inference.explain import ScoredRow, explain, short_number
from medgemma_clinical.inference.scoring import prediction_table, scoring_rows
from medgemma_trainer import TrajectoryModel
from predicting import SERIES, STAGES, write_data

CHEMISTRY = SAMPLE.with_name("physionet2012_chemistry.csv.gz")
THREE = ("Serum bicarbonate", "potassium", "ph")
COLUMNS = (SERIES, "trajectory_potassium [mEq/L]", "trajectory_ph")


def explained(model, table):
    """Explain each row of a table as ``--explain`` does."""
    findings = Findings("DataFrame", strict=False)
    (rows,) = scoring_rows(table, model.config, trainer.DATASETS, findings, len(table))
    lines, scored = prediction_table(rows, model.trained, findings, 32)
    reports = lines["report"] if "report" in lines else [None] * len(lines)
    return [
        explain(
            ScoredRow(
                str(lines["id"][k]),
                k,
                scored.dataset.subset(np.array([k])),
                float(lines["probability"][k]),
                reports[k],
            ),
            model.trained,
            32,
        )
        for k in range(len(lines))
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
    """A stage 1 of three series."""
    place = tmp_path_factory.mktemp("several")
    words = ["--trajectory_only", "--trajectory_epochs", "1", "--min_cell", "0", "--log_file"]
    words += ["none", "--data_path", str(write_data(stays, place / "train.csv")), "--series"]
    words += [",".join(THREE), "--output_dir", str(place), "--encoder_lr", "0.05"]
    assert trainer.main(words) == 0
    return TrajectoryModel.from_pretrained(place / "trajectory")


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_point_of_the_curve_is_the_prediction(stage, models, table):
    rows = explained(models[stage], table.head(6))
    predicted = models[stage].predict_proba(table.head(6))[:, 1]
    for row, probability in zip(rows, predicted, strict=True):
        assert row.risks[-1] == pytest.approx(probability, abs=1e-6)
        assert row.risks[-1] == pytest.approx(row.probability, abs=1e-6)
        assert len(row.hours) == len(row.risks) == len(row.times)
        np.testing.assert_array_equal(row.hours, row.times)
        assert row.without == {}, "a single series leaves nothing to score"


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
    measured = [cell for cell in few.loc[0, list(COLUMNS)] if cell]
    assert len(rows[0].without) == len(measured)


def test_a_row_that_cannot_be_scored_without_a_series_has_no_effect(several, stays):
    row = stays.head(1).assign(
        **{SERIES: "20 (0h) -> 21 (900000h)", COLUMNS[1]: "4 (450000h)", COLUMNS[2]: ""}
    )
    without = explained(several, row)[0].without
    assert [risk is None for risk in without.values()] == [False, True]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_without_soft_prompt_the_model_reads_the_text_alone(stage, models, table):
    """Compared with a model whose projection is taken out."""
    rows = explained(models[stage], table.head(3))
    llm = models[stage].trained.model
    projection, llm.projection = llm.projection, None
    try:
        expected = models[stage].predict_proba(table.head(3))[:, 1]
        assert explained(models[stage], table.head(1))[0].without_soft_prompt is None
    finally:
        llm.projection = projection
    for row, risk in zip(rows, expected, strict=True):
        assert row.without_soft_prompt == pytest.approx(risk, rel=2e-5)
        assert risk != pytest.approx(row.probability, rel=1e-4)
    assert explained(models["trajectory"], table.head(1))[0].without_soft_prompt is None


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_language_model_of_weight_zero_leaves_nothing_to_remove(stage, models, table):
    llm = models[stage].trained.model
    weight, llm.residual_weight = llm.residual_weight, 0.0
    try:
        assert explained(models[stage], table.head(1))[0].without_soft_prompt is None
    finally:
        llm.residual_weight = weight


@pytest.mark.parametrize("stage", STAGES)
def test_the_spread_is_that_of_the_last_values_of_training_rows(stage, models, table):
    model = models[stage]
    (spread,) = explained(model, table.head(1))[0].spreads
    dataset = trainer.DATASETS["dka"](table)
    train = dataset.split(0)["train"]
    place = dataset.summary_names().index(f"{dataset.features[0]} last")
    last = dataset.summaries()[train, place]
    assert spread == pytest.approx(last.std(), rel=1e-5)


def test_a_series_that_is_constant_in_training_has_no_spread(models, table):
    model = models["trajectory"].trained.model
    scaler = model.members[0].head.summary_scaler
    fitted = copy.deepcopy(scaler)
    scaler.fit(torch.full((9, len(scaler.std)), 3.0))
    try:
        (spread,) = explained(models["trajectory"], table.head(1))[0].spreads
    finally:
        scaler.load_state_dict(fitted.state_dict())
    assert np.isnan(spread)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (40.9167, "40.9"),
        (82, "82"),
        (1, "1"),
        (0.846, "0.85"),
        (-1.25, "-1.2"),
        (1234.56, "1234.6"),
    ],
)
def test_a_fact_has_one_decimal_at_most_and_small_ones_stay(value, text):
    assert short_number(value) == text


def test_facts_are_those_that_the_model_reads(models, table):
    row = table.head(1).assign(clinical_context="54-year-old woman of Rome, medical ICU")
    facts = explained(models["trajectory"], row)[0].facts
    assert facts["numbers in the context"] == "54-year, kg unknown"
    assert "woman" in facts["words in the context"]
    assert "Rome" not in str(facts).title(), "a word that the model does not read"
    told = explained(models["classification"], row)[0].facts
    assert told["context that the language model reads"].endswith("of Rome, medical ICU")


def test_the_report_is_that_of_the_predictions_and_its_numbers_are_marked(models, table):
    model = models["generative"]
    (row,) = explained(model, table.head(1))
    assert row.report is not None
    assert "".join(mark.text for mark in row.report) == model.write_reports(table.head(1))[0]
    assert explained(models["classification"], table.head(1))[0].report is None


def test_observations_are_told_with_unit(several, stays):
    row = stays.head(1).assign(
        **{SERIES: "20 (0h) -> 21.5 (3h)", COLUMNS[1]: "4 (3h)", COLUMNS[2]: ""}
    )
    told = explained(several, row)[0].observations
    assert told == (
        "Serum bicarbonate 20 mmol/L",
        "Serum bicarbonate 21.5 mmol/L, potassium 4 mEq/L",
    )
