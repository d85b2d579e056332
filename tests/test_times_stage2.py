"""Times to events in stage 2: what the language model adds to stage 1's hazards, and its weight."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from faults import result_of
from torch.nn import functional

import medgemma_trainer as trainer
from conftest import DRAWS
from language_models import TINY_MODEL, rehash
from medgemma_clinical.commands.run_folder import given_stage1
from medgemma_clinical.evaluation import decision, metrics
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import first_auroc, outcome_of
from medgemma_clinical.models.trained_model import check_stage1
from medgemma_clinical.training.evaluate import score_batches
from predicting import predicted, refused
from stages import arguments, data_for, make_stage, train_epoch
from test_resume import stop
from test_times import ABOUT, EVENTS, RISKS, waiting

pytestmark = pytest.mark.slow

STAGE_1, TUNES = "stage 1 (trajectory alone)", False
ROWS = range(8)


def words_of(folder, *more):
    """Return the command of a run of stage 2, without dropout."""
    words = ["--data_path", folder / "waiting.csv", "--horizon_hours", "24,72", "--log_file"]
    words += ["none", "--epochs", 1, "--batch_size", 64, "--model_name", TINY_MODEL]
    return [*map(str, [*words, "--lora_dropout", 0, *more])]


def with_stage1(folder, *more):
    return words_of(folder, "--ode_checkpoint", folder / "medgemma_trajectory_best.pt", *more)


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    """A run of stage 1, and stage 2 of weight 1 on it, on texts that tell more than the series."""
    folder = tmp_path_factory.mktemp("times")
    rows = waiting()
    rows["clinical_context"] = np.where(rows["event"] == 1, "frail ", "") + "patient"
    rows.to_csv(folder / "waiting.csv", index=False)
    (folder / "waiting.json").write_text(json.dumps({**ABOUT, "interventions": [2]}))
    stage1 = ["--trajectory_only", "--trajectory_epochs", "2", "--output_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "REPLICATES", DRAWS)
        words = ["--data_path", str(folder / "waiting.csv"), "--horizon_hours", "24,72"]
        assert trainer.main([*words, *stage1, "--log_file", "none"]) == 0
        patch.setattr(decision, "fit_residual_weight", lambda *_: 1.0)  # 0 hides faults
        learns = ["--adapter_lr", "0.01", "--head_lr", "0.05", "--output_dir", folder]
        assert trainer.main(with_stage1(folder, *learns)) == 0
    return folder


def table_of(folder, part="test"):
    return pd.read_csv(folder / "classification" / f"predictions_{part}.csv").set_index("id")


def stage_of(words):
    """Wire the stage of a command."""
    args = arguments(*words)
    return make_stage(args, data_for(args))


def test_each_risk_stands_beside_that_of_stage_1(times):
    table, alone = table_of(times), pd.read_csv(times / "trajectory" / "predictions_test.csv")
    columns = ["probability", "patient", *RISKS, *(f"{STAGE_1} {x}" for x in RISKS)]
    assert {*columns} <= {*table}
    assert [*table][:4] == [*EVENTS, *columns[:2]]
    stage1 = alone.set_index("id").loc[table.index, RISKS]
    np.testing.assert_allclose(table[[f"{STAGE_1} {name}" for name in RISKS]], stage1, rtol=1e-5)
    assert not np.allclose(table[RISKS], stage1, rtol=1e-2)
    np.testing.assert_allclose(table["probability"], table["risk_24h"], rtol=1e-9)
    content = read_json(times / "classification" / "metrics.json")
    assert content["residual_weight"] == 1
    own, expected = content["test"], metrics_at(table.event_hours, table.event, table.risk_72h, 72)
    assert own["auroc_72h"]["value"] == pytest.approx(expected["auroc"], rel=1e-9)


@pytest.fixture(scope="module")
def stage(times):
    """A new stage 2 on the trained stage 1."""
    return stage_of(with_stage1(times))


def test_a_new_stage_2_and_one_of_weight_0_predict_what_stage_1_does(stage):
    model, batch = stage.model.eval(), stage.collate(ROWS)
    expected = model.stage1(batch).outputs
    torch.testing.assert_close(model(batch).outputs, expected)
    with torch.no_grad():
        model.head.bias[:] = torch.tensor([0.7, -1.3])
    moved = model(batch)
    assert not torch.allclose(moved.outputs, expected, atol=0.1)
    model.residual_weight = 0.0
    found = model(batch)
    assert torch.equal(found.outputs, found.offset)
    assert torch.equal(found.offset, moved.offset)
    for position, name in enumerate(RISKS):
        hazards = model.outcome.cumulative(found.outputs.double())
        risks = model.outcome.target_risks(hazards)[:, position]
        known = stage.stage1_risks[f"{STAGE_1} {name}"][list(ROWS)]
        np.testing.assert_array_equal(risks.detach(), known)
    model.residual_weight = 1.0
    with torch.no_grad():
        model.head.bias.zero_()


def test_a_number_of_one_cause_moves_its_hazards_alone_and_all_of_them(stage):
    model, batch = stage.model.eval(), stage.collate(ROWS)
    intervals = len(model.outcome.cuts)
    for cause in (0, 1):
        with torch.no_grad():
            model.head.bias.zero_()
            before = model(batch).outputs
            model.head.bias[cause] = 0.9
            after = model(batch).outputs
            model.head.bias.zero_()
        hazards = [model.outcome.cumulative(x.detach()) for x in (before, after)]
        outputs = before.unflatten(1, (2, intervals + 1))
        z = outputs[:, cause, :-1] + outputs[:, cause, -1:] + 0.9
        torch.testing.assert_close(hazards[1][:, cause], functional.softplus(z))
        assert torch.equal(hazards[1][:, 1 - cause], hazards[0][:, 1 - cause])


def test_the_loss_is_that_of_the_hazards_and_reaches_the_adapter(times):
    stage = stage_of(with_stage1(times, "--head_lr", "0.05", "--adapter_lr", "0.01"))
    state = trainer.set_up(stage)
    before = [p.detach().clone() for p in state.parameters]
    for epoch in (1, 2):
        train_epoch(stage, state, seed=0, epoch=epoch)
    parts = {
        name: not torch.equal(old, new)
        for (name, new), old in zip(stage.trainable_parameters().items(), before, strict=True)
    }
    assert all(moved for name, moved in parts.items() if "lora_B" in name or "head" in name)
    assert any("lora_B" in name for name in parts)
    batch = stage.collate(ROWS)
    output = stage.model.eval()(batch)
    hazards, targets = stage.model.outcome, batch["outcomes"]
    expected = hazards.relative_losses(output.outputs[None], targets).sum()
    torch.testing.assert_close(output.loss.sum(), expected)
    assert output.terms == len(ROWS)


@pytest.mark.parametrize("way", ["text", "off"])
def test_without_stage_1_everyone_starts_at_the_risk_of_the_training_part(times, way):
    off = ("--stage1_logit", "off")
    words = words_of(times, "--soft_prompt", "off") if way == "text" else with_stage1(times, *off)
    stage = stage_of(words)
    found = score_batches(stage.model, stage.batches["train"], stage.collate)
    outcome = outcome_of(stage.config)
    assert isinstance(outcome, Hazards)
    assert stage.model.head.bias.tolist() == [0, 0]
    risks = outcome.risks(outcome.forecast(found.outputs))
    table = waiting().iloc[found.rows]
    for risk, hours in zip(risks.T, (24, 72), strict=False):
        first = metrics_at(table["event_hours"], table["event"], risk, hours)
        assert risk.std() < 1e-9
        assert first["oe"] == pytest.approx(1, abs=0.03)


def test_the_weight_is_that_of_the_lowest_loss_and_0_where_the_first_risk_ranks_no_better(stage):
    outcome, dataset = stage.model.outcome, stage.collate.dataset
    targets, observed = dataset.targets(), dataset.observed(np.arange(len(dataset)))
    rng, dies = np.random.default_rng(0), (targets[:, 2] == 1) - 0.5

    def added(numbers):
        """Return what numbers of the first cause add to the outputs."""
        both = np.column_stack([numbers, 0 * numbers])
        return outcome.added(torch.from_numpy(both)).numpy()

    def weight(numbers):
        functions = partial(outcome.row_losses, targets), partial(first_auroc, outcome, observed)
        patients, outputs = np.arange(len(targets)), offset + added(numbers)
        return decision.fit_residual_weight(offset, outputs, patients, *functions)

    offset = np.array(outcome.null_outputs) + added(0.01 * rng.normal(size=len(targets)))
    assert weight(dies) == 1
    assert 0.3 <= weight(4 * dies) < 1
    assert weight(-dies) == 0
    assert weight(rng.normal(size=len(targets))) == 0
    losses = outcome.row_losses(targets, offset[None])
    expected = outcome.loss(torch.from_numpy(offset[None]), torch.from_numpy(targets))
    assert losses.sum() == pytest.approx(expected.item())
    risk = outcome.risks(outcome.forecast(offset))[:, 0]
    found = metrics_at(targets[:, 1], targets[:, 2], risk, 24)["auroc"]
    assert first_auroc(outcome, observed, offset) == pytest.approx(found)
    offset -= added(np.ones(len(targets)))
    assert outcome.row_losses(targets, offset[None]).sum() > losses.sum()
    assert weight(np.ones(len(targets))) == 0  # a better level is no better order


def test_a_saved_stage_2_predicts_what_the_run_did_and_its_weight_counts(times, tmp_path):
    table = table_of(times)
    rows = pd.read_csv(times / "waiting.csv").set_index("subject_id", drop=False)
    rows.loc[table.index].drop(columns=EVENTS).to_csv(tmp_path / "new.csv", index=False)
    folder = shutil.copytree(times / "classification", tmp_path / "classification")
    found = predicted(folder, tmp_path / "new.csv", tmp_path / "out.csv").set_index("id")
    np.testing.assert_allclose(found.loc[table.index, RISKS], table[RISKS], rtol=1e-5)
    rehash(folder / "best", residual_weight=0.0)
    alone = predicted(folder, tmp_path / "new.csv", tmp_path / "alone.csv").set_index("id")
    stage1 = table[[f"{STAGE_1} {name}" for name in RISKS]]
    np.testing.assert_allclose(alone.loc[table.index, RISKS], stage1, rtol=1e-5)


def test_python_loads_saves_and_loads_the_same_risks(times, tmp_path):
    rows = pd.read_csv(times / "waiting.csv").head(20).drop(columns=EVENTS)
    model = trainer.TrajectoryModel.from_pretrained(times / "classification")
    expected = model.predictions(rows)
    model.save_pretrained(tmp_path / "saved")
    saved = trainer.TrajectoryModel.from_pretrained(tmp_path / "saved", model_name=TINY_MODEL)
    pd.testing.assert_frame_equal(saved.predictions(rows), expected, rtol=1e-9)
    assert [*expected][:8] == ["id", "probability", "prediction", *RISKS, "problem"]


def test_a_stopped_stage_2_resumes_to_the_same_result(times, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "REPLICATES", DRAWS)
    whole, part = (with_stage1(times, "--output_dir", tmp_path / x) for x in ("whole", "part"))
    assert trainer.main(whole) == 0
    stop(part, 6)
    assert trainer.main([*part, "--resume"]) == 0
    stage = "classification"
    assert result_of(tmp_path / "part", stage) == result_of(tmp_path / "whole", stage)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--mode", "generative"], "--mode generative: not for times to events"),
        (["--horizon_hours", "24,48"], "death, transplant by 24h, 48h, without transplant"),
    ],
)
def test_stage_3_and_a_stage_1_of_other_horizons_are_refused(
    times, tmp_path, capsys, more, expected
):
    words = with_stage1(times, "--output_dir", tmp_path / "run", *more)
    assert refused(capsys, words, expected, out=tmp_path / "run")


def test_a_stage_1_of_labels_is_refused_for_times(times):
    args = arguments(*with_stage1(times))
    data, stage1 = data_for(args), given_stage1(args)
    config = {name: x for name, x in stage1.config.items() if name != "events"}
    with pytest.raises(InputError, match="trained on a label, the data have times to death"):
        check_stage1(replace(stage1, config=config), data, {})
