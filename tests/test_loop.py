"""The one training loop of the script: what it computes, and what it does when numbers fail."""

import copy
import json
import logging
import math
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from torch import nn

import medgemma_trainer as trainer
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.training import state as state_module
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.stage import WEIGHT_DECAY
from medgemma_clinical.training.state import MAX_SKIPPED, NonFiniteLossError
from stages import arguments, data_for, make_stage
from toy_stage import toy_stage


def stage_1(data, folder, *flags):
    words = f"--trajectory_only --data_path {data} --output_dir {folder} --encoder_lr 0.05"
    return [*f"{words} --log_file none --trajectory_epochs 3 --batch_size 20".split(), *flags]


def make(data, folder, *flags):
    args = arguments(*stage_1(data, folder, *flags))
    return make_stage(args, data := data_for(args)), data


def history_of(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


EPOCHS, PATIENCE, TOLERANCE, STEPS = 9, 2, 0.3, 7  # 128 of 160 rows train, 20 at a time


def train_alone(model, stage, split):
    """Train a member as one model, plainly; return each epoch's metrics, its weights and epochs."""
    parameters, val, train = list(model.parameters()), split["val"], split["train"]
    matrices, others = ([p for p in parameters if (p.ndim > 1) == each] for each in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0)
    average, epochs = [p.detach().clone() for p in parameters], {}
    lowest, lowest_epoch, norms, metrics, step, total = math.inf, 0, [], [], 0, EPOCHS * STEPS

    def val_output(weights):
        before = nn.utils.parameters_to_vector(parameters).clone()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(weights), parameters)
        output = model.eval()(stage.collate(val.tolist()))
        nn.utils.vector_to_parameters(before, parameters)
        return output.loss.item() / len(val), output.logit.detach().numpy()

    warmup = max(1, min(100, round(0.1 * total)))
    for epoch in range(1, EPOCHS + 1):
        order = np.random.default_rng(np.random.SeedSequence([7, epoch])).permutation(train)
        stage.collate.draw(7, epoch)
        model.train()
        losses = 0.0
        for rows in np.split(order, range(20, len(order), 20)):
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (step / warmup if step < warmup else cosine)
            optimizer.zero_grad()
            output = model(stage.collate(rows.tolist()))
            (output.loss / output.terms).backward()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
            optimizer.step()
            step, losses = step + 1, losses + output.loss.item()
            pairs = zip(average, parameters, strict=True)
            decay = min(0.998, (1 + step) / (10 + step))
            average = [decay * mean + (1 - decay) * p.detach() for mean, p in pairs]
        loss, logits = val_output(average)
        metrics.append([losses / len(train), loss, logits])
        if epoch - lowest_epoch <= PATIENCE:
            lowest, lowest_epoch = min((lowest, lowest_epoch), (loss, epoch))
            epochs[epoch] = loss, average
    assert max(norms) > 1.0, "else clipping would not have been exercised"
    good = [epoch for epoch, (loss, _) in epochs.items() if loss <= (1 + TOLERANCE) * lowest]
    best = [sum(each) / len(good) for each in zip(*(epochs[k][1] for k in good), strict=True)]
    if val_output(best)[0] > (1 + TOLERANCE) * lowest:
        good, best = [lowest_epoch], epochs[lowest_epoch][1]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(best), parameters)
    batch = stage.collate(train.tolist())
    logit, events = model.eval()(batch).logit.detach().numpy(), batch["labels"].numpy()
    shift = brentq(lambda x: expit(logit + x).mean() - events.mean(), -9, 9)
    head = model.members[0].head
    for bias in (head.output.bias, head.summaries[-1].bias):
        bias.data += shift
    return metrics, [p.detach().clone() for p in parameters], good, lowest_epoch


@pytest.mark.slow
def test_each_member_trains_and_stops_as_if_it_were_alone(dka_file, tmp_path, monkeypatch):
    """By clipped AdamW on the schedule, with the mean of the weights of its own good epochs."""
    monkeypatch.setattr(state_module, "LOSS_TOLERANCE", TOLERANCE)
    flags = f"--trajectory_epochs {EPOCHS} --patience {PATIENCE} --members 3 --dropout 0"
    stage, data = make(dka_file, tmp_path, *flags.split())
    members = [(each.encoder, each.head) for each in copy.deepcopy(stage.model.members)]
    state = trainer.fit(stage, 7, tmp_path)
    alone = [train_alone(Stage1([each]), stage, data.split) for each in members]
    metrics, best, averaged, lowest_epochs = zip(*alone, strict=True)
    assert state.progress.averaged == list(averaged)
    assert len(set(lowest_epochs)) > 1, "else stopping alone would not have been exercised"
    assert max(map(len, averaged)) > 1
    for member, weights in zip(stage.model.members, best, strict=True):
        found = [p.detach() for p in member.parameters()]
        torch.testing.assert_close(found, weights, rtol=0, atol=2e-5)
    history, labels = history_of(tmp_path), data.dataset.labels[data.split["val"]]
    assert len(history) == min(EPOCHS, max(lowest_epochs) + PATIENCE)
    assert stage.model.learn == [len(history) - epoch <= PATIENCE for epoch in lowest_epochs]
    together = history[: min(lowest_epochs) + PATIENCE]  # then a member learns no longer
    for line, each in zip(together, zip(*metrics, strict=True), strict=False):
        train_loss, val_loss, logits = zip(*each, strict=True)
        expected = [line["epoch"] * STEPS, np.mean(train_loss), np.mean(val_loss)]
        expected.append(roc_auc_score(labels, np.mean(logits, axis=0)))
        np.testing.assert_allclose(list(line.values())[1:5], expected, atol=1e-5)


@pytest.mark.slow
def test_the_test_part_is_read_once_and_only_after_training(dka_file, tmp_path, monkeypatch):
    """With all bits of float32; a tracker gets each epoch and the final metrics as numbers."""
    events, tracker, read = [], MagicMock(), LengthBatches.__iter__
    split = make(dka_file, tmp_path)[1].split

    def reading(batches):
        assert torch.get_float32_matmul_precision() == "highest"
        rows = batches.rows.tolist()
        events.extend(part for part in split if split[part].tolist() == rows)
        return read(batches)

    monkeypatch.setattr(LengthBatches, "__iter__", reading)
    monkeypatch.setattr("medgemma_clinical.training.trackers.Accelerator", lambda **_: tracker)
    monkeypatch.setattr("medgemma_clinical.commands.run_log.check_tracker", lambda name: None)
    torch.set_float32_matmul_precision("high")
    assert trainer.main([*stage_1(dka_file, tmp_path), "--report_to", "wandb"]) == 0
    torch.set_float32_matmul_precision("highest")
    assert events == [*["train", "val"] * 3, "val", "train", "val", "test"]
    # Epochs, their mean, its shift, the model.

    assert [call.kwargs["step"] for call in tracker.log.call_args_list] == [7, 14, 21, 21]
    *lines, final = sent = [call.args[0] for call in tracker.log.call_args_list]
    for line, row in zip(lines, history_of(tmp_path / "trajectory"), strict=True):
        assert line == {name: row[name] for name in {"train_loss", "val_auroc", *line}}
    metrics = json.loads((tmp_path / "trajectory" / "metrics.json").read_text())
    assert final["test_auroc"] == metrics["test"]["auroc"]["value"]
    assert all(isinstance(value, (int, float)) for each in sent for value in each.values())


def test_a_step_waits_for_the_device_once(monkeypatch):
    stage, waits, step = toy_stage(accumulate=2), [], trainer.step
    stage.begin_epoch = lambda *_: waits.clear()
    monkeypatch.setattr(trainer, "step", lambda *given: (step(*given), waits.append("step"))[0])
    monkeypatch.setattr(trainer, "validate", MagicMock(side_effect=ZeroDivisionError))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "nonzero"):
        real = getattr(torch.Tensor, name)
        waiting = lambda *given, name=name, real=real: waits.append(name) or real(*given)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, waiting)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(stage, 7)
    assert waits == ["tolist", "step"] * 3


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_number_moves_no_weight_no_moment_and_no_rate(what, value):
    state = trainer.set_up(toy_stage())

    def step(loss, slope):
        for parameter in state.parameters:
            parameter.grad = torch.ones_like(parameter)
        state.parameters[1].grad[2] = slope
        assert not trainer.step(state, torch.tensor(loss), 2)
        assert all(p.grad is None or not p.grad.any() for p in state.parameters)
        moments = state.optimizer.state_dict()["state"].values()
        kept = [*state.parameters, *(t for each in moments for t in each.values())]
        return [*map(torch.clone, kept), torch.tensor(state.schedule.get_last_lr())]

    before = step(1.0, 1.0)
    skipped = step(value if what == "loss" else 1.0, value if what == "gradient" else 1.0)
    assert all(map(torch.equal, skipped, before))
    assert not any(map(torch.equal, step(1.0, 1.0), before))
    progress = state.progress
    assert (progress.loss, progress.terms, progress.skipped, progress.steps) == (2.0, 4.0, 1, 3)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("faults", [MAX_SKIPPED - 1, MAX_SKIPPED])
def test_skipped_steps_are_counted_and_five_in_a_row_end_the_run(faults, fault, tmp_path, caplog):
    stage = toy_stage(size=20)  # two steps an epoch
    stage.model.fault, stage.model.faults = fault, faults
    if faults == MAX_SKIPPED:
        with pytest.raises(NonFiniteLossError):
            trainer.fit(stage, 7, tmp_path)
    else:
        trainer.fit(stage, 7, tmp_path)
    lines = [(line["skipped_steps"], line["train_loss"] is None) for line in history_of(tmp_path)]
    assert lines == [(2, True), (2, True), (0, False)][: 2 if faults == MAX_SKIPPED else 3]
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert all(each.isfinite().all() for each in torch.load(tmp_path / "best.pt").values())


def test_a_validation_loss_that_is_no_number_stops_the_run():
    stage = toy_stage()
    stage.model.base.weight.fill_(math.inf)
    with pytest.raises(NonFiniteLossError):
        trainer.validate(stage, trainer.set_up(stage))
