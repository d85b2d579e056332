"""The state of training: kept whole, and brought back to the last bit or refused."""

import math
import os
import re
import resource
import signal
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

import medgemma_trainer as trainer
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.training import state as module
from medgemma_clinical.training.signals import SIGNALS, Stopped
from medgemma_clinical.training.state import (
    Progress,
    TrainState,
    WeightAverage,
    load_training_state,
    read_state,
    training_state,
    write_state,
)
from toy_stage import toy_stage


def test_the_newest_is_read_as_it_was_written_and_no_half_file_is_left(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        weights = torch.full((2, 3), step / 3)
        write_state(tmp_path / "last", {"step": step, "weights": weights, "epochs": []})
    (path,) = (tmp_path / "last").iterdir()
    state = read_state(tmp_path / "last")
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.ones(2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_state(tmp_path / "last", {"step": 4, "epochs": []})
    assert read_state(tmp_path / "last")["step"] == 3
    assert [*path.parent.iterdir()] == [path]


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_an_error_of_the_file(tmp_path):
    write_state(tmp_path, {"step": 1, "epochs": []})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=module.STATE_FILE):
            write_state(tmp_path, {"step": 2, "weights": torch.zeros(2**20), "epochs": []})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_state(tmp_path)["step"] == 1
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:99], lambda data: data[:-200] + b"0" * 200])
def test_a_damaged_state_is_named_and_left_alone(damage, tmp_path):
    write_state(tmp_path / "last", {"step": 4, "epochs": []})
    path = tmp_path / "last" / module.STATE_FILE
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(InputError, match=str(path)):
        read_state(tmp_path / "last")
    assert path.read_bytes() == damaged


def test_code_does_not_run_and_another_version_is_named(tmp_path, monkeypatch):
    write_state(tmp_path, {"code": os.mkdir, "epochs": []})
    with pytest.raises(InputError, match=module.STATE_FILE):
        read_state(tmp_path)
    monkeypatch.setattr(module, "STATE_FORMAT", module.STATE_FORMAT + 1)
    write_state(tmp_path, {"step": 5, "epochs": []})
    assert read_state(tmp_path) == {"step": 5, "epochs": {}}
    monkeypatch.undo()
    with pytest.raises(InputError, match=module.STATE_FILE):
        read_state(tmp_path)


def everything(state):
    """Return all that a state must bring back, the time it took apart."""
    moments, progress = state.optimizer.state_dict(), dict(vars(state.progress))
    tensors = [*state.parameters, *state.average.weights, torch.get_rng_state()]
    tensors += [weight for weights in state.epochs.values() for weight in weights]
    tensors += [t for each in moments["state"].values() for t in each.values()]
    progress["history"] = [{**line, "seconds": 0} for line in progress["history"]]
    schedule = state.schedule.state_dict(), [group["lr"] for group in moments["param_groups"]]
    return [t.tolist() for t in tensors], repr({**progress, "seconds": 0}), schedule


def fit(folder, seed=0, **options):
    """Train a new stage of 3 epochs of 5 steps; return all of its state."""
    stage = toy_stage(seed)
    state = trainer.fit(stage, 7, folder, **options)
    best = torch.load(folder / "best.pt", weights_only=True)
    assert all(torch.equal(best[name], p) for name, p in stage.model.state_dict().items())
    return everything(state)


@pytest.fixture(scope="module")
def whole():
    return everything(trainer.fit(toy_stage(), 7))


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("end", ["signal", "step", "validate", "save_best"])
def test_a_stopped_run_resumes_to_the_last_bit(end, save_every, whole, tmp_path, monkeypatch):
    """With dropout; a signal is heard behind a step, another fault where it comes."""
    name = "step" if end == "signal" else end
    for number in (1, 5, 6, 12, 15) if name == "step" else (1, 3):
        calls, real, folder = [], getattr(trainer, name), tmp_path / str(number)

        def counted(*arguments, calls=calls, number=number, real=real):
            calls.append(1)
            if len(calls) == number and end != "signal":
                raise ZeroDivisionError
            if len(calls) == number:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments)

        folder.mkdir()
        monkeypatch.setattr(trainer, name, counted)
        with pytest.raises(Stopped if end == "signal" else ZeroDivisionError), SIGNALS.installed():
            fit(folder, save_every=save_every)
        monkeypatch.setattr(trainer, name, real)
        last = folder / "last"
        if name == "step":  # kept at the beginning, before validation and every so many steps
            kept = [k for k in range(number) if k % 5 == 0 or (save_every and k % 2 == 0)]
            steps = number if end == "signal" else max(kept)
            assert read_state(last)["progress"]["steps"] == steps
        (last / "epoch_9.weights").touch()  # what no state names is removed
        assert fit(folder, seed=5, resume=read_state(last)) == whole
        kept = (last / module.STATE_FILE).read_bytes()
        assert {p.name for p in last.iterdir()} == {module.STATE_FILE, "epoch_3.weights"}
        (folder / "best.pt").unlink()  # the state brings it back
        assert fit(folder, seed=6, resume=read_state(last)) == whole
        assert (last / module.STATE_FILE).read_bytes() == kept, "a finished one is not kept anew"


def test_no_step_before_one_without_memory_is_lost(whole, tmp_path):
    """The pass fails behind its dropout, which has drawn from the generator."""
    stage, calls = toy_stage(), []

    def without_memory(*_):
        calls.append(1)
        if stage.model.training and len(calls) == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")

    stage.model.encoder.register_forward_hook(without_memory)
    with pytest.raises(RunFault, match="memory"):
        trainer.fit(stage, 7, tmp_path)
    kept = read_state(tmp_path / "last")
    assert kept["progress"]["batches"] > 0, "in the middle of an epoch"
    assert fit(tmp_path, seed=5, resume=kept) == whole


def test_the_state_does_not_grow_with_good_epochs_whose_files_it_needs(tmp_path, monkeypatch):
    records, write = [], trainer.write_state

    def written(folder, content):
        write(folder, content)
        with zipfile.ZipFile(folder / module.STATE_FILE) as archive:
            records.append(len(archive.namelist()))

    monkeypatch.setattr(module, "LOSS_TOLERANCE", 9.0)
    monkeypatch.setattr(trainer, "write_state", written)
    mean = trainer.fit(toy_stage(epochs=6), 7, tmp_path)
    assert mean.progress.averaged == [[1, 2, 3, 4, 5, 6]]
    assert len({*records[1:]}) == 1, "the moments come with the first step"
    alone = trainer.fit(toy_stage(epochs=6), 7)
    assert all(map(torch.equal, mean.parameters, alone.parameters)), "in memory it is the same"
    path, state = tmp_path / "last" / "epoch_2.weights", read_state(tmp_path / "last")
    assert [*state["epochs"]] == [1, 2, 3, 4, 5, 6]
    weight = state["epochs"][2][0].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[::-1]))
    with pytest.raises(InputError, match=path.name):
        read_state(path.parent)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        read_state(path.parent)


def test_a_signal_to_another_process_stops_this_one_too(tmp_path, monkeypatch):
    others = iter(torch.tensor([[0.0, 0.0, k == 7] for k in range(1, 16)]))
    monkeypatch.setattr(trainer, "reduce", lambda own, _: own + next(others))
    with pytest.raises(Stopped, match="SIGTERM"):
        fit(tmp_path)
    assert read_state(tmp_path / "last")["progress"]["steps"] == 7


@pytest.mark.parametrize("other", [{"head.weight": torch.zeros(1)}, {"other": torch.ones(1)}, {}])
def test_a_state_of_another_run_is_refused_before_it_is_used(other):
    stage = toy_stage()
    state = trainer.set_up(stage)
    content, before = training_state(stage, state), everything(state)
    content["weights"] = {name: w + 1 for name, w in content["weights"].items()} | other
    content["random"] *= 1 if other else 2  # of another number of processes
    with pytest.raises(InputError, match="--resume"):
        load_training_state(stage, state, content)
    assert everything(state) == before


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 1), (40, 20), (400, 100)])
def test_each_part_learns_at_its_rate_times_the_schedule_of_transformers(epochs, warmup):
    state, total = trainer.set_up(toy_stage(epochs=epochs)), 5 * epochs
    parts = [{"params": [torch.zeros(1)], "lr": rate} for rate in (0.01, 0.01, 0.1, 0.1)]
    schedule = get_cosine_schedule_with_warmup(torch.optim.AdamW(parts), warmup, total)
    for _ in range(total):
        assert [group["lr"] for group in state.optimizer.param_groups] == schedule.get_last_lr()
        for each in (state.optimizer, state.schedule, schedule.optimizer, schedule):
            each.step()


def test_the_average_follows_the_weights_over_at_most_500_steps():
    weight, expected = nn.Parameter(torch.tensor([1.0])), 1.0
    average = WeightAverage([weight])
    for step in range(1, 6000):
        weight.data.fill_(step % 7)
        average.update(step)
        decay = min((1 + step) / (10 + step), 0.998)
        expected = decay * expected + (1 - decay) * (step % 7)
    assert average.weights[0].item() == pytest.approx(expected, abs=1e-4)


def rule_state(members):
    """Return a state in memory that knows the rule of selection alone."""
    state = SimpleNamespace(progress=Progress(), members=members, epochs={}, folder=None)
    state.kept_weights = lambda epoch: TrainState.kept_weights(state, epoch)
    return state


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_each_member_averages_its_good_epochs_and_waits_for_no_other(patience):
    table, tolerance = np.random.default_rng(0).integers(300, 330, (30, 60)), module.LOSS_TOLERANCE
    state = rule_state(range(60))
    progress, state.mean_weights = state.progress, lambda: TrainState.mean_weights(state)
    for epoch, losses in enumerate(table.astype(float), 1):
        state.average = SimpleNamespace(weights=[torch.tensor(float(epoch))] * 60)
        kept = TrainState.keep_good(state, losses, patience, None)
        assert kept == (epoch in state.epochs) == any(epoch in e for e in progress.averaged)
        progress.next_epoch()
    expected, seen = [], []
    for losses in table.T:
        end = next(k for k in range(30) if k == 29 or k - losses[: k + 1].argmin() == patience)
        seen.append(losses[: end + 1])
        expected.append(np.flatnonzero(seen[-1] <= (1 + tolerance) * seen[-1].min()) + 1)
    assert progress.averaged == [epochs.tolist() for epochs in expected]
    assert torch.stack(state.mean_weights()).numpy() == pytest.approx([e.mean() for e in expected])
    lowest = np.min(progress.losses, axis=0)
    assert lowest.tolist() == [losses.min() for losses in seen]
    assert state.epochs.keys() == {*np.concatenate(expected)}, "no other weights are kept"
    assert (table.min(axis=0) < lowest).any(), "a lower loss came too late"
    assert max(map(len, expected)) > 1


def test_weights_of_epochs_that_are_no_longer_good_are_let_go():
    state, kept = rule_state([0]), []
    state.average = SimpleNamespace(weights=[torch.zeros(1)])
    for loss in (1.0, 0.5, 0.505, 0.3):
        TrainState.keep_good(state, np.array([loss]), 9, None)
        state.progress.next_epoch()
        kept.append([*state.epochs])
    assert kept == [[1], [2], [2, 3], [4]]


@pytest.mark.parametrize(("final", "averaged"), [([2, 3, 5], [[2, 3, 5]] * 2), (None, [[5]] * 2)])
def test_without_validation_part_the_epochs_of_the_folds_are_averaged_or_the_last(final, averaged):
    state = rule_state([0, 1])
    progress = state.progress
    for epoch in range(1, 6):
        state.average = SimpleNamespace(weights=[torch.tensor(float(epoch))] * 2)
        TrainState.keep_good(state, None, 9, final)
        progress.next_epoch()
    assert progress.averaged == averaged
    means = [w.item() for w in TrainState.mean_weights(state)]
    assert means == pytest.approx([np.mean(averaged[0])] * 2)


@pytest.mark.parametrize("mean_loss", [0.401, 0.5, math.nan])
def test_a_mean_that_is_much_worse_than_the_best_epoch_gives_way_to_it(mean_loss):
    stage = toy_stage()
    state = trainer.set_up(stage)
    state.progress.losses, state.progress.averaged = [[0.5], [0.4], [0.401]], [[2, 3]]
    first = [torch.zeros_like(p) for p in state.parameters]
    state.epochs = {2: first, 3: [w + 1 for w in first]}
    state.set_best(lambda: np.array([mean_loss]))
    is_good = mean_loss < 0.5
    assert state.progress.averaged == ([[2, 3]] if is_good else [[2]])
    assert {p.unique().item() for p in state.parameters} == ({0.5} if is_good else {0.0})


def test_epochs_in_a_row_are_named_as_a_range():
    assert module.describe_epochs([7, 2, 3, 3, 4, 9, 10]) == "2 to 4, 7, 9 to 10"


def test_the_rule_that_averages_epochs_is_described_by_its_numbers(monkeypatch):
    monkeypatch.setattr(module, "LOSS_TOLERANCE", 0.07)
    monkeypatch.setattr(module, "AVERAGE_DECAY", 0.99)
    one, several = module.describe_selection(1), module.describe_selection(3)
    assert re.findall("[0-9]+", one) == re.findall("[0-9]+", several) == ["7", "100"]
    assert one != several


def test_several_processes_drop_units_of_their_own(monkeypatch):
    draws = []
    for index in (0, 1, 1):
        own = SimpleNamespace(num_processes=2, process_index=index, prepare_model=lambda each: each)
        monkeypatch.setattr(trainer, "Accelerator", lambda own=own, **_: own)
        trainer.set_up(toy_stage())
        draws.append(torch.rand(1).item())
    assert draws[0] != draws[1] == draws[2]
