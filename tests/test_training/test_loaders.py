"""Batches: each row once, in an order that seed and epoch give, of about equal length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgemma_clinical.files import InputError
from medgemma_clinical.training import loaders
from medgemma_clinical.training.loaders import (
    BUCKET,
    LengthBatches,
    batches_of,
    make_loaders,
    padding_share,
)


def lengths_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 200, rows)


@pytest.mark.parametrize("rows", [1, 16, 47, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_is_in_one_batch_and_the_number_of_batches_is_known(
    rows: int, shuffle: bool
) -> None:
    positions = np.arange(rows) + 3
    batches = LengthBatches(positions, 16, lengths_of(rows + 3), shuffle=shuffle)
    passed = list(batches)
    assert len(passed) == len(batches)
    assert max(map(len, passed)) <= 16
    assert sorted(row for batch in passed for row in batch) == positions.tolist()


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    batches = LengthBatches(np.arange(640), 16, lengths_of(640), shuffle=True)
    orders: dict[tuple[int, int], list[list[int]]] = {}
    for seed, epoch in ((0, 2), (1, 1), (0, 1), (1, 2), (2, 0), (0, 2)):
        batches.set_epoch(seed, epoch)
        order = list(batches)
        assert orders.setdefault((seed, epoch), order) == order
    assert len({str(order) for order in orders.values()}) == 5, "no seed repeats another's epoch"


def test_without_lengths_the_order_is_a_plain_shuffle() -> None:
    batches = LengthBatches(np.arange(640), 16, shuffle=True)
    batches.set_epoch(3, 1)
    expected = np.random.default_rng(np.random.SeedSequence([3, 1])).permutation(640)
    assert [row for batch in batches for row in batch] == expected.tolist()


def test_a_stopped_pass_goes_on_behind_the_batches_that_were_done() -> None:
    batches = LengthBatches(np.arange(640), 16, lengths_of(640), shuffle=True)
    batches.set_epoch(1, 5)
    whole = list(batches)
    batches.set_epoch(1, 5, done=13)
    assert list(batches) == whole[13:]
    assert len(batches) == len(whole)


def test_rows_of_about_equal_length_share_a_batch_and_batches_come_in_any_length() -> None:
    lengths = lengths_of(3200)
    batches = LengthBatches(np.arange(3200), 16, lengths, shuffle=True)
    share = padding_share(batches, lengths)
    longest = np.array([lengths[batch].max() for batch in batches])
    plain = LengthBatches(np.arange(3200), 16, shuffle=True)
    assert share < 0.1 < 0.4 < padding_share(plain, lengths)
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2
    within = longest[:BUCKET]
    assert within.tolist() != sorted(within), "the batches of a bucket come in random order"


class TwoProcesses:
    """Stands for accelerate's state in one of two processes."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index = index


@pytest.mark.parametrize("rows", [64, 66, 65, 129])
@pytest.mark.parametrize("shuffle", [False, True])
def test_two_processes_share_each_row_once(
    rows: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for index in (0, 1):
        monkeypatch.setattr(loaders, "processes", lambda index=index: TwoProcesses(index))
        batches = LengthBatches(np.arange(rows), 16, lengths_of(rows), shuffle=shuffle)
        batches.set_epoch(0, 1)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
        assert all(shares[-1]), "a process without rows would wait for the others"
    assert not shuffle or len(shares[0]) == len(shares[1]), "each step is one of both"
    together = [row for share in shares for batch in share for row in batch]
    assert sorted(together) == list(range(rows))


def test_fewer_rows_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "processes", lambda: TwoProcesses(0))
    with pytest.raises(InputError, match="1 rows train, too few for 2 processes"):
        LengthBatches(np.arange(1), 4, shuffle=True)


def test_loaders_collate_positions_and_evaluate_twice_as_many() -> None:
    split = {"train": np.array([5, 2, 9, 4]), "val": np.array([1, 7, 3, 0, 8])}
    made = make_loaders(split, 2, lambda rows: {"index": torch.tensor(rows)})
    passed = {part: [b["index"].tolist() for b in loader] for part, loader in made.items()}
    assert [len(batch) for batch in passed["train"]] == [2, 2]
    assert passed["val"] == [[1, 7, 3, 0], [8]], "in the order given"
    assert sorted(row for batch in passed["train"] for row in batch) == [2, 4, 5, 9]
    assert batches_of(made["train"]).shuffle
    assert len(made["val"]) == 2


def test_a_pass_draws_nothing_from_the_generator_of_training() -> None:
    """torch's loader would, at the start of each pass, and so once more after a restart."""
    made = make_loaders({"train": np.arange(9)}, 2, lambda rows: {"index": torch.tensor(rows)})
    before = torch.get_rng_state()
    list(made["train"])
    assert torch.equal(before, torch.get_rng_state())
