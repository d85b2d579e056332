"""Stopping, averaging and the state that training starts from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medgemma_clinical.training import train_state
from medgemma_clinical.training.train_state import (
    EarlyStopping,
    Progress,
    WeightAverage,
    set_up_training,
    swapped_weights,
)
from toy_stage import take_steps, toy_stage


@pytest.mark.parametrize("higher", [True, False])
def test_early_stopping_waits_for_patience_epochs_and_keeps_the_first_best(higher: bool) -> None:
    stopping = EarlyStopping(patience=2, higher_is_better=higher)
    sign = 1 if higher else -1
    improved = [stopping.improved(sign * score) for score in (0.6, 0.7, 0.7, 0.65)]
    assert improved == [True, True, False, False]
    assert (stopping.best, stopping.best_epoch) == (sign * 0.7, 2)
    assert stopping.exhausted


def test_the_average_starts_at_the_weights_and_follows_them() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([weight], decay=0.5)
    for value in (2.0, 3.0):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
    # decays (1 + n) / (10 + n) = 2/11 and 3/12 lie below 0.5
    expected = 3 / 12 * (2 / 11 * 1 + 9 / 11 * 2) + 9 / 12 * 3
    assert average.weights[0].item() == pytest.approx(expected)
    assert average.steps == 2
    for _ in range(20):
        average.update()
    before = average.weights[0].item()
    average.update()
    assert average.weights[0].item() == pytest.approx((before + 3) / 2), "the decay is limited"


def test_swapped_weights_come_back_after_a_fault_too() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    with swapped_weights([weight], [torch.tensor([5.0])]):
        assert weight.item() == 5.0
    assert weight.item() == 1.0
    with pytest.raises(ZeroDivisionError), swapped_weights([weight], [torch.tensor([5.0])]):
        raise ZeroDivisionError
    assert weight.item() == 1.0


def test_the_best_is_a_copy_of_the_average() -> None:
    stage = toy_stage()
    state = set_up_training(stage, torch.device("cpu"))
    take_steps(stage, state, 3)
    state.set_best()
    best = [each.clone() for each in state.best]
    assert all(map(torch.equal, best, state.average.weights))
    take_steps(stage, state, 1)
    assert all(map(torch.equal, best, state.best))
    assert not any(map(torch.equal, best, state.average.weights))


def test_the_next_epoch_starts_at_zero_but_for_history_and_skips_in_a_row() -> None:
    progress = Progress(3, 2.0, 4.0, 9.0, 2, 1, [{"epoch": 1}])
    assert progress.mean_loss == 0.5
    following = progress.next_epoch(over=True)
    assert following == Progress(skipped_in_a_row=1, history=[{"epoch": 1}], over=True)
    assert math.isnan(following.mean_loss), "an epoch without a step has no training loss"


@pytest.mark.parametrize(("skipped", "warned"), [(0, False), (2, False), (3, True)])
def test_more_than_one_percent_of_skipped_steps_is_a_warning(
    skipped: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    for step in range(200):
        for length in (3, 320 - step % 2, 5):  # three batches a step
            series = {"times": torch.zeros(2, 2), "summaries": torch.zeros(2, 900), "plan": None}
            progress.see({**series, "input_ids": torch.zeros(2, length)})
        progress.end_step(1.0, 2.0, taken=step >= skipped)
    progress.warn_of_skipped(4, 200)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    if warned:
        text = caplog.messages[0]
        assert text.startswith("epoch 4: 3 of 200 steps (1.5 %) were skipped")
        assert "in batches 319, 320 tokens" in text
        assert "attention" in text


def test_several_processes_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each process's dropout would leave out the same units."""

    class Process:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index = index

    class Accelerator:
        def __init__(self, **_: object) -> None:
            pass

        def prepare_model(self, model: nn.Module) -> nn.Module:
            return model

    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    draws = []
    for index in (0, 1):
        monkeypatch.setattr(train_state, "processes", lambda index=index: Process(index))
        set_up_training(toy_stage(), torch.device("cpu"))
        draws.append(torch.rand(1).item())
    assert draws[0] != draws[1]
