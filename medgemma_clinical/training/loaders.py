"""Batches of rows of about equal length, the same after every restart, shared over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from medgemma_clinical.distributed import processes
from medgemma_clinical.files import InputError

BUCKET = 25
"""Batches whose rows are sorted by length together: less padding, and still a random order."""


class LengthBatches(Sampler[list[int]]):
    """Positions in batches, the rows of a batch of about equal length where lengths are given.

    Training: shuffled, then sorted by length within runs of ``BUCKET`` batches, then the batches
    shuffled. Otherwise sorted throughout: no result depends on the order, except the control of
    shuffled soft tokens.

    Of several processes each gets its share of every training batch, which is then as many times
    larger, or, for evaluation, every so many-th batch.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        lengths: NDArray[np.int64] | None = None,
        *,
        shuffle: bool,
    ) -> None:
        """Keep what an order is made of.

        Args:
            rows: positions in the data set, (n,).
            batch_size: rows of a batch of one process.
            lengths: of each row of the data set, (N,), by position; None where they do not matter.
            shuffle: True for training.

        Raises:
            InputError: fewer rows train than processes share them.
        """
        self.rows = rows
        self.process, self.n_processes = processes().process_index, processes().num_processes
        self.batch_size = batch_size * (self.n_processes if shuffle else 1)
        self.lengths = lengths
        self.shuffle = shuffle
        self.set_epoch(0, 0)
        if shuffle and len(rows) < self.n_processes:
            raise InputError(
                f"{len(rows)} rows train, too few for {self.n_processes} processes: start fewer"
            )

    def set_epoch(self, seed: int, epoch: int, done: int = 0) -> None:
        """Choose the order of the next pass, which depends on no pass before.

        Args:
            seed: of the run, not negative.
            epoch: number of the pass; no other seed's epoch has the same order.
            done: batches of this process that are left out at the start, as a stopped run had
                learned from them.
        """
        self.seed, self.epoch, self.done = seed, epoch, done

    def __len__(self) -> int:
        """Return the number of batches of this process in a whole pass."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        if self.shuffle:  # a rest that cannot be shared out joins the batch before it
            return max(1, whole + (rest >= self.n_processes))
        return len(range(self.process, whole + (rest > 0), self.n_processes))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches of positions."""
        if not self.shuffle:
            yield from self._cut(self.rows)[self.process :: self.n_processes]
            return
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))
        rows = generator.permutation(self.rows)
        run = self.batch_size * BUCKET
        batches = [b for k in range(0, len(rows), run) for b in self._cut(rows[k : k + run])]
        if len(batches) > len(self):
            batches[-2:] = [batches[-2] + batches[-1]]
        if self.lengths is not None:
            batches = [batches[k] for k in generator.permutation(len(batches))]
        for batch in batches[self.done :]:
            yield batch[self.process :: self.n_processes]

    def _cut(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """Sort rows by length, where lengths are given, and cut them into batches."""
        if self.lengths is not None:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        size = self.batch_size
        return [rows[k : k + size].tolist() for k in range(0, len(rows), size)]


def make_loaders(
    split: dict[str, NDArray[np.int64]],
    batch_size: int,
    collate: Callable[[Sequence[int]], Any],
    lengths: NDArray[np.int64] | None = None,
) -> dict[str, DataLoader[Any]]:
    """Return a loader for each part of the split; "train" is shuffled by ``LengthBatches``.

    Args:
        split: positions of each part.
        batch_size: of training; evaluation needs no gradients, so it takes twice as many rows.
        collate: makes a batch of positions.
        lengths: of each row of the data set, (N,), so that rows of equal length share a batch.
    """
    loaders: dict[str, DataLoader[Any]] = {}
    for part, rows in split.items():
        trains = part == "train"
        size = batch_size if trains else 2 * batch_size
        loaders[part] = DataLoader(
            range(int(rows.max(initial=-1)) + 1),  # type: ignore[arg-type]  # a position is its own item
            batch_sampler=LengthBatches(rows, size, lengths, shuffle=trains),
            collate_fn=collate,
            # Without its own a loader draws from torch's generator, once more after a restart.
            generator=torch.Generator(),
        )
    return loaders


def batches_of(loader: DataLoader[Any]) -> LengthBatches:
    """Return the sampler of a loader of ``make_loaders``."""
    sampler = loader.batch_sampler
    assert isinstance(sampler, LengthBatches)
    return sampler


def padding_share(batches: LengthBatches, lengths: NDArray[np.int64]) -> float:
    """Return the share of padding among all tokens of one pass.

    Args:
        batches: of the pass.
        lengths: tokens of each row of the data set, (N,), by position.
    """
    passed = [lengths[batch] for batch in batches]
    return float(1 - sum(n.sum() for n in passed) / sum(len(n) * n.max() for n in passed))
