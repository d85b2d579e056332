"""The one training loop of the script: what it computes, and what it does when numbers fail."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medgemma_trainer as trainer
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.models.trajectory import Output, TrajectoryClassifier
from medgemma_clinical.training import trackers
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import batches_of
from medgemma_clinical.training.optimizer import warmup_cosine
from medgemma_clinical.training.stage import WEIGHT_DECAY, Stage
from medgemma_clinical.training.train_state import (
    AVERAGE_DECAY,
    MOST_SKIPPED,
    NonFiniteLossError,
    set_up_training,
)
from stages import make_stage
from toy_stage import toy_stage

CPU = torch.device("cpu")
STEPS = 8
"""Of an epoch: 128 of 160 rows train, 16 at a time."""


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals need not be good here."""
    monkeypatch.setattr(bootstrap, "REPLICATES", 20)


def stage_1(data: Path, folder: Path, *words: str) -> list[str]:
    shared = ["--trajectory_only", "--data_path", str(data), "--output_dir", str(folder)]
    shared += ["--min_cell", "0"]
    return [*shared, "--log_file", "none", "--trajectory_epochs", "3", *words]


def parse(*words: str) -> argparse.Namespace:
    return trainer.complete(trainer.build_parser().parse_args([*words]))


def make(words: list[str]) -> tuple[Stage, Data]:
    args = parse(*words)
    dataset = trainer.read_dataset(args)
    prompts = wiring.prompt_options(args)
    data = prepare_data(dataset, max_samples=args.max_samples, seed=args.seed, prompts=prompts)
    return make_stage(args, data), data


def history_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "trajectory" / "history.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


# --------------------------------------------------------------------------- what it computes


def test_the_loop_is_clipped_adamw_on_the_schedule_with_averaged_weights(
    dka_file: Path, tmp_path: Path
) -> None:
    """Written out plainly, from the same weights, they give the same best weights."""
    words = stage_1(dka_file, tmp_path, "--trajectory_epochs", "2", "--encoder_lr", "0.05")
    stage, _ = make(words)
    (tmp_path / "trajectory").mkdir()
    trainer.fit(stage, 7, tmp_path / "trajectory")

    plain, data = make(words)
    parameters = list(plain.model.parameters())
    matrices, others = ([p for p in parameters if (p.ndim > 1) == each] for each in (True, False))
    groups: Any = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0, fused=True)
    average = [p.detach().clone() for p in parameters]
    norms, best, best_score, step = [], average, -1.0, 0
    for epoch in (1, 2):
        train = data.split["train"]
        order = np.random.default_rng(np.random.SeedSequence([7, epoch])).permutation(train)
        plain.model.train()
        for rows in np.split(order, range(16, len(order), 16)):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * warmup_cosine(step, 2 * STEPS)
            optimizer.zero_grad()
            output = plain.model(data.dataset.collate(rows.tolist()))
            (output.loss / output.terms).backward()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
            optimizer.step()
            step += 1
            decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
            average = [
                a.lerp(p.detach(), 1 - decay) for a, p in zip(average, parameters, strict=True)
            ]
        kept = [p.detach().clone() for p in parameters]
        copy(parameters, average)
        score = evaluate(plain.model, plain.loaders["val"], CPU).auroc()
        if score > best_score:
            best_score, best = score, average
        copy(parameters, kept)
    assert step == 2 * STEPS
    assert max(norms) > 1.0, "else clipping would not have been exercised"
    for found, expected in zip(stage.model.parameters(), best, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=2e-5)


def test_a_run_without_a_folder_ends_with_the_same_weights_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    kept, free = toy_stage(), toy_stage()
    torch.manual_seed(1)
    trainer.fit(kept, 7, tmp_path / "run")
    torch.manual_seed(1)
    trainer.fit(free, 7)
    assert list(tmp_path.rglob("here/*")) == []
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    for stage in (kept, free):
        for name, tensor in stage.model.state_dict().items():
            assert torch.equal(tensor, saved[name]), name


def copy(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_accumulated_batches_are_one_large_batch_the_last_ones_too(accumulate: int) -> None:
    """Five batches of 8, 8, 8, 8 and 5 rows: the mean is over rows, not over batches."""
    stage = toy_stage(accumulate=accumulate)
    stage.model.get_submodule("encoder.2").p = 0.0  # type: ignore[assignment]  # no dropout
    state = set_up_training(stage, CPU)
    gradients: list[list[torch.Tensor]] = []

    def keep(*_: Any, **__: Any) -> None:
        gradients.append([p.grad.clone() for p in state.parameters if p.grad is not None])

    state.optimizer.register_step_pre_hook(keep)
    before = [p.detach().clone() for p in state.parameters]
    trainer.train_epoch(stage, state, seed=3)
    assert len(gradients) == stage.steps_per_epoch == state.average.steps
    batches = batches_of(stage.loaders["train"])
    batches.set_epoch(3, 1)
    rows = [row for batch in list(batches)[:accumulate] for row in batch]
    copy(state.parameters, before)
    stage.model.zero_grad()
    output = stage.model(stage.loaders["train"].collate_fn(rows))
    (output.loss / len(rows)).backward()
    nn.utils.clip_grad_norm_(state.parameters, trainer.LARGEST_NORM)
    for found, parameter in zip(gradients[0], state.parameters, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(found, parameter.grad)


def test_the_test_part_is_read_once_and_only_after_training(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data = make(stage_1(dka_file, tmp_path))
    events: list[str] = []
    fit = trainer.fit

    def seen(model: nn.Module, loader: Any, *rest: Any, **further: Any) -> Predictions:
        rows = batches_of(loader).rows.tolist()
        events.append("test" if rows == data.split["test"].tolist() else "val")
        return evaluate(model, loader, *rest, **further)

    def training(*arguments: Any, **further: Any) -> Any:
        state = fit(*arguments, **further)
        events.append("trained")
        return state

    for module in ("training.evaluate", "training.memory", "commands.results"):
        monkeypatch.setattr(f"medgemma_clinical.{module}.evaluate", seen)
    monkeypatch.setattr(trainer, "fit", training)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 0
    assert events.count("test") == 1
    assert events.count("val") == 5, "a trial, three epochs, the best"
    assert events.index("trained") < events.index("test")


def test_patience_ends_a_run_early_and_the_best_epoch_is_kept(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.6, 0.7, 0.5, 0.5, 0.5, 0.9])
    validate = trainer.validate
    weights = []

    class Scored(Predictions):
        def auroc(self) -> float:
            return next(scores)

    def scored(stage: Stage, state: Any) -> Predictions:
        weights.append([each.clone() for each in state.average.weights])
        return Scored(**vars(validate(stage, state)))

    monkeypatch.setattr(trainer, "validate", scored)
    words = stage_1(dka_file, tmp_path / "run", "--trajectory_epochs", "6", "--patience", "3")
    assert trainer.main(words) == 0
    history = history_of(tmp_path / "run")
    assert [row["improved"] for row in history] == [True, True, False, False, False]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    saved = read_trajectory(tmp_path / "run" / TRAJECTORY_FILE)
    stage, _ = make(words)
    names = list(stage.trainable_parameters())
    for name, second in zip(names, weights[1], strict=True):
        assert torch.equal(saved.weights[name], second), name


# --------------------------------------------------------------------------- what fails


class Faulty(TrajectoryClassifier):
    """Fails in the training step that ``fault_at`` counts, and in ``faults`` - 1 behind it."""

    fault_at = 0
    faults = MOST_SKIPPED
    fault = ""

    def forward(self, batch: Any) -> Output:
        output = super().forward(batch)
        Faulty.fault_at -= self.training
        if not -Faulty.faults < Faulty.fault_at <= 0 or not self.training:
            return output
        if Faulty.fault == "interrupt":
            raise KeyboardInterrupt
        if Faulty.fault == "gradient":  # finite loss, infinite slope
            zero = self.get_parameter("members.0.head.output.bias").sum() * 0
            return output._replace(loss=output.loss + zero.sqrt())
        return output._replace(loss=output.loss * math.nan)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    monkeypatch.setattr(wiring, "TrajectoryClassifier", Faulty)
    for name in ("fault_at", "faults", "fault"):
        monkeypatch.setattr(Faulty, name, getattr(Faulty, name))
    return Faulty


@pytest.mark.parametrize(
    ("fault", "code", "step", "epochs_done"),
    [
        ("loss", 3, 3, 0),
        ("gradient", 3, 12, 1),
        ("interrupt", 130, 12, 1),
    ],
)
def test_a_fault_in_training_keeps_the_last_good_state(
    fault: str,
    code: int,
    step: int,
    epochs_done: int,
    faulty: type[Faulty],
    dka_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty.fault_at, faulty.fault = step, fault
    words = stage_1(dka_file, tmp_path / "run", "--log_file", str(tmp_path / "own.log"))
    assert trainer.main(words) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    text = error.removeprefix("error: ").replace(f"{tmp_path}/", "")  # no folder stands in a log
    assert text in (tmp_path / "own.log").read_text()
    if fault == "interrupt":
        assert "no test figures" in error
        assert "best weights so far are in" in error
    else:
        assert f"epoch {epochs_done + 1}, the 5th time in a row, in batches " in error
        assert "extreme values in the data" in error
        assert "the attention of this GPU" in error
        assert "learning rate" not in error
    folder = tmp_path / "run" / "trajectory"
    best = tmp_path / "run" / TRAJECTORY_FILE
    assert best.exists() == bool(epochs_done)
    if epochs_done:
        saved = read_trajectory(best)
        for tensor in saved.weights.values():
            assert torch.isfinite(tensor).all()
        assert len(history_of(tmp_path / "run")) == epochs_done
    assert not (folder / "metrics.json").exists()
    assert not (folder / "predictions_test.csv").exists()


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_without_a_number_is_left_out_and_counted(
    fault: str,
    faulty: type[Faulty],
    dka_file: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty.fault_at, faulty.faults, faulty.fault = 1, MOST_SKIPPED - 1, fault
    words = stage_1(dka_file, tmp_path / "run")
    assert trainer.main(words) == 0
    printed = capsys.readouterr().out
    stage, data = make(words)
    batches_of(stage.loaders["train"]).set_epoch(0, 1)
    rows = list(batches_of(stage.loaders["train"]))[: MOST_SKIPPED - 1]
    lengths = sorted({int(data.dataset.lengths[batch].max()) for batch in rows})
    assert printed.count(" were skipped") == 1
    assert "epoch 1: 4 of 8 steps (50.0 %) were skipped" in printed
    assert f"in batches {', '.join(map(str, lengths))} tokens (without text: observ" in printed
    history = history_of(tmp_path / "run")
    assert [row["skipped_steps"] for row in history] == [4, 0, 0]
    assert [row["step"] for row in history] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert all(np.isfinite(row["train_loss"]) for row in history)
    assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_number_moves_no_weight_and_no_moment(what: str, value: float) -> None:
    stage = toy_stage()
    state = set_up_training(stage, CPU)

    def step(loss: float, slope: float) -> None:
        for parameter in state.parameters:
            parameter.grad = torch.ones_like(parameter)
        gradient = state.parameters[1].grad
        assert gradient is not None
        gradient[2] = slope
        trainer.train_step(state, loss, 2)

    def memory() -> list[torch.Tensor]:
        moments = state.optimizer.state_dict()["state"].values()
        kept = [*state.parameters, *(t for each in moments for t in each.values())]
        return [tensor.detach().clone() for tensor in kept]

    step(1.0, 1.0)
    before = memory()
    step(value if what == "loss" else 1.0, value if what == "gradient" else 1.0)
    assert all(map(torch.equal, memory(), before))
    assert all(p.grad is None or not p.grad.any() for p in state.parameters)
    step(1.0, 1.0)
    assert not any(map(torch.equal, memory(), before))
    progress = state.progress
    assert (progress.loss, progress.terms, progress.skipped) == (2.0, 4.0, 1)
    assert progress.skipped_in_a_row == 0
    assert state.average.steps == 3


def test_skipped_steps_in_a_row_are_counted_across_epochs() -> None:
    state = set_up_training(toy_stage(), CPU)
    for _ in range(MOST_SKIPPED - 1):
        trainer.train_step(state, math.nan, 2)
    state.progress = state.progress.next_epoch(over=False)
    with pytest.raises(NonFiniteLossError, match="the 5th time in a row"):
        trainer.train_step(state, math.nan, 2)


def test_an_epoch_without_a_single_step_has_no_training_loss(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda state, loss, terms: train_step(state, math.nan, terms)
    )
    words = stage_1(dka_file, tmp_path / "run", "--batch_size", "64", "--trajectory_epochs", "2")
    assert trainer.main(words) == 0
    history = history_of(tmp_path / "run")
    assert [line["train_loss"] for line in history] == [None, None]
    assert [line["skipped_steps"] for line in history] == [2, 2]


def test_a_validation_loss_that_is_no_number_stops_the_run(
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*arguments: Any, **further: Any) -> Predictions:
        return replace(evaluate(*arguments, **further), loss=math.nan)

    monkeypatch.setattr("medgemma_clinical.training.evaluate.evaluate", broken)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 3
    assert "validation loss is nan in epoch 1" in capsys.readouterr().err


def test_a_tracker_that_fails_ends_no_run(
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing:
        def __init__(self, **_: Any) -> None:
            pass

        def init_trackers(self, *_: Any) -> None:
            pass

        def log(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("the server is gone")

        end_training = log

    monkeypatch.setattr("accelerate.Accelerator", Failing)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    words = stage_1(dka_file, tmp_path / "run", "--trajectory_epochs", "1")
    assert trainer.main([*words, "--report_to", "wandb"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("training goes on without it: the server is gone") == 1
    assert len(history_of(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "trajectory" / "metrics.json").exists()


def test_a_tracker_gets_each_epoch_and_the_final_figures_as_numbers_alone(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    steps: list[int] = []

    class Recorder:
        def __init__(self, **_: Any) -> None:
            pass

        def init_trackers(self, name: str, numbers: dict[str, Any], _: Any) -> None:
            sent.append(numbers)

        def log(self, figures: dict[str, Any], step: int) -> None:
            sent.append(figures)
            steps.append(step)

        def end_training(self) -> None:
            pass

    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    words = stage_1(dka_file, tmp_path / "run", "--report_to", "wandb")
    assert trainer.main(words) == 0
    numbers, *epochs, final = sent
    history = history_of(tmp_path / "run")
    assert numbers["seed"] == 0
    assert steps[:-1] == [row["step"] for row in history]
    for figures, row in zip(epochs, history, strict=True):
        assert figures == {name: row[name] for name in figures}
        assert {"train_loss", "val_loss", "val_auroc"} <= set(figures)
    metrics = json.loads((tmp_path / "run" / "trajectory" / "metrics.json").read_text())
    for part in ("validation", "test"):
        for name in ("auroc", "auprc", "brier", "log_loss"):
            assert final[f"{part}_{name}"] == metrics[part][name]["value"]
    assert all(isinstance(value, (int, float)) for each in sent for value in each.values())
