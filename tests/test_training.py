"""The one loop and its parts: stopping, averaging, schedule, faults, metrics, checkpoints."""

import argparse
import contextlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dte_encoder
import medgemma_trainer as trainer
from dataset_format import InputError


def parse(*words: str) -> argparse.Namespace:
    return trainer.resolve(trainer.build_parser().parse_args([*words]))


def stage_1(data: Path, folder: Path, *words: str) -> list[str]:
    shared = ["--trajectory_only", "--data_path", str(data), "--output_dir", str(folder)]
    return [*shared, "--log_file", "none", "--trajectory_epochs", "3", *words]


@pytest.mark.parametrize("higher", [True, False])
def test_early_stopping_waits_for_patience_epochs_and_keeps_the_first_best(higher: bool) -> None:
    stopping = trainer.EarlyStopping(patience=2, higher_is_better=higher)
    sign = 1 if higher else -1
    improved = [stopping.improved(sign * score) for score in (0.6, 0.7, 0.7, 0.65)]
    assert improved == [True, True, False, False]
    assert (stopping.best, stopping.best_epoch) == (sign * 0.7, 2)
    assert stopping.exhausted


def test_patience_ends_a_run_early(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.6, 0.7, 0.5, 0.5, 0.5, 0.9])
    monkeypatch.setattr(trainer, "auroc", lambda _: next(scores))
    words = stage_1(dka_file, tmp_path / "run", "--trajectory_epochs", "6", "--patience", "3")
    assert trainer.main(words) == 0
    lines = (tmp_path / "run" / "trajectory" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["improved"] for line in lines] == [True, True, False, False, False]


def test_the_average_starts_at_the_weights_follows_them_and_gives_them_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    vectors = trainer.Vectors([{"params": [weight], "lr": 0.1}])
    average = trainer.WeightAverage(vectors.weights, decay=0.5)
    for value in (2.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
    # decays (1 + n) / (10 + n) = 2/11 and 3/12 lie below 0.5
    expected = 3 / 12 * (2 / 11 * 1 + 9 / 11 * 2) + 9 / 12 * 3
    with vectors.lent(average.shadow):
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 3.0
    with vectors.lent(average.shadow):
        assert weight.item() == pytest.approx(expected)


def test_the_schedule_counts_steps_up_to_a_tenth_then_falls_to_zero() -> None:
    factor = trainer.warmup_cosine(200)
    assert factor(0) == pytest.approx(1 / 20)
    assert factor(19) == 1.0
    assert factor(110) == pytest.approx(0.5)
    assert factor(200) == pytest.approx(0.0)
    assert trainer.warmup_cosine(1)(0) == 1.0
    assert trainer.warmup_cosine(100_000)(99) == 1.0


def test_the_loop_is_clipped_adamw_on_the_schedule_in_an_order_of_its_own(
    dka_file: Path, tmp_path: Path
) -> None:
    args = parse(*stage_1(dka_file, tmp_path, "--trajectory_epochs", "2", "--encoder_lr", "0.05"))
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    (tmp_path / "trajectory").mkdir()
    trainer.run_stage(stage, tmp_path / "trajectory", torch.device("cpu"), seed=7)

    data = trainer.load_data(args)
    plain = trainer.trajectory_stage(args, data)
    parameters = list(plain.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01, fused=True)
    shadow = [p.detach().clone() for p in parameters]
    norms, best, winner, steps = [], -1.0, shadow, 0
    for epoch in (1, 2):
        train = data.split["train"]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(7 + epoch))
        plain.model.train()
        for places in order.split(16):
            batch = data.dataset.collate(train[places.numpy()].tolist())
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * trainer.warmup_cosine(16)(steps)
            optimizer.zero_grad()
            output = plain.model(batch)
            output.loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            assert len(gradients) == len(parameters)
            # As one vector, the largest first: in another order the last bits differ.
            whole = torch.cat([g.flatten() for g in sorted(gradients, key=lambda g: -g.numel())])
            norm = (whole @ whole).sqrt()
            norms.append(float(norm) / output.terms)
            for gradient in gradients:
                gradient.div_(norm.clamp(min=output.terms))
            optimizer.step()
            steps += 1
            decay = min(0.998, (1 + steps) / (10 + steps))
            shadow = [
                a.lerp(p.detach(), 1 - decay) for a, p in zip(shadow, parameters, strict=True)
            ]
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, a in zip(parameters, shadow, strict=True):
                p.copy_(a)
        score = trainer.auroc(
            trainer.evaluate(plain.model, plain.loaders["val"], torch.device("cpu"))
        )
        if score > best:
            best, winner = score, [a.clone() for a in shadow]
        with torch.no_grad():
            for p, k in zip(parameters, kept, strict=True):
                p.copy_(k)
    assert max(norms) > 1.0  # else clipping would not have been exercised
    for mine, expected in zip(stage.model.parameters(), winner, strict=True):
        assert torch.equal(mine, expected)


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_takes_the_same_few_calls_for_any_number_of_parameters() -> None:
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        vectors = trainer.Vectors([{"params": [p], "lr": 0.1} for p in model.parameters()])
        learner = trainer.Learner(
            *(model, vectors, trainer.AdamW(vectors, lambda step: 1.0)),
            trainer.WeightAverage(vectors.weights, 0.9),
            trainer.EarlyStopping(1, True),
        )
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = [p.detach().clone() for p in model.parameters()]
        with Calls() as calls:
            trainer.take_step(learner, 1, torch.tensor(1.0), 2)
        assert not any(map(torch.equal, before, model.parameters()))
        del calls.names["view"]  # to lay gradients end to end, one each; moves nothing
        counts.append(calls.names)
    assert counts[0] == counts[1]
    assert counts[0]["_fused_adamw_"] == counts[0]["div_"] == counts[0]["dot"] == 1
    assert sum(counts[0].values()) <= 14


def test_an_epoch_waits_for_nothing_from_the_device_but_where_it_reads_its_steps(
    dka_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there is nothing to read: whoever asks for a number there fails."""
    monkeypatch.setattr(dte_encoder, "in_full_precision", lambda _: contextlib.nullcontext())
    read: list[list[int]] = []

    def unread(learner: trainer.Learner) -> None:
        read.append([step.batch for step in learner.tried])
        learner.tried.clear()

    args = parse("--trajectory_only", "--data_path", str(dka_file), "--batch_size", "5")
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    learner = trainer.begin(stage, torch.device("meta"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "read_steps", unread)
        trainer.train_epoch(stage, learner)
    count, most = len(stage.loaders["train"]), trainer.STEPS_UNREAD
    assert [*itertools.chain(*read)] == list(range(1, count + 1))
    assert [len(each) for each in read] == [most] * (count // most) + [count % most]
    assert len(read) > 2
    assert count % most
    assert all(weights.is_meta for weights in learner.vectors.weights)
    learner.progress.batches = 0
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        trainer.train_epoch(stage, learner)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_number_moves_no_weight(what: str, value: float) -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in (3, 5)]
    vectors = trainer.Vectors([{"params": [p], "lr": p.numel() / 10} for p in parameters])
    learner = trainer.Learner(
        *(nn.Identity(), vectors, trainer.AdamW(vectors, lambda step: 1.0)),
        trainer.WeightAverage(vectors.weights, 0.9),
        trainer.EarlyStopping(1, True),
    )
    optimizer = learner.optimizer
    memory = [*vectors.weights, *optimizer.exp_avg, *optimizer.exp_avg_sq, *optimizer.steps]
    shadow = learner.average.shadow

    def step(loss: float, slope: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        gradient = parameters[1].grad
        assert gradient is not None
        gradient[2] = slope
        trainer.take_step(learner, 1, torch.tensor(loss), 2)

    step(1.0, 1.0)
    before = [each.clone() for each in memory]
    pairs = zip(shadow, vectors.weights, strict=True)
    average = [each.lerp(weights, 1 - 3 / 12) for each, weights in pairs]
    step(value if what == "loss" else 1.0, value if what == "gradient" else 1.0)
    assert all(map(torch.equal, memory, before))
    assert all(map(torch.equal, shadow, average)), "towards the weights as they were"
    step(1.0, 1.0)
    assert not any(map(torch.equal, memory, before))
    trainer.read_steps(learner)
    progress = learner.progress
    assert (progress.loss, progress.terms, progress.skipped) == (2.0, 4.0, 1)
    assert progress.skipped_in_a_row == 0
    assert not learner.tried


@pytest.mark.parametrize("sizes", [(1, 1), (2**22, 3 * 2**16 + 1)])
def test_gradients_are_clipped_by_their_norm_over_all_vectors(sizes: tuple[int, int]) -> None:
    """Of the first step AdamW's mean of gradients is a tenth of what clipping has left."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.1, 0.2), strict=True)]
    vectors = trainer.Vectors(groups)
    optimizer = trainer.AdamW(vectors, lambda step: 1.0)
    average = trainer.WeightAverage(vectors.weights, 0.9)
    stopping = trainer.EarlyStopping(1, True)
    learner = trainer.Learner(nn.Identity(), vectors, optimizer, average, stopping)
    generator = torch.Generator().manual_seed(0)
    for parameter, size in zip(parameters, (3.0, 4.0), strict=True):
        slope = torch.randn(parameter.shape, generator=generator)
        parameter.grad = slope * size / slope.double().norm()
    trainer.take_step(learner, 1, torch.tensor(1.0), 1)
    left = [float(10 * mean.double().norm()) for mean in optimizer.exp_avg]
    assert left == pytest.approx([0.6, 0.8], rel=2e-6)


def test_parameters_of_several_rates_and_kinds_learn_as_with_the_optimizer_of_torch() -> None:
    kinds = [
        (torch.float32, 0.1),
        (torch.bfloat16, 0.1),
        (torch.float32, 0.01),
        (torch.float32, 0.1),
    ]
    mine, other = (
        [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).to(kind)) for kind, _ in kinds]
        for _ in range(2)
    )
    groups, rates = (
        [{"params": [p], "lr": rate} for p, (_, rate) in zip(each, kinds, strict=True)]
        for each in (mine, other)
    )
    vectors = trainer.Vectors(groups)
    optimizer = trainer.AdamW(vectors, lambda step: 1 / (1 + step))
    expected = torch.optim.AdamW(rates, weight_decay=0.01, fused=True)
    for step in range(4):
        for group, (_, rate) in zip(expected.param_groups, kinds, strict=True):
            group["lr"] = rate / (1 + step)
        for place, (one, two) in enumerate(zip(mine, other, strict=True)):
            comes = place < 3 or step == 0
            two.grad = two.detach() * (step - 1.5) * comes
            one.grad = two.grad.clone() if comes else None  # none is as one of zero
        optimizer.step(vectors.take_gradients(), torch.zeros(()))
        assert all(p.grad is None for p in mine), "the next step begins without"
        expected.step()
    assert all(map(torch.equal, mine, other))
    assert [len(each) for each in vectors.weights] == [12, 6, 6], "of each rate and kind one"


def test_vectors_are_the_memory_of_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1, bias=False), nn.LayerNorm(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = trainer.Vectors([{"params": list(model.parameters()), "lr": 0.1}])
    after = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    others = [torch.arange(float(len(each))) for each in vectors.weights]
    with vectors.lent(others):
        for parameter, piece in zip(model.parameters(), vectors.cut(others), strict=True):
            assert torch.equal(parameter, piece)
    with contextlib.suppress(ZeroDivisionError), vectors.lent(others):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(
        *(torch.cat([p.flatten() for p in each]) for each in (vectors.weights, model.parameters()))
    ), "what is read into the model is what learns"
    assert all(torch.equal(tensor, before[name] + 1) for name, tensor in after.items())


def test_a_saved_encoder_holds_its_own_numbers_alone(dka_file: Path, tmp_path: Path) -> None:
    args = parse(*stage_1(dka_file, tmp_path))
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    trainer.begin(stage, torch.device("cpu"))  # all that learns now lies in one memory
    (tmp_path / "trajectory").mkdir()
    stage.save(tmp_path / "trajectory")
    content = trainer.read_trajectory(tmp_path / trainer.TRAJECTORY_FILE)
    for tensor in [*content["encoder"].values(), *content["head"].values()]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_the_test_part_is_read_once_and_only_after_training(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(*stage_1(dka_file, tmp_path))
    test_rows = trainer.load_data(args).split["test"].tolist()
    events: list[str] = []
    evaluate, run_stage = trainer.evaluate, trainer.run_stage

    def seen(model: nn.Module, loader: trainer.Loader, *rest: Any) -> trainer.Scored:
        events.append("test" if loader.batch_sampler.rows.tolist() == test_rows else "val")
        return evaluate(model, loader, *rest)

    def training(*arguments: Any, **further: Any) -> trainer.EarlyStopping:
        result = run_stage(*arguments, **further)
        events.append("trained")
        return result

    monkeypatch.setattr(trainer, "evaluate", seen)
    monkeypatch.setattr(trainer, "run_stage", training)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 0
    assert events.count("test") == 1
    assert events.index("trained") < events.index("test")


def test_training_keeps_freed_memory_and_reading_does_not(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("load_data", "keep_freed_memory", "train_epoch"):
        work = getattr(trainer, name)

        def looking(*arguments: Any, work: Any = work) -> Any:
            calls.append(work.__name__)
            return work(*arguments)

        monkeypatch.setattr(trainer, name, looking)
    assert trainer.main(stage_1(dka_file, tmp_path / "run", "--trajectory_epochs", "1")) == 0
    assert calls == ["load_data", "keep_freed_memory", "train_epoch"]


@pytest.mark.parametrize(("size", "threads"), [(32, 1), (33, 3)])
def test_small_batches_learn_on_one_thread(
    size: int, threads: int, dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are back for what follows, after a fault as well."""
    args = parse(*stage_1(dka_file, tmp_path, "--batch_size", str(size)))
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    (tmp_path / "trajectory").mkdir()
    seen, own, cpu = set(), torch.get_num_threads(), torch.device("cpu")
    for name in ("take_step", "evaluate"):
        work = getattr(trainer, name)

        def looking(*arguments: Any, work: Any = work) -> Any:
            seen.add((work.__name__, torch.get_num_threads()))
            return work(*arguments)

        monkeypatch.setattr(trainer, name, looking)
    try:
        torch.set_num_threads(3)
        trainer.run_stage(stage, tmp_path / "trajectory", cpu, seed=0)
        assert seen == {("take_step", threads), ("evaluate", threads)}
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(trainer, "take_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run_stage(stage, tmp_path / "trajectory", cpu, seed=0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)


def test_no_figure_depends_on_the_batch_size(dka_file: Path) -> None:
    scored = []
    for size in ("1", "7", "64"):
        args = parse("--data_path", str(dka_file), "--batch_size", size)
        stage = trainer.trajectory_stage(args, trainer.load_data(args))
        scored.append(trainer.evaluate(stage.model, stage.loaders["val"], torch.device("cpu")))
    for other in scored[1:]:
        assert other.loss == pytest.approx(scored[0].loss, rel=1e-6)
        assert np.allclose(other.probability, scored[0].probability, atol=1e-6)


class Faulty(trainer.TrajectoryClassifier):
    """Fails in the training step that ``fault_at`` counts, and in ``faults`` - 1 behind it."""

    fault_at = 0
    faults = trainer.MOST_SKIPPED
    fault = ""

    def forward(self, batch: Any) -> trainer.Output:
        output = super().forward(batch)
        Faulty.fault_at -= self.training
        if not -Faulty.faults < Faulty.fault_at <= 0 or not self.training:
            return output
        if Faulty.fault == "interrupt":
            raise KeyboardInterrupt
        if Faulty.fault == "gradient":  # finite loss, infinite slope
            zero = self.head.bias.sum() * 0
            return output._replace(loss=output.loss + zero.sqrt())
        return output._replace(loss=output.loss * float("nan"))


@pytest.mark.parametrize(("step", "epochs_done"), [(3, 0), (8, 0), (12, 1)])
@pytest.mark.parametrize(("fault", "code"), [("loss", 3), ("gradient", 3), ("interrupt", 130)])
def test_a_fault_in_training_keeps_the_last_good_state(
    step: int,
    epochs_done: int,
    fault: str,
    code: int,
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "TrajectoryClassifier", Faulty)
    monkeypatch.setattr(Faulty, "fault_at", step)
    monkeypatch.setattr(Faulty, "fault", fault)
    words = stage_1(dka_file, tmp_path / "run", "--log_file", str(tmp_path / "own.log"))
    assert trainer.main(words) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.removeprefix("error: ") in (tmp_path / "own.log").read_text()
    if fault == "interrupt":
        assert "the best state so far lies in" in error
        assert "no test figure" in error
    else:
        last = step + trainer.MOST_SKIPPED - 2  # counted from zero
        assert f"batch {last % 8 + 1} of epoch {last // 8 + 1}, the 5th time in a row" in error
        epochs_done = last // 8
    saved = trainer.read_trajectory(tmp_path / "run" / trainer.TRAJECTORY_FILE)
    for part in ("encoder", "head"):
        assert all(torch.isfinite(tensor).all() for tensor in saved[part].values())
    folder = tmp_path / "run" / "trajectory"
    lines = folder / "history.jsonl"
    assert (len(lines.read_text().splitlines()) if lines.exists() else 0) == epochs_done
    assert not (folder / "metrics.json").exists()
    assert not (folder / "predictions_test.csv").exists()


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_without_a_number_is_left_out_and_counted(
    fault: str, dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "TrajectoryClassifier", Faulty)
    monkeypatch.setattr(Faulty, "fault_at", 3)
    monkeypatch.setattr(Faulty, "faults", trainer.MOST_SKIPPED - 1)
    monkeypatch.setattr(Faulty, "fault", fault)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 0
    lines = (tmp_path / "run" / "trajectory" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [row["skipped_steps"] for row in history] == [4, 0, 0]
    assert [row["step"] for row in history] == [8, 16, 24]
    assert all(np.isfinite(row["train_loss"]) for row in history)


def test_a_validation_loss_that_is_no_number_stops_the_run(
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate = trainer.evaluate

    def broken(*arguments: Any) -> trainer.Scored:
        return evaluate(*arguments)._replace(loss=float("nan"))

    monkeypatch.setattr(trainer, "evaluate", broken)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 3
    assert "validation loss is nan in epoch 1" in capsys.readouterr().err
    assert (tmp_path / "run" / trainer.TRAJECTORY_FILE).exists()


@pytest.mark.parametrize(
    ("phase", "kept", "figures"),
    [
        ("load_data", None, None),
        ("announce", False, False),
        ("evaluate", False, False),
        ("write_results", True, False),
        ("peak_memory", True, True),
    ],
)
def test_ctrl_c_says_what_was_reached(
    phase: str,
    kept: bool | None,
    figures: bool | None,
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, phase, interrupt)
    assert trainer.main(stage_1(dka_file, tmp_path / "run")) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("nothing more was written" in error) == (kept is None)
    assert (tmp_path / "run").exists() == (kept is not None)
    assert ("best state so far lies in" in error) == bool(kept)
    assert ("its figures too" in error) == bool(figures)


def simulated(seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.3).astype(float)
    labels[:2] = [0, 1]
    risk = np.clip(0.3 + 0.2 * labels + rng.normal(0, 0.2, rows), 0, 1).round(2)  # with ties
    return labels, risk


@pytest.mark.parametrize("seed", range(5))
def test_weighted_metrics_equal_scikit_learn(seed: int) -> None:
    labels, risk = simulated(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(labels))).astype(float)
    weights[:, :2] = 1  # both classes count in every weighting
    result = trainer.weighted_metrics(labels, risk, weights)
    for k, weight in enumerate(weights):
        expected = {
            "auroc": metrics.roc_auc_score(labels, risk, sample_weight=weight),
            "auprc": metrics.average_precision_score(labels, risk, sample_weight=weight),
            "accuracy": metrics.accuracy_score(labels, risk >= 0.5, sample_weight=weight),
            "brier": metrics.brier_score_loss(labels, risk, sample_weight=weight),
            "log_loss": metrics.log_loss(labels, risk, sample_weight=weight),
        }
        for name, value in expected.items():
            assert result[name][k] == pytest.approx(value, abs=1e-9)
    assert set(result) == set(trainer.metrics_of(labels, risk))


def test_the_bootstrap_is_seeded_and_draws_patients_not_rows() -> None:
    labels, risk = simulated(0, rows=100)
    alone = np.arange(100).astype(str)
    first = trainer.metrics_with_intervals(labels, risk, alone, seed=1)
    assert first == trainer.metrics_with_intervals(labels, risk, alone, seed=1)
    assert first != trainer.metrics_with_intervals(labels, risk, alone, seed=2)
    # Each patient four times says no more than each once: the interval must not shrink.
    four = [np.tile(a, 4) for a in (labels, risk, alone)]
    repeated = trainer.metrics_with_intervals(four[0], four[1], four[2], seed=1)
    for name in ("auroc", "brier"):
        assert repeated[name]["low"] == pytest.approx(first[name]["low"])
        assert repeated[name]["high"] == pytest.approx(first[name]["high"])


def test_intervals_cover_the_true_auroc() -> None:
    """Normal scores one standard deviation apart have AUROC 0.760 (the normal CDF of 1/sqrt 2)."""
    covered = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0.0, 1.0], [100, 50])
        risk = 1 / (1 + np.exp(-(rng.normal(0, 1, 150) + labels)))
        score = trainer.metrics_with_intervals(labels, risk, np.arange(150).astype(str), seed)
        covered += score["auroc"]["low"] <= 0.7602 <= score["auroc"]["high"]
    assert 0.90 <= covered / 120 <= 0.99


def test_baselines_learn_from_the_training_part_only(dka_file: Path) -> None:
    data = trainer.load_data(parse("--data_path", str(dka_file)))
    before = trainer.baselines(data)
    held_out = np.concatenate([data.split["val"], data.split["test"]])
    data.dataset.labels[held_out] = 1 - data.dataset.labels[held_out]
    after = trainer.baselines(data)
    for name in before:
        for part in ("val", "test"):
            assert np.array_equal(before[name][part], after[name][part])


def test_the_last_value_baseline_ranks_by_the_last_value(dka_file: Path) -> None:
    data = trainer.load_data(parse("--data_path", str(dka_file)))
    last = data.dataset.values[data.dataset.offsets[1:] - 1, 0][data.split["test"]]
    risk = trainer.baselines(data)["last value"]["test"]
    ranks = pd.Series(last).rank(), pd.Series(risk).rank()
    assert abs(ranks[0].corr(ranks[1])) == pytest.approx(1.0)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_does_not_run(
    tmp_path: Path,
) -> None:
    torch.save({"format": 1, "bomb": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="not a stage 1 checkpoint"):
        trainer.read_trajectory(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def checkpoint(dka_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    assert trainer.main(stage_1(dka_file, folder, "--trajectory_epochs", "1")) == 0
    return folder / trainer.TRAJECTORY_FILE


def load(checkpoint: Path, data: Path, *words: str) -> trainer.ClinicalODERNN:
    args = parse("--data_path", str(data), "--ode_checkpoint", str(checkpoint), *words)
    return trainer.make_encoder(args, trainer.load_data(args))


def test_a_loaded_encoder_is_the_saved_one_and_frozen(checkpoint: Path, dka_file: Path) -> None:
    encoder = load(checkpoint, dka_file)
    saved = trainer.read_trajectory(checkpoint)["encoder"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in encoder.state_dict().items())
    assert not trainer.trainable(encoder)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--seed", "1"), "another split of the same data"),
        (("--max_samples", "100"), "another split of the same data"),
        (("--time_scale", "24"), "--time_scale is 72.0"),
    ],
)
def test_an_encoder_that_does_not_fit_this_run_is_refused(
    words: tuple[str, ...], reason: str, checkpoint: Path, dka_file: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        load(checkpoint, dka_file, *words)


def test_an_encoder_of_another_series_is_refused(checkpoint: Path, dka_file: Path) -> None:
    other = dka_file.with_name("other.csv")
    other.write_bytes(dka_file.read_bytes())
    other.with_suffix(".json").write_text('{"series": "Lactate", "unit": "mmol/L"}')
    with pytest.raises(InputError, match="trained on features"):
        load(checkpoint, other)


def test_an_encoder_of_another_file_is_warned_of(
    checkpoint: Path, dka_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "fewer.csv"
    pd.read_csv(dka_file).iloc[:120].to_csv(other, index=False)
    load(checkpoint, other)
    assert "another data file" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"encoder": {}},
        {"config": {"time_scale": "long"}},
        {"encoder": {"value_mean": torch.zeros(3)}},
        {"format": 1},
    ],
    ids=str,
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    change: dict[str, Any], checkpoint: Path, dka_file: Path, tmp_path: Path
) -> None:
    content = trainer.read_trajectory(checkpoint)
    for part, entries in change.items():
        whole = isinstance(entries, dict) and entries
        content[part] = {**content[part], **entries} if whole else entries
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(InputError, match=r"changed\.pt: "):
        load(tmp_path / "changed.pt", dka_file)


def test_a_gap_that_the_checkpoints_time_scale_cannot_hold_is_refused(
    checkpoint: Path, dka_file: Path, tmp_path: Path
) -> None:
    content = trainer.read_trajectory(checkpoint)
    content["config"]["time_scale"] = 0.05
    torch.save(content, tmp_path / trainer.TRAJECTORY_FILE)
    table = pd.read_csv(dka_file)
    table.loc[0, "clinical_trajectory"] = "20 (0h) -> 21 (900h)"
    table.to_csv(tmp_path / "long.csv", index=False)
    with pytest.raises(InputError, match="gap of 900 h in the data needs a larger --time_scale"):
        load(tmp_path / trainer.TRAJECTORY_FILE, tmp_path / "long.csv")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged\.pt: not a stage 1 checkpoint"):
        trainer.read_trajectory(path)
    with pytest.raises(InputError, match="no such stage 1 checkpoint"):
        trainer.read_trajectory(tmp_path / "missing.pt")


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    trainer.write_text(path, "old")
    with pytest.raises(TypeError), trainer.atomic(path) as temporary:
        temporary.write_bytes([b"half", None])  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_states_that_are_read_and_then_pooled_say_what_pooled_states_say() -> None:
    torch.manual_seed(0)
    head = trainer.PooledHead(6, 0.3).double()
    states = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    lengths = [5, 1, 3]
    present = torch.arange(5) < torch.tensor(lengths)[:, None]
    logit = head(states, trainer.pooling_mask(present))
    (found,) = torch.autograd.grad(logit.sum(), states)
    expected = []
    for row, length in enumerate(lengths):
        own = states[row, :length]
        attention, *output = head.weight
        pooled = (own @ attention).softmax(dim=0) @ own
        expected.append(torch.cat([pooled, own[-1]]) @ torch.cat(output) + head.bias.squeeze())
    torch.testing.assert_close(logit, torch.stack(expected))
    (wanted,) = torch.autograd.grad(torch.stack(expected).sum(), states)
    torch.testing.assert_close(found, wanted)
    assert not found[1, 1:].any(), "padding moves nothing"
    narrow = head.bfloat16()(states.bfloat16(), trainer.pooling_mask(present))
    torch.testing.assert_close(narrow.double(), logit, rtol=0, atol=0.05)


def test_each_batch_of_stage_1_is_planned_once_ahead_of_its_pass(
    dka_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, passes, waiting = [], [], []
    plan, forward = trainer.ClinicalODERNN.plan, trainer.ClinicalODERNN.forward

    def planning(encoder: trainer.ClinicalODERNN, *batch: torch.Tensor) -> Any:
        plans.append(plan(encoder, *batch))
        return plans[-1]

    def passing(encoder: trainer.ClinicalODERNN, *batch: Any) -> torch.Tensor:
        passes.append(batch[3])
        waiting.append(len(plans) - len(passes))
        return forward(encoder, *batch)

    monkeypatch.setattr(trainer.ClinicalODERNN, "plan", planning)
    monkeypatch.setattr(trainer.ClinicalODERNN, "forward", passing)
    assert trainer.main(stage_1(dka_file, tmp_path, "--trajectory_epochs", "2")) == 0
    assert len(passes) > 8
    # A plan that is moved keeps this list.
    assert {id(each.sizes) for each in plans} == {id(each.sizes) for each in passes}
    assert len(plans) == len(passes), "each pass has a plan of its own, and no plan is made twice"
    assert max(waiting) > 1, "none is made between two passes"


@pytest.mark.parametrize(("cells", "most"), [(1, trainer.BATCHES_AHEAD), (2**19, 2), (2**21, 1)])
def test_a_loader_makes_some_batches_ahead_in_order_and_no_more(cells: int, most: int) -> None:
    """Twice as many each time, as long as they are small together."""
    made: list[list[int]] = []

    def collate(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        made.append(list(rows))
        return {"rows": torch.tensor(rows)}

    def prepare(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [
            {**each, "other": torch.empty(cells - len(each["rows"]) % cells)} for each in batches
        ]

    rows = np.arange(0, 8 * trainer.BATCHES_AHEAD)
    loader = trainer.Loader(trainer.Batches(rows, 2, None, shuffle=False), collate, prepare)
    given, waiting = [], []
    for batch in loader:
        assert "other" in batch, "each is prepared"
        given.append(batch["rows"].tolist())
        waiting.append(1 + len(made) - len(given))
    assert given == rows.reshape(-1, 2).tolist() == made
    assert waiting[0] == 1
    assert max(waiting) == most
